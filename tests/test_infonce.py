"""kernels/infonce.py against its fp64 definition: masks, dtypes, sizes, poison, ranks, bad input.

python -m pytest tests/test_infonce.py
    the torch twin, ranks, ahead-of-time compilation, and the Triton tests, interpreted
TRITON_INTERPRET=1 python -m pytest tests/test_infonce.py -k triton
    the Triton tests alone; on a GPU, without the variable, they run compiled
"""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import compiled_kernels
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.infonce as infonce
from kernels.infonce import LogSum, Masks, Weights, info_nce, info_nce_dist, info_nce_ref

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_runs = pytest.mark.skipif(
    DEVICE == "cpu" and not infonce.INTERPRET, reason="needs a GPU or TRITON_INTERPRET=1"
)
compiled = pytest.mark.skipif(
    infonce.INTERPRET or infonce.triton is None, reason="needs Triton, not interpreted"
)
IMPLS = [pytest.param("torch", id="twin"), pytest.param("triton", marks=triton_runs)]
MASKS = {
    "none": (),
    "ids": ("ids",),
    "margin": ("margin",),
    "all": ("ids", "queries", "margin"),
}
SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Put block edges inside every case, at no multiple of any size."""
    monkeypatch.setattr(infonce, "CPU_BLOCK", 48)
    monkeypatch.setattr(infonce, "WORKSPACE", 2 * 256 * 256 * 4)


def device_of(impl):
    return DEVICE if impl == "triton" else "cpu"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def unit_rows(n, D, generator):
    return F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1)


def batch(N, M, D, seed=0, masks=(), shared=False, ignored=False):
    """Return fp64 unit rows q (N, D), d (M, D) and keyword arguments for the loss.

    A margin lies in a gap of the scores that no rounding can cross, and drops some of them.
    """
    g = seeded(seed)
    q = unit_rows(N, D, g)
    noise = unit_rows(M, D, g)
    target = torch.arange(N)
    if shared:
        target = torch.randint(0, (N + 1) // 2, (N,), generator=g)
    share_ignored = 0.2 if ignored else 0
    target[torch.rand(N, generator=g) < share_ignored] = -1

    # The hard negatives of row i are i + N, i + 2N, ...
    d = F.normalize(0.85 * q[torch.arange(M) % N] + 0.6 * noise, dim=1)
    # Every third positive is nearer to another query.
    d[:N:3] = F.normalize(q[:N:3].roll(1, 0) + 0.2 * noise[:N:3], dim=1)

    kw = {}
    if shared or ignored:
        kw["target"] = target
    if "ids" in masks:
        kw["ids"] = torch.randint(0, 2 * M // 3 + 1, (M,), generator=g) - 5
    if "queries" in masks:
        kw["q_ids"] = torch.randint(0, 2 * N // 3 + 1, (N,), generator=g) - 5
    if "margin" in masks:
        s = q @ d.T
        over = (s - s.gather(1, target.clamp(min=0)[:, None])).flatten().sort().values
        gaps = (over.diff() > 0.025) & (over[:-1] >= 0)
        # Without a gap this is an IndexError, never a case without a margin.
        kw["margin"] = float((over[:-1] + over[1:])[gaps][0] / 2)
    return q, d, kw


def sum_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def evaluate(loss_of, q, d, scale, dtype, device="cpu", **kw):
    """Return [loss, dq, dd, dscale] in fp64 on the CPU, for inputs in `dtype` on `device`.

    The upstream gradients are other than 1.
    """
    q = q.to(device, dtype, copy=True).requires_grad_()
    d = d.to(device, dtype, copy=True).requires_grad_()
    scale = torch.tensor(scale, dtype=sum_type(dtype), device=device, requires_grad=True)
    for name, value in kw.items():
        if isinstance(value, torch.Tensor):
            kw[name] = value.to(device)

    loss = loss_of(q, d, scale, **kw)
    weights = torch.linspace(-0.5, 2, max(loss.numel(), 2))[-loss.numel() :] / loss.numel()
    loss.backward(weights.to(loss).view(loss.shape))
    return [x.detach().double().cpu() for x in (loss, q.grad, d.grad, scale.grad)]


def run(impl, q, d, scale=33.3, **kw):
    """Evaluate info_nce in fp32."""
    return evaluate(info_nce, q, d, scale, torch.float32, impl=impl, device=device_of(impl), **kw)


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_as_good_as_plain(q, d, scale, dtype, case, impl="torch", device="cpu", **kw):
    """Check: error against fp64 <= 2x plain torch's own at this dtype + 1e-6 (half: 1e-3).

    This holds for the loss and every gradient. On top comes the last fp32 digit of the value. Where
    plain torch was right by luck, its error is taken over reflected copies of the same problem.
    The interpreter truncates bf16 where a GPU rounds: there, 2^-7 of the largest value is allowed.
    """
    last_digit = torch.finfo(sum_type(dtype)).eps
    if infonce.INTERPRET and impl == "triton" and dtype == torch.bfloat16:
        last_digit += 2**-7

    plain = [0.0] * 4
    for turn in range(24):
        if turn:
            v = torch.randn(q.shape[1], dtype=q.dtype, generator=seeded(turn))
            v = F.normalize(v, dim=0)
            q = q - 2 * torch.outer(q @ v, v)
            d = d - 2 * torch.outer(d @ v, v)
        rounded_q = q.to(dtype).double()
        rounded_d = d.to(dtype).double()
        exact = evaluate(info_nce_ref, rounded_q, rounded_d, scale, torch.float64, **kw)
        other = evaluate(info_nce_ref, rounded_q, rounded_d, scale, dtype, **kw)
        plain = [max(p, (x - e).abs().max()) for p, x, e in zip(plain, other, exact, strict=True)]

        if turn == 0:
            ours = evaluate(
                info_nce, rounded_q, rounded_d, scale, dtype, impl=impl, device=device, **kw
            )
            assert (ours[0] >= 0).all(), f"loss < 0 in {case}"
            errors = [(o - e).abs() for o, e in zip(ours, exact, strict=True)]
            largest = [e.abs().max() for e in exact]
        limits = [
            2 * p + SLACK[dtype] + last_digit * e for p, e in zip(plain, largest, strict=True)
        ]
        if all(error.max() <= limit for error, limit in zip(errors, limits, strict=True)):
            return

    names = ("loss", "dq", "dd", "dscale")
    for name, error, limit, e in zip(names, errors, limits, largest, strict=True):
        assert error.max() <= limit, (
            f"{name} {case}: max {error.max():.2e}, mean {error.mean():.2e}, "
            f"allowed {limit:.2e}, largest {e:.2e}"
        )


# symmetric, masks, hard negatives, shared targets
CASES = list(itertools.product((True, False), MASKS, (0, 41), (True, False)))


def describe(D, dtype, case, scale):
    symmetric, masks, negatives, shared = case
    return (
        f"D {D} {dtype} symmetric {symmetric} masks {masks} negatives {negatives} "
        f"shared {shared} scale {scale}"
    )


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("D", [5, 64, 200, 2048, 3584])
def test_twin_equals_the_definition(D, dtype):
    N = 59 if D <= 200 else 29
    for seed, case in enumerate(CASES):
        symmetric, masks, negatives, shared = case
        q, d, kw = batch(N, N + negatives, D, seed % 4, MASKS[masks], shared, ignored=negatives > 0)
        kw["symmetric"] = symmetric
        for scale in (1.0, 33.3, 100.0, 300.0):
            kw["reduction"] = "none" if scale == 33.3 else "mean"
            assert_as_good_as_plain(q, d, scale, dtype, describe(D, dtype, case, scale), **kw)


@triton_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [5, 64, 200, 2048, 3584])
def test_triton_equals_the_definition(D, dtype):
    """The scales taken in turn. Interpreted: all cases once, elsewhere every seventh."""
    N = 59 if D <= 200 else 7
    every = 7 if infonce.INTERPRET and (D, dtype) != (5, torch.float32) else 1
    for seed, case in list(enumerate(CASES))[::every]:
        symmetric, masks, negatives, shared = case
        q, d, kw = batch(N, N + negatives, D, seed % 4, MASKS[masks], shared, ignored=negatives > 0)
        kw |= dict(symmetric=symmetric, impl="triton", device=DEVICE)
        scale = (1.0, 33.3, 100.0, 300.0)[(seed + seed // 4) % 4]
        assert_as_good_as_plain(q, d, scale, dtype, describe(D, dtype, case, scale), **kw)


@pytest.mark.skipif(
    DEVICE == "cuda" or infonce.INTERPRET, reason="the Triton tests run here as they are"
)
@pytest.mark.skipif(infonce.triton is None, reason="no Triton")
def test_interpreter_passes_the_triton_tests():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    options = "--noconftest -p no:cacheprovider -k triton".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    output = done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 25, output


def test_twin_passes_gradcheck():
    q, d, kw = batch(7, 12, 6, 3, MASKS["all"], shared=True, ignored=True)
    q.requires_grad_()
    d.requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    for symmetric, reduction in itertools.product((True, False), ("mean", "none")):
        options = dict(symmetric=symmetric, reduction=reduction, impl="torch", **kw)

        def loss(q, d, scale, options=options):
            return info_nce(q, d, scale, **options)

        assert torch.autograd.gradcheck(loss, (q, d, scale))


def loss_over_pairs(q, d, scale, *, target, ids, q_ids, margin, symmetric):
    """The losses (N,), written as sums over pairs."""
    cosines = q @ d.T
    asker = {}  # {column: the query of the first row whose positive it is}
    for query, column in zip(q_ids.tolist(), target.tolist(), strict=True):
        asker.setdefault(column, query)

    def is_negative(i, j):
        if target[i] < 0 or ids[j] == ids[target[i]] or asker.get(j) == int(q_ids[i]):
            return False
        return cosines[i, j].detach() <= cosines[i, target[i]].detach() + margin

    losses = []
    for i, column in enumerate(target.tolist()):
        if column < 0:
            losses.append(0 * cosines[i, 0])
            continue
        forward = [cosines[i, j] for j in range(len(d)) if is_negative(i, j)]
        reverse = [cosines[k, column] for k in range(len(q)) if is_negative(k, column)]
        own = cosines[i, column]
        parts = []
        for negatives in (forward, reverse):
            logits = scale * torch.stack([own, *negatives])
            parts.append(logits.logsumexp(0) - logits[0])
        losses.append(sum(parts) / 2 if symmetric else parts[0])
    return torch.stack(losses)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_definition_equals_a_loop_over_pairs(shared, symmetric):
    """Queries have several answers, contents several queries; some are hard negatives."""
    q, d, kw = batch(13, 21, 6, 5, MASKS["all"], shared, ignored=True)
    kw["ids"] = kw["ids"] % 7
    kw["q_ids"] = kw["q_ids"] % 7
    # Two rows that are alike in all but the answer, on purpose
    q[[2, 9]] = q[[1, 3]]
    by_vectors = q.unique(dim=0, return_inverse=True)[1]
    for q_ids in (kw.pop("q_ids"), None):
        known = by_vectors if q_ids is None else q_ids
        options = dict(kw, symmetric=symmetric)
        expected = evaluate(loss_over_pairs, q, d, 5.0, torch.float64, q_ids=known, **options)
        options |= dict(q_ids=q_ids, reduction="none")
        for form in (info_nce_ref, info_nce):
            ours = evaluate(form, q, d, 5.0, torch.float64, **options)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_answers_of_many_queries_cross_blocks_and_tiles(impl):
    """120 rows of 9 queries and 150 candidates of 40 contents, in several blocks and tiles."""
    q, d, _ = batch(120, 150, 16, 7)
    g = seeded(8)
    kw = dict(
        ids=torch.randint(0, 40, (150,), generator=g),
        q_ids=torch.randint(0, 9, (120,), generator=g),
        reduction="none",
    )
    exact = evaluate(info_nce_ref, q, d, 33.3, torch.float64, **kw)
    for a, b in zip(run(impl, q, d, **kw), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_rows_are_one_query_if_and_only_if_all_bits_are_equal(dtype):
    g = seeded(0)
    signs = torch.randint(0, 2, (3000, 14), generator=g) * 2.0 - 1  # many repeat
    rows = torch.cat([signs, torch.eye(14), -torch.eye(14), torch.zeros(2, 14)]).to(dtype)
    rows[-1] *= -1  # -0 is 0
    hashes = infonce._hash_rows(rows)
    expected = rows.unique(dim=0, return_inverse=True)[1]
    same = hashes.unique(return_inverse=True)[1]
    pairs = torch.stack([expected, same], 1).unique(dim=0)
    assert len(pairs) == len(expected.unique()) == len(hashes.unique())
    assert torch.equal(hashes[5:9], infonce._hash_rows(rows[5:9].T.contiguous().T))


def test_without_ids_equal_queries_stay_different():
    q, d, _ = batch(6, 9, 8)
    q[1] = q[0]
    numbered = dict(ids=torch.arange(9), q_ids=torch.arange(6))
    plain = evaluate(info_nce, q, d, 33.3, torch.float64)
    assert identical(plain, evaluate(info_nce, q, d, 33.3, torch.float64, **numbered))
    merged = evaluate(info_nce, q, d, 33.3, torch.float64, ids=torch.arange(9))
    assert merged[0] < plain[0]


def test_definition_on_paper():
    """Two rows and a hard negative by hand: masks and shared targets without any library loss."""
    s = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.5, 0.95]], dtype=torch.float64)
    q = torch.eye(2, 3, dtype=torch.float64)
    d = torch.cat([s, torch.zeros(1, 3, dtype=torch.float64)]).T.contiguous()  # q @ d.T = s
    e = (10 * s).exp()
    rows = e.sum(1)
    columns = e[:, :2].sum(0)
    positive = e.diagonal()

    def loss(**kw):
        return info_nce_ref(q, d, 10.0, reduction="none", **kw).tolist()

    def both(forward, reverse):
        return ((forward.log() + reverse.log()) / 2).tolist()

    assert loss() == pytest.approx(both(rows / positive, columns / positive))
    assert loss(symmetric=False) == pytest.approx((rows / positive).log().tolist())

    # The second row's hard negative (0.95 > 0.5 + 0.1) is dropped; in the reverse direction nothing
    # changes.
    kept = (rows - torch.tensor([0, e[1, 2]])) / positive
    assert loss(margin=0.1) == pytest.approx(both(kept, columns / positive))

    # Columns 0 and 2 hold the same content: column 2 is no negative of row 0.
    kept = (rows - torch.tensor([e[0, 2], 0])) / positive
    assert loss(ids=torch.tensor([7, 8, 7])) == pytest.approx(both(kept, columns / positive))

    # Both rows want column 1: each is its own anchor there, and neither is the other's negative.
    assert loss(target=torch.tensor([1, 1])) == pytest.approx(both(rows / e[:, 1], torch.ones(2)))

    # An ignored row: no loss, and no negative of column 1; its own column remains a candidate.
    second = both(rows / positive, torch.ones(2))[1]
    assert loss(target=torch.tensor([-1, 1])) == pytest.approx([0, second])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_inputs_give_the_same_bits(impl):
    q, d, kw = batch(59, 83, 20, 1, MASKS["all"], shared=True)
    assert identical(run(impl, q, d, **kw), run(impl, q, d, **kw))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    def transposed(q, d, scale, **kw):
        return info_nce(q.T.contiguous().T, d.T.contiguous().T, scale, **kw)

    def sliced(q, d, scale, **kw):
        wider = torch.cat([q, q + 1], 1)
        longer = d.repeat_interleave(2, 0)
        return info_nce(wider[:, :24], longer[::2], scale, **kw)

    q, d, _ = batch(21, 50, 24)
    straight = run(impl, q, d)
    for view in (transposed, sliced):
        seen = evaluate(view, q, d, 33.3, torch.float32, impl=impl, device=device_of(impl))
        for a, b in zip(straight, seen, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_change_nothing_else(impl):
    q, d, _ = batch(21, 50, 24)
    gradients = run(impl, q, d)[1:]
    device = device_of(impl)
    for need in itertools.product((True, False), repeat=3):
        leaves = [x.to(device, torch.float32) for x in (q, d, torch.tensor(33.3))]
        for x, needed in zip(leaves, need, strict=True):
            x.requires_grad_(needed)
        loss = info_nce(*leaves, impl=impl)
        if any(need):
            (loss * 2).backward()

        for x, needed, expected in zip(leaves, need, gradients, strict=True):
            if needed:
                assert torch.equal(x.grad.double().cpu(), expected)
            else:
                assert x.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_contrast_is_zero_not_nan(impl):
    q, d, _ = batch(6, 9, 8)
    for kw in ({"ids": torch.zeros(9, dtype=torch.int64)}, {"target": torch.full((6,), -1)}):
        assert all((x == 0).all() for x in run(impl, q, d, **kw)), kw
    assert all((x == 0).all() for x in run(impl, q[:1], d[:1]))

    ids = torch.tensor([1, 1, 1, 1, 1, 2, 1, 1, 1])
    loss, dq, dd, _ = run(impl, q, d, ids=ids, reduction="none", symmetric=False)
    assert (loss[:5] > 0).all() and loss[5] > 0 and dq.isfinite().all() and dd.isfinite().all()


def test_nan_rows_show():
    q, d, _ = batch(6, 9, 8)
    for poisoned in (q, d):
        poisoned[5, 3] = torch.nan
        assert info_nce(q.float(), d.float(), 33.3, margin=0.1, impl="torch").isnan()
        poisoned[5, 3] = 0


class Watch(TorchDispatchMode):
    """The largest tensor any operation makes, and the operations' names, backward included."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_memory_is_bounded_and_the_host_never_waits():
    q, d, kw = batch(300, 500, 16, 0, MASKS["all"])
    kw["target"] = None
    with Watch() as watch:
        evaluate(info_nce, q, d, 33.3, torch.float32, impl="torch", **kw)
    assert watch.largest <= 500 * 16, f"{watch.largest} elements, N x M is {300 * 500}"
    waits = {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "is_nonzero"}
    called = {name.split("::")[-1].split(".")[0] for name in watch.names}
    assert not called & waits, watch.names


