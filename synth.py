"""V-SynFlow: weakly captioned videos -> universal retrieval data, UVRD (arXiv 2510.27571, sections 3.3 and A.6, Tables 7 and 8).

    python synth.py --videos runs/raw/captions.jsonl --out runs/synth                    # the mini world's; under two CPU minutes
    python synth.py --videos DIR --out DIR --captioner openai:http://localhost:8000/v1#MODEL --prober Alibaba-NLP/GVE-3B

Three stages, each a folder of JSON lines below --out with one row per job, its fate (kept, dropped or failed) and the reason:
    1-pool      quality control; pool.jsonl beside it is the asset pool, after what only all rows together can tell
    2-captions  enrichment: five captions per video and per key frame
    3-pairs     task extension: T2T, T2I, T2V, I2V, V2V, composed queries (TI2V, TV2V), hard negatives
then <out>/train: a training file per task and the mixture.json that train.py takes. The same command goes on where a killed run
stopped and tries what failed again. Work is shared by torchrun's ranks, by --shard 0/4 ... 3/4, or by the same command run twice.
Legend: N videos in the pool, D embedding dim, n sampled frames of a video.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import os
import random
import re
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import read_frames, read_jsonl, resolve
from embed import encode, parse_flags, top_k
from extras.captioners import ahead, server_captioner, transformers_captioner
from model import GVE

TASKS = {  # Table 7: thousands of pairs, hard negatives, batch size per GPU; the instructions are ours, theirs are not listed
    "T2T": (100, 0, 64, "Find a text that describes the same video."),
    "T2I": (210, 0, 32, "Find the image that matches the given caption."),
    "T2V": (879, 1, 64, "Find the video that matches the given caption."),
    "I2V": (200, 0, 64, "Find the video that the given image was taken from."),
    "V2V": (36, 0, 64, "Find the video that the given clip was cut from."),
    "TI2V": (89, 1, 64, "Find the video that shows the given image changed as the text says."),
    "TV2V": (35, 1, 64, "Find the video that shows the given clip changed as the text says.")}
WORDS = {  # A.6: what is asked for, and the least and most words of each
    "video": {"concise": (10, 25), "rich": (80, 200), "abstract": (30, 100), "keywords": (5, 30), "partial": (10, 70)},
    "image": {"concise": (10, 25), "rich": (50, 200), "abstract": (30, 100), "keywords": (5, 30), "minimal": (10, 70)},
    "TI2V": {"query": (3, 50)}, "TV2V": {"query": (3, 25)}}
PROMPTS = {  # our wording of A.6's specification; requests_for() fills the slots
    "video": """Describe the video for a search engine in five captions:
concise (10-25 words): what happens, in one sentence; rich (80-200 words): who and what is where, looks like what, and does what in
which order; abstract (30-100 words): topic and mood, for someone who forgot the details; keywords (5-30 words): key terms with commas
between them; partial (10-70 words): one object, moment or place only.
30-60 % of each is spatial (objects, looks, positions), 30-60 % temporal (actions, changes, order), up to 20 % theme, background, style
and camera, up to 10 % anything else; give most room to {focus}. One caption is under 20 words and one over 100. State only what
can be seen: no names, causes or sounds. Write {readability} sentences for readers with {education}.{raw}""",
    "image": """Describe this frame of a video for a search engine in five captions:
concise (10-25 words): the moment and where things are, in one sentence; rich (50-200 words): every object, its looks and where it
stands to the others; abstract (30-100 words): what the arrangement of the space is about; keywords (5-30 words): key terms with commas
between them, the moment's among them; minimal (10-70 words): one object and its place.
50-70 % of each is spatial, up to 30 % what this one moment proves (no sequence of events), 10-20 % style and composition, up to 10 %
anything else. One caption is under 20 words. State only what can be seen. Write {readability} sentences for readers with {education}.""",
    "TI2V": """First comes a reference image, then the target video. Write the text that finds the target together with the image, by
this strategy: {strategy}. Check that it (1) has at most 50 words, (2) means nothing without the image, (3) does not describe the image
again, (4) names a specific attribute of the target, (5) rules out at least half of the videos that fit the image, (6) is true of the
target and not of the reference, (7) reads like something a person would type.""",
    "TV2V": """First comes a reference clip, then the target video. Write the text, usually 5-15 words, that finds the target together
