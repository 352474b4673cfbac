"""The instruments of the mini world: rankers that should fail, studies, and the reports on them."""

import dataclasses
import importlib
import math
import random
import re
import shutil
import statistics

import numpy as np
import pytest
import torch
from conftest import write_mixture

import data
import model
from data import content_id, load_mixture
from mini import world
from model import GVE
from studies import ablate, curriculum, report, study
from support.files import load_jsonl, write_jsonl


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


def test_losses_are_averaged_over_tenths_of_a_run():
    steps = [{"source": "ab"[i % 2], "loss": float(i)} for i in range(40)]
    steps[39]["source"] = "a"
    means = curriculum.mean_losses(steps)
    assert means["a"] == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37.6667]
    assert means["b"] == [2, 6, 10, 14, 18, 22, 26, 30, 34, 37]
    few = curriculum.mean_losses(steps[:5])  # fewer steps than tenths
    assert few["b"] == [None, None, 1, None, None, None, 3, None, None, None]


@pytest.mark.slow
def test_a_run_s_line_holds_its_model_at_every_point(tiny, media, tmp_path, monkeypatch):
    """The states along the way, scored as eval.py and a sum by hand would."""
    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(curriculum, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setattr(curriculum, "HELD_OUT", tmp_path / "held-out")
    mixture = write_mixture(media)
    shutil.copytree(media, tmp_path / "held-out/train")
    shutil.copy(mixture, tmp_path / "held-out/train/mixture.json")
    flags = (
        f"--base {tiny} --prober {tiny} --data {media} --mixture {mixture} --features= --steps 6 "
        "--lr 0.005 --save-every 1 --keep 99 --log-every 1"
    )
    monkeypatch.setattr(curriculum, "DATA", {"tour": flags})

    seen = []  # (step, sum of the LoRA weights) where eval.py would score a checkpoint

    def score(gve, run, step):
        curriculum.restore(gve, run, step)
        weights = [float(w.detach().double().sum()) for w in gve.lora_parameters().values()]
        seen.append((step, sum(weights)))
        return {"AVG-D": step / 10}

    monkeypatch.setattr(curriculum, "score_state", score)
    curriculum.measure_run("pyramid", 5)
    (line,) = load_jsonl(curriculum.RECORD)
    assert (line["variant"], line["seed"]) == ("pyramid", 5)
    assert list(line["scores"]) == ["2", "4", "6"]
    assert len({weights for _, weights in seen}) == 3

    # The last state is the checkpoint itself.
    run = study.Variant(f"{flags} --schedule pyramid").folder(5)
    gve = GVE.from_pretrained(str(run), lora=True).eval()
    weights = [float(w.detach().double().sum()) for w in gve.lora_parameters().values()]
    assert seen[-1] == (6, pytest.approx(sum(weights)))
    assert not (run / "state").exists()

    # Of the end, by hand
    held_out = load_mixture(tmp_path / "held-out/train/mixture.json")
    assert set(line["held_out"]) <= {source.name for source in held_out}
    for source in held_out:
        if source.name not in line["held_out"]:
            continue
        right = 0
        pairs = [source.load(row, [str(tmp_path / "held-out")])[:2] for row in range(len(source))]
        q = gve.embed([query for query, _ in pairs], source.instruction)
        p = gve.embed([positive for _, positive in pairs])
        for i, (_, positive) in enumerate(pairs):
            best = int((p @ q[i]).argmax())
            right += content_id(pairs[best][1]) == content_id(positive)
        assert line["held_out"][source.name]["end"] == pytest.approx(right / len(pairs), abs=1e-4)


def record_line(variant, seed, score):
    scores = {step: results(score - late) for step, late in (("2", 0.2), ("4", 0.1), ("6", 0.0))}
    held_out = {"a": {"step": 3, "then": 0.5, "end": 0.5 - score / 10}}
    losses = {"a": [1.0] * 5 + [None] * 5}
    return {
        "variant": variant,
        "seed": seed,
        "scores": scores,
        "losses": losses,
        "held_out": held_out,
    }


def test_the_tables_pair_the_seeds_that_all_variants_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curriculum, "RECORD", tmp_path / "record.jsonl")
    names = [name for name, (data, _) in curriculum.VARIANTS.items() if data == "tour"]
    lines = [record_line(names[0], 9, 0.9)]  # a seed that the others lack
    for seed, luck in ((5, 0.00), (6, 0.04)):
        for i, name in enumerate(names):
            lines.append(record_line(name, seed, 0.4 + 0.01 * i + luck * (1 + i % 2)))
    lines[-1]["held_out"]["b"] = {"step": 6, "then": 0.25, "end": 0.75}  # others never drew it
    write_jsonl(curriculum.RECORD, lines[:1])
    curriculum.run_study(only_table=True)  # nothing to compare yet
    assert "no variant has two runs yet" in capsys.readouterr().out
    assert not (tmp_path / "record.png").exists()

    write_jsonl(curriculum.RECORD, lines)
    curriculum.run_study(only_table=True)
    printed = capsys.readouterr().out
    assert "Data of tour: 2 seeds" in printed and "Data of chain: 0 seeds" in printed

    # The second variant: .41 and .49, less .40 and .44; with two pairs t = 12.706.
    half = 12.7062 * statistics.stdev([0.01, 0.05]) / math.sqrt(2)
    assert f"| {names[1]} | 0.250 (+0.030 ± {half:.3f})" in printed
    # And the difference seen with power .8: (t(.975) + t(.8)) sd / sqrt(2)
    seen = (12.7062 + 1.37638) * statistics.stdev([0.01, 0.05]) / math.sqrt(2)
    assert f"* {names[1]}: {seen:.3f}" in printed
    *others, last = re.findall(r"\| (\S+(?: \+0.500)?) \| -?\+?[0-9.-]+ ± ", printed)
    assert (others, last) == (["-"] * (len(names) - 1), "0.25 +0.500")
    assert (tmp_path / "record.png").stat().st_size > 10_000


def test_runs_in_the_record_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(curriculum, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setattr(curriculum, "SEEDS", range(5, 7))
    first, second = list(curriculum.VARIANTS)[:2]
    lines = [record_line(name, 5, 0.4) for name in curriculum.VARIANTS if name != second]
    write_jsonl(curriculum.RECORD, lines)
    commands = []
    monkeypatch.setattr(study, "run_logged", lambda command, log: commands.append(command))
    curriculum.run_missing()
    assert f"python -m studies.curriculum 5 {second}" in commands
    assert f"python -m studies.curriculum 5 {first}" not in commands
    assert len(commands) == 1 + len(curriculum.VARIANTS)


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
