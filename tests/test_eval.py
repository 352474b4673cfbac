"""eval.py: metrics against trec_eval, chance by sampling, ceilings by brute force, missing media,
any model, the command; extras/export.py."""

import ctypes
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import moving_square, write_video
from PIL import Image

import embed
import eval as ev
import tables
import uvrb
from embed import top_k
from extras import export
from model import GVE
from support.files import hash_files, write_json, write_jsonl
from support.flags import parse_flags
from support.media import load_image, load_video

REPO = Path(__file__).resolve().parent.parent
TREC = {  # our names of trec_eval's measures
    "R@1": "recall_1",
    "R@5": "recall_5",
    "R@10": "recall_10",
    "hit@1": "success_1",
    "hit@5": "success_5",
    "hit@10": "success_10",
    "P@1": "P_1",
    "MRR": "recip_rank",
    "nDCG@10": "ndcg_cut_10",
}
MEASURES = {"recall.1,5,10", "success.1,5,10", "P.1", "recip_rank", "ndcg_cut.10"}


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(REPO / "eval.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def call(*args):
    """Run the command in this process: importing torch and transformers anew costs seconds."""
    return ev.main(parse_flags(ev.Flags, [str(a) for a in args]))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Put back what --encoder changes: its file stands in for the program that runs."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    before = dict(sys.modules)
    yield
    for name in ("__main__", "__mp_main__", *OUR_MODULES):
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


OUR_MODULES = [path.stem for path in REPO.glob("*.py")]


def results_of(out):
    return json.loads((out / "results.json").read_text())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Metrics


def problem(n=37, m=53, d=16, seed=0, most=5):
    """Random vectors and 1 to `most` positives per query, the odd sizes on purpose."""
    rng = np.random.default_rng(seed)
    queries = torch.from_numpy(rng.standard_normal((n, d)).astype(np.float32))
    corpus = torch.from_numpy(rng.standard_normal((m, d)).astype(np.float32))
    positives = []
    for _ in range(n):
        count = rng.integers(1, most + 1)
        positives.append(rng.choice(m, count, replace=False).tolist())
    return queries, corpus, positives, rng


def trec_means(qrel, runs):
    """Means of trec_eval's measures over queries, under our names, and its rows."""
    rows = list(pytrec_eval.RelevanceEvaluator(qrel, MEASURES).evaluate(runs).values())
    means = {name: float(np.mean([row[key] for row in rows])) for name, key in TREC.items()}
    return means, rows


def trec(queries, corpus, positives, pools=None):
    """Means of trec_eval's measures over queries, scores being cosines in float64."""
    queries = torch.nn.functional.normalize(queries.double(), dim=1)
    corpus = torch.nn.functional.normalize(corpus.double(), dim=1)
    cosines = (queries @ corpus.T).numpy()
    pools = pools or [range(len(corpus))] * len(queries)
    qrel = {str(i): {str(p): 1 for p in own} for i, own in enumerate(positives)}
    runs = {str(i): {str(j): float(cosines[i, j]) for j in pool} for i, pool in enumerate(pools)}
    return trec_means(qrel, runs)[0]


def bench(n=6, m=8, name="MSRVTT", pools=None, expected=None):
    """A dataset of n queries and m corpus items; query i looks for item i."""

    def rows(kind, count):
        made = []
        for i in range(count):
            where = f"{kind}.jsonl:{i + 1}"
            made.append({"id": f"{kind}{i}", "item": {"text": "x"}, "where": where})
        return made

    positives = [[i] for i in range(n)]
    expected = expected or (n, m)
    dataset = uvrb.ALL[name]
    return uvrb.Bench(name, dataset, rows("q", n), rows("c", m), positives, pools, expected, [])


def score(b, queries, corpus, lost_queries=(), lost_corpus=(), **options):
    """The entry of a dataset; lost_*: indices without a vector."""
    lost = [dict.fromkeys(indices, "lost") for indices in (lost_queries, lost_corpus)]
    return ev.score(ev.Encoded(b, queries, corpus, *lost), **options)


@pytest.mark.parametrize("n, m, most", [(37, 53, 1), (37, 53, 5), (13, 7, 6), (101, 781, 12)])
def test_metrics_equal_trec_evals(n, m, most):
    queries, corpus, positives, _ = problem(n, m, most=most)
    ours = ev.metrics(ev.ranks(queries, corpus, positives))
    for name, value in trec(queries, corpus, positives).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert set(ours) == {*TREC, "MdR", "MnR"}


@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_trec_evals_with_ties_duplicates_and_missing_items(seed):
    """Rows of 16 signs have exact cosines, so ties are real; half the corpus is a copy, some
    queries and videos have no vector.

    trec_eval puts the greater id first among equals: ids that fall along the corpus make its order
    ours.
    """
    rng = np.random.default_rng(seed)
    n, m = 41, 30
    twice = rng.choice([-1.0, 1.0], (m, 16))
    corpus = torch.from_numpy(twice)[rng.permutation(np.r_[0:m, 0:m])].float()
    near = corpus[rng.integers(0, 2 * m, n)]
    queries = near * torch.from_numpy(rng.choice([-1.0, 1.0, 1.0, 1.0], (n, 16))).float()
    positives = []
    for _ in range(n):
        positives.append(sorted(rng.choice(2 * m, rng.integers(1, 6), replace=False).tolist()))
    pools = None
    if seed % 2:
        pools = [sorted({*own, *rng.choice(2 * m, 12).tolist()}) for own in positives]
    lost_queries = set(rng.choice(n, 4, replace=False).tolist())
    lost_corpus = set(rng.choice(2 * m, 5, replace=False).tolist())

    b = bench(n, 2 * m)
    b.positives = positives
    b.pools = pools
    entry = score(b, queries, corpus, lost_queries, lost_corpus)

    kept = [i for i in range(n) if i not in lost_queries and not lost_corpus & set(positives[i])]
    cosines = (queries.double() @ corpus.double().T / 16).numpy()
    runs, qrel = {}, {}
    for i in kept:
        candidates = [j for j in (pools[i] if pools else range(2 * m)) if j not in lost_corpus]
        runs[str(i)] = {f"{999 - j}": float(cosines[i, j]) for j in candidates}
        qrel[str(i)] = {f"{999 - j}": 1 for j in positives[i]}
    means, rows = trec_means(qrel, runs)
    assert entry["n"] == len(rows) == len(kept) > 10
    for name, value in means.items():
        assert entry[name] == pytest.approx(value, abs=1e-9), name
    firsts = [1 / row["recip_rank"] for row in rows]
    assert entry["MdR"] == pytest.approx(np.median(firsts))
    assert entry["MnR"] == pytest.approx(np.mean(firsts))


def test_a_query_without_a_positive_is_rejected():
    with pytest.raises(ValueError, match="without a positive"):
        ev.metrics([[1], []])


def test_metrics_in_pools_equal_trec_evals_over_the_same_candidates():
    queries, corpus, positives, rng = problem()
    pools = [sorted({*own, *rng.choice(53, 8).tolist()}) for own in positives]
    ranks = ev.ranks(queries, corpus, positives, pools)
    ours = ev.metrics(ranks)
    for name, value in trec(queries, corpus, positives, pools).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["R@1"] > ev.metrics(ev.ranks(queries, corpus, positives))["R@1"]
    assert ev.ranks(queries, corpus, positives, [pool[::-1] for pool in pools]) == ranks


def test_median_and_mean_rank_are_of_the_first_positive():
    assert ev.metrics([[1], [4, 90], [3, 5]])["MdR"] == 3
    assert ev.metrics([[2], [5]])["MdR"] == 3.5
    assert ev.metrics([[1], [4, 90], [4, 5]])["MnR"] == 3


def test_bootstrap_intervals_are_those_of_a_proportion():
    """400 queries of which a quarter hit: .25 +- 1.96 sqrt(.25 x .75 / 400). The two R@10 sets are
    at 1 with 4 candidates."""
    corpus = torch.eye(4)
    datasets = {}
    for name in uvrb.DATASETS:
        b = bench(400, 4, name=name, expected=(400, 4))
        b.positives = [[0]] * 400
        datasets[name] = score(b, corpus[torch.arange(400) % 4], corpus, bootstrap=2000)
        # First in the corpus, so second among the ties.
        assert datasets[name]["MRR"] == pytest.approx((1 + 3 / 2) / 4)
    result = ev.summarise("UVRB", "x", PROTOCOL, datasets)
    assert json.loads(json.dumps(result)) == result and "draws" not in datasets["MSRVTT"]

    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert result["ci95"]["MSRVTT"] == pytest.approx([0.25 - half, 0.25 + half], abs=0.006)
    middle = (14 * 0.25 + 2) / 16
    half *= 14**0.5 / 16  # 14 independent sets
    assert result["ci95"]["AVG-D"] == pytest.approx([middle - half, middle + half], abs=0.002)
    assert set(result["ci95"]) == {*uvrb.DATASETS, *uvrb.ABILITIES, "AVG-D", "AVG-A"}


def test_ties_rank_in_corpus_order():
    """Vectors of 0 and 1 tie exactly. Here we differ from trec_eval, which puts the later of two
    equal documents first."""
    rng = np.random.default_rng(1)
    units = np.eye(4, dtype=np.float32)
    corpus = torch.from_numpy(units[rng.integers(0, 4, 23)])
    queries = torch.from_numpy(units[rng.integers(0, 4, 11)])
    positives = [rng.choice(23, 3, replace=False).tolist() for _ in range(11)]
    expected = []
    for q, own in zip(queries.tolist(), positives, strict=True):
        scores = [sum(a * b for a, b in zip(q, c, strict=True)) for c in corpus.tolist()]
        order = sorted(range(23), key=lambda j, scores=scores: (-scores[j], j))
        expected.append(sorted(order.index(p) + 1 for p in own))
    assert ev.ranks(queries, corpus, positives) == expected
    backwards = [list(range(23))[::-1]] * 11  # in pools too, in whatever order
    assert ev.ranks(queries, corpus, positives, backwards) == expected

    one = torch.ones(1, 4)
    assert ev.ranks(one, one.repeat(2, 1), [[1]]) == [[2]]
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {"1": 1}}, {"recip_rank"})
    assert evaluator.evaluate({"q": {"0": 1.0, "1": 1.0}})["q"]["recip_rank"] == 1.0