with the clip. It says how the target differs, by this relation: {strategy}. It means nothing without the clip and does not describe
the clip again."""}
SHORT = {"video": "Describe the video in the {style} style.", "image": "Describe the image in the {style} style.",
         "TI2V": "Describe what changes from the reference to the target video."}
SHORT["TV2V"] = SHORT["TI2V"]
FOCUS = {"what things look like and where they are": 0.3, "what happens and in which order": 0.6, "theme, style and camera": 0.1}
STRATEGY = {"TI2V": ("the same subject in another action", "the same subject in another place", "the same subject without one thing",
                     "the same relation between other things"),
            "TV2V": ("what happens next", "another point of view", "another quality or condition", "the same action, done otherwise")}

URL = r"https?://|www\.|\b\w+\.(com|org|net)\b"
FILE = r"\.(mp4|avi|mov|mkv|webm|wmv|jpe?g|png|gif)\b|^\W*(img|dsc|vid|mvi|gopr|pxl|clip|video|untitled|final)[\W\d_]*$"
FILLER = (r"subscribe|click (here|the|on|below)|link (below|in)|follow (me|us)|watch (now|more|full)|all rights reserved|copyright|©|"
          r"royalty[- ]free|stock (footage|video)|no (description|caption|title)|lorem ipsum|sponsored|download|free shipping|^(#\w+\s*)+$")
RULES = {  # annotation rectification: what is no description. rule(text, its words, script); the first that holds counts
    "empty": lambda text, words, script: not words,
    "URL": lambda text, words, script: re.search(URL, text, re.I),
    "file name": lambda text, words, script: re.search(FILE, text, re.I),
    "boilerplate": lambda text, words, script: re.search(FILLER, text, re.I),
    "wrong script": lambda text, words, script: 3 * sum(c.isalpha() for c in text) > 4 * sum(
        unicodedata.name(c, "").startswith(script) for c in text if c.isalpha()),
    "too short": lambda text, words, script: len(words) < 3,
    "too long": lambda text, words, script: len(words) > 1000,
    "repetition": lambda text, words, script: len(words) > 5 and 2 * len(set(itertools.pairwise(words))) < len(words)}


def flag(default, text, **more):
    how = {"default_factory": lambda: default} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": text, **more}, **how)


@dataclasses.dataclass
class Flags:
    videos: str = flag("runs/raw/captions.jsonl", 'a folder of videos, or JSON lines {"video", "text"?, "id"?}')
    out: str = flag("runs/synth", "folder to write")
    captioner: str = flag("mini", "mini | hf:MODEL | openai:URL#MODEL")
    prober: str = flag("mini/prober", "embedder that filters and mines")
    prompts: str = flag("auto", "full: A.6's; short: one style at a time and plain answers, for small captioners; auto: short for mini",
                        choices=["auto", "full", "short"])
    stage: str = flag("all", "run only this one", choices=["all", "1", "2", "3"])
    shard: str = flag("0/1", "i/n: take parts i, i + n, i + 2n, ... of each stage")
    part: int = flag(256, "rows per file of a stage, the unit of progress")
    dry_run: bool = flag(False, "print prompts, counts, expected calls and tokens, and stop")
    root: list[str] = flag([], "more folders that videos may lie in")
    seed: int = flag(42, "of everything random")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    script: str = flag("LATIN", "captions are in this script (first word of its letters' Unicode names)")
    min_side: int = flag(56, "least height and width in pixels: two vision tokens")
    min_frames: int = flag(8, "least frames: what the embedder sees")
    probe_fps: float = flag(8.0, "frames per second on which motion and cuts are measured")
    min_motion: float = flag(0.01, "least share of pixels that change by 24 of 255 levels within a shot")
    consistency: str = flag("0.0", "least centred cosine of video and caption; q0.1: the lowest tenth goes")
    duplicate: float = flag(0.6, "videos whose brightness gradients agree in sign this much (1 all, 0 by chance) are one")
    key_frames: int = flag(3, "most key frames per video")
    clips: int = flag(2, "most clips per video, 2-10 s each")
    hallucination: float = flag(0.1, "a caption goes if its cosine with the video is this far below the raw caption's")
    shares: list[str] = flag([], "pairs per video, as T2I=0.5; default Table 7's in units of T2V")
    negatives: list[str] = flag([], "hard negatives per pair, as TI2V=2; default Table 7's")
    margin: float = flag(0.0, "a hard negative's score exceeds the positive's by at most this")
    twin: float = flag(0.995, "a video with this cosine to the positive is neither its negative nor its reference")
    frames: int = flag(8, "frames of a video that captioner and prober see")
    max_tokens: int = flag(200, "vision tokens (28 x 28 pixels) per frame")
    batch_size: int = flag(32, "items per forward")
    workers: int = flag(2, "decoding threads")
    max_new_tokens: int = flag(1024, "per answer")
    tries: int = flag(3, "answers per request; each after the first is asked for with the error of the one before")
    concurrency: int = flag(32, "openai: requests in flight")
    retries: int = flag(5, "openai: further attempts after 408, 429, 5xx, time-outs and broken connections")
    backoff: float = flag(1.0, "openai: seconds before the second attempt, doubled for each further one")
    timeout: float = flag(300.0, "openai: seconds of silence before an attempt is given up")


RESULT = ("prober prompts part seed script min_side min_frames probe_fps min_motion consistency duplicate key_frames clips "
          "hallucination shares negatives margin twin frames max_tokens").split()  # flags that decide rows: a rerun keeps them


# Asking

def requests_for(kind, media, flags, rng, raw=""):
    """Word the requests for one video's or frame's captions or for one composed query: [{"media", "prompt", "want", "plain"}]."""
    if flags.prompts == "short":
        return [{"media": media, "prompt": SHORT[kind].format(style=style), "want": {style: (2, 70)}, "plain": True}
                for style in WORDS[kind]]
    slots = {"focus": rng.choices(list(FOCUS), list(FOCUS.values()))[0], "strategy": rng.choice(STRATEGY.get(kind, [""])),
             "readability": rng.choice(("simple", "everyday", "elaborate")),
             "education": rng.choice(("primary school", "high school", "a university degree")),
             "raw": f"\nIts uploader wrote, perhaps wrongly: {' '.join(raw.split()[:200])}" if raw else ""}
    form = json.dumps(dict.fromkeys(WORDS[kind], "..."))
    return [{"media": media, "prompt": f"{PROMPTS[kind].format(**slots)}\nAnswer with one JSON object and nothing else: {form}",
             "want": WORDS[kind], "plain": False}]


def parse(answer, want, plain):
    """Read an answer as {name: text} with the wanted names and numbers of words; ValueError tells the captioner what is wrong."""
    if plain:
        got = dict.fromkeys(want, answer.strip())
    else:
        try:
            got = json.loads(re.sub(r"^\s*```\w*|```\s*$", "", answer))
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(got, dict) or set(got) != set(want) or not all(isinstance(text, str) for text in got.values()):
            raise ValueError(f"schema: it must be one object with strings under {', '.join(want)} and no other key")
    for name, (low, high) in want.items():
        if not low <= (n := len(got[name].split())) <= high:
            raise ValueError(f"length: {name} has {n} words and must have {low}-{high}")
    if len({text.lower() for text in got.values()}) < len(got):
        raise ValueError("repetition: two captions are the same")
    return got


def obtain(ask, requests, flags):
    """Ask until every answer parses or its tries are spent -> one {"fate", "got" or "why", "tokens": [read, written]} each."""
    out, pending = [{"tokens": [0, 0]} for _ in requests], list(range(len(requests)))
    for _ in range(flags.tries):
        shown = [f"\nYour last answer was refused: {out[i]['why']}. Answer again." if "why" in out[i] else "" for i in pending]
        asked = [{**requests[i], "prompt": requests[i]["prompt"] + error} for i, error in zip(pending, shown, strict=True)]
        for i, (answer, failure, *tokens) in zip(pending, ask(asked), strict=True):
            fate = {"fate": "failed", "why": failure}
            if not failure:
                try:
                    fate = {"fate": "kept", "got": parse(answer, requests[i]["want"], requests[i]["plain"])}
                except ValueError as error:
                    fate = {"fate": "dropped", "why": str(error)}
            out[i] = fate | {"tokens": [a + b for a, b in zip(out[i]["tokens"], tokens, strict=True)]}
        pending = [i for i in pending if out[i]["fate"] == "dropped"]
    return out


# Shared, resumable work

def read(path):
    return [row for _, row in read_jsonl(path)]


def write(path, rows):
    """Write JSON lines under a temporary name and rename: the file is whole or not there."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def lock(path, wait=True):
    """Hold a lock that dies with its process; gives False where another holds it and wait is False."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held


def share(stage, parts, do, flags):
    """Do what is missing or failed of a stage's parts (lists of jobs with an "id") beside others who do the same -> all rows.

    do(p, jobs) -> a row with "id" and "fate" per job. The first pass takes what is free, this rank's own parts first; the second
    waits for parts that others hold and finishes what they left, so that all ranks leave a stage together. Exits while other
    shards have parts to do.
    """
    folder, began = Path(flags.out) / stage, time.time()
    folder.mkdir(exist_ok=True)
    (i, n), rank, world = map(int, flags.shard.split("/")), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths, mine = [folder / f"{p:05}.jsonl" for p in range(len(parts))], range(i, len(parts), n)
    for wait, p in itertools.product((False, True), sorted(mine, key=lambda p: p // n % world != rank)):
        with lock(paths[p].with_suffix(".lock"), wait) as held:
            there = paths[p].exists()
            if not held or there and (wait or paths[p].stat().st_mtime > began):  # this run's failures wait for the next run
                continue
            old = {row["id"]: row for row in read(paths[p])} if there else {}
            jobs, start = [job for job in parts[p] if old.get(job["id"], {"fate": "failed"})["fate"] == "failed"], time.time()
            if jobs or not there:
                new = {row["id"]: row for row in do(p, jobs)}
                write(paths[p], [new.get(job["id"]) or old[job["id"]] for job in parts[p]])
                tokens = [sum(row.get("tokens", (0, 0))[k] for row in new.values()) for k in (0, 1)]
                event = {"stage": stage, "part": p, "seconds": round(time.time() - start, 2), "tokens": tokens}
                with open(Path(flags.out) / "log.jsonl", "a") as file:
                    file.write(json.dumps(event | collections.Counter(row["fate"] for row in new.values())) + "\n")
    if missing := sum(not path.exists() for path in paths):
        sys.exit(f"{stage}: {missing} of {len(paths)} parts belong to other shards; run this again when they are done")
    return [read(path) for path in paths]


def tell(stage, rows, flags):
    """Print what a stage kept, why it did not keep the rest, and what that took."""
    count = collections.Counter((row["fate"], row.get("why", "").split(":")[0]) for row in rows)
    lost = ", ".join(f"{fate} {n} ({why})" for (fate, why), n in sorted(count.items()) if fate != "kept")
    events = [event for event in read(Path(flags.out) / "log.jsonl") if event["stage"] == stage]
    seconds, (read_in, written) = sum(e["seconds"] for e in events), np.sum([e["tokens"] for e in events] or [[0, 0]], axis=0)
    print(f"{stage}: kept {sum(row['fate'] == 'kept' for row in rows)} of {len(rows)}{', ' * bool(lost)}{lost}; {seconds:.0f} s of one "
          f"process, {read_in} tokens read, {written} written", flush=True)
    return seconds


# Stage 1: quality control

def inputs(flags):
    """List the rows {"id", "video", "text"} of a folder (every file in it) or of a JSON-lines file; ids must differ."""
    path, seen = Path(flags.videos), {}
    if path.is_dir():
        return [{"id": str(f.relative_to(path)), "video": str(f), "text": ""} for f in sorted(path.rglob("*")) if f.is_file()]
    for number, row in read_jsonl(path):
        row = {"id": str(row.get("id", row.get("video"))), "video": row.get("video"), "text": row.get("text") or ""}
        if row["id"] in seen or not isinstance(row["video"], str) or not isinstance(row["text"], str):
            raise ValueError(f"{path}:{number}: video and text must be strings and id {row['id']!r} new")
        seen[row["id"]] = row
    return list(seen.values())


def watch(path, fps):
    """Read a whole video at about `fps` -> (frames shrunk to (n, 3, 32, 32) float of 0-255, facts); 32 frames at a time."""
    facts, small, done = {}, [], 0

    def choose(n, rate):
        facts.update(frames=n, rate=rate, step=max(1, round(rate / fps)))
        return np.arange(0, n, facts["step"])[done : done + 32]

    while not small or done * facts["step"] < facts["frames"]:
        frames = torch.from_numpy(read_frames(path, choose)).movedim(-1, 1)
        small.append(F.adaptive_avg_pool2d(frames.float(), 32))
        done += len(frames)
    return torch.cat(small), facts | {"size": list(frames.shape[2:])}


def look(row, flags):
    """Check and measure one video -> its row: facts, motion, cuts, key frames, clips, fingerprint; kept, or dropped and why."""
    useless = next((name for name, rule in RULES.items() if rule(row["text"], row["text"].lower().split(), flags.script)), None)
    row = row | ({"text": "", "text_dropped": useless} if useless else {})  # the video stays: it can do without
    try:
        base = flags.videos if os.path.isdir(flags.videos) else os.path.dirname(os.path.abspath(flags.videos))
        row["video"] = resolve({"video": os.path.abspath(row["video"]) if base == flags.videos else row["video"]}, base, flags.root)["video"]
        small, facts = watch(row["video"], flags.probe_fps)
    except (ValueError, FileNotFoundError) as error:
        return row | {"fate": "dropped", "why": f"unreadable: {error}"}
    gray, tick, length = small.mean(1), facts["step"] / facts["rate"], facts["frames"] / facts["rate"]
    change = F.pad((small[1:] - small[:-1]).abs().mean((1, 2, 3)), (2, 2))
    beside = change.unfold(0, 5, 1)[:, [0, 1, 3, 4]].amax(1)  # a cut stands out from the two steps on either side
    cuts = ((change[2:-2] > 8) & (change[2:-2] > 1.5 * beside)).nonzero()[:, 0] + 1
    shots = list(itertools.pairwise([0, *cuts.tolist(), len(small)]))
    motion = sum(((gray[a:b].amax(0) - gray[a:b].amin(0)) > 24).float().mean().item() * (b - a) for a, b in shots) / len(small)
    row |= {**facts, "seconds": round(length, 3), "motion": round(motion, 4), "cuts": [round(a * tick, 3) for a, _ in shots[1:]]}
    for name, value, least in (("resolution", min(facts["size"]), flags.min_side), ("frames", facts["frames"], flags.min_frames),
                               ("static", row["motion"], flags.min_motion)):
        if value < least:
            return row | {"fate": "dropped", "why": f"{name}: {value} < {least}"}
    keys, clips, rng = [], [], random.Random(f"{flags.seed}/{row['id']}/clips")
    for at, (a, b) in itertools.product((0.5, 0.2, 0.8), sorted(shots, key=lambda shot: shot[0] - shot[1])):
        k = a + int(at * (b - a))
        if len(keys) < flags.key_frames and all((small[k] - small[j]).abs().mean() > 4 for j in keys):
            keys.append(k)  # unlike every frame before it; longest shots first
    for a, b in shots[: 50 * flags.clips]:
        start, end = a * tick, min((b - 1) * tick + 1 / facts["rate"], length)  # only what was seen to be this shot
        seconds = min(rng.uniform(2, 10), end - start, 0.75 * length)
        if seconds >= 2:
            begin = rng.uniform(start, end - seconds)
            clips.append([round(begin, 3), round(begin + seconds, 3)])
    tiny = F.adaptive_avg_pool2d(gray[np.linspace(0, len(gray) - 1, 4).round()], 8)
    signs = torch.cat([(tiny.diff(dim=d) > 0).flatten() for d in (1, 2)])  # 448 bits
    return row | {"fate": "kept", "key_frames": [round(k * tick + 0.25 / facts["rate"], 4) for k in keys],
                  "clips": sorted(rng.sample(clips, min(len(clips), flags.clips))), "hash": np.packbits(signs).tobytes().hex()}


def control(p, jobs, see, flags):
    """Stage 1 of a part; vectors of videos and captions (n, 2, D) float16 lie beside its rows."""
    rows = list(ahead(lambda job: look(job, flags), jobs, flags.workers, 8))
    array = see([{"video": row["video"]} if row["fate"] == "kept" else {"text": "-"} for row in rows] +
                [{"text": row["text"] or "-"} for row in rows]).view(2, len(rows), -1).movedim(0, 1)
    with open(path := Path(flags.out) / "1-pool" / f"{p:05}.npy.part", "wb") as file:
        np.save(file, array.half().numpy())
    os.replace(path, path.with_suffix(""))
    return rows


def select(rows, flags):
    """What takes all rows: consistency, near-duplicates, captions of several videos -> pool.jsonl, pool.npy (N, D)."""
    paths = sorted((Path(flags.out) / "1-pool").glob("*.npy"))
    both = torch.from_numpy(np.concatenate([np.load(path) for path in paths])).float()  # (rows, 2, D)
    paired = [i for i, row in enumerate(rows) if row["fate"] == "kept" and row["text"]]
    v, t = F.normalize(both[paired] - both[paired].mean(0), dim=-1).unbind(1)  # without the gap between the modalities
    scores, limit = (v * t).sum(1), float(flags.consistency.lstrip("q"))
    limit = scores.quantile(limit).item() if flags.consistency.startswith("q") and paired else limit
    for i, score in zip(paired, scores.tolist(), strict=True):
        rows[i]["consistency"] = round(score, 4)
        if score < limit:
            rows[i] |= {"fate": "dropped", "why": f"consistency: {score:.4f} < {limit:.4f}"}
    kept = [i for i, row in enumerate(rows) if row["fate"] == "kept"]
    signs = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(rows[i]["hash"]), np.uint8)) for i in kept]).reshape(len(kept), -1)
    signs = torch.from_numpy(signs).float() * 2 - 1
    for i, agree, others in zip(kept, *top_k(signs, signs, 8), strict=True):
        first = min((kept[j] for s, j in zip(agree, others, strict=True) if s >= flags.duplicate * signs.shape[1]), default=i)
        if first < i:
            rows[i] |= {"fate": "dropped", "why": f"duplicate: of {rows[first]['id']}"}
    kept = [i for i in kept if rows[i]["fate"] == "kept"]
    often = collections.Counter(rows[i]["text"].lower() for i in kept)
    for i in kept:
        if rows[i]["text"] and often[rows[i]["text"].lower()] > 1:
            rows[i] |= {"text": "", "text_dropped": "of several videos"}
    np.save(Path(flags.out) / "pool.npy", both[kept, 0].numpy())
    write(Path(flags.out) / "pool.jsonl", rows)


# Stage 2: enrichment

def wanted(row, flags):
    """Choose by lot which pairs a video shall give -> ["T2V", "T2V", "I2V", ...]: each task's share, its fraction by chance."""
    rng = random.Random(f"{flags.seed}/{row['id']}/tasks")
    return [task for task, share in flags.share.items() for _ in range(int(share + rng.random()))]


