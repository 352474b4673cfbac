"""Say how far a loop is: a bar on a terminal, a line now and then in a log file.

for video in track(videos, len(videos), "videos"): ...
with report_progress(len(items), "encode") as advance:
    ...
    advance(3)
"""

import contextlib
import os
import sys
import threading
import time

from tqdm import tqdm

SILENCE = 10.0  # seconds between lines where there is no terminal


def track(things, total, label):
    """Yield things, telling on stderr how many of `total` there were, at which rate, until when."""
    with report_progress(total, label) as advance:
        for thing in things:
            yield thing
            advance()


@contextlib.contextmanager
def report_progress(total, label, quiet=False):
    """Yield advance(n=1), to be called as things get done, `total` in all.

    total None: nobody knows. quiet: say nothing; only rank 0 speaks in any case. A thread of its
    own writes the lines, so that one slow thing is not taken for a run that hangs.
    """
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=total, desc=label, leave=False, disable=quiet or not on_terminal)
    began = time.time()
    done = 0
    has_ended = threading.Event()

    def advance(n=1):
        nonlocal done
        done += n
        bar.update(n)

    def speak():
        while not has_ended.wait(1 if on_terminal else SILENCE):
            if on_terminal:
                bar.refresh()  # the time goes on
                continue

            seconds = time.time() - began
            line = f"    {label}: {seconds:.0f} s so far"
            if total is not None:
                line += f", {done} of {total}"
            if done:
                line += f", {done / seconds:.2g} a second"
            if done and total is not None:
                line += f", about {seconds / done * (total - done):.0f} s left"
            # Past sys.stderr, whose lock a process that is forked meanwhile would inherit.
            os.write(2, f"{line}\n".encode())

    thread = threading.Thread(target=speak, daemon=True)
    if not quiet:
        thread.start()
    try:
        yield advance
    finally:
        has_ended.set()
        if not quiet:
            thread.join()
        bar.close()
