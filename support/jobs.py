"""Stages that many processes share and a killed run resumes.

    rows_by_part = run_sharded("runs/synth", "1-pool", parts, do)
    print_summary("runs/synth", "1-pool", rows)

A part is a list of jobs, dicts with an "id". do(p, jobs) returns one row per job, with its "id" and
"fate": "kept", "dropped" (with the reason under "why") or "failed" (the next run tries again).
"""

import collections
import json
import os
import re
import sys
import time
from pathlib import Path

from support.files import file_lock, load_jsonl, write_jsonl
from support.progress import report_progress

NAMED = 3  # rows that are named for each reason why rows were dropped


def run_sharded(out, stage, parts, do, shard="0/1"):
    """Do a stage's missing and failed jobs beside other processes that do the same.

    parts   lists of jobs. Part p's rows are a file below <out>/<stage>, whole or not there.
    do      do(p, jobs) -> rows, one per job, in any order.
    shard   "i/n" leaves all parts but i, i + n, i + 2n, ... to other machines.

    Returns the rows of each part. torchrun's ranks share the parts and leave a stage together.
    Raises ValueError while other shards have parts to do.
    """
    began = time.time()
    folder = Path(out) / stage
    folder.mkdir(exist_ok=True)
    if not re.fullmatch(r"\d+/[1-9]\d*", shard):
        raise ValueError(f"shard {shard!r}: wanted i/n")
    first, step = map(int, shard.split("/"))
    paths = [folder / f"{p:05}.jsonl" for p in range(len(parts))]
    order = own_parts_first(range(first, len(parts), step), step)

    # Take free parts: those that no process has done yet, and those with failures of earlier runs.
    for p in order:
        with file_lock(paths[p].with_suffix(".lock"), wait=False) as held:
            if held and (not paths[p].exists() or written_before(paths[p], began)):
                do_part(out, stage, p, paths, parts[p], do)

    # Wait for the rest: a process that held a part may have died without finishing it.
    with report_progress(None, f"{stage}: other processes are at the rest"):
        for p in order:
            with file_lock(paths[p].with_suffix(".lock")):
                if not paths[p].exists():
                    do_part(out, stage, p, paths, parts[p], do)

    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{stage}: {len(missing)} of {len(paths)} parts belong to other shards; "
            "run this again when they are done"
        )
    return list(map(load_jsonl, paths))


def own_parts_first(parts, step):
    """Order a shard's parts so that each of torchrun's ranks begins with different ones."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    return sorted(parts, key=lambda p: p // step % world != rank)


def written_before(path, began):
    """Say whether an earlier run wrote the file: failures of this run wait for the next one."""
    return path.stat().st_mtime <= began


def do_part(out, stage, p, paths, jobs, do):
    """Do the jobs of a part that have no row yet or failed, write all its rows, log the work."""
    path = paths[p]
    old = {}
    if path.exists():
        old = rows_by_id(load_jsonl(path))
    to_do = []
    for job in jobs:
        if job["id"] not in old or old[job["id"]]["fate"] == "failed":
            to_do.append(job)
    if not to_do and path.exists():
        return

    if to_do:
        print(f"{stage}: part {p + 1} of {len(paths)}, {len(to_do)} rows to do", flush=True)
    start = time.time()
    new = rows_by_id(do(p, to_do))
    seconds = round(time.time() - start, 2)
    write_jsonl(path, [new.get(job["id"]) or old[job["id"]] for job in jobs])

    event = {"stage": stage, "part": p, "seconds": seconds, "tokens": sum_tokens(new.values())}
    fates = collections.Counter(row["fate"] for row in new.values())
    with open(Path(out) / "log.jsonl", "a") as file:
        file.write(json.dumps(event | fates) + "\n")


def rows_by_id(rows):
    """Return {id: row}."""
    return {row["id"]: row for row in rows}


def sum_tokens(rows):
    """Add up "tokens", [read, written], of rows or log events; not all stages have them."""
    total_read = 0
    total_written = 0
    for row in rows:
        read, written = row.get("tokens", (0, 0))
        total_read += read
        total_written += written
    return [total_read, total_written]


def print_summary(out, stage, rows):
    """Print the number of rows kept, the reasons why others were not, by name, and the cost.

    Returns the seconds that one process would have taken.
    """
    groups = collections.defaultdict(list)  # (fate, reason) -> rows
    for row in rows:
        reason = row.get("why", "").split(":")[0]  # "unreadable: <file>: <details>"
        groups[row["fate"], reason].append(row)
    line = f"{stage}: kept {len(groups.pop(('kept', ''), []))} of {len(rows)}"
    for (fate, reason), alike in sorted(groups.items()):
        line += f", {fate} {len(alike)} ({reason})"

    events = []
    if rows:
        log = load_jsonl(Path(out) / "log.jsonl")
        events = [event for event in log if event["stage"] == stage]
    seconds = sum(event["seconds"] for event in events)
    read, written = sum_tokens(events)
    line += f"; {seconds:.0f} s of one process, {read} tokens read, {written} written"
    print(line)
    for (fate, reason), alike in sorted(groups.items()):
        for row in alike[:NAMED]:
            print(f"    {fate} {row['id']}: {row.get('why', '')[:150]}")
        if len(alike) > NAMED:
            print(f"    {fate}: {len(alike) - NAMED} more ({reason})")
    sys.stdout.flush()
    return seconds
