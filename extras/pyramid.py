"""The walk up the Modality Pyramid, from a run's log: R_k and P(k) per source and per level (arXiv 2510.27571, section 4.2).

python extras/pyramid.py runs/gve-mini/log.jsonl        # prints the tables of all epochs, writes pyramid.png beside the log
"""

import json
import sys
from pathlib import Path


def table(event, levels):
    """One curriculum epoch as text: R_k, its standard error, P(k), expected steps and passes so far, per source and per level.

    event: the log's "epoch" line; levels {source: (level 1..4, task)}
    """
    lines = [
        f"{'level':>5} {'task':<6} {'source':<24} {'R_k':>7} {'+-':>6} {'P(k)':>7} {'steps':>7} {'passes':>7}"
    ]
    for level in range(1, 5):
        members = [name for name, (of, _) in levels.items() if of == level]
        for name in members:
            r = (
                f"{event['R'][name]:7.3f} {event['R_error'][name]:6.3f}"
                if event["R"]
                else f"{'-':>7} {'-':>6}"
            )
            lines.append(
                f"{level:>5} {levels[name][1]:<6} {name:<24} {r} {event['P'][name]:7.3f} "
                f"{event['P'][name] * event['steps']:7.1f} {event['passes'][name]:7.2f}"
            )
        if members:
            p = event["level_P"][str(level)]
            lines.append(f"{level:>5} {'all':<6} {'':<39} {p:7.3f} {p * event['steps']:7.1f}")
    return "\n".join(lines)


def plot(epochs, levels, path):
    """Draw R_k with its standard error and P(k) over the epochs: a line per source, a colour per level, wide ones their sums."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    x = [event["epoch"] + 1 for event in epochs]
    for name, (level, _) in sorted(levels.items(), key=lambda pair: pair[1]):
        look = {"color": f"C{level}", "alpha": 0.6, "label": f"{level}: {name}"}
        if all(event["R"] for event in epochs):
            left.errorbar(
                x, [e["R"][name] for e in epochs], [e["R_error"][name] for e in epochs], **look
            )
        right.plot(x, [event["P"][name] for event in epochs], **look)
    for level in sorted({level for level, _ in levels.values()}):
        right.plot(
            x,
            [event["level_P"][str(level)] for event in epochs],
            color=f"C{level}",
            linewidth=4,
            alpha=0.4,
        )
    for ax, what in (
        (left, "R_k, mean cosine of positive pairs under the prober"),
        (right, "P(k), thick: sum of a level"),
    ):
        ax.set(title=what, xlabel="curriculum epoch", xticks=x)
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
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or not Path(words[0]).is_file():
        return __doc__
    try:
        events = [json.loads(line) for line in Path(words[0]).read_text().splitlines()]
        levels = {
            name: (source["level"], source["task"]) for name, source in events[0]["sources"].items()
        }
        epochs = [event for event in events if event["event"] == "epoch"]
        epochs[0]  # a log without one has no walk to draw
    except (ValueError, IndexError, KeyError, TypeError) as error:
        return f"{words[0]}: not a log of this train.py ({error!r})"
    for event in epochs:
        print(
            f"\nepoch {event['epoch'] + 1}, sigma {event['sigma']:.2f}, schedule {event['schedule']}\n{table(event, levels)}"
        )
    path = Path(words[0]).with_name("pyramid.png")
    plot(epochs, levels, path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
