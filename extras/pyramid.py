"""The walk up the Modality Pyramid: R_k and P(k) per source and per level (section 4.2).

    python extras/pyramid.py runs/gve-mini/log.jsonl

Reads the log of a training run, prints the table of each curriculum epoch, and writes pyramid.png
beside the log.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

from support.files import load_jsonl
from support.flags import flag, parse_flags
from tables import pyramid_table


@dataclasses.dataclass
class Flags:
    log: str = flag(..., "log.jsonl of a training run", positional=True)


def read_log(path):
    """Read a run's log -> ({source: (level 1..4, task)}, the "epoch" event of each epoch).

    Raises ValueError naming the file if train.py did not write it.
    """
    try:
        events = load_jsonl(path)
        sources = events[0]["sources"]
        levels = {name: (source["level"], source["task"]) for name, source in sources.items()}
        epochs = [event for event in events if event["event"] == "epoch"]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a log of this train.py ({error!r})") from error
    if not epochs:
        raise ValueError(f"{path}: not a log of this train.py that has begun an epoch")
    return levels, epochs


def plot(epochs, levels, path):
    """Draw R_k with its standard error, and P(k), over the epochs.

    A thin line is a source, a thick one the sum of its level; a colour is a level.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no screen
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    x = [event["epoch"] + 1 for event in epochs]

    # Sources. Only the pyramid probes them; the other schedules have no R_k.
    probed = all(event["R"] for event in epochs)
    for name, (level, _) in sorted(levels.items(), key=lambda item: item[1]):
        style = {"color": f"C{level}", "alpha": 0.6, "label": f"{level}: {name}"}
        if probed:
            relevance = [event["R"][name] for event in epochs]
            error = [event["R_error"][name] for event in epochs]
            left.errorbar(x, relevance, error, **style)
        right.plot(x, [event["P"][name] for event in epochs], **style)

    # Levels.
    for level in sorted({level for level, _ in levels.values()}):
        level_sum = [event["level_P"][str(level)] for event in epochs]
        right.plot(x, level_sum, color=f"C{level}", linewidth=4, alpha=0.4)

    left.set_title("R_k, mean cosine of positive pairs under the prober")
    right.set_title("P(k), thick: sum of a level")
    for ax in (left, right):
        ax.set(xlabel="curriculum epoch", xticks=x)
    right.legend(
        fontsize=6,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        title="level: source",
        title_fontsize=7,
    )
    picture.savefig(path, dpi=100)
    pyplot.close(picture)


def main(argv=None):
    """Print the tables of a log and draw its picture; returns an error text or None."""
    flags = parse_flags(Flags, argv, __doc__)
    if not Path(flags.log).is_file():
        return f"The walk is read from the log of a training run; no such file: {flags.log}"
    try:
        levels, epochs = read_log(flags.log)
    except ValueError as error:
        return str(error)

    for event in epochs:
        number = event["epoch"] + 1
        print(f"\nepoch {number}, sigma {event['sigma']:.2f}, schedule {event['schedule']}")
        print(pyramid_table(event, levels))
    path = Path(flags.log).with_name("pyramid.png")
    plot(epochs, levels, path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