def enrich(jobs, ask, see, pool, flags):
    """Caption videos and key frames; drop captions that are less like their video than the raw caption is."""
    asked = [requests_for(job["kind"], [job["item"]], flags, random.Random(f"{flags.seed}/{job['id']}"), job["text"]) for job in jobs]
    answers, rows = iter(obtain(ask, sum(asked, []), flags)), []
    for job, requests in zip(jobs, asked, strict=True):
        mine = [next(answers) for _ in requests]
        worst = min(mine, key=lambda answer: ("failed", "dropped", "kept").index(answer["fate"]))
        rows.append({**{key: job[key] for key in ("id", "of", "kind", "item")}, "fate": worst["fate"],
                     "tokens": np.sum([a["tokens"] for a in mine], axis=0).tolist(), **(
                         {"why": worst["why"]} if "why" in worst else {"captions": {k: v for a in mine for k, v in a["got"].items()}})})
    checked = [(row, job["text"]) for row, job in zip(rows, jobs, strict=True) if row["fate"] == "kept" and job["text"]]
    vectors = iter(see([{"text": text} for row, raw in checked for text in (raw, *row["captions"].values())]))
    for row, _ in checked:
        video = pool[row["of"]]["vector"]
        least = next(vectors) @ video - flags.hallucination
        row["removed"] = {style: text for style, text in row["captions"].items() if next(vectors) @ video < least}
        row["captions"] = {style: text for style, text in row["captions"].items() if style not in row["removed"]}
        if not row["captions"]:
            row |= {"fate": "dropped", "why": "hallucination: every caption is less like the video than the raw one"}
    return rows


