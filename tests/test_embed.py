"""embed.py: order, failures and exact top-k."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from embed import encode, top_k  # noqa: E402
from model import GVE  # noqa: E402


def test_results_come_in_order_and_a_bad_item_shifts_nothing(tiny, media):
    gve = GVE.from_pretrained(tiny)
    (media / "bad.mp4").write_bytes(b"bad")
    a, b = {"video": str(media / "a.mp4")}, {"text": "b"}
    items = [a, {"text": "a longer text than the other"}, {"video": str(media / "bad.mp4")}, b, {"image": str(media / "i.png")},
             a, {"video": str(media / "nowhere.mp4")}, b]
    good = [0, 1, 3, 4, 5, 7]
    expected = torch.cat([gve.embed([items[i]]) for i in good])
    for workers in (0, 2):
        vectors, failed = encode(gve, items, batch_size=2, workers=workers)
        assert sorted(failed) == [2, 6] and "bad.mp4" in failed[2] and "nowhere.mp4" in failed[6]
        assert vectors[[2, 6]].isnan().all()
        error = (vectors[good] - expected).abs().max()
        assert error < 1e-5, f"max {error:.2e}"


def test_only_equal_items_share_a_vector(tiny):
    vectors, _ = encode(GVE.from_pretrained(tiny), [{"text": t} for t in ("Red ball", "red  ball", "red ball", "Red ball")])
    assert torch.equal(vectors[0], vectors[3])
    assert all((vectors[i] - vectors[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("n, m, k, block", [(7, 50, 5, 8), (3, 5, 9, 2), (13, 781, 10, 100), (4, 64, 64, 64), (1, 1, 1, 1)])
def test_top_k_is_exact_and_ties_go_by_corpus_order(n, m, k, block):
    torch.manual_seed(0)
    queries, corpus = torch.randint(-2, 3, (n, 3)).float(), torch.randint(-2, 3, (m, 3)).float()  # integers: many exact ties
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


def test_command_writes_vectors_and_names_what_failed(tiny, media, tmp_path):
    rows = [{"id": "x", "text": "hello"}, {"id": "y", "video": "gone.mp4"}, {"id": "z", "video": "b.mp4"}]
    (media / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["embed.py", str(media / "items.jsonl"), "--ckpt", tiny, "--out", str(tmp_path), "--workers", "0"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 3 items" in done.stdout, done.stderr
    assert "items.jsonl:2: video 'gone.mp4'" in done.stdout
    vectors, lines = np.load(tmp_path / "vectors.npy"), [json.loads(x) for x in open(tmp_path / "items.jsonl")]
    assert [line["id"] for line in lines] == ["x", "y", "z"] and "error" in lines[1] and np.isnan(vectors[1]).all()
    gve = GVE.from_pretrained(tiny)
    expected = gve.embed([{"text": "hello"}, {"video": str(media / "b.mp4")}]).numpy()
    assert np.abs(vectors[[0, 2]] - expected).max() < 1e-5
