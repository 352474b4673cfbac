"""tests/speed_gpu.py --tiny: every stage runs on a CPU, and its figures are possible ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support.files import load_jsonl  # noqa: E402

PROGRAM = ROOT / "tests/speed_gpu.py"

# The tiny vision tower on a clip of 640 x 360, by hand: 4 pairs of frames of 20 x 36 patches. A
# block has 4 x 32^2 weights in its attention and 3 x 32 x 48 in its MLP. The merger sees a quarter
# of the patches.
PATCHES = 4 * 20 * 36
WEIGHTS = 1176 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48) + (128 * 128 + 128 * 64) / 4
# One block attends within a pair of frames, the other within windows of 8 x 8 patches.
PATCH_PAIRS = PATCHES * 20 * 36 + PATCHES * 8 * 8
VISION_FLOPS = 2 * PATCHES * WEIGHTS + 4 * 32 * PATCH_PAIRS


def run_in(folder, *words, commit="c0ffee"):
    """Run the program on a tiny model in folder/work, with the record folder/record.md."""
    command = [sys.executable, PROGRAM, "--tiny", "--work", folder / "work"]
    command += ["--out", folder / "record.md", "--commit", commit, *words]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def read_record(path):
    """Read a record -> {stage: text}, the head under ""."""
    head, *parts = path.read_text().split("\n## ")
    sections = {"": head}
    for part in parts:
        stage, _, text = part.partition("\n\n")
        sections[stage] = text
    return sections


def read_tables(text):
    """Read the rows of a section's tables -> {first cell: the other cells}."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, *others = [cell.strip() for cell in line.strip("|").split("|")]
            rows[first] = others
    return rows


def number(text):
    """Read the first number of a cell; a share in per cent as written."""
    return float(re.search(r"-?[\d.]+(e[+-]?\d+)?", text)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with record.md of all stages, built by two calls, and what they made in work/."""
    folder = tmp_path_factory.mktemp("speed")
    for stages in (["make", "train"], ["encode", "dry-run", "bf16", "profile"]):
        done = run_in(folder, "--stages", *stages)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def record(folder):
    return read_record(folder / "record.md")


@pytest.mark.slow
def test_every_stage_has_its_section_under_one_head(record):
    assert list(record) == ["", "make", "train", "encode", "dry-run", "bf16", "profile"]
    head = read_tables(record[""])
    assert head["torch"] == [torch.__version__]
    assert head["commit"] == ["c0ffee"]
    assert f"{os.cpu_count()} cores" in head["device"][0]


@pytest.mark.slow
def test_training_figures_agree_with_the_clock_of_the_log(folder, record):
    rows = read_tables(record["train"])
    value = {name: number(cells[0]) for name, cells in rows.items() if re.search(r"\d", cells[0])}
    events = load_jsonl(folder / "work/run/log.jsonl")
    times = [event["time"] for event in events if event["event"] == "step"]
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    assert len(times) == 3
    assert value["s a step"] == pytest.approx(seconds, rel=0.05)
    assert value["pairs/s"] == pytest.approx(16 / seconds, rel=0.05)

    # A clip costs the vision tower alone so much, and a step computes some more.
    assert VISION_FLOPS < 1e12 * value["TFLOP/s"] / value["pairs/s"] < 10 * VISION_FLOPS
    assert 0 < value["share of the measured product"] < 100
    assert 0 <= value["waiting for data"] < 100
    assert 0.1 < value["peak memory, GiB"] < 20


@pytest.mark.slow
def test_encoding_figures_are_possible(record):
    rows = read_tables(record["encode"])
    for name, cells in rows.items():
        if len(cells) > 1 and cells[0].replace(".", "").isdigit():
            assert number(cells[0]) * number(cells[1]) == pytest.approx(1000, rel=0.01), name
    whole = number(rows["embed.encode, 4096 tokens a forward"][1])
    parts = []
    for part in ("decode", "vision tower", "language model"):
        cells = rows[f"{part}, alone"]
        parts.append(number(cells[1]))
        assert number(cells[5]) == pytest.approx(100 * parts[-1] / whole, rel=0.01), part
    # One decoding process beside one that computes: no faster than the slower of them, and hardly
    # slower than one after the other. (The machine may be busy with something else meanwhile.)
    assert 0.5 * max(parts) < whole < 3 * sum(parts)
    clips, _, tflops, *_ = rows["vision tower, alone"]
    assert 1e12 * number(tflops) / number(clips) == pytest.approx(VISION_FLOPS, rel=0.01)
    apart = next(name for name in rows if name.startswith("1 - cosine"))
    assert number(apart.split("max")[1]) < 0.01  # bfloat16 and their own positions
    assert "sentence-transformers" in rows


@pytest.mark.slow
def test_the_forecast_stands_beside_what_training_took(record):
    forecast, taken = record["dry-run"].split("Stage train took:")
    peaks = re.findall(r"([\d.]+) GiB", forecast)
    assert peaks
    measured = read_tables(record["train"])["peak memory, GiB"][0]
    assert number(taken) == pytest.approx(float(measured), abs=0.01)


@pytest.mark.slow
def test_bf16_tracks_float32(record):
    rows = read_tables(record["bf16"])
    steps = [rows[str(step)] for step in range(1, 11)]
    for loss, exact_loss, _, norm, exact_norm, _ in steps:
        assert number(loss) == pytest.approx(number(exact_loss), rel=0.02)
        assert number(norm) == pytest.approx(number(exact_norm), rel=0.1)
        assert loss != exact_loss or norm != exact_norm  # they are two runs
    assert "they do." in record["bf16"]


@pytest.mark.slow
def test_ten_items_of_training_and_of_encoding_are_profiled(record):
    training, encoding = record["profile"].split("Encoding")
    for text in (training, encoding):
        items = {name: cells for name, cells in read_tables(text).items() if "`" in name}
        shares = [number(cells[2]) for cells in items.values()]
        assert len(items) == 10
        assert shares == sorted(shares, reverse=True)
        assert 30 < sum(shares) < 100.5


@pytest.mark.slow
def test_a_stage_replaces_its_own_section_alone(folder, record):
    assert "16 of them rendered now" in record["make"]
    assert run_in(folder, "--stages", "make").returncode == 0
    now = read_record(folder / "record.md")
    assert "0 of them rendered now" in now.pop("make")
    record.pop("make")
    assert now == record


@pytest.mark.slow
def test_a_record_of_another_commit_and_unknown_stages_are_refused(folder):
    other = run_in(folder, "--stages", "make", commit="beef")
    assert other.returncode == 1
    assert "another machine or commit" in other.stderr
    unknown = run_in(folder, "--stages", "sing")
    assert unknown.returncode == 1
    assert "accepted: make, train, encode, dry-run, bf16, profile" in unknown.stderr


@pytest.mark.slow
def test_a_stage_that_fails_says_so_in_the_record(tmp_path):
    done = run_in(tmp_path, "--stages", "encode", "bf16")  # nothing was made
    assert done.returncode == 1
    assert done.stderr.strip().endswith("error: failed: encode, bf16")
    record = read_record(tmp_path / "record.md")
    assert "neither a checkpoint folder" in record["encode"]
    assert "failed" in record["bf16"]
