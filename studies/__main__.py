"""Experiments on the mini world, which `python -m mini` renders and trains on first.

python -m studies ablate            rankers that should fail, beside the models: 4 minutes
python -m studies report            a page about the world, runs/report/README.md, with the results
                                    of `ablate` and, where it has been run, of `noise`
python -m studies report --synth runs/raw runs/synth
                                    what synth.py made of the raw videos, judged by their scenes
python -m studies NAME              train and score variants over seeds: noise, defects, late,
                                    scaling, frames, synth; minutes to hours
python -m studies curriculum        schedules beside each other, hours; goes on where it stopped
"""

import dataclasses
import os
import sys
from pathlib import Path

from studies import ablate, curriculum, report, study
from support.flags import flag, parse_flags


@dataclasses.dataclass
class Flags:
    command: str = flag(
        ...,
        "the experiment",
        choices=("ablate", "report", "curriculum", *study.STUDIES),
        positional=True,
    )
    ckpt: str = flag("runs/gve-mini", "ablate: the trained model")
    table: bool = flag(False, "curriculum: run nothing, print the results so far")
    synth: list[str] = flag([], "report: folder of raw videos and folder of synth.py's output")

    def __post_init__(self):
        if self.synth and self.command != "report":
            raise ValueError("--synth belongs to report")
        if self.table and self.command != "curriculum":
            raise ValueError("--table belongs to curriculum")
        if len(self.synth) not in (0, 2):
            raise ValueError(f"--synth takes two folders, RAW and OUT, got {len(self.synth)}")


def main(argv=None):
    flags = parse_flags(Flags, argv, __doc__)
    # Paths in commands and tables are relative to the repository.
    os.chdir(Path(__file__).resolve().parent.parent)
    if flags.command == "ablate":
        ablate.score_rankers(flags.ckpt)
    elif flags.command == "report" and flags.synth:
        raw, out = flags.synth
        report.synth_report(raw, out)
    elif flags.command == "report":
        report.world_report()
    elif flags.command == "curriculum":
        curriculum.run_study(flags.table)
    else:
        study.run_study(flags.command)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")
