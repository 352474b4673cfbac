"""embed.py: order, failures, the cache, ranks and exact top-k."""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import embed  # noqa: E402
import eval as ev  # noqa: E402
import model  # noqa: E402
from embed import Flags, encode, main, top_k  # noqa: E402
from model import GVE  # noqa: E402
from support import cache as cache_module  # noqa: E402
from support.cache import FeatureStore, VectorCache, hash_key, hash_weights  # noqa: E402


@pytest.fixture(scope="module")
def gve(tiny):
    return GVE.from_pretrained(tiny)


def assert_close(ours, theirs, most=1e-6):
    error = (ours - theirs).abs()
    assert error.max() <= most, f"max {error.max():.2e}, mean {error.mean():.2e}"


# Order, batches, failures


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_a_bad_item_shifts_nothing(gve, media, workers):
    (media / "bad.mp4").write_bytes(b"bad")
    a = {"video": str(media / "a.mp4")}
    b = {"text": "b"}
    items = [
        a,
        {"text": "a longer text than the other"},
        {"video": str(media / "bad.mp4")},
        b,
        {"image": str(media / "i.png")},
        a,
        {"video": str(media / "nowhere.mp4")},
        b,
    ]
    good = [0, 1, 3, 4, 5, 7]
    vectors, failed = encode(gve, items, batch_tokens=200, workers=workers)

    assert sorted(failed) == [2, 6]
    assert "bad.mp4" in failed[2]
    assert "nowhere.mp4" in failed[6]
    assert vectors[[2, 6]].isnan().all()
    one_by_one = torch.cat([gve.embed([items[i]]) for i in good])
    assert_close(vectors[good], one_by_one, 1e-5)


def test_decoders_have_cores_of_their_own_and_the_threads_come_back(gve, media, monkeypatch):
    before = torch.get_num_threads()
    to_device = model.to_device
    seen = []

    def spy(*given):
        seen.append(torch.get_num_threads())
        return to_device(*given)

    monkeypatch.setattr(model, "to_device", spy)
    clips = [{"video": str(media / "a.mp4")}, {"video": str(media / "b.mp4")}]
    try:
        torch.set_num_threads(3)
        encode(gve, clips, workers=2, batch_tokens=1)
        assert seen == [1, 3]  # the last batch has the cores to itself
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_only_equal_items_share_a_vector(gve):
    texts = ["Red ball", "red  ball", "red ball", "Red ball"]
    vectors, _ = encode(gve, [{"text": text} for text in texts])
    assert torch.equal(vectors[0], vectors[3])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (vectors[i] - vectors[j]).abs().max() > 1e-3


def test_batches_hold_at_most_so_many_tokens_and_no_fewer_than_they_could(gve, media, monkeypatch):
    shapes = []
    forward = GVE.forward

    def spy(self, batch):
        shapes.append(tuple(batch["input_ids"].shape))
        return forward(self, batch)

    monkeypatch.setattr(GVE, "forward", spy)
    items = [{"text": "x" * n} for n in (900, 5, 80, 3, 70, 4, 200, 6)]
    items += [{"video": str(media / f"{name}.mp4")} for name in "abcd"]
    encode(gve, items, batch_tokens=700)

    collate = data.Collator(gve.processor)
    lengths = [len(collate.prepare(item)["ids"]) for item in items]
    assert sum(rows for rows, _ in shapes) == len(items)
    assert max(lengths) > 700
    assert all(rows * tokens <= 700 or rows == 1 for rows, tokens in shapes), shapes

    # Greedily: texts from short to long, then videos.
    expected = []
    batch = []
    for length in sorted(lengths[:8]) + lengths[8:]:
        if batch and max(*batch, length) * (len(batch) + 1) > 700:
            expected.append((len(batch), max(batch)))
            batch = []
        batch.append(length)
    expected.append((len(batch), max(batch)))
    assert shapes == expected


