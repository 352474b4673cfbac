"""Vectors and vision features on disk."""

import hashlib
import json
import os
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from support.files import file_fingerprint, read_jsonl, whole_file


def hash_weights(module):
    """SHA-256 of a module's weights, names, shapes and dtypes included. About a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def item_key(item):
    """Hash what an item's vector depends on: text, paths, spans and, standing for the content, the files' sizes and times."""
    media = [
        m if isinstance(m, str) else m.get("path", m.get("video"))
        for m in (item.get("image"), item.get("video"))
        if m
    ]
    stamps = [file_fingerprint(path) if os.path.exists(path) else None for path in media]
    return hashlib.sha256(json.dumps([item, stamps], sort_keys=True).encode()).hexdigest()


class VectorCache:
    """A model's vectors on disk: FOLDER/KEY/ holds key.json, what KEY is a hash of (weights, code, instruction, protocol), and
    shards, each X.npy (n, D) float32 and X.jsonl with a line {"key", "item"} per row.

    Shards are only ever added, whole, by any number of processes; a killed one loses at most its last `every` seconds of work.
    """

    def __init__(self, folder, gve, every=15):
        self.folder, self.every, processor = Path(folder), every, gve.processor
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = [
            (Path(__file__).parent.parent / name).read_text()
            for name in ("data.py", "model.py", "kernels/windows.py")
        ]
        parts += (
            processor.image_processor.to_json_string(),
            processor.video_processor.to_json_string(),
        )
        parts.append(processor.tokenizer.backend_tokenizer.to_str())
        self.key = {
            "weights": hash_weights(gve),
            "code and processor": hashlib.sha256("".join(parts).encode()).hexdigest(),
            "device": gve.device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def allocate(self, n, dim):
        """NaN (n, dim) float32 in a file without a name: memory that the system can have back at any time."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(max(n, 1), dim)))[
                :n
            ].fill_(torch.nan)

    def open(self, instruction, collate):
        """Turn to the shards of one instruction and one setting of the Collator."""
        settings = {
            k: v
            for k, v in vars(collate).items()
            if isinstance(v, (int, float, str, dict, type(None)))
        }
        content = json.dumps(
            self.key | settings | {"instruction": instruction}, indent=1, sort_keys=True
        ).encode()
        self.here = self.folder / hashlib.sha256(content).hexdigest()[:16]
        self.here.mkdir(parents=True, exist_ok=True)
        with whole_file(self.here / "key.json", "wb") as file:
            file.write(content)
        self.lines, self.vectors, self.since = [], [], time.monotonic()
        return self

    def read(self, first, vectors):
        """Copy what is there into vectors[first[key]], a memory-mapped shard at a time -> the set of these indices."""
        known = set()
        for path in sorted(self.here.glob("*.jsonl")):
            keys, shard = (
                [row["key"] for _, row in read_jsonl(path)],
                np.load(path.with_suffix(".npy"), mmap_mode="r"),
            )
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
            with whole_file(self.here / f"{name}.npy", "wb") as file:
                np.save(file, torch.cat(self.vectors).numpy())
            with whole_file(self.here / f"{name}.jsonl") as file:
                file.write(text)
        self.lines, self.vectors, self.since = [], [], time.monotonic()


class FeatureStore:
    """What the frozen vision tower made of each medium, one safetensors file each; a damaged file is computed anew."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def find(self, key):
        """Look a medium up -> (its file, its tensors or None). key: everything that the features depend on, as JSON."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = self.folder / name[:2] / f"{name}.safetensors"
        try:
            return str(file), load_file(file)
        except (FileNotFoundError, SafetensorError):
            return str(file), None

    def keep(self, batch):
        """Save the features of a batch (GVE.encode_vision) that were computed just now: those with a file name."""
        for kind in ("image", "video"):
            for i, file in enumerate(batch.get(f"{kind}_file") or ()):
                if file is None:
                    continue
                tensors = {
                    f"{kind}_features": batch[f"{kind}_features"][i].contiguous(),
                    f"{kind}_grid_thw": batch[f"{kind}_grid_thw"][i : i + 1],
                }
                if kind == "video":
                    tensors["second_per_grid_ts"] = batch["second_per_grid_ts"][i : i + 1]
                os.makedirs(os.path.dirname(file), exist_ok=True)
                with whole_file(
                    file, "wb"
                ) as out:  # several ranks may meet the same medium at once
                    out.write(save(tensors))
