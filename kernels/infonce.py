"""Symmetric InfoNCE with in-batch and hard negatives, false-negative masks, on one process or many (paper section 4, Eq. (1)).

    loss = info_nce(q, d, 1 / 0.03, ids=content_ids, margin=0.1)      # d = [positives; hard negatives]
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def info_nce_ref(q, d, scale, *, target=None, ids=None, margin=None, symmetric=True, reduction="mean"):
    """The definition, in plain torch: what every other form here must equal (arguments: info_nce)."""
    row, col = torch.arange(len(q), device=q.device), torch.arange(len(d), device=q.device)
    t, ids = row if target is None else target, col if ids is None else ids
    valid, t = t >= 0, t.clamp(min=0)
    s = q @ d.T  # (N, M) cosines
    drop = (ids == ids[t][:, None]) | ~valid[:, None]  # the positive's content is no negative, an ignored row has none
    if margin is not None:
        drop = drop | (s > s.gather(1, t[:, None]).detach() + margin)
    z = scale * s
    loss = F.cross_entropy(z.masked_fill(drop & (col != t[:, None]), -torch.inf), t, reduction="none")
    if symmetric:  # each row is the positive of its own anchor, the column t[i]: (N anchors, N rows)
        back = z[:, t].T.masked_fill(drop[:, t].T & (row != row[:, None]), -torch.inf)
        loss = (loss + F.cross_entropy(back, row, reduction="none")) / 2
    loss = loss.where(valid, 0)
    return loss if reduction == "none" else loss.sum() / valid.sum().clamp(min=1)


def info_nce(q, d, scale, *, target=None, ids=None, margin=None, symmetric=True, reduction="mean", impl="auto"):
    """InfoNCE of q (N, D) against d (M, D), unit rows of one dtype; row i's positive is d[target[i]] (paper Eq. (1)).

    scale      1 / tau: a float, or a 0-dim tensor that may require grad.
    target     (N,) int64, default row i -> i; -1 ignores the row in both directions.
    ids        (M,) int64 content ids: a candidate with the positive's id is not a negative.
    margin     cosine: s_ij > s_i,target + margin counts as a false negative and is dropped (threshold detached).
    symmetric  mean of query -> all candidates and positive -> all queries, under the same masks; else the first alone.
    reduction  "mean" over the rows that are not ignored, or "none": (N,) losses in nats.
    """
    return info_nce_ref(q, d, scale, target=target, ids=ids, margin=margin, symmetric=symmetric, reduction=reduction)


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order; backward sums what every rank's share says about this rank's rows."""

    @staticmethod
    def forward(ctx, x, sizes):
        ctx.sizes = sizes
        padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])  # gloo gathers equal sizes only
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def info_nce_dist(q, p, scale, *, n=None, p_ids=None, n_ids=None, margin=None, symmetric=True, impl="auto"):
    """This rank's share of the global mean loss: shares, and all gradients, SUM over ranks to the one-process result.

    q, p (N, D) this rank's queries and their positives, n (K, D) or None its hard negatives; p_ids (N,), n_ids (K,) content
    ids. N and K may differ between ranks (0 included). Everything else as info_nce. Works without torch.distributed.
    q, p, n and scale carry gradient, each rank's part of the gradient of the *global* mean, so sum over ranks, never average.
    """
    n = p[:0] if n is None else n
    if (p_ids is None) != (n_ids is None) and len(n) or (p_ids is None and n_ids is not None):
        raise ValueError("p_ids and n_ids come together: both or neither")
    options = dict(margin=margin, symmetric=symmetric, reduction="none")
    ids = None if p_ids is None else torch.cat([p_ids] if n_ids is None else [p_ids, n_ids])
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return info_nce_ref(q, torch.cat([p, n]), scale, ids=ids, **options).sum() / len(q)
    counts = [torch.empty(2, dtype=torch.int64, device=q.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(q), len(n)], device=q.device))
    rows, negatives = torch.stack(counts).T.tolist()  # one host sync: every rank must know the sizes
    candidates = [a + b for a, b in zip(rows, negatives, strict=True)]
    offset = torch.tensor([0] + candidates[:-1]).cumsum(0).tolist()  # rank r's columns: its positives, then its negatives
    target = torch.cat([torch.arange(o, o + a, device=q.device) for o, a in zip(offset, rows, strict=True)])
    all_q, all_d = _Gather.apply(q, rows), _Gather.apply(torch.cat([p, n]), candidates)
    all_ids = None if ids is None else _Gather.apply(ids, candidates)
    loss = info_nce_ref(all_q, all_d, scale, target=target, ids=all_ids, **options)
    return loss.split(rows)[dist.get_rank()].sum() / sum(rows)