def write_damaged(folder, clip):
    """Write clips that cannot be used in ten ways -> {name that the reason must hold: item}."""
    content = clip.read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_text("<html>404 Not Found</html>" * 50)
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])  # its index was at the end
    (folder / "zeroed.mp4").write_bytes(bytes(len(content)))

    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        silence = np.zeros((1, 44100), np.float32)
        sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        sound.sample_rate = 44100
        for packet in [*stream.encode(sound), *stream.encode()]:
            file.mux(packet)

    heights = {"nothing": [], "torn": [40, 40], "uneven": [40, 44]}
    for name, of_frames in heights.items():
        (folder / name).mkdir()
        for i, height in enumerate(of_frames):
            frame = np.zeros((height, 40, 3), np.uint8)
            Image.fromarray(frame).save(folder / name / f"{i}.jpg")
    whole = (folder / "torn" / "0.jpg").read_bytes()
    (folder / "torn" / "1.jpg").write_bytes(whole[:100])

    files = ["empty.mp4", "page.mp4", "half.mp4", "zeroed.mp4", "sound.mp4", "absent.mp4"]
    items = {name: {"video": str(folder / name)} for name in [*files, *heights]}
    items[clip.name] = {"video": {"path": str(clip), "start": 60.0}}
    return items


def test_ten_damaged_clips_and_one_that_hangs_cost_nothing_but_themselves(
    gve, media, tmp_path, monkeypatch
):
    """200 clips. One decoder sleeps in C holding the interpreter's lock: only a kill ends it."""
    clips = []
    for i in range(189):
        path = tmp_path / f"{i:03d}.mp4"
        shutil.copy(media / f"{'abcd'[i % 4]}.mp4", path)
        clips.append({"video": {"path": str(path), "start": i % 5 / 10}})
    shutil.copy(media / "a.mp4", tmp_path / "hang.mp4")
    bad = write_damaged(tmp_path, tmp_path / "000.mp4")
    bad["hang.mp4"] = {"video": str(tmp_path / "hang.mp4")}
    items = clips + list(bad.values())
    random.Random(0).shuffle(items)

    load = data.open_clip

    def sleepy(video, frames):
        if "hang.mp4" in str(video):
            ctypes.PyDLL(None).sleep(1000)
        return load(video, frames)

    monkeypatch.setattr(data, "open_clip", sleepy)
    began = time.time()
    vectors, failed = encode(gve, items, workers=2, seconds=8)
    assert time.time() - began < 120

    assert len(failed) == 11
    for name, item in bad.items():
        assert name in failed[items.index(item)], name
    assert failed[items.index(bad["hang.mp4"])].endswith("not decoded within 8 s")
    good = [i for i in range(200) if i not in failed]
    assert len(good) == 189
    assert vectors[sorted(failed)].isnan().all()
    alone, _ = encode(gve, [items[i] for i in good])
    assert_close(vectors[good], alone)


def test_a_decoder_that_dies_is_replaced(gve, media, monkeypatch):
    load = data.open_clip

    def deadly(video, frames):
        if "b.mp4" in str(video):
            os.kill(os.getpid(), signal.SIGKILL)
        return load(video, frames)

    monkeypatch.setattr(data, "open_clip", deadly)
    items = [{"video": str(media / f"{name}.mp4")} for name in "abcd"]
    vectors, failed = encode(gve, items, workers=1)
    assert list(failed) == [1]
    assert "b.mp4" in failed[1] and "crashed" in failed[1]
    good = [0, 2, 3]
    assert_close(vectors[good], gve.embed([items[i] for i in good]))


# The cache


