"""Make mini/base and mini/prober: `python -m mini pretrain`, about 30 minutes on two cores.

The base plays Qwen2.5-VL-Instruct: 1.7M parameters that learn to see, and then to describe training
scenes in words, by next-token prediction. It is hardly a retriever. The prober plays GME: a small
LoRA adapter on the base, trained on coarse captions alone, from which the curriculum starts
(section 4.2). Both are committed, so this runs rarely.

`python -m mini pretrain --check` reads 200 held-out clips with the committed base and should find
the caption of at least 80 % right in colour, shape and motion of every object.

Legend: N scenes, F = 16 frames, S = 56 pixels, B batch, T tokens, D width of the language model.
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

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
from data import (
    ANSWER_START,
    DEFAULT_INSTRUCTION,
    END,
    IMAGE_TOKENS,
    MIN_TOKENS,
    SYSTEM_START,
    TURN_END,
    USER_START,
    VISION_BLOCK,
    Collator,
    sample_indices,
)
from kernels import windows
from mini import bench, world
from model import mrope_positions
from support.commands import run
from support.files import write_json
from support.progress import track

BASE = Path("mini/base")
PROBER = Path("mini/prober")
CACHE = Path("runs/pretrain")

# The base's geometry is Qwen2.5-VL's own: only its widths and depths are small.
PATCH = 14  # pixels per side of a patch
MERGE = 2  # patches per side that become one token
PATCH_FRAMES = 2  # frames in a patch
PATCH_VALUES = 3 * PATCH_FRAMES * PATCH * PATCH  # 1,176 colour values
TOKEN_PIXELS = (PATCH * MERGE) ** 2  # 28 x 28
SIDE = world.SIZE // PATCH  # patches per side of a frame: 4
FRAME_TOKENS = (SIDE // MERGE) ** 2  # one per place of the world: 4
VIDEO_FRAMES = 8
VIDEO_GRIDS = VIDEO_FRAMES // PATCH_FRAMES
SECONDS_PER_GRID = world.FRAMES / world.FPS / VIDEO_GRIDS
WIDTH = 128  # D
TOKENS_PER_SECOND = 2  # M-RoPE's unit of time, as in the real models
MAX_TOKENS = 32768
VOCABULARY = 1100  # at most, without the special tokens

# Qwen's special tokens, in the order of their ids.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
STOP = TURN_END.strip()  # the token that ends an answer

# Qwen's own rule for splitting a text into the pieces within which byte pairs are merged.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# data.py's prompt without its pooled token: HEAD, media, request, TAIL, and then the answer.
HEAD = SYSTEM_START + DEFAULT_INSTRUCTION + TURN_END + USER_START
TAIL = TURN_END + ANSWER_START


def make_chat_template():
    """Write the chat template of Qwen2.5-VL-Instruct from data.py's pieces of the prompt.

    The user turn has its parts in the order given, and only a generation prompt at its end.
    """
    before_role, after_role = USER_START.split("user")
    before_kind, after_kind = VISION_BLOCK["image"].split("image")
    pieces = {
        "DEFAULT_SYSTEM": SYSTEM_START + DEFAULT_INSTRUCTION + TURN_END,
        "BEFORE_ROLE": before_role,
        "AFTER_ROLE": after_role,
        "BEFORE_KIND": before_kind,
        "AFTER_KIND": after_kind,
        "TURN_END": TURN_END,
        "ANSWER_START": ANSWER_START,
    }
    # Unlike model.py's: parts in the order given, and no pooled token at the end.
    template = (
        "{%- if messages[0].role != 'system' %}\n"
        "{{- DEFAULT_SYSTEM }}{%- endif %}\n"
        "{%- for message in messages %}{{- BEFORE_ROLE + message.role + AFTER_ROLE }}\n"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content %}\n"
        "{%- if part.type == 'text' %}{{- part.text }}{%- else %}\n"
        "{{- BEFORE_KIND + part.type + AFTER_KIND }}{%- endif %}\n"
        "{%- endfor %}{%- endif %}{{- TURN_END }}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- ANSWER_START }}{%- endif %}"
    )
    for name, text in pieces.items():
        literal = "'" + text.replace("\n", r"\n") + "'"
        template = template.replace(name, literal)
    return template


def build_processor(texts):
    """Make a Qwen2.5-VL processor with Qwen's special tokens and byte pairs learnt from `texts`."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters.alphabet(), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)

    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=MAX_TOKENS,
        padding_side="left",
        extra_special_tokens=SPECIAL,
    )
    size = {
        "shortest_edge": MIN_TOKENS * TOKEN_PIXELS,
        "longest_edge": IMAGE_TOKENS * TOKEN_PIXELS,
    }
    images = Qwen2VLImageProcessor(size=dict(size))
    videos = Qwen2VLVideoProcessor(size=dict(size))
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=make_chat_template())


