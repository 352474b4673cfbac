"""Encoding speed beside the two usual ways, in one run:  python tests/speed_embed.py [checkpoint] [clips] [decoding processes]

Encodes clips of runs/mini/videos (`python -m mini render`) by embed.encode, by a plain loop over transformers' processor and
model in batches of 8, and by sentence-transformers, in turns, three times; all load one merged folder. The latter two decode
inline, with decord as we do: transformers' own reader needs torchcodec. Prints the median seconds by the clock, seconds of
processor time (decoding processes included), and how far the vectors lie apart.
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


def read(path):
    """Eight uniform frames and what transformers wants to know about them."""
    import decord

    reader = decord.VideoReader(path)
    frames = reader.get_batch(np.linspace(0, len(reader) - 1, 8).round().astype(int)).asnumpy()
    return frames, {
        "fps": 8 * reader.get_avg_fps() / len(reader),
        "total_num_frames": 8,
        "frames_indices": list(range(8)),
    }


@torch.no_grad()
def plain_loop(model, processor, paths, batch_size=8):
    """What one would write first, with the right prompt, frames and sizes."""
    out = []
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}]}], tokenize=False
    )
    for start in range(0, len(paths), batch_size):
        videos, metadata = zip(*map(read, paths[start : start + batch_size]), strict=True)
        inputs = processor(
            text=[text] * len(videos),
            videos=list(videos),
            padding=True,
            return_tensors="pt",
            videos_kwargs={"do_sample_frames": False, "video_metadata": list(metadata)},
        )
        pooled = last_token_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])
        out.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(out)


def sentence_transformers(model, paths):
    items = ({"video": dict(zip(("array", "video_metadata"), read(p), strict=True))} for p in paths)
    return model.encode(list(items), convert_to_tensor=True)


def main(checkpoint="mini/prober", n="500", workers="2", rounds=3):
    from sentence_transformers import SentenceTransformer
    from transformers import Qwen2_5_VLModel, Qwen2_5_VLProcessor

    paths = sorted(map(str, Path("runs/mini/videos").glob("*.mp4")))[: int(n)]
    with tempfile.TemporaryDirectory() as folder:
        GVE.from_pretrained(checkpoint).save_pretrained(folder, merge=True)
        gve, st = GVE.from_pretrained(folder), SentenceTransformer(folder, device="cpu")
        model, processor = (
            Qwen2_5_VLModel.from_pretrained(folder).eval(),
            Qwen2_5_VLProcessor.from_pretrained(folder),
        )
    assert processor.chat_template == CHAT_TEMPLATE
    items = [{"video": path} for path in paths]
    ways = {
        "embed.encode": lambda n: encode(gve, items[:n], workers=int(workers), batch_tokens=1024)[
            0
        ],
        "plain loop": lambda n: plain_loop(model, processor, paths[:n]),
        "sentence-transformers": lambda n: sentence_transformers(st, paths[:n]),
    }
    clock, work, vectors = {name: [] for name in ways}, {name: [] for name in ways}, {}
    for way in ways.values():
        way(16)
    for name in [*ways] * rounds:
        began, spent = time.perf_counter(), sum(os.times()[:4])
        vectors[name] = ways[name](None)
        clock[name].append(time.perf_counter() - began)
        while multiprocessing.active_children():  # which counts a child's time once it has ended
            time.sleep(0.01)
        work[name].append(sum(os.times()[:4]) - spent)
    print(
        f"{len(paths)} clips, {checkpoint}, {torch.get_num_threads()} threads, {workers} decoding processes"
    )
    clock, work = (
        {name: float(np.median(x)) for name, x in taken.items()} for taken in (clock, work)
    )
    for name in ways:
        apart = 1 - (vectors["embed.encode"] * vectors[name]).sum(1)
        print(
            f"{name:22} {clock[name]:6.2f} s = {clock[name] / clock['embed.encode']:.2f} x ours, processor time "
            f"{work[name]:6.2f} s = {work[name] / work['embed.encode']:.2f} x; "
            f"1 - cosine to ours: mean {apart.mean():.1e}, max {apart.max():.1e}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