def cached_keys(folder):
    """Every key in a cache, in all its shards, as a person would read them."""
    keys = []
    for path in sorted(Path(folder).rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            keys.append(json.loads(line)["key"])
    return keys


@pytest.fixture
def items_seen(monkeypatch):
    """Return a function: how many items the model has been given since it was last asked."""
    seen = []
    forward = GVE.forward

    def spy(self, batch):
        seen.extend(batch["input_ids"])
        return forward(self, batch)

    def count():
        n = len(seen)
        seen.clear()
        return n

    monkeypatch.setattr(GVE, "forward", spy)
    return count


def test_what_is_in_the_cache_is_not_encoded_again_and_can_be_read_by_hand(
    tiny, gve, media, tmp_path, items_seen
):
    items = [
        {"text": "one"},
        {"video": str(media / "a.mp4")},
        {"text": "one"},
        {"video": str(media / "frames")},
    ]
    vectors, _ = encode(gve, items, "Find it.", cache=VectorCache(tmp_path, gve))
    assert items_seen() == 3
    other = GVE.from_pretrained(tiny)
    more = [*items[::-1], {"text": "two"}]
    again, failed = encode(other, more, "Find it.", cache=VectorCache(tmp_path, other), workers=1)
    assert items_seen() == 1
    assert not failed
    assert torch.equal(again[:4], vectors.flip(0))

    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    sizes = []
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line)["item"] for line in open(path)]
        shard = torch.from_numpy(np.load(path.with_suffix(".npy")))
        sizes.append(len(rows))
        assert len(shard) == len(rows)
        for row, vector in zip(rows, shard, strict=True):
            assert_close(vector[None], gve.embed([row], "Find it."))
    assert sorted(sizes) == [1, 3]

    key = json.loads((folder / "key.json").read_text())
    assert key["weights"] == hash_weights(gve)
    assert key["instruction"] == "Find it."
    assert key["frames"] == 8
    assert hash_key(key).startswith(folder.name), (
        "key.json is not all that the folder's name hashes"
    )


def test_another_model_prompt_protocol_or_file_never_meets_an_old_vector(
    tiny, media, tmp_path, items_seen
):
    clip = Path(shutil.copy(media / "a.mp4", tmp_path / "clip.mp4"))
    frames = Path(shutil.copytree(media / "frames", tmp_path / "frames"))
    items = [{"video": str(clip)}, {"video": str(frames)}]

    def encoded(gve=None, *args, **options):
        gve = gve or GVE.from_pretrained(tiny)
        cache = VectorCache(tmp_path / "cache", gve)
        _, failed = encode(gve, items, *args, **options, cache=cache)
        assert not failed
        return items_seen()

    assert encoded() == 2
    assert encoded() == 0
    for options in (
        {"instruction": "x"},
        {"frames": 4},
        {"max_tokens": 100},
        {"max_length": 4096},
    ):
        assert encoded(**options) == 2, options

    nudged = GVE.from_pretrained(tiny)
    with torch.no_grad():
        nudged.core.language_model.norm.weight[0] += 1e-3
    lora = GVE.from_pretrained(tiny, lora=True)
    paler = GVE.from_pretrained(tiny)
    paler.processor.video_processor.image_mean = [0.5, 0.5, 0.5]
    user = GVE.from_pretrained(tiny, prompt_style="user")
    mean = GVE.from_pretrained(tiny, pooling="mean")
    for gve in (nudged, lora, paler, user, mean):
        assert encoded(gve) == 2
    with torch.no_grad():
        next(p for name, p in lora.lora_parameters().items() if "lora_B" in name)[0, 0] = 1e-3
    assert encoded(lora) == 2

    os.utime(clip, ns=(1, 1))
    assert encoded() == 1
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(frames / "003.jpg")
    assert encoded() == 1
    assert encoded() == 0


def test_a_new_vectors_version_drops_old_vectors_and_features(
    gve, tmp_path, items_seen, monkeypatch
):
    def encoded():
        encode(gve, [{"text": "one"}], cache=VectorCache(tmp_path, gve))
        return items_seen()

    file, _ = FeatureStore(tmp_path).find(["video", "a.mp4"])
    assert FeatureStore(tmp_path).find(["video", "a.mp4"])[0] == file
    assert encoded() == 1
    assert encoded() == 0
    monkeypatch.setattr(cache_module, "VECTORS_VERSION", cache_module.VECTORS_VERSION + 1)
    assert encoded() == 1
    assert FeatureStore(tmp_path).find(["video", "a.mp4"])[0] != file


# The first 16 of 64 numbers of golden_items' vectors under conftest's tiny model (seed 0).
# fmt: off
GOLDEN = {
    "text": [
        -0.2547, 0.3940, 0.1109, 0.0573, -0.0176, -0.1322, -0.0644, -0.0517,
        -0.3161, -0.0666, -0.0923, -0.0016, 0.1946, 0.0877, 0.0843, 0.0025,
    ],
    "image": [
        0.0484, 0.1175, -0.0360, -0.0564, -0.0084, -0.1765, 0.0662, 0.2423,
        0.0684, 0.0425, 0.0361, 0.0792, 0.0636, -0.0199, 0.2141, -0.0149,
    ],
    "video": [
        -0.1121, 0.2976, 0.1043, 0.0501, -0.0183, -0.1861, -0.0220, 0.0083,
        -0.2064, -0.0736, 0.0725, 0.0227, 0.1741, 0.0039, 0.2364, -0.0302,
    ],
}
# fmt: on


