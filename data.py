"""Items, media, batches: everything between files on disk and tensors for model.py (arXiv 2510.27571, sections 4.1, 5.1, A.3, A.7).

An *item* is a dict with any of `text`, `image`, `video`; DESIGN's forms of media are resolved, decoded, resized by transformers' own
rule and tokenised here. A *mixture* is a list of training sources; every step draws one source, the same on every rank.

    python data.py check runs/mini/train/mixture.json --root runs/mini     # every bad row as file:line, about 10 s for the mini world

Legend: F frames, H height, W width, B batch, T tokens, P patches, G global batch of a source.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

DEFAULT_INSTRUCTION = "You are a helpful assistant."
END = "<|endoftext|>"  # the pooled token
IMAGE_TOKENS, MIN_TOKENS = 256, 4  # vision tokens per image and at least per frame (released processor; section A.7)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TASKS = ("T2T", "T2I", "TI2I", "TI2T", "TI2TI", "I2I", "I2T", "T2TI", "T2V", "I2V", "V2V", "TI2V", "TV2V")


class MediaError(ValueError):
    """A media file that cannot be used; the message names it."""


# ---- media ----

def sample_indices(n, frames):
    """Uniform frame indices of the UVRB protocol, linspace(0, n-1, frames).round(); a shorter clip repeats some. -> (frames,) int64"""
    if frames < 2 or frames % 2:
        raise ValueError(f"frames must be even and at least 2 (Qwen2.5-VL merges frames in pairs), got {frames}")
    return np.linspace(0, n - 1, frames).round().astype(np.int64)


def window(n, fps, spec):
    """First frame and number of frames of spec's start/end (seconds) in a clip of n frames at fps; at least one frame."""
    start, end = spec.get("start", 0), spec.get("end")
    if start < 0 or (end is not None and end <= start) or start * fps >= n:
        raise MediaError(f"{spec['path']}: start {start} and end {end} do not lie in a clip of {n / fps:.2f} s")
    first = int(start * fps)
    last = n if end is None else min(n, max(first + 1, math.ceil(end * fps - 1e-6)))
    return first, last - first


@functools.cache
def _say_once(message):
    warnings.warn(message, stacklevel=3)


def _read(path, choose):
    """Decode the frames that choose(n, fps) asks for -> (uint8 (F, H, W, 3), n frames of the file, fps). decord first, PyAV for the rest."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")
    import decord  # late: importing it before torch can hang DataLoader workers
    try:
        reader = decord.VideoReader(path, num_threads=1)
        n, fps = len(reader), float(reader.get_avg_fps())
        if n > 0 and fps > 0:
            return reader.get_batch(choose(n, fps)).asnumpy(), n, fps
        reason = f"{n} frames at {fps} fps"
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    frames = _read_av(path, choose, reason)
    _say_once(f"decord cannot read some videos (first: {path}: {reason}); PyAV reads those")
    return frames


def _read_av(path, choose, reason):
    import av
    try:
        with av.open(path) as file:
            fps = float(file.streams.video[0].average_rate or 0)
            n = sum(1 for _ in file.decode(video=0))  # the header's count is often absent or wrong
        if n == 0 or fps <= 0:
            raise MediaError(f"{path}: {n} frames at {fps} fps")
        indices = choose(n, fps)
        with av.open(path) as file:
            kept = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(file.decode(video=0)) if i in set(indices.tolist())}
        return np.stack([kept[i] for i in indices.tolist()]), n, fps
    except MediaError:
        raise
    except (av.FFmpegError, ValueError, IndexError, KeyError) as error:  # ValueError: metadata that is not UTF-8
        raise MediaError(f"{path}: not a readable video (decord: {reason}; PyAV: {error})") from error


def load_video(video, frames=8):
    """Decode `frames` uniform frames of a resolved video -> (uint8 (F, H, W, 3), duration of the clip or window in seconds).

    video: path of a file or a folder of frames in name order, or {"path", "start"?, "end"?, "fps"?}; raises MediaError.
    """
    spec = video if isinstance(video, dict) else {"path": video}
    path, span = str(spec["path"]), {}

    def choose(n, fps):
        first, count = window(n, fps, spec)
        span["seconds"] = count / fps
        return first + sample_indices(count, frames)

    if os.path.isdir(path):
        files = sorted(f for f in os.listdir(path) if Path(f).suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise MediaError(f"{path}: a folder without frames ({', '.join(sorted(IMAGE_SUFFIXES))})")
        images = [load_image(os.path.join(path, files[i])) for i in choose(len(files), spec.get("fps", 8))]
        if len({image.shape for image in images}) > 1:
            raise MediaError(f"{path}: frames of different sizes {sorted({image.shape[:2] for image in images})}")
        return np.stack(images), span["seconds"]
    pixels = _read(path, choose)[0]
    return pixels, span["seconds"]


def load_image(image):
    """Decode a resolved image: a path, or {"video": path, "time": seconds} for a video's frame -> uint8 (H, W, 3); raises MediaError."""
    if isinstance(image, dict):
        def choose(n, fps):
            if not 0 <= image["time"] <= n / fps:
                raise MediaError(f"{image['video']}: time {image['time']} does not lie in a clip of {n / fps:.2f} s")
            return np.array([min(int(image["time"] * fps), n - 1)])
        return _read(str(image["video"]), choose)[0][0]
    from PIL import Image
    if not os.path.isfile(image):
        raise FileNotFoundError(f"{image}: no such image file")
    try:
        with Image.open(image) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{image}: not a readable image ({error})") from error


