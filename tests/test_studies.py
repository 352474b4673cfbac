"""The instruments of the mini world: rankers that should fail, studies, and the reports on them."""

import dataclasses
import importlib
import math
import random

import numpy as np
import pytest
import torch

import data
import model
from mini import world
from studies import ablate, report, study
from support.files import write_jsonl


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two rendered clips that differ in their colours alone: their paths."""
    folder = tmp_path_factory.mktemp("clips")
    scene = world.sample_scene(random.Random(3), test=False, count=2)
    first, second = scene["objects"]
    paths = []
    for one, other in (("red", "blue"), ("green", "yellow")):
        objects = [{**first, "colour": one}, {**second, "colour": other}]
        made = {**scene, "theme": "night", "objects": objects}
        path = folder / f"{one}.mp4"
        path.write_bytes(world.encode_mp4(world.render_scene(made)))
        paths.append(str(path))
    return paths


def test_histogram_tells_colours_apart_and_nothing_else(clips):
    items = [
        {"video": clips[0]},
        {"video": clips[1]},
        {"text": "a red star and a blue one"},
        {"text": "green, yellow"},
        {"text": "a red star moves left and a blue one"},
    ]
    vectors = ablate.histogram(items, None)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    one, two, red_blue, green_yellow, moved = vectors
    assert red_blue @ one > red_blue @ two + 0.3
    assert green_yellow @ two > green_yellow @ one + 0.3
    assert np.array_equal(moved, red_blue)


@pytest.fixture
def tiny_gve(tiny, monkeypatch):
    ablate.gve.cache_clear()
    monkeypatch.setenv("CKPT", tiny)
    yield ablate.gve()
    ablate.gve.cache_clear()


def test_frames_are_taken_away_and_given_back(tiny_gve, clips, monkeypatch):
    items = [{"video": path} for path in clips]
    open_clip = data.open_clip
    whole = tiny_gve.embed(items)
    still = ablate.still(items, None)
    shuffled = ablate.shuffled(items, None)
    assert data.open_clip is open_clip and torch.equal(tiny_gve.embed(items), whole)
    assert not torch.allclose(shuffled, whole, atol=1e-4)
    assert torch.allclose(ablate.shuffled(items[::-1], None).flip(0), shuffled, atol=1e-5)

    def middle_frame(video, frames=8):
        clip = open_clip(video)
        return dataclasses.replace(clip, pixels=np.stack([clip.pixels[4]] * 8))

    monkeypatch.setattr(data, "open_clip", middle_frame)
    assert torch.allclose(tiny_gve.embed(items), still, atol=1e-5)
    assert not torch.allclose(still, whole, atol=1e-4)


def test_composed_queries_lose_what_the_name_says(tiny_gve, clips):
    one, two = clips
    items = [{"text": "it moves", "video": one}, {"text": "it stops", "video": two}, {"video": one}]

    def same(ranker, shown):
        wanted = tiny_gve.embed(shown, "Find it.")
        return torch.allclose(ranker(items, "Find it."), wanted, atol=1e-5)

    assert same(ablate.no_text, [{"video": one}, {"video": two}, {"video": one}])
    texts = [{"text": "it moves"}, {"text": "it stops"}, {"video": one}]
    assert same(ablate.no_reference, texts)
    swapped = [{"text": "it moves", "video": two}, {"text": "it stops", "video": one}, items[2]]
    assert same(ablate.wrong_reference, swapped)


def results(score):
    entries = {name: {"chance": 0.1} for name in ablate.uvrb.DATASETS}
    return {
        "abilities": dict.fromkeys(ablate.uvrb.ABILITIES, score),
        "AVG-D": score,
        "AVG-A": score,
        "datasets": entries,
    }


def test_verdicts_by_hand():
    found = {name: results(0.3) for name in ablate.RANKERS}
    found["trained"] = results(0.6)
    found["words"] = results(0.4)
    rows = {what: (value, met) for what, value, _, met in ablate.verdicts(found)}
    assert rows["colour histogram on S, at most"] == (0.3, False)
    value, met = rows["T above chance that a single frame removes"]
    assert value == pytest.approx((0.6 - 0.3) / (0.6 - 0.1)) and met  # .6 of what lies above chance
    assert rows["AVG-D of the trained model beyond bags of words"] == (pytest.approx(0.2), True)


def test_defects_do_what_they_say(monkeypatch):
    # Given back afterwards.
    monkeypatch.setitem(model.POOLINGS, "last_token", model.last_token_pool)
    monkeypatch.setattr(model, "GVE", type("GVE", (), {}))
    hidden = torch.arange(8.0).view(1, 4, 2)
    left = torch.tensor([[0, 1, 1, 1]])
    right = torch.tensor([[1, 1, 1, 0]])
    study.one_early()
    pool = model.POOLINGS["last_token"]
    assert pool(hidden, left).tolist() == [[4, 5]]
    assert pool(hidden, right).tolist() == [[2, 3]]
    study.one_dimensional()
    assert model.GVE.position_ids(None, {"attention_mask": left}).tolist() == [[[0, 0, 1, 2]]] * 3


def test_a_script_runs_with_the_defect_in_it(tmp_path, monkeypatch):
    monkeypatch.setitem(model.POOLINGS, "last_token", model.last_token_pool)
    monkeypatch.setattr(study.sys, "argv", [])
    (tmp_path / "script.py").write_text(
        "import sys\nimport model\nimport torch\npool = model.POOLINGS['last_token']\n"
        "pooled = pool(torch.arange(6.).view(1, 3, 2), torch.ones(1, 3).long())\n"
        "open(sys.argv[1], 'w').write(str(pooled.tolist()))\n"
    )
    study.run_with_defect("early", str(tmp_path / "script.py"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "[[2.0, 3.0]]"


def test_variants_share_a_checkpoint_when_they_train_alike_and_never_a_result():
    for _, variants in study.STUDIES.values():
        assert len({how.results(42) for how in variants.values()}) == len(variants)
    frames = study.STUDIES["frames"].variants
    assert {how.folder(42) for how in frames.values()} == {study.TOUR.folder(42)}


def test_interval_and_table_by_hand(capsys):
    mean, half = study.interval([0.0, 0.1, 0.2])
    assert mean == pytest.approx(0.1)
    # t(.975, 2) = 4.3027, deviation .1
    assert half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-5)

    measured = {"a": [results(0.1), results(0.3)], "b": [results(0.2), results(0.5)]}
    study.print_table(range(42, 44), measured)
    out = capsys.readouterr().out
    assert "| a | 0.200 " in out
    # t(.975, 1) = 12.706, deviation .0707
    assert "| b - a | +0.150 ± 0.635 " in out


def test_what_is_beyond_the_noise_by_hand(capsys, tmp_path):
    floor = study.columns([results(0.4), results(0.5), results(0.6)])  # mean .5, deviation .1
    scores = {
        "default": study.columns([results(0.5)]),
        "near": study.columns([results(2.1)]),
        "far": study.columns([results(9.0)]),
    }
    # t(1 - .025 / 11, 2) = 14.78, times sqrt(4 / 3): differences above 1.707
    study.print_beyond_noise(scores, floor)
    near, far = capsys.readouterr().out.splitlines()[-2:]
    assert near == "* near: nothing"
    assert "AVG-D +8.500 (+85.0)" in far and far.count("+85.0") == 11

    curve = {"6 steps": scores["near"], "60 steps": scores["far"]}
    study.draw("scaling", [42], curve, tmp_path / "a.png")
    dots = {"default": floor, "other": floor}
    study.draw("defects", range(42, 45), dots, tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_a_defect_trains_scores_and_is_not_run_again(
    tiny, media, mixture, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(study, "OUT", tmp_path / "study")
    folder = tmp_path / "uvrb" / "MSRVTT"
    folder.mkdir(parents=True)
    queries = [{"id": f"q{c}", "text": f"clip {c}"} for c in "abcd"]
    corpus = [{"id": c, "video": str(media / f"{c}.mp4")} for c in "abcd"]
    instances = [{"qid": f"q{c}", "pos": [c]} for c in "abcd"]
    write_jsonl(folder / "queries.jsonl", queries)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "instances.jsonl", instances)

    train = (
        f"--base {tiny} --prober {tiny} --data {media} --mixture {mixture} "
        f"--features {tmp_path}/features --steps 1 --epochs 1"
    )
    how = study.Variant(train, f"--uvrb {tmp_path}/uvrb --root {media}", "early")
    assert list(study.measure(how, 1)["datasets"]) == ["MSRVTT"]
    commands = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in commands] == [
        ["$", "python", "train.py"],
        ["$", "python", "eval.py"],
    ]
    stamp = how.results(1).stat().st_mtime_ns
    study.measure(how, 1)
    assert how.results(1).stat().st_mtime_ns == stamp
    assert "trained 1 steps" in (how.folder(1) / "train.txt").read_text()
    late = study.Variant(train, how.test, "early", late=True)
    sound = study.Variant(train, how.test)
    assert late.folder(1) == sound.folder(1) != how.folder(1)
    assert late.results(1) != sound.results(1)
    monkeypatch.setattr(study.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="status 1; its output is in .*train.txt"):
        study.measure(how, 2)
    assert not (how.folder(2) / "trained").exists()


def test_what_comes_first_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="python -m mini`? first"):
        study.run_study("noise")
    with pytest.raises(ValueError, match="studies ablate` first"):
        report.world_report(tmp_path / "report")
    assert not list(tmp_path.iterdir())


def test_a_variant_whose_prober_is_another_trains_that_one_first(tmp_path, monkeypatch):
    """And its checkpoint depends on which prober that is."""
    monkeypatch.setattr(study, "OUT", tmp_path)
    commands = []
    monkeypatch.setattr(study, "start", lambda command, *_: commands.append(command))
    first = study.Variant("--steps 1")
    second = study.Variant("--steps 1", prober=first)
    study.train(second, 5)
    assert [command.split()[-1] for command in commands] == [
        str(first.folder(study.PROBER_SEED)),
        str(second.folder(5)),
    ]
    assert f"--prober {first.folder(study.PROBER_SEED)} " in commands[1]
    assert second.folder(5) != first.folder(5)


def test_the_nearest_wrong_answer_is_the_first_that_is_not_right(tmp_path):
    rows = [
        {"qid": "q0", "positives": ["b"], "ranked": ["a", "b", "c"]},
        {"qid": "q1", "positives": ["c", "a"], "ranked": ["a", "c", "b"]},
    ]
    write_jsonl(tmp_path / "X.jsonl", rows)
    assert report.nearest_wrong(tmp_path / "X.jsonl", "q0") == "a"
    assert report.nearest_wrong(tmp_path / "X.jsonl", "q1") == "b"


@pytest.mark.parametrize("command", ["mini", "studies"])
def test_flags_of_another_command_are_refused(command):
    main = importlib.import_module(f"{command}.__main__").main
    wrong = {
        "mini": [["render", "--check"], ["--seed", "7"]],
        "studies": [["ablate", "--synth", "a", "b"], ["report", "--synth", "a"]],
    }
    for argv in wrong[command]:
        with pytest.raises(ValueError, match=argv[-2] if argv[-1] == "7" else "belongs|takes"):
            main(argv)
