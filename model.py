"""GVE: any mix of text, image and video -> one unit vector (arXiv 2510.27571, sections 4 and A.7).

The embedder is a Qwen-VL model without its language-model head. An item becomes one chat turn that
ends in `<|endoftext|>`; its vector is the last hidden state at that token, L2-normalised in
float32. Only LoRA weights on the language model are trained.

    from model import GVE
    gve = GVE.from_pretrained("mini/prober")  # or a hub id, a LoRA folder, a merged folder
    v = gve.embed([{"video": "a.mp4"}, {"text": "a red ball falls", "image": "b.png"}])  # (2, D)

    python model.py [CHECKPOINT]  # print a checkpoint's sizes with LoRA (mini/base), in seconds

Another pooling is a function in POOLINGS, another Qwen-VL a row of BACKBONES.

Legend: B batch, T tokens, D embedding dim (hidden size), V vision tokens after merging, P patches.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
)
from transformers.utils import cached_file

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
    normalise,
)
from kernels import windows
from support.decoders import DecoderPool, Failed
from support.files import parse_json, whole_folder
from support.flags import flag, parse_flags

# Table 9. The modules that LoRA is put on depend on the backbone: BackboneSpec.lora_targets.
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "bias": "none",
    "task_type": "FEATURE_EXTRACTION",
}
FRAME_TOKENS = 200  # most vision tokens per video frame (section 4.1)
FRAMES = 8  # per video (section 4.1)
# PAPER: names no least number of vision tokens per video frame. The released processor leaves
# qwen-vl-utils' 128 in force, so a checkpoint that says nothing of its own (no gve.json) gets it.
RELEASED_MIN_TOKENS = 128
# PAPER: says M-RoPE. The released forward() computes it in a process's first call alone and plain
# places in the row from the second on ("1d"); which of the two GVE was trained with is not known.
POSITIONS = ("mrope", "1d")


def last_token_pool(hidden, attention_mask):
    """Return the hidden state at each row's last attended token, padded left or right (A.7).

    hidden (B, T, D); attention_mask (B, T) of 0 and 1 -> (B, D)
    """
    # argmax finds the first 1 from the right.
    last = hidden.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mean_pool(hidden, attention_mask):
    """Return the mean hidden state of each row's attended tokens, (B, T, D), (B, T) -> (B, D)."""
    padding = attention_mask[..., None] == 0  # (B, T, 1)
    return hidden.masked_fill(padding, 0).sum(1) / attention_mask.sum(1, keepdim=True)


# gve.json names a checkpoint's pooling; where it names none, the last token was pooled. A pooling
# that sentence-transformers shall load, too, needs its name there (write_sentence_transformers).
POOLINGS = {"last_token": last_token_pool, "mean": mean_pool}


