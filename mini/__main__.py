"""The tour of the mini world and its parts (DESIGN.md section 4).

    python -m mini                     render, evaluate the base, train, evaluate; the two tables and a radar plot; under 10 minutes on 2 cores
    python -m mini render              only the files of runs/mini (about a minute)
    python -m mini pretrain            make mini/base and mini/prober again (about 25 minutes); they are committed, so rarely needed
    python -m mini pretrain --check    measure the committed base: colour, shape and motion of every object in its captions of held-out clips

The base is a Qwen2.5-VL of 1.7M parameters taught by next-token prediction to describe scenes in words; it is no retriever. The prober is a
small LoRA adapter on it, trained on coarse captions alone, and plays the off-the-shelf embedder that starts the curriculum (section 4.2).
Legend: B batch, T tokens, F frames, P patches, N scenes.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor,
                          Qwen2VLVideoProcessor)

from data import Collator, sample_indices
from mini import world
from model import mrope_positions
from uvrb import DATASETS

HERE = Path(__file__).resolve().parent
BASE, PROBER, RUNS = HERE / "base", HERE / "prober", HERE.parent / "runs"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = """{%- if messages[0].role != 'system' -%}<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'video') -%}{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}""".replace("assistant.<|im_end|>\\n", "assistant.<|im_end|>{{ '\\n' }}").replace(
    "<|im_start|>system\\n", "<|im_start|>system{{ '\\n' }}")

# What a user may ask of the base. {} is a style; the JSON forms answer {"caption": ...}, {"query": ...} or a dict of the five styles.
ASK = {
    "video": ("Describe the video in the {} style.", "Write a {} caption of the video.", "Give a {} description of this video."),
    "image": ("Describe the image in the {} style.", "Write a {} caption of the image.", "Give a {} description of this frame."),
    "query": ("Write the query that leads from the first to the second.", "Describe what changes from the reference to the target video."),
    "json": " Answer in JSON.",
    "five video": ("Describe the video in five styles. Answer in JSON.",),
    "five image": ("Describe the image in five styles. Answer in JSON.",)}
TASKS = {"video concise": 8, "video rich": 4, "video abstract": 1.5, "video keywords": 1.5, "video partial": 1, "image concise": 2, "image rich": 2,
         "image abstract": 0.7, "image keywords": 0.7, "image minimal": 0.7, "query video": 2, "query image": 1.5, "json video": 0.7,
         "json image": 0.4, "json query": 0.7, "five video": 0.5, "five image": 0.3, "text": 2}


# The base's tokenizer, processor and weights

def build_processor(texts):
    """A Qwen2.5-VL processor whose byte-level BPE was learnt from `texts`: Qwen's splitting rule and special tokens, about 1,000 tokens."""
    bpe = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1100, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    learnt = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(m) for m in learnt["merges"]], model_max_length=32768, padding_side="left",
                               extra_special_tokens=SPECIAL)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 256 * 28 * 28}
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=dict(size)), chat_template=CHAT)


def build_model(tokenizer):
    """A Qwen2.5-VL of 1.7M parameters: 4 vision blocks of width 96, 4 language layers of width 128, tied embeddings."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end",
                                                                            "endoftext", "im_end")}
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.05,
                num_key_value_heads=2, max_position_embeddings=32768, rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0}, bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    vision = dict(depth=4, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2, tokens_per_second=2, window_size=112, fullatt_block_indexes=[1, 3], initializer_range=0.05)
    config = Qwen2_5_VLConfig(text_config={**text, "tie_word_embeddings": True}, vision_config=vision, image_token_id=ids["image_pad"],
                              video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
                              tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [ids["im_end"], ids["endoftext"]], ids["endoftext"]
    return model


# Examples: a request and its answer

def scene_pool(n, seed):
    """n training scenes, the first half in pairs of a scene and its near-twin: [(scene, change from its predecessor or None)]."""
    pool, rng = [], random.Random(f"{seed}/pretrain")
    while len(pool) < n:
        scene = world.sample_scene(rng, test=False, count=rng.choices((1, 2, 3), (3, 5, 2))[0])
        pool.append((scene, None))
        if len(pool) < n // 2:
            twin = None
            while twin is None:
                twin = world.change(scene, rng.choice(("motion", "motion", "order", "exchange", "place", "size", "texture", "camera", "theme",
                                                       "colour")), rng, test=False)
            pool.append(twin)
    return pool


def through_codec(scene):
    """A scene's frames uint8 (F, S, S, 3) as a reader of its mp4 file sees them."""
    return world.decode_mp4(world.encode_mp4(world.render_scene(scene)))


