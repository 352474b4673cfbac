"""V-SynFlow: weakly captioned videos -> universal retrieval data, UVRD.

Paper: arXiv 2510.27571, sections 3.3 and A.6, Tables 7 and 8.

    python synth.py --videos runs/raw/captions.jsonl --out runs/synth    # mini: one CPU minute
    python synth.py --videos DIR --out DIR --captioner openai:http://HOST:8000/v1#M \\
        --prober Alibaba-NLP/GVE-3B --consistency q0.1

Three stages. Each is a folder of JSON lines below --out: one row per job with its fate (kept,
dropped or failed) and the reason.
    1-pool      quality control. Beside it, pool.jsonl has all rows with their final fate, after the
                filters that compare all videos (consistency threshold, near-duplicates), and
                pool.npy the vectors of those kept: the asset pool
    2-captions  enrichment: five captions per video and per key frame
    3-pairs     task extension: T2T, T2I, T2V, I2V, V2V, composed queries (TI2V, TV2V), negatives
Then <out>/uvrd: training files, and the mixture.json that train.py takes. Beside the rows of the
last two stages, .answers files have the captioner's replies as they came: none is asked for twice.

The same command goes on where a killed run stopped and tries again what failed. torchrun's ranks,
--shard 0/4 ... 3/4, and the same command run twice share the work.

Legend: N videos in the pool, D embedding dim, n sampled frames of a video.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from caption import (
    TOKEN_SIDE,
    Answer,
    ask_until_valid,
    keep_replies,
    make_requests,
    open_captioner,
    print_dry_run,
    split_captioner,
    useless_text,
    whole_characters,
)
from data import resolve
from embed import encode, top_k
from model import GVE
from support.decoders import DecoderPool, Failed
from support.files import (
    file_lock,
    load_jsonl,
    read_jsonl,
    visible_files,
    whole_file,
    write_json,
    write_jsonl,
)
from support.flags import flag, parse_flags
from support.jobs import print_summary, run_sharded
from support.media import IMAGE_SUFFIXES, read_frames
from support.progress import track

# Quality control. The paper gives no thresholds; these were tuned on the mini world (NOTES.md).
SCRIPT = "LATIN"  # captions are in this script: first word of its letters' Unicode names
MIN_SIDE = 2 * TOKEN_SIDE  # pixels: least height and width
MIN_FRAMES = 8  # the embedder sees eight; fewer would repeat
PROBE_FPS = 8.0  # frames per second on which motion and cuts are measured
THUMBNAIL = 32  # pixels: side of the shrunk frames on which they are measured
PATIENCE = 10  # a whole video has this many times the seconds that eight of its frames have
KEY_FRAMES = 3  # most key frames per video
CLIPS = 2  # most clips per video
CLIP_SECONDS = (2, 10)

# Enrichment and task extension
TRIES = 3  # attempts per request; later ones tell the captioner the error of the one before
TWIN = 0.98  # cosine from which on a video is neither another one's negative nor its reference
SAME_CAPTION = 0.97  # cosine above which a video's caption says the same as a T2V query
LIKELY = 32  # a T2V query's likeliest negatives, which are ranked by their captions

# Stands in for an item that needs no vector, so that rows and vectors stay side by side.
PLACEHOLDER = {"text": "-"}

COMPOSED = ("TI2V", "TV2V")


def read_table7():
    """Return {task: source} of UVRD's tasks: samples, negatives, batch sizes, our instructions."""
    mixture = json.loads((Path(__file__).parent / "mixtures" / "gve-3b.json").read_text())
    return {source["task"]: source for source in mixture if source["name"].startswith("UVRD-")}


TABLE7 = read_table7()


def read_task_numbers(words, defaults, kind):
    """Read a flag's words TASK=NUMBER over its defaults -> {task: number of type `kind`}."""
    numbers = dict(defaults)
    pattern = r"\d+(\.\d+)?" if kind is float else r"\d+"
    for word in words:
        task, _, number = word.partition("=")
        if task not in defaults or not re.fullmatch(pattern, number):
            raise ValueError(f"{word}: wanted TASK=NUMBER, TASK one of {', '.join(defaults)}")
        numbers[task] = kind(number)
    return numbers


