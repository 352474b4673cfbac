"""Stages that many processes share and a killed run resumes."""

import collections
import itertools
import json
import os
import re
import time
from pathlib import Path

from support.files import file_lock, load_jsonl, write_jsonl


def run_sharded(out, stage, parts, do, shard="0/1"):
    """Do what is missing or failed of a stage's parts (lists of jobs with an "id") beside others who do the same -> rows by part.

    do(p, jobs) -> a row with "id" and "fate" per job. The first pass takes what is free, this rank's own parts first; the second
    waits for parts that others hold and finishes what they left, so that all ranks leave a stage together. `shard` "i/n" leaves
    all parts but i, i + n, ... to others; ranks are torchrun's. Raises ValueError while others have parts to do.
    """
    folder, began = Path(out) / stage, time.time()
    folder.mkdir(exist_ok=True)
    if not re.fullmatch(r"\d+/[1-9]\d*", shard):
        raise ValueError(f"shard {shard!r}: wanted i/n")
    (i, n), rank, world = (
        map(int, shard.split("/")),
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    paths, mine = [folder / f"{p:05}.jsonl" for p in range(len(parts))], range(i, len(parts), n)
    for wait, p in itertools.product(
        (False, True), sorted(mine, key=lambda p: p // n % world != rank)
    ):
        with file_lock(paths[p].with_suffix(".lock"), wait) as held:
            there = paths[p].exists()
            if (
                not held or there and (wait or paths[p].stat().st_mtime > began)
            ):  # this run's failures wait for the next run
                continue
            old, start = (
                {row["id"]: row for row in load_jsonl(paths[p])} if there else {},
                time.time(),
            )
            jobs = [
                job
                for job in parts[p]
                if job["id"] not in old or old[job["id"]]["fate"] == "failed"
            ]
            if jobs or not there:
                new = {row["id"]: row for row in do(p, jobs)}
                write_jsonl(paths[p], [new.get(job["id"]) or old[job["id"]] for job in parts[p]])
                tokens = [sum(row.get("tokens", (0, 0))[k] for row in new.values()) for k in (0, 1)]
                event = {
                    "stage": stage,
                    "part": p,
                    "seconds": round(time.time() - start, 2),
                    "tokens": tokens,
                }
                with open(Path(out) / "log.jsonl", "a") as file:
                    file.write(
                        json.dumps(event | collections.Counter(row["fate"] for row in new.values()))
                        + "\n"
                    )
    if missing := sum(not path.exists() for path in paths):
        raise ValueError(
            f"{stage}: {missing} of {len(paths)} parts belong to other shards; run this again when they are done"
        )
    return [load_jsonl(path) for path in paths]


def print_summary(out, stage, rows):
    """Print what a stage kept, why it did not keep the rest, and what that took -> seconds."""
    count = collections.Counter((row["fate"], row.get("why", "").split(":")[0]) for row in rows)
    lost = [f", {fate} {n} ({why})" for (fate, why), n in sorted(count.items()) if fate != "kept"]
    events = [e for e in load_jsonl(Path(out) / "log.jsonl") if e["stage"] == stage] if rows else []
    seconds, tokens = (
        sum(e["seconds"] for e in events),
        [sum(e["tokens"][k] for e in events) for k in (0, 1)],
    )
    print(
        f"{stage}: kept {count['kept', '']} of {len(rows)}{''.join(lost)}; {seconds:.0f} s of one process, {tokens[0]} tokens "
        f"read, {tokens[1]} written",
        flush=True,
    )
    return seconds
