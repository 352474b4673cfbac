"""GVE: any mix of text, image and video -> one unit vector (arXiv 2510.27571, sections 4 and A.7).

The embedder is Qwen2.5-VL without its language-model head. An item becomes one chat turn that ends in `<|endoftext|>`; its vector
is the last hidden state at that token, L2-normalised in float32. Only LoRA weights on the language model are trained.

    from model import GVE
    gve = GVE.from_pretrained("mini/prober")                    # or Qwen/Qwen2.5-VL-3B-Instruct, a LoRA folder, a merged folder
    v = gve.embed([{"video": "a.mp4"}, {"text": "a red ball falls", "image": "b.png"}])       # (2, D) float32

    python model.py                                             # prints the sizes of mini/base with LoRA, in seconds

Legend: B batch, T tokens, D embedding dim (hidden size), V vision tokens after merging, P patches before merging.
"""

import copy
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftConfig,
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
)
from transformers.utils import cached_file

from data import DEFAULT_INSTRUCTION, END, IMAGE_TOKENS, MIN_TOKENS, Collator, normalise
from kernels import windows  # registers the attention that load_backbone names

# Table 9: r 16, alpha 32, dropout 0.1 on q, k, v, up, gate, down of the language model; o_proj is not in the list. The expression
# has to name the language model, because the vision tower's MLP has the same three projection names.
LORA = dict(
    r=16,
    lora_alpha=32,
    lora_dropout=0.1,
    bias="none",
    task_type="FEATURE_EXTRACTION",
    target_modules=r".*language_model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(up|gate|down)_proj)",
)

# What the checkpoints were trained on, as a chat template: video, image, text in that order, the pooled token at the very end.
CHAT_TEMPLATE = (
    """{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\n"""
    + DEFAULT_INSTRUCTION
    + """<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content if part.type == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}{%- endfor %}
{%- for part in message.content if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endfor %}
{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{{- '<|im_start|>assistant\\n"""
    + END
    + """' }}"""
)

# The same pooling and normalisation for sentence-transformers >= 5.4, which then loads a checkpoint folder by itself.
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.base.modules.transformer.Transformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.base.modules.normalize.Normalize",
        },
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {
            "text": FORWARD,
            "image": FORWARD,
            "video": FORWARD,
            "message": FORWARD | {"format": "structured"},
        },
    },
    "1_Pooling/config.json": {
        "embedding_dimension": None,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    },
    "2_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
}


