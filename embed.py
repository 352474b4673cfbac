"""Vectors for any number of items, and exact top-k over vectors (arXiv 2510.27571, section 4.1).

    python embed.py items.jsonl --ckpt runs/gve-mini --out runs/vectors   # an item per line
    python embed.py clips/ --ckpt runs/gve-mini --out runs/vectors   # a folder's videos and images
    torchrun --nproc-per-node 8 embed.py items.jsonl --ckpt ... --out ...   # ranks share the items

    -> runs/vectors/vectors.npy     (n, D) float32, a row of NaN where an item failed
       runs/vectors/items.jsonl     a line per item: "id", "line" number or, in a folder, "path",
                                    "error" if it failed
       runs/vectors/cache/          vectors kept as they are made: a killed run continues from here

Everything is written where items failed, too; the exit status is then 1.

From Python:

    vectors, failed = encode(gve, [{"video": "a.mp4"}, {"text": "a red ball"}], workers=2)
    scores, indices = top_k(queries, corpus, 10)

Legend: n items, D embedding dim, N queries, M corpus rows.
"""

import collections
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import resolve, with_plain_paths
from model import GVE, decode_and_embed
from support.cache import NoCache, VectorCache, item_key, write_array
from support.files import read_jsonl, visible_files, whole_file
from support.flags import flag, parse_flags
from support.media import IMAGE_SUFFIXES
from support.progress import first_few, report_progress
from support.ranks import all_gather_object, join_ranks, leave_ranks

MOST_SHOWN = 10  # reasons that are printed; items.jsonl has all of them
# A folder's files with these endings are taken for videos.
VIDEO_SUFFIXES = set(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)


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
    tally=None,
):
    """Embed resolved items -> (vectors (n, D) float32 on the CPU, {index: reason} of failed items).

    A failed item's vector is NaN and costs no other item anything.

    batch_tokens    tokens per forward, padding included
    workers         decoding processes, with `seconds` per item; 0 decodes inline, without a limit,
                    and a clip that crashes its decoder ends the program
    frames, max_tokens, max_length      as in data.Collator
    cache           a VectorCache of this model. With it vectors lie in a file rather than in
                    memory, and torch.distributed's ranks share the work: all of them pass the same
                    items and get the same vectors
    desc            label of the progress reports; without one there are none
    tally           collections.Counter that gets the number of videos that each decoder read, and
                    "note: SENTENCE" for each damaged file of which only a part could be read
    """
    items = [with_plain_paths(item) for item in items]
    collate = gve.collator(frames=frames, max_tokens=max_tokens, max_length=max_length)
    settings = {
        "instruction": instruction,
        "frames": frames,
        "max_tokens": max_tokens,
        "max_length": max_length,
    }

    def embed_some(todo, failed, tally):
        return decode_and_embed(
            lambda item: collate.prepare(item, instruction),
            lambda batch: gve.embed_samples(collate, batch.values()),
            items,
            todo,
            batch_tokens=batch_tokens,
            workers=workers,
            seconds=seconds,
            failed=failed,
            tally=tally,
        )

    was_training = gve.training
    gve.eval()
    result = encode_distinct(
        items,
        embed_some,
        cache or NoCache(),
        settings,
        dim=gve.dim,
        sort_key=lambda i: kind_and_length(items[i]),  # like beside like, to save padding
        desc=desc,
        tally=tally,
    )
    gve.train(was_training)
    return result