# Stage 3: task extension

def plan(rows, pool, flags):
    """List the pairs that a part's captioned videos shall give, composed ones still without a reference and a query."""
    jobs, frames = [], {row["of"]: row for row in rows if row["kind"] == "image" and row["fate"] == "kept"}
    for row in rows:
        if row["kind"] == "image" or row["fate"] != "kept":
            continue
        video, rng, count = pool[row["of"]], random.Random(f"{flags.seed}/{row['of']}/pairs"), collections.Counter()
        texts = [{"text": text} for text in rng.sample(list(row["captions"].values()), len(row["captions"]))]
        for task in wanted(video, flags):
            k, query, positive = count[task], None, {"video": video["video"]}
            if task == "T2V":
                query = texts[k % len(texts)]
            elif task == "T2T" and len(texts) > 2:  # two that T2V did not select
                query, positive = texts[-1 - k % (len(texts) - 2)], texts[-2 - k % (len(texts) - 2)]
            elif task == "T2I" and row["of"] in frames:
                query, positive = {"text": rng.choice(list(frames[row["of"]]["captions"].values()))}, frames[row["of"]]["item"]
            elif task in ("I2V", "TI2V"):
                query = frame_of(video, rng)
            elif task == "TV2V" or task == "V2V" and video["clips"]:
                query = clip_of(video, rng)
            if query:
                count[task] += 1
                jobs.append({"id": f"{row['of']} {task} {k}", "of": row["of"], "task": task, "query": query, "positive": positive})
    return jobs