# ---- items ----

MEDIA_KEYS = {"video": {"path", "start", "end", "fps"}, "image": {"video", "time"}}


def check_item(item):
    """Raise ValueError, naming the key and what is accepted, unless `item` has the form of an item."""
    if not isinstance(item, dict) or not any(item.get(k) for k in ("text", "image", "video")):
        raise ValueError(f"an item needs a non-empty text, image or video, got {item!r}")
    if item.get("text") is not None and not isinstance(item["text"], str):
        raise ValueError(f"text must be a string, got {item['text']!r}")
    for kind, accepted in MEDIA_KEYS.items():
        media, main = item.get(kind), "path" if kind == "video" else "video"
        if isinstance(media, dict):
            if set(media) - accepted or not isinstance(media.get(main), str):
                raise ValueError(f"{kind} has keys {sorted(media)}, accepted: {main} (required), {', '.join(sorted(accepted - {main}))}")
            numbers = {k: v for k, v in media.items() if k != main and v is not None}
            if kind == "image" and "time" not in media or not all(isinstance(v, (int, float)) for v in numbers.values()):
                raise ValueError(f"{kind} needs numbers of seconds (or frames per second) beside {main}, got {media}")
        elif media is not None and not isinstance(media, str):
            raise ValueError(f"{kind} must be a path or a dict with {main}, got {media!r}")


def resolve(item, base, roots=()):
    """Return the item with absolute real media paths, which must exist and lie under `base` or one of `roots` (symlinks followed).

    Raises ValueError for a wrong form or a path that leaves its roots, FileNotFoundError for one that is not there.
    """
    check_item(item)
    out = {k: item[k] for k in ("text", "image", "video") if item.get(k)}
    for kind, main in (("image", "video"), ("video", "path")):
        media = out.get(kind)
        if media is None:
            continue
        given = media[main] if isinstance(media, dict) else media
        real = os.path.realpath(os.path.join(base, given))
        allowed = [os.path.realpath(r) for r in (base, *roots)]
        if not any(os.path.commonpath([real, root]) == root for root in allowed):
            raise ValueError(f"{kind} {given!r} leaves the allowed roots {allowed} (add one with --root)")
        if not os.path.exists(real):
            raise FileNotFoundError(f"{kind} {given!r}: {real} does not exist")
        out[kind] = {**media, main: real} if isinstance(media, dict) else real
    return out


