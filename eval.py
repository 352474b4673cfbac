"""Score any model on UVRB, or on a benchmark in its layout, and show every table and figure of
arXiv 2510.27571 (section 4; tables.py makes the tables).

    python eval.py --ckpt runs/gve-mini                 mini-UVRB, after `python -m mini render`;
                                                        about a minute on 2 cores
    python eval.py --ckpt DIR_OR_HUB_ID --uvrb DIR      UVRB as released; Table 11's sets likewise
    python eval.py --encoder my.py:embed --uvrb DIR     your model: see Function
    python eval.py --embeddings VECTORS --uvrb DIR      vectors of any origin: see read_datasets
    python eval.py --ckpt X --frames 8 16 48            Figure 12
    python eval.py --ckpt X --max-tokens 200 400 800    Figure 13
    python eval.py --table 3 --figure 2 --results A.json B.json C.json    tables of earlier scores
    python eval.py --published                          cells of the paper that contradict others

Writes <out>/results.json, whole or not at all, log.jsonl, and tables as .txt, .md, .csv and .tex;
with --rankings also rankings/<DS>.jsonl. extras/export.py turns these into files for MTEB and
trec_eval. <out>/cache keeps the vectors, so that a killed run goes on where it stopped. Under
torchrun the ranks share the encoding.

The exit status is 0 where items failed, too: the tables mark the scores that lack them, and the
last line counts them. It is 1 where nothing could be scored, or where a table that --table or
--figure names has nothing to show. A damaged video that gave only a part of its frames is named as
it is decoded, so not again by a run that finds its vector in the cache.

Protocol: vision only, uniform frames, cosine in float32, no re-ranking. Queries carry the prompt of
their dataset (Table 5) as system turn, corpus items the default one. Ties rank in corpus order.

Legend: N queries, M corpus items, D embedding dim, P positives of a query.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import time
import traceback
import types
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image

import uvrb
from data import PATH_KEY
from embed import encode, encode_distinct, find_first_equals, hash_some_columns, load_checkpoint
from model import decode_and_embed
from support.cache import SharedVectors, VectorCache
from support.files import hash_files, read_jsonl, write_json, write_jsonl
from support.flags import flag, parse_flags
from support.media import load_image, open_clip, sample_indices
from support.progress import first_few
from support.ranks import join_ranks, leave_ranks
from tables import cell, print_published, read_results, show, with_numbers

MAX_LENGTH = 8192  # tokens of an item at most; longer texts lose their tail
SCORE_TABLES = ("Table 1", "Table 2", "Table 11")  # shown as far as there are scores for them


@dataclasses.dataclass
class Flags:
    ckpt: str = flag("runs/gve-mini", "checkpoint to score: a folder or a hub id")
    base: str = flag("", "the base of an adapter whose base moved; empty: as the adapter names it")
    encoder: str = flag(
        "", "score a function instead: FILE.py:NAME, (items, instruction) -> array (n, D)"
    )
    embeddings: str = flag(
        "", "score a folder of vectors instead, <DS>/vectors.npy and <DS>/items.jsonl"
    )
    uvrb: str = flag(
        "runs/mini/uvrb",
        "benchmark folder; media may lie anywhere below the folder that holds it",
    )
    root: list[str] = flag([], "further folders for media; paths may be relative to them, too")
    datasets: list[str] = flag([], "datasets to score; none: all that are in the folder")
    frames: list[int] = flag([8], "frames per video, even; several are scored one after the other")
    max_tokens: list[int] = flag(
        [200], "most visual tokens per frame, 28x28 pixels each; several likewise"
    )
    min_tokens: int = flag(0, "least visual tokens per frame; 0: the checkpoint's own")
    positions: str = flag("", "mrope or 1d; empty: the checkpoint's own")
    prompt_style: str = flag(
        "", "turn that holds a query's prompt, system or user; empty: the checkpoint's own choice"
    )
    batch_tokens: int = flag(4096, "tokens per forward pass, padding included")
    batch_size: int = flag(32, "items per call of --encoder's function")
    workers: int = flag(
        2, "decoding processes per rank; 0: none, a clip that hangs or crashes ends the run"
    )
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    bootstrap: int = flag(0, "resamples of the queries for 95 % intervals, say 1000; 0: none")
    rankings: bool = flag(False, "also write <out>/rankings/<DS>.jsonl, the top 1000 of each query")
    name: str = flag(
        "",
        "the model's name in tables, a published one to stand under that row; empty: last part of "
        "--ckpt or its substitute",
    )
    out: str = flag(
        "", "folder to write; empty: runs/<last part of --ckpt or its substitute>, or runs/tables"
    )
    table: list[str] = flag([], "render these of Tables 1-11 and exit (no scoring)")
    figure: list[str] = flag([], "render these of Figures 2 6 7 8 11 12 13 and exit (no scoring)")
    results: list[str] = flag(
        [], "results.json files to render; alone: in Tables 1 and 2 (no scoring)"
    )
    published: bool = flag(
        False, "recompute the paper's cells from each other, list those that disagree, and exit"
    )


# Metrics


def cosines(queries, corpus, pools=None, *, block=2**26):
    """Yield per query its candidates in corpus order (C,) int64 and their cosines (C,) float32.

    Arguments as in ranks. Equal rows of the corpus have equal cosines, those of the first of them.
    Not embed.top_k, which keeps each query's k best: a positive may rank anywhere, so that its rank
    needs the scores of all candidates.
    """
    everything = torch.arange(len(corpus))
    first = find_first_equals(corpus, hash_some_columns(corpus))
    repeats = (first != everything).nonzero().flatten()
    step = max(1, block // max(1, len(corpus)))
    for start in range(0, len(queries), step):
        q = torch.nn.functional.normalize(queries[start : start + step].float(), dim=-1)
        columns = []
        for part in corpus.split(65536):  # the corpus as a whole is never copied
            c = torch.nn.functional.normalize(part.float(), dim=-1)
            columns.append(q @ c.T)
        scores = torch.cat(columns, 1)  # (step, M)
        scores[:, repeats] = scores[:, first[repeats]]
        assert scores.isfinite().all(), "a NaN would compare false and so rank first"

        for i, row in enumerate(scores, start):
            if pools:
                candidates = torch.tensor(sorted(pools[i]))
                yield candidates, row[candidates]
            else:
                yield everything, row


def ranks(queries, corpus, positives, pools=None, *, block=2**26):
    """Rank every query's positives by cosine in float32, ties in corpus order.

    queries     (N, D) tensor of any float dtype
    corpus      (M, D) likewise
    positives   N lists of corpus indices
    pools       None to rank the whole corpus, or N lists of the indices to rank, positives included
    block       about so many scores exist at a time

    Returns N ascending lists of the positives' ranks from 1. Other positives take up places, too,
    as in trec_eval.
    """
    positions = []
    rows = cosines(queries, corpus, pools, block=block)
    for own, (candidates, scores) in zip(positives, rows, strict=True):
        own = torch.tensor(own, dtype=torch.int64)
        places = torch.searchsorted(candidates, own)  # (P,) where the positives stand in `scores`
        query_positions = []
        for p in places.tolist():
            above = (scores > scores[p]).sum()
            ties_before = (scores[:p] == scores[p]).sum()
            query_positions.append(1 + int(above + ties_before))
        positions.append(sorted(query_positions))
    return positions


def query_metrics(positions):
    """Compute one query's metrics from its positives' ascending ranks from 1 (P,).

    R@k is strict recall, the share of the P positives among the first k. hit@k asks for any
    positive and is often sold as recall. MRR, MdR and MnR look at the first positive.
    # PAPER: does not say which of the two it means, nor how it breaks ties.

    Raises ValueError without a positive.
    """
    if not positions:
        raise ValueError("a query without a positive has no metrics")
    count = len(positions)
    first = positions[0]
    values = {}
    for k in (1, 5, 10):
        values[f"R@{k}"] = sum(rank <= k for rank in positions) / count
    for k in (1, 5, 10):
        values[f"hit@{k}"] = float(first <= k)
    values["P@1"] = values["hit@1"]
    values["MRR"] = 1 / first

    gain = sum(1 / np.log2(1 + rank) for rank in positions if rank <= 10)
    ideal = sum(1 / np.log2(1 + rank) for rank in range(1, min(count, 10) + 1))
    values["nDCG@10"] = float(gain / ideal)

    values["MdR"] = first
    values["MnR"] = first
    return values


def metrics(positions):
    """Average query_metrics over N queries: MdR is a median, all others are means."""
    rows = [query_metrics(query_positions) for query_positions in positions]
    averages = {}
    for name in rows[0]:
        average = np.median if name == "MdR" else np.mean
        averages[name] = float(average([row[name] for row in rows]))
    return averages


def chance(metric, counts, sizes):
    """Compute the expected R@k or P@k of a uniformly random ranking, exactly.

    counts, sizes: each query's numbers of positives and of candidates.
    """
    kind, k = metric.split("@")
    values = []
    for positives, candidates in zip(counts, sizes, strict=True):
        if kind == "R":  # each positive is among the first k with this probability
            values.append(min(1, int(k) / candidates))
        else:  # each of the first k is a positive with this probability
            values.append(positives / candidates)
    return math.fsum(values) / len(values)


def ceiling(metric, counts):
    """Compute the best possible R@k or P@k: of P positives, min(k, P) can be among the first k.

    counts: each query's number of positives.
    """
    kind, k = metric.split("@")
    values = [min(int(k), p) / (p if kind == "R" else int(k)) for p in counts]
    return math.fsum(values) / len(values)


# One dataset


@dataclasses.dataclass
class Encoded:
    """A dataset with its vectors."""

    bench: uvrb.Bench
    queries: torch.Tensor  # (N, D) float
    corpus: torch.Tensor  # (M, D) float
    lost_queries: dict = dataclasses.field(default_factory=dict)  # {index: why it has no vector}
    lost_corpus: dict = dataclasses.field(default_factory=dict)
    damaged: list = dataclasses.field(default_factory=list)  # notes on videos embedded in part


@dataclasses.dataclass
class Scorable:
    """The part of a dataset that can be scored. Positives and pools are numbered in `corpus`."""

    queries: list  # indices of the queries that count
    corpus: list  # indices of the corpus items that have a vector
    positives: list
    pools: list | None


def leave_out_lost(encoded):
    """Find the queries and corpus items to score, given those without a vector -> Scorable.

    A query counts only if it and all its positives have a vector. Lost distractors leave the
    ranking.
    """
    bench = encoded.bench
    scorable = Scorable([], [], [], [] if bench.pools else None)

    number = {}  # {index in the benchmark: index among the kept}
    for j in range(len(bench.corpus)):
        if j not in encoded.lost_corpus:
            number[j] = len(scorable.corpus)
            scorable.corpus.append(j)

    for i, positives in enumerate(bench.positives):
        kept = [number[j] for j in positives if j in number]
        if i in encoded.lost_queries or len(kept) < len(positives):
            continue
        scorable.queries.append(i)
        scorable.positives.append(kept)
        if bench.pools:
            scorable.pools.append([number[j] for j in bench.pools[i] if j in number])
    return scorable


def score(encoded, *, bootstrap=0):
    """Score one dataset -> its entry of results.json.

    "complete" says whether the score may enter an average: nothing is absent or lost. "note" is
    there only if the score says nothing about the model, and says why.
    bootstrap: adds "draws", so many scores of resampled queries.
    """
    bench = encoded.bench
    metric = bench.dataset.metric
    part = leave_out_lost(encoded)
    n = len(part.queries)
    m = len(part.corpus)
    expected = bench.expected[0] or len(bench.queries)
    expected_corpus = bench.expected[1] or len(bench.corpus)
    entry = {
        "metric": metric,
        "score": None,
        "chance": None,
        "ceiling": None,
        "n": n,
        "expected": expected,
        "corpus": m,
        "expected_corpus": expected_corpus,
        "pooled": bench.pools is not None,
        "complete": n == expected and m == expected_corpus,
    }
    if not n:
        return entry

    queries = encoded.queries[part.queries]
    corpus = encoded.corpus[part.corpus]
    positions = ranks(queries, corpus, part.positives, part.pools)
    values = metrics(positions)

    counts = [len(positives) for positives in part.positives]
    sizes = [len(pool) for pool in part.pools] if part.pools else [m] * n
    entry["score"] = values[metric]
    entry["chance"] = chance(metric, counts, sizes)
    entry["ceiling"] = ceiling(metric, counts)
    entry.update(values)
    if all_equal(encoded.corpus):
        entry["note"] = "all corpus vectors are equal: only their order makes this score"
    elif all_equal(encoded.queries):
        entry["note"] = "all query vectors are equal: all queries get the same ranking"
    if bootstrap:
        scores = [query_metrics(query_positions)[metric] for query_positions in positions]
        entry["draws"] = resample(scores, bootstrap, bench.name)
    return entry


def resample(scores, times, name):
    """Draw the mean of resampled scores (N,) so many times -> list of floats.

    The dataset's name is the seed, so that datasets are resampled independently.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [float(rng.choice(scores, len(scores)).mean()) for _ in range(times)]


