"""data.py and support/media.py: decoding, items, mixtures, training batches, and bad input."""

import json
import math
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import moving_square, write_video
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from data import (
    Collator,
    Source,
    TrainLoader,
    content_id,
    load_mixture,
    micro_batches,
    resolve,
)
from support.media import MediaError, load_image, load_video, sample_indices


@pytest.fixture(scope="module")
def collate(tiny):
    return Collator(Qwen2_5_VLProcessor.from_pretrained(tiny))


def first_batch(sources, collate, rows, **options):
    """The first training batch of a plan that draws `rows` of source 0."""
    plan = [(0, np.asarray(rows))]
    return next(TrainLoader(sources, collate, **options)(plan))


# Frames and images


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
    assert sample_indices(n, 8).tolist() == expected


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_odd_frame_counts_are_refused(frames):
    with pytest.raises(ValueError, match="even"):
        sample_indices(10, frames)


def columns(frames):
    """Where moving_square's square stands in each frame: the first column unlike the ground."""
    found = []
    for frame in frames:
        frame = frame.astype(int)
        difference = np.abs(frame - frame[0, -1]).sum(-1)  # (H, W) to the ground's colour
        found.append(int((difference.max(0) > 60).argmax()))
    return np.array(found)


def assert_columns(frames, expected):
    difference = np.abs(columns(frames) - expected)
    assert difference.max() <= 1, f"off by {difference.tolist()} columns"


def test_decoded_frames_are_the_ones_asked_for(media):
    path = str(media / "a.mp4")
    truth = columns(moving_square(16, seed=0))

    frames, seconds = load_video(path)
    assert frames.shape == (8, 56, 56, 3) and frames.dtype == np.uint8 and seconds == 2.0
    assert_columns(frames, truth[[0, 2, 4, 6, 9, 11, 13, 15]])

    window, seconds = load_video({"path": path, "start": 0.5, "end": 1.5})  # frames 4 .. 11
    assert seconds == 1.0
    assert_columns(window, truth[4:12])

    one, seconds = load_video({"path": path, "start": 1.0, "end": 1.01})  # at least one frame
    assert seconds == 0.125
    assert_columns(one, truth[8])

    picture = load_image({"video": path, "time": 1.0})
    assert picture.shape == (56, 56, 3)
    assert_columns([picture], truth[8])


def test_short_clips_and_frame_folders(media):
    frames, seconds = load_video(str(media / "short.mp4"))
    assert frames.shape[0] == 8 and seconds == pytest.approx(3 / 8)

    write_video(media / "one.mp4", moving_square(1))
    frames, seconds = load_video(str(media / "one.mp4"))
    assert frames.shape[0] == 8 and (frames == frames[0]).all() and seconds == pytest.approx(1 / 8)

    folder, seconds = load_video(str(media / "frames"))
    assert folder.shape == (8, 56, 56, 3) and seconds == 10 / 8  # 8 frames per second unless told
    assert_columns(folder, columns(moving_square(10, seed=7))[[0, 1, 3, 4, 5, 6, 8, 9]])
    assert load_video({"path": str(media / "frames"), "fps": 2})[1] == 5.0


