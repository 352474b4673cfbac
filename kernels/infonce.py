"""Fused symmetric InfoNCE that never stores the N x M similarities, on one process or many.

    loss = info_nce(q, d, 1 / 0.03, ids=content_ids, margin=0.1)   # d = [positives; hard negatives]

The loss is the paper's Eq. (1), section 4. The file stands alone: torch, and Triton where there is
a GPU. In order: the definition in plain torch (info_nce_ref); two Triton kernels with their
launchers; the torch twin, which does the same work without Triton; the autograd function that runs
either of them block by block; the checks; the two public functions, info_nce and info_nce_dist.
Lines hold more here than elsewhere in the project: each formula stands on one line, like the ones
below, and the twin works in place because memory is the point.

Legend
    N queries, M candidates, D dimensions; i is a row (query), j a column (candidate)
    s_ij = q_i . d_j    cosine
    z_ij = scale * s_ij logit; scale = 1 / tau
    t(i)                column of row i's positive
    g_i                 upstream gradient of loss_i

Candidate j is a negative of row i unless it has the content of row i's positive, it is the positive
of a row with row i's query, row i is ignored, or s_ij > s_it(i) + margin. The log-sum-exps run over
negatives alone:

    r_i = log sum_j exp z_ij        c_j = log sum_i exp z_ij
    loss_i = 1/2 [softplus(r_i - z_it(i)) + softplus(c_t(i) - z_it(i))]

Because the positive stays out of both sums, the loss cannot be negative. A row without negatives
has r_i = -inf, and loss and gradient 0, without a special case. A column that is the positive of
several rows serves each of them as a separate anchor.

The gradient with respect to the logits, with u_i = 1/2 g_i and L_i = log(exp r_i + exp z_it(i)):

    G_ij    =  u_i exp(z_ij - L_i) + v_j exp(z_ij - c_j)                            j a negative
    G_it(i) = -w_i
    w_i = u_i [sigmoid(r_i - z_it(i)) + sigmoid(c_t(i) - z_it(i))]
    v_j = sum of u_i sigmoid(c_j - z_ij) over the rows i with t(i) = j
    dq = scale G d        dd = scale G^T q        dscale = sum_i q_i . (G d)_i

Cost, in units of one N x M x D product (2NMD FLOP): one for the forward pass, one to recompute the
logits in the backward pass, two for the products with G. Four is the least that recomputing allows;
other public kernels take 6 to 10.

Why the backward pass is not shaped like flash attention's: at D = 2048 to 3584 a tile of dq does
not fit on the chip, and adding to it in memory once per tile is bound by L2 traffic. Instead G goes
to a workspace of bounded size, and two plain matrix products accumulate it in fp32. This costs 6
bytes per logit, is deterministic, and drops no gradient for being small.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Run the Triton kernels on the CPU, for tests. Triton itself reads this when it decorates them.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Also check values that live on the GPU, at the price of waiting for it.
DEBUG = os.environ.get("INFONCE_DEBUG") == "1"

# Bytes for a block of G on a GPU: 16k x 16k in bf16. Larger blocks re-read fp32 sums less often.
WORKSPACE = 512 * 2**20
# Rows and columns of a block on the CPU: 4 MiB in fp32, which stays in the cache.
CPU_BLOCK = 1024
# Rows that are multiplied elementwise at once where a copy of all of q would be too much.
ROWS_AT_ONCE = 2048

# Largest cosine of a sum without terms. It is finite, so that inf - inf never arises.
LOWEST = -1e30
# Id of what is not there: the content of rows that pad a rank's candidates to the length of the
# longest rank's, and the query of candidates that are no row's positive.
NO_ID = torch.iinfo(torch.int64).min
# dtype of the inputs -> dtype of the loss and of all sums
SUM_TYPE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    # Blocks come in many sizes: do not compile a kernel anew for N or M = 1 or a multiple of 16.
    jit = functools.partial(triton.jit, do_not_specialize=["N", "M"])
    LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2: exp(x) = exp2(x * LOG2_E)
    NO_TOP = tl.constexpr(LOWEST)
except ImportError:  # no wheel for this platform: the torch twin does everything
    triton = None

    def jit(function):
        """Leave a kernel as it is, since nothing will launch it."""
        return function


def info_nce_ref(
    q,
    d,
    scale,
    *,
    target=None,
    ids=None,
    q_ids=None,
    margin=None,
    symmetric=True,
    reduction="mean",
):
    """Define the loss in plain torch: every other form here must equal it (arguments: info_nce)."""
    rows = torch.arange(len(q), device=q.device)
    columns = torch.arange(len(d), device=q.device)
    target = rows if target is None else target
    valid = target >= 0
    target = target.clamp(min=0)

    # With ids alone, equal rows of q are one query.
    if q_ids is None:
        q_ids = rows if ids is None else q.detach().unique(dim=0, return_inverse=True)[1]
    ids = columns if ids is None else ids
    is_positive = valid[:, None] & (columns == target[:, None])  # (N, M)
    asker = is_positive.int().argmax(0)  # (M,) the first row whose positive a column is

    # Right answers to the query are no negatives, and an ignored row has no negatives.
    dropped = (ids == ids[target][:, None]) | ~valid[:, None]  # (N, M)
    dropped |= (q_ids[asker] == q_ids[:, None]) & is_positive.any(0)
    cosines = q @ d.T  # (N, M)
    if margin is not None:
        dropped |= cosines > cosines.gather(1, target[:, None]).detach() + margin

    logits = scale * cosines
    others = dropped & (columns != target[:, None])
    loss = F.cross_entropy(logits.masked_fill(others, -torch.inf), target, reduction="none")
    if symmetric:
        # Anchor i is row i's positive, the column target[i]; its candidates are all rows.
        others = dropped[:, target].T & (rows != rows[:, None])  # (N anchors, N rows)
        reverse = logits[:, target].T.masked_fill(others, -torch.inf)
        loss = (loss + F.cross_entropy(reverse, rows, reduction="none")) / 2

    loss = loss.where(valid, 0)
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp(min=1)


# Values that travel together between the autograd function and the kernels


class LogSum(NamedTuple):
    """Keep n log-sum-exps of logits as pairs: log sum_j exp(scale * s_j) = scale * top + rest.

    One number near 300 would be rounded by 2e-5, and so would every probability. The difference
    s - top is exact where it matters, and each row's probabilities sum to 1.
    """

    top: torch.Tensor  # (n,) the largest cosine; LOWEST for a sum without terms
    rest: torch.Tensor  # (n,) log sum_j exp(scale * (s_j - top)); -inf for a sum without terms

    @classmethod
    def empty(cls, n, scale):
        """Make n sums without terms."""
        return cls(scale.new_full((n,), LOWEST), scale.new_full((n,), -torch.inf))

    @classmethod
    def merge(cls, tops, rests, scale):
        """Merge P partial log-sum-exps of the same n sums: tops, rests (P, n) -> (n,)."""
        top = tops.amax(0)
        return cls(top, (rests + (tops - top) * scale).logsumexp(0))

    def including(self, other, scale):
        """Return the n sums with the terms of `other`, n more sums, added."""
        tops = torch.stack([self.top, other.top])  # (2, n)
        rests = torch.stack([self.rest, other.rest])
        return LogSum.merge(tops, rests, scale)

    def add_block(self, where, block, scale):
        """Add a block's sums to the sums at `where`, a slice, in place."""
        merged = self.block(where).including(block, scale)
        self.top[where] = merged.top
        self.rest[where] = merged.rest

    def block(self, where):
        """Return the sums at `where`, a slice or indices."""
        return LogSum(self.top[where], self.rest[where])

    def minus_logit(self, cosines, scale):
        """Return the log-sum-exps less scale * cosines, (n,)."""
        return (self.top - cosines) * scale + self.rest


