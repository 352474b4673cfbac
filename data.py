"""Items, media, mixtures: everything between files on disk and model.py's tensors (arXiv 2510.27571, sections 4.1, A.3, A.7).

An *item* is a dict with any of `text`, `image`, `video`. A *mixture* is a list of training sources; every step draws one source,
the same on every rank. decord decodes (PyAV what it cannot), transformers' own processors resize and cut patches.

Commands: `python data.py check FILE`, `python data.py mixture FILE` (extras/mixture.py)
Legend: F frames, H height, W width, B batch, T tokens, P patches, G global batch of a source, K sources.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

DEFAULT_INSTRUCTION = "You are a helpful assistant."
END = "<|endoftext|>"  # the pooled token
IMAGE_TOKENS, MIN_TOKENS = 256, 4  # vision tokens per image, and at least per frame (the released processor's limits)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TASKS = "T2T T2I TI2I TI2T TI2TI I2I I2T T2TI T2V I2V V2V TI2V TV2V".split()


class MediaError(ValueError):
    """A media file that cannot be used; the message names it."""


def sample_indices(n, frames):
    """Return UVRB's uniform indices linspace(0, n-1, frames).round(), (frames,) int64; a shorter clip repeats some."""
    if frames < 2 or frames % 2:
        raise ValueError(f"frames must be even and at least 2 (Qwen2.5-VL merges frames in pairs), got {frames}")
    return np.linspace(0, n - 1, frames).round().astype(np.int64)


def read_frames(path, choose):
    """Decode the frames whose indices choose(n, fps) returns -> uint8 (F, H, W, 3); decord first, then PyAV."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such video file")
    import decord  # late: imported before torch it can hang DataLoader workers
    try:
        reader = decord.VideoReader(path, num_threads=1)
        n, fps = len(reader), float(reader.get_avg_fps())
        if n > 0 and fps > 0:
            return reader.get_batch(choose(n, fps)).asnumpy()
        reason = f"{n} frames at {fps} fps"
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    import av
    try:
        with av.open(path) as file:
            fps = float(file.streams.video[0].average_rate or 0)
            n = sum(1 for _ in file.decode(video=0))  # the header's count is often absent or wrong
        if n == 0 or fps <= 0:
            raise MediaError(f"{path}: {n} frames at {fps} fps")
        indices = choose(n, fps).tolist()
        with av.open(path) as file:
            kept = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(file.decode(video=0)) if i in set(indices)}
        warnings.warn("decord cannot read some videos (AV1, for instance); PyAV reads those", stacklevel=2)  # shown once
        return np.stack([kept[i] for i in indices])
    except (av.FFmpegError, UnicodeDecodeError, IndexError, KeyError) as error:  # metadata may not be UTF-8
        raise MediaError(f"{path}: not a readable video (decord: {reason}; PyAV: {error})") from error


def load_video(video, frames=8):
    """Decode uniform frames of a resolved video -> (uint8 (F, H, W, 3), duration of the clip or window in seconds).

    video: path of a file or of a folder of frames in name order, or {"path", "start", "end", "fps"}: optional seconds, and the
    folder's frame rate (8). Raises MediaError or FileNotFoundError, naming the file.
    """
    spec = video if isinstance(video, dict) else {"path": video}
    path, start, end, seconds = str(spec["path"]), spec.get("start") or 0, spec.get("end"), 0.0

    def choose(n, fps):
        nonlocal seconds
        if start < 0 or start * fps >= n or (end is not None and end <= start):
            raise MediaError(f"{path}: start {start} and end {end} do not lie in a clip of {n / fps:.2f} s")
        first = int(start * fps)
        last = n if end is None else min(n, max(first + 1, math.ceil(end * fps - 1e-6)))  # at least one frame
        seconds = (last - first) / fps
        return first + sample_indices(last - first, frames)
    if not os.path.isdir(path):
        return read_frames(path, choose), seconds
    if not (files := sorted(f for f in os.listdir(path) if Path(f).suffix.lower() in IMAGE_SUFFIXES)):
        raise MediaError(f"{path}: a folder without frames ({', '.join(sorted(IMAGE_SUFFIXES))})")
    images = [load_image(os.path.join(path, files[i])) for i in choose(len(files), spec.get("fps") or 8)]
    if len({image.shape for image in images}) > 1:
        raise MediaError(f"{path}: frames of different sizes {sorted({image.shape[:2] for image in images})}")
    return np.stack(images), seconds


def load_image(image):
    """Decode a path, or {"video": path, "time": seconds} for a video's frame -> uint8 (H, W, 3); raises as load_video."""
    if isinstance(image, dict):
        def choose(n, fps):
            if not 0 <= image["time"] <= n / fps:
                raise MediaError(f"{image['video']}: time {image['time']} does not lie in a clip of {n / fps:.2f} s")
            return np.array([min(int(image["time"] * fps), n - 1)])
        return read_frames(str(image["video"]), choose)[0]
    from PIL import Image
    if not os.path.isfile(image):
        raise FileNotFoundError(f"{image}: no such image file")
    try:
        with Image.open(image) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{image}: not a readable image ({error})") from error


