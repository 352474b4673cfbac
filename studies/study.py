"""Does a change make a difference on mini-UVRB, or is it noise? `python -m studies NAME`.

A study trains and scores variants, each with several seeds, and prints means and paired differences
with 95 % intervals; runs/study/NAME.png shows the averages. A variant is train.py or eval.py with
other flags, or with a deliberate defect in the code (`run_with_defect`). There is one run per
variant and seed, and as many at once as there are cores.

A run that is finished with the same training data is not repeated. After a change of the code,
delete runs/study.
"""

import dataclasses
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scipy import stats

import model
from mini import bench
from support.commands import run
from support.files import file_lock, write_json

OUT = Path("runs/study")
STAMP = Path("runs/mini/stamp.json")
UVRD = Path("runs/synth/uvrd/mixture.json")

# Training data, as flags of train.py. The tour's:
BOTH = f"--mixture runs/mini/train/mixture.json {UVRD} --root runs/raw"
# The tour's, but no hard negatives that differ in motion or camera:
EASY = f"--mixture {OUT}/no-motion-negatives.json {UVRD} --root runs/raw runs/mini/train"
# For `synth`: collected sources of kinds that Table 6 has, so no composed video and no twins,
# alone and beside V-SynFlow's pairs from more raw videos:
TABLE_6 = ("t2t", "t2i", "ti2i", "t2v", "t2v-long")
PLAIN = f"--root runs/mini/train {OUT}/raw --steps 320 --mixture {OUT}/plain.json"
RICH = f"{PLAIN} {OUT}/synth/uvrd/mixture.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train and to score; by default the tour's."""

    train: str = BOTH  # flags of train.py besides --seed
    test: str = ""  # flags of eval.py
    defect: str = ""  # a key of DEFECTS
    late: bool = False  # the defect is there at test time alone

    def folder(self, seed):
        """Name the checkpoint's folder: one for all variants that train alike on the same data."""
        # The stamp stands for the mini sources, and a mixture for what was synthesised.
        mixtures = {Path(word) for word in self.train.split() if word.endswith(".json")}
        files = sorted({STAMP, *mixtures})
        defect = "" if self.late else self.defect
        content = f"{defect} {self.train}".encode()
        for path in files:
            if path.is_file():
                content += path.read_bytes()
        return OUT / f"{zlib.crc32(content):08x}-seed{seed}"

    def results(self, seed):
        """Name the file of its scores."""
        name = re.sub(r"\W+", "_", self.test).strip("_")
        if self.late:
            name += self.defect
        return self.folder(seed) / name / "results.json"


class Study(NamedTuple):
    """Variants that are compared, each trained once per seed."""

    seeds: range
    variants: dict  # {name: Variant}; differences are to the first


TOUR = Variant()
STUDIES = {
    # How far do seeds alone lead apart?
    "noise": Study(range(42, 52), {"default": TOUR}),
    # Does mini-UVRB notice mistakes in the method?
    "defects": Study(
        range(42, 43),
        {
            "default": TOUR,
            "1-D positions": Variant(defect="1d"),
            "pooled one token early": Variant(defect="early"),
            "temperature x 10": Variant(f"{BOTH} --temperature 0.3"),
            "no hard negatives on motion": Variant(EASY),
            "no reverse loss": Variant(f"{BOTH} --no-symmetric"),
        },
    ),
    # Does it notice them in an evaluation alone, of a model that was trained without?
    "late": Study(
        range(42, 52),
        {
            "default": TOUR,
            "1-D positions at test": Variant(defect="1d", late=True),
            "pooled early at test": Variant(defect="early", late=True),
        },
    ),
    # Figure 6's form: more training
    "scaling": Study(
        range(42, 45),
        {
            "6 steps": Variant(f"{BOTH} --steps 6"),
            "20 steps": Variant(f"{BOTH} --steps 20"),
            "64 steps": Variant(f"{BOTH} --steps 64"),
            "200 steps": Variant(f"{BOTH} --steps 200"),
            "640 steps": TOUR,
        },
    ),
    # Figure 12's form: more frames at test
    "frames": Study(
        range(42, 45),
        {
            "8 frames": TOUR,
            "2 frames": Variant(test="--frames 2"),
            "4 frames": Variant(test="--frames 4"),
            "16 frames": Variant(test="--frames 16"),
        },
    ),
    # The paper's own ablation: without V-SynFlow, without the pyramid, with both
    "synth": Study(
        range(5, 15),
        {
            "GVE-i": Variant(f"{PLAIN} --schedule proportional"),
            "GVE-s": Variant(f"{RICH} --schedule proportional"),
            "GVE": Variant(f"{RICH} --schedule pyramid"),
            "GVE, no quotas": Variant(f"{RICH} --schedule pyramid-free"),
        },
    ),
}


# Deliberate defects in the code


