"""V-SynFlow: weakly captioned videos -> universal retrieval data, UVRD (arXiv 2510.27571, sections 3.3 and A.6, Tables 7 and 8).

    python synth.py --videos runs/raw/captions.jsonl --out runs/synth                    # the mini world's; one CPU minute
    python synth.py --videos DIR --out DIR --captioner openai:http://HOST:8000/v1#M --prober Alibaba-NLP/GVE-3B --consistency q0.1

Three stages, each a folder of JSON lines below --out with one row per job, its fate (kept, dropped or failed) and the reason:
    1-pool      quality control; pool.jsonl beside it is the asset pool, after what only all rows together can tell
    2-captions  enrichment: five captions per video and per key frame
    3-pairs     task extension: T2T, T2I, T2V, I2V, V2V, composed queries (TI2V, TV2V), hard negatives
then <out>/uvrd: training files and the mixture.json that train.py takes. The same command goes on where a killed run stopped and
tries again what failed; torchrun's ranks, --shard 0/4 ... 3/4 and the same command run twice share the work.
Legend: N videos in the pool, D embedding dim, n sampled frames of a video.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from caption import ahead, captioner, dry_run, obtain, requests_for, task_numbers, useless_text
from data import resolve
from embed import encode, top_k
from model import GVE
from support.files import file_lock, load_jsonl, read_jsonl, write_jsonl
from support.flags import flag, parse_flags
from support.jobs import print_summary, run_sharded
from support.media import read_frames

TABLE7 = {
    m["task"]: m
    for m in json.loads((Path(__file__).parent / "mixtures" / "gve-3b.json").read_text())
    if m["name"].startswith("UVRD-")
}  # samples, hard negatives, batch sizes and our instructions of its seven tasks
COMPOSED = ("TI2V", "TV2V")


@dataclasses.dataclass
class Flags:
    videos: str = flag(
        "runs/raw/captions.jsonl", 'a folder of videos, or JSON lines {"video", "text"?, "id"?}'
    )
    out: str = flag("runs/synth", "folder to write")
    captioner: str = flag("mini", "mini | hf:MODEL | openai:URL#MODEL")
    prober: str = flag("mini/prober", "embedder that filters and mines")
    prompts: str = flag(
        "auto",
        "full: A.6's; short: a style at a time, plain answers; auto: short for mini, which is too small "
        "for full",
        choices=["auto", "full", "short"],
    )
    stages: int = flag(3, "stop after this one")
    shard: str = flag("0/1", "i/n: take parts i, i + n, i + 2n, ... of each stage")
    part: int = flag(256, "rows per file of a stage, the unit of progress")
    dry_run: bool = flag(False, "print prompts, counts, expected calls and tokens, and stop")
    root: list[str] = flag([], "more folders that videos may lie in")
    seed: int = flag(42, "of everything random")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    script: str = flag(
        "LATIN", "captions are in this script (first word of its letters' Unicode names)"
    )
    min_side: int = flag(56, "least height and width in pixels: two vision tokens")
    min_frames: int = flag(8, "least frames: what the embedder sees")
    probe_fps: float = flag(8.0, "frames per second on which motion and cuts are measured")
    min_motion: float = flag(
        0.01, "least share of pixels that change by 24 of 255 levels within a shot"
    )
    consistency: str = flag(
        "0.09",
        "least cosine of caption and video or shot, for mini/prober; q0.1: the lowest tenth goes",
    )
    duplicate: float = flag(
        0.6,
        "videos whose brightness gradients agree in sign this much (1 all, 0 by chance) are one",
    )
    key_frames: int = flag(3, "most key frames per video")
    clips: int = flag(2, "most clips per video, 2-10 s each")
    hallucination: float = flag(
        2.0,
        "a caption goes if its cosine with the video is this far below the raw caption's; 2: off",
    )
    shares: list[str] = flag([], "pairs per video, as T2I=0.5; default Table 7's in units of T2V")
    negatives: list[str] = flag([], "hard negatives per pair, as TI2V=2; default Table 7's")
    margin: float = flag(0.0, "a hard negative's score exceeds the positive's by at most this")
    same: float = flag(
        0.97,
        "a video one of whose captions is this like the query (cosine) is no hard negative of T2V",
    )
    twin: float = flag(
        0.98, "a video with this cosine to the positive is neither its negative nor its reference"
    )
    frames: int = flag(8, "frames of a video that captioner and prober see")
    max_tokens: int = flag(200, "vision tokens (28 x 28 pixels) per frame")
    batch_size: int = flag(32, "the captioner's requests per forward")
    workers: int = flag(2, "decoding threads")
    max_new_tokens: int = flag(1024, "per answer")
    tries: int = flag(
        3, "answers per request; each after the first is asked for with the error of the one before"
    )
    concurrency: int = flag(32, "openai: requests in flight")
    retries: int = flag(
        5, "openai: further attempts after 408, 429, 5xx, time-outs and broken connections"
    )
    backoff: float = flag(
        1.0, "openai: seconds before the second attempt, doubled for each further one"
    )
    timeout: float = flag(300.0, "openai: seconds of silence before an attempt is given up")


DECISIVE = (
    "prober prompts part seed script min_side min_frames probe_fps min_motion consistency duplicate key_frames clips "
    "hallucination shares negatives margin same twin frames max_tokens"
).split()  # one --out, one value


# Stage 1: quality control


def inputs(flags):
    """List the rows {"id", "video", "text"} of a folder (every file in it) or of a JSON-lines file; ids must differ."""
    path, seen = Path(flags.videos), {}
    if path.is_dir():
        files = (f for f in sorted(path.rglob("*")) if f.is_file())
        return [
            {"id": str(f.relative_to(path)), "video": os.path.abspath(f), "text": ""} for f in files
        ]
    for number, row in read_jsonl(path):
        row = {
            "id": str(row.get("id", row.get("video"))),
            "video": row.get("video"),
            "text": row.get("text") or "",
        }
        if (
            row["id"] in seen
            or not isinstance(row["video"], str)
            or not isinstance(row["text"], str)
        ):
            raise ValueError(
                f"{path}:{number}: video and text must be strings and the id {row['id']!r} new"
            )
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
    useless = useless_text(row["text"], flags.script)
    row = row | (
        {"text": "", "text_dropped": useless} if useless else {}
    )  # the video stays: it can do without
    try:
        base = (
            flags.videos
            if os.path.isdir(flags.videos)
            else os.path.dirname(os.path.abspath(flags.videos))
        )
        row["video"] = resolve({"video": row["video"]}, base, flags.root)["video"]
        small, facts = watch(row["video"], flags.probe_fps)
    except (ValueError, FileNotFoundError) as error:
        return row | {"fate": "dropped", "why": f"unreadable: {error}"}
    gray, tick, length = (
        small.mean(1),
        facts["step"] / facts["rate"],
        facts["frames"] / facts["rate"],
    )
    change = (small[1:] - small[:-1]).abs().mean((1, 2, 3))  # (n - 1,)
    beside = F.pad(change, (2, 3)).unfold(0, 5, 1)[: len(change), [0, 1, 3, 4]].amax(1)
    cuts = ((change > 8) & (change > 1.5 * beside)).nonzero()[
        :, 0
    ] + 1  # stand out from the two steps on either side
    shots = list(itertools.pairwise([0, *cuts.tolist(), len(small)]))
    motion = sum(
        ((gray[a:b].amax(0) - gray[a:b].amin(0)) > 24).float().mean().item() * (b - a)
        for a, b in shots
    ) / len(small)
    row |= {
        **facts,
        "seconds": round(length, 3),
        "motion": round(motion, 4),
        "cuts": [round(a * tick, 3) for a, _ in shots[1:]],
    }
    for name, value, least in (
        ("resolution", min(facts["size"]), flags.min_side),
        ("frames", facts["frames"], flags.min_frames),
        ("static", row["motion"], flags.min_motion),
    ):
        if value < least:
            return row | {"fate": "dropped", "why": f"{name}: {value} < {least}"}
    keys, clips, rng = [], [], random.Random(f"{flags.seed}/{row['id']}/clips")
    for at, (a, b) in itertools.product(
        (0.5, 0.2, 0.8), sorted(shots, key=lambda shot: shot[0] - shot[1])
    ):
        k = a + int(at * (b - a))
        if len(keys) < flags.key_frames and all(
            (small[k] - small[j]).abs().mean() > 4 for j in keys
        ):
            keys.append(k)  # unlike every frame before it; longest shots first
    for a, b in shots:
        start, end = (
            a * tick,
            min((b - 1) * tick + 1 / facts["rate"], length),
        )  # only what was seen to be this shot
        seconds = min(rng.uniform(2, 10), end - start, 0.75 * length)
        if seconds >= 2:
            begin = rng.uniform(start, end - seconds)
            clips.append([round(begin, 3), round(begin + seconds, 3)])
    tiny = F.adaptive_avg_pool2d(gray[np.linspace(0, len(gray) - 1, 4).round()], 8)
    signs = torch.cat([(tiny.diff(dim=d) > 0).flatten() for d in (1, 2)])  # 448 bits
    return row | {
        "fate": "kept",
        "key_frames": [round(k * tick + 0.25 / facts["rate"], 4) for k in keys],
        "clips": rng.sample(clips, min(len(clips), flags.clips)),
        "hash": np.packbits(signs).tobytes().hex(),
    }


def control(p, jobs, see, flags):
    """Stage 1 of a part, vectors (rows, D) beside it; consistency: the caption's best cosine with the video and its shots."""
    rows = list(ahead(lambda job: look(job, flags), jobs, flags.workers, 8))
    said = [i for i, row in enumerate(rows) if row["fate"] == "kept" and row["text"]]
    shots = [
        (i, {"video": {"path": rows[i]["video"], "start": a, "end": b}})
        for i in said
        for a, b in itertools.pairwise([0, *rows[i]["cuts"], rows[i]["seconds"]])
        if 0.5 <= b - a < rows[i]["seconds"]
    ]
    videos = see(
        [{"video": row["video"]} if row["fate"] == "kept" else {"text": "-"} for row in rows]
    )
    texts = dict(zip(said, see([{"text": rows[i]["text"]} for i in said]), strict=True))
    for i, view in [
        *((i, videos[i]) for i in said),
        *zip((i for i, _ in shots), see([item for _, item in shots]), strict=True),
    ]:
        rows[i]["consistency"] = max(
            rows[i].get("consistency", -1), round(float(view @ texts[i]), 4)
        )
    np.save(Path(flags.out) / "1-pool" / f"{p:05}.npy", videos.half().numpy())
    return rows  # their file, written after the vectors, says that both are there