def golden_items(folder):
    """Text, an image above the most vision tokens, a video below the least; no codec decides."""
    rng = np.random.default_rng(0)

    def save_mosaic(path, rows, columns, side):
        """Random squares of `side` pixels, so that every frame and every place differs."""
        colours = rng.integers(0, 256, (rows, columns, 3), np.uint8)
        Image.fromarray(colours.repeat(side, 0).repeat(side, 1)).save(path)

    save_mosaic(folder / "image.png", 10, 12, side=50)
    (folder / "video").mkdir()
    for i in range(12):
        save_mosaic(folder / "video" / f"{i:03d}.png", 5, 4, side=8)
    return {
        "text": {"text": "a red ball falls"},
        "image": {"image": str(folder / "image.png")},
        "video": {"video": {"path": str(folder / "video"), "fps": 2}, "text": "at night"},
    }


def test_vectors_are_those_of_this_vectors_version(gve, tmp_path):
    """Cached vectors outlive the code that made them, so a change of vectors must be noticed."""
    for kind, item in golden_items(tmp_path).items():
        found = gve.embed([item], "Find it.")[0, :16]
        error = (found - torch.tensor(GOLDEN[kind])).abs().max()
        assert error < 2e-3, (
            f"{kind}: vectors changed: raise VECTORS_VERSION and renew these numbers "
            f"(by up to {error:.4f}; now {[round(x, 4) for x in found.tolist()]})"
        )


def test_a_shard_is_there_only_with_both_files(gve, tmp_path, monkeypatch):
    """The run ends between the first and the second file."""
    replace = os.replace
    moved = []

    def third_fails(a, b):
        moved.append(b)
        if len(moved) == 3:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", third_fails)
        encode(gve, [{"text": "one"}], cache=VectorCache(tmp_path, gve))
    key, vectors_file, rows_file = moved
    assert key.name == "key.json"
    assert vectors_file.exists()
    assert not rows_file.exists()
    assert cached_keys(tmp_path) == []

    vectors, failed = encode(gve, [{"text": "one"}], cache=VectorCache(tmp_path, gve))
    assert not failed
    assert len(cached_keys(tmp_path)) == 1
    assert_close(vectors, gve.embed([{"text": "one"}]))


def encode_alone(*args, **options):
    """Encode in a process that will be killed.

    tqdm's lock is shared by forks, and a dead one that held it stops all others.
    """
    tqdm.set_lock(threading.RLock())
    encode(*args, **options)


def child_processes(pid):
    pids = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        pids += [int(word) for word in task.read_text().split()]
    return pids


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.split(")")[1].split()[0] != "Z"


def count_shards(folder):
    return len(list(folder.rglob("*.npy")))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes in /proc")
def test_killed_at_20_moments_it_goes_on_each_time_and_loses_and_repeats_nothing(
    gve, media, tmp_path
):
    items = [{"text": f"item {i}"} for i in range(120)]
    for i in range(40):
        for name in "abcd":
            items.append({"video": {"path": str(media / f"{name}.mp4"), "start": i / 100}})
    rng = random.Random(0)
    known = set()

    for attempt in range(20):
        cache = VectorCache(tmp_path, gve, every=0)
        work = multiprocessing.get_context("fork").Process(
            target=encode_alone,
            args=(gve, items),
            kwargs={"batch_tokens": 300, "workers": attempt % 2, "cache": cache},
        )
        work.start()
        # Strike amid the writing, whatever the machine's speed.
        enough = count_shards(tmp_path) + rng.randrange(5)
        while count_shards(tmp_path) < enough:
            assert work.is_alive(), f"it ended with status {work.exitcode} before the kills did"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        decoders = child_processes(work.pid)
        os.kill(work.pid, signal.SIGKILL)
        work.join()

        keys = cached_keys(tmp_path)
        assert len(set(keys)) == len(keys) and known <= set(keys), "an item twice, or lost"
        known = set(keys)
        for path in tmp_path.rglob("*.jsonl"):
            assert len(np.load(path.with_suffix(".npy"))) == len(path.read_text().splitlines())

        for _ in range(100):
            decoders = [pid for pid in decoders if is_running(pid)]
            if not decoders:
                break
            time.sleep(0.1)
        assert not decoders, "a decoder has outlived its parent"

    assert 0 < len(known) < len(items), "the kills did not meet the work"
    vectors, failed = encode(gve, items, cache=VectorCache(tmp_path, gve))
    assert not failed
    assert len(cached_keys(tmp_path)) == len(items)
    assert_close(vectors, encode(gve, items)[0])


