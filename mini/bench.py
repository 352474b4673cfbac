"""mini-UVRB and the training sources: which scenes exist, what is asked about them, and which videos are right answers.

Every test query carries a claim (world.py), and its positives are all corpus videos that satisfy it. Corpora hold near-twins:
families of clips with the same objects that differ in motion or order (CRB-T, ten to a family), in place, size or texture (CRB-S,
VDC-O, VDC-D, five), in camera (CMRB, 32, so that finding the family does not win R@10) or in the order of their scenes (LoVR-V,
two). Training scenes share no set of objects with test scenes.

    from mini.bench import write; write("runs/mini")       # everything, under a minute on 2 cores; = `python -m mini render`

Writes <out>/videos/*.mp4, <out>/scenes.jsonl (the graphs), <out>/uvrb/<DS>/jsonl/*.jsonl and benchmark.json, <out>/train/*.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mini import world
from uvrb import DATASETS

SEED = 42
KINDS = {
    "t": ("motion", "order", "exchange"),
    "s": ("place", "size", "texture"),
    "c": ("camera",),
    "x": ("colour", "theme", "place", "motion"),
}  # what the twins of a family differ in
SOURCES = {  # name: (task, hard negatives, instruction of the same spirit as Table 5's, but none of its strings)
    "t2t": ("T2T", 1, "Find a text that describes the same scene."),
    "t2i": ("T2I", 0, "Find the image that matches the given description."),
    "ti2i": (
        "TI2I",
        1,
        "Find the image that corresponds to the given image changed by the given text.",
    ),
    "t2v": ("T2V", 0, "Find the clip that matches the described scene."),
    "t2v-words": ("T2V", 0, "Find the video that the given words or the given event belong to."),
    "t2v-detail": ("T2V", 2, "Find the video that matches the detailed text description."),
    "t2v-spatial": (
        "T2V",
        2,
        "Find the video according to the spatial description of its objects.",
    ),
    "t2v-temporal": (
        "T2V",
        2,
        "Find the video according to the temporal description of its events.",
    ),
    "t2v-camera": ("T2V", 2, "Find the video that has the described camera motion."),
    "t2v-long": ("T2V", 1, "Find the long video that matches the long text description."),
    "i2v": ("I2V", 0, "Find the video that contains the given image."),
    "v2v": ("V2V", 0, "Find the long video that contains the given short video clip."),
    "ti2v": (
        "TI2V",
        2,
        "Find the video clip that corresponds to the given image changed by the given text.",
    ),
    "tv2v": (
        "TV2V",
        2,
        "Find the video clip that corresponds to the given video changed by the given text.",
    ),
}


def texts(scene, rng):
    """One text of the world in any of its forms, or a prompt: what the base reads as plain language."""
    forms = [
        *world.VIDEO_STYLES.values(),
        *world.FRAME_STYLES.values(),
        world.spatial,
        world.temporal,
        world.paragraph,
        world.main_object,
        world.camera,
        world.theme,
        world.detail,
        None,
    ]
    form = rng.choice(forms)
    if form is None:
        prompts = [d.prompt for d in DATASETS.values()] + [
            instruction for *_, instruction in SOURCES.values()
        ]
        return rng.choice([world.story({"scenes": [scene, scene]}, rng)[0], rng.choice(prompts)])
    return form(scene, rng)[0]


# Which videos exist


def families(rng, name, n, size, kinds, test, star=False):
    """n families of `size` near-twins; all but a family's first carry "parent" (an id) and "change" (what leads here from it).

    star: the first is the parent of all, so that no twin is nearer to it than another.
    """
    videos = []
    for f in range(n):
        family = [
            {
                "scenes": [
                    world.sample_scene(
                        rng, test, rng.choice((2, 2, 3)), events=0.7 if "order" in kinds else 0.35
                    )
                ]
            }
        ]
        while len(family) < size:
            parent = family[0] if star else rng.choice(family)
            made = world.change(parent["scenes"][0], rng.choice(kinds), rng, test)
            if made and all(
                {**made[0], "seed": 0} != {**v["scenes"][0], "seed": 0} for v in family
            ):
                family.append(
                    {
                        "scenes": [made[0]],
                        "parent": f"{name}-{f:03}-{family.index(parent)}",
                        "change": made[1],
                    }
                )
        videos += [
            {"id": f"{name}-{f:03}-{i}", "family": f"{name}-{f:03}", **v}
            for i, v in enumerate(family)
        ]
    return videos


def filmed(rng, name, n, size, test):
    """n families of `size` twins that differ in their camera alone, two moves for most; otherwise like a star of families()."""
    videos = []
    for f in range(n):
        scene, cameras = world.sample_scene(rng, test, rng.choice((2, 2, 3))), []
        while len(cameras) < size:
            moves = world.sample_moves(rng, world.CAMERAS, rng.random() < 0.7)
            cameras += [moves] if moves not in cameras else []
        for i, moves in enumerate(cameras):
            change = {"kind": "camera", "object": scene["objects"][0]["shape"], "to": moves}
            videos.append(
                {
                    "id": f"{name}-{f:03}-{i}",
                    "family": f"{name}-{f:03}",
                    "scenes": [{**scene, "camera": moves, "seed": rng.getrandbits(32)}],
                    **({"parent": f"{name}-{f:03}-0", "change": change} if i else {}),
                }
            )
    return videos


def singles(rng, name, n, test, scenes):
    """n unrelated videos; a long one has several scenes of one or two objects each."""
    scene = lambda: world.sample_scene(rng, test, *((rng.choice((1, 2)), 0) if scenes > 1 else ()))  # noqa: E731
    return [
        {
            "id": f"{name}-{i:03}",
            "family": f"{name}-{i:03}",
            "scenes": [scene() for _ in range(scenes)],
        }
        for i in range(n)
    ]


def retold(rng, videos):
    """A twin of each long video: the same scenes, filmed again, in another order."""
    twins = []
    for v in videos:
        while (scenes := rng.sample(v["scenes"], len(v["scenes"]))) == v["scenes"]:
            pass
        twins.append(
            {
                **v,
                "id": v["id"] + "-1",
                "scenes": [{**s, "seed": rng.getrandbits(32)} for s in scenes],
            }
        )
    return twins


def all_videos(seed=SEED):
    """Every video of the world, {"train-g" | "test-g" | ...: [video]}: g general, t s c x families (KINDS), long, retold."""
    groups = {}
    for side, count in (
        (
            "train",
            {
                "g": (240, 1),
                "t": (130, 4),
                "s": (150, 4),
                "c": (80, 4),
                "x": (60, 4),
                "long": (60, 4),
            },
        ),
        ("test", {"g": (200, 1), "t": (20, 10), "s": (40, 5), "c": (6, 32), "long": (100, 4)}),
    ):
        for kind, (n, size) in count.items():
            rng, name, test = (
                random.Random(f"{seed}/{side}/{kind}"),
                f"{side}-{kind}",
                side == "test",
            )
            groups[name] = (
                filmed(rng, name, n, size, test)
                if kind == "c"
                else families(rng, name, n, size, KINDS[kind], test, star=True)
                if kind in KINDS
                else singles(rng, name, n, test, size)
            )
            if kind == "long":
                groups[f"{side}-retold"] = retold(rng, groups[name][: 50 if test else n])
    return groups


# Media items; `up` is the way from the file that names them to <out>


def path_of(v, up):
    return f"{up}/videos/{v['id']}.mp4"


def frame_item(v, rng, up):
    """A random frame in which every object is seen; the quarter keeps clear of rounding."""
    return {
        "image": {"video": path_of(v, up), "time": (rng.choice(world.VISIBLE) + 0.25) / world.FPS}
    }


def clip_item(v, i, up):
    """The i-th scene of a long video as a window."""
    seconds = world.FRAMES / world.FPS
    return {"video": {"path": path_of(v, up), "start": i * seconds, "end": (i + 1) * seconds}}


# mini-UVRB


def ask(corpus, form, n, rng, most):
    """Ask n queries, form(scene or long video) -> (text, claim) of each video in turn; at most `most` videos satisfy a claim."""
    queries, seen, turn = [], set(), 0
    while len(queries) < n:
        assert turn < 40 * n, "the corpus has too few videos that a claim singles out"
        v = corpus[turn % len(corpus)]
        (text, claim), turn = form(v if form is world.story else v["scenes"][0], rng), turn + 1
        positives = [] if text in seen else [u["id"] for u in corpus if world.satisfies(u, claim)]
        if 0 < len(positives) <= most:
            seen.add(text)
            queries.append(({"text": text, "claim": claim}, positives, None))
    return queries


def moments(videos, n, rng, medium):
    """MomentSeeker's form: a reference and a change, ranked over a pool of 10: right answers, four more clips that are one change
    away from the reference, clips of other families that show what the text says, and chance ones."""
    by_id, queries = {v["id"]: v for v in videos}, []
    for target in rng.sample([v for v in videos if "parent" in v], n):
        reference = by_id[target["parent"]]
        text, claim = world.composed(target["scenes"][0], target["change"], rng)
        others = [v for v in videos if v not in (target, reference)]
        siblings = [v for v in others if v["family"] == target["family"]]
        siblings = rng.sample(siblings, min(4, len(siblings)))
        loose = {
            **claim,
            "objects": [
                {k: x for k, x in o.items() if k != "colour"}
                for o in claim["objects"]
                if len(o) > 2
            ],
        }
        alike = [v for v in others if v["family"] != target["family"] and world.satisfies(v, loose)]
        pool = [target] + siblings + rng.sample(alike, min(4, len(alike)))
        pool += rng.sample([v for v in others if v not in pool], 10 - len(pool))
        right = [v["id"] for v in pool if world.satisfies(v, claim)]
        item = (
            frame_item(reference, rng, "../..")
            if medium == "image"
            else {"video": path_of(reference, "../..")}
        )
        queries.append(
            (
                {"text": text, **item, "claim": claim},
                right,
                [v["id"] for v in pool if v["id"] not in right],
            )
        )
    return queries


def benchmark(groups, seed=SEED):
    """The 16 datasets: {name: (corpus videos, [(query without id, positive ids, negative ids or None)])}."""
    g, t, s, c, long, again = (groups[f"test-{k}"] for k in ("g", "t", "s", "c", "long", "retold"))
    pairs = [v for pair in zip(long, again, strict=False) for v in pair]
    shuffled = lambda form: lambda scene, rng: form(scene, rng, shuffle=True)  # noqa: E731
    recipes = {
        "MSRVTT": (g, shuffled(world.concise), 200, 2),
        "DiDeMo": (g, world.paragraph, 200, 2),
        "CRB-G": (g, shuffled(world.rich), 200, 2),
        "CRB-S": (s, shuffled(world.spatial), 200, 2),
        "VDC-O": (s, world.main_object, 200, 1),
        "CRB-T": (t, world.temporal, 200, 2),
        "CMRB": (c + g[:8], world.camera, 150, 10),
        "DREAM-E": (g, world.partial, 250, 1),
        "LoVR-TH": (g, world.theme, 200, 10),
        "PEV-K": (g, shuffled(world.keywords), 200, 2),
        "LoVR-V": (pairs, world.story, 100, 2),
        "VDC-D": (s, world.detail, 200, 2),
    }
    out = {
        name: (corpus, ask(corpus, form, n, random.Random(f"{seed}/{name}"), most))
        for name, (corpus, form, n, most) in recipes.items()
    }
    for name, medium in (("MS-TI", "image"), ("MS-TV", "video")):
        queries = moments(t + s + c, 100, random.Random(f"{seed}/{name}"), medium)
        used = {i for _, right, wrong in queries for i in right + wrong}
        out[name] = [v for v in t + s + c if v["id"] in used], queries
    rng = random.Random(
        f"{seed}/VIS"
    )  # pixels, not claims: a frame or window belongs to the one video it was cut from
    out["MSRVTT-I2V"] = g, [(frame_item(v, rng, "../.."), [v["id"]], None) for v in g]
    out["LoVR-C2V"] = (
        long,
        [(clip_item(v, rng.randrange(4), "../.."), [v["id"]], None) for v in long],
    )
    return {name: out[name] for name in DATASETS}


# Training sources


def training(groups, seed=SEED):
    """All training rows, {source: [{"query", "positive", "negatives"?, "id"}]}; hard negatives are twins that do not fit."""
    g, t, s, c, x, long, again = (
        groups[f"train-{k}"] for k in ("g", "t", "s", "c", "x", "long", "retold")
    )
    short, rng = g + t + s + c + x, random.Random(f"{seed}/training")
    by_id, family, rows = (
        {v["id"]: v for v in short},
        collections.defaultdict(list),
        {name: [] for name in SOURCES},
    )
    for v in short:
        family[v["family"]].append(v)
    video, frame = (lambda v: {"video": path_of(v, "..")}), (lambda v: frame_item(v, rng, ".."))

    def add(name, query, positive, negatives=()):
        k = SOURCES[name][1]
        if len(negatives) >= k:
            chosen = {"negatives": rng.sample(list(negatives), k)} if k else {}
            rows[name].append(
                {
                    "query": query,
                    "positive": positive,
                    **chosen,
                    "id": f"{name}-{len(rows[name]):04}",
                }
            )

    def others(v):
        """The siblings of a clip, or any four clips where it has none."""
        return family[v["family"]] if len(family[v["family"]]) > 1 else rng.sample(g, 4)

    def describe(name, videos, form, times=1, **options):
        for v in videos * times:
            text, claim = form(v["scenes"][0], rng, **options)
            add(
                name,
                {"text": text},
                video(v),
                [video(u) for u in others(v) if not world.satisfies(u, claim)],
            )

    for v in rng.sample(short, 800):
        one, two = rng.sample(
            (world.concise, world.rich, world.temporal, world.spatial, world.keywords), 2
        )
        wrong = [two(u["scenes"][0], rng, shuffle=True) for u in others(v)]
        add(
            "t2t",
            *({"text": form(v["scenes"][0], rng, shuffle=True)[0]} for form in (one, two)),
            [{"text": text} for text, claim in wrong if not world.satisfies(v, claim)],
        )

    def still(v, *styles):
        return {
            "text": world.FRAME_STYLES[rng.choice(styles)](v["scenes"][0], rng, shuffle=True)[0]
        }

    for v in rng.sample(short, 600):
        add("t2i", still(v, "concise", "rich", "keywords"), frame(v))
    describe("t2v", short, world.concise, shuffle=True)
    describe("t2v-words", short, world.keywords, shuffle=True)
    describe("t2v-words", g + x, world.theme)
    describe("t2v-words", g + t, world.partial)
    describe("t2v-detail", short, world.rich, shuffle=True)
    describe("t2v-detail", s + t, world.detail)
    describe("t2v-spatial", s + x, world.spatial, shuffle=True)
    describe("t2v-spatial", s + x, world.main_object)
    describe("t2v-temporal", t, world.temporal, 2)
    describe("t2v-temporal", t, world.paragraph)
    describe("t2v-camera", c, world.camera, 3)
    for pair in zip(long, again, strict=True):
        for v, twin in (pair, pair[::-1]):
            for i in range(4):
                add("t2v-long", {"text": world.story(v, rng)[0]}, video(v), [video(twin)])
                add("v2v", clip_item(v, i, ".."), video(v))
    for v in rng.sample(short, 700):
        add("i2v", frame(v), video(v))
    for target in [v for v in t + s + c + x for _ in range(2) if "parent" in v]:
        reference, (text, claim) = (
            by_id[target["parent"]],
            world.composed(target["scenes"][0], target["change"], rng),
        )
        wrong = [
            u for u in family[target["family"]] if not world.satisfies(u, claim)
        ]  # the reference itself among them
        if target["change"]["kind"] not in ("motion", "camera"):
            add(
                "ti2i", {"text": text, **frame(reference)}, frame(target), [frame(u) for u in wrong]
            )
        add("ti2v", {"text": text, **frame(reference)}, video(target), [video(u) for u in wrong])
        add("tv2v", {"text": text, **video(reference)}, video(target), [video(u) for u in wrong])
    return rows


# Files


def put(path, content):
    """Write bytes, or rows as JSON lines; the file appears whole under its name or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(
        content
        if isinstance(content, bytes)
        else "".join(json.dumps(row) + "\n" for row in content).encode()
    )
    os.replace(part, path)