def content_id(item):
    """Hash a resolved item's normalised text, media paths and spans to 63 bits: equal content, equal id (duplicate mask of the loss)."""
    media = [sorted(m.items()) if isinstance(m, dict) else m for m in (item.get("image"), item.get("video"))]
    key = json.dumps([" ".join((item.get("text") or "").lower().split()), *media])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def read_jsonl(path):
    """Yield (line number, dict) of a JSON-lines file; raises ValueError naming file:line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")


def _parse(line, where):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


# ---- collation ----

class Collator:
    """Turn resolved items into model inputs with transformers' processors (resize, normalise, patches) and our prompt.

    frames per video (even), max_tokens vision tokens per video frame, max_length tokens in all. padding_side: default the tokenizer's.
    """

    def __init__(self, processor, *, frames=8, max_tokens=200, max_length=8192, padding_side=None):
        sample_indices(1, frames)  # rejects odd counts early
        if max_tokens < MIN_TOKENS:
            raise ValueError(f"max_tokens must be at least {MIN_TOKENS}, got {max_tokens}")
        self.processor, self.frames, self.max_tokens, self.max_length = processor, frames, max_tokens, max_length
        self.tokenizer = processor.tokenizer
        self.padding_side = padding_side or self.tokenizer.padding_side
        self.end, self.image_pad, self.video_pad = self.tokenizer.convert_tokens_to_ids([END, "<|image_pad|>", "<|video_pad|>"])

    def __call__(self, items, instruction=None):
        """items: list of B items; instruction: one system turn for all, or a list of B -> dict of tensors, see `batch`."""
        instructions = instruction if isinstance(instruction, list) else [instruction] * len(items)
        return self.batch([self.prepare(*pair) for pair in zip(items, instructions, strict=True)])

    def prepare(self, item, instruction=None):
        """Decode and tokenise one item -> dict of `ids` (list of int) and, where there are media, pixels (P, C*2*14*14) and grid (1, 3)."""
        sample, vision = {}, ""
        try:
            if item.get("video"):
                frames, seconds = load_video(item["video"], self.frames)
                made = self._process(self.processor.video_processor, self.max_tokens, videos=[_channels_first(frames)],
                                     do_sample_frames=False, cap_pixels_per_frame=False)
                sample.update(pixel_values_videos=made["pixel_values_videos"], video_grid_thw=made["video_grid_thw"],
                              second_per_grid_ts=self.processor.video_processor.temporal_patch_size * seconds / self.frames)
                vision += "<|vision_start|><|video_pad|><|vision_end|>"
            if item.get("image"):
                pixels = _channels_first(load_image(item["image"]))
                made = self._process(self.processor.image_processor, IMAGE_TOKENS, images=[pixels])
                sample.update(pixel_values=made["pixel_values"], image_grid_thw=made["image_grid_thw"])
                vision += "<|vision_start|><|image_pad|><|vision_end|>"
        except ValueError as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{item.get('video') or item.get('image')}: {error}") from error  # transformers' resize: aspect ratio > 200
        sample["ids"] = self._tokens(vision, item.get("text") or "", instruction, sample)
        return sample

    def _process(self, processor, max_tokens, **media):
        unit = (processor.patch_size * processor.merge_size) ** 2  # pixels of one vision token, 28 x 28
        size = {"shortest_edge": MIN_TOKENS * unit, "longest_edge": max_tokens * unit}
        return processor(**media, size=size, input_data_format="channels_first", return_tensors="pt")

    def _tokens(self, vision, text, instruction, sample):
        """Token ids of the whole prompt; where they exceed max_length, the tail of the user's text goes and nothing else."""
        instruction, text = (s.replace("<|", "< |") for s in (instruction or DEFAULT_INSTRUCTION, text))  # no special tokens from users
        head, tail = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{vision}", "<|im_end|>\n<|im_start|>assistant\n" + END
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        ids = encode(head + text + tail)
        merged = self.processor.image_processor.merge_size ** 2
        for pad, grid in ((self.video_pad, "video_grid_thw"), (self.image_pad, "image_grid_thw")):
            if grid in sample:
                at = ids.index(pad)
                ids[at : at + 1] = [pad] * (int(sample[grid].prod()) // merged)
        excess = len(ids) - self.max_length
        if excess > 0:
            n_tail, n_vision = len(encode(tail)), sum(i in (self.video_pad, self.image_pad) for i in ids)
            n_head = len(encode(head)) + n_vision - vision.count("_pad|>")
            if n_head + n_tail > self.max_length:
                grids = {k: sample[k].tolist()[0] for k in ("video_grid_thw", "image_grid_thw") if k in sample}
                raise ValueError(f"{n_head + n_tail} tokens before any text exceed max_length {self.max_length}: {n_vision} vision tokens "
                                 f"({self.frames} frames x at most {self.max_tokens} tokens; grids t, h, w in patches {grids}) and the prompt")
            ids = ids[: len(ids) - n_tail - excess] + ids[-n_tail:]
        assert ids[-1] == self.end, f"the pooled token must be {END}"
        return ids

    def batch(self, samples):
        """Pad and stack prepared samples -> input_ids, attention_mask, mm_token_type_ids (B, T) int64 and, where any sample has them,
        pixel_values(_videos) (P, C*2*14*14) float32, image/video_grid_thw (n, 3), second_per_grid_ts (n_videos,) float32."""
        width = max(len(s["ids"]) for s in samples)
        ids = torch.full((len(samples), width), self.end)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            n = len(sample["ids"])
            where = slice(width - n, width) if self.padding_side == "left" else slice(0, n)
            ids[row, where] = torch.tensor(sample["ids"])
            mask[row, where] = 1
        out = {"input_ids": ids, "attention_mask": mask,
               "mm_token_type_ids": (ids == self.image_pad).long() + 2 * (ids == self.video_pad).long()}
        for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if parts := [s[key] for s in samples if key in s]:
                out[key] = torch.cat(parts)
        if seconds := [s["second_per_grid_ts"] for s in samples if "second_per_grid_ts" in s]:
            out["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32)
        return out


def _channels_first(pixels):
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3)  # a copy: PIL's buffer is read-only


# ---- training files and mixtures ----

class Rows:
    """A JSON-lines training file read row by row through an index of byte offsets: millions of rows cost 16 bytes each."""

    def __init__(self, path):
        index, offset = [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    index.append((offset, number))
                offset += len(line)
        self.path, self.index = str(path), np.array(index, dtype=np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self.index)

    def where(self, i):
        return f"{self.path}:{self.index[i, 1]}"

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.index[i, 0])
            return _parse(file.readline(), self.where(i))


@dataclasses.dataclass
class Source:
    """One entry of a mixture (Tables 6 and 7)."""
    name: str
    task: str  # "T2V": query form 2 candidate form
    path: str  # training file, relative to the mixture
    samples: int = 0  # pairs that count as one pass: more rows are subsampled, fewer repeat; 0 = as many as there are rows
    negatives: int = 0  # hard negatives used per row
    batch_size: int = 32  # the paper's, per GPU on 32 GPUs; times --batch-scale it is the global batch
    instruction: str = DEFAULT_INSTRUCTION  # system turn of the queries; candidates get the default one
    rows: Rows = None

    def load(self, i, roots=()):
        """Row i, its items resolved -> (query, positive, [negatives]); raises ValueError or FileNotFoundError naming file:line."""
        row, base = self.rows[i], os.path.dirname(os.path.abspath(self.path))
        try:
            if set(row) - {"query", "positive", "negatives", "id"} or not {"query", "positive"} <= set(row):
                raise ValueError(f"keys {sorted(row)}; accepted: query, positive (both required), negatives, id")
            return (resolve(row["query"], base, roots), resolve(row["positive"], base, roots),
                    [resolve(item, base, roots) for item in row.get("negatives", [])[: self.negatives]])
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{self.rows.where(i)}: {error}") from error


def load_mixture(path):
    """Read a mixture -> list of Source with their rows indexed; raises ValueError naming the file, the entry and what is accepted."""
    fields = {f.name: f.type for f in dataclasses.fields(Source) if f.name != "rows"}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: a mixture is a non-empty JSON list of sources")
    sources = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number} ({entry.get('name', '?') if isinstance(entry, dict) else entry})"
        if not isinstance(entry, dict) or set(entry) - set(fields) or not {"name", "task", "path"} <= set(entry):
            raise ValueError(f"{where}: has {sorted(entry)}; accepted: {', '.join(fields)} (name, task, path required)")
        if wrong := [k for k, v in entry.items() if type(v) is not fields[k]]:
            raise ValueError(f"{where}: {wrong[0]} must be {fields[wrong[0]].__name__}, got {entry[wrong[0]]!r}")
        if entry["task"] not in TASKS:
            raise ValueError(f"{where}: task {entry['task']!r}; accepted: {', '.join(TASKS)}")
        if entry.get("batch_size", 1) < 1 or min(entry.get("samples", 0), entry.get("negatives", 0)) < 0:
            raise ValueError(f"{where}: batch_size must be positive, samples and negatives not negative")
        source = Source(**entry)
        source.path = str(Path(path).parent / source.path)
        if not os.path.isfile(source.path):
            raise ValueError(f"{where}: training file {source.path} does not exist")
        source.rows = Rows(source.path)
        if len(source.rows) == 0:
            raise ValueError(f"{where}: training file {source.path} is empty")
        source.samples = source.samples or len(source.rows)
        sources.append(source)
    if len({s.name for s in sources}) < len(sources):
        raise ValueError(f"{path}: two entries share a name: {sorted(s.name for s in sources)}")
    return sources