def all_equal(vectors):
    """Return whether two or more vectors (n, D) all point one way; rows of NaN are left out."""
    first = None
    count = 0
    for part in vectors.split(1024):  # one part is enough unless they are equal
        part = part[part.isfinite().all(1)].float()
        unit = torch.nn.functional.normalize(part, dim=-1)
        if not len(unit):
            continue
        if first is None:
            first = unit[0]
        if (unit - first).abs().max() > 1e-5:  # above the rounding errors of float32
            return False
        count += len(unit)
    return count > 1


def rankings(encoded, depth=1000):
    """Yield {"qid", "positives": ids, "ranked": ids, "scores": cosines} of each scored query.

    Ranked are the `depth` best, ties in corpus order.
    """
    part = leave_out_lost(encoded)
    corpus_ids = [encoded.bench.corpus[j]["id"] for j in part.corpus]
    rows = cosines(encoded.queries[part.queries], encoded.corpus[part.corpus], part.pools)
    for i, positives, (candidates, scores) in zip(part.queries, part.positives, rows, strict=True):
        order = scores.argsort(descending=True, stable=True)[:depth]
        yield {
            "qid": encoded.bench.queries[i]["id"],
            "positives": [corpus_ids[j] for j in positives],
            "ranked": [corpus_ids[j] for j in candidates[order].tolist()],
            "scores": scores[order].tolist(),
        }