def frame_of(video, rng):
    return {"image": {"video": video["video"], "time": rng.choice(video["key_frames"])}}


def clip_of(video, rng):
    start, end = rng.choice(video["clips"]) if video["clips"] else (0, min(10, video["seconds"]))
    return {"video": {"path": video["video"], "start": start, "end": end}}


def extend(jobs, ask, see, pool, matrix, flags):
    """Compose queries about a reference that is like the target, drop those that do without it, mine hard negatives.

    # PAPER: the reference is a frame or clip of a *similar* video of the pool (A.6 allows the same source or a similar one).
    """
    names, asked, mined = list(pool), [], []
    near = lambda video: matrix @ video["vector"] >= flags.twin  # noqa: E731  (N,) bool: the video and its twins
    for job in jobs:
        job["fate"], target = "kept", pool[job["of"]]
        if job["task"] in ("TI2V", "TV2V"):
            rng, scores = random.Random(f"{flags.seed}/{job['id']}"), (matrix @ target["vector"]).masked_fill(near(target), -1)
            job["reference"] = names[rng.choice(scores.topk(min(3, len(names)))[1].tolist())]
            job["query"] = (frame_of if job["task"] == "TI2V" else clip_of)(pool[job["reference"]], rng)
            asked.append((job, requests_for(job["task"], [job["query"], job["positive"]], flags, rng)[0]))
    for (job, _), answer in zip(asked, obtain(ask, [request for _, request in asked], flags), strict=True):
        job |= {key: value for key, value in answer.items() if key != "got"}
        if job["fate"] == "kept":
            job["query"]["text"] = answer["got"]["query"]
    mined = [job for job in jobs if job["fate"] == "kept" and job["task"].endswith("2V")]
    vectors = see([job["query"] for job in mined])
    alone = see([{"text": job["query"]["text"]} if "reference" in job else {"text": "-"} for job in mined])
    for job, query, text in zip(mined, vectors, alone, strict=True):
        target, scores = pool[job["of"]], matrix @ query  # (N,)
        positive = scores[target["row"]].item()
        if "reference" in job:
            job["ranks"] = [int((s > s[target["row"]]).sum()) + 1 for s in (scores, matrix @ text)]
            if job["ranks"][0] >= job["ranks"][1]:
                job |= {"fate": "dropped", "why": f"needs no reference: rank {job['ranks'][1]} without, {job['ranks'][0]} with it"}
                continue
        barred = near(target) | (scores > positive + flags.margin)
        if "reference" in job:
            barred[pool[job["reference"]]["row"]] = True
        k = flags.negative[job["task"]]
        best, where = scores.masked_fill(barred, -2).topk(min(k, len(scores)))
        job["negatives"] = [{"video": pool[names[j]]["video"]} for s, j in zip(best, where.tolist(), strict=True) if s > -2]
        if len(job["negatives"]) < k:
            job |= {"fate": "dropped", "why": f"negatives: {len(job['negatives'])} of {k} found"}
    return jobs