def test_ranks_agree_with_top_k_for_any_block_size_scale_and_dtype():
    queries, corpus, positives, _ = problem(most=3)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (queries, corpus)]
    indices = top_k(*unit, len(corpus))[1].tolist()
    expected = []
    for order, own in zip(indices, positives, strict=True):
        expected.append(sorted(order.index(p) + 1 for p in own))
    for block in (1, 60, 54 * 7, 2**26):
        assert ev.ranks(queries, corpus, positives, block=block) == expected
    # Cosine: lengths do not count.
    assert ev.ranks(queries * 1e3, corpus * torch.rand(53, 1), positives) == expected
    half = [x.half() for x in (queries, corpus)]
    assert ev.ranks(*half, positives) == ev.ranks(*(x.double() for x in half), positives)


def test_a_nan_vector_cannot_be_ranked():
    queries, corpus, positives, _ = problem()
    corpus[3, 2] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        ev.ranks(queries, corpus, positives)


@pytest.mark.parametrize("metric", ["R@1", "R@5", "R@10", "P@1"])
def test_chance_is_the_mean_over_random_rankings(metric):
    """20,000 random rankings of 4 queries with 1 to 6 positives among 8 to 40 candidates; the
    tolerance is 5 standard errors."""
    rng = np.random.default_rng(2)
    counts, sizes = [1, 3, 6, 2], [40, 25, 8, 11]
    draws = []
    for _ in range(20_000):
        ranks = []
        for p, m in zip(counts, sizes, strict=True):
            ranks.append(np.sort(rng.permutation(m)[:p] + 1).tolist())
        draws.append(ev.metrics(ranks)[metric])
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(ev.chance(metric, counts, sizes) - np.mean(draws)) < 5 * error


@pytest.mark.parametrize("metric", ["R@1", "R@5", "P@1"])
def test_ceiling_is_the_best_of_all_rankings(metric):
    for p in range(1, 7):
        rankings = itertools.combinations(range(1, 8), p)
        best = max(ev.metrics([list(ranks)])[metric] for ranks in rankings)
        assert ev.ceiling(metric, [p]) == pytest.approx(best)
    alone = [ev.ceiling(metric, [p]) for p in (1, 2, 4)]
    assert ev.ceiling(metric, [1, 2, 4]) == pytest.approx(np.mean(alone))


def test_ceiling_of_dream_1k_is_the_known_one():
    """DREAM-1K has 6,251 distinct events: 6,214 of one video, 32 of 2, 4 of 3, 1 of 5; strict R@1
    cannot pass 0.9969."""
    assert round(ev.ceiling("R@1", [1] * 6214 + [2] * 32 + [3] * 4 + [5]), 4) == 0.9969


# One dataset and all of them


def test_lost_media_cost_their_queries_and_the_place_in_every_average():
    queries, corpus, _, _ = problem(6, 8)
    queries = corpus[:6] + 0.05 * queries  # every query finds its own video
    pools = [[i, (i + 1) % 8, 7] for i in range(6)]
    for b in (bench(), bench(name="MS-TI", pools=pools, expected=(6, None))):
        whole = score(b, queries, corpus)
        assert (whole["n"], whole["expected"]) == (6, 6)
        assert (whole["score"], whole["complete"]) == (1.0, True)

        # Query 4 has no vector, query 1's video is gone, video 7 is a distractor.
        holed, spoilt = queries.clone(), corpus.clone()
        holed[4] = spoilt[1] = spoilt[7] = math.nan
        part = score(b, holed, spoilt, {4}, {1, 7})
        assert (part["n"], part["expected"]) == (4, 6)
        assert (part["corpus"], part["expected_corpus"]) == (6, 8)
        assert (part["score"], part["complete"]) == (1.0, False)

        distractor = score(b, queries, corpus, (), {7})
        assert (distractor["n"], distractor["corpus"]) == (6, 7)
        assert not distractor["complete"]
    # Pools without videos 1 and 7.
    assert part["chance"] == pytest.approx(np.mean([1, 1 / 2, 1 / 2, 1 / 2]))
    nothing = score(bench(), queries, corpus, (), range(8))
    assert (nothing["n"], nothing["score"], nothing["complete"]) == (0, None, False)


def test_a_benchmark_smaller_than_it_should_be_is_incomplete():
    queries, corpus, _, _ = problem(6, 8)
    for expected in ((7, 8), (6, 9)):
        assert not score(bench(expected=expected), queries, corpus)["complete"]


def entry(score, complete=True):
    return {
        "metric": "R@1",
        "score": score,
        "chance": 0.005,
        "ceiling": 1.0,
        "n": 9,
        "expected": 9 if complete else 10,
        "corpus": 9,
        "expected_corpus": 9,
        "pooled": True,
        "complete": complete,
    }


PROTOCOL = {"checkpoint": "runs/x", "step": 3, "frames": 8, "max_tokens": 200, "dtype": "float32"}


def test_only_complete_datasets_enter_an_average():
    cells = {name: i / 100 for i, name in enumerate(uvrb.DATASETS)}
    datasets = {name: entry(value) for name, value in cells.items()}
    whole = ev.summarise("UVRB", "x", PROTOCOL, datasets)
    assert whole["AVG-D"] == pytest.approx(0.075) and None not in whole["abilities"].values()

    datasets["CMRB"] = entry(cells["CMRB"], complete=False)
    part = ev.summarise("UVRB", "x", PROTOCOL, datasets)
    assert part["AVG-D"] is part["AVG-A"] is None
    known = {name: value for name, value in part["abilities"].items() if value is not None}
    assert part["abilities"].keys() - known.keys() == {"T", "FG", "TXT"}
    assert known.items() <= whole["abilities"].items()


def test_results_json_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# The real command on real files


def write_dataset(root, name, queries, corpus, instances):
    folder = root / "uvrb" / name / "jsonl"
    folder.mkdir(parents=True)
    write_lines(folder / "queries.jsonl", queries)
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "instances.jsonl", instances)


