"""Score any model on UVRB, or a benchmark in its layout, and show every table and figure of arXiv 2510.27571.

    python eval.py --ckpt runs/gve-mini                     mini-UVRB after `python -m mini render`, about a minute on 2 cores
    python eval.py --ckpt DIR_OR_HUB_ID --uvrb DIR          the released benchmark; for Table 11 a DIR with K700, UCF101, ...
    python eval.py --encoder my.py:embed --uvrb DIR         your model, see from_function; --embeddings DIR: see from_folder
    python eval.py --ckpt X --frames 8 16 48                Figure 12; --max-tokens 200 400 800: Figure 13
    python eval.py --table 3 --results A.json B.json C.json     Tables 1-11, --figure 2 6 7 8 11 12 13: published, then yours
    python eval.py --published                              what does not follow from the paper's own cells

Writes <out>/results.json, whole or not at all, log.jsonl, and MTEB-shaped mteb/<DS>.json; tables as .txt, .md, .csv and .tex,
figures as .png (extras/tables.py). <out>/cache keeps the vectors: a run that was killed goes on where it stopped. Under torchrun
the ranks share the encoding.

Protocol: vision only, uniform frames, cosine in float32, no re-ranking. Queries carry their dataset's prompt (Table 5) as system
turn, corpus items the default one. Ties rank in corpus order.

Legend: N queries, M corpus items, D embedding dim, P positives of a query.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

import uvrb
from embed import encode
from model import GVE
from support.cache import VectorCache
from support.files import read_jsonl
from support.flags import flag, parse_flags
from support.ranks import join_ranks, leave_ranks
from tables import cell, print_published, show


@dataclasses.dataclass
class Flags:
    ckpt: str = flag("runs/gve-mini", "checkpoint to score: a folder or a hub id")
    encoder: str = flag("", "score a function instead, FILE.py:NAME")
    embeddings: str = flag(
        "", "score a folder of vectors instead, <DS>/vectors.npy and <DS>/items.jsonl"
    )
    uvrb: str = flag(
        "runs/mini/uvrb", "benchmark folder; media may lie anywhere below the folder that holds it"
    )
    root: list[str] = flag([], "further folders for media; paths are tried relative to them too")
    datasets: list[str] = flag([], "the datasets to score; none: all that are there")
    frames: list[int] = flag([8], "frames per video, even; several are scored one after the other")
    max_tokens: list[int] = flag(
        [200], "visual tokens per frame at most, 28x28 pixels each; several likewise"
    )
    prompt_style: str = flag(
        "",
        "turn that holds a query's prompt, system or user; empty: the checkpoint's own, else system",
    )
    batch_tokens: int = flag(4096, "tokens per forward pass, padding included")
    batch_size: int = flag(32, "items per call of --encoder's function")
    workers: int = flag(0, "decoding processes per rank; 0 decodes in this one")
    seconds: float = flag(60.0, "time a decoding process has for a clip, in seconds")
    dtype: str = flag("", "float32 or bfloat16; empty: bfloat16 on a GPU, float32 elsewhere")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    bootstrap: int = flag(0, "resamples of the queries for 95 % intervals, say 1000; 0: none")
    trec: bool = flag(False, "also write TREC files, <out>/trec/<DS>.run and .qrels")
    name: str = flag("", "the model's name in the tables; empty: the last part of what is scored")
    out: str = flag(
        "",
        "folder to write; empty: runs/<last part of what is scored>, or runs/tables where nothing is",
    )
    table: list[str] = flag([], "score nothing, show these of Tables 1-11")
    figure: list[str] = flag([], "score nothing, show these of Figures 2 6 7 8 11 12 13")
    results: list[str] = flag(
        [], "score nothing, show these results.json files; alone: in Tables 1 and 2"
    )
    published: bool = flag(
        False,
        "score nothing, recompute the paper's cells from each other and list those that disagree",
    )


# ---- metrics ----


def cosines(queries, corpus, pools=None, *, block=2**26):
    """Yield per query (corpus indices of its candidates in corpus order (C,) int64, their cosines (C,) float32); see ranks."""
    step, everything = max(1, block // max(1, len(corpus))), torch.arange(len(corpus))
    for start in range(0, len(queries), step):
        q = F.normalize(queries[start : start + step].float(), dim=-1)
        rows = torch.cat(
            [q @ F.normalize(c.float(), dim=-1).T for c in corpus.split(65536)], 1
        )  # no copy of the corpus
        assert rows.isfinite().all(), "a NaN would compare false and so rank first"
        for i, scores in enumerate(rows, start):  # scores (M,)
            pool = torch.tensor(sorted(pools[i])) if pools else everything
            yield pool, scores[pool] if pools else scores


def ranks(queries, corpus, positives, pools=None, *, block=2**26):
    """Rank every query's positives by cosine in float32, ties in corpus order.

    queries (N, D), corpus (M, D), any float dtype; positives: N lists of corpus indices; pools: None to rank the whole corpus, or
    N lists of the indices to rank, positives included. Returns N ascending lists of the positives' ranks from 1, where other
    positives take up places too, as in trec_eval. About `block` scores exist at a time.
    """
    out = []
    for own, (pool, scores) in zip(
        positives, cosines(queries, corpus, pools, block=block), strict=True
    ):
        at = torch.searchsorted(pool, torch.tensor(own, dtype=torch.int64)).tolist()
        out.append(
            sorted(
                1 + int((scores > scores[p]).sum() + (scores[:p] == scores[p]).sum()) for p in at
            )
        )
    return out


def query_metrics(ranks):
    """Metrics of one query from its positives' ascending ranks from 1 (P,); ValueError where it has none.

    R@k is strict recall: positives found over all P of them; hit@k, any positive found, is often sold as recall. MRR, MdR and MnR
    look at the first positive. # PAPER: does not say which of the two it means, nor how it breaks ties.
    """
    if not ranks:
        raise ValueError("a query without a positive has no metrics")
    dcg, ideal = (
        sum(1 / math.log2(1 + r) for r in at if r <= 10) for at in (ranks, range(1, len(ranks) + 1))
    )
    recall = {f"R@{k}": sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)}
    hit = {f"hit@{k}": float(ranks[0] <= k) for k in (1, 5, 10)}
    return {
        **recall,
        **hit,
        "P@1": hit["hit@1"],
        "MRR": 1 / ranks[0],
        "nDCG@10": dcg / ideal,
        "MdR": ranks[0],
        "MnR": ranks[0],
    }


def metrics(ranks):
    """Average query_metrics over N queries; MdR is the median, MnR the mean of the first positives' ranks."""
    rows = [query_metrics(r) for r in ranks]
    return {
        name: float((np.median if name == "MdR" else np.mean)([row[name] for row in rows]))
        for name in rows[0]
    }


