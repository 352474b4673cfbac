"""Train GVE up the Modality Pyramid (arXiv 2510.27571, sections 4 and A.8), on one process or many.

    python train.py                                     # --preset mini, minutes on 2 cores
    torchrun --nproc-per-node 2 train.py                # the same from two ranks
    torchrun --nproc-per-node 8 train.py --preset gve-3b --data DIR

The last line trains on the files that mixtures/gve-3b.json names, under DIR. With --dry-run it
prints the memory of a step instead, on any machine: the base's config.json is enough.

Every step draws one source. At the start of each curriculum epoch the prober Psi_t measures how
well each source's pairs agree, R_k = mean cosine of N_p positive pairs. Sources are then drawn by
P(k) = softmax(R_k / sigma_t), while sigma grows from 0.1 to 1.0: well-aligned sources come first,
the others catch up. P(k) decides the order, not the amount: each source has a quota, its share of
one pass over the data, and leaves the draw when that is used up.

Read in this order: the schedule and its sampler, the loss, GradCache, probing and mining, the loop
in `train`. A run writes a checkpoint folder (model.py), states to resume from
(support/checkpoint.py), and <out>/log.jsonl with one JSON line per event.

SIGTERM, SIGINT, SIGHUP and SIGUSR1 (SLURM's warning) finish the step, save, and stop. torchrun
passes SIGUSR1 on if started with --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1.

Legend: K sources, G global batch, B this rank's rows, N this rank's hard negatives, M candidates of
all ranks, D embedding dim. q queries, p positives, n hard negatives.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import OutsideRoots, TrainLoader, content_id, load_mixture
from embed import encode
from kernels.infonce import info_nce_dist
from memory import (
    CARD,
    BatchShape,
    PeakMemory,
    find_full,
    frame_sides,
    gib,
    peak_bytes,
    print_memory,
    step_memory,
    weight_bytes,
)
from model import GVE, POOLINGS, POSITIONS, checkpoint_file, to_device
from support.cache import FeatureStore, VectorCache, hash_weights
from support.checkpoint import (
    check_data,
    check_same_state,
    check_settings,
    describe_state,
    get_rng_state,
    install_signal_handlers,
    list_changes,
    load_state,
    newest_state,
    received_signals,
    save_state,
    set_rng_state,
)
from support.files import file_lock, git_commit, load_jsonl, name_what_failed, write_jsonl
from support.flags import flag, parse_flags
from support.flops import peak_flops, peak_memory_gib, step_flops
from support.progress import track
from support.ranks import (
    all_gather_object,
    barrier,
    fail_together,
    join_ranks,
    leave_ranks,
    sum_over_ranks,
)
from tables import pyramid_table

# The Modality Pyramid, Figure 5, bottom up.
# PAPER: the figure leaves out I2T and T2TI, which Tables 6 and 7 hold; both are level two here.
LEVELS = (
    ("T2T", "T2I"),
    ("TI2I", "TI2T", "TI2TI", "I2I", "I2T", "T2TI"),
    ("T2V", "I2V", "V2V"),
    ("TI2V", "TV2V"),
)
LEVEL = {task: level for level, tasks in enumerate(LEVELS, 1) for task in tasks}

# The plain loss holds a few (B, M) matrices; kernels/infonce.py holds none. --fused auto takes the
# kernel for sources whose global batch makes at least so many similarities: on a CPU it is the
# faster one from there on (records/2026-11-25-house.md). Not yet measured on a GPU.
FUSED_FROM = 1024 * 1024

PAPER = dict(
    lr=3e-5,
    weight_decay=0.1,
    epochs=3,
    temperature=0.03,
    dtype="bfloat16",
    batch_scale=32.0,
    checkpointing=True,
    workers=4,
    micro_batch=256,
    micro_tokens=32768,
    save_every=200,
    probe_pairs=256,
    min_tokens=128,  # PAPER: names none; the released processor's (model.RELEASED_MIN_TOKENS)
    grad_cache=True,  # PAPER: GradCache was off; on, a batch of 1,024 fits any GPU
)
PRESETS = {
    "mini": dict(
        base="mini/base",
        prober="mini/prober",
        data="runs/mini",
        mixture=["runs/mini/train/mixture.json"],
        out="runs/gve-mini",
        features="runs/features",
        schedule="pyramid-free",  # until its study says whether "pyramid" is as good here
        steps=640,
        dropout=0.0,
        micro_tokens=16384,
    ),
    "gve-3b": dict(
        PAPER,
        base="Qwen/Qwen2.5-VL-3B-Instruct",
        out="runs/gve-3b",
        mixture=["mixtures/gve-3b.json"],
    ),
    "gve-7b": dict(
        PAPER,
        base="Qwen/Qwen2.5-VL-7B-Instruct",
        out="runs/gve-7b",
        mixture=["mixtures/gve-7b.json"],
    ),
}


# The schedule: which source does a step draw? (section 4.2)


def pyramid_weights(relevance, sigma_t, sizes, levels, progress):
    """Weigh by exp(R_k / sigma_t), which makes P(k) = softmax(R_k / sigma_t)."""
    # PAPER: k is read as a source; as the formula is written, its size does not count.
    z = relevance / sigma_t
    return np.exp(z - z.max())


def reverse_weights(relevance, sigma_t, sizes, levels, progress):
    """Weigh by exp(-R_k / sigma_t): the hardest sources first, the pyramid's negative control."""
    return pyramid_weights(-relevance, sigma_t, sizes, levels, progress)


def proportional_weights(relevance, sigma_t, sizes, levels, progress):
    """Weigh by size: GVE-s."""
    return sizes


def uniform_weights(relevance, sigma_t, sizes, levels, progress):
    """Weigh all sources alike."""
    return np.ones(len(sizes))


def staged_weights(relevance, sigma_t, sizes, levels, progress):
    """Walk the levels in turn, each for its share of a pass; inside a level, weigh by size."""
    of_levels = [sizes[levels == level].sum() for level in range(1, len(LEVELS) + 1)]
    ends = np.cumsum(of_levels) / sizes.sum()
    level = 1 + np.searchsorted(ends, progress, side="right")
    return sizes * (levels == level)


# PAPER: without quotas, P(k) would also decide how much of each source is seen: Table 6's smallest
# source 75 times, 6 % of its largest. But the paper's curves end where one pass over all sources
# ends. So "pyramid" gives each source its share of one pass, a quota; "pyramid-free" does not.
#
# weigh: gives the sources' weights (K,) at a step. probes: it needs R_k. quotas: a source leaves
# the draw when its quota is used up.
SCHEDULES = {
    "pyramid": dict(weigh=pyramid_weights, probes=True, quotas=True),
    "pyramid-free": dict(weigh=pyramid_weights, probes=True, quotas=False),
    "reverse": dict(weigh=reverse_weights, probes=True, quotas=True),
    "proportional": dict(weigh=proportional_weights, probes=False, quotas=False),
    "uniform": dict(weigh=uniform_weights, probes=False, quotas=False),
    "staged": dict(weigh=staged_weights, probes=False, quotas=False),
}