def write_damaged(path):
    """Write a video of 40 frames whose index is whole and whose last frames are cut off."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height = stream.width = 56
        stream.pix_fmt = "yuv420p"
        for frame in moving_square(40):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    content = path.read_bytes()
    path.write_bytes(content[: int(0.97 * len(content))])


def world(root, media):
    """A benchmark of three datasets over 7 real clips: text queries with 2 positives, pools, an
    image and a clip as query."""
    (root / "videos").mkdir(parents=True)
    for i in range(7):
        write_video(root / "videos" / f"{i}.mp4", moving_square(12, seed=20 + i))
    corpus = [{"id": f"c{i}", "video": f"../../videos/{i}.mp4"} for i in range(7)]
    image = str(media / "i.png")

    queries = [{"id": f"q{i}", "text": f"a square, number {i}"} for i in range(5)]
    instances = []
    for i in range(5):
        pos = [f"c{i}", f"c{(i + 2) % 7}"] if i % 2 else [f"c{i}"]
        instances.append({"qid": f"q{i}", "pos": pos})
    write_dataset(root, "MSRVTT", queries, corpus, instances)

    # Another corpus order in each.
    queries = [{"id": f"q{i}", "text": f"the same, {i}", "image": image} for i in range(4)]
    instances = []
    for i in range(4):
        instances.append({"qid": f"q{i}", "pos": [f"c{i}"], "neg": [f"c{i + 1}", f"c{i + 3}"]})
    write_dataset(root, "MS-TI", queries, corpus[1:] + corpus[:1], instances)

    queries = []
    for i in range(7):
        clip = {"path": f"../../videos/{i}.mp4", "start": 0, "end": 1}
        queries.append({"id": f"q{i}", "video": clip})
    instances = [{"qid": f"q{i}", "pos": [f"c{i}"]} for i in range(7)]
    write_dataset(root, "LoVR-C2V", queries, corpus[2:] + corpus[:2], instances)

    counts = {"MSRVTT": 5, "MS-TI": 4, "LoVR-C2V": 7}
    sizes = {name: {"queries": n, "corpus": 7} for name, n in counts.items()}
    benchmark = {"name": "tiny-UVRB", "datasets": sizes}
    (root / "uvrb" / "benchmark.json").write_text(json.dumps(benchmark))
    return root / "uvrb"


@pytest.fixture(scope="module")
def evaluated(tiny, media, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    folder = world(root, media)
    what = ("--ckpt", tiny, "--uvrb", folder, "--root", media)
    how = ("--name", "random", "--out", root / "out", "--batch-tokens", 300)
    done = run(*what, *how, cwd=root)
    assert done.returncode == 0, done.stderr
    return folder, root / "out", done.stdout


def test_the_command_scores_real_clips_as_embedding_them_one_by_one_does(evaluated, tiny, media):
    """The judge embeds every item alone, with the prompt of Table 5 as system turn, and leaves the
    metric to trec_eval."""
    folder, out, _ = evaluated
    result = results_of(out)
    gve = GVE.from_pretrained(tiny)
    assert list(result["datasets"]) == ["MSRVTT", "MS-TI", "LoVR-C2V"]
    for name, entry in result["datasets"].items():
        b = uvrb.read(folder, name, [media])
        prompt = tables.published()["datasets"][name]["prompt"]
        queries = torch.cat([gve.embed([row["item"]], prompt) for row in b.queries])
        corpus = torch.cat([gve.embed([row["item"]]) for row in b.corpus])
        expected = trec(queries, corpus, b.positives, b.pools)
        for metric, value in expected.items():
            assert entry[metric] == pytest.approx(value, abs=1e-9), (name, metric)
        assert entry["score"] == expected[{"MS-TI": "P@1"}.get(name, "R@1")] and entry["complete"]
        assert entry["n"] == entry["expected"] == len(b.queries)
    assert result["datasets"]["MS-TI"]["chance"] == pytest.approx(1 / 3)
    # Two of five queries have two positives.
    assert result["datasets"]["MSRVTT"]["ceiling"] == pytest.approx(0.8)


def test_results_json_holds_the_protocol_and_every_contracted_key(evaluated, tiny):
    folder, out, text = evaluated
    result = results_of(out)
    assert result["benchmark"] == "tiny-UVRB" and result["model"] == "random"
    assert set(result["abilities"]) == set(uvrb.ABILITIES) and {"AVG-D", "AVG-A"} < set(result)
    # 13 datasets are not here.
    assert result["AVG-D"] is None and result["abilities"]["VIS"] is None

    p = result["protocol"]
    assert (p["frames"], p["max_tokens"], p["max_length"]) == (8, 200, 8192)
    assert (p["dtype"], p["checkpoint"]) == ("float32", tiny)
    assert p["torch"] == torch.__version__ and p["transformers"]
    assert "corpus order" in p["ties"] and "step" in p
    # No adapter: the checkpoint is its own base.
    assert p["sha256"] == p["base_sha256"] == hash_files(tiny)

    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["dataset"] for e in events] == list(result["datasets"])
    assert all(e["event"] == "eval" and e["failed"] == [] for e in events)
    # No ability is complete, so there is no Table 2; Table 1 would repeat the lines on the screen.
    files = {"results.json", "log.jsonl", "cache"}
    for style in ("txt", "md", "csv", "tex"):
        files.add(f"table1.{style}")
    assert {path.name for path in out.iterdir()} == files
    assert "Table 1: tiny-UVRB" in (out / "table1.txt").read_text()
    starts = [line.split()[0] for line in text.splitlines()]
    assert starts == ["MSRVTT", "MS-TI", "LoVR-C2V", f"{out}:"]


ENCODER = """
import sys
sys.path.insert(0, {repo!r})
from model import GVE
gve = GVE.from_pretrained({ckpt!r})
def embed(items, instruction):
    assert len(items) <= 4
    return gve.embed(items, instruction).numpy()
def short(items, instruction):
    return [[1.0, 0.0]]
def half(items, instruction):
    return [[float("nan")] * 2 if "text" in item else [1.0, 0.0] for item in items]
"""


def write_vectors(folder, name, rows, vectors):
    """Write a dataset's files for --embeddings; rows are {"id", "kind"}."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / name / "vectors.npy", vectors)
    write_lines(folder / name / "items.jsonl", rows)


def test_any_model_from_a_file_or_a_folder_gets_the_numbers_of_the_checkpoint(
    evaluated, tiny, media, tmp_path, capsys
):
    """The same weights behind --encoder, and their vectors, of any length and in any order, behind
    --embeddings."""
    folder, out, _ = evaluated
    expected = results_of(out)["datasets"]
    (tmp_path / "mine.py").write_text(ENCODER.format(repo=str(REPO), ckpt=tiny))
    common = ("--uvrb", folder, "--root", media, "--out", tmp_path / "out")
    call("--encoder", f"{tmp_path / 'mine.py'}:embed", "--batch-size", 4, *common)
    assert results_of(tmp_path / "out")["datasets"] == expected

    gve = GVE.from_pretrained(tiny)
    rng = np.random.default_rng(0)
    for name in expected:
        b = uvrb.read(folder, name, [media])
        rows = [("query", row, uvrb.DATASETS[name].prompt) for row in b.queries]
        rows += [("corpus", row, None) for row in b.corpus]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        vectors = torch.cat([gve.embed([row["item"]], prompt) for _, row, prompt in rows]).numpy()
        lengths = rng.uniform(0.5, 9, (len(rows), 1)).astype(np.float32)
        lines = [{"id": row["id"], "kind": kind} for kind, row, _ in rows]
        write_vectors(tmp_path / "v", name, lines, vectors * lengths)
    call("--embeddings", tmp_path / "v", *common)
    assert results_of(tmp_path / "out")["datasets"] == expected
    assert "MS-TI/vectors.npy: corpus vectors are " in capsys.readouterr().out

    np.save(tmp_path / "v" / "MS-TI" / "vectors.npy", np.ones((11, 3), np.float32))
    words = r"MS-TI/vectors.npy: float32 \(11, 3\); expected floats \(11, 64\)"
    with pytest.raises(ValueError, match=words):
        call("--embeddings", tmp_path / "v", *common)


OWN = {  # a dataset that only a benchmark.json knows
    "task": "TXT",
    "domain": "CG",
    "metric": "R@5",
    "prompt": "Find my video.",
    "queries": 7,
    "corpus": 9,
}


def own_benchmark(root):
    """One of the 16 names and a dataset that uvrb.py does not know, texts alone. -> folder"""
    for name, n, m in (("MSRVTT", 3, 4), ("MyVideos", 7, 9)):
        queries = [{"id": f"q{i}", "text": f"query {i}"} for i in range(n)]
        corpus = [{"id": f"c{i}", "text": f"item {i}"} for i in range(m)]
        instances = [{"qid": f"q{i}", "pos": [f"c{i}"]} for i in range(n)]
        write_dataset(root, name, queries, corpus, instances)
    sizes = {"MSRVTT": {"queries": 3, "corpus": 4}, "MyVideos": OWN}
    benchmark = {"name": "mine", "datasets": sizes}
    (root / "uvrb" / "benchmark.json").write_text(json.dumps(benchmark))
    return root / "uvrb"


