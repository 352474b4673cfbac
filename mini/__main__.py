"""The tour of the mini world, and its parts (DESIGN.md section 4).

    python -m mini                     render, synthesise, score the base, train, score again, compare: under 10 minutes
    python -m mini render              the files of runs/mini and runs/raw, under a minute; nothing where they are current
    python -m mini pretrain            make mini/base and mini/prober again, about 30 minutes; committed, so rarely needed
    python -m mini ablate              rankers that must fail, beside base, prober and runs/gve-mini: 4 minutes
    python -m mini study NAME          train and score variants over seeds: noise, defects, late, scaling, frames, ...
    python -m mini report              one page about the world, in runs/report, with what `ablate` and `study noise` have found
    python -m mini report --synth      what synth.py made of the raw videos in runs/raw, judged by their scene graphs
    python -m mini pretrain --check    measure the captions of the committed base: everything right in at least 80 % of clips

The base is a Qwen2.5-VL of 1.7M parameters that learnt to describe training scenes word by word, and hardly a retriever. The
prober is a small LoRA adapter on it, trained on coarse captions alone: the embedder that the curriculum starts from (4.2).
Legend: B batch, T tokens, F frames, S = 56 pixels, N scenes.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from caption import transformers_captioner
from data import DEFAULT_INSTRUCTION, END, Collator, sample_indices
from kernels import windows
from mini import bench, world
from model import mrope_positions

BASE, PROBER, CACHE = Path("mini/base"), Path("mini/prober"), Path("runs/pretrain")
RANKS = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2"  # two ranks of one thread beat one rank of two
SPECIAL = [
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end "
        "vision_pad image_pad video_pad"
    ).split()
]
HEAD = f"<|im_start|>system\n{DEFAULT_INSTRUCTION}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
CHAT = (
    """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\n"""
    + DEFAULT_INSTRUCTION
    + """<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}
{%- if part.type == 'text' %}{{- part.text }}{%- else %}
{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

# What a user may ask of the base; {} is a style. JSON answers are {"caption": ...}, {"query": ...} or a dict of the five styles.
JSON = " Answer in JSON."
ASK = {
    "video": (
        "Describe the video in the {} style.",
        "Write a {} caption of the video.",
        "Give a {} description of this video.",
    ),
    "image": (
        "Describe the image in the {} style.",
        "Write a {} caption of the image.",
        "Give a {} description of this frame.",
    ),
    "query": (
        "Write the query that leads from the first to the second.",
        "Describe what changes from the reference to the target video.",
    ),
    "five video": ("Describe the video in five styles." + JSON,),
    "five image": ("Describe the image in five styles." + JSON,),
}
TASKS = {  # and how often each is practised
    "video concise": 10,
    "video rich": 4,
    "video abstract": 1.5,
    "video keywords": 1.5,
    "video partial": 1,
    "image concise": 2,
    "image rich": 2,
    "image abstract": 0.7,
    "image keywords": 0.7,
    "image minimal": 0.7,
    "query video": 2,
    "query image": 1.5,
    "json video": 0.7,
    "json image": 0.4,
    "json query": 0.7,
    "five video": 0.5,
    "five image": 0.3,
    "text": 2,
    "plain video": 7,
    "plain image": 3,
    "plain text": 7,
}
PLAIN = (world.concise, world.rich, world.temporal, world.spatial, world.keywords)


def build_processor(texts):
    """A Qwen2.5-VL processor with Qwen's splitting rule and special tokens, and a byte-level BPE learnt from `texts`."""
    bpe, letters = (
        Tokenizer(models.BPE()),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), letters]
    )
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1100, initial_alphabet=letters.alphabet(), show_progress=False
        ),
    )
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(m) for m in learnt["merges"]],
        model_max_length=32768,
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 256 * 28 * 28}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=dict(size))
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT)