def test_a_full_disk_is_named_and_what_was_embedded_stays(gve, tmp_path):
    texts = [{"text": f"line {i} " * 50} for i in range(40)]
    encode(gve, texts[:5], cache=VectorCache(tmp_path, gve))
    before = cached_keys(tmp_path)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal, SIGXFSZ
    # Room for neither the vectors nor, then, the rows of the cache.
    for size, message in ((8192, f"no room for 40 vectors.*{tmp_path}"), (12000, "too large")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=message):
                encode(gve, texts, cache=VectorCache(tmp_path, gve))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached_keys(tmp_path) == before
    encode(gve, texts, cache=VectorCache(tmp_path, gve))
    assert len(cached_keys(tmp_path)) == 40


def test_two_ranks_equal_one(tiny, media, tmp_path):
    rows = [{"text": f"a text of {n}" * n} for n in range(1, 9)]
    rows += [{"video": f"{name}.mp4"} for name in "abcdb"]
    rows += [{"image": "i.png"}]
    (media / "bad.mp4").write_bytes(b"bad")
    rows.insert(3, {"video": "bad.mp4"})
    path = media / "shared.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    flags = ["--ckpt", tiny, "--workers", "1", "--device", "cpu", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *torchrun, "embed.py", str(path), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("14 of 15 items") == 1, done.stderr
    assert "shared.jsonl:4:" in done.stdout
    keys = cached_keys(tmp_path / "two" / "cache")
    assert len(keys) == len(set(keys)) == 13
    assert count_shards(tmp_path / "two" / "cache") == 2

    main(Flags(str(path), ckpt=tiny, workers=1, device="cpu", out=str(tmp_path / "one")))
    one = torch.from_numpy(np.load(tmp_path / "one" / "vectors.npy"))
    two = torch.from_numpy(np.load(tmp_path / "two" / "vectors.npy"))
    assert torch.equal(one.isnan(), two.isnan())
    assert_close(one.nan_to_num(), two.nan_to_num())
    neighbours = top_k(one.nan_to_num(), one, 5)[1]
    assert torch.equal(neighbours, top_k(two.nan_to_num(), two, 5)[1])
    lines = (tmp_path / "one" / "items.jsonl").read_text()
    assert lines == (tmp_path / "two" / "items.jsonl").read_text()


# Exact top-k


@pytest.mark.parametrize(
    "n, m, k, block",
    [(7, 50, 5, 8), (3, 5, 9, 2), (13, 781, 10, 100), (4, 64, 64, 64), (1, 1, 1, 1)],
)
def test_top_k_is_exact_and_ties_go_by_corpus_order(n, m, k, block):
    torch.manual_seed(0)
    queries = torch.randint(-2, 3, (n, 3)).float()  # integers: many exact ties
    corpus = torch.randint(-2, 3, (m, 3)).float()
    scores, indices = top_k(queries, corpus, k, block=block, query_block=3)
    for i in range(n):
        row = [float(queries[i] @ c) for c in corpus]
        order = sorted(range(m), key=lambda j: (-row[j], j))[:k]
        assert indices[i].tolist() == order
        assert scores[i].tolist() == [row[j] for j in order]


def test_top_k_reads_a_memory_mapped_half_precision_corpus(tmp_path):
    corpus = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    np.save(tmp_path / "c.npy", corpus)
    queries = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    scores, indices = top_k(queries, np.load(tmp_path / "c.npy", mmap_mode="r"), 3, block=64)
    full = queries.astype(np.float64) @ corpus.astype(np.float64).T
    assert (indices.numpy() == np.argsort(-full, axis=1)[:, :3]).all()
    assert np.abs(scores.numpy() - np.sort(full)[:, ::-1][:, :3]).max() < 1e-4