def encode_distinct(
    items,
    embed_some,
    cache,
    settings,
    *,
    dim=None,
    sort_key=None,
    share=1,
    desc=None,
    tally=None,
):
    """Embed items as encode does, by any model: equal ones once, and those of its cache not at all.

    embed_some  function of (todo, failed, tally) that yields ([i, ...], vectors (b, D)) until all
                indices of the list `todo` are done, but for those that failed: it adds their
                reasons to the dict `failed`, and to the Counter `tally` what encode says
    settings    dict of everything besides the cache's model that the vectors depend on
    dim         D; None: as the first vectors have it
    sort_key    function of an index by which items are sorted; None: their order
    share       ranks get so many neighbours at a time

    Raises ValueError if ranks find vectors of different D.
    """
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

    # Plan: items that the cache lacks, dealt out to the ranks.
    cache.open(settings)
    dim = dim or agree_on_dim(cache.find_dim())
    known = set()
    if dim:
        vectors = cache.allocate(len(items), dim)
        known = cache.read(first, vectors)
    todo = []
    for place, i in enumerate(sorted(first.values(), key=sort_key)):
        if place // share % world == rank and i not in known:
            todo.append(i)

    # Run: decode, embed and keep, batch by batch.
    failed = {}
    own_tally = collections.Counter()
    batches = embed_some(todo, failed, own_tally)
    with report_progress(len(todo), desc, quiet=desc is None) as advance:
        if not dim:
            head = list(itertools.islice(batches, 1))
            batches = itertools.chain(head, batches)
            dim = agree_on_dim(head[0][1].shape[1] if head else 0)
            vectors = cache.allocate(len(items), max(dim, 1))
        for batch, made in batches:
            vectors[batch] = made
            cache.add([{"key": keys[i], "item": items[i]} for i in batch], made)
            advance(len(batch))
    cache.flush()

    # Expand: read the other ranks' vectors, then give equal items those of the first one.
    if world > 1:
        # A barrier: every rank has written its vectors once this returns.
        own = (failed, own_tally)
        failed = {}
        own_tally = collections.Counter()
        for others_failed, others_tally in all_gather_object(own):
            failed |= others_failed
            own_tally += others_tally
        cache.read(first, vectors)
    if tally is not None:
        tally.update(own_tally)
    equals = [i for i, key in enumerate(keys) if first[key] != i]
    vectors[equals] = vectors[[first[keys[i]] for i in equals]]
    reasons = {i: failed[first[key]] for i, key in enumerate(keys) if first[key] in failed}
    return vectors, reasons


def agree_on_dim(own):
    """Return the D that any rank knows, 0 if none does; own: this rank's, or 0."""
    known = set(all_gather_object(own)) - {0}
    if len(known) > 1:
        raise ValueError(f"ranks made vectors of different widths: {sorted(known)}")
    return max(known, default=0)


def kind_and_length(item):
    """Return a sort key: texts, images, videos, both; short texts before long ones."""
    return "video" in item, "image" in item, len(item.get("text") or "")


def top_k(queries, corpus, k, *, block=16384, query_block=1024):
    """Find each query's k best corpus rows by inner product, exactly, ties by corpus order.

    queries (N, D), corpus (M, D): tensors, arrays or memory maps of any float dtype; computed in
    float32 on the queries' device. Rows with a NaN are never found. Equal rows have equal scores.
    -> scores (N, k) float32 and indices (N, k) int64 on the CPU, -inf and -1 where fewer than k
    rows can be found; k is M if that is less.

    The corpus is read once, in blocks, so memory does not grow with M but for two numbers per row;
    rows that look like repeats are read once more. Looking for equal rows costs about as much as
    the scores of a single query, whatever N.
    """
    queries = as_tensor(queries).float()
    if queries.shape[1] != corpus.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and corpus {tuple(corpus.shape)}: D differs"
        )
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
    """Hash the first 16 columns of rows (n, D) -> (n,) int64 on the CPU: few rows agree in them.

    Every row of a corpus is looked at, so this takes neighbours in memory and adds up their bits.
    """
    some = rows[:, :16].float() + 0  # -0 + 0 = 0
    bits = some.contiguous().view(torch.int32).long()
    # Powers of an odd number; they and the sums wrap around at 2^64.
    weights = torch.full_like(bits[:1], 0x61C8864680B583EB).cumprod(1)
    return (bits * weights).sum(1).cpu()


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
        ...,
        'JSON lines: an item per line, with an "id" if you like; or a folder of videos and images',
        positional=True,
    )
    ckpt: str = flag("runs/gve-mini", "checkpoint folder or hub id")
    base: str = flag("", "the base of an adapter whose base moved; empty: as the adapter names it")
    out: str = flag("runs/vectors", "folder to write")
    instruction: str = flag("", "system turn for every item; empty: the default one")
    prompt_style: str = flag("", "system or user turn; empty: the checkpoint's own")
    root: list[str] = flag([], "further folders for media; paths may be relative to them, too")
    batch_tokens: int = flag(4096, "tokens per forward, padding included")
    workers: int = flag(
        2, "decoding processes per rank; 0: none, a clip that hangs or crashes ends the run"
    )
    seconds: float = flag(60, "time limit of a worker for one clip, in seconds")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "most vision tokens per video frame")
    min_tokens: int = flag(0, "least vision tokens per video frame; 0: the checkpoint's own")
    positions: str = flag("", "mrope or 1d; empty: the checkpoint's own")
    device: str = flag("", "cpu or cuda; empty: cuda if there is one")