def test_a_folders_own_dataset_is_scored_and_shown_and_enters_no_average(tmp_path, capsys):
    """A new name in benchmark.json and no line of code: its metric is R@5, 5 of 7 queries hit."""
    folder = own_benchmark(tmp_path)
    for name, n, m in (("MSRVTT", 3, 4), ("MyVideos", 7, 9)):
        vectors = np.eye(m, 9, dtype=np.float32)
        queries = vectors[:n].copy()
        if name == "MyVideos":  # two queries rank all other items first
            queries[[6, 5]] = 1 - queries[[6, 5]]
        rows = [{"id": f"c{i}", "kind": "corpus"} for i in range(m)]
        rows += [{"id": f"q{i}", "kind": "query"} for i in range(n)]
        write_vectors(tmp_path / "v", name, rows, np.concatenate([vectors, queries]))

    common = ("--embeddings", tmp_path / "v", "--uvrb", folder, "--name", "me")
    done = run(*common, "--out", tmp_path / "out", "--bootstrap", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = results_of(tmp_path / "out")
    own = result["datasets"]["MyVideos"]
    assert (own["metric"], own["n"], own["complete"]) == ("R@5", 7, True)
    assert own["score"] == pytest.approx(5 / 7) and own["chance"] == pytest.approx(5 / 9)
    assert result["benchmark"] == "mine" and "MyVideos" in result["ci95"]
    # 15 of the 16 are not here, and the own dataset stands for none of them.
    assert result["AVG-D"] is result["AVG-A"] is None
    assert set(result["abilities"].values()) == {None}

    table = done.stdout.split("Table 1: mine")[1].split("Table 2")[0]
    head, mine = [line.split() for line in table.splitlines() if line.split()[:1] in HEAD]
    assert mine[head.index("MyVideos")] == ".714" and mine[head.index("MSRVTT")] == "1.000"

    # Alone, too.
    capsys.readouterr()
    call(*common, "--out", tmp_path / "o2", "--datasets", "MyVideos")
    about, line, last = capsys.readouterr().out.splitlines()
    assert "query vectors are 1 to 2.83 long and normalised here" in about
    assert line.split()[:3] == ["MyVideos", "R@5", ".714"] and last.startswith(f"{tmp_path}/o2: ")
    lines = (tmp_path / "o2" / "table1.csv").read_text().splitlines()
    assert lines == ["model,MyVideos", "me,.714", "chance,.556", "ceiling,1.000"]


HEAD = (["model"], ["me"])


def test_averages_of_the_16_stand_beside_a_folders_own_dataset():
    datasets = {name: entry(0.5) for name in uvrb.DATASETS}
    alone = ev.summarise("mine", "x", PROTOCOL, dict(datasets))
    both = ev.summarise("mine", "x", PROTOCOL, {**datasets, "MyVideos": entry(0.9)})
    assert both["AVG-D"] == alone["AVG-D"] == 0.5 and both["abilities"] == alone["abilities"]


def test_a_folders_own_prompt_heads_its_queries(tmp_path):
    folder = own_benchmark(tmp_path)
    seen = []

    def encode_rows(rows, instruction, desc):
        seen.append((len(rows), instruction))
        return torch.ones(len(rows), 2), {}, {}

    names = ["MSRVTT", "MyVideos"]
    benches = [uvrb.read(folder, name) for name in names]
    encoded = list(ev.encode_datasets(encode_rows, benches))
    assert [e.bench.name for e in encoded] == names
    assert seen == [(4 + 9, None), (3, uvrb.PROMPTS["MSRVTT"]), (7, "Find my video.")]


def test_the_benchmark_that_the_readme_shows_is_checked_and_scored(tiny, tmp_path, capsys):
    """Its rows as they stand there, five of each, over five real clips."""
    block = (REPO / "README.md").read_text().split("```\nmine/benchmark.json")[1].split("```")[0]
    content, *lines = re.split(r"\n(?=mine/)", block.strip())
    root = tmp_path / "mine"
    (root / "Kitchen" / "videos").mkdir(parents=True)
    (root / "benchmark.json").write_text(content)
    for line in lines[:3]:
        path, row = line.split(maxsplit=1)
        rows = [row.replace("1", str(i)) for i in range(1, 6)]
        assert rows[0] == row
        (tmp_path / path).write_text("\n".join(rows))
    for i in range(1, 6):
        write_video(root / "Kitchen" / "videos" / f"{i}.mp4", moving_square(12, seed=i))
    assert lines[3] == "mine/Kitchen/videos/1.mp4" and len(lines) == 4

    assert uvrb.check(root) == []
    assert capsys.readouterr().out == "Kitchen     5 queries, 5 corpus items, 0 media missing\n"
    call("--ckpt", tiny, "--uvrb", root, "--out", tmp_path / "out", "--name", "tiny")
    line, last = capsys.readouterr().out.splitlines()
    gve = GVE.from_pretrained(tiny)
    b = uvrb.read(root, "Kitchen")
    queries = torch.cat([gve.embed([row["item"]], "Find the video.") for row in b.queries])
    corpus = torch.cat([gve.embed([row["item"]]) for row in b.corpus])
    score = trec(queries, corpus, [[i] for i in range(5)])["R@1"]
    words = line.split()
    assert words[:3] == ["Kitchen", "R@1", f"{score:.3f}".removeprefix("0")]
    assert line.endswith("(chance .200, ceiling 1.000, 5/5 queries, 5/5 corpus items)")
    entry = results_of(tmp_path / "out")["datasets"]["Kitchen"]
    assert entry["score"] == pytest.approx(score) and entry["complete"]


def vectors_of(bench, folder, change=lambda rows, vectors: (rows, vectors)):
    """Write a folder for --embeddings in which every query is its first positive; `change` spoils
    it."""
    rows = [{"id": row["id"], "kind": "corpus"} for row in bench.corpus]
    rows += [{"id": row["id"], "kind": "query"} for row in bench.queries]
    corpus = np.eye(len(bench.corpus), dtype=np.float32)
    queries = corpus[[own[0] for own in bench.positives]]
    rows, vectors = change(rows, np.concatenate([corpus, queries]))
    write_vectors(folder, bench.name, rows, vectors)
    return folder


def test_missing_extra_and_damaged_vectors_are_reported(tmp_path, capsys):
    b = bench(6, 8)

    def change(rows, vectors):
        vectors[2] = np.nan  # c2
        rows[7] = {"id": "c99", "kind": "corpus"}
        rows[-1] = {"id": "q77", "kind": "query"}
        return rows, vectors

    encoded = next(ev.read_datasets(vectors_of(b, tmp_path, change), [b]))
    lost_queries, lost_corpus = encoded.lost_queries, encoded.lost_corpus
    assert set(lost_queries) == {5} and set(lost_corpus) == {2, 7}
    assert "q.jsonl:6" in lost_queries[5]
    assert "c.jsonl:3" in lost_corpus[2] and "'c7'" in lost_corpus[7]
    out = capsys.readouterr().out
    assert "1 query ids are not in MSRVTT and left out: q77" in out
    assert "1 corpus ids are not in MSRVTT and left out: c99" in out
    entry = ev.score(encoded)
    assert (entry["n"], entry["corpus"], entry["score"], entry["complete"]) == (4, 6, 1.0, False)

    whole = ev.score(next(ev.read_datasets(vectors_of(b, tmp_path), [b])))
    assert whole["complete"] and whole["score"] == 1.0


def instead(i, row):
    """A change of vectors_of's folder: line i is `row`."""
    return lambda rows, vectors: (rows[:i] + [row] + rows[i + 1 :], vectors)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda rows, v: (rows, v[:-1]),
            r"float32 \(13, 8\); expected floats \(14, D\), a row per line",
        ),
        (lambda rows, v: (rows, v.astype(np.int64)), "int64"),
        (lambda rows, v: (rows, v[:, :, None]), r"\(14, 8, 1\)"),
        (instead(3, {"id": "c0", "kind": "corpus"}), "items.jsonl:4: .* expected a new"),
        (
            instead(3, {"id": "c3", "kind": "video"}),
            'items.jsonl:4: .*"kind": "query" or "corpus"',
        ),
        (instead(3, {"id": 3, "kind": "corpus"}), "items.jsonl:4"),
        (
            lambda rows, v: (rows, v * (np.arange(14) != 9)[:, None]),
            "items.jsonl:10: its vector has length 0",
        ),
    ],
)
def test_a_wrong_folder_of_vectors_is_an_error_that_names_the_line(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        next(ev.read_datasets(vectors_of(bench(6, 8), tmp_path, change), [bench(6, 8)]))


def test_a_wrong_encoder_is_an_error_and_an_item_it_cannot_embed_is_a_loss(tiny, media, tmp_path):
    (tmp_path / "mine.py").write_text(ENCODER.format(repo=str(REPO), ckpt=tiny))
    rows = bench(3, 2).queries
    for name in ("i.png", "gone.png"):
        where = f"q.jsonl:{len(rows) + 1}"
        rows.append({"id": name, "item": {"image": str(media / name)}, "where": where})
    rows[1]["item"] = {"text": "y"}
    # 5 rows, two equal, one whose image is absent.
    with pytest.raises(ValueError, match=r"short: shape \(1, 2\) for 3 items; expected \(3, D\)"):
        encoder_at(f"{tmp_path}/mine.py:short", 8)(rows, None, "")
    vectors, failed, _ = encoder_at(f"{tmp_path}/mine.py:half", 2)(rows, None, "")
    assert set(failed) == {0, 1, 2, 4}
    assert failed[1] == "q.jsonl:2: the encoder says that this item failed (a row of NaN)"
    assert failed[4] == f"q.jsonl:5: {media / 'gone.png'} does not exist"
    assert vectors[3].tolist() == [1, 0] and vectors.isfinite().all(1).tolist() == 3 * [0] + [1, 0]

    with pytest.raises(ValueError, match="has no function 'nothing'"):
        ev.load_function(f"{tmp_path}/mine.py:nothing")
    with pytest.raises(OSError, match="gone.py"):
        ev.load_function(f"{tmp_path}/gone.py:embed")
    for spec in (f"{tmp_path}/mine.py", "mine:embed"):
        with pytest.raises(ValueError, match="expected FILE.py:FUNCTION"):
            ev.load_function(spec)


def encoder_at(spec, size=8, **options):
    """The encoder of FILE.py:NAME."""
    return ev.function_encoder(ev.load_function(spec), size, **options)


def encoder_of(folder, text, name="embed", size=8):
    """An encoder from a file of its own in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text)
    return encoder_at(f"{folder}/mine.py:{name}", size)


UNITS = {  # a function's result as people write it, three rows of the unit matrix
    "array": "np.eye(3)",
    "float16": "np.eye(3, dtype=np.float16)",
    "bf16 with gradients": "torch.eye(3, dtype=torch.bfloat16, requires_grad=True)",
    "integers": "torch.eye(3, dtype=torch.int64)",
    "list of lists": "np.eye(3).tolist()",
    "list of arrays": "list(np.eye(3, dtype=np.float32))",
    "list of tensors": "list(torch.eye(3, requires_grad=True))",
    "tuple of bf16": "tuple(torch.eye(3).bfloat16())",
}


@pytest.mark.parametrize("kind", UNITS)
def test_an_encoder_may_return_what_people_return(tmp_path, kind):
    text = f"import numpy as np, torch\ndef embed(items, instruction):\n    return {UNITS[kind]}\n"
    rows = bench(3, 2).queries
    for i, row in enumerate(rows):
        row["item"] = {"text": str(i)}
    vectors, failed, _ = encoder_of(tmp_path, text)(rows, None, "")
    assert vectors.dtype == torch.float32 and vectors.tolist() == np.eye(3).tolist()
    assert not failed and not vectors.requires_grad


def test_infinity_is_a_loss_of_another_kind_than_a_row_of_nan(tmp_path):
    text = "def embed(items, instruction):\n    return [[1.0, float(items[0]['text'])]]\n"
    for value in ("inf", "nan"):
        rows = bench(1, 1).queries
        rows[0]["item"] = {"text": value}
        _, failed, _ = encoder_of(tmp_path, text)(rows, None, "")
        assert failed[0].endswith("mine.py:embed gives a vector that is not finite")


WRONG_RESULTS = {  # an expression for two items: words of the error
    "None": "returns a NoneType; expected a tensor, an array or a list of rows, floats (2, D)",
    "{'vectors': np.eye(2)}": "returns a dict; expected a tensor",
    "['a', 'b']": "returns a list; expected a tensor",
    "[[1.0, 0.0], [1.0]]": "returns a list; expected a tensor",
    "np.ones(2)": "shape (2,) for 2 items; expected (2, D)",
    "np.ones((2, 1, 3))": "shape (2, 1, 3) for 2 items; expected (2, D)",
    "np.ones((3, 3))": "shape (3, 3) for 2 items; expected (2, D)",
    "np.ones((2, 5 if instruction else 4))": "shape (2, 5) for 2 items; expected (2, 4)",
    "np.zeros((2, 4))": "vectors of length 0 for 2 of 2 items (q.jsonl:1, q.jsonl:2)",
    "[[1.0, 2.0], [0.0, 0.0]]": "vectors of length 0 for 1 of 2 items (q.jsonl:2)",
    "items[0]['audio']": "KeyError: 'audio'",
}


@pytest.mark.parametrize("result", WRONG_RESULTS)
def test_a_wrong_result_of_an_encoder_is_named(tmp_path, result):
    text = f"import numpy as np\ndef embed(items, instruction):\n    return {result}\n"
    rows = bench(2, 2).queries
    rows[1]["item"] = {"text": "y"}
    encoder = encoder_of(tmp_path, text)
    with pytest.raises(ValueError) as error:
        for instruction in (None, "Find it."):
            encoder(rows, instruction, "")
    told = str(error.value)
    assert told.startswith(f"--encoder {tmp_path}/mine.py:embed: ") and "\n" not in told
    assert WRONG_RESULTS[result] in told


def test_vectors_that_are_all_equal_are_said(tmp_path, capsys):
    """For any source of vectors; of the queries, of the corpus, whatever their lengths."""
    b = bench(6, 8)
    corpus = torch.eye(8)
    same = torch.full((8, 8), 0.1) * torch.arange(1, 9)[:, None]
    same[2] = math.nan  # an item without a vector
    flags = parse_flags(ev.Flags, [])
    for queries, items, words in (
        (corpus[:6], same, "all corpus vectors are equal"),
        (same[:6], same, "all corpus vectors are equal"),
        (same[:6], corpus, "all query vectors are equal"),
        (corpus[:6], corpus, ""),
    ):
        lost = {2: "lost"} if items is same else {}
        lost_queries = {2: "lost"} if queries[0, 1] else {}
        encoded = ev.Encoded(b, queries, items, lost_queries, lost)
        ev.score_datasets([encoded], "mine", "x", PROTOCOL, flags, tmp_path)
        text = capsys.readouterr().out
        assert text.count("vectors are equal") == bool(words) and words in text
        entry = results_of(tmp_path)["datasets"]["MSRVTT"]
        assert entry.get("note", "").startswith(words) and ("note" in entry) == bool(words)
        assert not words or f"chance is .{'143' if items is same else '125'}" in text
    nearly = torch.ones(3000, 4) + 1e-3 * torch.eye(3000, 4)
    assert not ev.all_equal(nearly) and ev.all_equal(nearly[100:]) and not ev.all_equal(same[:1])


@pytest.mark.timeout(120)  # a pool whose workers cannot start tries for ever
def test_an_encoders_file_runs_as_python_would_run_it(tmp_path):
    """Beside it lie modules, one with a name of ours; its main block stays out; its dataclass, its
    arguments and a pool of new processes are its own."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("two = 2.0\n")
    (tmp_path / "model.py").write_text("from lib import two\nwidth = 3\n")
    text = """
from __future__ import annotations
import multiprocessing, os, sys
from dataclasses import dataclass
from model import two, width
@dataclass
class Config:
    dim: int | None = width
assert sys.argv == [__file__] and sys.path[0] == os.path.dirname(__file__)
def worker(text):
    return [float(len(text)), two, float("torch" in sys.modules)]
def embed(items, instruction):
    assert Config().dim == 3
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(worker, [item["text"] for item in items])
if __name__ == "__main__":
    raise SystemExit("as a program")
"""
    ours = sys.modules["model"]
    vectors, _, _ = encoder_of(tmp_path, text)(bench(1, 1).queries, None, "")
    # The worker ran this file alone: eval.py would have brought torch.
    assert vectors.tolist() == [[1.0, 2.0, 0.0]]
    assert sys.modules["model"] is not ours and ev.load_checkpoint.__globals__["GVE"] is ours.GVE


# Encoders that declare attributes


FRAMES = """
import json, os
import numpy as np
seen = []
def embed(items, instruction):
    seen.extend(items)
    with open({log!r}, "a") as file:
        texts = [item.get("text") for item in items]
        file.write(json.dumps([len(items), instruction, texts]) + "\\n")
    rows = []
    for item in items:
        text = sum(map(ord, item.get("text", "")))
        pixels = np.asarray(item.get("video", item.get("image", text)))
        rows.append([1.0, pixels.mean() / 255, pixels.std() / 255])
    return rows
def where_it_runs(pixels):
    return np.array([os.getpid(), *pixels.shape])
{attributes}
"""


def write_encoder(folder, attributes):
    """Write an encoder that keeps what it sees and logs its calls -> FILE.py:NAME."""
    text = FRAMES.format(log=str(folder / "calls.jsonl"), attributes=attributes)
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:embed"


def calls_of(folder):
    """Take the log of an encoder's calls -> [[number of items, instruction, texts], ...]."""
    log = folder / "calls.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def rows_of(*items):
    return [{"item": item, "where": f"q.jsonl:{i + 1}"} for i, item in enumerate(items)]


def squashed(picture, width, height):
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.BICUBIC))