def assemble(rows, flags):
    """Write <out>/train: a training file per task with media relative to it, and the mixture, whose samples keep the shares."""
    folder, mixture = Path(flags.out) / "train", []
    folder.mkdir(exist_ok=True)

    def local(item):
        if isinstance(item, dict):  # an item, or the dict form of a medium
            return {k: os.path.relpath(v, folder) if k in ("video", "path") and isinstance(v, str) else local(v) for k, v in item.items()}
        return item

    for task, (_, _, batch_size, instruction) in TASKS.items():
        mine = [row for row in rows if row["task"] == task and row["fate"] == "kept"]
        write(folder / f"uvrd-{task}.jsonl", [{key: [local(n) for n in row[key]] if key == "negatives" else local(row[key])
                                               for key in ("query", "positive", "negatives", "id") if row.get(key)} for row in mine])
        if mine:
            samples = round(flags.share[task] / flags.share["T2V"] * sum(r["task"] == "T2V" and r["fate"] == "kept" for r in rows)
                            ) if flags.share["T2V"] else 0
            mixture.append({"name": f"uvrd-{task}", "task": task, "path": f"uvrd-{task}.jsonl", "samples": samples or len(mine),
                            "negatives": flags.negative[task], "batch_size": batch_size, "instruction": instruction})
            print(f"    {task}: {len(mine)} pairs, {mixture[-1]['samples']} samples in the mixture")
    with open(part := folder / "mixture.json.part", "w") as file:
        json.dump(mixture, file, indent=1)
    os.replace(part, folder / "mixture.json")


