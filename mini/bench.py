"""mini-UVRB and the training sources: which videos exist, what is asked, which answers are right.

Every test query carries a claim (world.py); its positives are all corpus videos that satisfy it.
Corpora hold families of near-twins, clips with the same objects that differ in

    motion or order of events      CRB-T, ten to a family
    place, size or texture         CRB-S, VDC-O, VDC-D, five to a family
    camera                         CMRB, 32 to a family: finding the family does not win R@10
    order of scenes                LoVR-V, two to a family

No training scene shows the same set of objects as a test scene.

    from mini.bench import write
    write("runs/mini")      # `python -m mini render`: everything, under a minute on two cores

writes below runs/mini: videos/*.mp4, scenes.jsonl (the scene graphs), uvrb/<DS>/jsonl/*.jsonl with
uvrb/benchmark.json, train/*.jsonl with train/mixture.json. As in world.py, the order of random
draws is part of the data.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mini import world
from support.files import whole_file, write_json
from support.progress import track
from uvrb import DATASETS

SEED = 42

# The differences between the twins of a family: world.change's kinds.
KINDS = {
    "t": ("motion", "order", "exchange"),
    "s": ("place", "size", "texture"),
    "c": ("camera",),
    "x": ("colour", "theme", "place", "motion"),
}

# Groups of videos: {kind: (how many families, how many videos in each)} for the KINDS;
# {kind: (how many videos, how many scenes in each)} for g, general clips, and long.
GROUPS = {
    "train": {
        "g": (240, 1),
        "t": (130, 4),
        "s": (150, 4),
        "c": (80, 4),
        "x": (60, 4),
        "long": (60, 4),
    },
    "test": {
        "g": (200, 1),
        "t": (20, 10),
        "s": (40, 5),
        "c": (6, 32),
        "long": (100, 4),
    },
}


@dataclasses.dataclass(frozen=True)
class TrainingSource:
    """The entry of a mixture, without the rows."""

    task: str
    negatives: int  # hard negatives per row
    instruction: str  # in the spirit of Table 5's, but none of its strings


SOURCES = {
    "t2t": TrainingSource("T2T", 1, "Find a text that describes the same scene."),
    "t2i": TrainingSource("T2I", 0, "Find the image that matches the given description."),
    "ti2i": TrainingSource(
        "TI2I",
        1,
        "Find the image that corresponds to the given image changed by the given text.",
    ),
    "t2v": TrainingSource("T2V", 0, "Find the clip that matches the described scene."),
    "t2v-words": TrainingSource(
        "T2V", 0, "Find the video that the given words or the given event belong to."
    ),
    "t2v-detail": TrainingSource(
        "T2V", 2, "Find the video that matches the detailed text description."
    ),
    "t2v-spatial": TrainingSource(
        "T2V", 2, "Find the video according to the spatial description of its objects."
    ),
    "t2v-temporal": TrainingSource(
        "T2V", 2, "Find the video according to the temporal description of its events."
    ),
    "t2v-camera": TrainingSource("T2V", 2, "Find the video that has the described camera motion."),
    "t2v-long": TrainingSource(
        "T2V", 1, "Find the long video that matches the long text description."
    ),
    "i2v": TrainingSource("I2V", 0, "Find the video that contains the given image."),
    "v2v": TrainingSource(
        "V2V", 0, "Find the long video that contains the given short video clip."
    ),
    "ti2v": TrainingSource(
        "TI2V",
        2,
        "Find the video clip that corresponds to the given image changed by the given text.",
    ),
    "tv2v": TrainingSource(
        "TV2V",
        2,
        "Find the video clip that corresponds to the given video changed by the given text.",
    ),
}


def random_text(scene, rng):
    """Write a text about a scene in any of the world's forms, or one of the benchmark's prompts.

    The base learns its language from these texts (pretrain.py).
    """
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
    if form is not None:
        text, _ = form(scene, rng)
        return text

    long_text, _ = world.story({"scenes": [scene, scene]}, rng)
    prompts = [dataset.prompt for dataset in DATASETS.values()]
    prompts += [source.instruction for source in SOURCES.values()]
    return rng.choice([long_text, rng.choice(prompts)])


# Videos


def same_graph(scene, other):
    """Say whether two scenes differ in their seeds at most."""
    return {**scene, "seed": 0} == {**other, "seed": 0}


def families(rng, name, n, size, kinds, test, star=False):
    """Draw n families of `size` near-twins that differ in one of `kinds`.

    All but the first of a family carry "parent", an id, and "change", the difference to the parent.
    star: the first is the parent of all, so that no twin is nearer to it than another.
    """
    videos = []
    events = 0.7 if "order" in kinds else 0.35
    for number in range(n):
        family_id = f"{name}-{number:03}"
        count = rng.choice((2, 2, 3))
        scene = world.sample_scene(rng, test, count, events)
        family = [{"id": f"{family_id}-0", "family": family_id, "scenes": [scene]}]

        while len(family) < size:
            parent = family[0] if star else rng.choice(family)
            kind = rng.choice(kinds)
            made = world.change(parent["scenes"][0], kind, rng, test)
            if made is None:
                continue
            twin, difference = made
            if any(same_graph(twin, video["scenes"][0]) for video in family):
                continue

            family.append(
                {
                    "id": f"{family_id}-{len(family)}",
                    "family": family_id,
                    "scenes": [twin],
                    "parent": parent["id"],
                    "change": difference,
                }
            )
        videos += family
    return videos


def camera_families(rng, name, n, size, test):
    """Draw n families of `size` twins that differ in the camera alone, which mostly moves twice.

    The first of a family is the parent of all, as in a star of families().
    """
    videos = []
    for number in range(n):
        family_id = f"{name}-{number:03}"
        scene = world.sample_scene(rng, test, rng.choice((2, 2, 3)))
        cameras = []
        while len(cameras) < size:
            moves = world.sample_moves(rng, world.CAMERAS, rng.random() < 0.7)
            if moves not in cameras:
                cameras.append(moves)

        for i, moves in enumerate(cameras):
            video = {
                "id": f"{family_id}-{i}",
                "family": family_id,
                "scenes": [{**scene, "camera": moves, "seed": rng.getrandbits(32)}],
            }
            if i > 0:
                shape = scene["objects"][0]["shape"]
                video["parent"] = f"{family_id}-0"
                video["change"] = {"kind": "camera", "object": shape, "to": moves}
            videos.append(video)
    return videos


def singles(rng, name, n, test, scenes):
    """Draw n unrelated videos of so many scenes; those of several hold one or two objects each."""
    videos = []
    for number in range(n):
        video_id = f"{name}-{number:03}"
        graphs = []
        for _ in range(scenes):
            if scenes == 1:
                scene = world.sample_scene(rng, test)
            else:
                scene = world.sample_scene(rng, test, rng.choice((1, 2)), events=0)
            graphs.append(scene)
        videos.append({"id": video_id, "family": video_id, "scenes": graphs})
    return videos


def retold(rng, videos):
    """Make a twin of each long video: the same scenes, filmed again, in another order."""
    twins = []
    for video in videos:
        scenes = video["scenes"]
        while scenes == video["scenes"]:
            scenes = rng.sample(video["scenes"], len(video["scenes"]))
        filmed_again = [{**scene, "seed": rng.getrandbits(32)} for scene in scenes]
        twins.append({**video, "id": video["id"] + "-1", "scenes": filmed_again})
    return twins


def all_videos(seed=SEED):
    """Draw every video of the world: {"train-g": [video, ...], ...}, by side and kind.

    Beside those of GROUPS there are train-retold and test-retold, twins of the long videos (on the
    test side of every second one).
    """
    groups = {}
    for side, numbers in GROUPS.items():
        test = side == "test"
        for kind, (n, size) in numbers.items():
            name = f"{side}-{kind}"
            rng = random.Random(f"{seed}/{side}/{kind}")
            if kind == "c":
                groups[name] = camera_families(rng, name, n, size, test)
            elif kind in KINDS:
                groups[name] = families(rng, name, n, size, KINDS[kind], test, star=True)
            else:
                groups[name] = singles(rng, name, n, test, size)
            if kind == "long":
                retold_of = 50 if test else n
                groups[f"{side}-retold"] = retold(rng, groups[name][:retold_of])
    return groups


# Media items. `up` is the way from the folder of the file that names them to <out>.


def path_of(video, up):
    """Return the path of a video's file."""
    return f"{up}/videos/{video['id']}.mp4"


