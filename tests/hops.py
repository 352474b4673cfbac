"""Count the functions that a reader of one step meets: `python tests/hops.py`, about a minute.

Traced with sys.setprofile: one training step of train.py (one rank, workers 0, GradCache, a video
source, saving included), and one dataset of eval.py from its items to its entry in results.json. A
function counts once, however often it is called. Comprehensions and lambdas belong to the function
that holds them. The models' own layers (transformers, PEFT, torch) are not counted.
"""

import collections
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


class Tracer:
    """Record each function of this repository that is entered between start() and stop()."""

    def __init__(self):
        self.seen = collections.defaultdict(set)  # {file: {function}}

    def profile(self, frame, event, argument):
        code = frame.f_code
        path = Path(code.co_filename)
        if event != "call" or ROOT not in path.parents or path.parent.name == "tests":
            return
        if not code.co_name.startswith("<"):
            self.seen[str(path.relative_to(ROOT))].add(code.co_qualname)

    def start(self):
        sys.setprofile(self.profile)

    def stop(self):
        sys.setprofile(None)

    def total(self):
        return sum(map(len, self.seen.values()))


def between_calls(module, name, first, last, tracer):
    """Trace from the end of one call of module.name to the end of a later one (numbered from 1)."""
    original = getattr(module, name)
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        result = original(*args, **options)
        calls += 1
        if calls == first:
            tracer.start()
        if calls == last:
            tracer.stop()
        return result

    setattr(module, name, counted)


def trace_training_step(tiny, mixture, out):
    """Trace the second step: from the end of the first save to the end of the second."""
    import train

    tracer = Tracer()
    between_calls(train, "save_state", 1, 2, tracer)
    words = f"--base {tiny} --data {mixture.parent} --mixture {mixture} --out {out} --workers 0"
    words += " --steps 3 --epochs 1 --save-every 1 --schedule uniform --grad-cache --seed 1"
    flags = [*words.split(), "--prober", "", "--features", ""]
    train.main(train.parse_flags(train.Flags, flags, presets=train.PRESETS))
    return tracer


def trace_dataset(tiny, benchmark, out):
    """Trace the second of two datasets: from the end of the first score to the end of its own."""
    import eval as evaluate

    tracer = Tracer()
    between_calls(evaluate, "score", 1, 2, tracer)
    words = f"--ckpt {tiny} --uvrb {benchmark} --out {out} --device cpu --datasets MSRVTT CRB-G"
    evaluate.main(evaluate.parse_flags(evaluate.Flags, words.split()))
    return tracer


def write_benchmark(media, root):
    """Write two datasets of four text queries over four clips."""
    import json

    sizes = {}
    for name in ("MSRVTT", "CRB-G"):
        folder = root / name / "jsonl"
        folder.mkdir(parents=True)
        queries, corpus, instances = [], [], []
        for i, clip in enumerate("abcd"):
            queries.append({"id": f"q{i}", "text": f"{name} clip {clip}"})
            corpus.append({"id": f"v{i}", "video": str(media / f"{clip}.mp4")})
            instances.append({"qid": f"q{i}", "pos": [f"v{i}"]})
        for kind, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}.jsonl").write_text(lines)
        sizes[name] = {"queries": 4, "corpus": 4}
    content = json.dumps({"name": "four clips", "datasets": sizes})
    (root / "benchmark.json").write_text(content)


def measure():
    """Return {"training step": Tracer, "dataset": Tracer} of a tiny model on a few clips."""
    import conftest

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(folder)
        tiny = conftest.write_tiny(folder / "tiny")
        media = folder / "media"
        media.mkdir()
        for seed, name in enumerate("abcd"):
            frames = conftest.moving_square(seed=seed)
            conftest.write_video(media / f"{name}.mp4", frames)
        mixture = conftest.write_mixture(media)
        write_benchmark(media, folder / "bench")
        return {
            "training step": trace_training_step(tiny, mixture, folder / "run"),
            "dataset": trace_dataset(tiny, folder / "bench", folder / "scores"),
        }


def main():
    for name, tracer in measure().items():
        print(f"\none {name}: {tracer.total()} functions in {len(tracer.seen)} files")
        for file, functions in sorted(tracer.seen.items()):
            print(f"  {file} ({len(functions)}): {', '.join(sorted(functions))}")


if __name__ == "__main__":
    main()
