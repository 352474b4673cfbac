"""tables.py: every table and figure, whose rows stand together, and the paper's contradictions."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import moving_square, write_video

import eval as ev
import tables
import uvrb
from support.flags import parse_flags

PROTOCOL = {"checkpoint": "runs/x", "step": 3, "frames": 8, "max_tokens": 200, "dtype": "float32"}


def call(*words):
    """Do what the command does, in this process: importing torch and transformers takes seconds."""
    return ev.main(parse_flags(ev.Flags, [str(word) for word in words]))


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


def make_result(benchmark, model, datasets, **protocol):
    """A results.json by hand; only complete datasets enter abilities and averages."""
    scores = {name: row["score"] for name, row in datasets.items() if row["complete"]}
    means = uvrb.abilities(scores)
    return {
        "benchmark": benchmark,
        "model": model,
        "protocol": PROTOCOL | protocol,
        "datasets": datasets,
        "abilities": {ability: means[ability] for ability in uvrb.ABILITIES},
        "AVG-D": means["AVG-D"],
        "AVG-A": means["AVG-A"],
    }


def rows_of(text):
    """Split printed rows into {first word: the other words}."""
    rows = {}
    for line in text.splitlines():
        if line.split():
            first, *others = line.split()
            rows[first] = others
    return rows


def models(n=4, benchmark="UVRB"):
    """n complete results with random scores: Figures 6-8 and 11-13 need several."""
    rng = np.random.default_rng(3)
    results = []
    for i in range(n):
        names = [*uvrb.DATASETS, *uvrb.ZERO_SHOT]
        datasets = {name: entry(float(rng.random())) for name in names}
        frames, max_tokens = ((8, 200), (16, 200), (48, 200), (8, 400))[i]
        protocol = {
            "frames": frames,
            "max_tokens": max_tokens,
            "pairs": 10 ** (i + 3),
            "training": {"lr": 0.5},
        }
        results.append(make_result(benchmark, f"model{i}", datasets, **protocol))
    return results


# Rows: yours, the paper's, chance and ceiling


@pytest.mark.parametrize("benchmark", ["UVRB", "mini-UVRB"])
def test_score_tables_show_base_beside_trained_chance_ceiling_and_marks(
    capsys, tmp_path, benchmark
):
    names = list(uvrb.DATASETS)
    base = make_result(benchmark, "base", {name: entry(0.031) for name in names})
    scored = {name: entry(0.411, name != "DiDeMo") for name in names if name != "PEV-K"}
    scored["MS-TV"]["pooled"] = False
    trained = make_result(benchmark, "gve-mini", scored)
    tables.show(["Table 1", "Table 2"], [base, trained], tmp_path, "nowhere")
    text = capsys.readouterr().out
    about = "" if benchmark == "UVRB" else "mini-UVRB: "
    one, two = text.split(f"Table 2: {about}")
    assert one.strip().startswith(f"Table 1: {about}score per dataset")
    assert max(map(len, text.splitlines())) <= 200

    # Order of rows: the paper's, yours, bounds.
    order = [line.split()[0] for line in one.splitlines() if line.split() and line[0].isalpha()]
    first = order.index("model")
    models_shown = order[first + 1 :]
    theirs = []
    if benchmark == "UVRB":
        theirs = [*tables.published()["table1"], "published", "Embed-RL-2B", "Embed-RL-4B"]
    assert models_shown == [*theirs, "base", "gve-mini", "chance", "ceiling"]

    rows = rows_of(one)
    assert rows["base"] == [".031"] * 17
    assert rows["chance"] == [".005"] * 17
    assert rows["ceiling"] == ["1.000"] * 17
    expected = {name: ".411" for name in names} | {"AVG": "-", "DiDeMo": ".411*", "PEV-K": "-"}
    assert dict(zip(rows["model"], rows["gve-mini"], strict=True)) == expected

    rows = rows_of(two)
    absent = {
        name for name, value in zip(rows["model"], rows["gve-mini"], strict=True) if value == "-"
    }
    assert absent == {"AVG", "TXT", "CG", "FG", "PR"}
    assert "* DiDeMo: 9/10 queries" in two and "not scored: PEV-K" in two

    # The caption says in every format that a composed set was ranked whole.
    assert "MS-TI: no pools" not in two
    for style in ("txt", "md", "tex"):
        caption = (tmp_path / f"table1.{style}").read_text()
        assert "MS-TV: no pools in its instances, so its whole corpus is ranked" in caption


@pytest.mark.parametrize("results", [[], models(1)], ids=["none", "UVRB"])
def test_published_rows_are_the_papers(capsys, tmp_path, results):
    tables.show(["Table 1", "Table 2"], results, tmp_path, "nowhere")
    one, two = capsys.readouterr().out.split("Table 2: score per ability")
    published = tables.published()
    for text, block in ((one, "table1"), (two, "table2")):
        rows = rows_of(text)
        for model, cells in published[block].items():
            printed = dict(zip(rows["model"], rows[model], strict=True))
            assert printed == {name: f"{value:.3f}"[1:] for name, value in cells.items()}


def test_results_of_another_benchmark_stand_without_published_scores(capsys, tmp_path, monkeypatch):
    """In no score table, figure or radar; a figure with nothing else to show is an error."""
    results = models(4, "mini-UVRB")
    drawn = {}
    plot = tables.plot
    monkeypatch.setattr(
        tables, "plot", lambda name, title, table, path: drawn.update({name: (title, table)})
    )
    names = ["Table 1", "Table 2", "Table 3", "Table 11"]
    names += [name for name in tables.TITLES if name.startswith("Figure")]
    tables.show(names, results, tmp_path, "nowhere")
    text = capsys.readouterr().out
    for name in names:
        assert f"{name}: mini-UVRB: {tables.TITLES[name]}" in text
    for model in tables.published()["models"]:
        assert model not in text, model
    assert "CLIP" not in text and "MLLM" not in text
    assert text.count("yours Pearson") == 2  # Figures 7 and 8: your own correlations only

    title, table = drawn["Figure 2"]
    assert title == "Figure 2: mini-UVRB: nine abilities and the averages"
    assert table.published == []
    assert [row["model"] for row in table.yours] == ["model0", "model1", "model2", "model3"]
    for name, (title, table) in drawn.items():
        plot(name, title, table, tmp_path / "figure.png")  # each can be drawn

    for name in ("Figure 7", "Figure 8"):
        with pytest.raises(ValueError, match=f"{name}: nothing to show.* on mini-UVRB have no"):
            tables.show([name], results[:2], tmp_path, "nowhere")
    del results[0]["protocol"]["pairs"]
    with pytest.raises(ValueError, match="Figure 6: nothing to show"):
        tables.show(["Figure 6"], results[:1], tmp_path, "nowhere")


@pytest.mark.parametrize("benchmark", ["UVRB", "mine"])
def test_datasets_of_a_folders_own_are_columns_of_table_1_and_enter_no_average(
    tmp_path, capsys, benchmark
):
    sixteen = {name: entry(0.25) for name in uvrb.DATASETS}
    own = {"MyVideos": entry(0.9), "MyShots": entry(0.8, complete=False)}
    own["MyVideos"] |= {"metric": "R@5", "chance": 0.1, "ceiling": 0.95}
    own["MyVideos"]["pooled"] = False  # no claim of the paper's about its pools
    result = make_result(benchmark, "x", sixteen | own)
    without = make_result(benchmark, "y", sixteen)
    (tmp_path / "x.json").write_text(json.dumps(result))
    (tmp_path / "y.json").write_text(json.dumps(without))
    files = [tmp_path / "y.json", tmp_path / "x.json"]
    call("--table", 1, 2, 3, "--results", *files, "--out", tmp_path / "t")
    one, rest = capsys.readouterr().out.split("Table 2: ")

    rows = rows_of(one)
    assert rows["model"][-2:] == ["MyVideos", "MyShots"]
    assert rows["x"] == [".250"] * 17 + [".900", ".800*"]
    assert rows["y"] == [".250"] * 17 + ["-", "-"]
    assert rows["chance"] == [".005"] * 17 + [".100", "-"]
    assert rows["ceiling"] == ["1.000"] * 17 + [".950", "-"]
    if benchmark == "UVRB":
        assert rows["GVE-7B"][-2:] == ["-", "-"]
    assert "* MyShots: 9/10 queries" in one
    assert "MyVideos: no pools" not in one
    assert "MyVideos" not in rest.replace("\n  * MyShots", "")  # neither in Table 2 nor in Table 3

    # A result that has nothing but its own.
    alone = make_result(benchmark, "z", own)
    tables.show(["Table 1"], [alone], tmp_path, "nowhere")
    rows = rows_of(capsys.readouterr().out)
    assert rows["model"] == ["MyVideos", "MyShots"] and rows["z"] == [".900", ".800*"]
    assert "GVE-7B" not in rows
    assert tables.with_numbers(EVERY, [alone]) == ["Table 1"]


EVERY = ["Table 1", "Table 2", "Table 11", "Figure 12", "Figure 13"]


@pytest.mark.parametrize("benchmark", ["UVRB", "mine"])
def test_a_few_of_the_16_show_their_columns_alone(tmp_path, capsys, benchmark):
    """The published rows of these datasets and no other's, if they are UVRB's."""
    datasets = {name: entry(0.3) for name in ("MSRVTT-I2V", "LoVR-C2V")}
    datasets["DiDeMo"] = entry(0.2, complete=False)
    result = make_result(benchmark, "x", datasets)
    assert tables.with_numbers(EVERY, [result])[:2] == ["Table 1", "Table 2"]
    tables.show(["Table 1", "Table 2"], [result], tmp_path, "nowhere")
    one, two = map(rows_of, capsys.readouterr().out.split("Table 2: "))
    assert one["model"] == ["DiDeMo", "MSRVTT-I2V", "LoVR-C2V"] and two["model"] == ["VIS"]
    assert one["x"] == [".200*", ".300", ".300"] and two["x"] == [".300"]
    assert one["chance"] == ["-", ".005", ".005"]

    theirs = tables.published()
    assert ("GVE-7B" in one) == ("GVE-7B" in two) == (benchmark == "UVRB")
    if benchmark == "UVRB":
        cells = theirs["table1"]["GVE-7B"]
        shown = [f"{cells[name]:.3f}"[1:] for name in one["model"]]
        assert one["GVE-7B"] == shown and len(theirs["table1"].keys() & one.keys()) == 16

    # One dataset with some of its media: no table but Table 1, and no row of dashes.
    result = make_result(benchmark, "x", {"DiDeMo": datasets["DiDeMo"]})
    assert tables.with_numbers(EVERY, [result]) == ["Table 1"]
    tables.show(["Table 1"], [result], tmp_path, "nowhere")
    text = capsys.readouterr().out
    assert " -" not in text and "chance" not in text
    assert "not scored: 15 of UVRB's 16 datasets" in text
    with pytest.raises(ValueError, match="Table 2: nothing to show"):
        tables.show(["Table 2"], [result], tmp_path, "nowhere")
    assert not tables.figure_2(theirs, [result]).yours


def test_a_note_of_evals_is_a_footnote_of_its_score(tmp_path, capsys):
    """Beside a model whose score has none; the averages stay."""
    names = list(uvrb.DATASETS)
    good = make_result("UVRB", "good", {name: entry(0.411) for name in names})
    equal = make_result("UVRB", "equal", {name: entry(0.411) for name in names})
    equal["datasets"]["DiDeMo"]["note"] = "all corpus vectors are equal"
    for result in (good, equal):
        (tmp_path / f"{result['model']}.json").write_text(json.dumps(result))
    call("--results", tmp_path / "good.json", tmp_path / "equal.json", "--out", tmp_path)
    one, two = capsys.readouterr().out.split("Table 2: ")
    rows = rows_of(one)
    expected = [".411*" if name == "DiDeMo" else ".411" for name in rows["model"]]
    assert rows["equal"] == expected and rows["good"] == [".411"] * 17
    assert rows_of(two)["equal"] == [".411"] * 10  # nine abilities and their average
    for name in ("table1", "table2"):
        lines = (tmp_path / f"{name}.txt").read_text().splitlines()
        assert lines.count("  * DiDeMo: all corpus vectors are equal") == 1


def test_a_table_with_nothing_to_show_does_not_hide_the_others(tmp_path, capsys):
    """All others are shown; the error at the end names every one that has nothing."""
    result = make_result("mine", "x", {"MyVideos": entry(0.3)})
    (tmp_path / "x.json").write_text(json.dumps(result))
    with pytest.raises(ValueError) as error:
        call("--table", 2, 1, 3, 5, "--results", tmp_path / "x.json", "--out", tmp_path / "t")
    assert str(error.value).startswith("Table 2, Table 3: nothing to show: these results on mine")
    text = capsys.readouterr().out
    assert "Table 1: mine: " in text and "Table 5: " in text
    files = {path.stem for path in (tmp_path / "t").iterdir()}
    assert files == {"table1", "table5"}


def test_a_file_that_is_no_results_json_is_named(tmp_path):
    for content, words in (("{", "x.json: not JSON"), ('{"model": "x"}', "it has no benchmark")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            call("--results", tmp_path / "x.json", "--out", tmp_path)


def test_bootstrap_intervals_are_two_rows_below_the_result():
    result = make_result("UVRB", "x", {name: entry(0.25) for name in uvrb.DATASETS})
    result["ci95"] = {"MSRVTT": [0.2, 0.3], "AVG-D": [0.24, 0.26]}
    yours = tables.score_table("Table 1", tables.published(), [result]).yours
    assert [row["model"] for row in yours] == ["x", "  2.5 %", "  97.5 %"]
    assert [row["MSRVTT"] for row in yours] == [0.25, 0.2, 0.3]
    assert [row["AVG"] for row in yours] == [0.25, 0.24, 0.26]
    assert yours[1]["DiDeMo"] is None


def test_results_option_prints_existing_results_side_by_side(tmp_path, capsys):
    for name in ("random", "other"):
        result = make_result("tiny-UVRB", name, {"MSRVTT": entry(0.2)})
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    call("--results", tmp_path / "random.json", tmp_path / "other.json", "--out", tmp_path)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    lines = lines[lines.index("model") :]
    assert lines.index("other") - lines.index("random") == 1
    assert lines.count("chance") == lines.count("ceiling") == 1  # no ability is complete


def test_results_of_two_benchmarks_do_not_share_a_table(tmp_path):
    results = [*models(1), *models(1, "mini-UVRB")]
    with pytest.raises(ValueError, match="results of UVRB and mini-UVRB do not belong into one"):
        tables.show(["Table 1"], results, tmp_path, "nowhere")


# A measured row under its published row


GVE_3B = {"MSRVTT": 0.4296, "DiDeMo": 0.3764, "CRB-G": 0.85, "MSRVTT-I2V": 0.3}
# GVE-3B's published scores there are .431, .376, .850 and .891; its CG is .552.
INTERVALS = {"MSRVTT": [0.4, 0.46], "DiDeMo": [0.3764, 0.4], "CRB-G": [0.83, 0.8494]}
INTERVALS |= {"MSRVTT-I2V": [0.27, 0.33], "CG": [0.5524, 0.6]}
ORDER = ["GVE-3B", "measured: GVE-3B", "difference"]


def gve_3b(benchmark="UVRB", **extra):
    return make_result(benchmark, "GVE-3B", {k: entry(v) for k, v in GVE_3B.items()}) | extra


def rows_from(cells, first):
    """Return the rows of a table's cells from one whose first cell is `first`, and its place."""
    names = [row[0].strip() for row in cells]
    start = names.index(first)
    return [[name, *row[1:]] for name, row in zip(names, cells, strict=True)][start:]