@pytest.mark.parametrize("size", [None, (20, 30)])
def test_an_encoder_with_frames_gets_the_arrays_of_load_video_and_load_image(media, tmp_path, size):
    """Windows, folders of frames and frames of videos, too; texts and absent media as ever."""
    spec = write_encoder(tmp_path, f"embed.frames = 4\nembed.size = {size}")
    window = {"path": str(media / "wide.mp4"), "start": 1.0, "end": 3.0}
    moment = {"video": str(media / "b.mp4"), "time": 1.0}
    videos = [str(media / "a.mp4"), window, str(media / "frames"), str(media / "short.mp4")]
    items = [{"video": video} for video in videos]
    items += [{"image": str(media / "wide.png"), "text": "and words"}, {"image": moment}]
    items += [{"text": "words"}, {"video": str(media / "gone.mp4")}, items[1]]
    function = ev.load_function(spec)
    encode_rows = ev.function_encoder(function, 3, workers=1)
    vectors, failed, damaged = encode_rows(rows_of(*items), "Find it.", "")

    seen = function.call.__globals__["seen"]
    expected = [{"video": load_video(video, 4)[0]} for video in videos]
    expected.append({"image": load_image(items[4]["image"]), "text": "and words"})
    expected.append({"image": load_image(moment)})
    if size:
        for item in expected:
            if "video" in item:
                item["video"] = np.stack([squashed(frame, 30, 20) for frame in item["video"]])
            else:
                item["image"] = squashed(item["image"], 30, 20)
    assert len(seen) == 7 and seen[6] == {"text": "words"}
    for item, wanted in zip(seen, expected, strict=False):
        assert item.keys() == wanted.keys() and item.get("text") == wanted.get("text")
        for kind in item.keys() - {"text"}:
            assert item[kind].dtype == np.uint8 and item[kind].flags.writeable
            assert np.array_equal(item[kind], wanted[kind]), (kind, item[kind].shape)

    calls = [call[:2] for call in calls_of(tmp_path)]
    assert calls == [[3, "Find it."], [3, "Find it."], [1, "Find it."]]
    assert failed == {7: f"q.jsonl:8: {media / 'gone.mp4'} does not exist"} and not damaged
    for vector, item in zip(vectors, expected, strict=False):  # each in its own row
        pixels = item.get("video", item.get("image"))
        assert vector.tolist() == pytest.approx([1, pixels.mean() / 255, pixels.std() / 255])
    assert torch.equal(vectors[8], vectors[1])


def test_prepare_runs_in_a_decoding_process_and_an_image_is_one_frame(media, tmp_path):
    spec = write_encoder(tmp_path, "embed.frames = 4\nembed.prepare = where_it_runs")
    rows = rows_of({"video": str(media / "wide.mp4")}, {"image": str(media / "i.png")})
    for workers in (1, 0):
        function = ev.load_function(spec)
        ev.function_encoder(function, 8, workers=workers)(rows, None, "")
        video, image = function.call.__globals__["seen"]
        assert video["video"][1:].tolist() == [4, 84, 168, 3]
        assert image["image"][1:].tolist() == [1, 70, 90, 3]
        assert (video["video"][0] == os.getpid()) == (workers == 0)


