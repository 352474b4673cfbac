"""Work in many processes, any of which may die: decoding ahead of a model, and stages that a killed run resumes.

    for i, sample in prepared(range(n), prepare, items.__getitem__, workers=4, seconds=60): ...       # embed.py, `data.py check`
    for batch in batches(plan, sources, collate, rank=0, world=8, workers=4): ...                     # train.py
    rows = share("out", "1-pool", parts, do)                                                          # synth.py

A decoder that crashes or hangs in C costs the one item that it had. A part's file appears whole under its name or not at all,
and its lock dies with the process that holds it.
"""

import collections
import contextlib
import ctypes
import fcntl
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data import content_id, micro_batches, read_jsonl


class Decoder(threading.local):
    """Call prepare(key) in a process of its own for each thread that asks. One that dies, or takes longer than `seconds`, is
    replaced: a decoder that hangs in C ends only with its process. -> (key, what prepare returns, or name(key) and the reason)"""
    process = None

    def __init__(self, prepare, name, seconds, lock):
        self.prepare, self.name, self.seconds, self.lock = prepare, name, seconds, lock

    @staticmethod
    def serve(parents, pipe, prepare):
        parents.close()  # an open copy would hide the parent's death
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: one that hangs would keep a dead rank's GPU memory
        os.setsid()  # what stops the parent's group is for the parent to heed: it still needs its clips for the step at hand
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # but its own way to heed it is not this process's
        torch.set_num_threads(1)
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:  # a plain pickle: torch's own would share the tensors' memory, which dies with this process
                pipe.send_bytes(pickle.dumps(prepare(pipe.recv()), pickle.HIGHEST_PROTOCOL))

    def __call__(self, key):
        if self.process is None:
            fork = multiprocessing.get_context("fork")  # what prepare knows need not be sent
            with self.lock:  # held while the model runs, too: a fork copies locks as they stand, its threads' as well
                self.pipe, theirs = fork.Pipe()
                self.process = fork.Process(target=self.serve, args=(self.pipe, theirs, self.prepare), daemon=True)
                self.process.start()
                theirs.close()
        try:
            self.pipe.send(key)
            if self.pipe.poll(self.seconds):
                return key, pickle.loads(self.pipe.recv_bytes())
            reason = f"not decoded within {self.seconds:g} s"
        except (EOFError, OSError):
            reason = "its decoder crashed"
        self.process.kill()
        self.process = None
        return key, f"{self.name(key)}: {reason}"


def prepared(order, prepare, name, workers, seconds, lock=None, depth=0, cores=False):
    """Yield (key, prepare(key)) in order, or (key, a reason that begins with name(key)) where its decoder died or took `seconds`.

    prepare runs in one of `workers` processes, which work ahead; with 0 of them it runs inline, without a limit.
    lock: held by the caller whenever it does something during which no process should fork. depth: how far ahead, at least.
    cores: until all is prepared torch has a thread less here for each of them; for callers that wait for their decoders.
    """
    if not workers:
        yield from ((key, prepare(key)) for key in order)
        return
    decoder = Decoder(prepare, name, seconds, lock or threading.Lock())
    threads, before = ThreadPoolExecutor(workers), torch.get_num_threads()
    futures = (threads.submit(decoder, key) for key in order)
    ahead = collections.deque(itertools.islice(futures, max(depth, 32 * workers)))  # to last while the model runs
    torch.set_num_threads(max(1, before - cores * workers))
    try:
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(itertools.islice(futures, 1))
    finally:
        torch.set_num_threads(before)
        threads.shutdown(cancel_futures=True)


