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
from conftest import write_tiny
from safetensors.torch import load_file
from test_train import (
    ROOT,
    assert_same_weights,
    events,
    flags_for,
    go,
    launch,
    run,
    steps_of,
    weights,
)

import train
from extras import pyramid
from support.files import load_jsonl

# Run as a script it is train.py; FATE sends a rank a signal, SLOW slows each clip down.
RECORD = Path(__file__).with_name("test_train.py")


@pytest.fixture(scope="module")
def uninterrupted(tiny, mixture, tmp_path_factory):
    """A run of 9 steps over 3 epochs on 2 ranks, pyramid and dropout on -> (out, flags(out))."""
    out = tmp_path_factory.mktemp("whole") / "run"

    def flags(out):
        more = "--steps 9 --probe-pairs 4 --save-every 2 --lr 0.01"
        return flags_for(tiny, mixture, out, more)

    done = run(*launch(2), RECORD, out.parent / "seen.pt", *flags(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps_of(out)) == 9
    return out, flags


def test_a_killed_rank_ends_the_job_and_the_run_resumes_bit_for_bit(uninterrupted, tmp_path):
    whole, flags = uninterrupted
    out = tmp_path / "run"
    command = [*launch(2), RECORD, tmp_path / "seen.pt", *flags(out)]

    began = time.time()
    done = run(*command, FATE="9 1 5")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert time.time() - began < 60
    assert not (out / "state" / "step-00000009").exists()

    again = run(*command, "--resume", "auto")
    assert again.returncode == 0, again.stderr[-9000:]
    assert_same_weights(out, whole)
    assert steps_of(out) == steps_of(whole)
    log = load_jsonl(out / "log.jsonl")
    assert len(events(log, "epoch")) == 3
    assert len(events(log, "resume")) == 1
    assert len(events(log, "start")) == 1


def test_one_of_three_ranks_dies_and_the_others_end_within_a_minute_over_a_checkpoint_that_loads(
    tiny, mixture, tmp_path
):
    out = tmp_path / "run"
    more = "--steps 9 --schedule uniform --save-every 1"
    flags = flags_for(tiny, mixture, out, more)
    began = time.time()
    done = run(*launch(3), RECORD, tmp_path / "seen.pt", *flags, FATE="9 2 4")
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    assert time.time() - began < 60  # from the start, even

    gve = train.GVE.from_pretrained(out)
    assert gve.info["step"] == 4
    assert gve.embed([{"text": "a red ball"}]).norm() == pytest.approx(1)

    # The checkpoint holds the weights of the newest state.
    trained = train.GVE.from_pretrained(out, lora=True).lora_parameters()
    saved = load_file(out / "state" / "step-00000004" / "tensors.safetensors")
    for i, (name, p) in enumerate(trained.items()):
        assert torch.equal(p, saved[f"{i}.weight"]), name


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
    while job.poll() is None:
        if log.is_file() and f'"step": {step},' in log.read_text():
            break
        time.sleep(0.01)
    return job


@pytest.mark.slow
def test_sigterm_to_torchrun_finishes_the_step_with_its_clips_and_resumes_bit_for_bit(
    tiny, mixture, tmp_path
):
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"

    def command(out):
        more = "--steps 12 --epochs 1 --schedule uniform --workers 1 --features '' --resume auto"
        flags = flags_for(tiny, mixture, out, more)
        return [*launch(2), RECORD, tmp_path / "seen.pt", *flags]

    assert run(*command(whole)).returncode == 0

    # The signal comes while the next step waits for its clips. torchrun passes it on to the ranks'
    # whole process groups, so the decoders get it too.
    job = start(command(stopped), stopped, 5, SLOW="0.5")
    job.terminate()
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0, said[-3000:]
    assert "crashed" not in said, said[-3000:]
    assert re.search(r"stopped after step \d+ as asked", said), said[-3000:]
    assert len(steps_of(stopped)) < 12

    assert run(*command(stopped)).returncode == 0
    assert_same_weights(stopped, whole)
    assert steps_of(stopped) == steps_of(whole)


def kill(job):
    """Kill torchrun and its ranks at once -> torchrun's exit status."""
    # Ranks have sessions of their own and outlive torchrun.
    pgrep = ["pgrep", "-P", str(job.pid)]
    ranks = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
    for pid in (job.pid, *map(int, ranks)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate()
    return job.returncode


@pytest.mark.slow
def test_killed_outright_at_ten_random_moments_two_ranks_end_as_if_nothing_had_been(
    tiny, mixture, tmp_path
):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"

    def command(out):
        more = "--steps 30 --probe-pairs 4 --save-every 1 --lr 0.01 --resume auto"
        return [*launch(2), "train.py", *flags_for(tiny, mixture, out, more)]

    assert run(*command(whole)).returncode == 0

    rng = np.random.default_rng(0)
    steps = rng.choice(np.arange(1, 30), 10, replace=False)
    for step in sorted(steps):
        job = start(command(killed), killed, step)
        time.sleep(rng.uniform(0, 0.2))
        assert kill(job) == -signal.SIGKILL
    assert run(*command(killed)).returncode == 0

    assert_same_weights(killed, whole)
    assert steps_of(killed) == steps_of(whole)
    assert len(steps_of(killed)) == 30
    log = load_jsonl(killed / "log.jsonl")
    assert len(events(log, "epoch")) == 3
    assert len(events(log, "start")) == 1

    # A resumed run cuts off all lines after the last state, "resume" lines included.
    assert 1 <= len(events(log, "resume")) <= 10


def test_sigterm_finishes_the_step_and_saves(tiny, mixture, tmp_path):
    same = "--steps 6 --schedule uniform"
    flags = flags_for(tiny, mixture, tmp_path / "a", same)
    done = run(RECORD, tmp_path / "seen.pt", *flags, FATE="15 0 3")
    assert done.returncode == 128 + 15
    assert "stopped after step 5" in done.stdout + done.stderr

    again = go(*flags, "--resume", "auto").lora_parameters()
    straight = go(*flags_for(tiny, mixture, tmp_path / "b", same)).lora_parameters()
    assert len(again) == len(straight)
    for name, p in straight.items():
        assert torch.equal(again[name], p), name
    assert [step for step, *_ in steps_of(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_other_settings_is_an_error_and_an_unfinished_state_is_not_loaded(
    tiny, mixture, tmp_path
):
    more = "--steps 4 --schedule uniform --save-every 1 --keep 2"
    flags = flags_for(tiny, mixture, tmp_path, more)
    states = tmp_path / "state"
    go(*flags)
    assert sorted(os.listdir(states)) == ["step-00000003", "step-00000004"]
    before = weights(tmp_path)

    def assert_weights_as_before():
        for name, tensor in weights(tmp_path).items():
            assert torch.equal(before[name], tensor), name

    # A state that was not finished is passed over: nothing is left to do.
    (states / "part").mkdir()
    (states / "part" / "facts.json").write_text("{")
    go(*flags, "--resume", "auto")
    assert_weights_as_before()

    with pytest.raises(ValueError, match="cannot resume with other settings.*'seed': .42, 7."):
        go(*flags, "--resume", "auto", "--seed", "7")

    # The base may lie elsewhere, but it has to be the same one.
    shutil.copytree(tiny, tmp_path / "moved")
    go(*flags, "--resume", "auto", "--base", tmp_path / "moved")
    assert_weights_as_before()
    write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="the weights of --base .*/other are not those"):
        go(*flags, "--resume", "auto", "--base", tmp_path / "other")

    # Damaged files are named. Once their state is removed, the run goes on from the one before.
    newest = states / "step-00000004"
    for name in ("tensors.safetensors", "facts.json"):
        path = newest / name
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(ValueError, match=f"step-00000004/{name}: damaged .* remove"):
            go(*flags, "--resume", "auto")
    shutil.rmtree(newest)
    go(*flags, "--resume", "auto")
    assert_weights_as_before()


def test_a_flag_that_was_renamed_or_added_since_the_state_is_named(tiny, mixture, tmp_path):
    flags = flags_for(tiny, mixture, tmp_path, "--steps 2 --schedule uniform")
    go(*flags)
    path = tmp_path / "state" / "step-00000002" / "facts.json"
    facts = json.loads(path.read_text())
    facts["config"]["gradient_limit"] = facts["config"].pop("clip")
    path.write_text(json.dumps(facts))
    message = "other settings.*'clip': .'no such flag'.*'gradient_limit': .*--base .* another --out"
    with pytest.raises(ValueError, match=message):
        go(*flags, "--resume", "auto")


def test_resuming_with_other_code_is_said(tiny, mixture, tmp_path, capsys):
    flags = flags_for(tiny, mixture, tmp_path, "--steps 2 --schedule uniform")
    go(*flags)
    path = tmp_path / "state" / "step-00000002" / "facts.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "commit": "abc"}))
    go(*flags, "--resume", "auto")
    assert "note: the state is of commit abc, this is" in capsys.readouterr().out


def contents(folder):
    """Return the bytes of all files under a folder but the log, {path: bytes}."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "log.jsonl":
            files[path] = path.read_bytes()
    return files


def test_a_nan_loss_stops_with_its_rows_and_keeps_the_last_checkpoint(tiny, mixture, tmp_path):
    go(*flags_for(tiny, mixture, tmp_path, "--steps 2"))
    # A new run moves the states of another to state.old; moved now, they keep their paths below.
    (tmp_path / "state").rename(tmp_path / "state.old")
    before = contents(tmp_path)

    more = "--steps 4 --lr 1e30 --warmup 0 --epochs 1"
    flags = flags_for(tiny, mixture, tmp_path, more)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*source \w+, rows \[\d"):
        go(*flags)
    assert contents(tmp_path) == before


def test_the_walk_up_the_pyramid_is_drawn_from_the_log(uninterrupted, tmp_path, capsys):
    out, _ = uninterrupted
    log = tmp_path / "log.jsonl"
    shutil.copy(out / "log.jsonl", log)
    assert pyramid.main([str(log)]) is None
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 3
    assert printed.count(" t2v ") == 3
    assert (tmp_path / "pyramid.png").stat().st_size > 5000

    first = events(load_jsonl(log), "epoch")[0]
    relevance = first["R"]["t2v"]
    error = first["R_error"]["t2v"]
    p = first["P"]["t2v"]
    assert f"{relevance:7.3f} {error:6.3f} {p:7.3f}" in printed

    assert pyramid.main([str(tmp_path / "gone")]).startswith("The walk")
    for content in ("", "{", "[1]", '{"event": "start"}', '{"event": "start", "sources": {}}'):
        log.write_text(content)
        assert "log.jsonl: not a log of this train.py" in pyramid.main([str(log)])