def build_model(tokenizer):
    """A Qwen2.5-VL of 1.7M parameters: 4 vision blocks of width 96, 4 language layers of width 128, tied embeddings.

    Rotary base 100, and most channels to the width: heads of 32 would be blind to left and right at Qwen's base and sections.
    """
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    end, stop = ids["<|endoftext|>"], ids["<|im_end|>"]
    rope = {"rope_type": "default", "mrope_section": [2, 4, 10], "rope_theta": 100.0}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters=rope,
        initializer_range=0.05,
        bos_token_id=end,
        eos_token_id=stop,
        pad_token_id=end,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=4,
        hidden_size=96,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=128,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        tokens_per_second=2,
        window_size=112,
        fullatt_block_indexes=[1, 3],
        initializer_range=0.05,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [stop, end], end
    return model


def scene_pool(n, seed):
    """n training scenes, [(scene, change from the scene before it or None)]; the first half alternates with near-twins."""
    pool, rng = [], random.Random(f"{seed}/pretrain")
    while len(pool) < n:
        scene, twin = (
            world.sample_scene(rng, test=False, count=rng.choices((1, 2, 3), (3, 5, 2))[0]),
            None,
        )
        pool.append((scene, None))
        while len(pool) < n // 2 and twin is None:
            kind = rng.choice(
                "motion motion order exchange place size texture camera theme colour".split()
            )
            twin = world.change(scene, kind, rng, test=False)
        pool += [twin] if twin else []
    return pool


def through_codec(scene):
    """A scene's frames uint8 (F, S, S, 3) as a reader of its mp4 file sees them."""
    return world.decode_mp4(world.encode_mp4(world.render_scene(scene)))


