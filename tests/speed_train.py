"""Training speed beside sentence-transformers' trainer and an older loop of ours, in one run of some minutes:

    pip install datasets accelerate                           # what sentence-transformers' trainer needs and nothing else here
    python tests/speed_train.py [source] [steps] [commit]     # t2v-spatial 40; a commit's train.py runs, too, in a worktree

One source of runs/mini (`python -m mini render`), batches of 64 with its hard negatives, LoRA on mini/base, the same rate,
temperature and instruction, one process with all cores, decoding inline with decord on the CPU: train.py with GradCache in
micro-batches of 32 and without, its vision features kept on disk from an earlier run or not; and sentence-transformers'
CachedMultipleNegativesRankingLoss in mini-batches of 32. Prints pairs per second of the second half of the steps and the last
step's loss (ours leaves out false negatives, so the two are not one quantity). Then GradCache in one batch of 2,048 pairs beside
plain batches of 32: model time per pair, without waiting for data, and peak memory of the process. records/ has figures.
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


def ours(root, mixture, out, steps, *more):
    """Run a train.py -> the last line of its log, which is about the second half of the steps."""
    flags = [
        "--mixture",
        mixture,
        "--data",
        str(DATA),
        "--out",
        out,
        "--epochs",
        "1",
        "--schedule",
        "uniform",
        "--device",
        "cpu",
        "--steps",
        str(steps),
        "--workers",
        "0",
        "--dropout",
        "0",
        "--log-every",
        str(steps // 2),
    ]
    done = subprocess.run(
        [sys.executable, "train.py", *flags, *more], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [json.loads(line) for line in open(f"{out}/log.jsonl")][-2]


def path(item):
    return os.path.normpath(DATA / "train" / item["video"])


def theirs(source, out, steps):
    """Rows of the same source through SentenceTransformerTrainer -> the same two figures of it."""
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

    rows = [json.loads(line) for line in open(DATA / source["path"])]
    rows = rows[: len(rows) // 64 * 64]  # whole batches
    data = Dataset.from_list(
        [
            {"query": row["query"]["text"], "positive": path(row["positive"])}
            | {f"negative_{i}": path(item) for i, item in enumerate(row.get("negatives", []))}
            for row in rows
        ]
    )
    GVE.from_pretrained(str(ROOT / "mini/base")).save_pretrained(f"{out}/merged", merge=True)
    model = SentenceTransformer(f"{out}/merged", device="cpu")
    targets = BACKBONES["qwen2_5_vl"].lora_targets
    model.add_adapter(LoraConfig(**{**LORA, "target_modules": targets, "lora_dropout": 0.0}))
    at = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at[state.global_step] = time.perf_counter()

    def shown(items):  # paths travel in the table, frames are read for each batch
        return [
            {"video": dict(zip(("array", "video_metadata"), read(item), strict=True))}
            if item.endswith(".mp4")
            else item
            for item in items
        ]

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
        model, arguments, train_dataset=data, loss=loss, callbacks=[Clock()]
    )
    preprocess = trainer.data_collator.preprocess_fn
    trainer.data_collator.preprocess_fn = lambda items, **more: preprocess(shown(items), **more)
    trainer.train()
    speed = 64 * (steps - steps // 2) / (at[steps] - at[steps // 2])
    return {"items_per_s": speed, "loss": float(trainer.state.log_history[-2]["loss"])}


def large(source, out, features):
    """Print what GradCache costs in one batch of 2,048 pairs, a source's rows over and over, in micro-batches of 32."""
    rows, file, mixture, seen = (
        [json.loads(x) for x in open(source["path"])],
        f"{out}/large.jsonl",
        f"{out}/large.json",
        {},
    )
    for item in (
        item
        for row in rows
        for item in (row["query"], row["positive"], *row.get("negatives", []))
        if "video" in item
    ):
        item["video"] = path(item)
    Path(file).write_text("".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(4096)))
    for size, steps, more in ((32, 128, ()), (2048, 2, ("--grad-cache", "--micro-batch", "32"))):
        Path(mixture).write_text(
            json.dumps([source | {"path": file, "batch_size": size, "samples": 0}])
        )
        last = ours(ROOT, mixture, f"{out}/{size}", steps, "--features", features, *more)
        seen[size] = (1 - last["waiting"]) / last["items_per_s"], last["memory_gib"]
        print(
            f"batches of {size:,}: {1000 * seen[size][0]:.2f} ms of model time a pair, {last['memory_gib']:.2f} GiB at peak"
        )
    time, memory = (big / small for small, big in zip(*seen.values(), strict=True))
    print(
        f"2,048 with GradCache beside 32 without: {time:.2f} times the time, {memory:.2f} times the memory",
        flush=True,
    )


def main(name="t2v-spatial", steps="40", commit=None):
    steps = int(steps)
    if steps < 2 or steps % 2:
        raise ValueError(f"{steps} steps: an even number is needed")
    sources = {
        source["name"]: source for source in json.loads((DATA / "train/mixture.json").read_text())
    }
    if name not in sources:
        raise ValueError(f"{name}: one of {', '.join(sources)} is needed")
    source = sources[name] | {"path": str(DATA / "train" / sources[name]["path"])}
    print(f"{name}: batches of 64 pairs with {source['negatives']} hard negatives, {steps} steps")

    def tell(way, last):
        print(f"{way:40} {last['items_per_s']:6.1f} pairs/s, loss {last['loss']:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as out:
        mixture, features, cached = (
            f"{out}/mixture.json",
            f"{out}/features",
            ("--grad-cache", "--micro-batch", "32"),
        )
        Path(mixture).write_text(json.dumps([source]))
        ours(ROOT, mixture, f"{out}/fill", steps, "--features", features)
        tell(
            "train.py, features kept",
            ours(ROOT, mixture, f"{out}/a", steps, "--features", features),
        )
        tell("train.py", ours(ROOT, mixture, f"{out}/b", steps, "--features", ""))
        tell(
            "train.py, GradCache, features kept",
            ours(ROOT, mixture, f"{out}/c", steps, "--features", features, *cached),
        )
        tell(
            "train.py, GradCache", ours(ROOT, mixture, f"{out}/d", steps, "--features", "", *cached)
        )
        tell("sentence-transformers, cached loss", theirs(source, out, steps))
        large(source, out, features)
        if commit:
            subprocess.run(
                ["git", "worktree", "add", "-q", "--detach", f"{out}/old", commit],
                cwd=ROOT,
                check=True,
            )
            try:
                shutil.copytree(ROOT / "mini/base", f"{out}/old/mini/base", dirs_exist_ok=True)
                tell(f"train.py of {commit}", ours(f"{out}/old", mixture, f"{out}/e", steps))
            finally:
                subprocess.run(
                    ["git", "worktree", "remove", "--force", f"{out}/old"], cwd=ROOT, check=True
                )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
