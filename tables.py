"""Every table and figure of arXiv 2510.27571, published numbers beside yours; where the paper errs.

    python eval.py --table 4
    python eval.py --figure 7 --results A.json B.json C.json
    python eval.py --published

eval.py prints its scores through this file; scoring needs nothing from it. Top to bottom: formats,
score tables, tables of data and settings, figures, their pictures, the paper checked against
itself, and the functions that print.

Throughout, `paper` is the content of published.json and `results` are contents of results.json
files. The published scores are UVRB's: results of another benchmark, such as mini-UVRB, are shown
without them. A result that measures a published model anew stands right under the published row,
with the difference of each cell.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

import uvrb
from support.files import parse_json
from support.media import MediaError, load_video

ROOT = Path(__file__).resolve().parent
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


@dataclasses.dataclass
class Table:
    """The rows of a table or figure, in groups; a row is {column: value}."""

    published: list = dataclasses.field(default_factory=list)
    later: list = dataclasses.field(default_factory=list)  # published after the paper
    # Results that measure a published model anew: {model: the rows that stand under its row}.
    reruns: dict = dataclasses.field(default_factory=dict)
    yours: list = dataclasses.field(default_factory=list)
    bounds: list = dataclasses.field(default_factory=list)  # chance and ceiling
    mixed: list = dataclasses.field(default_factory=list)  # each with published values and yours
    footnotes: list = dataclasses.field(default_factory=list)  # lines of the caption

    def groups(self):
        """Return the groups that have rows, in the order in which they are shown."""
        published = self.add_reruns(self.published)
        later = self.add_reruns(self.later)
        every = (published, later, self.yours, self.bounds, self.mixed)
        return [group for group in every if group]

    def add_reruns(self, rows):
        """Return these published rows, each followed by the rows that measure its model anew."""
        group = []
        for row in rows:
            group.append(row)
            group.extend(self.reruns.get(row.get("model"), []))
        return group

    def rows_of_results(self):
        """Return yours and the reruns, wherever they stand."""
        return [*self.yours, *itertools.chain(*self.reruns.values())]


def published():
    """Return the paper's numbers, the content of published.json."""
    return json.loads((ROOT / "published.json").read_text(encoding="utf-8"))


def read_results(path):
    """Read a results.json of eval.py; raise ValueError naming the file if it is not one."""
    content = parse_json(Path(path).read_bytes(), path)
    needed = ("benchmark", "model", "protocol", "datasets", "abilities", "AVG-D", "AVG-A")
    absent = [key for key in needed if key not in content]
    if absent:
        raise ValueError(f"{path}: no results.json of eval.py: it has no {', '.join(absent)}")
    return content


def comparable(results):
    """Return whether published scores may stand beside these results.

    True if every result is on UVRB, or if there are no results.
    """
    return all(result["benchmark"] == "UVRB" for result in results)


# Formats


def cell(value):
    """Format a value as the paper prints it: .431, 15.0, 1,000, and - for None."""
    if value is None:
        return "-"
    if type(value) is int:  # and not bool, which is a kind of int
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 5e-4:  # a learning rate
        return f"{value:g}"
    if abs(value) > 1:
        return f"{value:,.1f}"
    return f"{value:.3f}".replace("0.", ".", 1)


def render(caption, groups, style="txt"):
    """Format groups of rows with a rule between groups; style: a key of STYLES."""
    columns = {}  # a dict as an ordered set: the columns of all rows
    for group in groups:
        for row in group:
            columns.update(dict.fromkeys(row))

    # The head is a section of one line.
    sections = [[list(map(str, columns))]]
    for group in groups:
        lines = []
        for row in group:
            lines.append([cell(row.get(column)) for column in columns])
        sections.append(lines)
    return STYLES[style](caption, sections)


# Each style takes sections, lists of lines; a line is a list of cells, all text.


