"""Rankers that must fail on mini-UVRB, each a function for eval.py --encoder: `python -m mini ablate` scores them all.

Cheap ones see the rendered files and the texts alone: `histogram`, `words`, `length`. The others are the trained model ($CKPT),
shown less than there is: `still`, `shuffled`, `wrong_reference`, `no_reference`, `no_text`. items, instruction -> (n, D) arrays.
"""

import functools
import json
import math
import os
import re
import statistics
import zlib
from pathlib import Path

import numpy as np

import data
import uvrb
from caption import transformers_captioner
from mini import world
from model import GVE
from support.files import read_jsonl

PALETTE = np.array(list(world.COLOURS.values()), float)
SIZE = 4096  # columns that words are hashed to
CMP = [name for name, d in uvrb.DATASETS.items() if d.task == "CMP"]
RANKERS = {
    "histogram": [],
    "words": [],
    "length": [],
    "still": [],
    "shuffled": [],  # name: its datasets, all if empty
    "wrong_reference": CMP,
    "no_reference": CMP,
    "no_text": CMP,
}


# Without a model, or with the base's captions alone


def histogram(items, instruction):
    """Share of each of the palette's colours among the pixels, or among a text's colour words; both for a composed query."""

    def seen(pixels):
        away = np.linalg.norm(
            pixels.reshape(-1, 1, 3).astype(float) - PALETTE, axis=-1
        )  # (pixels, colours)
        return np.bincount(away.argmin(1)[away.min(1) < 60], minlength=len(PALETTE))

    def vector(item):
        counts = np.array(
            [len(re.findall(rf"\b{colour}\b", item.get("text", ""))) for colour in world.COLOURS],
            float,
        )
        for kind, load in (("image", data.load_image), ("video", lambda v: data.load_video(v)[0])):
            if kind in item:
                counts += 4 * (share := seen(load(item[kind]))) / max(1, share.sum())
        return np.sqrt(counts) + 1e-6

    return np.stack([vector(item) for item in items])


@functools.cache
def captioner():
    return transformers_captioner(
        "mini/base", frames=8, max_tokens=200, device="cpu", batch_size=32, max_new_tokens=96
    )


def training_texts():
    rows = (
        row
        for path in sorted(Path("runs/mini/train").glob("t2v*.jsonl"))
        for _, row in read_jsonl(path)
    )
    return [row["query"]["text"] for row in rows]


@functools.cache
def rarity():
    """Inverse document frequency of the training texts' words (SIZE,)."""
    texts, found = training_texts(), np.zeros(SIZE)
    for text in texts:
        found[
            list({zlib.crc32(word.encode()) % SIZE for word in re.findall(r"\w+", text.lower())})
        ] += 1
    return np.log((1 + len(texts)) / (1 + found))


def words(items, instruction):
    """Bags of words, weighted by tf-idf: a text, and what the base says of an image or a video."""
    shown = [
        (i, kind) for i, item in enumerate(items) for kind in ("image", "video") if kind in item
    ]
    ask = "Describe the {} in the rich style."
    said = captioner()(
        [{"media": [{kind: items[i][kind]}], "prompt": ask.format(kind)} for i, kind in shown]
    )
    texts = [item.get("text", "") for item in items]
    for (i, _), (answer, *_) in zip(shown, said, strict=True):
        texts[i] += " " + (answer or "")
    bags = np.full((len(items), SIZE), 1e-9)
    for bag, text in zip(bags, texts, strict=True):
        np.add.at(
            bag, [zlib.crc32(word.encode()) % SIZE for word in re.findall(r"\w+", text.lower())], 1
        )
    return bags * rarity()


@functools.cache
def usual(kind):
    """Mean and deviation of the logarithm of the training texts' lengths, or of the training videos' sizes in bytes."""
    values = (
        [len(t.split()) for t in training_texts()]
        if kind == "text"
        else [path.stat().st_size for path in Path("runs/mini/videos").glob("train-*.mp4")]
    )
    return statistics.NormalDist.from_samples(map(math.log, values))


