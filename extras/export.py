"""Turn results of eval.py into files that other tools read: MTEB's result files, trec_eval's runs.

    python extras/export.py mteb runs/gve-mini/results.json --uvrb runs/mini/uvrb
    python extras/export.py trec runs/gve-mini/results.json      after eval.py --rankings

Writes mteb/<DS>.json (MTEB 2.x), or trec/<DS>.run and <DS>.qrels, beside each results.json; takes
seconds. trec_eval sorts by score again and puts the greater id first among equals, where our files
have corpus order: its numbers differ from ours where scores tie.
"""

import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import uvrb  # noqa: E402
from support.files import hash_files, read_jsonl, whole_file, write_json  # noqa: E402
from support.flags import flag, parse_flags  # noqa: E402
from tables import read_results  # noqa: E402

MTEB_NAMES = {"R": "recall_at_", "hit": "hit_rate_at_", "P": "precision_at_", "nDCG": "ndcg_at_"}


@dataclasses.dataclass
class Flags:
    format: str = flag(..., "files to write", choices=["mteb", "trec"], positional=True)
    results: list[str] = flag(..., "results.json files of eval.py", positional=True)
    uvrb: str = flag("runs/mini/uvrb", "benchmark folder that was scored; mteb records its hash")


def mteb_result(name, entry, revision, seconds):
    """Shape a dataset's entry of results.json as an MTEB 2.x result file.

    revision: hash of the benchmark's files; seconds: evaluation time, None if it was not logged.
    """
    scores = {}
    for metric, value in entry.items():
        kind, at, k = metric.partition("@")
        if at:
            scores[MTEB_NAMES[kind] + k] = value
    scores["mrr"] = entry["MRR"]
    scores["main_score"] = entry["score"]
    scores["hf_subset"] = "default"
    scores["languages"] = ["eng-Latn"]
    return {
        "dataset_revision": revision,
        "task_name": name,
        "mteb_version": None,
        "scores": {"test": [scores]},
        "evaluation_time": seconds,
        "kg_co2_emissions": None,
    }


def export_mteb(path, results, benchmark):
    """Write mteb/<DS>.json of every dataset with a scored query -> the folder."""
    seconds = {}  # the last time that this model was scored counts
    for _, event in read_jsonl(path.with_name("log.jsonl")):
        if event["event"] == "eval" and event["model"] == results["model"]:
            seconds[event["dataset"]] = event.get("seconds")

    out = path.with_name("mteb")
    out.mkdir(exist_ok=True)
    for name, entry in results["datasets"].items():
        folder = uvrb.folder_of(benchmark, name)
        if folder is None:
            raise ValueError(f"{path}: {name} is not in {benchmark} (give its folder with --uvrb)")
        if entry["n"]:
            revision = hash_files(folder, "*.jsonl")
            content = mteb_result(name, entry, revision, seconds.get(name))
            write_json(out / f"{name}.json", content)
    return out


def export_trec(path, results):
    """Write trec/<DS>.run and .qrels from the rankings of eval.py --rankings -> the folder."""
    out = path.with_name("trec")
    out.mkdir(exist_ok=True)
    for name, entry in results["datasets"].items():
        rankings = path.with_name("rankings") / f"{name}.jsonl"
        if not entry["n"]:
            continue
        if not rankings.is_file():
            raise ValueError(f"{rankings}: no such file (eval.py --rankings writes it)")
        with whole_file(out / f"{name}.run") as run, whole_file(out / f"{name}.qrels") as qrels:
            for _, row in read_jsonl(rankings):
                query = without_spaces(row["qid"])
                pairs = zip(row["ranked"], row["scores"], strict=True)
                for rank, (item, score) in enumerate(pairs, 1):
                    run.write(f"{query} Q0 {without_spaces(item)} {rank} {score!r} nanoGVE\n")
                for item in row["positives"]:
                    qrels.write(f"{query} 0 {without_spaces(item)} 1\n")
    return out


def without_spaces(key):
    """Replace white space in an id, since it separates the columns of TREC files."""
    return re.sub(r"\s", "%20", key)


def main(flags):
    """Export each results.json and print the folder that it went to."""
    for path in map(Path, flags.results):
        results = read_results(path)
        if flags.format == "mteb":
            print(export_mteb(path, results, flags.uvrb))
        else:
            print(export_trec(path, results))


if __name__ == "__main__":
    try:
        main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as error:  # bad flags and files; the message names them
        sys.exit(f"export.py: {error}")
