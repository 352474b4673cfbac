"""Score a checkpoint on UVRB, or a benchmark in its layout, and print the paper's Tables 1 and 2 (arXiv 2510.27571, section 4.1).

    python eval.py --ckpt runs/gve-mini                     mini-UVRB after `python -m mini render`, about a minute on 2 cores
    python eval.py --ckpt DIR_OR_HUB_ID --uvrb DIR          the released benchmark
    python eval.py --tables runs/base/results.json runs/gve-mini/results.json      several results in the same two tables
    python eval.py --published                              Table 2 recomputed from Table 1: two misprints, else within 0.0011

Writes <out>/results.json, complete or not at all, and one line per dataset to <out>/log.jsonl. Nothing here is random.
<out>/cache keeps the vectors: a run that was killed goes on where it stopped. Under torchrun the ranks share the encoding.

Protocol: vision only, uniform frames, cosine in float32, no re-ranking. Queries carry their dataset's prompt (Table 5) as system
turn, corpus items the default one. Ties rank in corpus order.

Legend: N queries, M corpus items, D embedding dim, P positives of a query.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

import uvrb
from embed import GVE, Cache, encode, join_ranks, parse_flags

TIES = "corpus order: of equal scores the item that comes first in corpus.jsonl ranks first"
TOLERANCE = 0.0011  # the paper's tables are rounded to 0.001; a mean of rounded cells is off by at most that


def flag(default, help):
    return dataclasses.field(default_factory=lambda: default, metadata={"help": help})


@dataclasses.dataclass
class Flags:
    ckpt: str = flag("runs/gve-mini", "checkpoint to score: a folder or a hub id")
    uvrb: str = flag("runs/mini/uvrb", "benchmark folder; media may lie anywhere below the folder that holds it")
    root: list[str] = flag([], "further folders for media; paths are tried relative to them too")
    datasets: list[str] = flag([], "the datasets to score; none: all that are there")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "visual tokens per frame at most, 28x28 pixels each")
    prompt_style: str = flag("", "turn that holds a query's prompt, system or user; empty: the checkpoint's own, else system")
    batch_tokens: int = flag(4096, "tokens per forward pass, padding included")
    workers: int = flag(0, "decoding processes per rank; 0 decodes in this one")
    seconds: float = flag(60.0, "time a decoding process has for a clip, in seconds")
    dtype: str = flag("", "float32 or bfloat16; empty: bfloat16 on a GPU, float32 elsewhere")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    name: str = flag("", "the model's name in the tables; empty: the last part of --ckpt")
    out: str = flag("", "folder for results.json and log.jsonl; empty: runs/<last part of --ckpt>")
    tables: list[str] = flag([], "score nothing, print the tables of these results.json files")
    published: bool = flag(False, "score nothing, recompute Table 2 from Table 1 and list the cells that disagree")


def ranks(queries, corpus, positives, pools=None, *, block=2**26):
    """Rank every query's positives by cosine in float32, ties in corpus order.

    queries (N, D), corpus (M, D), any float dtype; positives: N lists of corpus indices; pools: None to rank the whole corpus, or
    N lists of the indices to rank, positives included. Returns N ascending lists of the positives' ranks from 1, where other
    positives take up places too, as in trec_eval. About `block` scores exist at a time.
    """
    step, out = max(1, block // max(1, len(corpus))), []
    for start in range(0, len(queries), step):
        q = F.normalize(queries[start : start + step].float(), dim=-1)
        cosines = torch.cat([q @ F.normalize(c.float(), dim=-1).T for c in corpus.split(65536)], 1)  # no copy of the corpus
        assert cosines.isfinite().all(), "a NaN would compare false and so rank first"
        for i, scores in enumerate(cosines, start):  # scores (M,)
            own = positives[i]
            if pools is not None:
                pool = sorted(pools[i])  # corpus order again
                scores, own = scores[pool], [pool.index(p) for p in own]
            out.append(sorted(1 + int((scores > scores[p]).sum() + (scores[:p] == scores[p]).sum()) for p in own))
    return out


def metrics(ranks):
    """Average the retrieval metrics over queries: {"R@1", "hit@1", ..., "P@1", "MRR", "nDCG@10", "MdR"}.

    ranks: N non-empty ascending lists, each positive's rank from 1. R@k is strict recall: positives found over all P of them;
    hit@k, any positive found, is often sold as recall. MRR and MdR, the median rank, look at the first positive.
    # PAPER: does not say which of the two it means where a query has several positives, nor how it breaks ties.
    """
    def mean(of):
        return math.fsum(of(r) for r in ranks) / len(ranks)

    def dcg(at):
        return math.fsum(1 / math.log2(1 + r) for r in at if r <= 10)

    out = {}
    for k in (1, 5, 10):
        out[f"R@{k}"] = mean(lambda r, k=k: sum(x <= k for x in r) / len(r))
        out[f"hit@{k}"] = mean(lambda r, k=k: r[0] <= k)
    return out | {
        "P@1": mean(lambda r: r[0] == 1),
        "MRR": mean(lambda r: 1 / r[0]),
        "nDCG@10": mean(lambda r: dcg(r) / dcg(range(1, len(r) + 1))),
        "MdR": statistics.median(r[0] for r in ranks),
    }


def chance(metric, counts, sizes):
    """Expected R@k or P@k of a uniformly random ranking, exact. counts, sizes: per query, its positives and its candidates."""
    kind, k = metric.split("@")
    # A positive is among the first k of M with probability k/M: recall's mean. Each of the first k is a positive with P/M.
    values = [min(1, int(k) / m) if kind == "R" else p / m for p, m in zip(counts, sizes, strict=True)]
    return math.fsum(values) / len(values)


def ceiling(metric, counts):
    """Best possible R@k or P@k: with P positives, min(k, P) of them can be among the first k. counts: positives per query."""
    kind, k = metric.split("@")
    return math.fsum(min(int(k), p) / (p if kind == "R" else int(k)) for p in counts) / len(counts)


def score(bench, queries, corpus, lost_queries=(), lost_corpus=()):
    """Score one dataset: its entry of results.json.

    bench: uvrb.Bench; queries (N, D), corpus (M, D); lost_*: indices without a vector, media missing or damaged. A query counts
    only if it and all its positives have one; lost distractors leave the ranking. "complete": the score may enter an average.
    """
    metric, lost_corpus = uvrb.DATASETS[bench.name].metric, set(lost_corpus)
    scored = [i for i, own in enumerate(bench.positives) if i not in lost_queries and not lost_corpus.intersection(own)]
    kept = [j for j in range(len(bench.corpus)) if j not in lost_corpus]
    expected, expected_corpus = bench.expected[0], bench.expected[1] or len(bench.corpus)
    entry = {"metric": metric, "score": None, "chance": None, "ceiling": None, "n": len(scored), "expected": expected,
             "corpus": len(kept), "expected_corpus": expected_corpus, "pooled": bench.pools is not None,
             "complete": len(scored) == expected and len(kept) == expected_corpus}
    if scored:
        new = {old: j for j, old in enumerate(kept)}
        positives = [[new[p] for p in bench.positives[i]] for i in scored]
        pools = None if bench.pools is None else [[new[p] for p in bench.pools[i] if p in new] for i in scored]
        counts, sizes = [len(p) for p in positives], [len(p) for p in pools] if pools else [len(kept)] * len(scored)
        values = metrics(ranks(queries[scored], corpus[kept], positives, pools))
        entry |= {"score": values[metric], "chance": chance(metric, counts, sizes), "ceiling": ceiling(metric, counts)} | values
    return entry


def summarise(benchmark, model, protocol, datasets):
    """Make results.json's content: only complete datasets enter abilities and averages, and what needs another is None."""
    means = uvrb.abilities({name: entry["score"] for name, entry in datasets.items() if entry["complete"]})
    averages = {name: means.pop(name) for name in ("AVG-D", "AVG-A")}
    return {"benchmark": benchmark, "model": model, "protocol": protocol, "datasets": datasets, "abilities": means, **averages}


