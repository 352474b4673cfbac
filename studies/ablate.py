"""Rankers that should fail on mini-UVRB: `python -m studies ablate` scores them beside the models.

Each is a function for `eval.py --encoder studies/ablate.py:NAME`: items and an instruction in,
(n, D) vectors out. `histogram`, `words` and `length` know only cheap properties of the rendered
files and of the texts. The others are the trained model ($CKPT), shown less than there is: `still`,
`shuffled`, `wrong_reference`, `no_reference`, `no_text`.
"""

import dataclasses
import functools
import json
import math
import os
import re
import statistics
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import uvrb
from caption import transformers_captioner
from mini import world
from model import GVE
from support.commands import run
from support.files import load_jsonl

OUT = Path("runs/ablate")
COMPOSED = [name for name, dataset in uvrb.DATASETS.items() if dataset.task == "CMP"]
RANKERS = {  # name: the datasets that it scores, all if empty
    "histogram": [],
    "words": [],
    "length": [],
    "still": [],
    "shuffled": [],
    "wrong_reference": COMPOSED,
    "no_reference": COMPOSED,
    "no_text": COMPOSED,
}


# Cheap properties, and the captions of the base


PALETTE = np.array(list(world.COLOURS.values()), float)  # (8, 3)


def colour_share(pixels):
    """Return each palette colour's share (8,) of the pixels (..., 3) that are near any of them."""
    pixels = pixels.reshape(-1, 1, 3).astype(float)
    distance = np.linalg.norm(pixels - PALETTE, axis=-1)  # (pixels, 8)
    coloured = distance.min(1) < 60
    count = np.bincount(distance.argmin(1)[coloured], minlength=len(PALETTE))
    return count / max(1, count.sum())


def histogram(items, instruction):
    """Compare colours: those of the pixels, those that a text names, or both."""
    vectors = []
    for item in items:
        text = item.get("text", "")
        named = [len(re.findall(rf"\b{colour}\b", text)) for colour in world.COLOURS]
        vector = np.array(named, float)
        if "image" in item:
            vector += 4 * colour_share(data.load_image(item["image"]))
        if "video" in item:
            frames, _ = data.load_video(item["video"])
            vector += 4 * colour_share(frames)
        # Square roots: the cosine is then Bhattacharyya's coefficient. Never a zero vector.
        vectors.append(np.sqrt(vector) + 1e-6)
    return np.stack(vectors)


@functools.cache
def captioner():
    """Open the base as a captioner, once."""
    return transformers_captioner(
        "mini/base",
        frames=8,
        max_tokens=200,
        device="cpu",
        batch_size=32,
        max_new_tokens=96,
    )


def training_texts():
    """Return all text queries of the mini training sources."""
    texts = []
    for path in sorted(Path("runs/mini/train").glob("t2v*.jsonl")):
        texts += [row["query"]["text"] for row in load_jsonl(path)]
    return texts


N_COLUMNS = 4096


def columns_of(text):
    """Hash the words of a text to columns -> list of int, a word as often as it occurs."""
    words = re.findall(r"\w+", text.lower())
    return [zlib.crc32(word.encode()) % N_COLUMNS for word in words]


@functools.cache
def inverse_document_frequency():
    """Return how rare the training texts' words are, in logarithms (N_COLUMNS,)."""
    texts = training_texts()
    found = np.zeros(N_COLUMNS)
    for text in texts:
        found[list(set(columns_of(text)))] += 1
    return np.log((1 + len(texts)) / (1 + found))


def words(items, instruction):
    """Compare bags of words, weighted by tf-idf, of texts and of the base's captions of media."""
    places = []
    requests = []
    for i, item in enumerate(items):
        for kind in ("image", "video"):
            if kind in item:
                prompt = f"Describe the {kind} in the rich style."
                places.append(i)
                requests.append({"media": [{kind: item[kind]}], "prompt": prompt})

    texts = [item.get("text", "") for item in items]
    for i, (caption, *_) in zip(places, captioner()(requests), strict=True):
        texts[i] += " " + (caption or "")

    bags = np.full((len(items), N_COLUMNS), 1e-9)
    for bag, text in zip(bags, texts, strict=True):
        np.add.at(bag, columns_of(text), 1)
    return bags * inverse_document_frequency()


@functools.cache
def usual_length(kind):
    """Fit a normal distribution to log lengths: training texts in words, or videos in bytes."""
    if kind == "text":
        lengths = [len(text.split()) for text in training_texts()]
    else:
        paths = Path("runs/mini/videos").glob("train-*.mp4")
        lengths = [path.stat().st_size for path in paths]
    return statistics.NormalDist.from_samples(map(math.log, lengths))


def length(items, instruction):
    """Match long texts with large files.

    A vector's angle on a quarter circle is the share of training texts, or files, that are shorter.
    """
    shares = []
    for item in items:
        if "text" in item:
            n_words = len(item["text"].split())
            shares.append(usual_length("text").cdf(math.log(n_words)))
        elif isinstance(item.get("video"), str):
            n_bytes = os.path.getsize(item["video"])
            shares.append(usual_length("video").cdf(math.log(n_bytes)))
        else:
            # For a frame or a window, the size of its file would give the file away.
            shares.append(0.5)
    angles = np.array(shares) * math.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1)


# The trained model, shown less


