"""Every table and figure of arXiv 2510.27571, published numbers beside yours, and what the paper's own cells contradict.

    python eval.py --table 4        python eval.py --figure 7 --results A.json B.json C.json        python eval.py --published

What eval.py prints after scoring comes from here; nothing here is needed to score. A table is groups of rows, published ones
first, and a row is {column: value}. `paper` is published.json, `results` are contents of results.json files.
"""

import csv
import functools
import io
import json
import math
import re
from pathlib import Path

import numpy as np

import data
import uvrb

ROOT = Path(__file__).resolve().parent
TOLERANCE = 0.0011  # the paper's cells are rounded to 0.001; a mean of rounded cells, rounded, is off by at most that
TITLES = {
    "Table 1": "score per dataset",
    "Table 2": "score per ability",
    "Table 3": "GVE-i on collected data, GVE-s with UVRD, GVE with the Modality Pyramid",
    "Table 4": "sizes, mean seconds of a corpus video, mean words of a query",
    "Table 5": "metrics and prompts",
    "Table 6": "collected training data",
    "Table 7": "synthesised training data, UVRD",
    "Table 8": "training pairs per kind of data",
    "Table 9": "training settings",
    "Table 10": "models",
    "Table 11": "zero-shot video classification, accuracy",
    "Figure 2": "nine abilities and the averages",
    "Figure 6": "averages over training pairs, y = a ln x + b",
    "Figure 7": "correlation of two abilities over models",
    "Figure 8": "correlation with the average over models",
    "Figure 11": "abilities over training pairs, y = a ln x + b",
    "Figure 12": "frames per video",
    "Figure 13": "tokens per frame",
}
CURVES = {  # published.json's block, its list of x, and of a result's protocol the key that is x and what stays the same
    "Figure 6": ("figure6_data_scaling", "pairs", "pairs", {}),
    "Figure 11": ("figure6_data_scaling", "pairs", "pairs", {}),
    "Figure 12": ("figure12_frames", "frames", "frames", {"max_tokens": 200}),
    "Figure 13": ("figure13_tokens", "tokens_per_frame", "max_tokens", {"frames": 8}),
}


def published():
    """The paper's numbers (published.json)."""
    return json.loads((ROOT / "published.json").read_text(encoding="utf-8"))


def cell(x):
    """Print a value as the paper does: .431, 15.0, 1,000, - for None."""
    if not isinstance(x, float):
        return "-" if x is None else f"{x:,}" if type(x) is int else str(x)
    return (
        f"{x:g}"
        if 0 < abs(x) < 5e-4
        else f"{x:,.1f}"
        if abs(x) > 1
        else f"{x:.3f}".replace("0.", ".", 1)
    )