def video_item(video, up):
    """Return a whole video as an item."""
    return {"video": path_of(video, up)}


def frame_item(video, rng, up):
    """Draw a frame in which every object is visible."""
    frame = rng.choice(world.VISIBLE)
    # A quarter of a frame later, so that no rounding picks its neighbour.
    seconds = (frame + 0.25) / world.FPS
    return {"image": {"video": path_of(video, up), "time": seconds}}


def clip_item(video, i, up):
    """Return the i-th scene of a long video as a window of it."""
    seconds = world.FRAMES / world.FPS
    start = i * seconds
    return {"video": {"path": path_of(video, up), "start": start, "end": start + seconds}}


# mini-UVRB


class Query(NamedTuple):
    """One test query: its row without an id, ids of right answers, and of wrong ones.

    negatives is None where the query is ranked over the whole corpus, not over a pool.
    """

    row: dict
    positives: list
    negatives: list | None


class Recipe(NamedTuple):
    """How a text-to-video dataset is made."""

    corpus: list
    form: object  # (scene or long video, rng) -> (text, claim)
    queries: int
    most: int  # right answers of a query


def ask(recipe, rng):
    """Write a recipe's queries, about each video in turn, and find all right answers.

    A text is dropped if it has been asked before or if too many videos satisfy its claim.
    """
    corpus = recipe.corpus
    queries = []
    asked = set()
    turn = 0
    while len(queries) < recipe.queries:
        assert turn < 40 * recipe.queries, "the corpus has too few videos that a claim singles out"
        video = corpus[turn % len(corpus)]
        turn += 1
        subject = video if recipe.form is world.story else video["scenes"][0]
        text, claim = recipe.form(subject, rng)
        if text in asked:
            continue
        positives = [v["id"] for v in corpus if world.satisfies(v, claim)]
        if 0 < len(positives) <= recipe.most:
            asked.add(text)
            queries.append(Query({"text": text, "claim": claim}, positives, None))
    return queries