def example(task, index, pool, rng):
    """Make one example of a task from scene `index`: (media, request, answer); media are ("video" | "image", pool index, frame)."""
    scene, delta = pool[index]
    kind, _, style = task.partition(" ")
    shot = ("image", index, rng.choice(world.VISIBLE))
    if kind == "text":
        from mini.bench import texts  # every text form of the world and the prompts of the benchmark, read rather than answered
        return [], "", texts(scene, rng)
    if kind == "query" or style == "query":
        while delta is None:
            index = rng.randrange(len(pool) // 2)
            scene, delta = pool[index]
        reference = (rng.choice(("video", "image")) if kind == "json" else style, index - 1, rng.choice(world.VISIBLE))
        media, ask, answer = [reference, ("video", index, 0)], rng.choice(ASK["query"]), world.composed(scene, delta, rng)[0]
        return (media, ask + ASK["json"], json.dumps({"query": answer})) if kind == "json" else (media, ask, answer)
    if kind == "five":
        caption, styles = (world.video_caption, world.VIDEO_STYLES) if style == "video" else (world.frame_caption, world.FRAME_STYLES)
        media = ("video", index, 0) if style == "video" else shot
        return [media], rng.choice(ASK[task]), json.dumps({s: caption(scene, s, rng)[0] for s in styles})
    medium, style = (style, "") if kind == "json" else (kind, style)
    style = style or rng.choice(world.VIDEO_STYLES if medium == "video" else world.FRAME_STYLES)
    text = (world.video_caption if medium == "video" else world.frame_caption)(scene, style, rng)[0]
    media, ask = [("video", index, 0) if medium == "video" else shot], rng.choice(ASK[medium]).format(style)
    return (media, ask + ASK["json"], json.dumps({"caption": text})) if kind == "json" else (media, ask, text)


def patches(frames):
    """Cut normalised frames into Qwen2-VL's patches: uint8 (n, F, S, S, 3) -> float32 (n * F/2 * 16, 1176), F even."""
    x = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255  # (n, F, 3, S, S)
    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    x = (x - mean[:, None, None]) / std[:, None, None]
    n, f, c, side = x.shape[0], x.shape[1] // 2, 3, x.shape[-1] // 28
    x = x.view(n, f, 2, c, side, 2, 14, side, 2, 14).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # merged rows, merged columns, 2 x 2, then a patch
    return x.reshape(-1, c * 2 * 14 * 14)


HEAD, TAIL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def batch_of(examples, clips, tokenizer):
    """Collate examples: a dict of model inputs padded on the right, and labels (B, T), -100 where no answer stands."""
    rows, videos, images, pads = [], [], [], tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    for media, ask, answer in examples:
        blocks = ""
        for kind, index, frame in media:
            pad, n = ("<|video_pad|>", 16) if kind == "video" else ("<|image_pad|>", 4)
            (videos if kind == "video" else images).append(clips[index][sample_indices(16, 8)] if kind == "video" else clips[index][[frame] * 2])
            blocks += "<|vision_start|>" + pad * n + "<|vision_end|>"
        head = encode(HEAD + blocks + ask + TAIL) if ask else encode(HEAD)
        rows.append((head, encode(answer + "<|im_end|>")))
    longest = max(len(a) + len(b) for a, b in rows)
    ids, labels = torch.full((len(rows), longest), tokenizer.pad_token_id), torch.full((len(rows), longest), -100)
    mask = torch.zeros_like(ids)
    for i, (head, answer) in enumerate(rows):
        n = len(head) + len(answer)
        ids[i, :n], labels[i, len(head) : n], mask[i, :n] = torch.tensor(head + answer), torch.tensor(answer), 1
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == pads[0]).long() + 2 * (ids == pads[1]).long()}
    if videos:
        batch |= {"pixel_values_videos": patches(np.stack(videos)), "video_grid_thw": torch.tensor([[4, 4, 4]] * len(videos)),
                  "second_per_grid_ts": torch.full((len(videos),), 0.5)}
    if images:
        batch |= {"pixel_values": patches(np.stack(images)), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(images))}
    return batch, labels


