"""UVRB, the universal video retrieval benchmark: 16 datasets, their folders, 9 abilities (paper section 3.1, Tables 4 and 5).

    python uvrb.py check DIR             list every bad row of a benchmark folder as file:line: reason; status 1 if any (seconds)
    python uvrb.py check DIR --decode    also decode every video and image that it names (hours on the full release)
    python uvrb.py derive NAME SOURCE OUT    build a dataset from its upstream annotation file (extras/derive.py)

`read` turns one dataset's <DS>/jsonl/{queries,corpus,instances}.jsonl into items and lists of indices, `abilities` 16 scores into
the paper's nine: applied to its Table 1 it gives its Table 2 to 0.0011, two misprints apart (tests/test_uvrb.py).
<root>/benchmark.json {"name": "mini-UVRB", "datasets": {DS: {"queries": n, "corpus": n}}} declares another benchmark.

Legend: N queries, M corpus items; "positives" and "pools" are lists of corpus indices, one list per query.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data

MODALITIES = ("text", "image", "video")
ABILITIES = (
    "TXT",
    "CMP",
    "VIS",
    "CG",
    "FG",
    "LC",
    "S",
    "T",
    "PR",
)  # Table 2's columns; its average is over the first six


class Dataset(NamedTuple):
    name: str
    task: str  # TXT, CMP or VIS: the form of the query
    domain: str  # CG, S, T, PR or LC for TXT; FG is made of S, T and PR
    metric: str  # Table 5
    queries: int  # published sizes, Table 4
    corpus: int  # PAPER: the 10 of MS-TI and MS-TV is taken to be each query's pool of candidates, as in MMEB-V2
    prompt: str  # Table 5, the query's instruction; corpus items get the default system prompt


DATASETS = {
    row[0]: Dataset(*row)
    for row in (
        (
            "MSRVTT",
            "TXT",
            "CG",
            "R@1",
            1000,
            1000,
            "Find the clip that corresponds to the described scene in the given video.",
        ),
        (
            "DiDeMo",
            "TXT",
            "CG",
            "R@1",
            1004,
            1004,
            "Find a video that includes the following described scenes.",
        ),
        (
            "CRB-G",
            "TXT",
            "CG",
            "R@1",
            1000,
            1000,
            "Find the video according to the general text description.",
        ),
        (
            "CRB-S",
            "TXT",
            "S",
            "R@1",
            1000,
            1000,
            "Find the video according to the spatial description.",
        ),
        (
            "VDC-O",
            "TXT",
            "S",
            "R@1",
            1027,
            1027,
            "Find the video according to the object description.",
        ),
        (
            "CRB-T",
            "TXT",
            "T",
            "R@1",
            1000,
            1000,
            "Find the video according to the temporal description.",
        ),
        (
            "CMRB",
            "TXT",
            "T",
            "R@10",
            728,
            1071,
            "Find the video according to the camera motion description.",
        ),
        (
            "DREAM-E",
            "TXT",
            "PR",
            "R@1",
            6251,
            1000,
            "Find the video according to the text description.",
        ),
        (
            "LoVR-TH",
            "TXT",
            "PR",
            "R@10",
            8854,
            8854,
            "Find the video according to text description about video theme information.",
        ),
        (
            "PEV-K",
            "TXT",
            "PR",
            "R@1",
            14427,
            15000,
            "Find the video according to the text description of a series of keywords.",
        ),
        (
            "LoVR-V",
            "TXT",
            "LC",
            "R@1",
            100,
            467,
            "Find the long video according to the long text description.",
        ),
        (
            "VDC-D",
            "TXT",
            "LC",
            "R@1",
            1000,
            1027,
            "Find the video according to the detailed text description.",
        ),
        (
            "MS-TI",
            "CMP",
            "",
            "P@1",
            400,
            10,
            "Find the video clip that corresponds to the given text and the given image.",
        ),
        (
            "MS-TV",
            "CMP",
            "",
            "P@1",
            400,
            10,
            "Find the video clip that corresponds to the given text and the given video.",
        ),
        ("MSRVTT-I2V", "VIS", "", "R@1", 1000, 1000, "Find the video according to the image."),
        (
            "LoVR-C2V",
            "VIS",
            "",
            "R@1",
            467,
            467,
            "Find the original long video according to the short video clip.",
        ),
    )
}

# Table 11, zero-shot classification: clips are the queries, class names the corpus, accuracy is R@1. They enter no ability.
# PAPER: sizes and prompt are not given; the prompt is ours and a folder is complete if all that it names could be encoded.
ZERO_SHOT = {
    name: Dataset(
        name, "V2T", "", "R@1", 0, 0, "Find the label that names what happens in the video."
    )
    for name in ("K700", "UCF101", "HMDB51", "SSV2", "Breakfast")
}
ALL = DATASETS | ZERO_SHOT


def abilities(scores: dict) -> dict:
    """Average dataset scores into the nine abilities and two averages (section 3.1; the rules are recovered from Tables 1 and 2).

    scores: {dataset: score in [0, 1]}. Returns {"TXT", ..., "PR", "AVG-D", "AVG-A"}; whatever needs an absent score is None.
    The means are hierarchical: FG is the mean of S, T and PR, TXT the mean of CG, FG and LC, not of 7 and 12 datasets.
    """

    def mean(values):
        values = list(values)
        return None if None in values else sum(values) / len(values)

    def over(tag):
        return mean(scores.get(d.name) for d in DATASETS.values() if tag in (d.task, d.domain))

    out = {tag: over(tag) for tag in ("CMP", "VIS", "CG", "LC", "S", "T", "PR")}
    out["FG"] = mean((out["S"], out["T"], out["PR"]))
    out["TXT"] = mean((out["CG"], out["FG"], out["LC"]))
    out = {tag: out[tag] for tag in ABILITIES}
    # AVG-D is Table 1's column, the plain mean of 16. AVG-A is Table 2's: six terms, S, T and PR count through FG only.
    return out | {
        "AVG-D": mean(scores.get(name) for name in DATASETS),
        "AVG-A": mean(out[tag] for tag in ABILITIES[:6]),
    }


@dataclass
class Bench:
    """One dataset as read from its folder. Rows are {"id", "item", "where": "file:line"}; items hold absolute media paths."""

    name: str
    queries: list  # N rows
    corpus: list  # M rows
    positives: list  # N sorted lists of corpus indices
    pools: (
        list | None
    )  # N sorted lists of corpus indices, positives and negatives; None: the whole corpus is ranked
    expected: tuple  # (queries, corpus) of a complete dataset; corpus is None for CMP, where Table 4's 10 is the size of a pool
    missing: list  # "file:line: reason" of absent media; their items still name the path, and fail when they are encoded


def folder_of(root, name: str) -> Path | None:
    """Find the folder with a dataset's jsonl files: <DS> or, as archives unpack, UVRB/<DS>, with jsonl/ or not. None: absent."""
    for folder in (
        Path(root) / name,
        Path(root) / name / "UVRB" / name,
        Path(root) / "UVRB" / name,
    ):
        for rows in (folder / "jsonl", folder):
            if (rows / "queries.jsonl").is_file():
                return rows
    return None