def news_of(claim):
    """Return the part of a composed query's claim that its text alone states: the changed thing."""
    news = []
    for o in claim["objects"]:
        if len(o) > 2:  # more than a colour and a shape
            news.append({key: value for key, value in o.items() if key != "colour"})
    return {**claim, "objects": news}


def moments(videos, n, rng, medium):
    """Write n queries in MomentSeeker's form: a reference and a change, over a pool of ten.

    The pool: right answers, up to four more clips of the family, up to four clips of other families
    that show the changed thing, and random ones.
    """
    by_id = {video["id"]: video for video in videos}
    queries = []
    targets = [video for video in videos if "parent" in video]
    for target in rng.sample(targets, n):
        reference = by_id[target["parent"]]
        text, claim = world.composed(target["scenes"][0], target["change"], rng)
        others = [v for v in videos if v not in (target, reference)]

        family = target["family"]
        siblings = [v for v in others if v["family"] == family]
        siblings = rng.sample(siblings, min(4, len(siblings)))
        news = news_of(claim)
        alike = [v for v in others if v["family"] != family and world.satisfies(v, news)]
        alike = rng.sample(alike, min(4, len(alike)))
        pool = [target, *siblings, *alike]
        rest = [v for v in others if v not in pool]
        pool += rng.sample(rest, 10 - len(pool))

        right = [v["id"] for v in pool if world.satisfies(v, claim)]
        wrong = [v["id"] for v in pool if v["id"] not in right]
        if medium == "image":
            item = frame_item(reference, rng, "../..")
        else:
            item = video_item(reference, "../..")
        queries.append(Query({"text": text, **item, "claim": claim}, right, wrong))
    return queries


