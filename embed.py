"""Vectors for any number of items, and exact top-k over them (arXiv 2510.27571, section 4.1: cosines, no re-ranking).

    python embed.py items.jsonl --ckpt runs/gve-mini --out runs/vectors      # one item per line, an "id" beside it if you like
    torchrun --nproc-per-node 8 embed.py items.jsonl --ckpt ... --out ...    # the ranks share the items
    -> runs/vectors/vectors.npy (n, D) float32, NaN where an item failed, and items.jsonl, one line per item with its fate

What is encoded is kept in <out>/cache: a run that was killed goes on where it stopped.
Legend: N queries, M corpus items, D embedding dim, n items.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from data import Collator, read_jsonl, resolve, stamp
from model import GVE, to_device
from parts import packed, prepared, unpacked
from state import everyones, join_ranks


def _batches(samples, failed, batch_tokens):
    """Group (i, sample) into dicts of at most batch_tokens tokens, padding included; a reason in place of a sample is noted."""
    batch, width = {}, 0
    for i, sample in samples:
        if isinstance(sample, str):
            failed[i] = sample
            continue
        width = max(width, len(sample["ids"]))
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, width = {}, len(sample["ids"])
        batch[i] = unpacked(sample)
    if batch:
        yield batch


@torch.no_grad()
def encode(gve, items, instruction=None, *, batch_tokens=4096, workers=0, seconds=60, frames=8, max_tokens=200, max_length=8192,
           cache=None, desc=None):
    """Embed resolved items -> (vectors (n, D) float32 on the CPU, {index: reason} of the items that failed; their rows are NaN).

    Equal items are encoded once; batches hold items of like kind and length, the result is in the items' order.
    batch_tokens: tokens per forward, padding included. workers: decoding processes, which give a clip up after so many seconds;
    0 decodes inline, without a limit. cache: a Cache of this model. With it the vectors lie in a file rather than in memory, and
    torch.distributed's ranks share the work: all pass the same items and get the same. desc: label of a progress bar.
    """
    collate = Collator(gve.processor, frames=frames, max_tokens=max_tokens, max_length=max_length, prompt_style=gve.prompt_style)
    rank, world = (dist.get_rank(), dist.get_world_size()) if cache and dist.is_initialized() else (0, 1)
    keys, first, failed, lock = [item_key(item) for item in items], {}, {}, threading.Lock()
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    order = sorted(first.values(), key=lambda i: ["video" in items[i], "image" in items[i], len(items[i].get("text") or "")])
    vectors = torch.full((len(items), gve.dim), torch.nan) if cache is None else cache.room(len(items), gve.dim)
    known = cache.open(instruction, collate).read(first, vectors) if cache else set()

    def prepare(i):
        try:
            sample = collate.prepare(items[i], instruction)
        except Exception as error:  # a decoder may raise anything over a damaged file; it is listed, not hidden
            return str(error) if isinstance(error, (ValueError, FileNotFoundError)) else f"{items[i]}: {error!r}"
        return packed(sample)

    training, todo = gve.training, [i for i in order[rank::world] if i not in known]
    gve.eval()
    with tqdm(total=len(todo), desc=desc, disable=desc is None or rank > 0, leave=False) as bar:
        stream = prepared(todo, prepare, items.__getitem__, workers, seconds, lock, cores=True)
        for batch in _batches(stream, failed, batch_tokens):
            with lock:
                vectors[list(batch)] = made = gve(to_device(collate.batch(batch.values(), raw=True), gve.device)).float().cpu()
            if cache:
                cache.add([{"key": keys[i], "item": items[i]} for i in batch], made)
            bar.update(len(batch))
    gve.train(training)
    if cache:
        cache.flush()
    if world > 1:
        failed = dict(collections.ChainMap(*everyones(failed, world)))  # all shards are on the disk when this returns
        cache.read(first, vectors)
    again = [i for i, key in enumerate(keys) if first[key] != i]
    vectors[again] = vectors[[first[keys[i]] for i in again]]
    return vectors, {i: failed[first[key]] for i, key in enumerate(keys) if first[key] in failed}


def hash_weights(module):
    """SHA-256 of a module's weights, names, shapes and dtypes included. About a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def item_key(item):
    """Hash what an item's vector depends on: text, paths, spans and, standing for the content, the files' sizes and times."""
    media = [m if isinstance(m, str) else m.get("path", m.get("video")) for m in (item.get("image"), item.get("video")) if m]
    stamps = [stamp(path) if os.path.exists(path) else None for path in media]
    return hashlib.sha256(json.dumps([item, stamps], sort_keys=True).encode()).hexdigest()


