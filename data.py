"""Items, media, the prompt and mixtures: everything between files on disk and model.py's tensors.

arXiv 2510.27571, sections 4.1, A.3 and A.7. An *item* is a dict with any of `text`, `image` and
`video`. A *mixture* is a list of training sources; every step draws one source, the same on every
rank. PyAV decodes videos; transformers' own processors resize frames and cut them into patches.

    collate = Collator(processor, frames=8, max_tokens=200)
    batch = collate([{"text": "a red ball falls"}, {"video": "a.mp4"}])  # what GVE.forward takes

    loader = TrainLoader(load_mixture("mixture.json"), collate, workers=4)
    for batch in loader(plan): ...  # one TrainBatch for each (source number, row numbers) of plan

`python extras/check_data.py MIXTURE` lists the rows of a mixture that cannot be used.

Legend: F frames, H height, W width, B batch, T tokens, P patches, S values of a patch, V vision
tokens of a medium, D their width, G global batch of a source, K sources.
"""

import array
import dataclasses
import hashlib
import json
import os
import threading
import unicodedata
from pathlib import Path

import numpy as np
import torch

from support.decoders import DecoderPool, Failed
from support.files import file_fingerprint, parse_json
from support.media import MediaError, check_numbers, load_image, open_clip, sample_indices
from support.media import load_video as load_video  # for callers of this file

DEFAULT_INSTRUCTION = "You are a helpful assistant."

# The prompt, written once: Collator builds it from these pieces, and so do the saved chat template
# (model.py) and the mini world's base (mini/pretrain.py).
SYSTEM_START = "<|im_start|>system\n"
USER_START = "<|im_start|>user\n"
ANSWER_START = "<|im_start|>assistant\n"
TURN_END = "<|im_end|>\n"
VISION_BLOCK = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
END = "<|endoftext|>"  # the pooled token


# The ways to put an item into a prompt. Each is a function of the item's media, {kind: the text
# that stands for it} in their order, of its text and of the instruction, "" where there is none.
# It returns what stands before the text and after it; only the text is ever cut.


def system_prompt(media, text, instruction):
    """Put the instruction into the system turn, as GVE and GME do."""
    # PAPER: Figure 4 draws prompt, text, image, video. A system turn, and media before text, are
    # how MTEB and the released code do it.
    system = instruction or DEFAULT_INSTRUCTION
    head = f"{SYSTEM_START}{system}{TURN_END}{USER_START}{''.join(media.values())}"
    return head, f"{TURN_END}{ANSWER_START}{END}"


def user_prompt(media, text, instruction):
    """Put the instruction at the head of the user turn."""
    lead = ""
    if instruction:
        lead = f"{instruction}\n"
    head = f"{SYSTEM_START}{DEFAULT_INSTRUCTION}{TURN_END}{USER_START}{lead}"
    return head + "".join(media.values()), f"{TURN_END}{ANSWER_START}{END}"


def represent_prompt(media, text, instruction):
    """Write the prompt of Qwen3-VL-Embedding (its repository, src/models/qwen3_vl_embedding.py).

    It has a default instruction of its own, ends an instruction with a full stop, and pools the
    last token, which is the one that its tokenizer appends to every text, if it appends one.
    """
    system = instruction.strip() or "Represent the user's input."
    if not unicodedata.category(system[-1]).startswith("P"):
        system += "."
    head = f"{SYSTEM_START}{system}{TURN_END}{USER_START}{''.join(media.values())}"
    return head, f"{TURN_END}{ANSWER_START}"


# gve.json names a checkpoint's prompt style.
PROMPT_STYLES = {"system": system_prompt, "user": user_prompt, "represent": represent_prompt}

IMAGE_TOKENS = 256  # most vision tokens per image (the released processor's limit)
MIN_TOKENS = 4  # least vision tokens per image (likewise) and, by default, per video frame
TASKS = "T2T T2I TI2I TI2T TI2TI I2I I2T T2TI T2V I2V V2V TI2V TV2V".split()