def chance(metric, counts, sizes):
    """Expected R@k or P@k of a uniformly random ranking, exact. counts, sizes: per query, its positives and its candidates."""
    kind, k = metric.split("@")
    # A positive is among the first k of M with probability k/M: recall's mean. Each of the first k is a positive with P/M.
    values = [
        min(1, int(k) / m) if kind == "R" else p / m for p, m in zip(counts, sizes, strict=True)
    ]
    return math.fsum(values) / len(values)


def ceiling(metric, counts):
    """Best possible R@k or P@k: with P positives, min(k, P) of them can be among the first k. counts: positives per query."""
    kind, k = metric.split("@")
    return math.fsum(min(int(k), p) / (p if kind == "R" else int(k)) for p in counts) / len(counts)


def score(bench, queries, corpus, lost_queries=(), lost_corpus=(), *, bootstrap=0, trec=None):
    """Score one dataset: its entry of results.json.

    bench: uvrb.Bench; queries (N, D), corpus (M, D); lost_*: indices without a vector, media missing or damaged. A query counts
    only if it and all its positives have one; lost distractors leave the ranking. "complete": the score may enter an average.
    bootstrap: adds so many "draws", scores of resampled queries; trec: path without suffix of TREC files.
    """
    metric, lost_corpus = uvrb.ALL[bench.name].metric, set(lost_corpus)
    scored = [
        i
        for i, own in enumerate(bench.positives)
        if i not in lost_queries and not lost_corpus.intersection(own)
    ]
    kept = [j for j in range(len(bench.corpus)) if j not in lost_corpus]
    expected, expected_corpus = (
        bench.expected[0] or len(bench.queries),
        bench.expected[1] or len(bench.corpus),
    )
    entry = {
        "metric": metric,
        "score": None,
        "chance": None,
        "ceiling": None,
        "n": len(scored),
        "expected": expected,
        "corpus": len(kept),
        "expected_corpus": expected_corpus,
        "pooled": bench.pools is not None,
        "complete": len(scored) == expected and len(kept) == expected_corpus,
    }
    if scored:
        new = {old: j for j, old in enumerate(kept)}
        positives = [[new[p] for p in bench.positives[i]] for i in scored]
        pools = (
            None
            if bench.pools is None
            else [[new[p] for p in bench.pools[i] if p in new] for i in scored]
        )
        counts, sizes = (
            [len(p) for p in positives],
            [len(p) for p in pools] if pools else [len(kept)] * len(scored),
        )
        found = ranks(queries[scored], corpus[kept], positives, pools)
        values = metrics(found)
        entry |= {
            "score": values[metric],
            "chance": chance(metric, counts, sizes),
            "ceiling": ceiling(metric, counts),
        } | values
        if bootstrap:  # the name seeds it, so that datasets are resampled independently
            rng, each = (
                np.random.default_rng(zlib.crc32(bench.name.encode())),
                [query_metrics(r)[metric] for r in found],
            )
            entry["draws"] = [float(rng.choice(each, len(each)).mean()) for _ in range(bootstrap)]
        if trec:
            write_trec(
                trec,
                [bench.queries[i]["id"] for i in scored],
                [bench.corpus[j]["id"] for j in kept],
                positives,
                cosines(queries[scored], corpus[kept], pools),
            )
    return entry


