"""eval.py: metrics against trec_eval, chance by sampling, ceilings by brute force, missing media, any model, the command.

extras/tables.py: every table and figure, and what the paper's cells contradict.
"""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import moving_square, write_video

import eval as ev
import tables
import uvrb
from embed import top_k
from model import GVE
from support.flags import parse_flags

REPO = Path(__file__).resolve().parent.parent
TREC = {
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


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(REPO / "eval.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def call(*args):
    """What the command does, in this process: importing torch and transformers anew costs seconds."""
    return ev.main(parse_flags(ev.Flags, [str(a) for a in args]))


def problem(n=37, m=53, d=16, seed=0, most=5):
    """Random vectors and 1 to `most` positives per query, the odd sizes on purpose."""
    rng = np.random.default_rng(seed)
    queries, corpus = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for shape in ((n, d), (m, d))
    )
    return (
        queries,
        corpus,
        [rng.choice(m, rng.integers(1, most + 1), replace=False).tolist() for _ in range(n)],
        rng,
    )


def trec(queries, corpus, positives, pools=None):
    """Means of trec_eval's measures over queries, scores being cosines in float64."""
    queries, corpus = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, corpus))
    cosines = (queries @ corpus.T).numpy()
    pools = pools or [range(len(corpus))] * len(queries)
    qrel = {str(i): {str(p): 1 for p in own} for i, own in enumerate(positives)}
    runs = {str(i): {str(j): float(cosines[i, j]) for j in pool} for i, pool in enumerate(pools)}
    measures = {"recall.1,5,10", "success.1,5,10", "P.1", "recip_rank", "ndcg_cut.10"}
    rows = pytrec_eval.RelevanceEvaluator(qrel, measures).evaluate(runs).values()
    return {name: float(np.mean([row[key] for row in rows])) for name, key in TREC.items()}


@pytest.mark.parametrize("n, m, most", [(37, 53, 1), (37, 53, 5), (13, 7, 6), (101, 781, 12)])
def test_metrics_equal_trec_evals(n, m, most):
    queries, corpus, positives, _ = problem(n, m, most=most)
    ours = ev.metrics(ev.ranks(queries, corpus, positives))
    for name, value in trec(queries, corpus, positives).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert set(ours) == {*TREC, "MdR", "MnR"}


@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_trec_evals_with_ties_duplicates_and_missing_items(seed):
    """Rows of 16 signs have exact cosines, so ties are real; half the corpus is a copy, some queries and videos have no vector.

    trec_eval puts the greater id first among equals: ids that fall along the corpus make its order ours.
    """
    rng = np.random.default_rng(seed)
    n, m = 41, 30
    corpus = torch.from_numpy(rng.choice([-1.0, 1.0], (m, 16)))[
        rng.permutation(np.r_[0:m, 0:m])
    ].float()
    queries = (
        corpus[rng.integers(0, 2 * m, n)]
        * torch.from_numpy(rng.choice([-1.0, 1.0, 1.0, 1.0], (n, 16))).float()
    )
    positives = [
        sorted(rng.choice(2 * m, rng.integers(1, 6), replace=False).tolist()) for _ in range(n)
    ]
    pools = (
        [sorted({*own, *rng.choice(2 * m, 12).tolist()}) for own in positives] if seed % 2 else None
    )
    lost_queries, lost_corpus = (
        set(rng.choice(n, 4, replace=False).tolist()),
        set(rng.choice(2 * m, 5, replace=False).tolist()),
    )
    b = bench(n, 2 * m)
    b.positives, b.pools = positives, pools
    entry = ev.score(b, queries, corpus, lost_queries, lost_corpus)
    kept = [i for i in range(n) if i not in lost_queries and not lost_corpus & set(positives[i])]
    cosines = (queries.double() @ corpus.double().T / 16).numpy()
    runs = {
        str(i): {
            f"{999 - j}": float(cosines[i, j])
            for j in (pools[i] if pools else range(2 * m))
            if j not in lost_corpus
        }
        for i in kept
    }
    qrel = {str(i): {f"{999 - j}": 1 for j in positives[i]} for i in kept}
    rows = list(
        pytrec_eval.RelevanceEvaluator(
            qrel, {"recall.1,5,10", "success.1,5,10", "P.1", "recip_rank", "ndcg_cut.10"}
        )
        .evaluate(runs)
        .values()
    )
    assert entry["n"] == len(rows) == len(kept) > 10
    for name, key in TREC.items():
        assert entry[name] == pytest.approx(np.mean([row[key] for row in rows]), abs=1e-9), name
    firsts = [1 / row["recip_rank"] for row in rows]
    assert entry["MdR"] == pytest.approx(np.median(firsts)) and entry["MnR"] == pytest.approx(
        np.mean(firsts)
    )


def test_a_query_without_a_positive_is_rejected():
    with pytest.raises(ValueError, match="without a positive"):
        ev.metrics([[1], []])


def test_metrics_in_pools_equal_trec_evals_over_the_same_candidates():
    queries, corpus, positives, rng = problem()
    pools = [sorted({*own, *rng.choice(53, 8).tolist()}) for own in positives]
    ours, whole = (ev.metrics(ev.ranks(queries, corpus, positives, p)) for p in (pools, None))
    for name, value in trec(queries, corpus, positives, pools).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["R@1"] > whole["R@1"]
    assert ev.ranks(queries, corpus, positives, [p[::-1] for p in pools]) == ev.ranks(
        queries, corpus, positives, pools
    )


def test_median_and_mean_rank_are_of_the_first_positive():
    assert ev.metrics([[1], [4, 90], [3, 5]])["MdR"] == 3 and ev.metrics([[2], [5]])["MdR"] == 3.5
    assert ev.metrics([[1], [4, 90], [4, 5]])["MnR"] == 3


