"""kernels/infonce.py against its fp64 definition: masks, dtypes, sizes, poison, ranks, ahead-of-time compilation, bad input.

python -m pytest tests/test_infonce.py                                 the torch twin, ranks, the Triton tests interpreted
TRITON_INTERPRET=1 python -m pytest tests/test_infonce.py -k triton    those alone; on a GPU, without the variable, compiled
"""

import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.infonce as infonce
from kernels.infonce import info_nce, info_nce_dist, info_nce_ref

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_runs = pytest.mark.skipif(
    DEVICE == "cpu" and not infonce.INTERPRET, reason="needs a GPU or TRITON_INTERPRET=1"
)
compiled = pytest.mark.skipif(
    infonce.INTERPRET or infonce.triton is None, reason="needs Triton, not interpreted"
)
MASKS = {"none": (), "ids": ("ids",), "margin": ("margin",), "both": ("ids", "margin")}
SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(
        infonce, "CPU_BLOCK", 48
    )  # block edges inside every case, no multiple of any size
    monkeypatch.setattr(infonce, "WORKSPACE", 2 * 256 * 256 * 4)


def batch(N, M, D, seed=0, masks=(), shared=False, ignored=False):
    """fp64 unit rows and keyword arguments. A margin lies in a gap of the scores that no rounding can cross, and drops some."""
    g = torch.Generator().manual_seed(seed)
    q, noise = (
        F.normalize(torch.randn(n, D, generator=g, dtype=torch.float64), dim=1) for n in (N, M)
    )
    target = torch.randint(0, (N + 1) // 2, (N,), generator=g) if shared else torch.arange(N)
    target[torch.rand(N, generator=g) < (0.2 if ignored else 0)] = -1
    d = F.normalize(
        0.85 * q[torch.arange(M) % N] + 0.6 * noise, dim=1
    )  # hard negatives of row i: i + N, i + 2N, ...
    d[:N:3] = F.normalize(
        q[:N:3].roll(1, 0) + 0.2 * noise[:N:3], dim=1
    )  # every third positive is nearer to another query
    kw = {"target": target} if shared or ignored else {}
    if "ids" in masks:
        kw["ids"] = torch.randint(0, 2 * M // 3 + 1, (M,), generator=g) - 5
    if "margin" in masks:
        s = q @ d.T
        over = (s - s.gather(1, target.clamp(min=0)[:, None])).flatten().sort().values
        gaps = (over.diff() > 0.025) & (over[:-1] >= 0)
        kw["margin"] = float(
            (over[:-1] + over[1:])[gaps][0] / 2
        )  # no gap: an IndexError, never a case without a margin
    return q, d, kw


def evaluate(fn, q, d, scale, dtype, **kw):
    """[loss, dq, dd, dscale] in fp64 on the CPU, for inputs in `dtype` on kw's device, with upstream gradients other than 1."""
    device = kw.pop("device", "cpu")
    q, d = (x.to(device, dtype, copy=True).requires_grad_() for x in (q, d))
    scale = torch.tensor(scale, dtype=SUM(dtype), device=device, requires_grad=True)
    loss = fn(
        q,
        d,
        scale,
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()},
    )
    weights = torch.linspace(-0.5, 2, max(loss.numel(), 2))[-loss.numel() :] / loss.numel()
    loss.backward(weights.to(loss).view(loss.shape))
    return [x.detach().double().cpu() for x in (loss, q.grad, d.grad, scale.grad)]


def SUM(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_as_good_as_plain(q, d, scale, dtype, case, impl="torch", device="cpu", **kw):
    """Error against fp64 <= 2x plain torch's own error at this dtype + 1e-6 (half: 1e-3), for the loss and every gradient.

    On top, the last fp32 digit of the value. Where plain torch was right by luck, its error is taken over reflected copies of
    the same problem. The interpreter truncates bf16 where a GPU rounds: there alone, 2^-7 of the largest value is allowed.
    """
    names, plain = ("loss", "dq", "dd", "dscale"), [0.0] * 4
    last_digit = torch.finfo(SUM(dtype)).eps
    if infonce.INTERPRET and impl == "triton" and dtype == torch.bfloat16:
        last_digit += 2**-7
    for turn in range(24):
        if turn:
            v = F.normalize(
                torch.randn(
                    q.shape[1], dtype=q.dtype, generator=torch.Generator().manual_seed(turn)
                ),
                dim=0,
            )
            q, d = (x - 2 * torch.outer(x @ v, v) for x in (q, d))
        q16, d16 = q.to(dtype).double(), d.to(dtype).double()
        exact = evaluate(info_nce_ref, q16, d16, scale, torch.float64, **kw)
        other = evaluate(info_nce_ref, q16, d16, scale, dtype, **kw)
        plain = [max(p, (x - e).abs().max()) for p, x, e in zip(plain, other, exact, strict=True)]
        if turn == 0:
            ours = evaluate(info_nce, q16, d16, scale, dtype, impl=impl, device=device, **kw)
            errors, largest = (
                [(o - e).abs() for o, e in zip(ours, exact, strict=True)],
                [e.abs().max() for e in exact],
            )
            assert (ours[0] >= 0).all(), f"loss < 0 in {case}"
        limits = [
            2 * p + SLACK[dtype] + last_digit * e for p, e in zip(plain, largest, strict=True)
        ]
        if all(error.max() <= limit for error, limit in zip(errors, limits, strict=True)):
            return
    for name, error, limit, e in zip(names, errors, limits, largest, strict=True):
        message = f"{name} {case}: max {error.max():.2e}, mean {error.mean():.2e}, allowed {limit:.2e}, largest {e:.2e}"
        assert error.max() <= limit, message


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("D", [5, 64, 200, 2048, 3584])
def test_twin_equals_the_definition(D, dtype):
    cases = itertools.product((True, False), MASKS, (0, 41), (True, False))
    for seed, (symmetric, masks, negatives, shared) in enumerate(cases):
        N = 59 if D <= 200 else 29
        q, d, kw = batch(N, N + negatives, D, seed % 4, MASKS[masks], shared, ignored=negatives > 0)
        for scale in (1.0, 33.3, 100.0, 300.0):
            case = f"D {D} {dtype} symmetric {symmetric} masks {masks} negatives {negatives} shared {shared} scale {scale}"
            kw["reduction"] = "none" if scale == 33.3 else "mean"
            assert_as_good_as_plain(q, d, scale, dtype, case, symmetric=symmetric, **kw)


@triton_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [5, 64, 200, 2048, 3584])
def test_triton_equals_the_definition(D, dtype):
    """The scales taken in turn. Interpreted: all cases once, elsewhere every seventh."""
    cases = list(enumerate(itertools.product((True, False), MASKS, (0, 41), (True, False))))
    every = 7 if infonce.INTERPRET and (D, dtype) != (5, torch.float32) else 1
    for seed, (symmetric, masks, negatives, shared) in cases[::every]:
        N = 59 if D <= 200 else 7
        q, d, kw = batch(N, N + negatives, D, seed % 4, MASKS[masks], shared, ignored=negatives > 0)
        scale = (1.0, 33.3, 100.0, 300.0)[(seed + seed // 4) % 4]
        case = f"D {D} {dtype} symmetric {symmetric} masks {masks} negatives {negatives} shared {shared} scale {scale}"
        assert_as_good_as_plain(
            q, d, scale, dtype, case, impl="triton", device=DEVICE, symmetric=symmetric, **kw
        )


@pytest.mark.skipif(
    DEVICE == "cuda" or infonce.INTERPRET, reason="the Triton tests run here as they are"
)
@pytest.mark.skipif(infonce.triton is None, reason="no Triton")
def test_interpreter_passes_the_triton_tests():
    """The interpreter is chosen when Triton is first imported, so it needs a process of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        __file__,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 25, (
        done.stdout[-8000:] + done.stderr[-2000:]
    )


def test_twin_passes_gradcheck():
    q, d, kw = batch(7, 12, 6, 3, MASKS["both"], shared=True, ignored=True)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    for symmetric, reduction in itertools.product((True, False), ("mean", "none")):
        assert torch.autograd.gradcheck(
            lambda q, d, s, o=(symmetric, reduction): info_nce(
                q, d, s, symmetric=o[0], reduction=o[1], impl="torch", **kw
            ),
            (q.requires_grad_(), d.requires_grad_(), scale),
        )


def test_definition_on_paper():
    """Two rows and a hard negative by hand: what the masks and the shared target mean, without any library loss."""
    s = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.5, 0.95]], dtype=torch.float64)
    q, d = (
        torch.eye(2, 3, dtype=torch.float64),
        torch.cat([s, torch.zeros(1, 3, dtype=torch.float64)]).T.contiguous(),
    )
    e = (10 * s).exp()
    both = lambda forward, reverse: ((forward.log() + reverse.log()) / 2).tolist()  # noqa: E731
    loss = lambda **kw: info_nce_ref(q, d, 10.0, reduction="none", **kw).tolist()  # noqa: E731
    rows, pos = e.sum(1), e.diagonal()
    assert loss() == pytest.approx(both(rows / pos, e[:, :2].sum(0) / pos))
    assert loss(symmetric=False) == pytest.approx((rows / pos).log().tolist())
    # The second row's hard negative (0.95 > 0.5 + 0.1) is dropped; in the reverse direction nothing changes.
    assert loss(margin=0.1) == pytest.approx(
        both((rows - torch.tensor([0, e[1, 2]])) / pos, e[:, :2].sum(0) / pos)
    )
    # Columns 0 and 2 hold the same content: column 2 is no negative of row 0.
    kept = (rows - torch.tensor([e[0, 2], 0])) / pos
    assert loss(ids=torch.tensor([7, 8, 7])) == pytest.approx(both(kept, e[:, :2].sum(0) / pos))
    # Both rows want column 1: each is its own anchor there, and neither is the other's negative.
    assert loss(target=torch.tensor([1, 1])) == pytest.approx(both(rows / e[:, 1], torch.ones(2)))
    # An ignored row: no loss, and no negative of column 1; its own column remains a candidate.
    assert loss(target=torch.tensor([-1, 1])) == pytest.approx(
        [0, both(rows / pos, torch.ones(2))[1]]
    )


def identical(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(impl, q, d, scale=33.3, **kw):
    return evaluate(
        info_nce,
        q,
        d,
        scale,
        torch.float32,
        impl=impl,
        device=DEVICE if impl == "triton" else "cpu",
        **kw,
    )


IMPLS = [pytest.param("torch", id="twin"), pytest.param("triton", marks=triton_runs)]


@pytest.mark.parametrize("impl", IMPLS)
def test_same_inputs_give_the_same_bits(impl):
    q, d, kw = batch(59, 83, 20, 1, MASKS["both"], shared=True)
    assert identical(run(impl, q, d, **kw), run(impl, q, d, **kw))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    q, d, _ = batch(21, 50, 24)
    kw = dict(device=DEVICE if impl == "triton" else "cpu", impl=impl)
    straight = evaluate(info_nce, q, d, 33.3, torch.float32, **kw)
    transposed = lambda q, d, s, **k: info_nce(q.T.contiguous().T, d.T.contiguous().T, s, **k)  # noqa: E731
    sliced = lambda q, d, s, **k: info_nce(
        torch.cat([q, q + 1], 1)[:, :24], d.repeat_interleave(2, 0)[::2], s, **k
    )  # noqa: E731
    for view in (transposed, sliced):
        for a, b in zip(straight, evaluate(view, q, d, 33.3, torch.float32, **kw), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_change_nothing_else(impl):
    q, d, _ = batch(21, 50, 24)
    full = run(impl, q, d)
    for need in itertools.product((True, False), repeat=3):
        device = DEVICE if impl == "triton" else "cpu"
        q32, d32 = (
            x.to(device, torch.float32).requires_grad_(n)
            for x, n in zip((q, d), need[:2], strict=True)
        )
        scale = torch.tensor(33.3, device=q32.device, requires_grad=need[2])
        loss = info_nce(q32, d32, scale, impl=impl)
        if any(need):
            (loss * 2).backward()
        for x, n, expected in zip((q32, d32, scale), need, full[1:], strict=True):
            assert (x.grad is None) != n and (not n or torch.equal(x.grad.double().cpu(), expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_contrast_is_zero_not_nan(impl):
    q, d, _ = batch(6, 9, 8)
    for kw in ({"ids": torch.zeros(9, dtype=torch.int64)}, {"target": torch.full((6,), -1)}):
        assert all((x == 0).all() for x in run(impl, q, d, **kw)), kw
    assert all((x == 0).all() for x in run(impl, q[:1], d[:1]))
    loss, dq, dd, _ = run(
        impl, q, d, ids=torch.tensor([1, 1, 1, 1, 1, 2, 1, 1, 1]), reduction="none", symmetric=False
    )
    assert (loss[:5] > 0).all() and loss[5] > 0 and dq.isfinite().all() and dd.isfinite().all()


def test_nan_rows_show():
    q, d, _ = batch(6, 9, 8)
    for poisoned in (q, d):
        poisoned[5, 3] = torch.nan
        assert info_nce(q.float(), d.float(), 33.3, margin=0.1, impl="torch").isnan()
        poisoned[5, 3] = 0


@pytest.mark.gpu
def test_gpu_70k_by_70k_without_a_sync(monkeypatch):
    """Past 2^31 logits, in bounded memory, the host never waiting; Triton and the twin agree."""
    monkeypatch.setattr(infonce, "WORKSPACE", 512 * 2**20)
    g = torch.Generator("cuda").manual_seed(0)
    q, d = (
        F.normalize(torch.randn(70_000, 96, generator=g, device="cuda"), dim=1).bfloat16()
        for _ in range(2)
    )
    ids, results = torch.arange(70_000, device="cuda") // 2, []
    for impl in ("triton", "torch", "triton"):
        q, d = (x.detach().requires_grad_() for x in (q, d))
        if results:  # the first compiled the kernels
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.reset_peak_memory_stats()
        loss = info_nce(q, d, 33.3, ids=ids, margin=0.1, impl=impl)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() < 2e9
        results.append([x.detach().float() for x in (loss, q.grad, d.grad)])
    assert identical(results[0], results[2])
    for a, b in zip(*results[:2], strict=True):
        assert (a - b).abs().max() <= 0.01 * b.abs().max()


class Watch(TorchDispatchMode):
    """The largest tensor any operation makes, and the operations' names, backward included."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_memory_is_bounded_and_the_host_never_waits():
    q, d, kw = batch(300, 500, 16, 0, MASKS["both"])
    kw["target"] = None
    with Watch() as watch:
        evaluate(info_nce, q, d, 33.3, torch.float32, impl="torch", **kw)
    assert watch.largest <= 500 * 16, f"{watch.largest} elements, N x M is {300 * 500}"
    waits = {"_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "is_nonzero"}
    assert not {n for n in watch.names if n.split("::")[-1].split(".")[0] in waits}, watch.names


def test_autocast_changes_nothing():
    q, d, _ = batch(59, 83, 20)
    plain = run("torch", q, d)
    with torch.autocast("cpu", torch.bfloat16):
        assert identical(plain, run("torch", q, d))


def poison(x):
    """The same values as a view inside a buffer of NaNs (integers: of ids that exist)."""
    buffer = torch.full(
        (x.numel() + 2048,),
        torch.nan if x.is_floating_point() else 1,
        dtype=x.dtype,
        device=x.device,
    )
    view = buffer[1024 : 1024 + x.numel()].view(x.shape)
    view.copy_(x)
    view.buffer = buffer
    return view


def assert_buffer_intact(view):
    outside = torch.cat([view.buffer[:1024], view.buffer[-1024:]])
    assert outside.isnan().all() if view.is_floating_point() else (outside == 1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n,m,D", [(33, 65, 5), (63, 47, 40), (32, 64, 64)])
def test_infcl_a_nothing_outside_is_read_or_written(impl, n, m, D, monkeypatch):
    """Inputs, statistics, weights and workspace in poisoned buffers; n % 64 != 0 is where Inf-CL reads past its rows."""
    g, device = torch.Generator().manual_seed(0), DEVICE if impl == "triton" else "cpu"
    dtype = torch.float16 if impl == "triton" else torch.float32
    q, d = (F.normalize(torch.randn(k, D, generator=g), dim=1).to(device, dtype) for k in (n, m))
    scale, floats = (
        torch.tensor(33.3, device=device),
        [torch.rand(k, generator=g).to(device) for k in (n,) * 5 + (m,) * 3],
    )
    bound, top, rest, u, w, col_top, col_rest, v = floats
    own, at, ids = (
        x.int().to(device) for x in (torch.arange(n) % m, torch.arange(n), torch.arange(m))
    )
    work = torch.zeros((1, n, m) if impl == "triton" else (2, n, m), device=device, dtype=dtype)
    lse = [q, d, scale, own, bound + 0.2, ids, work]
    grad = [
        q,
        d,
        scale,
        own,
        bound + 0.2,
        at,
        top + 1,
        rest + 1,
        u,
        w,
        ids,
        col_top + 1,
        col_rest + 1,
        v,
    ]
    expected = [x.clone() for x in infonce.LSE[impl](*lse)] + [
        infonce.GRAD[impl](*grad, 0, work).clone()
    ]
    made, new_empty = [], torch.Tensor.new_empty

    def poisoned_new_empty(self, *size, **kw):
        out = new_empty(self, *size, **kw)
        if (
            not out.is_floating_point() or out.numel() == 0
        ):  # not the kernels': the interpreter's own
            return out
        made.append(poison(out.zero_()))
        return made[-1].fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)
    lse, grad, work = [poison(x) for x in lse], [poison(x) for x in grad], poison(work)
    work.fill_(torch.nan)
    actual = [*infonce.LSE[impl](*lse[:-1], work), infonce.GRAD[impl](*grad, 0, work)]
    assert identical(expected, actual)
    for view in [*lse[:-1], *grad, work, *made]:
        assert_buffer_intact(view)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("D", [48, 96, 384])
def test_infcl_b_any_D_not_powers_of_two(impl, D):
    q, d, kw = batch(13, 31, D, 2, MASKS["both"])
    assert_as_good_as_plain(
        q,
        d,
        33.3,
        torch.float32,
        f"D {D}",
        impl=impl,
        device=DEVICE if impl == "triton" else "cpu",
        **kw,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_infcl_e_logits_of_300_do_not_overflow(impl):
    x = (
        F.normalize(
            torch.randn(9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
            dim=1,
        )
        .float()
        .double()
    )
    for q in (x, -x):
        exact = evaluate(info_nce_ref, q, x, 300.0, torch.float64)
        for a, b in zip(run(impl, q, x, scale=300.0), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_small_upstream_gradients_survive_fp16(impl):
    """Weights of 1e-4 / N fall below fp16's range; relative to the largest they do not."""
    q, d, _ = batch(59, 83, 20)
    once, small = [], lambda q, d, s, **kw: info_nce(q, d, s, **kw) * 1e-4
    for loss in (info_nce, small):
        once.append(
            evaluate(
                loss,
                q,
                d,
                33.3,
                torch.float16,
                impl=impl,
                device=DEVICE if impl == "triton" else "cpu",
            )
        )
    for a, b in zip(once[0][1:3], once[1][1:3], strict=True):
        assert (a - 1e4 * b).abs().max() <= 0.005 * a.abs().max()


@triton_runs
@pytest.mark.parametrize("stride", [2**27, 2**27 + 1], ids=["descriptors", "pointers"])
def test_triton_offsets_pass_2_to_the_31(stride):
    """Row 17 of a view with such a stride starts past 2^31 elements; untouched pages of its buffer cost nothing."""
    q, d, _ = batch(20, 20, 40)
    far = torch.empty(19 * stride + 40, dtype=torch.float16, device=DEVICE).as_strided(
        (20, 40), (stride, 1)
    )
    near = [x.half().to(DEVICE) for x in (q, d)]
    expected = info_nce(*near, 33.3, impl="triton")
    for side in range(2):
        inputs = [far.copy_(x) if side == k else x for k, x in enumerate(near)]
        assert torch.equal(info_nce(*inputs, 33.3, impl="triton"), expected) and expected > 0


WORLDS = (1, 2, 3, 4)
ROWS, NEGATIVES = (
    (5, 3, 0, 4),
    (2, 7, 1, 0),
)  # by rank: uneven, one rank without queries, one without negatives


def rank_main(rank, folder):
    """All cases in every world, in one start of the processes; each rank computes the one-process answer too."""
    torch.set_num_threads(1)
    assert_shares_add_up(rank=0, world=1)  # torch.distributed not initialised
    for world in WORLDS[rank:]:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
        )
        for dtype, negatives, ids in itertools.product(
            (torch.float64, torch.float32), (True, False), (True, False)
        ):
            for margin, symmetric in (
                ((None, True), (0.1, True), (0.1, False))
                if dtype == torch.float64
                else ((0.1, True),)
            ):
                assert_shares_add_up(rank, world, dtype, negatives, ids, margin, symmetric)
        if world > 1:
            q = torch.eye(3, 4 + rank % 2)  # D differs
            with pytest.raises(ValueError, match=r"q, p, n: .* by rank"):
                info_nce_dist(q, q, 1.0)
        dist.barrier()
        dist.destroy_process_group()


def assert_shares_add_up(
    rank, world, dtype=torch.float64, negatives=True, ids=True, margin=None, symmetric=True
):
    """Shares and gradients sum over the ranks to one process, for q, p, n and a learnable scale."""
    g = torch.Generator().manual_seed(0)
    rows, more = ROWS[:world], NEGATIVES[:world]
    unit = lambda n: F.normalize(torch.randn(n, 12, generator=g, dtype=torch.float64), dim=1).to(
        dtype
    )  # noqa: E731
    q, n = unit(sum(rows)), unit(sum(more) if negatives else 0)
    p, ids_p, ids_n = (
        F.normalize(q + unit(len(q)), dim=1),
        *(torch.randint(0, 9, (k,), generator=g) for k in (len(q), len(n))),
    )
    leaves = [x.clone().requires_grad_() for x in (q, p, n, torch.tensor(33.3, dtype=dtype))]
    loss = info_nce_ref(
        leaves[0],
        torch.cat(leaves[1:3]),
        leaves[3],
        ids=torch.cat([ids_p, ids_n]) if ids else None,
        margin=margin,
        symmetric=symmetric,
    )
    loss.backward()
    mine = lambda x, sizes: x.split(list(sizes))[rank].clone()  # noqa: E731
    more = more if negatives else (0,) * world
    local = [mine(q, rows), mine(p, rows), mine(n, more), torch.tensor(33.3, dtype=dtype)]
    local = [x.requires_grad_() for x in local]
    share = info_nce_dist(
        local[0],
        local[1],
        local[3],
        n=local[2] if negatives else None,
        margin=margin,
        symmetric=symmetric,
        p_ids=mine(ids_p, rows) if ids else None,
        n_ids=mine(ids_n, more) if ids and negatives else None,
    )
    share.backward()
    total, dscale = share.detach().clone(), local[3].grad.clone()
    for x in (total, dscale) if world > 1 else ():
        dist.all_reduce(x)
    expected = [
        loss,
        *(mine(x.grad, sizes) for x, sizes in zip(leaves[:2], (rows, rows), strict=True)),
        leaves[3].grad,
    ]
    got = [total, local[0].grad, local[1].grad, dscale]
    if negatives:
        expected, got = [*expected, mine(leaves[2].grad, more)], [*got, local[2].grad]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, a, b in zip(("loss", "dq", "dp", "dscale", "dn"), got, expected, strict=False):
        error = (a - b).abs().max() if a.numel() else 0
        case = f"rank {rank}/{world} {dtype} negatives {negatives} ids {ids} margin {margin} symmetric {symmetric}"
        assert error <= tolerance, f"{case}: {name} off by {error:.1e}"


def test_infcl_c_d_ranks_equal_one_process(tmp_path):
    """Inf-CL's learnable scale gets world x its gradient, and one rank with torch.distributed initialised is an error there."""
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), len(WORLDS))


@pytest.mark.parametrize(
    "kind,arch,limit,product",
    [("hopper", 90, 232_448, "wgmma.mma_async"), ("ampere", 80, 166_912, "mma.sync")],
)
@pytest.mark.parametrize("D", [1536, 2048, 3584])
@compiled
def test_kernels_compile_ahead_of_time(D, kind, arch, limit, product, tmp_path):
    """Every tile that bf16 can choose on sm_90 and sm_80: tensor-core products, nothing spilled, shared memory that fits."""
    assert D % 16 == 0  # compile() says so to Triton
    for kernel in (infonce.lse_kernel, infonce.grad_kernel):
        for tma in (True, False) if kind == "hopper" else (False,):
            binary = compile_kernel(kernel, infonce.TILES[kind], tma, arch)
            usage = resource_usage(binary, tmp_path)
            stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
            case = f"{kernel.__name__} sm_{arch} descriptors {tma}: {usage}"
            assert (stack, local) == ("0", "0"), case
            assert binary.metadata.shared <= limit and product in binary.asm["ptx"], case


def compile_kernel(kernel, tile, tma, arch):
    """Compile a kernel for bf16 inputs as a launch would, with no GPU at hand."""
    import triton
    from triton.backends.compiler import GPUTarget

    constants = {name: tile[name] for name in ("BM", "BN", "BK", "WIDTH")} | {"TMA": tma}
    integers = {"positive_id_ptr", "candidate_id_ptr", "target_ptr"}
    multiples_of_16 = {"stride_q", "stride_d", "stride_grad", "D"}
    signature, values, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(at,)] = constants[name]
        elif name in ("q", "d"):
            rows = tile["BM"] if name == "q" else tile["BN"]
            signature[name] = f"tensordesc<bf16[{rows}, {tile['BK']}]>" if tma else "*bf16"
        elif name == "grad_ptr":
            signature[name] = "*bf16"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in integers else "*fp32"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in multiples_of_16:
            attributes[(at,)] = [["tt.divisibility", 16]]

    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    options = dict(num_warps=tile["num_warps"], num_stages=tile["num_stages"])
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resource_usage(binary, folder):
    """Return cuobjdump's line on registers, stack and local memory."""
    import triton

    cubin = folder / "cubin"
    cubin.write_bytes(binary.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def bad(**changes):
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
    ("n_ids", dict(n=torch.eye(3, 6), p_ids=torch.arange(3))),
    ("n_ids", dict(n=torch.eye(3, 6), n_ids=torch.arange(3))),
    ("q", dict(q=torch.ones(0, 6), p=torch.ones(0, 6))),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_input_of_the_ranks_form_names_the_argument(argument, call):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        info_nce_dist(**({"q": torch.eye(3, 6), "p": torch.eye(3, 6), "scale": 10.0} | call))


@pytest.mark.skipif(infonce.INTERPRET or DEVICE == "cuda", reason="Triton runs here")
def test_impl_triton_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match="impl='triton'.*GPU"):
        info_nce(torch.eye(3), torch.eye(3), 1.0, impl="triton")


def test_debug_checks_values(monkeypatch):
    monkeypatch.setattr(infonce, "DEBUG", True)
    with pytest.raises(ValueError, match=r"q: NaN or inf in rows \[1\]"):
        info_nce(torch.eye(3).index_fill(0, torch.tensor([1]), torch.nan), torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="scale"):
        info_nce(torch.eye(3), torch.eye(3), torch.tensor(-1.0))


def test_auto_says_its_choice_once(capsys):
    infonce._say_once.cache_clear()
    for _ in range(2):
        info_nce(torch.eye(3), torch.eye(3), 1.0)
    assert (
        capsys.readouterr().err == "infonce: impl='auto' chose 'torch' for torch.float32 on cpu\n"
    )


FAKE = {  # an outline of what transformers' hub_kernels.py and modeling_utils.py take from that package
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
    "layer/mode.py": "import enum\nMode = enum.Flag('Mode', 'TRAINING INFERENCE TORCH_COMPILE FALLBACK')",
    "../kernels-0.16.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.2\n",
}
IMPORTS = """import transformers.modeling_utils, transformers.integrations.hub_kernels as hub, kernels
from transformers.utils import is_kernels_available
from kernels import get_kernel
from kernels.infonce import info_nce_ref
assert is_kernels_available() and kernels.__file__.startswith({root!r}), kernels.__file__
assert info_nce_ref.__module__ == 'kernels.infonce' and get_kernel.__module__ == 'kernels.utils'
print(kernels.__version__)"""


def test_transformers_finds_the_other_kernels_package(tmp_path):
    """Hugging Face's `kernels` and ours in one process: the real one where it is installed, else its outline."""
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        path.append(str(tmp_path))
        for name, text in FAKE.items():
            file = (tmp_path / "kernels" / name).resolve()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(root=str(ROOT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_the_other_package_ours_stands_alone():
    command = [
        sys.executable,
        "-S",
        "-c",
        "import kernels; print(kernels.__path__)",
    ]  # -S: no site-packages
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert done.stdout.strip() == str([str(ROOT / "kernels")]), done.stderr