def test_autocast_changes_nothing():
    q, d, _ = batch(59, 83, 20)
    plain = run("torch", q, d)
    with torch.autocast("cpu", torch.bfloat16):
        assert identical(plain, run("torch", q, d))


def poison(x):
    """Return the same values as a view inside a buffer of NaNs (integers: of ids that exist)."""
    filler = torch.nan if x.is_floating_point() else 1
    buffer = torch.full((x.numel() + 2048,), filler, dtype=x.dtype, device=x.device)
    view = buffer[1024 : 1024 + x.numel()].view(x.shape)
    view.copy_(x)
    view.buffer = buffer
    return view


def assert_buffer_intact(view):
    outside = torch.cat([view.buffer[:1024], view.buffer[-1024:]])
    if view.is_floating_point():
        assert outside.isnan().all()
    else:
        assert (outside == 1).all()


def random_block(n, m, D, dtype, device):
    """Return arguments by name for LSE and GRAD on one block of n rows and m columns."""
    g = seeded(0)
    q = F.normalize(torch.randn(n, D, generator=g), dim=1).to(device, dtype)
    d = F.normalize(torch.randn(m, D, generator=g), dim=1).to(device, dtype)

    def per_row():
        return torch.rand(n, generator=g).to(device)

    def per_column():
        return torch.rand(m, generator=g).to(device)

    threshold = per_row() + 0.2
    full_lse = LogSum(per_row() + 1, per_row() + 1)
    row_weight = per_row()
    positive_weight = per_row()
    col_lse = LogSum(per_column() + 1, per_column() + 1)
    col_weight = per_column()

    # Each row's query is another. Every other column is the positive of a row.
    columns = torch.arange(m).int().to(device)
    positive_id = (torch.arange(n) % m).int().to(device)
    query_id = torch.arange(n).int().to(device)
    asker_id = torch.where(columns % 2 == 0, columns, -1)
    lse = dict(
        q=q,
        d=d,
        scale=torch.tensor(33.3, device=device),
        masks=Masks(positive_id, query_id, threshold, columns, asker_id),
    )
    grad = lse | dict(
        target=torch.arange(n).int().to(device),
        full_lse=full_lse,
        col_lse=col_lse,
        weights=Weights(row_weight, positive_weight, col_weight),
    )
    return lse, grad


