"""train.py's plain loss, against a loop over pairs in float64, over ranks, against the kernel."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from kernels.infonce import info_nce_dist
from train import contrastive_loss, curve_sums, gather_rows, mine, use_fused

TAU = 0.03
ROWS = (4, 0, 3)  # queries of each rank: one rank has none
NEGATIVES = (2, 5, 0)  # and one has no hard negatives


def unit(n, dim, generator):
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)


def make_case(rows, negatives, seed=0):
    """Return q, p, n, the content ids of p and n, and q's ids.

    All ids repeat, so that a query has several answers, some of them answers of other queries and
    some among the hard negatives. A negative scores above its positive.
    """
    generator = torch.Generator().manual_seed(seed)
    q = unit(rows, 6, generator)
    p = F.normalize(q + 0.7 * unit(rows, 6, generator), dim=1)
    n = unit(negatives, 6, generator)
    if negatives and rows:
        n[0] = q[0]  # a false negative: above the positive by more than the margin
    p_ids = torch.randint(0, 5, (rows,), generator=generator)
    n_ids = torch.randint(0, 9, (negatives,), generator=generator)
    q_ids = torch.randint(0, 9, (rows,), generator=generator)
    return q, p, n, p_ids, n_ids, q_ids


def loop_loss(q, p, n, p_ids, n_ids, q_ids, margin, symmetric):
    """The mean loss, written as sums over pairs: the independent definition."""
    candidates = torch.cat([p, n])
    ids = torch.cat([p_ids, n_ids]).tolist()

    def is_negative(i, j):
        """Is candidate j a negative of query i?"""
        if ids[j] == ids[i] or (j < len(q) and q_ids[j] == q_ids[i]):
            return False
        above = float((q[i] @ candidates[j] - q[i] @ p[i]).detach())
        return margin is None or above <= margin

    total = 0.0
    for i in range(len(q)):
        own = torch.exp(q[i] @ p[i] / TAU)
        others = 0.0
        for j in range(len(candidates)):
            if is_negative(i, j):
                others = others + torch.exp(q[i] @ candidates[j] / TAU)
        loss = torch.log(own + others) - torch.log(own)
        if symmetric:
            others = 0.0
            for k in range(len(q)):
                if is_negative(k, i):
                    others = others + torch.exp(q[k] @ p[i] / TAU)
            loss = (loss + torch.log(own + others) - torch.log(own)) / 2
        total = total + loss
    return total / len(q)


def loss_and_gradients(loss, q, p, n, *rest):
    leaves = [x.clone().requires_grad_() for x in (q, p, n)]
    value = loss(*leaves, *rest)
    value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [value.detach(), *gradients]


CASES = list(itertools.product((0, 6), (None, 0.1, 0.0), (True, False)))


@pytest.mark.parametrize(("negatives", "margin", "symmetric"), CASES)
def test_the_plain_loss_is_the_sum_over_pairs(negatives, margin, symmetric):
    case = make_case(12, negatives, seed=1)

    def plain(*x):
        *x, q_ids = x
        return contrastive_loss(*x, q_ids=q_ids, tau=TAU, margin=margin, symmetric=symmetric)

    def loop(*x):
        return loop_loss(*x, margin, symmetric)

    ours = loss_and_gradients(plain, *case)
    expected = loss_and_gradients(loop, *case)
    for name, a, b in zip(("loss", "dq", "dp", "dn"), ours, expected, strict=True):
        if b.numel():
            error = (a - b).abs().max() / b.abs().max().clamp(min=1e-12)
            assert error < 1e-9, f"{name}: relative error {error:.1e}"


def test_the_masks_matter_in_these_cases():
    """A test of masks that masks nothing cannot fail: every mask changes the loss."""
    q, p, n, p_ids, n_ids, q_ids = make_case(12, 6, seed=1)
    rows = torch.arange(12)
    options = dict(tau=TAU, margin=0.1)
    values = [
        contrastive_loss(q, p, n, p_ids, n_ids, q_ids=q_ids, **options),
        contrastive_loss(q, p, n, p_ids, n_ids, q_ids=q_ids, tau=TAU),
        contrastive_loss(q, p, n, p_ids, n_ids, q_ids=rows, **options),
        contrastive_loss(q, p, n, rows, torch.arange(12, 18), q_ids=q_ids, **options),
        contrastive_loss(q, p, n, p_ids, n_ids, q_ids=q_ids, symmetric=False, **options),
    ]
    assert len({round(float(value), 6) for value in values}) == 5
    # No query occurs twice, to the last bit, so without ids all differ.
    assert contrastive_loss(q, p, n, p_ids, n_ids, **options) == values[2]


# Five rows by name, and two hard negatives
QUERIES = "qqrrs"
POSITIVES = "abbcd"
NEGATIVE_CONTENTS = "ae"


def is_answer(i, j):
    """Is candidate j (a row's positive or, from five on, a hard negative) right for row i?"""
    same_content = POSITIVES[i] == (POSITIVES + NEGATIVE_CONTENTS)[j]
    return same_content or (j < len(QUERIES) and QUERIES[i] == QUERIES[j])


def named_case():
    """Return q, p, n, their ids, and for each row the contents that are its negatives."""
    generator = torch.Generator().manual_seed(3)
    of_query = {name: unit(1, 6, generator)[0] for name in "qrs"}
    of_content = {name: unit(1, 6, generator)[0] for name in "abcde"}
    q = torch.stack([of_query[name] for name in QUERIES])
    p = torch.stack([of_content[name] for name in POSITIVES])
    n = torch.stack([of_content[name] for name in NEGATIVE_CONTENTS])
    q_ids, p_ids, n_ids = (
        torch.tensor([ord(name) for name in names])
        for names in (QUERIES, POSITIVES, NEGATIVE_CONTENTS)
    )
    return q, p, n, p_ids, n_ids, q_ids


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_query_with_two_right_answers_pushes_neither_away(with_ids):
    """By hand, over rows: the same content or the same query; equal vectors do as well as ids."""
    q, p, n, p_ids, n_ids, q_ids = named_case()
    total = 0.0
    for i in range(5):
        own = torch.exp(q[i] @ p[i])
        negatives = [c for j, c in enumerate(torch.cat([p, n])) if not is_answer(i, j)]
        forward = own + sum(torch.exp(q[i] @ c) for c in negatives)
        others = [k for k in range(5) if not is_answer(k, i)]
        reverse = own + sum(torch.exp(q[k] @ p[i]) for k in others)
        total += (torch.log(forward / own) + torch.log(reverse / own)) / 2

    options = {"q_ids": q_ids} if with_ids else {}
    plain = contrastive_loss(q, p, n, p_ids, n_ids, tau=1.0, **options)
    fused = info_nce_dist(q, p, 1.0, n=n, p_ids=p_ids, n_ids=n_ids, **options)
    for loss in (plain, fused):
        assert abs(float(loss) - float(total) / 5) < 1e-12


def test_the_curves_hardest_negative_is_no_answer():
    q, p, n, p_ids, n_ids, q_ids = named_case()
    gaps = 0.0
    for i in range(5):
        columns = enumerate(torch.cat([p, n]))
        scores = [float(q[i] @ c) for j, c in columns if not is_answer(i, j)]
        gaps += float(q[i] @ p[i]) - max(scores)
    for options in ({"q_ids": q_ids}, {}):
        sums = curve_sums(q, p, n, p_ids, n_ids, **options)
        assert abs(float(sums["gaps"]) - gaps) < 1e-12


def test_mining_never_takes_another_right_answer():
    q, p, _, p_ids, _, q_ids = named_case()
    for options in ({"q_ids": q_ids}, {}):
        for block in (1, 2, 100):
            found = mine(q, p, p_ids, 4, block=block, **options).tolist()
            for i, query in enumerate(QUERIES):
                known = [p for q, p in zip(QUERIES, POSITIVES, strict=True) if q == query]
                left = [name for name in "abcd" if name not in known]
                left.sort(key=lambda name, i=i: -float(q[i] @ p[POSITIVES.index(name)]))
                rows = [POSITIVES.index(name) for name in left]
                assert found[i] == rows + [-1] * (4 - len(rows))


def check_ranks(rank, folder):
    """On one of three ranks: shares and gradients add up to those of one process."""
    world = len(ROWS)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world
    )
    whole = make_case(sum(ROWS), sum(NEGATIVES), seed=3)

    def mine(x, sizes):
        return x.split(list(sizes))[rank].clone()

    sizes = (ROWS, ROWS, NEGATIVES, ROWS, NEGATIVES, ROWS)
    own = [mine(x, size) for x, size in zip(whole, sizes, strict=True)]
    for dtype, margin, symmetric in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), (None, 0.1), (True, False)
    ):

        def loop(*x, margin=margin, symmetric=symmetric):
            return loop_loss(*x, margin, symmetric)

        options = dict(margin=margin, symmetric=symmetric)

        def plain(q, p, n, p_ids, n_ids, q_ids, options=options):
            return contrastive_loss(q, p, n, p_ids, n_ids, q_ids=q_ids, tau=TAU, **options)

        def fused(q, p, n, p_ids, n_ids, q_ids, options=options):
            ids = dict(p_ids=p_ids, n_ids=n_ids, q_ids=q_ids)
            return info_nce_dist(q, p, 1 / TAU, n=n, **ids, **options)

        rounded = [x.to(dtype) if x.is_floating_point() else x for x in own]
        exact = [x.to(dtype).double() if x.is_floating_point() else x for x in whole]
        loss, *gradients = loss_and_gradients(loop, *exact)
        expected = [loss, *(mine(g, s) for g, s in zip(gradients, sizes, strict=False))]
        # A gradient in bfloat16 has three digits.
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
        for way in (plain, fused):
            share, *gradients = loss_and_gradients(way, *rounded)
            total = share.double()
            dist.all_reduce(total)
            for name, a, b in zip(
                ("loss", "dq", "dp", "dn"), [total, *gradients], expected, strict=True
            ):
                if b.numel():
                    error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)
                    case = f"{way.__name__} {dtype} margin {margin} symmetric {symmetric}"
                    assert error < tolerance, f"rank {rank}, {case}: {name} off by {error:.1e}"
    dist.destroy_process_group()


def test_shares_and_gradients_of_three_uneven_ranks_sum_to_one_process_plain_and_fused(tmp_path):
    torch.multiprocessing.start_processes(
        check_ranks, (str(tmp_path),), nprocs=len(ROWS), start_method="fork"
    )


def test_on_one_process_gathering_changes_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


def test_auto_takes_the_kernel_for_large_batches_only():
    assert use_fused("on", "infonce", 2, 0) and not use_fused("off", "infonce", 10**6, 2)
    assert not use_fused("auto", "infonce", 64, 2) and use_fused("auto", "infonce", 8192, 0)
    sizes = [2**k for k in range(4, 15)]
    chosen = [use_fused("auto", "infonce", size, 1) for size in sizes]
    assert chosen == sorted(chosen)  # once it pays, it pays for all larger ones


def test_a_loss_of_ones_own_is_never_replaced_by_the_kernel():
    assert not use_fused("auto", "siglip", 10**6, 2)
    with pytest.raises(ValueError, match="--fused on: the kernel computes infonce, not siglip"):
        use_fused("on", "siglip", 8, 0)
