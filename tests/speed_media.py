"""How long a clip takes to decode, beside another checkout of this repository.

    python tests/speed_media.py runs/mini --other ../before

Each reader takes 8 frames of each of 300 mp4 files of a folder, in a process of its own and in
turns with the other. The times are of the CPU, medians over the rounds; the frames and seconds must
be equal to the bit. This takes a minute. Commit b02786e, whose reader is decord, is the slower one.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def serve(repository):
    """Time lists of files that come as lines of JSON on the standard input."""
    sys.path.insert(0, repository)
    from support.media import load_video

    for line in sys.stdin:
        digest = hashlib.sha256()
        spent = 0.0
        for path in json.loads(line):
            began = time.process_time()
            pixels, seconds = load_video(path)
            spent += time.process_time() - began
            digest.update(pixels.tobytes())
            digest.update(repr(float(seconds)).encode())
        print(json.dumps([spent, digest.hexdigest()]), flush=True)


def start(repository):
    """Start a process that serves the reader of a checkout."""
    words = [sys.executable, __file__, "--serve", str(repository)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process, files):
    """Let a process decode files -> [seconds, hash of all frames and lengths]."""
    process.stdin.write(json.dumps(files) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="mp4 files anywhere below it")
    parser.add_argument("--other", help="another checkout")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve)
        return

    files = sorted(str(path) for path in Path(flags.folder).rglob("*.mp4"))
    files = files[:: max(1, len(files) // 300)][:300]
    readers = {"here": start(REPOSITORY), "other": start(flags.other)}
    times = {name: [] for name in readers}
    digests = {}
    for k in range(flags.rounds + 1):
        for name, process in readers.items():
            spent, digests[name] = ask(process, files)
            if k > 0:  # the first round warms up
                times[name].append(1000 * spent / len(files))

    for name, process in readers.items():
        process.stdin.close()
        process.wait()
        print(f"{name}: {statistics.median(times[name]):.2f} ms of CPU a clip")
    ratio = statistics.median(times["here"]) / statistics.median(times["other"])
    same = digests["here"] == digests["other"]
    print(
        f"ratio {ratio:.2f}; {len(files)} files, frames and seconds {'equal' if same else 'DIFFER'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
