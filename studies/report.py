"""Two reports on the mini world.

    python -m studies report
        runs/report/README.md: scenes, queries, right and wrong answers
    python -m studies report --synth runs/raw runs/synth
        what synth.py made of raw videos, judged by their scene graphs

The second reads captions back as claims (world.py) with `facts_in`; `misses` counts the stated
facts that a scene does not satisfy.
"""

import collections
import contextlib
import io
import itertools
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

import uvrb
from mini import world
from studies import ablate, study
from support.files import load_jsonl
from support.media import load_image, load_video

OUT = Path("runs/report")
MINI = Path("runs/mini")


# Reading captions back


def invert(table):
    """Turn a table {key: phrases} into {phrase: key}."""
    keys = {}
    for key, phrases in table.items():
        keys |= dict.fromkeys(phrases, key)
    return keys


SIZE_WORDS = invert(world.SIZES)
NOUN = re.compile(
    rf"(?:\b(?P<size>{'|'.join(SIZE_WORDS)}) )?"
    rf"(?:\b(?P<texture>{'|'.join(world.TEXTURES)}) )?"
    rf"(?:\b(?P<colour>{'|'.join(world.COLOURS)}) )?"
    rf"\b(?P<shape>{'|'.join(world.SHAPES)})\b"
)
PLACE = re.compile(rf"in the ({'|'.join(world.PLACES)})")
CAMERA = re.compile(r"\b(?:the|static) (?:camera|view)\b")


def keys_in(text, table):
    """List the keys of a table {key: phrases} whose phrases a text has, in the text's order."""
    key_of = invert(table)
    # Where two phrases begin alike, the longer one is meant.
    longest_first = sorted(map(re.escape, key_of), key=len, reverse=True)
    found = re.findall("|".join(longest_first), text)
    return [key_of[phrase] for phrase in found]


def camera_in(text):
    """Read the camera's moves, None if the text does not name any."""
    _, *told = CAMERA.split(text)
    moves = keys_in(" ".join(told), world.CAMERAS)
    if moves:
        return moves
    # Keywords end with a move: "..., zoom in".
    for move in list(world.CAMERAS)[1:]:
        if text.endswith(", " + move):
            return [move]
    return ["static"] if "static camera" in text else None


def objects_in(text):
    """Read the objects of a text and what it says of each, up to where the next one is named."""
    objects = {}  # {shape: properties}; one shape is one object
    found = list(NOUN.finditer(text))
    for noun, following in itertools.zip_longest(found, found[1:]):
        o = objects.setdefault(noun["shape"], {"shape": noun["shape"]})
        if noun["size"]:
            o["size"] = SIZE_WORDS[noun["size"]]
        for key in ("texture", "colour"):
            if noun[key]:
                o[key] = noun[key]

        end = following.start() if following else None
        # In world.detail's "looking at the red star again, it is ..." nothing is new.
        told = text[noun.end() : end].split(", it is")[0]
        motion = keys_in(told, world.MOTIONS)
        if motion:
            o["motion"] = motion
        place = PLACE.search(told)
        if place:
            o["place"] = place[1]
    return list(objects.values())


def facts_in(text):
    """Read the facts that a caption states: a claim {"objects": [...], "theme"?, "camera"?}."""
    text = text.lower()
    claim = {}
    camera = camera_in(text)
    if camera:
        claim["camera"] = camera
    theme_words = {theme: (theme, *phrases) for theme, phrases in world.THEMES.items()}
    themes = keys_in(text, theme_words)
    if themes:
        claim["theme"] = themes[0]
    # Only what comes before the camera tells of objects.
    claim["objects"] = objects_in(CAMERA.split(text)[0])
    return claim


def stated(claim):
    """Count the facts of a claim."""
    facts_of_objects = sum(map(len, claim["objects"]))
    return facts_of_objects + ("theme" in claim) + ("camera" in claim)


def missed_of_object(wanted, o):
    """Count the wanted properties that an object does not have; o None: all of them."""
    if o is None:
        return len(wanted)
    missed = 0
    for key, value in wanted.items():
        if not world.object_fits({key: value}, o):
            missed += 1
    return missed


def missed_of_scene(claim, scene):
    """Count the facts that a scene does not satisfy, for the best assignment of its objects."""
    wanted = claim["objects"]
    candidates = [*scene["objects"], *[None] * len(wanted)]
    fewest = min(
        sum(map(missed_of_object, wanted, chosen))
        for chosen in itertools.permutations(candidates, len(wanted))
    )
    if "theme" in claim:
        fewest += claim["theme"] != scene["theme"]
    if "camera" in claim:
        fewest += not world.moves_hold(claim["camera"], scene["camera"])
    return fewest