def example(task, i, pool, rng):
    """Make one example of a task from scene i: (media, prompt, answer); media are ("video" | "image", clip, frame)."""
    kind, _, style = task.partition(" ")
    if kind == "text":
        return [], "", bench.texts(pool[i][0], rng)
    if (
        kind == "plain"
    ):  # Qwen has read END wherever a document begins; here it opens answers that nobody asked for
        forms = (
            [world.FRAME_STYLES[s] for s in ("concise", "rich", "keywords")]
            if style == "image"
            else PLAIN
        )
        given, answer = (form(pool[i][0], rng, shuffle=True)[0] for form in rng.sample(forms, 2))
        media = [(style, i, rng.choice(world.VISIBLE))] if style != "text" else []
        return media, (given if style == "text" else "") + TAIL + END, answer
    if "query" in task:
        while pool[i][1] is None:
            i = rng.randrange(len(pool) // 2)
        media = [
            (
                rng.choice(("video", "image")) if kind == "json" else style,
                i - 1,
                rng.choice(world.VISIBLE),
            ),
            ("video", i, 0),
        ]
        request, answer = rng.choice(ASK["query"]), world.composed(*pool[i], rng)[0]
        if kind == "json":
            return media, request + JSON + TAIL, json.dumps({"query": answer})
        return media, request + TAIL, answer
    medium = kind if kind in ("video", "image") else style
    styles = world.VIDEO_STYLES if medium == "video" else world.FRAME_STYLES
    media = [(medium, i, rng.choice(world.VISIBLE))]
    if kind == "five":
        return (
            media,
            rng.choice(ASK[task]) + TAIL,
            json.dumps({s: form(pool[i][0], rng)[0] for s, form in styles.items()}),
        )
    style = rng.choice(list(styles)) if kind == "json" else style
    request, answer = rng.choice(ASK[medium]).format(style), styles[style](pool[i][0], rng)[0]
    if kind == "json":
        return media, request + JSON + TAIL, json.dumps({"caption": answer})
    return media, request + TAIL, answer


def patches(frames):
    """Cut frames into Qwen2-VL's normalised patches: uint8 (n, F, S, S, 3) -> float32 (n * F/2 * 16, 1176), F even."""
    x = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255  # (n, F, 3, S, S)
    mean, std = (
        torch.tensor((0.48145466, 0.4578275, 0.40821073)),
        torch.tensor((0.26862954, 0.26130258, 0.27577711)),
    )
    x = (x - mean[:, None, None]) / std[:, None, None]
    x = x.view(len(x), x.shape[1] // 2, 2, 3, 2, 2, 14, 2, 2, 14)
    return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(
        -1, 3 * 2 * 14 * 14
    )  # merged cells, 2 x 2 patches in each, a patch


def batch_of(examples, clips, collate):
    """Collate examples: model inputs padded on the right, and labels (B, T) that are -100 except where an answer stands."""
    rows, media, encode = [], {"video": [], "image": []}, collate.tokenizer.encode
    for shown, prompt, answer in examples:
        blocks = ""
        for kind, i, frame in shown:
            media[kind].append(
                clips[i][sample_indices(world.FRAMES, 8) if kind == "video" else [frame] * 2]
            )
            blocks += (
                "<|vision_start|>"
                + f"<|{kind}_pad|>" * (16 if kind == "video" else 4)
                + "<|vision_end|>"
            )
        rows.append((encode(HEAD + blocks + prompt), encode(answer + "<|im_end|>")))
    batch = collate.batch([{"ids": head + answer} for head, answer in rows])
    labels = torch.full_like(batch["input_ids"], -100)
    for i, (head, answer) in enumerate(rows):
        labels[i, len(head) : len(head) + len(answer)] = torch.tensor(answer)
    for kind, suffix, grid in (("video", "_videos", [4, 4, 4]), ("image", "", [1, 4, 4])):
        if n := len(media[kind]):
            batch |= {
                "pixel_values" + suffix: patches(np.stack(media[kind])),
                kind + "_grid_thw": torch.tensor([grid] * n),
            }
            batch |= {"second_per_grid_ts": torch.full((n,), 0.5)} if kind == "video" else {}
    return batch, labels


def positions(model, batch):
    """Our M-RoPE positions (3, B, T) of a batch."""
    grids = (batch.get(key) for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"))
    return mrope_positions(
        batch["mm_token_type_ids"],
        batch["attention_mask"],
        *grids,
        tokens_per_second=model.config.vision_config.tokens_per_second,
    )


def sights(scene):
    """What is where: classes (4 places, 4) of colour, shape, size and texture, 0 = no object; tracks (4, F, 4) of x, y, radius
    and visibility; the camera (F, 3); the theme."""
    classes, track = np.zeros((4, 4), np.int64), np.zeros((4, world.FRAMES, 4), np.float32)
    tables = {
        "colour": [*world.COLOURS],
        "shape": [*world.SHAPES],
        "size": [*world.SIZES],
        "texture": ["plain", "striped"],
    }
    for o, (centre, radius, seen) in zip(scene["objects"], world.tracks(scene), strict=True):
        place = list(world.PLACES).index(o["place"])
        classes[place] = [1 + names.index(o[key]) for key, names in tables.items()]
        track[place] = np.concatenate(
            [(centre - world.PLACES[o["place"]]) / 7, radius[:, None] / 7 - 1, seen[:, None]], 1
        )
    camera = (world.camera_path(scene) / (16, 16, 0.5)).astype(np.float32)
    return classes, track, camera, list(world.THEMES).index(scene["theme"])


def learn_to_see(model, clips, pool, rng, steps, batch_size=192, lr=2e-3):
    """Warm the vision tower up: each merged token of two frames tells what is at its place, where, the theme and the camera.

    The real Qwen2.5-VL starts from a trained vision encoder, too. Without this step shapes and motions were still at chance after
    1,300 steps of captioning.
    """
    sizes = [
        9,
        7,
        3,
        3,
        len(world.THEMES),
        8,
        6,
    ]  # colour, shape, size, texture, theme; tracks; camera in the first and its way
    head = torch.nn.Linear(128, sum(sizes))
    classes, track, camera, theme = (
        torch.from_numpy(np.stack(x)) for x in zip(*(sights(s) for s, _ in pool), strict=True)
    )
    params = [*model.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule, log = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1), []
    grid, bar = torch.tensor([[1, 4, 4]] * batch_size), tqdm(range(steps), "seeing")
    for step in bar:
        i = np.array([rng.randrange(len(pool)) for _ in range(batch_size)])
        f = np.array([rng.randrange(world.FRAMES - 3) for _ in i])
        g = f + np.array(
            [rng.choice((0, 2, 2, 3)) for _ in i]
        )  # the same frame twice is how an image comes
        out = model.model.visual(
            patches(np.stack([clips[i, f], clips[i, g]], 1)), grid_thw=grid
        ).pooler_output
        *logits, where, moved = head(out).split(sizes, 1)  # each (B * 4, ...), one row per place
        first, second = track[i, :, f].flatten(0, 1), track[i, :, g].flatten(0, 1)  # (B * 4, 4)
        shown = torch.maximum(
            first[:, 3], second[:, 3]
        )  # what blinks is named if either frame shows it
        tracks = torch.cat(
            [first, (second - first)[:, :3] * 4, second[:, 3:]], 1
        )  # steps are small: make them count
        wanted = torch.cat(
            [
                classes[i].flatten(0, 1) * shown.long()[:, None],
                theme[i].repeat_interleave(4)[:, None],
            ],
            1,
        )
        weight = torch.stack(
            [first[:, 3]] * 3 + [shown] + [first[:, 3] * second[:, 3]] * 3 + [shown], 1
        )
        seen_from = torch.cat(
            [camera[i, f], (camera[i, g] - camera[i, f]) * 4], 1
        ).repeat_interleave(4, 0)
        loss = sum(F.cross_entropy(p, wanted[:, k]) for k, p in enumerate(logits))
        error = (where - tracks) ** 2 * weight  # (B * 4, 8)
        loss = (
            loss
            + 4 * error.mean()
            + 12 * error[:, 4:7].mean()
            + 20 * ((moved - seen_from) ** 2).mean()
        )
        _step(optimizer, loss, params)
        schedule.step()
        log.append(
            [
                (p.argmax(1) == wanted[:, k])[wanted[:, 0] > 0].float().mean().item()
                for k, p in enumerate(logits)
            ]
            + [
                (error[:, 4:6].sum() / (tracks[:, 4:6] ** 2 * weight[:, 4:6]).sum()).item(),
                ((moved - seen_from) ** 2).mean().item(),
            ]
        )
        if step % 100 == 99:
            bar.write(
                f"{step + 1}: colour, shape, size, texture, theme; step, camera error {np.mean(log[-100:], 0).round(3)}"
            )


def _step(optimizer, loss, params):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()


def describe(model, clips, pool, collate, rng, steps, lr, warm=0.2, batch_size=48):
    """Teach the TASKS in one cycle of the learning rate; at first (`warm`) only concise captions of one or two objects."""
    eyes, rest = (
        list(model.model.visual.parameters()),
        [p for name, p in model.named_parameters() if ".visual." not in name],
    )
    optimizer = torch.optim.AdamW(
        [{"params": eyes, "share": 0.3}, {"params": rest, "share": 1.0}],
        betas=(0.9, 0.98),
        weight_decay=0.02,
    )
    easy, seen, bar = (
        [i for i, (s, _) in enumerate(pool) if len(s["objects"]) < 3],
        {},
        tqdm(range(steps), "describing"),
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = (
                group["share"]
                * lr
                * min(1, (step + 1) / 100)
                * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            )
        early = step < steps * warm
        task = (
            rng.choice(("video concise", "image concise"))
            if early
            else rng.choices(list(TASKS), list(TASKS.values()))[0]
        )
        size = batch_size // 2 if task.startswith(("five", "text", "plain text")) else batch_size
        chosen = rng.choices(easy if early else range(len(pool)), k=size)
        batch, labels = batch_of([example(task, i, pool, rng) for i in chosen], clips, collate)
        hidden = model.model(
            **batch, position_ids=positions(model, batch), use_cache=False
        ).last_hidden_state  # (B, T, D)
        wanted = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])
        _step(optimizer, loss, eyes + rest)
        seen.setdefault(task, []).append(loss.item())
        if step % 100 == 99:
            bar.write(
                f"step {step + 1}, loss: "
                + ", ".join(f"{t} {np.mean(v):.3f}" for t, v in sorted(seen.items()))
            )
            seen = {}


def pretrain_base(out, seed=42, scenes=8000, lr=2e-3):
    """Train the base from scratch, to see and then to describe, and save it to `out` in bf16. About 25 minutes on 2 cores."""
    torch.set_num_threads(os.cpu_count())
    pool = scene_pool(scenes, seed)
    cache = CACHE / f"clips-{zlib.crc32(json.dumps(pool).encode()):08x}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool() as workers:
            np.save(
                cache,
                np.stack(
                    list(
                        tqdm(
                            workers.imap(through_codec, [s for s, _ in pool], 64),
                            "rendering",
                            len(pool),
                        )
                    )
                ),
            )
    clips, rng = np.load(cache), random.Random(seed)  # (N, 16, S, S, 3) uint8
    torch.manual_seed(seed)
    processor = build_processor(
        [bench.texts(s, rng) for s, _ in pool[:2000]]
        + [
            HEAD + TAIL + " ".join(example(task, rng.randrange(scenes), pool, rng)[1:])
            for task in TASKS
            for _ in range(30)
        ]
    )
    collate, model = (
        Collator(processor, padding_side="right"),
        build_model(processor.tokenizer).train(),
    )
    windows.install(model.model.visual)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens, {len(pool)} scenes"
    )
    for cycle, (seeing, describing, rate) in enumerate(((1200, 3400, lr), (600, 600, lr / 2))):
        if cycle:  # from weights in bf16, which is how the first cycle's were kept, with a random state of its own
            rng = random.Random(seed + cycle)
            torch.manual_seed(seed + cycle)
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
        learn_to_see(model, clips, pool, rng, seeing, lr=rate)
        describe(model, clips, pool, collate, rng, describing, rate, warm=0 if cycle else 0.2)
    shutil.rmtree(out, ignore_errors=True)
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)


