"""The processes that torchrun starts: join them, gather objects, add up gradients.

rank, world, device = join_ranks("cuda")
with fail_together(): ...
sums = sum_over_ranks(parameters, {"loss": loss, "rows": rows})
leave_ranks()
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

# A rank may wait days for the slowest one's clips. If a rank dies, torchrun ends the others.
TIMEOUT = datetime.timedelta(days=7)


def join_ranks(device=""):
    """Join torchrun's other processes if it started this one -> (rank, world, torch.device).

    device: "cpu" or "cuda"; empty: cuda if there is one. On GPUs tensors travel by NCCL, objects by
    gloo.
    """
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)

    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks():
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather_object(value):
    """Return every rank's value in rank order; [value] in a single process. Also a barrier."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait until every rank has come this far."""
    all_gather_object(None)


@contextlib.contextmanager
def fail_together():
    """Raise on every rank the ValueError or OSError that one rank's block raises. Also a barrier.

    Otherwise the other ranks would wait for the failed one until torchrun kills them.
    """
    own = None
    try:
        yield
    except (ValueError, OSError) as error:
        own = error
    for problem in all_gather_object(own):
        if problem is not None:
            raise problem


def sum_over_ranks(parameters, sums):
    """Sum gradients and scalars over all ranks with one flat all-reduce -> {name: float}.

    parameters: tensors; their .grad is replaced by the sum, zero where no rank has one
    sums: {name: scalar tensor}

    Each rank's gradient is its part of the gradient of the *global* mean loss, so parts are added,
    never averaged.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    scalars = torch.stack([value.double() for value in sums.values()])

    # One message for all: an all-reduce per tensor would cost hundreds of round trips.
    if dist.is_initialized():
        gradients = [p.grad.flatten() for p in parameters]
        flat = torch.cat([*gradients, scalars.to(parameters[0].dtype)])
        dist.all_reduce(flat)
        at = 0
        for p in parameters:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        scalars = flat[at:].double()
    return dict(zip(sums, scalars.tolist(), strict=True))