def select(rows, flags):
    """What takes all rows: consistency, near-duplicates, captions of several videos -> pool.jsonl, pool.npy (N, D)."""
    vectors = np.concatenate(
        [np.load(path) for path in sorted((Path(flags.out) / "1-pool").glob("*.npy"))]
    )  # (rows, D)
    scores, limit = (
        [row["consistency"] for row in rows if "consistency" in row],
        float(flags.consistency.lstrip("q")),
    )
    limit = (
        float(np.quantile(scores, limit)) if flags.consistency.startswith("q") and scores else limit
    )
    for row in rows:
        if row.get("consistency", limit) < limit:
            row |= {
                "fate": "dropped",
                "why": f"consistency: {row['consistency']:.4f} < {limit:.4f}",
            }
    kept = [i for i, row in enumerate(rows) if row["fate"] == "kept"]
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(rows[i]["hash"]), np.uint8)) for i in kept]
    signs = torch.from_numpy(np.array(bits, np.float32).reshape(len(kept), 448)) * 2 - 1
    for i, agree, others in zip(kept, *top_k(signs, signs, 8), strict=True) if kept else ():
        first = min(
            (
                kept[j]
                for s, j in zip(agree, others, strict=True)
                if s >= flags.duplicate * signs.shape[1]
            ),
            default=i,
        )
        if first < i:
            rows[i] |= {"fate": "dropped", "why": f"duplicate: of {rows[first]['id']}"}
    kept = [i for i in kept if rows[i]["fate"] == "kept"]
    often = collections.Counter(rows[i]["text"].lower() for i in kept)
    for i in kept:
        if rows[i]["text"] and often[rows[i]["text"].lower()] > 1:
            rows[i] |= {"text": "", "text_dropped": "of several videos"}
    np.save(Path(flags.out) / "pool.npy", vectors[kept].astype(np.float32))
    write_jsonl(Path(flags.out) / "pool.jsonl", rows)


