"""support/checkpoint.py, and every way a run may stop (signals, a dead rank, NaN) and resume."""

import contextlib
import dataclasses
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
from conftest import full_disk, write_tiny
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
from support import checkpoint
from support.files import file_lock, load_jsonl, write_jsonl

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


def test_a_run_killed_in_its_first_save_leaves_the_states_of_the_run_before(
    tiny, mixture, tmp_path
):
    (tmp_path / "state.old" / "step-00000009").mkdir(parents=True)
    (tmp_path / "state" / "part").mkdir(parents=True)
    same = "--steps 1 --epochs 1 --schedule uniform --resume auto"
    go(*flags_for(tiny, mixture, tmp_path, same))
    assert os.listdir(tmp_path / "state.old") == ["step-00000009"]
    assert os.listdir(tmp_path / "state") == ["step-00000001"]


def test_resuming_with_other_settings_is_an_error_and_an_unfinished_state_is_not_loaded(
    tiny, mixture, tmp_path, capsys
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
    capsys.readouterr()
    go(*flags, "--resume", "auto")
    assert_weights_as_before()
    assert "holds a finished run of 4 steps: nothing is left to train" in capsys.readouterr().out

    with pytest.raises(ValueError, match="cannot resume with other settings.*'seed': .42, 7."):
        go(*flags, "--resume", "auto", "--seed", "7")

    # The base may lie elsewhere, but it has to be the same one.
    shutil.copytree(tiny, tmp_path / "moved")
    go(*flags, "--resume", "auto", "--base", tmp_path / "moved")
    assert_weights_as_before()
    write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="the weights of --base .*/other are not those"):
        go(*flags, "--resume", "auto", "--base", tmp_path / "other")

    # So may the data: the mixture of another folder that has the same files, until one changes.
    shutil.copytree(Path(mixture).parent, tmp_path / "data")
    moved = ["--mixture", tmp_path / "data" / "mixture.json", "--data", tmp_path / "data"]
    go(*flags, "--resume", "auto", *moved)
    assert_weights_as_before()
    file = tmp_path / "data" / "ti2v.jsonl"
    file.write_text(file.read_text().replace("red ball", "red bell"))
    with pytest.raises(ValueError, match="other data.* source ti2v: hash '.*' -> '.*'; to train"):
        go(*flags, "--resume", "auto", *moved)

    # Damaged files are named. Once their state is removed, the run goes on from the one before.
    newest = states / "step-00000004"
    for name in ("tensors.safetensors", "facts.json"):
        path = newest / name
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(ValueError, match=f"step-00000004/{name}: damaged .* remove"):
            go(*flags, "--resume", "auto")
    for name in ("tensors.safetensors", "facts.json"):
        (newest / name).unlink()
        with pytest.raises(ValueError, match=f"step-00000004/{name}: not there; remove"):
            checkpoint.newest_state(states)
    shutil.rmtree(newest)
    go(*flags, "--resume", "auto")
    assert_weights_as_before()


# Flags on which no number of a run depends, and those whose contents are compared instead.
FREE = "preset resume keep save_every log_every dry_run workers features"
BY_CONTENT = "out data mixture root base"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(train.Flags)])
def test_every_flag_that_numbers_depend_on_must_stay(name):
    then = {field.name: 1 for field in dataclasses.fields(train.Flags)} | {"world": 2}
    now = then | {name: 2}
    if name in f"{FREE} {BY_CONTENT}".split():
        checkpoint.check_settings("out", then, now)
    else:
        with pytest.raises(ValueError, match=f"out: cannot resume .*{{'{name}': .1, 2.}}"):
            checkpoint.check_settings("out", then, now)
    with pytest.raises(ValueError, match="'world': .2, 4."):
        checkpoint.check_settings("out", then, then | {"world": 4})


def test_data_that_changed_is_told_by_the_sources_names():
    facts = {"rows": 7, "hash": "a"}
    then = {"x": facts, "y": facts}
    assert checkpoint.list_changes(then, {"x": dict(facts), "y": dict(facts)}) == ""
    cases = {
        "source y is gone": {"x": facts},
        "source z is new": {"x": facts, "y": facts, "z": facts},
        "source y: rows 7 -> 8; source y: hash 'a' -> 'b'": {
            "x": facts,
            "y": {"rows": 8, "hash": "b"},
        },
        "order of the sources x, y -> y, x": {"y": facts, "x": facts},
        "source x is gone; source z is new": {"y": facts, "z": facts},
    }
    for words, now in cases.items():
        assert checkpoint.list_changes(then, now) == words
        with pytest.raises(ValueError, match=re.escape(words)):
            checkpoint.check_data("out", then, now)


def write_state(folder, step, **facts):
    state = folder / f"step-{step:08}"
    state.mkdir(parents=True)
    (state / "facts.json").write_text(json.dumps({"step": step, **facts}))
    (state / "tensors.safetensors").write_bytes(b"x")
    return state


