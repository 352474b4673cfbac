"""V-SynFlow: weakly captioned videos -> universal retrieval data, UVRD (arXiv 2510.27571, sections 3.3 and A.6, Tables 7 and 8).

    python synth.py --videos runs/raw/captions.jsonl --out runs/synth --captioner mini            # half a minute on the mini world
    python synth.py --videos DIR --out DIR --captioner openai:http://localhost:8000/v1#MODEL --prober Alibaba-NLP/GVE-3B

Three stages, each a folder of JSON lines under --out with one row per job and its fate (kept, dropped or failed) and reason:
  1-pool      quality control: text rules, decodable, large and long enough, moving, alike its caption; key frames and clips
              (pool.jsonl: the asset pool, after what needs all rows at once: thresholds that are quantiles, duplicates)
  2-captions  enrichment: five captions per video and per key frame, in the paper's styles
  3-pairs     task extension: T2T, T2I, T2V, I2V, V2V, and queries that a captioner composed (TI2V, TV2V); hard negatives
and <out>/train: one training file per task and the mixture.json that train.py takes. A killed run is continued by the same command,
which also tries failed jobs again. Processes may share the work: torchrun, or --shard 0/4 ... 3/4, or the same command twice.

Legend: N rows of the pool, D embedding dim, F frames.
"""

import base64
import collections
import contextlib
import dataclasses
import fcntl
import functools
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import MediaError, load_image, load_video, read_frames, read_jsonl, resolve
from embed import encode, parse_flags, top_k
from model import GVE, mrope_positions

TASKS = {  # Table 7: thousands of pairs, hard negatives, batch size per GPU; and our instruction, since theirs are not listed
    "T2T": (100, 0, 64, "Find a text that describes the same video."),
    "T2I": (210, 0, 32, "Find the image that matches the given caption."),
    "T2V": (879, 1, 64, "Find the video that matches the given caption."),
    "I2V": (200, 0, 64, "Find the video that the given image was taken from."),
    "V2V": (36, 0, 64, "Find the video that the given clip was cut from."),
    "TI2V": (89, 1, 64, "Find the video that shows the given image changed as the text says."),
    "TV2V": (35, 1, 64, "Find the video that shows the given clip changed as the text says.")}
WORDS = {  # A.6: the five styles of a video's and of a frame's captions, with their ranges of words
    "video": {"concise": (10, 25), "rich": (80, 200), "abstract": (30, 100), "keywords": (5, 30), "partial": (10, 70)},
    "image": {"concise": (10, 25), "rich": (50, 200), "abstract": (30, 100), "keywords": (5, 30), "minimal": (10, 70)},
    "TI2V": {"query": (3, 50)}, "TV2V": {"query": (3, 25)}}
PROMPTS = {  # our wording of A.6's specification; {slots} are filled by the four functions below
    "video": """Watch the video and describe it for a search engine, in five captions that differ in style.
concise: 10-25 words, what happens, in one sentence.
rich: 80-200 words, who and what is where and what it looks like, and what happens in which order.
abstract: 30-100 words, the topic and mood, so that someone who forgot the details could look for it.
keywords: 5-30 words, key terms only, separated by commas.
partial: 10-70 words, one part of it only: a single object, moment or place.
In each caption 30-60 % of the content is spatial (objects, looks, positions), 30-60 % temporal (actions, changes, order), at most
20 % theme, background, style or camera, at most 10 % anything else. Here, put the weight on {focus}. State only what can be seen;
do not guess names, causes or sounds. At least one caption is shorter than 20 words and one longer than 100. Write {readability}
sentences for readers with {education}.{raw}
Answer with one JSON object and nothing else: {{"concise": "...", "rich": "...", "abstract": "...", "keywords": "...", "partial": "..."}}""",
    "image": """Look at the image, a frame of a video, and describe it for a search engine, in five captions that differ in style.
concise: 10-25 words, the moment and where things are, in one sentence.
rich: 50-200 words, every object, its looks, and where it stands to the others.
abstract: 30-100 words, what the arrangement of the space is about.
keywords: 5-30 words, key terms only, separated by commas, with words for the moment shown.
minimal: 10-70 words, one object and its place.
In each caption 50-70 % of the content is spatial, at most 30 % is what this single moment proves (no sequence of events), 10-20 %
style and composition, at most 10 % anything else. State only what can be seen. At least one caption is shorter than 20 words and one
longer than 100. Write {readability} sentences for readers with {education}.
Answer with one JSON object and nothing else: {{"concise": "...", "rich": "...", "abstract": "...", "keywords": "...", "minimal": "..."}}""",
    "TI2V": """The first picture is a reference image, the video after it is the target. Write the text that, together with the
image, finds the target. Strategy: {strategy}. Rules: at most 50 words; it means nothing without the image, so refer to what
the image shows ("the same dog", "this room") and do not describe it again; it names at least one specific attribute of the target; it leaves
at most half of the videos that would fit the image alone; it is true of the target and not of the reference; it mentions
neither "image" nor "video"; it reads like something a person would type. Check all seven before you answer.
Answer with one JSON object and nothing else: {{"query": "..."}}""",
    "TV2V": """The first video is a reference clip, the second is the target. Write the text that, together with the clip, finds the
target. Relation: {strategy}. Rules: usually 5-15 words; it means nothing without the clip and does not describe it again; it says
what differs in the target, and that is true of the target and not of the reference.
Answer with one JSON object and nothing else: {{"query": "..."}}"""}
SHORT = {"video": "Describe the video in the {style} style.", "image": "Describe the image in the {style} style.",
         "TI2V": "Describe what changes from the reference to the target video."}
