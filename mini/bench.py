"""mini-UVRB and the training sources: which scenes exist, what is asked about them, and which videos are right answers.

Every test query carries a claim (world.py) and its positives are all corpus videos that satisfy it: relevance is computed, complete and
exact. Corpora hold near-twins: families of clips with the same objects that differ in motion or order (CRB-T), place, size or texture
(CRB-S, VDC-O), or camera (CMRB). Training scenes share no set of objects with test scenes.

    from mini.bench import write; write("runs/mini")            # everything, about a minute on 2 cores; `python -m mini render` does this

Layout: <out>/videos/*.mp4, <out>/scenes.jsonl (the graphs), <out>/uvrb/<DS>/jsonl/*.jsonl, <out>/uvrb/benchmark.json, <out>/train/*.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import random
from pathlib import Path

from tqdm import tqdm

from mini import world
from uvrb import DATASETS

SEED = 42
KINDS = {"t": ("motion", "order", "exchange"), "s": ("place", "size", "texture"), "c": ("camera",), "x": ("colour", "theme", "place", "motion")}
SOURCES = {  # name: (task, hard negatives, batch size, instruction of the same spirit as Table 5's, but none of its strings)
    "t2t": ("T2T", 1, 64, "Find a text that describes the same scene."),
    "t2i": ("T2I", 0, 64, "Find the image that matches the given description."),
    "i2t": ("I2T", 0, 64, "Find the text description that corresponds to the given image."),
    "i2i": ("I2I", 0, 64, "Find an image of the same scene according to the given image."),
    "ti2i": ("TI2I", 1, 64, "Find the image that corresponds to the given image changed by the given text."),
    "t2v": ("T2V", 0, 64, "Find the clip that matches the described scene."),
    "t2v-general": ("T2V", 0, 64, "Find the video that includes the general text description."),
    "t2v-spatial": ("T2V", 1, 64, "Find the video according to the spatial description of its objects."),
    "t2v-object": ("T2V", 1, 64, "Find the video that shows the described main object."),
    "t2v-temporal": ("T2V", 2, 64, "Find the video according to the temporal description of its events."),
    "t2v-camera": ("T2V", 2, 64, "Find the video that has the described camera motion."),
    "t2v-event": ("T2V", 1, 64, "Find a video that includes the described event."),
    "t2v-theme": ("T2V", 0, 64, "Find the clip that matches the theme information."),
    "t2v-keywords": ("T2V", 0, 64, "Find the video that matches a series of keywords."),
    "t2v-detail": ("T2V", 1, 64, "Find the video that matches the detailed text description."),
    "t2v-long": ("T2V", 0, 64, "Find the long video that matches the long text description."),
    "i2v": ("I2V", 0, 64, "Find the video that contains the given image."),
    "v2v": ("V2V", 0, 64, "Find the long video that contains the given short video clip."),
    "ti2v": ("TI2V", 2, 64, "Find the video clip that corresponds to the given image changed by the given text."),
    "tv2v": ("TV2V", 2, 64, "Find the video clip that corresponds to the given video changed by the given text.")}


def texts(scene, rng):
    """One text of the world in any of its forms, or a prompt: what the base reads as plain language."""
    forms = [lambda: world.video_caption(scene, rng.choice(world.VIDEO_STYLES), rng, True)[0],
             lambda: world.frame_caption(scene, rng.choice(world.FRAME_STYLES), rng, True)[0],
             lambda: world.spatial(scene, rng, True)[0], lambda: world.temporal(scene, rng)[0], lambda: world.main_object(scene, rng)[0],
             lambda: world.camera(scene, rng)[0], lambda: world.theme(scene, rng)[0], lambda: world.detail(scene, rng)[0],
             lambda: world.story({"scenes": [scene, scene]}, rng)[0],
             lambda: rng.choice([d.prompt for d in DATASETS.values()] + [s[3] for s in SOURCES.values()])]
    return rng.choice(forms)()


# Which videos exist

def graph(video):
    """What a video shows, without the seed of its pixels: equal graphs, equal truths."""
    return json.dumps([{**s, "seed": 0} for s in video["scenes"]], sort_keys=True)


def families(rng, name, n, size, kinds, test):
    """n families of `size` near-twins each. Returns videos with "family", and all but the first with "parent" (an id) and "change"."""
    videos = []
    for f in range(n):
        first = world.sample_scene(rng, test, rng.choices((1, 2, 3), (0, 7, 3))[0], events=0.7 if "order" in kinds else 0.35)
        family = [{"scenes": [first]}]
        while len(family) < size:
            parent = rng.choice(family)
            made = world.change(parent["scenes"][0], rng.choice(kinds), rng, test)
            twin = made and {"scenes": [made[0]], "parent": parent, "change": made[1]}
            if twin and graph(twin) not in map(graph, family):
                family.append(twin)
        for i, v in enumerate(family):
            v.update(id=f"{name}-{f:03}-{i}", family=f"{name}-{f:03}")
        videos += [{**v, "parent": v["parent"]["id"]} if "parent" in v else v for v in family]
    return videos


def singles(rng, name, n, test, scenes=1):
    """n unrelated videos of `scenes` scenes each; a long one shows one or two objects per scene."""
    return [{"id": f"{name}-{i:03}", "family": f"{name}-{i:03}",
             "scenes": [world.sample_scene(rng, test, rng.choice((1, 2)) if scenes > 1 else None, 0.35 * (scenes == 1)) for _ in range(scenes)]}
            for i in range(n)]


def all_videos(seed=SEED):
    """Every video of the world as {group: [video]}: g general, t s c x families (KINDS), long; test groups start with "test-"."""
    groups = {}
    for side, count in (("train", {"g": 320, "t": 80, "s": 60, "c": 45, "x": 45, "long": 120}),
                        ("test", {"g": 200, "t": 40, "s": 40, "c": 40, "long": 100})):
        for kind, n in count.items():
            rng, name, test = random.Random(f"{seed}/{side}/{kind}"), f"{side}-{kind}", side == "test"
            groups[name] = (families(rng, name, n, 5 if test else 4, KINDS[kind], test) if kind in KINDS else
                            singles(rng, name, n, test, 4 if kind == "long" else 1))
    return groups


# Media items; `up` is the way from the file that names them to <out>

def video_item(v, up):
    return {"video": f"{up}/videos/{v['id']}.mp4"}


def frame_item(v, rng, up):
    """A random frame in which every object is seen; the quarter keeps clear of rounding."""
    return {"image": {"video": f"{up}/videos/{v['id']}.mp4", "time": (rng.choice(world.VISIBLE) + 0.25) / world.FPS}}


def clip_item(v, i, up):
    """The i-th scene of a long video as a window."""
    seconds = world.FRAMES / world.FPS
    return {"video": {"path": f"{up}/videos/{v['id']}.mp4", "start": i * seconds, "end": (i + 1) * seconds}}


# mini-UVRB

def ask(corpus, make, n, rng, most=2):
    """Ask n queries: make(video, rng) -> (text, claim) about each video in turn, kept if at most `most` corpus videos satisfy the claim."""
    queries, seen, turn = [], set(), 0
    while len(queries) < n:
        assert turn < 40 * n, "the corpus has too few videos that a claim singles out"
        text, claim = make(corpus[turn % len(corpus)], rng)
        turn += 1
        positives = [] if text in seen else [v["id"] for v in corpus if world.satisfies(v, claim)]
        if 0 < len(positives) <= most:
            seen.add(text)
            queries.append(({"text": text, "claim": claim}, positives, None))
    return queries


def of_scene(form, **options):
    return lambda video, rng: form(video["scenes"][0], rng, **options)


def paragraph(scene, rng):
    """DiDeMo's form: sentences about single events, joined."""
    text, claim = world.temporal(scene, rng)
    return text + " " + world.sentence("it happens", world.mood(scene["theme"], rng)), {**claim, "theme": scene["theme"]}