# Stage 2: enrichment


def wanted(row, flags):
    """Choose by lot which pairs a video shall give -> ["T2V", "T2V", "I2V", ...]: each task's share, its fraction by chance."""
    rng = random.Random(f"{flags.seed}/{row['id']}/tasks")
    return [task for task, share in flags.share.items() for _ in range(int(share + rng.random()))]


def captions_of(row, flags):
    """List what to caption of a video: itself and, if it shall give T2I pairs, a key frame."""
    jobs = [
        {
            "id": f"{row['id']} video",
            "of": row["id"],
            "kind": "video",
            "text": row["text"],
            "item": {"video": row["video"]},
        }
    ]
    frame = frame_of(row, random.Random(f"{flags.seed}/{row['id']}/frame"))
    more = [
        {"id": f"{row['id']} image", "of": row["id"], "kind": "image", "text": "", "item": frame}
    ]
    return jobs + more * ("T2I" in wanted(row, flags))


def enrich(jobs, ask, see, pool, flags):
    """Caption videos and key frames; drop captions that are less like their video than the raw caption is."""
    asked = [
        requests_for(
            job["kind"],
            [job["item"]],
            flags.prompts,
            random.Random(f"{flags.seed}/{job['id']}"),
            job["text"],
        )
        for job in jobs
    ]
    answers, rows = iter(obtain(ask, sum(asked, []), flags.tries)), []
    for job, requests in zip(jobs, asked, strict=True):
        mine = [next(answers) for _ in requests]
        worst = min(mine, key=lambda answer: ("failed", "dropped", "kept").index(answer["fate"]))
        got = (
            {"why": worst["why"]}
            if "why" in worst
            else {"captions": {k: text for a in mine for k, text in a["got"].items()}}
        )
        rows.append(
            job
            | got
            | {"fate": worst["fate"], "tokens": [sum(a["tokens"][k] for a in mine) for k in (0, 1)]}
        )
    checked = [row for row in rows if row["fate"] == "kept" and row["text"]]
    vectors = iter(
        see(
            [{"text": text} for row in checked for text in (row["text"], *row["captions"].values())]
        )
    )
    for row in checked:
        video, every = pool[row["of"]]["vector"], row["captions"]
        least = next(vectors) @ video - flags.hallucination
        row["removed"] = {
            style: text for style, text in every.items() if next(vectors) @ video < least
        }
        row["captions"] = {
            style: text for style, text in every.items() if style not in row["removed"]
        }
        if not row["captions"]:
            row |= {
                "fate": "dropped",
                "why": "hallucination: every caption is less like the video than the raw one",
            }
    return rows