FORMS = {"image": ("video", {"time"}), "video": ("path", {"start", "end", "fps"})}  # dict forms: path key, number keys


def check_item(item):
    """Raise ValueError, naming the key and what is accepted, unless `item` has the form of an item."""
    if not isinstance(item, dict) or not any(item.get(k) for k in ("text", "image", "video")):
        raise ValueError(f"an item needs a non-empty text, image or video, got {item!r}")
    if not isinstance(item.get("text") or "", str):
        raise ValueError(f"text must be a string, got {item['text']!r}")
    for kind, (main, numbers) in FORMS.items():
        media = item.get(kind) or ""
        spec = media if isinstance(media, dict) else {main: media}
        wrong = [k for k, v in spec.items() if k != main and (k not in numbers or not isinstance(v, (int, float, type(None))))]
        if wrong or not isinstance(spec.get(main), str) or (kind == "image" and spec is media and media.get("time") is None):
            raise ValueError(f"{kind} must be a path or a dict of {main} and numbers {sorted(numbers)}, got {media!r}")


def resolve(item, base, roots=()):
    """Return the item with absolute real media paths, which must exist under `base` or one of `roots` (symlinks followed). Raises
    ValueError for a wrong form or a path that leaves its roots, FileNotFoundError for a missing file."""
    check_item(item)
    out = {key: item[key] for key in ("text", "image", "video") if item.get(key)}
    for kind in FORMS.keys() & out.keys():
        media, main = out[kind], FORMS[kind][0]
        given = media[main] if isinstance(media, dict) else media
        real, allowed = os.path.realpath(os.path.join(base, given)), [os.path.realpath(r) for r in (base, *roots)]
        if not any(os.path.commonpath([real, root]) == root for root in allowed):
            raise ValueError(f"{kind} {given!r} leaves the allowed roots {allowed} (add one with --root)")
        if not os.path.exists(real):
            raise FileNotFoundError(f"{kind} {given!r}: {real} does not exist")
        out[kind] = {**media, main: real} if isinstance(media, dict) else real
    return out


def content_id(item):
    """Hash a resolved item's normalised text, media paths and spans to 63 bits: equal content, equal id (for the loss)."""
    media = [sorted(m.items()) if isinstance(m, dict) else m for m in (item.get("image"), item.get("video"))]
    key = json.dumps([" ".join((item.get("text") or "").lower().split()), *media])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def stamp(path):
    """Name, size and time of a media file, or of each file in a folder of frames: they stand for the content in caches' keys."""
    files = sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _parse(text, where, kind=dict):
    try:
        if isinstance(value := json.loads(text), kind):
            return value
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not JSON: {error}") from error
    raise ValueError(f"{where}: expected a JSON {'object' if kind is dict else 'list'}, got {type(value).__name__}")