def test_trec_files_give_trec_eval_our_numbers(tmp_path):
    """Read by whitespace as trec_eval does; ids with spaces survive. Only ties may rank otherwise, and here are none."""
    queries, corpus, positives, rng = problem(19, 31, most=3)
    for pools in (None, [sorted({*own, *rng.choice(31, 8).tolist()}) for own in positives]):
        b = bench(19, 31)
        b.positives, b.pools, b.corpus[7]["id"], b.queries[3]["id"] = (
            positives,
            pools,
            "clip 7\tb.mp4",
            "q 3",
        )
        entry = ev.score(
            b, queries, corpus, {2: "lost"}, {30: "lost"}, trec=tmp_path / "trec" / "x"
        )
        runs, qrel = {}, {}
        for line in (tmp_path / "trec" / "x.run").read_text().splitlines():
            query, q0, doc, rank, cosine, _ = line.split()
            runs.setdefault(query, {})[doc] = float(cosine)
            assert q0 == "Q0" and int(rank) == len(runs[query])
        for line in (tmp_path / "trec" / "x.qrels").read_text().splitlines():
            query, _, doc, relevance = line.split()
            qrel.setdefault(query, {})[doc] = int(relevance)
        rows = (
            pytrec_eval.RelevanceEvaluator(qrel, {"recip_rank", "ndcg_cut.10"})
            .evaluate(runs)
            .values()
        )
        assert len(rows) == entry["n"] < 19 and all("%20" in key or " " not in key for key in qrel)
        assert entry["MRR"] == pytest.approx(np.mean([row["recip_rank"] for row in rows]), abs=1e-9)
        assert entry["nDCG@10"] == pytest.approx(
            np.mean([row["ndcg_cut_10"] for row in rows]), abs=1e-9
        )


def test_bootstrap_intervals_are_those_of_a_proportion():
    """400 queries of which a quarter hit: .25 +- 1.96 sqrt(.25 x .75 / 400). The two R@10 sets are at 1 with 4 candidates."""
    corpus = torch.eye(4)
    datasets = {}
    for name in uvrb.DATASETS:
        b = bench(400, 4, name=name, expected=(400, 4))
        b.positives = [[0]] * 400
        datasets[name] = ev.score(b, corpus[torch.arange(400) % 4], corpus, bootstrap=2000)
        assert datasets[name]["MRR"] == pytest.approx((1 + 3 / 2) / 4), (
            "first in the corpus, so second among the ties"
        )
    result = ev.summarise("UVRB", "x", PROTOCOL, datasets)
    assert json.loads(json.dumps(result)) == result and "draws" not in datasets["MSRVTT"]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert result["ci95"]["MSRVTT"] == pytest.approx([0.25 - half, 0.25 + half], abs=0.006)
    middle, half = (14 * 0.25 + 2) / 16, half * 14**0.5 / 16  # 14 independent sets
    assert result["ci95"]["AVG-D"] == pytest.approx([middle - half, middle + half], abs=0.002)
    assert set(result["ci95"]) == {*uvrb.DATASETS, *uvrb.ABILITIES, "AVG-D", "AVG-A"}
    low, high = tables.score_table("Table 1", tables.published(), [result])[1][1:]
    assert (low["model"], high["model"]) == ("  2.5 %", "  97.5 %") and low["MSRVTT"] < 0.25 < high[
        "MSRVTT"
    ]


def test_ties_rank_in_corpus_order():
    """Vectors of 0 and 1 tie exactly. Here we differ from trec_eval, which puts the later of two equal documents first."""
    rng = np.random.default_rng(1)
    corpus, queries = (
        torch.from_numpy(np.eye(4, dtype=np.float32)[rng.integers(0, 4, k)]) for k in (23, 11)
    )
    positives = [rng.choice(23, 3, replace=False).tolist() for _ in range(11)]
    expected = []
    for q, own in zip(queries.tolist(), positives, strict=True):
        order = sorted(
            range(23),
            key=lambda j: (-sum(a * b for a, b in zip(q, corpus[j].tolist(), strict=True)), j),
        )
        expected.append(sorted(order.index(p) + 1 for p in own))
    assert ev.ranks(queries, corpus, positives) == expected
    assert (
        ev.ranks(queries, corpus, positives, [list(range(23))[::-1]] * 11) == expected
    )  # in pools too, in whatever order
    one = torch.ones(1, 4)
    assert ev.ranks(one, one.repeat(2, 1), [[1]]) == [[2]]
    trec_run = pytrec_eval.RelevanceEvaluator({"q": {"1": 1}}, {"recip_rank"}).evaluate(
        {"q": {"0": 1.0, "1": 1.0}}
    )
    assert trec_run["q"]["recip_rank"] == 1.0


def test_ranks_agree_with_top_k_for_any_block_size_scale_and_dtype():
    queries, corpus, positives, _ = problem(most=3)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (queries, corpus)]
    indices = top_k(*unit, len(corpus))[1].tolist()
    expected = [
        sorted(order.index(p) + 1 for p in own)
        for order, own in zip(indices, positives, strict=True)
    ]
    for block in (1, 60, 54 * 7, 2**26):
        assert ev.ranks(queries, corpus, positives, block=block) == expected
    assert (
        ev.ranks(queries * 1e3, corpus * torch.rand(53, 1), positives) == expected
    )  # cosine: lengths do not count
    half = [x.half() for x in (queries, corpus)]
    assert ev.ranks(*half, positives) == ev.ranks(*(x.double() for x in half), positives)


def test_a_nan_vector_cannot_be_ranked():
    queries, corpus, positives, _ = problem()
    corpus[3, 2] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        ev.ranks(queries, corpus, positives)


@pytest.mark.parametrize("metric", ["R@1", "R@5", "R@10", "P@1"])
def test_chance_is_the_mean_over_random_rankings(metric):
    """20,000 random rankings of 4 queries with 1 to 6 positives among 8 to 40 candidates; the tolerance is 5 standard errors."""
    rng, counts, sizes = np.random.default_rng(2), [1, 3, 6, 2], [40, 25, 8, 11]
    draws = [
        ev.metrics(
            [
                np.sort(rng.permutation(m)[:p] + 1).tolist()
                for p, m in zip(counts, sizes, strict=True)
            ]
        )[metric]
        for _ in range(20_000)
    ]
    assert (
        abs(ev.chance(metric, counts, sizes) - np.mean(draws))
        < 5 * np.std(draws) / len(draws) ** 0.5
    )