# Stage 3: task extension


def frame_of(video, rng):
    return {"image": {"video": video["video"], "time": rng.choice(video["key_frames"])}}


def clip_of(video, rng):
    start, end = rng.choice(video["clips"] or [(0, min(10, video["seconds"]))])
    return {"video": {"path": video["video"], "start": start, "end": end}}


def plan(rows, pool, flags):
    """List the pairs that a part's captioned videos shall give; composed ones get reference and query later."""
    jobs, frames = (
        [],
        {row["of"]: row for row in rows if row["kind"] == "image" and row["fate"] == "kept"},
    )
    for row in (row for row in rows if row["kind"] == "video" and row["fate"] == "kept"):
        video, frame, texts = (
            pool[row["of"]],
            frames.get(row["of"]),
            [{"text": text} for text in row["captions"].values()],
        )
        random.Random(f"{flags.seed}/{row['of']}/texts").shuffle(texts)
        for k, task in enumerate(wanted(video, flags)):
            name = f"{row['of']} {task} {k}"
            query, positive, rng = (
                {},
                row["item"],
                random.Random(f"{flags.seed}/{name}"),
            )  # no draw depends on what else worked
            if task == "T2T" and len(texts) > 2:
                query, positive = texts[-2:]  # T2V does not select these two
            elif task == "T2V":
                query = rng.choice(texts[:-2] or texts)
            elif task == "T2I" and frame:
                query, positive = {"text": rng.choice([*frame["captions"].values()])}, frame["item"]
            elif task == "I2V":
                query = frame_of(video, rng)
            elif task == "V2V" and video["clips"]:
                query = clip_of(video, rng)
            if query or task in COMPOSED:
                jobs.append(
                    {
                        "id": name,
                        "of": row["of"],
                        "task": task,
                        "query": query,
                        "positive": positive,
                    }
                )
    return jobs


