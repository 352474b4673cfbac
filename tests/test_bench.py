"""kernels/bench.py: its fp64 errors against autograd of the definition, its rows, what it stops.

The table with the Triton kernels interpreted is slow: -m slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels.infonce import info_nce_ref

PATH = list(sys.path)
from kernels import bench  # noqa: E402

sys.path[:] = PATH  # the module changes it

ROOT = Path(__file__).parent.parent
LOSSES = [bench.SYMMETRIC, bench.MASKED, bench.ONE_WAY, bench.SIGMOID]
NAMES = ["ours (torch twin)", "the definition, info_nce_ref", "plain, fp32 logits"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Run on the CPU as if nothing else could be had, and without the measurement's waits."""
    monkeypatch.setattr(bench, "CUDA", False)
    monkeypatch.setattr(bench, "INTERPRET", False)
    monkeypatch.setattr(bench, "TIMED", True)
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "measure", lambda run: (run(), (1e-3, 0))[1])


def by_autograd(loss, batch):
    """Return a loss of the table and its whole gradients by autograd, in the dtype of the batch."""
    q = batch.q.detach().requires_grad_()
    d = batch.d.detach().requires_grad_()
    if loss == bench.SIGMOID:
        labels = 2 * torch.eye(len(q), dtype=q.dtype) - 1
        value = -F.logsigmoid(labels * (10 * q @ d.T - 10)).sum() / len(q)
    else:
        options = {
            bench.SYMMETRIC: {},
            bench.MASKED: {"ids": batch.ids, "q_ids": batch.q_ids, "margin": 0.1},
            bench.ONE_WAY: {"margin": 0.1, "symmetric": False},
        }
        value = info_nce_ref(q, d, 1 / 0.03, **options[loss])
    value.backward()
    return value.item(), q.grad, d.grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size, dim", [(37, 11), (64, 32), (6, 3)])