def read_jsonl(path):
    """Yield (line number, dict) of a JSON-lines file; raises ValueError naming file:line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(line, f"{path}:{number}")


class Collator:
    """Turn resolved items into model inputs with transformers' processors and our prompt: collator(items, instruction) -> batch.

    frames per video (even), max_tokens vision tokens per video frame, max_length tokens in all, padding_side (the tokenizer's),
    prompt_style: the instruction stands for the "system" turn or heads the "user" turn,
    store: folder of one vision tower's output per medium, read here and filled by GVE.see; a changed file is another medium.
    """

    def __init__(self, processor, *, frames=8, max_tokens=200, max_length=8192, padding_side=None, prompt_style="system",
                 store=None):
        sample_indices(1, frames)  # rejects odd counts early
        if max_tokens < MIN_TOKENS or prompt_style not in ("system", "user"):
            raise ValueError(f"max_tokens {max_tokens} (at least {MIN_TOKENS}), prompt_style {prompt_style!r} (system or user)")
        self.processor, self.frames, self.store, self.max_length = processor, frames, store, max_length
        self.most, self.prompt_style = {"image": IMAGE_TOKENS, "video": max_tokens}, prompt_style
        self.settings = [processor.image_processor.to_json_string(), processor.video_processor.to_json_string()]
        self.tokenizer, self.padding_side = processor.tokenizer, padding_side or processor.tokenizer.padding_side
        self.end, self.image_pad, self.video_pad = self.tokenizer.convert_tokens_to_ids([END, "<|image_pad|>", "<|video_pad|>"])

    def __call__(self, items, instruction=None):
        return self.batch([self.prepare(item, instruction) for item in items])

    def prepare(self, item, instruction=None):
        """Decode and tokenise one item -> {"ids": list of int}; for each medium, its pixels (P, C*2*14*14) uint8, or its features
        (V, D) where the store holds them, its grid (1, 3), and a video's seconds per grid (1,)."""
        check_item(item)
        sample, vision = {}, ""
        for kind in ("video", "image"):
            if item.get(kind):
                sample |= self._see(kind, item[kind])
                vision += f"<|vision_start|><|{kind}_pad|><|vision_end|>"
        sample["ids"] = self._tokens(vision, item.get("text") or "", instruction or "", sample)
        return sample

    def _see(self, kind, media):
        if self.store:
            path = media if isinstance(media, str) else media[FORMS[kind][0]]
            about = [kind, media, stamp(path), self.frames, self.most, self.settings]
            name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
            file = f"{self.store}/{name[:2]}/{name}.safetensors"
            with contextlib.suppress(FileNotFoundError, SafetensorError):  # a damaged file is made anew
                return load_file(file)  # as GVE.see has left it
        processor = self.processor.image_processor if kind == "image" else self.processor.video_processor
        pixels, seconds = load_video(media, self.frames) if kind == "video" else (load_image(media), None)
        pixels = torch.from_numpy(np.array(pixels)).movedim(-1, -3)  # a copy: PIL's buffer is read-only
        unit = (processor.patch_size * processor.merge_size) ** 2  # pixels of one vision token, 28 x 28
        options = {"do_sample_frames": False, "cap_pixels_per_frame": False} if kind == "video" else {}
        options |= {"size": {"shortest_edge": MIN_TOKENS * unit, "longest_edge": self.most[kind] * unit}, "do_rescale": False,
                    "do_normalize": False}  # see normalise: uint8 travels lighter between processes
        try:
            made = processor(**{kind + "s": [pixels]}, **options, input_data_format="channels_first", return_tensors="pt")
        except ValueError as error:  # transformers' resize refuses aspect ratios over 200
            raise MediaError(f"{media}: {error}") from error
        made = {k: v for k, v in made.items() if k.startswith("pixel_values") or k.endswith("grid_thw")}
        made |= {"second_per_grid_ts": torch.tensor([processor.temporal_patch_size * seconds / self.frames])} if seconds else {}
        return made | ({f"{kind}_file": file} if self.store else {})

    def _tokens(self, vision, text, instruction, sample):
        """Token ids of the whole prompt; where they exceed max_length, the tail of the user's text goes and nothing else."""
        instruction, text = (s.replace("<|", "< |") for s in (instruction, text))  # users cannot write special tokens
        # PAPER: Figure 4 draws prompt, text, image, video; a system turn, and media before text, are MTEB's and released code.
        system, lead = (instruction, "") if self.prompt_style == "system" else ("", instruction and instruction + "\n")
        head = f"<|im_start|>system\n{system or DEFAULT_INSTRUCTION}<|im_end|>\n<|im_start|>user\n{lead}{vision}"
        tail = f"<|im_end|>\n<|im_start|>assistant\n{END}"
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        ids, n_vision = encode(head + text + tail), 0
        for pad, grid in ((self.video_pad, "video_grid_thw"), (self.image_pad, "image_grid_thw")):
            if grid in sample:
                at, n = ids.index(pad), int(sample[grid].prod()) // self.processor.image_processor.merge_size**2
                ids[at : at + 1] = [pad] * n
                n_vision += n
        if (excess := len(ids) - self.max_length) > 0:
            n_tail = len(encode(tail))
            fixed = len(encode(head)) - vision.count("_pad|>") + n_vision + n_tail
            if fixed > self.max_length:
                raise ValueError(f"{fixed} tokens before any text exceed max_length {self.max_length}: the prompt and {n_vision} "
                                 f"vision tokens ({self.frames} frames x at most {self.most['video']} tokens per video)")
            ids = ids[: len(ids) - n_tail - excess] + ids[-n_tail:]
        assert ids[-1] == self.end, f"the pooled token must be {END}"
        return ids

    def batch(self, samples, raw=False):
        """Pad and stack prepared samples -> input_ids, attention_mask, mm_token_type_ids (B, T) int64 and, where any sample has
        media, pixel_values(_videos) (P, C*2*14*14) float32 (raw: uint8, for GVE.see), image/video_grid_thw (n, 3) and
        second_per_grid_ts (n,); with a store image/video_features and _file, lists: what see need not do, where to keep it."""
        width = max(len(s["ids"]) for s in samples)
        ids, mask = torch.full((len(samples), width), self.end), torch.zeros(len(samples), width, dtype=torch.int64)
        for row, sample in enumerate(samples):
            n = len(sample["ids"])
            where = slice(width - n, width) if self.padding_side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = torch.tensor(sample["ids"]), 1
        out = {"input_ids": ids, "attention_mask": mask,
               "mm_token_type_ids": (ids == self.image_pad).long() + 2 * (ids == self.video_pad).long()}
        by = {"pixel_values": self.processor.image_processor, "pixel_values_videos": self.processor.video_processor}
        for key in (*by, "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            if parts := [s[key] for s in samples if key in s]:
                out[key] = torch.cat(parts) if raw or key not in by else normalise(torch.cat(parts), by[key])
        for kind in ("image", "video") if self.store else ():
            shown = [s for s in samples if f"{kind}_grid_thw" in s]
            out |= {f"{kind}_{what}": [s.get(f"{kind}_{what}") for s in shown] for what in ("features", "file")} if shown else {}
        return out


def normalise(patches, processor):
    """Normalise patches (P, C*2*14*14) from uint8 to float32 as transformers' image and video processors do, to the bit."""
    mean, std = (torch.tensor(x).repeat_interleave(patches.shape[1] // len(x)) * (1 / processor.rescale_factor)
                 for x in (processor.image_mean, processor.image_std))
    return (patches.float() - mean.to(patches.device)).div_(std.to(patches.device))


@dataclasses.dataclass
class Source:
    """One entry of a mixture (Tables 6 and 7). Its rows stay on disk: an index of line offsets costs 16 bytes each."""
    name: str
    task: str  # "T2V": query form 2 candidate form
    path: str  # training file, relative to the mixture or under one of its roots
    samples: int = 0  # pairs that count as one pass: more rows are subsampled, fewer repeat; 0 = as many as there are rows
    negatives: int = 0  # hard negatives used per row
    batch_size: int = 32  # the paper's, per GPU on 32 GPUs; times --batch-scale it is the global batch
    instruction: str = DEFAULT_INSTRUCTION  # system turn of the queries; candidates get the default one

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise ValueError(f"{field.name} must be {field.type.__name__}, got {getattr(self, field.name)!r}")
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}; accepted: {', '.join(TASKS)}")
        if self.batch_size < 1 or self.samples < 0 or self.negatives < 0:
            raise ValueError("batch_size must be positive, samples and negatives not negative")
        index, offset, self.mined = [], 0, {}  # {row: items}: hard negatives ahead of the file's, for an epoch's rows
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                index += [(offset, number)] if line.strip() else []
                offset += len(line)
        if not index:
            raise ValueError(f"training file {self.path} is empty")
        self.index, self.samples = np.array(index, dtype=np.int64), self.samples or len(index)

    def __len__(self):
        return len(self.index)

    def where(self, i):
        return f"{self.path}:{self.index[i, 1]}"

    def load(self, i, roots=(), use=list):
        """Read and resolve row i -> use([query, positive, *negatives]); whatever is wrong is a ValueError naming file:line."""
        where = self.where(i)
        with open(self.path, "rb") as file:
            file.seek(self.index[i, 0])
            row = _parse(file.readline(), where)
        try:
            if not {"query", "positive"} <= row.keys() <= {"query", "positive", "negatives", "id"}:
                raise ValueError(f"keys {sorted(row)}; accepted: query, positive (both required), negatives, id")
            if not isinstance(negatives := row.get("negatives") or [], list):
                raise ValueError(f"negatives must be a list of items, got {negatives!r}")
            items = [row["query"], row["positive"], *[*self.mined.get(i, []), *negatives][: self.negatives]]
            return use([resolve(item, os.path.dirname(os.path.abspath(self.path)), roots) for item in items])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{where}: {error}") from error


def load_mixture(path, roots=()):
    """Read a mixture -> list of Source; files lie beside it or under a root. A ValueError names entry and accepted values."""
    entries, sources = _parse(Path(path).read_bytes(), path, list), []
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a mixture is a non-empty JSON list of sources (objects)")
    for number, entry in enumerate(entries):
        try:
            places = [os.path.join(base, entry.get("path", "missing path")) for base in (Path(path).parent, *roots)]
            sources.append(Source(**{**entry, "path": next(filter(os.path.isfile, places), " or ".join(places))}))
            if sources[-1].name in {s.name for s in sources[:-1]}:
                raise ValueError("an earlier entry has the same name")
        except (TypeError, ValueError, FileNotFoundError) as error:  # Source's own signature knows the keys
            raise ValueError(f"{path}: entry {number} ({entry.get('name', 'no name')}): {error} "
                             f"(keys: {', '.join(f.name for f in dataclasses.fields(Source))})") from error
    return sources


def micro_batches(lengths, most, tokens=0):
    """Group items of like length -> lists of their indices: at most `most` items and, padded, `tokens` tokens (0: any number)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == most or 0 < tokens < (len(groups[-1]) + 1) * lengths[i]:
            groups.append([])
        groups[-1].append(i)
    return groups


if __name__ == "__main__":
    from extras.mixture import main  # only the command line needs it
    raise SystemExit(main())
