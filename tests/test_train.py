"""train.py: ranks against one process, frozen weights, the pyramid's arithmetic, and every way a run may stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


def run(*command, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}, timeout=300)


def flags_for(tiny, mixture, out, *more):
    return ["--base", tiny, "--prober", "", "--data", mixture.parent, "--mixture", mixture, "--out", out, "--workers", "0",
            "--log-every", "1", *more]


def record(out):
    """Run train.main on this rank and keep the reduced loss and the gradients that the optimiser saw at every step (script mode)."""
    seen = {"loss": [], "grad": []}
    reduce_sum, step = train.reduce_sum, torch.optim.AdamW.step

    def spy_reduce(parameters, extra):
        summed = reduce_sum(parameters, extra)
        seen["loss"].append(summed[0].clone())
        seen["grad"].append(torch.cat([p.grad.flatten() for p in parameters]).double())
        return summed

    train.reduce_sum = spy_reduce
    torch.optim.AdamW.step = step
    train.main(train.parse_flags(train.Flags, sys.argv[2:], presets=train.PRESETS))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save({k: torch.stack(v) for k, v in seen.items()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def one_and_many(tiny, mixture, tmp_path_factory):
    """The same float64 run without dropout on 1, 2 and 3 ranks: 9 steps, hard negatives, batches of 4, 3 and 1 rows."""
    folder, seen = tmp_path_factory.mktemp("ranks"), {}
    for world in (1, 2, 3):
        out = folder / str(world)
        more = flags_for(tiny, mixture, out, "--dtype", "float64", "--dropout", "0", "--steps", "9", "--schedule", "uniform", "--lr", "0.01")
        launch = [] if world == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", world, "--master-port", 29500 + world]
        done = run(*launch, __file__, folder / f"{world}.pt", *more)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[world] = torch.load(folder / f"{world}.pt") | {"log": [json.loads(x) for x in open(out / "log.jsonl")]}
    return seen


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_loss_and_gradients_of_one_process(one_and_many, world):
    one, many = one_and_many[1], one_and_many[world]
    sizes = {len(x["grad"]) for x in (one, many)}
    assert sizes == {9} and one["loss"].abs().min() >= 0 and (one["loss"] > 0.1).sum() >= 5
    for name in ("loss", "grad"):
        scale = one[name].abs().amax(-1, keepdim=True) if name == "grad" else one[name].abs().clamp(min=1e-3)
        error = ((one[name] - many[name]).abs() / scale.clamp(min=1e-12)).max()
        assert error < 1e-9, f"{name}: relative error {error:.2e} on {world} ranks"


def test_the_run_held_the_uneven_cases(one_and_many):
    steps = [x for x in one_and_many[1]["log"] if x["event"] == "step"]
    assert {x["source"] for x in steps} == {"t2v", "ti2v", "t2t"}
    sizes = [b for x in one_and_many[1]["log"] if x["event"] == "end" for b in x["passes"].values()]
    assert max(sizes) > 1  # some source was exhausted: its short last batch was drawn
