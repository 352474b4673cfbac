"""support/checkpoint.py, and every way a run may stop (signals, a dead rank, NaN) and resume."""

import contextlib
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
from test_train import ROOT, flags_for, go, launch, run, steps_of, weights

import train
from extras import pyramid

RECORD = Path(__file__).with_name(
    "test_train.py"
)  # run as a script it is train.py, and a rank may be dealt a fate


@pytest.fixture(scope="module")
def uninterrupted(tiny, mixture, tmp_path_factory):
    """A run of 9 steps over 3 epochs on 2 ranks, pyramid and dropout on -> (out, flags(out))."""
    out = tmp_path_factory.mktemp("whole") / "run"

    def flags(out):
        return flags_for(
            tiny,
            mixture,
            out,
            *"--steps 9 --probe-pairs 4 --save-every 2 --lr 0.01".split(),
        )

    done = run(*launch(2), RECORD, out.parent / "seen.pt", *flags(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps_of(out)) == 9
    return out, flags


def resumes(uninterrupted, out, fate):
    """Run with a signal, check the end, resume, and compare with the run without a signal."""
    whole, flags = uninterrupted
    began = time.time()
    done = run(*launch(2), RECORD, out.parent / "seen.pt", *flags(out), FATE=fate)
    assert done.returncode != 0 and time.time() - began < 60
    assert not (out / "state" / "step-00000009").exists()
    again = run(*launch(2), RECORD, out.parent / "seen.pt", *flags(out), "--resume", "auto")
    assert again.returncode == 0, again.stderr[-9000:]
    ours, expected = weights(out), weights(whole)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)
    assert steps_of(out) == steps_of(whole)
    events = [json.loads(line)["event"] for line in open(out / "log.jsonl")]
    assert events.count("epoch") == 3 and events.count("resume") == 1 and events.count("start") == 1
    return done


def test_a_killed_rank_ends_the_job_and_the_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    done = resumes(uninterrupted, tmp_path / "run", "9 1 5")
    assert "SIGKILL" in done.stderr


def test_one_of_three_ranks_dies_and_the_others_end_within_a_minute_over_a_checkpoint_that_loads(
    tiny, mixture, tmp_path
):
    flags = flags_for(
        tiny,
        mixture,
        tmp_path / "run",
        *"--steps 9 --schedule uniform --save-every 1".split(),
    )
    began = time.time()
    done = run(*launch(3), RECORD, tmp_path / "seen.pt", *flags, FATE="9 2 4")
    assert (
        done.returncode != 0 and "exitcode  : -9" in done.stderr and time.time() - began < 60
    )  # from the start, even
    gve = train.GVE.from_pretrained(tmp_path / "run")
    assert gve.info["step"] == 4 and gve.embed([{"text": "a red ball"}]).norm() == pytest.approx(1)
    saved = load_file(tmp_path / "run" / "state" / "step-00000004" / "tensors.safetensors")
    assert all(
        torch.equal(p, saved[f"{i}.weight"])
        for i, p in enumerate(
            train.GVE.from_pretrained(tmp_path / "run", lora=True).lora_parameters().values()
        )
    )


def start(command, out, step, **env):
    """Start torchrun and wait until the log of `out` holds that step."""
    job = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )
    log = out / "log.jsonl"
    while job.poll() is None and not (log.is_file() and f'"step": {step},' in log.read_text()):
        time.sleep(0.01)
    return job


@pytest.mark.slow
def test_sigterm_to_torchrun_finishes_the_step_with_its_clips_and_resumes_bit_for_bit(
    tiny, mixture, tmp_path
):
    def command(name):
        return [
            *launch(2),
            RECORD,
            tmp_path / "seen.pt",
            *flags_for(
                tiny,
                mixture,
                tmp_path / name,
                *"--steps 12 --epochs 1 --schedule uniform --workers 1 --features".split(),
                "",
                *"--resume auto".split(),
            ),
        ]

    assert run(*command("whole")).returncode == 0
    job = start(
        command("stopped"), tmp_path / "stopped", 5, SLOW="0.5"
    )  # the next step waits for its clips then
    job.terminate()  # torchrun passes it on to the ranks' whole process groups
    said = job.communicate(timeout=60)[0]
    assert (
        job.returncode != 0
        and "crashed" not in said
        and re.search(r"stopped after step \d+ as asked", said)
    ), said[-3000:]
    assert len(steps_of(tmp_path / "stopped")) < 12
    assert run(*command("stopped")).returncode == 0
    ours, expected = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
    assert steps_of(tmp_path / "stopped") == steps_of(tmp_path / "whole")


