"""embed.py: order, failures, the cache, ranks and exact top-k."""

import ctypes
import json
import multiprocessing
import os
import random
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
from embed import Flags, encode, main, top_k  # noqa: E402
from model import GVE
from support.cache import VectorCache, hash_weights  # noqa: E402


@pytest.fixture(scope="module")
def gve(tiny):
    return GVE.from_pretrained(tiny)


def close(ours, theirs, most=1e-6):
    error = (ours - theirs).abs()
    assert error.max() <= most, f"max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_a_bad_item_shifts_nothing(gve, media, workers):
    (media / "bad.mp4").write_bytes(b"bad")
    a, b = {"video": str(media / "a.mp4")}, {"text": "b"}
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
    assert sorted(failed) == [2, 6] and "bad.mp4" in failed[2] and "nowhere.mp4" in failed[6]
    assert vectors[[2, 6]].isnan().all()
    close(vectors[good], torch.cat([gve.embed([items[i]]) for i in good]), 1e-5)


def test_decoders_have_cores_of_their_own_and_the_threads_come_back(gve, media, monkeypatch):
    before, seen, to_device = torch.get_num_threads(), [], embed.to_device
    monkeypatch.setattr(
        embed, "to_device", lambda *given: seen.append(torch.get_num_threads()) or to_device(*given)
    )
    try:
        torch.set_num_threads(3)
        encode(
            gve,
            [{"video": str(media / "a.mp4")}, {"video": str(media / "b.mp4")}],
            workers=2,
            batch_tokens=1,
        )
        assert (
            seen == [1, 3] and torch.get_num_threads() == 3
        )  # the last batch has the cores to itself
    finally:
        torch.set_num_threads(before)