def moments(videos, n, rng, medium):
    """MomentSeeker's form: a reference and a change, ranked over a pool of 10: right answers, siblings of the reference whose change
    leads elsewhere, clips of other families that show what the text says, and chance ones."""
    by_id, queries = {v["id"]: v for v in videos}, []
    edges = [v for v in videos if "parent" in v]
    for target in rng.sample(edges, n):
        reference = by_id[target["parent"]]
        text, claim = world.composed(target["scenes"][0], target["change"], rng)
        siblings = [v for v in videos if v["family"] == target["family"] and v["id"] not in (target["id"], reference["id"])]
        loose = {**claim, "objects": [{k: x for k, x in o.items() if k != "colour"} for o in claim["objects"] if len(o) > 2]}
        alike = [v for v in videos if v["family"] != target["family"] and world.satisfies(v, loose)]
        pool = [target] + siblings + rng.sample(alike, min(4, len(alike)))
        pool += rng.sample([v for v in videos if v not in pool and v is not reference], 10 - len(pool))
        right = [v["id"] for v in pool if world.satisfies(v, claim)]
        item = frame_item(reference, rng, "../..") if medium == "image" else video_item(reference, "../..")
        queries.append(({"text": text, **item, "claim": claim}, right, [v["id"] for v in pool if v["id"] not in right]))
    return queries


