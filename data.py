"""Items, media, mixtures: everything between files on disk and model.py's tensors (arXiv 2510.27571, sections 4.1, A.3, A.7).

An *item* is a dict with any of `text`, `image`, `video`. A *mixture* is a list of training sources; every step draws one source,
the same on every rank. decord decodes (PyAV what it cannot), transformers' own processors resize and cut patches.

Legend: F frames, H height, W width, B batch, T tokens, P patches, G global batch of a source, K sources.
"""

import dataclasses
import functools
import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import torch

from support.decoders import DecoderPool, Failed
from support.files import file_fingerprint, parse_json
from support.media import MediaError, load_image, load_video, sample_indices

DEFAULT_INSTRUCTION = "You are a helpful assistant."

# The prompt, written once: Collator builds it from these pieces, and so do the saved chat template (model.py) and the
# mini world's base (mini/pretrain.py).
SYSTEM_START = "<|im_start|>system\n"
USER_START = "<|im_start|>user\n"
ANSWER_START = "<|im_start|>assistant\n"
TURN_END = "<|im_end|>\n"
VISION_BLOCK = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
END = "<|endoftext|>"  # the pooled token

IMAGE_TOKENS = 256  # most vision tokens per image (the released processor's limit)
MIN_TOKENS = 4  # least vision tokens per image or video frame (likewise)
TASKS = "T2T T2I TI2I TI2T TI2TI I2I I2T T2TI T2V I2V V2V TI2V TV2V".split()


FORMS = {
    "image": ("video", {"time"}),
    "video": ("path", {"start", "end", "fps"}),
}  # dict forms: path key, number keys


def check_item(item):
    """Raise ValueError, naming the key and what is accepted, unless `item` has the form of an item."""
    if not isinstance(item, dict) or not any(item.get(k) for k in ("text", "image", "video")):
        raise ValueError(f"an item needs a non-empty text, image or video, got {item!r}")
    if not isinstance(item.get("text") or "", str):
        raise ValueError(f"text must be a string, got {item['text']!r}")
    for kind, (main, numbers) in FORMS.items():
        media = item.get(kind) or ""
        spec = media if isinstance(media, dict) else {main: media}
        wrong = [
            k
            for k, v in spec.items()
            if k != main and (k not in numbers or not isinstance(v, (int, float, type(None))))
        ]
        if (
            wrong
            or not isinstance(spec.get(main), str)
            or (kind == "image" and spec is media and media.get("time") is None)
        ):
            raise ValueError(
                f"{kind} must be a path or a dict of {main} and numbers {sorted(numbers)}, got {media!r}"
            )


def resolve(item, base, roots=()):
    """Return the item with absolute real media paths, which must exist under `base` or one of `roots` (symlinks followed). Raises
    ValueError for a wrong form or a path that leaves its roots, FileNotFoundError for a missing file."""
    check_item(item)
    out = {key: item[key] for key in ("text", "image", "video") if item.get(key)}
    for kind in FORMS.keys() & out.keys():
        media, main = out[kind], FORMS[kind][0]
        given = media[main] if isinstance(media, dict) else media
        real, allowed = (
            os.path.realpath(os.path.join(base, given)),
            [os.path.realpath(r) for r in (base, *roots)],
        )
        if not any(os.path.commonpath([real, root]) == root for root in allowed):
            raise ValueError(
                f"{kind} {given!r} leaves the allowed roots {allowed} (add one with --root)"
            )
        if not os.path.exists(real):
            raise FileNotFoundError(f"{kind} {given!r}: {real} does not exist")
        out[kind] = {**media, main: real} if isinstance(media, dict) else real
    return out


def content_id(item):
    """Hash a resolved item's normalised text, media paths and spans to 63 bits: equal content, equal id (for the loss)."""
    media = [
        sorted(m.items()) if isinstance(m, dict) else m
        for m in (item.get("image"), item.get("video"))
    ]
    key = json.dumps([" ".join((item.get("text") or "").lower().split()), *media])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


