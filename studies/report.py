"""A page about the mini world, `python -m mini report`, and what synth.py made of its raw videos, judged by the scene graphs:
`python -m mini report --synth`.

Texts are read back as claims (world.py) by `facts_in`; `misses` counts how many stated facts a scene does not satisfy.
"""

import contextlib
import io
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

import uvrb
from mini import world
from studies import ablate, study
from support.files import read_jsonl
from support.media import load_image, load_video

LOOKS = {
    "size": {w: size for size, words in world.SIZES.items() for w in words},
    "texture": {w: w for w in ("plain", "striped")},
    "colour": {w: w for w in world.COLOURS},
    "shape": {w: w for w in world.SHAPES},
}
NOUN = re.compile(
    "".join(rf"(?:\b({'|'.join(LOOKS[k])}) )?" for k in ("size", "texture", "colour"))
    + rf"\b({'|'.join(world.SHAPES)})\b"
)
REASON = {
    "wrong": ("consistency",),
    "boilerplate": (),
    "static": ("static",),
    "broken": ("unreadable", "frames", "resolution"),
    "copy": ("duplicate",),
    "again": ("duplicate",),
}


def _phrases(text, table):
    """The keys of `table` whose phrases occur in a text, in order; longer phrases first where two begin alike."""
    named = {phrase: key for key, phrases in table.items() for phrase in phrases}
    return [
        named[m]
        for m in re.findall("|".join(sorted(map(re.escape, named), key=len, reverse=True)), text)
    ]


def facts_in(text):
    """Read what a caption states: a claim {"objects": [...], "theme"?, "camera"?}; objects are told apart by their shape."""
    text, objects, claim = text.lower(), {}, {}
    scene, *lens = re.split(r"\b(?:the|static) (?:camera|view)\b", text)
    camera = _phrases(" ".join(lens), world.CAMERAS) or [
        c for c in list(world.CAMERAS)[1:] if text.endswith(", " + c)
    ]
    if camera or "static camera" in text:
        claim["camera"] = camera or ["static"]
    if theme := _phrases(text, {t: (t, *words[-1]) for t, words in world.THEMES.items()}):
        claim["theme"] = theme[0]
    found = list(NOUN.finditer(scene))
    for m, after in itertools.zip_longest(found, found[1:]):
        o = objects.setdefault(m[4], {"shape": m[4]})
        o |= {
            key: LOOKS[key][m[i]] for i, key in ((1, "size"), (2, "texture"), (3, "colour")) if m[i]
        }
        said = scene[m.end() : after.start() if after else None].split(", it is")[0]
        if motion := _phrases(said, world.MOTIONS):
            o["motion"] = motion
        if place := re.search(rf"in the ({'|'.join(world.PLACES)})", said):
            o["place"] = place[1]
    return claim | {"objects": list(objects.values())}


def stated(claim):
    return sum(len(o) for o in claim["objects"]) + ("theme" in claim) + ("camera" in claim)


def misses(video, claim):
    """Count the stated facts that the best-fitting scene of a video does not satisfy (0: the claim holds)."""

    def wrong(want, o):
        return sum(
            o is None or not (world.said(v, o[k]) if k == "motion" else o[k] == v)
            for k, v in want.items()
        )

    def of(scene):
        rest = [*scene["objects"], *[None] * len(claim["objects"])]
        objects = min(
            sum(map(wrong, claim["objects"], chosen))
            for chosen in itertools.permutations(rest, len(claim["objects"]))
        )
        return (
            objects
            + (claim.get("theme", scene["theme"]) != scene["theme"])
            + ("camera" in claim and not world.said(claim["camera"], scene["camera"]))
        )

    return min(map(of, video["scenes"]))


