"""The instruments of the mini world: rankers that must fail (mini/ablate.py) and studies (mini/study.py)."""

import json
import math
import random

import numpy as np
import pytest
import torch

import data
import model
from mini import world
from studies import ablate, report, study


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two rendered clips that differ in their colours alone: their paths."""
    folder, scene = (
        tmp_path_factory.mktemp("clips"),
        world.sample_scene(random.Random(3), test=False, count=2),
    )
    scene["theme"], out = "night", []
    for colours in (("red", "blue"), ("green", "yellow")):
        made = {
            **scene,
            "objects": [{**o, "colour": c} for o, c in zip(scene["objects"], colours, strict=True)],
        }
        out.append(folder / f"{colours[0]}.mp4")
        out[-1].write_bytes(world.encode_mp4(world.render_scene(made)))
    return list(map(str, out))


def test_histogram_tells_colours_apart_and_nothing_else(clips):
    items = [{"video": path} for path in clips] + [
        {"text": text} for text in ("a red star and a blue one", "green, yellow")
    ]
    one, two, *texts = (v / np.linalg.norm(v) for v in ablate.histogram(items, None))
    assert texts[0] @ one > texts[0] @ two + 0.3 and texts[1] @ two > texts[1] @ one + 0.3
    moved = ablate.histogram([{"text": "a red star moves left and a blue one"}], None)[0]
    assert np.array_equal(moved / np.linalg.norm(moved), texts[0])


@pytest.fixture
def tiny_gve(tiny, monkeypatch):
    ablate.gve.cache_clear()
    monkeypatch.setenv("CKPT", tiny)
    yield ablate.gve()
    ablate.gve.cache_clear()


def test_frames_are_taken_away_and_given_back(tiny_gve, clips, monkeypatch):
    items = [{"video": path} for path in clips]
    whole, load = tiny_gve.embed(items), data.load_video
    still, shuffled = ablate.still(items, None), ablate.shuffled(items, None)
    assert data.load_video is load and torch.equal(tiny_gve.embed(items), whole)
    assert not torch.allclose(shuffled, whole, atol=1e-4)
    assert torch.allclose(ablate.shuffled(items[::-1], None).flip(0), shuffled, atol=1e-5)
    monkeypatch.setattr(
        data,
        "load_video",
        lambda video, frames=8: (np.stack([load(video)[0][4]] * 8), load(video)[1]),
    )
    assert torch.allclose(tiny_gve.embed(items), still, atol=1e-5) and not torch.allclose(
        still, whole, atol=1e-4
    )


def test_composed_queries_lose_what_the_name_says(tiny_gve, clips):
    one, two = clips
    items = [{"text": "it moves", "video": one}, {"text": "it stops", "video": two}, {"video": one}]
    same = lambda a, b: torch.allclose(a, tiny_gve.embed(b, "Find it."), atol=1e-5)  # noqa: E731
    assert same(ablate.no_text(items, "Find it."), [{"video": one}, {"video": two}, {"video": one}])
    assert same(
        ablate.no_reference(items, "Find it."),
        [{"text": "it moves"}, {"text": "it stops"}, {"video": one}],
    )
    swapped = [
        {"text": "it moves", "video": two},
        {"text": "it stops", "video": one},
        {"video": one},
    ]
    assert same(ablate.wrong_reference(items, "Find it."), swapped)


def results(score):
    entries = {name: {"chance": 0.1} for name in ablate.uvrb.DATASETS}
    return {
        "abilities": dict.fromkeys(ablate.uvrb.ABILITIES, score),
        "AVG-D": score,
        "AVG-A": score,
        "datasets": entries,
    }


def test_verdicts_by_hand():
    found = {name: results(0.3) for name in ablate.RANKERS} | {
        "trained": results(0.6),
        "words": results(0.4),
    }
    rows = {what: (value, met) for what, value, _, met in ablate.verdicts(found)}
    assert rows["colour histogram on S, at most"] == (0.3, False)
    value, met = rows["T above chance that a single frame removes"]
    assert value == pytest.approx((0.6 - 0.3) / (0.6 - 0.1)) and met  # .6 of what lies above chance
    assert rows["AVG-D of the trained model beyond bags of words"] == (pytest.approx(0.2), True)


def test_defects_do_what_they_say(monkeypatch):
    # Given back afterwards.
    monkeypatch.setitem(model.POOLINGS, "last_token", model.last_token_pool)
    monkeypatch.setattr(model, "GVE", type("GVE", (), {}))
    study.one_early(model)
    hidden, left, right = (
        torch.arange(8.0).view(1, 4, 2),
        torch.tensor([[0, 1, 1, 1]]),
        torch.tensor([[1, 1, 1, 0]]),
    )
    pool = model.POOLINGS["last_token"]
    assert pool(hidden, left).tolist() == [[4, 5]]
    assert pool(hidden, right).tolist() == [[2, 3]]
    study.one_dimensional(model)
    assert model.GVE.positions(None, {"attention_mask": left}).tolist() == [[[0, 0, 1, 2]]] * 3


def test_a_script_runs_with_the_defect_in_it(tmp_path, monkeypatch):
    monkeypatch.setitem(model.POOLINGS, "last_token", model.last_token_pool)
    monkeypatch.setattr(study.sys, "argv", [])
    (tmp_path / "script.py").write_text(
        "import sys\nfrom model import POOLINGS\nimport torch\n"
        "pooled = POOLINGS['last_token'](torch.arange(6.).view(1, 3, 2), torch.ones(1, 3).long())\n"
        "open(sys.argv[1], 'w').write(str(pooled.tolist()))\n"
    )
    study.broken("early", str(tmp_path / "script.py"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "[[2.0, 3.0]]"


def test_variants_share_a_checkpoint_when_they_train_alike_and_never_a_result():
    for _, variants in study.STUDIES.values():
        assert len({how.results(42) for how in variants.values()}) == len(variants)
    frames = study.STUDIES["frames"][1]
    assert {how.folder(42) for how in frames.values()} == {study.TOUR.folder(42)}


def test_interval_and_table_by_hand(capsys):
    mean, half = study.interval([0.0, 0.1, 0.2])  # t(.975, 2) = 4.3027, deviation .1
    assert mean == pytest.approx(0.1) and half == pytest.approx(
        4.3027 * 0.1 / math.sqrt(3), abs=1e-5
    )
    study.table(
        range(42, 44), {"a": [results(0.1), results(0.3)], "b": [results(0.2), results(0.5)]}
    )
    out = capsys.readouterr().out
    assert (
        "| a | 0.200 " in out and "| b - a | +0.150 ± 0.635 " in out
    )  # t(.975, 1) = 12.706, deviation .0707


def test_what_is_beyond_the_noise_by_hand(capsys, tmp_path):
    floor = study.columns([results(score) for score in (0.4, 0.5, 0.6)])  # mean .5, deviation .1
    scores = {
        name: study.columns([results(score)])
        for name, score in (("default", 0.5), ("near", 2.1), ("far", 9.0))
    }
    study.found(
        scores, floor
    )  # t(1 - .025 / 11, 2) = 14.78, times sqrt(4 / 3): differences above 1.707
    near, far = capsys.readouterr().out.splitlines()[-2:]
    assert near == "* near: nothing" and "AVG-D +8.500 (+85.0)" in far and far.count("+85.0") == 11
    study.picture(
        "scaling", [42], {"6 steps": scores["near"], "60 steps": scores["far"]}, tmp_path / "a.png"
    )
    study.picture("defects", range(42, 45), {"default": floor, "other": floor}, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_a_defect_trains_scores_and_is_not_run_again(tiny, media, mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUT", tmp_path / "study")
    folder = tmp_path / "uvrb" / "MSRVTT"
    folder.mkdir(parents=True)
    for name, rows in {
        "queries": [{"id": f"q{c}", "text": f"clip {c}"} for c in "abcd"],
        "corpus": [{"id": c, "video": str(media / f"{c}.mp4")} for c in "abcd"],
        "instances": [{"qid": f"q{c}", "pos": [c]} for c in "abcd"],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = (
        f"--base {tiny} --prober {tiny} --data {media} --mixture {mixture} --features {tmp_path}/features "
        "--steps 1 --epochs 1"
    )
    how = study.Variant(train, f"--uvrb {tmp_path}/uvrb --root {media}", "early")
    assert list(study.measure(how, 1)["datasets"]) == ["MSRVTT"]
    stamp = how.results(1).stat().st_mtime_ns
    study.measure(how, 1)
    assert how.results(1).stat().st_mtime_ns == stamp
    assert "trained 1 steps" in (how.folder(1) / "train.txt").read_text()
    late = study.Variant(train, how.test, "early", late=True)
    sound = study.Variant(train, how.test)
    assert late.folder(1) == sound.folder(1) != how.folder(1) and late.results(1) != sound.results(
        1
    )
    monkeypatch.setattr(study.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="status 1; its output is in .*train.txt"):
        study.measure(how, 2)
    assert not (how.folder(2) / "trained").exists()


def test_what_comes_first_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="python -m mini`? first"):
        study.study("noise")
    with pytest.raises(ValueError, match="mini ablate` first"):
        report.world_report(tmp_path / "report")
    assert not list(tmp_path.iterdir())