def test_only_equal_items_share_a_vector(gve):
    vectors, _ = encode(
        gve, [{"text": t} for t in ("Red ball", "red  ball", "red ball", "Red ball")]
    )
    assert torch.equal(vectors[0], vectors[3])
    assert all((vectors[i] - vectors[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_batches_hold_at_most_so_many_tokens_and_no_fewer_than_they_could(gve, media, monkeypatch):
    shapes, forward = [], GVE.forward
    monkeypatch.setattr(
        GVE,
        "forward",
        lambda self, batch: shapes.append(batch["input_ids"].shape) or forward(self, batch),
    )
    items = [{"text": "x" * n} for n in (900, 5, 80, 3, 70, 4, 200, 6)] + [
        {"video": str(media / f"{c}.mp4")} for c in "abcd"
    ]
    encode(gve, items, batch_tokens=700)
    single = [len(data.Collator(gve.processor).prepare(item)["ids"]) for item in items]
    assert sum(b for b, _ in shapes) == len(items) and max(single) > 700
    assert all(b * t <= 700 or b == 1 for b, t in shapes), shapes
    texts, clips = sorted(single[:8]), single[8:]
    wanted, batch = [], []
    for length in texts + clips:  # texts from short to long, then videos
        if batch and max(*batch, length) * (len(batch) + 1) > 700:
            wanted, batch = [*wanted, (len(batch), max(batch))], []
        batch.append(length)
    assert [tuple(s) for s in shapes] == [*wanted, (len(batch), max(batch))]


def damaged(folder, clip):
    """Ten ways in which a clip cannot be used: {name in the reason: item}."""
    content, frame = clip.read_bytes(), np.zeros((40, 40, 3), np.uint8)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_text("<html>404 Not Found</html>" * 50)
    (folder / "half.mp4").write_bytes(content[: len(content) // 2])  # its index was at the end
    (folder / "zeroed.mp4").write_bytes(bytes(len(content)))
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 44100), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 44100
        for packet in [*stream.encode(sound), *stream.encode()]:
            file.mux(packet)
    for name, sizes in (("nothing", ()), ("torn", (40, 40)), ("uneven", (40, 44))):
        (folder / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(np.resize(frame, (size, 40, 3))).save(folder / name / f"{i}.jpg")
    (folder / "torn" / "1.jpg").write_bytes((folder / "torn" / "0.jpg").read_bytes()[:100])
    out = {
        name: {"video": str(folder / name)}
        for name in (
            "empty.mp4",
            "page.mp4",
            "half.mp4",
            "zeroed.mp4",
            "sound.mp4",
            "nothing",
            "torn",
            "uneven",
            "absent.mp4",
        )
    }
    return out | {clip.name: {"video": {"path": str(clip), "start": 60.0}}}


def test_ten_damaged_clips_and_one_that_hangs_cost_nothing_but_themselves(
    gve, media, tmp_path, monkeypatch
):
    """200 clips. The decoder of one sleeps in C and holds the interpreter's lock meanwhile: only killing its process ends it."""
    clips = []
    for i in range(189):
        shutil.copy(media / f"{'abcd'[i % 4]}.mp4", tmp_path / f"{i:03d}.mp4")
        clips.append({"video": {"path": str(tmp_path / f"{i:03d}.mp4"), "start": i % 5 / 10}})
    shutil.copy(media / "a.mp4", tmp_path / "hang.mp4")
    bad = damaged(tmp_path, tmp_path / "000.mp4") | {
        "hang.mp4": {"video": str(tmp_path / "hang.mp4")}
    }
    items = clips + list(bad.values())
    random.Random(0).shuffle(items)
    load = data.load_video

    def sleepy(video, frames):
        if "hang.mp4" in str(video):
            ctypes.PyDLL(None).sleep(1000)
        return load(video, frames)

    monkeypatch.setattr(data, "load_video", sleepy)
    began = time.time()
    vectors, failed = encode(gve, items, workers=2, seconds=8)
    assert time.time() - began < 120 and len(failed) == 11
    for name, item in bad.items():
        assert name in failed[items.index(item)], name
    assert failed[items.index(bad["hang.mp4"])].endswith("not decoded within 8 s")
    good = [i for i in range(200) if i not in failed]
    assert vectors[sorted(failed)].isnan().all() and len(good) == 189
    close(vectors[good], encode(gve, [items[i] for i in good])[0])


def test_a_decoder_that_dies_is_replaced(gve, media, monkeypatch):
    load = data.load_video
    monkeypatch.setattr(
        data,
        "load_video",
        lambda video, frames: (
            os.kill(os.getpid(), signal.SIGKILL) if "b.mp4" in str(video) else load(video, frames)
        ),
    )
    items = [{"video": str(media / f"{c}.mp4")} for c in "abcd"]
    vectors, failed = encode(gve, items, workers=1)
    assert list(failed) == [1] and "b.mp4" in failed[1] and "crashed" in failed[1]
    close(vectors[[0, 2, 3]], gve.embed([items[i] for i in (0, 2, 3)]))


# ---- cache ----


def lines_of(folder):
    """Every key in a cache, in all its shards, as a person would read them."""
    return [
        json.loads(line)["key"]
        for path in sorted(Path(folder).rglob("*.jsonl"))
        for line in open(path)
    ]


@pytest.fixture
def count(monkeypatch):
    """How many items the model has been given."""
    seen, forward = [], GVE.forward
    monkeypatch.setattr(
        GVE, "forward", lambda self, batch: seen.extend(batch["input_ids"]) or forward(self, batch)
    )
    return lambda: [len(seen), seen.clear()][0]


def test_what_is_in_the_cache_is_not_encoded_again_and_can_be_read_by_hand(
    tiny, gve, media, tmp_path, count
):
    items = [
        {"text": "one"},
        {"video": str(media / "a.mp4")},
        {"text": "one"},
        {"video": str(media / "frames")},
    ]
    vectors, _ = encode(gve, items, "Find it.", cache=VectorCache(tmp_path, gve))
    assert count() == 3
    again, failed = encode(
        other := GVE.from_pretrained(tiny),
        [*items[::-1], {"text": "two"}],
        "Find it.",
        cache=VectorCache(tmp_path, other),
        workers=1,
    )
    assert count() == 1 and not failed and torch.equal(again[:4], vectors.flip(0))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    shards = {
        path: [json.loads(line)["item"] for line in open(path)] for path in folder.glob("*.jsonl")
    }
    assert sorted(map(len, shards.values())) == [1, 3]
    for path, rows in shards.items():
        for row, vector in zip(rows, np.load(path.with_suffix(".npy")), strict=True):
            close(torch.from_numpy(vector)[None], gve.embed([row], "Find it."))
    key = json.loads((folder / "key.json").read_text())
    assert (
        key["weights"] == hash_weights(gve)
        and key["instruction"] == "Find it."
        and key["frames"] == 8
    )


def test_another_model_prompt_protocol_or_file_never_meets_an_old_vector(
    tiny, media, tmp_path, count
):
    clip = Path(shutil.copy(media / "a.mp4", tmp_path / "clip.mp4"))
    frames = Path(shutil.copytree(media / "frames", tmp_path / "frames"))
    items = [{"video": str(clip)}, {"video": str(frames)}]

    def encoded(gve=None, *args, **options):
        gve = gve or GVE.from_pretrained(tiny)
        vectors, failed = encode(
            gve, items, *args, **options, cache=VectorCache(tmp_path / "cache", gve)
        )
        assert not failed
        return count()

    assert encoded() == 2 and encoded() == 0
    for options in (
        dict(instruction="x"),
        dict(frames=4),
        dict(max_tokens=100),
        dict(max_length=4096),
    ):
        assert encoded(**options) == 2, options
    nudged, lora = GVE.from_pretrained(tiny), GVE.from_pretrained(tiny, lora=True)
    with torch.no_grad():
        nudged.core.language_model.norm.weight[0] += 1e-3
    paler = GVE.from_pretrained(tiny)
    paler.processor.video_processor.image_mean = [0.5, 0.5, 0.5]
    for gve in (nudged, lora, paler):
        assert encoded(gve) == 2
    with torch.no_grad():
        next(p for name, p in lora.lora_parameters().items() if "lora_B" in name)[0, 0] = 1e-3
    assert encoded(lora) == 2
    os.utime(clip, ns=(1, 1))
    assert encoded() == 1
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(frames / "003.jpg")
    assert encoded() == 1 and encoded() == 0


def test_a_shard_is_there_only_with_both_files(gve, tmp_path, monkeypatch):
    """The run ends between the first and the second file."""
    replace, moved = os.replace, []

    def third_fails(a, b):
        moved.append(b)
        if len(moved) == 3:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", third_fails)
        encode(gve, [{"text": "one"}], cache=VectorCache(tmp_path, gve))
    assert (
        moved[0].name == "key.json"
        and moved[1].exists()
        and not moved[2].exists()
        and lines_of(tmp_path) == []
    )
    vectors, failed = encode(gve, [{"text": "one"}], cache=VectorCache(tmp_path, gve))
    assert not failed and len(lines_of(tmp_path)) == 1
    close(vectors, gve.embed([{"text": "one"}]))


def encode_alone(*args, **how):
    """For a process that will be killed: tqdm's lock is shared by forks, and a dead one that held it stops all others."""
    tqdm.set_lock(threading.RLock())
    encode(*args, **how)


def children(pid):
    return [
        int(c)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for c in task.read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds child processes in /proc")
def test_killed_at_20_moments_it_goes_on_each_time_and_loses_and_repeats_nothing(
    gve, media, tmp_path
):
    items = [{"text": f"item {i}"} for i in range(120)] + [
        {"video": {"path": str(media / f"{c}.mp4"), "start": i / 100}}
        for i in range(40)
        for c in "abcd"
    ]
    rng, known = random.Random(0), set()
    for attempt in range(20):
        work = multiprocessing.get_context("fork").Process(
            target=encode_alone,
            args=(gve, items),
            kwargs=dict(
                batch_tokens=300, workers=attempt % 2, cache=VectorCache(tmp_path, gve, every=0)
            ),
        )
        work.start()
        some = len(list(tmp_path.rglob("*.npy"))) + rng.randrange(
            5
        )  # strike amid the writing, whatever the machine's speed
        while len(list(tmp_path.rglob("*.npy"))) < some:
            assert work.is_alive(), (
                f"the work ended with status {work.exitcode} before the kills did"
            )
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        decoders = children(work.pid)
        os.kill(work.pid, signal.SIGKILL)
        work.join()
        keys = lines_of(tmp_path)
        assert len(set(keys)) == len(keys) and known <= set(keys), "an item twice, or lost"
        for path in tmp_path.rglob("*.jsonl"):
            assert len(np.load(path.with_suffix(".npy"))) == len(path.read_text().splitlines())
        known = set(keys)
        for _ in range(100):
            decoders = [
                pid
                for pid in decoders
                if Path(f"/proc/{pid}").exists()
                and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
            ]
            time.sleep(0.1 if decoders else 0)
        assert not decoders, "a decoder has outlived its parent"
    assert 0 < len(known) < len(items), "the kills did not meet the work"
    vectors, failed = encode(gve, items, cache=VectorCache(tmp_path, gve))
    assert not failed and len(lines_of(tmp_path)) == len(items)
    close(vectors, encode(gve, items)[0])


def test_two_ranks_equal_one(tiny, media, tmp_path):
    rows = (
        [{"text": f"a text of {n}" * n} for n in range(1, 9)]
        + [{"video": f"{c}.mp4"} for c in "abcdb"]
        + [{"image": "i.png"}]
    )
    (media / "bad.mp4").write_bytes(b"bad")
    rows.insert(3, {"video": "bad.mp4"})
    (media / "shared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, flags = str(media / "shared.jsonl"), {"ckpt": tiny, "workers": 1, "device": "cpu"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "embed.py",
            path,
            *words,
            "--out",
            str(tmp_path / "two"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("14 of 15 items") == 1, done.stderr
    assert "shared.jsonl:4:" in done.stdout
    keys = lines_of(tmp_path / "two" / "cache")
    assert (
        len(keys) == len(set(keys)) == 13
        and len(list((tmp_path / "two" / "cache").rglob("*.npy"))) == 2
    )
    main(path, Flags(**flags, out=str(tmp_path / "one")))
    one, two = (
        torch.from_numpy(np.load(tmp_path / name / "vectors.npy")) for name in ("one", "two")
    )
    assert torch.equal(one.isnan(), two.isnan())
    close(one.nan_to_num(), two.nan_to_num())
    assert torch.equal(top_k(one.nan_to_num(), one, 5)[1], top_k(two.nan_to_num(), two, 5)[1])
    assert (tmp_path / "one" / "items.jsonl").read_text() == (
        tmp_path / "two" / "items.jsonl"
    ).read_text()


# ---- ranking ----


@pytest.mark.parametrize(
    "n, m, k, block",
    [(7, 50, 5, 8), (3, 5, 9, 2), (13, 781, 10, 100), (4, 64, 64, 64), (1, 1, 1, 1)],
)
def test_top_k_is_exact_and_ties_go_by_corpus_order(n, m, k, block):
    torch.manual_seed(0)
    queries, corpus = (
        torch.randint(-2, 3, (n, 3)).float(),
        torch.randint(-2, 3, (m, 3)).float(),
    )  # integers: many exact ties
    scores, indices = top_k(queries, corpus, k, block=block, query_block=3)
    for i in range(n):
        row = [float(queries[i] @ c) for c in corpus]
        order = sorted(range(m), key=lambda j: (-row[j], j))[:k]
        assert indices[i].tolist() == order and scores[i].tolist() == [row[j] for j in order]


def test_top_k_reads_a_memory_mapped_half_precision_corpus(tmp_path):
    corpus = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    np.save(tmp_path / "c.npy", corpus)
    queries = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
    scores, indices = top_k(queries, np.load(tmp_path / "c.npy", mmap_mode="r"), 3, block=64)
    full = queries.astype(np.float64) @ corpus.astype(np.float64).T
    assert (indices.numpy() == np.argsort(-full, axis=1)[:, :3]).all()
    assert np.abs(scores.numpy() - np.sort(full)[:, ::-1][:, :3]).max() < 1e-4


def test_top_k_takes_any_order_of_scores_and_never_finds_a_nan(tmp_path):
    rising = torch.arange(1.0, 3001)[:, None]  # every score beats all before it
    scores, indices = top_k(torch.tensor([[1.0], [-1.0], [0.0]]), rising, 7, block=500)
    assert indices.tolist() == [list(range(2999, 2992, -1)), list(range(7)), list(range(7))]
    assert scores[0].tolist() == list(range(3000, 2993, -1))
    rising[[0, 5]] = torch.nan
    scores, indices = top_k(torch.tensor([[-1.0]]), rising[:8], 8, block=3)
    assert (
        indices.tolist() == [[1, 2, 3, 4, 6, 7, -1, -1]]
        and scores[0, 6:].tolist() == [-torch.inf] * 2
    )
    assert top_k(torch.ones(2, 1), torch.ones(0, 1), 3)[1].shape == (2, 0)


def test_command_writes_vectors_and_names_what_failed(tiny, media, tmp_path):
    rows = [
        {"id": "x", "text": "hello"},
        {"id": "y", "video": "gone.mp4"},
        {"id": "z", "video": "b.mp4"},
    ]
    (media / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        "embed.py",
        str(media / "items.jsonl"),
        "--ckpt",
        tiny,
        "--out",
        str(tmp_path),
        "--workers",
        "0",
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 3 items" in done.stdout, done.stderr
    assert "items.jsonl:2: video 'gone.mp4'" in done.stdout
    vectors, lines = (
        np.load(tmp_path / "vectors.npy"),
        [json.loads(x) for x in open(tmp_path / "items.jsonl")],
    )
    assert (
        [line["id"] for line in lines] == ["x", "y", "z"]
        and "error" in lines[1]
        and np.isnan(vectors[1]).all()
    )
    gve = GVE.from_pretrained(tiny)
    expected = gve.embed([{"text": "hello"}, {"video": str(media / "b.mp4")}]).numpy()
    assert np.abs(vectors[[0, 2]] - expected).max() < 1e-5


def test_the_commands_prompt_style_and_frames_reach_the_vectors(tiny, media, tmp_path):
    rows, made = [{"text": "hello"}, {"video": "b.mp4"}], []
    (media / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i, (style, frames) in enumerate((("system", 8), ("user", 8), ("system", 4))):
        more = dict(
            instruction="Find it.", prompt_style=style, frames=frames, workers=0, device="cpu"
        )
        main(str(media / "few.jsonl"), Flags(ckpt=tiny, out=str(tmp_path / str(i)), **more))
        made.append(np.load(tmp_path / str(i) / "vectors.npy"))
        items = [rows[0], {"video": str(media / "b.mp4")}]
        expected = (
            GVE.from_pretrained(tiny, prompt_style=style)
            .embed(items, "Find it.", frames=frames)
            .numpy()
        )
        assert np.abs(made[-1] - expected).max() < 1e-5
    assert np.abs(made[0] - made[1]).max() > 1e-3 and np.abs(made[0] - made[2])[1].max() > 1e-3


def test_the_command_ends_with_one_line_for_a_missing_file():
    done = subprocess.run(
        [sys.executable, "embed.py", "gone.jsonl"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr.strip().splitlines()[-1].startswith("embed.py:")
        and "gone.jsonl" in done.stderr
    )
    assert "Traceback" not in done.stderr


def anonymous():
    """Memory of this process that no file backs, in GB."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon in /proc")
@pytest.mark.parametrize("n, m", [(1000, 100_000), (10_000, 1_000_000)])
def test_top_k_over_a_million_vectors_costs_little_more_than_the_products(tmp_path, n, m):
    """1,024 wide in half precision on disk, k = 100. The values are small integers, so that scores are exact and ties abound."""
    corpus = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", np.float16, (m, 1024))
    for start in range(0, m, 50_000):
        corpus[start : start + 50_000] = np.random.default_rng(start).integers(
            -3, 4, (min(50_000, m), 1024), np.int8
        )
    corpus.flush()
    corpus, queries = (
        np.load(tmp_path / "c.npy", mmap_mode="r"),
        torch.randint(-3, 4, (n, 1024)).float(),
    )
    peak, done, began, spent = (
        anonymous(),
        threading.Event(),
        time.perf_counter(),
        time.process_time(),
    )

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    threading.Thread(target=watch).start()
    scores, indices = top_k(queries, corpus, 100)
    done.set()
    clock, work = time.perf_counter() - began, time.process_time() - spent
    began, spent = time.perf_counter(), time.process_time()
    for start in range(0, m, 16384):
        block = torch.from_numpy(np.array(corpus[start : start + 16384])).float()
        for row in range(0, n, 1024):
            queries[row : row + 1024] @ block.T
    clock, work = clock / (time.perf_counter() - began), work / (time.process_time() - spent)
    print(
        f"{n} x {m}: {clock:.2f} times cast and product by the clock, {work:.2f} in processor time, peak {peak:.2f} GB"
    )
    some = torch.arange(0, n, n // 20)
    full = [
        queries[some] @ torch.from_numpy(np.array(corpus[i : i + 10_000])).float().T
        for i in range(0, m, 10_000)
    ]
    best, order = torch.cat(full, 1).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores[some], best[:, :100]) and torch.equal(indices[some], order[:, :100])
    assert peak <= 2 and work <= 1.3


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "runs/mini/uvrb").is_dir(), reason="needs `python -m mini render`")
def test_mini_uvrb_killed_at_20_moments_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    import eval as ev

    gve, rng, finished = GVE.from_pretrained(ROOT / "mini/prober"), random.Random(0), 0

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
        some = len(list(tmp_path.rglob("*.npy"))) + rng.randrange(3)
        while len(list(tmp_path.rglob("*.npy"))) < some and work.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        finished += not work.is_alive()
        work.kill()
        work.join()
    assert finished == 0, "the kills came too late"
    for out in ("killed", "whole"):
        score(tmp_path / out, 0)
    killed, whole = (
        json.loads((tmp_path / out / "results.json").read_text())["datasets"]
        for out in ("killed", "whole")
    )
    assert killed == whole
    for folder in (tmp_path / "killed" / "cache").iterdir():
        assert len(lines_of(folder)) == len(set(lines_of(folder))), "an item was encoded twice"
    assert sorted(lines_of(tmp_path / "killed" / "cache")) == sorted(
        lines_of(tmp_path / "whole" / "cache")
    )