def test_the_exact_slices_equal_autograd_of_the_whole_loss(loss, size, dim, monkeypatch):
    monkeypatch.setattr(bench, "BLOCK", 16)
    monkeypatch.setattr(bench, "CHECKED_ROWS", 21)  # more than a block
    batch = bench.random_batch(size, dim, torch.float64)
    value, dq, dd = by_autograd(loss, batch)
    exact = bench.exact_loss(loss, batch)
    assert exact.loss == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(exact.dq, dq[:21], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(exact.dd, dd[:21], rtol=1e-10, atol=1e-14)

    # The errors, likewise, are of the first rows alone.
    batch.q.grad = dq * 1.5
    batch.d.grad = torch.cat([dd[:21], dd[21:] * 9])
    result = bench.Result(size, dim, loss, "a method")
    result.take_errors(exact, value * 0.75, batch.q, batch.d)
    assert result.loss_error == pytest.approx(0.25)
    assert result.dq_error == pytest.approx(0.5)
    assert result.dd_error < 1e-9


def test_every_mask_drops_something_of_the_random_batch():
    batch = bench.random_batch(64, 2048, torch.float64)  # D so large that chance drops nothing
    masks = batch.options(bench.MASKED)
    assert set(masks) == {"ids", "q_ids", "margin"}
    no_ids = torch.arange(64)
    others = [masks | {"ids": no_ids}, masks | {"q_ids": no_ids}, masks | {"margin": None}]
    losses = [info_nce_ref(batch.q, batch.d, 1 / 0.03, **options) for options in others]
    for loss in losses:
        assert loss > info_nce_ref(batch.q, batch.d, 1 / 0.03, **masks) + 1e-6


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """Return a function that runs the main program -> (table, the object of --json)."""

    def run(words):
        files = ["--out", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]
        monkeypatch.setattr(sys, "argv", ["bench.py", *words.split(), *files])
        bench.main()
        return (tmp_path / "t.md").read_text(), json.loads((tmp_path / "t.json").read_text())

    return run


def cells_of(table):
    """Return the cells of the table's rows, without its header."""
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_table_has_every_size_and_every_method_rounds_only(run_bench, monkeypatch):
    calls = []
    run_method = bench.run_method
    monkeypatch.setattr(
        bench, "run_method", lambda *args: (calls.append(args), run_method(*args))[1]
    )
    words = "--sizes 32 48 --dims 16 --dtype fp32 --repeats 2 --methods twin plain, definition"
    table, written = run_bench(words)
    cells = cells_of(table)
    expected = [[loss, name] for loss in LOSSES[:1] for name in NAMES]
    expected += [[loss, name] for loss in LOSSES[1:3] for name in NAMES[:2]]
    expected += [[bench.SIGMOID, NAMES[2]]]
    assert [row[:2] for row in cells] == [[n, "16"] for n in ("32", "48") for _ in expected]
    assert [row[2:4] for row in cells] == expected * 2
    assert len(calls) == 2 * len(expected) * (1 + 2)

    # The limits are some dozen roundings of fp32.
    assert len(written["rows"]) == len(cells)
    for row, shown in zip(written["rows"], cells, strict=True):
        assert [f"{row['size']}", f"{row['dim']}", row["loss"], row["method"]] == shown[:4]
        assert row["loss_error"] < 1e-6
        assert row["dq_error"] < 2e-6 and row["dd_error"] < 2e-6
        assert shown[8:11] == [f"{row[key]:.1e}" for key in ("loss_error", "dq_error", "dd_error")]
        assert row["seconds"] == 1e-3 and row["extra"] < 0 and row["note"] == ""

    where = written["where"]
    assert where["versions"]["torch"] == torch.__version__
    assert set(where["versions"]) == {"torch", "triton", *bench.PEERS}
    assert where["flags"]["sizes"] == [32, 48] and where["flags"]["repeats"] == 2
    assert where["command"].startswith("python kernels/bench.py --sizes 32 48")
    assert {"commit", "device"} <= set(where)


def test_half_inputs_show_in_the_errors(run_bench):
    words = "--sizes 48 --dims 32 --dtype bf16 --repeats 0 --methods twin plain, definition"
    _, written = run_bench(words)
    rows = {(row["loss"], row["method"]): row for row in written["rows"]}
    ours = rows[bench.SYMMETRIC, "ours (torch twin)"]
    half = rows[bench.SYMMETRIC, "plain, half logits"]
    assert ours["loss_error"] < 1e-6
    assert 5e-4 < ours["dq_error"] < 3e-3  # from rounding the gradients to bf16
    assert half["loss_error"] > 1e-4 and half["dq_error"] > 1.5 * ours["dq_error"]


def test_a_method_with_a_wrong_loss_or_gradient_shows(run_bench, monkeypatch):
    def colder(q, d):
        return info_nce_ref(q, d, 1.02 / 0.03)

    def rescaled(q, d):
        loss = info_nce_ref(q, d, 1 / 0.03)
        return 2 * loss - loss.detach()  # as memeff's stable=True does

    def broken(q, d):
        raise RuntimeError("no such | kernel\nand more")

    methods = [
        bench.Method(bench.SYMMETRIC, "colder", colder),
        bench.Method(bench.SYMMETRIC, "rescaled", rescaled),
        bench.Method(bench.SYMMETRIC, "broken", broken),
        bench.Method(bench.SYMMETRIC, "absent", colder, package="no_such_package"),
        bench.Method(bench.SYMMETRIC, "large", colder, bytes_per_logit=2**60),
    ]
    monkeypatch.setattr(bench, "list_methods", lambda batch: methods)
    table, written = run_bench("--sizes 24 --dims 16 --dtype fp32 --repeats 1")
    rows = {row["method"]: row for row in written["rows"]}
    assert rows["colder"]["loss_error"] > 1e-3 and rows["colder"]["dq_error"] > 1e-3
    assert rows["rescaled"]["loss_error"] < 1e-6
    assert rows["rescaled"]["dq_error"] == pytest.approx(1, abs=1e-5)

    notes = {name: row["note"] for name, row in rows.items() if row["seconds"] is None}
    assert notes == {
        "broken": "RuntimeError: no such / kernel",
        "absent": "not installed",
        "large": "does not fit",
    }
    for cells in cells_of(table)[2:]:
        assert cells[4:11] == ["-"] * 7 and cells[11] == notes[cells[3]]


def test_a_slow_method_is_stopped_and_keeps_the_times_it_has(run_bench, monkeypatch):
    clock = {"slow": [7.0], "compiled": [5.0, 1.0, 1.0, 1.0, 1.0], "steady": [1.0, 2.5]}
    wanted = []

    def method(name):
        def loss(q, d):
            wanted.append(name)
            return info_nce_ref(q, d, 1 / 0.03)

        return bench.Method(bench.SYMMETRIC, name, loss)

    def measure(run):
        wanted.clear()
        run()
        return (clock[wanted[0]].pop(0) if wanted else 1.0), 0

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "list_methods", lambda batch: [*map(method, clock)])
    _, written = run_bench("--sizes 16 --dims 16 --dtype fp32 --repeats 4 --limit 6")
    rows = {row["method"]: row for row in written["rows"]}
    assert [rows[name]["seconds"] for name in rows] == [7.0, 1.0, 2.5]
    assert rows["slow"]["note"] == "its first run, compiling"
    assert rows["compiled"]["note"] == ""
    assert rows["steady"]["note"] == "stopped after 1 runs"  # 3 more would take 7.5 s
    assert all(not times for times in clock.values())


def test_rates_and_the_summary_follow_from_the_times(run_bench):
    slow = bench.Result(100, 1000, bench.SYMMETRIC, "plain", 16e9, 0.01, extra=2.0**20)
    assert slow.row().split("|")[5:9] == [" 10.00 ", " 1 ", " 0.01 ", " 50% "]
    fast = bench.Result(100, 1000, bench.SYMMETRIC, "ours (torch twin)", 16e9, 0.001, extra=0)
    assert bench.ours_is_faster([slow, fast])
    fast.seconds = 0.1
    assert not bench.ours_is_faster([slow, fast])
    fast.seconds = None
    assert not bench.ours_is_faster([slow, fast])

    table, _ = run_bench("--sizes 16 --dims 16 --dtype fp32 --repeats 1 --methods masks")
    assert "\nmasks and ids, D = 16: ours is faster than every other method at N = " in table


def test_bf16_is_refused_where_the_interpreter_would_compute_it_wrongly(run_bench, monkeypatch):
    monkeypatch.setattr(bench, "TIMED", False)
    with pytest.raises(SystemExit, match="bf16"):
        run_bench("--sizes 16 --dims 16 --dtype bf16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype, limit", [("fp32", 2e-6), ("fp16", 1e-3)])
def test_the_interpreted_table_has_errors_and_no_times(dtype, limit, tmp_path):
    command = [sys.executable, "kernels/bench.py", "--sizes", "33", "--dims", "64"]
    command += ["--dtype", dtype, "--json", str(tmp_path / "t.json"), "--methods", "triton", "mem"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " ms " not in done.stdout and "faster" not in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    ours = [row for row in rows if row["method"] == "ours (triton)"]
    assert [row["loss"] for row in ours] == LOSSES[:3]
    for row in ours:
        assert row["seconds"] is None and row["dq_error"] < limit and row["loss_error"] < limit