class Sampler:
    """Draw single-source global batches. What is drawn depends on seed, step and probabilities alone: every rank draws the same.

    A source's rows come without replacement and are reshuffled when exhausted (the last batch of a pass may be short).
    Replaying `draw` over the first n steps restores the position of step n.
    """

    def __init__(self, sources, batch_scale=1.0, seed=42):
        self.sources, self.seed = sources, seed
        self.rows = [min(s.samples, len(s.rows)) for s in sources]  # distinct rows of one pass
        self.batch = [max(1, round(s.batch_size * batch_scale)) for s in sources]  # G
        self.drawn = [0] * len(sources)  # rows drawn so far
        self.order = functools.lru_cache(2 * len(sources))(self._order)

    def _order(self, k, epoch):
        total = len(self.sources[k].rows)
        subset = np.random.default_rng([self.seed, k]).permutation(total)[: self.rows[k]]
        return np.random.default_rng([self.seed, k, epoch]).permutation(subset)

    def draw(self, step, probabilities):
        """-> (source number, row numbers (<= G,) int64)"""
        k = int(np.random.default_rng([self.seed, step]).choice(len(self.sources), p=probabilities))
        epoch, at = divmod(self.drawn[k], self.rows[k])
        rows = self.order(k, epoch)[at : at + self.batch[k]]
        self.drawn[k] += len(rows)
        return k, rows