@dataclasses.dataclass
class Flags:
    videos: str = flag(
        "runs/raw/captions.jsonl",
        'a folder of videos, whose images are left out, or JSON lines {"video", "text"?, "id"?}',
    )
    out: str = flag("runs/synth", "folder to write")
    captioner: str = flag("mini", "mini | hf:MODEL | openai:URL#MODEL")
    prober: str = flag("mini/prober", "embedder that filters and mines")
    prompts: str = flag(
        "auto",
        "full: A.6's; short: one style at a time, plain answers; auto: short for mini, which is "
        "too small for full",
        choices=["auto", "full", "short"],
    )
    stages: int = flag(3, "stop after this one")
    shard: str = flag("0/1", "i/n: take parts i, i + n, i + 2n, ... of each stage")
    part: int = flag(256, "rows per file of a stage, the unit of progress")
    dry_run: bool = flag(False, "print prompts, counts, expected calls and tokens, and stop")
    root: list[str] = flag([], "further folders for media; paths may be relative to them, too")
    seed: int = flag(42, "random seed")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    min_motion: float = flag(
        0.01,
        "least share of pixels of which a colour changes by 24 of 255 levels within a shot. This, "
        "--consistency and --duplicate were tuned on mini/: for other videos run --stages 1, look "
        'at the figures "motion", "consistency" and "why" in OUT/pool.jsonl, and take another '
        "--out",
    )
    consistency: str = flag(
        "0.09",
        "least cosine of caption and video or shot, for mini/prober; q0.1: the lowest tenth goes",
    )
    duplicate: float = flag(
        0.6,
        "two videos are one if the signs of their brightness gradients agree this much (1: all, "
        "0: by chance): all of one fixed camera do; 2 lets everything pass",
    )
    shares: list[str] = flag([], "pairs per video, as T2I=0.5; default Table 7's in units of T2V")
    negatives: list[str] = flag([], "hard negatives per pair, as TI2V=2; default Table 7's")
    frames: int = flag(8, "frames of a video that captioner and prober see")
    max_tokens: int = flag(200, "vision tokens per frame")
    max_new_tokens: int = flag(
        0,
        "tokens per answer; 0: as many as the words asked for need, openai at least 1024. More for "
        "a captioner that thinks first",
    )
    concurrency: int = flag(32, "openai: requests in flight")
    workers: int = flag(
        2, "decoding processes; 0 decodes inline, where a damaged clip can hang or end the run"
    )
    seconds: float = flag(
        60, "time a worker has for a clip's frames, in seconds; ten times that for a whole video"
    )

    def __post_init__(self):
        # Table 7's numbers by task. A fraction of pairs per video is the chance of one pair more.
        t2v = TABLE7["T2V"]["samples"]
        per_video = {task: source["samples"] / t2v for task, source in TABLE7.items()}
        per_pair = {task: source["negatives"] for task, source in TABLE7.items()}
        self.pairs_per_video = read_task_numbers(self.shares, per_video, float)
        self.negatives_per_pair = read_task_numbers(self.negatives, per_pair, int)


# Flags that decide the contents of the files: all runs on one --out must agree on them.
DECISIVE = (
    "prober prompts part seed min_motion consistency duplicate shares negatives frames max_tokens"
).split()


class Prober:
    """The embedder that filters and mines; its weights are loaded at the first use."""

    def __init__(self, flags):
        self.flags = flags

    @functools.cached_property
    def gve(self):
        name = self.flags.prober
        if name == Flags.prober:  # wherever the program was started
            name = str(Path(__file__).parent / name)
        return GVE.from_pretrained(name, device=self.flags.device)

    def embed(self, items):
        """Embed items -> (vectors (n, D) float32, {index: reason}); vectors that failed are 0."""
        has_media = any("video" in item or "image" in item for item in items)
        vectors, failed = encode(
            self.gve,
            items,
            frames=self.flags.frames,
            max_tokens=self.flags.max_tokens,
            workers=self.flags.workers,
            seconds=self.flags.seconds,
            desc="vectors" if has_media else None,
        )
        # A NaN would be neither above nor below any threshold.
        for i in vectors.isnan().any(1).nonzero().flatten().tolist():
            failed.setdefault(i, "the embedder returned NaN")
            vectors[i] = 0
        return vectors, failed


def drop(row, why):
    """Mark a row as dropped, with the reason."""
    row["fate"] = "dropped"
    row["why"] = why


def kept_indices(rows):
    """Return the indices of the rows that are kept."""
    return [i for i, row in enumerate(rows) if row["fate"] == "kept"]


# Stage 1: quality control


def list_videos(flags):
    """List rows {"id", "video", "text"} of a JSON-lines file, or of every file in a folder.

    Hidden files are left out, and a folder's images, whose number is printed. Raises ValueError
    naming file:line for wrong types and for an id that comes twice.
    """
    path = Path(flags.videos)
    rows = {}
    if path.is_dir():
        n_images = 0
        for file in visible_files(path):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                n_images += 1
                continue
            name = str(file.relative_to(path))
            rows[name] = raw_row(name, os.path.abspath(file), "")
        if n_images:
            print(f"{path}: {n_images} image files left out, since only videos are used")
        return list(rows.values())

    for number, given in read_jsonl(path):
        name = str(given.get("id", given.get("video")))
        video = given.get("video")
        text = given.get("text") or ""
        if name in rows or not isinstance(video, str) or not isinstance(text, str):
            raise ValueError(
                f"{path}:{number}: video and text must be strings and the id {name!r} new"
            )
        rows[name] = raw_row(name, video, text)
    return list(rows.values())


def raw_row(name, video, text):
    """Return a row {"id", "video", "text"} that UTF-8 can hold, for its text, id and path go on.

    Half an emoji in a text is dropped; a path that is not UTF-8 drops the row.
    """
    row = {"id": printable(name), "video": printable(video), "text": whole_characters(text)}
    if row["video"] != video:
        drop(row, f"file name: {row['video']} is not UTF-8; rename the file")
    return row