# All datasets


def summarise(benchmark, model, protocol, datasets):
    """Make the content of results.json; only complete datasets enter abilities and averages."""
    complete = {}
    draws = {}
    for name, entry in datasets.items():
        if entry["complete"]:
            complete[name] = entry["score"]
        if "draws" in entry:
            draws[name] = entry.pop("draws")

    means = uvrb.abilities(complete)
    result = {
        "benchmark": benchmark,
        "model": model,
        "protocol": protocol,
        "datasets": datasets,
        "abilities": {ability: means[ability] for ability in uvrb.ABILITIES},
        "AVG-D": means["AVG-D"],
        "AVG-A": means["AVG-A"],
    }
    if draws:
        result["ci95"] = intervals(draws, complete)
    return result


def intervals(draws, complete):
    """Compute 95 % bootstrap intervals -> {column: [low, high]}.

    draws: {dataset: resampled scores}. The columns are these datasets, and those abilities and
    averages whose datasets are all in `complete`.
    """
    names = [name for name in draws if name in complete]
    resampled = []
    for scores in zip(*[draws[name] for name in names], strict=True):
        resampled.append(uvrb.abilities(dict(zip(names, scores, strict=True))))

    columns = dict(draws)
    for column in (*uvrb.ABILITIES, "AVG-D", "AVG-A"):
        if resampled and resampled[0][column] is not None:
            columns[column] = [means[column] for means in resampled]

    bounds = {}
    for column, values in columns.items():
        bounds[column] = np.percentile(values, (2.5, 97.5)).tolist()
    return bounds