@pytest.mark.parametrize("metric", ["R@1", "R@5", "P@1"])
def test_ceiling_is_the_best_of_all_rankings(metric):
    for p in range(1, 7):
        best = max(ev.metrics([list(r)])[metric] for r in itertools.combinations(range(1, 8), p))
        assert ev.ceiling(metric, [p]) == pytest.approx(best)
    assert ev.ceiling(metric, [1, 2, 4]) == pytest.approx(
        np.mean([ev.ceiling(metric, [p]) for p in (1, 2, 4)])
    )


def test_ceiling_of_dream_1k_is_the_known_one():
    """DREAM-1K has 6,251 distinct events: 6,214 of one video, 32 of 2, 4 of 3, 1 of 5; strict R@1 cannot pass 0.9969."""
    assert round(ev.ceiling("R@1", [1] * 6214 + [2] * 32 + [3] * 4 + [5]), 4) == 0.9969


def bench(n=6, m=8, name="MSRVTT", pools=None, expected=None):
    rows = [
        [
            {"id": f"{kind}{i}", "item": {"text": "x"}, "where": f"{kind}.jsonl:{i + 1}"}
            for i in range(k)
        ]
        for kind, k in (("q", n), ("c", m))
    ]
    return uvrb.Bench(name, *rows, [[i] for i in range(n)], pools, expected or (n, m), [])


def test_lost_media_cost_their_queries_and_the_place_in_every_average():
    queries, corpus, _, _ = problem(6, 8)
    own, pools = corpus[:6] + 0.05 * queries, [[i, (i + 1) % 8, 7] for i in range(6)]
    queries = own.clone()  # every query finds its own video
    for b in (bench(), bench(name="MS-TI", pools=pools, expected=(6, None))):
        whole = ev.score(b, queries, corpus)
        assert (whole["n"], whole["expected"], whole["score"], whole["complete"]) == (
            6,
            6,
            1.0,
            True,
        )
        holed, spoilt = queries.clone(), corpus.clone()
        holed[4], spoilt[1], spoilt[7] = math.nan, math.nan, math.nan
        part = ev.score(b, holed, spoilt, {4: "no such file"}, {1: "damaged", 7: "damaged"})
        # Query 4 has no vector, query 1's video is gone, video 7 is a distractor: 4 of 6 queries over 6 of 8 videos.
        assert (
            part["n"],
            part["expected"],
            part["corpus"],
            part["expected_corpus"],
            part["complete"],
        ) == (4, 6, 6, 8, False)
        assert part["score"] == 1.0
        distractor = ev.score(b, queries, corpus, {}, {7: "damaged"})
        assert (distractor["n"], distractor["corpus"], distractor["complete"]) == (6, 7, False)
    assert part["chance"] == pytest.approx(
        np.mean([1, 1 / 2, 1 / 2, 1 / 2])
    )  # pools without videos 1 and 7
    nothing = ev.score(bench(), queries, corpus, {}, dict.fromkeys(range(8), "damaged"))
    assert (nothing["n"], nothing["score"], nothing["complete"]) == (0, None, False)


def test_a_benchmark_smaller_than_it_should_be_is_incomplete():
    queries, corpus, _, _ = problem(6, 8)
    for expected in ((7, 8), (6, 9)):
        assert not ev.score(bench(expected=expected), queries, corpus)["complete"]


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
    whole = ev.summarise("UVRB", "x", PROTOCOL, {name: entry(s) for name, s in cells.items()})
    assert whole["AVG-D"] == pytest.approx(0.075) and None not in whole["abilities"].values()
    part = ev.summarise(
        "UVRB", "x", PROTOCOL, {name: entry(s, name != "CMRB") for name, s in cells.items()}
    )
    assert part["AVG-D"] is part["AVG-A"] is None
    assert {k for k, v in part["abilities"].items() if v is None} == {"T", "FG", "TXT"}
    assert {k: v for k, v in part["abilities"].items() if v is not None}.items() <= whole[
        "abilities"
    ].items()


def rows_of(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}


def test_tables_show_published_rows_base_beside_trained_chance_ceiling_and_marks(capsys, tmp_path):
    names = list(uvrb.DATASETS)
    base = ev.summarise("mini-UVRB", "base", PROTOCOL, {name: entry(0.031) for name in names})
    scored = {name: entry(0.411, name != "DiDeMo") for name in names if name != "PEV-K"}
    scored["MS-TV"]["pooled"] = False
    trained = ev.summarise("mini-UVRB", "gve-mini", PROTOCOL, scored)
    tables.show(["Table 1", "Table 2"], [base, trained], tmp_path, "nowhere")
    text = capsys.readouterr().out
    one, two = text.split("Table 2: mini-UVRB")
    assert one.strip().startswith(
        "Table 1: mini-UVRB below the published rows, which are UVRB's: score per dataset"
    )
    assert max(map(len, text.splitlines())) <= 200
    rows, order = (
        rows_of(one),
        [line.split()[0] for line in one.splitlines() if line.split() and line[0].isalpha()],
    )
    assert (
        order.index("GVE-7B")
        < order.index("base")
        < order.index("gve-mini")
        < order.index("chance")
        < order.index("ceiling")
    )
    published = tables.published()
    assert rows["GVE-7B"] == [f"{x:.3f}"[1:] for x in published["table1"]["GVE-7B"].values()]
    assert (
        rows["base"] == [".031"] * 17
        and rows["chance"] == [".005"] * 17
        and rows["ceiling"] == ["1.000"] * 17
    )
    expected = {name: ".411" for name in names} | {"AVG": "-", "DiDeMo": ".411*", "PEV-K": "-"}
    assert dict(zip(rows["model"], rows["gve-mini"], strict=True)) == expected
    rows = rows_of(two)
    assert dict(zip(rows["model"], rows["CLIP4Clip"], strict=True)) == {
        key: f"{x:.3f}"[1:] for key, x in published["table2"]["CLIP4Clip"].items()
    }
    assert {a for a, cell in zip(rows["model"], rows["gve-mini"], strict=True) if cell == "-"} == {
        "AVG",
        "TXT",
        "CG",
        "FG",
        "PR",
    }
    assert "* DiDeMo: 9/10 queries" in two and "not scored: PEV-K" in two
    # The caption says that a composed set was ranked whole, in every format.
    assert "MS-TI: no pools" not in two
    for style in ("txt", "md", "tex"):
        assert (
            "MS-TV: no pools in its instances, so its whole corpus is ranked"
            in (tmp_path / f"table1.{style}").read_text()
        )


