"""Train GVE up the Modality Pyramid (arXiv 2510.27571, section 4 and A.8): one visible loop, one process or many under torchrun.

    python train.py                                                     # --preset mini, minutes on 2 cores
    torchrun --nproc-per-node 2 train.py                                # the same from two ranks
    torchrun --nproc-per-node 8 train.py --preset gve-3b --data DIR     # files of mixtures/gve-3b.json under DIR

Every step draws one source. At each curriculum epoch's start the prober Psi_t measures how well each source's pairs agree,
R_k = mean cosine of N_p positive pairs, and sources are drawn by P(k) = softmax(R_k / sigma_t) while sigma grows from 0.1 to 1.0:
well-aligned sources come first, the others catch up. What a run did is in <out>/log.jsonl, one JSON line per event.

Legend: K sources, G global batch, B this rank's rows, N hard negatives, D embedding dim.
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
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Collator, TrainLoader, content_id, load_mixture
from embed import encode
from extras.pyramid import table
from kernels.infonce import info_nce_dist
from model import GVE, to_device
from support.cache import FeatureStore, VectorCache, hash_weights
from support.checkpoint import (
    get_rng_state,
    install_signal_handlers,
    load_state,
    newest_state,
    received_signals,
    save_state,
    set_rng_state,
)
from support.files import git_commit, read_jsonl, write_jsonl
from support.flags import flag, parse_flags
from support.flops import multiply_adds, peak_flops, peak_memory_gib
from support.ranks import all_gather_object, join_ranks, leave_ranks, sum_over_ranks

# Figure 5, bottom up. # PAPER: the figure leaves out I2T and T2TI, which Tables 6 and 7 hold; both are level two here.
LEVELS = (
    ("T2T", "T2I"),
    ("TI2I", "TI2T", "TI2TI", "I2I", "I2T", "T2TI"),
    ("T2V", "I2V", "V2V"),
    ("TI2V", "TV2V"),
)
LEVEL = {task: level for level, tasks in enumerate(LEVELS, 1) for task in tasks}

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
    grad_cache=True,
)  # PAPER: cache off
PRESETS = {
    "mini": dict(
        base="mini/base",
        prober="mini/prober",
        data="runs/mini",
        mixture=["runs/mini/train/mixture.json"],
        out="runs/gve-mini",
        features="runs/features",
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


@dataclasses.dataclass
class Flags:
    preset: str = flag("mini", "defaults of the other flags", choices=list(PRESETS))
    base: str = flag("", "checkpoint to start from: Qwen2.5-VL, or a LoRA folder to go on with")
    data: str = flag("data", "folder of the training data; media may lie anywhere under it")
    mixture: list[str] = flag(
        [], "mixtures, joined; their files lie beside them or under DATA; none: DATA/mixture.json"
    )
    root: list[str] = flag([], "more folders that media may lie in")
    out: str = flag("", "checkpoint folder to write")
    prober: str = flag(
        "", "Psi_1, the first epoch's prober: any checkpoint; empty: the starting one"
    )
    schedule: str = flag(
        "pyramid", "how sources are drawn", choices=["pyramid", "proportional", "uniform", "staged"]
    )
    epochs: int = flag(
        3, "curriculum epochs; together they are one pass over the data"
    )  # PAPER: or three; its curves show one
    steps: int = flag(0, "optimiser steps; 0: sum over sources of ceil(samples / global batch)")
    sigma_min: float = flag(0.1, "sigma of the first epoch")
    sigma_max: float = flag(1.0, "sigma of the last epoch")
    probe_pairs: int = flag(32, "N_p, positive pairs per source for R_k")
    batch_scale: float = flag(1.0, "global batch of a source = its batch_size x this")
    remine: bool = flag(
        False,
        "mine hard negatives with Psi_t at each epoch's start, ahead of the files'; ranks share OUT",
    )
    micro_batch: int = flag(64, "items per forward")
    micro_tokens: int = flag(0, "tokens per forward, padding included; 0: no limit")
    grad_cache: bool = flag(False, "keep no graphs, embed twice: batches beyond memory (GradCache)")
    lr: float = flag(2e-3, "peak learning rate of AdamW, cosine to zero")
    warmup: float = flag(0.03, "share of the steps with rising rate (not given in the paper)")
    weight_decay: float = flag(0.1, "AdamW's weight decay")
    clip: float = flag(1.0, "largest gradient norm, 0 = no limit (not given in the paper)")
    dropout: float = flag(0.1, "LoRA dropout")
    temperature: float = flag(0.03, "tau of the loss")
    margin: float = flag(0.1, "a negative this far above the positive (cosine) is false; -1: off")
    symmetric: bool = flag(True, "add the candidate-to-query direction to the loss")
    frames: int = flag(8, "frames per video, even")
    max_tokens: int = flag(200, "vision tokens per video frame")
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
        "folder to keep the vision tower's output of every medium in, for sources of few media; empty: none",
    )
    resume: str = flag(
        "",
        "auto: go on from OUT's newest state, if it has one, with the same numbers",
        choices=["", "auto"],
    )
    save_every: int = flag(0, "steps between states to resume from; 0: at each epoch's end alone")
    keep: int = flag(2, "newest states to keep")
    log_every: int = flag(10, "steps between log lines")
    dry_run: bool = flag(
        False,
        "only try the largest micro-batch, forward and backward, print its memory, write nothing",
    )
    seed: int = flag(42, "of everything random")
    device: str = flag("", "cpu or cuda; empty: cuda where there is one")


def sigma(epoch, epochs, low=0.1, high=1.0):
    """Temperature of the source distribution in curriculum epoch 0..epochs-1: linear from low to high (a single epoch: low)."""
    return low if epochs == 1 else low + (high - low) * epoch / (epochs - 1)


def source_probabilities(schedule, relevance, sigma_t, sizes, levels, progress=0.0):
    """Return P (K,) over sources: `pyramid` softmax(R_k / sigma_t), `proportional` to size (GVE-s), `uniform`, or `staged`.

    relevance R (K,) cosines or None; sizes (K,) pairs; levels (K,) 1..4; progress in [0, 1): how far the run is. `staged` walks
    the levels one after the other, each for its share of the pairs, proportional to size inside.
    """
    sizes, levels = np.asarray(sizes, float), np.asarray(levels)
    if (
        schedule == "pyramid"
    ):  # PAPER: k is taken to be a source; its size does not count, as written
        z = np.asarray(relevance, float) / sigma_t
        weight = np.exp(z - z.max())
    elif schedule == "staged":
        ends = np.cumsum([sizes[levels == level].sum() for level in range(1, 5)]) / sizes.sum()
        weight = sizes * (levels == 1 + np.searchsorted(ends, progress, side="right"))
    else:
        weight = sizes if schedule == "proportional" else np.ones(len(sizes))
    return weight / weight.sum()


class Sampler:
    """Draw single-source global batches. What is drawn depends on seed, step and probabilities alone: every rank draws the same.

    A source's rows come without replacement and are reshuffled when exhausted (the last batch of a pass may be short).
    Replaying `draw` over the first n steps restores the position of step n.
    """

    def __init__(self, sources, batch_scale=1.0, seed=42):
        self.sources, self.seed = sources, seed
        self.rows = [min(s.samples, len(s)) for s in sources]  # (K,) distinct rows of one pass
        self.batch = [
            max(1, round(s.batch_size * batch_scale)) for s in sources
        ]  # (K,) G of each source
        self.drawn = [0] * len(sources)  # (K,) rows drawn so far
        self.order = functools.lru_cache(2 * len(sources))(self._order)

    def _order(self, k, epoch):
        subset = np.random.default_rng([self.seed, k]).permutation(len(self.sources[k]))[
            : self.rows[k]
        ]
        return np.random.default_rng([self.seed, k, epoch]).permutation(subset)

    def passes(self):
        """How often each source's rows have been drawn so far (K,)."""
        return [drawn / rows for drawn, rows in zip(self.drawn, self.rows, strict=True)]

    def draw(self, step, probabilities):
        """Draw step's batch under probabilities (K,) -> (source number, row numbers (<= G,) int64)."""
        k = int(np.random.default_rng([self.seed, step]).choice(len(self.sources), p=probabilities))
        epoch, at = divmod(self.drawn[k], self.rows[k])
        rows = self.order(k, epoch)[at : at + self.batch[k]]
        self.drawn[k] += len(rows)
        return k, rows


