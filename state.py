"""What a run needs beside the method: its ranks, signals, the work it does, and a state on disk to go on from as if nothing had
happened.

    <out>/state/step-N/tensors.safetensors    LoRA weights, AdamW's moments, each rank's random state
    <out>/state/step-N/facts.json             step, epoch, curriculum state, flags, where the log stood

A state is written beside its place, synced and renamed, so that what has the name is whole. train.py --resume auto reads it.
"""

import datetime
import json
import math
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PATIENCE = datetime.timedelta(days=7)  # ranks wait for the slowest one's clips; torchrun sees to it if one dies
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,  # from the maker's data sheets
        "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12}
STOP = []  # the signals that asked this process to stop


def heed_signals():
    """Let SIGTERM and SIGINT end the run after the step at hand: saved, exit status 128 + the signal's number."""
    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, lambda number, _: STOP.append(number))


def join_ranks():
    """Join torchrun's other processes, where it started this one -> rank."""
    if "RANK" not in os.environ:
        return 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=PATIENCE)
    return dist.get_rank()


def memory(device):
    """Peak GiB: of the GPU where there is one, else of this process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process) / 2**30


def peak_flops(device, dtype):
    """Operations a second that this GPU promises in dense bfloat16; None for others and where nobody has looked it up."""
    return PEAK.get(torch.cuda.get_device_name(device)) if device.type == "cuda" and dtype == "bfloat16" else None


def multiply_adds(gve):
    """Return a function: collated batch -> the multiply-adds that one training step needs for it, the vision tower and the
    language model forward and, for LoRA's sake, the latter backward.

    Not counted: padding, gradients of frozen weights, recomputation, what causality or a vision window hides, norms, the loss.
    Counted although only the pooled token needs it: the last layer of all other tokens.
    """
    text, vision, visual = gve.core.config.text_config, gve.core.config.vision_config, gve.core.visual
    layers, merge, full = gve.core.language_model.layers, vision.spatial_merge_size, len(vision.fullatt_block_indexes)
    weights = {name: m.weight.numel() for name, m in layers.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = sum(n for name, n in weights.items() if ".lora_" in name)  # these have a gradient of their own
    first = sum(n for name, n in weights.items()  # the embeddings, which these read, need none
                if name.startswith("0.self_attn") and ".o_proj" not in name and ".lora_B" not in name)
    per_token = 2 * sum(weights.values()) + lora - first
    per_pair = 6 * text.num_hidden_layers * text.num_attention_heads * layers[0].self_attn.head_dim  # scores, values; thrice
    matrices = {name: p.numel() for name, p in visual.named_parameters() if p.dim() > 1}
    per_patch = sum(n / merge**2 if name.startswith("merger") else n for name, n in matrices.items())
    window = vision.window_size // vision.patch_size // merge  # its side in cells of merge x merge patches

    def count(batch):
        macs = sum(n * per_token + n * (n + 1) // 2 * per_pair for n in batch["attention_mask"].sum(1).tolist())
        for kind in ("image", "video"):
            grids = batch[f"{kind}_grid_thw"].tolist() if f"{kind}_grid_thw" in batch else []
            known = batch.get(f"{kind}_features", [None] * len(grids))  # those from the store cost nothing
            for t, h, w in (grid for grid, features in zip(grids, known, strict=True) if features is None):
                sides = ([min(window, n // merge - at) for at in range(0, n // merge, window)] for n in (h, w))
                near = merge**4 * math.prod(sum(n * n for n in side) for side in sides)  # pairs of patches that share a window
                macs += t * h * w * per_patch + 2 * vision.hidden_size * t * (full * (h * w) ** 2 + (vision.depth - full) * near)
        return macs
    return count


def commit():
    """The checked-out commit, for the record; None outside a git checkout."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or None


def everyones(value, world):
    """Every rank's value, in rank order."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def reduce_sum(parameters, extra):
    """Sum gradients and a vector of scalars over all ranks with one flat all-reduce; returns the summed vector (float64).

    Each rank's gradient is its part of the gradient of the *global* mean loss, so parts are added, never averaged.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not dist.is_initialized():
        return extra
    flat = torch.cat([p.grad.flatten() for p in parameters] + [extra.to(parameters[0].dtype)])
    dist.all_reduce(flat)
    for p in parameters:
        p.grad.copy_(flat[: p.numel()].view_as(p))
        flat = flat[p.numel():]
    return flat.double()


def rng_state(device, state=None):
    """Return the random state that dropout draws from on this device; set it first where one is given."""
    if device.type == "cuda":
        get, put = (lambda: torch.cuda.get_rng_state(device)), (lambda s: torch.cuda.set_rng_state(s, device))
    else:
        get, put = torch.get_rng_state, torch.set_rng_state
    if state is not None:
        put(state)
    return get()


def save_state(folder, optimizer, rng, facts, keep):
    """Write folder/step-N: weights and moments of the optimiser's parameters, rng (world, n) uint8, facts; keep the newest."""
    tensors, part = {"rng": rng}, folder / "part"
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"{i}.weight": p.detach(), **{f"{i}.{name}": value for name, value in optimizer.state[p].items()}}
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / "tensors.safetensors")
    (part / "facts.json").write_text(json.dumps(facts))
    for path in (*part.iterdir(), part):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    final = folder / f"step-{facts['step']:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def newest_state(folder, config):
    """Find the newest state -> (its folder, its facts), or None twice; one that was not finished has no such name.

    config: this run's flags; a ValueError names those that are not the state's, but for `resume`, `keep` and `save_every`.
    """
    states = sorted(folder.glob("step-*"))
    if not states:
        return None, None
    try:
        facts = json.loads((states[-1] / "facts.json").read_text())
    except ValueError as error:
        raise ValueError(f"{states[-1] / 'facts.json'}: damaged ({error}); remove its folder to use the one before") from error
    changed = {key: (then, config[key]) for key, then in facts["config"].items() if then != config[key]}
    if changed.keys() - {"resume", "keep", "save_every"}:
        raise ValueError(f"{folder.parent}: cannot resume with other settings (then, now): {changed}")
    return states[-1], facts


def load_state(folder, optimizer):
    """Restore weights and optimiser from a state's folder -> every rank's random state (world, n) uint8."""
    try:
        tensors = load_file(folder / "tensors.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'tensors.safetensors'}: damaged ({error}); remove {folder} to use the one before") from error
    moments = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.data.copy_(tensors[f"{i}.weight"])
        moments[i] = {name: tensors[f"{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return tensors["rng"]
