"""The walk up the Modality Pyramid: R_k, P(k) and quotas per source and per level (section 4.2).

    python extras/pyramid.py runs/gve-mini/log.jsonl           of a training run
    python extras/pyramid.py mixtures/gve-3b.json              of a run to come

Prints the table of each curriculum epoch, and draws pyramid.png beside the log. A mixture's walk
needs no data and no model, since its R_k are made up: --profile gives each level's.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

from support.files import load_jsonl
from support.flags import flag, parse_flags
from tables import pyramid_table
from train import LEVEL, SCHEDULES, Sampler, plan_epoch


@dataclasses.dataclass
class Flags:
    source: str = flag(..., "log.jsonl of a training run, or a mixture", positional=True)
    profile: list[float] = flag(
        [0.8, 0.65, 0.5, 0.35], "of a mixture: R_k of the sources on levels 1 to 4"
    )
    schedule: str = flag("pyramid", "of a mixture: as in train.py", choices=list(SCHEDULES))
    epochs: int = flag(3, "of a mixture: curriculum epochs")
    steps: int = flag(0, "of a mixture: steps of the run; 0: one pass")
    sigma_max: float = flag(1.0, "of a mixture: sigma of the last epoch; the first has 0.1")
    batch_scale: float = flag(32.0, "of a mixture: global batch = a source's batch_size times this")
    seed: int = flag(42, "of a mixture: random seed")
    out: str = flag("", "picture to write; empty: pyramid.png beside the log or in the folder here")


@dataclasses.dataclass
class Entry:
    """An entry of a mixture, as train.Sampler wants it; its rows need not be there."""

    name: str
    task: str
    samples: int
    batch_size: int

    def __len__(self):
        return self.samples


def walk_mixture(flags):
    """Walk a mixture with R_k made up -> the same as read_log.

    Raises ValueError naming the file if it is no mixture.
    """
    try:
        sources = []
        for entry in json.loads(Path(flags.source).read_text()):
            values = [entry[field.name] for field in dataclasses.fields(Entry)]
            sources.append(Entry(*values))
        if not sources:
            raise ValueError("it is empty")
        levels = {source.name: (LEVEL[source.task], source.task) for source in sources}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flags.source}: not a mixture ({error!r})") from error
    if len(flags.profile) != 4:
        raise ValueError(f"--profile: expected 4 numbers, one per level, got {flags.profile}")

    relevance = [flags.profile[LEVEL[source.task] - 1] for source in sources]
    start = {"relevance": relevance, "error": [0.0] * len(sources)}
    sampler = Sampler(sources, flags.batch_scale, flags.seed)
    epochs = []
    for epoch in range(flags.epochs):
        _, about = plan_epoch(flags, epoch, start, sources, sampler)
        epochs.append(about)
    return levels, epochs


def read_log(path):
    """Read a run's log -> ({source: (level 1..4, task)}, the "epoch" event of each epoch).

    Raises ValueError naming the file if train.py did not write it.
    """
    try:
        events = load_jsonl(path)
        sources = events[0]["sources"]
        levels = {name: (source["level"], source["task"]) for name, source in sources.items()}
        epochs = [event for event in events if event["event"] == "epoch"]
        for event in epochs:
            missing = {"R", "P", "drawn", "used", "quota", "passes"} - event.keys()
            if missing:  # a log of an older train.py
                raise KeyError(*sorted(missing))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a log of this train.py ({error!r})") from error
    if not epochs:
        raise ValueError(f"{path}: not a log of this train.py that has begun an epoch")
    return levels, epochs


def plot(epochs, levels, path):
    """Draw R_k with its standard error, P(k), and the steps of each level, over the epochs.

    In the first two a thin line is a source, a thick one the sum of its level; a colour is a level.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no screen
    from matplotlib import pyplot

    size = (19, 5.5)
    picture, (left, middle, right) = pyplot.subplots(1, 3, figsize=size, layout="constrained")
    x = [event["epoch"] + 1 for event in epochs]

    # Sources. Not all schedules probe them; the others have no R_k.
    probed = all(event["R"] for event in epochs)
    for name, (level, _) in sorted(levels.items(), key=lambda item: item[1]):
        style = {"color": f"C{level}", "alpha": 0.6, "label": f"{level}: {name}"}
        if probed:
            relevance = [event["R"][name] for event in epochs]
            error = [event["R_error"][name] for event in epochs]
            left.errorbar(x, relevance, error, **style)
        middle.plot(x, [event["P"][name] for event in epochs], **style)

    # Levels: sums over their sources
    numbers = sorted({level for level, _ in levels.values()})
    for position, level in enumerate(numbers):
        members = [name for name, (own_level, _) in levels.items() if own_level == level]

        def total(values, members=members):
            return sum(values[name] for name in members)

        level_p = [total(event["P"]) for event in epochs]
        middle.plot(x, level_p, color=f"C{level}", linewidth=4, alpha=0.4)

        # One bar per epoch, side by side with those of the other levels
        used = [total(event["used"]) for event in epochs]
        at = [epoch + 0.8 * (position + 0.5) / len(numbers) - 0.4 for epoch in x]
        bars = {"width": 0.7 / len(numbers), "color": f"C{level}"}
        right.bar(at, used, label=f"level {level}: used", **bars)
        if epochs[0]["quota"]:
            unused = [total(event["quota"]) - n for event, n in zip(epochs, used, strict=True)]
            right.bar(at, unused, bottom=used, alpha=0.25, label=f"level {level}: left", **bars)

    left.set_title("R_k, mean cosine of positive pairs under the prober")
    middle.set_title("P(k), mean over an epoch; thick: sum of a level")
    right.set_title("steps of each level by the epoch's end")
    for ax in (left, middle, right):
        ax.set(xlabel="curriculum epoch", xticks=x)
    right.legend(fontsize=7, loc="upper left")
    handles, labels = middle.get_legend_handles_labels()
    picture.legend(handles, labels, fontsize=6, loc="outside right center", title="level: source")
    picture.savefig(path, dpi=100)
    pyplot.close(picture)


def main(argv=None):
    """Print the tables of a walk and draw its picture; returns an error text or None."""
    flags = parse_flags(Flags, argv, __doc__)
    if not Path(flags.source).is_file():
        return f"The walk is read from a training run's log, or a mixture; no file {flags.source}"
    of_log = flags.source.endswith(".jsonl")
    try:
        levels, epochs = read_log(flags.source) if of_log else walk_mixture(flags)
    except ValueError as error:
        return str(error)

    for event in epochs:
        number = event["epoch"] + 1
        print(f"\nepoch {number}, sigma {event['sigma']:.2f}, schedule {event['schedule']}")
        print(pyramid_table(event, levels))
    path = Path(flags.out or "pyramid.png")
    if of_log and not flags.out:
        path = Path(flags.source).with_name("pyramid.png")
    plot(epochs, levels, path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
