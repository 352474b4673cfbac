"""support/: files that are whole or absent, locks, flags, sums over ranks."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, full_disk
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support import checkpoint, files, ranks  # noqa: E402
from support.cache import FeatureStore  # noqa: E402
from support.flags import flag, parse_flags  # noqa: E402

# files.py


@pytest.mark.parametrize("mode, old, new", [("w", "old", "new"), ("wb", b"old", b"new")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, mode, old, new):
    path = tmp_path / "file"
    with files.whole_file(path, mode) as file:
        file.write(old)
    with pytest.raises(KeyboardInterrupt), files.whole_file(path, mode) as file:
        file.write(new)
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "a temporary file is left"

    with files.whole_file(path, mode) as file:
        file.write(new)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def write_lines(folder):
    files.write_jsonl(folder / "rows.jsonl", [{"text": "x" * 9000}])


def write_tensors(folder):
    save_file({"x": torch.zeros(9000)}, folder / "x.safetensors")


def write_tokenizer(folder):
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("write", [write_lines, write_tensors, write_tokenizer])
def test_a_full_disk_is_named_with_its_path_and_leaves_what_was_there(tmp_path, write):
    """Python, safetensors and tokenizers each raise an error of their own."""
    out = tmp_path / "out"
    with files.whole_folder(out) as staging:
        (staging / "rows.jsonl").write_text("old")
        (staging / "x.safetensors").write_text("old")
    (out / "other").write_text("stays")

    with pytest.raises(OSError, match=r"File too large: '.*/out"), full_disk(5000):
        with files.whole_folder(out) as staging:
            write(staging)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out)) == ["other", "rows.jsonl", "x.safetensors"]
    assert (out / "rows.jsonl").read_text() == "old"

    with files.whole_folder(out) as staging:
        write(staging)
    assert (out / "other").read_text() == "stays"
    assert sorted(os.listdir(tmp_path)) == ["out"]

    with pytest.raises(OSError, match=r"File too large: '.*/a.bin'"), full_disk(5000):
        with files.whole_file(tmp_path / "a.bin", "wb") as file:
            file.write(b"x" * 9000)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_errors_that_are_not_the_disks_keep_their_type(tmp_path):
    with pytest.raises(KeyError), files.whole_folder(tmp_path / "out"):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError, match="'/no/such/file'"):
        with files.whole_file(tmp_path / "a"):
            open("/no/such/file")
    assert os.listdir(tmp_path) == []


def test_half_an_emoji_is_written_to_json_lines_and_comes_back(tmp_path):
    rows = [{"text": "half \ud83d", "path": "latin \udce9.mp4"}, {"text": "一 \U0001f600"}]
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert files.load_jsonl(tmp_path / "rows.jsonl") == rows
    assert "一 \U0001f600" in (tmp_path / "rows.jsonl").read_text()


def test_a_feature_store_that_cannot_be_written_says_so_once_and_keeps_no_more(tmp_path, capsys):
    store = FeatureStore(tmp_path / "features")

    def keep(key, width):
        file, found = store.find(key)
        assert found is None
        batch = {
            "image_file": [file],
            "image_grid_thw": torch.ones(1, 3, dtype=torch.int64),
            "image_features": [torch.ones(4, width)],
        }
        store.keep(batch)
        return store.find(key)[1]

    assert keep("a", 8)["image_features"].shape == (4, 8)
    with full_disk(2000):
        assert keep("b", 800) is None
        assert keep("c", 800) is None
    said = capsys.readouterr().err
    assert said.count("warning: no further features are kept in") == 1
    assert str(tmp_path / "features") in said and "File too large" in said
    assert store.find("a")[1] is not None
    assert not list(tmp_path.rglob("*.part"))

    # One that cannot even be looked at holds nothing.
    (tmp_path / "file").write_text("")
    store = FeatureStore(tmp_path / "file" / "features")
    assert keep("a", 8) is None


# checkpoint.py


def test_a_signal_to_stop_is_noted_and_nohup_is_heeded(monkeypatch):
    monkeypatch.setattr(checkpoint, "received_signals", [])
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        checkpoint.install_signal_handlers()
        for number in numbers:
            signal.raise_signal(number)
        assert checkpoint.received_signals == list(numbers)

        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        checkpoint.install_signal_handlers()
        signal.raise_signal(signal.SIGHUP)
        assert checkpoint.received_signals == list(numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_whose_terminal_is_gone_can_still_speak_and_save(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            checkpoint.install_signal_handlers()
            os.write(1, b"ready")
            while not checkpoint.received_signals:
                time.sleep(0.01)
            os.write(1, b"stopped")  # an OSError if nobody took care
            (tmp_path / "saved").write_text("")
        finally:
            os._exit(0)

    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)  # sends SIGHUP
    os.waitpid(pid, 0)
    assert (tmp_path / "saved").exists()


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with files.whole_file(path) as first, files.whole_file(path) as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"  # renamed last
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_come_back_as_they_were_with_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "röd boll 红球", "n": 1}, {"nested": [1, {"a": None}]}]
    files.write_jsonl(path, rows)
    assert files.load_jsonl(path) == rows
    assert "红球" in path.read_text(encoding="utf-8")
    path.write_text('\n{"a": 1}\n\n  \n{"b": 2}')
    assert list(files.read_jsonl(path)) == [(2, {"a": 1}), (5, {"b": 2})]
    files.write_json(path, rows)
    assert json.loads(path.read_text(encoding="utf-8")) == rows


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"3", "expected a JSON object, got int"),
    ],
)
def test_a_bad_line_is_named_and_spoils_none_before_it(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"good": 1}\n' + line + b"\n")
    rows = files.read_jsonl(path)
    assert next(rows) == (1, {"good": 1})
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {reason}"):
        next(rows)


HOLD_LOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from support.files import file_lock
with file_lock(sys.argv[2], wait=False) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    path = str(tmp_path / "lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(ROOT), path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        with files.file_lock(path, wait=False) as held:
            assert not held
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        began = time.time()
        with files.file_lock(path) as held:
            assert held
        assert time.time() - began < 5
    finally:
        holder.kill()

    with files.file_lock(path, wait=False) as held:
        assert held, "leaving the block did not release the lock"


def test_a_lock_is_released_when_its_block_raises(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(KeyError), files.file_lock(path):
        raise KeyError
    with files.file_lock(path, wait=False) as held:
        assert held


def test_a_fingerprint_changes_with_a_files_size_and_time_and_with_a_folders_files(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    frame = folder / "0.png"
    frame.write_bytes(b"a")
    of_file = files.file_fingerprint(frame)
    of_folder = files.file_fingerprint(folder)
    assert of_file == of_folder == [["0.png", 1, frame.stat().st_mtime_ns]]

    os.utime(frame, ns=(1, 1))
    assert files.file_fingerprint(frame) == [["0.png", 1, 1]]
    frame.write_bytes(b"ab")
    os.utime(frame, ns=(1, 1))
    assert files.file_fingerprint(frame) == [["0.png", 2, 1]]
    (folder / "1.png").write_bytes(b"")
    assert len(files.file_fingerprint(folder)) == 2


def test_a_folders_hash_is_of_its_matching_files(tmp_path):
    assert files.hash_files(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"1")
    first = files.hash_files(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"2")
    assert files.hash_files(tmp_path) == first
    (tmp_path / "b.safetensors").write_bytes(b"2")
    assert files.hash_files(tmp_path) != first


# flags.py


PRESETS = {"small": {}, "large": {"steps": 500, "names": ["x", "y"]}}


@dataclasses.dataclass
class Flags:
    path: str = flag(..., "file of items", positional=True)
    must: int = flag(..., "a number that has to be given")
    preset: str = flag("small", "defaults of the other flags", choices=list(PRESETS))
    steps: int = flag(10, "optimiser steps, 100 % of them")
    rate: float = flag(2e-3, "learning rate")
    cached: bool = flag(False, "keep results")
    shuffled: bool = flag(True, "shuffle rows")
    names: list[str] = flag(["a"], "names of sources")
    sizes: list[int] = flag([], "sizes")


def parse(*words):
    return parse_flags(Flags, ["items.jsonl", "--must", "3", *words], "A program.", PRESETS)


def refused(capsys, cls, *words, presets=None):
    """Parse words that must be refused -> the message."""
    with pytest.raises(SystemExit) as stopped:
        parse_flags(cls, list(words), presets=presets)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_preset_that_names_no_flag_is_refused():
    with pytest.raises(AssertionError, match="flags that do not exist: {'step'}"):
        parse_flags(Flags, ["items.jsonl", "--must", "3"], presets={"small": {"step": 5}})


def test_flags_are_typed_and_have_their_defaults():
    defaults = Flags("items.jsonl", 3)
    assert parse() == defaults
    assert defaults.names == ["a"] and defaults.names is not Flags("", 0).names

    flags = parse("--steps", "7", "--rate", "1e-4", "--names", "b", "c", "--sizes", "1", "2")
    assert flags == dataclasses.replace(
        defaults, steps=7, rate=1e-4, names=["b", "c"], sizes=[1, 2]
    )
    assert parse("--cached", "--no-shuffled") == dataclasses.replace(
        defaults, cached=True, shuffled=False
    )


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--stepz", "3"], "--stepz"),
        (["--ste", "3"], "--ste"),  # argparse alone would take an abbreviation
        (["--steps", "many"], "--steps"),
        (["--cached", "yes"], "yes"),
        (["--preset", "huge"], "'small', 'large'"),
        (["second.jsonl"], "second.jsonl"),
    ],
)
def test_unknown_abbreviated_and_ill_typed_flags_end_with_status_2(capsys, words, reason):
    message = refused(capsys, Flags, "items.jsonl", "--must", "3", *words, presets=PRESETS)
    assert reason in message


def test_required_flags_must_be_given(capsys):
    assert "path" in refused(capsys, Flags, "--must", "3", presets=PRESETS)
    assert "--must" in refused(capsys, Flags, "items.jsonl", presets=PRESETS)


def test_a_preset_gives_defaults_that_flags_override():
    assert parse("--preset", "large").steps == 500
    assert parse("--preset=large").names == ["x", "y"]
    assert parse("--steps", "7", "--preset", "large").steps == 7
    assert parse("--preset", "large").preset == "large"


def test_help_shows_the_presets_defaults(capsys):
    for words, steps in (([], 10), (["--preset", "large"], 500)):
        with pytest.raises(SystemExit) as stopped:
            parse(*words, "--help")
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "A program." in shown
        assert f"optimiser steps, 100 % of them (default {steps})" in shown
        assert "--cached, --no-cached" in shown
        assert "file of items" in shown


@dataclasses.dataclass
class SomePaths:
    paths: list[str] = flag(..., "files", positional=True)


@dataclasses.dataclass
class AnyPaths:
    paths: list[str] = flag([], "files", positional=True)


@dataclasses.dataclass
class OnePath:
    path: str = flag("all", "a file", positional=True)


def test_positional_arguments_may_be_lists_and_have_defaults(capsys):
    assert parse_flags(SomePaths, ["a", "b"]).paths == ["a", "b"]
    assert "paths" in refused(capsys, SomePaths)
    assert parse_flags(AnyPaths, []).paths == []
    assert parse_flags(AnyPaths, ["a"]).paths == ["a"]
    assert parse_flags(OnePath, []).path == "all"
    assert parse_flags(OnePath, ["a"]).path == "a"


# ranks.py


SUM_OVER_RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from support.ranks import (
    all_gather_object, fail_together, join_ranks, leave_ranks, sum_over_ranks
)
rank, world, device = join_ranks("cpu")
parameters = [torch.zeros(2, 3, requires_grad=True) for _ in range(3)]
parameters[0].grad = torch.full((2, 3), 1.0 + rank)         # a gradient on both ranks
if rank == 1:
    parameters[1].grad = torch.full((2, 3), 5.0)            # on one
sums = {"loss": torch.tensor(0.5 * rank), "rows": torch.tensor(4, dtype=torch.int64)}
sums = sum_over_ranks(parameters, sums)                     # and on neither
gradients = [p.grad.unique().tolist() for p in parameters]
try:
    with fail_together():
        if rank == 1:
            open("/no/such/file")
except OSError as error:
    problem = str(error)
for line in all_gather_object([rank, world, sums, gradients, problem]):
    if rank == 0:
        print(json.dumps(line), flush=True)
leave_ranks()
"""


def test_two_ranks_sum_gradients_also_where_one_is_missing_and_fail_together(tmp_path):
    script = tmp_path / "sum.py"
    script.write_text(SUM_OVER_RANKS)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    problem = "[Errno 2] No such file or directory: '/no/such/file'"
    expected = [{"loss": 0.5, "rows": 8.0}, [[3.0], [5.0], [0.0]], problem]
    assert lines == [[0, 2, *expected], [1, 2, *expected]]


def test_a_single_process_is_the_only_rank():
    assert ranks.join_ranks("cpu") == (0, 1, torch.device("cpu"))
    assert ranks.all_gather_object("x") == ["x"]
    with ranks.fail_together():
        pass
    with pytest.raises(ValueError, match="own"), ranks.fail_together():
        raise ValueError("own")
    p = torch.zeros(2, requires_grad=True)
    q = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(2)
    sums = ranks.sum_over_ranks([p, q], {"loss": torch.tensor(0.25), "rows": torch.tensor(7)})
    assert sums == {"loss": 0.25, "rows": 7.0}
    assert p.grad.tolist() == [1, 1]
    assert q.grad.tolist() == [0, 0, 0]
    ranks.leave_ranks()