def printable(name):
    """Return a name with an escape for each byte or half character that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclasses.dataclass
class Sample:
    """Frames of a whole video at about PROBE_FPS, shrunk: enough to see motion and cuts."""

    thumbnails: torch.Tensor  # (n, 3, 32, 32) float32 of 0-255
    times: np.ndarray  # (n,) seconds at which their frames come on display
    shown: np.ndarray  # (n,) seconds that their frames stay there
    frames: int  # in the file
    duration: float  # of the file in seconds
    size: list  # [height, width] of the file's frames in pixels


def sample_frames(path, fps):
    """Read a whole video at about `fps` -> Sample. One full-size frame is held at a time."""
    size = []

    def choose(timeline):
        n = len(timeline)
        if timeline.rate:
            return np.arange(0, n, max(1, round(timeline.rate / fps)))
        # The first frame in each 1 / fps seconds.
        slots = np.floor(timeline.times * fps)
        return np.unique(slots, return_index=True)[1]

    def shrink(pixels):
        size[:] = pixels.shape[:2]
        frame = torch.from_numpy(pixels).movedim(-1, 0).float()  # (3, H, W)
        return F.adaptive_avg_pool2d(frame, THUMBNAIL)

    read = read_frames(path, choose, shrink)
    timeline = read.timeline
    if timeline.rate:
        shown = np.full(len(timeline), 1 / timeline.rate)
    else:
        shown = np.diff(timeline.times, append=timeline.seconds)
    return Sample(
        thumbnails=torch.stack(read.pictures),
        times=timeline.times[read.indices],
        shown=shown[read.indices],
        frames=len(timeline),
        duration=timeline.seconds,
        size=size,
    )


def find_shots(thumbnails):
    """Cut a video into shots -> [(first, end)] in thumbnails.

    A cut is a change of more than 8 levels that stands out from the two changes on either side.
    """
    # A fade or a pan changes many frames on end; a cut changes one.
    change = (thumbnails[1:] - thumbnails[:-1]).abs().mean((1, 2, 3))  # (n - 1,)
    windows = F.pad(change, (2, 3)).unfold(0, 5, 1)  # (n, 5); window i is centred on change i
    around = windows[: len(change), [0, 1, 3, 4]].amax(1)  # (n - 1,)
    cuts = ((change > 8) & (change > 1.5 * around)).nonzero()[:, 0] + 1
    return list(itertools.pairwise([0, *cuts.tolist(), len(thumbnails)]))


def measure_motion(thumbnails, shots):
    """Return the share of pixels of which a colour changes by more than 24 levels in their shot."""
    # A cut is no motion: each shot is measured alone, and counts by its length.
    moved = 0.0
    for first, end in shots:
        shot = thumbnails[first:end]  # (n, 3, 32, 32)
        change = shot.amax(0) - shot.amin(0)  # (3, 32, 32)
        # Not their mean: a red ball may be as bright as the grey ground that it crosses.
        changed = change.amax(0) > 24  # (32, 32)
        moved += changed.float().mean().item() * (end - first)
    return moved / len(thumbnails)


def choose_key_frames(thumbnails, shots):
    """Choose thumbnails unlike each other, middles of long shots first -> their indices."""
    # All shots give their middle before any gives a second frame.
    longest_first = sorted(shots, key=lambda shot: shot[0] - shot[1])
    chosen = []
    for place in (0.5, 0.2, 0.8):
        for first, end in longest_first:
            k = first + int(place * (end - first))
            differences = [(thumbnails[k] - thumbnails[j]).abs().mean() for j in chosen]
            if len(chosen) < KEY_FRAMES and all(difference > 4 for difference in differences):
                chosen.append(k)
    return chosen


def draw_clips(sample, shots, rng):
    """Draw clips, each from a shot of its own -> at most CLIPS of [start, end] in seconds.

    A clip is at most three quarters of its video, or V2V would ask for the video itself.
    """
    least, most = CLIP_SECONDS
    clips = []
    for first, end in shots:
        # Only what was seen to be this shot: the cut lies somewhere between two thumbnails.
        shot_start = float(sample.times[first])
        shot_end = min(float(sample.times[end - 1] + sample.shown[end - 1]), sample.duration)
        seconds = min(rng.uniform(least, most), shot_end - shot_start, 0.75 * sample.duration)
        if seconds >= least:
            start = rng.uniform(shot_start, shot_end - seconds)
            clips.append([round(start, 3), round(start + seconds, 3)])
    return rng.sample(clips, min(len(clips), CLIPS))


def fingerprint(thumbnails):
    """Hash a video's looks -> 448 bits in hex: signs of brightness gradients, four tiny frames."""
    four = np.linspace(0, len(thumbnails) - 1, 4).round()
    gray = thumbnails.mean(1)[four]
    tiny = F.adaptive_avg_pool2d(gray, 8)  # (4, 8, 8)
    down = tiny.diff(dim=1) > 0
    right = tiny.diff(dim=2) > 0
    signs = torch.cat([down.flatten(), right.flatten()])
    return np.packbits(signs).tobytes().hex()


def measure(path, name, flags):
    """Watch one video -> the rest of its row: facts, fate, key frames, clips, fingerprint.

    Raises MediaError or FileNotFoundError. Runs in a decoding process.
    """
    sample = sample_frames(path, PROBE_FPS)
    shots = find_shots(sample.thumbnails)
    motion = measure_motion(sample.thumbnails, shots)
    row = {
        "frames": sample.frames,
        "rate": round(sample.frames / sample.duration, 3),
        "size": sample.size,
        "seconds": round(sample.duration, 3),
        "motion": round(motion, 4),
        "cuts": [round(float(sample.times[first]), 3) for first, _ in shots[1:]],
    }

    for quality, value, least in (
        ("resolution", min(sample.size), MIN_SIDE),
        ("frames", sample.frames, MIN_FRAMES),
        ("static", row["motion"], flags.min_motion),
    ):
        if value < least:
            drop(row, f"{quality}: {value} < {least}")
            return row

    row["fate"] = "kept"
    row["key_frames"] = []
    for k in choose_key_frames(sample.thumbnails, shots):
        # A quarter of a frame later, so that rounding cannot point at the frame before.
        row["key_frames"].append(round(float(sample.times[k] + 0.25 * sample.shown[k]), 4))
    row["clips"] = draw_clips(sample, shots, random.Random(f"{flags.seed}/{name}/clips"))
    row["hash"] = fingerprint(sample.thumbnails)
    return row