def extend(jobs, ask, see, told, pool, matrix, flags):
    """Compose queries about a reference that is like the target, drop those that do without it, mine hard negatives.

    told(id) -> a video's captions as vectors (n, D). Captions tell twins apart better than videos do: for T2V the 32 likeliest
    negatives are ranked by theirs. # PAPER: the reference is a frame or clip of a *similar* video (A.6: same or similar source).
    """
    names, asked = list(pool), []
    for job in jobs:
        near = matrix @ pool[job["of"]]["vector"]  # (N,)
        job |= {"fate": "kept", "near": near >= flags.twin}
        if job["task"] in COMPOSED:
            rng = random.Random(f"{flags.seed}/{job['id']}")
            like, which = near.masked_fill(job["near"], -2).topk(min(3, len(names)))
            job["reference"] = names[
                rng.choice(which[like > -2].tolist() or [pool[job["of"]]["row"]])
            ]  # else its own
            job["query"] = (frame_of if job["task"] == "TI2V" else clip_of)(
                pool[job["reference"]], rng
            )
            asked.append(
                (
                    job,
                    requests_for(job["task"], [job["query"], job["positive"]], flags.prompts, rng)[
                        0
                    ],
                )
            )
    for (job, _), answer in zip(
        asked, obtain(ask, [request for _, request in asked], flags.tries), strict=True
    ):
        job["query"] = job["query"] | {"text": answer.pop("got", {"query": ""})["query"]}
        job |= answer
    mined = [job for job in jobs if job["fate"] == "kept" and job["task"].endswith("2V")]
    alone = see([{"text": job["query"]["text"] if "reference" in job else "-"} for job in mined])
    for job, query, text in zip(mined, see([job["query"] for job in mined]), alone, strict=True):
        row, k, scores = pool[job["of"]]["row"], flags.negative[job["task"]], matrix @ query  # (N,)
        barred = job["near"] | (scores > scores[row] + flags.margin)
        if "reference" in job:
            barred[pool[job["reference"]]["row"]] = True
            job["ranks"] = [
                int((s > s[row]).sum()) + 1 for s in (scores, matrix @ text)
            ]  # with and without the reference
        if job["task"] == "T2V":
            likely, scores = (
                scores.masked_fill(barred, -2).topk(min(32, len(names))).indices,
                torch.full_like(scores, -2),
            )
            for j in likely.tolist():
                scores[j] = max((told(names[j]) @ query).tolist(), default=-2)
            barred |= scores > flags.same
        best, which = scores.masked_fill(barred, -2).topk(min(k, len(scores)))
        job["negatives"] = [pool[names[j]]["item"] for j in which[best > -2].tolist()]
        if "reference" in job and job["ranks"][0] >= job["ranks"][1]:
            job |= {
                "fate": "dropped",
                "why": "needs no reference: the target ranks as high without it",
            }
        elif len(job["negatives"]) < k:
            job |= {"fate": "dropped", "why": f"too few negatives: {len(job['negatives'])} of {k}"}
    return [{key: value for key, value in job.items() if key != "near"} for job in jobs]


def assemble(rows, flags):
    """Write <out>/uvrd: a training file per task with media relative to it, and a mixture whose samples keep the shares."""
    folder, mixture = Path(flags.out) / "uvrd", []
    folder.mkdir(exist_ok=True)

    def local(x):
        if isinstance(x, list):
            return [local(item) for item in x]
        return (
            x
            if not isinstance(x, dict)
            else {
                k: os.path.relpath(v, folder)
                if k in ("video", "path") and isinstance(v, str)
                else local(v)
                for k, v in x.items()
            }
        )

    made = collections.Counter(row["task"] for row in rows)
    for task, source in TABLE7.items():
        mine, keys = (
            [row for row in rows if row["task"] == task],
            ("query", "positive", "negatives", "id"),
        )
        write_jsonl(
            folder / f"{task.lower()}.jsonl",
            [{key: local(row[key]) for key in keys if row.get(key)} for row in mine],
        )
        if mine:
            samples = round(flags.share[task] / (flags.share["T2V"] or 1) * made["T2V"]) or len(
                mine
            )
            mixture.append(
                source
                | {
                    "path": f"{task.lower()}.jsonl",
                    "samples": samples,
                    "negatives": flags.negative[task],
                }
            )
            print(f"    {task}: {len(mine)} pairs, {samples} samples in the mixture")
    (folder / "mixture.json.part").write_text(json.dumps(mixture, indent=1) + "\n")
    os.replace(folder / "mixture.json.part", folder / "mixture.json")