class Collator:
    """Turn resolved items into model inputs with transformers' processors and our prompt: collator(items, instruction) -> batch.

    frames per video (even), max_tokens vision tokens per video frame, max_length tokens in all, padding_side (the tokenizer's),
    prompt_style: the instruction stands for the "system" turn or heads the "user" turn,
    store: folder of one vision tower's output per medium, read here and filled by GVE.encode_vision; a changed file is another medium.
    """

    def __init__(
        self,
        processor,
        *,
        frames=8,
        max_tokens=200,
        max_length=8192,
        padding_side=None,
        prompt_style="system",
        store=None,
    ):
        sample_indices(1, frames)  # rejects odd counts early
        if max_tokens < MIN_TOKENS or prompt_style not in ("system", "user"):
            raise ValueError(
                f"max_tokens {max_tokens} (at least {MIN_TOKENS}), prompt_style {prompt_style!r} (system or user)"
            )
        self.processor, self.frames, self.store, self.max_length = (
            processor,
            frames,
            store,
            max_length,
        )
        self.most, self.prompt_style = {"image": IMAGE_TOKENS, "video": max_tokens}, prompt_style
        self.settings = [
            processor.image_processor.to_json_string(),
            processor.video_processor.to_json_string(),
        ]
        self.tokenizer, self.padding_side = (
            processor.tokenizer,
            padding_side or processor.tokenizer.padding_side,
        )
        self.end, self.image_pad, self.video_pad = self.tokenizer.convert_tokens_to_ids(
            [END, "<|image_pad|>", "<|video_pad|>"]
        )

    def __call__(self, items, instruction=None):
        return self.batch([self.prepare(item, instruction) for item in items])

    def prepare(self, item, instruction=None):
        """Decode and tokenise one item -> {"ids": list of int}; for each medium, its pixels (P, C*2*14*14) uint8, or its features
        (V, D) where the store holds them, its grid (1, 3), and a video's seconds per grid (1,)."""
        check_item(item)
        sample, vision = {}, ""
        for kind in ("video", "image"):
            if item.get(kind):
                sample |= self._vision(kind, item[kind])
                vision += VISION_BLOCK[kind]
        sample["ids"] = self._tokens(vision, item.get("text") or "", instruction or "", sample)
        return sample

    def _vision(self, kind, media):
        if self.store:
            path = media if isinstance(media, str) else media[FORMS[kind][0]]
            about = [kind, media, file_fingerprint(path), self.frames, self.most, self.settings]
            file, known = self.store.find(about)
            if known:
                return known
        processor = (
            self.processor.image_processor if kind == "image" else self.processor.video_processor
        )
        pixels, seconds = (
            load_video(media, self.frames) if kind == "video" else (load_image(media), None)
        )
        pixels = torch.from_numpy(np.array(pixels)).movedim(
            -1, -3
        )  # a copy: PIL's buffer is read-only
        unit = (
            processor.patch_size * processor.merge_size
        ) ** 2  # pixels of one vision token, 28 x 28
        options = (
            {"do_sample_frames": False, "cap_pixels_per_frame": False} if kind == "video" else {}
        )
        options |= {
            "size": {"shortest_edge": MIN_TOKENS * unit, "longest_edge": self.most[kind] * unit},
            "do_rescale": False,
            "do_normalize": False,
        }  # see normalise: uint8 travels lighter between processes
        try:
            made = processor(
                **{kind + "s": [pixels]},
                **options,
                input_data_format="channels_first",
                return_tensors="pt",
            )
        except ValueError as error:  # transformers' resize refuses aspect ratios over 200
            raise MediaError(f"{media}: {error}") from error
        made = {
            k: v for k, v in made.items() if k.startswith("pixel_values") or k.endswith("grid_thw")
        }
        made |= (
            {
                "second_per_grid_ts": torch.tensor(
                    [processor.temporal_patch_size * seconds / self.frames]
                )
            }
            if seconds
            else {}
        )
        return made | ({f"{kind}_file": file} if self.store else {})

    def _tokens(self, vision, text, instruction, sample):
        """Token ids of the whole prompt; where they exceed max_length, the tail of the user's text goes and nothing else."""
        instruction, text = (
            s.replace("<|", "< |") for s in (instruction, text)
        )  # users cannot write special tokens
        # PAPER: Figure 4 draws prompt, text, image, video; a system turn, and media before text, are MTEB's and released code.
        system, lead = (
            (instruction, "")
            if self.prompt_style == "system"
            else ("", instruction and instruction + "\n")
        )
        head = f"{SYSTEM_START}{system or DEFAULT_INSTRUCTION}{TURN_END}{USER_START}{lead}{vision}"
        tail = f"{TURN_END}{ANSWER_START}{END}"
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        ids, n_vision = encode(head + text + tail), 0
        for pad, grid in ((self.video_pad, "video_grid_thw"), (self.image_pad, "image_grid_thw")):
            if grid in sample:
                at, n = (
                    ids.index(pad),
                    int(sample[grid].prod()) // self.processor.image_processor.merge_size**2,
                )
                ids[at : at + 1] = [pad] * n
                n_vision += n
        if (excess := len(ids) - self.max_length) > 0:
            n_tail = len(encode(tail))
            fixed = len(encode(head)) - vision.count("_pad|>") + n_vision + n_tail
            if fixed > self.max_length:
                raise ValueError(
                    f"{fixed} tokens before any text exceed max_length {self.max_length}: the prompt and {n_vision} "
                    f"vision tokens ({self.frames} frames x at most {self.most['video']} tokens per video)"
                )
            ids = ids[: len(ids) - n_tail - excess] + ids[-n_tail:]
        assert ids[-1] == self.end, f"the pooled token must be {END}"
        return ids

    def batch(self, samples, raw=False):
        """Pad and stack prepared samples -> input_ids, attention_mask, mm_token_type_ids (B, T) int64 and, where any sample has
        media, pixel_values(_videos) (P, C*2*14*14) float32 (raw: uint8, for GVE.encode_vision), image/video_grid_thw (n, 3) and
        second_per_grid_ts (n,); with a store image/video_features and _file, lists: what see need not do, where to keep it."""
        width = max(len(s["ids"]) for s in samples)
        ids, mask = (
            torch.full((len(samples), width), self.end),
            torch.zeros(len(samples), width, dtype=torch.int64),
        )
        for row, sample in enumerate(samples):
            n = len(sample["ids"])
            where = slice(width - n, width) if self.padding_side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = torch.tensor(sample["ids"]), 1
        out = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_pad).long()
            + 2 * (ids == self.video_pad).long(),
        }
        by = {
            "pixel_values": self.processor.image_processor,
            "pixel_values_videos": self.processor.video_processor,
        }
        for key in (*by, "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            if parts := [s[key] for s in samples if key in s]:
                out[key] = (
                    torch.cat(parts)
                    if raw or key not in by
                    else normalise(torch.cat(parts), by[key])
                )
        for kind in ("image", "video") if self.store else ():
            shown = [s for s in samples if f"{kind}_grid_thw" in s]
            out |= (
                {
                    f"{kind}_{what}": [s.get(f"{kind}_{what}") for s in shown]
                    for what in ("features", "file")
                }
                if shown
                else {}
            )
        return out


def normalise(patches, processor):
    """Normalise patches (P, C*2*14*14) from uint8 to float32 as transformers' image and video processors do, to the bit."""
    mean, std = (
        torch.tensor(x).repeat_interleave(patches.shape[1] // len(x))
        * (1 / processor.rescale_factor)
        for x in (processor.image_mean, processor.image_std)
    )
    return (patches.float() - mean.to(patches.device)).div_(std.to(patches.device))


@dataclasses.dataclass
class Source:
    """One entry of a mixture (Tables 6 and 7). Its rows stay on disk: an index of line offsets costs 16 bytes each."""

    name: str
    task: str  # "T2V": query form 2 candidate form
    path: str  # training file, relative to the mixture or under one of its roots
    samples: int = 0  # pairs that count as one pass: more rows are subsampled, fewer repeat; 0 = as many as there are rows
    negatives: int = 0  # hard negatives used per row
    batch_size: int = (
        32  # the paper's, per GPU on 32 GPUs; times --batch-scale it is the global batch
    )
    instruction: str = (
        DEFAULT_INSTRUCTION  # system turn of the queries; candidates get the default one
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise ValueError(
                    f"{field.name} must be {field.type.__name__}, got {getattr(self, field.name)!r}"
                )
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}; accepted: {', '.join(TASKS)}")
        if self.batch_size < 1 or self.samples < 0 or self.negatives < 0:
            raise ValueError("batch_size must be positive, samples and negatives not negative")
        index, offset, self.mined = (
            [],
            0,
            {},
        )  # {row: items}: hard negatives ahead of the file's, for an epoch's rows
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
            row = parse_json(file.readline(), where)
        try:
            if not {"query", "positive"} <= row.keys() <= {"query", "positive", "negatives", "id"}:
                raise ValueError(
                    f"keys {sorted(row)}; accepted: query, positive (both required), negatives, id"
                )
            if not isinstance(negatives := row.get("negatives") or [], list):
                raise ValueError(f"negatives must be a list of items, got {negatives!r}")
            items = [
                row["query"],
                row["positive"],
                *[*self.mined.get(i, []), *negatives][: self.negatives],
            ]
            return use(
                [
                    resolve(item, os.path.dirname(os.path.abspath(self.path)), roots)
                    for item in items
                ]
            )
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{where}: {error}") from error


def load_mixture(path, roots=()):
    """Read a mixture -> list of Source; files lie beside it or under a root. A ValueError names entry and accepted values."""
    entries, sources = parse_json(Path(path).read_bytes(), path, list), []
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a mixture is a non-empty JSON list of sources (objects)")
    for number, entry in enumerate(entries):
        try:
            places = [
                os.path.join(base, entry.get("path", "missing path"))
                for base in (Path(path).parent, *roots)
            ]
            sources.append(
                Source(
                    **{**entry, "path": next(filter(os.path.isfile, places), " or ".join(places))}
                )
            )
            if sources[-1].name in {s.name for s in sources[:-1]}:
                raise ValueError("an earlier entry has the same name")
        except (
            TypeError,
            ValueError,
            FileNotFoundError,
        ) as error:  # Source's own signature knows the keys
            raise ValueError(
                f"{path}: entry {number} ({entry.get('name', 'no name')}): {error} "
                f"(keys: {', '.join(f.name for f in dataclasses.fields(Source))})"
            ) from error
    return sources


def micro_batches(lengths, most, tokens=0):
    """Group items of like length -> lists of their indices: at most `most` items and, padded, `tokens` tokens (0: any number)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == most or 0 < tokens < (len(groups[-1]) + 1) * lengths[i]:
            groups.append([])
        groups[-1].append(i)
    return groups


@dataclasses.dataclass
class Group:
    """The items of one role (queries, positives or hard negatives) of a training batch, in micro-batches."""

    micro_batches: list  # of collated batches (Collator.batch), items of like length together
    order: torch.Tensor  # (n,) int64: torch.cat(the micro-batches' vectors)[order] is in row order
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

    A row that cannot be used, or whose decoder dies or takes `seconds` (with workers), is replaced by the next usable
    row of its file, whatever the number of ranks.
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

        def use(items):
            made = []
            for n, item in enumerate(items):
                instruction = source.instruction if n == 0 else None  # the query's alone
                made.append((self.collate.prepare(item, instruction), content_id(item)))
            return made

        return source.load(row, self.roots, use)

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
        decoded = self.pool.map(
            keys, ahead=2 * most
        )  # the next step's rows while this one's are used

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
            with self.fork_lock:
                yield batch