def poison_all(arguments):
    """Poison each tensor of a dict of tensors and named tuples -> (new dict, list of views)."""
    poisoned = {}
    views = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            poisoned[name] = poison(value)
            views.append(poisoned[name])
        else:
            poisoned[name] = type(value)(*map(poison, value))
            views.extend(poisoned[name])
    return poisoned, views


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n,m,D", [(33, 65, 5), (63, 47, 40), (32, 64, 64)])
def test_infcl_a_nothing_outside_is_read_or_written(impl, n, m, D, monkeypatch):
    """Inputs, sums, weights and workspace in poisoned buffers.

    n % 64 != 0 is where Inf-CL reads past its rows.
    """
    device = device_of(impl)
    dtype = torch.float16 if impl == "triton" else torch.float32
    layers = 1 if impl == "triton" else 2
    work = torch.zeros((layers, n, m), device=device, dtype=dtype)
    lse, grad = random_block(n, m, D, dtype, device)

    def results(lse, grad, work):
        rows, columns = infonce.LSE[impl](**lse, workspace=work)
        return [*rows, *columns, infonce.GRAD[impl](**grad, workspace=work)]

    expected = [x.clone() for x in results(lse, grad, work)]

    made = []
    new_empty = torch.Tensor.new_empty

    def poisoned_new_empty(self, *size, **kw):
        out = new_empty(self, *size, **kw)
        if not out.is_floating_point() or out.numel() == 0:  # the interpreter's own
            return out
        made.append(poison(out.zero_()))
        return made[-1].fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)
    lse, lse_views = poison_all(lse)
    grad, grad_views = poison_all(grad)
    work = poison(work)
    work.fill_(torch.nan)
    assert identical(expected, results(lse, grad, work))
    for view in [*lse_views, *grad_views, work, *made]:
        assert_buffer_intact(view)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("D", [48, 96, 384])
