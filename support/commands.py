"""Start other scripts of this repository, as `python -m mini` and `python -m studies` do.

run("python eval.py --ckpt mini/base --out runs/base")
"""

import os
import subprocess
import sys


def run(command, **environment):
    """Print a command, run it in this environment and with this Python, and exit if it fails.

    command: "python ..." or "torchrun ..."; its words contain no spaces. environment: variables to
    add. Ends the program with a message that names the command and its status.
    """
    settings = [f"{name}={value}" for name, value in environment.items()]
    print("\n$ " + " ".join([*settings, command]), flush=True)

    program, *words = command.split()
    if program == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    finished = subprocess.run([sys.executable, *words], env=os.environ | environment)
    if finished.returncode:
        sys.exit(f"`{command}` ended with status {finished.returncode}")