def test_a_clip_that_hangs_or_crashes_its_decoder_is_lost_alone_and_a_damaged_one_noted(
    media, tmp_path, monkeypatch
):
    load = ev.open_clip

    def fatal(video, frames):
        if "/hang.mp4" in video:
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock: only a kill ends it
        if "/crash.mp4" in video:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(video, frames)

    monkeypatch.setattr(ev, "open_clip", fatal)
    for name in ("hang", "crash", "b"):
        shutil.copy(media / "b.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    write_damaged(tmp_path / "part.mp4")
    names = ["hang", "b", "crash", "bad", "part"]
    rows = rows_of(*[{"video": str(tmp_path / f"{name}.mp4")} for name in names])
    spec = write_encoder(tmp_path, "embed.frames = 4\nembed.size = (8, 8)")
    encode_rows = encoder_at(spec, 2, workers=2, seconds=1.5)
    vectors, failed, damaged = encode_rows(rows, None, "")

    assert set(failed) == {0, 2, 3}
    assert failed[0] == f"q.jsonl:1: {tmp_path}/hang.mp4: not decoded within 1.5 s"
    assert failed[2] == f"q.jsonl:3: {tmp_path}/crash.mp4: its decoder crashed"
    assert failed[3].startswith(f"q.jsonl:4: {tmp_path}/bad.mp4: ")
    assert re.fullmatch(r"q.jsonl:5: .*/part.mp4: damaged: \d+ of 40 frames decode", damaged[4])
    assert vectors.isfinite().all(1).tolist() == [False, True, False, False, True]
    alone, _, _ = encode_rows(rows[1:2], None, "")
    assert torch.equal(alone[0], vectors[1])


def test_vectors_with_a_fingerprint_are_kept_until_anything_changes(media, tmp_path):
    plain = "embed.frames = 4\nembed.size = (8, 8)\nembed.fingerprint = 'one'"
    clip = tmp_path / "clip.mp4"
    shutil.copy(media / "a.mp4", clip)
    rows = rows_of({"video": str(clip)}, {"text": "a"}, {"text": ""})

    def calls(attributes=plain, instruction=None, keep=True):
        """How many items the encoder is given; the vectors must be those without a cache."""
        function = ev.load_function(write_encoder(tmp_path, attributes))
        cache = ev.function_cache(function, tmp_path / "cache") if keep else None
        vectors, failed, _ = ev.function_encoder(function, 2, cache=cache)(rows, instruction, "")
        given = sum(n for n, _, _ in calls_of(tmp_path))
        if keep:
            assert torch.equal(vectors, calls(attributes, instruction, keep=False)[1])
        return given, vectors

    assert [calls()[0], calls()[0]] == [3, 0]
    for change in (
        plain + "\n",  # the file
        plain.replace("one", "two"),
        plain.replace("4", "2"),
        plain.replace("(8, 8)", "(8, 6)"),
        plain.replace("size = (8, 8)", "prepare = np.asarray"),
    ):
        assert [calls(change)[0], calls(change)[0]] == [3, 0], change
    assert calls(instruction="Find it.")[0] == 3
    shutil.copy(media / "wide.mp4", clip)
    assert [calls()[0], calls()[0]] == [1, 0]


def test_the_settings_alone_tell_one_key_from_another(tmp_path):
    """Even where the file stays the same: they may come from outside it."""
    spec = write_encoder(tmp_path, "")
    settings = dict(frames=4, size=(8, 8), fingerprint="one")
    changes = [{}, {"frames": 2}, {"size": (8, 6)}, {"fingerprint": "two"}]
    changes += [{"size": None, "prepare": np.flip}, {"size": None}, {"spec": spec + "2"}]
    keys = set()
    for change in changes:
        function = ev.Function(**({"spec": spec, "call": None} | settings | change))
        keys.add(json.dumps(ev.function_cache(function, tmp_path / "cache").model_key))
    assert len(keys) == len(changes)


def test_without_a_fingerprint_nothing_is_kept_and_a_failed_item_never_is(tmp_path):
    text = "def embed(items, instruction):\n    seen.append(len(items))\n"
    text += "    return [[1.0, float(item['text'])] for item in items]\nseen = []\n"
    rows = rows_of({"text": "1"}, {"text": "nan"}, {"text": "inf"})
    for fingerprint, expected in (("", [3, 3]), ("embed.fingerprint = 'one'\n", [3, 2])):
        (tmp_path / "mine.py").write_text(text + fingerprint)
        given = []
        for _ in range(2):
            function = ev.load_function(f"{tmp_path}/mine.py:embed")
            cache = ev.function_cache(function, tmp_path / "cache")
            vectors, failed, _ = ev.function_encoder(function, 8, cache=cache)(rows, None, "")
            assert set(failed) == {1, 2} and vectors[0].tolist() == [1, 1]
            given += function.call.__globals__["seen"]
        assert given == expected
        assert (tmp_path / "cache").exists() == bool(fingerprint)


def test_results_json_holds_what_an_encoder_says_of_itself(tmp_path):
    attributes = "embed.protocol = {'positions': '1d'}\nembed.parameters = 12\n"
    attributes += "embed.published = 'GME-2B'\nembed.frames = 4\nembed.fingerprint = 'one'"
    spec = write_encoder(tmp_path, attributes)
    folder = own_benchmark(tmp_path)
    out = tmp_path / "out"
    for expected in (7, 0):  # 9 different corpus items, 3 and 7 queries
        call("--encoder", spec, "--uvrb", folder, "--out", out, "--batch-size", "3")
        assert len(calls_of(tmp_path)) == expected
    results = results_of(out)
    known = {"checkpoint": spec, "similarity": "cosine, float32", "frames": 4, "positions": "1d"}
    assert results["protocol"] == known
    assert (results["parameters"], results["published"]) == (12, "GME-2B")

    call("--encoder", write_encoder(tmp_path, ""), "--uvrb", folder, "--out", out)
    results = results_of(out)
    assert "parameters" not in results and "published" not in results
    assert results["protocol"] == {"checkpoint": spec, "similarity": "cosine, float32"}


WRONG_ATTRIBUTES = {  # lines of the encoder's file: words of the error
    "embed.frames = 3": "must be even",
    "embed.frames = '8'": "frames = '8'; expected int",
    "embed.frames = 4\nembed.size = 224": "size = 224; expected list | tuple",
    "embed.frames = 4\nembed.size = (8, 8, 3)": "expected (height, width)",
    "embed.frames = 4\nembed.size = (8, 8)\nembed.prepare = where_it_runs": "not both",
    "embed.protocol = {'weights': np.ones(2)}": "protocol",
    "embed.fingerprint = 7": "fingerprint = 7",
    "del embed\ndef __getattr__(name): raise AttributeError(f'{name}: I know A-1')": "I know A-1",
}


def test_a_torch_module_may_stand_for_the_function(tmp_path):
    """Its methods are no attributes of an encoder; without frames, neither are size and prepare."""
    lines = "import torch\nclass Model(torch.nn.Module):\n    size = 768\n"
    lines += "    prepare = forward = lambda self, items, instruction: embed(items, instruction)\n"
    write_encoder(tmp_path, lines + "model = Model()")
    function = ev.load_function(f"{tmp_path}/mine.py:model")
    assert (function.parameters, function.size, function.prepare) == (None, None, None)
    vectors, failed, _ = ev.function_encoder(function, 8)(rows_of({"text": "abc"}), None, "")
    assert vectors.shape == (1, 3) and not failed


@pytest.mark.parametrize("lines", WRONG_ATTRIBUTES)
def test_a_wrong_attribute_of_an_encoder_is_named(tmp_path, lines):
    with pytest.raises(ValueError, match=re.escape(WRONG_ATTRIBUTES[lines])):
        ev.load_function(write_encoder(tmp_path, lines))


def test_an_encoder_may_be_made_when_it_is_asked_for_by_a_name_with_a_hyphen(tmp_path):
    lines = "def __getattr__(name): return {'GME-2B': embed}[name]"
    write_encoder(tmp_path, lines)
    vectors, _, _ = encoder_at(f"{tmp_path}/mine.py:GME-2B")(rows_of({"text": "abc"}), None, "")
    assert vectors.shape == (1, 3)


def test_ranks_whose_vectors_differ_in_width_are_an_error(monkeypatch):
    monkeypatch.setattr(embed, "all_gather_object", lambda own: [own, 0, 5])
    assert embed.agree_on_dim(5) == embed.agree_on_dim(0) == 5
    with pytest.raises(ValueError, match=r"different widths: \[4, 5\]"):
        embed.agree_on_dim(4)


@pytest.mark.slow
@pytest.mark.parametrize("fingerprint", [None, "one"])
def test_two_ranks_of_an_encoder_equal_one(media, tmp_path, fingerprint):
    """With a clip that is lost and one that gives a part."""
    folder = world(tmp_path, media)
    (tmp_path / "videos" / "2.mp4").write_bytes(b"bad")
    write_damaged(tmp_path / "videos" / "5.mp4")
    attributes = f"embed.frames = 4\nembed.size = (8, 8)\nembed.fingerprint = {fingerprint!r}"
    spec = write_encoder(tmp_path, attributes)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    logged = []
    items = []
    batches = []  # of texts: none of them fails, so that they are the same
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        words = ["--encoder", spec, "--uvrb", folder, "--root", media, "--out", out, "--rankings"]
        words += ["--batch-size", "2", "--workers", "1", "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, *(torchrun if ranks == 2 else []), REPO / "eval.py", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results.json, tables and log") == 1
        calls = calls_of(tmp_path)
        items.append(sum(n for n, _, _ in calls))
        batches.append(sorted(texts for _, _, texts in calls if texts[0]))
        events = [json.loads(line) for line in (out / "log.jsonl").open()]
        logged.append([[event["failed"], event["damaged"]] for event in events])
        assert (out / "cache").exists() == bool(fingerprint)
    assert items[0] == items[1] and batches[0] == batches[1]
    assert logged[0] == logged[1] and all(failed and damaged for failed, damaged in logged[0][2:])
    one, two = [results_of(tmp_path / name) for name in "12"]
    assert one == two
    for path in (tmp_path / "1" / "rankings").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "rankings" / path.name).read_bytes()