def inspect_videos(rows, flags):
    """Check captions and measure videos -> rows with facts and fate.

    Videos are decoded in processes with a time limit: a clip that hangs or crashes its decoder is
    dropped with that reason, like any other unreadable file.
    """
    base = flags.videos
    if not os.path.isdir(base):
        base = os.path.dirname(os.path.abspath(base))

    # Captions and paths need no decoder.
    rows = [dict(row) for row in rows]
    found = []
    for i, row in enumerate(rows):
        useless = useless_text(row["text"], SCRIPT)
        if useless:  # the video stays: it can do without a caption
            row["text"] = ""
            row["text_dropped"] = useless
        if "fate" in row:  # its name is not UTF-8
            continue
        try:
            row["video"] = resolve({"video": row["video"]}, base, flags.root)["video"]
        except (ValueError, FileNotFoundError) as error:
            drop(row, f"unreadable: {error}")
        else:
            found.append(i)

    pool = DecoderPool(
        lambda i: measure(rows[i]["video"], rows[i]["id"], flags),
        lambda i: rows[i]["video"],
        workers=flags.workers,
        seconds=PATIENCE * flags.seconds,
    )
    for i, measured in track(pool.map(found), len(found), "videos measured"):
        if isinstance(measured, Failed):
            drop(rows[i], f"unreadable: {measured.reason}")
        else:
            rows[i].update(measured)
    return rows


def check_part(p, jobs, prober, flags):
    """Do stage 1 of part p -> rows; their vectors (rows, D) are saved beside their file.

    The rows' file is written last and says that both are there.
    """
    rows = inspect_videos(jobs, flags)
    items = []
    for row in rows:
        items.append({"video": row["video"]} if row["fate"] == "kept" else PLACEHOLDER)
    vectors, failed = prober.embed(items)
    for i, reason in failed.items():
        if rows[i]["fate"] == "kept":
            drop(rows[i], f"not embedded: {reason}")

    score_captions(rows, vectors, prober)
    with whole_file(Path(flags.out) / "1-pool" / f"{p:05}.npy", "wb") as file:
        np.save(file, vectors.half().numpy())
    return rows


def score_captions(rows, vectors, prober):
    """Add "consistency" to captioned rows: the best cosine of a caption with its video or a shot.

    Why shots: a long video's caption often tells of a part only. vectors (rows, D): the videos'.
    """
    captioned = [i for i in kept_indices(rows) if rows[i]["text"]]
    texts, text_failed = prober.embed([{"text": rows[i]["text"]} for i in captioned])

    # Shots of half a second and more; the only shot of a video is the video.
    owners = []  # of each shot: index into captioned
    shots = []
    for n, i in enumerate(captioned):
        row = rows[i]
        for start, end in itertools.pairwise([0, *row["cuts"], row["seconds"]]):
            if 0.5 <= end - start < row["seconds"]:
                owners.append(n)
                shots.append({"video": {"path": row["video"], "start": start, "end": end}})
    shot_vectors, shot_failed = prober.embed(shots)

    for n, i in enumerate(captioned):
        rows[i]["consistency"] = cosine(vectors[i], texts[n])
    for n, vector in zip(owners, shot_vectors, strict=True):
        row = rows[captioned[n]]
        row["consistency"] = max(row["consistency"], cosine(vector, texts[n]))

    # Without its text or one of its shots, a video's best cosine is not known.
    lost = dict(text_failed)
    for m, reason in shot_failed.items():
        lost[owners[m]] = reason
    for n, reason in lost.items():
        row = rows[captioned[n]]
        del row["consistency"]
        drop(row, f"not embedded: {reason}")


def cosine(a, b):
    """Return the cosine of two unit vectors, rounded as in the stages' files; never below -1."""
    return max(-1, round(float(a @ b), 4))


def select_pool(rows, flags):
    """Apply the filters that compare all videos; write pool.jsonl and pool.npy, (N, D) of the kept.

    Captions that several videos share are blanked: they cannot tell these apart.
    """
    out = Path(flags.out)
    drop_inconsistent(rows, flags.consistency)
    drop_duplicates(rows, flags.duplicate)

    # After the duplicates: copies of one video may share a caption.
    kept = kept_indices(rows)
    uses = collections.Counter(rows[i]["text"].lower() for i in kept)
    for i in kept:
        text = rows[i]["text"]
        if text and uses[text.lower()] > 1:
            rows[i]["text"] = ""
            rows[i]["text_dropped"] = "of several videos"

    parts = sorted((out / "1-pool").glob("*.npy"))
    vectors = np.concatenate(list(map(np.load, parts)))  # (rows, D)
    with whole_file(out / "pool.npy", "wb") as file:
        np.save(file, vectors[kept].astype(np.float32))
    write_jsonl(out / "pool.jsonl", rows)