# Vectors. An encoder is a function encode_rows(rows, instruction, desc) -> (vectors (n, D), {index:
# "file:line: reason"} of the rows that have none, {index: "file:line: note"} of those whose damaged
# video was embedded in part). A source of vectors yields Encoded datasets.


def checkpoint_encoder(gve, cache, flags, frames, max_tokens):
    """Make the encoder of a checkpoint."""

    def encode_rows(rows, instruction, desc):
        tally = collections.Counter()
        vectors, failed = encode(
            gve,
            [row["item"] for row in rows],
            instruction,
            batch_tokens=flags.batch_tokens,
            workers=flags.workers,
            frames=frames,
            max_tokens=max_tokens,
            max_length=MAX_LENGTH,
            cache=cache,
            desc=desc,
            tally=tally,
        )
        # Rows that failed are NaN; any other NaN is the model's own.
        not_finite = (~vectors.isfinite().all(1)).nonzero().flatten()
        for i in not_finite.tolist():
            if i not in failed:
                where = rows[i]["where"]
                raise ValueError(f"{where}: {flags.ckpt} gives a vector that is not finite")
        return vectors, *say_where(rows, failed, tally)

    return encode_rows


def say_where(rows, reasons, tally):
    """Name the lines of rows that failed or gave a part -> (failed, damaged) of encode_rows.

    reasons: {index: reason}; tally: embed.encode's
    """
    failed = {i: f"{rows[i]['where']}: {reason}" for i, reason in reasons.items()}
    damaged = find_damaged(rows, tally)
    for i in failed.keys() & damaged.keys():  # its window lies in the lost part
        del damaged[i]
    return failed, damaged


def find_damaged(rows, tally):
    """Find the rows whose video gave only a part of its frames -> {index: "file:line: note"}.

    tally: embed.encode's, whose notes begin with the video's path. It has those of the videos that
    were decoded, not of vectors from a cache.
    """
    notes = [key.removeprefix("note: ") for key in tally if key.startswith("note: ")]
    damaged = {}
    for i, row in enumerate(rows):
        video = row["item"].get("video")
        path = video["path"] if isinstance(video, dict) else video
        for note in notes:
            if note.startswith(f"{path}: "):
                damaged[i] = f"{row['where']}: {note}"
    return damaged


@dataclasses.dataclass
class Function:
    """The function of --encoder FILE.py:NAME, with the attributes that it may have.

    It takes (items, instruction) and returns (n, D). items: dicts with any of "text", "image" and
    "video", media as absolute paths or with spans as in data.py, equal ones once and none whose
    media are absent. instruction: the dataset's prompt (Table 5) for queries, None for the corpus.
    The result is a tensor, an array or a list of rows. A row of NaN in it says that an item failed.
    """

    spec: str  # FILE.py:NAME
    call: object
    # An even number F. A "video" is then an array (F, H, W, 3) uint8, its uniform frames, and an
    # "image" an array (H, W, 3). They are decoded in processes that may hang or crash, many items
    # ahead: frames of full size take much memory there.
    frames: int | None = None
    # (height, width) to which frames and images are resized there, bicubic, whatever their shape.
    size: tuple | None = None
    # Or a function that is called there, without a GPU: of an array (F, H, W, 3) uint8, F = 1 for
    # an image. Its result, tensor or array, becomes the "video" or "image".
    prepare: object = None
    # Changes with the weights and with every setting. With it vectors are kept in <out>/cache and
    # found again as long as it, NAME and the file's content are the same; without it never.
    fingerprint: str | None = None
    protocol: dict | None = None  # joins the protocol in results.json
    parameters: int | None = None  # size of the model, for Table 10
    published: str | None = None  # the model's name in published.json

    def __post_init__(self):
        types = {"frames": int, "size": list | tuple, "fingerprint": str, "protocol": dict}
        types |= {"parameters": int, "published": str}
        if self.frames is None:  # nothing is decoded
            self.size = None
            self.prepare = None
        for name, kind in types.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                expected = getattr(kind, "__name__", kind)
                raise ValueError(f"--encoder {self.spec}: {name} = {value!r}; expected {expected}")
        if self.size and len(self.size) != 2:
            raise ValueError(f"--encoder {self.spec}: size = {self.size}; expected (height, width)")
        if self.size and self.prepare:
            raise ValueError(f"--encoder {self.spec}: expected size or prepare, not both")
        if self.frames is not None:
            sample_indices(1, self.frames)  # rejects odd numbers early
        try:
            json.dumps([self.protocol, self.parameters])
        except TypeError as error:  # results.json is written last, after hours perhaps
            raise ValueError(f"--encoder {self.spec}: protocol: {error}") from error