def pretrain_prober(out, seed=42):
    """Train the prober with train.py on coarse captions only (T2V, T2I) and keep its adapter in bf16 at `out`."""
    run(
        f"{RANKS} train.py --base {BASE} --prober {BASE} --mixture runs/mini/train/coarse.json --out {CACHE / 'prober'} "
        f"--epochs 1 --schedule uniform --steps 400 --seed {seed} --workers 0 --dropout 0.1",
        OMP_NUM_THREADS="1",
    )
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(CACHE / "prober", out, ignore=shutil.ignore_patterns("log.jsonl", "state*"))
    weights = load_file(out / "adapter_model.safetensors")
    save_file(
        {k: v.to(torch.bfloat16) for k, v in weights.items()},
        out / "adapter_model.safetensors",
        {"format": "pt"},
    )


def caption_accuracy(folder=BASE, n=200, seed=7, show=3):
    """Share of n held-out clips, decoded from mp4, whose greedy concise caption has all colours, shapes and motions right."""
    ask = transformers_captioner(
        folder, frames=8, max_tokens=200, device="cpu", batch_size=32, max_new_tokens=64
    )
    rng, right = random.Random(f"{seed}/caption"), 0
    scenes = [world.sample_scene(rng, test=True) for _ in range(n)]
    with tempfile.TemporaryDirectory() as clips:
        for i, scene in enumerate(scenes):
            Path(clips, f"{i}.mp4").write_bytes(world.encode_mp4(world.render_scene(scene)))
        prompt = "Describe the video in the concise style."
        answers = [
            answer
            for answer, *_ in ask(
                [{"media": [{"video": f"{clips}/{i}.mp4"}], "prompt": prompt} for i in range(n)]
            )
        ]
    for i, (scene, answer) in enumerate(zip(scenes, answers, strict=True)):
        good = world.read_events(answer) == {
            (o["colour"], o["shape"]): o["motion"] for o in scene["objects"]
        }
        right += good
        if i < show or not good and i < 10 * show:
            print(
                "right:" if good else "WRONG:",
                answer,
                "" if good else f"(truth: {world.concise(scene, rng)[0]})",
            )
    print(
        f"{folder}: {right} of {n} held-out clips have colour, shape and motion of every object right ({right / n:.1%})"
    )
    return right / n


