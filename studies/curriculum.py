"""In which order should a training run draw its sources? `python -m studies curriculum`, hours.

The tour's training under seven schedules (train.SCHEDULES), 640 steps or 1.9 passes over its data,
and one pass, 122 steps, over sources that build on one another; ten seeds, which the variants
share. "pyramid", "reverse" and "pyramid by task" see the same batches in another order;
"proportional" and "staged" see each source about as often; "pyramid-free" and "uniform" change the
amount of each source as well as the order. Two differences of AVG-D at the end were named
beforehand: reverse - pyramid (does the order matter?) and pyramid-free - pyramid (which is the
tour's?). Beside the scores at the end:

* the scores at a third and two thirds of the way, since an early lead is what an order can buy;
* the training loss of each source over the run;
* forgetting: a source's R@1 among 64 held-out pairs of its own, at the first state saved after its
  last step, and at the end. Sources that are drawn in the last tenth are left out of the mean: they
  cannot forget. The held-out pairs are the same sources of another world (another seed).

Intervals hold for one comparison at a time, so of twenty without a difference one leaves out zero,
on average. They are of the seeds: the questions of mini-UVRB stay the same.

A finished run is a line of records/curriculum.jsonl and is not run again: the study may be stopped
at any time, and goes on there. --table runs nothing; it prints and draws the results so far.
"""

import collections
import json
import math
import os
import re
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy import stats

import train
from data import content_id, load_mixture
from mini import bench
from model import GVE
from studies import study
from support.files import file_lock, load_jsonl, short_commit, write_json, write_jsonl

RECORD = Path("records/curriculum.jsonl")
HELD_OUT = study.OUT / "held-out"
HELD_OUT_SEED = 1  # of its world; the tour's is bench.SEED
HELD_OUT_PAIRS = 64
EPOCHS = 3
PARTS = 10  # of a run, over each of which a source's losses are averaged
SEEDS = range(5, 15)

# Sources that build on one another: words and pictures of single scenes, then clips of them, then
# long videos and edited clips of such scenes.
CHAIN = ("t2t", "t2i", "ti2i", "t2v", "v2v", "t2v-long", "tv2v")
CHAIN_MIXTURE = study.OUT / "chain.json"
# What the variants train on, as flags of train.py. All states stay, to be measured at the end.
HOW = "--save-every 10 --keep 99 --log-every 1 --micro-batch 16"  # 16: a little faster
DATA = {
    "tour": f"{study.BOTH} {HOW}",
    "chain": f"--mixture {CHAIN_MIXTURE} --root runs/mini/train --steps 0 {HOW}",
}

# {name: (key of DATA, more flags of train.py)}; differences are to the first on the same data.
VARIANTS = {
    "pyramid": ("tour", "--schedule pyramid"),
    "pyramid-free": ("tour", "--schedule pyramid-free"),
    "reverse": ("tour", "--schedule reverse"),
    "proportional": ("tour", "--schedule proportional"),
    "pyramid by task": ("tour", "--schedule pyramid --relevance task"),
    "staged": ("tour", "--schedule staged"),
    "uniform": ("tour", "--schedule uniform"),
    "chain: pyramid": ("chain", "--schedule pyramid"),
    "chain: reverse": ("chain", "--schedule reverse"),
    "chain: proportional": ("chain", "--schedule proportional"),
}


# One run


def measure_run(name, seed):
    """Train a variant with a seed, measure it along the way, and add it to the record."""
    data, more = VARIANTS[name]
    how = study.Variant(f"{DATA[data]} {more}")
    study.train(how, seed)
    run = how.folder(seed)
    log = load_jsonl(run / "log.jsonl")
    start = next(event for event in log if event["event"] == "start")
    steps = [event for event in log if event["event"] == "step"]
    gve = GVE.from_pretrained(str(run), lora=True).eval()

    scores = {}
    for epoch in range(EPOCHS):
        step = train.epoch_steps(epoch, EPOCHS, len(steps)).stop
        scores[step] = score_state(gve, run, step)

    line = {
        "variant": name,
        "seed": seed,
        "flags": how.train,
        "commit": start["commit"],
        "torch": start["torch"],
        "scores": scores,
        "losses": mean_losses(steps),
        "held_out": measure_forgetting(gve, run, steps),
    }
    with file_lock(study.OUT / "record.lock"):
        write_jsonl(RECORD, [*read_record(), line])
    shutil.rmtree(run / "state")  # some 100 MB


def read_record():
    """Return the finished runs, a list of the record's lines."""
    return load_jsonl(RECORD) if RECORD.exists() else []