def load_function(spec):
    """Run the file of FILE.py:NAME -> Function. Raises ValueError if there is no such function."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--encoder {spec}: expected FILE.py:FUNCTION")
    module = run_file(path)
    reason = f"{path} has no function {name!r}"
    try:
        call = getattr(module, name)
    except AttributeError as error:
        call = None
        if hasattr(module, "__getattr__"):  # it makes functions by name, and says of which names
            reason = str(error)
    if not callable(call):
        raise ValueError(f"--encoder {spec}: {reason}")

    attributes = {}
    for field in dataclasses.fields(Function):
        if field.name in ("spec", "call"):
            continue
        value = getattr(call, field.name, None)
        if callable(value) and field.name != "prepare":  # a torch module's method `parameters`
            value = None
        attributes[field.name] = value
    return Function(spec, call, **attributes)


def function_cache(function, folder):
    """Return the cache in `folder` of a function's vectors; without a fingerprint none is kept."""
    if not function.fingerprint:
        return SharedVectors()
    path, _, name = function.spec.rpartition(":")
    key = {
        "encoder": name,
        "file": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "fingerprint": function.fingerprint,
        "frames": function.frames,
        "size": function.size,
        "prepare": function.prepare and getattr(function.prepare, "__qualname__", "an object"),
    }
    return VectorCache(folder, key)


def function_encoder(function, size, *, cache=None, workers=0, seconds=60):
    """Make the encoder of a Function.

    size: most items of a call. cache: function_cache's. workers, seconds: as in embed.encode, for a
    function with `frames`; others get no decoding. On any number of ranks the calls have the same
    items, unless some cannot be decoded or are in the cache.

    Raises ValueError if the function raises, or if its result is not (n, D) with the same D in
    every call and no row of zeros.
    """
    dim = None

    def encode_rows(rows, instruction, desc):
        nonlocal dim
        absent = {}
        present = []  # indices of all other rows
        for i, row in enumerate(rows):
            path = absent_medium(row["item"])
            if path:
                absent[i] = f"{path} does not exist"
            else:
                present.append(i)
        items = [rows[i]["item"] for i in present]
        own_dim = dim

        def embed_batch(batch):
            nonlocal own_dim
            decoded = [rows[present[i]] | sample for i, sample in batch.items()]
            vectors = call_encoder(function, decoded, instruction, own_dim)
            own_dim = vectors.shape[1]
            return vectors

        def embed_some(todo, failed, tally):
            made = decode_and_embed(
                lambda item: decode_media(item, function),
                embed_batch,
                items,
                todo,
                batch_size=size,
                workers=workers if function.frames else 0,
                seconds=seconds,
                failed=failed,
                tally=tally,
            )
            return keep_finite(made, function.spec, failed)

        tally = collections.Counter()
        made, failed = encode_distinct(
            items,
            embed_some,
            cache or SharedVectors(),
            {"instruction": instruction},
            dim=dim,
            share=size,
            desc=desc,
            tally=tally,
        )
        if len(failed) < len(items):
            dim = made.shape[1]  # on every rank, also where all vectors come from the cache
        vectors = torch.full((len(rows), made.shape[1]), math.nan)
        vectors[present] = made
        reasons = absent | {present[i]: reason for i, reason in failed.items()}
        return vectors, *say_where(rows, reasons, tally)

    return encode_rows


def keep_finite(batches, spec, failed):
    """Yield batches of decode_and_embed without rows that are not finite; those go to `failed`."""
    for batch, vectors in batches:
        good = []
        for row, i in enumerate(batch):
            if vectors[row].isfinite().all():
                good.append(row)
            elif vectors[row].isnan().all():
                failed[i] = "the encoder says that this item failed (a row of NaN)"
            else:
                failed[i] = f"{spec} gives a vector that is not finite"
        yield [batch[row] for row in good], vectors[good]


def decode_media(item, function):
    """Decode an item for a Function -> {"item": item with arrays} and, of a video, "decoder" and,
    if it is damaged, "note". Without `frames` the item stays as it is.
    """
    decoded = dict(item)
    sample = {"item": decoded}
    if function.frames is None:
        return sample
    prepare = function.prepare or (lambda pixels: resize(pixels, function.size))
    if "video" in item:
        clip = open_clip(item["video"], function.frames)
        decoded["video"] = prepare(clip.pixels)
        sample["decoder"] = clip.decoder
        if clip.note:
            sample["note"] = clip.note
    if "image" in item:
        picture = np.array(load_image(item["image"]))  # a copy: Pillow's buffer is read-only
        decoded["image"] = prepare(picture[None])
        if not function.prepare:
            decoded["image"] = decoded["image"][0]
    return sample


def resize(pixels, size):
    """Resize pictures (F, H, W, 3) uint8 to `size`, (height, width), by Pillow's bicubic filter.

    size None: returns them as they are.
    """
    if not size:
        return pixels
    height, width = size
    resized = []
    for picture in pixels:
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        resized.append(np.asarray(image))
    return np.stack(resized)