def embed_pairs(gve, source, rows, flags, cache=None):
    """Embed queries and positives of rows -> ([(row, positive)], (n, D), (n, D)); training will list unusable ones."""
    pairs = []
    for row in rows:
        with contextlib.suppress(ValueError):
            pairs.append((int(row), *source.load(int(row), [flags.data, *flags.root])[:2]))
    options = {
        name: getattr(flags, name) for name in ("workers", "frames", "max_tokens", "max_length")
    } | {"cache": cache}
    q, bad = encode(gve, [query for _, query, _ in pairs], source.instruction, **options)
    p, worse = encode(gve, [positive for *_, positive in pairs], **options)
    good = [i for i in range(len(pairs)) if i not in bad | worse]
    if not q[good].isfinite().all() or not p[good].isfinite().all():
        raise FloatingPointError(
            f"source {source.name}: the prober gives vectors that are not finite"
        )
    return [(pairs[i][0], pairs[i][2]) for i in good], q[good], p[good]


def probe(gve, sources, flags, rank=0, world=1):
    """Measure R_k, the mean cosine of N_p positive pairs per source -> (R (K,), standard error (K,)); ranks share the work."""
    sums = torch.zeros(len(sources), 3, dtype=torch.float64)
    for k, source in enumerate(sources):
        rows = np.random.default_rng([flags.seed, k]).permutation(len(source))[: flags.probe_pairs][
            rank::world
        ]
        _, q, p = embed_pairs(gve, source, rows, flags)
        cosine = (q * p).sum(1).double()
        sums[k] = torch.stack([cosine.sum(), (cosine**2).sum(), torch.tensor(float(len(cosine)))])
    if world > 1:
        sums = sums.to(gve.device)
        dist.all_reduce(sums)
    total, squares, n = sums.cpu().T
    if (n == 0).any():
        empty = [source.name for source, count in zip(sources, n, strict=True) if count == 0]
        raise ValueError(
            f"sources {empty}: none of {flags.probe_pairs} probed pairs can be used; try `python data.py check`"
        )
    mean = total / n
    return mean.numpy(), (
        (squares / n - mean**2).clamp(min=0) / (n - 1).clamp(min=1)
    ).sqrt().numpy()