def kill(job):
    """Kill torchrun and its ranks at once."""
    ranks = subprocess.run(
        ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in (job.pid, *map(int, ranks)):  # ranks have sessions of their own and outlive torchrun
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate()
    return job.returncode


@pytest.mark.slow
def test_killed_outright_at_ten_random_moments_two_ranks_end_as_if_nothing_had_been(
    tiny, mixture, tmp_path
):
    def command(name):
        return [
            *launch(2),
            "train.py",
            *flags_for(
                tiny,
                mixture,
                tmp_path / name,
                *"--steps 30 --probe-pairs 4 --save-every 1 --lr 0.01 --resume auto".split(),
            ),
        ]

    assert run(*command("whole")).returncode == 0
    rng, out = np.random.default_rng(0), tmp_path / "killed"
    for step in sorted(rng.choice(np.arange(1, 30), 10, replace=False)):
        job = start(command("killed"), out, step)
        time.sleep(rng.uniform(0, 0.2))
        assert kill(job) == -signal.SIGKILL
    assert run(*command("killed")).returncode == 0
    ours, expected = weights(out), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours)
    assert steps_of(out) == steps_of(tmp_path / "whole") and len(steps_of(out)) == 30
    events = [json.loads(line)["event"] for line in open(out / "log.jsonl")]
    assert events.count("epoch") == 3 and events.count("start") == 1
    assert (
        1 <= events.count("resume") <= 10
    )  # what a killed run wrote after its last state is cut off, this line included


def test_sigterm_finishes_the_step_and_saves(tiny, mixture, tmp_path):
    flags = flags_for(tiny, mixture, tmp_path / "a", "--steps", "6", "--schedule", "uniform")
    done = run(RECORD, tmp_path / "seen.pt", *flags, FATE="15 0 3")
    assert done.returncode == 128 + 15 and "stopped after step 5" in done.stdout + done.stderr
    again = go(*flags, "--resume", "auto")
    straight = go(
        *flags_for(tiny, mixture, tmp_path / "b", "--steps", "6", "--schedule", "uniform")
    )
    for (name, a), b in zip(
        again.lora_parameters().items(), straight.lora_parameters().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert [s[0] for s in steps_of(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_other_settings_is_an_error_and_an_unfinished_state_is_not_loaded(
    tiny, mixture, tmp_path
):
    flags = flags_for(
        tiny,
        mixture,
        tmp_path,
        *"--steps 4 --schedule uniform --save-every 1 --keep 2".split(),
    )
    go(*flags)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    before = weights(tmp_path)
    (tmp_path / "state" / "part").mkdir()
    (tmp_path / "state" / "part" / "facts.json").write_text("{")
    go(*flags, "--resume", "auto")  # nothing left to do
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path).items())
    with pytest.raises(ValueError, match="cannot resume with other settings.*'seed': .42, 7."):
        go(*flags, "--resume", "auto", "--seed", "7")
    shutil.copytree(tiny, tmp_path / "wide")
    with pytest.raises(ValueError, match="cannot resume with other settings.*'base'"):
        go(*flags, "--resume", "auto", "--base", str(tmp_path / "wide"))
    newest = tmp_path / "state" / "step-00000004"
    for name in ("tensors.safetensors", "facts.json"):
        (newest / name).write_bytes((newest / name).read_bytes()[:60])
        with pytest.raises(ValueError, match=f"step-00000004/{name}: damaged .* remove"):
            go(*flags, "--resume", "auto")
    shutil.rmtree(newest)
    go(*flags, "--resume", "auto")
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path).items())


def test_a_flag_that_was_renamed_or_added_since_the_state_is_named(tiny, mixture, tmp_path):
    flags = flags_for(tiny, mixture, tmp_path, "--steps", "2", "--schedule", "uniform")
    go(*flags)
    path = tmp_path / "state" / "step-00000002" / "facts.json"
    facts = json.loads(path.read_text())
    facts["config"]["learning_rate"] = facts["config"].pop("lr")
    path.write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match="other settings.*'learning_rate': .*'lr': .'no such flag'"
    ):
        go(*flags, "--resume", "auto")


def test_a_nan_loss_stops_with_its_rows_and_keeps_the_last_checkpoint(tiny, mixture, tmp_path):
    go(*flags_for(tiny, mixture, tmp_path, "--steps", "2"))
    (tmp_path / "state").rename(
        tmp_path / "state.old"
    )  # as a new run does with the states of another
    before = {
        f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "log.jsonl"
    }
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*source \w+, rows \[\d"):
        go(
            *flags_for(
                tiny,
                mixture,
                tmp_path,
                *"--steps 4 --lr 1e30 --warmup 0 --epochs 1".split(),
            )
        )
    assert before == {
        f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != "log.jsonl"
    }


def test_the_walk_up_the_pyramid_is_drawn_from_the_log(uninterrupted, tmp_path, capsys):
    shutil.copy(uninterrupted[0] / "log.jsonl", tmp_path)
    assert pyramid.main([str(tmp_path / "log.jsonl")]) is None
    out, epochs = capsys.readouterr().out, [json.loads(x) for x in open(tmp_path / "log.jsonl")]
    assert (
        out.count("epoch ") == 3
        and out.count(" t2v ") == 3
        and (tmp_path / "pyramid.png").stat().st_size > 5000
    )
    first = next(x for x in epochs if x["event"] == "epoch")
    assert (
        f"{first['R']['t2v']:7.3f} {first['R_error']['t2v']:6.3f} {first['P']['t2v']:7.3f}" in out
    )
    assert pyramid.main([str(tmp_path / "gone")]).startswith("The walk")
    for content in ("", "{", "[1]", '{"event": "start"}', '{"event": "start", "sources": {}}'):
        (tmp_path / "log.jsonl").write_text(content)
        assert "log.jsonl: not a log of this train.py" in pyramid.main(
            [str(tmp_path / "log.jsonl")]
        )