def _write(path, write):
    """Write a file through write(file); it gets its name when it is whole and on the disk."""
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Cache:
    """A model's vectors on disk: FOLDER/KEY/ holds key.json, what KEY is a hash of (weights, code, instruction, protocol), and
    shards, each X.npy (n, D) float32 and X.jsonl with a line {"key", "item"} per row.

    Shards are only ever added, whole, by any number of processes; a killed one loses at most its last `every` seconds of work.
    """

    def __init__(self, folder, gve, every=15):
        self.folder, self.every, processor = Path(folder), every, gve.processor
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = [(Path(__file__).parent / name).read_text() for name in ("data.py", "model.py", "kernels/windows.py")]
        parts += processor.image_processor.to_json_string(), processor.video_processor.to_json_string()
        parts.append(processor.tokenizer.backend_tokenizer.to_str())
        self.key = {"weights": hash_weights(gve), "code and processor": hashlib.sha256("".join(parts).encode()).hexdigest(),
                    "device": gve.device.type, "torch": torch.__version__, "transformers": transformers.__version__}

    def room(self, n, dim):
        """NaN (n, dim) float32 in a file without a name: memory that the system can have back at any time."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(max(n, 1), dim)))[:n].fill_(torch.nan)

    def open(self, instruction, collate):
        """Turn to the shards of one instruction and one setting of the Collator."""
        settings = {k: v for k, v in vars(collate).items() if isinstance(v, (int, float, str, dict, type(None)))}
        content = json.dumps(self.key | settings | {"instruction": instruction}, indent=1, sort_keys=True).encode()
        self.here = self.folder / hashlib.sha256(content).hexdigest()[:16]
        self.here.mkdir(parents=True, exist_ok=True)
        _write(self.here / "key.json", lambda file: file.write(content))
        self.lines, self.vectors, self.since = [], [], time.monotonic()
        return self

    def read(self, first, vectors):
        """Copy what is there into vectors[first[key]], a memory-mapped shard at a time -> the set of these indices."""
        known = set()
        for path in sorted(self.here.glob("*.jsonl")):
            keys, shard = [row["key"] for _, row in read_jsonl(path)], np.load(path.with_suffix(".npy"), mmap_mode="r")
            rows = [row for row, key in enumerate(keys) if key in first]
            at = [first[keys[row]] for row in rows]
            vectors[at] = torch.from_numpy(shard[rows])
            known.update(at)
        return known

    def add(self, lines, vectors):
        self.lines += lines
        self.vectors.append(vectors)
        if time.monotonic() - self.since > self.every:
            self.flush()

    def flush(self):
        """Write a shard: its vectors, and then the lines, which alone make it one."""
        if self.lines:
            name, text = uuid.uuid4().hex, "".join(json.dumps(line) + "\n" for line in self.lines)
            _write(self.here / f"{name}.npy", lambda file: np.save(file, torch.cat(self.vectors).numpy()))
            _write(self.here / f"{name}.jsonl", lambda file: file.write(text.encode()))
        self.lines, self.vectors, self.since = [], [], time.monotonic()


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
            row, column = (scores > best_s[own, -1:]).nonzero(as_tuple=True)  # in corpus order; equal ones come too late
            count = row.bincount(minlength=len(scores))
            place = k + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
            s = F.pad(best_s[own], (0, int(count.max())), value=-torch.inf)  # the best so far, then each row's better ones
            i = F.pad(best_i[own], (0, int(count.max())), value=-1)
            s[row, place], i[row, place] = scores[row, column], column + start
            s, order = s.sort(dim=1, descending=True, stable=True)  # stable: corpus order among equal scores
            best_s[own], best_i[own] = s[:, :k], i.gather(1, order)[:, :k]
        start = stop
    return best_s.cpu(), best_i.cpu()


def _tensor(x):
    return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else torch.as_tensor(x)  # a copy: memory maps are read-only


def flag(default, help, **more):
    """A field of a flat dataclass of flags; more: choices."""
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, **more}, **how)


def parse_flags(cls, argv=None, doc=None, presets=None):
    """Fill the flat dataclass `cls` from the command line: a flag per field, help from its metadata; unknown flags are errors.

    bool fields become --x / --no-x, list fields take several words; presets {name: {field: value}} are defaults by --preset.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    given = {}
    if presets:  # known before the others, so that --help shows the preset's defaults
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=cls.preset)
        given = presets.get(first.parse_known_args(argv)[0].preset, {})
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        default = given.get(field.name, default)
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = f" (default {shown})" if shown != "" else ""
        how = {"default": default, "help": (field.metadata.get("help", "") + shown).replace("%", "%%")}
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            how.update(nargs="+", type=field.type.__args__[0])
        else:
            how.update(type=field.type, choices=field.metadata.get("choices"))
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    return cls(**vars(parser.parse_args(argv)))


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
    rank, out = join_ranks(), Path(flags.out)
    gve = GVE.from_pretrained(flags.ckpt, device=flags.device, prompt_style=flags.prompt_style)
    vectors, more = encode(gve, items, flags.instruction or None, batch_tokens=flags.batch_tokens, workers=flags.workers,
                           seconds=flags.seconds, frames=flags.frames, max_tokens=flags.max_tokens,
                           cache=Cache(out / "cache", gve), desc="encode")
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    failed = {**{i: f"{path}:{rows[i][0]}: {reason}" for i, reason in more.items()}, **failed}
    vectors[list(failed)] = torch.nan
    lines = [{"id": row.get("id", str(i)), "line": number, **({"error": failed[i]} if i in failed else {})}
             for i, (number, row) in enumerate(rows)]
    _write(out / "vectors.npy", lambda file: np.save(file, vectors.numpy()))
    _write(out / "items.jsonl", lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
    print(*failed.values(), f"{out}: {len(rows) - len(failed)} of {len(rows)} items embedded, dim {gve.dim}", sep="\n")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__ if sys.argv[1:] not in (["-h"], ["--help"]) else parse_flags(Flags, sys.argv[1:], __doc__))
    try:
        main(sys.argv[1], parse_flags(Flags, sys.argv[2:], __doc__))
    except (ValueError, OSError) as problem:
        sys.exit(f"embed.py: {problem}")
