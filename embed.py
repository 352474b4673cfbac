"""Vectors for any number of items, and exact top-k over vectors (arXiv 2510.27571, section 4.1).

    python embed.py items.jsonl --ckpt runs/gve-mini --out runs/vectors     # an item per line
    torchrun --nproc-per-node 8 embed.py items.jsonl --ckpt ... --out ...   # ranks share the items

    -> runs/vectors/vectors.npy     (n, D) float32, a row of NaN where an item failed
       runs/vectors/items.jsonl     a line per item: "id", "line" number, "error" if it failed
       runs/vectors/cache/          vectors kept as they are made: a killed run continues from here

From Python:

    vectors, failed = encode(gve, [{"video": "a.mp4"}, {"text": "a red ball"}], workers=2)
    scores, indices = top_k(queries, corpus, 10)

Legend: n items, D embedding dim, N queries, M corpus rows.
"""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Collator, resolve
from model import GVE, to_device
from support.cache import NoCache, VectorCache, item_key
from support.decoders import DecoderPool, Failed
from support.files import read_jsonl, whole_file
from support.flags import flag, parse_flags
from support.ranks import all_gather_object, join_ranks, leave_ranks


@torch.no_grad()
def encode(
    gve,
    items,
    instruction=None,
    *,
    batch_tokens=4096,
    workers=0,
    seconds=60,
    frames=8,
    max_tokens=200,
    max_length=8192,
    cache=None,
    desc=None,
):
    """Embed resolved items -> (vectors (n, D) float32 on the CPU, {index: reason} of failed items).

    A failed item's vector is NaN and costs no other item anything.

    batch_tokens    tokens per forward, padding included
    workers         decoding processes, with `seconds` per item; 0 decodes inline, without a limit
    frames, max_tokens, max_length      as in data.Collator
    cache           a VectorCache of this model. With it vectors lie in a file rather than in
                    memory, and torch.distributed's ranks share the work: all of them pass the same
                    items and get the same vectors
    desc            label of the progress bar; without one there is no bar
    """
    collate = Collator(
        gve.processor,
        frames=frames,
        max_tokens=max_tokens,
        max_length=max_length,
        prompt_style=gve.prompt_style,
    )
    if cache is None:
        cache = NoCache()
    rank = 0
    world = 1
    if cache.shared_by_ranks and dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()

    # Dedupe: among equal items only the first is encoded.
    keys = [item_key(item) for item in items]
    first = {}  # key -> index of its first item
    for i, key in enumerate(keys):
        first.setdefault(key, i)

    # Plan: items that the cache lacks, like beside like to save padding, dealt out to the ranks.
    settings = {
        "instruction": instruction,
        "frames": frames,
        "max_tokens": max_tokens,
        "max_length": max_length,
    }
    cache.open(settings)
    vectors = cache.allocate(len(items), gve.dim)
    known = cache.read(first, vectors)
    order = sorted(first.values(), key=lambda i: kind_and_length(items[i]))
    todo = [i for i in order[rank::world] if i not in known]

    # Run: decode, embed and keep, batch by batch.
    failed = {}
    was_training = gve.training
    gve.eval()
    with tqdm(total=len(todo), desc=desc, disable=desc is None or rank > 0, leave=False) as bar:
        for batch, made in decode_and_embed(
            gve, collate, items, instruction, todo, batch_tokens, workers, seconds, failed
        ):
            vectors[batch] = made
            cache.add([{"key": keys[i], "item": items[i]} for i in batch], made)
            bar.update(len(batch))
    gve.train(was_training)
    cache.flush()

    # Expand: read the other ranks' vectors, then give equal items those of the first one.
    if world > 1:
        # A barrier: every rank has written its vectors once this returns.
        for others in all_gather_object(failed):
            failed = failed | others
        cache.read(first, vectors)
    equals = [i for i, key in enumerate(keys) if first[key] != i]
    vectors[equals] = vectors[[first[keys[i]] for i in equals]]
    reasons = {i: failed[first[key]] for i, key in enumerate(keys) if first[key] in failed}
    return vectors, reasons


def kind_and_length(item):
    """Return a sort key: texts, images, videos, both; short texts before long ones."""
    return "video" in item, "image" in item, len(item.get("text") or "")