def test_infcl_b_any_D_not_powers_of_two(impl, D):
    q, d, kw = batch(13, 31, D, 2, MASKS["all"])
    kw |= dict(impl=impl, device=device_of(impl))
    assert_as_good_as_plain(q, d, 33.3, torch.float32, f"D {D}", **kw)


@pytest.mark.parametrize("impl", IMPLS)
def test_infcl_e_logits_of_300_do_not_overflow(impl):
    x = unit_rows(9, 16, seeded(0)).float().double()
    for q in (x, -x):
        exact = evaluate(info_nce_ref, q, x, 300.0, torch.float64)
        for a, b in zip(run(impl, q, x, scale=300.0), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_upstream_gradients_survive_fp16(impl):
    """Weights of 1e-4 / N fall below fp16's range; relative to the largest they do not."""

    def small(q, d, scale, **kw):
        return info_nce(q, d, scale, **kw) * 1e-4

    q, d, _ = batch(59, 83, 20)
    kw = dict(impl=impl, device=device_of(impl))
    _, *whole, _ = evaluate(info_nce, q, d, 33.3, torch.float16, **kw)
    _, *scaled, _ = evaluate(small, q, d, 33.3, torch.float16, **kw)
    for a, b in zip(whole, scaled, strict=True):
        assert (a - 1e4 * b).abs().max() <= 0.005 * a.abs().max()


@triton_runs
@pytest.mark.parametrize("stride", [2**27, 2**27 + 1], ids=["descriptors", "pointers"])
def test_triton_offsets_pass_2_to_the_31(stride):
    """Row 17 of such a view starts past 2^31 elements; untouched pages cost nothing."""
    q, d, _ = batch(20, 20, 40)
    q = q.half().to(DEVICE)
    d = d.half().to(DEVICE)
    buffer = torch.empty(19 * stride + 40, dtype=torch.float16, device=DEVICE)
    far = buffer.as_strided((20, 40), (stride, 1))
    expected = info_nce(q, d, 33.3, impl="triton")
    assert expected > 0
    assert torch.equal(info_nce(far.copy_(q), d, 33.3, impl="triton"), expected)
    assert torch.equal(info_nce(q, far.copy_(d), 33.3, impl="triton"), expected)


WORLDS = (1, 2, 3, 4)
# By rank: uneven, one rank without queries, one without negatives.
ROWS = (5, 3, 0, 4)
NEGATIVES = (2, 7, 1, 0)


def rank_main(rank, folder):
    """All cases in every world, in one start of the processes.

    Each rank computes the one-process answer, too.
    """
    torch.set_num_threads(1)
    assert_shares_add_up(rank=0, world=1)  # torch.distributed not initialised
    for world in WORLDS[rank:]:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
        )
        for negatives, ids in itertools.product((True, False), repeat=2):
            common = dict(rank=rank, world=world, negatives=negatives, ids=ids)
            common["queries"] = negatives == ids
            assert_shares_add_up(**common)
            assert_shares_add_up(**common, margin=0.1)
            assert_shares_add_up(**common, margin=0.1, symmetric=False)
            assert_shares_add_up(**common, margin=0.1, dtype=torch.float32)
        if world > 1:
            q = torch.eye(3, 4 + rank % 2)  # D differs
            with pytest.raises(ValueError, match=r"q, p, n: .* by rank"):
                info_nce_dist(q, q, 1.0)
        dist.barrier()
        dist.destroy_process_group()


