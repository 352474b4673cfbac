"""Equal vectors tie exactly in embed.top_k and eval.ranks, in corpus order, whatever BLAS does.

A matrix product may give equal rows scores that differ in the last bits. Which processor does so at
which size cannot be foreseen, so here every product is disturbed on purpose.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embed import find_first_equals, hash_some_columns, top_k
from eval import rankings, ranks


@pytest.fixture(autouse=True)
def noisy_products(monkeypatch):
    """Move each entry of a float32 product by up to two units in the last place."""
    generator = torch.Generator().manual_seed(0)
    product = torch.Tensor.__matmul__

    def noisy(a, b):
        out = product(a, b)
        if out.dtype == torch.float32:
            steps = torch.randint(-2, 3, out.shape, generator=generator)
            out = out * (1 + steps * torch.finfo(torch.float32).eps)
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", noisy)


def repeated(n, m, distinct, dim, seed=0):
    """Return queries (n, D), a corpus (m, D) of so many different rows, and the rows' numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(distinct, dim, generator=generator), dim=1)
    number = torch.randint(0, distinct, (m,), generator=generator)
    queries = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return queries, rows[number], number


def exact_order(queries, corpus):
    """Return each query's corpus rows, best first, by float64 sums and corpus order."""
    orders = []
    for q in queries.double():
        scores = (corpus.double() * q).sum(1).tolist()
        orders.append(sorted(range(len(corpus)), key=lambda j, scores=scores: (-scores[j], j)))
    return orders


# Queries, corpus rows, different ones among them, width
CASES = [(3, 40, 1, 8), (5, 60, 4, 3), (9, 200, 7, 130), (2, 50, 45, 3584), (1, 9, 9, 5)]


@pytest.mark.parametrize(("n", "m", "distinct", "dim"), CASES)
def test_top_k_ranks_equal_rows_in_corpus_order(n, m, distinct, dim):
    queries, corpus, number = repeated(n, m, distinct, dim)
    orders = exact_order(queries, corpus)
    for k in (1, 3, 10, m):
        for block in (7, 64, 16384):
            scores, indices = top_k(queries, corpus, k, block=block, query_block=4)
            assert indices.tolist() == [order[:k] for order in orders], (k, block)
            exact = (queries.double() @ corpus.double().T).gather(1, indices)
            assert (scores - exact).abs().max() < 1e-5
            for row, found in zip(scores, number[indices], strict=True):
                assert len(row.unique()) <= len(found.unique()), "equal rows, different scores"


@pytest.mark.parametrize(("n", "m", "distinct", "dim"), CASES)
def test_ranks_put_equal_rows_in_corpus_order(n, m, distinct, dim):
    queries, corpus, _ = repeated(n, m, distinct, dim)
    positives = [[i % m, (7 * i + 3) % m] for i in range(n)]
    pools = [sorted({*own, *range(i, m, 3)}) for i, own in enumerate(positives)]
    orders = exact_order(queries, corpus)
    expected = []
    pooled = []
    for order, own, pool in zip(orders, positives, pools, strict=True):
        expected.append(sorted(order.index(p) + 1 for p in own))
        order = [j for j in order if j in pool]
        pooled.append(sorted(order.index(p) + 1 for p in own))
    for block in (1, 2 * m, 2**26):
        assert ranks(queries, corpus, positives, block=block) == expected
        assert ranks(queries, corpus, positives, pools, block=block) == pooled


def test_equal_rows_tie_across_the_pieces_of_a_long_corpus():
    generator = torch.Generator().manual_seed(1)
    corpus = F.normalize(torch.randn(66_000, 16, generator=generator), dim=1)
    corpus[65_990] = corpus[17]
    query = corpus[17:18]
    assert ranks(query, corpus, [[17, 65_990]]) == [[1, 2]]
    assert top_k(query, corpus, 2)[1].tolist() == [[17, 65_990]]


def test_a_memory_mapped_half_precision_corpus_with_nan_rows(tmp_path):
    queries, corpus, _ = repeated(4, 90, 6, 16)
    corpus = corpus.half()
    bad = [0, 5, 40]
    corpus[bad] = torch.nan
    np.save(tmp_path / "c.npy", corpus.numpy())
    stored = np.load(tmp_path / "c.npy", mmap_mode="r")
    scores, indices = top_k(queries, stored, 90, block=16)
    orders = exact_order(queries, corpus.nan_to_num())
    for found, order in zip(indices.tolist(), orders, strict=True):
        assert found == [j for j in order if j not in bad] + [-1] * 3
    assert (scores[:, -3:] == -torch.inf).all() and scores[:, :-3].isfinite().all()


def test_rankings_give_equal_rows_one_score():
    class Bench:
        queries = [{"id": "q"}]
        corpus = [{"id": str(j)} for j in range(30)]
        positives = [[4]]
        pools = None

    class Encoded:
        bench = Bench
        lost_queries = {}
        lost_corpus = {}

    Encoded.queries, Encoded.corpus, _ = repeated(1, 30, 2, 64)
    line = next(rankings(Encoded))
    assert line["ranked"] == [str(j) for j in exact_order(Encoded.queries, Encoded.corpus)[0]]
    assert len(set(line["scores"])) == 2


def test_rows_are_equal_if_all_values_are():
    """Rows that agree in the columns of the first look, -0 and 0, and what only float64 tells."""
    corpus = torch.zeros(9, 40, dtype=torch.float64)
    corpus[1, 1] = 1  # not among every second column
    corpus[2, 1] = 1
    corpus[3, 39] = 1e-30
    corpus[4] = -0.0
    corpus[5, 0] = 2
    corpus[6, 1] = 1 + 1e-12  # 1 in float32, in which scores are computed
    corpus[7:, 3] = torch.nan
    looks = hash_some_columns(corpus)
    assert len(looks.unique()) == 2
    assert find_first_equals(corpus, looks).tolist() == [0, 1, 1, 3, 0, 5, 1, 7, 7]
    assert find_first_equals(corpus, looks, block=2).tolist() == [0, 1, 1, 3, 0, 5, 1, 7, 7]