def drop_inconsistent(rows, consistency):
    """Drop rows whose consistency is below a cosine "0.09", or below a quantile "q0.1" of all."""
    scores = [row["consistency"] for row in rows if "consistency" in row]
    limit = float(consistency.lstrip("q"))
    if consistency.startswith("q") and scores:
        limit = float(np.quantile(scores, limit))
    for row in rows:
        if "consistency" in row and row["consistency"] < limit:
            drop(row, f"consistency: {row['consistency']:.4f} < {limit:.4f}")


def drop_duplicates(rows, least):
    """Drop kept rows like an earlier one. least: agreement of fingerprints, 1 all, 0 by chance."""
    kept = kept_indices(rows)
    if not kept:
        return
    signs = []
    for i in kept:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(rows[i]["hash"]), np.uint8))
        signs.append(2.0 * bits - 1)
    signs = torch.from_numpy(np.array(signs, np.float32))  # (kept, 448) of -1 and 1

    agreement, others = top_k(signs, signs, 8)
    n_bits = signs.shape[1]
    for n, i in enumerate(kept):
        alike = others[n][agreement[n] >= least * n_bits].tolist()
        first = min(alike, default=n)  # the earliest stays
        if first < n:
            share = (signs[n] @ signs[first]).item() / n_bits
            drop(rows[i], f"duplicate: of {rows[kept[first]]['id']}, agreement {share:.2f}")


# The asset pool


@dataclasses.dataclass
class Video:
    """A video of the asset pool, as stages 2 and 3 see it."""

    id: str
    path: str
    text: str  # raw caption, "" if there is none of use
    duration: float  # seconds
    key_frames: list  # times in seconds
    clips: list  # of [start, end] in seconds
    row: int  # in the pool's matrix (N, D)
    vector: torch.Tensor  # (D,)

    @property
    def item(self):
        return {"video": self.path}

    def draw_frame(self, rng):
        """Draw one of the key frames -> item."""
        return {"image": {"video": self.path, "time": rng.choice(self.key_frames)}}

    def draw_clip(self, rng):
        """Draw one of the clips, else the first seconds of the video -> item."""
        start, end = rng.choice(self.clips or [(0, min(CLIP_SECONDS[1], self.duration))])
        return {"video": {"path": self.path, "start": start, "end": end}}


class Pool:
    """The kept videos of stage 1, with their vectors as a matrix (N, D)."""

    def __init__(self, rows, matrix):
        self.matrix = matrix
        self.videos = []
        for n, i in enumerate(kept_indices(rows)):
            row = rows[i]
            video = Video(
                id=row["id"],
                path=row["video"],
                text=row["text"],
                duration=row["seconds"],
                key_frames=row["key_frames"],
                clips=row["clips"],
                row=n,
                vector=matrix[n],
            )
            self.videos.append(video)
        self.by_id = {video.id: video for video in self.videos}


# Stage 2: enrichment


def draw_tasks(video, flags):
    """Draw the pairs that a video shall give -> ["T2V", "T2V", "I2V", ...]."""
    rng = random.Random(f"{flags.seed}/{video.id}/tasks")
    tasks = []
    for task, share in flags.pairs_per_video.items():
        tasks += [task] * int(share + rng.random())
    return tasks


def caption_jobs(video, flags):
    """List the items of a video to caption: itself and, if it shall give T2I pairs, a key frame."""
    whole = {
        "id": f"{video.id} video",
        "of": video.id,
        "kind": "video",
        "text": video.text,
        "item": video.item,
    }
    if "T2I" not in draw_tasks(video, flags):
        return [whole]
    frame = {
        "id": f"{video.id} image",
        "of": video.id,
        "kind": "image",
        "text": "",
        "item": video.draw_frame(random.Random(f"{flags.seed}/{video.id}/frame")),
    }
    return [whole, frame]


def caption_part(p, jobs, ask, flags):
    """Do stage 2 of part p: caption videos and key frames -> rows."""
    ask = keep_answers(ask, "2-captions", p, flags)

    # One batch of requests for the whole part: a captioner is fastest with many at once.
    requests = []
    owners = []  # index of each request's job
    for n, job in enumerate(jobs):
        rng = random.Random(f"{flags.seed}/{job['id']}")
        wanted = make_requests(job["kind"], [job["item"]], flags.prompts, rng, job["text"])
        requests += wanted
        owners += [n] * len(wanted)

    answers = [[] for _ in jobs]
    for n, answer in zip(owners, ask_until_valid(ask, requests, TRIES), strict=True):
        answers[n].append(answer)
    return [job | merge_answers(mine) for job, mine in zip(jobs, answers, strict=True)]


def keep_answers(ask, stage, p, flags):
    """Return ask(requests), which keeps the captioner's answers beside the part's file of rows."""
    path = Path(flags.out) / stage / f"{p:05}.answers"
    return keep_replies(ask, path, f"{flags.captioner} {flags.max_new_tokens}")


def merge_answers(answers):
    """Join the Answers about one item -> the rest of its row. It is kept if all are valid."""
    worst = min(answers, key=lambda answer: ("failed", "dropped", "kept").index(answer.fate))
    row = {}
    if worst.fate == "kept":
        row["captions"] = {}
        for answer in answers:
            row["captions"] |= answer.texts
    else:
        row["why"] = worst.why
    row["fate"] = worst.fate
    row["tokens"] = np.sum([answer.tokens for answer in answers], 0).tolist()
    return row