def assert_shares_add_up(
    rank,
    world,
    dtype=torch.float64,
    negatives=True,
    ids=True,
    queries=True,
    margin=None,
    symmetric=True,
):
    """Shares and gradients sum over the ranks to one process, for q, p, n and a learnable scale."""
    rows = list(ROWS[:world])
    more = list(NEGATIVES[:world]) if negatives else [0] * world
    options = dict(margin=margin, symmetric=symmetric)

    g = seeded(0)
    q = unit_rows(sum(rows), 12, g).to(dtype)
    n = unit_rows(sum(more), 12, g).to(dtype)
    p = F.normalize(q + unit_rows(len(q), 12, g).to(dtype), dim=1)
    scale = torch.tensor(33.3, dtype=dtype)
    p_ids = torch.randint(0, 9, (len(q),), generator=g)
    n_ids = torch.randint(0, 9, (len(n),), generator=g)
    q_ids = torch.randint(0, 6, (len(q),), generator=g)
    q[-1] = q[0]  # one query, also where no q_ids say so

    # One process
    whole = {"q": q, "p": p, "n": n, "scale": scale}
    whole = {name: x.clone().requires_grad_() for name, x in whole.items()}
    loss = info_nce_ref(
        whole["q"],
        torch.cat([whole["p"], whole["n"]]),
        whole["scale"],
        ids=torch.cat([p_ids, n_ids]) if ids else None,
        q_ids=q_ids if queries else None,
        **options,
    )
    loss.backward()

    # This rank's share
    def mine(x, sizes):
        return x.split(sizes)[rank].clone()

    local = {"q": mine(q, rows), "p": mine(p, rows), "n": mine(n, more), "scale": scale.clone()}
    for x in local.values():
        x.requires_grad_()
    share = info_nce_dist(
        local["q"],
        local["p"],
        local["scale"],
        n=local["n"] if negatives else None,
        p_ids=mine(p_ids, rows) if ids else None,
        n_ids=mine(n_ids, more) if ids and negatives else None,
        q_ids=mine(q_ids, rows) if queries else None,
        **options,
    )
    share.backward()
    total = share.detach().clone()
    dscale = local["scale"].grad.clone()
    if world > 1:
        dist.all_reduce(total)
        dist.all_reduce(dscale)

    pairs = {
        "loss": (total, loss),
        "dq": (local["q"].grad, mine(whole["q"].grad, rows)),
        "dp": (local["p"].grad, mine(whole["p"].grad, rows)),
        "dscale": (dscale, whole["scale"].grad),
    }
    if negatives:
        pairs["dn"] = (local["n"].grad, mine(whole["n"].grad, more))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, (got, expected) in pairs.items():
        error = (got - expected).abs().max() if got.numel() else 0
        assert error <= tolerance, (
            f"rank {rank}/{world} {dtype} negatives {negatives} ids {ids} {options}: "
            f"{name} off by {error:.1e}"
        )