def write_trec(path, queries, corpus, positives, rankings, depth=1000):
    """Write <path>.run and <path>.qrels from ids, positives and (candidates, cosines) per query; spaces in ids become %20.

    trec_eval sorts by score again and puts the greater id first among equals, where the file has corpus order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    queries, corpus = ([re.sub(r"\s", "%20", key) for key in ids] for ids in (queries, corpus))
    with (
        open(f"{path}.run", "w", encoding="utf-8") as run,
        open(f"{path}.qrels", "w", encoding="utf-8") as qrels,
    ):
        for query, own, (pool, scores) in zip(queries, positives, rankings, strict=True):
            order = scores.argsort(descending=True, stable=True)[:depth].tolist()
            run.writelines(
                f"{query} Q0 {corpus[pool[j]]} {n} {scores[j].item()!r} nanoGVE\n"
                for n, j in enumerate(order, 1)
            )
            qrels.writelines(f"{query} 0 {corpus[p]} 1\n" for p in own)


def summarise(benchmark, model, protocol, datasets):
    """Make results.json's content: only complete datasets enter abilities and averages, and what needs another is None."""
    draws = {name: entry.pop("draws") for name, entry in datasets.items() if "draws" in entry}
    means = uvrb.abilities(
        {name: entry["score"] for name, entry in datasets.items() if entry["complete"]}
    )
    averages = {name: means.pop(name) for name in ("AVG-D", "AVG-A")}
    result = {
        "benchmark": benchmark,
        "model": model,
        "protocol": protocol,
        "datasets": datasets,
        "abilities": means,
        **averages,
    }
    if draws:
        whole = {name: values for name, values in draws.items() if datasets[name]["complete"]}
        rows = [
            uvrb.abilities(dict(zip(whole, draw, strict=True)))
            for draw in zip(*whole.values(), strict=True)
        ]
        draws |= {
            a: [row[a] for row in rows]
            for a in {**means, **averages}
            if rows and rows[0][a] is not None
        }
        result["ci95"] = {
            column: np.percentile(values, (2.5, 97.5)).tolist() for column, values in draws.items()
        }
    return result


def mteb(name, entry, revision, seconds):
    """Shape a dataset's entry as an MTEB 2.x result file. revision: of the benchmark's files; seconds: evaluation time."""
    words = {"R": "recall_at_", "hit": "hit_rate_at_", "P": "precision_at_", "nDCG": "ndcg_at_"}
    scores = {
        words[metric.split("@")[0]] + metric.split("@")[1]: value
        for metric, value in entry.items()
        if "@" in metric
    }
    scores |= {
        "mrr": entry["MRR"],
        "main_score": entry["score"],
        "hf_subset": "default",
        "languages": ["eng-Latn"],
    }
    return {
        "dataset_revision": revision,
        "task_name": name,
        "mteb_version": None,
        "scores": {"test": [scores]},
        "evaluation_time": seconds,
        "kg_co2_emissions": None,
    }