def positions(model, batch):
    """Our M-RoPE positions (3, B, T) of a batch."""
    return mrope_positions(batch["mm_token_type_ids"], batch["attention_mask"], batch.get("image_grid_thw"), batch.get("video_grid_thw"),
                           batch.get("second_per_grid_ts"), tokens_per_second=model.config.vision_config.tokens_per_second)


def answer_loss(model, batch, labels):
    """Next-token cross-entropy over the answers -> (mean loss, share of tokens predicted exactly)."""
    hidden = model.model(**batch, position_ids=positions(model, batch), use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, D)
    wanted = labels[:, 1:] != -100
    logits, target = model.lm_head(hidden[wanted]), labels[:, 1:][wanted]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()


def equal_windows(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    """Vision attention over windows of one length in one call; transformers would loop over them. query (1, H, P, d) -> (1, P, H, d)"""
    n, (_, heads, _, width) = len(cu_seq_lens_q) - 1, query.shape
    cut = lambda x: x.view(heads, n, -1, width).transpose(0, 1)  # noqa: E731  (n, H, P/n, d)
    return F.scaled_dot_product_attention(cut(query), cut(key), cut(value), scale=scaling).transpose(1, 2).reshape(1, -1, heads, width), None


def use_equal_windows(model):
    """Let a model whose clips all have one size use `equal_windows` (every frame of the mini world is a single window)."""
    ALL_ATTENTION_FUNCTIONS.register("flash_equal_windows", equal_windows)  # the word flash makes transformers pass all windows at once
    model.model.visual.config._attn_implementation = "flash_equal_windows"


def sights(scene):
    """What can be seen where: classes (4 places, 4) of colour, shape, size, texture (0 = no object) and tracks (4, F, 4) of x, y, radius, seen."""
    classes, track = np.zeros((4, 4), np.int64), np.zeros((4, world.FRAMES, 4), np.float32)
    tables = list(world.COLOURS), list(world.SHAPES), list(world.SIZES), ["plain", "striped"]
    for o, (centre, radius, seen) in zip(scene["objects"], world.tracks(scene), strict=True):
        q = list(world.PLACES).index(o["place"])
        classes[q] = [1 + table.index(o[key]) for table, key in zip(tables, ("colour", "shape", "size", "texture"), strict=True)]
        track[q] = np.concatenate([(centre - world.PLACES[o["place"]]) / 7, radius[:, None] / 7 - 1, seen[:, None]], 1)
    return classes, track


def learn_to_see(model, clips, pool, rng, steps, batch_size=192, lr=2e-3):
    """Warm the vision tower up: from every merged token of two frames tell what is there, where in both frames, the theme and the camera.

    Real Qwen2.5-VL starts its captioning from a trained vision encoder as well; without this step shapes and motions take 10x longer.
    """
    visual, sizes = model.model.visual, (9, 7, 3, 3)
    head = torch.nn.Linear(128, sum(sizes) + 8 + len(world.THEMES) + 3)
    labels = [sights(s) for s, _ in pool]
    classes, track = np.stack([c for c, _ in labels]), np.stack([t for _, t in labels])
    themes = np.array([list(world.THEMES).index(s["theme"]) for s, _ in pool])
    camera = np.stack([np.cumsum([world.camera_step(s, f) for f in range(world.FRAMES)], 0) for s, _ in pool]) / (4, 4, 0.13)
    params = [*visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    began, log = time.time(), []
    for step in range(steps):
        i = np.array([rng.randrange(len(pool)) for _ in range(batch_size)])
        f = np.array([rng.randrange(world.FRAMES - 3) for _ in i])
        g = f + np.array([rng.choice((0, 2, 3)) for _ in i])  # the same frame twice is how an image comes
        x = patches(np.stack([clips[i, f], clips[i, g]], 1))
        out = visual(x, grid_thw=torch.tensor([[1, 4, 4]] * batch_size)).pooler_output  # (B * 4, 128), one token per place
        parts = head(out).split([*sizes, 8, len(world.THEMES), 3], 1)
        both = torch.from_numpy(np.concatenate([track[i, :, f], track[i, :, g]], 2)).flatten(0, 1)  # (B * 4, 8)
        shown = both[:, [3, 7]].amax(1)  # an object that blinks is named where either frame shows it
        names = torch.from_numpy(classes[i]).flatten(0, 1) * shown.long()[:, None]
        loss = sum(F.cross_entropy(p, names[:, k]) for k, p in enumerate(parts[:4]))
        weight = torch.stack([both[:, 3]] * 3 + [shown] + [both[:, 7]] * 3 + [shown], 1)
        loss = loss + 4 * ((parts[4] - both) ** 2 * weight).mean() + F.cross_entropy(parts[5], torch.from_numpy(themes[i]).repeat_interleave(4))
        moved = torch.from_numpy(camera[i, g] - camera[i, f]).float().repeat_interleave(4, 0)
        loss = loss + 2 * ((parts[6] - moved) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        there = names[:, 0] > 0
        log.append([loss.item()] + [(p.argmax(1) == names[:, k])[there].float().mean().item() for k, p in enumerate(parts[:4])] +
                   [((parts[4] - both) ** 2 * weight).mean().item(), ((parts[6] - moved) ** 2).mean().item()])
        if step % 100 == 99:
            print(f"seeing, step {step + 1} {time.time() - began:.0f} s: loss {np.mean(log, 0)[0]:.3f}, colour shape size texture "
                  f"{np.mean(log, 0)[1:5].round(3)}, squared error of tracks {np.mean(log, 0)[5]:.3f} camera {np.mean(log, 0)[6]:.3f}", flush=True)
            log = []


def pretrain_base(out, seed=42, scenes=8000, seeing=1000, steps=1500, batch_size=48, lr=2e-3):
    """Train the base from scratch by captioning and save it to `out` in bf16. About 20 minutes on 2 cores."""
    torch.set_num_threads(os.cpu_count())
    pool, cache = scene_pool(scenes, seed), RUNS / "pretrain" / f"clips-{scenes}-{seed}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.Pool() as workers:
            clips = np.stack(list(tqdm(workers.imap(through_codec, [s for s, _ in pool], 64), "rendering", len(pool))))
        np.save(cache, clips)
    clips = np.load(cache)  # (N, 16, S, S, 3) uint8
    torch.manual_seed(seed)
    rng = random.Random(seed)
    from mini.bench import texts
    processor = build_processor([texts(s, rng) for s, _ in pool[:2000]] +
                                [HEAD + TAIL + " ".join(example(t, rng.randrange(1000), pool, rng)[1:]) for t in TASKS for _ in range(30)])
    tokenizer, easy = processor.tokenizer, [i for i, (s, _) in enumerate(pool) if len(s["objects"]) < 3]
    model = build_model(tokenizer).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(pool)} scenes, {steps} steps")
    use_equal_windows(model)
    learn_to_see(model, clips, pool, rng, seeing)
    save_base(model, processor, out)
    eyes = list(model.model.visual.parameters())
    rest = [p for n, p in model.named_parameters() if ".visual." not in n]
    optimizer = torch.optim.AdamW([{"params": eyes, "share": 0.3}, {"params": rest, "share": 1.0}], betas=(0.9, 0.98), weight_decay=0.02)
    began, seen = time.time(), {}
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        warm = step < steps // 10  # first only concise captions of one or two objects, then everything
        task = rng.choice(("video concise", "video concise", "image concise")) if warm else rng.choices(list(TASKS), list(TASKS.values()))[0]
        size = batch_size // 2 if task.startswith(("five", "text")) else batch_size
        batch, labels = batch_of([example(task, rng.choice(easy) if warm else rng.randrange(len(pool)), pool, rng) for _ in range(size)], clips, tokenizer)
        loss, right = answer_loss(model, batch, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.setdefault(task, []).append((loss.item(), right.item()))
        if step % 100 == 99:
            print(f"step {step + 1} {time.time() - began:.0f} s  " + "  ".join(
                f"{t} {np.mean([x for x, _ in v]):.3f}/{np.mean([y for _, y in v]):.3f}" for t, v in sorted(seen.items())), flush=True)
            seen = {}
        if step % 500 == 499:
            save_base(model, processor, out)
            print(f"step {step + 1}: {caption_accuracy(model, processor, n=48):.3f} of held-out clips right", flush=True)
            model.train()
    save_base(model, processor, out)


def save_base(model, processor, out):
    """Write the checkpoint folder in bf16; the running model stays as it is."""
    import copy
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


# Writing and checking

@torch.inference_mode()
def generate(model, processor, items, prompts, max_new_tokens=64, batch_size=32):
    """Answer each prompt about its item greedily, with our own M-RoPE positions. Returns a list of str.

    items: resolved items of data.py (video or image), or lists of them (reference, target) shown in that order; prompts: one str per item.
    """
    collate, tokenizer, out = Collator(processor, padding_side="left"), processor.tokenizer, []
    start, stop, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|im_end|>"])
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    for at in range(0, len(items), batch_size):
        samples = []
        for item, prompt in zip(items[at : at + batch_size], prompts[at : at + batch_size], strict=True):
            parts, ids = [collate.prepare(i) for i in (item if isinstance(item, list) else [item])], encode(HEAD)
            for p in parts:
                ids += p["ids"][p["ids"].index(start) : p["ids"].index(stop) + 1]
            merged = {"ids": ids + encode(prompt + TAIL)}
            for key in {k for p in parts for k in p if k != "ids"}:
                merged[key] = [p[key] for p in parts if key in p]
                merged[key] = torch.cat(merged[key]) if isinstance(merged[key][0], torch.Tensor) else merged[key]
            samples.append(merged)
        out += _greedy(model, _stack(samples, tokenizer.pad_token_id, collate), end, max_new_tokens, tokenizer)
    return out


def _stack(samples, pad, collate):
    """Left-pad prepared samples into one batch of model inputs."""
    longest = max(len(s["ids"]) for s in samples)
    ids = torch.tensor([[pad] * (longest - len(s["ids"])) + s["ids"] for s in samples])
    mask = torch.tensor([[0] * (longest - len(s["ids"])) + [1] * len(s["ids"]) for s in samples])
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == collate.image_pad).long() + 2 * (ids == collate.video_pad).long()}
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if any(key in s for s in samples):
            batch[key] = torch.cat([s[key] for s in samples if key in s])
    if "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = torch.tensor([x for s in samples for x in s.get("second_per_grid_ts", [])])
    return batch


def _greedy(model, batch, end, max_new_tokens, tokenizer):
    position, mask, cache = positions(model, batch), batch["attention_mask"], None
    inputs, written, done = dict(batch), [], torch.zeros(len(mask), dtype=torch.bool)
    following = position.amax((0, 2)) + 1  # (B,) text goes on after the largest position
    for _ in range(max_new_tokens):
        out = model.model(**{**inputs, "attention_mask": mask}, position_ids=position, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)  # (B,)
        written.append(torch.where(done, end, token))
        done |= token == end
        if done.all():
            break
        inputs, position = {"input_ids": token[:, None], "mm_token_type_ids": torch.zeros(len(token), 1, dtype=torch.long)}, following.expand(3, -1)[..., None]
        following, mask = following + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    rows = torch.stack(written, 1).tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def caption_accuracy(model, processor, n=200, seed=7, show=0):
    """Share of n held-out clips whose free-running concise caption has colour, shape and motions of every object right."""
    model.eval()
    rng, folder, right = random.Random(f"{seed}/caption"), RUNS / "pretrain" / "heldout", 0
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [world.sample_scene(rng, test=True) for _ in range(n)]
    for i, scene in enumerate(scenes):
        (folder / f"{i}.mp4").write_bytes(world.encode_mp4(world.render_scene(scene)))
    answers = generate(model, processor, [{"video": str(folder / f"{i}.mp4")} for i in range(n)], ["Describe the video in the concise style."] * n)
    for scene, answer in zip(scenes, answers, strict=True):
        truth = {(o["colour"], o["shape"]): o["motion"] for o in scene["objects"]}
        ok = world.read_events(answer) == truth
        right += ok
        if show > 0:
            show -= 1
            print("right" if ok else "WRONG", answer, "" if ok else truth)
    return right / n


def main(argv=None):
    args = argparse.Namespace(scenes=int(sys.argv[2]), steps=int(sys.argv[3])) if len(sys.argv) > 3 else argparse.Namespace(scenes=8000, steps=2600)
    pretrain_base(RUNS / "pretrain" / "base", scenes=args.scenes, steps=args.steps)


if __name__ == "__main__":
    main()