def damaged(media, folder):
    """Write one file for each way in which a video can be bad -> {name: path}."""
    good = (media / "a.mp4").read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a video at all\n" * 20,
        "truncated": good[: len(good) // 2],
        "header": b"\0" * 200 + good[200:],
        "jpeg": (media / "frames" / "000.jpg").read_bytes()[:100],
    }
    paths = {"missing": folder / "gone.mp4"}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.mp4"
        paths[name].write_bytes(content)
    return paths


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
    """Decoders conceal such damage: the right number of frames, or an error that names the file."""
    good = bytearray((media / "wide.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for trial in range(10):
        broken = bytearray(good)
        for place in rng.integers(0, len(good), 40):
            broken[place] = int(rng.integers(256))
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


def test_tiny_odd_and_extreme_sizes(collate, media, tmp_path):
    for width, height in ((1, 1), (3, 5), (57, 31), (3000, 1500)):
        path = tmp_path / f"{width}x{height}.png"
        Image.new("RGB", (width, height), (10, 200, 30)).save(path)
        grid = collate.prepare({"image": str(path)})["image_grid_thw"][0]
        assert 4 <= grid.prod() // 4 <= 256

    Image.new("RGB", (2000, 3)).save(tmp_path / "strip.png")
    with pytest.raises(MediaError, match="strip.png.*aspect ratio"):
        collate.prepare({"image": str(tmp_path / "strip.png")})

    for max_tokens in (4, 20, 200):
        small = Collator(collate.processor, max_tokens=max_tokens)
        grid = small.prepare({"video": str(media / "wide.mp4")})["video_grid_thw"][0]
        assert grid[0] == 4 and grid[1] * grid[2] // 4 <= max_tokens


# Items


def test_paths_stay_under_their_roots(media, tmp_path):
    inside = str(media / "a.mp4")
    assert resolve({"video": "a.mp4"}, media) == {"video": inside}
    assert resolve({"video": inside}, media)["video"] == inside

    os.symlink(inside, tmp_path / "link.mp4")
    for bad in ("../a.mp4", inside, "link.mp4"):
        with pytest.raises(ValueError, match="leaves the allowed roots"):
            resolve({"video": bad}, tmp_path)
    assert resolve({"video": "link.mp4"}, tmp_path, [media])["video"] == inside

    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        resolve({"video": "gone.mp4"}, media)


def test_a_sibling_folder_whose_name_begins_like_a_root_is_outside_it(media, tmp_path):
    root = tmp_path / "root"
    sibling = tmp_path / "root-x"
    root.mkdir()
    sibling.mkdir()
    shutil.copy(media / "a.mp4", sibling / "a.mp4")
    os.symlink(sibling / "a.mp4", root / "link.mp4")

    for path in (str(sibling / "a.mp4"), "../root-x/a.mp4", "link.mp4"):
        for media_item in ({"video": path}, {"image": {"video": path, "time": 0}}):
            with pytest.raises(ValueError, match="leaves the allowed roots"):
                resolve(media_item, root)
    with pytest.raises(ValueError, match="leaves the allowed roots"):
        resolve({"video": str(sibling / "a.mp4")}, media, [root])

    allowed = resolve({"video": "../root-x/a.mp4"}, root, [sibling])
    assert allowed == {"video": str(sibling / "a.mp4")}


@pytest.mark.parametrize(
    "item, message",
    [
        ({}, "non-empty"),
        ({"text": ""}, "non-empty"),
        ({"text": 3}, "text must be a string"),
        ({"video": {"path": "a.mp4", "begin": 1}}, "path or a dict of path and numbers"),
        ({"image": {"video": "a.mp4"}}, "image must be a path or a dict of video and numbers"),
        ({"video": 7}, "video must be a path"),
        ({"video": {"path": "a.mp4", "end": "1"}}, "a.mp4: end must be a number"),
        ({"video": {"path": "a.mp4", "end": True}}, "a.mp4: end must be a number"),
        ({"video": {"path": "a.mp4", "end": math.inf}}, "a.mp4: end must be finite"),
        ({"video": {"path": "a.mp4", "start": math.nan}}, "a.mp4: start must be finite"),
        ({"video": {"path": "a.mp4", "start": 2, "end": 1}}, "a.mp4: end 1 must come after start"),
        ({"video": {"path": "frames", "fps": 0}}, "frames: fps must be above 0"),
        ({"image": {"video": "a.mp4", "time": -1}}, "a.mp4: time must be finite and not negative"),
        ("x", "an item needs"),
    ],
)
def test_wrong_items_are_named(media, item, message):
    with pytest.raises(ValueError, match=message):
        resolve(item, media)


def test_content_ids_follow_content(media):
    a, b = str(media / "a.mp4"), str(media / "b.mp4")
    text = content_id({"text": "A  red ball"})
    assert content_id({"text": "a red ball "}) == text

    different = [
        {"text": "a red cube"},
        {"video": a},
        {"video": b},
        {"video": {"path": a, "start": 1}},
        {"image": {"video": a, "time": 1}},
        {"image": a},
        {"video": a, "text": "a red ball"},
    ]
    ids = {content_id(item) for item in different}
    assert len(ids) == len(different) and text not in ids
    assert all(0 <= number < 2**63 for number in ids)


@pytest.mark.parametrize(
    "item, other",
    [
        ({"text": "Ein Caf\u00e9"}, {"text": "ein cafe\u0301"}),  # composed, decomposed
        ({"text": "\u1e9b\u0323"}, {"text": "\u017f\u0323\u0307"}),  # Unicode's own example of NFC
        ({"video": "a"}, {"video": {"path": "a"}}),
        ({"video": "a"}, {"video": {"path": "a", "start": 0, "end": None, "fps": None}}),
        ({"video": "a"}, {"video": {"end": None, "start": -0.0, "path": "a"}}),
        ({"video": {"path": "a", "end": 2}}, {"video": {"path": "a", "start": 0.0, "end": 2.0}}),
        ({"image": {"video": "a", "time": 0}}, {"image": {"video": "a", "time": 0.0}}),
        ({"image": "a", "text": " \n"}, {"image": "a"}),
    ],
)
def test_content_is_the_same_however_it_is_written(item, other):
    assert content_id(item) == content_id(other)


@pytest.mark.parametrize(
    "item, other",
    [
        ({"video": {"path": "a", "end": 0}}, {"video": "a"}),
        ({"video": {"path": "a", "start": 1}}, {"video": {"path": "a", "end": 1}}),
        ({"video": {"path": "a", "fps": 1}}, {"video": {"path": "a", "end": 1}}),
        ({"image": {"video": "a", "time": 0}}, {"image": "a"}),
        ({"image": "a"}, {"video": "a"}),
        ({"text": "a"}, {"text": "\u00e4"}),
    ],
)
def test_other_content_has_another_id(item, other):
    assert content_id(item) != content_id(other)


def test_a_name_that_no_file_can_have_is_said_and_one_that_is_not_utf8_is_read(tmp_path):
    for name in ("a\0.png", "half \ud83d.png"):
        for item in ({"image": name}, {"video": {"path": name}}):
            with pytest.raises(ValueError, match="cannot be a file's name"):
                resolve(item, tmp_path)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    found = resolve({"image": "caf\udce9.png"}, tmp_path)
    assert found == {"image": f"{tmp_path}/caf\udce9.png"}


# Mixtures


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


def test_an_index_finds_every_row_and_costs_16_bytes_a_row_while_it_is_built(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = b'{"query": {"text": "%d"}, "positive": {"text": "b"}}'
    lines = [line % i for i in range(100_000)]
    lines[5] = b" \t\r"  # blank
    lines[6] = b""
    content = b"\xef\xbb\xbf" + b"\r\n".join(lines)  # a BOM, CRLF, no last newline
    path.write_bytes(content)

    tracemalloc.start()
    source = Source("s", "T2T", str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 99_998
    assert peak < 2 * 16 * len(source) + 300_000  # and the file's buffer

    for row, i in ((0, 0), (4, 4), (5, 7), (99_997, 99_999)):
        assert source.load(row)[0] == {"text": str(i)}
        assert source.where(row) == f"{path}:{i + 1}"
    assert source.facts()["rows"] == 99_998
    assert source.facts()["bytes"] == len(content)
    path.write_bytes(content.replace(b'"7"', b'"8"'))
    assert Source("s", "T2T", str(path)).facts()["hash"] != source.facts()["hash"]


def test_a_mixture_may_begin_with_a_byte_order_mark_and_have_crlf(mixture, media):
    path = media / "bom.json"
    entries = json.loads(mixture.read_text())
    content = json.dumps(entries, indent=1).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    names = [source.name for source in load_mixture(path)]
    assert names == [entry["name"] for entry in entries]


# Training batches


def query_texts(batches, collate):
    """The prompts of all queries, without padding and in alphabetical order."""
    texts = []
    for batch in batches:
        for micro_batch in batch.query.micro_batches:
            for text in collate.tokenizer.batch_decode(micro_batch["input_ids"]):
                texts.append(text.replace("<|endoftext|>", ""))
    return sorted(texts)


def test_ranks_share_a_global_batch_without_overlap(collate, mixture):
    sources = load_mixture(mixture)
    rows = [5, 2, 0, 6, 1, 3]
    whole = query_texts([first_batch(sources, collate, rows, micro_batch=2)], collate)
    assert len(whole) == 6

    for world in (1, 2, 3):
        parts = []
        for rank in range(world):
            options = {"rank": rank, "world": world, "micro_batch": 2}
            parts.append(first_batch(sources, collate, rows, **options))

        assert sum(len(part.positive.ids) for part in parts) == 6
        assert {part.source for part in parts} == {0}
        for part in parts:
            assert all(len(batch["input_ids"]) <= 2 for batch in part.query.micro_batches)
        assert query_texts(parts, collate) == whole


@pytest.mark.parametrize(("most", "tokens"), [(3, 0), (64, 40), (4, 30), (1, 0), (2, 5)])
def test_micro_batches_hold_every_item_once_within_their_bounds(most, tokens):
    lengths = [7, 30, 3, 3, 12, 8, 9, 30, 1, 12]
    groups = micro_batches(lengths, most, tokens)
    assert sorted(sum(groups, [])) == list(range(10))
    for group in groups:
        padded = max(lengths[i] for i in group) * len(group)
        assert len(group) <= most
        assert not tokens or padded <= tokens or len(group) == 1

    in_order = [lengths[i] for i in sum(groups, [])]
    assert in_order == sorted(in_order)
    assert micro_batches([], most, tokens) == []
    if (most, tokens) == (64, 40):  # by hand: 1 3 3 7 8 | 9 12 12 | 30 | 30
        assert [len(group) for group in groups] == [5, 3, 1, 1]


def test_vectors_find_their_rows_again(collate, mixture):
    """The sum of a prompt's token ids stands for its vector."""
    sources = load_mixture(mixture)
    query = first_batch(sources, collate, range(7), micro_batch=2).query
    vectors = []
    for batch in query.micro_batches:
        vectors += (batch["input_ids"] * batch["attention_mask"]).sum(1).tolist()

    expected = []
    for row in range(7):
        item = sources[0].load(row)[0]
        expected.append(sum(collate.prepare(item, sources[0].instruction)["ids"]))
    assert [vectors[place] for place in query.order] == expected != vectors


def test_an_unusable_row_is_replaced_by_the_next_one_for_any_rank_and_listed(
    collate, media, mixture
):
    lines = (media / "t2v.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"query": {"text": "gone"}, "positive": {"video": "gone.mp4"}})
    lines[4] = lines[4][:-5]
    (media / "hurt.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"name": "hurt", "task": "T2V", "path": "hurt.jsonl", "batch_size": 7}
    (media / "hurt.json").write_text(json.dumps([entry]))
    sources = load_mixture(media / "hurt.json")

    batch = first_batch(sources, collate, range(7))
    ids = batch.positive.ids.tolist()
    assert len(ids) == 7 and ids[2] == ids[3] and ids[4] == ids[5]
    assert len(batch.bad) == 2
    assert "hurt.jsonl:3" in batch.bad[0] and "hurt.jsonl:5" in batch.bad[1]

    third = first_batch(sources, collate, range(7), rank=2, world=3)
    assert third.positive.ids.tolist() == ids[2::3]


def test_a_row_whose_medium_does_not_decode_is_named_by_file_and_line(collate, media, mixture):
    (media / "noise.mp4").write_bytes(b"not a video")
    row = {"query": {"text": "a"}, "positive": {"video": "noise.mp4"}}
    good = {"query": {"text": "b"}, "positive": {"video": "a.mp4"}}
    (media / "noise.jsonl").write_text(f"\n{json.dumps(row)}\n{json.dumps(good)}\n")
    entry = {"name": "noise", "task": "T2V", "path": "noise.jsonl"}
    (media / "noise.json").write_text(json.dumps([entry]))

    (reason,) = first_batch(load_mixture(media / "noise.json"), collate, [0]).bad
    assert reason.startswith(f"{media / 'noise.jsonl'}:2: ") and "noise.mp4" in reason


def test_decoders_ahead_of_training_leave_it_its_threads(collate, mixture, monkeypatch):
    sources = load_mixture(mixture)
    said = []
    # Pretended: a real pool of threads would make other tests' forks hang.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", said.append)

    apart = first_batch(sources, collate, range(7), workers=1)
    inline = first_batch(sources, collate, range(7), workers=0)
    assert set(said) == {3}
    pixels = [batch.positive.micro_batches[0]["pixel_values_videos"] for batch in (apart, inline)]
    assert torch.equal(*pixels)