@pytest.mark.parametrize("style", ["csv", "md", "tex"])
def test_a_measured_row_stands_under_its_published_row_with_differences(tmp_path, capsys, style):
    (tmp_path / "x.json").write_text(json.dumps(gve_3b()))
    call("--results", tmp_path / "x.json", "--out", tmp_path)
    one = cells_of(tmp_path / "table1")[style]
    assert one[0] == ["model", "MSRVTT", "DiDeMo", "CRB-G", "MSRVTT-I2V"]
    expected = [
        ["GVE-3B", ".431", ".376", ".850", ".891"],
        ["measured: GVE-3B", ".430", ".376", ".850", ".300"],
        ["difference", "-.001", "+.000", "+.000", "-.591"],
    ]
    rows = rows_from(one, "GVE-3B")
    assert rows[:3] == expected and rows[3][0] == "GVE-7B"
    assert [row[0].strip() for row in one].count("GVE-3B") == 1  # not among yours as well

    # Table 2: CG is the mean of three.
    rows = rows_from(cells_of(tmp_path / "table2")[style], "GVE-3B")
    assert rows[:3] == [["GVE-3B", ".552"], ["measured: GVE-3B", ".552"], ["difference", "+.000"]]
    text = (tmp_path / "table1.txt").read_text()
    assert text in capsys.readouterr().out
    assert "difference: measured - published\n  no interval and so no mark: GVE-3B; eval.py" in text
    assert "!" not in text