def length(items, instruction):
    """Long texts belong to large files: angles on a quarter circle by the share of training texts or files that are shorter."""

    def angle(item):
        if "text" in item:
            return usual("text").cdf(math.log(len(item["text"].split())))
        if isinstance(item.get("video"), str):
            return usual("video").cdf(math.log(os.path.getsize(item["video"])))
        return 0.5  # a frame or a window: the size of its file would give the file away

    angles = np.array([angle(item) for item in items]) * math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1)


# The trained model, shown less


@functools.cache
def gve():
    return GVE.from_pretrained(os.environ.get("CKPT", "runs/gve-mini"))


def _reordered(items, instruction, order):
    """Embed with each video's frames in order(path) -> indices (8,)."""
    load = data.load_video

    def changed(video, frames=8):
        pixels, seconds = load(video, frames)
        return pixels[order(str(video))], seconds

    data.load_video = changed
    try:
        return gve().embed(items, instruction)
    finally:
        data.load_video = load


def still(items, instruction):
    """The middle frame, eight times."""
    return _reordered(items, instruction, lambda path: [4] * 8)


def shuffled(items, instruction):
    """All frames, in an order of chance that is the same whenever a video comes."""
    return _reordered(
        items,
        instruction,
        lambda path: np.random.default_rng(zlib.crc32(path.encode())).permutation(8),
    )


def _composed(item):
    return "text" in item and ("image" in item or "video" in item)


def wrong_reference(items, instruction):
    """Composed queries get the reference of another one."""
    at = [i for i, item in enumerate(items) if _composed(item)]
    other = {i: at[n - 1] for n, i in enumerate(at)}
    swapped = [
        {**items[other[i]], "text": item["text"]} if i in other else item
        for i, item in enumerate(items)
    ]
    return gve().embed(swapped, instruction)


def no_reference(items, instruction):
    return gve().embed(
        [{"text": item["text"]} if _composed(item) else item for item in items], instruction
    )


def no_text(items, instruction):
    alone = [
        {k: v for k, v in item.items() if k != "text" or not _composed(item)} for item in items
    ]
    return gve().embed(alone, instruction)


# What they say together


def verdicts(results):
    """{name: results.json content}, all rankers and "trained" -> [(what is asked, measured, wanted, met)]."""

    def score(name, ability):
        return results[name]["abilities"].get(ability, results[name].get(ability))

    def chance(ability):
        entries = results["trained"]["datasets"]
        return uvrb.abilities({name: entry["chance"] for name, entry in entries.items()})[ability]

    def removed(name, ability):
        """Share of the trained model's score above chance that a ranker lacks."""
        return (score("trained", ability) - score(name, ability)) / (
            score("trained", ability) - chance(ability)
        )

    rows = [
        ("colour histogram on S, at most", score("histogram", "S"), -0.2),
        ("T above chance that a single frame removes", removed("still", "T"), 0.6),
        ("T above chance that shuffling removes", removed("shuffled", "T"), 0.4),
        ("CMP above chance that a wrong reference removes", removed("wrong_reference", "CMP"), 0.6),
        (
            "CMP above chance that dropping the reference removes",
            removed("no_reference", "CMP"),
            0.4,
        ),
        ("CMP above chance that dropping the text removes", removed("no_text", "CMP"), 0.4),
        (
            "AVG-D of the trained model beyond bags of words",
            results["trained"]["AVG-D"] - results["words"]["AVG-D"],
            0.15,
        ),
    ]
    return [
        (what, value, abs(wanted), -value >= wanted if wanted < 0 else value >= wanted)
        for what, value, wanted in rows
    ]


def table(files):
    """Print abilities of all rankers, {name: path of results.json}, and the verdicts."""
    results = {name: json.loads(Path(path).read_text()) for name, path in files.items()}
    columns = [*uvrb.ABILITIES, "AVG-D"]
    print("| mini-UVRB | " + " | ".join(columns) + " |\n" + "| --- " * (1 + len(columns)) + "|")
    for name, result in results.items():
        scores = {**result["abilities"], "AVG-D": result["AVG-D"]}
        print(
            f"| {name} | "
            + " | ".join("-" if scores[c] is None else f"{scores[c]:.3f}" for c in columns)
            + " |"
        )
    print()
    for what, value, wanted, met in verdicts(results):
        print(f"* {'met' if met else 'MISSED'}: {what}: {value:.3f} (wanted {wanted})")