def test_infcl_c_d_ranks_equal_one_process(tmp_path):
    """In Inf-CL, a learnable scale gets world x its gradient, and one initialised rank fails."""
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), len(WORLDS))


@pytest.mark.parametrize("chip", compiled_kernels.CHIPS, ids=lambda chip: chip.name)
@compiled
def test_kernels_compile_ahead_of_time(chip):
    """The tiles of large GPUs: fast products, no spills, and an epilogue that stays short.

    The bounds are explained in compiled_kernels.py.
    """
    for kernel in compiled_kernels.KERNELS:
        program = compiled_kernels.compile_program(kernel, infonce.TILES[chip.tile], chip)
        check_program(program, chip, per_sm=1)
        epilogue = sum(program.once.values())
        bound = 1.15 * compiled_kernels.EPILOGUE[chip.name, kernel.__name__]
        assert epilogue <= bound, f"{kernel.__name__} on {chip.name}: {epilogue} instructions"


@pytest.mark.slow
@pytest.mark.parametrize("chip", compiled_kernels.RARE_CHIPS, ids=lambda chip: chip.name)
@compiled
def test_kernels_compile_for_rare_chips(chip):
    for kernel in compiled_kernels.KERNELS:
        program = compiled_kernels.compile_program(kernel, infonce.TILES[chip.tile], chip)
        check_program(program, chip, per_sm=1)