def _render(job):
    path, video = job
    put(path, world.encode_mp4(np.concatenate([world.render_scene(s) for s in video["scenes"]])))


def write(out, seed=SEED, workers=None):
    """Render every video and write mini-UVRB and the training sources below `out`; nothing where they are complete and current.

    Returns {"videos", "queries", "pairs", "fresh"}; `fresh` says whether anything was written.
    """
    out, stamp = Path(out), Path(out) / "stamp.json"
    code = b"".join(
        (Path(__file__).parent / name).read_bytes() for name in ("world.py", "bench.py")
    )
    code = hashlib.sha256(code + str(seed).encode()).hexdigest()[:16]
    if stamp.is_file():
        known = json.loads(stamp.read_text())
        whole = all(
            (out / f).is_file() and (out / f).stat().st_size == n for f, n in known["files"].items()
        )
        if known["code"] == code and whole:
            return {**known["counts"], "fresh": False}
        stamp.unlink()
    groups = all_videos(seed)
    videos = [v for vs in groups.values() for v in vs]
    with multiprocessing.get_context("fork").Pool(workers or os.cpu_count()) as pool:
        list(
            tqdm(
                pool.imap_unordered(_render, [(out / path_of(v, "."), v) for v in videos], 16),
                "rendering",
                len(videos),
            )
        )
    put(out / "scenes.jsonl", videos)
    sets, rows, sizes = benchmark(groups, seed), training(groups, seed), {}
    for name, (corpus, queries) in sets.items():
        folder = out / "uvrb" / name / "jsonl"
        sizes[name] = {"queries": len(queries), "corpus": 10 if queries[0][2] else len(corpus)}
        put(
            folder / "corpus.jsonl", [{"id": v["id"], "video": path_of(v, "../..")} for v in corpus]
        )
        put(
            folder / "queries.jsonl",
            [{"id": f"q{i}", **query} for i, (query, _, _) in enumerate(queries)],
        )
        put(
            folder / "instances.jsonl",
            [
                {"qid": f"q{i}", "pos": pos, **({"neg": neg} if neg else {})}
                for i, (_, pos, neg) in enumerate(queries)
            ],
        )
    put(out / "uvrb" / "benchmark.json", [{"name": "mini-UVRB", "datasets": sizes}])
    for name, source in rows.items():
        put(out / "train" / f"{name}.jsonl", source)
    mixture = [
        {
            "name": name,
            "task": task,
            "path": f"{name}.jsonl",
            "samples": len(rows[name]),
            "negatives": k,
            "batch_size": 64,
            "instruction": text,
        }
        for name, (task, k, text) in SOURCES.items()
    ]
    put(out / "train" / "mixture.json", json.dumps(mixture, indent=1).encode() + b"\n")
    put(
        out / "train" / "coarse.json",
        json.dumps([m for m in mixture if m["name"] in ("t2v", "t2i")], indent=1).encode() + b"\n",
    )
    counts = {
        "videos": len(videos),
        "queries": sum(len(q) for _, q in sets.values()),
        "pairs": sum(map(len, rows.values())),
    }
    files = [
        p
        for part in ("videos", "uvrb", "train")
        for p in sorted((out / part).rglob("*"))
        if p.is_file()
    ]
    put(
        stamp,
        [
            {
                "code": code,
                "counts": counts,
                "files": {str(p.relative_to(out)): p.stat().st_size for p in files},
            }
        ],
    )
    return {**counts, "fresh": True}