# A medium is a path or a dict. A clip is {"path", "start", "end", "fps"}; an image that is a frame
# of a video is {"video", "time"}. Below: the key of the path, the keys of the numbers.
PATH_KEY = {"video": "path", "image": "video"}
NUMBER_KEYS = {"video": {"start", "end", "fps"}, "image": {"time"}}
PIXELS_KEY = {"video": "pixel_values_videos", "image": "pixel_values"}  # transformers' names


def check_item(item):
    """Check the form of an item; raise ValueError naming the key and the accepted values."""
    if not isinstance(item, dict) or not (
        item.get("text") or item.get("image") or item.get("video")
    ):
        raise ValueError(f"an item needs a non-empty text, image or video, got {item!r}")
    if item.get("text") and not isinstance(item["text"], str):
        raise ValueError(f"text must be a string, got {item['text']!r}")

    for kind, path_key in PATH_KEY.items():
        media = item.get(kind)
        if not media or isinstance(media, str):
            continue

        spec = media if isinstance(media, dict) else {path_key: media}
        wrong = (
            not isinstance(spec.get(path_key), str)
            or not spec.keys() <= {path_key} | NUMBER_KEYS[kind]
            # A frame of a video needs its time.
            or (kind == "image" and spec.get("time") is None)
        )
        if wrong:
            accepted = sorted(NUMBER_KEYS[kind])
            raise ValueError(
                f"{kind} must be a path or a dict of {path_key} and numbers {accepted}, "
                f"got {media!r}"
            )
        check_numbers(spec, f"{kind} {spec[path_key]}")


class OutsideRoots(ValueError):
    """An item names a medium that lies outside the allowed roots."""


def with_plain_paths(item):
    """Return an item whose media paths are strings where they were pathlib's."""
    if not isinstance(item, dict):
        return item  # check_item says so
    plain = dict(item)
    for kind, path_key in PATH_KEY.items():
        media = plain.get(kind)
        if isinstance(media, os.PathLike):
            plain[kind] = os.fspath(media)
        elif isinstance(media, dict) and isinstance(media.get(path_key), os.PathLike):
            plain[kind] = media | {path_key: os.fspath(media[path_key])}
    return plain


def resolve(item, base, roots=()):
    """Check an item and make its media paths absolute; they must exist under an allowed root.

    base: the folder that relative paths start from, an allowed root itself. roots: more allowed
    folders, which are searched in turn for what is not below base. Symlinks are followed first.
    Raises ValueError for a wrong form, OutsideRoots for a path outside the roots,
    FileNotFoundError for a missing file.
    """
    check_item(item)
    resolved = {key: item[key] for key in ("text", "image", "video") if item.get(key)}

    for kind, path_key in PATH_KEY.items():
        if kind not in resolved:
            continue
        media = resolved[kind]
        given = media[path_key] if isinstance(media, dict) else media

        try:
            places = [os.path.realpath(os.path.join(place, given)) for place in (base, *roots)]
            found = [place for place in places if os.path.exists(place)]
        except ValueError as error:  # a NUL character, half an emoji
            raise ValueError(f"{kind} {given!r} cannot be a file's name: {error}") from error
        path = found[0] if found else places[0]
        allowed = [os.path.realpath(root) for root in (base, *roots)]
        # Whole path components: /data/root-x begins with /data/root but does not lie under it.
        if not any(os.path.commonpath([path, root]) == root for root in allowed):
            raise OutsideRoots(
                f"{kind} {given!r} leaves the allowed roots {allowed} (add one with --root)"
            )
        if not found:
            elsewhere = ", nor is it below a --root" if roots else ""
            raise FileNotFoundError(f"{kind} {given!r}: {path} does not exist{elsewhere}")

        resolved[kind] = media | {path_key: path} if isinstance(media, dict) else path
    return resolved