def mean_losses(steps):
    """Average each source's losses over tenths of a run -> {source: [mean, or None, ...]}.

    steps: the "step" events of a log, all of them.
    """
    losses = collections.defaultdict(lambda: [[] for _ in range(PARTS)])
    for i, event in enumerate(steps):
        losses[event["source"]][i * PARTS // len(steps)].append(event["loss"])
    means = {}
    for source, parts in losses.items():
        means[source] = [round(statistics.mean(part), 4) if part else None for part in parts]
    return means


def restore(gve, run, step):
    """Give a model the LoRA weights that a run had after a step at which it left a state."""
    tensors = load_file(run / f"state/step-{step:08d}/tensors.safetensors")
    with torch.no_grad():
        for i, weight in enumerate(gve.lora_parameters().values()):
            weight.copy_(tensors[f"{i}.weight"])


def score_state(gve, run, step):
    """Score the model of a step on mini-UVRB -> {"AVG-D", "AVG-A", "abilities": {...}}."""
    restore(gve, run, step)
    folder = run / f"at-{step}"
    gve.save_pretrained(folder)
    study.run_logged(f"python eval.py --ckpt {folder} --out {folder}", run / f"eval-{step}.txt")
    results = json.loads((folder / "results.json").read_text())
    shutil.rmtree(folder)
    return {key: results[key] for key in ("AVG-D", "AVG-A", "abilities")}


def measure_forgetting(gve, run, steps):
    """Measure R@1 on held-out pairs at the first state after a source's last step and at the end.

    Returns {source: {"step": that state's, "then": its R@1, "end": R@1 at the end}} for the sources
    that have held-out pairs. steps: the "step" events of a log, all of them.
    """
    # No base and no out, which must be named: the model is there, and nothing is written.
    flags = train.Flags(base="-", out="-", data=str(HELD_OUT), workers=0)
    sources = {source.name: source for source in load_mixture(HELD_OUT / "train/mixture.json")}
    states = sorted(int(path.name.removeprefix("step-")) for path in (run / "state").iterdir())
    last = {event["source"]: event["step"] for event in steps if event["source"] in sources}
    state_after = {}
    for source, step in last.items():
        state_after[source] = next(state for state in states if state >= step)

    measured = {}
    for state in sorted({*state_after.values(), len(steps)}):
        restore(gve, run, state)
        for source, its_state in state_after.items():
            if state not in (its_state, len(steps)):
                continue
            recall = recall_at_1(gve, sources[source], flags)
            if state == its_state:
                measured[source] = {"step": state, "then": recall}
            if state == len(steps):
                measured[source]["end"] = recall
    return measured


def recall_at_1(gve, source, flags):
    """Return the share of queries whose positive, or one of equal content, scores highest."""
    pairs, q, p = train.embed_pairs(gve, source, range(min(HELD_OUT_PAIRS, len(source))), flags)
    ids = torch.tensor([content_id(positive) for _, _, positive in pairs])
    best = (q @ p.T).argmax(1)
    return round(float((ids[best] == ids).double().mean()), 4)


# All runs


def prepare():
    """Render the held-out pairs and write the mixture of CHAIN."""
    study.OUT.mkdir(parents=True, exist_ok=True)
    bench.write(HELD_OUT, HELD_OUT_SEED)
    mixture = json.loads(Path("runs/mini/train/mixture.json").read_text())
    chain = [source for source in mixture if source["name"] in CHAIN]
    write_json(CHAIN_MIXTURE, chain, indent=None)


def run_missing():
    """Run all that is not in the record yet, seed by seed, as many at once as there are cores."""
    done = {(line["variant"], line["seed"]) for line in read_record()}
    missing = []
    for seed in SEEDS:
        missing += [(name, seed) for name in VARIANTS if (name, seed) not in done]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = []
        for name, seed in missing:
            log = study.OUT / f"curriculum-{re.sub('[^a-z]+', '-', name)}-{seed}.txt"
            command = f"python -m studies.curriculum {seed} {name}"
            jobs.append(pool.submit(study.run_logged, command, log))
        for job in jobs:
            job.result()


# Tables


def print_tables():
    """Print the study's tables from the record, over the seeds that all variants have."""
    found = collections.defaultdict(dict)  # {variant: {seed: line}}
    for line in read_record():
        found[line["variant"]][line["seed"]] = line
    for data in DATA:
        names = [name for name in VARIANTS if VARIANTS[name][0] == data]
        seeds = sorted(set.intersection(*[set(found[name]) for name in names]))
        print(f"\n## Data of {data}: {len(seeds)} seeds that all variants have\n")
        if len(seeds) < 2:
            continue
        runs = {}  # {variant: its lines, in the order of the seeds}
        for name in names:
            runs[name] = [found[name][seed] for seed in seeds]
        study.print_table(seeds, {name: scores_at(lines, -1) for name, lines in runs.items()})
        print_power(runs)
        print_along_the_way(runs)
        print_forgetting(runs)


def scores_at(lines, point):
    """Return the scores of runs at a point of measurement: 0, 1, ..., or -1 for the end."""
    return [list(line["scores"].values())[point] for line in lines]


def differences(runs, name, point):
    """Return AVG-D of a variant's runs minus that of the first variant's, seed by seed."""
    first = next(iter(runs.values()))
    pairs = zip(scores_at(runs[name], point), scores_at(first, point), strict=True)
    return [score["AVG-D"] - of_first["AVG-D"] for score, of_first in pairs]


def print_power(runs):
    """Print the smallest difference of AVG-D to the first variant that the seeds would show.

    It is that of a paired t test, two-sided at 5 % with power .8, if the deviation of the pairs'
    differences is as it was found.
    """
    first, *others = runs
    print(f"\nThe true difference to {first} that so many pairs show with power .8 at 5 %:\n")
    for name in others:
        values = differences(runs, name, -1)
        n = len(values)
        deviation_of_mean = statistics.stdev(values) / math.sqrt(n)
        deviations = stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)
        print(f"* {name}: {deviations * deviation_of_mean:.3f}")


