"""The tour of the mini world: the whole method on rendered videos, under 10 minutes on two cores.

    python -m mini                    render, synthesise, score the base, train, score, compare
    python -m mini render             write runs/mini and runs/raw, under a minute; does nothing
                                      where they are complete and made by this code
    python -m mini pretrain           make mini/base and mini/prober again, about 30 minutes;
                                      both are committed, so this is rarely needed
    python -m mini pretrain --check   measure the committed base: in at least 80 % of its captions
                                      colour, shape and motion of all objects are right

Experiments on this world are in studies/: `python -m studies --help`.
"""

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

from mini import bench
from support.commands import run
from support.flags import flag, parse_flags


@dataclasses.dataclass
class Flags:
    command: str = flag(
        "tour",
        "the tour or one of its parts",
        choices=("tour", "render", "pretrain"),
        positional=True,
    )
    seed: int = flag(bench.SEED, "random seed of render and pretrain")
    check: bool = flag(False, "pretrain: measure the committed base and train nothing")

    def __post_init__(self):
        if self.command == "tour" and self.seed != bench.SEED:
            raise ValueError("--seed belongs to render and pretrain; the tour's seed is fixed")
        if self.check and self.command != "pretrain":
            raise ValueError("--check belongs to pretrain")


def tour():
    """Walk through the whole method; every step is a command that also runs alone."""
    began = time.time()
    print("nanoGVE's tour: a rendered world, a tiny Qwen2.5-VL, the Modality Pyramid, 16 datasets.")
    print("Each of its commands runs alone, too.")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

    run("python -m mini render")
    run("python synth.py --max-new-tokens 96 --shares T2T=0 T2I=0 I2V=0 V2V=0 TI2V=1 TV2V=0")
    run("python eval.py --ckpt mini/base --out runs/base --name base")
    # Two ranks of one thread are faster than one rank of two threads.
    run(
        "torchrun --nproc-per-node 2 train.py --workers 0 "
        "--mixture runs/mini/train/mixture.json runs/synth/uvrd/mixture.json --root runs/raw",
        OMP_NUM_THREADS="1",
    )
    run("python eval.py --ckpt runs/gve-mini --out runs/gve-mini --name trained")
    run(
        "python eval.py --table 1 2 --figure 2 "
        "--results runs/base/results.json runs/gve-mini/results.json --out runs/tables"
    )
    print(f"\nthe tour took {(time.time() - began) / 60:.1f} minutes")


def render(seed):
    """Write runs/mini and runs/raw where they are missing or made by other code."""
    began = time.time()
    made = bench.write("runs/mini", seed)
    if made["fresh"] or not Path("runs/raw/captions.jsonl").exists():
        shutil.rmtree("runs/synth", ignore_errors=True)  # it was made from other videos
        bench.raw("runs/raw", seed)

    news = "complete and current, nothing done"
    if made["fresh"]:
        news = f"written in {time.time() - began:.0f} s"
    print(
        f"runs/mini: {made['videos']} videos, {made['queries']} test queries, "
        f"{made['pairs']} training pairs, {news}"
    )


def pretrain(seed, check):
    """Make the base and the prober, or only measure the base."""
    # Imported here, because rendering needs neither torch nor transformers.
    from mini.pretrain import BASE, PROBER, caption_accuracy, pretrain_base, pretrain_prober

    if not check:
        pretrain_base(BASE, seed)
    caption_accuracy()
    if not check:
        bench.write("runs/mini", seed)
        pretrain_prober(PROBER, seed)


def main(argv=None):
    flags = parse_flags(Flags, argv, __doc__)
    # Paths in the commands are relative to the repository.
    os.chdir(Path(__file__).resolve().parent.parent)
    if flags.command == "tour":
        tour()
    elif flags.command == "render":
        render(flags.seed)
    else:
        pretrain(flags.seed, flags.check)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")