def test_top_k_takes_any_order_of_scores_and_never_finds_a_nan():
    rising = torch.arange(1.0, 3001)[:, None]  # every score beats all before it
    queries = torch.tensor([[1.0], [-1.0], [0.0]])
    scores, indices = top_k(queries, rising, 7, block=500)
    assert indices.tolist() == [list(range(2999, 2992, -1)), list(range(7)), list(range(7))]
    assert scores[0].tolist() == list(range(3000, 2993, -1))

    rising[[0, 5]] = torch.nan
    scores, indices = top_k(torch.tensor([[-1.0]]), rising[:8], 8, block=3)
    assert indices.tolist() == [[1, 2, 3, 4, 6, 7, -1, -1]]
    assert scores[0, 6:].tolist() == [-torch.inf] * 2
    assert top_k(torch.ones(2, 1), torch.ones(0, 1), 3)[1].shape == (2, 0)


# The command


def test_command_writes_vectors_and_names_what_failed(tiny, media, tmp_path):
    rows = [
        {"id": "x", "text": "hello"},
        {"id": "y", "video": "gone.mp4"},
        {"id": "z", "video": "b.mp4"},
    ]
    path = media / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--ckpt", tiny, "--out", str(tmp_path), "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "embed.py", str(path), *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "2 of 3 items" in done.stdout.splitlines()[-1], done.stderr
    assert "1 failed" in done.stdout.splitlines()[-1]
    assert "1/1" not in done.stderr and "it/s" not in done.stderr  # no bars without a terminal
    assert "items.jsonl:2: video 'gone.mp4'" in done.stdout

    vectors = np.load(tmp_path / "vectors.npy")
    lines = [json.loads(line) for line in open(tmp_path / "items.jsonl")]
    assert [line["id"] for line in lines] == ["x", "y", "z"]
    assert "error" in lines[1]
    assert np.isnan(vectors[1]).all()
    gve = GVE.from_pretrained(tiny)
    expected = gve.embed([{"text": "hello"}, {"video": str(media / "b.mp4")}]).numpy()
    assert np.abs(vectors[[0, 2]] - expected).max() < 1e-5