def print_along_the_way(runs):
    """Print AVG-D at each point of measurement, and the paired differences to the first variant."""
    first = next(iter(runs))
    points = list(runs[first][0]["scores"])
    print(f"\nAVG-D after so many steps: mean, and difference to {first} with 95 % interval\n")
    study.print_row("", points)
    study.print_row("---", ["---"] * len(points))
    for name, lines in runs.items():
        cells = []
        for point in range(len(points)):
            mean = statistics.mean(score["AVG-D"] for score in scores_at(lines, point))
            difference, half = study.interval(differences(runs, name, point))
            own = f"{mean:.3f}"
            cells.append(own if name == first else f"{own} ({difference:+.3f} ± {half:.3f})")
        study.print_row(name, cells)


def print_forgetting(runs):
    """Print each source's held-out R@1 after its last step, and its change by the end."""
    sources = set()
    for lines in runs.values():
        for line in lines:
            sources |= set(line["held_out"])
    sources = sorted(sources)
    print("\nHeld-out R@1 after a source's last step, and its change by the end of the run\n")
    study.print_row("", [*sources, "all"])
    study.print_row("---", ["---"] * (len(sources) + 1))
    for name, lines in runs.items():
        cells = []
        for source in sources:
            # A run may never have drawn the source.
            entries = [line["held_out"][source] for line in lines if source in line["held_out"]]
            if not entries:
                cells.append("-")
                continue
            then = statistics.mean(entry["then"] for entry in entries)
            end = statistics.mean(entry["end"] for entry in entries)
            cells.append(f"{then:.2f} {end - then:+.3f}")
        study.print_row(name, [*cells, mean_change(lines)])


def mean_change(lines):
    """Write what sources lose after their last step: the mean over sources, with its interval.

    A run's sources that are drawn in its last tenth do not count.
    """
    of_runs = []
    for line in lines:
        end = max(int(step) for step in line["scores"])
        changes = []
        for entry in line["held_out"].values():
            if entry["step"] <= 0.9 * end:
                changes.append(entry["end"] - entry["then"])
        if changes:
            of_runs.append(statistics.mean(changes))
    if len(of_runs) < 2:
        return "-"
    mean, half = study.interval(of_runs)
    return f"{mean:+.3f} ± {half:.3f}"


def draw(path):
    """Plot AVG-D along the way, and the losses of the sources under three schedules.

    Variants with a single run are left out; if there are no others, nothing is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = collections.defaultdict(list)
    for line in read_record():
        found[line["variant"]].append(line)
    names = [name for name in VARIANTS if len(found[name]) > 1]
    if not names:
        print(f"\nno variant has two runs yet, so {path} is not drawn")
        return
    size = (16, 4.5)
    picture, (left, *right) = pyplot.subplots(1, 4, figsize=size, layout="constrained")
    for name in names:
        points = [int(step) for step in found[name][0]["scores"]]
        means = []
        halves = []
        for point in range(len(points)):
            scores = [score["AVG-D"] for score in scores_at(found[name], point)]
            mean, half = study.interval(scores)
            means.append(mean)
            halves.append(half)
        left.errorbar(points, means, halves, capsize=3, marker="o", label=name)
    left.set(title="AVG-D, mean and 95 % interval", xlabel="steps")
    left.legend(fontsize=7)

    for ax, name in zip(right, ("pyramid", "reverse", "proportional"), strict=True):
        curves = collections.defaultdict(list)
        for line in found[name]:
            for source, losses in line["losses"].items():
                curves[source].append(losses)
        for source, of_seeds in sorted(curves.items()):  # one colour per source everywhere
            shown = []  # (part of the run, mean loss)
            for part, values in enumerate(zip(*of_seeds, strict=True)):
                there = [value for value in values if value is not None]
                if there:
                    shown.append(((part + 0.5) / PARTS, statistics.mean(there)))
            ax.plot(*zip(*shown, strict=True), ".-", linewidth=1, label=source)
        ax.set(title=f"loss by source: {name}", xlabel="share of the run", ylim=(0, None))
    if curves:
        ax.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, dpi=100)
    pyplot.close(picture)
    print(f"\n{path}")


def run_study(only_table):
    """Run what is missing, unless only the table is asked for, and print and draw all results."""
    if not only_table:
        study.check_data()
        prepare()
        run_missing()
    print(f"commit {short_commit()}, from {RECORD}")
    print_tables()
    draw(RECORD.with_suffix(".png"))


if __name__ == "__main__":  # python -m studies.curriculum SEED VARIANT: see run_missing
    measure_run(" ".join(sys.argv[2:]), int(sys.argv[1]))