def run(command, **environment):
    """Print a command and run it; stop with its status if it fails."""
    shown = command.replace(RANKS, "torchrun --nproc-per-node 2").replace(sys.executable, "python")
    print("\n$ " + " ".join([*(f"{k}={v}" for k, v in environment.items()), shown]), flush=True)
    status = subprocess.run(command.split(), env=os.environ | environment).returncode
    if status:
        sys.exit(f"`{shown}` ended with status {status}")


def tour():
    """Walk the whole method: render, synthesise, score the base, train, score the trained model, compare."""
    began, python = time.time(), sys.executable
    print(
        "nanoGVE's tour: a rendered world, a tiny Qwen2.5-VL, the Modality Pyramid, 16 datasets. All commands run alone, too."
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    run(f"{python} -m mini render")
    run(f"{python} synth.py --max-new-tokens 96 --shares T2T=0 T2I=0 I2V=0 V2V=0 TI2V=1 TV2V=0")
    run(f"{python} eval.py --ckpt {BASE} --out runs/base --name base")
    run(
        f"{RANKS} train.py --workers 0 --mixture runs/mini/train/mixture.json runs/synth/uvrd/mixture.json --root runs/raw",
        OMP_NUM_THREADS="1",
    )
    run(f"{python} eval.py --ckpt runs/gve-mini --out runs/gve-mini --name trained")
    files = ["runs/base/results.json", "runs/gve-mini/results.json"]
    run(f"{python} eval.py --table 1 2 --figure 2 --results {' '.join(files)} --out runs/tables")
    print(f"\nthe tour took {(time.time() - began) / 60:.1f} minutes")


def shortcuts(ckpt):
    """Score base, prober, a checkpoint and every ranker that must fail (ablate.py), and print what they reach."""
    how = {
        name: f"--ckpt {folder}"
        for name, folder in {"base": BASE, "prober": PROBER, "trained": ckpt}.items()
    }
    for name, datasets in ablate.RANKERS.items():
        how[name] = f"--encoder mini/ablate.py:{name}" + (
            f" --datasets {' '.join(datasets)}" if datasets else ""
        )
    how["trained"] += " --trec"  # the report names wrong answers
    for name, flags in how.items():
        run(
            f"{sys.executable} eval.py {flags} --out runs/ablate/{name} --name {name}",
            CKPT=str(ckpt),
        )
    ablate.table({name: f"runs/ablate/{name}/results.json" for name in how})


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", help="one of the above; without it, the tour"
    )
    for name in ("render", "pretrain"):
        sub = commands.add_parser(name)
        sub.add_argument("--seed", type=int, default=bench.SEED, help="of everything random")
    sub.add_argument("--check", action="store_true", help="only measure the committed base")
    sub = commands.add_parser("ablate")
    sub.add_argument("--ckpt", default="runs/gve-mini", help="the checkpoint to compare with")
    commands.add_parser("study").add_argument("name", choices=study.STUDIES)
    sub = commands.add_parser("report")
    sub.add_argument(
        "--synth",
        nargs="*",
        metavar="DIR",
        help="judge what synth.py made; default: of runs/raw, in runs/synth",
    )
    args = parser.parse_args(argv)
    os.chdir(Path(__file__).resolve().parent.parent)
    if args.command is None:
        tour()
    elif args.command == "render":
        began, made = time.time(), bench.write("runs/mini", args.seed)
        if made["fresh"] or not Path("runs/raw/captions.jsonl").exists():
            shutil.rmtree("runs/synth", ignore_errors=True)  # made of other videos
            bench.raw("runs/raw", args.seed)
        print(
            f"runs/mini: {made['videos']} videos, {made['queries']} test queries, {made['pairs']} training pairs, "
            f"{f'written in {time.time() - began:.0f} s' if made['fresh'] else 'complete and current, nothing done'}"
        )
    elif args.command == "ablate":
        shortcuts(args.ckpt)
    elif args.command == "study":
        study.study(args.name)
    elif args.command == "report" and args.synth is None:
        report.world_report("runs/report")
    elif args.command == "report":
        report.synth_report(*(args.synth or ("runs/raw", "runs/synth")))
    elif args.check:
        caption_accuracy()
    else:
        pretrain_base(BASE, args.seed)
        caption_accuracy()
        bench.write("runs/mini", args.seed)
        pretrain_prober(PROBER, args.seed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as problem:
        sys.exit(f"error: {problem}")