# ---- vectors: a source yields (bench, queries (N, D), corpus (M, D), {query index: why it has none}, {corpus index: why}) ----


def embed(gve, cache, flags, rows, instruction, desc):
    """Encode the items of rows, equal ones once: (vectors (n, D), {index: "file:line: reason"} of those that have no vector)."""
    vectors, failed = encode(
        gve,
        [row["item"] for row in rows],
        instruction,
        batch_tokens=flags.batch_tokens,
        workers=flags.workers,
        seconds=flags.seconds,
        frames=flags.frames[0],
        max_tokens=flags.max_tokens[0],
        cache=cache,
        desc=desc,
    )
    for i in (~vectors.isfinite().all(1)).nonzero().flatten().tolist():
        if i not in failed:
            raise ValueError(f"{rows[i]['where']}: {flags.ckpt} gives a vector that is not finite")
    return vectors, {i: f"{rows[i]['where']}: {reason}" for i, reason in failed.items()}


def from_model(encode_rows, benches):
    """Encode with encode_rows(rows, instruction, desc) -> (vectors (n, D), {index: reason})."""
    # All corpora in one call: CRB-G, -S and -T, or VDC-O and -D, hold the same videos.
    vectors, failed = encode_rows(
        [row for bench in benches for row in bench.corpus], None, "corpora"
    )
    offset = 0
    for bench in benches:
        queries, lost = encode_rows(
            bench.queries, uvrb.ALL[bench.name].prompt, f"{bench.name} queries"
        )
        own = range(offset, offset + len(bench.corpus))
        yield (
            bench,
            queries,
            vectors[own.start : own.stop],
            lost,
            {i - offset: r for i, r in failed.items() if i in own},
        )
        offset = own.stop