def test_a_difference_is_marked_where_the_interval_does_not_hold_the_published_score(tmp_path):
    """DiDeMo's and CG's intervals begin .0004 above the rounded score, CRB-G's ends .0006 below."""
    tables.show(["Table 1", "Table 2"], [gve_3b(ci95=INTERVALS)], tmp_path, "nowhere")
    for style in ("csv", "md", "tex"):
        rows = rows_from(cells_of(tmp_path / "table1")[style], "GVE-3B")
        assert rows[2] == ["difference", "-.001", "+.000", "+.000!", "-.591!"]
        assert [row[0] for row in rows[:6]] == [*ORDER, "2.5 %", "97.5 %", "GVE-7B"]
        assert rows[3][1:] == [".400", ".376", ".830", ".270"]
        assert rows_from(cells_of(tmp_path / "table2")[style], "GVE-3B")[2][1] == "+.000"
    for style in ("txt", "md", "tex"):
        caption = (tmp_path / f"table1.{style}").read_text()
        assert "! the published score lies outside the measured one's bootstrap interval" in caption
        assert "no interval" not in caption


def test_a_result_may_say_which_published_model_it_measures(tmp_path):
    """In its own name or by its key "published"; without intervals it is named."""
    ours = gve_3b(ci95=INTERVALS)
    other = gve_3b() | {"model": "seed2", "published": "GVE-3B"}
    mine = gve_3b() | {"model": "mine"}
    later = gve_3b() | {"model": "Embed-RL-4B"}
    table = tables.score_table("Table 1", tables.published(), [ours, other, mine, later])
    names = [row["model"].strip() for group in table.groups() for row in group]
    own = ["2.5 %", "97.5 %", "measured: seed2", "difference", "GVE-7B", "published later"]
    start = names.index("GVE-3B")
    assert names[start : start + 9] == [*ORDER, *own]
    last = ["Embed-RL-4B", "measured: Embed-RL-4B", "difference", "mine", "chance", "ceiling"]
    assert names[start + 9 :] == ["Embed-RL-2B", *last]
    assert table.groups()[1][4]["MSRVTT"] == "-.010"  # .4296 - .440
    assert table.footnotes[-1].startswith("  no interval and so no mark: seed2, Embed-RL-4B;")

    other["published"] = "GVE-30B"
    with pytest.raises(ValueError, match="seed2: it says to measure 'GVE-30B', .*VLM2Vec-V2"):
        tables.show(["Table 1"], [other], tmp_path, "nowhere")