def main(flags):
    """Run the stages and print what each kept. Raises ValueError for wrong flags and input."""
    per_video = {
        task: source["samples"] / TABLE7["T2V"]["samples"] for task, source in TABLE7.items()
    }
    flags.share = task_numbers(flags.shares, per_video, float)
    flags.negative = task_numbers(
        flags.negatives, {task: source["negatives"] for task, source in TABLE7.items()}, int
    )
    if flags.prompts == "auto":
        flags.prompts = "short" if flags.captioner == "mini" else "full"
    flags.device = (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if flags.device == "cuda" else flags.device
    )
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
    out, rows = Path(flags.out), inputs(flags)
    if not rows:
        raise ValueError(f"{flags.videos}: nothing in it")
    if flags.dry_run:
        return dry_run(len(rows), flags.share, flags.prompts, flags.frames, flags.max_tokens)
    out.mkdir(parents=True, exist_ok=True)
    now = {"videos": f"of {len(rows)} rows, checksum {zlib.crc32(json.dumps(rows).encode())}"}
    now |= {key: getattr(flags, key) for key in DECISIVE}
    with file_lock(out / "lock"):
        if not (out / "flags.jsonl").exists():
            write_jsonl(out / "flags.jsonl", [now])
        for key, value in load_jsonl(out / "flags.jsonl")[0].items():
            if now[key] != value:
                raise ValueError(
                    f"{out} was begun with --{key.replace('_', '-')} {value}, not {now[key]}: take another --out"
                )
    sizes = {key: getattr(flags, key) for key in ("frames", "max_tokens")}
    prober = functools.cache(lambda: GVE.from_pretrained(flags.prober, device=flags.device))
    rest = {
        k: getattr(flags, k)
        for k in "device batch_size workers max_new_tokens concurrency retries backoff timeout".split()
    }
    asker = functools.cache(lambda: captioner(flags.captioner, **sizes, **rest))
    see = lambda items: encode(prober(), items, **sizes)[0]  # noqa: E731  -> (len(items), D) float32
    ask = lambda requests: asker()(requests) if requests else ()  # noqa: E731
    cut = lambda rows: [rows[i : i + flags.part] for i in range(0, len(rows), flags.part)]  # noqa: E731
    rows = run_sharded(
        out, "1-pool", cut(rows), lambda p, jobs: control(p, jobs, see, flags), flags.shard
    )
    with file_lock(out / "lock"):
        if not (out / "pool.jsonl").exists():
            select(sum(rows, []), flags)
    rows, matrix = (
        load_jsonl(out / "pool.jsonl"),
        torch.from_numpy(np.load(out / "pool.npy")),
    )  # (N, D)
    seconds = print_summary(out, "1-pool", rows)
    useless = dict(
        collections.Counter(row["text_dropped"] for row in rows if "text_dropped" in row)
    )
    print(f"    captions dropped: {useless}; {sum(len(row.get('cuts', ())) for row in rows)} cuts")
    if flags.stages < 2:
        return
    kept = [row for row in rows if row["fate"] == "kept"]
    pool = {
        row["id"]: {**row, "vector": matrix[i], "row": i, "item": {"video": row["video"]}}
        for i, row in enumerate(kept)
    }
    parts = [[job for row in part for job in captions_of(row, flags)] for part in cut(kept)]
    captions = run_sharded(
        out, "2-captions", parts, lambda p, jobs: enrich(jobs, ask, see, pool, flags), flags.shard
    )
    seconds += print_summary(out, "2-captions", sum(captions, []))
    if flags.stages < 3:
        return
    said = {
        row["of"]: row["captions"].values()
        for row in sum(captions, [])
        if (row["fate"], row["kind"]) == ("kept", "video")
    }
    told = functools.lru_cache(100_000)(
        lambda of: see([{"text": text} for text in said.get(of, ())])
    )
    parts = [plan(part, pool, flags) for part in captions]
    pairs = sum(
        run_sharded(
            out,
            "3-pairs",
            parts,
            lambda p, jobs: extend(jobs, ask, see, told, pool, matrix, flags),
            flags.shard,
        ),
        [],
    )
    seconds += print_summary(out, "3-pairs", pairs)
    with file_lock(out / "lock"):
        assemble(good := [row for row in pairs if row["fate"] == "kept"], flags)
    seconds /= max(1, len(good))
    print(
        f"    {seconds:.2f} s a pair; 1.55M pairs at this rate: {seconds * 1.55e6 / 3600:.0f} hours of one such process"
    )
    if failed := sum(row["fate"] == "failed" for row in sum(captions, []) + pairs):
        sys.exit(f"{failed} failed; the same command tries them again")
    if not good:
        sys.exit("not one pair was made; the reasons are above")


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"synth.py: {error}")