def as_text(caption, sections):
    """Align the cells; the first column is text, the others are numbers."""
    every_line = itertools.chain(*sections)
    widths = [max(map(len, column)) for column in zip(*every_line, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    out = [caption]
    for section in sections:
        out.append(rule)
        for first, *others in section:
            cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
            out.append("  ".join(cells).rstrip())
    return "\n".join(out) + "\n"


def as_markdown(caption, sections):
    """Make one Markdown table, which has no rules between sections."""
    (head,), *rest = sections
    alignment = ["---"] + ["---:"] * (len(head) - 1)

    out = [caption.replace("\n", "  \n"), ""]  # two spaces keep a line break
    for line in itertools.chain([head, alignment], *rest):
        out.append(f"| {' | '.join(line)} |")
    return "\n".join([*out, ""])


def as_csv(caption, sections):
    """Make comma-separated values, without the caption and without rules."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(itertools.chain(*sections))
    return text.getvalue()


def as_latex(caption, sections):
    """Make a LaTeX tabular with the rules of booktabs; the caption is a comment above it."""
    texts = []
    for section in sections:
        text = ""
        for line in section:
            text += " & ".join(map(escape_latex, line)) + " \\\\\n"
        texts.append(text)

    columns = "l" + "r" * (len(sections[0][0]) - 1)
    out = [
        "% " + caption.replace("\n", "\n% "),
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        "\\midrule\n".join(texts) + "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(out) + "\n"


def escape_latex(text):
    """Put a backslash before LaTeX's special characters."""
    return re.sub(r"([%&#_$])", r"\\\1", text)


STYLES = {"txt": as_text, "md": as_markdown, "csv": as_csv, "tex": as_latex}


# Score tables: Tables 1, 2, 3 and 11
#
# Their columns are those of the published table. A result's abilities and averages are computed
# anew from its datasets, so that a change of the rules in uvrb.py shows in older results, too.

# The average that the paper calls AVG in each; Table 3 has both under their own names.
AVERAGES = {"Table 1": "AVG-D", "Table 2": "AVG-A", "Table 3": None, "Table 11": "AVG-Z"}

ROUNDING = 0.0005  # published scores have three digits


def block_of(name):
    """Return "table1" for "Table 1": the name of its block in published.json and of its files."""
    return name.lower().replace(" ", "")


def with_averages(scores):
    """Add abilities and averages to {dataset: score}; AVG-Z is the mean over Table 11."""
    zero_shot = [scores.get(name) for name in uvrb.ZERO_SHOT]
    average = None
    if None not in zero_shot:
        average = sum(zero_shot) / len(zero_shot)
    return {**scores, **uvrb.abilities(scores), "AVG-Z": average}


def own_datasets(results):
    """Return the names of scored datasets that a folder's benchmark.json defines, not the paper."""
    names = {}  # a dict as an ordered set
    for result in results:
        names.update(dict.fromkeys(result["datasets"]))
    return [name for name in names if name not in uvrb.DATASETS and name not in uvrb.ZERO_SHOT]


def score_table(name, paper, results):
    """Build Table 1, 2, 3 or 11: published rows, a row per result, then chance and ceiling.

    * marks a score that the caption speaks of: an incomplete dataset's, or one with a note of
    eval.py's. Table 1 has a further column for each dataset of your own, which enters no average.
    Table 3 calls the results GVE-i, GVE-s, GVE, in this order. Columns in which no result has a
    number are left out, of the published rows as well.

    A result whose model has a published row stands right under it, with a row of differences.
    """
    scores = paper[block_of(name)]
    later = paper["later"].get(block_of(name), {})
    printed_scores = scores | later
    published_columns = list(next(iter(scores.values())))
    columns = list(published_columns)
    if name == "Table 1":
        columns += own_datasets(results)
    roles = ("GVE-i: ", "GVE-s: ", "GVE: ") if name == "Table 3" else ("",)

    def make_row(label, values):
        values = {**values, "AVG": values.get(AVERAGES[name])}
        return {"model": label} | {column: values.get(column) for column in columns}

    table = Table()
    complete_entries = {}
    rerun_results = []
    for i, result in enumerate(results):
        complete, marked = complete_and_marked(result)
        for dataset in complete:
            complete_entries[dataset] = result["datasets"][dataset]
        label = roles[i % len(roles)] + result["model"]
        row = make_row(label, with_averages(complete) | marked)

        # The intervals of --bootstrap, lower ends and upper ends.
        intervals = []
        if "ci95" in result:
            for end, percent in enumerate(("2.5", "97.5")):
                bounds = {column: interval[end] for column, interval in result["ci95"].items()}
                intervals.append(make_row(f"  {percent} %", bounds))

        # The published row is there if the result has a number in one of its columns.
        model = published_model(result, paper)
        has_numbers = any(row[column] is not None for column in published_columns)
        if comparable(results) and model in printed_scores and has_numbers:
            row["model"] = f"  measured: {label}"
            exact = make_row("  difference", with_averages(complete))
            difference = subtract(exact, printed_scores[model], intervals)
            table.reruns.setdefault(model, []).extend([row, difference, *intervals])
            rerun_results.append(result)
        else:
            table.yours += [row, *intervals]

    # Chance and ceiling belong to the data: any result with the complete dataset has them.
    if results:
        for bound in ("chance", "ceiling"):
            values = {dataset: entry[bound] for dataset, entry in complete_entries.items()}
            table.bounds.append(make_row(bound, with_averages(values)))

        columns = columns_with_numbers(table.rows_of_results())
        if not columns:
            return Table()
        table.yours = [pick(row, columns) for row in table.yours]
        table.bounds = [pick(row, columns) for row in table.bounds]
        for model, rows in table.reruns.items():
            table.reruns[model] = [pick(row, columns) for row in rows]
        if not columns_with_numbers(table.bounds):  # no dataset is complete
            table.bounds = []

    # The published rows, without your own datasets.
    columns = [column for column in columns if column in published_columns]
    if comparable(results) and columns:
        for model, cells in scores.items():
            table.published.append(pick({"model": model, **cells}, columns))
        if later:
            unlike = paper["later"]["not_like_for_like"]
            table.later = later_rows(later, columns, unlike)
            table.footnotes.append(paper["later"]["note"])
            if set(columns) & set(unlike):
                table.footnotes.append(paper["later"]["caveat"])
    table.footnotes += explain_differences(rerun_results)
    return table


def complete_and_marked(result):
    """Return {dataset: score} of a result's complete datasets, and {dataset: text} of marked ones.

    Only complete datasets enter averages. A complete one with a note of eval.py's is in both.
    """
    complete = {}
    marked = {}
    for dataset, entry in result["datasets"].items():
        if entry["complete"]:
            complete[dataset] = entry["score"]
        if entry["n"] and ("note" in entry or not entry["complete"]):
            marked[dataset] = cell(entry["score"]) + "*"
    return complete, marked


def published_model(result, paper):
    """Return the name of the published model that a result measures anew, None if there is none.

    The result may say so ("published", which an encoder may give); otherwise its own name counts.
    Raises ValueError if it says to measure a model that has no published row.
    """
    known = [*paper["table1"], *paper["later"]["table1"]]
    name = result.get("published")
    if name is not None and name not in known:
        raise ValueError(
            f"{result['model']}: it says to measure {name!r}, which has no published row "
            f"(accepted: {', '.join(known)})"
        )
    name = name or result["model"]
    return name if name in known else None


def subtract(row, printed, intervals):
    """Make the row of differences, measured - published, from a row of measured scores.

    printed: {column: published score}. intervals: the rows of lower and of upper ends, or none.
    ! marks a difference that the interval does not allow: the published score, rounded as it is,
    lies outside.
    """
    differences = {"model": row["model"]}
    for column, measured in row.items():
        if column == "model":
            continue
        published_score = printed.get(column)
        if measured is None or published_score is None:
            differences[column] = None
            continue

        rounded = round(measured - published_score, 3) + 0.0  # -0.0 + 0.0 is 0.0
        text = f"{rounded:+.3f}".replace("0.", ".", 1)
        ends = [bounds[column] for bounds in intervals]
        if ends and None not in ends:
            low, high = ends
            if not low - ROUNDING <= published_score <= high + ROUNDING:
                text += "!"
        differences[column] = text
    return differences


def explain_differences(results):
    """Return the footnotes on rows of differences, none if no result has one."""
    without = [result["model"] for result in results if "ci95" not in result]
    lines = []
    if results:
        lines.append("difference: measured - published")
    if len(without) < len(results):
        lines.append("  ! the published score lies outside the measured one's bootstrap interval")
    if without:
        lines.append(
            f"  no interval and so no mark: {', '.join(without)}; eval.py --bootstrap 1000 "
            "gives intervals"
        )
    return lines


def later_rows(scores, columns, unlike):
    """Make the rows of models that were published after the paper, under a heading.

    scores: {model: {column: score}}. unlike: columns that are not like for like, marked with ?.
    """
    rows = [{"model": "published later"} | dict.fromkeys(columns, "")]
    for model, cells in scores.items():
        row = {"model": model}
        for column in columns:
            row[column] = cells.get(column)
            if column in unlike and row[column] is not None:
                row[column] = cell(row[column]) + "?"
        rows.append(row)
    return rows


def columns_with_numbers(rows):
    """Return the columns, the model's name aside, in which any of the rows has a value."""
    columns = {}  # a dict as an ordered set
    for row in rows:
        columns.update(dict.fromkeys(row))
    found = []
    for column in columns:
        if column != "model" and any(row.get(column) is not None for row in rows):
            found.append(column)
    return found


def pick(row, columns):
    """Return a model's row with these columns alone."""
    return {"model": row["model"]} | {column: row[column] for column in columns}


def notes(results):
    """Return the lines below a table's title: the conditions and gaps of each result."""
    lines = []
    for result in results:
        protocol = result["protocol"]
        facts = [protocol["checkpoint"]]
        for key in ("step", "frames", "max_tokens", "dtype"):
            if key in protocol:
                facts.append(f"{key} {protocol[key]}")
        lines.append(f"{result['model']}: {', '.join(facts)}")

        for name, entry in result["datasets"].items():
            if not entry["complete"]:
                lines.append(
                    f"  * {name}: {entry['n']}/{entry['expected']} queries, "
                    f"{entry['corpus']}/{entry['expected_corpus']} corpus items; it enters no "
                    "average"
                )
            if "note" in entry:
                lines.append(f"  * {name}: {entry['note']}")
            dataset = uvrb.DATASETS.get(name)  # None for Table 11's and for a folder's own
            if dataset and dataset.task == "CMP" and not entry["pooled"]:
                lines.append(
                    f"  {name}: no pools in its instances, so its whole corpus is ranked "
                    "(the paper: 10 candidates)"
                )

        absent = [name for name in uvrb.DATASETS if name not in result["datasets"]]
        if 0 < len(absent) < len(uvrb.DATASETS):
            listed = ", ".join(absent)
            if len(absent) > 4:
                listed = f"{len(absent)} of UVRB's 16 datasets"
            lines.append(f"  not scored: {listed}; averages over them are left out")
    return lines


# Tables of data and settings: Tables 4 to 10
#
# They compare no scores, so the published rows are always there. Yours come from the benchmark
# folder (4), uvrb.py (5), mixtures/*.json (6 to 8) and the checkpoints of the results (9, 10).


def table_4(paper, folder, roots):
    """Build Table 4: published sizes, and those of the benchmark in `folder`."""
    columns = ("queries", "corpus", "duration_s", "words")
    return Table(published=dataset_rows(paper, columns), yours=measured(folder, roots))


def table_5(paper):
    """Build Table 5: published metrics and prompts, and those of uvrb.py."""
    columns = ("task", "domain", "metric", "prompt")
    yours = []
    for name, dataset in uvrb.DATASETS.items():
        row = {"dataset": name}
        for column in columns:
            row[column] = getattr(dataset, column) or None
        yours.append(row)
    return Table(published=dataset_rows(paper, columns), yours=yours)


def dataset_rows(paper, columns):
    """Return a published row for each of the 16 datasets."""
    rows = []
    for name, values in paper["datasets"].items():
        rows.append({"dataset": name, **{column: values[column] for column in columns}})
    return rows


def measured(folder, roots):
    """Count Table 4's rows in a benchmark folder.

    A dataset that ranks pools counts the median pool as its corpus, as the paper does. * marks a
    mean duration without those videos that cannot be read.
    """

    @functools.cache  # datasets share videos
    def seconds(video):
        try:
            _, duration = load_video(json.loads(video), 2)
        except (MediaError, FileNotFoundError):
            return None
        return duration

    rows = []
    names = []
    if Path(folder).is_dir():
        names, _ = uvrb.find(folder)
    for name in names:
        if name in uvrb.ZERO_SHOT:  # no part of Table 4
            continue
        bench = uvrb.read(folder, name, roots)

        # Queries: words of those that have a text.
        items = [row["item"] for row in bench.queries]
        words = [len(item["text"].split()) for item in items if "text" in item]

        # Corpus: seconds of those videos that can be read.
        videos = [row["item"]["video"] for row in bench.corpus if "video" in row["item"]]
        durations = [seconds(json.dumps(video)) for video in videos]
        known = [duration for duration in durations if duration is not None]
        shown = cell(mean(known))
        if len(known) < len(durations):
            shown += "*"

        candidates = len(bench.corpus)
        if bench.pools:
            candidates = int(np.median([len(pool) for pool in bench.pools]))
        rows.append(
            {
                "dataset": bench.name,
                "queries": len(bench.queries),
                "corpus": candidates,
                "duration_s": shown,
                "words": mean(words),
            }
        )
    return rows


def mean(values):
    """Return the mean as a float, None of an empty list."""
    return float(np.mean(values)) if values else None


def mixture_rows(folder):
    """Read Tables 6 and 7 from mixtures/gve-3b.json and gve-7b.json; no rows without both files."""
    files = [Path(folder) / f"gve-{size}.json" for size in ("3b", "7b")]
    if not all(file.is_file() for file in files):
        return []
    small, large = (json.loads(file.read_text(encoding="utf-8")) for file in files)

    # Both list the same sources in the same order (tests/test_check_data.py).
    rows = []
    for entry, entry_7b in zip(small, large, strict=True):
        rows.append(
            {
                "name": entry["name"],
                "task": entry["task"],
                "samples_3b": entry["samples"],
                "samples_7b": entry_7b["samples"],
                "negatives": entry["negatives"],
                "batch_size": entry["batch_size"],
            }
        )
    return rows


def kind_of(row):
    """Return Table 8's row that a source {"name", "task"} belongs to."""
    if row["name"].startswith("UVRD"):
        return "UVRD"
    if row["task"] == "T2T":
        return "text"
    return "video" if "V" in row["task"] else "image"


def totals(mixture):
    """Sum Table 8 from the rows of Tables 6 and 7: {kind or "all": {"3B": pairs, "7B": pairs}}."""
    sums = {}
    for kind in ("text", "image", "video", "UVRD", "all"):  # the order of Table 8's rows
        sums[kind] = {"3B": 0, "7B": 0}
    for row in mixture:
        for size in ("3B", "7B"):
            pairs = row["samples_" + size.lower()]
            sums[kind_of(row)][size] += pairs
            sums["all"][size] += pairs
    return sums


def table_6_or_7(name, paper):
    """Build Table 6 (collected data) or Table 7 (synthesised data)."""
    synthesised = name == "Table 7"
    yours = []
    for row in mixture_rows(ROOT / "mixtures"):
        if (kind_of(row) == "UVRD") == synthesised:
            yours.append(row)
    printed = paper["table7_uvrd" if synthesised else "table6_mixture"]
    return Table(published=printed, yours=yours)


def table_8(paper):
    """Build Table 8, printed sums beside those of Tables 6 and 7."""
    sums = totals(paper["table6_mixture"] + paper["table7_uvrd"])
    table = Table()
    for kind, printed in paper["table8_totals"].items():
        row = {"data": kind, **printed}
        row["Tables 6+7, 3B"] = sums[kind]["3B"]
        row["Tables 6+7, 7B"] = sums[kind]["7B"]
        table.published.append(row)

    mixture = mixture_rows(ROOT / "mixtures")
    if mixture:
        for kind, own in totals(mixture).items():
            table.yours.append({"data": kind, **own})
    return table


def table_9(paper, results):
    """Build Table 9, the paper's training settings beside those of your checkpoints."""
    rows = []
    for setting, value in paper["table9"].items():
        row = {"setting": setting, "paper": value}
        for result in results:
            # A model that was not trained here has no settings.
            training = result["protocol"].get("training", {})
            row[result["model"]] = training.get(setting)
        rows.append(row)
    return Table(mixed=rows)


def table_10(paper, results):
    """Build Table 10: the models, their printed sizes, and parameters counted from loaded weights.

    A result that measures a published model anew gives its count to that row. Sizes are the
    models' own, so results of any benchmark do.
    """
    table = Table()
    counts = {}  # {published model: number of parameters}
    for result in results:
        # eval.py writes a checkpoint's count into the protocol, an encoder's beside it.
        count = result["protocol"].get("parameters", result.get("parameters"))
        model = published_model(result, paper)
        if model in paper["models"] and count is not None:
            counts[model] = count
        else:
            checkpoint = result["protocol"]["checkpoint"]
            row = {"model": result["model"], "full_name": checkpoint, "parameters": count}
            table.yours.append(row)

    for model, facts in paper["models"].items():
        row = {"model": model}
        for column, value in facts.items():
            row[column] = value
            if column == "size" and results:
                row["parameters"] = counts.get(model)
        table.published.append(row)
    return table


# Figures: 2, curves (6, 11, 12, 13), correlations (7, 8)
#
# A figure is a table first, which is printed and saved like the others; a picture comes from it.


def averages_of(result):
    """Return a result's averages and abilities as columns."""
    return {"AVG-D": result["AVG-D"], "AVG-A": result["AVG-A"], **result["abilities"]}


def figure_2(paper, results):
    """Build Figure 2: averages and abilities per model; without results that have none of them."""
    table = Table()
    for result in results:
        row = {"model": result["model"], **averages_of(result)}
        if columns_with_numbers([row]):
            table.yours.append(row)
    if comparable(results):
        for model, cells in paper["table2"].items():
            row = {"model": model, "AVG-D": paper["table1"][model]["AVG"], "AVG-A": cells["AVG"]}
            for ability in uvrb.ABILITIES:
                row[ability] = cells[ability]
            table.published.append(row)
    return table


@dataclasses.dataclass(frozen=True)
class Curve:
    """Where the points of a figure come from."""

    block: str  # published.json's block
    xs: str  # its list of x
    setting: str  # the key of a result's protocol that is x
    fixed: dict  # other keys of the protocol, which must have these values
    scores: tuple = ()  # the scores that are shown; empty: all of the block


CURVES = {
    "Figure 6": Curve("figure6_data_scaling", "pairs", "pairs", {}, ("AVG-D", "AVG-A")),
    "Figure 11": Curve("figure6_data_scaling", "pairs", "pairs", {}, uvrb.ABILITIES[:6]),
    "Figure 12": Curve("figure12_frames", "frames", "frames", {"max_tokens": 200}),
    "Figure 13": Curve("figure13_tokens", "tokens_per_frame", "max_tokens", {"frames": 8}),
}
GVE = ("GVE-3B", "GVE-7B")  # the two models whose curves the paper shows


def published_points(curve, paper):
    """Return {model: {x: {score: y}}} of the paper's two models."""
    block = paper[curve.block]
    points = {}
    for model in GVE:
        points[model] = {}
        for i, x in enumerate(block[curve.xs]):
            if x == "full":  # all training pairs
                x = block["full"][model]
            scores = {score: y[model][i] for score, y in block["values"].items()}
            points[model][int(x)] = scores
    return points


def your_points(curve, results):
    """Return {checkpoint: {x: {score: y}}} of the results that have the curve's setting."""
    points = {}
    for result in results:
        protocol = result["protocol"]
        if not protocol.get(curve.setting) or not curve.fixed.items() <= protocol.items():
            continue
        # Data scaling has one checkpoint per point, and all of them make one curve.
        owner = "yours" if curve.setting == "pairs" else protocol["checkpoint"]
        x = int(protocol[curve.setting])
        points.setdefault(owner, {})[x] = averages_of(result)
    return points


def curves(name, paper, results):
    """Build Figure 6, 11, 12 or 13: a row per model and score, a column per x.

    Data scaling (Figures 6 and 11) has further columns, its fit.
    """
    curve = CURVES[name]
    theirs = {}
    if comparable(results):
        theirs = published_points(curve, paper)
    ours = your_points(curve, results)
    xs = set().union(*theirs.values(), *ours.values())  # of all points

    def make_rows(points_of):
        rows = []
        for model, points in points_of.items():
            for score in curve.scores or paper[curve.block]["values"]:
                row = {"model": model, "score": score}

                known = {}  # a model has no point at some x, an incomplete result no score
                for x in sorted(xs):
                    row[x] = points[x][score] if x in points else None
                    if row[x] is not None:
                        known[x] = row[x]
                if not known:  # results on a few datasets have few averages or none
                    continue

                if curve.setting == "pairs" and len(known) > 1:
                    row |= fit(list(known), list(known.values()))
                rows.append(row)
        return rows

    return Table(published=make_rows(theirs), yours=make_rows(ours))


def fit(x, y):
    """Fit y = a ln x + b by least squares (section 5.2, Figures 6 and 11).

    Returns a, b, the gain per decade, and that gain relative to the mean of y.
    """
    a, b = np.polyfit(np.log(x), y, 1)
    gain = a * math.log(10)  # of y, where x grows tenfold
    return {
        "a": float(a),
        "b": float(b),
        "per decade": float(gain),
        "relative": float(gain / np.mean(y)),
    }


def pearson(x, y):
    """Return Pearson's correlation of two lists."""
    return float(np.corrcoef(np.asarray(x, float), np.asarray(y, float))[0, 1])


def spearman(x, y):
    """Return Spearman's correlation of two lists, which is Pearson's of their ranks."""
    return pearson(mean_ranks(x), mean_ranks(y))


def mean_ranks(values):
    """Return ascending ranks, less a constant that correlations ignore; ties get their mean."""
    values = np.asarray(values, float)
    smaller = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return smaller + equal / 2


FAMILIES = ("CLIP", "MLLM", "All")  # correlations are over 6 CLIP models, 10 MLLMs or all 16


class Correlation(NamedTuple):
    """A published correlation, and both statistics computed from the published scores."""

    printed: float
    pearson: float
    spearman: float


def correlations(name, paper):
    """Recompute Figure 7 or 8: {(pair or column, family): Correlation}.

    # PAPER: says Pearson. Figure 8's "average" is taken to be Table 2's; its bars stop at .03, and
    # so do ours.
    """
    scores = {model: paper["table1"][model] | paper["table2"][model] for model in paper["table1"]}
    out = {}
    for family in FAMILIES:
        models = []
        for model, row in paper["models"].items():
            if family in ("All", row["family"]):
                models.append(scores[model])

        if name == "Figure 7":
            triangle = paper["figure7_correlations"]["lower_triangle_rows"][family]
            for a, row in triangle.items():
                # Row i of the lower triangle has i cells, so it ends before ABILITIES do.
                for b, printed in zip(uvrb.ABILITIES, row, strict=False):
                    x = values_of(models, a)
                    y = values_of(models, b)
                    out[f"{a}-{b}", family] = Correlation(printed, pearson(x, y), spearman(x, y))
        else:
            average = values_of(models, "AVG")
            for a, row in paper["figure8_correlation_with_average"].items():
                x = values_of(models, a)
                shown_pearson = max(pearson(x, average), 0.03)
                shown_spearman = max(spearman(x, average), 0.03)
                out[a, family] = Correlation(row[family], shown_pearson, shown_spearman)
    return out


def values_of(rows, name):
    """Return the values of one column, None for a row without it."""
    return [row.get(name) for row in rows]


def correlation_table(name, paper, results):
    """Build Figure 7 or 8, a row per pair or column: printed value, Pearson and Spearman.

    Your own correlations are over your results, from three results on.
    """
    # The published values, a column per family and statistic.
    rows = {}
    for (pair, family), correlation in correlations(name, paper).items():
        row = rows.setdefault(pair, {"pair": pair})
        if comparable(results):
            row[family] = correlation.printed
            row[f"{family} Pearson"] = correlation.pearson
            row[f"{family} Spearman"] = correlation.spearman

    # Yours: two points would always correlate perfectly.
    if len(results) > 2:
        models = []
        for result in results:
            scores = {dataset: entry["score"] for dataset, entry in result["datasets"].items()}
            models.append(averages_of(result) | scores)
        for pair, row in rows.items():
            a, b = (pair, "AVG-A") if name == "Figure 8" else pair.split("-")
            x = values_of(models, a)
            y = values_of(models, b)
            row["yours Pearson"] = None
            row["yours Spearman"] = None
            if None not in x + y:
                row["yours Pearson"] = pearson(x, y)
                row["yours Spearman"] = spearman(x, y)
    elif not comparable(results):
        return Table()  # neither published values nor enough of yours
    return Table(mixed=list(rows.values()))


# Pictures
#
# Each function draws one kind of figure from its table and returns matplotlib's figure. `pyplot` is
# an argument because plot() imports it late.


def plot(name, title, table, path):
    """Draw a figure from its table and save it as PNG."""
    # Imported here: train.py and eval.py start without it.
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no screen
    from matplotlib import pyplot

    if name == "Figure 2":
        picture = plot_abilities(pyplot, table)
    elif name in CURVES:
        picture = plot_curves(pyplot, table)
    elif name == "Figure 7":
        picture = plot_matrices(pyplot, table)
    else:
        picture = plot_bars(pyplot, table)
    picture.suptitle(title)
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


def plot_abilities(pyplot, table):
    """Draw Figure 2: a radar of abilities (published GVE dashed, yours filled) and averages."""
    picture = pyplot.figure(figsize=(14, 6), layout="constrained")
    radar = picture.add_subplot(1, 2, 1, projection="polar")
    bars = picture.add_subplot(1, 2, 2)

    # The radar: a line closes where it began.
    angles = np.linspace(0, 2 * math.pi, len(uvrb.ABILITIES) + 1)
    corners = [*uvrb.ABILITIES, uvrb.ABILITIES[0]]
    for row in table.published:
        if row["model"] in GVE:
            values = [row[ability] for ability in corners]
            radar.plot(angles, values, "--", label=f"{row['model']} (published, UVRB)")
    for row in table.yours:
        values = [row[ability] or 0 for ability in corners]
        (line,) = radar.plot(angles, values, "-", label=row["model"])
        radar.fill(angles, values, facecolor=line.get_color(), alpha=0.15)
    radar.set_xticks(angles[:-1], uvrb.ABILITIES)
    radar.set_ylim(0, 1)
    radar.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2)

    # The bars: two for each model, which all stand there.
    rows = [*table.published, *table.yours]
    places = np.arange(len(rows))
    for offset, average in ((-0.2, "AVG-D"), (0.2, "AVG-A")):
        lengths = [row[average] or 0 for row in rows]
        bars.barh(places + offset, lengths, 0.4, label=average)
    bars.set_yticks(places, values_of(rows, "model"))
    bars.invert_yaxis()
    bars.legend()
    return picture


def plot_curves(pyplot, table):
    """Draw Figure 6, 11, 12 or 13: a panel per score, a line per model."""
    rows = [*table.published, *table.yours]
    scores = list(dict.fromkeys(values_of(rows, "score")))
    wide = min(len(scores), 4 if len(scores) > 6 else 3)
    high = math.ceil(len(scores) / wide)
    picture, axes = pyplot.subplots(
        high, wide, figsize=(13, 3.5 * high), squeeze=False, layout="constrained"
    )

    for ax, score in zip(axes.flat, scores, strict=True):
        ax.set_title(score)
        for row in rows:
            if row["score"] != score:
                continue
            xs = [x for x in row if isinstance(x, int) and row[x] is not None]
            ys = [row[x] for x in xs]
            style = "o" if "a" in row else "o-"  # "a": the fit is the line
            (line,) = ax.plot(xs, ys, style, label=row["model"])
            if "a" in row:
                ax.plot(xs, row["a"] * np.log(xs) + row["b"], color=line.get_color())
                ax.set_xscale("log")
    axes.flat[0].legend()
    return picture


def plot_matrices(pyplot, table):
    """Draw Figure 7: Spearman's correlation of each pair of abilities, a panel per family."""
    rows = table.mixed
    families = [name.removesuffix(" Spearman") for name in rows[0] if name.endswith(" Spearman")]
    picture, axes = pyplot.subplots(
        1, len(families), figsize=(5 * len(families), 5), squeeze=False, layout="constrained"
    )

    # Cells outside the triangle, and those that are not known, are blank.
    n = len(uvrb.ABILITIES)
    for ax, family in zip(axes.flat, families, strict=True):
        grid = np.full((n, n), np.nan)
        for row in rows:
            a, b = map(uvrb.ABILITIES.index, row["pair"].split("-"))
            value = row[f"{family} Spearman"]
            if value is not None:
                grid[a, b] = value
            ax.text(b, a, f"{grid[a, b]:.2f}", ha="center", va="center", fontsize=7)
        ax.imshow(grid, cmap="coolwarm", vmin=-1, vmax=1)
        ax.set_xticks(range(n), uvrb.ABILITIES)
        ax.set_yticks(range(n), uvrb.ABILITIES)
        ax.set_title(f"{family}, Spearman")
    return picture


def plot_bars(pyplot, table):
    """Draw Figure 8: Spearman's correlation of each score with the average, a colour per family."""
    rows = table.mixed
    families = [name for name in rows[0] if name.endswith("Spearman")]
    picture, ax = pyplot.subplots(figsize=(13, 5), layout="constrained")

    width = 0.8 / len(families)
    places = np.arange(len(rows))
    for i, family in enumerate(families):
        heights = [row[family] or 0 for row in rows]
        ax.bar(places + i * width, heights, width, label=family)
    ax.set_xticks(places, values_of(rows, "pair"), rotation=60)
    ax.legend()
    return picture


# The paper against itself
#
# Many published values follow from others: averages from cells, sums from rows, gains from curves.
# Each function below yields such values; those that differ are errata, or show that we read the
# rules of the benchmark wrongly.

# Cells are rounded to 0.001, so a mean of cells, rounded as well, is off by at most this.
TOLERANCE = 0.0011


class Check(NamedTuple):
    """A published value that follows from other published values."""

    where: str  # table or figure
    row: str
    column: str
    printed: float
    computed: float
    tolerance: float = TOLERANCE


def recompute(paper):
    """Yield a Check for every published value that follows from others."""
    yield from check_tables_1_and_2(paper)
    yield from check_table_3(paper)
    yield from check_table_8(paper)
    yield from check_table_11(paper)
    yield from check_curves(paper)
    yield from check_gains(paper)
    yield from check_claims(paper)


def check_tables_1_and_2(paper):
    """Check averages and abilities by Table 1's cells."""
    for model, cells in paper["table1"].items():
        means = uvrb.abilities(cells)
        yield Check("Table 1", model, "AVG", cells["AVG"], means["AVG-D"])
        for name, printed in paper["table2"][model].items():
            computed = means["AVG-A" if name == "AVG" else name]
            yield Check("Table 2", model, name, printed, computed)


def check_averages(where, row, cells):
    """Check FG, TXT and AVG-A by the row's other cells and section 3.1's rules (uvrb.abilities)."""
    rules = {"FG": ("S", "T", "PR"), "TXT": ("CG", "FG", "LC"), "AVG-A": uvrb.ABILITIES[:6]}
    for name, parts in rules.items():
        if {name, *parts} <= cells.keys():
            computed = sum(cells[part] for part in parts) / len(parts)
            yield Check(where, row, name, cells[name], computed)


def check_table_3(paper):
    """Check averages by the row's cells; a model of Tables 1 and 2 must have their row."""
    for model, cells in paper["table3"].items():
        yield from check_averages("Table 3", model, cells)
        if model in paper["table2"]:
            same = dict(paper["table2"][model])
            same["AVG-A"] = same["AVG"]
            same["AVG-D"] = paper["table1"][model]["AVG"]
            for name, printed in cells.items():
                yield Check("Table 3", model, name, printed, same[name], tolerance=1e-9)


def check_table_8(paper):
    """Check sums by Tables 6 and 7, and the last row by the others."""
    sums = totals(paper["table6_mixture"] + paper["table7_uvrd"])
    printed_sums = paper["table8_totals"]
    for kind, row in printed_sums.items():
        for size, printed in row.items():
            computed = sums[kind][size]
            if kind == "all":
                own = [other[size] for name, other in printed_sums.items() if name != "all"]
                computed = sum(own)
            # Printed in units of 10,000.
            yield Check("Table 8", kind, size, printed, computed, tolerance=5000)


def check_table_11(paper):
    """Check the average of five accuracies."""
    for model, cells in paper["table11"].items():
        computed = sum(cells[name] for name in uvrb.ZERO_SHOT) / len(uvrb.ZERO_SHOT)
        yield Check("Table 11", model, "AVG", cells["AVG"], computed)


def check_curves(paper):
    """Check averages by the point's other scores, and one point of each curve by Table 3.

    That point is all data, 8 frames or 200 tokens: the model itself. Figure 6 shares its block of
    published.json with Figure 11.
    """
    for where, the_model in (("Figure 11", -1), ("Figure 12", 0), ("Figure 13", 0)):
        curve = CURVES[where]
        xs = paper[curve.block][curve.xs]
        values = paper[curve.block]["values"]
        for model in GVE:
            for i, x in enumerate(xs):
                point = {score: y[model][i] for score, y in values.items()}
                yield from check_averages(where, f"{model} at {x}", point)

            for score, y in values.items():
                computed = paper["table3"][model][score]
                label = f"{model} at {xs[the_model]}"
                yield Check(where, label, score, y[model][the_model], computed)


def check_gains(paper):
    """Check section 5.2's gains per decade by fits to Figures 6 and 11."""
    gains = paper["figure6_data_scaling"]["gain_per_decade"]
    for name in ("Figure 6", "Figure 11"):
        for row in curves(name, paper, []).published:
            label = f"{row['model']} {row['score']}"
            printed = gains[row["score"]][row["model"]]
            computed = {"absolute": row["per decade"], "relative": row["relative"]}
            for kind, gain in computed.items():
                if printed[kind] is None:  # the paper does not say
                    continue
                column = f"{kind} gain per decade"
                yield Check("section 5.2", label, column, printed[kind], gain)


def check_claims(paper):
    """Check the values in the paper's text by its tables and figures."""
    figures = {name: correlations(name, paper) for name in ("Figure 7", "Figure 8")}
    for where, row, name, claimed in paper["claims"]:
        if where == "Table 2":
            shown = paper["table2"][row][name]
        else:
            shown = figures[where][row, name].printed
        # Figures print two digits.
        yield Check("text", f"{where}, {row}", name, claimed, shown, tolerance=0.0101)


def contradicted(checks):
    """Return the checks that fail as {(where, row, column): (printed, computed)}."""
    wrong = {}
    for check in checks:
        if abs(check.printed - check.computed) > check.tolerance:
            wrong[check.where, check.row, check.column] = (check.printed, check.computed)
    return wrong


def disagreements(paper):
    """Find published values that do not follow from others.

    Returns {(where, row, column): (printed, computed)}, and a line per figure and family for the
    correlations of Figures 7 and 8. A correlation is judged by itself only if one statistic,
    Pearson or Spearman, reproduces nine tenths of its family: only then is it known which of the
    two was printed.
    """
    wrong = contradicted(recompute(paper))

    # Correlations: count the cells that each statistic does not give.
    lines = []
    for name in ("Figure 7", "Figure 8"):
        cells = correlations(name, paper)
        for family in FAMILIES:
            own = {pair: value for (pair, where), value in cells.items() if where == family}

            misfits = {}  # {statistic: {pair: (printed, computed)}}
            for statistic in ("pearson", "spearman"):
                misfits[statistic] = {}
                for pair, value in own.items():
                    computed = getattr(value, statistic)
                    if not abs(value.printed - computed) < 0.0051:  # two printed digits
                        misfits[statistic][pair] = (value.printed, computed)

            fits = {statistic: len(own) - len(pairs) for statistic, pairs in misfits.items()}
            best = max(fits, key=fits.get)
            if fits[best] >= 0.9 * len(own):
                for pair, values in misfits[best].items():
                    wrong[name, pair, family] = values
            lines.append(
                f"{name}, {family}: of {len(own)} printed cells "
                f"Pearson gives {fits['pearson']}, Spearman {fits['spearman']}"
            )
    return wrong, lines


# What is printed


# build() makes a table, show() prints and saves those that eval.py asks for, print_published() is
# eval.py --published, and pyramid_table() is the table that train.py prints at each epoch.


def build(name, paper, results, folder, roots):
    """Return the rows of any table or figure."""
    if name in AVERAGES:
        return score_table(name, paper, results)
    if name in CURVES:
        return curves(name, paper, results)
    if name in ("Figure 7", "Figure 8"):
        return correlation_table(name, paper, results)
    if name == "Figure 2":
        return figure_2(paper, results)
    if name == "Table 4":
        return table_4(paper, folder, roots)
    if name == "Table 5":
        return table_5(paper)
    if name in ("Table 6", "Table 7"):
        return table_6_or_7(name, paper)
    if name == "Table 8":
        return table_8(paper)
    if name == "Table 9":
        return table_9(paper, results)
    return table_10(paper, results)


def with_numbers(names, results):
    """Return those of the score tables and curves in which any of the results has a number."""
    paper = published()
    return [name for name in names if build(name, paper, results, None, ()).rows_of_results()]


def repeats_lines(name, table):
    """Return whether a score table says no more than eval.py's line per dataset does."""
    several = table.published or len(table.yours) > 1
    return name in ("Table 1", "Table 11") and not several and "AVG" not in table.yours[0]


def show(names, results, out, folder, roots=(), brief=False):
    """Print tables and figures; write them as <out>/table1.txt, .md, .csv, .tex, figures as .png.

    names: keys of TITLES. results: all of one benchmark. folder, roots: the benchmark that Table 4
    counts, and where its media may lie. brief: do not print what eval.py's lines have said.

    Raises ValueError for an unknown name and for results of two benchmarks; and, after all others
    are shown, for tables and figures for which neither the results nor the paper have a number.
    """
    paper = published()
    # Names and benchmarks are checked before the first table is written.
    unknown = [name for name in names if name not in TITLES]
    if unknown:
        raise ValueError(f"no {', '.join(unknown)} here (accepted: {', '.join(TITLES)})")
    benchmarks = {result["benchmark"] for result in results} or {"UVRB"}
    if len(benchmarks) > 1:
        listed = " and ".join(sorted(benchmarks))
        raise ValueError(f"results of {listed} do not belong into one table")
    (benchmark,) = benchmarks

    empty = []  # without published values a table or figure may have no number at all
    for name in names:
        table = build(name, paper, results, folder, roots)
        if not table.groups():
            empty.append(name)
            continue

        # Scores say whose they are, if not UVRB's, and on what they depend. Table 4 has sizes:
        # those of another benchmark may stand below UVRB's if the caption says so.
        has_scores = name in AVERAGES or name.startswith("Figure")
        about = ""
        if has_scores and benchmark != "UVRB":
            about = f"{benchmark}: "
        if name == "Table 4" and table.yours:
            counted, _ = uvrb.benchmark(folder)
            if counted != "UVRB":
                about = f"{counted} below the published rows, which are UVRB's: "
        title = f"{name}: {about}{TITLES[name]}"
        caption = title
        if has_scores:
            caption = "\n".join([title, *notes(results), *table.footnotes])

        path = Path(out) / block_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        for style in STYLES:
            text = render(caption, table.groups(), style)
            path.with_suffix("." + style).write_text(text, encoding="utf-8")
        if not (brief and repeats_lines(name, table)):
            print("\n" + render(caption, table.groups()), end="")
        if name.startswith("Figure"):
            plot(name, title, table, path.with_suffix(".png"))
            print(path.with_suffix(".png"))

    if empty:
        raise ValueError(
            f"{', '.join(empty)}: nothing to show: these results on {benchmark} have no number "
            "there (Figures 7 and 8 take three results; published numbers are UVRB's)"
        )


def print_published():
    """Print Table 2 recomputed from Table 1, and all values that do not follow from others."""
    paper = published()
    wrong, lines = disagreements(paper)

    # The table and the column in which the paper prints each of the columns here.
    sources = {"AVG-D": ("Table 1", "AVG"), "AVG-A": ("Table 2", "AVG")}
    for ability in uvrb.ABILITIES:
        sources[ability] = ("Table 2", ability)

    rows = []
    for model, cells in paper["table1"].items():
        means = uvrb.abilities(cells)
        row = {"model": model}
        for name, (where, printed_name) in sources.items():
            row[name] = cell(means[name])
            if (where, model, printed_name) in wrong:
                row[name] += "!"
        rows.append(row)
    caption = "Table 2, UVRB: recomputed from the cells of Table 1; "
    print(render(caption + "! where the paper prints another value", [rows]))

    print(f"{len(wrong)} published values do not follow from others:")
    print_contradicted(wrong)
    print("\n".join(lines))

    # Rows of another paper: its values are no errata of this one.
    later = paper["later"]
    wrong = contradicted(check_tables_1_and_2(later))
    print(f"\n{later['source']}: {len(wrong)} values do not follow from its cells by our rules:")
    print_contradicted(wrong)


def print_contradicted(wrong):
    """Print a line for each of contradicted()'s values."""
    for (where, row, name), (printed, computed) in wrong.items():
        line = f"  {where}, {row}, {name}: printed {printed:,}, the others give {computed:,.4f}"
        print(line.replace(".0000", ""))  # counts of pairs are whole numbers


def pyramid_table(event, levels):
    """Format one curriculum epoch (section 4.2), a line per source and per level of the pyramid.

    A line has R_k and its standard error; P(k), the mean over the epoch's steps; the steps drawn in
    this epoch; and how much is through by the epoch's end: the passes and, where sources have
    quotas, the steps used and left of them.
    event: the "epoch" line of train.py's log. levels: {source: (level 1..4, task)}.
    """
    quota = event["quota"]
    titles = f"{'level':>5} {'task':<6} {'source':<24} {'R_k':>7} {'+-':>6} {'P(k)':>7}"
    titles += f" {'steps':>6} {'passes':>7}"
    if quota:
        titles += f" {'used':>6} {'left':>6}"
    lines = [titles]

    def add_line(level, task, members, name="", relevance="", passes=""):
        p = sum(event["P"][member] for member in members)
        steps = sum(event["drawn"][member] for member in members)
        line = f"{level:>5} {task:<6} {name:<24} {relevance:>14} {p:7.3f} {steps:6.0f} {passes:>7}"
        if quota:
            used = sum(event["used"][member] for member in members)
            left = sum(quota[member] for member in members) - used
            line += f" {used:6.0f} {left:6.0f}"
        lines.append(line.rstrip())

    for level in range(1, 5):
        members = [name for name, (own_level, _) in levels.items() if own_level == level]
        for name in members:
            _, task = levels[name]
            relevance = f"{'-':>7} {'-':>6}"  # only schedules that need R_k probe
            if event["R"]:
                relevance = f"{event['R'][name]:7.3f} {event['R_error'][name]:6.3f}"
            add_line(level, task, [name], name, relevance, f"{event['passes'][name]:.2f}")
        if members:
            add_line(level, "all", members)
    return "\n".join(lines)