def one_dimensional():
    """Make every token's position its place in the row, text or vision."""

    def position_ids(self, batch):
        mask = batch["attention_mask"]
        return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)

    model.GVE.position_ids = position_ids


def one_early():
    """Pool the token before the last one."""
    pool = model.POOLINGS["last_token"]

    def pool_early(hidden, mask):
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return pool(hidden, mask.scatter(1, last[:, None], 0))

    model.POOLINGS["last_token"] = pool_early


DEFECTS = {"1d": one_dimensional, "early": one_early}


def run_with_defect(defect, script, *flags):
    """Run a script of this repository in this process, with a defect in it."""
    DEFECTS[defect]()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


# Runs


def run_logged(command, log, defect=""):
    """Run `python ...` to its end, perhaps with a defect; its output goes to the file `log`.

    Raises RuntimeError that names the command and the log if it fails.
    """
    _, *words = command.split()
    if defect:
        words = ["-m", "studies.study", defect, *words]
    note = f"  # with the defect {defect}" if defect else ""
    print(f"$ {command} > {log}{note}", flush=True)

    # As many runs as cores at once, so each computes with one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        finished = subprocess.run([sys.executable, *words], stdout=out, stderr=out, env=environment)
    if finished.returncode:
        raise RuntimeError(
            f"`{command}` ended with status {finished.returncode}; its output is in {log}"
        )


def train(variant, seed):
    """Train a variant with a seed, unless that has been done."""
    folder = variant.folder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    defect = "" if variant.late else variant.defect
    # Variants may share a checkpoint, and one of them trains it.
    with file_lock(folder / "lock"):
        # Not the checkpoint itself: it may be that of an epoch's end.
        finished = folder / "trained"
        if not finished.is_file():
            flags = f"--workers 0 {variant.train} --seed {seed} --out {folder}"
            run_logged(f"python train.py {flags}", folder / "train.txt", defect)
            finished.touch()


def measure(variant, seed):
    """Train and score a variant with a seed, unless that is done -> content of results.json."""
    train(variant, seed)
    results = variant.results(seed)
    if not results.is_file():
        out = results.parent
        out.mkdir(parents=True, exist_ok=True)
        command = f"python eval.py --ckpt {variant.folder(seed)} {variant.test} --out {out}"
        run_logged(command, out / "eval.txt", variant.defect)
    return json.loads(results.read_text())


# Tables


def interval(values):
    """Return mean and half the 95 % interval (Student's t) of values; inf for a single value."""
    mean = statistics.mean(values)
    n = len(values)
    if n < 2:
        return mean, math.inf
    deviation_of_mean = statistics.stdev(values) / math.sqrt(n)
    return mean, stats.t.ppf(0.975, n - 1) * deviation_of_mean


def columns(results):
    """Turn contents of results.json into columns: {ability or average: its scores}."""
    scores = {}
    for tag in results[0]["abilities"]:
        scores[tag] = [result["abilities"][tag] for result in results]
    for tag in ("AVG-D", "AVG-A"):
        scores[tag] = [result[tag] for result in results]
    return scores


def print_row(name, cells):
    """Print a row of a Markdown table."""
    print("| " + " | ".join([name, *cells]) + " |")


def print_table(seeds, measured):
    """Print means, deviations over seeds and paired differences to the first variant.

    measured: {variant: contents of results.json, one per seed}. Returns {variant: columns()}.
    """
    scores = {name: columns(results) for name, results in measured.items()}
    first = next(iter(measured))
    tags = list(scores[first])
    several = len(seeds) > 1

    contents = "with differences"
    if several:
        contents = "means, deviations over seeds, then paired differences with 95 % intervals"
    print(f"mini-UVRB, seeds {seeds[0]} to {seeds[-1]}, {contents} to {first}\n")
    print_row("", tags)
    print_row("---", ["---"] * len(tags))
    for name in measured:
        means = [statistics.mean(values) for values in scores[name].values()]
        print_row(name, [f"{mean:.3f}" for mean in means])
        if several:
            deviations = [statistics.stdev(values) for values in scores[name].values()]
            print_row("", [f"({deviation:.3f})" for deviation in deviations])

    for name in list(measured)[1:]:
        cells = []
        for tag in tags:
            pairs = zip(scores[name][tag], scores[first][tag], strict=True)
            mean, half = interval([score - default for score, default in pairs])
            cells.append(f"{mean:+.3f} ± {half:.3f}" if several else f"{mean:+.3f}")
        print_row(f"{name} - {first}", cells)

    if len(seeds) >= 5 and len(measured) == 1:
        deviation = statistics.stdev(scores[first]["AVG-D"])
        needed = math.ceil(2 * (1.96 + 0.84) ** 2 * (deviation / 0.01) ** 2)
        print(f"\nTo see .01 of AVG-D with power .8 at 5 %: {needed} seeds a side.")
    return scores


