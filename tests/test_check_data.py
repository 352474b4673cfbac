"""mixtures/*.json against the paper's Tables 6 to 8 (published.json), and the report of what a run over them would be."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import train
from data import TASKS, load_mixture
from extras import check_data as report
from model import GVE

REPO = Path(__file__).resolve().parent.parent
PAPER = json.loads((REPO / "published.json").read_text())
TEXT, VIDEO = {"T2T"}, {"VAST", "InternVid-FLT", "PE-Video", "WebVid"}


def entries(size):
    return json.loads((REPO / "mixtures" / f"gve-{size}.json").read_text())


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_38_sources_are_tables_6_and_7_cell_for_cell(size):
    ours, paper = entries(size), PAPER["table6_mixture"] + PAPER["table7_uvrd"]
    assert len(ours) == len(paper) == 38 and len(PAPER["table7_uvrd"]) == 7
    for entry, row in zip(ours, paper, strict=True):
        printed = row["name"].replace(" ", "-")
        assert entry["name"] in (printed, f"{printed}-{row['task']}")
        assert [entry[key] for key in ("task", "samples", "negatives", "batch_size")] == [
            row[key] for key in ("task", f"samples_{size}", "negatives", "batch_size")
        ], entry["name"]
    for key in ("name", "path", "instruction"):
        assert len({entry[key] for entry in ours}) == 38
    assert all(
        entry["instruction"].startswith("Find ") and entry["instruction"].endswith(".")
        for entry in ours
    )
    assert {entry["task"] for entry in ours} <= set(TASKS)


def test_the_two_mixtures_differ_in_samples_alone():
    for small, large in zip(entries("3b"), entries("7b"), strict=True):
        assert {**small, "samples": 0} == {**large, "samples": 0} and small["samples"] <= large[
            "samples"
        ]


@pytest.mark.parametrize(
    "size, image_sum, steps", [("3b", 1_910_000, 11_149), ("7b", 2_970_000, 12_106)]
)
def test_sums_are_table_8_except_for_the_papers_own_image_row(size, image_sum, steps):
    sums = dict.fromkeys(("text", "image", "video", "UVRD"), 0)
    for entry in entries(size):
        kind = (
            "UVRD"
            if entry["name"].startswith("UVRD")
            else "text"
            if entry["task"] in TEXT
            else "video"
            if entry["name"] in VIDEO
            else "image"
        )
        sums[kind] += entry["samples"]
    printed = {kind: total[size.upper()] for kind, total in PAPER["table8_totals"].items()}
    for kind in ("text", "video", "UVRD"):
        assert abs(sums[kind] - printed[kind]) < 5_000, kind  # Table 8 rounds to 10K
    # PAPER: Table 8 has 1.82M / 2.80M, and its total is the sum of its own rows; Table 6's image rows add up to this:
    assert (
        sums["image"] == image_sum and printed["image"] == {"3b": 1_820_000, "7b": 2_800_000}[size]
    )
    assert sum(printed[kind] for kind in sums) == printed["all"]
    batches = [
        entry["samples"] / (32 * entry["batch_size"]) for entry in entries(size)
    ]  # of one pass on 32 GPUs
    assert (
        int(sum(batches)) == steps <= sum(map(math.ceil, batches)) < steps + 38
    )  # the last batch of a pass may be short


def stand_ins(folder, rows=3):
    """One small training file for each of the 38 sources, texts only."""
    lines = [
        json.dumps({"query": {"text": f"q{i}"}, "positive": {"text": f"p{i}"}}) + "\n"
        for i in range(rows)
    ]
    for entry in entries("3b"):
        file = folder / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))


@pytest.mark.timeout(3600)
@pytest.mark.slow  # 8 ranks on however few cores
def test_eight_ranks_walk_all_epochs_of_the_preset_over_38_small_stand_ins(tiny, media, tmp_path):
    def item(form, i):
        clip, seconds = str(media / f"{'abcd'[i % 4]}.mp4"), round(i / 16, 3)
        made = {"text": f"{form} number {i}"} if "T" in form else {}
        made |= {"image": {"video": clip, "time": seconds}} if "I" in form else {}
        return made | ({"video": {"path": clip, "start": seconds}} if "V" in form else {})

    for entry in entries("3b"):
        query, positive = entry["task"].split("2")
        rows = [
            {
                "query": item(query, i),
                "positive": item(positive, i + 9),
                "negatives": [item(positive, i + 10 + n) for n in range(entry["negatives"])],
            }
            for i in range(9)
        ]
        file = tmp_path / "data" / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "8",
        "--master-port",
        "29555",
        "train.py",
        "--preset",
        "gve-3b",
        "--data",
        str(tmp_path / "data"),
        "--root",
        str(media),
        "--base",
        tiny,
        "--steps",
        "12",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "rror" in line][:5]
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    epochs, end = [line for line in log if line["event"] == "epoch"], log[-1]
    assert (
        [round(epoch["sigma"], 2) for epoch in epochs] == [0.1, 0.55, 1.0]
        and end["event"] == "end"
        and end["step"] == 12
    )
    for epoch in epochs:  # each source's file was read and its pairs embedded at each epoch's start
        assert set(epoch["R"]) == {entry["name"] for entry in entries("3b")} and all(
            abs(r) <= 1 for r in epoch["R"].values()
        )
        assert sum(epoch["P"].values()) == pytest.approx(1, abs=1e-3)
    assert not end["bad_rows"] and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_presets_find_their_files_under_the_data_folder(tmp_path):
    stand_ins(tmp_path)
    flags = train.parse_flags(
        train.Flags, ["--preset", "gve-3b", "--data", str(tmp_path)], presets=train.PRESETS
    )
    sources = load_mixture(REPO / flags.mixture[0], [flags.data])
    assert [s.name for s in sources] == [e["name"] for e in entries("3b")] and {
        len(s) for s in sources
    } == {3}
    assert sources[0].load(1, [flags.data])[0] == {"text": "q1"}
    assert train.PRESETS["gve-7b"]["mixture"] == ["mixtures/gve-7b.json"]
    (tmp_path / "uvrd" / "t2i.jsonl").unlink()
    with pytest.raises(
        ValueError,
        match=f"UVRD-T2I.*No such file.*mixtures.uvrd.t2i.jsonl or {tmp_path}.uvrd.t2i.jsonl",
    ):
        load_mixture(REPO / flags.mixture[0], [flags.data])


def test_the_report_names_present_and_absent_files_and_the_run_over_the_present(tmp_path):
    stand_ins(tmp_path)
    for entry in entries("3b")[3:-7]:
        (tmp_path / entry["path"]).unlink()
    command = [
        sys.executable,
        "data.py",
        "mixture",
        "mixtures/gve-3b.json",
        "--root",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    # MSMARCO: 300,000 pairs at 64 x 32 = 2,048 are 146.5 steps; its 3 rows would be seen 100,000 times
    assert lines["MSMARCO"][1:] == [
        "T2T",
        "300,000",
        "3",
        "100000.00",
        "2048",
        "147",
        "msmarco.jsonl",
    ]
    assert lines["CIRR"][-4:] == ["cirr.jsonl", "is", "not", "here"]
    # 147 + 69K/2048 + 11K/1024 and UVRD's seven: 49 + 206 + 430 + 44 + 18 + 98 + 18
    assert (
        "10 of 38 sources, 1,929,000 pairs, 1,055 steps, 3 curriculum epochs of 352 steps"
        in done.stdout
    )
    empty = subprocess.run(
        [*command[:-1], str(tmp_path / "uvrd" / "x")],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert empty.returncode == 1 and "none of its 38 files is here" in empty.stderr


def test_the_memory_formula_counts_the_lora_weights_that_a_model_has():
    gve = GVE.from_pretrained(REPO / "mini" / "base", lora=True)
    text = gve.core.config.text_config
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    counted = report.lora_weights(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, keys
    )
    assert counted == sum(p.numel() for p in gve.lora_parameters().values())
    # by hand: 2 x 3.75e9 + 16 x 27.6e6 bytes, and 27,200 tokens x (2 x 36 x 2048 + 40 x 11008)
    assert report.memory("3B", 27_200) == pytest.approx(
        (7.5e9 + 0.441e9 + 27_200 * 587_776) / 2**30, rel=0.001
    )
