"""mixtures/*.json against Tables 6 to 8; extras/check_data.py: bad rows, and a run described."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from data import TASKS, load_mixture
from extras import check_data
from model import GVE
from support.flags import parse_flags

REPO = Path(__file__).resolve().parent.parent
PAPER = json.loads((REPO / "published.json").read_text())
TEXT = {"T2T"}
VIDEO = {"VAST", "InternVid-FLT", "PE-Video", "WebVid"}


def command(*words):
    """Run extras/check_data.py as a user does."""
    return subprocess.run(
        [sys.executable, "extras/check_data.py", *map(str, words)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )


def entries(size):
    return json.loads((REPO / "mixtures" / f"gve-{size}.json").read_text())


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_38_sources_are_tables_6_and_7_cell_for_cell(size):
    ours = entries(size)
    paper = PAPER["table6_mixture"] + PAPER["table7_uvrd"]
    assert len(ours) == len(paper) == 38
    assert len(PAPER["table7_uvrd"]) == 7
    for entry, row in zip(ours, paper, strict=True):
        printed = row["name"].replace(" ", "-")
        assert entry["name"] in (printed, f"{printed}-{row['task']}")
        for key in ("task", "negatives", "batch_size"):
            assert entry[key] == row[key], (entry["name"], key)
        assert entry["samples"] == row[f"samples_{size}"], entry["name"]

    for key in ("name", "path", "instruction"):
        assert len({entry[key] for entry in ours}) == 38
    for entry in ours:
        assert entry["instruction"].startswith("Find ")
        assert entry["instruction"].endswith(".")
    assert {entry["task"] for entry in ours} <= set(TASKS)


def test_the_two_mixtures_differ_in_samples_alone():
    for small, large in zip(entries("3b"), entries("7b"), strict=True):
        assert {**small, "samples": 0} == {**large, "samples": 0}
        assert small["samples"] <= large["samples"]


def kind_of(entry):
    """Table 8's row of a source, by the paper's names."""
    if entry["name"].startswith("UVRD"):
        return "UVRD"
    if entry["task"] in TEXT:
        return "text"
    return "video" if entry["name"] in VIDEO else "image"


@pytest.mark.parametrize(
    "size, image_sum, steps", [("3b", 1_910_000, 11_149), ("7b", 2_970_000, 12_106)]
)
def test_sums_are_table_8_except_for_the_papers_own_image_row(size, image_sum, steps):
    sums = dict.fromkeys(("text", "image", "video", "UVRD"), 0)
    for entry in entries(size):
        sums[kind_of(entry)] += entry["samples"]
    printed = {kind: total[size.upper()] for kind, total in PAPER["table8_totals"].items()}
    for kind in ("text", "video", "UVRD"):
        assert abs(sums[kind] - printed[kind]) < 5_000, kind  # Table 8 rounds to 10K

    # PAPER: Table 8 has 1.82M / 2.80M images, and its total is the sum of its own rows. The image
    # rows of Table 6 add up to image_sum.
    assert sums["image"] == image_sum
    assert printed["image"] == {"3b": 1_820_000, "7b": 2_800_000}[size]
    assert sum(printed[kind] for kind in sums) == printed["all"]

    # Steps of one pass on 32 GPUs; the last batch of a source's pass may be short.
    batches = [entry["samples"] / (32 * entry["batch_size"]) for entry in entries(size)]
    assert int(sum(batches)) == steps
    assert steps <= sum(map(math.ceil, batches)) < steps + 38


def stand_ins(folder, rows=3):
    """Write one small training file for each of the 38 sources, texts only."""
    text = ""
    for i in range(rows):
        text += json.dumps({"query": {"text": f"q{i}"}, "positive": {"text": f"p{i}"}}) + "\n"
    for entry in entries("3b"):
        file = folder / entry["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.timeout(3600)
@pytest.mark.slow  # 8 ranks on however few cores
def test_eight_ranks_walk_all_epochs_of_the_preset_over_38_small_stand_ins(tiny, media, tmp_path):
    def item(form, i):
        clip = str(media / f"{'abcd'[i % 4]}.mp4")
        seconds = round(i / 16, 3)
        made = {}
        if "T" in form:
            made["text"] = f"{form} number {i}"
        if "I" in form:
            made["image"] = {"video": clip, "time": seconds}
        if "V" in form:
            made["video"] = {"path": clip, "start": seconds}
        return made

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

    words = f"--preset gve-3b --data {tmp_path / 'data'} --root {media} --base {tiny} --steps 12"
    words += f" --device cpu --dtype float32 --workers 0 --out {tmp_path / 'out'}"
    launcher = "-m torch.distributed.run --nproc-per-node 8 --master-port 29555 train.py"
    done = subprocess.run(
        [sys.executable, *launcher.split(), *words.split()],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "rror" in line][:5]

    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in log if line["event"] == "epoch"]
    end = log[-1]
    assert [round(epoch["sigma"], 2) for epoch in epochs] == [0.1, 0.55, 1.0]
    assert end["event"] == "end" and end["step"] == 12
    for epoch in epochs:  # each source's file was read and its pairs embedded at each epoch's start
        assert set(epoch["R"]) == {entry["name"] for entry in entries("3b")}
        assert all(abs(r) <= 1 for r in epoch["R"].values())
        assert sum(epoch["P"].values()) == pytest.approx(1, abs=1e-3)
    assert not end["bad_rows"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_presets_find_their_files_under_the_data_folder(tmp_path):
    stand_ins(tmp_path)
    words = ["--preset", "gve-3b", "--data", str(tmp_path)]
    flags = parse_flags(train.Flags, words, presets=train.PRESETS)
    sources = load_mixture(REPO / flags.mixture[0], [flags.data])
    assert [source.name for source in sources] == [entry["name"] for entry in entries("3b")]
    assert {len(source) for source in sources} == {3}
    assert sources[0].load(1, [flags.data])[0] == {"text": "q1"}
    assert train.PRESETS["gve-7b"]["mixture"] == ["mixtures/gve-7b.json"]
    (tmp_path / "uvrd" / "t2i.jsonl").unlink()
    with pytest.raises(
        ValueError,
        match=f"UVRD-T2I.*No such file.*mixtures.uvrd.t2i.jsonl or {tmp_path}.uvrd.t2i.jsonl",
    ):
        load_mixture(REPO / flags.mixture[0], [flags.data])


def test_a_mixture_with_a_byte_order_mark_is_described(tmp_path, capsys):
    stand_ins(tmp_path)
    entry = json.dumps([entries("3b")[0]])
    (tmp_path / "m.json").write_text(entry, encoding="utf-8-sig")
    assert check_data.main([str(tmp_path / "m.json"), "--describe"]) is None
    assert "1 of 1 sources" in capsys.readouterr().out


def test_the_report_names_present_and_absent_files_and_the_run_over_the_present(tmp_path):
    stand_ins(tmp_path)
    for entry in entries("3b")[3:-7]:
        (tmp_path / entry["path"]).unlink()
    done = command("mixtures/gve-3b.json", "--describe", "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    # MSMARCO: 300,000 pairs at 64 x 32 = 2,048 are 146.5 steps, 100,000 passes over its 3 rows.
    assert lines["MSMARCO"][1:] == "T2T 300,000 3 100000.00 2048 147 msmarco.jsonl".split()
    assert lines["CIRR"][-4:] == ["cirr.jsonl", "is", "not", "here"]
    # 147 + 69K/2048 + 11K/1024 and UVRD's seven: 49 + 206 + 430 + 44 + 18 + 98 + 18
    assert (
        "10 of 38 sources, 1,929,000 pairs, 1,055 steps, 3 curriculum epochs of 352 steps"
        in done.stdout
    )
    empty = command("mixtures/gve-3b.json", "--describe", "--root", tmp_path / "uvrd" / "x")
    assert empty.returncode == 1
    assert "none of its 38 files is here" in empty.stderr


def test_the_described_run_is_that_of_the_presets():
    described = (check_data.BATCH_SCALE, check_data.EPOCHS, check_data.MICRO_TOKENS)
    for preset in ("gve-3b", "gve-7b"):
        flags = parse_flags(train.Flags, ["--preset", preset], presets=train.PRESETS)
        assert described == (flags.batch_scale, flags.epochs, flags.micro_tokens)


def test_the_memory_formula_counts_the_lora_weights_that_a_model_has():
    gve = GVE.from_pretrained(REPO / "mini" / "base", lora=True)
    text = gve.core.config.text_config
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    counted = check_data.lora_weights(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, keys
    )
    assert counted == sum(p.numel() for p in gve.lora_parameters().values())
    # by hand: 2 x 3.75e9 + 16 x 27.6e6 bytes, and 27,200 tokens x (2 x 36 x 2048 + 40 x 11008)
    assert check_data.memory("3B", 27_200) == pytest.approx(
        (7.5e9 + 0.441e9 + 27_200 * 587_776) / 2**30, rel=0.001
    )


def test_every_bad_row_is_listed_with_file_and_line(media, mixture, tmp_path):
    assert command(mixture).returncode == 0
    (media / "broken.mp4").write_bytes(b"no")
    a = {"text": "a"}
    rows = [
        {"query": a, "positive": {"video": "a.mp4"}},
        {"query": a, "positive": {"video": "broken.mp4"}},
        {"query": a, "positive": {"text": "b"}, "negatives": 3},
        {"query": a, "positive": {"video": "../x.mp4"}},
        {"query": a, "positives": {"video": "a.mp4"}},
        {"query": {}, "positive": {"video": "a.mp4"}},
        {"query": a, "positive": {"text": "b"}, "negatives": [{"image": "no.png"}]},
        {"query": a, "positive": {"image": "half \ud83d.png"}},
        {"query": a, "positive": {"image": "latin \udce9.png"}},
    ]
    (media / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    done = command(media / "rows.jsonl")
    assert done.returncode == 1
    bad = done.stdout.splitlines()
    numbers = [line.split("rows.jsonl:")[1].split(":")[0] for line in bad]
    assert numbers == [str(number) for number in range(2, 11)], done.stdout
    assert "negatives must be a list of items, got 3" in bad[1]
    assert done.stderr.strip().endswith("9 unusable rows")


def test_a_source_with_fewer_negatives_than_promised_is_named(tmp_path):
    row = {"query": {"text": "a"}, "positive": {"text": "b"}, "negatives": [{"text": "c"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    entry = {"name": "x", "task": "T2T", "path": "x.jsonl", "negatives": 2}
    (tmp_path / "m.json").write_text(json.dumps([entry]))
    (bad,) = check_data.check(tmp_path / "m.json")
    assert bad == f"{tmp_path}/x.jsonl:1: 1 negatives, the mixture promises 2"


def test_a_clip_that_kills_its_decoder_costs_its_row_alone(media, monkeypatch):
    rows = [
        {"query": {"text": c}, "positive": {"video": f"{c}.mp4"}, "negatives": None} for c in "abcd"
    ]
    file = media / "deadly.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(check_data.check(file, workers=2)) == []  # null: no negatives

    def kill(video):
        if "b.mp4" in video:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(check_data, "load_video", kill)
    (bad,) = check_data.check(file, workers=2)
    assert bad.split("deadly.jsonl:")[1] == "2: its decoder crashed"


@pytest.mark.parametrize(
    "content",
    [
        [{"name": "x", "task": "T2T", "path": "x.jsonl", "batchsize": 3}],
        ["x"],
        {"name": "x"},
    ],
)
def test_a_misspelt_mixture_is_named(tmp_path, content):
    (tmp_path / "x.jsonl").write_text('{"query": {"text": "a"}, "positive": {"text": "b"}}\n')
    (tmp_path / "m.json").write_text(json.dumps(content))
    problem = check_data.main([str(tmp_path / "m.json"), "--describe"])
    assert "m.json: not a mixture of sources" in problem


def test_unknown_flags_are_errors():
    assert command("x.jsonl", "--rot", "y").returncode == 2
