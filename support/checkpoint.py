"""States to resume training from, random states, and signals that ask a run to stop.

    <out>/state/step-N/tensors.safetensors    LoRA weights, AdamW's moments, ranks' random states
    <out>/state/step-N/facts.json             step, epoch and how it began, flags, log position

A state is written beside its place, synced and renamed, so a folder with this name is complete.
"""

import json
import os
import shutil
import signal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MAY_CHANGE = {"resume", "keep", "save_every"}  # flags that a resumed run may set anew
received_signals = []  # signal numbers that asked this process to stop


def install_signal_handlers():
    """Note SIGTERM and SIGINT; train.py then finishes its step, saves, exits with 128 + number."""

    def remember(number, frame):
        received_signals.append(number)

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, remember)


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
    "step".
    """
    tensors = {"rng": rng}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors[f"{i}.weight"] = p.detach()
        for name, value in optimizer.state[p].items():
            tensors[f"{i}.{name}"] = value

    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "tensors.safetensors")
    (part / "facts.json").write_text(json.dumps(facts))
    for path in (part / "tensors.safetensors", part / "facts.json", part):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    final = folder / f"step-{facts['step']:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_state(folder, config):
    """Find the newest complete state -> (its folder, its facts), or (None, None) if there is none.

    config: this run's flags. Raises ValueError naming every flag that the state was not made with
    (those in MAY_CHANGE excepted): one with another value, one that is new since then, one that no
    longer exists.
    """
    states = sorted(folder.glob("step-*"))
    if not states:
        return None, None
    path = states[-1] / "facts.json"
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); remove its folder to use the one before"
        ) from error

    changed = {}
    for name in sorted((config.keys() | facts["config"].keys()) - MAY_CHANGE):
        then = facts["config"].get(name, "no such flag")
        now = config.get(name, "no such flag")
        if then != now:
            changed[name] = (then, now)
    if changed:
        raise ValueError(
            f"{folder.parent}: cannot resume with other settings (then, now): {changed}; to train "
            f"further with others, start a new run with --base {folder.parent} and another --out"
        )
    return states[-1], facts


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