def test_a_score_that_is_incomplete_has_no_difference():
    result = gve_3b(ci95=INTERVALS)
    result["datasets"]["DiDeMo"]["complete"] = False
    table = tables.score_table("Table 1", tables.published(), [result])
    measured, difference, *_ = table.reruns["GVE-3B"]
    assert (measured["DiDeMo"], difference["DiDeMo"]) == (".376*", None)
    assert difference["MSRVTT"] == "-.001"


@pytest.mark.parametrize("said", [{}, {"published": "GVE-7B"}], ids=["by name", "by key"])
def test_no_row_of_another_benchmark_stands_under_a_published_row(tmp_path, said):
    result = gve_3b("mini-UVRB", ci95=INTERVALS, **said)
    tables.show(["Table 1", "Table 2"], [result], tmp_path, "nowhere")
    for block in ("table1", "table2"):
        for style in ("csv", "md", "tex"):
            names = [row[0].strip() for row in cells_of(tmp_path / block)[style]]
            assert names == ["model", "GVE-3B", "2.5 %", "97.5 %", "chance", "ceiling"]
        text = (tmp_path / f"{block}.txt").read_text()
        assert "difference" not in text and "measured" not in text and "later" not in text

    # Datasets of a folder's own have no published row either, whatever the model's name is.
    own = make_result("UVRB", "GVE-3B", {"MyVideos": entry(0.9)})
    table = tables.score_table("Table 1", tables.published(), [own])
    assert [row["model"] for row in table.yours] == ["GVE-3B"]
    assert not table.reruns and not table.published and not table.later