def benchmark(groups, seed=SEED):
    """The 16 datasets: {name: (corpus videos, [(query without id, positive ids, negative ids or None)])}."""
    g, t, s, c, long = (groups[f"test-{k}"] for k in ("g", "t", "s", "c", "long"))
    out = {}

    def add(name, corpus, make, n=200, **options):
        out[name] = corpus, ask(corpus, make, n, random.Random(f"{seed}/{name}"), **options)

    add("MSRVTT", g, of_scene(world.concise, shuffle=True))
    add("DiDeMo", g, of_scene(paragraph))
    add("CRB-G", g, of_scene(world.rich, shuffle=True))
    add("CRB-S", s, of_scene(world.spatial, shuffle=True))
    add("VDC-O", s, of_scene(world.main_object))
    add("CRB-T", t, of_scene(world.temporal))
    add("CMRB", c, of_scene(world.camera), 150, most=10)
    add("DREAM-E", g, of_scene(world.partial), 300)
    add("LoVR-TH", g, of_scene(world.theme), most=10)
    add("PEV-K", g, of_scene(world.keywords, shuffle=True))
    add("LoVR-V", long, world.story, 50)
    add("VDC-D", s, of_scene(world.detail))
    for name, medium in (("MS-TI", "image"), ("MS-TV", "video")):
        queries = moments(t + s + c, 100, random.Random(f"{seed}/{name}"), medium)
        used = {i for _, right, wrong in queries for i in right + wrong}
        out[name] = [v for v in t + s + c if v["id"] in used], queries
    rng = random.Random(f"{seed}/VIS")
    out["MSRVTT-I2V"] = g, [(frame_item(v, rng, "../.."), [v["id"]], None) for v in g]  # pixels, not claims: only its own video has the frame
    out["LoVR-C2V"] = long, [(clip_item(v, rng.randrange(4), "../.."), [v["id"]], None) for v in long]
    return {name: out[name] for name in DATASETS}


# Training sources

def training(groups, seed=SEED):
    """All training rows: {source: [{"query", "positive", "negatives"?, "id"}]}. Hard negatives are near-twins that the query does not fit."""
    g, t, s, c, x, long = (groups[f"train-{k}"] for k in ("g", "t", "s", "c", "x", "long"))
    short, rng = g + t + s + c + x, random.Random(f"{seed}/training")
    by_id, family, rows = {v["id"]: v for v in short}, collections.defaultdict(list), {name: [] for name in SOURCES}
    for v in short:
        family[v["family"]].append(v)
    video, frame = (lambda v: video_item(v, "..")), (lambda v: frame_item(v, rng, ".."))

    def add(name, query, positive, negatives=()):
        want = SOURCES[name][1]
        if len(negatives) >= want:
            row = {"query": query, "positive": positive, "id": f"{name}-{len(rows[name]):04}"}
            rows[name].append({**row, "negatives": rng.sample(list(negatives), want)} if want else row)

    def twins(v, claim):
        """Siblings that do not satisfy the claim; for a lone clip any two others that do not."""
        pool = family[v["family"]] if len(family[v["family"]]) > 1 else rng.sample(g, 4)
        return [u for u in pool if not world.satisfies(u, claim)]

    def describe(name, videos, form, times=1, **options):
        for v in [v for v in videos for _ in range(times)]:
            text, claim = form(v["scenes"][0], rng, **options)
            add(name, {"text": text}, video(v), [video(u) for u in twins(v, claim)])

    for v in rng.sample(short, 800):
        scene, styles = v["scenes"][0], rng.sample((world.concise, world.rich, world.temporal, world.spatial, world.keywords), 2)
        text, claim = styles[0](scene, rng, shuffle=True)
        wrong = [styles[1](u["scenes"][0], rng, shuffle=True) for u in twins(v, claim)]
        add("t2t", {"text": text}, {"text": styles[1](scene, rng, shuffle=True)[0]}, [{"text": t_} for t_, c_ in wrong if not world.holds(scene, c_)])
    for v in rng.sample(short, 600):
        add("t2i", {"text": world.frame_caption(v["scenes"][0], rng.choice(("concise", "rich", "keywords", "concise")), rng, True)[0]}, frame(v))
    for v in rng.sample(short, 400):
        add("i2t", frame(v), {"text": world.frame_caption(v["scenes"][0], rng.choice(("concise", "rich")), rng, True)[0]})
    for v in rng.sample(short, 400):
        add("i2i", frame(v), frame(v))
    describe("t2v", short, world.concise, shuffle=True)
    describe("t2v-general", short, world.rich, shuffle=True)
    describe("t2v-spatial", s + x, world.spatial, 2, shuffle=True)
    describe("t2v-object", s + x + g, world.main_object)
    describe("t2v-temporal", t, world.temporal, 2)
    describe("t2v-temporal", t, paragraph)
    describe("t2v-camera", c, world.camera, 3)
    describe("t2v-event", g + t, world.partial)
    describe("t2v-theme", g + x, world.theme)
    describe("t2v-keywords", g + t + c, world.keywords, shuffle=True)
    describe("t2v-detail", s + t + g, world.detail)
    for v in [v for v in long for _ in range(3)]:
        add("t2v-long", {"text": world.story(v, rng)[0]}, video(v))
    for v in rng.sample(short, 700):
        add("i2v", frame(v), video(v))
    for v in long:
        for i in range(4):
            add("v2v", clip_item(v, i, ".."), video(v))
    for target in [v for v in t + s + c + x for _ in range(2) if "parent" in v]:
        reference, (text, claim) = by_id[target["parent"]], world.composed(target["scenes"][0], target["change"], rng)
        wrong = [u for u in family[target["family"]] if not world.satisfies(u, claim)]  # the reference itself among them
        kind = target["change"]["kind"]
        if kind in ("place", "size", "texture", "colour", "theme"):
            add("ti2i", {"text": text, **frame(reference)}, frame(target), [frame(u) for u in wrong])
        for name, item in (("ti2v", frame(reference)), ("tv2v", video(reference))):
            add(name, {"text": text, **item}, video(target), [video(u) for u in wrong])
    return rows