def from_function(spec, size):
    """Make encode_rows of FILE.py:NAME, a function (items, instruction) -> (n, D) array; a row of NaN says that the item failed.

    items: at most `size` dicts with any of "text", "image" and "video", media as absolute paths or with spans as in data.py,
    equal ones once; instruction: the dataset's prompt (Table 5) for queries, None for the corpus.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--encoder {spec}: wanted FILE.py:FUNCTION")
    found = importlib.util.spec_from_file_location("encoder", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"--encoder {spec}: {path} has no function {name!r}")

    def encode_rows(rows, instruction, desc):
        keys = [json.dumps(row["item"], sort_keys=True) for row in rows]
        items = dict(zip(keys, (row["item"] for row in rows), strict=True))
        batches = [list(items.values())[i : i + size] for i in range(0, len(items), size)]
        made = [
            torch.as_tensor(function(batch, instruction)).detach().float().cpu()
            for batch in batches
        ]
        if wrong := [
            (tuple(m.shape), len(b))
            for m, b in zip(made, batches, strict=True)
            if m.ndim != 2 or len(m) != len(b)
        ]:
            raise ValueError(
                f"--encoder {spec}: shape {wrong[0][0]} for {wrong[0][1]} items; wanted ({wrong[0][1]}, D)"
            )
        place = {key: i for i, key in enumerate(items)}
        vectors = torch.cat(made)[[place[key] for key in keys]]
        bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        return vectors, {
            i: f"{rows[i]['where']}: {spec} gives a vector that is not finite" for i in bad
        }

    return encode_rows


def from_folder(folder, benches):
    """Read <folder>/<DS>/vectors.npy, floats (n, D), and items.jsonl beside it: n lines {"id": str, "kind": "query" | "corpus"}.

    Line i names row i by the benchmark's id. Ids that the benchmark lacks are printed and left out; absent ones and NaN rows
    count as failed. Lengths other than 1 are printed: scores are cosines. ValueError: a repeated id, an unknown kind, a row of
    length 0, another number of rows, or another D than the dataset before.
    """
    dim = None
    for bench in benches:
        file, lines, rows = (
            Path(folder) / bench.name / "vectors.npy",
            [],
            {"query": {}, "corpus": {}},
        )
        array = np.load(file, mmap_mode="r")
        for number, row in read_jsonl(file.with_name("items.jsonl")):
            lines.append(number)
            if (
                row.get("kind") not in rows
                or not isinstance(row.get("id"), str)
                or row["id"] in rows[row["kind"]]
            ):
                raise ValueError(
                    f'{file.parent}/items.jsonl:{number}: {row}; wanted a new "id" and "kind": "query" or "corpus"'
                )
            rows[row["kind"]][row["id"]] = len(lines) - 1
        if (
            array.dtype.kind != "f"
            or array.ndim != 2
            or array.shape != (len(lines), dim or array.shape[1])
        ):
            wanted = f"({len(lines)}, {dim or 'D'}), a row per line of items.jsonl"
            raise ValueError(f"{file}: {array.dtype} {array.shape}; wanted floats {wanted}")
        dim = array.shape[1]
        out, lost = [], []
        for kind, wanted in (("query", bench.queries), ("corpus", bench.corpus)):
            if unknown := sorted(rows[kind].keys() - {row["id"] for row in wanted}):
                print(
                    f"{file.parent}: {len(unknown)} {kind} ids are not in {bench.name} and left out: {', '.join(unknown[:3])}"
                )
            at = [rows[kind].get(row["id"]) for row in wanted]
            vectors = np.full((len(at), array.shape[1]), np.nan, np.float32)
            there = [j for j, i in enumerate(at) if i is not None]
            vectors[there] = array[[at[j] for j in there]]
            norms = np.linalg.norm(vectors, axis=1)
            if (norms == 0).any():
                raise ValueError(
                    f"{file.parent}/items.jsonl:{lines[at[int((norms == 0).argmax())]]}: its vector has length 0"
                )
            if (np.abs(norms - 1) > 0.01).any():
                print(
                    f"{file}: {kind} vectors are {np.nanmin(norms):.3g} to {np.nanmax(norms):.3g} long and normalised here"
                )
            out.append(torch.from_numpy(vectors))
            lost.append(
                {
                    j: f"{row['where']}: {file} has no finite vector of {kind} {row['id']!r}"
                    for j, row in enumerate(wanted)
                    if not np.isfinite(norms[j])
                }
            )
        yield bench, *out, *lost


def fingerprint(folder, pattern="*.safetensors"):
    """SHA-256 over a folder's files, None where there are none (a hub id): equal weights, equal print. A second per GB."""
    digest, files = hashlib.sha256(), sorted(Path(folder).glob(pattern))
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def protocol(gve, flags):
    """Everything that a score depends on besides the benchmark's files, and what the checkpoint says of its training."""
    drawn = gve.info.get("data", {}).values()
    return {
        "checkpoint": flags.ckpt,
        "sha256": fingerprint(flags.ckpt),
        "base": str(gve.base),
        "base_sha256": fingerprint(gve.base),
        "step": gve.info.get("step"),
        "commit": gve.info.get("commit"),
        "similarity": "cosine, float32",
        "ties": "corpus order: of equal scores the item that comes first in corpus.jsonl ranks first",
        "frames": flags.frames[0],
        "max_tokens": flags.max_tokens[0],
        "max_length": inspect.signature(encode).parameters["max_length"].default,
        "prompt": f"queries: their dataset's prompt in the {gve.prompt_style} turn; corpus: the default system turn alone",
        "dtype": str(next(gve.core.parameters()).dtype).removeprefix("torch."),
        "device": str(gve.device),
        "batch_tokens": flags.batch_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in gve.parameters()),
        "training": gve.info.get("config", {}),
        "pairs": sum(min(source["rows"], source["drawn"]) for source in drawn) or None,
    }


# ---- command ----