def content_id(item):
    """Hash a resolved item's normalised text, media paths and spans -> int of 63 bits.

    Items of equal content get equal ids, by which the loss masks duplicates.
    """
    # The tokenizer composes characters, too: an accent may be written as one of its own.
    text = unicodedata.normalize("NFC", item.get("text") or "")
    content = [" ".join(text.lower().split())]
    for kind, path_key in PATH_KEY.items():
        media = item.get(kind)
        if not isinstance(media, dict):
            media = {path_key: media}

        # A span may be written in many ways: 2 or 2.0, null or not at all, from 0 or not at all.
        span = []
        for key in sorted(NUMBER_KEYS[kind]):
            value = media.get(key)
            is_default = value is None or (key == "start" and value == 0)
            span.append(None if is_default else float(value))
        content.append([media[path_key], span])

    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Collator:
    """Turn resolved items into model inputs with transformers' processors and our prompt.

    collate(items, instruction) -> batch. The two halves of this can run apart: prepare(item) in
    decoding processes, batch(samples) beside the model.

    frames        per video, an even number
    max_tokens    most vision tokens per video frame
    min_tokens    least vision tokens per video frame: smaller frames are enlarged
    max_length    most tokens of the whole prompt
    padding_side  "left" or "right"; None: the tokenizer's
    prompt_style  a name in PROMPT_STYLES
    timed_grids   Qwen3-VL's videos: each temporal grid is a vision block of its own after its time
                  as text, and the video processor's limits count all frames together
    store         support.cache.FeatureStore with the frozen vision tower's output for each medium,
                  read here and filled after GVE.encode_vision; None: decode every time
    """

    def __init__(
        self,
        processor,
        *,
        frames=8,
        max_tokens=200,
        min_tokens=MIN_TOKENS,
        max_length=8192,
        padding_side=None,
        prompt_style="system",
        timed_grids=False,
        store=None,
    ):
        sample_indices(1, frames)  # rejects odd counts early
        if max_tokens < min_tokens or min_tokens < 1 or prompt_style not in PROMPT_STYLES:
            raise ValueError(
                f"max_tokens {max_tokens} (at least min_tokens, {min_tokens}), min_tokens (at "
                f"least 1), prompt_style {prompt_style!r} ({' or '.join(PROMPT_STYLES)})"
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.frames = frames
        self.min_tokens = {"image": MIN_TOKENS, "video": min_tokens}
        self.max_tokens = {"image": IMAGE_TOKENS, "video": max_tokens}
        self.max_length = max_length
        self.padding_side = padding_side or self.tokenizer.padding_side
        self.prompt_style = prompt_style
        self.timed_grids = timed_grids
        self.store = store

        # Stored features depend on every setting of the processors.
        self.settings = [
            processor.image_processor.to_json_string(),
            processor.video_processor.to_json_string(),
        ]
        self.end = self.tokenizer.convert_tokens_to_ids(END)
        self.appended = self.tokenizer.encode("")  # what the tokenizer ends every text with
        self.image_pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.video_pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")

    def __call__(self, items, instruction=None):
        return self.batch([self.prepare(item, instruction) for item in items])

    def prepare(self, item, instruction=None):
        """Decode and tokenise one item -> its sample, a dict.

        ids                         list of int, the whole prompt
        image_, video_grid_thw      (1, 3) int64, the medium's patches in time, height and width
        pixel_values(_videos)       (P, S) uint8, unless the store holds the medium's features:
        image_, video_features      (V, D) instead, or else
        image_, video_file          the store's file for the features that are to be computed
        second_per_grid_ts          (1,) float32, seconds between a video's temporal grids
        grid_times                  (1, temporal grids) float64, seconds, with timed_grids
        decoder, note               how a video was decoded, and what is missing of a damaged one

        Raises MediaError, ValueError or FileNotFoundError, naming the file.
        """
        item = with_plain_paths(item)
        check_item(item)
        sample = {}
        for kind, path_key in PATH_KEY.items():
            media = item.get(kind)
            if not media:
                continue

            stored = None
            if self.store is not None:
                path = media[path_key] if isinstance(media, dict) else media
                protocol = [self.frames, self.min_tokens, self.max_tokens, self.settings]
                # The fingerprint: a file that changes is another medium.
                key = [kind, media, file_fingerprint(path), *protocol]
                file, stored = self.store.find(key)
                if stored is None:
                    sample[f"{kind}_file"] = file
            sample |= stored or self.cut_patches(kind, media)

        sample["ids"] = self.tokenise(item.get("text") or "", instruction or "", sample)
        return sample

    def cut_patches(self, kind, media):
        """Decode one medium and cut it into patches -> its part of the sample.

        Patches stay uint8, a quarter of what must travel between processes; `normalise` turns them
        into floats later.
        """
        counted = 1  # frames that the processor's limits are for
        if kind == "image":
            processor = self.processor.image_processor
            options = {}
            pixels = load_image(media)  # (H, W, 3)
        else:
            processor = self.processor.video_processor
            options = {"do_sample_frames": False, "cap_pixels_per_frame": False}
            clip = open_clip(media, self.frames)
            pixels = clip.pixels  # (F, H, W, 3)
            if self.timed_grids:
                counted = self.frames

        # A copy: Pillow's buffer is read-only.
        pixels = torch.from_numpy(np.array(pixels)).movedim(-1, -3)  # (..., 3, H, W)

        pixels_per_token = (processor.patch_size * processor.merge_size) ** 2
        size = {
            "shortest_edge": self.min_tokens[kind] * pixels_per_token * counted,
            "longest_edge": self.max_tokens[kind] * pixels_per_token * counted,
        }
        try:
            inputs = processor(
                [pixels],
                size=size,
                do_rescale=False,
                do_normalize=False,
                input_data_format="channels_first",
                return_tensors="pt",
                **options,
            )
        except ValueError as error:  # transformers' resize refuses aspect ratios over 200
            raise MediaError(f"{media}: {error}") from error

        sample = {
            PIXELS_KEY[kind]: inputs[PIXELS_KEY[kind]],
            f"{kind}_grid_thw": inputs[f"{kind}_grid_thw"],
        }
        if kind == "video":
            seconds_per_grid = processor.temporal_patch_size * clip.seconds / self.frames
            sample["second_per_grid_ts"] = torch.tensor([seconds_per_grid])
            if self.timed_grids:
                # As Qwen3-VL's processor has it: halfway between a grid's first and last frame.
                times = clip.times.reshape(-1, processor.temporal_patch_size)
                middles = (times[:, 0] + times[:, -1]) / 2
                sample["grid_times"] = torch.from_numpy(middles)[None]
            sample["decoder"] = clip.decoder
            if clip.note:
                sample["note"] = clip.note
        return sample

    def tokenise(self, text, instruction, sample):
        """Return the token ids of one item's whole prompt, a list of int.

        sample: a dict with the grids of the item's media. A prompt over max_length loses the tail
        of the user's text and nothing else. Raises ValueError, naming frames x tokens, if that is
        not enough.
        """
        # Half of a character (an emoji cut in two) would be refused: U+FFFD takes its place.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Users cannot write special tokens.
        text = text.replace("<|", "< |")
        instruction = instruction.replace("<|", "< |")

        kinds = [kind for kind in ("video", "image") if f"{kind}_grid_thw" in sample]
        blocks = {kind: self.vision_blocks(kind, sample) for kind in kinds}
        media = {kind: "".join(blocks[kind]) for kind in kinds}
        head, tail = PROMPT_STYLES[self.prompt_style](media, text, instruction)
        prompt = self.encode(head + text + tail)
        tail_length = len(self.encode(tail))
        if not tail.endswith(END):
            prompt += self.appended
            tail_length += len(self.appended)

        # The prompt holds one placeholder per block; the model wants one per vision token.
        tokens_of = {}  # placeholder: vision tokens of a block
        vision_tokens = 0
        for kind in kinds:
            patches = int(sample[f"{kind}_grid_thw"].prod())
            count = patches // self.processor.image_processor.merge_size**2
            pad = self.video_pad if kind == "video" else self.image_pad
            tokens_of[pad] = count // len(blocks[kind])
            vision_tokens += count
        ids = []
        for token in prompt:
            ids += [token] * tokens_of.get(token, 1)

        excess = len(ids) - self.max_length
        if excess > 0:
            text_length = len(prompt) - len(self.encode(head)) - tail_length
            fixed = len(ids) - text_length
            if fixed > self.max_length:
                raise ValueError(
                    f"{fixed} tokens before any text exceed max_length {self.max_length}: the "
                    f"prompt and {vision_tokens} vision tokens ({self.frames} frames x at most "
                    f"{self.max_tokens['video']} tokens per video)"
                )
            text_end = len(ids) - tail_length
            ids = ids[: text_end - excess] + ids[text_end:]
        return ids

    def encode(self, text):
        """Return the ids of a part of the prompt, a list of int."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def vision_blocks(self, kind, sample):
        """Return the texts that stand for a medium, each with one placeholder, a list of str."""
        if kind == "image" or not self.timed_grids:
            return [VISION_BLOCK[kind]]
        times = sample["grid_times"][0].tolist()
        return [f"<{time:.1f} seconds>{VISION_BLOCK[kind]}" for time in times]

    def batch(self, samples, raw=False):
        """Pad and stack prepared samples -> batch, the dict that GVE.forward takes.

        input_ids, attention_mask        (B, T) int64
        mm_token_type_ids                (B, T) int64: 0 text, 1 image, 2 video
        pixel_values(_videos)            (P, S) float32; raw: uint8, for GVE.encode_vision
        image_grid_thw, video_grid_thw   (n, 3) int64, a row for each medium, in the samples' order
        second_per_grid_ts               (n,) float32, an entry for each video
        grid_times                       (n, temporal grids) float64, with timed_grids
        image_features, video_features   with a store: list with an entry for each medium, or None
        image_file, video_file           likewise: the files of those that the store lacks

        Keys of media are absent where no sample has any.
        """
        width = max(len(sample["ids"]) for sample in samples)
        ids = torch.full((len(samples), width), self.end)  # any id: the mask excludes padding
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            length = len(sample["ids"])
            start = width - length if self.padding_side == "left" else 0
            ids[row, start : start + length] = torch.tensor(sample["ids"])
            mask[row, start : start + length] = 1
        is_image = (ids == self.image_pad).long()
        is_video = (ids == self.video_pad).long()
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": is_image + 2 * is_video,
        }

        grids = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "grid_times")
        for key in (*PIXELS_KEY.values(), *grids):
            tensors = [sample[key] for sample in samples if key in sample]
            if tensors:
                batch[key] = torch.cat(tensors)
        if not raw and "pixel_values" in batch:
            batch["pixel_values"] = normalise(batch["pixel_values"], self.processor.image_processor)
        if not raw and "pixel_values_videos" in batch:
            batch["pixel_values_videos"] = normalise(
                batch["pixel_values_videos"], self.processor.video_processor
            )

        if self.store is not None:
            for kind in ("image", "video"):
                shown = [sample for sample in samples if f"{kind}_grid_thw" in sample]
                if shown:
                    for key in (f"{kind}_features", f"{kind}_file"):
                        batch[key] = [sample.get(key) for sample in shown]
        return batch


def normalise(patches, processor):
    """Normalise patches (P, S) from uint8 to float32, to the bit as transformers' processors do."""
    # A patch's values lie channel by channel.
    repeats = patches.shape[1] // len(processor.image_mean)
    scale = 1 / processor.rescale_factor
    mean = torch.tensor(processor.image_mean).repeat_interleave(repeats) * scale
    std = torch.tensor(processor.image_std).repeat_interleave(repeats) * scale
    return (patches.float() - mean.to(patches.device)).div_(std.to(patches.device))


@dataclasses.dataclass
class Source:
    """One entry of a mixture (Tables 6 and 7): a training file and how to sample it.

    The rows stay on disk; an index of line offsets costs 16 bytes a row, hardly more while it is
    built (a second for 4 million rows). Raises ValueError naming the field and the accepted values,
    FileNotFoundError for a missing file.
    """

    name: str
    task: str  # "T2V": query form 2 candidate form
    path: str  # training file; in a mixture: relative to it or to a root
    samples: int = 0  # pairs of one pass: more rows are subsampled, fewer repeat; 0: all rows
    negatives: int = 0  # hard negatives used per row
    batch_size: int = 32  # the paper's, per GPU on 32 GPUs; x --batch-scale: the global batch
    instruction: str = DEFAULT_INSTRUCTION  # for the queries; candidates get the default one

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ValueError(f"{field.name} must be {field.type.__name__}, got {value!r}")
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}; accepted: {', '.join(TASKS)}")
        if self.batch_size < 1 or self.samples < 0 or self.negatives < 0:
            raise ValueError("batch_size must be positive, samples and negatives not negative")

        # A list of Python's integers would take ten times as much memory.
        index = array.array("q")
        digest = hashlib.blake2b(digest_size=8)
        self.bytes = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    index.append(self.bytes)
                    index.append(number)
                self.bytes += len(line)
                digest.update(line)
        if not index:
            raise ValueError(f"training file {self.path} is empty")
        self.index = np.frombuffer(index, np.int64).reshape(-1, 2)  # (rows, 2): offset, line number
        self.hash = digest.hexdigest()  # of the file
        self.samples = self.samples or len(self)
        self.mined = {}  # {row: items}: mined hard negatives, used ahead of the file's own

    def __len__(self):
        return len(self.index)

    def facts(self):
        """Return all that decides which rows are drawn of this source, a dict for a run's state."""
        return {
            "task": self.task,
            "samples": self.samples,
            "negatives": self.negatives,
            "batch_size": self.batch_size,
            "instruction": self.instruction,
            "rows": len(self),
            "bytes": self.bytes,
            "hash": self.hash,
        }

    def where(self, row):
        """Return "file:line" of a row, for messages."""
        return f"{self.path}:{self.index[row, 1]}"

    def load(self, row, roots=()):
        """Read one row -> [query, positive, *hard negatives], resolved items.

        Raises ValueError naming file:line for a wrong row and for a medium that is not there,
        OutsideRoots for one that lies elsewhere.
        """
        offset, number = self.index[row]
        with open(self.path, "rb") as file:
            file.seek(offset)
            entry = parse_json(file.readline(), f"{self.path}:{number}")

        folder = os.path.dirname(os.path.abspath(self.path))
        try:
            required = {"query", "positive"}
            if not required <= entry.keys() <= required | {"negatives", "id"}:
                raise ValueError(
                    f"keys {sorted(entry)}; "
                    "accepted: query, positive (both required), negatives, id"
                )
            negatives = entry.get("negatives") or []
            if not isinstance(negatives, list):
                raise ValueError(f"negatives must be a list of items, got {negatives!r}")
            negatives = self.mined.get(row, []) + negatives
            items = [entry["query"], entry["positive"], *negatives[: self.negatives]]
            return [resolve(item, folder, roots) for item in items]
        except OutsideRoots as error:
            raise OutsideRoots(f"{self.where(row)}: {error}") from error
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{self.where(row)}: {error}") from error