def benchmark(groups, seed=SEED):
    """Make the 16 datasets, {name: (corpus videos, [Query, ...])}, each as its namesake was built.

    The test side of all_videos() is all that is read of `groups`.
    """
    general = groups["test-g"]
    motions = groups["test-t"]
    looks = groups["test-s"]
    cameras = groups["test-c"]
    long = groups["test-long"]
    long_twins = []
    for video, twin in zip(long, groups["test-retold"], strict=False):
        long_twins += [video, twin]

    def shuffled(form):
        return functools.partial(form, shuffle=True)

    recipes = {
        # coarse
        "MSRVTT": Recipe(general, shuffled(world.concise), 200, 2),
        "DiDeMo": Recipe(general, world.paragraph, 200, 2),
        "CRB-G": Recipe(general, shuffled(world.rich), 200, 2),
        # fine: spatial, temporal, partially relevant
        "CRB-S": Recipe(looks, shuffled(world.spatial), 200, 2),
        "VDC-O": Recipe(looks, world.main_object, 200, 1),
        "CRB-T": Recipe(motions, world.temporal, 200, 2),
        "CMRB": Recipe(cameras + general[:8], world.camera, 150, 10),
        "DREAM-E": Recipe(general, world.partial, 250, 1),
        "LoVR-TH": Recipe(general, world.theme, 200, 10),
        "PEV-K": Recipe(general, shuffled(world.keywords), 200, 2),
        # long context
        "LoVR-V": Recipe(long_twins, world.story, 100, 2),
        "VDC-D": Recipe(looks, world.detail, 200, 2),
    }
    sets = {}
    for name, recipe in recipes.items():
        sets[name] = recipe.corpus, ask(recipe, random.Random(f"{seed}/{name}"))

    twins = motions + looks + cameras
    for name, medium in (("MS-TI", "image"), ("MS-TV", "video")):
        queries = moments(twins, 100, random.Random(f"{seed}/{name}"), medium)
        used = set()
        for query in queries:
            used.update(query.positives, query.negatives)
        sets[name] = [video for video in twins if video["id"] in used], queries

    # Pixels, not claims: a frame or a window belongs to the one video from which it was cut.
    rng = random.Random(f"{seed}/VIS")
    frames = []
    for video in general:
        frames.append(Query(frame_item(video, rng, "../.."), [video["id"]], None))
    clips = []
    for video in long:
        window = clip_item(video, rng.randrange(4), "../..")
        clips.append(Query(window, [video["id"]], None))
    sets["MSRVTT-I2V"] = general, frames
    sets["LoVR-C2V"] = long, clips
    return {name: sets[name] for name in DATASETS}


# Training sources


class TrainingRows:
    """Collects the rows of all SOURCES; `groups` are the training side of all_videos()."""

    def __init__(self, groups, rng):
        self.rng = rng
        self.rows = {name: [] for name in SOURCES}
        self.general = groups["train-g"]
        self.clips = []
        for kind in ("g", *KINDS):
            self.clips += groups[f"train-{kind}"]
        self.by_id = {video["id"]: video for video in self.clips}
        self.family = collections.defaultdict(list)
        for video in self.clips:
            self.family[video["family"]].append(video)

    def frame(self, video):
        return frame_item(video, self.rng, "..")

    def video(self, video):
        return video_item(video, "..")

    def add(self, name, query, positive, negatives=()):
        """Add a row to a source, with a random choice of its hard negatives.

        Adds nothing if there are fewer negatives than every row of this source has.
        """
        wanted = SOURCES[name].negatives
        if len(negatives) < wanted:
            return
        row = {"query": query, "positive": positive}
        if wanted:
            row["negatives"] = self.rng.sample(list(negatives), wanted)
        row["id"] = f"{name}-{len(self.rows[name]):04}"
        self.rows[name].append(row)

    def candidates(self, video):
        """Return clips to draw hard negatives from: a clip's family, or any four if it has none."""
        family = self.family[video["family"]]
        return family if len(family) > 1 else self.rng.sample(self.general, 4)

    def describe(self, name, videos, form, **options):
        """Add a text-to-video row per video; candidates that do not fit the text are negatives."""
        for video in videos:
            text, claim = form(video["scenes"][0], self.rng, **options)
            candidates = self.candidates(video)
            wrong = [self.video(v) for v in candidates if not world.satisfies(v, claim)]
            self.add(name, {"text": text}, self.video(video), wrong)

    def paraphrase(self, video):
        """Add two texts about one clip; candidates' texts that are false of it are negatives."""
        forms = (world.concise, world.rich, world.temporal, world.spatial, world.keywords)
        first, second = self.rng.sample(forms, 2)
        wrong = []
        for candidate in self.candidates(video):
            text, claim = second(candidate["scenes"][0], self.rng, shuffle=True)
            if not world.satisfies(video, claim):
                wrong.append({"text": text})
        query, _ = first(video["scenes"][0], self.rng, shuffle=True)
        positive, _ = second(video["scenes"][0], self.rng, shuffle=True)
        self.add("t2t", {"text": query}, {"text": positive}, wrong)

    def describe_frame(self, video):
        """Add a text about a frame."""
        style = self.rng.choice(("concise", "rich", "keywords"))
        text, _ = world.FRAME_STYLES[style](video["scenes"][0], self.rng, shuffle=True)
        self.add("t2i", {"text": text}, self.frame(video))

    def compose(self, target):
        """Add composed queries that lead from a twin's parent to the twin."""
        reference = self.by_id[target["parent"]]
        text, claim = world.composed(target["scenes"][0], target["change"], self.rng)
        # The reference itself is among the wrong answers.
        wrong = [v for v in self.family[target["family"]] if not world.satisfies(v, claim)]
        videos = [self.video(v) for v in wrong]

        # No frame shows motion or camera, so an image cannot be the answer.
        if target["change"]["kind"] not in ("motion", "camera"):
            query = {"text": text, **self.frame(reference)}
            positive = self.frame(target)
            self.add("ti2i", query, positive, [self.frame(v) for v in wrong])
        query = {"text": text, **self.frame(reference)}
        self.add("ti2v", query, self.video(target), videos)
        query = {"text": text, **self.video(reference)}
        self.add("tv2v", query, self.video(target), videos)

    def tell(self, video, twin):
        """Add texts about a long video, whose twin is the negative, and its scenes as windows."""
        for i in range(len(video["scenes"])):
            text, _ = world.story(video, self.rng)
            self.add("t2v-long", {"text": text}, self.video(video), [self.video(twin)])
            self.add("v2v", clip_item(video, i, ".."), self.video(video))