def last_token_pool(hidden, attention_mask):
    """Return the hidden state at each row's last attended token, whatever the padding side (section A.7).

    hidden (B, T, D); attention_mask (B, T) of 0 and 1 -> (B, D)
    """
    last = (
        hidden.shape[1] - 1 - attention_mask.flip(1).argmax(1)
    )  # (B,) argmax finds the first 1 from the right
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


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
    """Compute Qwen2.5-VL's three-axis rotary positions without a loop over tokens and without a host sync.

    Text counts up by one on all three axes. A vision block that starts at position p puts its token (i, y, x) at
    (p + floor(i * s * tokens_per_second), p + y, p + x), and text goes on at the block's largest position plus one. This is
    transformers 4.51.3's rule; later versions truncate s to whole seconds or let the text begin inside the video's time range.
    # PAPER: "1.0 FPS" and 8 frames per clip of any length exclude each other; s is the true time between two temporal grids.

    token_types (B, T): 0 text, 1 image, 2 video; attention_mask (B, T); grids (n, 3) in patches (t, h, w), ordered as the blocks
    appear row by row; second_per_grid_ts (n_videos,) s in seconds, float32 -> (3, B, T) int64, 0 on padding
    """
    B, T = token_types.shape
    device = token_types.device
    vision = (token_types > 0) & attention_mask.bool()
    start = vision & ~F.pad(vision, (1, 0))[:, :-1]  # (B, T) first tokens: blocks never touch
    grid = torch.full((B, T, 3), merge_size, device=device)  # so that text divides by 1 below
    rate = torch.ones(
        B, T, device=device
    )  # seconds per temporal grid; an image has one grid, so its rate is never used
    for kind, grids in ((1, image_grid_thw), (2, video_grid_thw)):
        if grids is None:
            continue
        of_kind = vision & (token_types == kind)
        block = (start & of_kind).flatten().long().cumsum(0).view(
            B, T
        ) - 1  # (B, T) which row of `grids` a token belongs to
        block = block.clamp(0, len(grids) - 1)
        grid = torch.where(of_kind[..., None], grids.to(device)[block], grid)
        if kind == 2:
            seconds = torch.as_tensor(second_per_grid_ts, dtype=torch.float32, device=device)
            rate = torch.where(of_kind, seconds[block], rate)
    t, h, w = grid[..., 0], grid[..., 1] // merge_size, grid[..., 2] // merge_size
    column = torch.arange(T, device=device).expand(B, T)
    first = (
        torch.where(start, column, 0).cummax(1).values
    )  # (B, T) column where the current block began
    i = column - first  # index inside the block
    time = (i // (h * w) * rate * tokens_per_second).long()
    extent = torch.stack([((t - 1) * rate * tokens_per_second).long(), h - 1, w - 1]).amax(0) + 1
    advance = torch.where(
        vision, torch.where(start, extent, 0), attention_mask.long()
    )  # blocks advance at their first token
    base = advance.cumsum(1) - advance
    base_of_block = base.gather(1, first)
    inside = torch.stack([time, i % (h * w) // w, i % w])  # (3, B, T)
    return torch.where(vision, base_of_block + inside, base) * attention_mask.long()


class GVE(nn.Module):
    """Qwen2.5-VL as an embedder. `backbone` is transformers' Qwen2_5_VLModel (wrapped by PEFT when it carries LoRA)."""

    def __init__(self, backbone, processor, base="", info=None, prompt_style=""):
        super().__init__()
        self.backbone = backbone
        self.processor = processor
        self.base = base  # what the adapter sits on: a folder or a hub id
        self.info = info or {}  # the checkpoint's gve.json
        self.prompt_style = prompt_style or self.info.get("prompt_style", "system")

    @classmethod
    def from_pretrained(
        cls, path, *, dtype=None, device=None, lora=False, base=None, prompt_style=""
    ):
        """Load a Qwen2.5-VL checkpoint, a LoRA adapter on one, or a merged folder; local folder or hub id, safetensors only.

        path: str or Path. dtype: torch dtype or its name, default bfloat16 on CUDA and float32 elsewhere. device: default CPU.
        lora: True or a dict of LoraConfig fields adds a fresh, trainable adapter; an adapter folder's own becomes trainable.
        base: overrides the adapter's own record of its base model. prompt_style: data.Collator's; empty: gve.json's, or "system".
        Raises ValueError when files are missing or a tensor finds no place.
        """
        device, path = torch.device(device or "cpu"), str(path)
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if not os.path.exists(path) and (path.count("/") != 1 or path.startswith((".", "/"))):
            raise ValueError(f"{path}: neither a checkpoint folder nor a hub id (owner/name)")
        is_adapter = _file(path, "adapter_config.json") is not None
        base = (
            find_base(base or PeftConfig.from_pretrained(path).base_model_name_or_path, path)
            if is_adapter
            else path
        )
        try:
            processor = Qwen2_5_VLProcessor.from_pretrained(path)
        except (
            OSError,
            ValueError,
            TypeError,
            ImportError,
        ) as error:  # transformers raises any of these for absent files
            name = (
                path if os.path.exists(path) else f"{path} (a hub id, for there is no such folder)"
            )
            raise ValueError(
                f"{name}: no usable processor (its config, tokenizer.json): {str(error).splitlines()[0]}"
            ) from error
        backbone = load_backbone(base, dtype)
        backbone.requires_grad_(False)
        if is_adapter:
            backbone = _attach_adapter(backbone, path, lora)
        elif lora:
            config = LoraConfig(
                **{**LORA, **(lora if isinstance(lora, dict) else {})},
                base_model_name_or_path=str(base),
            )
            backbone = get_peft_model(
                backbone, config
            )  # LoRA weights in float32 over a bfloat16 base (autocast_adapter_dtype)
            backbone.peft_config["default"].base_model_name_or_path = str(base)
        backbone.apply(
            lambda layer: setattr(layer, "cast_input_dtype_enabled", dtype != torch.bfloat16)
        )  # as autocast does
        info = json.loads(Path(file).read_text()) if (file := _file(path, "gve.json")) else {}
        return cls(backbone, processor, base, info, prompt_style).to(device).eval()

    @property
    def core(self):
        """The Qwen2_5_VLModel inside, with LoRA layers in place where there are any."""
        return (
            self.backbone.get_base_model()
            if hasattr(self.backbone, "peft_config")
            else self.backbone
        )

    @property
    def dim(self):
        return self.core.config.text_config.hidden_size

    @property
    def device(self):
        return next(self.parameters()).device

    def lora_parameters(self):
        """Return {name: tensor} of what is trained: the LoRA weights and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def positions(self, batch):
        """M-RoPE positions (3, B, T) of a collated batch."""
        config = self.core.config.vision_config
        return mrope_positions(
            batch["mm_token_type_ids"],
            batch["attention_mask"],
            batch.get("image_grid_thw"),
            batch.get("video_grid_thw"),
            batch.get("second_per_grid_ts"),
            tokens_per_second=config.tokens_per_second,
            merge_size=config.spatial_merge_size,
        )

    @torch.no_grad()
    def encode_vision(self, batch):
        """Run the frozen vision tower, once: a collated batch, raw or not -> the batch with `image_features` and
        `video_features`, one (V, D) per medium, in place of pixels. What the collator's store lacks is written to it."""
        batch = dict(batch)
        for kind, pixels in (
            ("image", batch.pop("pixel_values", None)),
            ("video", batch.pop("pixel_values_videos", None)),
        ):
            if pixels is None:
                continue
            encode = getattr(self.core, f"get_{kind}_features")
            if pixels.dtype == torch.uint8:
                pixels = normalise(pixels, getattr(self.processor, f"{kind}_processor"))
            grids = batch[f"{kind}_grid_thw"]
            features = list(batch.get(f"{kind}_features") or [None] * len(grids))
            missing = [i for i, known in enumerate(features) if known is None]
            for i, made in zip(missing, encode(pixels, grids[missing]).pooler_output, strict=True):
                features[i] = made
            batch[f"{kind}_features"] = features
        return batch

    def inputs_embeds(self, batch):
        """Token embeddings (B, T, D) with vision features in place, without a graph: all of it is frozen."""
        batch, ids, config = self.encode_vision(batch), batch["input_ids"], self.core.config
        with torch.no_grad():
            embeds = self.core.get_input_embeddings()(ids)  # (B, T, D)
            for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
                if f"{kind}_features" in batch:
                    features = torch.cat(
                        [f.to(embeds) for f in batch[f"{kind}_features"]]
                    )  # (V, D)
                    place = (ids == token)[..., None]
                    assert place.sum() == len(features), (
                        f"{int(place.sum())} placeholders for {len(features)} features"
                    )
                    embeds = embeds.masked_scatter(place, features)
        return embeds

    def forward(self, batch):
        """Embed a collated batch (data.Collator) -> (B, D) unit vectors, float32 (float64 for a float64 model)."""
        embeds = self.inputs_embeds(batch)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.core.dtype == torch.bfloat16
        ):  # for LoRA's float32
            hidden = self.core.language_model(
                inputs_embeds=embeds,
                attention_mask=batch["attention_mask"],
                use_cache=False,
                position_ids=self.positions(batch),
            ).last_hidden_state  # (B, T, D)
        pooled = last_token_pool(hidden, batch["attention_mask"])  # (B, D)
        return F.normalize(pooled if pooled.dtype == torch.float64 else pooled.float(), dim=-1)

    @torch.no_grad()
    def embed(
        self, items, instruction=None, *, batch_size=32, frames=8, max_tokens=200, max_length=8192
    ):
        """Embed items (data.py) -> (n, D) float32 on the CPU. The first undecodable item raises; embed.encode goes on instead.

        instruction: system turn, default "You are a helpful assistant."; frames per video, even; max_tokens per frame.
        """
        if isinstance(items, dict):
            raise ValueError("embed takes a list of items, not one item")
        collate = Collator(
            self.processor,
            frames=frames,
            max_tokens=max_tokens,
            max_length=max_length,
            prompt_style=self.prompt_style,
        )
        out = [
            self(to_device(collate(items[i : i + batch_size], instruction), self.device))
            .float()
            .cpu()
            for i in range(0, len(items), batch_size)
        ]
        return torch.cat(out) if out else torch.empty(0, self.dim)

    def save_pretrained(self, folder, *, merge=False, info=None):
        """Write a checkpoint folder, valid for Hugging Face at its root; every file appears whole under its name or not at all.

        merge=False writes the LoRA adapter in PEFT's layout, merge=True full weights with LoRA folded in (as
        ForConditionalGeneration, so that any Qwen2.5-VL loader takes them). info: dict for gve.json.
        """
        part = Path(folder).with_name(Path(folder).name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if merge or not hasattr(self.backbone, "peft_config"):
            full = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                self.base, dtype=next(self.core.parameters()).dtype
            )
            lora = hasattr(self.backbone, "peft_config")
            full.model.load_state_dict(
                (
                    copy.deepcopy(self.backbone).merge_and_unload() if lora else self.backbone
                ).state_dict()
            )
            full.save_pretrained(part)
        else:
            self.backbone.save_pretrained(part, safe_serialization=True)
            (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        processor = copy.deepcopy(self.processor)
        processor.chat_template = CHAT_TEMPLATE
        for part_of, most in (
            (processor.image_processor, IMAGE_TOKENS),
            (processor.video_processor, 200),
        ):
            unit = (
                part_of.patch_size * part_of.merge_size
            ) ** 2  # other loaders then resize as our Collator does
            part_of.size = {"shortest_edge": MIN_TOKENS * unit, "longest_edge": most * unit}
        processor.save_pretrained(part)
        for name, content in SENTENCE_TRANSFORMERS.items():
            (part / name).parent.mkdir(exist_ok=True)
            content = content | {"embedding_dimension": self.dim} if "Pooling" in name else content
            (part / name).write_text(json.dumps(content, indent=1))
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
        }
        self.info = {
            **self.info,
            **(info or {}),
            "base": str(self.base),
            "dim": self.dim,
            "versions": versions,
            "prompt_style": self.prompt_style,
        }
        (part / "gve.json").write_text(json.dumps(self.info, indent=1) + "\n")
        shutil.copytree(part, folder, copy_function=os.replace, dirs_exist_ok=True)
        shutil.rmtree(part)


def to_device(batch, device):
    """Move a batch's tensors, leaving everything else as it is."""
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


def find_base(base, adapter):
    """Find an adapter's base: a path from here, from the adapter's folder or from this repository, else a hub id."""
    roots = Path(), Path(adapter), Path(__file__).resolve().parent
    return next(
        (str(root / base) for root in roots if (root / base / "config.json").is_file()), base
    )


def load_backbone(path, dtype):
    """Load Qwen2_5_VLModel strictly from any class's checkpoint of it (GVE's Qwen25VLForEmbedding, say), whole or in shards: a
    tensor that is missing or has no place is an error. The lm_head, tied or not, is left out. No remote code."""
    tensors = {}
    try:
        if not _file(
            path, "config.json"
        ):  # transformers would go on with its class default, of 72B's size
            raise OSError("no config.json")
        config = Qwen2_5_VLConfig.from_pretrained(path)
        index = _file(path, "model.safetensors.index.json")
        shards = (
            json.loads(Path(index).read_text())["weight_map"].values()
            if index
            else ["model.safetensors"]
        )
        for name in sorted(set(shards)):
            for key, tensor in load_file(_file(path, name) or f"{path}/{name}").items():
                if tensors.setdefault(weight_key(key), tensor) is not tensor:
                    raise ValueError(
                        f"{path}: {name} holds {key}, which another name or file holds as well"
                    )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be loaded as a Qwen2.5-VL checkpoint: {str(error).splitlines()[0]}"
        ) from error
    tensors.pop("lm_head.weight", None)
    model, report = Qwen2_5_VLModel.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # they raise below
    model.name_or_path = str(path)
    if wrong := {
        k: sorted(map(str, report[k]))[:3]
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[k]
    }:
        raise ValueError(f"{path}: weights do not fit Qwen2.5-VL: {wrong}")
    windows.install(model.visual)
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # NaN gradients under a mask on Hopper (pytorch issue 196678), a plan per shape
    return model


def _attach_adapter(backbone, path, lora):
    """Put an adapter folder's LoRA weights on a backbone and check that each one found its place; lora: from_pretrained's."""
    config = PeftConfig.from_pretrained(path)
    config.inference_mode = not lora
    config.lora_dropout = (
        lora["lora_dropout"]
        if isinstance(lora, dict) and "lora_dropout" in lora
        else config.lora_dropout
    )
    model = get_peft_model(backbone, config)
    tensors = load_file(
        _file(path, "adapter_model.safetensors") or f"{path}/adapter_model.safetensors"
    )
    tensors = {
        "base_model.model." + weight_key(k.removeprefix("base_model.model.")): v
        for k, v in tensors.items()
    }
    expected = set(get_peft_model_state_dict(model))
    if set(tensors) != expected:
        raise ValueError(
            f"{path}: adapter does not fit its base: without a place {sorted(set(tensors) - expected)[:3]}, "
            f"missing {sorted(expected - set(tensors))[:3]}"
        )
    set_peft_model_state_dict(model, tensors)
    return model


def weight_key(key):
    """A tensor's name in Qwen2_5_VLModel: classes with a head put "model." before it, on all but the vision tower until
    transformers 4.52, when the language model had no level of its own ("model.layers.0", "visual.blocks.0")."""
    key = key.removeprefix("model.")
    return "language_model." + key if key.startswith(("layers.", "embed_tokens.", "norm.")) else key


def _file(path, name):
    """The local path of a checkpoint's file, None if it has none; a local folder never asks the network."""
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


if __name__ == "__main__":
    gve = GVE.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "mini/base", lora=True)
    trained, total = (
        sum(p.numel() for p in gve.lora_parameters().values()),
        sum(p.numel() for p in gve.parameters()),
    )
    print(
        f"dim {gve.dim}; {total:,} parameters, {trained:,} trained in {len(gve.lora_parameters())} LoRA tensors"
    )
