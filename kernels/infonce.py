"""Fused symmetric InfoNCE that never holds the N x M similarities: Triton kernels, a torch twin, one process or many.

    loss = info_nce(q, d, 1 / 0.03, ids=content_ids, margin=0.1)     # d = [positives; hard negatives], paper section 4, Eq. (1)

N queries, M candidates, D dims; s_ij = q_i . d_j (cosine), z = scale * s, t(i) the column of row i's positive.
Candidate j is a negative of row i unless it has the positive's content id (so has the positive itself), row i is ignored, or
s_ij > s_it(i) + margin. With log-sum-exps over negatives alone (a unit is one N x M x D product, 2NMD FLOP),

    r_i = log sum_j exp z_ij        c_j = log sum_i exp z_ij                                      one pass over tiles: 1 unit
    loss_i = 1/2 [softplus(r_i - z_it(i)) + softplus(c_t(i) - z_it(i))]

The positive stays out of both sums: the loss cannot be negative, a row without negatives has r = -inf and loss and gradient 0
with no special case, and a column that several rows share as their positive serves each of them as an anchor of its own. With
g_i the gradient of loss_i and L_i = log(exp r_i + exp z_it(i)),

    G_ij = 1/2 g_i exp(z_ij - L_i) + v_j exp(z_ij - c_j)      v_j = sum over rows with t(i) = j of 1/2 g_i sigmoid(c_j - z_ij)
    G_it(i) = -1/2 g_i [sigmoid(r_i - z_it(i)) + sigmoid(c_t(i) - z_it(i))]                       recomputed: 1 unit
    dq = scale G d    dd = scale G^T q    dscale = sum_i q_i . (G d)_i                            two products: 2 units

Four units, the least that recomputing allows (other public kernels take 6 to 10). No flash-attention-like backward kernel: at
D = 2048-3584 a dq tile does not fit on the chip, and adding to it in memory once per tile is bound by L2 traffic. G goes to a
bounded workspace, and two plain products add it up in fp32: 6 bytes per logit, deterministic, nothing filtered out for its size.

A log-sum-exp is kept as a pair: top, the largest cosine, and rest, so that r = scale * top + rest. One number near 300 would
round to 2e-5 and so would every probability; s - top is exact where it matters, and each row's probabilities sum to 1.
"""

from __future__ import annotations

import functools
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = functools.partial(
        triton.jit, do_not_specialize=["N", "M", "first"]
    )  # not a new binary for every size of a block
except ImportError:  # no wheel for this platform: the torch twin does everything
    triton, jit = None, lambda fn: fn

INTERPRET = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton on the CPU, for tests; read when the kernels are decorated
DEBUG = (
    os.environ.get("INFONCE_DEBUG") == "1"
)  # also check values that live on the GPU, at the price of a sync
WORKSPACE = (
    512 * 2**20
)  # bytes for a block of G on a GPU: 16k x 16k in bf16, so that the fp32 sums are re-read seldom
CPU_BLOCK = 1024  # rows and columns of a block on the CPU: 4 MiB in fp32, which stays in the cache
LOWEST = -1e30  # "top" of no candidates at all; finite, so that inf - inf never arises
NO_ID = torch.iinfo(torch.int64).min  # content id of the padding between ranks
_say_once = functools.cache(lambda text: print(text, file=sys.stderr))
SUM_TYPE = {t: torch.float32 for t in (torch.float32, torch.bfloat16, torch.float16)} | {
    torch.float64: torch.float64
}


def info_nce_ref(
    q, d, scale, *, target=None, ids=None, margin=None, symmetric=True, reduction="mean"
):
    """The definition, in plain torch: what every other form here must equal (arguments: info_nce)."""
    row, col = torch.arange(len(q), device=q.device), torch.arange(len(d), device=q.device)
    t, ids = row if target is None else target, col if ids is None else ids
    valid, t = t >= 0, t.clamp(min=0)
    s = q @ d.T  # (N, M) cosines
    drop = (ids == ids[t][:, None]) | ~valid[
        :, None
    ]  # the positive's content is no negative, an ignored row has none
    if margin is not None:
        drop = drop | (s > s.gather(1, t[:, None]).detach() + margin)
    z = scale * s
    loss = F.cross_entropy(
        z.masked_fill(drop & (col != t[:, None]), -torch.inf), t, reduction="none"
    )
    if (
        symmetric
    ):  # each row is the positive of its own anchor, the column t[i]: (N anchors, N rows)
        back = z[:, t].T.masked_fill(drop[:, t].T & (row != row[:, None]), -torch.inf)
        loss = (loss + F.cross_entropy(back, row, reduction="none")) / 2
    loss = loss.where(valid, 0)
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp(min=1)