def list_media(folder):
    """List a folder's videos and images, by their endings -> (items, labels {"id", "path"}).

    In the order of their paths, subfolders included, hidden files and folders left out. An image is
    an item of its own: a folder of frames is not taken for a video.
    """
    items = []
    labels = []
    for path in visible_files(folder):
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            kind = "video"
        elif suffix in IMAGE_SUFFIXES:
            kind = "image"
        else:
            continue
        inside = os.path.relpath(path, folder)
        items.append({kind: inside})
        labels.append({"id": inside, "path": str(path)})
    if not items:
        accepted = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: no videos or images here ({accepted})")
    return items, labels


def list_rows(path):
    """Read the rows of a JSON-lines file -> (rows, labels {"id", "line"})."""
    if Path(path).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise ValueError(f"{path}: give the folder of this file, or a file of JSON lines")
    rows = []
    labels = []
    for number, row in read_jsonl(path):
        labels.append({"id": row.get("id", str(len(rows))), "line": number})
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no items")
    return rows, labels


def load_checkpoint(flags, device):
    """Load the checkpoint that a program's flags name -> GVE.

    Raises ValueError for an adapter on other weights than its own, also where --base names them:
    GVE.from_pretrained only warns then.
    """
    gve = GVE.from_pretrained(
        flags.ckpt,
        device=device,
        base=flags.base,
        prompt_style=flags.prompt_style,
        min_tokens=flags.min_tokens,
        positions=flags.positions,
    )
    if gve.wrong_base:
        raise ValueError(gve.wrong_base)
    return gve


def resolve_all(rows, names, folder, roots):
    """Resolve rows -> (items, {index: reason} of rows that cannot be used).

    These keep their places, as an item of one space, so that vectors stay in line with rows.
    """
    items = []
    failed = {}
    for i, row in enumerate(rows):
        try:
            items.append(resolve(row, folder, roots))
        except (ValueError, FileNotFoundError) as error:
            failed[i] = f"{names[i]}: {error}"
            items.append({"text": " "})
    return items, failed


def main(flags):
    """Embed the items that flags name and return how many failed."""
    if os.path.isdir(flags.items):
        folder = flags.items
        rows, labels = list_media(folder)
        names = [label["path"] for label in labels]
    else:
        folder = os.path.dirname(os.path.abspath(flags.items))
        rows, labels = list_rows(flags.items)
        names = [f"{flags.items}:{label['line']}" for label in labels]
    items, failed = resolve_all(rows, names, folder, flags.root)

    rank, _, device = join_ranks(flags.device)
    out = Path(flags.out)
    gve = load_checkpoint(flags, device)
    tally = collections.Counter()
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
        tally=tally,
    )
    leave_ranks()
    if rank > 0:
        return 0

    for i, reason in reasons.items():
        if not reason.startswith(os.path.realpath(names[i])):  # the reason names most files itself
            reason = f"{names[i]}: {reason}"
        failed.setdefault(i, reason)
    vectors[list(failed)] = torch.nan

    write_array(out / "vectors.npy", vectors.numpy())
    with whole_file(out / "items.jsonl") as file:
        for i, label in enumerate(labels):
            line = dict(label)
            if i in failed:
                line["error"] = failed[i]
            file.write(json.dumps(line) + "\n")
    report(failed, tally, len(rows), gve.dim, out)
    return len(failed)


def report(failed, tally, n, dim, out):
    """Print what failed, how videos were decoded, and how many items have a vector."""
    reasons = [failed[i] for i in sorted(failed)]
    notes = [key.removeprefix("note: ") for key in tally if key.startswith("note: ")]
    for lines, more in ((reasons, "failed"), (notes, "damaged in part")):
        for line in first_few(lines, MOST_SHOWN, f"more {more}"):
            print(line)

    ways = []
    for way, count in sorted(tally.items()):
        if not way.startswith("note: "):
            ways.append(f"{way} {count}")
    if ways:
        print("videos decoded by: " + ", ".join(ways))
    last = f"{out}: {n - len(failed)} of {n} items embedded, dim {dim}"
    if failed:
        last += f"; {len(failed)} failed, reasons in {out / 'items.jsonl'}"
    print(last)


if __name__ == "__main__":
    # A file name that is not UTF-8 is shown with escapes instead of ending the program.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        failures = main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as problem:
        sys.exit(f"embed.py: error: {problem}")
    sys.exit(min(failures, 1))