@functools.cache
def gve():
    """Load the trained model, once."""
    return GVE.from_pretrained(os.environ.get("CKPT", "runs/gve-mini"))


def embed_reordered(items, instruction, order):
    """Embed with each video's frames picked by order(path) -> 8 indices."""
    open_clip = data.open_clip

    def open_reordered(video, frames=8):
        clip = open_clip(video, frames)
        return dataclasses.replace(clip, pixels=clip.pixels[order(str(video))])

    data.open_clip = open_reordered
    try:
        return gve().embed(items, instruction)
    finally:
        data.open_clip = open_clip


def still(items, instruction):
    """Show the middle frame eight times."""

    def middle(path):
        return [4] * 8

    return embed_reordered(items, instruction, middle)


def shuffled(items, instruction):
    """Show all frames in a random order, the same whenever a video comes."""

    def permutation(path):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        return rng.permutation(8)

    return embed_reordered(items, instruction, permutation)


def is_composed(item):
    """Say whether an item is a composed query, text and reference."""
    return "text" in item and ("image" in item or "video" in item)


def wrong_reference(items, instruction):
    """Give each composed query the reference of the one before it."""
    composed = [i for i, item in enumerate(items) if is_composed(item)]
    changed = list(items)
    for n, i in enumerate(composed):
        # The first gets the last one's.
        changed[i] = {**items[composed[n - 1]], "text": items[i]["text"]}
    return gve().embed(changed, instruction)


def no_reference(items, instruction):
    """Show only the text of composed queries."""
    changed = []
    for item in items:
        if is_composed(item):
            item = {"text": item["text"]}
        changed.append(item)
    return gve().embed(changed, instruction)


def no_text(items, instruction):
    """Show only the reference of composed queries."""
    changed = []
    for item in items:
        if is_composed(item):
            item = {kind: media for kind, media in item.items() if kind != "text"}
        changed.append(item)
    return gve().embed(changed, instruction)


# Their verdict on the world


class Verdict(NamedTuple):
    """One requirement on the mini world, and whether it is met."""

    question: str
    measured: float
    wanted: float
    met: bool


def verdicts(results):
    """Judge whether the world measures what it should.

    results: {name: content of results.json} of all RANKERS and of "trained". Returns Verdicts.
    """

    def ability(name, tag):
        return results[name]["abilities"][tag]

    entries = results["trained"]["datasets"]
    chances = {name: entry["chance"] for name, entry in entries.items()}
    chance = uvrb.abilities(chances)

    def removed(name, tag):
        """Return the share of the trained model's ability above chance that a ranker lacks."""
        lost = ability("trained", tag) - ability(name, tag)
        return lost / (ability("trained", tag) - chance[tag])

    def at_least(question, measured, wanted):
        return Verdict(question, measured, wanted, measured >= wanted)

    # On S the right answer stands among twins of the same colours: a histogram must not find it.
    colours_on_s = ability("histogram", "S")
    beyond_words = results["trained"]["AVG-D"] - results["words"]["AVG-D"]
    lost = "CMP above chance that"
    return [
        Verdict("colour histogram on S, at most", colours_on_s, 0.2, colours_on_s <= 0.2),
        at_least("T above chance that a single frame removes", removed("still", "T"), 0.6),
        at_least("T above chance that shuffling removes", removed("shuffled", "T"), 0.4),
        at_least(f"{lost} a wrong reference removes", removed("wrong_reference", "CMP"), 0.6),
        at_least(f"{lost} dropping the reference removes", removed("no_reference", "CMP"), 0.4),
        at_least(f"{lost} dropping the text removes", removed("no_text", "CMP"), 0.4),
        at_least("AVG-D of the trained model beyond bags of words", beyond_words, 0.15),
    ]


def print_table(files):
    """Print the abilities of all rankers and the verdicts; files {name: path of results.json}."""
    results = {}
    for name, path in files.items():
        results[name] = json.loads(Path(path).read_text())
    columns = [*uvrb.ABILITIES, "AVG-D"]
    print("| mini-UVRB | " + " | ".join(columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for name, result in results.items():
        cells = []
        for tag in columns:
            score = result["AVG-D"] if tag == "AVG-D" else result["abilities"][tag]
            cells.append("-" if score is None else f"{score:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |")

    print()
    for verdict in verdicts(results):
        word = "met" if verdict.met else "MISSED"
        print(f"* {word}: {verdict.question}: {verdict.measured:.3f} (wanted {verdict.wanted})")


def result_files():
    """Return where score_rankers leaves its results: {name: path of results.json}."""
    names = ("base", "prober", "trained", *RANKERS)
    return {name: OUT / name / "results.json" for name in names}


def score_rankers(ckpt):
    """Score base, prober, a checkpoint and all rankers, about 4 minutes, and print their table."""
    options = {
        "base": "--ckpt mini/base",
        "prober": "--ckpt mini/prober",
        # studies/report.py names wrong answers of the trained model.
        "trained": f"--ckpt {ckpt} --rankings",
    }
    for name, datasets in RANKERS.items():
        options[name] = f"--encoder studies/ablate.py:{name}"
        if datasets:
            options[name] += " --datasets " + " ".join(datasets)

    for name, flags in options.items():
        run(f"python eval.py {flags} --out {OUT / name} --name {name}", CKPT=str(ckpt))
    print_table(result_files())