class Masks(NamedTuple):
    """Decide which candidates are negatives, from O(N + M) numbers instead of an N x M mask."""

    positive_id: torch.Tensor  # (N,) int32: content id of the row's positive
    query_id: torch.Tensor  # (N,) int32: id of the row's query
    threshold: torch.Tensor  # (N,) cosines above it are dropped; -inf for an ignored row: all
    candidate_id: torch.Tensor  # (M,) int32: content id of the candidate; -1 for padding
    asker_id: torch.Tensor  # (M,) int32: query id of the row whose positive it is; -1: no row's

    def block(self, rows, columns):
        """Return the part that belongs to a block; rows and columns are slices."""
        of_rows = [x[rows] for x in self[:3]]
        of_columns = [x[columns] for x in self[3:]]
        return Masks(*of_rows, *of_columns)


class Weights(NamedTuple):
    """The weights u, w and v in the gradient with respect to the logits (top of the file)."""

    row: torch.Tensor  # (N,) u_i
    positive: torch.Tensor  # (N,) w_i
    column: torch.Tensor  # (M,) v_j

    def block(self, rows, columns):
        """Return the part that belongs to a block; rows and columns are slices."""
        return Weights(self.row[rows], self.positive[rows], self.column[columns])


# Triton kernels. One program computes one (BM, BN) tile of the similarities, BK dimensions at a
# time (m, n: the tile's number; i, j: its row and column indices), and works on it in slices.