def dry_run(n, flags):
    """Print the prompts and what n videos would cost if none were dropped; 1.35 tokens a word, the middle of each range of words."""
    rng, total = random.Random(flags.seed), [0, 0, 0]
    for kind, times in (("video", 1), ("image", min(1, flags.share["T2I"])), ("TI2V", flags.share["TI2V"]), ("TV2V", flags.share["TV2V"])):
        requests = requests_for(kind, [], flags, rng)
        seen = flags.max_tokens * {"video": flags.frames / 2, "image": 1, "TI2V": 1 + flags.frames / 2, "TV2V": flags.frames}[kind]
        cost = [round(n * times * x) for x in (len(requests), sum(seen + 1.35 * len(r["prompt"].split()) for r in requests), sum(
            1.35 * sum(map(sum, r["want"].values())) / 2 for r in requests))]
        print(f"--- {kind}: {cost[0]} calls, {cost[1]} tokens read, {cost[2]} written", *(r["prompt"] for r in requests), sep="\n")
        total = [a + b for a, b in zip(total, cost, strict=True)]
    print(f"--- {n} videos: about {total[0]} calls, {total[1]} tokens read, {total[2]} written")


def numbers(words, default, kind):
    """Read TASK=NUMBER words over the defaults of a flag."""
    for task, _, value in (word.partition("=") for word in words):
        if task not in TASKS or not re.fullmatch(r"\d+(\.\d+)?" if kind is float else r"\d+", value):
            raise ValueError(f"{task}={value}: wanted TASK=NUMBER, TASK one of {', '.join(TASKS)}")
        default[task] = kind(value)
    return default