def mrope_positions(
    token_types,
    attention_mask,
    image_grid_thw=None,
    video_grid_thw=None,
    second_per_grid_ts=None,
    *,
    tokens_per_second=2,
    merge_size=2,
):
    """Compute Qwen2.5-VL's three-axis rotary positions, without a loop over tokens or a host sync.

    Text counts up by one on all three axes. A vision block that starts at position p puts its token
    (i, y, x) at (p + floor(i * s * tokens_per_second), p + y, p + x); the text after it goes on at
    the block's largest position plus one. This is transformers 4.51.3's rule; later versions
    truncate s to whole seconds or let the text begin inside the video's time range.
    # PAPER: says 1.0 FPS, but 8 frames of a clip of any length cannot be 1 FPS; s is the true time
    between two temporal grids.

    token_types (B, T): 0 text, 1 image, 2 video; attention_mask (B, T); image_grid_thw and
    video_grid_thw (n, 3): each block's patches (t, h, w), blocks in the order of the rows;
    second_per_grid_ts (n_videos,): s in seconds, float32 -> (3, B, T) int64, 0 on padding
    """
    B, T = token_types.shape
    device = token_types.device
    vision = (token_types > 0) & attention_mask.bool()
    # Text separates blocks, so a block starts where the token before it is no vision token.
    start = vision & ~F.pad(vision, (1, 0))[:, :-1]  # (B, T)

    # Give every vision token the grid of its block, and video tokens their seconds per grid.
    grid = torch.full((B, T, 3), merge_size, device=device)  # text: never divides by 0 below
    rate = torch.ones(B, T, device=device)  # an image is one grid, so its rate has no effect
    for kind, grids in ((1, image_grid_thw), (2, video_grid_thw)):
        if grids is None:
            continue
        of_kind = vision & (token_types == kind)
        block = (start & of_kind).flatten().long().cumsum(0).view(B, T) - 1  # row of `grids`
        block = block.clamp(0, len(grids) - 1)
        grid = torch.where(of_kind[..., None], grids.to(device)[block], grid)
        if kind == 2:
            seconds = torch.as_tensor(second_per_grid_ts, dtype=torch.float32, device=device)
            rate = torch.where(of_kind, seconds[block], rate)
    t = grid[..., 0]
    h = grid[..., 1] // merge_size
    w = grid[..., 2] // merge_size

    # The index of a token inside its block gives its offset from the block's first position.
    column = torch.arange(T, device=device).expand(B, T)
    first = torch.where(start, column, 0).cummax(1).values  # (B, T) where the block starts
    i = column - first
    time = (i // (h * w) * rate * tokens_per_second).long()
    inside = torch.stack([time, i % (h * w) // w, i % w])  # (3, B, T)

    # A block moves the positions after it by its largest extent, a text token by one.
    extent = torch.stack([((t - 1) * rate * tokens_per_second).long(), h - 1, w - 1]).amax(0) + 1
    advance = torch.where(vision, torch.where(start, extent, 0), attention_mask.long())
    base = advance.cumsum(1) - advance
    base_of_block = base.gather(1, first)
    return torch.where(vision, base_of_block + inside, base) * attention_mask.long()


def grid_positions(
    token_types,
    attention_mask,
    image_grid_thw=None,
    video_grid_thw=None,
    second_per_grid_ts=None,
    *,
    tokens_per_second=1,
    merge_size=2,
):
    """Compute Qwen2-VL's rotary positions: temporal grids count up by one, whatever their times.

    Arguments and result as in mrope_positions; the two about time have no effect. The text after a
    video goes on at its largest position plus one, as up to transformers 4.51.3; later versions let
    it begin inside the video's time range if the video has more temporal grids than rows and
    columns.
    """
    ones = None
    if video_grid_thw is not None:
        ones = torch.ones(len(video_grid_thw))
    return mrope_positions(
        token_types,
        attention_mask,
        image_grid_thw,
        video_grid_thw,
        ones,
        tokens_per_second=1,
        merge_size=merge_size,
    )


def timed_grid_positions(
    token_types,
    attention_mask,
    image_grid_thw=None,
    video_grid_thw=None,
    second_per_grid_ts=None,
    *,
    tokens_per_second=1,
    merge_size=2,
):
    """Compute Qwen3-VL's rotary positions: every temporal grid of a video counts like an image.

    Arguments and result as in mrope_positions; the two about time have no effect: the times stand
    in the prompt as text. (That the axes are interleaved in a head is the language model's matter.)
    """
    grids = video_grid_thw
    if grids is not None:
        grids = grids.repeat_interleave(grids[:, 0], dim=0)  # a sync point on a GPU
        grids = grids * grids.new_tensor([0, 1, 1]) + grids.new_tensor([1, 0, 0])  # t = 1
    return grid_positions(token_types, attention_mask, image_grid_thw, grids, merge_size=merge_size)


# The table of backbones: everything in which one Qwen-VL family differs from another, except how
# data.Collator writes a video (timed_grids).


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a checkpoint's vision input, read from its config."""

    patch_size: int  # pixels along the side of a patch
    temporal_patch_size: int  # frames in a patch
    patch_values: int  # numbers in a flattened patch: channels x frames x height x width
    merge_size: int  # patches along the side of a vision token
    token_side: int  # pixels along the side of a vision token
    window_size: int  # pixels along the side of the vision tower's windows; 0: no windows
    frame_layers: int  # layers of the vision tower that attend within a whole frame
    tower_width: int  # channels inside the vision tower
    feature_layers: int  # layers of the vision tower whose features the language model gets
    tokens_per_second: float  # temporal positions per second of video


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A row of BACKBONES: everything that one family of Qwen-VL does in its own way.

    A family whose vision features enter the language model at several layers returns them all in
    one tensor per medium from `encode_media`, so that they travel and are stored as one, and as
    further keyword arguments from `language_inputs`.
    """

    name: str  # for messages
    config_class: type
    model_class: type  # without the language-model head
    generation_class: type  # with the head; merged checkpoints are saved in its layout
    processor_class: type
    token_side: int  # as in Geometry, for code that has no checkpoint at hand
    tokens_per_second: float  # as in Geometry, where the config has no such field
    lora_targets: str  # regular expression that matches the adapted modules' full names
    positions: Callable  # with the arguments and the result of mrope_positions
    encode_media: Callable  # (core, kind, pixels, grids) -> one (V, ...) tensor per medium
    language_inputs: Callable  # (core, batch) -> the language model's keyword arguments
    install_fixes: Callable  # (vision tower) -> None: change it in place after loading
    timed_grids: bool = False  # see data.Collator

    def read_geometry(self, config):
        """Read the sizes of the vision input from a checkpoint's config."""
        vision = config.vision_config
        patch_pixels = vision.patch_size**2
        return Geometry(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * patch_pixels,
            merge_size=vision.spatial_merge_size,
            token_side=vision.patch_size * vision.spatial_merge_size,
            window_size=getattr(vision, "window_size", 0),
            frame_layers=len(getattr(vision, "fullatt_block_indexes", range(vision.depth))),
            tower_width=getattr(vision, "embed_dim", vision.hidden_size),
            feature_layers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            tokens_per_second=getattr(vision, "tokens_per_second", self.tokens_per_second),
        )


def encode_media(core, kind, pixels, grids):
    """Run the vision tower over a batch's images or videos.

    kind: "image" or "video"; pixels (P, patch_values); grids (n, 3) -> n tensors (V, D)
    """
    if kind == "image":
        return core.get_image_features(pixels, grids).pooler_output
    return core.get_video_features(pixels, grids).pooler_output


@torch.no_grad()  # token embeddings and vision tower are frozen
def embeds_with_features(core, batch):
    """Look up token embeddings and put vision features in the places of the placeholder tokens.

    core: the backbone; batch: from GVE.encode_vision -> {"inputs_embeds": (B, T, D)}
    """
    ids = batch["input_ids"]  # (B, T)
    embeds = core.get_input_embeddings()(ids)  # (B, T, D)
    placeholders = {"image": core.config.image_token_id, "video": core.config.video_token_id}

    for kind, token in placeholders.items():
        if f"{kind}_features" not in batch:
            continue
        features = torch.cat([media.to(embeds) for media in batch[f"{kind}_features"]])  # (V, D)
        place = (ids == token)[..., None]  # (B, T, 1)
        count = int(place.sum())  # a sync point: masked_scatter would accept too many features
        assert count == len(features), f"{count} placeholders for {len(features)} features"
        embeds = embeds.masked_scatter(place, features)
    return {"inputs_embeds": embeds}


def encode_media_deepstack(core, kind, pixels, grids):
    """Run Qwen3-VL's vision tower over a batch's images or videos.

    Arguments as in encode_media -> n tensors (V, L, D): the features of the tower's end and those
    of L - 1 of its inner layers, which enter after the language model's first L - 1 layers.
    """
    out = core.get_image_features(pixels, grids)  # which serves videos, too
    layers = [torch.cat(out.pooler_output), *out.deepstack_features]
    features = torch.stack(layers, 1)  # (V of all media, L, D)
    return features.split([len(media) for media in out.pooler_output])


@torch.no_grad()
def embeds_with_deepstack(core, batch):
    """Prepare Qwen3-VL's language model's inputs; arguments as in embeds_with_features.

    -> {"inputs_embeds": (B, T, D)} and, where there are media, "visual_pos_masks" (B, T) with the
    places of vision tokens and "deepstack_visual_embeds": L - 1 tensors (V, D) in their order
    """
    last = dict(batch)
    inner = []  # (places (B, T), features (V, L - 1, D)) of images and of videos
    ids = batch["input_ids"]
    placeholders = {"image": core.config.image_token_id, "video": core.config.video_token_id}
    for kind, token in placeholders.items():
        if f"{kind}_features" not in batch:
            continue
        last[f"{kind}_features"] = [media[:, 0] for media in batch[f"{kind}_features"]]
        features = torch.cat([media[:, 1:] for media in batch[f"{kind}_features"]])
        inner.append((ids == token, features))
    inputs = embeds_with_features(core, last)
    if not inner:
        return inputs

    # Images and videos alternate in a batch; the language model wants them in one order.
    places = torch.stack([place for place, _ in inner]).any(0)  # (B, T)
    shape = inner[0][1].shape[1:]
    mixed = inputs["inputs_embeds"].new_zeros(len(places.nonzero()), *shape)  # a sync point
    for place, features in inner:
        mixed[place[places]] = features.to(mixed)
    return inputs | {"visual_pos_masks": places, "deepstack_visual_embeds": mixed.unbind(1)}


# Table 9: q, k, v, up, gate, down of the language model; o_proj is not in its list. The pattern
# names the language model because some vision towers' MLPs have the same projections.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(up|gate|down)_proj)"

# By the model_type of a checkpoint's config.json.
BACKBONES = {
    "qwen2_vl": BackboneSpec(
        name="Qwen2-VL",
        config_class=Qwen2VLConfig,
        model_class=Qwen2VLModel,
        generation_class=Qwen2VLForConditionalGeneration,
        processor_class=Qwen2VLProcessor,
        token_side=28,
        tokens_per_second=1,
        lora_targets=LORA_TARGETS,
        positions=grid_positions,
        encode_media=encode_media,
        language_inputs=embeds_with_features,
        install_fixes=windows.install,
    ),
    "qwen2_5_vl": BackboneSpec(
        name="Qwen2.5-VL",
        config_class=Qwen2_5_VLConfig,
        model_class=Qwen2_5_VLModel,
        generation_class=Qwen2_5_VLForConditionalGeneration,
        processor_class=Qwen2_5_VLProcessor,
        token_side=28,
        tokens_per_second=2,
        lora_targets=LORA_TARGETS,
        positions=mrope_positions,
        encode_media=encode_media,
        language_inputs=embeds_with_features,
        install_fixes=windows.install,
    ),
    "qwen3_vl": BackboneSpec(
        name="Qwen3-VL",
        config_class=Qwen3VLConfig,
        model_class=Qwen3VLModel,
        generation_class=Qwen3VLForConditionalGeneration,
        processor_class=Qwen3VLProcessor,
        token_side=32,
        tokens_per_second=1,
        lora_targets=LORA_TARGETS,
        positions=timed_grid_positions,
        encode_media=encode_media_deepstack,
        language_inputs=embeds_with_deepstack,
        install_fixes=windows.install,
        timed_grids=True,
    ),
}

# Prompt styles of released checkpoints that have no gve.json, by a part of their names.
RELEASED_STYLES = {"Qwen3-VL-Embedding": "represent"}


class GVE(nn.Module):
    """A Qwen-VL model as an embedder.

    backbone: transformers' model without its head, wrapped by PEFT when it carries LoRA; core: the
    same without PEFT's wrapper, LoRA layers in place; spec: its row of BACKBONES; geometry: its
    sizes; base: folder or hub id of the full weights; info: the checkpoint's gve.json; dim: D;
    min_tokens: least vision tokens per video frame; positions: "mrope" or "1d".
    """

    def __init__(
        self,
        backbone,
        processor,
        spec,
        *,
        base="",
        info=None,
        pooling="last_token",
        prompt_style="system",
        min_tokens=MIN_TOKENS,
        positions="mrope",
    ):
        super().__init__()
        self.backbone = backbone
        self.has_lora = isinstance(backbone, PeftModel)
        core = backbone.get_base_model() if self.has_lora else backbone
        # Bypass nn.Module: as a second submodule, it would be in state_dict twice.
        object.__setattr__(self, "core", core)
        self.processor = processor
        self.spec = spec
        self.geometry = spec.read_geometry(core.config)
        self.dim = core.config.text_config.hidden_size

        self.base = base
        self.info = info or {}
        self.pooling = pooling
        self.prompt_style = prompt_style
        self.min_tokens = min_tokens
        self.positions = positions
        self.wrong_base = ""  # says that an adapter lies on other weights than it was trained on

    @classmethod
    def from_pretrained(
        cls,
        path,
        *,
        dtype=None,
        device=None,
        lora=False,
        base=None,
        pooling="",
        prompt_style="",
        min_tokens=None,
        positions="",
    ):
        """Load a Qwen-VL checkpoint, a LoRA adapter on one, or a merged folder; safetensors only.

        path: folder (str or Path) or hub id. dtype: torch dtype or its name, default bfloat16 on
        CUDA and float32 elsewhere. device: default CPU. lora: True or a dict of LoraConfig fields
        adds a fresh, trainable adapter, or makes the adapter of an adapter folder trainable.

        base: replaces the base model that the adapter names. If it holds other weights than those
        that the adapter was trained on, there is a warning; without `base` this is an error.

        pooling: a name in POOLINGS; prompt_style: see data.Collator; min_tokens: least vision
        tokens per video frame; positions: "mrope" or "1d" (a token's place in the row on all three
        axes). By default those of gve.json (an adapter without one: of its base's), else
        "last_token", "system", 4 and "mrope"; without any gve.json min_tokens is 128.

        Raises ValueError where a file is missing, a tensor has no place, an adapter lies on other
        weights than its own, or the model type, the pooling or the positions are unknown.
        """
        path = str(path)
        if not os.path.exists(path) and not is_hub_id(path):
            raise ValueError(f"{path}: neither a checkpoint folder nor a hub id (owner/name)")
        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()

        device = torch.device(device or "cpu")
        if not dtype:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)

        info = read_info(path)
        is_adapter = checkpoint_file(path, "adapter_config.json") is not None
        full = find_base(path, base) if is_adapter else path
        given = {
            "pooling": pooling,
            "prompt_style": prompt_style,
            "min_tokens": min_tokens,
            "positions": positions,
        }
        settings = choose_settings(given, info or read_info(full), path)

        with name_adapter(path, full):
            spec = find_spec(full)
        processor = load_processor(path, spec)
        with name_adapter(path, full):
            backbone = load_backbone(full, spec, dtype)
        backbone.requires_grad_(False)

        wrong_base = ""
        if is_adapter:
            wrong_base = compare_base(info, backbone, path, full)
            if wrong_base and not base:
                raise ValueError(wrong_base)
            if wrong_base:
                warnings.warn(wrong_base, stacklevel=2)  # the caller asked for this base
            backbone = load_adapter(backbone, path, lora)
        elif lora:
            backbone = add_adapter(backbone, spec, lora)
        for module in backbone.modules():
            # PEFT casts the inputs of LoRA layers to their weights' float32. Over bfloat16 that is
            # switched off: there the autocast in forward decides.
            module.cast_input_dtype_enabled = dtype != torch.bfloat16

        gve = cls(backbone, processor, spec, base=full, info=info, **settings)
        gve.wrong_base = wrong_base
        return gve.to(device).eval()

    @property
    def device(self):
        """The device of the weights."""
        return next(self.parameters()).device

    def lora_parameters(self):
        """Return {name: tensor} of the trained parameters: the LoRA weights and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def position_ids(self, batch):
        """Compute the position_ids (3, B, T) of a collated batch."""
        if self.positions == "1d":
            mask = batch["attention_mask"]
            return ((mask.cumsum(1) - 1) * mask).expand(3, -1, -1)
        return self.spec.positions(
            batch["mm_token_type_ids"],
            batch["attention_mask"],
            batch.get("image_grid_thw"),
            batch.get("video_grid_thw"),
            batch.get("second_per_grid_ts"),
            tokens_per_second=self.geometry.tokens_per_second,
            merge_size=self.geometry.merge_size,
        )

    @torch.no_grad()
    def encode_vision(self, batch):
        """Replace a batch's pixels by the features that the frozen vision tower gives.

        batch: from data.Collator, raw or not. Returns a new dict with `image_features` and
        `video_features`, lists of one tensor per medium, (V, D) or, where several layers' features
        enter the language model, (V, layers, D). Features that the collator found in
        its store are kept, and a batch that was encoded before comes back as it is.
        """
        batch = dict(batch)
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if key not in batch:
                continue
            pixels = batch.pop(key)  # (P, patch_values)
            if pixels.dtype == torch.uint8:
                pixels = normalise(pixels, getattr(self.processor, f"{kind}_processor"))

            grids = batch[f"{kind}_grid_thw"]
            features = list(batch.get(f"{kind}_features") or [None] * len(grids))
            missing = [i for i, known in enumerate(features) if known is None]
            encoded = self.spec.encode_media(self.core, kind, pixels, grids[missing])
            for i, feature in zip(missing, encoded, strict=True):
                features[i] = feature
            batch[f"{kind}_features"] = features
        return batch

    def forward(self, batch):
        """Embed a batch -> (B, D) unit vectors, float32 (float64 for a float64 model).

        batch: from data.Collator or encode_vision, on this model's device.
        """
        batch = self.encode_vision(batch)
        inputs = self.spec.language_inputs(self.core, batch)
        position_ids = self.position_ids(batch)

        # Over a bfloat16 backbone, LoRA's float32 weights compute in bfloat16.
        is_bfloat16 = self.core.dtype == torch.bfloat16
        with torch.autocast(position_ids.device.type, torch.bfloat16, enabled=is_bfloat16):
            hidden = self.core.language_model(
                **inputs,
                attention_mask=batch["attention_mask"],
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state  # (B, T, D)

        pooled = POOLINGS[self.pooling](hidden, batch["attention_mask"])  # (B, D)
        if pooled.dtype != torch.float64:
            pooled = pooled.float()
        return F.normalize(pooled, dim=-1)

    def collator(self, **options):
        """Make the data.Collator of this checkpoint; options: its other arguments."""
        return Collator(
            self.processor,
            min_tokens=self.min_tokens,
            prompt_style=self.prompt_style,
            timed_grids=self.spec.timed_grids,
            **options,
        )

    @torch.no_grad()
    def embed(
        self,
        items,
        instruction=None,
        *,
        batch_size=32,
        frames=8,
        max_tokens=FRAME_TOKENS,
        max_length=8192,
        workers=0,
        seconds=60,
        failed=None,
    ):
        """Embed a list of items (data.py) -> (n, D) float32 on the CPU.

        instruction: default "You are a helpful assistant."; frames per video: even; max_tokens:
        most vision tokens per frame; max_length: most tokens per item.

        workers: processes that decode, with `seconds` for each item. A clip that hangs or crashes
        its decoder then costs that item alone; with 0, the default, decoding happens in this
        process, which such a clip stops or kills.

        failed: a dict that gets {index: reason} of the items that cannot be used; their vectors
        are NaN. Without it the first of them raises ValueError.
        """
        if isinstance(items, dict):
            raise ValueError("embed takes a list of items, not one item")
        collate = self.collator(frames=frames, max_tokens=max_tokens, max_length=max_length)
        vectors = torch.full((len(items), self.dim), torch.nan)
        reasons = {} if failed is None else failed
        batches = decode_and_embed(
            lambda item: collate.prepare(item, instruction),
            lambda batch: self.embed_samples(collate, batch.values()),
            items,
            range(len(items)),
            batch_size=batch_size,
            workers=workers,
            seconds=seconds,
            failed=reasons,
        )
        for rows, made in batches:
            vectors[rows] = made
            if reasons and failed is None:
                break
        if reasons and failed is None:
            first = min(reasons)
            raise ValueError(f"item {first}: {reasons[first]}")
        return vectors

    def embed_samples(self, collate, samples):
        """Embed one batch of this collator's samples -> (b, D) float32 on the CPU."""
        inputs = collate.batch(samples, raw=True)
        return self(to_device(inputs, self.device)).float().cpu()

    def save_pretrained(self, folder, *, merge=False, info=None):
        """Write a checkpoint folder, valid for Hugging Face at its root; files appear whole.

        merge: write full weights with LoRA folded in, in the layout of the generation class, so
        that any loader of this family takes them; else the adapter in PEFT's layout.
        info: dict for gve.json.
        """
        with whole_folder(folder) as staging:
            self.write_files(staging, merge, info)

    def write_files(self, staging, merge, info):
        """Write all files of a checkpoint into a folder; arguments as in save_pretrained."""
        if self.has_lora and not merge:
            self.backbone.save_pretrained(staging, safe_serialization=True)
            (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        else:
            self.merged().save_pretrained(staging)

        # With these settings, other loaders write prompts and resize as our Collator does.
        processor = copy.deepcopy(self.processor)
        processor.chat_template = make_chat_template(self.spec.timed_grids)
        token_pixels = self.geometry.token_side**2
        processor.image_processor.size = {
            "shortest_edge": MIN_TOKENS * token_pixels,
            "longest_edge": IMAGE_TOKENS * token_pixels,
        }
        counted = FRAMES if self.spec.timed_grids else 1  # frames that the limits are for
        processor.video_processor.size = {
            "shortest_edge": self.min_tokens * token_pixels * counted,
            "longest_edge": FRAME_TOKENS * token_pixels * counted,
        }
        processor.save_pretrained(staging)
        write_sentence_transformers(staging, self.dim, self.pooling)

        packages = ("torch", "transformers", "peft")
        self.info = {
            **self.info,
            **(info or {}),
            "base": str(self.base),
            "dim": self.dim,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "prompt_style": self.prompt_style,
            "pooling": self.pooling,
            "min_tokens": self.min_tokens,
            "positions": self.positions,
            "base_fingerprint": self.core.fingerprint,
        }
        (staging / "gve.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def merged(self):
        """Return the generation model with a copy of these weights, LoRA folded in."""
        dtype = next(self.core.parameters()).dtype
        full = self.spec.generation_class.from_pretrained(self.base, dtype=dtype)
        backbone = self.backbone
        if self.has_lora:
            backbone = copy.deepcopy(backbone).merge_and_unload()
        full.model.load_state_dict(backbone.state_dict())
        return full


def to_device(batch, device):
    """Move a batch's tensors to a device; everything else stays as it is."""
    moved = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
        moved[key] = value
    return moved


def decode_and_embed(
    prepare,
    embed,
    items,
    order,
    *,
    batch_tokens=math.inf,
    batch_size=math.inf,
    workers=0,
    seconds=60,
    failed,
    tally=None,
):
    """Decode and embed items[i] for i in order -> yield ([i, ...], vectors (b, D)) per batch.

    prepare: item -> its sample, a dict; in a decoding process
    embed: {i: sample} -> vectors (b, D); no process is forked meanwhile
    batch_tokens: most tokens of a batch, padding included; batch_size: most items of a batch
    workers, seconds: see support.decoders.DecoderPool
    failed: dict that gets {i: reason} of the items that cannot be decoded
    tally: Counter that gets the number of videos that each decoder read, by the decoder's name, and
    "note: SENTENCE" for each damaged file that gave only a part
    """
    if not any("image" in items[i] or "video" in items[i] for i in order):
        workers = 0  # texts hang no decoder
    lock = threading.Lock()  # held while the model runs: no decoder may be forked meanwhile
    pool = DecoderPool(
        lambda i: prepare(items[i]),
        lambda i: name_media(items[i]),
        workers=workers,
        seconds=seconds,
        fork_lock=lock,
    )
    decoded = pool.map(order, lend_threads=True)
    for batch in group_samples(decoded, batch_tokens, batch_size, failed):
        for sample in batch.values():
            if tally is not None and "decoder" in sample:
                tally[sample["decoder"]] += 1
            if tally is not None and "note" in sample:
                tally["note: " + sample["note"]] += 1
        with lock:
            vectors = embed(batch)
        yield list(batch), vectors


def name_media(item):
    """Name an item's media for messages; one without media by its text."""
    media = [str(item[kind]) for kind in ("video", "image") if kind in item]
    return ", ".join(media) or repr(item)


def group_samples(decoded, batch_tokens, batch_size, failed):
    """Group (i, sample) into {i: sample} of so many tokens, padding included, and items at most.

    A longer sample is a batch of its own, and one without "ids" has no tokens. A Failed in a
    sample's place goes to failed[i].
    """
    batch = {}
    width = 0  # tokens of the longest sample
    for i, sample in decoded:
        if isinstance(sample, Failed):
            failed[i] = sample.reason
            continue
        length = len(sample.get("ids", ()))
        width = max(width, length)
        is_full = width * (len(batch) + 1) > batch_tokens or len(batch) == batch_size
        if batch and is_full:
            yield batch
            batch = {}
            width = length
        batch[i] = sample
    if batch:
        yield batch


# Loading


def checkpoint_file(path, name):
    """Return the local path of a checkpoint's file, None if it has none.

    Only hub ids ask the network.
    """
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def is_hub_id(path):
    """Say whether a path has the form of a hub id, owner/name."""
    return path.count("/") == 1 and not path.startswith((".", "/"))


def read_info(path):
    """Read a checkpoint's gve.json -> dict, empty if there is none."""
    file = checkpoint_file(path, "gve.json")
    if file is None:
        return {}
    return parse_json(Path(file).read_bytes(), file)


def choose_settings(given, saved, path):
    """Choose a checkpoint's settings: those given, else those of its gve.json, else the defaults.

    given: a value or None or "" for each setting; saved: the gve.json, {} if there is none.
    Raises ValueError for an unknown pooling or unknown positions.
    """
    settings = {
        "pooling": "last_token",
        "prompt_style": released_style(path),
        "min_tokens": MIN_TOKENS if saved else RELEASED_MIN_TOKENS,
        "positions": "mrope",
    }
    for name in settings:
        settings[name] = given[name] or saved.get(name, settings[name])

    for name, accepted in (("pooling", POOLINGS), ("positions", POSITIONS)):
        value = settings[name]
        if value not in accepted:
            raise ValueError(
                f"{path}: {name} {value!r} is unknown; accepted: {', '.join(accepted)}"
            )
    return settings


def released_style(path):
    """Return the prompt style of a checkpoint that names none."""
    for name, style in RELEASED_STYLES.items():
        if name.lower() in Path(path).name.lower():
            return style
    return "system"


def find_base(adapter, base=None):
    """Find an adapter's base: a path from here, from its folder, from this repository, or a hub id.

    adapter: the adapter's folder; base: takes the place of the name that the adapter gives.
    """
    given_by = "--base"
    if not base:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path or ""
        given_by = "its adapter_config.json"
    base = str(base)
    for root in (Path(), Path(adapter), Path(__file__).resolve().parent):
        if (root / base / "config.json").is_file():
            return str(root / base)
    if is_hub_id(base):
        return base
    raise ValueError(
        f"{adapter}: the base of this adapter is not here: {base!r} ({given_by}) is no checkpoint "
        "folder; give its folder or hub id (--base)"
    )


@contextlib.contextmanager
def name_adapter(path, full):
    """Put an adapter's name before an error about its base.

    path: the checkpoint; full: the folder or hub id of its full weights, `path` if no adapter's.
    """
    try:
        yield
    except ValueError as error:
        if full == path:
            raise
        raise ValueError(
            f"{path}: the base of this adapter: {error} (if it lies elsewhere: --base)"
        ) from error


def compare_base(info, backbone, path, base):
    """Say that an adapter lies on other weights than those it was trained on; "" if it does not.

    info: the adapter's gve.json, which may be older than the fingerprint; backbone: of `base`.
    """
    if info.get("base_fingerprint") in (None, backbone.fingerprint):
        return ""
    return (
        f"{path}: {base} holds other weights than those that this adapter was trained on "
        "(perhaps an adapter is merged into them, whose effect would come twice); "
        "give the adapter's own base (--base)"
    )


def find_spec(path):
    """Return the row of BACKBONES for a checkpoint, by its config's model_type."""
    try:
        file = checkpoint_file(path, "config.json")
    except OSError as error:
        raise ValueError(f"{path}: cannot be loaded: {first_line(error)}") from error
    if file is None and os.path.exists(path):
        raise ValueError(f"{path}: cannot be loaded: no config.json")
    if file is None:
        raise ValueError(
            f"{path}: no such folder, and the hub gives no config.json for this name (no network, "
            "HF_HUB_OFFLINE, no access, or no such model)"
        )

    model_type = parse_json(Path(file).read_bytes(), file).get("model_type")
    if model_type not in BACKBONES:
        accepted = ", ".join(BACKBONES)
        raise ValueError(f"{file}: model_type {model_type!r} is unknown; accepted: {accepted}")
    return BACKBONES[model_type]


def load_processor(path, spec):
    """Load tokenizer, image and video processor of a checkpoint."""
    try:
        return spec.processor_class.from_pretrained(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        # transformers raises any of these for absent files.
        raise ValueError(
            f"{path}: no usable processor (its config, tokenizer.json): {first_line(error)}"
        ) from error


def load_backbone(path, spec, dtype):
    """Load a backbone strictly: a tensor that is missing or has no place is an error.

    The checkpoint may be of any class that contains this backbone (GVE's Qwen25VLForEmbedding, for
    one), whole or in shards; its lm_head, tied or not, is left out. No remote code runs.
    """
    try:
        config = spec.config_class.from_pretrained(path)
        tensors = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be loaded as a {spec.name} checkpoint: {first_line(error)}"
        ) from error
    tensors.pop("lm_head.weight", None)
    fingerprint = fingerprint_weights(tensors)

    model, report = spec.model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they come with the report below
    )
    wrong = {}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            wrong[problem] = sorted(map(str, report[problem]))[:3]
    if wrong:
        raise ValueError(f"{path}: weights do not fit {spec.name}: {wrong}")

    model.name_or_path = str(path)  # PEFT writes it into adapter_config.json
    model.fingerprint = fingerprint
    spec.install_fixes(model.visual)
    # cuDNN's attention gives NaN gradients under a mask on Hopper (pytorch issue 196678), and it
    # makes a plan for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model


def read_tensors(path):
    """Read all tensors of a checkpoint -> {name in the backbone: tensor}."""
    index_file = checkpoint_file(path, "model.safetensors.index.json")
    shards = ["model.safetensors"]
    if index_file:
        index = parse_json(Path(index_file).read_bytes(), index_file)
        shards = sorted(set(index["weight_map"].values()))

    tensors = {}
    for shard in shards:
        # A missing shard is left to load_file, whose error names it.
        file = checkpoint_file(path, shard) or f"{path}/{shard}"
        for key, tensor in load_file(file).items():
            name = backbone_name(key)
            if name in tensors:
                raise ValueError(
                    f"{path}: {shard} holds {key}, which another name or file holds as well"
                )
            tensors[name] = tensor
    return tensors


def fingerprint_weights(tensors):
    """Hash a few values of each tensor -> 16 hex digits, in less than a second.

    Independent of the files' layout and, as values are compared in bfloat16, of their precision.
    tensors: {name in the backbone: tensor}.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        values = tensor.flatten()
        some = values[:: max(1, len(values) // 64)].contiguous().bfloat16()
        digest.update(some.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def backbone_name(key):
    """Return a tensor's name in the backbone for its name in any checkpoint.

    Classes with a head put "model." before it. Before transformers 4.52 they did so on all but the
    vision tower, and the language model had no level of its own ("model.layers.0",
    "visual.blocks.0").
    """
    key = key.removeprefix("model.")
    if key.startswith(("layers.", "embed_tokens.", "norm.")):
        return "language_model." + key
    return key


def add_adapter(backbone, spec, lora):
    """Put fresh LoRA weights on a backbone; lora: True or a dict of LoraConfig fields."""
    fields = {**LORA, "target_modules": spec.lora_targets}
    if isinstance(lora, dict):
        fields |= lora
    # PEFT keeps LoRA weights in float32 over a bfloat16 base (autocast_adapter_dtype).
    return get_peft_model(backbone, LoraConfig(**fields))


def load_adapter(backbone, path, lora):
    """Put an adapter folder's LoRA weights on a backbone and check that each one finds its place.

    lora: as in GVE.from_pretrained; of a dict, only lora_dropout has an effect.
    """
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = not lora
    config.base_model_name_or_path = backbone.name_or_path  # it may have moved
    if isinstance(lora, dict) and "lora_dropout" in lora:
        config.lora_dropout = lora["lora_dropout"]
    model = get_peft_model(backbone, config)

    file = checkpoint_file(path, "adapter_model.safetensors")
    prefix = "base_model.model."
    tensors = {}
    for key, tensor in load_file(file or f"{path}/adapter_model.safetensors").items():
        tensors[prefix + backbone_name(key.removeprefix(prefix))] = tensor

    expected = set(get_peft_model_state_dict(model))
    without_place = sorted(set(tensors) - expected)[:3]
    missing = sorted(expected - set(tensors))[:3]
    if without_place or missing:
        raise ValueError(
            f"{path}: adapter does not fit its base: "
            f"without a place {without_place}, missing {missing}"
        )
    set_peft_model_state_dict(model, tensors)
    return model


def first_line(error):
    """Return the first line of an error's message; transformers' go on for paragraphs."""
    return str(error).splitlines()[0]


# Saving for other programs


def make_chat_template(timed_grids=False):
    """Write data.py's prompt as a Jinja template, the pooled token at its very end.

    The checkpoints were trained on a user turn of video, image and text, in this order.
    timed_grids: as in data.Collator. There transformers' processor writes all blocks of a video in
    place of its token alone; a block around the token would stay (vllm-project/vllm#46817).
    """
    before_role, after_role = USER_START.split("user")
    pieces = {
        "SYSTEM": SYSTEM_START + DEFAULT_INSTRUCTION + TURN_END,
        "BEFORE_ROLE": before_role,
        "AFTER_ROLE": after_role,
        "VIDEO": "<|video_pad|>" if timed_grids else VISION_BLOCK["video"],
        "IMAGE": VISION_BLOCK["image"],
        "TURN_END": TURN_END,
        "ANSWER": ANSWER_START + END,
    }
    template = """{%- if messages[0].role != 'system' %}
{{- SYSTEM }}{%- endif %}
{%- for message in messages %}{{- BEFORE_ROLE + message.role + AFTER_ROLE }}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content if part.type == 'video' %}{{- VIDEO }}{%- endfor %}
{%- for part in message.content if part.type == 'image' %}{{- IMAGE }}{%- endfor %}
{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
{%- endif %}{{- TURN_END }}{%- endfor %}
{{- ANSWER }}"""

    for name, text in pieces.items():
        literal = "'" + text.replace("\n", r"\n") + "'"
        template = template.replace(name, literal)
    return template


CHAT_TEMPLATE = make_chat_template()


def write_sentence_transformers(folder, dim, pooling):
    """Write the files from which sentence-transformers >= 5.4 loads a checkpoint folder by itself.

    It then pools and normalises as GVE.forward does; a pooling that it lacks is an error there.
    """
    module_types = {
        "": "sentence_transformers.base.modules.transformer.Transformer",
        "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "2_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    modules = []
    for i, (path, module_type) in enumerate(module_types.items()):
        modules.append({"idx": i, "name": str(i), "path": path, "type": module_type})

    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {
            "text": forward,
            "image": forward,
            "video": forward,
            "message": forward | {"format": "structured"},
        },
    }
    their_names = {"last_token": "lasttoken"}  # the others are called as in POOLINGS
    pool = {
        "embedding_dimension": dim,
        "pooling_mode": their_names.get(pooling, pooling),
        "include_prompt": True,
    }
    normalize = {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }

    files = {
        "modules.json": modules,
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": pool,
        "2_Normalize/config.json": normalize,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1))


@dataclasses.dataclass
class Flags:
    ckpt: str = flag("mini/base", "checkpoint folder or hub id", positional=True)


def main(flags):
    """Print how many parameters a checkpoint has and how many of them LoRA would train."""
    gve = GVE.from_pretrained(flags.ckpt, lora=True)
    lora = gve.lora_parameters()
    trained = sum(p.numel() for p in lora.values())
    total = sum(p.numel() for p in gve.parameters())
    print(f"dim {gve.dim}; {total:,} parameters, {trained:,} trained in {len(lora)} LoRA tensors")


if __name__ == "__main__":
    main(parse_flags(Flags, doc=__doc__))