# Files

def dump(path, rows):
    """Write JSON lines; the file appears whole under its name or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def _render(job):
    path, video = job
    data = world.encode_mp4(world.render(video))
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return path.name, len(data)


def stamp_of(seed):
    """What the rendered files depend on: the seed and the sources of the world."""
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in ("world.py", "bench.py"))
    return hashlib.sha256(code + str(seed).encode()).hexdigest()[:16]


def write(out, seed=SEED, workers=None):
    """Render every video and write mini-UVRB and the training sources below `out`. Does nothing where they are complete and current.

    Returns {"videos", "queries", "pairs", "fresh"}; `fresh` says whether anything was written.
    """
    out, stamp = Path(out), Path(out) / "stamp.json"
    if stamp.is_file():
        known = json.loads(stamp.read_text())
        sizes = known["files"]
        if known["code"] == stamp_of(seed) and all((out / f).is_file() and (out / f).stat().st_size == n for f, n in sizes.items()):
            return {**known["counts"], "fresh": False}
        stamp.unlink()
    groups = all_videos(seed)
    videos = [v for vs in groups.values() for v in vs]
    (out / "videos").mkdir(parents=True, exist_ok=True)
    jobs = [(out / "videos" / f"{v['id']}.mp4", v) for v in videos]
    with multiprocessing.get_context("fork").Pool(workers or os.cpu_count()) as pool:
        list(tqdm(pool.imap_unordered(_render, jobs, 16), "rendering", len(jobs)))
    dump(out / "scenes.jsonl", videos)
    sets, written = benchmark(groups, seed), []
    for name, (corpus, queries) in sets.items():
        folder, ids = out / "uvrb" / name / "jsonl", [f"q{i}" for i in range(len(queries))]
        dump(folder / "corpus.jsonl", [{"id": v["id"], **video_item(v, "../..")} for v in corpus])
        dump(folder / "queries.jsonl", [{"id": i, **q} for i, (q, _, _) in zip(ids, queries, strict=True)])
        dump(folder / "instances.jsonl", [{"qid": i, "pos": pos, **({"neg": neg} if neg else {})}
                                          for i, (_, pos, neg) in zip(ids, queries, strict=True)])
    sizes = {name: {"queries": len(q), "corpus": 10 if q[0][2] else len(v)} for name, (v, q) in sets.items()}
    dump(out / "uvrb" / "benchmark.json", [{"name": "mini-UVRB", "datasets": sizes}])
    rows = training(groups, seed)
    for name, source in rows.items():
        dump(out / "train" / f"{name}.jsonl", source)
    mixture = [{"name": n, "task": task, "path": f"{n}.jsonl", "samples": len(rows[n]), "negatives": k, "batch_size": b, "instruction": text}
               for n, (task, k, b, text) in SOURCES.items()]
    (out / "train" / "mixture.json").write_text(json.dumps(mixture, indent=1) + "\n")
    counts = {"videos": len(videos), "queries": sum(len(q) for _, q in sets.values()), "pairs": sum(map(len, rows.values()))}
    written = [p for folder in ("videos", "uvrb", "train") for p in (out / folder).rglob("*") if p.is_file()]
    dump(stamp, [{"code": stamp_of(seed), "counts": counts, "files": {str(p.relative_to(out)): p.stat().st_size for p in sorted(written)}}])
    return {**counts, "fresh": True}