def test_ranks_that_see_different_states_are_told_so(tmp_path):
    seen = {
        "first": checkpoint.describe_state(write_state(tmp_path / "a", 4, saved=1)),
        "copy": checkpoint.describe_state(write_state(tmp_path / "b", 4, saved=1)),
        "later": checkpoint.describe_state(write_state(tmp_path / "c", 8, saved=1)),
        "twin": checkpoint.describe_state(write_state(tmp_path / "d", 4, saved=2)),
        "none": checkpoint.describe_state(None),
    }
    checkpoint.check_same_state([seen["first"], seen["copy"]])
    checkpoint.check_same_state([seen["none"], seen["none"]])
    for other in ("later", "twin", "none"):
        for ranks in (["first", "copy", other], [other, other, "first"]):
            with pytest.raises(ValueError, match="not see the same state.* rank 2 .*shared"):
                checkpoint.check_same_state([seen[name] for name in ranks])


@pytest.mark.slow
def test_two_ranks_whose_folders_are_not_shared_end_at_once_with_the_reason(
    tiny, mixture, tmp_path
):
    """As on two machines: each rank works in a folder of its own."""
    script = tmp_path / "node.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"os.makedirs('{tmp_path}/' + os.environ['RANK'], exist_ok=True)\n"
        f"os.chdir('{tmp_path}/' + os.environ['RANK'])\n"
        f"sys.path.insert(0, '{ROOT}')\n"
        f"runpy.run_path('{ROOT}/train.py', run_name='__main__')\n"
    )
    flags = flags_for(tiny, mixture, "out", "--steps 4 --schedule uniform --save-every 2 --keep 9")
    command = [*launch(2), script, *flags]
    assert run(*command).returncode == 0
    shutil.rmtree(tmp_path / "0" / "out" / "state" / "step-00000004")
    began = time.time()
    done = run(*command, "--resume", "auto")
    assert done.returncode != 0
    assert done.stderr.count("error: cannot resume: the ranks do not see the same state") == 2
    assert "sees no state" in done.stderr
    assert time.time() - began < 60


def test_a_second_run_into_the_same_folder_is_refused_and_the_lock_ends_with_the_run(
    tiny, mixture, tmp_path
):
    flags = flags_for(tiny, mixture, tmp_path / "out", "--steps 1 --schedule uniform")
    (tmp_path / "out").mkdir()
    with file_lock(tmp_path / "out" / "train.lock"):
        with pytest.raises(ValueError, match="out: another run is writing to this folder"):
            go(*flags)
    assert os.listdir(tmp_path / "out") == ["train.lock"]  # nothing was touched

    # A run lets go of it, also one that fails.
    with pytest.raises(ValueError, match="nowhere/at/all"):
        go(*flags, "--base", "nowhere/at/all")
    with file_lock(tmp_path / "out" / "train.lock", wait=False) as held:
        assert held


def test_a_disk_that_is_full_while_saving_leaves_the_checkpoint_before(tiny, mixture, tmp_path):
    out = tmp_path / "out"
    flags = flags_for(tiny, mixture, out, "--steps 2 --epochs 1 --schedule uniform --save-every 1")
    saved = []

    def save_less(*rest, save=checkpoint.save_state):
        save(*rest)
        saved.append(contents(out))
        stack.enter_context(full_disk(20_000))  # from the first state on

    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_state", save_less)
        with pytest.raises(OSError, match="File too large: '.*/out"):
            go(*flags)
    assert contents(out) == saved[0]
    assert sorted(os.listdir(tmp_path)) == ["out"]

    # A state that does not fit leaves the one before, too.
    gve = train.GVE.from_pretrained(tiny, lora=True)
    optimizer = torch.optim.AdamW(gve.lora_parameters().values())
    with pytest.raises(OSError, match="File too large: '.*/step-00000009'"), full_disk(20_000):
        rng = torch.zeros(1, 9, dtype=torch.uint8)
        checkpoint.save_state(out / "state", optimizer, rng, {"step": 9}, keep=1)
    assert contents(out) == saved[0]

    # With room again, it goes on.
    go(*flags, "--resume", "auto")
    assert [step for step, *_ in steps_of(out)] == [1, 2]


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

    older = [dict(event) for event in load_jsonl(log)]
    for event in events(older, "epoch"):
        del event["used"]
    path = tmp_path / "older.jsonl"
    write_jsonl(path, older)
    assert "older.jsonl: not a log of this train.py" in pyramid.main([str(path)])

    assert pyramid.main([str(tmp_path / "gone")]).startswith("The walk")
    for content in ("", "{", "[1]", '{"event": "start"}', '{"event": "start", "sources": {}}'):
        log.write_text(content)
        assert "log.jsonl: not a log of this train.py" in pyramid.main([str(log)])


def test_the_walk_of_a_mixture_is_shown_before_it_is_trained(tmp_path, capsys):
    path = tmp_path / "walk.png"
    assert pyramid.main(["mixtures/gve-3b.json", "--out", str(path)]) is None
    text = capsys.readouterr().out
    levels = [line.split() for line in text.splitlines() if " all " in line]
    used = [int(words[-2]) for words in levels]
    left = [int(words[-1]) for words in levels]
    for epoch, ending in enumerate((3721, 7442, 11_163)):  # thirds of one pass over Tables 6 and 7
        assert sum(used[4 * epoch : 4 * epoch + 4]) == ending
        assert sum(left[4 * epoch : 4 * epoch + 4]) == 11_163 - ending
    assert path.stat().st_size > 5000
    assert "not a mixture" in pyramid.main([str(path)])
    (tmp_path / "empty.json").write_text("[]")
    assert "it is empty" in pyramid.main([str(tmp_path / "empty.json")])
    assert "expected 4 numbers" in pyramid.main(["mixtures/gve-3b.json", "--profile", "0.5"])