class Steps(torch.utils.data.Dataset):
    """One rank's share of a list of drawn batches, decoded and collated by DataLoader workers: item i is step i.

    A row that cannot be used is replaced by the next row of its file (the same one for any number of ranks) and listed under `bad`.
    """

    def __init__(self, plan, sources, collate, *, rank=0, world=1, micro_batch=32, roots=()):
        self.plan, self.sources, self.collate = plan, sources, collate
        self.rank, self.world, self.micro, self.roots = rank, world, micro_batch, roots

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, i):
        k, rows = self.plan[i]
        source, bad, triples = self.sources[k], [], []
        for row in rows[self.rank :: self.world]:
            triples.append(self._usable(source, int(row), bad))
        queries, positives, negatives = [t[0] for t in triples], [t[1] for t in triples], [n for t in triples for n in t[2]]
        chunk = lambda samples: [self.collate.batch(samples[j : j + self.micro]) for j in range(0, len(samples), self.micro)]  # noqa: E731
        parts = {"query": queries, "positive": positives, "negative": negatives}
        return {"source": k, "rows": rows, "bad": bad, **{name: chunk([s for s, _ in part]) for name, part in parts.items()},
                "p_ids": torch.tensor([c for _, c in positives], dtype=torch.long),
                "n_ids": torch.tensor([c for _, c in negatives], dtype=torch.long)}

    def _usable(self, source, row, bad):
        """Prepare (query, positive, [negatives]), each as (sample, content id), from `row` or the first usable one after it."""
        for attempt in range(100):
            i = (row + attempt) % len(source.rows)
            try:
                query, positive, negatives = source.load(i, self.roots)
                prepared = [(self.collate.prepare(item, source.instruction if item is query else None), content_id(item))
                            for item in (query, positive, *negatives)]
                return prepared[0], prepared[1], prepared[2:]
            except (ValueError, FileNotFoundError) as error:
                bad.append(str(error) if source.path in str(error) else f"{source.rows.where(i)}: {error}")
        raise ValueError(f"100 rows in a row cannot be used, last: {bad[-1]}")