def render(caption, groups, style="txt"):
    """Render groups of rows as aligned text, "md", "csv" or "tex" (booktabs), a rule between groups."""
    head = list(dict.fromkeys(column for group in groups for row in group for column in row))
    blocks = [
        [[str(c) for c in head]],
        *([[cell(row.get(c)) for c in head] for row in group] for group in groups if group),
    ]
    rows = [row for block in blocks for row in block]
    if style == "csv":
        csv.writer(out := io.StringIO(), lineterminator="\n").writerows(rows)
        return out.getvalue()
    if style == "md":
        lines = [
            f"| {' | '.join(row)} |"
            for row in (rows[0], ["---"] + ["---:"] * (len(head) - 1), *rows[1:])
        ]
        return "\n".join([caption.replace("\n", "  \n"), "", *lines, ""])
    if style == "tex":
        rule, blocks = (
            "\\midrule\n",
            [
                [[re.sub(r"([%&#_$])", r"\\\1", x) for x in row] for row in block]
                for block in blocks
            ],
        )
        body = rule.join("".join(" & ".join(row) + " \\\\\n" for row in block) for block in blocks)
        caption = "% " + caption.replace("\n", "\n% ")
        return f"{caption}\n\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    widths, lines = [max(map(len, column)) for column in zip(*rows, strict=True)], [caption]
    for block in blocks:
        lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        lines += [
            "  ".join([a.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip()
            for a, *rest in block
        ]
    return "\n".join(lines) + "\n"


# ---- rows ----


def spread(scores):
    """All columns from {dataset: score}: the scores, abilities, averages, AVG-Z over Table 11's datasets."""
    zero = [scores.get(name) for name in uvrb.ZERO_SHOT]
    return {
        **scores,
        **uvrb.abilities(scores),
        "AVG-Z": None if None in zero else sum(zero) / len(zero),
    }


def score_table(name, paper, results):
    """Tables 1, 2, 3 and 11: the published rows, those of `results`, then chance and ceiling. * marks an incomplete dataset."""
    theirs = [
        {"model": model, **cells} for model, cells in paper[name.lower().replace(" ", "")].items()
    ]
    average = {"Table 1": "AVG-D", "Table 2": "AVG-A", "Table 11": "AVG-Z"}.get(name)
    roles = (
        ("GVE-i: ", "GVE-s: ", "GVE: ") if name == "Table 3" else ("", "", "")
    )  # Table 3: the results in this order

    def row(label, cells):
        return {
            "model": label,
            **{c: cells.get(average if c == "AVG" else c) for c in list(theirs[0])[1:]},
        }

    ours, whole = [], {}
    for i, r in enumerate(results):
        complete = {ds: e["score"] for ds, e in r["datasets"].items() if e["complete"]}
        partial = {
            ds: cell(e["score"]) + "*"
            for ds, e in r["datasets"].items()
            if ds not in complete and e["n"]
        }
        ours.append(row(roles[i % 3] + r["model"], spread(complete) | partial))
        for end, percent in enumerate(("2.5", "97.5")):  # --bootstrap
            ours += (
                [row(f"  {percent} %", {c: ends[end] for c, ends in r["ci95"].items()})]
                if "ci95" in r
                else []
            )
        whole |= {ds: e for ds, e in r["datasets"].items() if e["complete"]}
    # Chance and ceiling belong to the data: a row of each, from whichever result has the dataset whole.
    bounds = [
        row(bound, spread({ds: e[bound] for ds, e in whole.items()}))
        for bound in ("chance", "ceiling")
    ]
    return theirs, ours, bounds if results else []


def notes(results):
    """What the numbers of each result depend on, a line per fact: the rest of a table's caption."""
    out = []
    for r in results:
        p = r["protocol"]
        facts = [f"{key} {p[key]}" for key in ("step", "frames", "max_tokens", "dtype") if key in p]
        out.append(f"{r['model']}: {', '.join([p['checkpoint'], *facts])}")
        for name, e in r["datasets"].items():
            if not e["complete"]:
                part = (
                    f"{e['n']}/{e['expected']} queries, {e['corpus']}/{e['expected_corpus']} videos"
                )
                out.append(f"  * {name}: {part}; it enters no average")
            if uvrb.ALL[name].task == "CMP" and not e["pooled"]:
                out.append(
                    f"  {name}: no pools in its instances, so its whole corpus is ranked (the paper: 10 candidates)"
                )
        absent = [name for name in uvrb.DATASETS if name not in r["datasets"]]
        if 0 < len(absent) < len(uvrb.DATASETS):
            out.append(f"  not scored: {', '.join(absent)}; averages over them are left out")
    return out


def kind_of(row):
    """Table 8's row that a mixture entry {"name", "task"} belongs to."""
    if row["name"].startswith("UVRD") or row["task"] == "T2T":
        return "UVRD" if row["name"].startswith("UVRD") else "text"
    return "video" if "V" in row["task"] else "image"


def totals(mixture):
    """Table 8 from the rows of Tables 6 and 7: {kind: {"3B": pairs, "7B": pairs}}, and "all"."""
    kinds = ("text", "image", "video", "UVRD")
    out = {
        kind: {
            size: sum(row["samples_" + size.lower()] for row in mixture if kind_of(row) == kind)
            for size in ("3B", "7B")
        }
        for kind in kinds
    }
    return out | {"all": {size: sum(out[kind][size] for kind in kinds) for size in ("3B", "7B")}}


def mixtures(folder):
    """Rows of Tables 6 and 7 as in mixtures/gve-3b.json and gve-7b.json; none where the files are not there."""
    files = [Path(folder) / f"gve-{size}.json" for size in ("3b", "7b")]
    if not all(file.is_file() for file in files):
        return []
    small, big = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return [
        {
            "name": a["name"],
            "task": a["task"],
            "samples_3b": a["samples"],
            "samples_7b": b["samples"],
            "negatives": a["negatives"],
            "batch_size": a["batch_size"],
        }
        for a, b in zip(small, big, strict=True)
    ]


def measured(folder, roots):
    """Table 4's rows as counted in a benchmark folder; a corpus of pools counts as the median pool, as in the paper.

    * marks mean durations without those videos that cannot be read.
    """

    @functools.cache
    def seconds(video):
        try:
            return data.load_video(json.loads(video), 2)[1]
        except (data.MediaError, FileNotFoundError):
            return None

    rows = []
    for bench in [
        uvrb.read(folder, name, roots) for name in uvrb.DATASETS if uvrb.folder_of(folder, name)
    ]:
        words = [len(row["item"]["text"].split()) for row in bench.queries if "text" in row["item"]]
        lengths = [seconds(json.dumps(row["item"]["video"])) for row in bench.corpus]
        known = [length for length in lengths if length is not None]
        duration = cell(float(np.mean(known)) if known else None) + "*" * (known != lengths)
        candidates = (
            int(np.median([len(pool) for pool in bench.pools]))
            if bench.pools
            else len(bench.corpus)
        )
        rows.append(
            {
                "dataset": bench.name,
                "queries": len(bench.queries),
                "corpus": candidates,
                "duration_s": duration,
                "words": float(np.mean(words)) if words else None,
            }
        )
    return rows


def paper_table(name, paper, results, folder, roots):
    """Tables 4-10 as (published rows, ours): from the benchmark in `folder`, mixtures/*.json and the checkpoints of `results`."""
    if name in ("Table 4", "Table 5"):
        keys = (
            ("queries", "corpus", "duration_s", "words")
            if name == "Table 4"
            else ("task", "domain", "metric", "prompt")
        )
        theirs = [
            {"dataset": ds, **{k: row[k] for k in keys}} for ds, row in paper["datasets"].items()
        ]
        if name == "Table 4":
            return theirs, measured(folder, roots)
        return theirs, [
            {"dataset": d.name, **{k: getattr(d, k) or None for k in keys}}
            for d in uvrb.DATASETS.values()
        ]
    ours = mixtures(ROOT / "mixtures")
    if name in ("Table 6", "Table 7"):
        theirs = paper["table6_mixture" if name == "Table 6" else "table7_uvrd"]
        return theirs, [row for row in ours if (kind_of(row) == "UVRD") == (name == "Table 7")]
    if name == "Table 8":
        sums = totals(paper["table6_mixture"] + paper["table7_uvrd"])
        theirs = [
            {
                "data": kind,
                **row,
                "Tables 6+7, 3B": sums[kind]["3B"],
                "Tables 6+7, 7B": sums[kind]["7B"],
            }
            for kind, row in paper["table8_totals"].items()
        ]
        return theirs, [{"data": kind, **row} for kind, row in totals(ours).items()] if ours else []
    if name == "Table 9":
        settings = {r["model"]: r["protocol"].get("training", {}) for r in results}
        return (
            [
                {
                    "setting": key,
                    "paper": value,
                    **{model: s.get(key) for model, s in settings.items()},
                }
                for key, value in paper["table9"].items()
            ],
        )
    ours = [
        (r["model"], r["protocol"]["checkpoint"], r["protocol"].get("parameters")) for r in results
    ]
    theirs = [{"model": model, **row} for model, row in paper["models"].items()]
    return theirs, [
        {"model": model, "full_name": checkpoint, "size": size} for model, checkpoint, size in ours
    ]


def columns(result):
    return {"AVG-D": result["AVG-D"], "AVG-A": result["AVG-A"], **result["abilities"]}


def fit(x, y):
    """Least squares y = a ln x + b -> (a, b, gain per decade, the same over the mean of y). Section 5.2, Figures 6 and 11."""
    a, b = np.polyfit(np.log(x), y, 1)
    return {
        "a": float(a),
        "b": float(b),
        "per decade": float(a * math.log(10)),
        "relative": float(a * math.log(10) / np.mean(y)),
    }


def curves(name, paper, results):
    """Figures 6, 11, 12 and 13: a row per model and score, its columns are x; data scaling with its fit."""
    block, key, setting, same = CURVES[name]
    values, shown = (
        paper[block]["values"],
        {"Figure 6": ("AVG-D", "AVG-A"), "Figure 11": uvrb.ABILITIES[:6]}.get(name),
    )
    points = {}  # {model: {x: {score: y}}}
    for model in ("GVE-3B", "GVE-7B"):
        xs = [paper[block]["full"][model] if x == "full" else x for x in paper[block][key]]
        points[model] = {
            int(x): {c: y[model][i] for c, y in values.items()} for i, x in enumerate(xs)
        }
    for r in results:
        owner = (
            r["protocol"]["checkpoint"] if setting != "pairs" else "yours"
        )  # data scaling: one checkpoint per point
        if r["protocol"].get(setting) and same.items() <= r["protocol"].items():
            points.setdefault(owner, {})[int(r["protocol"][setting])] = columns(r)
    groups, xs = ([], []), sorted({x for at in points.values() for x in at})
    for model, at in points.items():
        for c in shown or values:
            row = {x: at[x][c] if x in at else None for x in xs}
            known = {x: y for x, y in row.items() if y is not None}
            fitted = (
                fit(list(known), list(known.values()))
                if setting == "pairs" and len(known) > 1
                else {}
            )
            groups[model not in ("GVE-3B", "GVE-7B")].append(
                {"model": model, "score": c, **row, **fitted}
            )
    return groups


def correlation(x, y, ranked=False):
    """Pearson's correlation; ranked: Spearman's, equal values at their mean rank."""
    x, y = (np.asarray(v, float) for v in (x, y))
    if ranked:
        x, y = ((v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y))
    return float(np.corrcoef(x, y)[0, 1])


def correlations(name, paper):
    """Figure 7 or 8: {(pair or column, block): (printed, Pearson, Spearman)} over 6 CLIP, 10 MLLM or all models.

    # PAPER: says Pearson. Figure 8's "average" is taken to be Table 2's; its bars stop at .03, and so do ours.
    """
    cells, out = (
        {model: paper["table1"][model] | paper["table2"][model] for model in paper["table1"]},
        {},
    )
    for block in ("CLIP", "MLLM", "All"):
        models = [
            cells[model]
            for model, row in paper["models"].items()
            if block in ("All", row["family"])
        ]
        if name == "Figure 7":
            rows = paper["figure7_correlations"]["lower_triangle_rows"][block].items()
            pairs = [
                (a, b, printed)
                for a, row in rows
                for b, printed in zip(uvrb.ABILITIES, row, strict=False)
            ]
        else:
            pairs = [
                (a, "AVG", row[block])
                for a, row in paper["figure8_correlation_with_average"].items()
            ]
        for a, b, printed in pairs:
            both = (
                correlation(*([m[c] for m in models] for c in (a, b)), ranked)
                for ranked in (False, True)
            )
            out[a if b == "AVG" else f"{a}-{b}", block] = (
                printed,
                *(max(r, 0.03) if b == "AVG" else r for r in both),
            )
    return out


def correlation_rows(name, paper, results):
    """Figures 7 and 8 as rows: per block the printed value, Pearson and Spearman; yours from three results on."""
    rows = {}
    for (pair, block), values in correlations(name, paper).items():
        rows.setdefault(pair, {"pair": pair}).update(
            zip((block, f"{block} Pearson", f"{block} Spearman"), values, strict=True)
        )
    models = [columns(r) | {ds: e["score"] for ds, e in r["datasets"].items()} for r in results]
    for pair, row in rows.items() if len(models) > 2 else ():
        a, b = (pair, "AVG-A") if name == "Figure 8" else pair.split("-")
        both = [[m.get(c) for m in models] for c in (a, b)]
        if None not in both[0] + both[1]:
            row |= {
                "yours Pearson": correlation(*both),
                "yours Spearman": correlation(*both, ranked=True),
            }
    return (list(rows.values()),)


def figure(name, paper, results):
    """The numbers of a figure as groups of rows."""
    if name in CURVES:
        return curves(name, paper, results)
    if name != "Figure 2":
        return correlation_rows(name, paper, results)
    theirs = [
        {
            "model": m,
            "AVG-D": paper["table1"][m]["AVG"],
            "AVG-A": row["AVG"],
            **{a: row[a] for a in uvrb.ABILITIES},
        }
        for m, row in paper["table2"].items()
    ]
    return theirs, [{"model": r["model"], **columns(r)} for r in results]


# ---- pictures ----


def plot(name, groups, path):
    """Draw a figure from its groups of rows and save it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for group in groups for row in group]
    if name == "Figure 2":
        picture = pyplot.figure(figsize=(14, 6), layout="constrained")
        radar, bars = picture.add_subplot(1, 2, 1, projection="polar"), picture.add_subplot(1, 2, 2)
        angles = np.linspace(0, 2 * math.pi, len(uvrb.ABILITIES) + 1)
        for row in [
            *groups[0][-2:],
            *groups[1],
        ]:  # the published GVE-3B and -7B dashed, yours filled
            values, yours = (
                [row[a] or 0 for a in (*uvrb.ABILITIES, uvrb.ABILITIES[0])],
                row in groups[1],
            )
            radar.plot(
                angles,
                values,
                "-" if yours else "--",
                label=row["model"] + ("" if yours else " (published, UVRB)"),
            )
            radar.fill(angles, values, alpha=0.15 * yours)
        radar.set_xticks(angles[:-1], uvrb.ABILITIES)
        radar.set_ylim(0, 1)
        radar.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2)
        for offset, average in ((-0.2, "AVG-D"), (0.2, "AVG-A")):
            bars.barh(
                np.arange(len(rows)) + offset,
                [row[average] or 0 for row in rows],
                0.4,
                label=average,
            )
        bars.set_yticks(range(len(rows)), [row["model"] for row in rows])
        bars.invert_yaxis()
        bars.legend()
    elif name in CURVES:
        names = list(dict.fromkeys(row["score"] for row in rows))
        wide = min(len(names), 4 if len(names) > 6 else 3)
        high = math.ceil(len(names) / wide)
        picture, axes = pyplot.subplots(
            high, wide, figsize=(13, 3.5 * high), squeeze=False, layout="constrained"
        )
        for ax, score in zip(axes.flat, names, strict=True):
            for row in [row for row in rows if row["score"] == score]:
                x = np.array([c for c in row if isinstance(c, int) and row[c] is not None])
                (line,) = ax.plot(
                    x, [row[c] for c in x.tolist()], "o" if "a" in row else "o-", label=row["model"]
                )
                if "a" in row:
                    ax.plot(x, row["a"] * np.log(x) + row["b"], color=line.get_color())
                    ax.set_xscale("log")
            ax.set_title(score)
        axes.flat[0].legend()
    elif name == "Figure 7":
        blocks = [c.removesuffix(" Spearman") for c in rows[0] if c.endswith(" Spearman")]
        picture, axes = pyplot.subplots(
            1, len(blocks), figsize=(5 * len(blocks), 5), squeeze=False, layout="constrained"
        )
        for ax, block in zip(axes.flat, blocks, strict=True):
            grid = np.full((9, 9), np.nan)
            for row in rows:
                a, b = (uvrb.ABILITIES.index(x) for x in row["pair"].split("-"))
                grid[a, b] = row.get(f"{block} Spearman", np.nan)
                ax.text(b, a, f"{grid[a, b]:.2f}", ha="center", va="center", fontsize=7)
            ax.imshow(grid, cmap="coolwarm", vmin=-1, vmax=1)
            ax.set_xticks(range(9), uvrb.ABILITIES)
            ax.set_yticks(range(9), uvrb.ABILITIES)
            ax.set_title(f"{block}, Spearman")
    else:
        blocks = [c for c in rows[0] if c.endswith("Spearman")]
        picture, ax = pyplot.subplots(figsize=(13, 5), layout="constrained")
        width = 0.8 / len(blocks)
        for i, block in enumerate(blocks):
            ax.bar(
                np.arange(len(rows)) + i * width,
                [row.get(block, 0) for row in rows],
                width,
                label=block,
            )
        ax.set_xticks(range(len(rows)), [row["pair"] for row in rows], rotation=60)
        ax.legend()
    picture.suptitle(f"{name}: {TITLES[name]}")
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


# ---- the paper against itself ----


def nested(where, row, cells):
    """The averages that a row's other cells give, section 3.1's rules (uvrb.abilities), as recompute yields them."""
    rules = {"FG": ("S", "T", "PR"), "TXT": ("CG", "FG", "LC"), "AVG-A": uvrb.ABILITIES[:6]}
    for column, parts in rules.items():
        if {column, *parts} <= cells.keys():
            yield (
                where,
                row,
                column,
                cells[column],
                sum(cells[part] for part in parts) / len(parts),
                TOLERANCE,
            )


def recompute(paper):
    """Yield (where, row, column, printed, computed, tolerance) for every published value that follows from other ones."""
    table1, table2, table3 = paper["table1"], paper["table2"], paper["table3"]
    for model, cells in table1.items():
        means = uvrb.abilities(cells)
        yield "Table 1", model, "AVG", cells["AVG"], means["AVG-D"], TOLERANCE
        for column, printed in table2[model].items():
            yield (
                "Table 2",
                model,
                column,
                printed,
                means["AVG-A" if column == "AVG" else column],
                TOLERANCE,
            )
    for model, cells in table3.items():
        yield from nested("Table 3", model, cells)
        if model in table2:
            same = {**table2[model], "AVG-A": table2[model]["AVG"], "AVG-D": table1[model]["AVG"]}
            yield from (
                ("Table 3", model, column, printed, same[column], 1e-9)
                for column, printed in cells.items()
            )
    sums, printed_sums = (
        totals(paper["table6_mixture"] + paper["table7_uvrd"]),
        paper["table8_totals"],
    )
    for kind, row in printed_sums.items():
        for size, printed in row.items():
            parts = sum(other[size] for name, other in printed_sums.items() if name != "all")
            yield (
                "Table 8",
                kind,
                size,
                printed,
                parts if kind == "all" else sums[kind][size],
                5000,
            )  # printed in units of 10,000
    for model, cells in paper["table11"].items():
        yield (
            "Table 11",
            model,
            "AVG",
            cells["AVG"],
            sum(cells[name] for name in uvrb.ZERO_SHOT) / 5,
            TOLERANCE,
        )
    for where, end in (
        ("Figure 11", -1),
        ("Figure 12", 0),
        ("Figure 13", 0),
    ):  # Figure 6 is in the block of 11
        block, key, *_ = CURVES[where]
        for model in ("GVE-3B", "GVE-7B"):
            for i, x in enumerate(paper[block][key]):
                yield from nested(
                    where,
                    f"{model} at {x}",
                    {c: y[model][i] for c, y in paper[block]["values"].items()},
                )
            for column, y in paper[block][
                "values"
            ].items():  # the curve's full-data, 8-frame or 200-token point is the model
                yield (
                    where,
                    f"{model} at {paper[block][key][end]}",
                    column,
                    y[model][end],
                    table3[model][column],
                    TOLERANCE,
                )
    for row in (row for name in ("Figure 6", "Figure 11") for row in curves(name, paper, [])[0]):
        gain = paper["figure6_data_scaling"]["gain_per_decade"][row["score"]][row["model"]]
        for kind, computed in (("absolute", row["per decade"]), ("relative", row["relative"])):
            if gain[kind] is not None:
                yield (
                    "section 5.2",
                    f"{row['model']} {row['score']}",
                    f"{kind} gain per decade",
                    gain[kind],
                    computed,
                    TOLERANCE,
                )
    values = {
        (name, *key): v[0]
        for name in ("Figure 7", "Figure 8")
        for key, v in correlations(name, paper).items()
    }
    for where, row, column, claimed in paper["claims"]:
        shown = table2[row][column] if where == "Table 2" else values[where, row, column]
        yield (
            "text",
            f"{where}, {row}",
            column,
            claimed,
            shown,
            0.0101,
        )  # the figures print two digits


def disagreements(paper):
    """Recompute the paper -> ({(where, row, column): (printed, computed)} that differ, ["Figure 7, CLIP: ..." per block]).

    A figure's correlations count cell by cell only where one of the two statistics gives nine tenths of its block.
    """
    wrong, blocks = {}, []
    for where, row, column, printed, computed, tolerance in recompute(paper):
        if abs(printed - computed) > tolerance:
            wrong[where, row, column] = printed, computed
    for name in ("Figure 7", "Figure 8"):
        cells = correlations(name, paper)
        for block in ("CLIP", "MLLM", "All"):
            own = {pair: values for (pair, b), values in cells.items() if b == block}
            right = [[pair for pair, v in own.items() if abs(v[0] - v[k]) < 0.0051] for k in (1, 2)]
            blocks.append(
                f"{name}, {block}: of {len(own)} printed cells Pearson gives {len(right[0])}, Spearman {len(right[1])}"
            )
            best = max((1, 2), key=lambda k: len(right[k - 1]))
            if len(right[best - 1]) >= 0.9 * len(own):
                wrong |= {
                    (name, pair, block): (v[0], v[best])
                    for pair, v in own.items()
                    if pair not in right[best - 1]
                }
    return wrong, blocks


# ---- what the command prints ----


def show(names, results, out, folder, roots=()):
    """Print "Table n" and "Figure n" of `names` and write each as <out>/table1.txt, .md, .csv and .tex, figures as .png too.

    results: contents of results.json files, of one benchmark. folder, roots: the benchmark that Table 4 counts.
    """
    paper, benchmarks = published(), {r["benchmark"] for r in results} or {"UVRB"}
    if unknown := [name for name in names if name not in TITLES]:
        raise ValueError(f"no {', '.join(unknown)} here (accepted: {', '.join(TITLES)})")
    if len(benchmarks) > 1:
        raise ValueError(
            f"results of {' and '.join(sorted(benchmarks))} do not belong into one table"
        )
    for name in names:
        if name in ("Table 1", "Table 2", "Table 3", "Table 11"):
            groups = score_table(name, paper, results)
        elif name.startswith("Table"):
            groups = paper_table(name, paper, results, folder, roots)
        else:
            groups = figure(name, paper, results)
        about, facts = benchmarks, notes(results)
        if name in (
            "Table 4",
            "Table 5",
            "Table 6",
            "Table 7",
            "Table 8",
            "Table 9",
            "Table 10",
        ):  # no scores in it
            about, facts = (
                {uvrb.benchmark(folder)[0] if name == "Table 4" and groups[1] else "UVRB"},
                [],
            )
        other = (
            ""
            if about == {"UVRB"}
            else ", ".join(about) + " below the published rows, which are UVRB's: "
        )
        caption = "\n".join([f"{name}: {other}{TITLES[name]}", *facts])
        path = Path(out) / name.lower().replace(" ", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        for style in ("txt", "md", "csv", "tex"):
            path.with_suffix("." + style).write_text(
                render(caption, groups, style), encoding="utf-8"
            )
        print("\n" + render(caption, groups), end="")
        if name.startswith("Figure"):
            plot(name, groups, path.with_suffix(".png"))
            print(path.with_suffix(".png"))


def print_published():
    """Print Table 2 as recomputed from Table 1, and every published value that does not follow from others."""
    paper = published()
    wrong, blocks = disagreements(paper)
    rows = []
    for model, cells in paper["table1"].items():
        means, row = uvrb.abilities(cells), {"model": model}
        printed = {
            "AVG-D": ("Table 1", "AVG"),
            "AVG-A": ("Table 2", "AVG"),
            **{a: ("Table 2", a) for a in uvrb.ABILITIES},
        }
        for column, (where, name) in printed.items():
            row[column] = cell(means[column]) + "!" * ((where, model, name) in wrong)
        rows.append(row)
    print(
        render(
            "Table 2, UVRB: recomputed from the cells of Table 1; ! where the paper prints another value",
            [rows],
        )
    )
    print(f"{len(wrong)} published values do not follow from others:")
    for (where, row, column), (printed, computed) in wrong.items():
        print(
            f"  {where}, {row}, {column}: printed {printed:,}, the others give {computed:,.4f}".replace(
                ".0000", ""
            )
        )
    print("\n".join(blocks))