def print_beyond_noise(scores, floor):
    """Print where one run of a variant differs from the default's runs by more than noise.

    The bound is a 95 % prediction interval for one more run of the default, over all columns
    together (Bonferroni).

    scores: {variant: {column: [score]}}, the default first; floor: {column: the default's scores},
    from `python -m studies noise`.
    """
    n = len(next(iter(floor.values())))
    print(f"\nBeyond the noise of {n} seeds of the default", end=" ")
    print("(differences to their mean, in their deviations):\n")
    bound = stats.t.ppf(1 - 0.025 / len(floor), n - 1) * math.sqrt(1 + 1 / n)
    for name in list(scores)[1:]:
        beyond = []
        for tag, values in floor.items():
            difference = scores[name][tag][0] - statistics.mean(values)
            deviation = statistics.stdev(values)
            if abs(difference) > bound * deviation:
                beyond.append(f"{tag} {difference:+.3f} ({difference / deviation:+.1f})")
        print(f"* {name}: {', '.join(beyond) or 'nothing'}")


def draw(title, seeds, scores, path):
    """Plot AVG-D and AVG-A of every variant, mean and 95 % interval.

    Where all variants are named by a number ("20 steps"), it is the horizontal axis, logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers = [re.match(r"\d+", variant) for variant in scores]
    is_curve = all(numbers)

    names = list(scores)
    x_of = {name: i for i, name in enumerate(names)}
    if is_curve:
        x_of = {name: int(number[0]) for name, number in zip(names, numbers, strict=True)}
        names.sort(key=x_of.get)
    x = [x_of[name] for name in names]

    _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for column in ("AVG-D", "AVG-A"):
        means = []
        halves = []
        for name in names:
            mean, half = interval(scores[name][column])
            means.append(mean)
            halves.append(half if len(seeds) > 1 else 0)
        style = "o-" if is_curve else "o"
        ax.errorbar(x, means, halves, fmt=style, capsize=4, label=column)

    if is_curve:
        unit = names[0].split()[1]
        ax.set(xscale="log", xlabel=unit)
        ax.set_xticks(x, list(map(str, x)))
    else:
        ax.set_xticks(x, names, rotation=30)
    ax.minorticks_off()
    ax.set(title=f"mini-UVRB: {title}, seeds {seeds[0]} to {seeds[-1]}", ylabel="score")
    ax.legend()
    pyplot.savefig(path, dpi=100)
    pyplot.close()
    print(f"\n{path}")


# Studies


def write_mixtures():
    """Write the mixtures of PLAIN and EASY."""
    mixture = json.loads(Path("runs/mini/train/mixture.json").read_text())
    plain = [source for source in mixture if source["name"] in TABLE_6]
    write_json(OUT / "plain.json", plain, indent=None)
    for source in mixture:
        if source["name"] in ("t2v-temporal", "t2v-camera"):
            source["negatives"] = 0
    write_json(OUT / "no-motion-negatives.json", mixture, indent=None)


def synthesise():
    """Make the pairs of RICH from more raw videos than the tour has."""
    captions = OUT / "raw/captions.jsonl"
    if not captions.is_file():
        bench.raw(OUT / "raw", n=100)
    # No V2V: its clips of two seconds need videos that are longer, and most of these are not.
    run(f"python synth.py --videos {captions} --out {OUT}/synth --max-new-tokens 96 --shares V2V=0")


def result_files(name):
    """List the results.json files of a study, finished or not."""
    seeds, variants = STUDIES[name]
    files = []
    for variant in variants.values():
        files += [variant.results(seed) for seed in seeds]
    return files


def compare_with_noise(scores):
    """Say which of the defects' differences are beyond the noise, where that has been studied."""
    found = []
    for path in result_files("noise"):
        if path.is_file():
            found.append(json.loads(path.read_text()))
    if len(found) > 2:
        print_beyond_noise(scores, columns(found))
    else:
        print("\nTo learn how much of this is noise: `python -m studies noise`, then this again.")


def check_data():
    """Raise ValueError where the tour has not been run, whose data all studies train on."""
    for path in (STAMP, UVRD):
        if not path.is_file():
            raise ValueError(f"{path}: not there; run `python -m mini` first")


def run_study(name):
    """Train and score all variants of a study; print its tables and draw its picture."""
    check_data()
    OUT.mkdir(parents=True, exist_ok=True)
    write_mixtures()
    if name == "synth":
        synthesise()

    seeds, variants = STUDIES[name]
    jobs = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for seed in seeds:
            for variant, how in variants.items():
                jobs[variant, seed] = pool.submit(measure, how, seed)
        measured = {}
        for variant in variants:
            measured[variant] = [jobs[variant, seed].result() for seed in seeds]

    scores = print_table(seeds, measured)
    if name == "defects":
        compare_with_noise(scores)
    draw(name, seeds, scores, OUT / f"{name}.png")


if __name__ == "__main__":  # python -m studies.study DEFECT SCRIPT FLAGS...: see run_logged
    run_with_defect(*sys.argv[1:])