def test_later_rows_stand_under_a_heading_and_in_no_figure(tmp_path, capsys):
    """arXiv 2602.13823's Table 10 and 13, in percent there."""
    later = {
        "Embed-RL-2B": "58.7? 43.7 42.2 91.4 89.7 84.6 49.4 36.5 31.8 56.5 33.6 80.0 93.8 19.3? "
        "21.0? 89.1 51.4",
        "Embed-RL-4B": "60.2? 44.0 46.1 92.1 89.9 85.9 53.8 38.2 32.0 57.9 31.9 77.0 95.2 15.8? "
        "21.0? 87.9 49.0",
    }
    abilities = {
        "Embed-RL-2B": "58.7? 61.1? 20.1? 70.3 59.1 54.6? 86.9 87.2 43.0 40.6",
        "Embed-RL-4B": "58.5? 62.0? 18.4? 70.3 60.7 55.6? 86.1 87.9 46.0 40.6",
    }
    call("--table", 1, 2, "--out", tmp_path)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 200
    for block, printed in (("table1", later), ("table2", abilities)):
        for style in ("csv", "md", "tex"):
            heading, *rows = rows_from(cells_of(tmp_path / block)[style], "published later")
            assert set(heading[1:]) == {""}
            expected = []
            for model, cells in printed.items():
                expected.append([model, *("." + cell.replace(".", "") for cell in cells.split())])
            assert rows == expected
        for style in ("txt", "md", "tex"):
            caption = (tmp_path / f"{block}.{style}").read_text()
            assert "2602.13823" in caption and "? not like for like: MS-TI and" in caption

    # A cell that is not given is a dash, and has no mark.
    row = tables.later_rows({"x": {"VIS": 0.5}}, ["CMP", "VIS"], ["CMP"])[1]
    assert row == {"model": "x", "CMP": None, "VIS": 0.5}

    paper = tables.published()
    for name in tables.TITLES:
        if name not in ("Table 1", "Table 2"):
            groups = tables.build(name, paper, models(), "nowhere", ()).groups()
            assert "Embed-RL" not in tables.render("", groups), name