def packed(sample):
    """A Collator's sample with arrays for tensors: they pickle four times as fast (bfloat16 has none)."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) and v.dtype != torch.bfloat16 else v for k, v in sample.items()}


def unpacked(sample):
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in sample.items()}


def batches(plan, sources, collate, *, rank=0, world=1, micro_batch=32, micro_tokens=0, roots=(), workers=0, seconds=60):
    """Yield one rank's share of every drawn batch, decoded ahead by `workers` processes and padded into micro-batches.

    plan: [(source number, row numbers)]. A row that cannot be used, or whose decoder dies or takes `seconds` (with workers), is
    replaced by the next usable one of its file, whatever the number of ranks, and listed under "bad". "query", "positive" and
    "negative" are lists of collated micro-batches; "..._at" finds each item's vector in them, "..._ids" are the content ids.
    """
    def prepare(key):  # -> [query, positive, *negatives], each as (sample, content id); the query alone carries the instruction
        source = sources[key[0]]

        def use(items):
            return [(packed(collate.prepare(x, None if n else source.instruction)), content_id(x)) for n, x in enumerate(items)]
        try:
            return source.load(key[1], roots, use)
        except ValueError as error:
            return str(error)

    def name(key):
        return sources[key[0]].where(key[1])

    def usable(key, made, bad):
        for attempt in range(1, 101):
            if not isinstance(made, str):
                return made
            bad.append(made)
            following = key[0], (key[1] + attempt) % len(sources[key[0]])
            made = spare(following)[1] if workers else prepare(following)
        raise ValueError(f"100 rows on end cannot be used, the last: {bad[-1]}")

    lock, keys = threading.Lock(), [(k, int(row)) for k, rows in plan for row in rows[rank::world]]
    depth = 2 * max((len(rows[rank::world]) for _, rows in plan), default=0)  # the next step's rows while this one's are used
    ahead, spare = prepared(keys, prepare, name, workers, seconds, lock, depth), Decoder(prepare, name, seconds, lock)
    for k, rows in plan:
        out = {"source": k, "rows": rows, "bad": []}
        made = [usable(*next(ahead), out["bad"]) for _ in rows[rank::world]]
        for part, which in (("query", slice(1)), ("positive", slice(1, 2)), ("negative", slice(2, None))):
            samples = [one for row in made for one in row[which]]
            groups = micro_batches([len(sample["ids"]) for sample, _ in samples], micro_batch, micro_tokens)
            out[part] = [collate.batch([unpacked(samples[i][0]) for i in group], raw=True) for group in groups]
            out[f"{part}_at"] = torch.tensor(sum(groups, []), dtype=torch.int64).argsort()
            out[f"{part}_ids"] = torch.tensor([number for _, number in samples], dtype=torch.int64)
        with lock:
            yield out


def read(path):
    return [row for _, row in read_jsonl(path)]


def write(path, rows, indent=None):
    """Write JSON lines (indented ones for people) under a temporary name and rename: the file is whole or not there."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, indent=indent) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def lock(path, wait=True):
    """Hold a lock that dies with its process; gives False where another holds it and wait is False."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held


def share(out, stage, parts, do, shard="0/1"):
    """Do what is missing or failed of a stage's parts (lists of jobs with an "id") beside others who do the same -> rows by part.

    do(p, jobs) -> a row with "id" and "fate" per job. The first pass takes what is free, this rank's own parts first; the second
    waits for parts that others hold and finishes what they left, so that all ranks leave a stage together. `shard` "i/n" leaves
    all parts but i, i + n, ... to others; ranks are torchrun's. Raises ValueError while others have parts to do.
    """
    folder, began = Path(out) / stage, time.time()
    folder.mkdir(exist_ok=True)
    if not re.fullmatch(r"\d+/[1-9]\d*", shard):
        raise ValueError(f"shard {shard!r}: wanted i/n")
    (i, n), rank, world = map(int, shard.split("/")), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths, mine = [folder / f"{p:05}.jsonl" for p in range(len(parts))], range(i, len(parts), n)
    for wait, p in itertools.product((False, True), sorted(mine, key=lambda p: p // n % world != rank)):
        with lock(paths[p].with_suffix(".lock"), wait) as held:
            there = paths[p].exists()
            if not held or there and (wait or paths[p].stat().st_mtime > began):  # this run's failures wait for the next run
                continue
            old, start = {row["id"]: row for row in read(paths[p])} if there else {}, time.time()
            jobs = [job for job in parts[p] if job["id"] not in old or old[job["id"]]["fate"] == "failed"]
            if jobs or not there:
                new = {row["id"]: row for row in do(p, jobs)}
                write(paths[p], [new.get(job["id"]) or old[job["id"]] for job in parts[p]])
                tokens = [sum(row.get("tokens", (0, 0))[k] for row in new.values()) for k in (0, 1)]
                event = {"stage": stage, "part": p, "seconds": round(time.time() - start, 2), "tokens": tokens}
                with open(Path(out) / "log.jsonl", "a") as file:
                    file.write(json.dumps(event | collections.Counter(row["fate"] for row in new.values())) + "\n")
    if missing := sum(not path.exists() for path in paths):
        raise ValueError(f"{stage}: {missing} of {len(paths)} parts belong to other shards; run this again when they are done")
    return [read(path) for path in paths]


def tell(out, stage, rows):
    """Print what a stage kept, why it did not keep the rest, and what that took -> seconds."""
    count = collections.Counter((row["fate"], row.get("why", "").split(":")[0]) for row in rows)
    lost = [f", {fate} {n} ({why})" for (fate, why), n in sorted(count.items()) if fate != "kept"]
    events = [e for e in read(Path(out) / "log.jsonl") if e["stage"] == stage] if rows else []
    seconds, tokens = sum(e["seconds"] for e in events), [sum(e["tokens"][k] for e in events) for k in (0, 1)]
    print(f"{stage}: kept {count['kept', '']} of {len(rows)}{''.join(lost)}; {seconds:.0f} s of one process, {tokens[0]} tokens "
          f"read, {tokens[1]} written", flush=True)
    return seconds