def embed(gve, rows, instruction, flags, desc, cache=None):
    """Encode the items of rows, equal ones once: (vectors (n, D), {index: "file:line: reason"} of those that have no vector)."""
    vectors, failed = encode(gve, [row["item"] for row in rows], instruction, batch_tokens=flags.batch_tokens,
                             workers=flags.workers, seconds=flags.seconds, frames=flags.frames, max_tokens=flags.max_tokens,
                             cache=cache, desc=desc)
    for i in (~vectors.isfinite().all(1)).nonzero().flatten().tolist():
        if i not in failed:
            raise ValueError(f"{rows[i]['where']}: {flags.ckpt} gives a vector that is not finite")
    return vectors, {i: f"{rows[i]['where']}: {reason}" for i, reason in failed.items()}


def evaluate(gve, benches, flags, report, cache=None):
    """Encode and score every dataset: {name: entry of results.json}. report(bench, entry, reasons of failed items) after each."""
    # All corpora in one call: CRB-G, -S and -T, or VDC-O and -D, hold the same videos.
    vectors, failed = embed(gve, [row for bench in benches for row in bench.corpus], None, flags, "corpora", cache)
    entries, offset = {}, 0
    for bench in benches:
        queries, lost = embed(gve, bench.queries, uvrb.DATASETS[bench.name].prompt, flags, f"{bench.name} queries", cache)
        own = range(offset, offset + len(bench.corpus))
        lost_corpus = {i - offset: reason for i, reason in failed.items() if i in own}
        entries[bench.name] = score(bench, queries, vectors[own.start : own.stop], lost, lost_corpus)
        report(bench, entries[bench.name], [*lost.values(), *lost_corpus.values()])
        offset = own.stop
    return entries