def mine(gve, source, rows, flags, cache=None):
    """Mine hard negatives of rows under the prober Psi_t (section 4.2) -> {row: items}: the distinct positives of these rows that
    score highest for the query, but none of its own positive's content and none above that by the margin."""
    # PAPER: mines "a large external corpus"; here the pool is what an epoch draws of the source itself.
    pairs, q, p = embed_pairs(gve, source, sorted(rows), flags, cache)
    ids, found = torch.tensor([content_id(item) for _, item in pairs]), {}
    first = torch.from_numpy(np.unique(ids, return_index=True)[1])  # (U,) one row of each content
    pool, kinds = p[first].to(gve.device), ids[first].to(gve.device)  # (U, D), (U,)
    for block in torch.arange(len(pairs)).split(1024):
        own, same = (
            (q[block] * p[block]).sum(1, keepdim=True).to(gve.device),
            ids[block].to(gve.device)[:, None] == kinds,
        )
        scores = q[block].to(gve.device) @ pool.T  # (1024, U)
        barred = same | (scores > own + (math.inf if flags.margin < 0 else flags.margin))
        best, at = (
            x.cpu()
            for x in scores.masked_fill(barred, -math.inf).topk(min(source.negatives, len(first)))
        )
        for i, score, which in zip(block.tolist(), best, first[at], strict=True):
            found[pairs[i][0]] = [pairs[j][1] for j in which[score > -math.inf].tolist()]
    return found