@pytest.mark.slow
@pytest.mark.parametrize("other", compiled_kernels.ALTERNATIVES, ids=lambda x: x.chip.name + x.name)
@compiled
def test_alternative_tiles_compile_ahead_of_time(other):
    for kernel in compiled_kernels.KERNELS:
        program = compiled_kernels.compile_program(kernel, other.tile(), other.chip)
        check_program(program, other.chip, other.per_sm)


def check_program(program, chip, per_sm):
    """Assert that the chip's fast matrix instruction multiplies, and that nothing is spilled."""
    case = f"{chip.name}: {program}"
    multiply = {opcode for opcode in compiled_kernels.MATRIX if program.loop[opcode]}
    assert multiply == {chip.matrix}, case
    assert program.stack == program.local == 0, case
    assert program.per_sm(chip) >= per_sm, case
    # Single numbers of G would take 128 stores of a thread.
    assert program.once["STG"] <= 64, case


def bad(**changes):
    """Return arguments for info_nce, good but for the changes."""
    x = torch.eye(4, 6)
    return {"q": x[:3], "d": x, "scale": 10.0} | changes


@pytest.mark.parametrize("argument,call", [
    ("target", bad(target=torch.tensor([0, 1, 4]))),
    ("target", bad(target=torch.tensor([0, 1, -2]))),
    ("target", bad(target=torch.tensor([0, 1]))),
    ("target", bad(target=torch.tensor([0.0, 1, 2]))),
    ("ids", bad(ids=torch.arange(3))),
    ("ids", bad(ids=torch.arange(4, dtype=torch.int32))),
    ("ids", bad(ids=torch.arange(4, device="meta"))),
    ("q_ids", bad(q_ids=torch.arange(4))),
    ("d", bad(d=torch.eye(4, 6, device="meta"))),
    ("d", bad(d=torch.eye(4, 6, dtype=torch.float16))),
    ("d", bad(d=torch.eye(4, 5))),
    ("d", bad(d=torch.ones(6))),
    ("q", bad(q=torch.eye(3, 6).long())),
    ("q", bad(q=torch.ones(3, 0), d=torch.ones(4, 0))),
    ("q", bad(q=torch.ones(0, 6))),
    ("d", bad(d=torch.ones(0, 6), target=torch.tensor([-1, -1, -1]))),
    ("target", bad(d=torch.eye(2, 6))),
    ("margin", bad(margin=-0.1)),
    ("margin", bad(margin=float("nan"))),
    ("scale", bad(scale=0)),
    ("scale", bad(scale=-1.0)),
    ("scale", bad(scale=float("inf"))),
    ("scale", bad(scale=torch.ones(1))),
    ("scale", bad(scale=torch.tensor(3))),
    ("reduction", bad(reduction="sum")),
    ("impl", bad(impl="cuda")),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        info_nce(**call)


@pytest.mark.parametrize("argument,call", [
    ("p", dict(p=torch.eye(2, 6))),
    ("p", dict(p=torch.eye(3, 5))),
    ("n", dict(n=torch.eye(3, 6).double())),
    ("p_ids", dict(p_ids=torch.arange(2))),
    ("q_ids", dict(q_ids=torch.arange(2))),
    ("n_ids", dict(n=torch.eye(3, 6), p_ids=torch.arange(3))),
    ("n_ids", dict(n=torch.eye(3, 6), n_ids=torch.arange(3))),
    ("q", dict(q=torch.ones(0, 6), p=torch.ones(0, 6))),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_input_of_the_ranks_form_names_the_argument(argument, call):
    good = {"q": torch.eye(3, 6), "p": torch.eye(3, 6), "scale": 10.0}
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        info_nce_dist(**(good | call))


@pytest.mark.skipif(infonce.INTERPRET or DEVICE == "cuda", reason="Triton runs here")
def test_impl_triton_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match="impl='triton'.*GPU"):
        info_nce(torch.eye(3), torch.eye(3), 1.0, impl="triton")


def test_debug_checks_values(monkeypatch):
    monkeypatch.setattr(infonce, "DEBUG", True)
    q = torch.eye(3)
    q[1] = torch.nan
    with pytest.raises(ValueError, match=r"q: NaN or inf in rows \[1\]"):
        info_nce(q, torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="scale"):
        info_nce(torch.eye(3), torch.eye(3), torch.tensor(-1.0))


def test_auto_says_its_choice_once(capsys):
    infonce._say_once.cache_clear()
    for _ in range(2):
        info_nce(torch.eye(3), torch.eye(3), 1.0)
    said = "infonce: impl='auto' chose 'torch' for torch.float32 on cpu\n"
    assert capsys.readouterr().err == said


# An outline of what transformers' hub_kernels.py and modeling_utils.py take from that package
FAKE = {
    "__init__.py": """import importlib.metadata
__version__ = importlib.metadata.version("kernels")
from kernels.layer import Mode
from kernels.utils import get_kernel
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: lambda decorated: decorated
""",
    "utils.py": "def get_kernel(*args, **kwargs): ...",
    "layer/__init__.py": "from kernels.layer.mode import Mode",
    "layer/mode.py": """import enum
Mode = enum.Flag("Mode", "TRAINING INFERENCE TORCH_COMPILE FALLBACK")
""",
    "../kernels-0.16.2.dist-info/METADATA": """Metadata-Version: 2.1
Name: kernels
Version: 0.16.2
""",
}
IMPORTS = """import kernels
import transformers.modeling_utils, transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
from kernels import get_kernel
from kernels.infonce import info_nce_ref
assert is_kernels_available() and kernels.__file__.startswith({root!r}), kernels.__file__
assert info_nce_ref.__module__ == 'kernels.infonce' and get_kernel.__module__ == 'kernels.utils'
print(kernels.__version__)"""


def run_python(*arguments, path, cwd=ROOT):
    """Run Python with this PYTHONPATH."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )


def test_transformers_finds_the_other_kernels_package(tmp_path):
    """Hugging Face's `kernels` and ours in one process; an outline of theirs if not installed."""
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        path.append(str(tmp_path))
        for name, text in FAKE.items():
            file = (tmp_path / "kernels" / name).resolve()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    done = run_python("-c", IMPORTS.format(root=str(ROOT)), path=path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_copied_file_works_alone(tmp_path):
    """With torch and nothing else: no Triton, and nothing of this repository on the path."""
    code = """import sys
sys.modules["triton"] = None
import torch, infonce
q = torch.eye(3).requires_grad_()
loss = infonce.info_nce(q, torch.eye(3), 1.0)
loss.backward()
assert torch.allclose(loss, infonce.info_nce_ref(q, torch.eye(3), 1.0)) and q.grad.any()
"""
    (tmp_path / "infonce.py").write_text(Path(infonce.__file__).read_text())
    done = run_python("-c", code, path=[str(tmp_path)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_the_other_package_ours_stands_alone():
    no_site_packages = "-S"
    done = run_python(no_site_packages, "-c", "import kernels; print(kernels.__path__)", path=[])
    assert done.stdout.strip() == str([str(ROOT / "kernels")]), done.stderr