# Stage 3: task extension


@dataclasses.dataclass
class Pair:
    """A training pair on its way through stage 3."""

    id: str
    of: str  # id of the target video
    task: str
    query: dict  # item
    positive: dict  # item
    fate: str = "kept"
    why: str = ""
    reference: str = ""  # composed: id of the video that the query shows
    answer: Answer | None = None  # composed: the captioner's
    ranks: list | None = None  # composed: of the target, with and without the reference
    negatives: list | None = None  # items

    def as_row(self):
        """Return the pair as a row of the stage's file."""
        row = {
            "id": self.id,
            "of": self.of,
            "task": self.task,
            "query": self.query,
            "positive": self.positive,
            "fate": self.fate,
        }
        if self.answer:
            row["reference"] = self.reference
            if self.answer.why:
                row["why"] = self.answer.why
            row["tokens"] = self.answer.tokens
        if self.ranks is not None:
            row["ranks"] = self.ranks
        if self.negatives is not None:
            row["negatives"] = self.negatives
        if self.why:
            row["why"] = self.why
        return row

    def drop(self, why):
        self.fate = "dropped"
        self.why = why


def plan_pairs(rows, pool, flags):
    """List the pairs that a part's captioned videos shall give, as jobs of stage 3.

    A composed pair gets its reference and query later. No draw depends on the fate of another job.
    """
    frames = {}
    videos = []
    for row in rows:
        if row["fate"] == "kept" and row["kind"] == "image":
            frames[row["of"]] = row
        elif row["fate"] == "kept":
            videos.append(row)

    # Each draw has a generator of its own, seeded by its name.
    jobs = []
    for row in videos:
        video = pool.by_id[row["of"]]
        texts = [{"text": text} for text in row["captions"].values()]
        random.Random(f"{flags.seed}/{video.id}/texts").shuffle(texts)
        for k, task in enumerate(draw_tasks(video, flags)):
            name = f"{video.id} {task} {k}"
            rng = random.Random(f"{flags.seed}/{name}")
            query, positive = draw_pair(task, video, texts, frames.get(video.id), rng)
            if query or task in COMPOSED:
                job = {"id": name, "of": video.id, "task": task}
                jobs.append(job | {"query": query, "positive": positive})
    return jobs


def draw_pair(task, video, texts, frame, rng):
    """Draw a pair of a task -> (query, positive); the query is {} if the video cannot give one.

    texts: the video's captions as items, shuffled. frame: row of its captioned key frame, or None.
    """
    if task == "T2T" and len(texts) > 2:
        return texts[-2], texts[-1]
    if task == "T2V":
        return rng.choice(texts[:-2] or texts), video.item  # not the two texts of T2T
    if task == "T2I" and frame:
        return {"text": rng.choice(list(frame["captions"].values()))}, frame["item"]
    if task == "I2V":
        return video.draw_frame(rng), video.item
    if task == "V2V" and video.clips:
        return video.draw_clip(rng), video.item
    return {}, video.item


def extend_part(p, jobs, pool, ask, prober, caption_vectors, flags):
    """Do stage 3 of part p: compose queries, drop those that need no reference, mine negatives.

    caption_vectors: video id -> vectors (n, D) of its captions.
    """
    ask = keep_answers(ask, "3-pairs", p, flags)
    pairs = [Pair(**job) for job in jobs]
    compose_queries([pair for pair in pairs if pair.task in COMPOSED], pool, ask, flags)

    # Composed queries are embedded without their references, too, to see whether these matter.
    to_video = [pair for pair in pairs if pair.fate == "kept" and pair.task.endswith("2V")]
    texts = []
    for pair in to_video:
        texts.append({"text": pair.query["text"]} if pair.task in COMPOSED else PLACEHOLDER)
    texts, text_failed = prober.embed(texts)
    queries, failed = prober.embed([pair.query for pair in to_video])
    failed |= text_failed

    for i, pair in enumerate(track(to_video, len(to_video), "negatives mined")):
        if i in failed:
            pair.drop(f"not embedded: {failed[i]}")
            continue
        if pair.task in COMPOSED:
            own = pool.by_id[pair.of].row
            pair.ranks = [
                rank_of(own, pool.matrix @ queries[i]),
                rank_of(own, pool.matrix @ texts[i]),
            ]
        k = flags.negatives_per_pair[pair.task]
        pair.negatives = mine(pair, queries[i], k, pool, caption_vectors)

        if pair.ranks and pair.ranks[0] >= pair.ranks[1]:
            pair.drop("needs no reference: the target ranks as high without it")
        elif len(pair.negatives) < k:
            pair.drop(
                f"too few negatives: {len(pair.negatives)} of {k}; the pool is too small: "
                f"take more videos, or --negatives {pair.task}=0 and another --out"
            )
    return [pair.as_row() for pair in pairs]


