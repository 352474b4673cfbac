"""Training speed beside sentence-transformers' trainer and an older loop of ours, in one run:

    pip install datasets accelerate                           # what sentence-transformers' trainer needs and nothing else here
    python tests/speed_train.py [source] [steps] [commit]     # t2v-spatial 40; a commit's train.py runs, too, in a worktree

One source of runs/mini (`python -m mini render`), batches of 64 with its hard negatives, LoRA on mini/base, the same rate and
temperature, one process with all cores, decoding inline: train.py as the mini preset has it (vision features kept on disk, in
an empty folder and then in the filled one), without that store, with GradCache in micro-batches of 32, and beside them
CachedMultipleNegativesRankingLoss in mini-batches of 32. Prints pairs per second of the second half of the steps and the last
loss.
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
MIXTURE = ROOT / "runs/mini/train/speed.json"


def ours(root, out, steps, *more):
    """Run a train.py -> (pairs per second, loss) of the second half of the steps, from its log."""
    flags = ["--mixture", str(MIXTURE), "--data", str(ROOT / "runs/mini"), "--out", out, "--epochs", "1", "--schedule", "uniform",
             "--steps", str(steps), "--workers", "0", "--dropout", "0", "--log-every", str(steps // 2)]
    done = subprocess.run([sys.executable, "train.py", *flags, *more], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    last = [json.loads(line) for line in open(f"{out}/log.jsonl")][-2]
    return last["items_per_s"], last["loss"]


def theirs(source, out, steps):
    """The same rows through SentenceTransformerTrainer -> (pairs per second, loss)."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from speed_embed import read
    from transformers import TrainerCallback

    from model import GVE, LORA
    folder = MIXTURE.parent / source["path"]
    rows = [json.loads(line) for line in open(folder)]
    path = lambda item: os.path.normpath(folder.parent / item["video"])  # noqa: E731
    data = Dataset.from_list([{"query": row["query"]["text"], "positive": path(row["positive"])} |
                              {f"negative_{i}": path(item) for i, item in enumerate(row.get("negatives", []))} for row in rows])
    GVE.from_pretrained(str(ROOT / "mini/base")).save_pretrained(f"{out}/merged", merge=True)
    model = SentenceTransformer(f"{out}/merged", device="cpu")
    model.add_adapter(LoraConfig(**{**LORA, "lora_dropout": 0.0}))
    at = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at[state.global_step] = time.perf_counter()

    def shown(items):  # paths travel in the table, frames are read for each batch
        return [{"video": dict(zip(("array", "video_metadata"), read(item), strict=True))} if item.endswith(".mp4") else item
                for item in items]

    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / 0.03, mini_batch_size=32,
                                              directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=out, per_device_train_batch_size=64, max_steps=steps, learning_rate=2e-3, warmup_steps=0.03, weight_decay=0.1,
        lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to=[], seed=42, use_cpu=True, disable_tqdm=True)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[Clock()])
    preprocess = trainer.data_collator.preprocess_fn
    trainer.data_collator.preprocess_fn = lambda items, **more: preprocess(shown(items), **more)
    trainer.train()
    return 64 * (steps - steps // 2) / (at[steps] - at[steps // 2]), float(trainer.state.log_history[-2]["loss"])


def main(name="t2v-spatial", steps="40", commit=None):
    steps, mixture = int(steps), json.loads((MIXTURE.parent / "mixture.json").read_text())
    source = next(s for s in mixture if s["name"] == name)
    MIXTURE.write_text(json.dumps([source]))
    print(f"{name}: batches of 64 pairs with {source['negatives']} hard negatives, {steps} steps")

    def tell(way, speed, loss):
        print(f"{way:44} {speed:6.1f} pairs/s, loss {loss:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as out:
        cached = "--features", "", "--grad-cache", "--micro-batch", "32", "--micro-tokens", "0"
        tell("train.py, features kept, empty at first", *ours(ROOT, f"{out}/a", steps, "--features", f"{out}/features"))
        tell("train.py, features kept before", *ours(ROOT, f"{out}/b", steps, "--features", f"{out}/features"))
        tell("train.py, no features kept", *ours(ROOT, f"{out}/c", steps, "--features", ""))
        tell("train.py, GradCache, no features kept", *ours(ROOT, f"{out}/d", steps, *cached))
        tell("train.py, GradCache, features kept before", *ours(ROOT, f"{out}/e", steps, "--features", f"{out}/features",
                                                               *cached[2:]))
        tell("sentence-transformers, cached loss", *theirs(source, out, steps))
        if commit:
            subprocess.run(["git", "worktree", "add", "-q", "--detach", f"{out}/old", commit], cwd=ROOT, check=True)
            try:
                shutil.copytree(ROOT / "mini/base", f"{out}/old/mini/base", dirs_exist_ok=True)
                tell(f"train.py of {commit}", *ours(f"{out}/old", f"{out}/f", steps))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", f"{out}/old"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
