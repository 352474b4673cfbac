"""train.py: ranks against one process, frozen weights, damaged clips, mining, the schedule."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


import data  # noqa: E402
import train  # noqa: E402


def run(*command, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        timeout=300,
    )


def flags_for(tiny, mixture, out, *more):
    return [
        "--base",
        tiny,
        "--prober",
        "",
        "--data",
        mixture.parent,
        "--mixture",
        mixture,
        "--out",
        out,
        *"--workers 0 --features".split(),
        Path(mixture).parent / "features",
        *"--log-every 1 --epochs 3 --dropout 0.1".split(),
        *more,
    ]


def record(out):
    """Run train.main and keep each step's summed loss and the gradients that the optimiser sees."""
    seen, sum_over_ranks = {"loss": [], "grad": []}, train.sum_over_ranks

    def spy_sums(parameters, sums):
        fate = os.environ.get(
            "FATE", "never never never"
        ).split()  # signal, rank, step at which this process gets it
        if fate[1:] == [os.environ.get("RANK", "0"), str(len(seen["loss"]))]:
            os.kill(os.getpid(), int(fate[0]))
        summed = sum_over_ranks(parameters, sums)
        seen["loss"].append(torch.tensor(summed["loss"], dtype=torch.float64))
        seen["grad"].append(torch.cat([p.grad.flatten() for p in parameters]).double())
        return summed

    def slow_load(video, frames, load=data.load_video):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return load(video, frames)

    train.sum_over_ranks, data.load_video = spy_sums, slow_load
    train.install_signal_handlers()
    train.main(train.parse_flags(train.Flags, sys.argv[2:], presets=train.PRESETS))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save({k: torch.stack(v) for k, v in seen.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def one_and_many(tiny, mixture, tmp_path_factory):
    """The same float64 run on 1, 2 and 3 ranks: 9 steps, batches of 4, 3 and 1 rows, no dropout."""
    folder, seen = tmp_path_factory.mktemp("ranks"), {}
    for world, cached in ((1, False), (3, False), (1, True), (2, True), (3, True)):
        out = folder / f"{world}-{cached}"
        more = flags_for(
            tiny,
            mixture,
            out,
            *"--dtype float64 --dropout 0 --steps 9 --schedule uniform --lr 0.01".split(),
            *(("--grad-cache", "--micro-batch", "3", "--micro-tokens", "170") if cached else ()),
        )
        done = run(*launch(world), __file__, folder / f"{out}.pt", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[world, cached] = torch.load(folder / f"{out}.pt") | {
            "log": [json.loads(x) for x in open(out / "log.jsonl")]
        }
    return seen


def launch(world):
    return (
        []
        if world == 1
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]
    )


@pytest.mark.parametrize(("world", "cached"), [(3, False), (1, True), (2, True), (3, True)])
def test_ranks_and_grad_cache_give_the_loss_and_gradients_of_one_process(
    one_and_many, world, cached
):
    one, many = one_and_many[1, False], one_and_many[world, cached]
    sizes = {len(x["grad"]) for x in (one, many)}
    assert sizes == {9} and one["loss"].abs().min() >= 0 and (one["loss"] > 0.1).sum() >= 5
    for name in ("loss", "grad"):
        scale = (
            one[name].abs().amax(-1, keepdim=True)
            if name == "grad"
            else one[name].abs().clamp(min=1e-3)
        )
        error = ((one[name] - many[name]).abs() / scale.clamp(min=1e-12)).max()
        assert error < 1e-9, f"{name}: relative error {error:.2e} on {world} ranks"


def test_the_run_held_the_uneven_cases(one_and_many):
    steps = [x for x in one_and_many[1, False]["log"] if x["event"] == "step"]
    assert {x["source"] for x in steps} == {"t2v", "ti2v", "t2t"}
    sizes = [
        b
        for x in one_and_many[1, False]["log"]
        if x["event"] == "end"
        for b in x["passes"].values()
    ]
    assert max(sizes) > 1  # some source was exhausted: its short last batch was drawn
    rows = {(x["source"], x["rows"]) for x in steps}
    assert ("ti2v", 1) in rows and ("t2v", 3) in rows, (
        rows
    )  # fewer rows than ranks, and hard negatives in a short batch


def go(*words):
    """Run the command in this process: a new import of torch for each case would take minutes."""
    return train.main(train.parse_flags(train.Flags, list(map(str, words)), presets=train.PRESETS))


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_the_same_run_twice_is_bit_identical_with_dropout(tiny, mixture, tmp_path):
    for name in "ab":
        go(*flags_for(tiny, mixture, tmp_path / name, "--steps", "4", "--schedule", "uniform"))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    other = tmp_path / "c"
    go(*flags_for(tiny, mixture, other, "--steps", "4", "--schedule", "uniform", "--dropout", "0"))
    assert any(not torch.equal(a[k], v) for k, v in weights(other).items())  # dropout was at work


def test_grad_cache_replays_dropout(tiny, mixture, tmp_path):
    same = (*"--dtype float64 --steps 4 --schedule uniform --micro-batch 2 --dropout 0.3".split(),)
    for name, more in (
        ("kept", ()),
        ("cached", ("--grad-cache",)),
        ("whole", ("--micro-batch", "64")),
    ):
        go(*flags_for(tiny, mixture, tmp_path / name, *same, *more))
    kept, cached, whole = (weights(tmp_path / name) for name in ("kept", "cached", "whole"))
    assert all((kept[k] - cached[k]).abs().max() <= 1e-9 * kept[k].abs().max() for k in kept)
    assert any(
        (kept[k] - whole[k]).abs().max() > 1e-3 * kept[k].abs().max() for k in kept
    )  # other micro-batches, other masks


def steps_of(out):
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return [(r["step"], r["loss"], r["lr"], r["source"]) for r in rows if r["event"] == "step"]


def test_only_lora_moves_and_in_bfloat16_at_3e_5_every_lora_tensor_does(tiny, mixture, tmp_path):
    start = train.GVE.from_pretrained(tiny, dtype="bfloat16").state_dict()
    torch.manual_seed(42)
    fresh = {
        n: p.detach().clone()
        for n, p in train.GVE.from_pretrained(tiny, dtype="bfloat16", lora={"lora_dropout": 0.1})
        .lora_parameters()
        .items()
    }
    gve = go(
        *flags_for(
            tiny,
            mixture,
            tmp_path,
            *"--dtype bfloat16 --lr 3e-5 --steps 3 --warmup 0".split(),
        )
    )
    frozen = {
        n.removeprefix("backbone.base_model.model.").replace(".base_layer", ""): p
        for n, p in gve.named_parameters()
        if ".lora_" not in n
    }
    assert len(frozen) == len(start)
    for name, tensor in frozen.items():
        assert torch.equal(tensor, start["backbone." + name.removeprefix("backbone.")]), name
    moved = gve.lora_parameters()
    assert moved.keys() == fresh.keys() and all(p.dtype == torch.float32 for p in moved.values())
    still = [n for n in moved if torch.equal(moved[n], fresh[n])]
    assert not still, still


@pytest.mark.parametrize(
    "words, message",
    [
        (["--frames", "7"], "even"),
        (["--preset", "gve-3b", "--data", "nowhere"], "MSMARCO.*nowhere/msmarco.jsonl"),
        (["--data", "nowhere", "--mixture", ""], "python -m mini render"),
        (["--base", "nowhere/at/all"], "nowhere/at/all"),
        (["--prober", "nowhere/at/all"], "nowhere/at/all"),
        (["--mixture", "twice"], "share a name: .'t2v', 'ti2v', 't2t'.$"),
    ],
)
def test_wrong_values_are_named(tiny, mixture, tmp_path, words, message):
    words = ["--mixture", mixture, mixture] if words[-1] == "twice" else words
    with pytest.raises(ValueError, match=message):
        go(*([] if "--data" in words else flags_for(tiny, mixture, tmp_path)), *words)


def test_the_command_ends_with_one_line_for_a_wrong_flag_or_value():
    done = run("train.py", "--lr-rate", "1")
    assert (
        done.returncode == 2
        and "unrecognized arguments: --lr-rate" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = run("train.py", "--data", "nowhere", "--mixture", "nowhere/m.json")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: nowhere/m.json: no such mixture"
    )


def test_damaged_clips_spread_over_the_sources_cost_what_replacing_their_rows_by_hand_would(
    tiny, media, tmp_path
):
    words, damaged = (
        ("ball", "cube", "ring", "star"),
        {"text": [3, 31], "image": [18, 19], "clip": [7, 39]},
    )  # 5 % of 120 rows
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        mixture = []
        for source, gone in damaged.items():
            rows = []
            for i in range(40):
                clip, text = (
                    {"path": str(media / f"{'abcd'[i % 4]}.mp4"), "start": 0.04 * i},
                    f"{words[i % 4]} {i}",
                )
                query = (
                    {"text": text, "image": str(media / "i.png")}
                    if source == "image"
                    else {"text": text}
                )
                rows.append(
                    {
                        "query": {"video": clip} if source == "clip" else query,
                        "positive": {"video": clip},
                    }
                )
            if name == "bad":
                for i in gone:
                    (tmp_path / "bad" / f"{source}{i}.mp4").write_bytes(
                        (media / "a.mp4").read_bytes()[:700]
                    )
                    rows[i]["positive"] = {"video": f"{source}{i}.mp4"}
            else:  # the next usable row of the file, the first one after the last
                rows = [
                    next(rows[j % 40] for j in range(i, 80) if j % 40 not in gone)
                    for i in range(40)
                ]
            (tmp_path / name / f"{source}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
            task = {"text": "T2V", "image": "TI2V", "clip": "V2V"}[source]
            mixture.append(
                {"name": source, "task": task, "path": f"{source}.jsonl", "batch_size": 8}
            )
        (tmp_path / name / "mixture.json").write_text(json.dumps(mixture))

    def flags(name):
        return flags_for(
            tiny,
            tmp_path / name / "mixture.json",
            tmp_path / name / "out",
            "--root",
            media,
            *"--steps 18 --seed 43 --schedule uniform".split(),
            *"--dtype float64 --dropout 0 --lr 0.01".split(),
        )

    go(*flags("good"))
    two = run(*launch(2), "train.py", *flags("bad"))  # every rank knows the rule
    assert two.returncode == 0 and "6 unusable rows replaced" in two.stdout, two.stderr[-2000:]
    losses = [
        np.array([x[1] for x in steps_of(tmp_path / name / "out")]) for name in ("bad", "good")
    ]
    assert (
        len(losses[0]) == 18 and np.abs(losses[0] - losses[1]).max() <= 1e-6 * losses[1].max()
    )  # the log has six digits
    end = [json.loads(x) for x in open(tmp_path / "bad" / "out" / "log.jsonl")][-1]
    assert min(end["passes"].values()) >= 1  # every row was met
    listed = sorted(
        (re.search(r"(\w+\.jsonl:\d+): ", x)[1], re.search(r"(\w+\.mp4): ", x)[1])
        for x in end["bad_rows"]
    )
    assert listed == sorted(
        (f"{s}.jsonl:{i + 1}", f"{s}{i}.mp4") for s, gone in damaged.items() for i in gone
    )


def test_clips_that_crash_or_hang_their_decoder_are_replaced_as_well(
    tiny, media, tmp_path, monkeypatch
):
    clips = [{"path": str(media / f"{'abcd'[i % 4]}.mp4"), "start": i / 10} for i in range(12)]
    rows = [
        {"query": {"text": f"number {i}"}, "positive": {"video": clip}}
        for i, clip in enumerate(clips)
    ]
    for name in ("crash", "hang"):
        shutil.copy(media / "a.mp4", tmp_path / f"{name}.mp4")
    bad = {3: "crash.mp4", 7: "hang.mp4", 8: "hang.mp4"}
    load, losses = data.load_video, {}

    def harmful(video, frames):
        if "crash.mp4" in str(video):
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang.mp4" in str(video):
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
        return load(video, frames)

    monkeypatch.setattr(data, "load_video", harmful)
    monkeypatch.setitem(train.TrainLoader.__init__.__kwdefaults__, "seconds", 3)
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        lines = [
            {**row, "positive": {"video": str(tmp_path / bad[i])}} if i in bad else row
            for i, row in enumerate(rows)
        ]
        if name == "good":
            lines = [next(rows[j] for j in range(i, 12) if j not in bad) for i in range(12)]
        (tmp_path / name / "rows.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        source = {"name": "t2v", "task": "T2V", "path": "rows.jsonl", "batch_size": 6}
        (tmp_path / name / "mixture.json").write_text(json.dumps([source]))
        out = tmp_path / name / "out"
        go(
            *flags_for(
                tiny,
                tmp_path / name / "mixture.json",
                out,
                "--root",
                media,
                tmp_path,
                *"--steps 3 --epochs 1 --schedule uniform --workers 2 --features".split(),
                "",
            )
        )
        losses[name] = [step[1] for step in steps_of(out)]
    assert losses["bad"] == losses["good"] and len(losses["good"]) == 3
    end = [json.loads(x) for x in open(tmp_path / "bad" / "out" / "log.jsonl")][-1]
    reasons = sorted(re.search(r"rows.jsonl:(\d+): (.*)", x).groups() for x in end["bad_rows"])
    assert reasons == [
        ("4", "its decoder crashed"),
        ("8", "not decoded within 3 s"),
        ("9", "not decoded within 3 s"),
    ]


def mined(out):
    return [json.loads(line) for path in sorted(out.glob("mined-*.jsonl")) for line in open(path)]


def test_hard_negatives_are_mined_again_under_the_prober(tiny, media, mixture, tmp_path):
    flags = flags_for(
        tiny,
        mixture,
        tmp_path / "one",
        *"--steps 9 --epochs 1 --schedule uniform --remine".split(),
    )
    go(*flags, "--margin", "-1")
    t2v, *others = mined(tmp_path / "one")
    assert others == [{}, {}] and len(t2v) == 7  # only this source has hard negatives
    gve, rows = (
        train.GVE.from_pretrained(tiny),
        [json.loads(line) for line in open(media / "t2v.jsonl")],
    )
    q = gve.embed([row["query"] for row in rows], "Find it.")
    clips = {
        name: gve.embed([{"video": str(media / name)}])[0]
        for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4")
    }
    for i, row in enumerate(rows):
        own = row["positive"]["video"]
        best = max(
            (name for name in clips if name != own), key=lambda name: float(q[i] @ clips[name])
        )
        assert [Path(item["video"]).name for item in t2v[str(i)]] == [best]
    assert any(
        Path(t2v[str(i)][0]["video"]).name != row["negatives"][0]["video"]
        for i, row in enumerate(rows)
    )
    source = train.load_mixture(mixture)[0]
    source.mined = {0: [{"video": str(media / "d.mp4")}]}
    names = [[Path(item["video"]).name for item in source.load(i, [media])[1:]] for i in (0, 1)]
    assert names == [
        ["a.mp4", "d.mp4"],
        ["b.mp4", "c.mp4"],
    ]  # mined ones come first, the file's where there are none
    above = [
        {
            name: float(q[i] @ (clip - clips[row["positive"]["video"]]))
            for name, clip in clips.items()
        }
        for i, row in enumerate(rows)
    ]
    i = max(
        range(7), key=lambda i: sorted(above[i].values())[-2]
    )  # two clips score above its positive
    best, second = sorted(above[i], key=above[i].get)[:-3:-1]
    assert above[i][second] > 0
    middle = train.parse_flags(
        train.Flags, [*map(str, flags), f"--margin={(above[i][best] + above[i][second]) / 2}"]
    )
    assert (
        Path(train.mine_source(gve, source, range(7), middle)[i][0]["video"]).name == second
    )  # the best one is false now
    source.negatives = 3  # of seven rows, whose positives are four clips
    whole = train.mine_source(
        gve, source, range(7), train.parse_flags(train.Flags, [*map(str, flags), "--margin=-1"])
    )
    for i, row in enumerate(rows):
        order = sorted(clips, key=lambda name: -float(q[i] @ clips[name]))
        order.remove(row["positive"]["video"])
        assert [Path(item["video"]).name for item in whole[i]] == order
    gve.embed = gve.forward = lambda *a, **k: torch.full(
        (len(a[0]["input_ids"]), gve.dim), torch.nan
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        train.mine_source(gve, source, range(7), middle)


def test_mining_is_the_same_on_two_ranks_and_after_a_stop(tiny, mixture, tmp_path):
    same = (
        *"--steps 6 --epochs 2 --schedule uniform --remine --dtype float64 --dropout 0".split(),
    )
    go(*flags_for(tiny, mixture, tmp_path / "one", *same))
    two = run(
        *launch(2),
        __file__,
        tmp_path / "two.pt",
        *flags_for(tiny, mixture, tmp_path / "two", *same),
    )
    assert two.returncode == 0 and mined(tmp_path / "one") == mined(tmp_path / "two"), two.stderr[
        -2000:
    ]
    stopped = flags_for(tiny, mixture, tmp_path / "stopped", *same)
    assert (
        run(__file__, tmp_path / "stopped.pt", *stopped, FATE="15 0 3").returncode == 128 + 15
    )  # in the second epoch
    go(*stopped, "--resume", "auto")
    ours, expected = weights(tmp_path / "stopped"), weights(tmp_path / "one")
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


def test_a_dry_run_prints_its_memory_and_writes_nothing(tiny, mixture, tmp_path, capsys):
    for more in ((), ("--grad-cache",)):
        go(
            *flags_for(
                tiny,
                mixture,
                tmp_path / "out",
                *"--dry-run --max-length 300 --max-tokens 20 --micro-tokens 1000".split(),
                *more,
            )
        )
        printed = re.findall(
            r"(\d+ \w+ of \d+) tokens in a forward: \d+\.\d\d GiB", capsys.readouterr().out
        )
        assert printed == [
            "7 videos of 140",
            "3 texts of 300",
        ]  # 4 grids of 4 x 5 tokens and 60 of prompt; 1,000 at most
    assert not list(tmp_path.iterdir())


def test_log_and_checkpoint_hold_what_the_record_needs(one_and_many):
    log = one_and_many[1, False]["log"]
    assert [x["event"] for x in log] == ["start"] + (["epoch"] + ["step"] * 3) * 3 + ["end"]
    curves = {
        "loss",
        "score",
        "positive",
        "gap",
        "lr",
        "grad_norm",
        "items_per_s",
        "waiting",
        "memory_gib",
        "tflops",
        "rows",
    }
    assert all(curves <= x.keys() and x["tflops"] > 0 for x in log if x["event"] == "step")
    epochs = [x for x in log if x["event"] == "epoch"]
    assert [x["sigma"] for x in epochs] == [0.1, 0.55, 1.0]
    assert all(
        abs(sum(x["P"].values()) - 1) < 1e-3 and abs(sum(x["level_P"].values()) - 1) < 1e-3
        for x in epochs
    )


def test_the_log_has_each_line_s_own_flops_whatever_the_ranks_and_grad_cache(one_and_many):
    runs = [
        (n, [x for x in one_and_many[n, cached]["log"] if x["event"] == "step"])
        for n, cached in sorted(one_and_many)
    ]
    first, *others = (
        [n * x["tflops"] * x["rows"] / x["items_per_s"] for x in steps] for n, steps in runs
    )
    assert all(
        other == pytest.approx(others[0], rel=1e-4) for other in others
    )  # neither GradCache nor ranks need more
    assert others[0] != sorted(others[0])  # a line's own steps, not all so far
    # The first run alone has seen the clips: their features were kept.
    assert sum(first) > 1.03 * sum(others[0])


def test_sampler_draws_each_row_once_per_pass_and_is_restored_by_replay(mixture):
    sources = train.load_mixture(mixture)
    sampler = train.Sampler(sources, seed=1)
    drawn = [sampler.draw(step, [0.5, 0.3, 0.2]) for step in range(60)]
    for k, source in enumerate(sources):
        rows = np.concatenate([r for i, r in drawn if i == k])
        n = len(source)
        passes = [rows[i : i + n] for i in range(0, len(rows) - n + 1, n)]
        assert len(passes) >= 2 and all(sorted(p) == list(range(n)) for p in passes)
        assert (passes[0] != passes[1]).any()  # reshuffled
    again = train.Sampler(sources, seed=1)
    for step in range(40):
        again.draw(step, [0.5, 0.3, 0.2])
    rest = [again.draw(step, [0.5, 0.3, 0.2]) for step in range(40, 60)]
    assert all(a[0] == b[0] and (a[1] == b[1]).all() for a, b in zip(drawn[40:], rest, strict=True))
    first = [train.Sampler(sources, seed=seed).draw(0, [1, 0, 0])[1].tolist() for seed in range(5)]
    assert len(set(map(tuple, first))) > 1  # the seed matters


# PAPER.md section 6 [CALC]: P for R = .3 / .5 / .7.
@pytest.mark.parametrize(
    "sigma_t, expected",
    [(0.1, [0.02, 0.12, 0.87]), (0.55, [0.22, 0.32, 0.46]), (1.0, [0.27, 0.33, 0.40])],
)
def test_source_probabilities_of_the_paper(sigma_t, expected):
    p = train.source_probabilities("pyramid", [0.3, 0.5, 0.7], sigma_t, [1, 1, 1], [1, 2, 3])
    assert np.abs(p - expected).max() < 0.006 and abs(p.sum() - 1) < 1e-12


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'pyramyd'.*pyramid, proportional, uniform, staged"):
        train.source_probabilities("pyramyd", [0.3, 0.5], 0.1, [1, 1], [1, 2])


def test_an_epoch_draws_by_relevance_alone_whatever_the_sizes():
    """Two sources of unequal size and equal relevance are drawn equally often: 200 times each."""

    class Rows:
        batch_size = 2

        def __init__(self, samples):
            self.samples = samples

        def __len__(self):
            return self.samples

    sampler = train.Sampler([Rows(10), Rows(1000)], seed=3)
    p = train.source_probabilities("pyramid", [0.4, 0.4], 0.1, [10, 1000], [1, 2])
    plan, share = train.draw_epoch(sampler, dict.fromkeys(range(400), p))
    small = sum(k == 0 for k, _ in plan)
    assert share.tolist() == pytest.approx([0.5, 0.5]) and abs(small - 200) < 4 * 10  # 4 deviations
    assert sampler.passes()[0] == small * 2 / 10
    again, _ = train.draw_epoch(
        train.Sampler([Rows(10), Rows(1000)], seed=3), dict.fromkeys(range(400), p)
    )
    assert all(a == b and (x == y).all() for (a, x), (b, y) in zip(plan, again, strict=True))


def test_sigma_and_the_other_schedules():
    assert [train.sigma(t, 3) for t in range(3)] == pytest.approx([0.1, 0.55, 1.0]) and train.sigma(
        0, 1
    ) == 0.1
    sizes, levels = [100, 300, 400, 200], [1, 1, 3, 4]
    assert train.source_probabilities(
        "proportional", None, 1, sizes, levels
    ).tolist() == pytest.approx([0.1, 0.3, 0.4, 0.2])
    assert train.source_probabilities("uniform", None, 1, sizes, levels).tolist() == [0.25] * 4
    times = (0.0, 0.39, 0.4, 0.79, 0.8, 0.999)
    staged = [
        train.source_probabilities("staged", None, 1, sizes, levels, t).tolist() for t in times
    ]
    assert staged[0] == staged[1] == pytest.approx([0.25, 0.75, 0, 0]) and staged[2] == staged[
        3
    ] == [0, 0, 1, 0]
    assert staged[4] == staged[5] == [0, 0, 0, 1]


def test_help_shows_the_defaults_of_the_preset(capsys):
    def shown(*words):
        with pytest.raises(SystemExit):
            train.parse_flags(train.Flags, [*words, "--help"], presets=train.PRESETS)
        return " ".join(capsys.readouterr().out.split())

    large = shown("--preset", "gve-3b")
    for wanted in (
        "(default Qwen/Qwen2.5-VL-3B-Instruct)",
        "cosine to zero (default 3e-05)",
        "(default mixtures/gve-3b.json)",
        "samples / global batch) (default 0)",
    ):
        assert wanted in large, wanted
    assert "samples / global batch) (default 640)" in shown()


def test_presets_hold_table_9():
    for name in ("gve-3b", "gve-7b"):
        flags = train.parse_flags(train.Flags, ["--preset", name], presets=train.PRESETS)
        assert (flags.lr, flags.weight_decay, flags.epochs, flags.temperature, flags.seed) == (
            3e-5,
            0.1,
            3,
            0.03,
            42,
        )
        assert (flags.dtype, flags.checkpointing, flags.frames, flags.dropout) == (
            "bfloat16",
            True,
            8,
            0.1,
        )
        assert flags.batch_scale == 32


def test_learning_rate_rises_then_falls_as_a_cosine():
    rates = [train.learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert (
        rates[9] == 1.0
        and rates[0] == pytest.approx(0.1)
        and rates[55] == pytest.approx(0.5)
        and rates[-1] < 1e-3
    )
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