@jit
def _similarity_tile(
    q,
    d,
    N,
    M,
    D,
    stride_q,
    stride_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Compute this program's (BM, BN) tile of q d^T in fp32 -> (tile, m, n)."""
    # Programs are numbered in groups of 8 tile rows, which keeps their operands in the L2 cache.
    tiles_m = tl.cdiv(N, BM)
    tiles_n = tl.cdiv(M, BN)
    group = tl.program_id(0) // (8 * tiles_n)
    inside = tl.program_id(0) % (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    m = group * 8 + inside % height
    n = inside // height

    s = tl.zeros((BM, BN), tl.float32)
    if TMA:
        # q and d are descriptors: the hardware reads zeros outside of the matrix.
        for k in range(0, D, BK):
            x = q.load([m * BM, k])  # (BM, BK)
            y = d.load([n * BN, k])  # (BN, BK)
            s = tl.dot(x, y.T, s, input_precision="ieee")
    else:
        # Rows past the end read row 0, whose scores the masks drop.
        i = m * BM + tl.arange(0, BM)
        j = n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)

        # Offsets are int64 because row * stride can pass 2^31.
        q += tl.where(i < N, i, 0).to(tl.int64)[:, None] * stride_q + k[None, :]
        d += tl.where(j < M, j, 0).to(tl.int64)[:, None] * stride_d + k[None, :]
        for k0 in range(0, D, BK):
            x = tl.load(q + k0, mask=k[None, :] < D - k0, other=0.0)  # (BM, BK)
            y = tl.load(d + k0, mask=k[None, :] < D - k0, other=0.0)  # (BN, BK)
            s = tl.dot(x, y.T, s, input_precision="ieee")
    return s, m, n


@jit
def _slices(s, WIDTH: tl.constexpr):
    """Cut a (BM, BN) tile into a tuple of (BM, WIDTH) slices, left to right.

    The kernels work through the slices one after the other. With masks and weights for a whole
    128 x 256 tile at once they would spill registers (tests/compiled_kernels.py compiles them ahead
    of time and counts).
    """
    # Triton compiles only the branch that applies, so both branches must return.
    if s.shape[1] == WIDTH:
        return (s,)
    else:
        left, right = s.reshape(s.shape[0], 2, s.shape[1] // 2).permute(0, 2, 1).split()
        return _slices(left, WIDTH) + _slices(right, WIDTH)


@jit
def _dropped(
    s, i, j, N, M, positive_id_ptr, query_id_ptr, threshold_ptr, candidate_id_ptr, asker_id_ptr
):
    """Mark the scores of a slice that are not negatives: (BM, WIDTH) cosines -> bool.

    A comparison with NaN is false, so that a NaN score is kept and shows in the loss.
    """
    positive_id = tl.load(positive_id_ptr + i, mask=i < N, other=-1)[:, None]
    query_id = tl.load(query_id_ptr + i, mask=i < N, other=0)[:, None]
    threshold = tl.load(threshold_ptr + i, mask=i < N, other=float("-inf"))[:, None]
    candidate_id = tl.load(candidate_id_ptr + j, mask=j < M, other=-1)[None, :]
    asker_id = tl.load(asker_id_ptr + j, mask=j < M, other=-1)[None, :]
    is_answer = (positive_id == candidate_id) | (query_id == asker_id)
    return (candidate_id < 0) | is_answer | (s > threshold)


@jit
def lse_kernel(
    # (N, D), (M, D): descriptors with TMA, else pointers; a pointer to one number
    q,
    d,
    scale_ptr,
    # masks: (N,) three times, (M,) twice
    positive_id_ptr,
    query_id_ptr,
    threshold_ptr,
    candidate_id_ptr,
    asker_id_ptr,
    # results: (tiles_n, N) twice, (tiles_m, M) twice
    row_top_ptr,
    row_sum_ptr,
    col_top_ptr,
    col_sum_ptr,
    # sizes and strides, in elements
    N,
    M,
    D,
    stride_q,
    stride_d,
    # tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write the LogSum of each tile's rows and columns, for LogSum.merge to put together.

    Each program writes to places of its own, without atomics or locks: always the same bits.
    """
    tile, m, n = _similarity_tile(q, d, N, M, D, stride_q, stride_d, BM, BN, BK, TMA)
    slices = _slices(tile, WIDTH)
    scale = tl.load(scale_ptr) * LOG2_E  # for exp2
    i = m * BM + tl.arange(0, BM)
    row_top = tl.full((BM,), NO_TOP, tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)

    for part in tl.static_range(BN // WIDTH):
        s = slices[part]  # (BM, WIDTH)
        j = n * BN + part * WIDTH + tl.arange(0, WIDTH)
        dropped = _dropped(
            s,
            i,
            j,
            N,
            M,
            positive_id_ptr,
            query_id_ptr,
            threshold_ptr,
            candidate_id_ptr,
            asker_id_ptr,
        )
        s = tl.where(dropped, float("-inf"), s)

        # Rows: fold the slice into the running sum, as online softmax does.
        higher = tl.maximum(row_top, tl.max(s, 1))  # (BM,)
        slice_sum = tl.sum(tl.exp2((s - higher[:, None]) * scale), 1)
        row_sum = row_sum * tl.exp2((row_top - higher) * scale) + slice_sum
        row_top = higher

        # Columns: the slice holds all of this tile's rows, so that their sums are complete.
        col_top = tl.maximum(tl.max(s, 0), NO_TOP)  # (WIDTH,)
        col_sum = tl.sum(tl.exp2((s - col_top[None, :]) * scale), 0)
        col_offset = m.to(tl.int64) * M + j
        tl.store(col_top_ptr + col_offset, col_top, mask=j < M)
        tl.store(col_sum_ptr + col_offset, col_sum, mask=j < M)

    row_offset = n.to(tl.int64) * N + i
    tl.store(row_top_ptr + row_offset, row_top, mask=i < N)
    tl.store(row_sum_ptr + row_offset, row_sum, mask=i < N)


@jit
def grad_kernel(
    # (N, D), (M, D): descriptors with TMA, else pointers; a pointer to one number
    q,
    d,
    scale_ptr,
    # masks: (N,) three times, (M,) twice
    positive_id_ptr,
    query_id_ptr,
    threshold_ptr,
    candidate_id_ptr,
    asker_id_ptr,
    # rows, (N,) each: column of the positive, L_i as a LogSum, u_i, w_i
    target_ptr,
    row_top_ptr,
    row_rest_ptr,
    row_weight_ptr,
    positive_weight_ptr,
    # columns, (M,) each: c_j as a LogSum, v_j
    col_top_ptr,
    col_rest_ptr,
    col_weight_ptr,
    # result: (N, M)
    grad_ptr,
    # sizes and strides, in elements
    N,
    M,
    D,
    stride_q,
    stride_d,
    stride_grad,
    # tile
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write G, the gradient with respect to the logits (formula at the top of the file)."""
    tile, m, n = _similarity_tile(q, d, N, M, D, stride_q, stride_d, BM, BN, BK, TMA)
    slices = _slices(tile, WIDTH)
    scale = tl.load(scale_ptr) * LOG2_E  # for exp2
    i = m * BM + tl.arange(0, BM)

    # The rows' values are loaded again for each slice: held throughout, they would spill.
    for part in tl.static_range(BN // WIDTH):
        s = slices[part]  # (BM, WIDTH)
        j = n * BN + part * WIDTH + tl.arange(0, WIDTH)

        # u_i exp(z_ij - L_i)
        top = tl.load(row_top_ptr + i, mask=i < N, other=0.0)[:, None]
        rest = tl.load(row_rest_ptr + i, mask=i < N, other=0.0)[:, None] * LOG2_E
        weight = tl.load(row_weight_ptr + i, mask=i < N, other=0.0)[:, None]
        grad = weight * tl.exp2((s - top) * scale - rest)

        # v_j exp(z_ij - c_j)
        top = tl.load(col_top_ptr + j, mask=j < M, other=0.0)[None, :]
        rest = tl.load(col_rest_ptr + j, mask=j < M, other=0.0)[None, :] * LOG2_E
        weight = tl.load(col_weight_ptr + j, mask=j < M, other=0.0)[None, :]
        grad += weight * tl.exp2((s - top) * scale - rest)

        # The mask also removes the infinities that sums without terms give.
        dropped = _dropped(
            s,
            i,
            j,
            N,
            M,
            positive_id_ptr,
            query_id_ptr,
            threshold_ptr,
            candidate_id_ptr,
            asker_id_ptr,
        )
        grad = tl.where(dropped, 0.0, grad)

        # -w_i at the positive
        target = tl.load(target_ptr + i, mask=i < N, other=-1)[:, None]
        weight = tl.load(positive_weight_ptr + i, mask=i < N, other=0.0)[:, None]
        grad = tl.where(target == j[None, :], -weight, grad)

        offset = i.to(tl.int64)[:, None] * stride_grad + j[None, :]
        # Stores run to the end of G's row, whose length is a multiple of 16: with M as the limit,
        # the compiler could not store neighbouring columns at once. Columns from M on are not read.
        inside = (i < N)[:, None] & (j < stride_grad)[None, :]
        tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# Tiles by kind of device. They do not depend on N, M or D, spill no registers, and fit the shared
# memory of the smallest device of their kind.
TILES = {
    # Hopper: 192 KiB
    "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=4),
    # datacentre Blackwell: as Hopper, but narrower slices, as Triton 3.6 spills with 32 columns
    "blackwell": dict(BM=128, BN=256, BK=64, WIDTH=16, num_warps=8, num_stages=4),
    # Ampere, Ada and small Blackwell: 72 KiB
    "ampere": dict(BM=128, BN=256, BK=32, WIDTH=64, num_warps=8, num_stages=4),
    # fp32 inputs: exact products, on the plain cores
    "fp32": dict(BM=64, BN=64, BK=32, WIDTH=32, num_warps=4, num_stages=3),
    # small, so that tests cross many edges
    "interpreter": dict(BM=32, BN=64, BK=32, WIDTH=32, num_warps=4, num_stages=1),
}


class Launch(NamedTuple):
    """The part of a launch that both kernels share."""

    q: torch.Tensor | TensorDescriptor  # (N, D)
    d: torch.Tensor | TensorDescriptor  # (M, D)
    tiles_m: int
    tiles_n: int
    settings: dict  # sizes, strides and the tile, by the kernels' argument names


def _prepare_launch(q, d):
    """Choose the tile for q (N, D) and d (M, D), and descriptors (TMA) or pointers to read them."""
    if INTERPRET and q.dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bf16 numbers as integers.
        q = q.float()
        d = d.float()
    if q.stride(1) != 1:
        q = q.contiguous()
    if d.stride(1) != 1:
        d = d.contiguous()

    half = q.dtype != torch.float32
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    if INTERPRET:
        tile = TILES["interpreter"]
    elif not half:
        tile = TILES["fp32"]
    elif major == 9:
        tile = TILES["hopper"]
    elif major == 10:
        tile = TILES["blackwell"]
    else:
        tile = TILES["ampere"]

    tma = half and major >= 9 and _fits_descriptor(q) and _fits_descriptor(d)
    settings = dict(N=len(q), M=len(d), D=q.shape[1], stride_q=q.stride(0), stride_d=d.stride(0))
    settings |= dict(TMA=tma, **tile)
    tiles_m = triton.cdiv(len(q), tile["BM"])
    tiles_n = triton.cdiv(len(d), tile["BN"])
    if tma:
        q = TensorDescriptor.from_tensor(q, [tile["BM"], tile["BK"]])
        d = TensorDescriptor.from_tensor(d, [tile["BN"], tile["BK"]])
    return Launch(q, d, tiles_m, tiles_n, settings)


def _fits_descriptor(x):
    """Say whether a half-precision matrix can be read by TMA: base and rows lie on 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) > 0


def _lse_triton(q, d, scale, masks, workspace):
    """Compute the LogSums of a block's rows and columns over its negatives -> (n,), (m,).

    q (n, D) and d (m, D) are the block's queries and candidates. Here and below, masks, sums and
    weights are the parts that belong to the block. This form needs no workspace.
    """
    launch = _prepare_launch(q, d)
    row_top = scale.new_empty(launch.tiles_n, len(q))
    row_sum = scale.new_empty(launch.tiles_n, len(q))
    col_top = scale.new_empty(launch.tiles_m, len(d))
    col_sum = scale.new_empty(launch.tiles_m, len(d))

    with torch.cuda.device_of(scale):
        lse_kernel[(launch.tiles_m * launch.tiles_n,)](
            q=launch.q,
            d=launch.d,
            scale_ptr=scale,
            positive_id_ptr=masks.positive_id,
            query_id_ptr=masks.query_id,
            threshold_ptr=masks.threshold,
            candidate_id_ptr=masks.candidate_id,
            asker_id_ptr=masks.asker_id,
            # results
            row_top_ptr=row_top,
            row_sum_ptr=row_sum,
            col_top_ptr=col_top,
            col_sum_ptr=col_sum,
            **launch.settings,
        )
    # The logarithms are taken here: in the kernel they would take a quarter of its epilogue.
    rows = LogSum.merge(row_top, row_sum.log_(), scale)
    columns = LogSum.merge(col_top, col_sum.log_(), scale)
    return rows, columns


def _grad_triton(q, d, scale, masks, target, full_lse, col_lse, weights, workspace):
    """Compute a block of G into the workspace, in its dtype -> (n, m).

    target (n,) int32: the positive's column, counted from the block's first; it may lie outside.
    full_lse (n,): L_i. col_lse (m,): c_j. weights: u_i, w_i, v_j.
    """
    launch = _prepare_launch(q, d)
    grad = workspace[0, : len(q), : len(d)]

    with torch.cuda.device_of(scale):
        grad_kernel[(launch.tiles_m * launch.tiles_n,)](
            q=launch.q,
            d=launch.d,
            scale_ptr=scale,
            positive_id_ptr=masks.positive_id,
            query_id_ptr=masks.query_id,
            threshold_ptr=masks.threshold,
            candidate_id_ptr=masks.candidate_id,
            asker_id_ptr=masks.asker_id,
            # rows
            target_ptr=target,
            row_top_ptr=full_lse.top,
            row_rest_ptr=full_lse.rest,
            row_weight_ptr=weights.row,
            positive_weight_ptr=weights.positive,
            # columns
            col_top_ptr=col_lse.top,
            col_rest_ptr=col_lse.rest,
            col_weight_ptr=weights.column,
            # result
            grad_ptr=grad,
            stride_grad=grad.stride(0),
            **launch.settings,
        )
    return grad


# The torch twin: the same two functions without Triton, in place in a workspace of two layers


def _lse_torch(q, d, scale, masks, workspace):
    """Do the work of _lse_triton in plain torch; workspace (2, >= n, >= m) in the sums' dtype."""
    cosines = workspace[0, : len(q), : len(d)]  # (n, m)
    scratch = workspace[1, : len(q), : len(d)]  # (n, m)
    _matmul(cosines, q, d.T)
    cosines.masked_fill_(_dropped_torch(cosines, masks), -torch.inf)

    row_top = cosines.amax(1).clamp_(min=LOWEST)  # (n,)
    torch.sub(cosines, row_top[:, None], out=scratch).mul_(scale).exp_()
    rows = LogSum(row_top, scratch.sum(1).log_())

    col_top = cosines.amax(0).clamp_(min=LOWEST)  # (m,)
    torch.sub(cosines, col_top, out=scratch).mul_(scale).exp_()
    columns = LogSum(col_top, scratch.sum(0).log_())
    return rows, columns


def _grad_torch(q, d, scale, masks, target, full_lse, col_lse, weights, workspace):
    """Do the work of _grad_triton in plain torch."""
    cosines = workspace[0, : len(q), : len(d)]  # (n, m)
    grad = workspace[1, : len(q), : len(d)]  # (n, m)
    _matmul(cosines, q, d.T)
    dropped = _dropped_torch(cosines, masks)

    # u_i exp(z_ij - L_i)
    torch.sub(cosines, full_lse.top[:, None], out=grad)
    torch.addcmul(-full_lse.rest[:, None], grad, scale, out=grad).exp_()
    grad.mul_(weights.row[:, None])

    # + v_j exp(z_ij - c_j), which takes the place of the cosines
    cosines.sub_(col_lse.top)
    torch.addcmul(-col_lse.rest, cosines, scale, out=cosines).exp_()
    grad.addcmul_(cosines, weights.column)
    grad.masked_fill_(dropped, 0)

    # -w_i at the positive, where this block holds it
    inside = (target >= 0) & (target < len(d))
    column = target.long().clamp(0, len(d) - 1)[:, None]  # (n, 1)
    kept = grad.gather(1, column)
    return grad.scatter_(1, column, torch.where(inside[:, None], -weights.positive[:, None], kept))


def _dropped_torch(cosines, masks):
    """Mark the scores that are not negatives, as _dropped does: (n, m) cosines -> bool."""
    dropped = masks.positive_id[:, None] == masks.candidate_id
    dropped.logical_or_(masks.query_id[:, None] == masks.asker_id)
    dropped.logical_or_(cosines > masks.threshold[:, None])
    return dropped.logical_or_(masks.candidate_id < 0)


LSE = {"triton": _lse_triton, "torch": _lse_torch}
GRAD = {"triton": _grad_triton, "torch": _grad_torch}


class _InfoNCE(torch.autograd.Function):
    """Compute the losses of this process's rows, (N,), block by block.

    With world > 1, d is this rank's part of the candidates, of equal length on all ranks, while
    target and masks are about the candidates of all ranks in rank order. masks come without their
    thresholds, which depend on q and d.
    """

    @staticmethod
    def forward(ctx, q, d, scale, target, masks, margin, symmetric, impl, world):
        scale_type = scale.dtype
        scale = scale.detach().to(SUM_TYPE[q.dtype])
        if world > 1:
            d = _all_gather(d)  # (M, D) of all ranks

        ignored = target < 0  # (N,)
        column = target.clamp(min=0)  # (N,)
        positive = _positive_cosines(q, d, column).to(scale.dtype)  # (N,)
        threshold = positive + (torch.inf if margin is None else margin)
        masks = masks._replace(threshold=threshold.masked_fill(ignored, -torch.inf))

        row_lse = LogSum.empty(len(q), scale)
        col_lse = LogSum.empty(len(d), scale)
        row_blocks, col_blocks, workspace = _blocks(q, d, impl)
        for rows in row_blocks:
            for cols in col_blocks:
                block_masks = masks.block(rows, cols)
                in_rows, in_cols = LSE[impl](q[rows], d[cols], scale, block_masks, workspace)
                row_lse.add_block(rows, in_rows, scale)
                col_lse.add_block(cols, in_cols, scale)

        if world > 1:
            # Each rank has seen its own rows of every column: add the ranks' sums together.
            parts = _all_gather(torch.stack(col_lse)).view(world, 2, -1)
            col_lse = LogSum.merge(parts[:, 0], parts[:, 1], scale)

        # The two directions' log-odds of a negative: r_i - z_it(i) and c_t(i) - z_it(i)
        row_odds = row_lse.minus_logit(positive, scale)
        col_odds = col_lse.block(column).minus_logit(positive, scale)
        log_odds = torch.stack([row_odds, col_odds])  # (2, N)
        # L_i: the positive's own logit joins the negatives'
        full_lse = row_lse.including(LogSum(positive, torch.zeros_like(positive)), scale)

        ctx.options = symmetric, impl, world, scale_type
        ctx.save_for_backward(q, d, scale, target, *masks, *full_lse, *col_lse, log_odds)

        # softplus; F.softplus takes a shortcut above 20
        losses = torch.logaddexp(log_odds, torch.zeros_like(log_odds))  # (2, N)
        loss = losses.mean(0) if symmetric else losses[0]
        return loss.masked_fill(ignored, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        symmetric, impl, world, scale_type = ctx.options
        q, d, scale, target, *saved, log_odds = ctx.saved_tensors
        masks = Masks(*saved[0:5])
        full_lse = LogSum(*saved[5:7])  # (N,) L_i
        col_lse = LogSum(*saved[7:9])  # (M,) c_j
        need_q, need_d, need_scale = ctx.needs_input_grad[:3]

        row_weight = upstream.to(scale.dtype).masked_fill(target < 0, 0)  # (N,) u_i
        if symmetric:
            row_weight = row_weight * 0.5
        positive_weight = row_weight * log_odds[0].sigmoid()  # (N,) w_i
        col_weight = torch.zeros_like(col_lse.top)  # (M,) v_j
        if symmetric:
            reverse = row_weight * log_odds[1].sigmoid()  # (N,)
            positive_weight = positive_weight + reverse
            # index_add_ would be shorter, but has no fixed order on a GPU.
            col_weight.index_put_((target.clamp(min=0),), reverse, accumulate=True)
        if world > 1:
            # Exact, in any order: a column is the positive of one rank's rows only.
            dist.all_reduce(col_weight)

        # Weights of 1 / N would vanish in half precision. So G holds them divided by the power of
        # two above the largest weight, and the fp32 sums are multiplied by it again. A power of two
        # costs no rounding.
        tiny = scale.new_full((1,), torch.finfo(scale.dtype).tiny)
        largest = torch.cat([row_weight, positive_weight, col_weight, tiny]).abs().amax()
        factor = torch.ldexp(torch.ones_like(scale), largest.frexp().exponent)
        weights = Weights(row_weight / factor, positive_weight / factor, col_weight / factor)

        dq = q.new_empty(q.shape) if need_q else None  # (N, D)
        dd = scale.new_zeros(d.shape) if need_d else None  # (M, D), of all ranks
        dscale = torch.zeros_like(scale)
        row_blocks, col_blocks, workspace = _blocks(q, d, impl)
        for rows in row_blocks:
            q_block = q[rows]  # (n, D)
            sums = scale.new_zeros(q_block.shape)  # (n, D): G d of the block's rows

            for cols in col_blocks:
                grad = GRAD[impl](
                    q_block,
                    d[cols],
                    scale,
                    masks.block(rows, cols),
                    (target[rows] - cols.start).int(),
                    full_lse.block(rows),
                    col_lse.block(cols),
                    weights.block(rows, cols),
                    workspace,
                )  # (n, m)
                if need_q or need_scale:
                    _matmul(sums, grad, d[cols], add=True)
                if need_d:
                    _matmul(dd[cols], grad.T, q_block, add=True)

            if need_scale:
                dscale += _sum_of_products(q_block, sums) * factor
            if need_q:
                dq[rows] = sums.mul_(factor * scale)

        if need_d:
            dd.mul_(factor * scale)
            if world > 1:
                dd = _reduce_scatter(dd)  # this rank's candidates again
            dd = dd.to(d.dtype)
        dscale = dscale.to(scale_type) if need_scale else None
        return dq, dd, dscale, *[None] * 6


def _blocks(q, d, impl):
    """Cut rows and columns into blocks -> (row slices, column slices, workspace for one block).

    The workspace is bounded for any N and M: see WORKSPACE and CPU_BLOCK.
    """
    if impl == "triton":
        layers = 1  # G, in the inputs' dtype
        dtype = q.dtype
    else:
        layers = 2  # cosines and G, in the dtype of the sums
        dtype = SUM_TYPE[q.dtype]

    size = CPU_BLOCK
    if q.is_cuda:
        size = int((WORKSPACE / layers / dtype.itemsize) ** 0.5) // 256 * 256
    height = min(size, len(q))
    width = min(size, (len(d) + 15) // 16 * 16)  # rows of G begin on multiples of 16 elements
    workspace = q.new_empty(layers, height, width, dtype=dtype)

    row_blocks = [slice(i, min(i + size, len(q))) for i in range(0, len(q), size)]
    col_blocks = [slice(j, min(j + size, len(d))) for j in range(0, len(d), size)]
    return row_blocks, col_blocks, workspace


def _positive_cosines(q, d, column):
    """Return q_i . d_column(i) in fp64, (N,), a few rows at a time: no wide copy of q and d."""
    chunks = zip(q.split(ROWS_AT_ONCE), column.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([(rows.double() * d[at].double()).sum(1) for rows, at in chunks])


def _sum_of_products(x, y):
    """Return sum(x * y), a few rows at a time: no product of a whole block."""
    total = y.new_zeros(())
    for x_rows, y_rows in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        total += (x_rows * y_rows).sum()
    return total


def _matmul(out, a, b, add=False):
    """Compute out = a @ b, or out += a @ b, summed in out's dtype (fp32 for half inputs).

    autocast leaves a call with out= alone.
    """
    beta = int(add)
    if out.is_cuda and b.dtype != out.dtype:
        torch.addmm(out, a.to(b.dtype), b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _all_gather(x):
    """Concatenate all ranks' x (n, ...), n the same on each, in rank order -> (world * n, ...)."""
    out = x.new_empty(len(x) * dist.get_world_size(), *x.shape[1:])
    if hasattr(dist, "all_gather_single"):  # its name since torch 2.13
        dist.all_gather_single(out, x.contiguous())
    else:
        dist.all_gather_into_tensor(out, x.contiguous())
    return out


def _reduce_scatter(x):
    """Sum x (world * n, ...) over the ranks and return this rank's rows of the sum, (n, ...)."""
    out = x.new_empty(len(x) // dist.get_world_size(), *x.shape[1:])
    if hasattr(dist, "reduce_scatter_single"):  # its name since torch 2.13
        dist.reduce_scatter_single(out, x.contiguous())
    else:
        dist.reduce_scatter_tensor(out, x.contiguous())
    return out


def _dense(ids):
    """Number int64 ids from 0 -> int32, equal where they were equal, -1 for NO_ID.

    unique() would do this, but waits for the GPU.
    """
    order = ids.argsort()
    in_order = ids[order]
    is_new = in_order.diff(prepend=in_order[:1]) != 0
    number = is_new.cumsum(0, dtype=torch.int32)
    dense = torch.empty_like(ids, dtype=torch.int32).scatter_(0, order, number)
    return dense.masked_fill_(ids == NO_ID, -1)


def _hash_rows(q):
    """Hash each row's bits (N, D) -> (N,) int64, the same on every rank and device."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[q.element_size()]

    # A large odd number per dimension. All products and sums wrap around at 2^64.
    weight = torch.arange(1, q.shape[1] + 1, device=q.device) * -0x61C8864680B583EB
    weight ^= weight >> 29
    weight *= -0x40A7B892E31B1A47
    weight |= 1

    hashes = []
    for rows in q.detach().split(ROWS_AT_ONCE):
        rows = (rows + 0).contiguous()  # -0 becomes 0
        mixed = rows.view(bits).long() * weight
        mixed ^= mixed >> 32  # without this, two signs that change would cancel
        hashes.append((mixed * weight).sum(1))
    return torch.cat(hashes)


def _find_askers(query_id, target, M):
    """Return the query id (M,) of the row whose positive each column is; -1 where there is none.

    query_id (N,): int32. target (N,): as in info_nce. A column that several rows share belongs to
    the first of them.
    """
    N = len(query_id)
    rows = torch.arange(N, device=target.device)
    column = target.where(target >= 0, M)  # ignored rows write past the end
    # The least row number: a plain scatter would write in any order on a GPU.
    first_row = torch.full((M + 1,), N, device=target.device)
    first_row = first_row.scatter_reduce(0, column, rows, "amin")[:M]
    return query_id[first_row.clamp(max=N - 1)].masked_fill(first_row == N, -1)


# Checks of a caller's arguments. Values on a GPU are checked only with INFONCE_DEBUG=1.


def _describe(vectors):
    """Write the shapes, dtypes and devices of {name: tensor} into one line for error messages."""
    return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} {x.device}" for name, x in vectors.items())


def _check(vectors, indices, margin):
    """Raise ValueError unless the arguments fit each other.

    vectors: {name: tensor}, all (rows, D). indices: {name: (tensor or None, length)}.
    """
    q = vectors["q"]
    for name, x in vectors.items():
        same_kind = x.dtype == q.dtype and x.device == q.device
        same_width = x.ndim == 2 and x.shape[1] == q.shape[-1] > 0
        if not (same_kind and same_width and x.dtype in SUM_TYPE):
            raise ValueError(
                f"{name}: expected (rows, D > 0), the same D, device and dtype for all, the dtype "
                f"one of {list(SUM_TYPE)}; got {_describe(vectors)}"
            )
        if DEBUG and not x.isfinite().all():
            rows = (~x.isfinite().all(1)).nonzero().flatten()[:8].tolist()
            raise ValueError(f"{name}: NaN or inf in rows {rows}; got {_describe(vectors)}")

    for name, (x, length) in indices.items():
        if x is None:
            continue
        if x.shape != (length,) or x.dtype != torch.int64 or x.device != q.device:
            raise ValueError(
                f"{name}: expected ({length},) int64 on {q.device}, got {tuple(x.shape)} "
                f"{x.dtype} {x.device}, beside {_describe(vectors)}"
            )

    # NaN is not >= 0 either
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin={margin}: expected a cosine difference >= 0, or None")


def _scale_tensor(scale, q):
    """Return scale as a 0-dim tensor beside q. Raises ValueError where it cannot be 1 / tau."""
    if not isinstance(scale, torch.Tensor):
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: expected 1 / tau, a finite number > 0")
        return torch.full((), scale, dtype=SUM_TYPE[q.dtype], device=q.device)

    fits = scale.ndim == 0 and scale.is_floating_point() and scale.device == q.device
    if not fits or (DEBUG and not scale > 0):
        raise ValueError(
            f"scale: expected a 0-dim float tensor > 0 on {q.device}, got {tuple(scale.shape)} "
            f"{scale.dtype} {scale.device}"
        )
    return scale


def _choose_impl(impl, vectors):
    """Return "triton" or "torch" for the caller's impl. Raises ValueError if it cannot run here."""
    q = vectors["q"]
    device_runs_triton = triton is not None and (q.is_cuda or INTERPRET)
    triton_fits = device_runs_triton and q.dtype != torch.float64
    if impl == "auto":
        impl = "triton" if triton_fits and q.is_cuda else "torch"
        if os.environ.get("RANK", "0") == "0":
            _say_once(f"infonce: impl='auto' chose {impl!r} for {q.dtype} on {q.device.type}")

    if impl not in ("triton", "torch") or (impl == "triton" and not triton_fits):
        raise ValueError(
            f"impl={impl!r}: expected 'auto', 'torch', or 'triton' (which needs a GPU or "
            f"TRITON_INTERPRET=1, and has no fp64); got {_describe(vectors)}"
        )
    return impl


@functools.cache
def _say_once(text):
    """Print a line to stderr the first time it comes up in this process."""
    print(text, file=sys.stderr)


def info_nce(
    q,
    d,
    scale,
    *,
    target=None,
    ids=None,
    q_ids=None,
    margin=None,
    symmetric=True,
    reduction="mean",
    impl="auto",
):
    """Compute InfoNCE of N queries against M candidates without their N x M similarities.

    The paper's Eq. (1); the mathematics stands at the top of the file.

    q          (N, D) unit rows, any strides, fp32, bf16 or fp16 (fp64: the twin only)
    d          (M, D) unit rows, like q
    scale      1 / tau, a float or a 0-dim tensor; q, d and scale carry gradient if asked
    target     (N,) int64: row i's positive is d[target[i]], by default d[i]; -1 ignores the row in
               both directions
    ids        (M,) int64 content ids > -2**63 of the candidates
    q_ids      (N,) int64 ids > -2**63 of the queries. A candidate is not a negative of a row if it
               has the content of the row's positive, or is itself the positive of a row with the
               same query (of the first, where rows share it). With ids alone, rows of q that are
               equal to the last bit are one query; training passes q_ids, since dropout makes the
               vectors of equal queries differ. Without both, all queries and all columns differ
    margin     cosine >= 0: candidates with s_ij > s_i,target + margin are taken for false negatives
               and dropped; no gradient flows through the threshold
    symmetric  mean of two directions under the same masks: query to all candidates, and positive
               to all queries; else the first alone
    reduction  "mean" over the rows not ignored, or "none"
    impl       "triton"; "torch", the same blocks and memory bound on any device; "auto": triton on
               a GPU, else torch, and says its choice once

    Returns the loss in nats, 0-dim for "mean" and (N,) for "none", fp32 (fp64 for fp64 inputs).
    Raises ValueError for arguments that do not fit. Values on a GPU (target, a tensor scale, NaN
    rows) are checked only with INFONCE_DEBUG=1, because the check would wait for the GPU.
    Extra memory: WORKSPACE, fp32 sums for d and for a block of q. Deterministic.
    """
    vectors = {"q": q, "d": d}
    indices = {"target": (target, len(q)), "ids": (ids, len(d)), "q_ids": (q_ids, len(q))}
    _check(vectors, indices, margin)
    scale = _scale_tensor(scale, q)
    impl = _choose_impl(impl, vectors)

    if len(q) == 0 or len(d) == 0 or (target is None and len(q) > len(d)):
        raise ValueError(
            f"q, d: expected rows, and without a target at least as many in d as in q; "
            f"got q {tuple(q.shape)}, d {tuple(d.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'none'")
    if target is not None and (DEBUG or not q.is_cuda):
        if not ((target >= -1) & (target < len(d))).all():
            raise ValueError(
                f"target: {target.min()} to {target.max()}, allowed are -1 to {len(d) - 1} for "
                f"d {tuple(d.shape)}"
            )

    rows = torch.arange(len(q), device=q.device)
    if target is None:
        target = rows
    if q_ids is None:
        q_ids = rows if ids is None else _hash_rows(q)
    if ids is None:
        candidate_id = torch.arange(len(d), device=q.device, dtype=torch.int32)
    else:
        candidate_id = _dense(ids)
    query_id = _dense(q_ids)
    masks = Masks(
        positive_id=candidate_id[target.clamp(min=0)],
        query_id=query_id,
        threshold=None,
        candidate_id=candidate_id,
        asker_id=_find_askers(query_id, target, len(d)),
    )
    loss = _InfoNCE.apply(q, d, scale, target, masks, margin, symmetric, impl, 1)
    if reduction == "none":
        return loss
    return loss.sum() / (target >= 0).sum().clamp(min=1)


class _RankShape(NamedTuple):
    """The numbers that the ranks tell each other about their rows."""

    queries: int  # N
    candidates: int  # N + K
    dim: int  # D
    dtype: int  # index in SUM_TYPE
    has_ids: int
    has_q_ids: int


def info_nce_dist(
    q,
    p,
    scale,
    *,
    n=None,
    p_ids=None,
    n_ids=None,
    q_ids=None,
    margin=None,
    symmetric=True,
    impl="auto",
):
    """Compute this rank's share of the global mean loss; every rank's p and n are candidates.

    Shares, and all gradients, SUM over the ranks to the result of one process: all-reduce them with
    SUM, never average. # PAPER: Eq. (1) names a row's own hard negatives alone, and no masks; the
    released forward has all of these but the mask by query ids.

    q       (N, D) this rank's queries
    p       (N, D) their positives
    n       (K, D) this rank's hard negatives, or None; N and K may differ between ranks, and be 0
    p_ids   (N,) int64 content ids of p
    n_ids   (K,) int64 content ids of n
    q_ids   (N,) int64 ids of q; as in info_nce, over the rows of all ranks
    The other arguments, and the errors, are info_nce's.

    q, p, n and scale carry gradient: each rank gets its part of the gradient of the *global* mean
    (the losses of its rows, over the number of all ranks' rows). The part of p's and n's gradient
    that comes from other ranks' queries arrives in one reduce-scatter; queries never travel. Every
    rank must call backward. With several ranks the host waits once, for the row counts.
    """
    if n is None:
        n = p[:0]
    if n_ids is None and p_ids is not None and len(n) == 0:
        n_ids = p_ids[:0]

    vectors = {"q": q, "p": p, "n": n}
    indices = {
        "p_ids": (p_ids, len(p)),
        "n_ids": (n_ids, len(n)),
        "q_ids": (q_ids, len(q)),
    }
    _check(vectors, indices, margin)
    scale = _scale_tensor(scale, q)
    impl = _choose_impl(impl, vectors)
    if len(p) != len(q) or (p_ids is None) != (n_ids is None):
        raise ValueError(
            f"p, n_ids: expected one p per q, and ids for both p and n or for neither; "
            f"got q {tuple(q.shape)}, p {tuple(p.shape)}"
        )

    # The ranks may differ in their numbers of rows, and must agree on all else.
    world = 1
    rank = 0
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        rank = dist.get_rank()
    dtype = list(SUM_TYPE).index(q.dtype)
    has_ids = int(p_ids is not None)
    has_q_ids = int(q_ids is not None)
    mine = _RankShape(len(q), len(p) + len(n), q.shape[1], dtype, has_ids, has_q_ids)
    shapes = [mine]
    if world > 1:
        gathered = _all_gather(torch.tensor([mine], device=q.device))  # (world, 6)
        shapes = [_RankShape(*row) for row in gathered.tolist()]  # waits for the GPU
    total = sum(shape.queries for shape in shapes)
    if total == 0 or any(shape[2:] != mine[2:] for shape in shapes):
        raise ValueError(
            f"q, p, n: expected rows, one D, one dtype, and ids everywhere or nowhere; got "
            f"[N, N + K, D, dtype, ids, q_ids] by rank: {[list(shape) for shape in shapes]}"
        )

    # Each rank's candidates: its p, its n, and padding, since gloo gathers equal sizes only.
    longest = max(shape.candidates for shape in shapes)
    padding = longest - mine.candidates
    d = F.pad(torch.cat([p, n]), (0, 0, 0, padding))  # (longest, D)
    numbers = torch.arange(rank * longest, rank * longest + mine.candidates, device=q.device)
    target = numbers[: len(q)]  # (N,)
    ids = numbers if p_ids is None else torch.cat([p_ids, n_ids])
    if q_ids is None:
        q_ids = target if p_ids is None else _hash_rows(q)

    # Two numbers of each candidate travel: its content and, of a positive, its query.
    ids = F.pad(ids, (0, padding), value=NO_ID)  # (longest,)
    asked = F.pad(q_ids, (0, longest - len(q)), value=NO_ID)  # (longest,)
    if world > 1:
        ids, asked = _all_gather(torch.stack([ids, asked], dim=1)).unbind(1)  # (world * longest,)
    candidate_id = _dense(ids)
    asker_id = _dense(asked)
    masks = Masks(candidate_id[target], asker_id[target], None, candidate_id, asker_id)

    loss = _InfoNCE.apply(q, d, scale, target, masks, margin, symmetric, impl, world)
    return loss.sum() / total
