"""Shared fixtures: a tiny random Qwen2.5-VL in Hugging Face layout and a few real media files."""

import contextlib
import json
import os
import resource
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

torch.set_num_threads(1)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen2.5-VL's own turn layout, restated: content parts in the order given, a generation prompt on
# request, no <|endoftext|>.
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    """A tokenizer of single bytes and Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def tiny_config(tokenizer, tokens_per_second):
    """Qwen2.5-VL 64 wide, with two layers in each tower."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
        tokens_per_second=tokens_per_second,
    )

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )

    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def write_tiny(folder, seed=0, tokens_per_second=2):
    """Save a random tiny Qwen2.5-VL with a byte tokenizer, as transformers saves a real one."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer, tokens_per_second))
    # Larger than transformers' 0.02, so that inputs show in the outputs; biases, too.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 256 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=dict(size)),
        tokenizer,
        Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=QWEN_TEMPLATE,
    )
    processor.save_pretrained(folder)
    # Without a gve.json it would be taken for a released checkpoint: 128 tokens a frame at least.
    Path(folder, "gve.json").write_text('{"min_tokens": 4}')
    return folder


def write_video(path, frames, fps=8, codec="libx264", **options):
    """Write uint8 frames (F, H, W, 3) as a real video file; H and W even."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps, options={"crf": "1", **options})
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())  # the frames that the encoder still holds
    return str(path)


def moving_square(n=16, height=56, width=56, seed=0):
    """A square that moves to the right over a coloured ground -> uint8 (n, height, width, 3)."""
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(0, 256, (2, 3))
    frames = np.broadcast_to(ground, (n, height, width, 3)).astype(np.uint8).copy()
    for i in range(n):
        left = int(i * (width - 12) / max(n - 1, 1))
        frames[i, height // 3 : height // 3 + 12, left : left + 12] = colour
    return frames


@contextlib.contextmanager
def full_disk(size):
    """Let no file of this process grow beyond so many bytes: writing then fails as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder of media.

    a.mp4 ... d.mp4 (16 frames, 8 fps), wide.mp4 (20 frames, 5 fps), short.mp4 (3 frames), i.png,
    wide.png, frames/ (10 files).
    """
    folder = tmp_path_factory.mktemp("media")
    for seed, name in enumerate("abcd"):
        write_video(folder / f"{name}.mp4", moving_square(seed=seed))
    write_video(folder / "wide.mp4", moving_square(20, 84, 168, seed=9), fps=5)
    write_video(folder / "short.mp4", moving_square(3, seed=8))

    Image.fromarray(moving_square(1, 70, 90, seed=5)[0]).save(folder / "i.png")
    Image.fromarray(moving_square(1, 60, 300, seed=6)[0]).save(folder / "wide.png")
    (folder / "frames").mkdir()
    for i, frame in enumerate(moving_square(10, seed=7)):
        Image.fromarray(frame).save(folder / "frames" / f"{i:03d}.jpg", quality=95)
    return folder


def write_mixture(media):
    """Write a mixture of three sources over the media folder -> its path.

    7 and 5 rows at batch 4 leave batches of 3 and of 1.
    """
    texts = [
        "red ball",
        "blue square rolls",
        "a green one",
        "two of them",
        "night",
        "the camera pans left",
        "snow",
    ]

    clips = ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    rows = {"t2v": [], "ti2v": [], "t2t": []}
    for i, text in enumerate(texts):
        t2v = {
            "query": {"text": text},
            "positive": {"video": clips[i % 4]},
            "negatives": [{"video": clips[(i + 1) % 4]}],
            "id": str(i),
        }
        ti2v = {
            "query": {"text": text, "image": {"video": clips[i % 4], "time": 0.3 * i}},
            "positive": {"video": {"path": clips[(i + 2) % 4], "start": 0.1 * i}},
        }

        rows["t2v"].append(t2v)
        rows["t2t"].append({"query": {"text": text}, "positive": {"text": text[::-1]}})
        if i < 5:
            rows["ti2v"].append(ti2v)

    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (media / f"{name}.jsonl").write_text(text)

    mixture = [
        {
            "name": "t2v",
            "task": "T2V",
            "path": "t2v.jsonl",
            "negatives": 1,
            "batch_size": 4,
            "instruction": "Find it.",
        },
        {"name": "ti2v", "task": "TI2V", "path": "ti2v.jsonl", "batch_size": 4},
        {"name": "t2t", "task": "T2T", "path": "t2t.jsonl", "batch_size": 4, "samples": 9},
    ]
    (media / "mixture.json").write_text(json.dumps(mixture))
    return media / "mixture.json"


@pytest.fixture(scope="session")
def mixture(media):
    return write_mixture(media)