def test_the_commands_prompt_style_and_frames_reach_the_vectors(tiny, media, tmp_path):
    path = media / "few.jsonl"
    rows = [{"text": "hello"}, {"video": "b.mp4"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    items = [rows[0], {"video": str(media / "b.mp4")}]

    made = []
    for i, (style, frames) in enumerate((("system", 8), ("user", 8), ("system", 4))):
        flags = Flags(
            str(path),
            ckpt=tiny,
            out=str(tmp_path / str(i)),
            instruction="Find it.",
            prompt_style=style,
            frames=frames,
            workers=0,
            device="cpu",
        )
        main(flags)
        made.append(np.load(tmp_path / str(i) / "vectors.npy"))
        gve = GVE.from_pretrained(tiny, prompt_style=style)
        expected = gve.embed(items, "Find it.", frames=frames).numpy()
        assert np.abs(made[-1] - expected).max() < 1e-5
    assert np.abs(made[0] - made[1]).max() > 1e-3
    assert np.abs(made[0] - made[2])[1].max() > 1e-3


def test_the_command_ends_with_one_line_for_a_missing_file():
    done = subprocess.run(
        [sys.executable, "embed.py", "gone.jsonl"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("embed.py:")
    assert "gone.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_s_media_are_embedded_and_its_failures_counted(
    tiny, media, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "clips"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    shutil.copy(media / "a.mp4", folder / "10.MP4")
    shutil.copy(media / "i.png", folder / "deep" / "i.png")
    shutil.copy(media / "i.png", folder / "deep" / ".hidden" / "i.png")
    (folder / "2.mkv").write_bytes(b"no video")
    (folder / "._10.MP4").write_bytes(b"a companion")
    (folder / "notes.txt").write_text("no media")
    os.symlink(folder, folder / "deep" / "round")
    open_clip = data.open_clip

    def noted(video, frames):
        return dataclasses.replace(open_clip(video, frames), note="10.MP4: cut off")

    monkeypatch.setattr(data, "open_clip", noted)
    flags = Flags(str(folder), ckpt=tiny, out=str(tmp_path / "out"), workers=0, device="cpu")
    assert main(flags) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"{tmp_path / 'out'}: 2 of 3 items embedded, dim 64; 1 failed")
    decoder = open_clip(str(media / "a.mp4"), 2).decoder
    assert said[-3:-1] == ["10.MP4: cut off", f"videos decoded by: {decoder} 1"]

    lines = [json.loads(line) for line in open(tmp_path / "out" / "items.jsonl")]
    names = ["10.MP4", "2.mkv", "deep/i.png"]
    assert [line["id"] for line in lines] == names
    assert [line["path"] for line in lines] == [str(folder / name) for name in names]
    assert "2.mkv" in lines[1]["error"] and "error" not in lines[0]
    gve = GVE.from_pretrained(tiny)
    expected = gve.embed([{"video": media / "a.mp4"}, {"image": media / "i.png"}])
    vectors = torch.from_numpy(np.load(tmp_path / "out" / "vectors.npy"))
    assert_close(vectors[[0, 2]], expected, 1e-6)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no videos or images here"):
        main(Flags(str(folder / "empty"), ckpt=tiny))


def test_the_commands_base_min_tokens_and_positions_reach_the_vectors(tiny, media, tmp_path):
    adapter = GVE.from_pretrained(tiny, lora=True)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.save_pretrained(tmp_path / "merged", merge=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/old/machine/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    path = media / "one.jsonl"
    path.write_text(json.dumps({"video": "b.mp4"}))

    for options in ({}, {"min_tokens": 9}, {"positions": "1d"}):
        flags = Flags(
            str(path),
            ckpt=str(tmp_path / "adapter"),
            base=tiny,
            out=str(tmp_path / "out"),
            workers=0,
            device="cpu",
            **options,
        )
        assert main(flags) == 0
        made = torch.from_numpy(np.load(tmp_path / "out" / "vectors.npy"))
        gve = GVE.from_pretrained(tiny, **options)
        assert_close(made, gve.embed([{"video": str(media / "b.mp4")}]))
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 3  # no setting meets another's


def test_evaluation_s_base_min_tokens_and_positions_reach_the_model_and_the_protocol(
    tiny, tmp_path, monkeypatch
):
    adapter = GVE.from_pretrained(tiny, lora=True)
    with torch.no_grad():
        for weights in adapter.lora_parameters().values():
            weights.fill_(0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.save_pretrained(tmp_path / "merged", merge=True)
    protocols = []
    monkeypatch.setattr(ev, "score_datasets", lambda *given: protocols.append(given[3]))
    flags = ev.Flags(ckpt=str(tmp_path / "adapter"), device="cpu")
    for options in ({}, {"min_tokens": 9, "positions": "1d", "base": tiny}):
        changed = dataclasses.replace(flags, **options)
        ev.score_checkpoint([], None, "m", changed, tmp_path / "out")
    assert [(p["min_tokens"], p["positions"]) for p in protocols] == [(4, "mrope"), (9, "1d")]

    # On its own merged base an adapter would take effect twice.
    (tmp_path / "i.jsonl").write_text('{"text": "a"}')
    merged = dataclasses.replace(flags, base=str(tmp_path / "merged"))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="merged holds other"):
        ev.score_checkpoint([], None, "m", merged, tmp_path / "out")
    embedding = Flags(str(tmp_path / "i.jsonl"), ckpt=merged.ckpt, base=merged.base, device="cpu")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="merged holds other"):
        main(embedding)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\r{"text": "b"}', ":1: not JSON.*carriage return"),
        ('{"text": "a"}\n{"text": "b"}'.encode("utf-16"), ":1: not JSON.*UTF-16"),
        (b'[{"text": "a"}]', ":1: expected a JSON object.*a JSON list"),
        (
            b'{"text": "a"}\n{"text": \n',
            ":2: not JSON: Expecting value: line 2 column 1 .char 10.$",
        ),
    ],
)
def test_a_file_that_is_no_json_lines_is_told_so(tmp_path, content, message):
    (tmp_path / "i.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="i.jsonl" + message):
        embed.list_rows(tmp_path / "i.jsonl")


# Large inputs, kills of the whole evaluation


def anonymous_gb():
    """Memory of this process that no file backs, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e6


class Stopwatch:
    """Seconds by the clock and of processor time since it was made."""

    def __init__(self):
        self.clock = time.perf_counter()
        self.work = time.process_time()

    def stop(self):
        self.clock = time.perf_counter() - self.clock
        self.work = time.process_time() - self.work
        return self


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon in /proc")
@pytest.mark.parametrize("n, m", [(1000, 100_000), (10_000, 1_000_000)])
@pytest.mark.parametrize("largest, most_work", [(60, 2), (3, 5)])
def test_top_k_over_a_million_vectors_costs_little_beside_the_products(
    tmp_path, n, m, largest, most_work
):
    """1,024 wide in half precision on disk, k = 100.

    The values are integers of at most `largest`, so that scores are exact. With 60 ties are rare;
    with 3 nearly every query has one at its k-th place, which top_k settles by sorting.
    """
    corpus = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", np.float16, (m, 1024))
    for start in range(0, m, 50_000):
        size = (min(50_000, m), 1024)
        rng = np.random.default_rng(start)
        corpus[start : start + 50_000] = rng.integers(-largest, largest + 1, size, np.int8)
    corpus.flush()
    corpus = np.load(tmp_path / "c.npy", mmap_mode="r")
    queries = torch.randint(-largest, largest + 1, (n, 1024)).float()

    peak = anonymous_gb()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_gb())

    threading.Thread(target=watch).start()
    ours = Stopwatch()
    scores, indices = top_k(queries, corpus, 100)
    ours.stop()
    done.set()

    products = Stopwatch()
    for start in range(0, m, 16384):
        block = torch.from_numpy(np.array(corpus[start : start + 16384])).float()
        for row in range(0, n, 1024):
            queries[row : row + 1024] @ block.T
    products.stop()
    clock = ours.clock / products.clock
    work = ours.work / products.work
    print(
        f"{n} x {m}, values up to {largest}: {clock:.2f} times cast and product by the clock, "
        f"{work:.2f} in processor time, peak {peak:.2f} GB"
    )

    some = torch.arange(0, n, n // 20)
    full = []
    for start in range(0, m, 10_000):
        block = torch.from_numpy(np.array(corpus[start : start + 10_000])).float()
        full.append(queries[some] @ block.T)
    best, order = torch.cat(full, 1).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores[some], best[:, :100])
    assert torch.equal(indices[some], order[:, :100])
    assert peak <= 2
    assert work <= most_work


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "runs/mini/uvrb").is_dir(), reason="needs `python -m mini render`")
def test_mini_uvrb_killed_at_20_moments_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    gve = GVE.from_pretrained(ROOT / "mini/prober")
    rng = random.Random(0)
    finished = 0

    def score(out, workers):
        os.chdir(ROOT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GVE, "from_pretrained", lambda *args, **options: gve)
            patch.setattr(
                ev, "VectorCache", lambda folder, model: VectorCache(folder, model, every=0.2)
            )
            ev.main(ev.Flags(ckpt="mini/prober", out=str(out), device="cpu", workers=workers))

    for attempt in range(20):
        work = multiprocessing.get_context("fork").Process(
            target=score, args=(tmp_path / "killed", attempt % 3)
        )
        work.start()
        enough = count_shards(tmp_path) + rng.randrange(3)
        while count_shards(tmp_path) < enough and work.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        finished += not work.is_alive()
        work.kill()
        work.join()
    assert finished == 0, "the kills came too late"

    datasets = {}
    for out in ("killed", "whole"):
        score(tmp_path / out, 0)
        results = json.loads((tmp_path / out / "results.json").read_text())
        datasets[out] = results["datasets"]
    assert datasets["killed"] == datasets["whole"]
    for folder in (tmp_path / "killed" / "cache").iterdir():
        keys = cached_keys(folder)
        assert len(keys) == len(set(keys)), "an item was encoded twice"
    killed_keys = sorted(cached_keys(tmp_path / "killed" / "cache"))
    assert killed_keys == sorted(cached_keys(tmp_path / "whole" / "cache"))