@jit
def _slices(s, WIDTH: tl.constexpr):
    # The accumulator as a tuple of (BM, WIDTH) slices, for the epilogues to work through one after the other: with masks and
    # weights for 128 x 256 at once they spill (tests/test_infonce.py compiles them ahead of time for sm_80 and sm_90).
    if s.shape[1] == WIDTH:
        return (s,)
    else:
        left, right = s.reshape(s.shape[0], 2, s.shape[1] // 2).permute(0, 2, 1).split()
        return _slices(left, WIDTH) + _slices(right, WIDTH)


@jit
def _similarities(
    q,
    d,
    stride_q,
    stride_d,
    N,
    M,
    D,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    # One (BM, BN) tile of q d^T in fp32. Tiles are numbered in groups of 8 tile rows, which keeps their operands in L2.
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(M, BN)
    group, inside = tl.program_id(0) // (8 * tiles_n), tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    m, n = group * 8 + inside % height, inside // height
    s = tl.zeros((BM, BN), tl.float32)
    if TMA:  # q and d are descriptors: the hardware fills what lies outside with zeros
        for k in range(0, D, BK):
            s = tl.dot(q.load([m * BM, k]), d.load([n * BN, k]).T, s, input_precision="ieee")
    else:  # rows past the end read row 0, whose scores the masks drop; offsets in int64, since row * stride passes 2^31
        i, j, k = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN), tl.arange(0, BK)
        q += tl.where(i < N, i, 0).to(tl.int64)[:, None] * stride_q + k[None, :]
        d += tl.where(j < M, j, 0).to(tl.int64)[:, None] * stride_d + k[None, :]
        for k0 in range(0, D, BK):
            x = tl.load(q + k0, mask=k[None, :] < D - k0, other=0.0)
            y = tl.load(d + k0, mask=k[None, :] < D - k0, other=0.0)
            s = tl.dot(x, y.T, s, input_precision="ieee")
    return s, m, n


@jit
def _negatives(s, i, j, own, bound, ids, N, M):
    # (BM, WIDTH) mask. own: the id of the row's positive; bound: -inf drops an ignored row. Not "s <= bound": a NaN must show.
    own, bound = (
        tl.load(own + i, mask=i < N, other=-1),
        tl.load(bound + i, mask=i < N, other=float("-inf")),
    )
    ids = tl.load(ids + j, mask=j < M, other=-1)
    return (ids >= 0)[None, :] & (own[:, None] != ids[None, :]) & ~(s > bound[:, None])


@jit
def lse_kernel(q, d, scale, own, bound, ids, row, col, stride_q, stride_d, N, M, D,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Each tile's (top, rest): row (2, tiles_n, N) over the tile's columns, col (2, tiles_m, M) over its rows; _merge them."""
    s, m, n = _similarities(q, d, stride_q, stride_d, N, M, D, BM, BN, BK, TMA)
    parts = _slices(s, WIDTH)
    log2 = tl.load(scale) * 1.4426950408889634  # exp(x) = exp2(x log2(e)), the hardware's own
    i = m * BM + tl.arange(0, BM)
    top, total = tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32)
    for part in tl.static_range(BN // WIDTH):
        j = n * BN + part * WIDTH + tl.arange(0, WIDTH)
        s = tl.where(
            _negatives(parts[part], i, j, own, bound, ids, N, M), parts[part], float("-inf")
        )
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2((top - higher) * log2) + tl.sum(
            tl.exp2((s - higher[:, None]) * log2), 1
        )
        top = higher
        highest = tl.maximum(tl.max(s, 0), -1e30)
        rest = tl.log2(tl.sum(tl.exp2((s - highest[None, :]) * log2), 0)) * 0.6931471805599453
        tl.store(
            col + m.to(tl.int64) * M + j, highest, mask=j < M
        )  # no atomics, no locks: always the same bits
        tl.store(col + (tl.cdiv(N, BM) + m).to(tl.int64) * M + j, rest, mask=j < M)
    tl.store(row + n.to(tl.int64) * N + i, top, mask=i < N)
    tl.store(
        row + (tl.cdiv(M, BN) + n).to(tl.int64) * N + i,
        tl.log2(total) * 0.6931471805599453,
        mask=i < N,
    )


@jit
def grad_kernel(q, d, scale, own, bound, at, top, rest, u, w, ids, col_top, col_rest, v, G, stride_q, stride_d, stride_g, N, M, D,
                first, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """G (N, M): u_i exp(z_ij - L_i) + v_j exp(z_ij - c_j) for negatives, -w_i where column first + j is at_i, else 0."""
    s, m, n = _similarities(q, d, stride_q, stride_d, N, M, D, BM, BN, BK, TMA)
    parts = _slices(s, WIDTH)
    log2 = tl.load(scale) * 1.4426950408889634
    i = m * BM + tl.arange(0, BM)
    for part in tl.static_range(BN // WIDTH):
        s = parts[part]
        j = n * BN + part * WIDTH + tl.arange(0, WIDTH)
        up, low = (
            tl.load(top + i, mask=i < N, other=0.0),
            tl.load(rest + i, mask=i < N, other=0.0) * 1.4426950408889634,
        )
        g = tl.load(u + i, mask=i < N, other=0.0)[:, None] * tl.exp2(
            (s - up[:, None]) * log2 - low[:, None]
        )
        up, low = (
            tl.load(col_top + j, mask=j < M, other=0.0),
            tl.load(col_rest + j, mask=j < M, other=0.0) * 1.4426950408889634,
        )
        g += tl.load(v + j, mask=j < M, other=0.0)[None, :] * tl.exp2(
            (s - up[None, :]) * log2 - low[None, :]
        )
        g = tl.where(
            _negatives(s, i, j, own, bound, ids, N, M), g, 0.0
        )  # drops the infinities of empty sums as well
        positive = (tl.load(at + i, mask=i < N, other=-1) - first)[:, None] == j[None, :]
        g = tl.where(positive, -tl.load(w + i, mask=i < N, other=0.0)[:, None], g)
        inside = (i < N)[:, None] & (j < M)[None, :]
        tl.store(
            G + i.to(tl.int64)[:, None] * stride_g + j[None, :],
            g.to(G.dtype.element_ty),
            mask=inside,
        )


TILES = {  # no spills, and shared memory for the smallest device of the kind; they do not depend on N, M or D
    "hopper": dict(
        BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=4
    ),  # and datacentre Blackwell: 192 KiB
    "ampere": dict(
        BM=128, BN=256, BK=32, WIDTH=32, num_warps=8, num_stages=4
    ),  # and Ada, small Blackwell: 72 KiB
    "fp32": dict(
        BM=64, BN=64, BK=32, WIDTH=32, num_warps=4, num_stages=3
    ),  # exact products, on the plain cores
    "interpreter": dict(
        BM=32, BN=64, BK=32, WIDTH=32, num_warps=4, num_stages=1
    ),  # small: tests cross many edges
}


def _launch(kernel, q, d, scale, *args, **sizes):
    if INTERPRET and q.dtype == torch.bfloat16:  # the interpreter's bf16 products are garbage
        q, d = q.float(), d.float()
    q, d = (x if x.stride(1) == 1 else x.contiguous() for x in (q, d))
    half, major = (
        q.dtype != torch.float32,
        torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9,
    )
    tile = TILES[
        "interpreter"
        if INTERPRET
        else "fp32"
        if not half
        else "hopper"
        if major in (9, 10)
        else "ampere"
    ]
    grid = (triton.cdiv(len(q), tile["BM"]), triton.cdiv(len(d), tile["BN"]))
    if kernel is lse_kernel:
        args += tuple(
            scale.new_empty(2, tiles, len(x))
            for tiles, x in zip(reversed(grid), (q, d), strict=True)
        )
    sizes |= dict(stride_q=q.stride(0), stride_d=d.stride(0), N=len(q), M=len(d), D=q.shape[1])
    # Descriptors (TMA) from Hopper on, where base and rows lie on 16 bytes; elsewhere masked pointers.
    tma = (
        half
        and major >= 9
        and all(x.stride(0) % 8 == x.data_ptr() % 16 == 0 < x.stride(0) for x in (q, d))
    )
    if tma:
        q, d = (
            TensorDescriptor.from_tensor(x, [tile[b], tile["BK"]])
            for x, b in ((q, "BM"), (d, "BN"))
        )
    with torch.cuda.device_of(scale):
        kernel[(grid[0] * grid[1],)](q, d, scale, *args, **sizes, TMA=tma, **tile)
    return args


def _lse_triton(q, d, scale, own, bound, ids, work):
    return [
        _merge(*parts.unbind(1), scale=scale)
        for parts in _launch(lse_kernel, q, d, scale, own, bound, ids)[-2:]
    ]


def _grad_triton(q, d, *args):  # the last two: first, work
    G = args[-1][0, : len(q), : len(d)]
    return _launch(grad_kernel, q, d, *args[:-2], G, stride_g=G.stride(0), first=args[-2])[-1]


def _lse_torch(q, d, scale, own, bound, ids, work):
    s, e = _addmm(work[0, : len(q), : len(d)], q, d.T, beta=0), work[1, : len(q), : len(d)]
    s.masked_fill_(
        (own[:, None] == ids).logical_or_(s > bound[:, None]).logical_or_(ids < 0), -torch.inf
    )
    row, col = s.amax(1).clamp_(min=LOWEST), s.amax(0).clamp_(min=LOWEST)
    row = torch.stack([row, torch.sub(s, row[:, None], out=e).mul_(scale).exp_().sum(1).log_()])
    return row, torch.stack([col, torch.sub(s, col, out=e).mul_(scale).exp_().sum(0).log_()])


def _grad_torch(
    q, d, scale, own, bound, at, top, rest, u, w, ids, col_top, col_rest, v, first, work
):
    s, G = _addmm(work[0, : len(q), : len(d)], q, d.T, beta=0), work[1, : len(q), : len(d)]
    drop = (own[:, None] == ids).logical_or_(s > bound[:, None]).logical_or_(ids < 0)
    torch.addcmul(-rest[:, None], torch.sub(s, top[:, None], out=G), scale, out=G).exp_().mul_(
        u[:, None]
    )
    G.addcmul_(torch.addcmul(-col_rest, s.sub_(col_top), scale, out=s).exp_(), v).masked_fill_(
        drop, 0
    )
    inside, at = (
        (at >= first) & (at < first + len(d)),
        (at.long() - first).clamp_(0, len(d) - 1)[:, None],
    )
    return G.scatter_(1, at, torch.where(inside[:, None], -w[:, None], G.gather(1, at)))


LSE, GRAD = (
    {"triton": _lse_triton, "torch": _lse_torch},
    {"triton": _grad_triton, "torch": _grad_torch},
)


def _addmm(out, a, b, beta=1):
    """out = beta * out + a @ b, summed in out's dtype (fp32 for half inputs); with out=, autocast leaves it alone."""
    if out.is_cuda and b.dtype != out.dtype:
        return torch.addmm(out, a.to(b.dtype), b, beta=beta, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _merge(*parts, scale):
    """Partial (top, rest) of the same n sums, each (2, n) -> theirs together (2, n)."""
    top, rest = torch.stack(parts, 1)
    return torch.stack([top.amax(0), (rest + (top - top.amax(0)) * scale).logsumexp(0)])


def _blocks(q, d, impl):
    """Blocks of rows x columns, row by row, with a workspace for one of them: bounded, whatever N and M are."""
    copies, dtype = (
        (1, q.dtype) if impl == "triton" else (2, SUM_TYPE[q.dtype])
    )  # G alone; the twin's scores and G, in fp32
    size = (
        int((WORKSPACE / copies / dtype.itemsize) ** 0.5) // 256 * 256 if q.is_cuda else CPU_BLOCK
    )
    work = q.new_empty(copies, min(size, len(q)), min(size, -(-len(d) // 16) * 16), dtype=dtype)
    rows, cols = ([slice(i, min(i + size, len(x))) for i in range(0, len(x), size)] for x in (q, d))
    return [(i, j, work) for i in rows for j in cols]


class _InfoNCE(torch.autograd.Function):
    """(N,) losses of this process's rows. With world > 1, d is this rank's equal part of the candidates, ids are everyone's."""

    @staticmethod
    def forward(ctx, q, d, scale, target, ids, margin, symmetric, impl, world):
        ctx.options = symmetric, impl, world, scale.dtype
        scale = scale.detach().to(SUM_TYPE[q.dtype])
        d = _collective("all_gather", d) if world > 1 else d
        t, ignored = target.clamp(min=0), target < 0
        own, rows = (
            ids[t],
            zip(q.split(2048), t.split(2048), strict=True),
        )  # a few at a time: no wide copy of q and d
        positive = torch.cat([(x.double() * d[at].double()).sum(1) for x, at in rows]).to(
            scale.dtype
        )
        bound = (positive + (torch.inf if margin is None else margin)).masked_fill(
            ignored, -torch.inf
        )
        row, col = (
            torch.stack([scale.new_full((len(x),), a) for a in (LOWEST, -torch.inf)])
            for x in (q, d)
        )
        for i, j, work in _blocks(q, d, impl):
            row_ij, col_ij = LSE[impl](q[i], d[j], scale, own[i], bound[i], ids[j], work)
            row[:, i], col[:, j] = (
                _merge(row[:, i], row_ij, scale=scale),
                _merge(col[:, j], col_ij, scale=scale),
            )
        if world > 1:  # each rank has seen its own rows of every column
            col = _merge(*_collective("all_gather", col).view(world, 2, -1), scale=scale)
        over = torch.stack(
            [(x[0] - positive) * scale + x[1] for x in (row, col[:, t])]
        )  # r_i - z_it(i), c_t(i) - z_it(i)
        row = _merge(row, torch.stack([positive, torch.zeros_like(positive)]), scale=scale)  # L_i
        ctx.save_for_backward(q, d, scale, target, ids, own, bound, row, col, over)
        loss = torch.logaddexp(
            over, torch.zeros_like(over)
        )  # softplus, without its shortcut above 20
        return (loss.mean(0) if symmetric else loss[0]).masked_fill(ignored, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        q, d, scale, target, ids, own, bound, row, col, over = ctx.saved_tensors
        symmetric, impl, world, scale_type = ctx.options
        need_q, need_d, need_scale = ctx.needs_input_grad[:3]
        u = upstream.to(over.dtype).masked_fill(target < 0, 0) * (0.5 if symmetric else 1)
        back = u * over[1].sigmoid() * symmetric
        w = u * over[0].sigmoid() + back
        v = torch.zeros_like(col[0]).index_put_(
            (target.clamp(min=0),), back, accumulate=True
        )  # index_add_ has no fixed order
        if world > 1:  # a column has one owner: an exact sum
            dist.all_reduce(v)
        # In half precision weights of 1/N would vanish: G holds them relative to the largest, the fp32 sums are multiplied.
        largest = torch.cat([u, w, v, v.new_full((1,), torch.finfo(v.dtype).tiny)]).abs().amax()
        factor = torch.ldexp(
            torch.ones_like(scale), largest.frexp().exponent
        )  # a power of two: costs no rounding
        by_row, by_col = (
            (own, bound, target.int(), *row, u / factor, w / factor),
            (ids, *col, v / factor),
        )
        dq, dd = (
            q.new_empty(q.shape) if need_q else None,
            scale.new_zeros(d.shape) if need_d else None,
        )
        dscale = torch.zeros_like(scale)
        for i, j, work in _blocks(q, d, impl):
            if j.start == 0:
                sums = scale.new_zeros(i.stop - i.start, q.shape[1])
            G = GRAD[impl](
                q[i], d[j], scale, *(x[i] for x in by_row), *(x[j] for x in by_col), j.start, work
            )
            if need_q or need_scale:
                _addmm(sums, G, d[j])
            if need_d:
                _addmm(dd[j], G.T, q[i])
            if (
                j.stop == len(d) and need_scale
            ):  # a few rows at a time: no fp32 copy of a whole block
                dscale += (
                    sum(
                        (x * y).sum()
                        for x, y in zip(q[i].split(2048), sums.split(2048), strict=True)
                    )
                    * factor
                )
            if j.stop == len(d) and need_q:
                dq[i] = sums.mul_(factor * scale)
        if need_d:
            dd.mul_(factor * scale)
            dd = (_collective("reduce_scatter", dd) if world > 1 else dd).to(d.dtype)
        return dq, dd, dscale.to(scale_type) if need_scale else None, *[None] * 6


def _collective(kind, x):
    """all_gather: every rank's rows (equally many), in rank order. reduce_scatter: this rank's rows of the sum over ranks."""
    world = dist.get_world_size()
    out = x.new_empty(len(x) * world if kind == "all_gather" else len(x) // world, *x.shape[1:])
    older = (
        dist.all_gather_into_tensor if kind == "all_gather" else dist.reduce_scatter_tensor
    )  # names before torch 2.13
    getattr(dist, f"{kind}_single", older)(out, x.contiguous())
    return out


def _dense(ids):
    """int64 content ids -> int32 from 0, equal where they were equal, -1 for NO_ID. unique() would wait for the GPU."""
    order = ids.argsort()
    new = ids[order].diff(prepend=ids[order[:1]]) != 0
    dense = torch.empty_like(ids, dtype=torch.int32).scatter_(
        0, order, new.cumsum(0, dtype=torch.int32)
    )
    return dense.masked_fill_(ids == NO_ID, -1)


def _check(vectors, indices, scale, margin, impl):
    """vectors {name: (rows, D)}, indices {name: (int64 or None, length)}. Returns scale as a tensor and the chosen impl."""
    q = vectors["q"]
    shapes = ", ".join(
        f"{name} {tuple(x.shape)} {x.dtype} {x.device}" for name, x in vectors.items()
    )
    for name, x in vectors.items():
        alike = (
            x.ndim == 2
            and x.shape[1] == q.shape[-1] > 0
            and (x.dtype, x.device) == (q.dtype, q.device)
        )
        if not alike or x.dtype not in SUM_TYPE:
            raise ValueError(
                f"{name}: must be (rows, D > 0), one D, device and dtype of {list(SUM_TYPE)} for all: {shapes}"
            )
        if DEBUG and not x.isfinite().all():
            raise ValueError(
                f"{name}: NaN or inf in rows {(~x.isfinite().all(1)).nonzero().flatten()[:8].tolist()}: {shapes}"
            )
    for name, (x, length) in indices.items():
        if x is not None and (
            x.shape != (length,) or x.dtype != torch.int64 or x.device != q.device
        ):
            raise ValueError(
                f"{name}: ({length},) int64 on {q.device}, not {tuple(x.shape)} {x.dtype} {x.device}: {shapes}"
            )
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin={margin}: a cosine difference >= 0, or None")
    if not isinstance(scale, torch.Tensor):
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: 1 / tau, a finite number > 0")
        scale = torch.full((), scale, dtype=SUM_TYPE[q.dtype], device=q.device)
    if (
        scale.ndim != 0
        or not scale.is_floating_point()
        or scale.device != q.device
        or (DEBUG and not scale > 0)
    ):
        raise ValueError(
            f"scale: a 0-dim float tensor > 0 on {q.device}, not {tuple(scale.shape)} {scale.dtype} {scale.device}"
        )
    able = triton is not None and (q.is_cuda or INTERPRET) and q.dtype != torch.float64
    if impl == "auto":
        impl = "triton" if able and q.is_cuda else "torch"
        os.environ.get("RANK", "0") == "0" and _say_once(
            f"infonce: impl='auto' chose {impl!r} for {q.dtype} on {q.device.type}"
        )
    if impl not in ("triton", "torch") or (impl == "triton" and not able):
        raise ValueError(
            f"impl={impl!r}: 'auto', 'torch', or 'triton' (a GPU or TRITON_INTERPRET=1; no fp64): {shapes}"
        )
    return scale, impl


def info_nce(
    q,
    d,
    scale,
    *,
    target=None,
    ids=None,
    margin=None,
    symmetric=True,
    reduction="mean",
    impl="auto",
):
    """InfoNCE of N queries against M candidates without their N x M similarities (paper Eq. (1); mathematics: top of the file).

    q, d       (N, D), (M, D) unit rows, any strides, one of fp32, bf16, fp16 (fp64: the twin only); scale = 1 / tau, a float
               or a 0-dim tensor. All three carry gradient if asked.
    target     (N,) int64, row i's positive is d[target[i]], default i; -1 ignores the row in both directions.
    ids        (M,) int64 content ids, > -2**63: a candidate with the positive's id is not a negative.
    margin     cosine >= 0: s_ij > s_i,target + margin is taken for a false negative and dropped (threshold detached).
    symmetric  mean of query -> all candidates and positive -> all queries, under the same masks; else the first alone.
    reduction  "mean" over the rows not ignored, a 0-dim loss in nats; or "none", (N,). fp32 (fp64 for fp64 inputs).
    impl       "triton", "torch" (same blocks and memory bound, any device) or "auto": triton on a GPU. Says once what it chose.

    Raises ValueError for what does not fit; what lies on a GPU (target's values, a tensor scale, NaN rows) is checked only with
    INFONCE_DEBUG=1, for that would wait for it. Extra memory: WORKSPACE, fp32 sums for d and a block of q. Deterministic.
    """
    scale, impl = _check(
        {"q": q, "d": d}, {"target": (target, len(q)), "ids": (ids, len(d))}, scale, margin, impl
    )
    if len(q) == 0 or len(d) == 0 or (target is None and len(q) > len(d)):
        raise ValueError(
            f"q, d: rows needed, and a positive for each (target=None): q {tuple(q.shape)}, d {tuple(d.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: 'mean' or 'none'")
    if (
        target is not None
        and (DEBUG or not q.is_cuda)
        and not ((target >= -1) & (target < len(d))).all()
    ):
        raise ValueError(
            f"target: {target.min()} .. {target.max()}, allowed -1 .. {len(d) - 1} for d {tuple(d.shape)}"
        )
    target = torch.arange(len(q), device=q.device) if target is None else target
    ids = torch.arange(len(d), device=q.device, dtype=torch.int32) if ids is None else _dense(ids)
    loss = _InfoNCE.apply(q, d, scale, target, ids, margin, symmetric, impl, 1)
    return loss if reduction == "none" else loss.sum() / (target >= 0).sum().clamp(min=1)


def info_nce_dist(
    q, p, scale, *, n=None, p_ids=None, n_ids=None, margin=None, symmetric=True, impl="auto"
):
    """This rank's share of the global mean loss: shares, and all gradients, SUM over the ranks to the one-process result.

    q, p (N, D) this rank's queries and their positives, n (K, D) or None its hard negatives, p_ids (N,), n_ids (K,) content
    ids. N and K may differ between ranks, and be 0. Every rank's p and n are candidates of every query. # PAPER:
    Eq. (1) names a row's own hard negatives alone, and no masks; the released forward has all of these. The rest as info_nce.
    q, p, n and scale carry gradient: on each rank its part of the gradient of the *global* mean (its rows' losses over all
    ranks' rows), so all-reduce with SUM, never average. What other ranks' queries say about p and n comes home in one
    reduce-scatter; queries never travel. Every rank must call backward. One host sync, for the row counts; none on one rank.
    """
    n = p[:0] if n is None else n
    n_ids = p_ids[:0] if p_ids is not None and n_ids is None and len(n) == 0 else n_ids
    scale, impl = _check(
        {"q": q, "p": p, "n": n},
        {"p_ids": (p_ids, len(p)), "n_ids": (n_ids, len(n))},
        scale,
        margin,
        impl,
    )
    if len(p) != len(q) or (p_ids is None) != (n_ids is None):
        raise ValueError(
            f"p, n_ids: one p per q, ids for p and n or for neither: q {tuple(q.shape)}, p {tuple(p.shape)}"
        )
    d, ids = torch.cat([p, n]), None if p_ids is None else torch.cat([p_ids, n_ids])
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    counts, rank = (
        [[len(q), len(d), q.shape[1], list(SUM_TYPE).index(q.dtype), int(ids is not None)]],
        0,
    )
    if world > 1:
        counts, rank = (
            _collective("all_gather", torch.tensor(counts, device=q.device)).tolist(),
            dist.get_rank(),
        )
    if any(x[2:] != counts[0][2:] for x in counts) or sum(x[0] for x in counts) == 0:
        raise ValueError(
            f"q, p, n: need rows, one D, one dtype, ids or none; [N, N + K, D, dtype, ids] by rank: {counts}"
        )
    most = max(
        x[1] for x in counts
    )  # each rank's columns: its p, its n, and padding, since gloo gathers equal sizes only
    first = torch.arange(rank * most, rank * most + len(d), device=q.device)
    ids = F.pad(first if ids is None else ids, (0, most - len(d)), value=NO_ID)
    ids = _dense(_collective("all_gather", ids) if world > 1 else ids)
    loss = _InfoNCE.apply(
        q,
        F.pad(d, (0, 0, 0, most - len(d))),
        scale,
        first[: len(q)],
        ids,
        margin,
        symmetric,
        impl,
        world,
    )
    return loss.sum() / sum(x[0] for x in counts)