def training(groups, seed=SEED):
    """Make all training rows: {source: [{"query", "positive", "negatives"?, "id"}, ...]}."""
    rng = random.Random(f"{seed}/training")
    made = TrainingRows(groups, rng)
    clips = made.clips
    general = groups["train-g"]
    motions = groups["train-t"]
    looks = groups["train-s"]
    cameras = groups["train-c"]
    mixed = groups["train-x"]

    # Texts and images: the first levels of the pyramid
    for video in rng.sample(clips, 800):
        made.paraphrase(video)
    for video in rng.sample(clips, 600):
        made.describe_frame(video)

    # Text to video
    made.describe("t2v", clips, world.concise, shuffle=True)
    made.describe("t2v-words", clips, world.keywords, shuffle=True)
    made.describe("t2v-words", general + mixed, world.theme)
    made.describe("t2v-words", general + motions, world.partial)
    made.describe("t2v-detail", clips, world.rich, shuffle=True)
    made.describe("t2v-detail", looks + motions, world.detail)
    made.describe("t2v-spatial", looks + mixed, world.spatial, shuffle=True)
    made.describe("t2v-spatial", looks + mixed, world.main_object)
    made.describe("t2v-temporal", motions * 2, world.temporal)
    made.describe("t2v-temporal", motions, world.paragraph)
    made.describe("t2v-camera", cameras * 3, world.camera)

    # Long videos, windows and frames of videos
    for video, twin in zip(groups["train-long"], groups["train-retold"], strict=True):
        made.tell(video, twin)
        made.tell(twin, video)
    for video in rng.sample(clips, 700):
        made.add("i2v", made.frame(video), made.video(video))

    # Composed queries, two for each twin
    for target in motions + looks + cameras + mixed:
        if "parent" in target:
            made.compose(target)
            made.compose(target)
    return made.rows


# Files


def write_lines(path, rows):
    """Write JSON lines, whole or not at all, and make the folder.

    Plain ASCII, unlike support.files.write_jsonl: the bytes of these files have not changed since
    the recorded runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_video(path, mp4):
    # No wait for the disk, three thousand times: the stamp, written last, holds the files' sizes.
    with whole_file(path, "wb", sync=False) as file:
        file.write(mp4)


def render(job):
    """Render one video to its file. job: (path, video), as a pool's workers take one argument."""
    path, video = job
    frames = np.concatenate([world.render_scene(scene) for scene in video["scenes"]])
    write_video(path, world.encode_mp4(frames))


