"""Vectors for any number of items, and exact top-k over them (arXiv 2510.27571, section 4.1: cosines, no re-ranking).

    python embed.py items.jsonl --ckpt runs/gve-mini --out runs/vectors      # one item per line, an "id" beside it if you like
    torchrun --nproc-per-node 8 embed.py items.jsonl --ckpt ... --out ...    # the ranks share the items
    -> runs/vectors/vectors.npy (n, D) float32, NaN where an item failed, and items.jsonl, one line per item with its fate

What is encoded is kept in <out>/cache: a run that was killed goes on where it stopped.
Legend: N queries, M corpus items, D embedding dim, n items.
"""

import collections
import dataclasses
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import Collator, resolve
from model import GVE, to_device
from support.cache import VectorCache, item_key
from support.decoders import DecoderPool, Failed
from support.files import read_jsonl, whole_file, write_jsonl
from support.flags import flag, parse_flags
from support.ranks import all_gather_object, join_ranks, leave_ranks


def _batches(samples, failed, batch_tokens):
    """Group (i, sample) into dicts of at most batch_tokens tokens, padding included; a reason in place of a sample is noted."""
    batch, width = {}, 0
    for i, sample in samples:
        if isinstance(sample, Failed):
            failed[i] = sample.reason
            continue
        width = max(width, len(sample["ids"]))
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, width = {}, len(sample["ids"])
        batch[i] = sample
    if batch:
        yield batch


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
    """Embed resolved items -> (vectors (n, D) float32 on the CPU, {index: reason} of the items that failed; their rows are NaN).

    Equal items are encoded once; batches hold items of like kind and length, the result is in the items' order.
    batch_tokens: tokens per forward, padding included. workers: decoding processes, which give a clip up after so many seconds;
    0 decodes inline, without a limit. cache: a Cache of this model. With it the vectors lie in a file rather than in memory, and
    torch.distributed's ranks share the work: all pass the same items and get the same. desc: label of a progress bar.
    """
    collate = Collator(
        gve.processor,
        frames=frames,
        max_tokens=max_tokens,
        max_length=max_length,
        prompt_style=gve.prompt_style,
    )
    rank, world = (
        (dist.get_rank(), dist.get_world_size()) if cache and dist.is_initialized() else (0, 1)
    )
    keys, first, failed, lock = [item_key(item) for item in items], {}, {}, threading.Lock()
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    order = sorted(
        first.values(),
        key=lambda i: ["video" in items[i], "image" in items[i], len(items[i].get("text") or "")],
    )
    vectors = (
        torch.full((len(items), gve.dim), torch.nan)
        if cache is None
        else cache.allocate(len(items), gve.dim)
    )
    known = cache.open(instruction, collate).read(first, vectors) if cache else set()

    training, todo = gve.training, [i for i in order[rank::world] if i not in known]
    gve.eval()
    with tqdm(total=len(todo), desc=desc, disable=desc is None or rank > 0, leave=False) as bar:
        pool = DecoderPool(
            lambda i: collate.prepare(items[i], instruction),
            lambda i: str(items[i]),
            workers=workers,
            seconds=seconds,
            fork_lock=lock,
        )
        stream = pool.map(todo, lend_threads=True)
        for batch in _batches(stream, failed, batch_tokens):
            with lock:
                vectors[list(batch)] = made = (
                    gve(to_device(collate.batch(batch.values(), raw=True), gve.device))
                    .float()
                    .cpu()
                )
            if cache:
                cache.add([{"key": keys[i], "item": items[i]} for i in batch], made)
            bar.update(len(batch))
    gve.train(training)
    if cache:
        cache.flush()
    if world > 1:
        failed = dict(
            collections.ChainMap(*all_gather_object(failed))
        )  # all shards are on the disk when this returns
        cache.read(first, vectors)
    again = [i for i, key in enumerate(keys) if first[key] != i]
    vectors[again] = vectors[[first[keys[i]] for i in again]]
    return vectors, {i: failed[first[key]] for i, key in enumerate(keys) if first[key] in failed}