def call_encoder(function, rows, instruction, dim):
    """Call a Function with the items of these rows -> vectors (n, D) float32 on the CPU.

    dim: D of earlier calls, None in the first one. Raises ValueError if the encoder raises, having
    printed where; if its result is not (n, D) numbers; and for rows of zeros.
    """
    spec = function.spec
    items = [row["item"] for row in rows]
    try:
        result = function.call(items, instruction)
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"--encoder {spec}: {type(error).__name__}: {error}") from error

    expected = f"({len(items)}, {dim or 'D'})"
    try:
        if isinstance(result, list | tuple):
            vectors = torch.stack([torch.as_tensor(row).detach().float().cpu() for row in result])
        else:
            vectors = torch.as_tensor(result).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--encoder {spec}: returns a {type(result).__name__}; expected a tensor, an array or "
            f"a list of rows, floats {expected}: {error}"
        ) from error
    if vectors.ndim != 2 or vectors.shape != (len(items), dim or vectors.shape[1]):
        raise ValueError(
            f"--encoder {spec}: shape {tuple(vectors.shape)} for {len(items)} items; "
            f"expected {expected}"
        )

    zeros = (vectors == 0).all(1).nonzero().flatten().tolist()
    if zeros:
        named = ", ".join(rows[i]["where"] for i in zeros[:3])
        raise ValueError(
            f"--encoder {spec}: vectors of length 0 for {len(zeros)} of {len(items)} items "
            f"({named}); a row of NaN says that an item failed"
        )
    return vectors


def absent_medium(item):
    """Return the path of an item's first medium that does not exist, None if all exist."""
    for kind, path_key in PATH_KEY.items():
        media = item.get(kind)
        path = media[path_key] if isinstance(media, dict) else media
        if path and not os.path.exists(path):
            return path
    return None