def test_table_10_has_the_parameters_of_loaded_weights_beside_the_published_sizes(tmp_path):
    """A checkpoint's count is in its protocol, an encoder's may stand beside it."""
    checkpoint = make_result("mini-UVRB", "GVE-3B", {}, parameters=3_754_622_976)
    encoder = make_result("mini-UVRB", "gme", {}) | {"published": "GME-2B", "parameters": 12_345}
    other = make_result("mini-UVRB", "mine", {}, parameters=1_000)
    tables.show(["Table 10"], [checkpoint, encoder, other], tmp_path, "nowhere")
    for style in ("csv", "md", "tex"):
        cells = cells_of(tmp_path / "table10")[style]
        assert cells[0] == ["model", "full_name", "family", "size", "parameters", "trained_on"]
        rows = {row[0]: row for row in cells}
        assert rows["GVE-3B"][3:5] == ["3.8B", "3,754,622,976"]
        assert rows["GME-2B"][3:5] == ["2.2B", "12,345"]
        assert rows["GME-7B"][3:5] == ["8.3B", "-"]
        assert rows["mine"] == ["mine", "runs/x", "-", "-", "1,000", "-"]
        assert len(cells) == 1 + 16 + 1


# All tables and figures


def cells_of(path):
    """Read a table's four formats -> {style: rows of cells}."""
    cells = {"csv": list(csv.reader(path.with_suffix(".csv").open())), "md": [], "tex": []}
    for line in path.with_suffix(".md").open():
        if line.startswith("|"):
            cells["md"].append(line.removeprefix("| ").removesuffix(" |\n").split(" | "))
    del cells["md"][1]  # the alignment
    for line in path.with_suffix(".tex").open():
        if " & " in line:
            row = line.removesuffix(" \\\\\n").split(" & ")
            cells["tex"].append([value.replace("\\", "") for value in row])
    plain = "".join(path.with_suffix(".txt").read_text().split("\n---")[1:])
    cells["txt"] = plain.replace("-", "").split()
    return cells


def test_every_table_and_figure_is_one_option(tmp_path, capsys):
    """All 11 tables and 7 figures in one call; the four formats hold the same cells."""
    for i, result in enumerate(models()):
        (tmp_path / f"{i}.json").write_text(json.dumps(result))
    files = sorted(tmp_path.glob("?.json"))
    numbers = ["--table", *range(1, 12), "--figure", 2, 6, 7, 8, 11, 12, 13]
    call(*numbers, "--results", *files, "--uvrb", tmp_path, "--out", tmp_path / "t")
    text = capsys.readouterr().out

    for name in tables.TITLES:
        assert f"{name}: {tables.TITLES[name]}" in text
        path = tmp_path / "t" / name.lower().replace(" ", "")
        cells = cells_of(path)
        assert cells["md"] == cells["tex"] == cells["csv"], name
        assert len({len(row) for row in cells["csv"]}) == 1, name
        words = " ".join(map(" ".join, cells["csv"])).replace("-", "").split()
        assert sorted(cells["txt"]) == sorted(words), name
        if name.startswith("Figure"):
            picture = path.with_suffix(".png").read_bytes()
            assert picture[:4] == b"\x89PNG" and len(picture) > 20_000

    with pytest.raises(ValueError, match="no Figure 3 here .accepted: Table 1, "):
        call("--figure", 3, "--out", tmp_path)


def test_score_tables_and_curves_hold_the_papers_numbers_and_ours():
    paper = tables.published()
    ours = models()

    three = tables.score_table("Table 3", paper, ours)
    roles = ["GVE-i: model0", "GVE-s: model1", "GVE: model2", "GVE-i: model3"]
    assert [row["model"] for row in three.yours] == roles
    assert three.yours[0]["AVG-A"] == ours[0]["AVG-A"]
    assert three.published[0]["CMP"] == 0.237

    names = ("K700", "UCF101", "HMDB51", "SSV2", "Breakfast")
    zero_shot = [ours[1]["datasets"][name]["score"] for name in names]
    row = tables.score_table("Table 11", paper, ours).yours[1]
    assert row["AVG"] == pytest.approx(np.mean(zero_shot))
    assert row["SSV2"] == zero_shot[3]

    table = tables.curves("Figure 12", paper, ours)
    rows = {(row["model"], row["score"]): row for row in [*table.published, *table.yours]}
    published = rows["GVE-7B", "LC"]
    assert [published[x] for x in (8, 16, 48)] == [0.814, 0.909, 0.918]
    mine = rows["runs/x", "VIS"]
    expected = [result["abilities"]["VIS"] for result in ours[:3]]
    assert [mine[x] for x in (8, 16, 48)] == expected, "not 8 x 400"

    rows = {row["score"]: row for row in tables.curves("Figure 11", paper, ours).yours}
    scores = [result["abilities"]["CMP"] for result in ours]
    slope, _ = np.polyfit([3, 4, 5, 6], scores, 1)  # over log10: the gain per decade
    assert rows["CMP"]["per decade"] == pytest.approx(slope)
    assert rows["CMP"][1000] == scores[0]