def build_model(tokenizer):
    """Make a random Qwen2.5-VL of 1.7M parameters with tied embeddings.

    Rotary base 100, and most channels to the width: with heads of 32 channels, Qwen's own base and
    sections would leave the model blind to left and right.
    """
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rotary = {"rope_type": "default", "mrope_section": [2, 4, 10], "rope_theta": 100.0}
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        # Four layers, with four heads of 32 channels that share two heads of keys and values.
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters=rotary,
        initializer_range=0.05,
        bos_token_id=ids[END],
        eos_token_id=ids[STOP],
        pad_token_id=ids[END],
        tie_word_embeddings=True,
    )

    # Two of the four vision blocks attend within windows of 8 x 8 patches, larger than a frame.
    vision = dict(
        depth=4,
        hidden_size=96,
        intermediate_size=256,
        num_heads=4,
        out_hidden_size=WIDTH,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=PATCH_FRAMES,
        tokens_per_second=TOKENS_PER_SECOND,
        window_size=8 * PATCH,
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
    model.generation_config.eos_token_id = [ids[STOP], ids[END]]
    model.generation_config.pad_token_id = ids[END]
    return model


# Scenes


class Practice(NamedTuple):
    """A training scene, and the difference to the scene before it if the two are near-twins."""

    scene: dict
    difference: dict | None


def scene_pool(n, seed):
    """Draw n training scenes as Practice; in the first half each is followed by a near-twin."""
    kinds = "motion motion order exchange place size texture camera theme colour".split()
    rng = random.Random(f"{seed}/pretrain")
    pool = []
    while len(pool) < n:
        count = rng.choices((1, 2, 3), (3, 5, 2))[0]
        scene = world.sample_scene(rng, test=False, count=count)
        pool.append(Practice(scene, None))

        twin = None
        while len(pool) < n // 2 and twin is None:
            twin = world.change(scene, rng.choice(kinds), rng, test=False)
        if twin is not None:
            pool.append(Practice(*twin))
    return pool


def through_codec(scene):
    """Return a scene's frames uint8 (F, S, S, 3) as a reader of its mp4 file sees them."""
    return world.decode_mp4(world.encode_mp4(world.render_scene(scene)))


def rendered(pool):
    """Return the frames of all scenes, uint8 (N, F, S, S, 3); rendered once and kept in CACHE."""
    cache = CACHE / f"clips-{zlib.crc32(json.dumps(pool).encode()):08x}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        scenes = [practice.scene for practice in pool]
        with multiprocessing.Pool() as workers:
            rendered = workers.imap(through_codec, scenes, 64)
            clips = list(track(rendered, len(pool), "rendering"))
        np.save(cache, np.stack(clips))
    return np.load(cache)


# Examples of what a user may ask of the base

# {} is a style; a request in JSON is answered by {"caption": ...}, {"query": ...} or, for five
# styles, by a dict of them.
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

# How often each task is practised.
TASKS = {
    # a caption: medium and style
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
    # a composed query: the reference's medium; the target is a video
    "query video": 2,
    "query image": 1.5,
    # the same in JSON, one caption in a random style, or all five
    "json video": 0.7,
    "json image": 0.4,
    "json query": 0.7,
    "five video": 0.5,
    "five image": 0.3,
    # a text of the world without any request, and an answer without a request
    "text": 2,
    "plain video": 7,
    "plain image": 3,
    "plain text": 7,
}
PLAIN_VIDEO = (world.concise, world.rich, world.temporal, world.spatial, world.keywords)
PLAIN_IMAGE = tuple(world.FRAME_STYLES[style] for style in ("concise", "rich", "keywords"))


class Medium(NamedTuple):
    """A medium that an example shows: the clip of scene `clip`, or one `frame` of it."""

    kind: str  # "video" or "image"
    clip: int
    frame: int


class Example(NamedTuple):
    media: list
    prompt: str  # request and TAIL, which follow HEAD and the media
    answer: str


def example(task, i, pool, rng):
    """Make one example of a task from scene i of the pool."""
    scene = pool[i].scene
    kind, _, style = task.partition(" ")
    if kind == "text":
        return Example([], "", bench.random_text(scene, rng))
    if kind == "plain":
        return plain_example(style, i, scene, rng)
    if "query" in task:
        return query_example(task, i, pool, rng)

    medium = kind if kind in ("video", "image") else style
    styles = world.VIDEO_STYLES if medium == "video" else world.FRAME_STYLES
    media = [Medium(medium, i, rng.choice(world.VISIBLE))]
    if kind == "five":
        request = rng.choice(ASK[task])
        captions = {}
        for name, form in styles.items():
            captions[name], _ = form(scene, rng)
        return Example(media, request + TAIL, json.dumps(captions))

    if kind == "json":
        style = rng.choice(list(styles))
    request = rng.choice(ASK[medium]).format(style)
    caption, _ = styles[style](scene, rng)
    if kind == "json":
        return Example(media, request + JSON + TAIL, json.dumps({"caption": caption}))
    return Example(media, request + TAIL, caption)


def plain_example(style, i, scene, rng):
    """Follow a video, an image or a text by END and another text about the same scene.

    Qwen has read END wherever a document begins; here it opens answers that nobody asked for.
    """
    forms = PLAIN_IMAGE if style == "image" else PLAIN_VIDEO
    first, second = rng.sample(forms, 2)
    given, _ = first(scene, rng, shuffle=True)
    answer, _ = second(scene, rng, shuffle=True)
    if style == "text":
        return Example([], given + TAIL + END, answer)
    media = [Medium(style, i, rng.choice(world.VISIBLE))]
    return Example(media, TAIL + END, answer)


def query_example(task, i, pool, rng):
    """Show a reference and its twin, and ask for the query that leads from one to the other."""
    while pool[i].difference is None:
        i = rng.randrange(len(pool) // 2)
    kind, _, medium = task.partition(" ")
    if kind == "json":
        medium = rng.choice(("video", "image"))
    reference = Medium(medium, i - 1, rng.choice(world.VISIBLE))
    media = [reference, Medium("video", i, 0)]

    request = rng.choice(ASK["query"])
    query, _ = world.composed(pool[i].scene, pool[i].difference, rng)
    if kind == "json":
        return Example(media, request + JSON + TAIL, json.dumps({"query": query}))
    return Example(media, request + TAIL, query)


# Batches


def patches(frames):
    """Cut frames uint8 (n, F, S, S, 3), F even, into Qwen2-VL's normalised patches.

    Returns float32 (n * F/2 * 16, 1176), equal to transformers' own processing (test_mini.py).
    """
    x = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255  # (n, F, 3, S, S)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))  # CLIP's, as in Qwen2-VL
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    x = (x - mean[:, None, None]) / deviation[:, None, None]

    # Axes: n, grid in time, frame of the patch, colour, then for rows and for columns the token,
    # the patch in the token and the pixel in the patch.
    n, n_frames = x.shape[:2]
    cell = (SIDE // MERGE, MERGE, PATCH)
    x = x.view(n, n_frames // PATCH_FRAMES, PATCH_FRAMES, 3, *cell, *cell)
    # The four patches of a token follow each other.
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(-1, PATCH_VALUES)


def vision_block(kind):
    """Return the prompt's block of a medium, with a placeholder for each of its vision tokens."""
    pad = f"<|{kind}_pad|>"
    n = FRAME_TOKENS * VIDEO_GRIDS if kind == "video" else FRAME_TOKENS
    return VISION_BLOCK[kind].replace(pad, pad * n)


def batch_of(examples, clips, collate):
    """Collate examples, whose media are read from clips (N, F, S, S, 3).

    Returns model inputs padded on the right, and labels (B, T): -100 except at answers.
    """
    encode = collate.tokenizer.encode
    heads = []
    answers = []
    media = {"video": [], "image": []}
    for made in examples:
        blocks = ""
        for kind, clip, frame in made.media:
            # An image is a frame that comes twice, as a patch has two frames.
            if kind == "video":
                frames = sample_indices(world.FRAMES, VIDEO_FRAMES)
            else:
                frames = [frame] * PATCH_FRAMES
            media[kind].append(clips[clip][frames])
            blocks += vision_block(kind)
        heads.append(encode(HEAD + blocks + made.prompt))
        answers.append(encode(made.answer + STOP))

    rows = zip(heads, answers, strict=True)
    batch = collate.batch([{"ids": head + answer} for head, answer in rows])
    labels = torch.full_like(batch["input_ids"], -100)
    for i, answer in enumerate(answers):
        start = len(heads[i])
        labels[i, start : start + len(answer)] = torch.tensor(answer)

    if media["video"]:
        n = len(media["video"])
        batch["pixel_values_videos"] = patches(np.stack(media["video"]))
        batch["video_grid_thw"] = torch.tensor([[VIDEO_GRIDS, SIDE, SIDE]] * n)
        batch["second_per_grid_ts"] = torch.full((n,), SECONDS_PER_GRID)
    if media["image"]:
        n = len(media["image"])
        batch["pixel_values"] = patches(np.stack(media["image"]))
        batch["image_grid_thw"] = torch.tensor([[1, SIDE, SIDE]] * n)
    return batch, labels


def positions(model, batch):
    """Return a batch's M-RoPE positions (3, B, T), by our own rule."""
    return mrope_positions(
        batch["mm_token_type_ids"],
        batch["attention_mask"],
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch.get("second_per_grid_ts"),
        tokens_per_second=model.config.vision_config.tokens_per_second,
    )


# Learning to see


# What an object looks like: its class of each kind is 1 + the index here.
CLASSES = {
    "colour": list(world.COLOURS),
    "shape": list(world.SHAPES),
    "size": list(world.SIZES),
    "texture": list(world.TEXTURES),
}
# Columns of an object's track: x and y off its place, radius, visible (0 or 1).
TRACK = 4
VISIBILITY = 3


class Sight(NamedTuple):
    """The facts of a scene that the vision tower learns to tell, by the world's four places."""

    classes: np.ndarray  # (4, 4): colour, shape, size, texture of a place's object; 0 = no object
    tracks: np.ndarray  # (4, F, TRACK)
    camera: np.ndarray  # (F, 3)
    theme: int


def sight_of(scene):
    """Return the Sight of a scene, its numbers scaled to about 1."""
    places = list(world.PLACES)
    classes = np.zeros((len(places), len(CLASSES)), np.int64)
    tracks = np.zeros((len(places), world.FRAMES, TRACK), np.float32)
    for o, (centre, radius, visible) in zip(scene["objects"], world.tracks(scene), strict=True):
        place = places.index(o["place"])
        for column, (key, names) in enumerate(CLASSES.items()):
            classes[place, column] = 1 + names.index(o[key])
        offset = (centre - world.PLACES[o["place"]]) / 7
        columns = [offset, radius[:, None] / 7 - 1, visible[:, None]]
        tracks[place] = np.concatenate(columns, 1)

    camera = world.camera_path(scene) / (16, 16, 0.5)
    theme = list(world.THEMES).index(scene["theme"])
    return Sight(classes, tracks, camera.astype(np.float32), theme)


class SightLoss:
    """Compares linear predictions from the vision tower's tokens with the Sights of their scenes.

    A token covers one place in two frames. It predicts classes (colour, shape, size and texture of
    the object there, and the theme) and numbers (the object's track in the first frame and its step
    to the second; the same of the camera).
    """

    def __init__(self, pool):
        sights = [sight_of(practice.scene) for practice in pool]
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*sights, strict=True)]
        self.classes, self.tracks, self.camera, self.theme = columns
        n_classes = [1 + len(table) for table in CLASSES.values()]
        self.sizes = [*n_classes, len(world.THEMES), 2 * TRACK, 2 * 3]
        self.head = torch.nn.Linear(WIDTH, sum(self.sizes))

    def __call__(self, tokens, scenes, f, g):
        """Compare tokens (B * 4, D) of frames f, g (B,) of scenes (B,) with the truth.

        Returns the loss, and for the log the accuracy of each class where there is an object, the
        share of the objects' steps that is not explained, and the camera's squared error.
        """
        *logits, track, camera = self.head(tokens).split(self.sizes, 1)
        first = self.tracks[scenes, :, f].flatten(0, 1)  # (B * 4, TRACK)
        second = self.tracks[scenes, :, g].flatten(0, 1)
        seen_first = first[:, VISIBILITY]
        seen_both = seen_first * second[:, VISIBILITY]
        # An object that blinks is named if either frame shows it.
        seen = torch.maximum(seen_first, second[:, VISIBILITY])

        classes = self.classes[scenes].flatten(0, 1) * seen.long()[:, None]
        themes = self.theme[scenes].repeat_interleave(FRAME_TOKENS)
        true_class = torch.cat([classes, themes[:, None]], 1)  # (B * 4, 5)
        loss = sum(F.cross_entropy(p, true_class[:, k]) for k, p in enumerate(logits))

        # Steps between frames are small: make them count.
        step = (second - first)[:, :VISIBILITY] * 4
        true_track = torch.cat([first, step, second[:, VISIBILITY:]], 1)  # (B * 4, 8)
        weight = torch.stack([seen_first] * 3 + [seen] + [seen_both] * 3 + [seen], 1)
        error = (track - true_track) ** 2 * weight

        camera_step = (self.camera[scenes, g] - self.camera[scenes, f]) * 4
        true_camera = torch.cat([self.camera[scenes, f], camera_step], 1)  # (B, 6)
        true_camera = true_camera.repeat_interleave(FRAME_TOKENS, 0)  # (B * 4, 6)
        camera_error = ((camera - true_camera) ** 2).mean()

        # Steps, in columns 4 to 6, count once more.
        loss = loss + 4 * error.mean() + 12 * error[:, 4:7].mean() + 20 * camera_error

        log = []
        is_object = true_class[:, 0] > 0
        for k, p in enumerate(logits):
            right = p.argmax(1) == true_class[:, k]
            log.append(right[is_object].float().mean().item())
        size_of_steps = (true_track[:, 4:6] ** 2 * weight[:, 4:6]).sum()
        unexplained = error[:, 4:6].sum() / size_of_steps
        return loss, [*log, unexplained.item(), camera_error.item()]


def learn_to_see(model, clips, pool, rng, steps, batch_size=192, lr=2e-3):
    """Warm up the vision tower: predict the facts of each place from its token.

    The real Qwen2.5-VL starts from a trained vision encoder, too. Without this step shapes and
    motions were still at chance after 1,300 steps of captioning.
    """
    sight_loss = SightLoss(pool)
    parameters = [*model.model.visual.parameters(), *sight_loss.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    grid = torch.tensor([[1, SIDE, SIDE]] * batch_size)

    log = []
    bar = tqdm(range(steps), "seeing", disable=None)
    for step in bar:
        scenes = np.array([rng.randrange(len(pool)) for _ in range(batch_size)])
        f = np.array([rng.randrange(world.FRAMES - 3) for _ in range(batch_size)])
        # The same frame twice is how an image comes.
        g = f + np.array([rng.choice((0, 2, 2, 3)) for _ in range(batch_size)])

        pairs = np.stack([clips[scenes, f], clips[scenes, g]], 1)  # (B, 2, S, S, 3)
        tokens = model.model.visual(patches(pairs), grid_thw=grid).pooler_output  # (B * 4, D)
        loss, measured = sight_loss(tokens, scenes, f, g)
        update(optimizer, loss, parameters)
        schedule.step()

        log.append(measured)
        if step % 100 == 99:
            means = np.mean(log[-100:], 0).round(3)
            bar.write(
                f"{step + 1}: colour, shape, size, texture, theme; step, camera error {means}"
            )


def update(optimizer, loss, parameters):
    """Take one optimiser step with clipped gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


# Learning to describe


def learn_to_describe(model, clips, pool, collate, rng, steps, lr, easy=0.2, batch_size=48):
    """Teach the TASKS in one cycle of the learning rate.

    easy: the share of steps, at the start, for concise captions of one or two objects alone.
    """
    eyes = list(model.model.visual.parameters())
    rest = [p for name, p in model.named_parameters() if ".visual." not in name]
    # The vision tower has seen its scenes already: it learns at less than a third of the rate.
    optimizer = torch.optim.AdamW(
        [{"params": eyes, "share": 0.3}, {"params": rest, "share": 1.0}],
        betas=(0.9, 0.98),
        weight_decay=0.02,
    )
    simple = [i for i, practice in enumerate(pool) if len(practice.scene["objects"]) < 3]

    losses = {}  # {task: losses since the last line of the log}
    bar = tqdm(range(steps), "describing", disable=None)
    for step in bar:
        warmup = min(1, (step + 1) / 100)
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * lr * warmup * decay

        # One task per step: its rows are about equally long.
        if step < steps * easy:
            task = rng.choice(("video concise", "image concise"))
            scenes = simple
        else:
            task = rng.choices(list(TASKS), list(TASKS.values()))[0]
            scenes = range(len(pool))
        long_rows = task.startswith(("five", "text", "plain text"))
        chosen = rng.choices(scenes, k=batch_size // 2 if long_rows else batch_size)
        examples = [example(task, i, pool, rng) for i in chosen]
        batch, labels = batch_of(examples, clips, collate)

        position_ids = positions(model, batch)
        outputs = model.model(**batch, position_ids=position_ids, use_cache=False)
        hidden = outputs.last_hidden_state  # (B, T, D)
        answered = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][answered])
        loss = F.cross_entropy(logits, labels[:, 1:][answered])
        update(optimizer, loss, eyes + rest)

        losses.setdefault(task, []).append(loss.item())
        if step % 100 == 99:
            means = [f"{name} {np.mean(values):.3f}" for name, values in sorted(losses.items())]
            bar.write(f"step {step + 1}, loss: " + ", ".join(means))
            losses = {}


# The base and the prober


def pretrain_base(out, seed=bench.SEED, scenes=8000, lr=2e-3):
    """Train the base from scratch and save it to `out` in bf16. About 25 minutes on two cores."""
    torch.set_num_threads(os.cpu_count())
    pool = scene_pool(scenes, seed)
    clips = rendered(pool)
    rng = random.Random(seed)
    torch.manual_seed(seed)

    texts = [bench.random_text(practice.scene, rng) for practice in pool[:2000]]
    for task in TASKS:
        for _ in range(30):
            made = example(task, rng.randrange(scenes), pool, rng)
            texts.append(HEAD + TAIL + made.prompt + " " + made.answer)
    processor = build_processor(texts)
    collate = Collator(processor, padding_side="right")
    model = build_model(processor.tokenizer).train()
    windows.install(model.model.visual)

    n_parameters = sum(p.numel() for p in model.parameters())
    n_tokens = len(processor.tokenizer)
    print(f"{n_parameters:,} parameters, {n_tokens} tokens, {len(pool)} scenes")

    learn_to_see(model, clips, pool, rng, 1200, lr=lr)
    learn_to_describe(model, clips, pool, collate, rng, 3400, lr)

    # A second, shorter cycle, at half the rate and with a random state of its own. It starts from
    # weights in bf16, because the first cycle's were kept that way.
    rng = random.Random(seed + 1)
    torch.manual_seed(seed + 1)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    learn_to_see(model, clips, pool, rng, 600, lr=lr / 2)
    learn_to_describe(model, clips, pool, collate, rng, 600, lr / 2, easy=0)

    shutil.rmtree(out, ignore_errors=True)
    model.bfloat16().save_pretrained(out)
    processor.save_pretrained(out)
    # Without it the frames of 96 x 96 pixels would be enlarged to the released models' 128 tokens.
    write_json(Path(out) / "gve.json", {"min_tokens": MIN_TOKENS})


def pretrain_prober(out, seed=bench.SEED):
    """Train the prober with train.py on coarse captions (T2V, T2I); keep its adapter in bf16."""
    made = CACHE / "prober"
    run(
        f"torchrun --nproc-per-node 2 train.py --base {BASE} --prober {BASE} "
        f"--mixture runs/mini/train/coarse.json --out {made} "
        f"--epochs 1 --schedule uniform --steps 400 --seed {seed} --workers 0 --dropout 0.1",
        OMP_NUM_THREADS="1",
    )
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out, ignore=shutil.ignore_patterns("log.jsonl", "state*"))
    path = out / "adapter_model.safetensors"
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def caption_accuracy(folder=BASE, n=200, seed=7, show=3):
    """Return the share of n held-out clips, read from mp4, whose concise caption is right.

    Right is a greedy caption with colour, shape and motion of every object. Prints the first
    captions and the first wrong ones.
    """
    rng = random.Random(f"{seed}/caption")
    scenes = [world.sample_scene(rng, test=True) for _ in range(n)]
    ask = transformers_captioner(
        folder,
        frames=VIDEO_FRAMES,
        max_tokens=200,
        device="cpu",
        batch_size=32,
        max_new_tokens=64,
    )
    requests = []
    with tempfile.TemporaryDirectory() as folder_of_clips:
        for i, scene in enumerate(scenes):
            path = Path(folder_of_clips, f"{i}.mp4")
            path.write_bytes(world.encode_mp4(world.render_scene(scene)))
            prompt = ASK["video"][0].format("concise")
            requests.append({"media": [{"video": str(path)}], "prompt": prompt})
        answers = [answer for answer, *_ in ask(requests)]

    n_right = 0
    for i, (scene, answer) in enumerate(zip(scenes, answers, strict=True)):
        truth = {(o["colour"], o["shape"]): o["motion"] for o in scene["objects"]}
        if world.read_events(answer) == truth:
            n_right += 1
            if i < show:
                print("right:", answer)
        elif i < 10 * show:
            caption, _ = world.concise(scene, rng)
            print(f"WRONG: {answer} (truth: {caption})")
    print(
        f"{folder}: {n_right} of {n} held-out clips have colour, shape and motion of every object "
        f"right ({n_right / n:.1%})"
    )
    return n_right / n