def synth_report(raw, out):
    """Print precision and recall of the filters, accuracy of captions, need of references, hardness of negatives."""

    def lines(path):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]

    def rows(stage):
        return [row for path in sorted(Path(out, stage).glob("*.jsonl")) for row in lines(path)]

    truth, pool = (
        {v["id"]: v for v in lines(Path(raw, "truth.jsonl"))},
        lines(Path(out, "pool.jsonl")),
    )
    why = {row["id"]: row.get("why", "").split(":")[0] for row in pool}
    text = {row["id"]: row.get("text_dropped") not in (None, "of several videos") for row in pool}
    print(f"V-SynFlow on {len(pool)} raw mini videos, judged by their scene graphs")
    print(
        f"{'filter':<12} planted  found  precision  recall   (among those that no earlier filter took)"
    )
    order = ["broken", "static", "wrong", "copy"]
    for fault in ("boilerplate", "broken", "static", "wrong", "copy"):
        same = ("copy", "again") if fault == "copy" else (fault,)
        hit = {i for i in why if (text[i] if fault == "boilerplate" else why[i] in REASON[fault])}
        before = (
            {r for f in order[: order.index(fault)] for r in REASON[f]} if fault in order else set()
        )
        gone = {
            i for i in why if why[i] in before
        }  # a copy can be found only if its original is still there
        planted = {
            i for i, v in truth.items() if v.get("fault") in same and not {i, v.get("of")} & gone
        }
        planted &= {i for i in planted if fault != "boilerplate" or text.get(i) is not None}
        right = len(hit & {i for i, v in truth.items() if v.get("fault") in same})
        print(
            f"{fault:<12} {len(planted):7}  {len(hit):5}  {right / max(1, len(hit)):9.3f}  "
            f"{len(hit & planted) / max(1, len(planted)):6.3f}"
        )

    def accuracy(pairs):
        claims = [(truth[i], facts_in(t)) for i, t in pairs]
        total = sum(stated(c) for _, c in claims)
        return f"{1 - sum(misses(v, c) for v, c in claims) / max(1, total):.3f} of {total} facts in {len(pairs)} captions"

    kept = [row for row in pool if row["fate"] == "kept"]
    made = [row for row in rows("2-captions") if row["kind"] == "video" and "captions" in row]
    after = [(row["of"], t) for row in made for t in row["captions"].values()]
    removed = [(row["of"], t) for row in made for t in row.get("removed", {}).values()]
    print(
        "raw captions right:                ",
        accuracy([(row["id"], row["text"]) for row in kept if row["text"]]),
    )
    print("before the hallucination check:    ", accuracy(after + removed))
    print("after it:                          ", accuracy(after))
    kept, pairs = (
        [truth[row["id"]] for row in kept],
        [row for row in rows("3-pairs") if row["fate"] == "kept"],
    )
    composed = [
        (row, facts_in(row["query"]["text"])) for row in pairs if row["task"] in ("TI2V", "TV2V")
    ]
    if composed:
        alone = sum(
            all(v["id"] == row["of"] for v in kept if misses(v, claim) == 0)
            for row, claim in composed
        )
        true = sum(misses(truth[row["of"]], claim) == 0 for row, claim in composed)
        print(
            f"composed queries that need their reference: {1 - alone / len(composed):.3f} of {len(composed)}; "
            f"true of their target: {true / len(composed):.3f}"
        )
    negatives = [
        misses(truth[Path(n["video"]).stem], facts_in(row["query"]["text"]))
        for row in pairs
        if row["task"] == "T2V"
        for n in row.get("negatives", ())
    ]
    n = max(1, len(negatives))
    print(
        f"hard negatives of T2V: truly negative {sum(m > 0 for m in negatives) / n:.3f}, one or two facts away "
        f"{sum(0 < m < 3 for m in negatives) / n:.3f} of {len(negatives)}"
    )


def strip(media, path):
    """Write an image, or a video's eight frames side by side, twice as large -> its link."""
    frames = (
        [load_image(media)] if isinstance(media, dict) and "time" in media else load_video(media)[0]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(frames), 1).repeat(2, 0).repeat(2, 1)).save(path)
    return f"![{path.stem}]({path.parent.name}/{path.name})"


def nearest_wrong(run, query, positives):
    """The corpus id that a TREC run ranks first among those that are no positives."""
    ranked = [line.split()[2] for line in run.read_text().splitlines() if line.split()[0] == query]
    return next(key for key in ranked if key not in positives)


def world_report(out):
    """Write <out>/README.md: scenes with their captions, each dataset with a query and the trained model's nearest wrong answer
    (of `python -m mini ablate`, which comes first), the rankers that must fail, and the noise, where it has been studied."""
    files = {
        name: Path("runs/ablate", name, "results.json")
        for name in ("base", "prober", "trained", *ablate.RANKERS)
    }
    if missing := [path for path in files.values() if not path.is_file()]:
        raise ValueError(f"{missing[0]}: not there; run `python -m mini ablate` first")
    out, lines, rng = Path(out), ["# The mini world"], random.Random(0)
    videos = {row["id"]: row for _, row in read_jsonl("runs/mini/scenes.jsonl")}
    for key in (
        "test-g-000",
        "test-t-000-0",
        "test-t-000-1",
        "test-s-000-0",
        "test-s-000-1",
        "test-c-000-0",
    ):
        lines += [
            f"\n## {key}",
            strip(f"runs/mini/videos/{key}.mp4", out / "images" / f"{key}.png"),
            "",
        ]
        lines += [
            f"* *{style}*: {form(videos[key]['scenes'][0], rng)[0]}"
            for style, form in world.VIDEO_STYLES.items()
        ]
    lines.append("\n# mini-UVRB")
    for name, dataset in uvrb.DATASETS.items():
        found = uvrb.read("runs/mini/uvrb", name, ["runs/mini"])
        query, own = found.queries[0], [found.corpus[p] for p in found.positives[0]]
        wrong = nearest_wrong(
            Path(f"runs/ablate/trained/trec/{name}.run"), query["id"], {row["id"] for row in own}
        )
        wrong = next(row for row in found.corpus if row["id"] == wrong)
        lines += [
            f"\n## {name}",
            f"{dataset.metric}; {len(found.queries)} queries, {len(found.corpus)} videos"
            f"{', pools of ' + str(len(found.pools[0])) if found.pools else ''}",
            "",
        ]
        item = query["item"]
        lines += [f"* query: {item['text']}"] if "text" in item else []
        lines += [
            f"* query: {strip(item[kind], out / 'images' / f'{name}-query.png')}"
            for kind in item
            if kind != "text"
        ]
        for what, row in (("right", own[0]), ("nearest wrong answer", wrong)):
            picture = strip(row["item"]["video"], out / "images" / f"{name}-{what.split()[0]}.png")
            lines.append(f"* {what}: {row['id']} {picture}")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print("\n# Rankers that must fail\n")
        ablate.table(files)
        print("\n# Noise\n")
        seeds, variants = study.STUDIES["noise"]
        if all(how.results(seed).is_file() for how in variants.values() for seed in seeds):
            study.study("noise")
        else:
            print("Not studied yet: `python -m mini study noise`.")
    (out / "README.md").write_text("\n".join(lines) + "\n" + text.getvalue())
    print(f"{out}/README.md")