def test_tables_6_to_8_come_from_the_mixtures(monkeypatch, tmp_path):
    """One source each of text, image, video and UVRD."""
    sources = (("a", "T2T", 1), ("b", "TI2TI", 20), ("c", "T2V", 300), ("UVRD-T2T", "T2T", 4000))
    (tmp_path / "mixtures").mkdir()
    for size, factor in (("3b", 1), ("7b", 2)):
        mixture = []
        for name, task, samples in sources:
            rest = {"path": "x", "negatives": 0, "batch_size": 32, "instruction": ""}
            mixture.append({"name": name, "task": task, "samples": samples * factor, **rest})
        (tmp_path / "mixtures" / f"gve-{size}.json").write_text(json.dumps(mixture))

    paper = tables.published()
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    sums = {row["data"]: (row["3B"], row["7B"]) for row in tables.table_8(paper).yours}
    assert sums == {
        "text": (1, 2),
        "image": (20, 40),
        "video": (300, 600),
        "UVRD": (4000, 8000),
        "all": (4321, 8642),
    }
    assert [row["name"] for row in tables.table_6_or_7("Table 7", paper).yours] == ["UVRD-T2T"]
    assert [row["name"] for row in tables.table_6_or_7("Table 6", paper).yours] == ["a", "b", "c"]


def write_benchmark(root):
    """A benchmark of three datasets over 7 real clips, one with pools, one without texts."""
    (root / "videos").mkdir(parents=True)
    for i in range(7):
        write_video(root / "videos" / f"{i}.mp4", moving_square(12, seed=20 + i))
    paths = [f"../../videos/{i}.mp4" for i in range(7)]
    text = [{"text": f"a square, number {i}"} for i in range(5)]
    composed = [{"text": f"the same, {i}", "video": paths[i]} for i in range(4)]
    clips = [{"video": {"path": path, "start": 0, "end": 1}} for path in paths]

    sizes = {}
    for name, queries in (("MSRVTT", text), ("MS-TI", composed), ("LoVR-C2V", clips)):
        instances = []
        for i in range(len(queries)):
            instances.append({"qid": f"q{i}", "pos": [f"c{i}"]})
            if name == "MS-TI":
                instances[i]["neg"] = [f"c{i + 1}", f"c{i + 3}"]
        files = {
            "queries": [{"id": f"q{i}", **query} for i, query in enumerate(queries)],
            "corpus": [{"id": f"c{i}", "video": path} for i, path in enumerate(paths)],
            "instances": instances,
        }
        folder = root / "uvrb" / name / "jsonl"
        folder.mkdir(parents=True)
        for file, rows in files.items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{file}.jsonl").write_text("".join(lines))
        sizes[name] = {"queries": len(queries), "corpus": 7}
    content = {"name": "tiny-UVRB", "datasets": sizes}
    (root / "uvrb" / "benchmark.json").write_text(json.dumps(content))
    return root / "uvrb"


def test_table_4_counts_the_data(capsys, tmp_path):
    folder = write_benchmark(tmp_path)
    call("--table", 4, "--uvrb", folder, "--out", tmp_path / "t")
    text = capsys.readouterr().out
    assert "Table 4: tiny-UVRB below the published rows" in text
    shown = ("MSRVTT ", "MS-TI ", "LoVR-C2V ")
    rows = [line.split() for line in text.splitlines() if line.startswith(shown)]
    assert rows[0] == ["MSRVTT", "1,000", "1,000", "15.0", "9.4"]  # published
    # Ours: 12 frames at 8 a second, pools of 3.
    assert rows[3:] == [
        ["MSRVTT", "5", "7", "1.5", "4.0"],
        ["MS-TI", "4", "3", "1.5", "3.0"],
        ["LoVR-C2V", "7", "7", "1.5", "-"],
    ]

    # Your own datasets are counted as well; one whose corpus is text has no seconds.
    (folder / "Labels").mkdir()
    for file, row in (
        ("queries", {"id": "q", "text": "three words here"}),
        ("corpus", {"id": "c", "text": "a label"}),
        ("instances", {"qid": "q", "pos": ["c"]}),
    ):
        (folder / "Labels" / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    content = json.loads((folder / "benchmark.json").read_text())
    own = {"queries": 1, "corpus": 1, "task": "TXT", "metric": "R@1", "prompt": "Find it."}
    content["datasets"]["Labels"] = own
    (folder / "benchmark.json").write_text(json.dumps(content))
    row = tables.measured(folder, [])[-1]
    assert list(row.values()) == ["Labels", 1, 1, "-", 3.0]

    (tmp_path / "videos" / "3.mp4").write_bytes(b"no video")
    row = tables.measured(folder, [])[0]
    assert (row["dataset"], row["corpus"], row["duration_s"]) == ("MSRVTT", 7, "1.5*")


# The paper against itself


def test_correlations_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, (2, 9)).astype(float)  # with ties
        assert tables.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
        assert tables.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


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
    wrong, lines = tables.disagreements(paper)
    # Also: section 5.2's 28 gains per decade follow from Figures 6 and 11.
    assert set(wrong) == WRONG
    assert wrong["Table 2", "GME-2B", "AVG"] == (0.416, pytest.approx(0.516, abs=5e-4))
    assert wrong["Table 8", "image", "3B"] == (1_820_000, 1_910_000)
    assert wrong["Table 8", "image", "7B"] == (2_800_000, 2_970_000)
    assert lines[0] == "Figure 7, CLIP: of 36 printed cells Pearson gives 1, Spearman 36"

    call("--published")
    text, later = capsys.readouterr().out.split("\narXiv 2602.13823, Tables 10 and 13: ")
    # By hand: 914.0 and 917.7 points in 16 cells; TXT is the mean of CG, FG and LC, FG of S, T, PR.
    assert later.startswith("9 values do not follow")
    for line in (
        "Table 1, Embed-RL-2B, AVG: printed 0.587, the others give 0.5712",
        "Table 1, Embed-RL-4B, AVG: printed 0.602, the others give 0.5736",
        "Table 2, Embed-RL-4B, VIS: printed 0.703, the others give 0.6845",
        "Table 2, Embed-RL-2B, FG: printed 0.546, the others give 0.5691",
    ):
        assert line in later
    assert "17 published values do not follow" in text
    assert text.count("!") == 6  # one in the caption
    assert "Table 2, GME-2B, AVG: printed 0.416, the others give 0.5161" in text
    assert "Table 8, image, 3B: printed 1,820,000, the others give 1,910,000" in text