SHORT["TV2V"] = SHORT["TI2V"]
FOCUS = {"where things are and what they look like": 0.3, "what happens and in which order": 0.6, "theme, style and camera": 0.1}
STRATEGY = {
    "TI2V": ("the same subject in another action", "the same subject in another place", "the same subject, but without something "
             "the image shows", "the same relation between other things"),
    "TV2V": ("what happens next", "another point of view", "other light, weather or quality", "the same action done slightly otherwise")}

URL = re.compile(r"https?://|www\.|\b\w+\.(com|org|net)\b", re.I)
FILE = re.compile(r"\.(mp4|avi|mov|mkv|webm|wmv|jpe?g|png|gif)\b|^\W*(img|dsc|vid|mvi|gopr|pxl|clip|video|untitled|final)[\W\d_]*\w?\W*$",
                  re.I)
FILLER = re.compile(r"subscribe|click (here|the|on|below)|link (below|in)|follow (me|us)|watch (now|more|full)|all rights reserved|"
                    r"copyright|©|royalty[- ]free|stock (footage|video)|no (description|caption|title)|lorem ipsum|sponsored|download|"
                    r"\bfree shipping\b|^#\w+( #\w+)*$", re.I)
RULES = {  # annotation rectification: what is no description; the first that applies counts. (text, words, expected script)
    "empty": lambda text, words, script: not words,
    "url": lambda text, words, script: URL.search(text),
    "file name": lambda text, words, script: FILE.search(text),
    "boilerplate": lambda text, words, script: FILLER.search(text),
    "wrong script": lambda text, words, script: _share(unicodedata.name(c, "").startswith(script) for c in text if c.isalpha()) < 0.7,
    "too short": lambda text, words, script: len(words) < 3,
    "too long": lambda text, words, script: len(words) > 1000,
    "repetition": lambda text, words, script: len(words) > 5 and len(set(zip(words, words[1:], strict=False))) < 0.5 * len(words)}


def _share(truths):
    return float(np.mean([*truths] or [0]))