def run_file(path):
    """Run a Python file as `python FILE` would see it, its main block left out -> module.

    Its folder comes first on sys.path, also before modules of ours that have the same name as one
    beside it. It stands in for __main__, which the workers of process pools run again, under the
    name that those give it: so it is this file that they run, and not eval.py.
    """
    path = Path(path).resolve()
    source = path.read_bytes()
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]

    ours = Path(__file__).resolve().parent
    if path.parent != ours:
        beside = {file.stem for file in path.parent.glob("*.py")}
        beside |= {file.parent.name for file in path.parent.glob("*/__init__.py")}
        for name in list(sys.modules):
            top = name.partition(".")[0]
            if top in beside and ((ours / f"{top}.py").exists() or (ours / top).exists()):
                del sys.modules[name]

    module = types.ModuleType("__mp_main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.modules["__mp_main__"] = module
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    return module


def encode_datasets(encode_rows, benches):
    """Encode datasets -> yields Encoded."""
    # All corpora in one call: CRB-G, -S and -T hold the same videos, and so do VDC-O and -D.
    rows = list(itertools.chain.from_iterable(bench.corpus for bench in benches))
    corpora, lost, damaged = encode_rows(rows, None, "corpora")
    start = 0
    for bench in benches:
        prompt = bench.dataset.prompt
        label = f"{bench.name} queries"
        queries, lost_queries, damaged_queries = encode_rows(bench.queries, prompt, label)
        stop = start + len(bench.corpus)
        lost_corpus = {i - start: reason for i, reason in lost.items() if start <= i < stop}
        notes = list(damaged_queries.values())
        notes += [note for i, note in damaged.items() if start <= i < stop]
        yield Encoded(bench, queries, corpora[start:stop], lost_queries, lost_corpus, notes)
        start = stop


def read_datasets(folder, benches):
    """Read datasets' vectors from files -> yields Encoded.

    <folder>/<DS>/vectors.npy holds floats (n, D), and items.jsonl beside it n lines
    {"id": str, "kind": "query" | "corpus"}: line i names row i by the benchmark's id. Or
    <folder>/<DS>/queries/ and <folder>/<DS>/corpus/ hold a pair of such files each, as embed.py
    writes them; a kind is not needed there.

    Ids that the benchmark lacks are printed and left out; absent ones and rows of NaN count as
    lost. Lengths other than 1 are printed, since scores are cosines. Raises ValueError for a
    repeated id, an unknown kind, a row of length 0, another number of rows, or another D than in
    the dataset before.
    """
    dim = None
    for bench in benches:
        own = Path(folder) / bench.name
        if (own / "queries" / "vectors.npy").is_file():
            query_file = VectorFile(own / "queries", dim, "query")
            corpus_file = VectorFile(own / "corpus", query_file.dim, "corpus")
        elif (own / "vectors.npy").is_file():
            query_file = corpus_file = VectorFile(own, dim)
        else:
            raise FileNotFoundError(f"{own}: no vectors.npy, and no queries/vectors.npy")
        dim = query_file.dim
        queries, lost_queries = query_file.pick("query", bench.queries, bench.name)
        corpus, lost_corpus = corpus_file.pick("corpus", bench.corpus, bench.name)
        yield Encoded(bench, queries, corpus, lost_queries, lost_corpus)


class VectorFile:
    """Vectors of one dataset, as read_datasets describes them."""

    def __init__(self, folder, dim=None, kind=None):
        """Open vectors.npy, its rows `dim` wide if that is given, and read items.jsonl, whose lines
        are of `kind` unless they say otherwise.
        """
        self.path = folder / "vectors.npy"
        self.names = folder / "items.jsonl"
        try:
            self.array = np.lib.format.open_memmap(self.path, mode="r")
        except ValueError as error:
            raise ValueError(f"{self.path}: no array of numbers: {error}") from error
        self.row_of = {"query": {}, "corpus": {}}  # {id: row of the array}
        self.lines = []  # line number of each row
        for line, row in read_jsonl(self.names):
            own_kind = row.get("kind", kind)
            key = row.get("id")
            known = self.row_of.get(own_kind)
            if known is None or not isinstance(key, str) or key in known:
                raise ValueError(
                    f'{self.names}:{line}: {row}; expected a new "id" and '
                    '"kind": "query" or "corpus"'
                )
            known[key] = len(self.lines)
            self.lines.append(line)

        n = len(self.lines)
        is_matrix = self.array.dtype.kind == "f" and self.array.ndim == 2
        if not is_matrix or self.array.shape != (n, dim or self.array.shape[1]):
            raise ValueError(
                f"{self.path}: {self.array.dtype} {self.array.shape}; expected floats "
                f"({n}, {dim or 'D'}), a row per line of items.jsonl"
            )
        self.dim = self.array.shape[1]

    def pick(self, kind, rows, name):
        """Return the vectors of these queries or corpus items (n, D), {index: why it has none}."""
        row_of = self.row_of[kind]
        unknown = sorted(row_of.keys() - {row["id"] for row in rows})
        if unknown:
            print(
                f"{self.path.parent}: {len(unknown)} {kind} ids are not in {name} and left out: "
                f"{', '.join(unknown[:3])}"
            )

        vectors = np.full((len(rows), self.dim), np.nan, np.float32)
        known = []
        places = []
        for i, row in enumerate(rows):
            if row["id"] in row_of:
                known.append(i)
                places.append(row_of[row["id"]])
        vectors[known] = self.array[places]

        norms = np.linalg.norm(vectors, axis=1)
        if (norms == 0).any():
            first = rows[int((norms == 0).argmax())]
            line = self.lines[row_of[first["id"]]]
            raise ValueError(f"{self.names}:{line}: its vector has length 0")
        if (np.abs(norms - 1) > 0.01).any():
            print(
                f"{self.path}: {kind} vectors are {np.nanmin(norms):.3g} to "
                f"{np.nanmax(norms):.3g} long and normalised here"
            )

        lost = {}
        for i in np.flatnonzero(~np.isfinite(norms)).tolist():
            row = rows[i]
            lost[i] = f"{row['where']}: {self.path} has no finite vector of {kind} {row['id']!r}"
        return torch.from_numpy(vectors), lost


# The command


def protocol_of(gve, flags, frames, max_tokens):
    """Collect all that a score depends on besides the benchmark's files, and how the checkpoint
    was trained.
    """
    pairs = 0
    for source in gve.info.get("data", {}).values():
        pairs += min(source["rows"], source["drawn"])
    ties = "corpus order: of equal scores the item that comes first in corpus.jsonl ranks first"
    query_prompt = f"queries: their dataset's prompt in the {gve.prompt_style} turn"
    return {
        # The checkpoint; a step and a commit are known if train.py wrote it.
        "checkpoint": flags.ckpt,
        "sha256": hash_files(flags.ckpt),
        "base": str(gve.base),
        "base_sha256": hash_files(gve.base),
        "step": gve.info.get("step"),
        "commit": gve.info.get("commit"),
        # The protocol of section 4.
        "similarity": "cosine, float32",
        "ties": ties,
        "frames": frames,
        "max_tokens": max_tokens,
        "min_tokens": gve.min_tokens,
        "positions": gve.positions,
        "max_length": MAX_LENGTH,
        "prompt": f"{query_prompt}; corpus: the default system turn alone",
        # Numbers depend on these in their last digits.
        "dtype": str(next(gve.core.parameters()).dtype).removeprefix("torch."),
        "device": str(gve.device),
        "batch_tokens": flags.batch_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # Tables 9 and 10, Figures 6 and 11.
        "parameters": sum(p.numel() for p in gve.parameters()),
        "training": gve.info.get("config", {}),
        "pairs": pairs or None,
    }


def function_protocol(function):
    """Return a Function's protocol, what it says of itself included."""
    protocol = {"checkpoint": function.spec, "similarity": "cosine, float32"}
    if function.frames:
        protocol["frames"] = function.frames
    return protocol | (function.protocol or {})


class Outcome(NamedTuple):
    results: dict  # the content of results.json
    failed: int  # queries and corpus items without a vector


def score_datasets(source, benchmark, model, protocol, flags, out, facts=None):
    """Score the Encoded datasets that `source` yields and write all files but the tables to `out`.

    facts: dict of further keys of results.json. Returns an Outcome.
    """
    entries = {}
    failures = 0
    began = time.time()
    for encoded in source:
        name = encoded.bench.name
        entry = score(encoded, bootstrap=flags.bootstrap)
        entries[name] = entry
        out.mkdir(parents=True, exist_ok=True)
        if flags.rankings and entry["n"]:
            (out / "rankings").mkdir(exist_ok=True)
            write_jsonl(out / "rankings" / f"{name}.jsonl", rankings(encoded))

        failed = [*encoded.lost_queries.values(), *encoded.lost_corpus.values()]
        failures += len(failed)
        event = {"event": "eval", "model": model, "dataset": name, **entry}
        event.pop("draws", None)
        event |= {"failed": failed, "damaged": encoded.damaged, "seconds": time.time() - began}
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")

        print(
            f"{name:10}  {entry['metric']:4}  {cell(entry['score']):>5}  (chance "
            f"{cell(entry['chance'])}, ceiling {cell(entry['ceiling'])}, "
            f"{entry['n']}/{entry['expected']} queries, "
            f"{entry['corpus']}/{entry['expected_corpus']} corpus items)"
        )
        if "note" in entry:
            print(f"  {entry['note']}; chance is {cell(entry['chance'])}")
        rest = f"more, listed in {out / 'log.jsonl'}"
        for reason in first_few(failed, 3, rest):
            print(f"  no vector: {reason}")
        for note in first_few(encoded.damaged, 3, rest):
            print(f"  embedded in part: {note}")
        began = time.time()

    results = summarise(benchmark, model, protocol, entries) | (facts or {})
    write_json(out / "results.json", results)
    return Outcome(results, failures)


def score_checkpoint(benches, benchmark, model, flags, out):
    """Score a checkpoint at each number of frames and tokens -> a list of Outcome, empty on all
    ranks but 0.
    """
    rank, _, device = join_ranks(flags.device)
    gve = load_checkpoint(flags, device)
    cache = VectorCache(out / "cache", gve)
    settings = list(itertools.product(flags.frames, flags.max_tokens))
    outcomes = []
    for frames, max_tokens in settings:
        label = model
        folder = out
        if len(settings) > 1:  # Figures 12 and 13
            label = f"{model} {frames}x{max_tokens}"
            folder = out / f"{frames}x{max_tokens}"
        encoder = checkpoint_encoder(gve, cache, flags, frames, max_tokens)
        source = encode_datasets(encoder, benches)
        if rank > 0:
            for _ in source:  # this rank takes its share of the encoding and scores nothing
                pass
            continue
        protocol = protocol_of(gve, flags, frames, max_tokens)
        outcomes.append(score_datasets(source, benchmark, label, protocol, flags, folder))
    leave_ranks()
    return outcomes


def score_function(benches, benchmark, model, flags, out):
    """Score --encoder's function -> a list of one Outcome, empty on all ranks but 0."""
    rank = 0
    # Only then, since it starts CUDA, and after that the function's own processes cannot be forked.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        rank, _, _ = join_ranks(flags.device)
    function = load_function(flags.encoder)
    cache = function_cache(function, out / "cache")
    encoder = function_encoder(function, flags.batch_size, cache=cache, workers=flags.workers)
    source = encode_datasets(encoder, benches)
    outcomes = []
    if rank == 0:
        protocol = function_protocol(function)
        facts = {"parameters": function.parameters, "published": function.published}
        facts = {key: value for key, value in facts.items() if value is not None}
        outcomes.append(score_datasets(source, benchmark, model, protocol, flags, out, facts))
    else:
        for _ in source:  # this rank takes its share of the encoding and scores nothing
            pass
    leave_ranks()
    return outcomes


def show_results(flags):
    """Render the tables and figures that flags name, from results.json files."""
    results = [read_results(path) for path in flags.results]
    names = [f"Table {n}" for n in flags.table] + [f"Figure {n}" for n in flags.figure]
    names = names or with_numbers(SCORE_TABLES, results)
    if not names:
        raise ValueError(f"{', '.join(flags.results)}: no scores to show")
    show(names, results, flags.out or "runs/tables", flags.uvrb, flags.root)


def main(flags):
    if flags.published:
        return print_published()
    if flags.table or flags.figure or flags.results:
        return show_results(flags)

    # Read the benchmark.
    if len(flags.frames) > 1 and len(flags.max_tokens) > 1:
        raise ValueError("--frames and --max-tokens: only one of the two may have several values")
    benchmark, _ = uvrb.benchmark(flags.uvrb)
    names = list(dict.fromkeys(flags.datasets))
    if not names:
        names, amiss = uvrb.find(flags.uvrb)
        if not names:
            raise ValueError("\n".join(amiss))
        for sentence in amiss:
            print(sentence)
    benches = [uvrb.read(flags.uvrb, name, flags.root) for name in names]

    # Encode and score.
    scored = flags.embeddings or flags.encoder or flags.ckpt
    model = flags.name or Path(scored).name
    out = Path(flags.out or Path("runs") / Path(scored).name)
    if flags.embeddings:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # each rank would do and write everything
            raise ValueError("--embeddings takes one process: no torchrun")
        source = read_datasets(flags.embeddings, benches)
        protocol = {"checkpoint": scored, "similarity": "cosine, float32"}
        outcomes = [score_datasets(source, benchmark, model, protocol, flags, out)]
    else:
        score_model = score_function if flags.encoder else score_checkpoint
        outcomes = score_model(benches, benchmark, model, flags, out)
        if not outcomes:  # only rank 0 has any
            return
    results = [outcome.results for outcome in outcomes]

    if not any(entry["n"] for result in results for entry in result["datasets"].values()):
        raise ValueError(f"no query could be scored; {out} has the reasons in log.jsonl")

    # Show the tables and figures that these scores belong to.
    names = [*SCORE_TABLES]
    if len(flags.frames) > 1:
        names.append("Figure 12")
    if len(flags.max_tokens) > 1:
        names.append("Figure 13")
    show(with_numbers(names, results), results, out, flags.uvrb, flags.root, brief=True)
    last = f"{out}: results.json, tables and log"
    failures = sum(outcome.failed for outcome in outcomes)
    if failures:
        last += f"; queries and corpus items that failed: {failures}, reasons in log.jsonl"
    print(last)


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:  # bad flags and files; the message names them
        sys.exit(f"eval.py: {error}")
