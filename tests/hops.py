"""Count the functions that a reader of one step meets: `python tests/hops.py`, about a minute.

Traced with sys.setprofile: one training step of train.py (one rank, workers 0, GradCache, a video
source, saving included), and one dataset of eval.py, from its media to its score. A
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

from support.files import write_json, write_jsonl  # noqa: E402


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


def after_call(module, name, number, action):
    """Call `action` when call `number` (from 1) of module.name has returned."""
    original = getattr(module, name)
    calls = 0

    def counted(*args, **options):
        nonlocal calls
        result = original(*args, **options)
        calls += 1
        if calls == number:
            action()
        return result

    setattr(module, name, counted)


def trace_training_step(tiny, mixture, out):
    """Trace the second step: from the end of the first save to the end of the second."""
    import train

    tracer = Tracer()
    after_call(train, "save_state", 1, tracer.start)
    after_call(train, "save_state", 2, tracer.stop)
    words = f"--base {tiny} --data {mixture.parent} --mixture {mixture} --out {out} --workers 0"
    words += " --steps 3 --epochs 1 --save-every 1 --schedule uniform --grad-cache --seed 1"
    flags = [*words.split(), "--prober", "", "--features", ""]
    train.main(train.parse_flags(train.Flags, flags, presets=train.PRESETS))
    return tracer


def trace_dataset(tiny, benchmark, out):
    """Trace a dataset from the moment when the model is there to its entry in results.json."""
    import eval as evaluate

    tracer = Tracer()
    after_call(evaluate, "VectorCache", 1, tracer.start)
    after_call(evaluate, "score", 1, tracer.stop)
    words = f"--ckpt {tiny} --uvrb {benchmark} --out {out} --device cpu"
    evaluate.main(evaluate.parse_flags(evaluate.Flags, words.split()))
    return tracer


def write_benchmark(media, root):
    """Write a benchmark of one dataset: four text queries over four clips."""
    folder = root / "MSRVTT" / "jsonl"
    folder.mkdir(parents=True)
    rows = {"queries": [], "corpus": [], "instances": []}
    for i, clip in enumerate("abcd"):
        rows["queries"].append({"id": f"q{i}", "text": f"clip {clip}"})
        rows["corpus"].append({"id": f"v{i}", "video": str(media / f"{clip}.mp4")})
        rows["instances"].append({"qid": f"q{i}", "pos": [f"v{i}"]})
    for kind, lines in rows.items():
        write_jsonl(folder / f"{kind}.jsonl", lines)
    sizes = {"MSRVTT": {"queries": 4, "corpus": 4}}
    write_json(root / "benchmark.json", {"name": "four clips", "datasets": sizes})


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
        method = {file: f for file, f in tracer.seen.items() if not file.startswith("support/")}
        print(f"\none {name}: {tracer.total()} functions in {len(tracer.seen)} files;", end=" ")
        print(f"without support/: {sum(map(len, method.values()))} in {len(method)}")
        for file, functions in sorted(tracer.seen.items()):
            print(f"  {file} ({len(functions)}): {', '.join(sorted(functions))}")


if __name__ == "__main__":
    main()
