"""States to resume training from, random states, and signals that ask a run to stop.

    <out>/state/step-N/tensors.safetensors    LoRA weights, AdamW's moments, ranks' random states
    <out>/state/step-N/facts.json             step, epoch and how it began, flags, sources, log
                                              position

A state is written beside its place, synced and renamed, so a folder with this name is complete.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import time

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.files import name_what_failed, sync_folder

# Flags that a resumed run may set anew: its numbers do not depend on them.
MAY_CHANGE = {
    "preset",  # only gives other flags their defaults, and they are compared
    *("resume", "keep", "save_every", "log_every", "dry_run"),  # when files are written
    *("workers", "features"),  # how media are decoded, not to which pixels
    # Places may move. The training files and the base are compared by their contents.
    *("out", "data", "mixture", "root", "base"),
}
received_signals = []  # signal numbers that asked this process to stop


def install_signal_handlers():
    """Note a signal to stop; train.py then finishes its step, saves, exits with 128 + number.

    SIGTERM and SIGINT, SIGUSR1 (with which SLURM warns before a job's time is over) and SIGHUP (the
    terminal is gone). Under nohup SIGHUP stays ignored.
    """
    # torchrun passes SIGTERM, SIGINT and SIGHUP on, and kills its ranks 30 s later. SIGUSR1 ends
    # torchrun itself, and its ranks train on, unless --signals-to-handle names it.

    def remember(number, frame):
        received_signals.append(number)

    def remember_hangup(number, frame):
        # Where the terminal is gone, the next word to it would end the run before it has saved.
        for output in (1, 2):
            try:
                os.write(output, b"")
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
        remember(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, remember)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, remember_hangup)


def get_rng_state(device):
    """Return the state of the random generator that dropout draws from on this device, uint8."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_rng_state(device, state):
    """Restore what get_rng_state returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def save_state(folder, optimizer, rng, facts, keep):
    """Write folder/step-N and delete all but the newest `keep` states.

    optimizer: its parameters and their moments are saved; rng (world, n) uint8; facts: a dict with
    "step"; keep: at least 1. An error of the disk names the state, and leaves the earlier ones.
    """
    facts = facts | {"saved": time.time()}  # no two states are the same
    tensors = {"rng": rng}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors[f"{i}.weight"] = p.detach()
        for name, value in optimizer.state[p].items():
            tensors[f"{i}.{name}"] = value

    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    final = folder / f"step-{facts['step']:08d}"
    try:
        with name_what_failed(final):
            part.mkdir(parents=True)
            save_file(tensors, part / "tensors.safetensors")
            (part / "facts.json").write_text(json.dumps(facts))
            sync_folder(part)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def newest_state(folder):
    """Find the newest complete state -> (its folder, its facts), or (None, None) if there is none.

    Raises ValueError naming the file that is damaged or gone.
    """
    states = sorted(folder.glob("step-*"))
    if not states:
        return None, None
    newest = states[-1]
    instead = f"remove {newest} to use the state before"
    for name in ("facts.json", "tensors.safetensors"):
        if not (newest / name).is_file():
            raise ValueError(f"{newest / name}: not there; {instead}")
    try:
        return newest, json.loads((newest / "facts.json").read_text())
    except ValueError as error:
        raise ValueError(f"{newest / 'facts.json'}: damaged ({error}); {instead}") from error


def describe_state(state):
    """Return what the ranks compare of a state: [this machine, its folder, step, hash].

    state: newest_state's folder; None gives [this machine, "no state", None, None].
    """
    machine = socket.gethostname()
    if state is None:
        return [machine, "no state", None, None]
    facts = (state / "facts.json").read_bytes()
    size = (state / "tensors.safetensors").stat().st_size
    digest = hashlib.sha256(facts + str(size).encode()).hexdigest()
    return [machine, str(state.resolve()), json.loads(facts)["step"], digest]


def check_same_state(seen):
    """Raise ValueError, naming two ranks, unless all of them see the same state.

    seen: describe_state's result of every rank.
    """
    for rank, (machine, place, step, digest) in enumerate(seen):
        first_machine, first_place, first_step, first_digest = seen[0]
        if (step, digest) != (first_step, first_digest):
            raise ValueError(
                f"cannot resume: the ranks do not see the same state. Rank 0 on {first_machine} "
                f"sees {first_place}, rank {rank} on {machine} sees {place}; --out must lie on a "
                "disk that is shared by all machines"
            )


def check_settings(out, then, now):
    """Raise ValueError naming every flag whose value is not the one that the state was made with.

    then, now: {flag: value}, of the state and of this run; one may hold flags that the other lacks.
    Those in MAY_CHANGE are not compared.
    """
    changed = {}
    for name in sorted((now.keys() | then.keys()) - MAY_CHANGE):
        before = then.get(name, "no such flag")
        after = now.get(name, "no such flag")
        if before != after:
            changed[name] = (before, after)
    if changed:
        raise ValueError(
            f"{out}: cannot resume with other settings (then, now): {changed}; to train "
            f"further with others, start a new run with --base {out} and another --out"
        )


def check_data(out, then, now):
    """Raise ValueError naming every source that is not what it was when the state was made.

    then, now: {source: {fact: value}} (data.Source.facts) of the state and of this run, in the
    mixture's order.
    """
    changes = list_changes(then, now)
    if changes:
        raise ValueError(
            f"{out}: cannot resume on other data (then -> now): {changes}; to train further on "
            f"it, start a new run with --base {out} and another --out"
        )


def list_changes(before, after):
    """Return in words how sources differ, by their names; "" if they do not.

    before, after: {source: {fact: value}}.
    """
    changes = []
    for name, facts in before.items():
        if name not in after:
            changes.append(f"source {name} is gone")
            continue
        for fact, value in facts.items():
            other = after[name].get(fact)
            if value != other:
                changes.append(f"source {name}: {fact} {value!r} -> {other!r}")
    for name in after:
        if name not in before:
            changes.append(f"source {name} is new")
    if not changes and list(before) != list(after):
        changes.append(f"order of the sources {', '.join(before)} -> {', '.join(after)}")
    return "; ".join(changes)


def load_state(folder, optimizer):
    """Restore weights and optimiser from a state -> each rank's random state (world, n) uint8."""
    path = folder / "tensors.safetensors"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged ({error}); remove {folder} to use the one before"
        ) from error

    moments = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.data.copy_(tensors[f"{i}.weight"])
        moments[i] = {name: tensors[f"{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return tensors["rng"]