def misses(video, claim):
    """Count the stated facts that the best-fitting scene of a video does not satisfy."""
    return min(missed_of_scene(claim, scene) for scene in video["scenes"])


# What synth.py made of raw videos


# The filters in synth.py's order, and the first words of their reasons in pool.jsonl.
FILTERS = {
    "broken": ("unreadable", "frames", "resolution"),
    "static": ("static",),
    "wrong": ("consistency",),
    "copy": ("duplicate",),
}


def share(part, whole):
    """Return part / whole, 0 of nothing."""
    return part / max(1, whole)


def by_id(rows):
    """Return {id: row}."""
    return {row["id"]: row for row in rows}


def only_kept(rows):
    """Return the rows that a stage of synth.py kept."""
    return [row for row in rows if row["fate"] == "kept"]


def print_filter(name, planted, found, faulty):
    """Print a filter's precision, over all videos with its fault, and its recall of the planted.

    planted, found, faulty: sets of ids.
    """
    precision = share(len(found & faulty), len(found))
    recall = share(len(found & planted), len(planted))
    print(f"{name:<12} {len(planted):7}  {len(found):5}  {precision:9.3f}  {recall:6.3f}")


def print_filters(truth, pool):
    """Print how well the filters find the planted faults.

    A fault counts as planted if no earlier filter took the video, and a copy only if its original
    was still there.
    """
    print("filter       planted  found  precision  recall   ", end="")
    print("(among those that no earlier filter took)")
    faulty = collections.defaultdict(set)  # {fault: ids}
    for video in truth.values():
        fault = video.get("fault")
        faulty["copy" if fault == "again" else fault].add(video["id"])

    # The first filter drops captions, not videos. Captions that stand for many videos are its
    # business only where somebody planted them.
    no_text = (None, "of several videos")
    found = {row["id"] for row in pool if row.get("text_dropped") not in no_text}
    planted = faulty["boilerplate"] & by_id(pool).keys()
    print_filter("boilerplate", planted, found, faulty["boilerplate"])

    gone = set()  # taken by earlier filters
    for name, words in FILTERS.items():
        found = set()
        for row in pool:
            reason = row.get("why", "").split(":")[0]
            if reason in words:
                found.add(row["id"])
        planted = set()
        for key in faulty[name] - gone:
            if truth[key].get("of") not in gone:
                planted.add(key)
        print_filter(name, planted, found, faulty[name])
        gone |= found


def print_accuracy(label, truth, captions):
    """Print the share of stated facts that hold; captions [(video's id, text), ...]."""
    total = 0
    wrong = 0
    for key, text in captions:
        claim = facts_in(text)
        total += stated(claim)
        wrong += misses(truth[key], claim)
    right = 1 - share(wrong, total)
    print(f"{label:<35} {right:.3f} of {total} facts in {len(captions)} captions")


def print_composed(truth, kept, pairs):
    """Print how many composed queries need their reference and how many fit their target."""
    alone = 0  # queries whose text fits the target and no other video
    true = 0
    for pair in pairs:
        claim = facts_in(pair["query"]["text"])
        others = [video for video in kept if video["id"] != pair["of"]]
        alone += all(misses(video, claim) > 0 for video in others)
        true += misses(truth[pair["of"]], claim) == 0
    if pairs:
        print(
            f"composed queries that need their reference: {1 - alone / len(pairs):.3f} of "
            f"{len(pairs)}; true of their target: {true / len(pairs):.3f}"
        )


def print_negatives(truth, pairs):
    """Print how many hard negatives of text queries are wrong answers, and how near these are."""
    total = 0
    wrong = 0
    near = 0
    for pair in pairs:
        claim = facts_in(pair["query"]["text"])
        for negative in pair.get("negatives", ()):
            video = truth[Path(negative["video"]).stem]
            missed = misses(video, claim)
            total += 1
            wrong += missed > 0
            near += missed in (1, 2)
    print(
        f"hard negatives of T2V: truly negative {share(wrong, total):.3f}, one or two facts away "
        f"{share(near, total):.3f} of {total}"
    )