def compose_queries(pairs, pool, ask, flags):
    """Give composed pairs a reference like their target, and the text that leads to the target.

    # PAPER: the reference is a frame or clip of a *similar* video (A.6: same or similar source).
    """
    requests = []
    for pair in pairs:
        rng = random.Random(f"{flags.seed}/{pair.id}")
        target = pool.by_id[pair.of]
        similarity = pool.matrix @ target.vector  # (N,)
        similarity[similarity >= TWIN] = -2  # the target itself among them
        values, rows = similarity.topk(min(3, len(similarity)))
        similar = rows[values > -2].tolist() or [target.row]
        reference = pool.videos[rng.choice(similar)]

        pair.reference = reference.id
        if pair.task == "TI2V":
            pair.query = reference.draw_frame(rng)
        else:
            pair.query = reference.draw_clip(rng)
        requests += make_requests(pair.task, [pair.query, pair.positive], flags.prompts, rng)

    # One request each: only captions come in several styles.
    answers = ask_until_valid(ask, requests, TRIES)
    for pair, answer in zip(pairs, answers, strict=True):
        pair.answer = answer
        pair.fate = answer.fate
        text = answer.texts["query"] if answer.fate == "kept" else ""
        pair.query = {**pair.query, "text": text}


def rank_of(row, scores):
    """Return the rank, from 1, of a row among scores (N,)."""
    return int((scores > scores[row]).sum()) + 1


def mine(pair, query, k, pool, caption_vectors):
    """Find the k hardest negatives of a pair's query (D,) -> their items; there may be fewer.

    Videos that may be right answers are left out: twins of the target, videos nearer to the query
    than the target is, and a composed query's reference. For T2V the likeliest negatives are ranked
    by their captions, which tell twins apart better than videos do (NOTES.md).
    """
    # Exclude possible right answers.
    target = pool.by_id[pair.of]
    scores = pool.matrix @ query  # (N,)
    excluded = pool.matrix @ target.vector >= TWIN  # the target itself among them
    excluded |= scores > scores[target.row]
    if pair.reference:
        excluded[pool.by_id[pair.reference].row] = True

    # Rank the likeliest negatives by their captions; one that says the same as the query is none.
    if pair.task == "T2V":
        likely = scores.masked_fill(excluded, -2).topk(min(LIKELY, len(scores))).indices
        scores = torch.full_like(scores, -2)
        for j in likely.tolist():
            captions = caption_vectors(pool.videos[j].id)
            if len(captions):
                scores[j] = (captions @ query).max()
        excluded |= scores > SAME_CAPTION

    best, rows = scores.masked_fill(excluded, -2).topk(min(k, len(scores)))
    return [pool.videos[j].item for j in rows[best > -2].tolist()]


# The mixture


def relative_media(value, folder):
    """Return an item, or a list of items, with media paths relative to a folder."""
    if isinstance(value, list):
        return [relative_media(one, folder) for one in value]
    if not isinstance(value, dict):
        return value
    relative = {}
    for key, inner in value.items():
        if key in ("video", "path") and isinstance(inner, str):
            relative[key] = os.path.relpath(inner, folder)
        else:
            relative[key] = relative_media(inner, folder)
    return relative


def write_uvrd(rows, flags):
    """Write <out>/uvrd: a training file per task, and a mixture whose samples keep the shares.

    A pair that was drawn several times is written once. Prints what was made; returns the number of
    pairs.
    """
    folder = Path(flags.out) / "uvrd"
    folder.mkdir(exist_ok=True)
    made = collections.Counter(row["task"] for row in rows)
    pairs = {}  # task -> lines
    mixture = []
    for task, source in TABLE7.items():
        name = f"{task.lower()}.jsonl"
        pairs[task] = training_lines([row for row in rows if row["task"] == task], folder)
        write_jsonl(folder / name, pairs[task])
        if not pairs[task]:
            continue

        # In proportion to T2V's pairs, even if more pairs of this task were dropped.
        share = flags.pairs_per_video[task] / (flags.pairs_per_video["T2V"] or 1)
        samples = round(share * made["T2V"]) or len(pairs[task])
        entry = {"path": name, "samples": samples, "negatives": flags.negatives_per_pair[task]}
        mixture.append(source | entry)
        line = f"    {task}: {len(pairs[task])} pairs, {samples} samples in the mixture"
        if len(pairs[task]) < made[task]:
            line += f" ({made[task] - len(pairs[task])} draws gave a pair again)"
        print(line)
    write_json(folder / "mixture.json", mixture)

    single = [task for task, lines in pairs.items() if len(lines) == 1]
    if single:
        print(
            f"    warning: only one pair in {', '.join(single)}: a batch of one pair has no other "
            "candidate to learn from; take more videos, or --shares TASK=0"
        )
    return sum(map(len, pairs.values()))


def training_lines(rows, folder):
    """Return the lines of a training file for a task's rows, each query and positive once."""
    lines = {}
    for row in rows:
        keys = [key for key in ("query", "positive", "negatives", "id") if row.get(key)]
        pair = json.dumps([row["query"], row["positive"]])
        lines.setdefault(pair, {key: relative_media(row[key], folder) for key in keys})
    return list(lines.values())


# The run


def check_flags(rows, flags):
    """Refuse an --out that was begun with other videos or other decisive flags."""
    path = Path(flags.out) / "flags.jsonl"
    checksum = zlib.crc32(json.dumps(rows).encode())
    now = {"videos": f"of {len(rows)} rows, checksum {checksum}"}
    now |= {key: getattr(flags, key) for key in DECISIVE}

    # The first process to come writes the file, under the lock.
    with file_lock(Path(flags.out) / "lock"):
        if not path.exists():
            write_jsonl(path, [now])
        begun = load_jsonl(path)[0]
    for key in begun | now:
        if begun.get(key) != now.get(key):
            raise ValueError(
                f"{flags.out} was begun with --{key.replace('_', '-')} {begun.get(key)}, "
                f"not {now.get(key)}: take another --out"
            )