def fingerprint(folder):
    """SHA-256 over a checkpoint folder's safetensors files, None for a hub id: equal weights, equal print. A second per GB."""
    digest, files = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def protocol(gve, flags):
    """Everything that a score depends on besides the benchmark's files."""
    return {
        "checkpoint": flags.ckpt, "sha256": fingerprint(flags.ckpt), "base": str(gve.base), "base_sha256": fingerprint(gve.base),
        "step": gve.info.get("step"), "commit": gve.info.get("commit"), "similarity": "cosine, float32", "ties": TIES,
        "frames": flags.frames, "max_tokens": flags.max_tokens,
        "max_length": inspect.signature(encode).parameters["max_length"].default,
        "prompt": f"queries: their dataset's prompt in the {gve.prompt_style} turn; corpus: the default system turn alone",
        "dtype": str(next(gve.core.parameters()).dtype).removeprefix("torch."), "device": str(gve.device),
        "batch_tokens": flags.batch_tokens, "torch": torch.__version__, "transformers": transformers.__version__,
    }


# ---- tables ----

def published():
    """The paper's numbers (published.json beside this file)."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def draw(title, head, groups):
    """Print rows of strings as an aligned table: first column left, the others right, a rule between groups."""
    groups = [head, *(group for group in groups if group)]
    widths = [max(len(row[i]) for group in groups for row in group) for i in range(len(head[0]))]
    print(f"\n{title}")
    for group in groups:
        print("-" * (sum(widths) + 2 * len(widths) - 2))
        for row in group:
            print("  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip())


def number(x, mark=""):
    return "-" if x is None else f"{x:.3f}".removeprefix("0") + mark


def print_tables(results):
    """Print Tables 1 and 2: the published rows, those of `results` (contents of results.json files), then chance and ceiling."""
    paper, names = published(), list(uvrb.DATASETS)
    for benchmark in dict.fromkeys(r["benchmark"] for r in results):
        ours = [r for r in results if r["benchmark"] == benchmark]
        # Chance and ceiling belong to the data: a row of each, from whichever result has the dataset whole.
        whole = {name: entry for r in ours for name, entry in r["datasets"].items() if entry["complete"]}
        bounds = {kind: {name: entry[kind] for name, entry in whole.items()} for kind in ("chance", "ceiling")}
        title = benchmark if benchmark == "UVRB" else f"{benchmark} (the published rows are UVRB's: another benchmark)"
        rows = []
        for r in ours:
            marks = {name: "" if entry["complete"] else "*" for name, entry in r["datasets"].items()}
            cells = [number(r["datasets"][name]["score"], marks[name]) if name in marks else "-" for name in names]
            rows.append([r["model"], number(r["AVG-D"]), *cells])
        bounds = {kind: cells | {"AVG": uvrb.abilities(cells)["AVG-D"]} for kind, cells in bounds.items()}
        metric_row = ["", "", *(uvrb.DATASETS[name].metric for name in names)]
        draw(f"Table 1, {title}: score per dataset", [["model", "AVG", *names], metric_row], [
            [[model, *(number(cells[name]) for name in ("AVG", *names))] for model, cells in paper["table1"].items()], rows,
            [[kind, *(number(cells.get(name)) for name in ("AVG", *names))] for kind, cells in bounds.items()],
        ])
        draw(f"Table 2, {title}: score per ability", [["model", "AVG", *uvrb.ABILITIES]], [
            [[model, *(number(cells[a]) for a in ("AVG", *uvrb.ABILITIES))] for model, cells in paper["table2"].items()],
            [[r["model"], number(r["AVG-A"]), *(number(r["abilities"][a]) for a in uvrb.ABILITIES)] for r in ours],
            [[kind, *(number(uvrb.abilities(cells)[a]) for a in ("AVG-A", *uvrb.ABILITIES))] for kind, cells in bounds.items()],
        ])
        for r in ours:
            p, absent = r["protocol"], [name for name in names if name not in r["datasets"]]
            limits = f"{p['frames']} frames, {p['max_tokens']} tokens per frame, {p['dtype']}"
            print(f"{r['model']}: {p['checkpoint']}, step {p['step']}, {limits}")
            for name, e in r["datasets"].items():
                if not e["complete"]:
                    part = f"{e['n']}/{e['expected']} queries, {e['corpus']}/{e['expected_corpus']} videos"
                    print(f"  * {name}: {part}; it enters no average")
                if uvrb.DATASETS[name].task == "CMP" and not e["pooled"]:
                    print(f"  {name}: no pools in its instances, so its whole corpus is ranked (the paper: 10 candidates)")
            if absent:
                print(f"  not scored: {', '.join(absent)}; averages over them are left out")


def disagreements(paper):
    """Recompute Table 1's AVG and Table 2 from Table 1's cells: {(table, model, column): (printed, computed)} that differ."""
    found = {}
    for model, cells in paper["table1"].items():
        means, table2 = uvrb.abilities(cells), paper["table2"][model]
        found["Table 1", model, "AVG"] = cells["AVG"], means["AVG-D"]
        found["Table 2", model, "AVG"] = table2["AVG"], means["AVG-A"]
        found |= {("Table 2", model, a): (table2[a], means[a]) for a in uvrb.ABILITIES}
    return {cell: pair for cell, pair in found.items() if abs(pair[0] - pair[1]) > TOLERANCE}


def print_published():
    """Print Table 2 as recomputed from Table 1, and the cells where the paper prints something else."""
    paper, rows = published(), []
    wrong = disagreements(paper)
    for model, cells in paper["table1"].items():
        means = uvrb.abilities(cells)
        columns = [("Table 1", "AVG", "AVG-D"), ("Table 2", "AVG", "AVG-A"), *(("Table 2", a, a) for a in uvrb.ABILITIES)]
        rows.append([model, *(number(means[key], "!" * ((table, model, column) in wrong)) for table, column, key in columns)])
    draw(f"Table 2, UVRB: recomputed from the cells of Table 1; ! where the paper prints another value (off by > {TOLERANCE})",
         [["model", "AVG-D", "AVG-A", *uvrb.ABILITIES]], [rows])
    print(f"{len(wrong)} printed cells do not follow from Table 1's cells:")
    for (table, model, column), (old, new) in wrong.items():
        print(f"  {table}, {model}, {column}: printed {old:.3f}, its cells give {new:.4f}")


# ---- command ----

def save(path, content):
    """Write JSON under a temporary name and rename, so that no half-written file ever has the final one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(flags):
    if flags.published:
        return print_published()
    if flags.tables:
        return print_tables([json.loads(Path(path).read_text(encoding="utf-8")) for path in flags.tables])
    benchmark, _ = uvrb.benchmark(flags.uvrb)
    names = flags.datasets or [name for name in uvrb.DATASETS if uvrb.folder_of(flags.uvrb, name)]
    if not names:
        raise ValueError(f"{flags.uvrb}: none of the 16 datasets is here ({', '.join(uvrb.DATASETS)})")
    benches = [uvrb.read(flags.uvrb, name, flags.root) for name in dict.fromkeys(names)]
    rank = join_ranks()
    gve = GVE.from_pretrained(flags.ckpt, dtype=flags.dtype or None, device=flags.device, prompt_style=flags.prompt_style)
    model, out = flags.name or Path(flags.ckpt).name, Path(flags.out or Path("runs") / Path(flags.ckpt).name)
    out.mkdir(parents=True, exist_ok=True)

    def report(bench, entry, failed):
        if rank > 0:
            return
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"event": "eval", "model": model, "dataset": bench.name, **entry, "failed": failed}) + "\n")
        print(f"{bench.name:10}  {entry['metric']:4}  {number(entry['score']):>5}  (chance {number(entry['chance'])}, "
              f"ceiling {number(entry['ceiling'])}, {entry['n']}/{entry['expected']} queries, {entry['corpus']} videos)")
        for reason in failed[:3]:
            print(f"  no vector: {reason}")
        if failed[3:]:
            print(f"  no vector: {len(failed) - 3} more, listed in {out / 'log.jsonl'}")

    result = summarise(benchmark, model, protocol(gve, flags), evaluate(gve, benches, flags, report, Cache(out / "cache", gve)))
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    save(out / "results.json", result)
    print_tables([result])
    print(f"{out / 'results.json'}")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:  # what a user typed or a file held; the message names it
        sys.exit(f"eval.py: {error}")
