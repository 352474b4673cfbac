"""Vectors and vision features on disk, each under a key that names everything it depends on.

    cache = VectorCache("runs/vectors/cache", gve)      # a model's vectors, for embed.encode
    store = FeatureStore("runs/features/1a2b3c4d")      # a vision tower's output, for data.Collator

A key is a JSON value; its hash is the name of a folder, a row or a file.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from support.files import file_fingerprint, read_jsonl, whole_file, write_json
from support.ranks import all_gather_object

# Raise this number with every change of code after which the same weights, settings and item give
# another vector: prompt, pooled token, choice of frames, resizing, normalisation, positions. It is
# part of every key, so entries that older code made are not found again. Golden vectors in
# tests/test_embed.py fail if it is forgotten.
VECTORS_VERSION = 2


def hash_key(key):
    """Return the SHA-256 of a JSON value as 64 hex digits, whatever the order of a dict's keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def hash_weights(module):
    """Return the SHA-256 of a module's weights, names, shapes and dtypes. About a second per GB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_array(path, array):
    """Write an array as .npy, whole or not at all.

    np.save's own writing says on a full disk how many values it wrote, but neither file nor reason.
    """
    array = np.ascontiguousarray(array)  # before the header, which names the order of the values
    with whole_file(path, "wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def item_key(item):
    """Hash a resolved item: its text, paths and spans, and its files' sizes and times."""
    fingerprints = []
    for kind in ("image", "video"):
        media = item.get(kind)
        if not media:
            continue
        path = media
        if isinstance(media, dict):
            path = media.get("path", media.get("video"))
        fingerprint = None
        if os.path.exists(path):
            fingerprint = file_fingerprint(path)
        fingerprints.append(fingerprint)
    return hash_key([item, fingerprints])


def gve_key(gve):
    """Return everything but the settings of a run that a GVE's vectors depend on, a dict."""
    processor = gve.processor
    processor_key = [
        processor.image_processor.to_json_string(),
        processor.video_processor.to_json_string(),
        processor.tokenizer.backend_tokenizer.to_str(),
    ]
    return {
        "weights": hash_weights(gve),
        "processor": hash_key(processor_key),
        "prompt_style": gve.prompt_style,
        "pooling": gve.pooling,
        "min_tokens": gve.min_tokens,
        "positions": gve.positions,
        "device": gve.device.type,
    }


class NoCache:
    """Stands in for a VectorCache when vectors are not kept: nothing is found, nothing written."""

    shared_by_ranks = False

    def open(self, settings):
        pass

    def find_dim(self):
        return 0

    def allocate(self, n, dim):
        """Return NaN (n, dim) float32."""
        return torch.full((n, dim), torch.nan)

    def read(self, index_of, vectors):
        return set()

    def add(self, rows, vectors):
        pass

    def flush(self):
        pass


class SharedVectors(NoCache):
    """Stands in for a VectorCache when ranks share the work and no vectors are kept on disk."""

    shared_by_ranks = True

    def open(self, settings):
        """Begin anew."""
        self.keys = []
        self.vectors = []

    def read(self, index_of, vectors):
        """Copy all ranks' vectors with a key in index_of {key: i} to vectors[i] -> set of i."""
        known = set()
        for keys, made in all_gather_object((self.keys, self.vectors)):
            places = [index_of[key] for key in keys]
            if places:
                vectors[places] = torch.cat(made)
            known.update(places)
        return known

    def add(self, rows, vectors):
        """Add vectors (n, D) with a row {"key", "item"} each."""
        self.keys += [row["key"] for row in rows]
        self.vectors.append(vectors)


