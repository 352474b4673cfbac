"""data.py: decoding, items, mixtures and the sampler, with every kind of bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moving_square, write_video
from transformers import Qwen2_5_VLProcessor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import (  # noqa: E402
    Collator,
    MediaError,
    content_id,
    load_image,
    load_mixture,
    load_video,
    micro_batches,
    resolve,
)
from extras.check_data import check  # noqa: E402


@pytest.mark.parametrize(
    "n, expected",
    [
        (16, [0, 2, 4, 6, 9, 11, 13, 15]),
        (8, list(range(8))),
        (1, [0] * 8),
        (3, [0, 0, 1, 1, 1, 1, 2, 2]),
        (300, [0, 43, 85, 128, 171, 214, 256, 299]),
    ],
)
def test_eight_uniform_indices(n, expected):
    assert data.sample_indices(n, 8).tolist() == expected


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_odd_frame_counts_are_refused(frames):
    with pytest.raises(ValueError, match="even"):
        data.sample_indices(10, frames)


def columns(frames):
    """Where the square of moving_square stands in each frame: the first column that differs from the ground."""
    return [
        int((np.abs(f.astype(int) - f[0, -1].astype(int)).sum(-1).max(0) > 60).argmax())
        for f in frames
    ]


def test_decoded_frames_are_the_ones_asked_for(media):
    truth = columns(moving_square(16, seed=0))
    frames, seconds = load_video(str(media / "a.mp4"))
    assert frames.shape == (8, 56, 56, 3) and frames.dtype == np.uint8 and seconds == 2.0
    assert (
        np.abs(np.array(columns(frames)) - [truth[i] for i in (0, 2, 4, 6, 9, 11, 13, 15)]).max()
        <= 1
    )
    window, seconds = load_video(
        {"path": str(media / "a.mp4"), "start": 0.5, "end": 1.5}
    )  # frames 4 .. 11
    assert seconds == 1.0 and np.abs(np.array(columns(window)) - truth[4:12]).max() <= 1
    one, seconds = load_video(
        {"path": str(media / "a.mp4"), "start": 1.0, "end": 1.01}
    )  # at least one frame
    assert seconds == 0.125 and np.abs(np.array(columns(one)) - truth[8]).max() <= 1
    picture = load_image({"video": str(media / "a.mp4"), "time": 1.0})
    assert picture.shape == (56, 56, 3) and abs(columns([picture])[0] - truth[8]) <= 1


def test_short_clips_and_frame_folders(media):
    frames, seconds = load_video(str(media / "short.mp4"))
    assert frames.shape[0] == 8 and seconds == pytest.approx(3 / 8)
    write_video(media / "one.mp4", moving_square(1))
    frames, seconds = load_video(str(media / "one.mp4"))
    assert frames.shape[0] == 8 and (frames == frames[0]).all() and seconds == pytest.approx(1 / 8)
    folder, seconds = load_video(str(media / "frames"))
    assert folder.shape == (8, 56, 56, 3) and seconds == 10 / 8  # 8 frames per second unless told
    assert (
        np.abs(
            np.array(columns(folder))
            - np.array(columns(moving_square(10, seed=7)))[[0, 1, 3, 4, 5, 6, 8, 9]]
        ).max()
        <= 1
    )
    assert load_video({"path": str(media / "frames"), "fps": 2})[1] == 5.0


def test_av1_is_read_by_pyav_and_said_once(tmp_path):
    write_video(tmp_path / "av1.mp4", moving_square(height=64, width=64), codec="libsvtav1")
    with pytest.warns(UserWarning, match="PyAV reads those"):
        frames, seconds = load_video(str(tmp_path / "av1.mp4"))
    assert frames.shape == (8, 64, 64, 3) and seconds == 2.0


def damaged(media, folder):
    """One file for each way in which a video can be bad -> {name: path}."""
    good = (media / "a.mp4").read_bytes()
    files = {
        "empty": b"",
        "text": b"not a video at all\n" * 20,
        "truncated": good[: len(good) // 2],
        "header": b"\0" * 200 + good[200:],
        "jpeg": (media / "frames" / "000.jpg").read_bytes()[:100],
    }
    for name, content in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return {**{name: folder / f"{name}.mp4" for name in files}, "missing": folder / "gone.mp4"}


def test_bad_videos_raise_one_error_that_names_the_file(media, tmp_path):
    for name, path in damaged(media, tmp_path).items():
        with pytest.raises((MediaError, FileNotFoundError), match=path.name):
            load_video(str(path))
            pytest.fail(name)
        with pytest.raises((MediaError, FileNotFoundError), match=path.name):
            load_image({"video": str(path), "time": 0})
        with pytest.raises((MediaError, FileNotFoundError), match=path.name):
            load_image(str(path))
    (tmp_path / "none").mkdir()
    with pytest.raises(MediaError, match="without frames"):
        load_video(str(tmp_path / "none"))


def test_bytes_damaged_inside_the_stream_never_end_the_process(media, tmp_path):
    good = bytearray((media / "wide.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for trial in range(
        10
    ):  # decoders conceal such damage: frames of the right shape, or an error that names the file
        broken = bytearray(good)
        for at in rng.integers(0, len(good), 40):
            broken[at] = int(rng.integers(256))
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(broken)
        try:
            assert load_video(str(path))[0].shape[0] == 8
        except MediaError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("spec", [{"start": 5.0}, {"start": -1}, {"start": 1.0, "end": 0.5}])
def test_windows_outside_the_clip_are_errors(media, spec):
    with pytest.raises(MediaError, match="a.mp4"):
        load_video({"path": str(media / "a.mp4"), **spec})
    with pytest.raises(MediaError, match="a.mp4"):
        load_image({"video": str(media / "a.mp4"), "time": 2.5})


def test_tiny_odd_and_extreme_sizes(tiny, media, tmp_path):
    from PIL import Image

    collate = Collator(Qwen2_5_VLProcessor.from_pretrained(tiny))
    for width, height in ((1, 1), (3, 5), (57, 31), (3000, 1500)):
        path = tmp_path / f"{width}x{height}.png"
        Image.new("RGB", (width, height), (10, 200, 30)).save(path)
        grid = collate.prepare({"image": str(path)})["image_grid_thw"][0]
        assert 4 <= grid.prod() // 4 <= 256
    Image.new("RGB", (2000, 3)).save(tmp_path / "strip.png")
    with pytest.raises(MediaError, match="strip.png.*aspect ratio"):
        collate.prepare({"image": str(tmp_path / "strip.png")})
    for max_tokens in (4, 20, 200):
        grid = Collator(collate.processor, max_tokens=max_tokens).prepare(
            {"video": str(media / "wide.mp4")}
        )["video_grid_thw"][0]
        assert grid[0] == 4 and grid[1] * grid[2] // 4 <= max_tokens


def test_paths_stay_under_their_roots(media, tmp_path):
    assert resolve({"video": "a.mp4"}, media) == {"video": str(media / "a.mp4")}
    assert resolve({"video": str(media / "a.mp4")}, media)["video"] == str(media / "a.mp4")
    link = tmp_path / "link.mp4"
    os.symlink(media / "a.mp4", link)
    for bad in ("../a.mp4", str(media / "a.mp4"), "link.mp4"):
        with pytest.raises(ValueError, match="leaves the allowed roots"):
            resolve({"video": bad}, tmp_path)
    assert resolve({"video": "link.mp4"}, tmp_path, [media])["video"] == str(media / "a.mp4")
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        resolve({"video": "gone.mp4"}, media)


@pytest.mark.parametrize(
    "item, message",
    [
        ({}, "non-empty"),
        ({"text": ""}, "non-empty"),
        ({"text": 3}, "text must be a string"),
        ({"video": {"path": "a.mp4", "begin": 1}}, "path or a dict of path and numbers"),
        ({"image": {"video": "a.mp4"}}, "image must be a path or a dict of video and numbers"),
        ({"video": 7}, "video must be a path"),
        ({"video": {"path": "a.mp4", "end": "1"}}, "numbers"),
        ("x", "an item needs"),
    ],
)
def test_wrong_items_are_named(media, item, message):
    with pytest.raises(ValueError, match=message):
        resolve(item, media)


def test_content_ids_follow_content(media):
    a, b = str(media / "a.mp4"), str(media / "b.mp4")
    same = [content_id({"text": "A  red ball"}), content_id({"text": "a red ball "})]
    others = [
        content_id(x)
        for x in (
            {"text": "a red cube"},
            {"video": a},
            {"video": b},
            {"video": {"path": a, "start": 1}},
            {"image": {"video": a, "time": 1}},
            {"image": a},
            {"video": a, "text": "a red ball"},
        )
    ]
    assert same[0] == same[1] and len({same[0], *others}) == len(others) + 1
    assert all(0 <= i < 2**63 for i in others)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": 3}, "keys: name, task"),
        ({"task": "V2X"}, "accepted: T2T"),
        ({"path": "gone.jsonl"}, "No such file.*gone"),
        ({"path": "empty.jsonl"}, "empty"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": "4"}, "must be int"),
        ({"name": None}, "must be str"),
    ],
)
def test_wrong_mixtures_name_file_entry_and_what_is_accepted(media, mixture, change, message):
    (media / "empty.jsonl").write_text("\n")
    entries = json.loads(mixture.read_text())
    path = media / "wrong.json"
    path.write_text(json.dumps([entries[0], {**entries[1], **change}]))
    with pytest.raises(ValueError, match=f"(?s)wrong.json: entry 1.*{message}"):
        load_mixture(path)
    path.write_text(json.dumps([entries[0], entries[0]]))
    with pytest.raises(ValueError, match="entry 1 .*same name"):
        load_mixture(path)


def test_ranks_share_a_global_batch_without_overlap(tiny, mixture):
    sources = load_mixture(mixture)
    plan = [(0, np.array([5, 2, 0, 6, 1, 3]))]
    collate = Collator(Qwen2_5_VLProcessor.from_pretrained(tiny))
    for world in (1, 2, 3):
        parts = [
            next(batches(plan, sources, collate, rank=r, world=world, micro_batch=2))
            for r in range(world)
        ]
        ids = torch.cat([p["positive_ids"] for p in parts])
        texts = sorted(
            t
            for p in parts
            for b in p["query"]
            for t in collate.tokenizer.batch_decode(b["input_ids"])
        )
        assert len(ids) == 6 and len(texts) == 6 and {p["source"] for p in parts} == {0}
        assert all(len(b["input_ids"]) <= 2 for p in parts for b in p["query"])
        if world == 1:
            whole = texts
        assert [t.replace("<|endoftext|>", "") for t in texts] == [
            t.replace("<|endoftext|>", "") for t in whole
        ]


@pytest.mark.parametrize(("most", "tokens"), [(3, 0), (64, 40), (4, 30), (1, 0), (2, 5)])
def test_micro_batches_hold_every_item_once_within_their_bounds(most, tokens):
    lengths = [7, 30, 3, 3, 12, 8, 9, 30, 1, 12]
    groups = micro_batches(lengths, most, tokens)
    assert sorted(sum(groups, [])) == list(range(10))
    for group in groups:
        width = max(lengths[i] for i in group)
        assert len(group) <= most and (
            not tokens or width * len(group) <= tokens or len(group) == 1
        )
    flat = [lengths[i] for i in sum(groups, [])]
    assert flat == sorted(flat) and micro_batches([], most, tokens) == []
    if (most, tokens) == (64, 40):  # by hand: 1 3 3 7 8 | 9 12 12 | 30 | 30
        assert list(map(len, groups)) == [5, 3, 1, 1]


def test_vectors_find_their_rows_again(tiny, mixture):
    sources, collate = load_mixture(mixture), Collator(Qwen2_5_VLProcessor.from_pretrained(tiny))
    step = next(batches([(0, np.arange(7))], sources, collate, micro_batch=2))
    read = [
        int(ids[mask.bool()].sum())
        for batch in step["query"]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    rows = [
        sum(collate.prepare(sources[0].load(row)[0], sources[0].instruction)["ids"])
        for row in range(7)
    ]
    assert [read[at] for at in step["query_at"]] == rows != read


def test_an_unusable_row_is_replaced_by_the_next_one_for_any_rank_and_listed(
    tiny, media, mixture, tmp_path
):
    lines = (media / "t2v.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"query": {"text": "gone"}, "positive": {"video": "gone.mp4"}})
    lines[4] = lines[4][:-5]
    (media / "hurt.jsonl").write_text("\n".join(lines) + "\n")
    (media / "hurt.json").write_text(
        json.dumps([{"name": "hurt", "task": "T2V", "path": "hurt.jsonl", "batch_size": 7}])
    )
    sources = load_mixture(media / "hurt.json")
    collate = Collator(Qwen2_5_VLProcessor.from_pretrained(tiny))
    step = next(batches([(0, np.arange(7))], sources, collate))
    ids = step["positive_ids"].tolist()
    assert len(ids) == 7 and ids[2] == ids[3] and ids[4] == ids[5]
    assert (
        len(step["bad"]) == 2
        and "hurt.jsonl:3" in step["bad"][0]
        and "hurt.jsonl:5" in step["bad"][1]
    )
    third = next(batches([(0, np.arange(7))], sources, collate, rank=2, world=3))
    assert third["positive_ids"].tolist() == step["positive_ids"][2::3].tolist()


def test_decoders_ahead_of_training_leave_it_its_threads(tiny, mixture, monkeypatch):
    sources, collate, said = (
        load_mixture(mixture),
        Collator(Qwen2_5_VLProcessor.from_pretrained(tiny)),
        [],
    )
    monkeypatch.setattr(
        torch, "get_num_threads", lambda: 3
    )  # a pool of threads that exists would make other tests' forks hang
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    apart, inline = (
        next(batches([(0, np.arange(7))], sources, collate, workers=n)) for n in (1, 0)
    )
    assert set(said) == {3}
    assert torch.equal(
        apart["positive"][0]["pixel_values_videos"], inline["positive"][0]["pixel_values_videos"]
    )


def command(*words):
    return subprocess.run(
        [sys.executable, "data.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_check_lists_every_bad_row_with_file_and_line(media, mixture, tmp_path):
    assert command("check", mixture).returncode == 0
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
    ]
    (media / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    done = command("check", media / "rows.jsonl")
    assert done.returncode == 1
    bad, total = done.stdout.splitlines(), done.stderr.strip()
    assert [line.split("rows.jsonl:")[1].split(":")[0] for line in bad] == [
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
    ], done.stdout
    assert "negatives must be a list of items, got 3" in bad[1] and total.endswith(
        "7 unusable rows"
    )


def test_check_survives_what_kills_its_decoder(media, mixture, monkeypatch):
    rows = [
        {"query": {"text": c}, "positive": {"video": f"{c}.mp4"}, "negatives": None} for c in "abcd"
    ]
    (media / "deadly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(check(media / "deadly.jsonl", workers=2)) == []  # null: no negatives
    monkeypatch.setattr(
        "extras.check_data.load_video",
        lambda video: "b.mp4" in video and os.kill(os.getpid(), signal.SIGKILL),
    )
    assert [
        line.split("deadly.jsonl:")[1] for line in check(media / "deadly.jsonl", workers=2)
    ] == ["2: its decoder crashed"]


def test_a_misspelt_mixture_is_named(tmp_path):
    for content in (
        [{"name": "x", "task": "T2T", "path": "x.jsonl", "batchsize": 3}],
        ["x"],
        {"name": "x"},
    ):
        (tmp_path / "x.jsonl").write_text('{"query": {"text": "a"}, "positive": {"text": "b"}}\n')
        (tmp_path / "m.json").write_text(json.dumps(content))
        done = command("mixture", tmp_path / "m.json")
        assert (
            done.returncode == 1
            and "m.json: not a mixture of sources" in done.stderr
            and "Traceback" not in done.stderr
        )


def test_unknown_flags_are_errors():
    assert command("check", "x.jsonl", "--rot", "y").returncode == 2