def decode_and_embed(
    gve, collate, items, instruction, todo, batch_tokens, workers, seconds, failed
):
    """Decode and embed items[i] for i in todo -> yield ([i, ...], vectors (b, D)) per batch.

    failed: dict that gets {i: reason} of the items that cannot be decoded.
    """
    lock = threading.Lock()  # held while the model runs: no decoder may be forked meanwhile
    pool = DecoderPool(
        lambda i: collate.prepare(items[i], instruction),
        lambda i: str(items[i]),
        workers=workers,
        seconds=seconds,
        fork_lock=lock,
    )
    decoded = pool.map(todo, lend_threads=True)
    for batch in batches_by_tokens(decoded, batch_tokens, failed):
        with lock:
            inputs = collate.batch(batch.values(), raw=True)
            vectors = gve(to_device(inputs, gve.device)).float().cpu()
        yield list(batch), vectors


def batches_by_tokens(decoded, batch_tokens, failed):
    """Group (i, sample) into {i: sample} of at most batch_tokens tokens, padding included.

    A longer sample is a batch of its own. A Failed in a sample's place goes to failed[i].
    """
    batch = {}
    width = 0  # tokens of the longest sample
    for i, sample in decoded:
        if isinstance(sample, Failed):
            failed[i] = sample.reason
            continue
        width = max(width, len(sample["ids"]))
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = {}
            width = len(sample["ids"])
        batch[i] = sample
    if batch:
        yield batch


def top_k(queries, corpus, k, *, block=16384, query_block=1024):
    """Find each query's k best corpus rows by inner product, exactly, ties by corpus order.

    queries (N, D), corpus (M, D): tensors, arrays or memory maps of any float dtype; computed in
    float32 on the queries' device. Rows with a NaN are never found. Equal rows have equal scores.
    -> scores (N, k) float32 and indices (N, k) int64 on the CPU, -inf and -1 where fewer than k
    rows can be found; k is M if that is less.

    The corpus is read once, in blocks, so memory does not grow with M but for two numbers per row;
    rows that look like repeats are read once more.
    """
    queries = as_tensor(queries).float()
    k = min(k, len(corpus))
    looks = []  # of each block's rows
    scores = queries.new_full((len(queries), k), -torch.inf)
    indices = torch.full_like(scores, -1, dtype=torch.int64)

    for start in range(0, len(corpus), block):
        part = as_tensor(corpus[start : start + block]).to(queries)  # (C, D)
        looks.append(hash_some_columns(part))
        for row in range(0, len(queries), query_block):
            own = slice(row, row + query_block)
            new = queries[own] @ part.T  # (Q, C)
            new.masked_fill_(new.isnan(), -torch.inf)
            both = torch.cat([scores[own], new], dim=1)  # (Q, k + C), equals in corpus order

            # torch.topk picks any of several equal scores. Where its choice is open, at the k-th
            # place, that row is sorted instead; ties are rare and sorting takes ten times as long.
            best, columns = both.topk(k + 1)
            columns = columns[:, :k]
            open_choice = best[:, k - 1] == best[:, k]
            in_order = both[open_choice].sort(dim=1, descending=True, stable=True).indices
            columns[open_choice] = in_order[:, :k]

            # Equal scores among the k: by column, that is, in corpus order.
            columns = columns.sort(dim=1).values
            scores[own], order = both.gather(1, columns).sort(dim=1, descending=True, stable=True)
            columns = columns.gather(1, order)
            earlier = indices[own].gather(1, columns.clamp(max=k - 1))
            indices[own] = torch.where(columns < k, earlier, start + columns - k)

    indices[scores == -torch.inf] = -1
    scores, indices = scores.cpu(), indices.cpu()
    if looks:
        rank_equal_rows(scores, indices, find_first_equals(corpus, torch.cat(looks)))
    return scores, indices


# A matrix product may give equal rows scores that differ in the last bit: it depends on a row's
# place in a tile, on the block and on the number of threads. So equal rows are found by their bits
# and share one score.


def hash_rows(rows):
    """Hash rows (n, D) of any float dtype by their float32 values -> (n,) int64; -0 is 0."""
    values = as_tensor(rows).float().cpu() + 0  # -0 + 0 = 0
    return torch.tensor([hash(row.tobytes()) for row in values.numpy()], dtype=torch.int64)


