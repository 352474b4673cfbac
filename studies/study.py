"""What makes a difference on mini-UVRB, and what is noise: `python -m mini study NAME` trains and scores a table of variants.

Every variant is train.py with other flags, one run per seed and as many at once as there are cores, kept under runs/study: what
is finished with the same data is not run again (after a change to the code, delete it). <study>.png shows the averages. Two of
the defects are made in the code, by starting a script through this file (`broken`).
"""

import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from scipy import stats
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

OUT = Path("runs/study")
DATA = Path("runs/mini/stamp.json"), Path("runs/synth/uvrd/mixture.json")
BOTH = "--mixture runs/mini/train/mixture.json runs/synth/uvrd/mixture.json --root runs/raw"  # the tour's training data
RANDOM = OUT / "random"  # a prober that knows nothing
SHORT = f"{BOTH} --steps 320 --batch-scale 0.5"  # a quarter of the tour: `curriculum` has 45 runs
EASY = f"--mixture {OUT}/no-motion-negatives.json runs/synth/uvrd/mixture.json --root runs/raw runs/mini/train"
# `synth`: V-SynFlow on more raw videos beside collected sources of kinds that Table 6 has: no composed video, no twins
TABLE6 = "t2t", "t2i", "ti2i", "t2v", "t2v-long"
PLAIN = f"--root runs/mini/train {OUT}/raw --steps 320 --mixture {OUT}/plain.json"
RICH = f"{PLAIN} {OUT}/synth/uvrd/mixture.json"


@dataclasses.dataclass
class Variant:
    train: str = BOTH  # flags of train.py besides --seed
    test: str = ""  # flags of eval.py
    defect: str = ""  # a key of DEFECTS
    late: bool = False  # the defect is there at test time alone

    def folder(self, seed):
        """Where its checkpoint lies: the same for every variant that trains alike, another one for other data."""
        named = {Path(word) for word in self.train.split() if word.endswith(".json")}
        made = b"".join(path.read_bytes() for path in sorted({DATA[0], *named}) if path.is_file())
        trained = f"{'' if self.late else self.defect} {self.train}".encode()
        return OUT / f"{zlib.crc32(trained + made):08x}-seed{seed}"

    def results(self, seed):
        what = re.sub(r"\W+", "_", self.test).strip("_") + self.late * self.defect
        return self.folder(seed) / what / "results.json"


TOUR, PYRAMID = Variant(), Variant(SHORT)
STUDIES = {  # name: (seeds, {variant: how}); differences are to the first variant
    "noise": (range(42, 52), {"default": TOUR}),
    "defects": (
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
    "late": (
        range(42, 52),
        {
            "default": TOUR,
            "1-D positions at test": Variant(defect="1d", late=True),
            "pooled early at test": Variant(defect="early", late=True),
        },
    ),
    "scaling": (
        range(42, 45),
        {f"{n} steps": Variant(f"{BOTH} --steps {n}") for n in (6, 20, 64, 200)}
        | {"640 steps": TOUR},
    ),
    "frames": (
        range(42, 45),
        {"8 frames": TOUR} | {f"{n} frames": Variant(test=f"--frames {n}") for n in (2, 4, 16)},
    ),
    "synth": (
        range(5, 15),
        {
            "GVE-i": Variant(f"{PLAIN} --schedule proportional"),
            "GVE-s": Variant(f"{RICH} --schedule proportional"),
            "GVE": Variant(RICH),
        },
    ),
    "curriculum": (
        range(42, 47),
        {
            "pyramid": PYRAMID,
            **{
                name: Variant(f"{SHORT} --schedule {name}")
                for name in ("proportional", "uniform", "staged")
            },
            **{f"sigma to {s}": Variant(f"{SHORT} --sigma-max {s}") for s in (0.3, 3)},
            **{
                f"prober {name}": Variant(f"{SHORT} --prober {path}")
                for name, path in {
                    "base": "mini/base",
                    "trained": PYRAMID.folder(42),
                    "random": RANDOM,
                }.items()
            },
        },
    ),
}


# Deliberate defects in the code


def one_dimensional(model):
    """Every token's position is its place in the row, whatever it shows."""

    def positions(self, batch):
        mask = batch["attention_mask"]
        return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)

    model.GVE.positions = positions