def test_nothing_scored_is_an_error_with_the_reasons_in_the_log(tmp_path):
    folder = own_benchmark(tmp_path)
    text = "def embed(items, instruction):\n    return [[float('nan')] for _ in items]\n"
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path / 'mine.py'}:embed"
    with pytest.raises(ValueError, match="no query could be scored"):
        call("--encoder", spec, "--uvrb", folder, "--out", tmp_path / "out")
    events = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [len(json.loads(event)["failed"]) for event in events] == [7, 16]


def test_torchrun_and_vectors_in_files_are_refused_before_every_rank_writes(tmp_path, monkeypatch):
    folder = own_benchmark(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="takes one process: no torchrun"):
        call("--embeddings", tmp_path, "--uvrb", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vectors_that_embed_wrote_are_read_from_two_folders(tmp_path):
    """queries/ and corpus/, whose lines have no kind but a line number and perhaps an error."""
    b = bench(3, 4)
    vectors = np.eye(4, dtype=np.float32)
    for name, rows, made in (("queries", b.queries, vectors[:3]), ("corpus", b.corpus, vectors)):
        lines = [{"id": row["id"], "line": i + 1} for i, row in enumerate(rows)]
        if name == "corpus":
            made = made.copy()
            made[3] = math.nan
            lines[3]["error"] = "no such file"
        write_vectors(tmp_path / "MSRVTT", name, lines, made)
    encoded = next(ev.read_datasets(tmp_path, [b]))
    entry = ev.score(encoded)
    assert (entry["n"], entry["corpus"], entry["score"]) == (3, 3, 1.0)
    assert set(encoded.lost_corpus) == {3} and not encoded.lost_queries

    np.save(tmp_path / "MSRVTT" / "corpus" / "vectors.npy", np.ones((4, 5), np.float32))
    with pytest.raises(ValueError, match=r"corpus/vectors.npy: .* expected floats \(4, 4\)"):
        next(ev.read_datasets(tmp_path, [b]))
    (tmp_path / "MSRVTT" / "corpus" / "vectors.npy").write_bytes(b"PK, no array")
    with pytest.raises(ValueError, match="corpus/vectors.npy: no array of numbers"):
        next(ev.read_datasets(tmp_path, [b]))
    with pytest.raises(OSError, match="gone/MSRVTT: no vectors.npy"):
        next(ev.read_datasets("gone", [b]))


def test_frames_and_tokens_vary_one_at_a_time(evaluated, tiny, media, tmp_path, capsys):
    """MS-TI under the name of MS-TV as well: then CMP is complete, and Figure 12 has a curve."""
    folder, out, _ = evaluated
    shutil.copytree(folder.parent / "videos", tmp_path / "videos")
    for name in ("MS-TI", "MS-TV"):
        shutil.copytree(folder / "MS-TI", tmp_path / "uvrb" / name)
    sizes = {name: {"queries": 4, "corpus": 7} for name in ("MS-TI", "MS-TV")}
    benchmark = {"name": "tiny-UVRB", "datasets": sizes}
    (tmp_path / "uvrb" / "benchmark.json").write_text(json.dumps(benchmark))

    common = ("--ckpt", tiny, "--uvrb", tmp_path / "uvrb", "--root", media)
    common += ("--name", "tiny", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="--frames and --max-tokens"):
        call("--frames", 8, 16, "--max-tokens", 200, 400, *common)
    call("--frames", 4, 8, *common)
    four, eight = [results_of(tmp_path / "out" / f"{frames}x200") for frames in (4, 8)]
    assert (four["protocol"]["frames"], eight["protocol"]["frames"]) == (4, 8)
    assert eight["model"] == "tiny 8x200"
    assert eight["datasets"]["MS-TI"] == results_of(out)["datasets"]["MS-TI"]

    text = capsys.readouterr().out
    assert "Table 1: tiny-UVRB" in text and "Table 2: tiny-UVRB" in text
    rows = [line.split() for line in text.split("Figure 12: ")[1].splitlines()]
    assert ["model", "score", "4", "8"] in rows
    assert [row[1] for row in rows if row[:1] == [tiny]] == ["CMP"]
    assert (tmp_path / "out/figure12.png").is_file()
    assert not (tmp_path / "out/figure13.png").exists()


@pytest.mark.skipif(
    not (REPO / "runs/mini/scenes.jsonl").is_file(),
    reason="runs/mini is not there: python -m mini render",
)
def test_zero_shot_classification_is_video_to_label_retrieval(tiny, tmp_path, capsys):
    """A small namesake of UCF101 from the mini world's truth: 12 clips, 4 classes, the theme.
    Labels are the corpus."""
    theme_of = {}
    for line in (REPO / "runs/mini/scenes.jsonl").open():
        video = json.loads(line)
        if len(video["scenes"]) == 1:
            theme_of[video["id"]] = video["scenes"][0]["theme"]
    themes = sorted(set(theme_of.values()))[:4]
    clips = []
    for theme in themes:
        clips += [i for i in theme_of if theme_of[i] == theme][:3]
    videos = [str(REPO / "runs/mini/videos" / f"{i}.mp4") for i in clips]
    write_dataset(
        tmp_path,
        "UCF101",
        [{"id": i, "video": video} for i, video in zip(clips, videos, strict=True)],
        [{"id": theme, "text": theme} for theme in themes],
        [{"qid": i, "pos": [theme_of[i]]} for i in clips],
    )

    root = (REPO / "runs/mini").resolve()
    common = ("--ckpt", tiny, "--uvrb", tmp_path / "uvrb", "--root", root)
    call(*common, "--out", tmp_path / "out", "--name", "tiny")
    entry = results_of(tmp_path / "out")["datasets"]["UCF101"]
    gve = GVE.from_pretrained(tiny)
    queries = gve.embed([{"video": video} for video in videos], uvrb.ZERO_SHOT["UCF101"].prompt)
    best = (queries @ gve.embed([{"text": theme} for theme in themes]).T).argmax(1).tolist()
    accuracy = np.mean([themes[k] == theme_of[i] for k, i in zip(best, clips, strict=True)])
    assert entry["score"] == pytest.approx(accuracy) and entry["complete"]
    assert entry["chance"] == pytest.approx(1 / 4)
    text = capsys.readouterr().out
    assert "Table 11" in text and "Table 1:" not in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    # Table 11 has UCF101's column alone, the published rows as well.
    assert rows["model"] == ["UCF101"] and len(rows) > 6
    assert rows["tiny"] == [f"{accuracy:.3f}".replace("0.", ".")]


def test_a_fingerprint_is_of_the_weights(tiny, tmp_path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert hash_files(copy) == hash_files(tiny) and hash_files("Alibaba-NLP/GVE-3B") is None
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert hash_files(copy) != hash_files(tiny)


def test_missing_and_damaged_media_are_named_and_never_averaged(tiny, media, tmp_path, capsys):
    folder = world(tmp_path, media)
    (tmp_path / "videos" / "2.mp4").unlink()
    damaged = tmp_path / "videos" / "5.mp4"
    damaged.write_bytes(damaged.read_bytes()[:300])
    out = tmp_path / "out"
    common = ("--ckpt", tiny, "--uvrb", folder, "--root", media, "--out", out)
    call(*common, "--datasets", "MSRVTT", "LoVR-C2V")
    result = results_of(out)

    # Query 2 looks for video 2, query 3 for 3 and 5.
    msrvtt = result["datasets"]["MSRVTT"]
    assert (msrvtt["n"], msrvtt["expected"]) == (3, 5)
    assert (msrvtt["corpus"], msrvtt["complete"]) == (5, False)
    # Queries 2 and 5 are those clips themselves.
    c2v = result["datasets"]["LoVR-C2V"]
    assert (c2v["n"], c2v["expected"], c2v["complete"]) == (5, 7, False)
    assert result["abilities"]["VIS"] is None
    said = capsys.readouterr().out
    assert "3/5 queries, 5/7 corpus items)" in said
    note = "* MSRVTT: 3/5 queries, 5/7 corpus items; it enters no average"
    assert note in (out / "table1.txt").read_text()

    failed = {}
    for line in (out / "log.jsonl").open():
        event = json.loads(line)
        failed[event["dataset"]] = event["failed"]
    places = [reason.split(": ")[0].rsplit("/", 1)[1] for reason in failed["LoVR-C2V"]]
    assert places == ["queries.jsonl:3", "queries.jsonl:6", "corpus.jsonl:1", "corpus.jsonl:4"]
    assert "2.mp4" in failed["MSRVTT"][0] and "5.mp4" in failed["MSRVTT"][1]

    # The command ends well; its last line counts the losses of both datasets.
    count = len(failed["MSRVTT"]) + len(failed["LoVR-C2V"])
    last = f"queries and corpus items that failed: {count}, reasons in log.jsonl"
    assert count == 6 and said.splitlines()[-1].endswith(last)


def test_a_video_that_gave_a_part_of_its_frames_is_noted(tiny, media, tmp_path, capsys):
    """A few below the line of each dataset that has it, all in log.jsonl. It costs no query but the
    one whose clip lies in the part that is lost."""
    folder = world(tmp_path, media)
    for i in (1, 3, 4, 6):
        write_damaged(tmp_path / "videos" / f"{i}.mp4")
    path = folder / "LoVR-C2V" / "jsonl" / "queries.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rows[1]["video"] |= {"start": 4.75, "end": 5}
    write_lines(path, rows)
    out = tmp_path / "out"
    common = ("--ckpt", tiny, "--uvrb", folder, "--root", media, "--out", out)
    call(*common, "--datasets", "MSRVTT", "LoVR-C2V")

    msrvtt, c2v = [json.loads(line) for line in (out / "log.jsonl").open()]
    places = {"MSRVTT": [f"corpus.jsonl:{n}" for n in (2, 4, 5, 7)]}
    places["LoVR-C2V"] = [f"queries.jsonl:{n}" for n in (4, 5, 7)]
    places["LoVR-C2V"] += [f"corpus.jsonl:{n}" for n in (2, 3, 5, 7)]  # its corpus begins with c2
    for event in (msrvtt, c2v):
        named = [note.split(": ")[0].rsplit("/", 1)[1] for note in event["damaged"]]
        assert named == places[event["dataset"]]
        for note in event["damaged"]:
            assert re.search(r"/videos/\d.mp4: damaged: \d+ of 40 frames decode$", note)
    assert msrvtt["complete"] and not msrvtt["failed"]
    (failed,) = c2v["failed"]
    assert "queries.jsonl:2: " in failed and "start 4.75 does not lie in a clip of" in failed

    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("MSRVTT ") and said[5].startswith("LoVR-C2V ")
    assert said[6] == f"  no vector: {failed}"
    for first, event in ((1, msrvtt), (7, c2v)):
        few = [f"  embedded in part: {note}" for note in event["damaged"][:3]]
        assert said[first : first + 3] == few
        assert f"... and {len(event['damaged']) - 3} more, listed in" in said[first + 3]
    assert said[-1].endswith("items that failed: 1, reasons in log.jsonl")


def test_a_path_with_a_colon_finds_its_note():
    rows = [{"item": {"text": "x"}, "where": "c.jsonl:1"}]
    for i, path in enumerate(["c.mp4", "a: b.mp4", {"path": "a: b.mp4", "start": 1}]):
        rows.append({"item": {"video": path}, "where": f"c.jsonl:{i + 2}"})
    note = "a: b.mp4: damaged: 2 of 3 frames decode"
    damaged = ev.find_damaged(rows, {"seek": 1, f"note: {note}": 1})
    assert damaged == {2: f"c.jsonl:3: {note}", 3: f"c.jsonl:4: {note}"}


@pytest.mark.parametrize(
    "args, words",
    [
        (["--framse", "8"], "unrecognized arguments: --framse"),
        (["--frames", "eight"], "invalid int value"),
        (["--uvrb", "nowhere"], "nowhere: no such benchmark folder"),
        (["--uvrb", "."], "none of the 16 datasets is here"),
        (["--results", "gone.json"], "gone.json"),
    ],
)
def test_what_a_user_mistypes_is_an_error_that_names_it(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        call(*args)
    assert words in str(error.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_dataset_or_checkpoint_leaves_no_results(tiny, media, tmp_path):
    folder = world(tmp_path, media)
    common = ("--root", media, "--out", tmp_path / "out", "--uvrb", folder)
    with open(folder / "MS-TI" / "jsonl" / "instances.jsonl", "a") as file:
        file.write('{"qid": "q0", "pos": ["c99"]}\n')
    done = run("--ckpt", tiny, *common, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("eval.py: ")
    assert "MS-TI/jsonl/instances.jsonl:5: pos 'c99'" in done.stderr
    with pytest.raises(ValueError, match="unknown dataset 'MSR-VTT'"):
        call("--ckpt", tiny, "--datasets", "MSR-VTT", *common)
    with pytest.raises(ValueError, match=str(media)):
        call("--ckpt", media, "--datasets", "MSRVTT", *common)
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_an_error_and_not_a_score(tiny, media, tmp_path, monkeypatch):
    folder = world(tmp_path, media)
    forward = GVE.forward
    monkeypatch.setattr(GVE, "forward", lambda self, batch: forward(self, batch) * math.nan)
    with pytest.raises(ValueError, match="corpus.jsonl:1: .* gives a vector that is not finite"):
        call("--ckpt", tiny, "--uvrb", folder, "--datasets", "MSRVTT", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("module", ["embed", "eval", "synth", "train"])
def test_help_prints_every_flag(module, capsys):
    flags = importlib.import_module(module).Flags
    with pytest.raises(SystemExit) as end:
        parse_flags(flags, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(flags):
        name = field.name
        if not field.metadata.get("positional"):
            name = "--" + name.replace("_", "-")
        assert name in shown


# extras/export.py


def export_files(*args):
    export.main(parse_flags(export.Flags, [str(a) for a in args]))


def read_trec(path):
    """Read <path>.run and .qrels by whitespace, as trec_eval does -> (runs, qrel)."""
    runs, qrel = {}, {}
    for line in path.with_suffix(".run").read_text().splitlines():
        query, q0, doc, rank, cosine, _ = line.split()
        runs.setdefault(query, {})[doc] = float(cosine)
        assert q0 == "Q0" and int(rank) == len(runs[query])
    for line in path.with_suffix(".qrels").read_text().splitlines():
        query, _, doc, relevance = line.split()
        qrel.setdefault(query, {})[doc] = int(relevance)
    return runs, qrel


def test_trec_files_give_trec_eval_our_numbers(tmp_path):
    """Ids with spaces survive. Only ties may rank otherwise, and here are none."""
    queries, corpus, positives, rng = problem(19, 31, most=3)
    for pools in (None, [sorted({*own, *rng.choice(31, 8).tolist()}) for own in positives]):
        b = bench(19, 31)
        b.positives = positives
        b.pools = pools
        b.corpus[7]["id"] = "clip 7\tb.mp4"
        b.queries[3]["id"] = "q 3"
        encoded = ev.Encoded(b, queries, corpus, {2: "lost"}, {30: "lost"})
        entry = ev.score(encoded)
        (tmp_path / "rankings").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "rankings" / "MSRVTT.jsonl", ev.rankings(encoded))
        results = ev.summarise("UVRB", "x", PROTOCOL, {"MSRVTT": entry})
        write_json(tmp_path / "results.json", results)
        export_files("trec", tmp_path / "results.json")

        runs, qrel = read_trec(tmp_path / "trec" / "MSRVTT")
        means, rows = trec_means(qrel, runs)
        assert len(rows) == entry["n"] < 19 and all("%20" in key or " " not in key for key in qrel)
        assert entry["MRR"] == pytest.approx(means["MRR"], abs=1e-9)
        assert entry["nDCG@10"] == pytest.approx(means["nDCG@10"], abs=1e-9)


def test_a_file_that_is_no_results_json_is_named(tmp_path):
    write_json(tmp_path / "gve.json", {"pooling": "last"})
    with pytest.raises(ValueError, match="gve.json: no results.json of eval.py"):
        export_files("trec", tmp_path / "gve.json")


def test_rankings_that_the_command_writes_become_trec_files(tmp_path):
    """Rounded to 32 bits twice, a cosine would differ in the file: numbers are as torch's repr."""
    folder = own_benchmark(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    rows = [{"id": f"c{i}", "kind": "corpus"} for i in range(9)]
    rows += [{"id": f"q{i}", "kind": "query"} for i in range(7)]
    write_vectors(tmp_path / "v", "MyVideos", rows, vectors)
    out = tmp_path / "out"
    common = ("--embeddings", tmp_path / "v", "--uvrb", folder, "--datasets", "MyVideos")
    call(*common, "--out", out)
    with pytest.raises(ValueError, match="rankings/MyVideos.jsonl: no such file .*--rankings"):
        export_files("trec", out / "results.json")
    call(*common, "--out", out, "--rankings")
    export_files("trec", out / "results.json")

    unit = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    scores = unit[9:] @ unit[:9].T
    lines = (out / "trec" / "MyVideos.run").read_text().splitlines()
    assert len(lines) == 7 * 9
    best = int(scores[0].argmax())
    assert lines[0] == f"q0 Q0 c{best} 1 {scores[0, best].item()!r} nanoGVE"
    qrels = (out / "trec" / "MyVideos.qrels").read_text().splitlines()
    assert qrels == [f"q{i} 0 c{i} 1" for i in range(7)]


def test_mteb_files_have_the_documented_keys(evaluated, tmp_path):
    """MTEB 2.x: these keys at the top, main_score, hf_subset and languages in every entry of
    scores[split]."""
    folder, scored, _ = evaluated
    out = tmp_path / "out"
    shutil.copytree(scored, out, ignore=shutil.ignore_patterns("cache"))
    command = [sys.executable, str(REPO / "extras" / "export.py"), "mteb"]
    command += [str(out / "results.json"), "--uvrb", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    result = results_of(out)
    files = {path.stem: json.loads(path.read_text()) for path in (out / "mteb").iterdir()}
    assert sorted(files) == sorted(result["datasets"])
    for name, entry in result["datasets"].items():
        file = files[name]
        keys = {"dataset_revision", "task_name", "mteb_version", "scores", "evaluation_time"}
        assert keys <= set(file) and file["task_name"] == name
        (row,) = file["scores"]["test"]
        assert (row["hf_subset"], row["languages"]) == ("default", ["eng-Latn"])
        assert (row["main_score"], row["mrr"]) == (entry["score"], entry["MRR"])
        assert (row["recall_at_5"], row["ndcg_at_10"]) == (entry["R@5"], entry["nDCG@10"])
        assert (row["hit_rate_at_1"], row["precision_at_1"]) == (entry["hit@1"], entry["P@1"])
        assert len(file["dataset_revision"]) == 64 and file["evaluation_time"] > 0
    with pytest.raises(ValueError, match="MSRVTT is not in nowhere"):
        export_files("mteb", out / "results.json", "--uvrb", "nowhere")