def hash_some_columns(rows):
    """Hash about 16 columns of rows (n, D) -> (n,) int64: cheap, and few rows agree in them."""
    return hash_rows(rows[:, :: max(1, rows.shape[1] // 16)])


def first_places(values):
    """Return the first place of each value in (n,) -> (n,) int64."""
    number = values.unique(return_inverse=True)[1]
    places = torch.arange(len(values))
    first = torch.empty_like(places).scatter_reduce_(0, number, places, "amin", include_self=False)
    return first[number]


def find_first_equals(corpus, looks, block=16384):
    """Find the first row of a corpus (M, D) that equals each of its rows -> row numbers (M,) int64.

    looks (M,): hash_some_columns of the corpus. Only rows that agree in them are compared whole.
    """
    first = first_places(looks)
    copies = first.bincount(minlength=len(first))
    rows = (copies[first] > 1).nonzero().flatten()
    hashes = [torch.zeros(0, dtype=torch.int64)]
    for some in rows.split(block):
        hashes.append(hash_rows(corpus[some.numpy()]))
    first[rows] = rows[first_places(torch.cat(hashes))]
    return first


def rank_equal_rows(scores, indices, first):
    """Give equal rows of top_k's result one score and their places in corpus order, in place.

    scores, indices (N, k). first (M,): the first row equal to each row of the corpus. Of equal
    rows at least the one with the highest score was found, if any of them belongs to the k best.
    """
    k = indices.shape[1]
    copies = first.bincount(minlength=len(first))  # (M,) of each first row
    groups = first[indices.clamp(min=0)]  # (N, k)
    repeated = (copies[groups] > 1) & (indices >= 0)
    if not repeated.any():
        return
    members = first.argsort(stable=True)  # (M,) row numbers, equal rows side by side
    starts = copies.cumsum(0) - copies
    for i in repeated.any(1).nonzero().flatten().tolist():
        best = {}  # {first row: the highest score that was found for its equals}
        for group, score in zip(groups[i].tolist(), scores[i].tolist(), strict=True):
            if score > -torch.inf:
                best.setdefault(group, score)

        found = []
        for group, score in best.items():
            start = starts[group]
            equal = members[start : start + min(copies[group], k)]
            found += [(-score, row) for row in equal.tolist()]
        found = sorted(found)[:k]
        scores[i, : len(found)] = torch.tensor([-score for score, _ in found])
        indices[i, : len(found)] = torch.tensor([row for _, row in found])


def as_tensor(x):
    """Return a tensor; an array is copied, since a memory map cannot be written to."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.array(x))
    return torch.as_tensor(x)


@dataclasses.dataclass
class Flags:
    items: str = flag(
        ..., 'JSON lines: an item per line, with an "id" if you like', positional=True
    )
    ckpt: str = flag("runs/gve-mini", "checkpoint folder or hub id")
    out: str = flag("runs/vectors", "folder to write")
    instruction: str = flag("", "system turn for every item; empty: the default one")
    prompt_style: str = flag("", "system or user turn; empty: the checkpoint's own")
    root: list[str] = flag([], "more folders that media may lie in")
    batch_tokens: int = flag(4096, "tokens per forward, padding included")
    workers: int = flag(2, "decoding processes per rank; 0 decodes inline")
    seconds: float = flag(60, "time limit of a worker for one clip, in seconds")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "vision tokens per video frame")
    device: str = flag("", "cpu or cuda; empty: cuda if there is one")


def main(flags):
    rows = list(read_jsonl(flags.items))  # of (line number, dict)
    if not rows:
        raise ValueError(f"{flags.items}: no items")

    # A row that cannot be used keeps its place, so that vectors stay in line with rows.
    folder = os.path.dirname(os.path.abspath(flags.items))
    items = []
    failed = {}  # index -> reason
    for i, (number, row) in enumerate(rows):
        try:
            items.append(resolve(row, folder, flags.root))
        except (ValueError, FileNotFoundError) as error:
            failed[i] = f"{flags.items}:{number}: {error}"
            items.append({"text": " "})

    rank, _, device = join_ranks(flags.device)
    out = Path(flags.out)
    gve = GVE.from_pretrained(flags.ckpt, device=device, prompt_style=flags.prompt_style)
    vectors, reasons = encode(
        gve,
        items,
        flags.instruction or None,
        batch_tokens=flags.batch_tokens,
        workers=flags.workers,
        seconds=flags.seconds,
        frames=flags.frames,
        max_tokens=flags.max_tokens,
        cache=VectorCache(out / "cache", gve),
        desc="encode",
    )
    leave_ranks()
    if rank > 0:
        return

    for i, reason in reasons.items():
        number, _ = rows[i]
        failed.setdefault(i, f"{flags.items}:{number}: {reason}")
    vectors[list(failed)] = torch.nan
    lines = []
    for i, (number, row) in enumerate(rows):
        line = {"id": row.get("id", str(i)), "line": number}
        if i in failed:
            line["error"] = failed[i]
        lines.append(line)

    with whole_file(out / "vectors.npy", "wb") as file:
        np.save(file, vectors.numpy())
    with whole_file(out / "items.jsonl") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    for i in sorted(failed):
        print(failed[i])
    print(f"{out}: {len(rows) - len(failed)} of {len(rows)} items embedded, dim {gve.dim}")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as problem:
        sys.exit(f"embed.py: {problem}")