# Raw videos for synth.py: weak captions, planted faults

EMPTY_TEXTS = (  # texts that describe nothing, as folders of web videos hold them
    "",
    "IMG_2041.MP4",
    "Untitled",
    "https://example.org/watch?v=8f3a",
    "Like and subscribe for more videos!",
    "clip",
    "final_v2.mov",
    "video video video video video video",
    "Stock footage, royalty free, 4K",
    "красная звезда движется влево",
    "Click the link below",
    "All rights reserved. Copyright 2021",
    "www.example.com",
    "DSC00127",
    "no description",
    "a a a a a a a a a a",
    "红色的圆圈向左移动",
)
DAMAGE = {
    "empty": lambda mp4: b"",
    "text": lambda mp4: b"<html>404</html>",
    "cut": lambda mp4: mp4[: len(mp4) // 2],
    "small": lambda mp4: world.encode_mp4(world.decode_mp4(mp4)[:, ::4, ::4]),
    "short": lambda mp4: world.encode_mp4(world.decode_mp4(mp4)[:3]),
}  # unreadable, or of less use than nothing


def weak_caption(scene, rng):
    """What an uploader might write: one event, a concise caption, or (in three of ten) a concise one with one thing wrong."""
    kind = rng.choices(("partial", "concise", "slip"), (2, 5, 3))[0]
    if kind == "partial":
        return world.partial(scene, rng)[0]
    slip = (
        world.change(scene, rng.choice(("colour", "motion")), rng, False)
        if kind == "slip"
        else None
    )
    return world.concise(slip[0] if slip else scene, rng)[0]


def again(mp4):
    """The same clip as another upload: a pixel to the side, brighter, and compressed once more."""
    frames = np.roll(world.decode_mp4(mp4), 1, axis=2).astype(float)
    return world.encode_mp4(np.clip(frames * 1.06 + 4, 0, 255).astype(np.uint8))


def raw(out, seed=SEED, n=12, faults=20):
    """Write raw videos of training scenes with weak captions and planted faults: <out>/videos, captions.jsonl and truth.jsonl.

    n families of four near-twins for each of KINDS, as many long videos; `faults` videos with each of: a wrong caption, a text
    that describes nothing, no motion, damage, an exact copy, a copy encoded again. truth.jsonl names a video's scenes and fault.
    """
    out, rng, videos = Path(out), random.Random(f"{seed}/raw"), []
    for kind, kinds in KINDS.items():
        videos += families(rng, f"raw-{kind}", n, 4, kinds, False)
    videos += singles(rng, "raw-long", n, False, 4)
    for fault in ("wrong", "boilerplate", "static", "broken"):
        videos += [{**v, "fault": fault} for v in singles(rng, f"raw-{fault}", faults, False, 1)]
    for v in videos:
        if v.get("fault") == "static":
            v["scenes"] = [
                {
                    **s,
                    "camera": ["static"],
                    "objects": [{**o, "motion": ["still"]} for o in s["objects"]],
                }
                for s in v["scenes"]
            ]
        elif all(
            s["camera"] == ["static"] and all(o["motion"] == ["still"] for o in s["objects"])
            for s in v["scenes"]
        ):
            v["fault"] = "static"  # by chance
        v["text"] = " ".join(weak_caption(s, rng) for s in v["scenes"])
    for i, v in enumerate(videos):
        if v.get("fault") == "boilerplate":
            v["text"] = EMPTY_TEXTS[i % len(EMPTY_TEXTS)]
        elif (
            v.get("fault") == "wrong"
        ):  # of a scene that shares no object and no theme with this one
            while True:
                other = world.sample_scene(rng, False)
                mine, looks = (
                    v["scenes"][0],
                    lambda s: (
                        {o["colour"] for o in s["objects"]} | {o["shape"] for o in s["objects"]}
                    ),
                )
                if other["theme"] != mine["theme"] and not looks(other) & looks(mine):
                    break
            v["text"] = world.concise(other, rng)[0]
    rng.shuffle(videos)
    sound = [v for v in videos if "fault" not in v]
    for fault in ("copy", "again"):
        of = rng.sample(sound, faults)
        videos += [
            {**v, "id": f"raw-{fault}-{i:03}", "fault": fault, "of": v["id"]}
            for i, v in enumerate(of)
        ]
    with multiprocessing.get_context("fork").Pool() as pool:
        jobs = [(out / path_of(v, "."), v) for v in videos if "of" not in v]
        list(tqdm(pool.imap_unordered(_render, jobs, 16), "rendering raw videos", len(jobs)))
    for i, v in enumerate(videos):
        path = out / path_of(v, ".")
        if "of" in v:
            data = (out / path_of({"id": v["of"]}, ".")).read_bytes()
            put(path, again(data) if v["fault"] == "again" else data)
        elif v.get("fault") == "broken":
            put(path, list(DAMAGE.values())[i % len(DAMAGE)](path.read_bytes()))
    put(
        out / "captions.jsonl",
        [{"id": v["id"], "video": path_of(v, "."), "text": v["text"]} for v in videos],
    )
    put(
        out / "truth.jsonl",
        [
            {key: v[key] for key in ("id", "scenes", "fault", "of", "text") if key in v}
            for v in videos
        ],
    )
    return len(videos)