def lazy_captioner(flags):
    """Return ask(requests), which opens the captioner when first needed: a rerun may not."""

    @functools.cache
    def opened():
        return open_captioner(
            flags.captioner,
            device=flags.device,
            concurrency=flags.concurrency,
            frames=flags.frames,
            max_tokens=flags.max_tokens,
            max_new_tokens=flags.max_new_tokens or None,
            workers=flags.workers,
            seconds=flags.seconds,
        )

    def ask(requests):
        if not requests:
            return []
        return track(opened()(requests), len(requests), "answers")

    return ask


def caption_embedder(captions, prober):
    """Return caption_vectors(video id) -> (n, D). captions: rows of stage 2."""
    texts = {}
    for row in captions:
        if row["fate"] == "kept" and row["kind"] == "video":
            texts[row["of"]] = [{"text": text} for text in row["captions"].values()]

    @functools.lru_cache(100_000)
    def caption_vectors(video_id):
        vectors, _ = prober.embed(texts.get(video_id, []))
        return vectors

    return caption_vectors


def print_pool_notes(rows, out):
    """Print which flags drop videos by figures tuned on mini, and what became of the captions."""
    reasons = {row.get("why", "").split(":")[0] for row in rows}
    if reasons & {"static", "consistency", "duplicate"}:
        print(
            "    --min-motion, --consistency and --duplicate were tuned on mini; their figures are "
            f"under motion, consistency and why in {out}/pool.jsonl"
        )
    useless = collections.Counter(row["text_dropped"] for row in rows if "text_dropped" in row)
    shared = useless.pop("of several videos", 0)
    if useless:
        listed = ", ".join(f"{n} ({reason})" for reason, n in useless.items())
        print(f"    raw captions not used, which drops no video: {listed}")
    if shared:
        print(f"    raw captions not used, since other videos have the same: {shared}")


def exit_if_failed(rows):
    """End the program with status 1 and the number of rows that failed, if any did."""
    failed = sum(row["fate"] == "failed" for row in rows)
    if failed:
        sys.exit(f"{failed} failed; the same command tries them again")


def cut(rows, size):
    """Cut a list into parts of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def join(parts):
    """Return the rows of all parts as one list."""
    return list(itertools.chain.from_iterable(parts))


def main(flags):
    """Run the stages and print what each kept. Raises ValueError for wrong flags and input."""
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    if flags.device == "cuda":
        flags.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if flags.prompts == "auto":
        flags.prompts = "short" if flags.captioner == "mini" else "full"
    # A wrong name must not show only when stage 1 is done, perhaps hours later.
    split_captioner(flags.captioner)

    rows = list_videos(flags)
    if not rows:
        raise ValueError(f"{flags.videos}: no videos in it")
    if flags.dry_run:
        shares = flags.pairs_per_video
        print_dry_run(len(rows), shares, flags.prompts, flags.frames, flags.max_tokens)
        return

    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    check_flags(rows, flags)
    prober = Prober(flags)
    ask = lazy_captioner(flags)

    # Stage 1: quality control
    parts = cut(rows, flags.part)
    do = functools.partial(check_part, prober=prober, flags=flags)
    checked = run_sharded(out, "1-pool", parts, do, flags.shard)
    with file_lock(out / "lock"):
        if not (out / "pool.jsonl").exists():
            select_pool(join(checked), flags)
    rows = load_jsonl(out / "pool.jsonl")
    pool = Pool(rows, torch.from_numpy(np.load(out / "pool.npy")))

    seconds = print_summary(out, "1-pool", rows)
    print_pool_notes(rows, out)
    if flags.stages < 2:
        return

    # Stage 2: enrichment
    parts = []
    for videos in cut(pool.videos, flags.part):
        parts.append(join(caption_jobs(video, flags) for video in videos))
    do = functools.partial(caption_part, ask=ask, flags=flags)
    captions = run_sharded(out, "2-captions", parts, do, flags.shard)
    seconds += print_summary(out, "2-captions", join(captions))
    if flags.stages < 3:
        exit_if_failed(join(captions))
        return

    # Stage 3: task extension
    parts = [plan_pairs(part, pool, flags) for part in captions]
    do = functools.partial(
        extend_part,
        pool=pool,
        ask=ask,
        prober=prober,
        caption_vectors=caption_embedder(join(captions), prober),
        flags=flags,
    )
    pairs = join(run_sharded(out, "3-pairs", parts, do, flags.shard))
    seconds += print_summary(out, "3-pairs", pairs)

    kept = [row for row in pairs if row["fate"] == "kept"]
    with file_lock(out / "lock"):
        n_pairs = write_uvrd(kept, flags)
    if n_pairs:
        per_pair = seconds / n_pairs
        hours = per_pair * 1.55e6 / 3600
        print(
            f"    {per_pair:.2f} s a pair; at this rate one process would take {hours:.0f} hours "
            "for the paper's 1.55M pairs"
        )
        print(
            f"    for training: train.py --mixture {out}/uvrd/mixture.json --root FOLDER_OF_VIDEOS"
        )

    exit_if_failed(join(captions) + pairs)
    if not kept:
        sys.exit("not one pair was made; the reasons are above")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"synth.py: {error}")