def benchmark(root) -> tuple[str, dict]:
    """Read what a complete benchmark is, (name, {dataset: (queries, corpus)}): benchmark.json, or without it "UVRB" and Table 4.

    Raises FileNotFoundError where root is no folder, ValueError naming the file and its form.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such benchmark folder")
    path = Path(root) / "benchmark.json"
    if not path.is_file():
        return "UVRB", {d.name: (d.queries, d.corpus) for d in DATASETS.values()}
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        return str(file["name"]), {
            ALL[ds].name: (int(n["queries"]), int(n["corpus"]))
            for ds, n in file["datasets"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        form = '{"name": str, "datasets": {DS: {"queries": int, "corpus": int}}}'
        raise ValueError(
            f"{path}: {type(e).__name__} {e}; wanted {form} with DS of {', '.join(ALL)}"
        ) from e


def read(root, name: str, roots=()) -> Bench:
    """Read one dataset; media may lie under `root`, the folder that holds it, and `roots`, whatever path or symlink names them.

    Raises FileNotFoundError if the dataset is not below root, ValueError with file, line and reason of the first bad rows.
    Missing media do not raise: they are in `.missing`, and the evaluation reports n/expected.
    """
    bench, bad = scan(root, name, roots)
    if bad:
        more = f"\n... and {len(bad) - 5} more: python uvrb.py check {root}" if len(bad) > 5 else ""
        raise ValueError("\n".join(bad[:5]) + more)
    return bench


def scan(root, name: str, roots=(), decode=False) -> tuple[Bench, list]:
    """Read one dataset and collect what is wrong instead of stopping: (Bench, ["file:line: reason", ...]).

    decode: load every video and image as well; what fails joins `.missing`.
    """
    if name not in ALL:
        raise ValueError(f"unknown dataset {name!r} (accepted: {', '.join(ALL)})")
    root = Path(root).resolve()
    sizes, rows = benchmark(root)[1], folder_of(root, name)
    if rows is None:
        raise FileNotFoundError(
            f"{root}: no {name} (wanted: {name}/jsonl/queries.jsonl, also below UVRB/ or without jsonl/)"
        )
    bad, missing = [], []
    if name not in sizes and name in DATASETS:
        bad.append(f"{root / 'benchmark.json'}: no sizes for {name}, whose folder is here")
    # Paths start at the dataset's folder or at a given root. Videos may lie beside the benchmark, not just anywhere.
    bases = [rows.parent if rows.name == "jsonl" else rows, *(Path(r).resolve() for r in roots)]
    allowed = [root, *bases[1:]] + [root.parent] * (root.parent != root.parent.parent)

    def items(path):
        """The rows of queries or corpus in file order. One with a bad item keeps its place, so that its references stay good."""
        out, lines = [], {}
        for where, line, row in tqdm(
            _rows(path, bad), f"{name} {path.name}", leave=False, disable=not decode
        ):
            item, key = None, row.get("id")
            if not isinstance(key, str):
                bad.append(f'{where}: "id" must be a string, not {key!r}')
                continue
            if key in lines:
                bad.append(f"{where}: duplicate id {key!r}, first on line {lines[key]}")
                continue
            try:
                item, lost = _item(row, bases, allowed, decode)
                missing.extend(f"{where}: {reason}" for reason in lost)
            except ValueError as e:
                bad.append(f"{where}: {e}")
            lines[key] = line
            out.append({"id": key, "item": item, "where": where})
        return out

    queries, corpus = items(rows / "queries.jsonl"), items(rows / "corpus.jsonl")
    positives, pools = _instances(rows / "instances.jsonl", queries, corpus, bad)
    expected = (
        (sizes[name][0], None if ALL[name].task == "CMP" else sizes[name][1])
        if name in sizes
        else (None, None)
    )
    return Bench(name, queries, corpus, positives, pools, expected, missing), bad


def _rows(path, bad):
    """Yield ("file:line", line, row) of a jsonl file; what is no JSON object goes to `bad`, so does a file without a row."""
    rows, lines = (
        0,
        path.read_bytes().split(b"\n") if path.is_file() else (),
    )  # bytes: bad UTF-8 spoils its own line only
    for line, text in enumerate(lines, 1):
        if text.strip():
            try:
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise ValueError(f"a JSON object is wanted, not {type(row).__name__}")
            except ValueError as e:
                bad.append(f"{path}:{line}: broken JSON: {e}")
                continue
            rows += 1
            yield f"{path}:{line}", line, row
    if not rows:
        bad.append(f"{path}: {'no rows' if path.is_file() else 'no such file'}")


def _item(row, bases, allowed, decode):
    """Turn a row into (item with absolute paths, reasons of absent media). ValueError if it is empty or leaves the roots."""
    item, lost = (
        {key: row[key] for key in MODALITIES if row.get(key)},
        [],
    )  # released rows may carry an empty text
    if not item:
        raise ValueError(
            f"nothing to embed: the row has {', '.join(row)}; one of {', '.join(MODALITIES)} is wanted"
        )
    data.check_item(item)
    for key, inner, load in (
        ("image", "video", data.load_image),
        ("video", "path", data.load_video),
    ):
        if key not in item:
            continue
        value = item[key]
        path = _locate(value[inner] if isinstance(value, dict) else value, bases)
        item[key] = {**value, inner: path} if isinstance(value, dict) else path
        try:
            item[key] = data.resolve({key: item[key]}, bases[0], allowed)[key]
            if decode:
                load(item[key])
        except FileNotFoundError as e:
            lost.append(f"missing media: {e}")
        except data.MediaError as e:
            lost.append(f"undecodable media: {e}")
    return item, lost


def _locate(path, bases):
    """Where a path lies below a base: as given, under videos/ or images/, or as a folder of frames, videos_frames/<stem>."""
    frames = Path("videos_frames") / Path(path).stem
    places = [
        base / place
        for base in bases
        for place in (path, Path("videos") / path, Path("images") / path, frames)
    ]
    return str(next((place for place in places if place.exists()), places[0]))


def _instances(path, queries, corpus, bad):
    """Read {"qid", "pos", "neg"?} rows, merged by query: (positives, pools or None), sorted corpus indices per query."""
    query_of = {row["id"]: i for i, row in enumerate(queries)}
    index_of = {row["id"]: j for j, row in enumerate(corpus)}
    found = {"pos": [set() for _ in queries], "neg": [set() for _ in queries]}
    for where, _, row in _rows(path, bad):
        i = query_of.get(str(row.get("qid")))
        if i is None:
            bad.append(f"{where}: qid {row.get('qid')!r} is not in queries.jsonl")
            continue
        for kind, sets in found.items():
            ids = row.get(kind) or []
            for key in ids if isinstance(ids, list) else [ids]:
                if not isinstance(key, str) or key not in index_of:
                    bad.append(f"{where}: {kind} {key!r} is not in corpus.jsonl")
                else:
                    sets[i].add(index_of[key])
    pairs = list(zip(found["pos"], found["neg"], strict=True))
    pools = [sorted(pos | neg) for pos, neg in pairs] if any(found["neg"]) else None
    for row, (pos, neg) in zip(queries, pairs, strict=True):
        if not pos:
            bad.append(f"{row['where']}: query {row['id']!r} has no positive in {path.name}")
        if pos & neg:
            both = corpus[min(pos & neg)]["id"]
            bad.append(
                f"{row['where']}: query {row['id']!r} has {both!r} as pos and as neg in {path.name}"
            )
        if (
            pools and not neg
        ):  # its pool would hold positives only, and every ranking of it be right
            bad.append(
                f"{row['where']}: query {row['id']!r} has no neg in {path.name}, where others have"
            )
    return [sorted(pos) for pos, _ in pairs], pools


def check(root, roots=(), decode=False) -> list:
    """Scan every dataset below `root` and print a line for each; returns all bad rows and absent media as "file:line: reason"."""
    (name, _), bad = benchmark(root), []
    for ds in DATASETS:
        if folder_of(root, ds) is None:
            print(f"{ds:10}  not here")
            continue
        bench, problems = scan(root, ds, roots, decode)
        n, m = len(bench.queries), len(bench.corpus)
        pools = (
            f", pools of {min(map(len, bench.pools))}-{max(map(len, bench.pools))}"
            if bench.pools
            else ""
        )
        print(f"{ds:10}  {n} queries, {m} videos{pools}, {len(bench.missing)} media missing")
        bad += problems + bench.missing
        if n != (bench.expected[0] or n) or m != (bench.expected[1] or m):
            bad.append(
                f"{folder_of(root, ds)}: {n} queries, {m} videos; {name} has {' and '.join(map(str, bench.expected))}"
            )
    if not any(folder_of(root, ds) for ds in DATASETS):
        bad.append(f"{root}: none of the 16 datasets is here ({', '.join(DATASETS)})")
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "check", help="list every bad row of a benchmark folder as file:line: reason"
    )
    sub.add_argument("dir", help="benchmark folder, with <DS>/jsonl/queries.jsonl and so on")
    sub.add_argument(
        "--root",
        nargs="+",
        default=[],
        help="further folders for media; paths are tried relative to them too",
    )
    sub.add_argument("--decode", action="store_true", help="also decode every video and image")
    from extras import derive  # only the command line needs it

    derive.add_flags(
        commands.add_parser(
            "derive",
            help="build a dataset from its upstream annotation file",
            description=derive.__doc__,
            formatter_class=parser.formatter_class,
        ),
        DATASETS,
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "derive":
            return print(derive.derive(args, DATASETS[args.name][4:6]))
        bad = check(args.dir, args.root, args.decode)
    except (ValueError, FileNotFoundError) as e:
        sys.exit(str(e))
    print("\n".join([*bad, f"{len(bad)} problems in {args.dir}"]))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