def save(path, content):
    """Write JSON under a temporary name and rename, so that no half-written file ever has the final one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run(source, benchmark, model, protocol, flags, out):
    """Score what `source` yields and write everything but tables to `out`; returns results.json's content."""
    entries, began = {}, time.time()
    for bench, queries, corpus, lost, lost_corpus in source:
        trec = out / "trec" / bench.name if flags.trec else None
        entry = entries[bench.name] = score(
            bench, queries, corpus, lost, lost_corpus, bootstrap=flags.bootstrap, trec=trec
        )
        failed = [*lost.values(), *lost_corpus.values()]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            line = {key: value for key, value in entry.items() if key != "draws"}
            log.write(
                json.dumps(
                    {
                        "event": "eval",
                        "model": model,
                        "dataset": bench.name,
                        **line,
                        "failed": failed,
                    }
                )
                + "\n"
            )
        if entry["n"]:
            revision = fingerprint(uvrb.folder_of(flags.uvrb, bench.name), "*.jsonl")
            save(
                out / "mteb" / f"{bench.name}.json",
                mteb(bench.name, entry, revision, time.time() - began),
            )
        print(
            f"{bench.name:10}  {entry['metric']:4}  {cell(entry['score']):>5}  (chance {cell(entry['chance'])}, "
            f"ceiling {cell(entry['ceiling'])}, {entry['n']}/{entry['expected']} queries, {entry['corpus']} videos)"
        )
        for reason in failed[:3]:
            print(f"  no vector: {reason}")
        if failed[3:]:
            print(f"  no vector: {len(failed) - 3} more, listed in {out / 'log.jsonl'}")
        began = time.time()
    result = summarise(benchmark, model, protocol, entries)
    save(out / "results.json", result)
    return result


def main(flags):
    if flags.published:
        return print_published()
    if flags.table or flags.figure or flags.results:
        results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in flags.results]
        names = [f"Table {n}" for n in flags.table] + [f"Figure {n}" for n in flags.figure]
        return show(
            names or ["Table 1", "Table 2"],
            results,
            flags.out or "runs/tables",
            flags.uvrb,
            flags.root,
        )
    if len(flags.frames) > 1 and len(flags.max_tokens) > 1:
        raise ValueError(
            "--frames and --max-tokens: one of the two may have several values, the other stays"
        )
    benchmark, _ = uvrb.benchmark(flags.uvrb)
    names = flags.datasets or [name for name in uvrb.ALL if uvrb.folder_of(flags.uvrb, name)]
    if not names:
        raise ValueError(
            f"{flags.uvrb}: none of the 16 datasets is here, nor one of Table 11's ({', '.join(uvrb.ALL)})"
        )
    benches = [uvrb.read(flags.uvrb, name, flags.root) for name in dict.fromkeys(names)]
    what = flags.embeddings or flags.encoder or flags.ckpt
    model = flags.name or Path(what).name
    out, known = (
        Path(flags.out or Path("runs") / Path(what).name),
        {"checkpoint": what, "similarity": "cosine, float32"},
    )
    if flags.embeddings:
        results = [run(from_folder(flags.embeddings, benches), benchmark, model, known, flags, out)]
    elif flags.encoder:
        encode_rows = from_function(flags.encoder, flags.batch_size)
        results = [run(from_model(encode_rows, benches), benchmark, model, known, flags, out)]
    else:
        (rank, _, device), results = join_ranks(flags.device), []
        gve = GVE.from_pretrained(
            flags.ckpt,
            dtype=flags.dtype or None,
            device=device,
            prompt_style=flags.prompt_style,
        )
        cache = VectorCache(out / "cache", gve)
        for frames, tokens in itertools.product(flags.frames, flags.max_tokens):
            one, label, folder = (
                dataclasses.replace(flags, frames=[frames], max_tokens=[tokens]),
                model,
                out,
            )
            if len(flags.frames) + len(flags.max_tokens) > 2:  # Figures 12 and 13
                label, folder = f"{model} {frames}x{tokens}", out / f"{frames}x{tokens}"
            source = from_model(functools.partial(embed, gve, cache, one), benches)
            if rank == 0:
                results.append(run(source, benchmark, label, protocol(gve, one), one, folder))
            else:
                collections.deque(
                    source, maxlen=0
                )  # this rank's share of the encoding is all that is wanted
        leave_ranks()
        if rank > 0:
            return
    wanted = {
        "Table 1": uvrb.DATASETS.keys() & names,
        "Table 2": uvrb.DATASETS.keys() & names,
        "Table 11": uvrb.ZERO_SHOT.keys() & names,
        "Figure 12": flags.frames[1:],
        "Figure 13": flags.max_tokens[1:],
    }
    show([name for name, reason in wanted.items() if reason], results, out, flags.uvrb, flags.root)
    print(f"{out}: results.json, tables and log")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:  # what a user typed or a file held; the message names it
        sys.exit(f"eval.py: {error}")