def rehearse(gve, optimizer, collate, flags):
    """Go through the largest micro-batch of videos, then of texts, that the flags admit, alone: print tokens and peak memory."""
    high = math.isqrt(flags.max_tokens)
    grid = torch.tensor(
        [[flags.frames // 2, 2 * high, 2 * (flags.max_tokens // high)]]
    )  # in patches, 2 x 2 to a token
    video = {
        "pixel_values_videos": torch.zeros(int(grid.prod()), 1176, dtype=torch.uint8),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.ones(1),
    }
    for name, sample in (("videos", video), ("texts", {})):
        text = "a " * flags.max_length if name == "texts" else ""
        sample["ids"] = collate.tokenise(text, "", sample)
        length = len(sample["ids"])
        n = min(
            flags.micro_batch,
            max(1, flags.micro_tokens // length) if flags.micro_tokens else flags.micro_batch,
        )
        short = sample | {
            "ids": sample["ids"][1:]
        }  # uneven, as real ones are: attention with a mask
        vectors, again = embed_parts(
            gve.train(), [collate.batch([sample] * (n - 1) + [short], raw=True)], flags.grad_cache
        )
        info_nce_dist(vectors, vectors, 1 / flags.temperature).backward()
        replay(gve, vectors, again)
        optimizer.step()
        tqdm.write(
            f"{n} {name} of {length} tokens in a forward: {peak_memory_gib(gve.device):.2f} GiB at peak"
        )


def embed_parts(gve, micro, cached=False, store=None):
    """Embed a list of collated micro-batches -> (vectors (rows, D), what `replay` needs); the vision tower runs here, once.

    cached (GradCache, arXiv 2101.06983): no graph is kept; the vectors are a leaf, and their gradient goes through a second
    forward, one micro-batch after the other. None of them: an empty leaf, so that this rank joins in backward.
    """
    made, again = [], []
    with torch.set_grad_enabled(not cached):
        for batch in micro:
            batch = gve.encode_vision(to_device(batch, gve.device))
            if store:
                store.keep(batch)
            again.append((batch, get_rng_state(gve.device)))
            made.append(gve(again[-1][0]))
    empty = torch.zeros(
        0,
        gve.dim,
        device=gve.device,
        dtype=torch.float64 if gve.core.dtype == torch.float64 else torch.float32,
    )
    vectors = torch.cat([*made, empty])
    return (vectors.requires_grad_(), again) if cached or not micro else (vectors, [])


def replay(gve, vectors, again):
    """Send d loss / d vectors through fresh forwards of the same micro-batches, with the same dropout."""
    after, at = get_rng_state(gve.device), 0
    for batch, before in again:
        set_rng_state(gve.device, before)
        made = gve(batch)
        made.backward(vectors.grad[at : at + len(made)])
        at += len(made)
    set_rng_state(gve.device, after)


def curve_sums(q, p, n, p_ids, n_ids):
    """Sums for the paper's curves (Figures 9, 10) over this rank's rows and candidates -> (5,): scores, their number, positives,
    positive minus hardest negative, rows. A candidate with the positive's content is no negative."""
    scores, ids = q @ torch.cat([p, n]).T, torch.cat([p_ids, n_ids]).to(q.device)  # (B, B + N)
    positive = (q * p).sum(1)
    hardest = (
        scores.masked_fill(ids == ids[: len(q), None], -1).amax(1) if scores.numel() else positive
    )
    return torch.stack(
        [
            scores.sum(),
            scores.new_tensor(scores.numel()),
            positive.sum(),
            (positive - hardest).sum(),
            scores.new_tensor(len(q)),
        ]
    )


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over a share of the steps, then cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def main(flags):
    rank, world, device = join_ranks(flags.device)
    kind = device.type
    sources = []
    for mixture in flags.mixture or [f"{flags.data}/mixture.json"]:
        if not os.path.isfile(mixture):
            hint = "; run `python -m mini render` first" if flags.preset == "mini" else ""
            raise ValueError(f"{mixture}: no such mixture{hint}")
        sources += load_mixture(mixture, [flags.data, *flags.root])
    if twice := [name for name, n in collections.Counter(s.name for s in sources).items() if n > 1]:
        raise ValueError(f"{flags.mixture}: two sources share a name: {twice}")
    sampler = Sampler(sources, flags.batch_scale, flags.seed)
    sizes, levels = [s.samples for s in sources], [LEVEL[s.task] for s in sources]
    steps = flags.steps or sum(
        math.ceil(size / batch) for size, batch in zip(sizes, sampler.batch, strict=True)
    )
    torch.manual_seed(flags.seed)  # LoRA starts equal on every rank
    gve = GVE.from_pretrained(
        flags.base, dtype=flags.dtype, device=device, lora={"lora_dropout": flags.dropout}
    )
    if flags.checkpointing:
        gve.core.language_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    parameters = list(gve.lora_parameters().values())
    needed, peak = multiply_adds(gve), peak_flops(device, flags.dtype)
    optimizer = torch.optim.AdamW(
        parameters, lr=flags.lr, weight_decay=flags.weight_decay, fused=kind == "cuda"
    )
    store = (
        FeatureStore(f"{flags.features}/{hash_weights(gve.core.visual)[:16]}")
        if flags.features
        else None
    )
    collate = Collator(
        gve.processor,
        frames=flags.frames,
        max_tokens=flags.max_tokens,
        max_length=flags.max_length,
        prompt_style=gve.prompt_style,
        store=store,
    )
    torch.manual_seed(flags.seed + rank)  # dropout differs between ranks

    if flags.dry_run:
        return rehearse(gve, optimizer, collate, flags)
    out, log_file, config = Path(flags.out), None, dataclasses.asdict(flags) | {"world": world}
    folder, resumed = newest_state(out / "state", config) if flags.resume else (None, None)
    rng = load_state(folder, optimizer) if resumed else None
    if rank == 0:
        if not resumed and (out / "state").exists():  # another run's
            shutil.rmtree(out / "state.old", ignore_errors=True)
            os.replace(out / "state", out / "state.old")
        out.mkdir(parents=True, exist_ok=True)
        log_file = open(out / "log.jsonl", "a" if resumed else "w")
        log_file.truncate(
            resumed["log"] if resumed else 0
        )  # what came after the state is done again

    def log(event, **values):
        if log_file:
            log_file.write(
                json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
            )
            log_file.flush()

    def named(values):
        return (
            None
            if values is None
            else {s.name: round(float(v), 5) for s, v in zip(sources, values, strict=True)}
        )

    def say(text):
        if rank == 0:
            tqdm.write(text)

    trained = sum(p.numel() for p in parameters)
    facts = {
        s.name: {"task": s.task, "level": LEVEL[s.task], "samples": s.samples, "rows": len(s)}
        for s in sources
    }
    log(
        "resume" if resumed else "start",
        config=config,
        commit=git_commit(),
        steps=steps,
        torch=torch.__version__,
        trained=trained,
        sources=facts,
    )
    say(
        f"{len(sources)} sources, {sum(sizes):,} pairs, {steps} steps on {world} x {kind}, {trained:,} trained weights -> {out}"
    )

    bad_rows, step, last = (
        set(resumed["bad_rows"] if resumed else ()),
        resumed["step"] if resumed else 0,
        {},
    )
    bar = tqdm(total=steps, initial=step, desc="train", disable=rank != 0, dynamic_ncols=True)
    for epoch in range(resumed["epoch"] if resumed else 0, flags.epochs):
        # -- where on the pyramid are we: probe, then draw this epoch's batches --
        first_step, last_step = (round(e * steps / flags.epochs) for e in (epoch, epoch + 1))
        sigma_t, relevance, error = (
            sigma(epoch, flags.epochs, flags.sigma_min, flags.sigma_max),
            None,
            None,
        )
        if resumed:
            sampler.drawn, relevance, error = (
                resumed["drawn"],
                resumed["relevance"],
                resumed["error"],
            )
        else:
            other = epoch == 0 and flags.prober and (flags.remine or flags.schedule == "pyramid")
            prober = (
                GVE.from_pretrained(flags.prober, dtype=flags.dtype, device=device)
                if other
                else gve
            )
            if flags.schedule == "pyramid":
                relevance, error = (x.tolist() for x in probe(prober, sources, flags, rank, world))
        drawn, plan, share = list(sampler.drawn), [], np.zeros(len(sources))
        for s in range(first_step, last_step):
            p = source_probabilities(flags.schedule, relevance, sigma_t, sizes, levels, s / steps)
            share += p / (last_step - first_step)
            plan.append(sampler.draw(s, p))
        if not resumed:
            about = {
                "epoch": epoch,
                "step": step,
                "steps": len(plan),
                "sigma": sigma_t,
                "schedule": flags.schedule,
                "R": named(relevance),
                "R_error": named(error),
                "P": named(share),
                "passes": named(sampler.passes()),
                "level_P": {
                    str(level): round(float(share[np.array(levels) == level].sum()), 5)
                    for level in range(1, 5)
                },
            }
            say(
                f"\nepoch {epoch + 1}/{flags.epochs}, sigma {sigma_t:.2f}, schedule {flags.schedule}\n"
                + table(about, {s.name: (LEVEL[s.task], s.task) for s in sources})
            )
            log("epoch", **about)
        if flags.remine and resumed:
            for source, (_, found) in zip(
                sources, read_jsonl(out / f"mined-{epoch}.jsonl"), strict=True
            ):
                source.mined = {int(row): items for row, items in found.items()}
        elif flags.remine:
            cache = VectorCache(out / "cache", prober)  # the ranks share the work
            for k, source in enumerate(sources):
                rows = {
                    row
                    for at, rows in plan
                    if at == k and source.negatives
                    for row in rows.tolist()
                }
                source.mined = mine(prober, source, rows, flags, cache) if rows else {}
            all_gather_object(None)  # all have read the cache
            if rank == 0:
                write_jsonl(out / f"mined-{epoch}.jsonl", [source.mined for source in sources])
                shutil.rmtree(out / "cache")
        load = TrainLoader(
            sources,
            collate,
            rank=rank,
            world=world,
            micro_batch=flags.micro_batch,
            micro_tokens=flags.micro_tokens,
            roots=[flags.data, *flags.root],
            workers=flags.workers,
        )
        stream = load(plan[step - first_step :])
        if resumed:
            set_rng_state(
                device, rng[rank].clone()
            )  # last of all: whatever comes before may draw numbers, too
        prober = resumed = None
        gve.train()
        clock = since = time.perf_counter()  # probing and saving are not training time
        seen, waited, macs = 0, 0.0, 0
        for batch in stream:
            waited, source = waited + time.perf_counter() - clock, sources[batch.source]
            # -- forward: queries, positives, hard negatives --
            groups = {"query": batch.query, "positive": batch.positive, "negative": batch.negative}
            parts = {
                name: embed_parts(gve, group.micro_batches, flags.grad_cache, store)
                for name, group in groups.items()
            }
            q, p, n = (parts[name][0][group.order.to(device)] for name, group in groups.items())
            p_ids, n_ids = batch.positive.ids.to(device), batch.negative.ids.to(device)
            # -- loss: this rank's share. # PAPER: Eq. (1) has a row's own hard negatives, no masks; as the released forward --
            loss = info_nce_dist(
                q,
                p,
                1 / flags.temperature,
                n=n,
                p_ids=p_ids,
                n_ids=n_ids,
                margin=None if flags.margin < 0 else flags.margin,
                symmetric=flags.symmetric,
            )
            # -- backward, and one sum over ranks --
            loss.backward()
            for part in parts.values():
                replay(gve, *part)
            with torch.no_grad():
                work = sum(needed(b) for group in groups.values() for b in group.micro_batches)
                names = "loss scores n_scores positives gaps rows work stops".split()
                values = [
                    loss.detach(),
                    *curve_sums(q, p, n, p_ids, n_ids),
                    torch.tensor(work),
                    torch.tensor(len(received_signals)),
                ]
                values = [value.double().to(device) for value in values]
            sums = sum_over_ranks(parameters, dict(zip(names, values, strict=True)))
            loss_sum, scores, n_scores, positives, gaps, rows, work, stops = sums.values()
            parts = q = p = n = loss = None  # the next step's come before these would go
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, flags.clip or math.inf))
            if not math.isfinite(loss_sum) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {step}: loss {loss_sum}, gradient norm {norm}; source {source.name}, rows "
                    f"{batch.rows.tolist()}; nothing was saved over the last checkpoint in {out}"
                )
            # -- step --
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, flags.lr, flags.warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -- log --
            step, seen, macs = step + 1, seen + rows, macs + work / world
            for reason in batch.bad:
                if reason not in bad_rows:
                    bad_rows.add(reason)
                    tqdm.write(f"replaced an unusable row: {reason}", file=sys.stderr)
            if step % flags.log_every == 0 or step == steps:
                elapsed = time.perf_counter() - since
                last = {
                    "loss": loss_sum,
                    "score": scores / n_scores,
                    "positive": positives / rows,
                    "gap": gaps / rows,
                    "lr": group["lr"],
                    "grad_norm": norm,
                    "items_per_s": seen / elapsed,
                    "waiting": waited / elapsed,
                    "memory_gib": peak_memory_gib(device),
                    "tflops": 2e-12 * macs / elapsed,
                    "bad_rows": len(bad_rows),
                    **({"mfu": 2 * macs / elapsed / peak} if peak else {}),
                }  # tflops, mfu: of one rank, on average
                last = {k: float(f"{v:.6g}") for k, v in last.items()}
                log("step", step=step, epoch=epoch, source=source.name, rows=int(rows), **last)
                seen, waited, macs, since = 0, 0.0, 0, time.perf_counter()
            bar.update()
            bar.set_postfix(loss=f"{loss_sum:.3f}", source=source.name, refresh=False)
            # -- save: the adapter and the state are whole at every moment --
            saving = time.perf_counter()
            if step == last_step or stops or flags.save_every and step % flags.save_every == 0:
                states, bad = zip(
                    *all_gather_object((get_rng_state(device), bad_rows)), strict=True
                )
                if rank == 0:
                    gve.save_pretrained(
                        out,
                        info={
                            "config": config,
                            "step": step,
                            "seed": flags.seed,
                            "commit": git_commit(),
                            "metrics": last,
                            "data": {
                                s.name: {"rows": len(s), "drawn": d}
                                for s, d in zip(sources, sampler.drawn, strict=True)
                            },
                        },
                    )
                    save_state(
                        out / "state",
                        optimizer,
                        torch.stack(states),
                        {
                            "step": step,
                            "epoch": epoch,
                            "drawn": drawn,
                            "relevance": relevance,
                            "error": error,
                            "config": config,
                            "bad_rows": sorted(set().union(*bad)),
                            "log": log_file.tell(),
                        },
                        flags.keep,
                    )
            if stops:
                all_gather_object(
                    None
                )  # rank 0 has saved: 30 s after the first exit torchrun kills the rest
                say(f"stopped after step {step} as asked; `--resume auto` goes on from here")
                sys.exit(128 + (received_signals or [15])[0])  # 15: the signal came to another rank
            clock = time.perf_counter()
            since += clock - saving
    bar.close()
    bad_rows = set().union(*all_gather_object(bad_rows))  # every rank met its own
    log("end", step=step, passes=named(sampler.passes()), bad_rows=sorted(bad_rows))
    say(
        f"\ntrained {step} steps; {len(bad_rows)} unusable rows replaced; checkpoint and log in {out}"
    )
    leave_ranks()
    return gve


if __name__ == "__main__":
    install_signal_handlers()
    try:
        main(parse_flags(Flags, doc=__doc__, presets=PRESETS))
    except (ValueError, OSError, FloatingPointError) as problem:
        sys.exit(f"error: {problem}")