# ---- flags and the check command ----

def parse_flags(cls, argv=None, doc=None, presets=None):
    """Fill the flat dataclass `cls` from the command line: one flag per field, help from its metadata, unknown flags are errors.

    bool fields become --x / --no-x, list fields take several words. presets: {name: {field: value}} chosen by --preset change defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        how = {"default": default, "help": f"{field.metadata.get('help', '')} (default {default})"}
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, list):
            how.update(nargs="+", type=field.type.__args__[0])
        else:
            how.update(type=field.type, choices=field.metadata.get("choices"))
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    known = parser.parse_known_args(argv)[0] if presets else None
    if presets:
        parser.set_defaults(**presets[known.preset])
    return cls(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class CheckFlags:
    root: list[str] = dataclasses.field(default_factory=list, metadata={"help": "folders that media may lie in, beside the file's own"})


def check(path, roots=()):
    """Yield one "file:line: reason" per unusable row of a training file, or of every file of a mixture (*.json); media are decoded."""
    sources = load_mixture(path) if str(path).endswith(".json") else [Source("file", "T2V", str(path), negatives=10**6, rows=Rows(path))]
    for source in sources:
        if len(source.rows) == 0:
            yield f"{source.path}: empty"
        for i in range(len(source.rows)):
            try:
                query, positive, negatives = source.load(i, roots)
                for item in (query, positive, *negatives):
                    _decode(item)
                if path_is_short := len(negatives) < source.negatives < 10**6:
                    raise ValueError(f"{len(negatives)} negatives, the mixture promises {source.negatives}" * path_is_short)
            except (ValueError, FileNotFoundError) as error:
                yield str(error) if str(error).startswith(source.path) else f"{source.rows.where(i)}: {error}"


@functools.lru_cache(4096)
def _decodable(kind, media):
    (load_video if kind == "video" else load_image)(json.loads(media))


def _decode(item):
    for kind in ("image", "video"):
        if item.get(kind):
            _decodable(kind, json.dumps(item[kind]))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "check":
        sys.exit("usage: python data.py check FILE.jsonl|MIXTURE.json [--root DIR ...]")
    target, flags = sys.argv[2], parse_flags(CheckFlags, sys.argv[3:], __doc__)
    problems = 0
    for problem in check(target, flags.root):
        problems += 1
        print(problem)
    print(f"{target}: {problems} unusable rows")
    sys.exit(1 if problems else 0)