def top_k(queries, corpus, k, *, block=16384, query_block=1024):
    """Find each query's k best corpus rows by inner product, exactly, ties by corpus order; rows with a NaN are never found.

    queries (N, D), corpus (M, D), any float dtype, tensors or memory maps; computed in float32 on the queries' device
    -> (scores (N, k) float32, indices (N, k) int64) on the CPU, -inf and -1 where there are fewer than k rows to find.
    The corpus is read once, in blocks: extra memory is (N + block) x D and some query_block x block floats, whatever M is.
    """
    queries, k, start = _tensor(queries).float(), min(k, len(corpus)), 0
    best_s = queries.new_full((len(queries), k), -torch.inf)
    best_i = torch.full_like(best_s, -1, dtype=torch.int64)
    while start < len(corpus):
        # Blocks grow, few scores of a late one beat the k-th best, and picking these is far cheaper than torch.topk
        stop = min(start + min(max(4 * k, 3 * start), block), len(corpus))
        c = _tensor(corpus[start:stop]).to(queries)
        for own in (slice(row, row + query_block) for row in range(0, len(queries), query_block)):
            scores = queries[own] @ c.T  # (Q, stop - start)
            row, column = (scores > best_s[own, -1:]).nonzero(
                as_tuple=True
            )  # in corpus order; equal ones come too late
            count = row.bincount(minlength=len(scores))
            place = k + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
            s = F.pad(
                best_s[own], (0, int(count.max())), value=-torch.inf
            )  # the best so far, then each row's better ones
            i = F.pad(best_i[own], (0, int(count.max())), value=-1)
            s[row, place], i[row, place] = scores[row, column], column + start
            s, order = s.sort(
                dim=1, descending=True, stable=True
            )  # stable: corpus order among equal scores
            best_s[own], best_i[own] = s[:, :k], i.gather(1, order)[:, :k]
        start = stop
    return best_s.cpu(), best_i.cpu()


def _tensor(x):
    return (
        torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else torch.as_tensor(x)
    )  # a copy: memory maps are read-only


@dataclasses.dataclass
class Flags:
    ckpt: str = flag("runs/gve-mini", "checkpoint folder or hub id")
    out: str = flag("runs/vectors", "folder to write")
    instruction: str = flag("", "system turn for every item; empty: the default one")
    prompt_style: str = flag("", "system or user turn; empty: the checkpoint's own")
    root: list[str] = flag([], "more folders that media may lie in")
    batch_tokens: int = flag(4096, "tokens per forward, padding included")
    workers: int = flag(2, "decoding processes per rank; 0 decodes inline")
    seconds: float = flag(60, "time a worker has for a clip, in seconds")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "vision tokens per video frame")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")


def main(path, flags):
    rows, items, failed = list(read_jsonl(path)), [], {}
    if not rows:
        raise ValueError(f"{path}: no items")
    for i, (number, row) in enumerate(rows):
        try:
            items.append(resolve(row, os.path.dirname(os.path.abspath(path)), flags.root))
        except (ValueError, FileNotFoundError) as error:
            failed[i] = f"{path}:{number}: {error}"
            items.append({"text": " "})  # holds the place; its vector is blanked below
    rank, _, device = join_ranks(flags.device)
    out = Path(flags.out)
    gve = GVE.from_pretrained(flags.ckpt, device=device, prompt_style=flags.prompt_style)
    vectors, more = encode(
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
    failed = {**{i: f"{path}:{rows[i][0]}: {reason}" for i, reason in more.items()}, **failed}
    vectors[list(failed)] = torch.nan
    lines = [
        {
            "id": row.get("id", str(i)),
            "line": number,
            **({"error": failed[i]} if i in failed else {}),
        }
        for i, (number, row) in enumerate(rows)
    ]
    with whole_file(out / "vectors.npy", "wb") as file:
        np.save(file, vectors.numpy())
    write_jsonl(out / "items.jsonl", lines)
    print(
        *failed.values(),
        f"{out}: {len(rows) - len(failed)} of {len(rows)} items embedded, dim {gve.dim}",
        sep="\n",
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(
            __doc__
            if sys.argv[1:] not in (["-h"], ["--help"])
            else parse_flags(Flags, sys.argv[1:], __doc__)
        )
    try:
        main(sys.argv[1], parse_flags(Flags, sys.argv[2:], __doc__))
    except (ValueError, OSError) as problem:
        sys.exit(f"embed.py: {problem}")