def find_schedule(name):
    """Return the schedule of this name; raise ValueError that names the known ones."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; accepted: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def source_probabilities(
    schedule, relevance, sigma_t, sizes, levels, *, progress=0.0, candidates=None
):
    """Return P (K,), the probability of each source at one step.

    schedule: a name of SCHEDULES, else ValueError. relevance R (K,): cosines; None for schedules
    that do not need them. sigma_t: temperature. sizes (K,): global batches of one pass, not
    rounded. levels (K,): 1..4. progress: how far the run is, in [0, 1). candidates (K,) bool: the
    sources that may be drawn; None: all.
    """
    weigh = find_schedule(schedule)["weigh"]
    sizes = np.asarray(sizes, float)
    levels = np.asarray(levels)
    if candidates is None:
        candidates = np.ones(len(sizes), bool)
    if relevance is not None:
        relevance = np.asarray(relevance, float)[candidates]

    weights = weigh(relevance, sigma_t, sizes[candidates], levels[candidates], progress)
    p = np.zeros(len(sizes))
    p[candidates] = weights / weights.sum()
    return p


def sigma(epoch, epochs, low=0.1, high=1.0):
    """Return sigma_t of curriculum epoch 0..epochs-1: linear from low to high (one epoch: low)."""
    if epochs == 1:
        return low
    return low + (high - low) * epoch / (epochs - 1)


def epoch_steps(epoch, epochs, steps):
    """Return the steps of curriculum epoch 0..epochs-1, a range; the epochs share them evenly."""
    return range(round(epoch * steps / epochs), round((epoch + 1) * steps / epochs))


def relevance_by_task(relevance, sizes, tasks):
    """Give all sources of a task (T2V, T2I, ...) one R: the mean of their R, weighted by size.

    relevance, sizes, tasks (K,) -> list (K,)
    """
    # PAPER: leaves open whether k counts data sources or task types.
    pairs = collections.Counter()
    sums = collections.Counter()
    for r, size, task in zip(relevance, sizes, tasks, strict=True):
        pairs[task] += size
        sums[task] += r * size
    return [sums[task] / pairs[task] for task in tasks]


def source_quotas(samples, batch, steps=0):
    """Return each source's steps in a run (K,), int: its share of one pass over the data.

    samples (K,): pairs. batch (K,): global batch sizes. steps: of the whole run; 0: one pass, which
    is ceil(samples / batch) steps of each source. Any other number is shared out in the proportions
    of one pass, and fractions are rounded so that the quotas sum to it: largest remainders go up.
    """
    one_pass = -(-np.asarray(samples) // np.asarray(batch))  # rounded up
    total = one_pass.sum()
    quotas, remainders = np.divmod(one_pass * (steps or total), total)
    missing = remainders.sum() // total
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[:missing]] += 1
    return quotas


def draw_epoch(
    schedule, relevance, sigma_t, sizes, levels, *, quotas, seed, taken=None, steps=None
):
    """Draw the source of each step of an epoch -> (numbers [k per step], expected share (K,)).

    The result is a pure function of the arguments. schedule, relevance, sigma_t, sizes, levels: as
    in source_probabilities. quotas (K,): source_quotas of the run; a schedule with quotas draws no
    source beyond its own. taken (K,): steps of each source in earlier epochs; None: none. steps:
    the epoch's part of the run's steps, a range; None: the whole run. Raises ValueError if the
    quotas are used up before the epoch ends, as they may be where `taken` is another run's.
    """
    has_quotas = find_schedule(schedule)["quotas"]
    total = int(np.sum(quotas))  # steps of the run
    if steps is None:
        steps = range(total)
    left = np.array(quotas)
    if taken is not None:
        left -= taken

    candidates = None  # all
    numbers = []
    share = np.zeros(len(left))
    for step in steps:
        if has_quotas:
            candidates = left > 0
            if not candidates.any():
                raise ValueError(
                    f"step {step} of {total}: all quotas are used up; the run began with another "
                    "schedule, or with other data"
                )
        p = source_probabilities(
            schedule,
            relevance,
            sigma_t,
            sizes,
            levels,
            progress=step / total,
            candidates=candidates,
        )
        # A generator for each step: the draw does not depend on where an epoch or a run begins.
        k = int(np.random.default_rng([seed, step]).choice(len(p), p=p))
        numbers.append(k)
        left[k] -= 1
        share += p / len(steps)
    return numbers, share


class Sampler:
    """Deal out the rows of each source, in global batches.

    All ranks deal alike. A source's rows come without replacement and are reshuffled when exhausted
    (the last batch of a pass may be short). Setting `drawn` restores a position.

    sources: objects with samples (pairs of one pass), batch_size and a length (rows). batch_scale:
    global batch G = batch_size x batch_scale. seed: of the shuffles.
    """

    def __init__(self, sources, batch_scale=1.0, seed=42):
        self.sources = sources
        self.seed = seed
        self.rows = [min(s.samples, len(s)) for s in sources]  # (K,) distinct rows of one pass
        self.batch = [max(1, round(s.batch_size * batch_scale)) for s in sources]  # (K,) G
        self.drawn = [0] * len(sources)  # (K,) rows drawn so far
        # A step needs its pass's order again; shuffling millions of rows for each would be slow.
        self.order = functools.lru_cache(2 * len(sources))(self.shuffle)

    def shuffle(self, k, pass_number):
        """Return the rows of source k in the order of that pass over them."""
        # Every pass has the same subset where the source has more rows than samples.
        every = np.random.default_rng([self.seed, k]).permutation(len(self.sources[k]))
        subset = every[: self.rows[k]]
        return np.random.default_rng([self.seed, k, pass_number]).permutation(subset)

    def passes(self):
        """Return how often each source's rows have been drawn so far (K,)."""
        return [drawn / rows for drawn, rows in zip(self.drawn, self.rows, strict=True)]

    def taken(self):
        """Return how many steps have drawn from each source so far (K,)."""
        steps = []
        for drawn, rows, batch in zip(self.drawn, self.rows, self.batch, strict=True):
            passes, rest = divmod(drawn, rows)
            # Rounded up, as the last batch of a pass may be short.
            steps.append(passes * -(-rows // batch) + -(-rest // batch))
        return steps

    def draw(self, k):
        """Draw one step's batch from source k -> row numbers."""
        pass_number, start = divmod(self.drawn[k], self.rows[k])
        rows = self.order(k, pass_number)[start : start + self.batch[k]]
        self.drawn[k] += len(rows)
        return rows


def learning_rate(step, steps, peak, warmup):
    """Return a step's learning rate: linear warm-up over a share of the steps, then cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# The loss


class GatherRows(torch.autograd.Function):
    """Concatenate all ranks' rows; in backward, sum all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        ctx.counts = [int(n) for n in counts]  # waits for the GPU

        # Ranks may hold different numbers of rows; gloo gathers equal sizes only: pad, then cut.
        padded = rows.new_zeros(max(ctx.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # not ours to change
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start = sum(ctx.counts[:rank])
        return gradient[start : start + ctx.counts[rank]]


def gather_rows(rows):
    """Return all ranks' rows in rank order, differentiable; on one process, the rows themselves.

    Ranks may hold different numbers of rows, also none.
    """
    if not dist.is_initialized():
        return rows
    return GatherRows.apply(rows)


def number_rows(q):
    """Number the rows of q (B, D): equal rows, to the last bit, get equal numbers (B,) int64."""
    return q.detach().unique(dim=0, return_inverse=True)[1]


def contrastive_loss(q, p, n, p_ids, n_ids, *, q_ids=None, tau, margin=None, symmetric=True):
    """Return this rank's share of the global mean of symmetric InfoNCE, Eq. (1).

    Shares and gradients SUM over the ranks to the result of one process; they are never averaged.

    q, p        (B, D) this rank's queries and their positives, unit rows
    n           (N, D) its hard negatives; B and N may differ between ranks, and be 0
    p_ids       (B,) content ids of the positives, int64
    n_ids       (N,) of the hard negatives; a candidate with the content of a query's positive is
                not a negative of that query
    q_ids       (B,) of the queries; the positive of a row with the same query is not a negative
                either. None: rows of q that are equal to the last bit are one query
    tau         temperature
    margin      a cosine: a candidate that scores this much above the positive is taken for a false
                negative and left out; None keeps all
    symmetric   the mean of query -> all candidates and positive -> all queries, under the same
                masks; else the first alone

    kernels/infonce.py computes the same without the (B, M) matrices, and takes over for large
    batches: leave this function as it is, and put a loss of yours beside it, in LOSSES.
    """
    # PAPER: Eq. (1) names only a row's own hard negatives, and no masks; the forward() of the
    # authors' released model code has all of these but the mask by query ids.
    margin = torch.inf if margin is None else margin
    if q.dtype in (torch.bfloat16, torch.float16):  # too coarse for scores over tau
        q = q.float()
        p = p.float()
        n = n.float()

    # Everything that other ranks hold
    all_q = gather_rows(q)
    all_p = gather_rows(p)
    all_q_ids = number_rows(all_q) if q_ids is None else gather_rows(q_ids)
    row_ids = gather_rows(p_ids)  # the content that each query of any rank is looking for
    candidates = torch.cat([all_p, gather_rows(n)])  # (M, D)
    candidate_ids = torch.cat([row_ids, gather_rows(n_ids)])  # (M,)
    thresholds = (all_q * all_p).sum(1).detach() + margin  # one for each query of any rank

    # Where this rank's rows stand among all rows, and with them its positives among the candidates.
    rank = dist.get_rank() if dist.is_initialized() else 0
    owner = gather_rows(torch.full((len(q),), rank, device=q.device))
    own = (owner == rank).nonzero().flatten()  # (B,)
    row = torch.arange(len(q), device=q.device)

    # Query -> candidates: rows are this rank's queries, columns the candidates of all ranks.
    scores = q @ candidates.T  # (B, M)
    drop = p_ids[:, None] == candidate_ids
    drop[:, : len(all_q)] |= all_q_ids[own][:, None] == all_q_ids
    drop |= scores > thresholds[own][:, None]
    drop[row, own] = False
    logits = (scores / tau).masked_fill(drop, -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, own, reduction="sum")

    # Positive -> queries: rows are this rank's positives, columns the queries of all ranks.
    if symmetric:
        scores = p @ all_q.T  # (B, all ranks' rows)
        drop = p_ids[:, None] == row_ids
        drop |= all_q_ids[own][:, None] == all_q_ids
        drop |= scores > thresholds
        drop[row, own] = False
        logits = (scores / tau).masked_fill(drop, -torch.inf)
        loss = (loss + torch.nn.functional.cross_entropy(logits, own, reduction="sum")) / 2
    return loss / len(all_q)


# By name: functions with contrastive_loss's arguments, called on every rank, also without rows.
LOSSES = {"infonce": contrastive_loss}


def use_fused(choice, loss, batch, negatives):
    """Decide whether a source's loss is computed by the fused kernel, which knows InfoNCE alone.

    choice: auto, on or off. loss: a name in LOSSES. batch: the source's global batch. negatives:
    hard negatives per row.
    """
    if loss != "infonce":
        if choice == "on":
            raise ValueError(f"--fused on: the kernel computes infonce, not {loss}")
        return False
    if choice == "auto":
        return batch * batch * (1 + negatives) >= FUSED_FROM
    return choice == "on"


# GradCache: batches beyond memory


class GradCache:
    """Embed any number of micro-batches with the memory of one (arXiv 2101.06983).

        cache = GradCache(encode, empty)
        vectors = cache.forward(batches)    # no graph is kept; vectors are a leaf
        loss(vectors).backward()            # d loss / d vectors: the paper's cached gradients
        cache.backward()                    # a second forward of each micro-batch, same dropout

    encode: batch -> vectors (n, D), differentiable. empty (0, D): gives dtype and device where
    there is no batch; that rank must still take part in the backward collectives.
    """

    def __init__(self, encode, empty):
        self.encode = encode
        self.empty = empty
        # Dropout draws from the generator of the device that the vectors lie on.
        self.generator = torch.default_generator
        if empty.is_cuda:
            self.generator = torch.cuda.default_generators[empty.device.index]

    @torch.no_grad()
    def forward(self, batches):
        """Embed an iterable of micro-batches -> (rows, D), a leaf that requires grad."""
        self.batches = []
        self.random_states = []
        vectors = [self.empty]
        for batch in batches:
            self.batches.append(batch)
            self.random_states.append(self.generator.get_state())
            vectors.append(self.encode(batch))
        self.vectors = torch.cat(vectors).requires_grad_()
        return self.vectors

    def backward(self):
        """Send the gradient of the vectors through fresh forwards of the same micro-batches."""
        random_state = self.generator.get_state()
        start = 0
        for batch, before in zip(self.batches, self.random_states, strict=True):
            self.generator.set_state(before)
            vectors = self.encode(batch)
            vectors.backward(self.vectors.grad[start : start + len(vectors)])
            start += len(vectors)
        self.generator.set_state(random_state)
        self.batches = self.vectors = None


# Probing and mining: what the prober Psi_t says about the sources (section 4.2)


def probe(q, p):
    """Return (R, its standard error): the mean cosine of positive pairs, the paper's relevance.

    q, p (n, D): unit rows of the same pairs.
    """
    cosine = (q * p).sum(1).double()
    n = len(cosine)
    mean = cosine.mean()
    variance = ((cosine**2).mean() - mean**2).clamp(min=0)
    return float(mean), float((variance / max(n - 1, 1)).sqrt())


def find_answers(queries, contents, q_ids, ids):
    """Mark the contents that a row with the same query has for its positive -> (B, U) bool.

    queries (B,), contents (U,), sorted: ids. q_ids, ids (n,): those of the rows.
    """
    known = torch.isin(q_ids, queries)  # rows with one of these queries
    numbers, query = torch.cat([q_ids[known], queries]).unique(return_inverse=True)
    of_row, of_query = query.split([len(query) - len(queries), len(queries)])

    answers = torch.zeros(len(numbers), len(contents), dtype=torch.bool, device=ids.device)
    answers[of_row, torch.searchsorted(contents, ids[known])] = True
    return answers[of_query]


def mine(q, p, ids, k, margin=None, *, q_ids=None, block=1024):
    """Find each query's hard negatives among the positives of all -> row numbers (n, <= k) int64.

    They are the distinct contents that score highest for the query, without those that are the
    positive of a row with the same query, and without those that score above the row's own positive
    by more than margin. -1 stands where fewer than k are left.

    q, p (n, D): unit rows of n pairs. ids (n,): content ids of the positives. margin: a cosine.
    q_ids (n,): ids of the queries; None: rows of q that are equal to the last bit are one query.
    """
    # PAPER: mines "a large external corpus"; here the pool is what an epoch draws of the source
    # itself.
    order = ids.argsort(stable=True)
    new = torch.ones(len(ids), dtype=torch.bool)
    new[1:] = ids[order][1:] != ids[order][:-1]
    first = order[new].to(p.device)  # (U,) the first row of each content
    ids = ids.to(p.device)
    q_ids = number_rows(q) if q_ids is None else q_ids.to(p.device)
    contents = ids[first]  # (U,)
    pool = p[first]  # (U, D)
    margin = torch.inf if margin is None else margin

    k = min(k, len(first))
    found = [first.new_empty(0, k)]
    for start in range(0, len(q), block):
        rows = slice(start, start + block)
        positive = (q[rows] * p[rows]).sum(1, keepdim=True)  # (block, 1)
        scores = q[rows] @ pool.T  # (block, U)
        right = find_answers(q_ids[rows], contents, q_ids, ids)
        false = scores > positive + margin
        best, which = scores.masked_fill(right | false, -torch.inf).topk(k)
        found.append(first[which].masked_fill(best == -torch.inf, -1))
    return torch.cat(found)


def embed_pairs(gve, source, rows, flags, cache=None):
    """Embed queries and positives of a source's rows -> ([(row, query, positive)], q, p).

    q, p (n, D): their vectors. Rows that cannot be used are left out; training will list them.
    """
    loaded = []
    for row in rows:
        try:
            query, positive, *_ = source.load(int(row), [flags.data, *flags.root])
        except ValueError:
            continue
        loaded.append((int(row), query, positive))

    options = {
        "workers": flags.workers,
        "frames": flags.frames,
        "max_tokens": flags.max_tokens,
        "max_length": flags.max_length,
        "cache": cache,
    }
    q, q_failed = encode(gve, [query for _, query, _ in loaded], source.instruction, **options)
    p, p_failed = encode(gve, [positive for _, _, positive in loaded], **options)

    good = [i for i in range(len(loaded)) if i not in q_failed and i not in p_failed]
    if not q[good].isfinite().all() or not p[good].isfinite().all():
        raise FloatingPointError(
            f"source {source.name}: the prober gives vectors that are not finite"
        )
    pairs = [loaded[i] for i in good]
    return pairs, q[good], p[good]


def probe_sources(prober, sources, flags, rank=0, world=1):
    """Measure R_k of each source on N_p of its pairs -> (R (K,), standard errors (K,)), two lists.

    The ranks share the work, and all get the same numbers.
    """
    relevance = []
    errors = []
    for k, source in enumerate(track(sources, len(sources), "R_k of sources")):
        # The same pairs on every rank, of which each embeds a part.
        rows = np.random.default_rng([flags.seed, k]).permutation(len(source))
        own = rows[: flags.probe_pairs][rank::world]
        _, q, p = embed_pairs(prober, source, own, flags)
        q = gather_rows(q.to(prober.device))
        p = gather_rows(p.to(prober.device))

        if len(q) == 0:
            raise ValueError(
                f"source {source.name}: none of {flags.probe_pairs} probed pairs can be used; "
                "try `python extras/check_data.py MIXTURE`"
            )
        mean, error = probe(q, p)
        relevance.append(mean)
        errors.append(error)
    return relevance, errors


def mine_source(prober, source, rows, flags, cache=None):
    """Mine hard negatives of a source's rows under the prober -> {row: [item, ...]}."""
    pairs, q, p = embed_pairs(prober, source, sorted(rows), flags, cache)
    q_ids = torch.tensor([content_id(query) for _, query, _ in pairs])
    ids = torch.tensor([content_id(positive) for _, _, positive in pairs])
    margin = None if flags.margin < 0 else flags.margin
    device = prober.device
    found = mine(q.to(device), p.to(device), ids, source.negatives, margin, q_ids=q_ids)

    mined = {}
    for (row, _, _), negatives in zip(pairs, found.tolist(), strict=True):
        mined[row] = [pairs[i][2] for i in negatives if i >= 0]
    return mined


def mine_epoch(prober, sources, plan, flags, path):
    """Mine hard negatives for the rows of a plan; keep them in `path` for a resumed run."""
    # Through the cache the ranks share the work. It is no other's: eval.py keeps one in the folder.
    cache = VectorCache(path.parent / "mining", prober)
    for k, source in enumerate(sources):
        rows = set()
        for other, drawn in plan:
            if other == k and source.negatives:
                rows |= set(drawn.tolist())
        source.mined = mine_source(prober, source, rows, flags, cache) if rows else {}

    barrier()  # all have read the cache
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_jsonl(path, [source.mined for source in sources])
        # On a network disk, a file that another rank has not closed yet stays a while.
        shutil.rmtree(path.parent / "mining", ignore_errors=True)


def read_mined(sources, path):
    """Give every source the hard negatives that an earlier run mined for this epoch.

    Raises ValueError if they are gone: the prober that mined them may be, too.
    """
    lines = load_jsonl(path) if path.exists() else []
    if len(lines) != len(sources):
        raise ValueError(
            f"{path}: cannot resume without this epoch's hard negatives, a line for each of "
            f"{len(sources)} sources; the file has {len(lines)}: put it back, or start a new run"
        )
    for source, mined in zip(sources, lines, strict=True):
        source.mined = {int(row): items for row, items in mined.items()}


# The run


@dataclasses.dataclass
class Flags:
    preset: str = flag("mini", "defaults of the other flags", choices=list(PRESETS))
    base: str = flag(
        "", "checkpoint to start from: a Qwen2.5-VL, or a LoRA folder to train further"
    )
    data: str = flag("data", "folder of the training data; media may lie anywhere under it")
    mixture: list[str] = flag(
        [],
        "mixtures, joined; their files lie beside them or under DATA; none: DATA/mixture.json",
    )
    root: list[str] = flag([], "further folders for media; paths may be relative to them, too")
    out: str = flag("", "checkpoint folder to write")
    prober: str = flag(
        "", "Psi_1, the first epoch's prober: any checkpoint; empty: the starting one"
    )
    schedule: str = flag("pyramid", "how sources are drawn", choices=list(SCHEDULES))
    relevance: str = flag(
        "source", "R_k of each source, or one for all of a task", choices=["source", "task"]
    )
    # PAPER: Table 9's three epochs could also mean three passes; the paper's curves show one.
    epochs: int = flag(3, "curriculum epochs; together they are one pass over the data")
    steps: int = flag(0, "optimiser steps; 0: sum over sources of ceil(samples / global batch)")
    sigma_max: float = flag(1.0, "sigma of the last epoch; the first has 0.1")
    probe_pairs: int = flag(32, "N_p, positive pairs per source for R_k")
    batch_scale: float = flag(1.0, "global batch of a source = its batch_size times this")
    remine: bool = flag(
        False,
        "mine hard negatives with Psi_t at each epoch's start, ahead of the files'",
    )
    micro_batch: int = flag(64, "items per forward")
    micro_tokens: int = flag(0, "tokens per forward, padding included; 0: no limit")
    grad_cache: bool = flag(False, "keep no graphs, embed twice: batches beyond memory (GradCache)")
    loss: str = flag("infonce", "the loss", choices=list(LOSSES))
    fused: str = flag(
        "auto",
        "loss by the fused kernel, without the similarity matrix; auto: for large batches",
        choices=["auto", "on", "off"],
    )
    lr: float = flag(2e-3, "peak learning rate of AdamW, cosine to zero")
    warmup: float = flag(0.03, "share of the steps with rising rate (not given in the paper)")
    weight_decay: float = flag(0.1, "AdamW's weight decay")
    clip: float = flag(1.0, "largest gradient norm, 0: no limit (not given in the paper)")
    dropout: float = flag(0.1, "LoRA dropout")
    pooling: str = flag(
        "", "token that is pooled; empty: the base's own, else the last", choices=["", *POOLINGS]
    )
    temperature: float = flag(0.03, "tau of the loss")
    margin: float = flag(
        0.1, "a negative that scores this much above the positive (cosine) is false; -1: off"
    )
    symmetric: bool = flag(True, "add the candidate-to-query direction to the loss")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "most vision tokens per video frame")
    min_tokens: int = flag(4, "least vision tokens per video frame; smaller frames are enlarged")
    positions: str = flag(
        "",
        "mrope, or 1d: places in the row, as in the released forward; empty: the base's own, else "
        "mrope",
        choices=["", *POSITIONS],
    )
    max_length: int = flag(8192, "tokens per item; the tail of longer texts is cut")
    dtype: str = flag(
        "float32",
        "of the frozen base; LoRA is float32 over bfloat16",
        choices=["float32", "bfloat16", "float64"],
    )
    checkpointing: bool = flag(False, "recompute activations in backward (gradient checkpointing)")
    workers: int = flag(1, "decoding processes per rank")
    features: str = flag(
        "",
        "folder that keeps the vision tower's output of every medium, for sources of few media; "
        "empty: none",
    )
    resume: str = flag(
        "",
        "auto: continue from OUT's newest state, if there is one, to the same numbers",
        choices=["", "auto"],
    )
    save_every: int = flag(0, "steps between states to resume from; 0: at each epoch's end only")
    keep: int = flag(2, "newest states to keep")
    log_every: int = flag(10, "steps between log lines")
    dry_run: bool = flag(
        False,
        "only print a step's memory: by arithmetic, and of the largest micro-batch tried; writes "
        "nothing, needs no data and, for the arithmetic, no weights",
    )
    seed: int = flag(42, "random seed")
    device: str = flag("", "cpu or cuda; empty: cuda if there is one")

    def __post_init__(self):
        """Raise ValueError for a value that no run can have, naming the flag and its range."""
        least = {
            "epochs": 1,
            "steps": 0,
            "probe_pairs": 1,
            "micro_batch": 1,
            "micro_tokens": 0,
            "weight_decay": 0,
            "clip": 0,
            "max_tokens": 1,
            "max_length": 1,
            "workers": 0,
            "save_every": 0,
            "keep": 1,
            "log_every": 1,
            "seed": 0,
        }
        above_zero = ("lr", "temperature", "sigma_max", "batch_scale")
        accepted = {}  # of the flags whose value is refused
        for name, lowest in least.items():
            if not lowest <= getattr(self, name) < math.inf:
                accepted[name] = f"at least {lowest}"
        for name in above_zero:
            if not 0 < getattr(self, name) < math.inf:
                accepted[name] = "above 0"
        if not 0 <= self.warmup <= 1:
            accepted["warmup"] = "from 0 to 1"
        if not 0 <= self.dropout < 1:
            accepted["dropout"] = "from 0 to below 1"
        if not -math.inf < self.margin < math.inf:
            accepted["margin"] = "a number; negative: off"
        if self.frames < 2 or self.frames % 2:
            accepted["frames"] = "even, at least 2"
        for name in ("base", "out"):
            if not getattr(self, name):
                accepted[name] = "a folder"

        refused = []
        for name, values in accepted.items():
            flag_name = "--" + name.replace("_", "-")
            refused.append(f"{flag_name} {getattr(self, name)!r} (accepted: {values})")
        if refused:
            raise ValueError(", ".join(refused))


def load_sources(flags):
    """Read the mixtures -> list of data.Source with distinct names."""
    sources = []
    for mixture in flags.mixture or [f"{flags.data}/mixture.json"]:
        if not os.path.isfile(mixture):
            hint = "; run `python -m mini render` first" if flags.preset == "mini" else ""
            raise ValueError(f"{mixture}: no such mixture{hint}")
        sources += load_mixture(mixture, [flags.data, *flags.root])

    count = collections.Counter(source.name for source in sources)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise ValueError(f"{flags.mixture}: two sources share a name: {twice}")
    return sources


ROWS_LOOKED_AT = 100  # per source, before anything is computed


def check_sources(sources, sampler, flags):
    """Look at some rows of each source before the run begins -> warnings, a list of texts.

    Raises ValueError naming a source that cannot be trained on: its media lie outside the allowed
    roots, no row can be used, or nothing would be contrasted with anything, a loss of 0.
    """
    warnings = []
    for source, batch, pass_rows in zip(sources, sampler.batch, sampler.rows, strict=True):
        look = look_at(source, [flags.data, *flags.root])
        if flags.remine and look.different > 1:
            look.hard_negatives += source.negatives
        warnings += check_usable(source, look)
        warnings += check_contrast(source, look, batch, pass_rows)
    return warnings


@dataclasses.dataclass
class Look:
    """What was seen in some rows of a source."""

    rows: int
    share: str  # "of 12", or "of 100 rows looked at" where the source has more
    outside: list  # reasons of rows whose media lie outside the allowed roots
    unusable: list  # reasons of other rows that cannot be used
    different: int  # queries or positives, the fewer of the two
    hard_negatives: int


def look_at(source, roots):
    """Load at most ROWS_LOOKED_AT rows of a source, evenly spaced, without their media -> Look."""
    looked_at = min(ROWS_LOOKED_AT, len(source))
    outside = []
    unusable = []
    queries = set()
    positives = set()
    hard_negatives = 0
    for row in np.linspace(0, len(source) - 1, looked_at).astype(int):
        try:
            query, positive, *negatives = source.load(int(row), roots)
        except OutsideRoots as error:
            outside.append(str(error))
            continue
        except ValueError as error:
            unusable.append(str(error))
            continue
        queries.add(content_id(query))
        positives.add(content_id(positive))
        hard_negatives += len(negatives)

    share = f"of {looked_at} rows looked at" if looked_at < len(source) else f"of {looked_at}"
    different = min(len(queries), len(positives))
    return Look(looked_at, share, outside, unusable, different, hard_negatives)


def check_usable(source, look):
    """Raise ValueError if the rows of a source cannot be used -> warnings."""
    outside = (
        f"source {source.name}: {len(look.outside)} {look.share} name media outside the allowed "
        "folders; "
    )
    if len(look.outside) > 0.9 * look.rows:
        raise ValueError(f"{outside}--root adds one. The first: {look.outside[0]}")
    if not look.different:
        raise ValueError(
            f"source {source.name}: none {look.share} can be used. The first: {look.unusable[0]}"
        )
    return [f"{outside}they will be replaced"] if look.outside else []


def check_contrast(source, look, batch, pass_rows):
    """Raise ValueError if a row of a source has nothing to be told from -> warnings.

    Rows of equal content are no negatives of each other. batch: the source's global batch.
    pass_rows: distinct rows of one pass over it.
    """
    different = look.different
    reason = None
    if pass_rows == 1:
        reason = "a pass over it is one row"
    elif batch == 1:
        reason = f"batch_size {source.batch_size} x --batch-scale makes a global batch of 1"
    elif different == 1:
        reason = f"{look.rows} {look.share} have the same query or the same positive"
    if reason and not look.hard_negatives:
        raise ValueError(
            f"source {source.name}: {reason}, and no hard negatives: its loss would be 0; "
            "remove its entry from the mixture, or give it more rows"
        )

    if look.rows < len(source) and 2 * different > look.rows:
        different = pass_rows  # too many to be counted in so few rows
    if 2 * different > batch:
        return []
    return [
        f"source {source.name}: different pairs: {different}, global batch: {batch}; "
        "few negatives make a weak source"
    ]


@contextlib.contextmanager
def hold_folder(out, rank):
    """Keep a folder for this run; raise ValueError on every rank while another run has it."""
    with contextlib.ExitStack() as stack:
        with fail_together():
            out.mkdir(parents=True, exist_ok=True)
            lock = out / "train.lock"
            if rank == 0 and not stack.enter_context(file_lock(lock, wait=False)):
                raise ValueError(
                    f"{out}: another run is writing to this folder (it holds {lock}); "
                    "wait until it has ended, or name another --out"
                )
        yield


class RunLog:
    """log.jsonl, one JSON line per event, and messages on the terminal, both from rank 0 only."""

    def __init__(self, out, rank, length=0):
        """Open <out>/log.jsonl and cut it after its first `length` bytes."""
        self.path = out / "log.jsonl"
        self.file = None
        if rank > 0:
            return
        # Unbuffered: each line is on its way to the disk at once, and a full disk is met here.
        self.file = open(self.path, "ab" if length else "wb", buffering=0)
        if length > self.path.stat().st_size:
            self.say(f"note: {self.path} has lost lines; what is left of it goes on")
            length = self.path.read_bytes().rfind(b"\n") + 1
        self.file.truncate(length)

    def event(self, name, **values):
        """Write one line: the event's name, the time, and its values."""
        if self.file:
            line = {"event": name, "time": round(time.time(), 3), **values}
            rest = (json.dumps(line) + "\n").encode()
            with name_what_failed(self.path):
                while rest:
                    rest = rest[self.file.write(rest) :]

    def length(self):
        """Return the length of the file in bytes, on rank 0."""
        return self.file.tell() if self.file else 0

    def say(self, text):
        """Print a message, above the progress bar if there is one."""
        if self.file:
            tqdm.write(text)
            sys.stdout.flush()  # a batch job's output is a file


def with_vision_features(gve, group, store=None):
    """Yield a group's micro-batches with the frozen vision tower's features in place of pixels."""
    for micro_batch in group.micro_batches:
        batch = gve.encode_vision(to_device(micro_batch, gve.device))
        if store:
            store.keep(batch)
        yield batch


@torch.no_grad()
def curve_sums(q, p, n, p_ids, n_ids, q_ids=None):
    """Return {name: sum over this rank's rows and candidates} for the curves of Figures 9 and 10.

    A gap is a positive's score minus that of the hardest negative. Answers to the query are not
    negatives, as in contrastive_loss. Only this rank's rows and candidates are looked at, so the
    curves move a little with the number of ranks.
    """
    q_ids = number_rows(q) if q_ids is None else q_ids
    scores = q @ torch.cat([p, n]).T  # (B, B + N)
    ids = torch.cat([p_ids, n_ids])
    positive = (q * p).sum(1)
    hardest = positive
    if scores.numel():
        answers = p_ids[:, None] == ids
        answers[:, : len(q)] |= q_ids[:, None] == q_ids
        hardest = scores.masked_fill(answers, -1).amax(1)
    return {
        "scores": scores.sum(),
        "n_scores": torch.tensor(scores.numel(), device=q.device),
        "positives": positive.sum(),
        "gaps": (positive - hardest).sum(),
        "rows": torch.tensor(len(q), device=q.device),
    }


# The dry run: what a step needs, by arithmetic (memory.py) and by trying


def dry_run(flags, rank, world, device):
    """Print what a training step needs, by arithmetic and, where the weights are, by trying it.

    The arithmetic needs the base's config.json and no weights, data or GPU. The trial is a training
    step of the largest micro-batch of videos that the flags admit, then one of texts. Nothing is
    written. Returns the model that was tried; None without weights.
    """
    base, _ = find_full(flags.base)
    files = ("model.safetensors.index.json", "model.safetensors")
    has_weights = any(checkpoint_file(base, file) for file in files)
    if rank == 0:
        # What cannot be tried here is counted for the GPU that it will run on.
        device_type = device.type if has_weights else "cuda"
        room = CARD
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).total_memory
        is_fused = functools.partial(use_fused, flags.fused, flags.loss)
        print_memory(flags, world, device_type, room, is_fused)
    if not has_weights:
        if rank == 0:
            tqdm.write(f"{base}: no weights, so nothing was tried")
        return None

    gve, optimizer, collate = build_model(flags, rank, device)
    count = step_memory(gve.core, flags, device.type)
    collate.store = None  # nothing is written
    high, wide = frame_sides(flags.max_tokens)
    side = gve.geometry.token_side  # of a vision token, in pixels
    with tempfile.TemporaryDirectory() as folder:
        for i in range(flags.frames):
            Image.new("RGB", (wide * side, high * side)).save(f"{folder}/{i:04d}.png")
        samples = {
            "videos": collate.prepare({"video": folder}),
            "texts": collate.prepare({"text": "a " * flags.max_length}),
        }

    # A short step first: it makes gradients and AdamW's state, which every later step finds there.
    # PeakMemory prepares glibc for all steps alike.
    gve.train()
    with PeakMemory(device):
        try_step(gve, optimizer, [collate.prepare({"text": "a"})] * 2, collate, flags)
    for name, sample in samples.items():
        length = len(sample["ids"])
        patches = len(sample.get("pixel_values_videos", []))
        shape = BatchShape(1, length, patches).limited(flags.micro_batch, flags.micro_tokens)

        # One shorter sample makes the batch uneven, like real ones: attention then takes a mask.
        shorter = {**sample, "ids": sample["ids"][1:]}
        with PeakMemory(device) as peak:
            try_step(gve, optimizer, [sample] * (shape.items - 1) + [shorter], collate, flags)
        predicted = peak_bytes(count.micro_batch(shape))
        measured = peak.rise + sum(weight_bytes(gve.core).values())
        if rank > 0:
            continue
        tqdm.write(
            f"{shape.items} {name} of {length} tokens in a forward: {gib(measured)} GiB at peak, "
            f"{gib(predicted)} GiB by arithmetic ({predicted / measured - 1:+.1%})"
        )
    return gve


def try_step(gve, optimizer, samples, collate, flags):
    """Make a training step of one micro-batch whose items are queries and positives at once."""
    # One expression: a name for the pixels would keep them in memory.
    batch = gve.encode_vision(to_device(collate.batch(samples, raw=True), gve.device))
    cache = GradCache(gve, torch.zeros(0, gve.dim, device=gve.device))
    vectors = cache.forward([batch]) if flags.grad_cache else gve(batch)
    ids = torch.arange(len(vectors), device=gve.device)
    if use_fused(flags.fused, flags.loss, len(vectors), 0):
        loss = info_nce_dist(vectors, vectors, 1 / flags.temperature, p_ids=ids, q_ids=ids)
    else:
        compute_loss = LOSSES[flags.loss]
        loss = compute_loss(vectors, vectors, vectors[:0], ids, ids[:0], tau=flags.temperature)
    loss.backward()
    if flags.grad_cache:
        cache.backward()
    optimizer.step()


def build_model(flags, rank, device):
    """Load the model with LoRA -> (gve, its optimiser, its collator)."""
    torch.manual_seed(flags.seed)  # LoRA starts equal on every rank
    lora = {"lora_dropout": flags.dropout}
    gve = GVE.from_pretrained(
        flags.base,
        dtype=flags.dtype,
        device=device,
        lora=lora,
        pooling=flags.pooling,
        min_tokens=flags.min_tokens,
        positions=flags.positions,
    )
    if flags.checkpointing:
        gve.core.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(flags.seed + rank)  # dropout differs between ranks

    optimizer = torch.optim.AdamW(
        gve.lora_parameters().values(),
        lr=flags.lr,
        weight_decay=flags.weight_decay,
        fused=device.type == "cuda",
    )

    # Vision features belong to one vision tower: its weights name their folder.
    store = None
    if flags.features:
        store = FeatureStore(f"{flags.features}/{hash_weights(gve.core.visual)[:16]}")
    collate = gve.collator(
        frames=flags.frames,
        max_tokens=flags.max_tokens,
        max_length=flags.max_length,
        store=store,
    )
    return gve, optimizer, collate


def describe_sources(sources):
    """Return what the log says of each source, {name: facts}."""
    described = {}
    for source in sources:
        described[source.name] = {
            "task": source.task,
            "level": LEVEL[source.task],
            "samples": source.samples,
            "rows": len(source),
        }
    return described


def by_source(sources, values):
    """Name a value per source, for the log; None stays None."""
    if values is None:
        return None
    return {s.name: round(float(v), 5) for s, v in zip(sources, values, strict=True)}


def plan_epoch(flags, epoch, start, sources, sampler):
    """Draw the batches of a curriculum epoch -> ([(source number, row numbers) per step], about).

    about: the epoch's line in the log. By source: R_k and its standard error; P(k), the mean over
    the epoch's steps; the steps drawn in this epoch; by its end, the steps used and the passes; the
    quota (None where the schedule keeps none).

    flags: schedule, sigma_max, epochs, steps, seed. start: {"relevance", "error"}, R_k and their
    standard errors (K,), None without probing. sampler: at the epoch's first step; it moves on.
    """
    samples = [source.samples for source in sources]
    quotas = source_quotas(samples, sampler.batch, flags.steps)
    # A step of a larger batch sees more pairs, so a source's size is counted in its batches.
    sizes = [n / batch for n, batch in zip(samples, sampler.batch, strict=True)]
    of_epoch = epoch_steps(epoch, flags.epochs, int(quotas.sum()))
    sigma_t = sigma(epoch, flags.epochs, high=flags.sigma_max)
    numbers, share = draw_epoch(
        flags.schedule,
        start["relevance"],
        sigma_t,
        sizes,
        levels=[LEVEL[source.task] for source in sources],
        quotas=quotas,
        seed=flags.seed,
        taken=sampler.taken(),
        steps=of_epoch,
    )
    plan = [(k, sampler.draw(k)) for k in numbers]
    if not SCHEDULES[flags.schedule]["quotas"]:
        quotas = None
    about = {
        "epoch": epoch,
        "step": of_epoch.start,
        "steps": len(plan),
        "sigma": sigma_t,
        "schedule": flags.schedule,
        "R": by_source(sources, start["relevance"]),
        "R_error": by_source(sources, start["error"]),
        "P": by_source(sources, share),
        "drawn": by_source(sources, np.bincount(numbers, minlength=len(sources))),
        "used": by_source(sources, sampler.taken()),
        "quota": by_source(sources, quotas),
        "passes": by_source(sources, sampler.passes()),
    }
    return plan, about


def main(flags):
    """Train as the flags say -> the trained model (GVE); after a dry run: the one that it tried."""
    rank, world, device = join_ranks(flags.device)
    if flags.dry_run:
        gve = dry_run(flags, rank, world, device)
        leave_ranks()
        return gve

    # Data: sources, and who draws from them. Each machine may read files of its own.
    with fail_together():
        sources = load_sources(flags)
        sampler = Sampler(sources, flags.batch_scale, flags.seed)
        warnings = check_sources(sources, sampler, flags)
    facts = {source.name: source.facts() for source in sources}
    for other, theirs in enumerate(all_gather_object(facts)):
        changes = list_changes(facts, theirs)
        if changes:
            raise ValueError(f"rank {rank} and rank {other} read different data: {changes}")
    if rank == 0:
        for warning in warnings:
            tqdm.write(f"warning: {warning}", file=sys.stderr)

    with hold_folder(Path(flags.out), rank):
        gve = train(flags, sources, sampler, rank, world, device)
    leave_ranks()
    return gve


def train(flags, sources, sampler, rank, world, device):
    """Train on the sources that the sampler draws from -> the trained model (GVE)."""
    sizes = [source.samples for source in sources]
    schedule = SCHEDULES[flags.schedule]
    margin = None if flags.margin < 0 else flags.margin
    tau = flags.temperature
    roots = [flags.data, *flags.root]
    steps = int(source_quotas(sizes, sampler.batch, flags.steps).sum())

    # Model
    gve, optimizer, collate = build_model(flags, rank, device)
    parameters = list(gve.lora_parameters().values())

    # A new run, or one to resume
    out = Path(flags.out)
    config = dataclasses.asdict(flags) | {"world": world, "device": device.type}
    data_facts = {source.name: source.facts() for source in sources}
    base_hash = gve.core.fingerprint
    resumed = None  # the facts of the state to resume from, until its epoch is under way
    if flags.resume:
        with fail_together():
            folder, resumed = newest_state(out / "state")
            seen = describe_state(folder)
        check_same_state(all_gather_object(seen))
    commit = git_commit()
    if resumed:
        with fail_together():
            check_settings(out, resumed["config"], config)
            check_data(out, resumed.get("data", {}), data_facts)
            if base_hash != resumed.get("base_hash"):
                raise ValueError(
                    f"{out}: cannot resume: the weights of --base {flags.base} are not those that "
                    f"the run began with (--base {resumed['config']['base']})"
                )
            rng_states = load_state(folder, optimizer)  # (world, n)
        before = resumed.get("commit")
        if before != commit and rank == 0:
            tqdm.write(
                f"note: the state is of commit {before}, this is {commit}: numbers may differ"
            )
    elif rank == 0 and any((out / "state").glob("step-*")):  # another run's
        shutil.rmtree(out / "state.old", ignore_errors=True)
        os.replace(out / "state", out / "state.old")
    log = RunLog(out, rank, length=resumed["log"] if resumed else 0)

    about_sources = describe_sources(sources)
    trained = sum(p.numel() for p in parameters)
    log.event(
        "resume" if resumed else "start",
        config=config,
        commit=commit,
        steps=steps,
        torch=torch.__version__,
        trained=trained,
        sources=about_sources,
    )
    pairs = f"{sum(sampler.rows):,} pairs"
    if sum(sampler.rows) < sum(sizes):  # samples beyond a source's rows are repeats
        pairs += f" ({sum(sizes):,} with repeats)"
    log.say(
        f"{len(sources)} sources, {pairs}, {steps} steps on {world} x {device.type}, "
        f"{trained:,} trained weights -> {out}"
    )
    if resumed and resumed["step"] == steps:
        log.say(f"{out} holds a finished run of {steps} steps: nothing is left to train")
    elif resumed:
        log.say(f"going on after step {resumed['step']}, from {folder}")
    elif flags.resume:
        log.say(f"no state in {out / 'state'}: a new run begins")

    # What the loop calls: batches of this rank, the cost of a step, vectors, the loss
    load = TrainLoader(
        sources,
        collate,
        rank=rank,
        world=world,
        micro_batch=flags.micro_batch,
        micro_tokens=flags.micro_tokens,
        roots=roots,
        workers=flags.workers,
    )
    count_flops = step_flops(gve)
    peak = peak_flops(device, flags.dtype)
    # A rank without rows still takes part in the backward collectives, through these.
    vector_dtype = torch.float64 if flags.dtype == "float64" else torch.float32
    empty = torch.zeros(0, gve.dim, device=device, dtype=vector_dtype, requires_grad=True)
    caches = {role: GradCache(gve, empty) for role in ("query", "positive", "negative")}
    compute_loss = LOSSES[flags.loss]
    fused = []  # (K,) by the global batch, so that all ranks choose alike
    for source, global_batch in zip(sources, sampler.batch, strict=True):
        fused.append(use_fused(flags.fused, flags.loss, global_batch, source.negatives))
    plain = len(fused) - sum(fused)
    log.say(f"loss: fused kernel for {sum(fused)} sources, plain torch for {plain}")

    # Where the run stands
    first_epoch = resumed["epoch"] if resumed else 0
    step = resumed["step"] if resumed else 0
    bad_rows = set(resumed["bad_rows"]) if resumed else set()
    metrics = {}  # of the last log line
    # A bar where there is a terminal (None lets tqdm look); else a line now and then.
    no_bar = None if rank == 0 else True
    bar = tqdm(total=steps, initial=step, desc="train", disable=no_bar, dynamic_ncols=True)
    training_time = 0.0  # seconds of this process, without probing and saving
    steps_before = step
    for epoch in range(first_epoch, flags.epochs):
        # Where on the pyramid are we? A resumed run finds in its state how this epoch began.
        of_epoch = epoch_steps(epoch, flags.epochs, steps)
        start = resumed["epoch_start"] if resumed else None
        prober = gve
        if start is None:
            start = {"drawn": list(sampler.drawn), "relevance": None, "error": None}
            if epoch == 0 and flags.prober and (schedule["probes"] or flags.remine):
                prober = GVE.from_pretrained(flags.prober, dtype=flags.dtype, device=device)
            if schedule["probes"]:
                relevance, error = probe_sources(prober, sources, flags, rank, world)
                if flags.relevance == "task":
                    tasks = [source.task for source in sources]
                    relevance = relevance_by_task(relevance, sizes, tasks)
                start |= {"relevance": relevance, "error": error}

        # Draw the epoch's batches. A resumed run draws all of them again and skips those done.
        sampler.drawn = list(start["drawn"])
        plan, about = plan_epoch(flags, epoch, start, sources, sampler)
        trained_rows = list(start["drawn"])  # (K,) rows of each source that a step has used
        for k, rows in plan[: step - of_epoch.start]:
            trained_rows[k] += len(rows)

        if not resumed:
            title = f"{flags.schedule}, sigma {about['sigma']:.2f}"
            levels = {s.name: (LEVEL[s.task], s.task) for s in sources}
            log.say(f"\nepoch {epoch + 1}/{flags.epochs}, {title}")
            log.say(pyramid_table(about, levels))
            log.event("epoch", **about)

        # Mine hard negatives for the rows drawn.
        if flags.remine:
            mined = out / f"mined-{epoch}.jsonl"
            if resumed and step < of_epoch.stop:
                with fail_together():
                    read_mined(sources, mined)
            elif not resumed:
                mine_epoch(prober, sources, plan, flags, mined)
        del prober

        stream = load(plan[step - of_epoch.start :])
        if resumed:
            # Restore the random state last: the code above may draw random numbers.
            set_rng_state(device, rng_states[rank].clone())
        resumed = None
        gve.train()

        # Time since the last log line; probing and saving are not training time.
        clock = since = time.perf_counter()
        seen, waited, flops = 0, 0.0, 0.0
        for batch in stream:
            waited += time.perf_counter() - clock
            source = sources[batch.source]

            # Forward: this rank's queries, positives and hard negatives, each in row order.
            vectors = {}
            step_cost = 0.0
            for role in ("query", "positive", "negative"):
                group = getattr(batch, role)
                step_cost += sum(count_flops(micro_batch) for micro_batch in group.micro_batches)
                micro_batches = with_vision_features(gve, group, collate.store)
                if flags.grad_cache:
                    made = caches[role].forward(micro_batches)
                else:
                    made = torch.cat([*map(gve, micro_batches), empty])
                vectors[role] = made[group.order.to(device)]
            q = vectors["query"]  # (B, D)
            p = vectors["positive"]  # (B, D)
            n = vectors["negative"]  # (N, D)

            # Loss: this rank's share.
            q_ids = batch.query.ids.to(device)
            p_ids = batch.positive.ids.to(device)
            n_ids = batch.negative.ids.to(device)
            if fused[batch.source]:
                loss = info_nce_dist(
                    q,
                    p,
                    1 / tau,
                    n=n,
                    p_ids=p_ids,
                    n_ids=n_ids,
                    q_ids=q_ids,
                    margin=margin,
                    symmetric=flags.symmetric,
                )
            else:
                loss = compute_loss(
                    q,
                    p,
                    n,
                    p_ids,
                    n_ids,
                    q_ids=q_ids,
                    tau=tau,
                    margin=margin,
                    symmetric=flags.symmetric,
                )

            # Backward, and one sum over ranks.
            loss.backward()
            if flags.grad_cache:
                for cache in caches.values():
                    cache.backward()
            sums = {
                "loss": loss.detach(),
                **curve_sums(q, p, n, p_ids, n_ids, q_ids),
                "flops": torch.tensor(step_cost, device=device),
                "stops": torch.tensor(len(received_signals), device=device),
            }
            sums = sum_over_ranks(parameters, sums)
            # Free these now; otherwise they stay alive while the next batch is embedded.
            del vectors, made, micro_batches, q, p, n, loss

            # Step.
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, flags.clip or math.inf))
            if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: loss {sums['loss']}, gradient norm {norm}; "
                    f"source {source.name}, rows {batch.rows.tolist()}; "
                    f"nothing was saved over the last checkpoint in {out}"
                )
            lr = learning_rate(step, steps, flags.lr, flags.warmup)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Log: sums since the last line, unusable rows once each.
            step += 1
            trained_rows[batch.source] += len(batch.rows)
            seen += sums["rows"]
            flops += sums["flops"] / world
            for reason in batch.bad:
                if reason not in bad_rows:
                    bad_rows.add(reason)
                    tqdm.write(f"replaced an unusable row: {reason}", file=sys.stderr)

            if step % flags.log_every == 0 or step == steps:
                elapsed = time.perf_counter() - since
                metrics = {
                    "loss": sums["loss"],
                    "score": sums["scores"] / sums["n_scores"],
                    "positive": sums["positives"] / sums["rows"],
                    "gap": sums["gaps"] / sums["rows"],
                    "lr": lr,
                    "grad_norm": norm,
                    "items_per_s": seen / elapsed,
                    "waiting": waited / elapsed,
                    "memory_gib": peak_memory_gib(device),
                    "tflops": flops / elapsed / 1e12,  # of one rank, on average
                    "bad_rows": len(bad_rows),
                }
                if peak:
                    metrics["mfu"] = flops / elapsed / peak

                # Six digits are enough to compare runs, and keep the lines readable.
                metrics = {name: float(f"{value:.6g}") for name, value in metrics.items()}
                rows = int(sums["rows"])
                log.event("step", step=step, epoch=epoch, source=source.name, rows=rows, **metrics)
                seen, waited, flops, since = 0, 0.0, 0.0, time.perf_counter()

                training_time += elapsed
                rate = (step - steps_before) / training_time
                if rank == 0 and bar.disable:
                    left = tqdm.format_interval((steps - step) / rate)
                    tqdm.write(
                        f"step {step}/{steps}: loss {sums['loss']:.3f}, source {source.name}, "
                        f"{rate:.2f} steps/s, {left} left",
                        file=sys.stderr,
                    )
            bar.update()
            bar.set_postfix(loss=f"{sums['loss']:.3f}", source=source.name, refresh=False)

            # Save. Adapter and state are whole at every moment; a kill costs the steps since.
            saving = time.perf_counter()
            due = flags.save_every and step % flags.save_every == 0
            if due or step == of_epoch.stop or sums["stops"]:
                # Each rank has a random state of its own and has met bad rows of its own.
                of_ranks = all_gather_object((get_rng_state(device), bad_rows))
                data = {}
                for k, drawn in enumerate(trained_rows):
                    data[sources[k].name] = {"rows": len(sources[k]), "drawn": drawn}
                info = {
                    "config": config,
                    "step": step,
                    "seed": flags.seed,
                    "commit": commit,
                    "metrics": metrics,
                    "data": data,
                }
                facts = {
                    "step": step,
                    "epoch": epoch,
                    "epoch_start": start,
                    "config": config,
                    "data": data_facts,
                    "base_hash": base_hash,
                    "commit": commit,
                    "bad_rows": sorted(set().union(*(bad for _, bad in of_ranks))),
                    "log": log.length(),
                }
                rng = torch.stack([state for state, _ in of_ranks])
                with fail_together():
                    if rank == 0:
                        gve.save_pretrained(out, info=info)
                        save_state(out / "state", optimizer, rng, facts, flags.keep)

            if sums["stops"]:
                # All ranks have waited for rank 0 to save: torchrun kills those that are left 30 s
                # after the first exit.
                log.say(f"stopped after step {step} as asked; `--resume auto` continues from here")
                sys.exit(128 + (received_signals or [15])[0])  # 15: another rank got the signal
            clock = time.perf_counter()
            since += clock - saving
        training_time += clock - since  # of the steps since the last log line

    bar.close()
    bad_rows = set().union(*all_gather_object(bad_rows))  # every rank met its own
    log.event(
        "end", step=step, passes=by_source(sources, sampler.passes()), bad_rows=sorted(bad_rows)
    )
    log.say(
        f"\ntrained {step} steps; unusable rows replaced: {len(bad_rows)}; "
        f"checkpoint and log in {out}"
    )
    return gve


if __name__ == "__main__":
    install_signal_handlers()
    try:
        main(parse_flags(Flags, doc=__doc__, presets=PRESETS))
    except (ValueError, OSError, FloatingPointError) as problem:
        sys.exit(f"error: {problem}")
