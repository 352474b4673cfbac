"""Encoding speed beside the two usual ways, in one run.

    python tests/speed_embed.py [checkpoint] [clips] [decoding processes]       # mini/prober 500 2

Encodes clips of runs/mini/videos (`python -m mini render`) by embed.encode, by a plain loop over
transformers' processor and model in batches of 8, and by sentence-transformers, in turns, three
times; all load one merged folder. The latter two decode inline, with our reader: transformers' own
needs torchcodec. Prints the median seconds by the clock, seconds of processor time
(decoding processes included), and how far the vectors lie apart.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from embed import encode  # noqa: E402
from model import CHAT_TEMPLATE, GVE, last_token_pool  # noqa: E402
from support.media import load_video  # noqa: E402

ROUNDS = 3


def read(path):
    """Return eight uniform frames and what transformers wants to know about them."""
    frames, seconds = load_video(path, 8)
    metadata = {
        "fps": 8 / seconds,
        "total_num_frames": 8,
        "frames_indices": list(range(8)),
    }
    return frames, metadata


@torch.no_grad()
def plain_loop(model, processor, paths, batch_size=8):
    """Embed clips as one would write it first, with the right prompt, frames and sizes."""
    message = {"role": "user", "content": [{"type": "video"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    out = []
    for start in range(0, len(paths), batch_size):
        videos = []
        metadata = []
        for path in paths[start : start + batch_size]:
            frames, about = read(path)
            videos.append(frames)
            metadata.append(about)
        inputs = processor(
            text=[text] * len(videos),
            videos=videos,
            padding=True,
            return_tensors="pt",
            videos_kwargs={"do_sample_frames": False, "video_metadata": metadata},
        )
        hidden = model(**inputs).last_hidden_state
        pooled = last_token_pool(hidden, inputs["attention_mask"])
        out.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(out)


def read_items(paths):
    """Read clips as the items that sentence-transformers takes."""
    items = []
    for path in paths:
        frames, metadata = read(path)
        items.append({"video": {"array": frames, "video_metadata": metadata}})
    return items


def processor_seconds():
    """Processor time of this process and of its children that have ended."""
    while multiprocessing.active_children():  # a child's time counts once it has ended
        time.sleep(0.01)
    return sum(os.times()[:4])


def main(checkpoint="mini/prober", clips="500", workers="2"):
    from sentence_transformers import SentenceTransformer
    from transformers import Qwen2_5_VLModel, Qwen2_5_VLProcessor

    paths = sorted(map(str, Path("runs/mini/videos").glob("*.mp4")))[: int(clips)]
    with tempfile.TemporaryDirectory() as folder:
        GVE.from_pretrained(checkpoint).save_pretrained(folder, merge=True)
        gve = GVE.from_pretrained(folder)
        st = SentenceTransformer(folder, device="cpu")
        model = Qwen2_5_VLModel.from_pretrained(folder).eval()
        processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    assert processor.chat_template == CHAT_TEMPLATE

    def ours(paths):
        items = [{"video": path} for path in paths]
        vectors, _ = encode(gve, items, workers=int(workers), batch_tokens=1024)
        return vectors

    ways = {
        "embed.encode": ours,
        "plain loop": lambda paths: plain_loop(model, processor, paths),
        "sentence-transformers": lambda paths: st.encode(read_items(paths), convert_to_tensor=True),
    }
    for way in ways.values():
        way(paths[:16])  # warm up

    clock = {name: [] for name in ways}
    work = {name: [] for name in ways}
    vectors = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            spent = processor_seconds()
            began = time.perf_counter()
            vectors[name] = way(paths)
            clock[name].append(time.perf_counter() - began)
            work[name].append(processor_seconds() - spent)

    print(
        f"{len(paths)} clips, {checkpoint}, {torch.get_num_threads()} threads, "
        f"{workers} decoding processes"
    )
    our_clock = np.median(clock["embed.encode"])
    our_work = np.median(work["embed.encode"])
    for name in ways:
        seconds = np.median(clock[name])
        spent = np.median(work[name])
        apart = 1 - (vectors["embed.encode"] * vectors[name]).sum(1)
        print(
            f"{name:22} {seconds:6.2f} s = {seconds / our_clock:.2f} x ours, "
            f"processor time {spent:6.2f} s = {spent / our_work:.2f} x; "
            f"1 - cosine to ours: mean {apart.mean():.1e}, max {apart.max():.1e}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
