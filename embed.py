"""Vectors for any number of items, and exact top-k over them (arXiv 2510.27571, section 4.1: cosines, no re-ranking).

    python embed.py items.jsonl --ckpt runs/gve-mini --out runs/vectors      # one item per line, an "id" beside it if you like
    -> runs/vectors/vectors.npy (n, D) float32, NaN where an item failed, and items.jsonl, one line per item with its fate

Legend: N queries, M corpus items, D embedding dim, n items.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Collator, read_jsonl, resolve
from model import GVE, to_device


class Batches(torch.utils.data.Dataset):
    """Decode and collate lists of items in DataLoader workers; an item that fails leaves its batch and takes nothing with it."""

    def __init__(self, items, order, collate, instruction):
        self.items, self.order, self.collate, self.instruction = items, order, collate, instruction

    def __len__(self):
        return len(self.order)

    def __getitem__(self, b):
        samples, good, failed = [], [], {}
        for i in self.order[b]:
            try:
                samples.append(self.collate.prepare(self.items[i], self.instruction))
                good.append(i)
            except (ValueError, FileNotFoundError) as error:
                failed[i] = str(error)
        return (self.collate.batch(samples) if samples else None), good, failed


@torch.no_grad()
def encode(gve, items, instruction=None, *, batch_size=32, workers=0, frames=8, max_tokens=200, max_length=8192, desc=None):
    """Embed resolved items -> (vectors (n, D) float32 on the CPU, {index: reason} of the items that failed; their rows are NaN).

    Equal items are encoded once. Batches hold items of like kind and length; the result is in the items' order.
    workers: decoding processes, 0 decodes inline. desc: label of the progress bar, None shows none.
    """
    names, first = [json.dumps(item, sort_keys=True) for item in items], {}
    for i, name in enumerate(names):
        first.setdefault(name, i)
    kind = [("video" in item, "image" in item, len(item.get("text") or "")) for item in items]
    keys = sorted(first.values(), key=lambda i: kind[i])
    order = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    collate = Collator(gve.processor, frames=frames, max_tokens=max_tokens, max_length=max_length,
                       prompt_style=gve.prompt_style)
    loader = torch.utils.data.DataLoader(Batches(items, order, collate, instruction), batch_size=None, num_workers=workers)
    vectors, failed = torch.full((len(items), gve.dim), torch.nan), {}
    training = gve.training
    gve.eval()
    with tqdm(total=len(keys), desc=desc, disable=desc is None, leave=False) as bar:
        for batch, good, bad in loader:
            if good:
                vectors[good] = gve(to_device(batch, gve.device)).float().cpu()
            failed.update(bad)
            bar.update(len(good) + len(bad))
    gve.train(training)
    for i, name in enumerate(names):
        j = first[name]
        vectors[i] = vectors[j]
        if j in failed:
            failed[i] = failed[j]
    return vectors, failed


def top_k(queries, corpus, k, *, block=65536, query_block=1024):
    """Find each query's k best corpus rows by inner product, exactly, ties by corpus order.

    queries (N, D), corpus (M, D), any float dtype, tensors or memory maps -> (scores (N, k) float32, indices (N, k) int64).
    The corpus is read in blocks, so extra memory is query_block x block floats whatever M is.
    """
    k = min(k, len(corpus))
    scores, indices = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for row in range(0, len(queries), query_block):
        q = _tensor(queries[row : row + query_block]).float()
        best_s, best_i = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for start in range(0, len(corpus), block):
            c = _tensor(corpus[start : start + block]).to(q)
            s, i = _top(q @ c.T, min(k, len(c)))
            # Earlier blocks stand first, so a stable sort keeps corpus order among equal scores.
            best_s, order = torch.cat([best_s, s], 1).sort(dim=1, descending=True, stable=True)
            best_s, best_i = best_s[:, :k], torch.cat([best_i, i + start], 1).gather(1, order)[:, :k]
        scores[row : row + len(q)], indices[row : row + len(q)] = best_s.cpu(), best_i.cpu()
    return scores, indices


def _tensor(x):
    return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else torch.as_tensor(x)  # a copy: memory maps are read-only


def _top(scores, k):
    """topk with ties by column. torch.topk breaks them arbitrarily, also at its edge: rows with a tie there pay for a sort."""
    s, i = scores.topk(k, dim=1)
    i, order = i.sort(dim=1)
    s, order = s.gather(1, order).sort(dim=1, descending=True, stable=True)
    i = i.gather(1, order)
    edge = s[:, -1:]
    tied = (scores == edge).sum(1) > (s == edge).sum(1)
    if tied.any():
        s[tied], i[tied] = (x[:, :k] for x in scores[tied].sort(dim=1, descending=True, stable=True))
    return s, i


def parse_flags(cls, argv=None, doc=None, presets=None):
    """Fill the flat dataclass `cls` from the command line: a flag per field, help from its metadata; unknown flags are errors.

    bool fields become --x / --no-x, list fields take several words; presets {name: {field: value}} are defaults by --preset.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        how = {"default": default, "help": field.metadata.get("help", "") + f" (default {default})".replace("%", "%%")}
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            how.update(nargs="+", type=field.type.__args__[0])
        else:
            how.update(type=field.type, choices=field.metadata.get("choices"))
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    if presets:
        parser.set_defaults(**presets[parser.parse_known_args(argv)[0].preset])
    return cls(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Flags:
    ckpt: str = dataclasses.field(default="runs/gve-mini", metadata={"help": "checkpoint folder or hub id"})
    out: str = dataclasses.field(default="runs/vectors", metadata={"help": "folder to write"})
    instruction: str = dataclasses.field(default="", metadata={"help": "system turn for every item; empty: the default one"})
    prompt_style: str = dataclasses.field(default="", metadata={"help": "system or user turn; empty: the checkpoint's own"})
    root: list[str] = dataclasses.field(default_factory=list, metadata={"help": "more folders that media may lie in"})
    batch_size: int = dataclasses.field(default=32, metadata={"help": "items per forward"})
    workers: int = dataclasses.field(default=2, metadata={"help": "decoding processes"})
    frames: int = dataclasses.field(default=8, metadata={"help": "frames per video, even"})
    max_tokens: int = dataclasses.field(default=200, metadata={"help": "vision tokens per video frame"})
    device: str = dataclasses.field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "torch device"})


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
    gve = GVE.from_pretrained(flags.ckpt, device=flags.device, prompt_style=flags.prompt_style)
    vectors, more = encode(gve, items, flags.instruction or None, batch_size=flags.batch_size, workers=flags.workers,
                           frames=flags.frames, max_tokens=flags.max_tokens, desc="encode")
    failed = {**{i: f"{path}:{rows[i][0]}: {reason}" for i, reason in more.items()}, **failed}
    vectors[list(failed)] = torch.nan
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [{"id": row.get("id", str(i)), "line": number, **({"error": failed[i]} if i in failed else {})}
             for i, (number, row) in enumerate(rows)]
    (out / "items.jsonl.part").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(out / "vectors.npy.part", "wb") as file:
        np.save(file, vectors.numpy())
    for name in ("vectors.npy", "items.jsonl"):
        os.replace(out / f"{name}.part", out / name)
    for reason in failed.values():
        print(reason)
    print(f"{out}: {len(rows) - len(failed)} of {len(rows)} items embedded, dim {gve.dim}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__ if sys.argv[1:] not in (["-h"], ["--help"]) else parse_flags(Flags, sys.argv[1:], __doc__))
    main(sys.argv[1], parse_flags(Flags, sys.argv[2:], __doc__))