def main(flags):
    """Run the stages and print what each kept. Raises ValueError for wrong flags and input."""
    flags.share = numbers(flags.shares, {task: n / TASKS["T2V"][0] for task, (n, *_) in TASKS.items()}, float)
    flags.negative = numbers(flags.negatives, {task: k for task, (_, k, *_) in TASKS.items()}, int)
    kind, _, name = ("hf:mini/base" if flags.captioner == "mini" else flags.captioner).partition(":")
    url, _, model = name.partition("#")
    if kind not in ("hf", "openai") or not name or kind == "openai" and not model or not re.fullmatch(r"\d+/[1-9]\d*", flags.shard):
        raise ValueError("--captioner takes mini, hf:MODEL or openai:URL#MODEL and --shard i/n, got "
                         f"{flags.captioner!r} and {flags.shard!r}")
    if flags.prompts == "auto":
        flags.prompts = "short" if flags.captioner == "mini" else "full"
    if flags.device == "cuda":
        flags.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    out, rows = Path(flags.out), inputs(flags)
    if flags.dry_run:
        return dry_run(len(rows), flags)
    out.mkdir(parents=True, exist_ok=True)
    chosen = {key: getattr(flags, key) for key in RESULT}
    with lock(out / "lock"):
        if not (out / "flags.jsonl").exists():
            write(out / "flags.jsonl", [chosen])
        for key, value in read(out / "flags.jsonl")[0].items():
            if chosen[key] != value:
                raise ValueError(f"{out} was begun with --{key.replace('_', '-')} {value}, not {chosen[key]}: take another --out")

    @functools.cache
    def load(what):
        sizes = {key: getattr(flags, key) for key in ("frames", "max_tokens", "max_new_tokens")}
        if what == "prober":
            return GVE.from_pretrained(flags.prober, device=flags.device)
        if kind == "hf":
            return transformers_captioner(name, device=flags.device, batch_size=flags.batch_size, workers=flags.workers, **sizes)
        return server_captioner(url, model, concurrency=flags.concurrency, retries=flags.retries, backoff=flags.backoff,
                                timeout=flags.timeout, **sizes)

    def see(items):  # -> (n, D) float32
        return encode(load("prober"), items, batch_size=flags.batch_size, frames=flags.frames, max_tokens=flags.max_tokens)[0]

    def ask(requests):
        return load("captioner")(requests) if requests else []

    def cut(rows):
        return [rows[i : i + flags.part] for i in range(0, len(rows), flags.part)]

    if flags.stage in ("all", "1"):
        rows = share("1-pool", cut(rows), lambda p, jobs: control(p, jobs, see, flags), flags)
        with lock(out / "lock"):
            if not (out / "pool.jsonl").exists():
                select(sum(rows, []), flags)
    rows, matrix = read(out / "pool.jsonl"), torch.from_numpy(np.load(out / "pool.npy"))  # (N, D)
    seconds = tell("1-pool", rows, flags)
    print(f"    captions dropped: {dict(collections.Counter(row['text_dropped'] for row in rows if 'text_dropped' in row))}; "
          f"{sum(len(row.get('cuts', ())) for row in rows)} cuts")
    kept = [row for row in rows if row["fate"] == "kept"]
    pool = {row["id"]: {**row, "vector": matrix[i], "row": i} for i, row in enumerate(kept)}
    if flags.stage in ("all", "2"):
        parts = [[{"id": f"{row['id']} {sort}", "of": row["id"], "kind": sort, "text": row["text"] * (sort == "video"), "item": item}
                  for row in rows for sort, item in (("video", {"video": row["video"]}), ("image", frame_of(row, random.Random(row["id"]))))
                  if sort == "video" or "T2I" in wanted(row, flags)] for rows in cut(kept)]
        captions = share("2-captions", parts, lambda p, jobs: enrich(jobs, ask, see, pool, flags), flags)
    else:
        captions = [read(path) for path in sorted((out / "2-captions").glob("*.jsonl"))]
    if flags.stage == "1":
        return
    seconds += tell("2-captions", sum(captions, []), flags)
    if flags.stage in ("all", "3"):
        parts = [plan(rows, pool, flags) for rows in captions]
        pairs = sum(share("3-pairs", parts, lambda p, jobs: extend(jobs, ask, see, pool, matrix, flags), flags), [])
        seconds += tell("3-pairs", pairs, flags)
        with lock(out / "lock"):
            assemble(pairs, flags)
        made = max(1, sum(row["fate"] == "kept" for row in pairs))
        print(f"    {seconds / made:.2f} s a pair; UVRD's 1.55M at this rate: {seconds / made * 1.55e6 / 3600:.0f} hours of one such process, "
              "if cost grows with pairs alone")
        if failed := sum(row["fate"] == "failed" for row in sum(captions, []) + pairs):
            sys.exit(f"{failed} failed; the same command tries them again")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"synth.py: {error}")