def load_mixture(path, roots=()):
    """Read a mixture -> list of Source. Its training files lie beside it or under a root.

    Raises ValueError naming the entry and the accepted keys or values.
    """
    entries = parse_json(Path(path).read_bytes(), path, list)
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a mixture is a non-empty JSON list of sources (objects)")

    folders = [Path(path).parent, *roots]
    accepted = ", ".join(field.name for field in dataclasses.fields(Source))
    sources = []
    names = set()
    for number, entry in enumerate(entries):
        try:
            given = entry.get("path", "missing path")
            places = [os.path.join(folder, given) for folder in folders]
            found = [place for place in places if os.path.isfile(place)]
            # If there is none, the error of opening it names every place.
            file = found[0] if found else " or ".join(places)
            source = Source(**{**entry, "path": file})
            if source.name in names:
                raise ValueError("an earlier entry has the same name")
        except (TypeError, ValueError, FileNotFoundError) as error:  # TypeError: unknown keys
            raise ValueError(
                f"{path}: entry {number} ({entry.get('name', 'no name')}): {error} "
                f"(keys: {accepted})"
            ) from error
        names.add(source.name)
        sources.append(source)
    return sources


def micro_batches(lengths, max_items, max_tokens=0):
    """Group items of like length -> lists of their indices, shortest items first.

    lengths: tokens of each item. A group holds at most max_items items and, padded to the longest
    of them, max_tokens tokens (0: no limit). An item that is longer than that is a group by itself.
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        last = groups[-1] if groups else []
        many = len(last) == max_items
        long = 0 < max_tokens < (len(last) + 1) * lengths[i]
        if not last or many or long:
            groups.append([])
        groups[-1].append(i)
    return groups


@dataclasses.dataclass
class Group:
    """A training batch's queries, positives or hard negatives, in micro-batches."""

    micro_batches: list  # collated batches (Collator.batch), items of like length together
    order: torch.Tensor  # (n,) int64: torch.cat(vectors of micro-batches)[order] is in row order
    ids: torch.Tensor  # (n,) int64 content ids, in row order