def test_any_cell_with_one_changed_digit_names_its_row():
    """Every cell of Tables 1, 2, 11 and of Figure 7's CLIP block in turn, its second digit changed.

    Table 3 too, but for GVE-i and GVE-s the first digit: CMP and VIS enter nothing but an average
    of six, and their AVG-D follows from no other cell.
    """
    paper = tables.published()

    def finds(cells, key, step, where, row):
        before = cells[key]
        cells[key] = round(before + (step if before < 0.9 else -step), 3)
        wrong, _ = tables.disagreements(paper)
        cells[key] = before
        found = {(w, r) for w, r, _ in wrong.keys() - WRONG}
        return (where, row) in found or where == "Table 1" and ("Table 2", row) in found

    for where in ("Table 1", "Table 2", "Table 3", "Table 11"):
        for row, cells in paper[where.lower().replace(" ", "")].items():
            if row == "VLM2Vec-V2" and where != "Table 11":
                continue  # its rows are wrong as they stand
            alone = where == "Table 3" and row[3:5] in ("-i", "-s")
            for key in cells:
                if alone and key == "AVG-D" or (where, row, key) in WRONG:
                    continue
                assert finds(cells, key, 0.1 if alone else 0.01, where, row), (where, row, key)

    for row, cells in paper["figure7_correlations"]["lower_triangle_rows"]["CLIP"].items():
        for i, ability in enumerate(uvrb.ABILITIES[: len(cells)]):
            assert finds(cells, i, 0.01, "Figure 7", f"{row}-{ability}"), (row, ability)


# The epoch's table in train.py


@pytest.mark.parametrize("quota", [None, {"a": 10, "b": 3}])
@pytest.mark.parametrize("probed", [True, False])
def test_the_pyramids_table_has_a_line_per_source_and_level(probed, quota):
    event = {
        "R": {"a": 0.5, "b": 0.25} if probed else None,
        "R_error": {"a": 0.01, "b": 0.02} if probed else None,
        "P": {"a": 0.75, "b": 0.25},
        "drawn": {"a": 5, "b": 3},
        "used": {"a": 9, "b": 3},
        "quota": quota,
        "passes": {"a": 1.5, "b": 0.125},
        "steps": 8,
    }
    text = tables.pyramid_table(event, {"a": (2, "T2V"), "b": (2, "T2I")})
    expected = [
        ["level", "task", "source", "R_k", "+-", "P(k)", "steps", "passes", "used", "left"],
        ["2", "T2V", "a", "0.500", "0.010", "0.750", "5", "1.50", "9", "1"],
        ["2", "T2I", "b", "0.250", "0.020", "0.250", "3", "0.12", "3", "0"],
        ["2", "all", "1.000", "8", "12", "1"],
    ]
    if not probed:
        expected[1][3:5] = expected[2][3:5] = ["-", "-"]
    if not quota:
        expected = [line[:-2] for line in expected]
    assert [line.split() for line in text.splitlines()] == expected


def test_tables_start_without_matplotlib():
    """train.py imports tables; drawing is for those who ask for a figure."""
    code = "import sys, tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tables.ROOT).returncode == 0