def flag(default, text, **more):
    return field(default_factory=lambda: default, metadata={"help": text, **more}) if isinstance(default, list) else field(
        default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class Flags:
    videos: str = flag("runs/raw/captions.jsonl", 'folder of videos, or JSON lines {"id"?, "video", "text"?}')
    out: str = flag("runs/synth", "folder to write")
    captioner: str = flag("mini", "mini | hf:MODEL | openai:URL#MODEL")
    prompts: str = flag("", "full: A.6's; short: one style at a time, plain answers, for small captioners; empty: short for mini",
                        choices=["", "full", "short"])
    prober: str = flag("mini/prober", "embedder that filters and mines")
    stage: str = flag("all", "run only this one", choices=["all", "1", "2", "3"])
    shard: str = flag("0/1", "this process takes part i, i + n, i + 2n, ... of every stage")
    part: int = flag(256, "rows per file of a stage, the unit of progress")
    dry_run: bool = flag(False, "print the prompts, the counts and the expected calls and tokens, then stop")
    root: list[str] = flag([], "more folders that videos may lie in")
    seed: int = flag(42, "of everything random")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    workers: int = flag(2, "threads that decode")
    script: str = flag("LATIN", "captions are in this script (the first word of its letters' Unicode names)")
    min_side: int = flag(56, "pixels; two vision tokens")
    min_frames: int = flag(8, "frames of a video; what the embedder sees")
    probe_fps: float = flag(8.0, "frames per second that motion and cuts are measured on")
    min_motion: float = flag(0.01, "share of pixels that change by 24 of 255 levels within a shot")
    consistency: str = flag("0.0", "least centred cosine of video and caption; q0.1: drop the lowest tenth")
    duplicate: float = flag(0.6, "two videos whose gradient signs agree by this (1 all, 0 chance) are one")
    key_frames: int = flag(3, "most key frames per video")
    clips: int = flag(2, "most clips per video, 2-10 s each")
    hallucination: float = flag(0.1, "drop a caption whose cosine with the video is this far below the raw caption's; 2: keep all")
    shares: list[str] = flag([], "pairs per video, as T2I=0.5; default Table 7's, relative to T2V")
    margin: float = flag(0.0, "a hard negative scores at most this much above the positive")
    negatives: list[str] = flag([], "hard negatives per pair, as TI2V=2; default Table 7's")
    skip_top: float = flag(0.995, "a video this near the positive (cosine) is neither its negative nor a reference")
    batch_size: int = flag(32, "items per forward, in captioner and prober")
    max_new_tokens: int = flag(1024, "per answer")
    tries: int = flag(3, "answers per request before it is dropped; each bad one is shown its error")
    concurrency: int = flag(32, "openai: requests in flight")
    retries: int = flag(5, "openai: further attempts after 408, 429, 5xx, time-outs and broken connections")
    backoff: float = flag(1.0, "openai: seconds before the second attempt, doubled each time")
    timeout: float = flag(300.0, "openai: seconds for one answer")
    frames: int = flag(8, "frames of a video that captioner and prober see")
    max_tokens: int = flag(200, "vision tokens (28 x 28 pixels) per frame")


# Captioners: ask(requests) yields, in order, (answer or None, why it failed, tokens read, tokens written)

def show(item, flags):
    """Decode an item's medium for a captioner -> (kind, list of F PIL images of at most max_tokens * 28 * 28 pixels, seconds)."""
    kind, seconds = "video" if "video" in item else "image", 0.0
    if kind == "video":
        frames, seconds = load_video(item["video"], flags.frames)
    else:
        frames = load_image(item["image"])[None]
    scale = min(1, math.sqrt(flags.max_tokens * 28 * 28 / (frames.shape[1] * frames.shape[2])))
    size = [max(28, round(side * scale)) for side in (frames.shape[2], frames.shape[1])] if scale < 1 else None
    return kind, [Image.fromarray(f).resize(size) if size else Image.fromarray(f) for f in frames], seconds


def ahead(make, things, workers, depth):
    """Map `make` over `things` in threads, in order, with at most `depth` results waiting: decoding overlaps with captioning."""
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for thing in things:
            waiting.append(pool.submit(make, thing))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def hub(name, flags):
    """Caption with any transformers image-text-to-text model, greedily, in batches; without a video processor it sees frames."""
    import transformers
    transformers.logging.set_verbosity_error()
    processor = transformers.AutoProcessor.from_pretrained(name)
    dtype = torch.bfloat16 if "cuda" in flags.device else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(flags.device).eval()
    processor.tokenizer.padding_side, films = "left", getattr(processor, "video_processor", None) is not None

    def prepare(batch):
        """-> (the failure or None of each request, model inputs of the others)"""
        failures, turns, images, videos, seconds = [], [], [], [], []
        for request in batch:
            try:
                shown = [show(item, flags) for item in request["media"]]
                failures.append(None)
            except (ValueError, FileNotFoundError) as error:
                failures.append(f"media: {error}")
                continue
            parts, stills = [], []
            for kind, frames, length in shown:
                if kind == "video" and films:
                    videos.append(np.stack(frames))
                    seconds.append(length)
                else:
                    stills += frames
                parts += [{"type": "video"}] if kind == "video" and films else [{"type": "image"}] * len(frames)
            images.append(stills)
            turns.append([{"role": "user", "content": [*parts, {"type": "text", "text": request["prompt"]}]}])
        if not turns:
            return failures, None
        media = {"images": images} if any(images) else {}
        if videos:
            made = [{"fps": flags.frames / s, "total_num_frames": flags.frames, "duration": s} for s in seconds]
            media |= {"videos": videos, "videos_kwargs": {"do_sample_frames": False, "video_metadata": made}}
        inputs = processor(text=processor.apply_chat_template(turns, add_generation_prompt=True), padding=True, return_tensors="pt",
                           **media)
        if model.config.model_type == "qwen2_5_vl":  # transformers >= 4.52 truncates seconds per grid
            kinds = sum(k * (inputs["input_ids"] == i) for k, i in ((1, model.config.image_token_id), (2, model.config.video_token_id)))
            times = torch.tensor(seconds) * 2 / flags.frames
            inputs["position_ids"] = mrope_positions(
                kinds, inputs["attention_mask"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), times,
                tokens_per_second=model.config.vision_config.tokens_per_second)
        return failures, inputs

    @torch.inference_mode()
    def ask(requests):
        batches = [requests[i : i + flags.batch_size] for i in range(0, len(requests), flags.batch_size)]
        for failures, inputs in ahead(prepare, batches, flags.workers, 2):
            answers, lengths = iter(()), iter(())
            if inputs is not None:
                read = inputs["attention_mask"].sum(1).tolist()
                made = model.generate(**inputs.to(flags.device), max_new_tokens=flags.max_new_tokens, do_sample=False)
                made = made[:, inputs["input_ids"].shape[1] :]
                answers = iter(processor.batch_decode(made, skip_special_tokens=True))
                lengths = iter(zip(read, (made != model.generation_config.pad_token_id).sum(1).tolist(), strict=True))
            for why in failures:
                yield (None, why, 0, 0) if why else (next(answers), "", *next(lengths))

    return ask


def server(address, flags):
    """Caption with a server that speaks OpenAI's chat completions (vLLM, SGLang); frames go as JPEG data URLs."""
    import httpx
    url, _, model = address.partition("#")
    key = os.environ.get("OPENAI_API_KEY")
    client = httpx.Client(timeout=flags.timeout, headers={"Authorization": f"Bearer {key}"} if key else {},
                          limits=httpx.Limits(max_connections=flags.concurrency))

    def one(request):
        content = []
        try:
            for kind, frames, seconds in (show(item, flags) for item in request["media"]):
                content.append({"type": "text", "text": f"{len(frames)} frames of a video of {seconds:.1f} s:" if kind == "video" else "Image:"})
                for frame in frames:
                    frame.save(data := io.BytesIO(), "JPEG", quality=90)
                    content.append({"type": "image_url", "image_url": {
                        "url": "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()}})
        except (ValueError, FileNotFoundError) as error:
            return None, f"media: {error}", 0, 0
        content.append({"type": "text", "text": request["prompt"]})
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": flags.max_new_tokens, "temperature": 0}
        for attempt in range(flags.retries + 1):
            if attempt:
                time.sleep(wait)
            wait = flags.backoff * 2**attempt * random.uniform(0.8, 1.2)
            try:
                reply = client.post(f"{url.rstrip('/')}/chat/completions", json=body)
                if reply.status_code == 200:
                    reply = reply.json()
                    used = reply.get("usage") or {}
                    return (reply["choices"][0]["message"]["content"] or "", "", used.get("prompt_tokens", 0), used.get("completion_tokens", 0))
                why = f"HTTP {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in (408, 409, 429) and reply.status_code < 500:
                    break
                if reply.headers.get("retry-after", "").isdigit():
                    wait = max(wait, int(reply.headers["retry-after"]))
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
        return None, why, 0, 0

    return lambda requests: ahead(one, requests, flags.concurrency, 2 * flags.concurrency)


def parse(answer, want, plain):
    """Read an answer as {name: text} with the wanted names and numbers of words; ValueError "kind: what is wrong" for the model."""
    if plain:
        got = dict.fromkeys(want, answer.strip())
    else:
        try:
            got = json.loads(re.sub(r"^\s*```\w*|```\s*$", "", answer))
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
        if not isinstance(got, dict) or set(got) != set(want) or not all(isinstance(text, str) for text in got.values()):
            raise ValueError(f"schema: wanted one object with strings under exactly {', '.join(want)}")
    for name, (low, high) in want.items():
        if not low <= len(got[name].split()) <= high:
            raise ValueError(f"length: {name} has {len(got[name].split())} words; {low}-{high} are wanted")
    if len({" ".join(text.lower().split()) for text in got.values()}) < len(got):
        raise ValueError("repetition: two captions are the same")
    return got


def obtain(ask, requests, flags):
    """Ask until each answer parses or `tries` are spent -> one {"fate", "got" or "why", "tokens": [read, written]} per request."""
    out, pending, why = [{"tokens": [0, 0]} for _ in requests], list(range(len(requests))), {}
    for _ in range(flags.tries):
        asked = [{**requests[i], "prompt": requests[i]["prompt"] + (
            f"\nYour last answer was refused: {why[i]}. Answer again." if i in why else "")} for i in pending]
        again = []
        for i, (answer, failure, *tokens) in zip(pending, ask(asked), strict=True):
            out[i]["tokens"] = [a + b for a, b in zip(out[i]["tokens"], tokens, strict=True)]
            try:
                out[i] |= {"fate": "failed", "why": failure} if failure else {
                    "fate": "kept", "got": parse(answer, requests[i]["want"], requests[i]["plain"])}
            except ValueError as error:
                why[i] = str(error)
                out[i] |= {"fate": "dropped", "why": why[i]}
                again.append(i)
        pending = again
    return out


def requests_for(kind, media, flags, rng, raw=""):
    """Word the requests for one video's or frame's captions or one composed query: [{"media", "prompt", "want", "plain"}]."""
    want = WORDS[kind]
    if flags.prompts == "short":
        return [{"media": media, "prompt": SHORT[kind].format(style=style), "want": {style: (2, 70)}, "plain": True} for style in want]
    slots = {"focus": rng.choices(list(FOCUS), list(FOCUS.values()))[0], "readability": rng.choice(("simple", "everyday", "elaborate")),
             "education": rng.choice(("primary school", "high school", "a university degree")),
             "strategy": rng.choice(STRATEGY.get(kind, [""])),
             "raw": f"\nIts uploader wrote, perhaps wrongly: {' '.join(raw.split()[:200])}" if raw else ""}
    return [{"media": media, "prompt": PROMPTS[kind].format(**slots), "want": want, "plain": False}]


# Shared, resumable work

def read(path):
    return [row for _, row in read_jsonl(path)]


def write(path, rows):
    """Write JSON lines under a temporary name and rename: the file is whole or not there."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def lock(path, wait):
    """Hold a lock that dies with its process; gives False where another holds it and wait is False."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def share(stage, parts, do, flags):
    """Do what is missing or failed of a stage's parts (lists of jobs with an "id"), together with whoever else does the same.

    do(p, jobs) -> rows with "id" and "fate". A first pass takes free parts, own ones first; a second waits for those that others
    hold and finishes what they left. Returns whether every part is there.
    """
    folder, began = Path(flags.out) / stage, time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (i, n), rank, world = map(int, flags.shard.split("/")), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = [folder / f"{p:05}.jsonl" for p in range(len(parts))]
    mine = list(range(i, len(parts), n))
    for wait in (False, True):
        for p in mine[rank::world] + [p for p in mine if p not in mine[rank::world]]:
            with lock(paths[p].with_suffix(".lock"), wait) as free:
                if not free or wait and paths[p].exists() or paths[p].exists() and paths[p].stat().st_mtime > began:
                    continue
                old = {row["id"]: row for row in read(paths[p])} if paths[p].exists() else {}
                jobs = [job for job in parts[p] if old.get(job["id"], {"fate": "failed"})["fate"] == "failed"]
                if jobs or not paths[p].exists():
                    start = time.time()
                    new = {row["id"]: row for row in do(p, jobs)}
                    write(paths[p], [new.get(job["id"]) or old[job["id"]] for job in parts[p]])
                    tokens = np.sum([row.get("tokens", [0, 0]) for row in new.values()] or [[0, 0]], axis=0).tolist()
                    log(flags, stage=stage, part=p, seconds=round(time.time() - start, 2), tokens=tokens, **fates(new.values()))
    return all(path.exists() for path in paths)


def fates(rows):
    return dict(collections.Counter(row["fate"] for row in rows))


def log(flags, **event):
    with open(Path(flags.out) / "log.jsonl", "a") as file:
        file.write(json.dumps(event) + "\n")


def tell(name, rows):
    """Print how many rows a stage kept and why it dropped the others."""
    count = collections.Counter((row["fate"], row.get("why", "").split(":")[0]) for row in rows)
    lost = ", ".join(f"{fate} {n} ({why})" for (fate, why), n in sorted(count.items()) if fate != "kept")
    print(f"{name}: kept {fates(rows).get('kept', 0)} of {len(rows)}" + (f"; {lost}" if lost else ""), flush=True)
    return rows


# Stage 1: quality control

def inputs(flags):
    """List the rows {"id", "video", "text"} of a folder (every file) or of a JSON-lines file; ids must differ."""
    path = Path(flags.videos)
    if path.is_dir():
        return [{"id": str(f.relative_to(path)), "video": str(f.relative_to(path))} for f in sorted(path.rglob("*")) if f.is_file()]
    rows, seen = [], {}
    for number, row in read_jsonl(path):
        row = {"id": str(row.get("id", row.get("video"))), "video": row.get("video"), "text": row.get("text") or ""}
        if row["id"] in seen or not all(isinstance(row[key], str) for key in ("video", "text")):
            raise ValueError(f"{path}:{number}: id {row['id']!r} must be new (line {seen.get(row['id'], '-')}), video and text strings")
        seen[row["id"]] = number
        rows.append(row)
    return rows


def watch(path, fps):
    """Read a whole video at about `fps` -> (frames shrunk to (n, 3, 32, 32) float of 0-255, their times (n,) s, facts)."""
    facts, small = {}, []
    while not small or sum(map(len, small)) < len(range(0, facts["frames"], facts["step"])):
        def choose(n, rate):
            facts.update(frames=n, rate=rate, step=max(1, round(rate / fps)))
            done = sum(map(len, small))
            return np.arange(0, n, facts["step"])[done : done + 32]
        frames = torch.from_numpy(read_frames(path, choose)).movedim(-1, 1).float()  # (32, 3, H, W) at most: bounded memory
        facts["size"] = list(frames.shape[2:])
        small.append(F.adaptive_avg_pool2d(frames, 32))
    small = torch.cat(small)
    return small, np.arange(len(small)) * facts["step"] / facts["rate"], facts


def look(row, flags):
    """Check and measure one video -> its row: facts, motion, cuts, key frames, clips, fingerprint; kept, or dropped and why."""
    words = row.get("text", "").lower().split()
    useless = next((name for name, rule in RULES.items() if rule(row.get("text", ""), words, flags.script)), None)
    row = {**row, "text": "" if useless else row["text"], "text_out": useless}
    try:
        base = flags.videos if os.path.isdir(flags.videos) else os.path.dirname(os.path.abspath(flags.videos))
        row["video"] = resolve({"video": row["video"]}, base, flags.root)["video"]
        small, times, facts = watch(row["video"], flags.probe_fps)
    except (ValueError, FileNotFoundError) as error:
        return {**row, "fate": "dropped", "why": f"unreadable: {error}"}
    step, rng = (small[1:] - small[:-1]).abs().mean((1, 2, 3)), random.Random(f"{flags.seed}/{row['id']}/look")
    near = F.pad(step, (2, 2)).unfold(0, 5, 1)[:, [0, 1, 3, 4]].amax(1) if len(step) else step  # the two steps on either side
    cuts = [0, *(((step > 8) & (step > 1.5 * near + 1)).nonzero()[:, 0] + 1).tolist(), len(small)]
    shots, gray = [(a, b) for a, b in itertools.pairwise(cuts)], small.mean(1)
    moved = sum(((gray[a:b].amax(0) - gray[a:b].amin(0)) > 24).float().mean().item() * (b - a) for a, b in shots) / len(small)
    length, frame = facts["frames"] / facts["rate"], facts["step"] / facts["rate"]
    row |= {"size": facts["size"], "frames": facts["frames"], "seconds": round(length, 3), "motion": round(moved, 4),
            "cuts": [round(float(times[a]), 3) for a, _ in shots[1:]]}
    for name, value, least in (("resolution", min(facts["size"]), flags.min_side), ("frames", facts["frames"], flags.min_frames),
                               ("static", moved, flags.min_motion)):
        if value < least:
            return {**row, "fate": "dropped", "why": f"{name}: {value:.4g} < {least}"}
    keys = []  # the middles of the longest shots, then their quarters; each unlike those before it
    for at in (0.5, 0.2, 0.8):
        for a, b in sorted(shots, key=lambda shot: shot[0] - shot[1]):
            k = a + int(at * (b - a))
            if len(keys) < flags.key_frames and all((small[k] - small[j]).abs().mean() > 4 for j in keys):
                keys.append(k)
    clips = []
    for a, b in rng.sample(shots, len(shots)):
        start, end = float(times[a]), float(times[b - 1]) + min(frame, 1 / facts["rate"])
        longest = min(10.0, end - start, 0.75 * length)
        if longest >= 2 and len(clips) < flags.clips:
            seconds = rng.uniform(2, longest)
            begin = rng.uniform(start, end - seconds)
            clips.append([round(begin, 3), round(begin + seconds, 3)])
    tiny = F.adaptive_avg_pool2d(gray[np.linspace(0, len(gray) - 1, 4).round()], 8)
    signs = torch.cat([(tiny.diff(dim=d) > 0).flatten() for d in (1, 2)])  # 448 bits
    return {**row, "fate": "kept", "key_frames": [round(float(times[k]) + 0.25 / facts["rate"], 4) for k in keys], "clips": clips,
            "hash": np.packbits(signs.numpy()).tobytes().hex()}


def vectors(prober, items, flags):
    """Embed items with the prober -> (n, D) float32; rows of NaN where one failed."""
    return encode(prober(), items, batch_size=flags.batch_size, workers=0, frames=flags.frames, max_tokens=flags.max_tokens)[0]


def control(p, jobs, prober, flags):
    """Stage 1 of one part; vectors of videos and captions (n, 2, D) float16 lie beside its rows, NaN where there is none."""
    rows = list(ahead(lambda job: look(job, flags), jobs, flags.workers, 8))
    kept = [row for row in rows if row["fate"] == "kept"]
    items = [{"video": row["video"]} for row in kept] + [{"text": row["text"] or "."} for row in kept]
    made = iter(vectors(prober, items, flags).view(2, len(kept), -1).movedim(0, 1)) if kept else iter(())
    blank = torch.full((2, prober().dim), torch.nan)
    array = torch.stack([next(made) if row["fate"] == "kept" else blank for row in rows]).half().numpy()
    with open(path := Path(flags.out) / "1-pool" / f"{p:05}.npy.part", "wb") as file:
        np.save(file, array)
    os.replace(path, path.with_suffix(""))
    return rows


def select(flags, n):
    """What needs all rows: consistency of video and caption, near-duplicates, captions of several videos -> pool.jsonl, pool.npy."""
    out = Path(flags.out)
    rows = [row for p in range(n) for row in read(out / "1-pool" / f"{p:05}.jsonl")]
    both = torch.from_numpy(np.concatenate([np.load(out / "1-pool" / f"{p:05}.npy") for p in range(n)])).float()  # (N, 2, D)
    have = torch.tensor([row["fate"] == "kept" and bool(row["text"]) for row in rows])
    centred = both - both[have].mean(0)  # without the gap between modalities and what every caption shares
    score = F.cosine_similarity(centred[:, 0], centred[:, 1])
    limit = float(flags.consistency.lstrip("q"))
    limit = score[have].quantile(limit).item() if flags.consistency.startswith("q") and have.any() else limit
    for i in have.nonzero()[:, 0].tolist():
        rows[i]["consistency"] = round(score[i].item(), 4)
        if score[i] < limit:
            rows[i] |= {"fate": "dropped", "why": f"consistency: {score[i]:.4f} < {limit:.4f}"}
    kept = [i for i, row in enumerate(rows) if row["fate"] == "kept"]
    signs = torch.tensor(np.array([np.unpackbits(np.frombuffer(bytes.fromhex(rows[i]["hash"]), np.uint8)) for i in kept])) * 2.0 - 1
    agree, where = top_k(signs, signs, 8) if kept else ([], [])
    for i, scores, others in zip(kept, agree, where, strict=True):
        first = min((kept[j] for s, j in zip(scores, others, strict=True) if s >= flags.duplicate * signs.shape[1]), default=i)
        if first < i:
            rows[i] |= {"fate": "dropped", "why": f"duplicate: of {rows[first]['id']}"}
    seen = collections.Counter(row["text"].lower() for row in rows if row["fate"] == "kept")
    for row in rows:
        if row["text"] and row["fate"] == "kept" and seen[row["text"].lower()] > 1:
            row.update(text="", text_out="of several videos")
    np.save(out / "pool.npy", both[[i for i, row in enumerate(rows) if row["fate"] == "kept"], 0].numpy())
    write(out / "pool.jsonl", rows)


# Stage 2: enrichment

def times(task, row, flags):
    """How many pairs of a task a video gives: its share, the fraction by lot."""
    share = flags.share[task]
    return math.floor(share + random.Random(f"{flags.seed}/{row['id']}/{task}").random())


def enrich(jobs, ask, prober, pool, flags):
    """Caption each video, and one key frame where its lot says T2I; drop captions less like the video than the raw one."""
    asked, owner = [], []
    for job in jobs:
        rng = random.Random(f"{flags.seed}/{job['id']}/captions")
        sights = [("video", {"video": job["video"]})]
        if times("T2I", job, flags):
            job["frame"] = {"video": job["video"], "time": rng.choice(job["key_frames"])}
            sights.append(("image", {"image": job["frame"]}))
        for kind, item in sights:
            for request in requests_for(kind, [item], flags, rng, job["text"]):
                asked.append(request)
                owner.append((job["id"], kind))
    answers, rows = collections.defaultdict(list), []
    for key, answer in zip(owner, obtain(ask, asked, flags), strict=True):
        answers[key].append(answer)
    for job in jobs:
        mine = {kind: answers.get((job["id"], kind), []) for kind in ("video", "image")}
        every = mine["video"] + mine["image"]
        bad = next((a for fate in ("failed", "dropped") for a in every if a["fate"] == fate), {"fate": "kept"})
        row = {"id": job["id"], "fate": bad["fate"], "tokens": np.sum([a["tokens"] for a in every], axis=0).tolist()}
        if bad["fate"] == "kept":
            row |= {name: {k: v for a in mine[kind] for k, v in a["got"].items()} for name, kind in
                    (("captions", "video"), ("frame_captions", "image"))}
            row["frame"] = job.get("frame")
        else:
            row["why"] = bad["why"]
        rows.append(row)
    checked = [(row, job["text"]) for row, job in zip(rows, jobs, strict=True) if row["fate"] == "kept" and job["text"]]
    texts = [{"text": text} for row, raw in checked for text in (raw, *row["captions"].values())]
    made = iter(vectors(prober, texts, flags)) if texts else None
    for row, _ in checked:
        video = pool[row["id"]]
        least = next(made) @ video - flags.hallucination
        row["removed"] = {style: text for style, text in row["captions"].items() if next(made) @ video < least}
        row["captions"] = {style: text for style, text in row["captions"].items() if style not in row["removed"]}
        if not row["captions"]:
            row |= {"fate": "dropped", "why": "hallucination: every caption is less like the video than the raw one"}
    return rows


# Stage 3: task extension

def plan(row, video, flags):
    """List the pairs that one captioned video shall give: simple ones whole, composed ones still without their query."""
    rng, jobs = random.Random(f"{flags.seed}/{row['id']}/pairs"), []
    styles = rng.sample(sorted(row["captions"]), len(row["captions"]))
    still = lambda: {"image": {"video": video["video"], "time": rng.choice(video["key_frames"])}}  # noqa: E731
    whole, texts = {"video": video["video"]}, [{"text": row["captions"][style]} for style in styles]
    clip = {"video": dict(zip(("path", "start", "end"), (video["video"], *rng.choice(video["clips"])), strict=True))} if video["clips"] else None
    for task in TASKS:
        for k in range(times(task, row, flags)):
            pair = {"T2V": lambda k: (texts[k % len(texts)], whole), "I2V": lambda k: (still(), whole), "V2V": lambda k: clip and (clip, whole),
                    "T2T": lambda k: (texts[-1], texts[-2]) if len(texts) > 2 else None,
                    "T2I": lambda k: row["frame"] and ({"text": rng.choice(list(row["frame_captions"].values()))}, {"image": row["frame"]}),
                    }.get(task, lambda k: (None, whole))(k)
            if pair:
                jobs.append({"id": f"{row['id']} {task} {k}", "task": task, "of": row["id"], "query": pair[0], "positive": pair[1]})
    return jobs


def extend(jobs, ask, prober, pool, videos, matrix, flags):
    """Compose the missing queries, drop those that need no reference, and mine hard negatives from the pool."""
    index, rows = {i: n for n, i in enumerate(pool)}, []
    names = list(pool)
    composed = [job for job in jobs if job["query"] is None]
    asked, ready = [], []
    if composed:
        target = torch.stack([pool[job["of"]] for job in composed])
        for job, scores, near in zip(composed, *top_k(target, matrix, 16), strict=True):
            rng = random.Random(f"{flags.seed}/{job['id']}")
            near = [j for s, j in zip(scores, near.tolist(), strict=True) if s < flags.skip_top and names[j] != job["of"]][:3]
            if not near:
                job |= {"fate": "dropped", "why": "no reference: nothing in the pool is alike"}
                continue
            other = videos[names[rng.choice(near)]]
            job["reference"] = {"image": {"video": other["video"], "time": rng.choice(other["key_frames"])}} if job["task"] == "TI2V" else {
                "video": dict(zip(("path", "start", "end"), (other["video"], *(rng.choice(other["clips"]) if other["clips"] else
                                                                              (0, min(10, other["seconds"])))), strict=True))}
            job["reference_id"] = other["id"]
            asked += requests_for(job["task"], [job["reference"], job["positive"]], flags, rng)
            ready.append(job)
    for job, answer in zip(ready, obtain(ask, asked, flags), strict=True):
        job |= answer
        if answer["fate"] == "kept":
            job["query"] = {"text": job.pop("got")["query"], **job["reference"]}
    jobs = [{"fate": "kept", **job} for job in jobs]
    mined = [job for job in jobs if job["fate"] == "kept" and job["task"].endswith("2V")]
    items = [job["query"] for job in mined] + [{"text": job["query"]["text"]} for job in mined if "reference" in job]
    made = vectors(prober, items, flags) if items else torch.empty(0, matrix.shape[1])
    alone = iter(made[len(mined) :])
    for job, query in zip(mined, made, strict=False):
        v, k = index[job["of"]], flags.negative[job["task"]]
        if "reference" in job:
            ranks = [int((matrix @ x > x @ matrix[v]).sum()) for x in (query, next(alone))]
            job["ranks"] = ranks  # of the target, with and without the reference
            if ranks[0] >= ranks[1]:
                job |= {"fate": "dropped", "why": f"needs no reference: rank {ranks[1]} without, {ranks[0]} with it"}
                continue
        (scores,), (near,) = top_k(query[None], matrix, 64 + k)
        keep = [j for s, j in zip(scores.tolist(), near.tolist(), strict=True) if j != v and names[j] != job.get("reference_id")
                and s <= float(query @ matrix[v]) + flags.margin and float(matrix[j] @ matrix[v]) < flags.skip_top]
        job["negatives"] = [{"video": videos[names[j]]["video"]} for j in keep[:k]]
        if len(keep) < k:
            job |= {"fate": "dropped", "why": f"negatives: {len(keep)} of {k} found"}
    return jobs


def assemble(flags, rows):
    """Write <out>/train: a training file per task, media relative to it, and the mixture; samples keep the shares."""
    folder, mixture = Path(flags.out) / "train", []
    folder.mkdir(exist_ok=True)
    near = lambda path: os.path.relpath(path, folder)  # noqa: E731

    def local(item):
        item = dict(item)
        for kind, key in (("image", "video"), ("video", "path")):
            if kind in item:
                item[kind] = {**item[kind], key: near(item[kind][key])} if isinstance(item[kind], dict) else near(item[kind])
        return item

    base = sum(row["task"] == "T2V" for row in rows) / max(flags.share["T2V"], 1e-9)
    for task, (_, _, batch, instruction) in TASKS.items():
        mine = [row for row in rows if row["task"] == task]
        if mine:
            write(folder / f"uvrd-{task}.jsonl", [{"query": local(row["query"]), "positive": local(row["positive"]), "id": row["id"], **(
                {"negatives": [local(n) for n in row["negatives"]]} if row.get("negatives") else {})} for row in mine])
            mixture.append({"name": f"uvrd-{task}", "task": task, "path": f"uvrd-{task}.jsonl", "samples": round(base * flags.share[task]) or len(mine),
                            "negatives": flags.negative[task], "batch_size": batch, "instruction": instruction})
            print(f"  {task}: {len(mine)} pairs, {mixture[-1]['samples']} samples in the mixture")
    part = folder / "mixture.json.part"
    part.write_text(json.dumps(mixture, indent=1) + "\n")
    os.replace(part, folder / "mixture.json")


def numbers(given, default, name):
    """Read TASK=NUMBER words over defaults; ValueError for anything else."""
    for word in given:
        task, _, value = word.partition("=")
        if task not in TASKS or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ValueError(f"--{name} {word!r}: wanted TASK=NUMBER with TASK one of {', '.join(TASKS)}")
        default[task] = float(value) if name == "shares" else int(value)
    return default


def main(flags):
    flags.share = numbers(flags.shares, {task: n / TASKS["T2V"][0] for task, (n, *_) in TASKS.items()}, "shares")
    flags.negative = numbers(flags.negatives, {task: k for task, (_, k, *_) in TASKS.items()}, "negatives")
    kind, _, name = flags.captioner.partition(":")
    if kind == "mini":
        kind, name, flags.prompts = "hf", "mini/base", flags.prompts or "short"
    flags.prompts = flags.prompts or "full"
    if kind not in ("hf", "openai") or not name or kind == "openai" and "#" not in name:
        raise ValueError(f"--captioner {flags.captioner!r}: wanted mini, hf:MODEL or openai:URL#MODEL")
    if "LOCAL_RANK" in os.environ and flags.device == "cuda":
        flags.device = f"cuda:{os.environ['LOCAL_RANK']}"
    out, rows = Path(flags.out), inputs(flags)
    parts = [rows[i : i + flags.part] for i in range(0, len(rows), flags.part)]
    if flags.dry_run:
        return dry_run(flags, len(rows))
    out.mkdir(parents=True, exist_ok=True)
    same = {k: v for k, v in dataclasses.asdict(flags).items() if k not in FREE}
    with lock(out / "lock", True):
        if not (out / "flags.json").exists():
            write(out / "flags.json", [same])
        for key, value in read(out / "flags.json")[0].items():
            if same[key] != value:
                raise ValueError(f"{out} was begun with --{key.replace('_', '-')} {value!r}, not {same[key]!r}: take another --out")
    prober = functools.cache(lambda: GVE.from_pretrained(flags.prober, device=flags.device))
    ask = functools.cache(lambda: (hub if kind == "hf" else server)(name, flags))
    lazy = lambda requests: ask()(requests)  # noqa: E731
    if flags.stage in ("all", "1"):
        if not share("1-pool", parts, lambda p, jobs: control(p, jobs, prober, flags), flags):
            sys.exit("stage 1: other shards are not done; run again when they are")
        with lock(out / "lock", True):
            if not (out / "pool.jsonl").exists():
                select(flags, len(parts))
    pool_rows = tell("1-pool", read(out / "pool.jsonl"))
    texts = collections.Counter(row["text_out"] for row in pool_rows if row["text_out"])
    print(f"  captions dropped: {dict(texts)}; {sum(len(row.get('cuts', [])) for row in pool_rows)} cuts")
    videos = {row["id"]: row for row in pool_rows if row["fate"] == "kept"}
    matrix = torch.from_numpy(np.load(out / "pool.npy"))  # (N, D)
    pool, kept = dict(zip(videos, matrix, strict=True)), list(videos.values())
    parts = [kept[i : i + flags.part] for i in range(0, len(kept), flags.part)]
    if flags.stage in ("all", "2"):
        if not share("2-captions", parts, lambda p, jobs: enrich(jobs, lazy, prober, pool, flags), flags):
            sys.exit("stage 2: other shards are not done; run again when they are")
    captions = [read(out / "2-captions" / f"{p:05}.jsonl") for p in range(len(parts))]
    tell("2-captions", sum(captions, []))
    parts = [[job for row in rows if row["fate"] == "kept" for job in plan(row, videos[row["id"]], flags)] for rows in captions]
    if flags.stage in ("all", "3"):
        if not share("3-pairs", parts, lambda p, jobs: extend(jobs, lazy, prober, pool, videos, matrix, flags), flags):
            sys.exit("stage 3: other shards are not done; run again when they are")
        pairs = tell("3-pairs", [row for p in range(len(parts)) for row in read(out / "3-pairs" / f"{p:05}.jsonl")])
        with lock(out / "lock", True):
            assemble(flags, [row for row in pairs if row["fate"] == "kept"])


FREE = ("videos", "stage", "shard", "dry_run", "root", "device", "workers", "batch_size", "concurrency", "retries", "backoff", "timeout", "captioner")

if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"synth.py: {error}")
