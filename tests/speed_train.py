"""Training speed beside sentence-transformers' trainer and an older loop of ours, in one run.

    pip install datasets accelerate     # for sentence-transformers' trainer, nothing else here
    python tests/speed_train.py [source] [steps] [commit]       # t2v-spatial 40; takes some minutes

One source of runs/mini (`python -m mini render`), batches of 64 with its hard negatives, LoRA on
mini/base, the same rate, temperature and instruction, one process with all cores, decoding inline
on the CPU. Compared are train.py, with GradCache in micro-batches of 32 and without,
its vision features on disk from an earlier run or not; sentence-transformers'
CachedMultipleNegativesRankingLoss in mini-batches of 32; and, given a commit, that commit's
train.py in a worktree.

Prints pairs per second over the second half of the steps and the last step's loss (ours leaves out
false negatives, so the two are not one quantity). Then GradCache in one batch of 2,048 pairs beside
plain batches of 32: model time per pair, without waiting for data, and the process's peak memory.
records/ has figures.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DATA = ROOT / "runs/mini"
GRAD_CACHE = ["--grad-cache", "--micro-batch", "32"]


def ours(root, mixture, out, steps, *more):
    """Run the train.py in `root` -> the step event of the second half of its steps."""
    flags = {
        "mixture": mixture,
        "data": DATA,
        "out": out,
        "epochs": 1,
        "schedule": "uniform",
        "device": "cpu",
        "steps": steps,
        "workers": 0,
        "dropout": 0,
        "log-every": steps // 2,
    }
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(
        [sys.executable, "train.py", *words, *more], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    events = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return [event for event in events if event["event"] == "step"][-1]


def video_path(item):
    return os.path.normpath(DATA / "train" / item["video"])


def read_rows(source):
    return [json.loads(line) for line in open(source["path"])]


def theirs(source, out, steps):
    """Train on the same source with SentenceTransformerTrainer -> {"items_per_s", "loss"}."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from speed_embed import read
    from transformers import TrainerCallback

    from model import BACKBONES, GVE, LORA

    rows = read_rows(source)
    table = []
    for row in rows[: len(rows) // 64 * 64]:  # whole batches
        columns = {"query": row["query"]["text"], "positive": video_path(row["positive"])}
        for i, item in enumerate(row.get("negatives", [])):
            columns[f"negative_{i}"] = video_path(item)
        table.append(columns)

    GVE.from_pretrained(str(ROOT / "mini/base")).save_pretrained(f"{out}/merged", merge=True)
    model = SentenceTransformer(f"{out}/merged", device="cpu")
    lora = {
        **LORA,
        "lora_dropout": 0.0,
        "target_modules": BACKBONES["qwen2_5_vl"].lora_targets,
    }
    model.add_adapter(LoraConfig(**lora))

    finished = {}  # step -> time

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            finished[state.global_step] = time.perf_counter()

    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / 0.03,
        mini_batch_size=32,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=out,
        per_device_train_batch_size=64,
        max_steps=steps,
        learning_rate=2e-3,
        warmup_steps=0.03,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        prompts={"query": source["instruction"]},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=42,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(table),
        loss=loss,
        callbacks=[Clock()],
    )

    # Paths travel in the table; frames are read for each batch.
    preprocess = trainer.data_collator.preprocess_fn

    def preprocess_with_frames(items, **more):
        shown = []
        for item in items:
            if item.endswith(".mp4"):
                frames, metadata = read(item)
                item = {"video": {"array": frames, "video_metadata": metadata}}
            shown.append(item)
        return preprocess(shown, **more)

    trainer.data_collator.preprocess_fn = preprocess_with_frames
    trainer.train()
    seconds = finished[steps] - finished[steps // 2]
    return {
        "items_per_s": 64 * (steps - steps // 2) / seconds,
        "loss": float(trainer.state.log_history[-2]["loss"]),
    }


def compare_large_batch(source, out, features):
    """Print the cost of GradCache in one batch of 2,048 pairs, a source's rows over and over."""
    rows = read_rows(source)
    for row in rows:
        for item in (row["query"], row["positive"], *row.get("negatives", [])):
            if "video" in item:
                item["video"] = video_path(item)
    file = Path(out) / "large.jsonl"
    file.write_text("".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(4096)))

    mixture = Path(out) / "large.json"
    times = []
    memories = []
    for size, steps, more in ((32, 128, []), (2048, 2, GRAD_CACHE)):
        large = source | {"path": str(file), "batch_size": size, "samples": 0}
        mixture.write_text(json.dumps([large]))
        last = ours(ROOT, mixture, f"{out}/{size}", steps, "--features", features, *more)
        seconds = (1 - last["waiting"]) / last["items_per_s"]
        times.append(seconds)
        memories.append(last["memory_gib"])
        print(
            f"batches of {size:,}: {1000 * seconds:.2f} ms of model time a pair, "
            f"{last['memory_gib']:.2f} GiB at peak"
        )
    print(
        f"2,048 with GradCache beside 32 without: {times[1] / times[0]:.2f} times the time, "
        f"{memories[1] / memories[0]:.2f} times the memory",
        flush=True,
    )


def train_at(commit, mixture, out, steps):
    """Run a commit's train.py in a worktree of its own -> as `ours`."""
    old = f"{out}/old"
    worktree = ["git", "worktree"]
    subprocess.run(
        [*worktree, "add", "-q", "--detach", old, commit],
        cwd=ROOT,
        check=True,
    )
    try:
        shutil.copytree(ROOT / "mini/base", f"{old}/mini/base", dirs_exist_ok=True)
        return ours(old, mixture, f"{out}/e", steps)
    finally:
        subprocess.run([*worktree, "remove", "--force", old], cwd=ROOT, check=True)


def main(name="t2v-spatial", steps="40", commit=None):
    steps = int(steps)
    if steps < 2 or steps % 2:
        raise ValueError(f"{steps} steps: an even number is needed")
    entries = json.loads((DATA / "train/mixture.json").read_text())
    sources = {entry["name"]: entry for entry in entries}
    if name not in sources:
        raise ValueError(f"{name}: one of {', '.join(sources)} is needed")
    source = sources[name] | {"path": str(DATA / "train" / sources[name]["path"])}
    print(f"{name}: batches of 64 pairs with {source['negatives']} hard negatives, {steps} steps")

    def show(way, last):
        print(f"{way:40} {last['items_per_s']:6.1f} pairs/s, loss {last['loss']:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as out:
        mixture = f"{out}/mixture.json"
        features = f"{out}/features"
        Path(mixture).write_text(json.dumps([source]))

        def train(folder, *more):
            return ours(ROOT, mixture, f"{out}/{folder}", steps, *more)

        train("fill", "--features", features)
        show("train.py, features kept", train("a", "--features", features))
        show("train.py", train("b", "--features", ""))
        cached = train("c", "--features", features, *GRAD_CACHE)
        show("train.py, GradCache, features kept", cached)
        show("train.py, GradCache", train("d", "--features", "", *GRAD_CACHE))
        show("sentence-transformers, cached loss", theirs(source, out, steps))
        compare_large_batch(source, out, features)
        if commit:
            show(f"train.py of {commit}", train_at(commit, mixture, out, steps))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