def synth_report(raw, out):
    """Print how good a folder of synth.py's output is, by the scene graphs of its raw videos.

    raw: folder of mini.bench.raw. Prints precision and recall of the filters, accuracy of captions,
    need of references and hardness of negatives.
    """

    def stage(name):
        rows = []
        for path in sorted(Path(out, name).glob("*.jsonl")):
            rows += load_jsonl(path)
        return rows

    truth = by_id(load_jsonl(Path(raw, "truth.jsonl")))
    pool = load_jsonl(Path(out, "pool.jsonl"))
    print(f"V-SynFlow on {len(pool)} raw mini videos, judged by their scene graphs")
    print_filters(truth, pool)

    kept = only_kept(pool)
    given = [(row["id"], row["text"]) for row in kept if row["text"]]
    written = []
    for row in stage("2-captions"):
        if row["kind"] == "video":
            for text in row.get("captions", {}).values():
                written.append((row["of"], text))
    print_accuracy("raw captions right:", truth, given)
    print_accuracy("written captions right:", truth, written)

    pairs = collections.defaultdict(list)  # by task
    for pair in only_kept(stage("3-pairs")):
        pairs[pair["task"]].append(pair)
    videos = [truth[row["id"]] for row in kept]
    print_composed(truth, videos, pairs["TI2V"] + pairs["TV2V"])
    print_negatives(truth, pairs["T2V"])


# The page


# Scenes to show: a general one, then near-twins that differ in events, in looks and in the camera.
SHOWN = (
    "test-g-000",
    "test-t-000-0",
    "test-t-000-1",
    "test-s-000-0",
    "test-s-000-1",
    "test-c-000-0",
)


def save_strip(media, path):
    """Save an image, or a video's eight frames side by side, twice as large -> Markdown's link."""
    if isinstance(media, dict) and "time" in media:
        frames = [load_image(media)]
    else:
        frames, _ = load_video(media)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.concatenate(list(frames), 1)
    twice_as_large = row.repeat(2, 0).repeat(2, 1)
    Image.fromarray(twice_as_large).save(path)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def nearest_wrong(rankings, query):
    """Return the first wrong answer to a query in a file of eval.py --rankings, an id."""
    ranking = next(row for row in load_jsonl(rankings) if row["qid"] == query)
    for key in ranking["ranked"]:
        if key not in ranking["positives"]:
            return key
    raise ValueError(f"{rankings}: no wrong answer to {query}")


def scene_lines(video, images, rng):
    """Describe a video's first scene: a strip of frames, and a caption in each style."""
    key = video["id"]
    strip = save_strip(f"{MINI}/videos/{key}.mp4", images / f"{key}.png")
    lines = [f"\n## {key}", strip, ""]
    for style, form in world.VIDEO_STYLES.items():
        text, _ = form(video["scenes"][0], rng)
        lines.append(f"* *{style}*: {text}")
    return lines


def dataset_lines(name, images):
    """Describe a dataset: its first query, a right answer, and the nearest wrong one."""
    bench = uvrb.read(str(MINI / "uvrb"), name, [str(MINI)])
    pool = f", pools of {len(bench.pools[0])}" if bench.pools else ""
    size = f"{len(bench.queries)} queries, {len(bench.corpus)} videos{pool}"
    lines = [f"\n## {name}", f"{uvrb.DATASETS[name].metric}; {size}", ""]

    query = bench.queries[0]
    for kind, content in query["item"].items():
        if kind != "text":
            content = save_strip(content, images / f"{name}-query.png")
        lines.append(f"* query: {content}")

    right = bench.corpus[bench.positives[0][0]]
    strip = save_strip(right["item"]["video"], images / f"{name}-right.png")
    lines.append(f"* right: {right['id']} {strip}")

    rankings = ablate.OUT / f"trained/rankings/{name}.jsonl"
    wrong = by_id(bench.corpus)[nearest_wrong(rankings, query["id"])]
    strip = save_strip(wrong["item"]["video"], images / f"{name}-nearest.png")
    lines.append(f"* nearest wrong answer: {wrong['id']} {strip}")
    return lines


def print_rankers_and_noise(files):
    """Print the table of ablate.py, and the noise study's where it has been run."""
    print("\n# Rankers that should fail\n")
    ablate.print_table(files)
    print("\n# Noise\n")
    if all(path.is_file() for path in study.result_files("noise")):
        study.run_study("noise")
    else:
        print("Not studied yet: `python -m studies noise`.")


def world_report(out=OUT):
    """Write <out>/README.md: scenes with captions, datasets with answers, rankers, noise.

    Answers and rankers are those of `python -m studies ablate`, which must have been run.
    """
    files = ablate.result_files()
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path}: not there; run `python -m studies ablate` first")

    out = Path(out)
    images = out / "images"
    videos = by_id(load_jsonl(MINI / "scenes.jsonl"))
    rng = random.Random(0)
    lines = ["# The mini world"]
    for key in SHOWN:
        lines += scene_lines(videos[key], images, rng)
    lines.append("\n# mini-UVRB")
    for name in uvrb.DATASETS:
        lines += dataset_lines(name, images)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_rankers_and_noise(files)
    lines.append(printed.getvalue())
    (out / "README.md").write_text("\n".join(lines))
    print(f"{out}/README.md")