def one_early(model):
    """Pool the token before the last one."""
    pool = model.POOLINGS["last_token"]

    def early(hidden, mask):
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return pool(hidden, mask.scatter(1, last[:, None], 0))

    model.POOLINGS["last_token"] = early


DEFECTS = {"1d": one_dimensional, "early": one_early}


def broken(defect, script, *flags):
    """Run a script of ours with a defect in it."""
    import model

    DEFECTS[defect](model)
    sys.argv = [script, *flags]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(script, run_name="__main__")


# Runs and tables


def measure(variant, seed):
    """Train and score one variant with one seed, unless that has been done -> content of results.json."""
    from support.files import (
        file_lock as lock,  # not where a script is started through this file, out of its folder
    )

    folder, results = variant.folder(seed), variant.results(seed)
    results.parent.mkdir(parents=True, exist_ok=True)

    def script(command, log, defect=variant.defect):
        start = [sys.executable, *([__file__, defect] if defect else [])]
        with open(log, "w") as out:
            status = subprocess.run(
                [*start, *command.split()],
                stdout=out,
                stderr=out,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if status.returncode:
            raise RuntimeError(
                f"`{command}` ended with status {status.returncode}; its output is in {log}"
            )

    with lock(folder / "lock"):  # variants may share a checkpoint
        if not (folder / "trained").is_file():  # a checkpoint alone may be that of an epoch's end
            script(
                f"train.py --workers 0 {variant.train} --seed {seed} --out {folder}",
                folder / "train.txt",
                "" if variant.late else variant.defect,
            )
            (folder / "trained").touch()
    if not results.is_file():
        script(
            f"eval.py --ckpt {folder} {variant.test} --out {results.parent}",
            results.with_name("eval.txt"),
        )
    return json.loads(results.read_text())


def interval(values):
    """Mean and half of its 95 % interval (Student's t); inf for a single value."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    return statistics.mean(values), stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(
        values
    ) / math.sqrt(len(values))


def columns(results):
    """{ability or average: its scores} of several contents of results.json."""
    return {
        c: [{**r["abilities"], **r}[c] for r in results]
        for c in (*results[0]["abilities"], "AVG-D", "AVG-A")
    }


def table(seeds, measured):
    """Print means, deviations over seeds and paired differences to the first variant; measured {variant: [results]} -> {variant:
    columns()}."""
    scores, first = (
        {name: columns(results) for name, results in measured.items()},
        next(iter(measured)),
    )
    names = list(scores[first])

    def line(name, cells):
        print("| " + " | ".join([name, *cells]) + " |")

    about = (
        "means, deviations over seeds, then paired differences with 95 % intervals"
        if len(seeds) > 1
        else "with differences"
    )
    print(f"mini-UVRB, seeds {seeds[0]} to {seeds[-1]}, {about} to {first}\n")
    line("", names)
    line("---", ["---"] * len(names))
    for name in measured:
        line(name, [f"{statistics.mean(scores[name][c]):.3f}" for c in names])
        if len(seeds) > 1:
            line("", [f"({statistics.stdev(scores[name][c]):.3f})" for c in names])
    for name in list(measured)[1:]:
        pairs = {
            c: [a - b for a, b in zip(scores[name][c], scores[first][c], strict=True)]
            for c in names
        }
        form = "{:+.3f} ± {:.3f}" if len(seeds) > 1 else "{:+.3f}"
        line(f"{name} - {first}", [form.format(*interval(pairs[c])) for c in names])
    if len(seeds) >= 5 and len(measured) == 1:
        deviation = statistics.stdev(scores[first]["AVG-D"])
        needed = math.ceil(2 * (1.96 + 0.84) ** 2 * (deviation / 0.01) ** 2)
        print(f"\nTo see .01 of AVG-D with power .8 at 5 %: {needed} seeds a side.")
    return scores


def found(scores, floor):
    """Print where one run differs from the default's runs by more than another of them would, 95 % over all columns (Bonferroni).

    scores {variant: {column: [score]}}, the default first; floor {column: scores of the default}, from `study noise`.
    """
    n = len(next(iter(floor.values())))
    print(
        f"\nBeyond the noise of {n} seeds of the default (differences to their mean, in their deviations):\n"
    )
    for name in list(scores)[1:]:
        limit, seen = stats.t.ppf(1 - 0.025 / len(floor), n - 1) * math.sqrt(1 + 1 / n), []
        for column, values in floor.items():
            away, deviation = (
                scores[name][column][0] - statistics.mean(values),
                statistics.stdev(values),
            )
            seen += (
                [f"{column} {away:+.3f} ({away / deviation:+.1f})"]
                if abs(away) > limit * deviation
                else []
            )
        print(f"* {name}: {', '.join(seen) or 'nothing'}")


def picture(name, seeds, scores, path):
    """Draw AVG-D and AVG-A of every variant, mean and 95 % interval; along a number where the variants are named by one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    numbers = [re.match(r"\d+", variant) for variant in scores]
    x = [int(m[0]) for m in numbers] if all(numbers) else range(len(scores))
    for column in ("AVG-D", "AVG-A"):
        means, halves = zip(*(interval(scores[variant][column]) for variant in scores), strict=True)
        order = sorted(range(len(scores)), key=lambda i: x[i])
        ax.errorbar(
            [x[i] for i in order],
            [means[i] for i in order],
            [halves[i] if len(seeds) > 1 else 0 for i in order],
            fmt="o-" if all(numbers) else "o",
            capsize=4,
            label=column,
        )
    if all(numbers):
        ax.set(xscale="log", xlabel=next(iter(scores)).split()[1])
    ax.set_xticks(
        x, [str(v) for v in x] if all(numbers) else list(scores), rotation=0 if all(numbers) else 30
    )
    ax.minorticks_off()
    ax.set(title=f"mini-UVRB: {name}, seeds {seeds[0]} to {seeds[-1]}", ylabel="score")
    ax.legend()
    pyplot.savefig(path, dpi=100)
    pyplot.close()
    print(f"\n{path}")


def study(name):
    if missing := [str(path) for path in DATA if not path.is_file()]:
        raise ValueError(f"{missing[0]}: not there; run `python -m mini` first")
    seeds, variants = STUDIES[name]
    mixture = json.loads(Path("runs/mini/train/mixture.json").read_text())
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "plain.json").write_text(
        json.dumps([source for source in mixture if source["name"] in TABLE6])
    )
    for source in mixture:
        if source["name"] in ("t2v-temporal", "t2v-camera"):
            source["negatives"] = 0
    if name == "synth":
        from mini import bench  # late: this file is a script, too

        if not (OUT / "raw/captions.jsonl").is_file():
            bench.raw(OUT / "raw", n=100)
        subprocess.run(
            [
                sys.executable,
                *f"synth.py --videos {OUT}/raw/captions.jsonl --out {OUT}/synth --max-new-tokens 96 "
                "--shares V2V=0".split(),
            ],
            check=True,
        )  # clips of two seconds, which films of two seconds do not have
    if name == "curriculum" and not RANDOM.is_dir():
        torch.manual_seed(0)
        shutil.copytree("mini/base", RANDOM)
        Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig.from_pretrained("mini/base")
        ).save_pretrained(RANDOM)
    (OUT / "no-motion-negatives.json").write_text(json.dumps(mixture))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (variant, seed): pool.submit(measure, how, seed)
            for seed in seeds
            for variant, how in variants.items()
        }
        scores = table(
            seeds,
            {variant: [jobs[variant, seed].result() for seed in seeds] for variant in variants},
        )
    if name == "defects":
        floor = [TOUR.results(seed) for seed in STUDIES["noise"][0] if TOUR.results(seed).is_file()]
        if len(floor) > 2:
            found(scores, columns([json.loads(path.read_text()) for path in floor]))
        else:
            print("\nWhat of this is noise: `python -m mini study noise` first, then this again.")
    picture(name, seeds, scores, OUT / f"{name}.png")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    broken(*sys.argv[1:])