def models(n=4):
    """n complete results with random scores: Figures 6-8 and 11-13 need several."""
    rng, out = np.random.default_rng(3), []
    for i in range(n):
        sets = {name: entry(float(rng.random())) for name in [*uvrb.DATASETS, *uvrb.ZERO_SHOT]}
        frames, tokens = ((8, 200), (16, 200), (48, 200), (8, 400))[i]
        setting = {
            "frames": frames,
            "max_tokens": tokens,
            "pairs": 10 ** (i + 3),
            "training": {"lr": 0.5},
        }
        out.append(ev.summarise("UVRB", f"model{i}", PROTOCOL | setting, sets))
    return out


def test_every_table_and_figure_is_one_option(tmp_path, capsys):
    """All 11 tables and 7 figures in one call; the four formats hold the same cells, figures are PNG files."""
    for i, result in enumerate(models()):
        (tmp_path / f"{i}.json").write_text(json.dumps(result))
    call(
        "--table",
        *range(1, 12),
        "--figure",
        2,
        6,
        7,
        8,
        11,
        12,
        13,
        "--results",
        *sorted(tmp_path.glob("?.json")),
        "--uvrb",
        tmp_path,
        "--out",
        tmp_path / "t",
    )
    text = capsys.readouterr().out
    for name in tables.TITLES:
        path = tmp_path / "t" / name.lower().replace(" ", "")
        assert f"{name}: " in text
        rows = list(csv.reader(path.with_suffix(".csv").open()))
        markdown = [
            line.strip("| \n").split(" | ")
            for line in path.with_suffix(".md").open()
            if line.startswith("|")
        ]
        latex = [
            line.removesuffix(" \\\\\n").split(" & ")
            for line in path.with_suffix(".tex").open()
            if " & " in line
        ]
        latex = [[c.replace("\\", "") for c in row] for row in latex]
        assert [markdown[0], *markdown[2:]] == latex == rows and len(
            {len(row) for row in rows}
        ) == 1, name
        plain = "".join(path.with_suffix(".txt").read_text().split("\n---")[1:])
        assert sorted(plain.replace("-", "").split()) == sorted(
            " ".join(map(" ".join, rows)).replace("-", "").split()
        ), name
        if name.startswith("Figure"):
            assert (
                path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
                and path.with_suffix(".png").stat().st_size > 20_000
            )
    with pytest.raises(ValueError, match="no Figure 3 here .accepted: Table 1, "):
        call("--figure", 3, "--out", tmp_path)


def test_tables_hold_the_papers_numbers_and_ours(monkeypatch, tmp_path):
    paper, ours = tables.published(), models()
    scores = {
        name: groups
        for name in ("Table 3", "Table 11")
        for groups in [tables.score_table(name, paper, ours)]
    }
    assert [row["model"] for row in scores["Table 3"][1]] == [
        "GVE-i: model0",
        "GVE-s: model1",
        "GVE: model2",
        "GVE-i: model3",
    ]
    assert (
        scores["Table 3"][1][0]["AVG-A"] == ours[0]["AVG-A"]
        and scores["Table 3"][0][0]["CMP"] == 0.237
    )
    zero = [
        ours[1]["datasets"][name]["score"]
        for name in ("K700", "UCF101", "HMDB51", "SSV2", "Breakfast")
    ]
    assert (
        scores["Table 11"][1][1]["AVG"] == pytest.approx(np.mean(zero))
        and scores["Table 11"][1][1]["SSV2"] == zero[3]
    )
    frames = {
        (row["model"], row["score"]): row
        for group in tables.curves("Figure 12", paper, ours)
        for row in group
    }
    assert frames["GVE-7B", "LC"] | {8: 0.814, 16: 0.909, 48: 0.918} == frames["GVE-7B", "LC"]
    assert [frames["runs/x", "VIS"][x] for x in (8, 16, 48)] == [
        r["abilities"]["VIS"] for r in ours[:3]
    ], "not 8 x 400"
    scaling = {row["score"]: row for row in tables.curves("Figure 11", paper, ours)[1]}["CMP"]
    slope = np.polyfit([3, 4, 5, 6], [r["abilities"]["CMP"] for r in ours], 1)[
        0
    ]  # over log10: the gain per decade
    assert (
        scaling["per decade"] == pytest.approx(slope)
        and scaling[1000] == ours[0]["abilities"]["CMP"]
    )
    # Tables 6-8 come from mixtures/*.json: one source each of text, image, video and UVRD.
    (tmp_path / "mixtures").mkdir()
    for size, factor in (("3b", 1), ("7b", 2)):
        rest = {"path": "x", "negatives": 0, "batch_size": 32, "instruction": ""}
        mixture = [
            {"name": name, "task": task, "samples": n * factor, **rest}
            for name, task, n in (
                ("a", "T2T", 1),
                ("b", "TI2TI", 20),
                ("c", "T2V", 300),
                ("UVRD-T2T", "T2T", 4000),
            )
        ]
        (tmp_path / "mixtures" / f"gve-{size}.json").write_text(json.dumps(mixture))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    totals = {
        row["data"]: (row["3B"], row["7B"])
        for row in tables.paper_table("Table 8", paper, [], "", ())[1]
    }
    assert totals == {
        "text": (1, 2),
        "image": (20, 40),
        "video": (300, 600),
        "UVRD": (4000, 8000),
        "all": (4321, 8642),
    }
    assert [row["name"] for row in tables.paper_table("Table 7", paper, [], "", ())[1]] == [
        "UVRD-T2T"
    ]