def render_all(out, videos, label, workers=None):
    """Render videos to <out>/videos in so many processes, one per core by default."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    jobs = [(out / path_of(video, "."), video) for video in videos]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for _ in track(pool.imap_unordered(render, jobs, 16), len(jobs), label):
            pass


def write_benchmark(folder, sets):
    """Write mini-UVRB in the layout of the released UVRB; benchmark.json holds title and sizes."""
    sizes = {}
    for name, (corpus, queries) in sets.items():
        jsonl = folder / name / "jsonl"
        videos = [{"id": video["id"], **video_item(video, "../..")} for video in corpus]
        rows = []
        instances = []
        for i, query in enumerate(queries):
            rows.append({"id": f"q{i}", **query.row})
            instance = {"qid": f"q{i}", "pos": query.positives}
            if query.negatives:
                instance["neg"] = query.negatives
            instances.append(instance)
        write_lines(jsonl / "corpus.jsonl", videos)
        write_lines(jsonl / "queries.jsonl", rows)
        write_lines(jsonl / "instances.jsonl", instances)

        ranked = 10 if queries[0].negatives else len(corpus)
        sizes[name] = {"queries": len(queries), "corpus": ranked}
    write_json(folder / "benchmark.json", {"name": "mini-UVRB", "datasets": sizes}, indent=None)


def write_sources(folder, rows):
    """Write the training files, their mixture, and the coarse mixture that trains the prober."""
    mixture = []
    for name, source in SOURCES.items():
        write_lines(folder / f"{name}.jsonl", rows[name])
        mixture.append(
            {
                "name": name,
                "task": source.task,
                "path": f"{name}.jsonl",
                "samples": len(rows[name]),
                "negatives": source.negatives,
                "batch_size": 64,
                "instruction": source.instruction,
            }
        )
    write_json(folder / "mixture.json", mixture)
    coarse = [entry for entry in mixture if entry["name"] in ("t2v", "t2i")]
    write_json(folder / "coarse.json", coarse)


def fingerprint(seed):
    """Hash the source of the world and the seed: the same fingerprint, the same files."""
    folder = Path(__file__).parent
    code = (folder / "world.py").read_bytes() + (folder / "bench.py").read_bytes()
    return hashlib.sha256(code + str(seed).encode()).hexdigest()[:16]


def is_whole(out, sizes):
    """Say whether all files are there; sizes {path below out: bytes}."""
    for name, size in sizes.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            return False
    return True


def write(out, seed=SEED, workers=None):
    """Render every video and write mini-UVRB and the training sources below `out`.

    Where the files are complete and made by this code, nothing is written. Returns {"videos",
    "queries", "pairs": how many, "fresh": whether anything was written}.
    """
    out = Path(out)
    stamp = out / "stamp.json"
    code = fingerprint(seed)
    if stamp.is_file():
        known = json.loads(stamp.read_text())
        if known["code"] == code and is_whole(out, known["files"]):
            return {**known["counts"], "fresh": False}
        stamp.unlink()

    groups = all_videos(seed)
    videos = []
    for group in groups.values():
        videos += group
    render_all(out, videos, "rendering", workers)
    write_lines(out / "scenes.jsonl", videos)
    sets = benchmark(groups, seed)
    write_benchmark(out / "uvrb", sets)
    rows = training(groups, seed)
    write_sources(out / "train", rows)

    counts = {
        "videos": len(videos),
        "queries": sum(len(queries) for _, queries in sets.values()),
        "pairs": sum(map(len, rows.values())),
    }
    sizes = {}
    for folder in ("videos", "uvrb", "train"):
        for path in sorted((out / folder).rglob("*")):
            if path.is_file():
                sizes[str(path.relative_to(out))] = path.stat().st_size
    # Last of all: only a finished world has a stamp.
    write_json(stamp, {"code": code, "counts": counts, "files": sizes}, indent=None)
    return {**counts, "fresh": True}


# Raw videos for synth.py, with weak captions and planted faults

# Texts that describe nothing, as folders of web videos hold them.
EMPTY_TEXTS = (
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
DAMAGES = ("empty", "text", "cut", "small", "short")


def damage(mp4, kind):
    """Return an mp4 file's bytes made unreadable, or its clip made too small or too short."""
    if kind == "empty":
        return b""
    if kind == "text":
        return b"<html>404</html>"
    if kind == "cut":
        return mp4[: len(mp4) // 2]
    frames = world.decode_mp4(mp4)
    if kind == "small":
        return world.encode_mp4(frames[:, ::4, ::4])
    assert kind == "short", kind
    return world.encode_mp4(frames[:3])


def encode_again(mp4):
    """Make another upload of a clip: a pixel to the side, brighter, compressed once more."""
    frames = np.roll(world.decode_mp4(mp4), 1, axis=2).astype(float)
    return world.encode_mp4(np.clip(frames * 1.06 + 4, 0, 255).astype(np.uint8))


def weak_caption(scene, rng):
    """Write a caption as uploaders do: one event, or all, in three of ten with a mistake."""
    kind = rng.choices(("partial", "concise", "slip"), (2, 5, 3))[0]
    if kind == "partial":
        text, _ = world.partial(scene, rng)
        return text
    if kind == "slip":
        made = world.change(scene, rng.choice(("colour", "motion")), rng, False)
        if made is not None:
            scene, _ = made
    text, _ = world.concise(scene, rng)
    return text


def at_rest(scene):
    """Return a scene in which nothing moves."""
    objects = [{**o, "motion": ["still"]} for o in scene["objects"]]
    return {**scene, "camera": ["static"], "objects": objects}


def is_at_rest(scene):
    """Say whether nothing moves in a scene, camera included."""
    return scene == at_rest(scene)


def wrong_caption(scene, rng):
    """Write a concise caption of a scene that has no colour, shape or theme in common with this."""

    def looks(scene):
        colours = {o["colour"] for o in scene["objects"]}
        shapes = {o["shape"] for o in scene["objects"]}
        return colours | shapes

    while True:
        other = world.sample_scene(rng, False)
        if other["theme"] != scene["theme"] and looks(other).isdisjoint(looks(scene)):
            text, _ = world.concise(other, rng)
            return text


def raw_videos(seed, n, faults):
    """Draw the videos that raw() writes.

    Beside "id", "family" and "scenes" they have "text", those with a planted fault "fault", and
    copies "of", the id of the original.
    """
    rng = random.Random(f"{seed}/raw")
    videos = []
    for kind, kinds in KINDS.items():
        videos += families(rng, f"raw-{kind}", n, 4, kinds, False)
    videos += singles(rng, "raw-long", n, False, 4)
    for fault in ("wrong", "boilerplate", "static", "broken"):
        for video in singles(rng, f"raw-{fault}", faults, False, 1):
            videos.append({**video, "fault": fault})

    for video in videos:
        if video.get("fault") == "static":
            video["scenes"] = [at_rest(scene) for scene in video["scenes"]]
        elif all(map(is_at_rest, video["scenes"])):
            video["fault"] = "static"  # by chance
        captions = [weak_caption(scene, rng) for scene in video["scenes"]]
        video["text"] = " ".join(captions)
    for i, video in enumerate(videos):
        if video.get("fault") == "boilerplate":
            video["text"] = EMPTY_TEXTS[i % len(EMPTY_TEXTS)]
        elif video.get("fault") == "wrong":
            video["text"] = wrong_caption(video["scenes"][0], rng)
    rng.shuffle(videos)

    # Copies come last; only sound videos are copied, so that each video has one fault.
    sound = [video for video in videos if "fault" not in video]
    for fault in ("copy", "again"):
        for i, original in enumerate(rng.sample(sound, faults)):
            copy = {"id": f"raw-{fault}-{i:03}", "fault": fault, "of": original["id"]}
            videos.append({**original, **copy})
    return videos


def raw(out, seed=SEED, n=12, faults=20):
    """Write raw videos of training scenes for synth.py; returns their number.

    n       families of four near-twins for each of KINDS, and as many long videos
    faults  videos with each of: a wrong caption, a text that describes nothing, no motion, a
            damaged file, an exact copy of another, a copy encoded again

    Writes <out>/videos, captions.jsonl and truth.jsonl, which names each video's scenes and fault.
    """
    out = Path(out)
    videos = raw_videos(seed, n, faults)
    originals = [video for video in videos if "of" not in video]
    render_all(out, originals, "rendering raw videos")
    for i, video in enumerate(videos):
        path = out / path_of(video, ".")
        if "of" in video:
            mp4 = (out / path_of({"id": video["of"]}, ".")).read_bytes()
            write_video(path, encode_again(mp4) if video["fault"] == "again" else mp4)
        elif video.get("fault") == "broken":
            kind = DAMAGES[i % len(DAMAGES)]
            write_video(path, damage(path.read_bytes(), kind))

    captions = []
    truth = []
    for video in videos:
        item = video_item(video, ".")
        captions.append({"id": video["id"], **item, "text": video["text"]})
        keys = [key for key in ("id", "scenes", "fault", "of", "text") if key in video]
        truth.append(world.pick(video, *keys))
    write_lines(out / "captions.jsonl", captions)
    write_lines(out / "truth.jsonl", truth)
    return len(videos)