class VectorCache:
    """A model's vectors on disk.

    model: a GVE, or a dict of everything that another model's vectors depend on

    folder/KEY/key.json     everything that KEY is a hash of: weights, versions, settings
    folder/KEY/X.npy        a shard: vectors (n, D) float32
    folder/KEY/X.jsonl      its rows: {"key": item_key(item), "item": item}

    Any number of processes may add shards. A shard appears whole and never changes; a killed
    process loses at most its last `every` seconds of work.
    """

    shared_by_ranks = True

    def __init__(self, folder, model, every=15):
        self.folder = Path(folder)
        self.every = every
        self.folder.mkdir(parents=True, exist_ok=True)
        own = model if isinstance(model, dict) else gve_key(model)
        self.model_key = own | {
            "version": VECTORS_VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def open(self, settings):
        """Turn to the shards of these settings, a dict: instruction, frames, ..."""
        key = self.model_key | settings
        self.shards = self.folder / hash_key(key)[:16]
        self.shards.mkdir(parents=True, exist_ok=True)
        write_json(self.shards / "key.json", key)
        self.start_shard()

    def find_dim(self):
        """Return D of the vectors on disk under these settings, 0 if there are none."""
        for path in self.shards.glob("*.jsonl"):
            return np.load(path.with_suffix(".npy"), mmap_mode="r").shape[1]
        return 0

    def allocate(self, n, dim):
        """Return NaN (n, dim) float32 in a nameless file: memory that the system can reclaim."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            # Writing to a mapped file that a full disk cannot hold would kill the process.
            try:
                os.posix_fallocate(file.fileno(), 0, max(n, 1) * dim * 4)
            except OSError as error:
                raise OSError(
                    error.errno, f"no room for {n} vectors: {error.strerror}", str(self.folder)
                ) from error
            array = np.memmap(file, np.float32, "w+", shape=(max(n, 1), dim))
            return torch.from_numpy(array)[:n].fill_(torch.nan)

    def read(self, index_of, vectors):
        """Copy the vectors on disk with a key in index_of {key: i} to vectors[i] -> set of i.

        Shards are memory-mapped, one at a time.
        """
        known = set()
        for path in sorted(self.shards.glob("*.jsonl")):
            shard = np.load(path.with_suffix(".npy"), mmap_mode="r")
            rows = []
            places = []
            for row, (_, line) in enumerate(read_jsonl(path)):
                if line["key"] in index_of:
                    rows.append(row)
                    places.append(index_of[line["key"]])
            vectors[places] = torch.from_numpy(shard[rows])
            known.update(places)
        return known

    def add(self, rows, vectors):
        """Add vectors (n, D) with a row {"key", "item"} each; they go to disk now and then."""
        self.rows += rows
        self.vectors.append(vectors)
        if time.monotonic() - self.started > self.every:
            self.flush()

    def flush(self):
        """Write what was added as a shard. The .jsonl comes last: without it there is no shard."""
        if self.rows:
            name = uuid.uuid4().hex
            write_array(self.shards / f"{name}.npy", torch.cat(self.vectors).numpy())
            with whole_file(self.shards / f"{name}.jsonl") as file:
                for row in self.rows:
                    file.write(json.dumps(row) + "\n")
        self.start_shard()

    def start_shard(self):
        self.rows = []
        self.vectors = []
        self.started = time.monotonic()


class FeatureStore:
    """A frozen vision tower's output on disk, one safetensors file for each image or video.

    Features can be computed again: a store that cannot be written says so once and keeps no more.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.broken = False  # a file could not be written

    def find(self, key):
        """Look features up -> (file, tensors by name, or None if the file cannot be read).

        key: everything that the features depend on besides the tower's weights, a JSON value.
        """
        name = hash_key([VECTORS_VERSION, key])
        file = self.folder / name[:2] / f"{name}.safetensors"
        try:
            return str(file), load_file(file)
        except (OSError, SafetensorError):
            return str(file), None

    def keep(self, batch):
        """Save a batch's features (GVE.encode_vision) that were not read from here.

        They are the ones with a file name in batch["image_file"] or batch["video_file"].
        """
        for kind in ("image", "video"):
            for i, file in enumerate(batch.get(f"{kind}_file") or ()):
                if file is None:
                    continue
                names = [f"{kind}_grid_thw"]
                if kind == "video":
                    names.append("second_per_grid_ts")
                if kind == "video" and "grid_times" in batch:
                    names.append("grid_times")
                tensors = {name: batch[name][i : i + 1] for name in names}
                tensors[f"{kind}_features"] = batch[f"{kind}_features"][i].contiguous()
                self.write(file, tensors)

    def write(self, file, tensors):
        """Write one medium's tensors by name, unless an earlier file could not be written."""
        if self.broken:
            return
        # Several ranks may write the same file at once: each writes it whole. Waiting for the disk
        # takes milliseconds a file, and a damaged one is computed anew.
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with whole_file(file, "wb", sync=False) as out:
                out.write(save(tensors))
        except OSError as error:  # the disk is full, or may not be written
            self.broken = True
            tqdm.write(
                f"warning: no further features are kept in {self.folder}: {error}",
                file=sys.stderr,
            )