@dataclasses.dataclass
class TrainBatch:
    """One rank's share of a global batch."""

    source: int  # index into the sources
    rows: np.ndarray  # (G,) row numbers of the global batch
    bad: list  # reasons of this rank's rows that were replaced
    query: Group
    positive: Group
    negative: Group


class TrainLoader:
    """Turn an epoch's plan into one rank's training batches, decoded ahead by `workers` processes.

    A row that cannot be used, or whose decoder dies or takes longer than `seconds` (with workers),
    is replaced by the next usable row of its file, the same one for any number of ranks.

    micro_batch, micro_tokens: most items and most padded tokens of a micro-batch (0: no limit).
    roots: allowed folders for media, beside the training file's own.
    """

    def __init__(
        self,
        sources,
        collate,
        *,
        rank=0,
        world=1,
        micro_batch=32,
        micro_tokens=0,
        roots=(),
        workers=0,
        seconds=60,
    ):
        self.sources = sources
        self.collate = collate
        self.rank = rank
        self.world = world
        self.micro_batch = micro_batch
        self.micro_tokens = micro_tokens
        self.roots = roots
        self.fork_lock = threading.Lock()  # held while the caller runs the model
        self.pool = DecoderPool(
            self.decode, self.describe, workers=workers, seconds=seconds, fork_lock=self.fork_lock
        )

    def decode(self, key):
        """Load one row -> [query, positive, *negatives], each as (sample, content id)."""
        k, row = key
        source = self.sources[k]

        items = source.load(row, self.roots)
        decoded = []
        for n, item in enumerate(items):
            instruction = source.instruction if n == 0 else None  # the query's alone
            try:
                sample = self.collate.prepare(item, instruction)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"{source.where(row)}: {error}") from error
            decoded.append((sample, content_id(item)))
        return decoded

    def describe(self, key):
        k, row = key
        return self.sources[k].where(row)

    def replace(self, key, failed, bad):
        """Return the next usable row of the same file, noting each reason in `bad`."""
        k, row = key
        for attempt in range(1, 101):
            bad.append(failed.reason)
            result = self.pool((k, (row + attempt) % len(self.sources[k])))
            if not isinstance(result, Failed):
                return result
            failed = result
        raise ValueError(f"100 rows on end cannot be used, the last: {failed.reason}")

    def group(self, samples):
        """Collate (sample, content id) pairs into micro-batches of like length."""
        lengths = [len(sample["ids"]) for sample, _ in samples]
        groups = micro_batches(lengths, self.micro_batch, self.micro_tokens)
        batches = []
        places = []
        for group in groups:
            batches.append(self.collate.batch([samples[i][0] for i in group], raw=True))
            places += group
        order = torch.tensor(places, dtype=torch.int64).argsort()
        ids = torch.tensor([number for _, number in samples], dtype=torch.int64)
        return Group(batches, order, ids)

    def __call__(self, plan):
        """Yield a TrainBatch for each (source number, row numbers) of plan."""
        keys = []
        most = 0
        for k, rows in plan:
            own = rows[self.rank :: self.world]
            keys += [(k, int(row)) for row in own]
            most = max(most, len(own))
        # Two batches ahead: the next step's rows are decoded while this one's are used.
        decoded = self.pool.map(keys, ahead=2 * most)

        for k, rows in plan:
            queries, positives, negatives, bad = [], [], [], []
            for _ in rows[self.rank :: self.world]:
                key, result = next(decoded)
                if isinstance(result, Failed):
                    result = self.replace(key, result, bad)
                queries.append(result[0])
                positives.append(result[1])
                negatives += result[2:]
            batch = TrainBatch(
                source=k,
                rows=rows,
                bad=bad,
                query=self.group(queries),
                positive=self.group(positives),
                negative=self.group(negatives),
            )
            # The caller runs the model until it asks for the next batch: fork no decoder meanwhile.
            with self.fork_lock:
                yield batch