def test_correlations_equal_scipys():
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, (2, 9)).astype(float)  # with ties
        assert tables.correlation(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
        assert tables.correlation(x, y, ranked=True) == pytest.approx(stats.spearmanr(x, y)[0])


WRONG = {
    ("Table 2", "GME-2B", "AVG"),
    ("Table 1", "VLM2Vec-V2", "AVG"),
    *(("Table 2", "VLM2Vec-V2", c) for c in ("AVG", "TXT", "CG")),
    ("Table 8", "image", "3B"),
    ("Table 8", "image", "7B"),
    *(("Figure 11", "GVE-7B at full", c) for c in ("TXT", "CMP", "VIS", "CG", "FG", "LC")),
    ("text", "Figure 8, MSRVTT", "All"),
    ("text", "Figure 7, T-S", "All"),
    ("text", "Figure 7, S-FG", "All"),
    ("text", "Table 2, Unite-7B", "VIS"),
}


def test_published_errata_are_found_by_computing(capsys):
    paper = tables.published()
    del paper["errata"]
    wrong, blocks = tables.disagreements(paper)
    assert (
        set(wrong) == WRONG
    )  # and so section 5.2's 28 gains per decade follow from Figures 6 and 11
    assert wrong["Table 2", "GME-2B", "AVG"] == (0.416, pytest.approx(0.516, abs=5e-4))
    assert [wrong["Table 8", "image", size] for size in ("3B", "7B")] == [
        (1_820_000, 1_910_000),
        (2_800_000, 2_970_000),
    ]
    assert blocks[0] == "Figure 7, CLIP: of 36 printed cells Pearson gives 1, Spearman 36"
    call("--published")
    text = capsys.readouterr().out
    assert (
        "17 published values do not follow" in text and text.count("!") == 6
    )  # one in the caption
    assert "Table 2, GME-2B, AVG: printed 0.416, the others give 0.5161" in text
    assert "Table 8, image, 3B: printed 1,820,000, the others give 1,910,000" in text


def test_any_cell_with_one_changed_digit_names_its_row():
    """Every cell of Tables 1, 2, 11 and of Figure 7's CLIP block, one after the other, its second digit changed.

    Table 3 too, but for GVE-i and GVE-s the first digit: CMP and VIS enter nothing but an average of six, and their AVG-D follows
    from no other cell.
    """
    paper = tables.published()

    def finds(cells, key, step, where, row):
        before, cells[key] = (
            cells[key],
            round(cells[key] + (step if cells[key] < 0.9 else -step), 3),
        )
        found = {(w, r) for w, r, *_ in tables.disagreements(paper)[0].keys() - WRONG}
        cells[key] = before
        return (where, row) in found or where == "Table 1" and ("Table 2", row) in found

    for where, block in (
        ("Table 1", "table1"),
        ("Table 2", "table2"),
        ("Table 3", "table3"),
        ("Table 11", "table11"),
    ):
        for row, cells in paper[block].items():
            for key in cells:
                alone = where == "Table 3" and row[3:5] in ("-i", "-s")
                if (
                    alone
                    and key == "AVG-D"
                    or (where, row, key) in WRONG
                    or row == "VLM2Vec-V2"
                    and where != "Table 11"
                ):
                    continue  # VLM2Vec-V2's rows are wrong as they stand
                assert finds(cells, key, 0.1 if alone else 0.01, where, row), (where, row, key)
    for row, cells in paper["figure7_correlations"]["lower_triangle_rows"]["CLIP"].items():
        for i, ability in enumerate(uvrb.ABILITIES[: len(cells)]):
            assert finds(cells, i, 0.01, "Figure 7", f"{row}-{ability}"), (row, ability)


def test_save_leaves_the_old_file_when_it_cannot_write_the_new_one(tmp_path):
    path = tmp_path / "results.json"
    ev.save(path, {"a": 1})
    with pytest.raises(TypeError):
        ev.save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---- the real command on real files ----


def world(root, media):
    """A benchmark of three datasets over 7 real clips: text queries with 2 positives, pools, an image and a clip as query."""
    (root / "videos").mkdir(parents=True)
    for i in range(7):
        write_video(root / "videos" / f"{i}.mp4", moving_square(12, seed=20 + i))
    corpus = [{"id": f"c{i}", "video": f"../../videos/{i}.mp4"} for i in range(7)]
    image, clip = str(media / "i.png"), {"path": "../../videos/0.mp4", "start": 0, "end": 1}
    sets = {
        "MSRVTT": (
            [{"text": f"a square, number {i}"} for i in range(5)],
            [{"pos": [i, (i + 2) % 7] if i % 2 else [i]} for i in range(5)],
        ),
        "MS-TI": (
            [{"text": f"the same, {i}", "image": image} for i in range(4)],
            [{"pos": [i], "neg": [i + 1, i + 3]} for i in range(4)],
        ),
        "LoVR-C2V": (
            [{"video": {**clip, "path": f"../../videos/{i}.mp4"}} for i in range(7)],
            [{"pos": [i]} for i in range(7)],
        ),
    }
    sizes = {}
    for k, (name, (queries, instances)) in enumerate(sets.items()):
        rows = root / "uvrb" / name / "jsonl"
        rows.mkdir(parents=True)
        turned = corpus[k:] + corpus[:k]  # another corpus order in each
        files = {
            "queries": [{"id": f"q{i}", **q} for i, q in enumerate(queries)],
            "corpus": turned,
            "instances": [
                {"qid": f"q{i}", **{k: [f"c{j}" for j in v] for k, v in row.items()}}
                for i, row in enumerate(instances)
            ],
        }
        for file, lines in files.items():
            (rows / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sizes[name] = {"queries": len(queries), "corpus": 7}
    (root / "uvrb" / "benchmark.json").write_text(
        json.dumps({"name": "tiny-UVRB", "datasets": sizes})
    )
    return root / "uvrb"


@pytest.fixture(scope="module")
def evaluated(tiny, media, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    folder = world(root, media)
    done = run(
        "--ckpt",
        tiny,
        "--uvrb",
        folder,
        "--root",
        media,
        "--name",
        "random",
        "--out",
        root / "out",
        "--batch-tokens",
        300,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return folder, root / "out", done.stdout


def test_the_command_scores_real_clips_as_embedding_them_one_by_one_does(evaluated, tiny, media):
    """The judge embeds every item alone, with the prompt of Table 5 as system turn, and leaves the metric to trec_eval."""
    folder, out, _ = evaluated
    result, gve = json.loads((out / "results.json").read_text()), GVE.from_pretrained(tiny)
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
    assert result["datasets"]["MSRVTT"]["ceiling"] == pytest.approx(
        0.8
    )  # two of five queries have two positives


def test_results_json_holds_the_protocol_and_every_contracted_key(evaluated, tiny):
    folder, out, text = evaluated
    result = json.loads((out / "results.json").read_text())
    assert result["benchmark"] == "tiny-UVRB" and result["model"] == "random"
    assert set(result["abilities"]) == set(uvrb.ABILITIES) and {"AVG-D", "AVG-A"} < set(result)
    assert result["AVG-D"] is None and result["abilities"]["VIS"] is None, (
        "13 datasets are not here"
    )
    p = result["protocol"]
    assert (p["frames"], p["max_tokens"], p["max_length"], p["dtype"], p["checkpoint"]) == (
        8,
        200,
        8192,
        "float32",
        tiny,
    )
    assert (
        p["torch"] == torch.__version__
        and p["transformers"]
        and "corpus order" in p["ties"]
        and "step" in p
    )
    assert (
        p["sha256"] == p["base_sha256"] == ev.fingerprint(tiny)
    )  # no adapter: the checkpoint is its own base
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["dataset"] for e in events] == list(result["datasets"])
    assert all(e["event"] == "eval" and e["failed"] == [] for e in events)
    styles = ("txt", "md", "csv", "tex")
    files = {
        "results.json",
        "log.jsonl",
        "mteb",
        "cache",
        *(f"table{n}.{style}" for n in (1, 2) for style in styles),
    }
    assert {path.name for path in out.iterdir()} == files
    assert "Table 1: tiny-UVRB" in text and "Table 2: tiny-UVRB" in text and "GVE-7B" in text


def test_mteb_files_have_the_documented_keys(evaluated):
    """MTEB 2.x: these keys at the top, main_score, hf_subset and languages in every entry of scores[split]."""
    folder, out, _ = evaluated
    result = json.loads((out / "results.json").read_text())
    assert sorted(path.stem for path in (out / "mteb").iterdir()) == sorted(result["datasets"])
    for name, entry in result["datasets"].items():
        file = json.loads((out / "mteb" / f"{name}.json").read_text())
        assert {
            "dataset_revision",
            "task_name",
            "mteb_version",
            "scores",
            "evaluation_time",
        } <= set(file)
        (row,) = file["scores"]["test"]
        assert (file["task_name"], row["hf_subset"], row["languages"]) == (
            name,
            "default",
            ["eng-Latn"],
        )
        assert (
            row["main_score"] == entry["score"]
            and row["recall_at_5"] == entry["R@5"]
            and row["mrr"] == entry["MRR"]
        )
        assert [row[key] for key in ("ndcg_at_10", "hit_rate_at_1", "precision_at_1")] == [
            entry[key] for key in ("nDCG@10", "hit@1", "P@1")
        ]
        assert len(file["dataset_revision"]) == 64 and file["evaluation_time"] > 0


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


def test_any_model_from_a_file_or_a_folder_gets_the_numbers_of_the_checkpoint(
    evaluated, tiny, media, tmp_path, capsys
):
    """The same weights behind --encoder, and their vectors, of any length and in any order, behind --embeddings."""
    folder, out, _ = evaluated
    expected = json.loads((out / "results.json").read_text())["datasets"]
    (tmp_path / "mine.py").write_text(ENCODER.format(repo=str(REPO), ckpt=tiny))
    common = ("--uvrb", folder, "--root", media, "--out", tmp_path / "out")
    call("--encoder", f"{tmp_path / 'mine.py'}:embed", "--batch-size", 4, *common)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["datasets"] == expected
    gve, rng = GVE.from_pretrained(tiny), np.random.default_rng(0)
    for name in expected:
        b = uvrb.read(folder, name, [media])
        rows = [("query", row, uvrb.DATASETS[name].prompt) for row in b.queries] + [
            ("corpus", row, None) for row in b.corpus
        ]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        (tmp_path / "v" / name).mkdir(parents=True)
        vectors = torch.cat([gve.embed([row["item"]], prompt) for _, row, prompt in rows]).numpy()
        np.save(
            tmp_path / "v" / name / "vectors.npy",
            vectors * rng.uniform(0.5, 9, (len(rows), 1)).astype(np.float32),
        )
        lines = [json.dumps({"id": row["id"], "kind": kind}) + "\n" for kind, row, _ in rows]
        (tmp_path / "v" / name / "items.jsonl").write_text("".join(lines))
    call("--embeddings", tmp_path / "v", *common)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["datasets"] == expected
    out = capsys.readouterr().out
    assert "Table 2: tiny-UVRB" in out and "MS-TI/vectors.npy: corpus vectors are " in out
    np.save(tmp_path / "v" / "MS-TI" / "vectors.npy", np.ones((11, 3), np.float32))
    with pytest.raises(
        ValueError, match=r"MS-TI/vectors.npy: float32 \(11, 3\); wanted floats \(11, 64\)"
    ):
        call("--embeddings", tmp_path / "v", *common)


def vectors_of(bench, folder, change=lambda rows, vectors: (rows, vectors)):
    """Write a folder for --embeddings in which every query is its first positive; `change` spoils it."""
    rows = [
        {"id": row["id"], "kind": kind}
        for kind, own in (("corpus", bench.corpus), ("query", bench.queries))
        for row in own
    ]
    vectors = np.eye(len(bench.corpus), dtype=np.float32)
    rows, vectors = change(
        rows, np.concatenate([vectors, vectors[[own[0] for own in bench.positives]]])
    )
    folder.joinpath(bench.name).mkdir(parents=True, exist_ok=True)
    np.save(folder / bench.name / "vectors.npy", vectors)
    (folder / bench.name / "items.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return folder


def test_missing_extra_and_damaged_vectors_are_reported(tmp_path, capsys):
    b = bench(6, 8)

    def change(rows, vectors):
        vectors[2] = np.nan  # c2
        return rows[:7] + [{"id": "c99", "kind": "corpus"}] + rows[8:-1] + [
            {"id": "q77", "kind": "query"}
        ], vectors

    _, queries, corpus, lost, lost_corpus = next(
        ev.from_folder(vectors_of(b, tmp_path, change), [b])
    )
    assert set(lost) == {5} and set(lost_corpus) == {2, 7}
    assert "q.jsonl:6" in lost[5] and "c.jsonl:3" in lost_corpus[2] and "'c7'" in lost_corpus[7]
    out = capsys.readouterr().out
    assert (
        "1 query ids are not in MSRVTT and left out: q77" in out
        and "1 corpus ids are not in MSRVTT and left out: c99" in out
    )
    entry = ev.score(b, queries, corpus, lost, lost_corpus)
    assert (entry["n"], entry["corpus"], entry["score"], entry["complete"]) == (4, 6, 1.0, False)
    whole = next(ev.from_folder(vectors_of(b, tmp_path), [b]))
    assert ev.score(*whole)["complete"] and ev.score(*whole)["score"] == 1.0


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda rows, v: (rows, v[:-1]),
            r"float32 \(13, 8\); wanted floats \(14, D\), a row per line",
        ),
        (lambda rows, v: (rows, v.astype(np.int64)), "int64"),
        (lambda rows, v: (rows, v[:, :, None]), r"\(14, 8, 1\)"),
        (lambda rows, v: (rows[:3] + rows[:1] + rows[4:], v), "items.jsonl:4: .* wanted a new"),
        (
            lambda rows, v: (rows[:3] + [{"id": "c3", "kind": "video"}] + rows[4:], v),
            'items.jsonl:4: .*"kind": "query" or "corpus"',
        ),
        (lambda rows, v: (rows[:3] + [{"id": 3, "kind": "corpus"}] + rows[4:], v), "items.jsonl:4"),
        (
            lambda rows, v: (rows, v * (np.arange(14) != 9)[:, None]),
            "items.jsonl:10: its vector has length 0",
        ),
    ],
)
def test_a_wrong_folder_of_vectors_is_an_error_that_names_the_line(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        next(ev.from_folder(vectors_of(bench(6, 8), tmp_path, change), [bench(6, 8)]))


def test_a_wrong_encoder_is_an_error_and_an_item_it_cannot_embed_is_a_loss(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(ENCODER.format(repo=str(REPO), ckpt=tiny))
    rows = bench(3, 2).queries + [{"id": "v", "item": {"video": "a.mp4"}, "where": "q.jsonl:4"}]
    rows[1]["item"] = {"text": "y"}
    with pytest.raises(
        ValueError, match=r"mine.py:short: shape \(1, 2\) for 3 items; wanted \(3, D\)"
    ):  # 4 rows, two equal
        ev.from_function(f"{tmp_path}/mine.py:short", 8)(rows, None, "")
    vectors, failed = ev.from_function(f"{tmp_path}/mine.py:half", 2)(rows, None, "")
    assert (
        set(failed) == {0, 1, 2}
        and failed[1].startswith("q.jsonl:2: ")
        and vectors[3].tolist() == [1, 0]
    )
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        ev.from_function(f"{tmp_path}/mine.py:nothing", 8)
    with pytest.raises(OSError, match="gone.py"):
        ev.from_function(f"{tmp_path}/gone.py:embed", 8)
    for spec in (f"{tmp_path}/mine.py", "mine:embed"):
        with pytest.raises(ValueError, match="wanted FILE.py:FUNCTION"):
            ev.from_function(spec, 8)


def test_frames_and_tokens_vary_one_at_a_time(evaluated, tiny, media, tmp_path, capsys):
    folder, out, _ = evaluated
    common = (
        "--ckpt",
        tiny,
        "--uvrb",
        folder,
        "--root",
        media,
        "--datasets",
        "MSRVTT",
        "--name",
        "tiny",
        "--out",
        tmp_path,
    )
    with pytest.raises(ValueError, match="--frames and --max-tokens"):
        call("--frames", 8, 16, "--max-tokens", 200, 400, *common)
    call("--frames", 4, 8, *common)
    four, eight = (json.loads((tmp_path / f"{f}x200" / "results.json").read_text()) for f in (4, 8))
    assert (four["protocol"]["frames"], eight["protocol"]["frames"], eight["model"]) == (
        4,
        8,
        "tiny 8x200",
    )
    assert (
        eight["datasets"]["MSRVTT"]
        == json.loads((out / "results.json").read_text())["datasets"]["MSRVTT"]
    )
    text = capsys.readouterr().out
    assert (
        "Figure 12: tiny-UVRB" in text
        and (tmp_path / "figure12.png").is_file()
        and not (tmp_path / "figure13.png").exists()
    )


@pytest.mark.skipif(
    not (REPO / "runs/mini/scenes.jsonl").is_file(),
    reason="runs/mini is not there: python -m mini render",
)
def test_zero_shot_classification_is_video_to_label_retrieval(tiny, tmp_path, capsys):
    """A small namesake of UCF101 from the mini world's truth: 12 clips, 4 classes, the theme. Labels are the corpus."""
    scenes = [json.loads(line) for line in (REPO / "runs/mini/scenes.jsonl").open()]
    theme_of = {s["id"]: s["scenes"][0]["theme"] for s in scenes if len(s["scenes"]) == 1}
    themes = sorted(set(theme_of.values()))[:4]
    clips = [i for theme in themes for i in [i for i in theme_of if theme_of[i] == theme][:3]]
    folder = tmp_path / "uvrb" / "UCF101" / "jsonl"
    folder.mkdir(parents=True)
    files = {
        "queries": [{"id": i, "video": str(REPO / "runs/mini/videos" / f"{i}.mp4")} for i in clips],
        "corpus": [{"id": theme, "text": theme} for theme in themes],
        "instances": [{"qid": i, "pos": [theme_of[i]]} for i in clips],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = (REPO / "runs/mini").resolve()
    call(
        "--ckpt",
        tiny,
        "--uvrb",
        tmp_path / "uvrb",
        "--root",
        root,
        "--out",
        tmp_path / "out",
        "--name",
        "tiny",
    )
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["UCF101"]
    gve, prompt = GVE.from_pretrained(tiny), uvrb.ZERO_SHOT["UCF101"].prompt
    queries = gve.embed([{"video": row["video"]} for row in files["queries"]], prompt)
    best = (queries @ gve.embed([{"text": theme} for theme in themes]).T).argmax(1).tolist()
    accuracy = np.mean([themes[k] == theme_of[i] for k, i in zip(best, clips, strict=True)])
    assert (
        entry["score"] == pytest.approx(accuracy)
        and entry["chance"] == pytest.approx(1 / 4)
        and entry["complete"]
    )
    text = capsys.readouterr().out
    assert "Table 11" in text and "Table 1:" not in text
    assert rows_of(text)["tiny"] == ["-", "-", f"{accuracy:.3f}".replace("0.", "."), "-", "-", "-"]


def test_table_4_counts_the_data(evaluated, media, capsys, tmp_path):
    folder, *_ = evaluated
    call("--table", 4, "--uvrb", folder, "--root", media, "--out", tmp_path)
    text = capsys.readouterr().out
    assert "Table 4: tiny-UVRB below the published rows" in text
    rows = [
        line.split()
        for line in text.splitlines()
        if line.startswith(("MSRVTT ", "MS-TI ", "LoVR-C2V "))
    ]
    assert rows[0] == [
        "MSRVTT",
        "1,000",
        "1,000",
        "15.0",
        "9.4",
    ]  # published; ours: 12 frames at 8 a second, pools of 3
    assert rows[3:] == [
        ["MSRVTT", "5", "7", "1.5", "4.0"],
        ["MS-TI", "4", "3", "1.5", "3.0"],
        ["LoVR-C2V", "7", "7", "1.5", "-"],
    ]
    world(tmp_path / "holed", media)
    (tmp_path / "holed" / "videos" / "3.mp4").write_bytes(b"no video")
    row = tables.measured(tmp_path / "holed" / "uvrb", [media])[0]
    assert (row["dataset"], row["corpus"], row["duration_s"]) == ("MSRVTT", 7, "1.5*")


def test_a_fingerprint_is_of_the_weights(tiny, tmp_path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert (
        ev.fingerprint(copy) == ev.fingerprint(tiny)
        and ev.fingerprint("Alibaba-NLP/GVE-3B") is None
    )
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert ev.fingerprint(copy) != ev.fingerprint(tiny)


def test_results_option_prints_existing_results_side_by_side(evaluated, tmp_path, capsys):
    _, out, _ = evaluated
    other = json.loads((out / "results.json").read_text()) | {"model": "other"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    call("--results", out / "results.json", tmp_path / "other.json", "--out", tmp_path)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    lines = lines[lines.index("GVE-7B") :]
    assert lines.index("other") - lines.index("random") == 1
    assert lines.count("chance") == lines.count("ceiling") == 2


def test_missing_and_damaged_media_are_named_and_never_averaged(tiny, media, tmp_path, capsys):
    folder = world(tmp_path, media)
    (tmp_path / "videos" / "2.mp4").unlink()
    damaged = tmp_path / "videos" / "5.mp4"
    damaged.write_bytes(damaged.read_bytes()[:300])
    call(
        "--ckpt",
        tiny,
        "--uvrb",
        folder,
        "--root",
        media,
        "--out",
        tmp_path / "out",
        "--datasets",
        "MSRVTT",
        "LoVR-C2V",
    )
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    msrvtt, c2v = result["datasets"]["MSRVTT"], result["datasets"]["LoVR-C2V"]
    # MSRVTT: query 2 looks for video 2, query 3 for 3 and 5. LoVR-C2V: queries 2 and 5 are those clips themselves.
    assert (msrvtt["n"], msrvtt["expected"], msrvtt["corpus"], msrvtt["complete"]) == (
        3,
        5,
        5,
        False,
    )
    assert (c2v["n"], c2v["expected"], c2v["complete"]) == (5, 7, False) and result["abilities"][
        "VIS"
    ] is None
    assert "* MSRVTT: 3/5 queries, 5/7 videos; it enters no average" in capsys.readouterr().out
    failed = {
        event["dataset"]: event["failed"]
        for event in map(json.loads, (tmp_path / "out" / "log.jsonl").open())
    }
    assert [reason.split(": ")[0].rsplit("/", 1)[1] for reason in failed["LoVR-C2V"]] == [
        "queries.jsonl:3",
        "queries.jsonl:6",
        "corpus.jsonl:1",
        "corpus.jsonl:4",
    ]
    assert "2.mp4" in failed["MSRVTT"][0] and "5.mp4" in failed["MSRVTT"][1]


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
    folder, common = world(tmp_path, media), ("--root", media, "--out", tmp_path / "out")
    with open(folder / "MS-TI" / "jsonl" / "instances.jsonl", "a") as file:
        file.write('{"qid": "q0", "pos": ["c99"]}\n')
    done = run("--ckpt", tiny, "--uvrb", folder, *common, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith("eval.py: ")
        and "MS-TI/jsonl/instances.jsonl:5: pos 'c99'" in done.stderr
    )
    with pytest.raises(ValueError, match="unknown dataset 'MSR-VTT'"):
        call("--ckpt", tiny, "--uvrb", folder, "--datasets", "MSR-VTT", *common)
    with pytest.raises(ValueError, match=str(media)):
        call("--ckpt", media, "--uvrb", folder, "--datasets", "MSRVTT", *common)
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
    cls = importlib.import_module(module).Flags
    with pytest.raises(SystemExit) as end:
        parse_flags(cls, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(
        "--" + f.name.replace("_", "-") in shown for f in dataclasses.fields(cls)
    )
