"""The released checkpoints' form: folders as GVE-3B's with either layout of names, and prompts against Qwen2.5's own tokenizer.

QWEN_TOKENIZER=FOLDER python -m pytest tests/test_released.py      # FOLDER: tokenizer.json, tokenizer_config.json of Qwen2.5
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from data import Collator
from model import GVE

FIND = "Find the video according to the text description."


def new_name(name):
    """transformers 4.52's name of a tensor that was named before it."""
    return (
        "model." + name
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
    )


def lay_out(source, folder, tensors, layout, shards=1, architecture="Qwen25VLForEmbedding"):
    """Write a checkpoint folder: the source's tokenizer and processor, a class name of remote code, tensors in so many files."""
    folder.mkdir()
    for file in Path(source).iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": [architecture],
        "auto_map": {"AutoModel": f"modeling.{architecture}"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "new":
        tensors = {new_name(name): tensor for name, tensor in tensors.items()}
    names = sorted(tensors)
    files = [
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        for i in range(shards)
    ]
    for i, file in enumerate(files):
        save_file(
            {name: tensors[name].contiguous() for name in names[i::shards]},
            folder / file,
            {"format": "pt"},
        )
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(
                {
                    "metadata": {},
                    "weight_map": {name: files[i % shards] for i, name in enumerate(names)},
                }
            )
        )
    return folder


@pytest.fixture(scope="module")
def tensors(tiny):
    loaded = load_file(f"{tiny}/model.safetensors")
    assert (
        "model.layers.0.mlp.up_proj.weight" in loaded and "visual.merger.mlp.0.weight" in loaded
    )  # the layout before 4.52
    return loaded


# Qwen2.5-VL-3B-Instruct's config.json as released (flat, before 4.52), with 1 of 36 and 2 of 32 layers.
CONFIG_3B = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def shapes_3b():
    """Names and shapes of GVE-3B's tensors, written out; biases where the release has them."""

    def linear(name, out, inner, bias):
        return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})}

    shapes = {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (1280,),
    }
    layer = "model.layers.0"
    shapes |= {
        f"{layer}.{norm}.weight": (2048,)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name, out, bias in (
        ("q", 2048, True),
        ("k", 256, True),
        ("v", 256, True),
        ("o", 2048, False),
    ):
        shapes |= linear(f"{layer}.self_attn.{name}_proj", out, 2048, bias)
    for name, out, inner in (("gate", 11008, 2048), ("up", 11008, 2048), ("down", 2048, 11008)):
        shapes |= linear(f"{layer}.mlp.{name}_proj", out, inner, False)
    for block in ("visual.blocks.0", "visual.blocks.1"):
        shapes |= {f"{block}.norm{i}.weight": (1280,) for i in (1, 2)}
        shapes |= linear(f"{block}.attn.qkv", 3840, 1280, True) | linear(
            f"{block}.attn.proj", 1280, 1280, True
        )
        for name, out, inner in (("gate", 3420, 1280), ("up", 3420, 1280), ("down", 1280, 3420)):
            shapes |= linear(f"{block}.mlp.{name}_proj", out, inner, True)
    return (
        shapes
        | linear("visual.merger.mlp.0", 5120, 5120, True)
        | linear("visual.merger.mlp.2", 2048, 5120, True)
    )


def test_a_folder_of_gve_3b_s_sizes_loads_in_both_layouts_with_equal_vectors(tiny, media, tmp_path):
    torch.manual_seed(0)
    made = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes_3b().items()}
    for name, tensor in made.items():
        if "norm" in name or "ln_q" in name:
            tensor.fill_(1)
        else:
            tensor[:2000].normal_(0, 0.02)  # the tokens in use; 150,000 embeddings stay zero
    source = tmp_path / "source"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("*.safetensors"))
    ids = {
        key: value
        for key, value in json.loads((source / "config.json").read_text()).items()
        if key.endswith("token_id")
    }
    (source / "config.json").write_text(
        json.dumps(CONFIG_3B | ids)
    )  # the small tokenizer's special tokens
    items, vectors = (
        [{"text": "a red ball"}, {"image": str(media / "i.png"), "text": "at night"}],
        {},
    )
    for layout, shards in (("old", 2), ("new", 1)):
        folder = lay_out(source, tmp_path / layout, made, layout, shards)
        gve = GVE.from_pretrained(folder, dtype="bfloat16")
        assert gve.dim == 2048 and {p.dtype for p in gve.parameters()} == {torch.bfloat16}
        state = gve.core.state_dict()
        assert len(state) == len(made) and sum(t.numel() for t in state.values()) == sum(
            t.numel() for t in made.values()
        )
        assert torch.equal(
            state["language_model.layers.0.mlp.down_proj.weight"],
            made["model.layers.0.mlp.down_proj.weight"],
        )
        assert torch.equal(
            state["visual.blocks.1.attn.qkv.bias"], made["visual.blocks.1.attn.qkv.bias"]
        )
        vectors[layout] = gve.embed(items, FIND)
        del gve, state
        shutil.rmtree(folder)
    assert torch.equal(vectors["old"], vectors["new"]) and vectors["old"].shape == (2, 2048)
    assert (vectors["old"].norm(dim=1) - 1).abs().max() < 1e-5 and (
        vectors["old"][0] @ vectors["old"][1]
    ).abs() < 0.99


@pytest.mark.parametrize("layout", ["old", "new", "bare"])
@pytest.mark.parametrize("head", ["tied away", "tied and stored", "untied"])
def test_every_layout_and_head_gives_the_same_vectors(tiny, tensors, tmp_path, layout, head):
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
    if layout == "bare":  # as Qwen2_5_VLModel itself is saved
        tensors = {
            new_name(name).removeprefix("model."): tensor for name, tensor in tensors.items()
        }
    folder = lay_out(tiny, tmp_path / "x", tensors, layout, shards=3)
    embedding = next(
        tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")
    )
    if head != "tied away":
        save_file(
            {
                "lm_head.weight": embedding.clone()
                if head == "tied and stored"
                else torch.randn_like(embedding)
            },
            folder / "head.safetensors",
            {"format": "pt"},
        )
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": head != "untied"})
    )
    items = [{"text": "a red ball"}, {"text": "two"}]
    assert torch.equal(
        GVE.from_pretrained(folder).embed(items), GVE.from_pretrained(tiny).embed(items)
    )


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("damage", ["renamed", "missing", "extra", "both layouts", "shape"])
def test_one_wrong_tensor_is_named(tiny, tensors, tmp_path, layout, damage):
    tensors, name = dict(tensors), "model.layers.1.self_attn.k_proj.bias"
    if damage == "renamed":
        tensors["model.layers.1.self_attn.k_proj.biass"] = tensors.pop(name)
    elif damage == "missing":
        tensors.pop(name)
    elif damage == "extra":
        tensors["model.layers.2.self_attn.k_proj.bias"] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = tensors[name][1:]
    folder = lay_out(tiny, tmp_path / "x", tensors, layout, shards=2)
    if damage == "both layouts":
        file = folder / "model-00002-of-00002.safetensors"
        other = new_name(name) if layout == "old" else name
        save_file({**load_file(file), other: tensors[name] + 1}, file, {"format": "pt"})
    place = "layers.2" if damage == "extra" else "layers.1"
    with pytest.raises(ValueError, match=f"{place}.self_attn.k_proj.bias"):
        GVE.from_pretrained(folder)


def test_a_shard_that_is_missing_or_broken_is_named(tiny, tensors, tmp_path):
    folder = lay_out(tiny, tmp_path / "x", tensors, "old", shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="x: cannot be loaded as a Qwen2.5-VL checkpoint"):
        GVE.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
        GVE.from_pretrained(folder)


def test_the_prompt_style_is_the_model_s_and_survives_saving(tiny, tmp_path):
    items = [{"text": "a red ball"}]
    system, user = (
        GVE.from_pretrained(tiny, prompt_style=style, lora=True) for style in ("", "user")
    )
    assert torch.equal(system.embed(items), user.embed(items))
    assert not torch.equal(system.embed(items, FIND), user.embed(items, FIND))
    user.save_pretrained(tmp_path)
    assert GVE.from_pretrained(tmp_path).prompt_style == "user"
    assert GVE.from_pretrained(tmp_path, prompt_style="system").prompt_style == "system"
    with pytest.raises(ValueError, match="'sistem' .system or user"):
        GVE.from_pretrained(tiny, prompt_style="sistem").embed(items)


@pytest.fixture(scope="module")
def qwen():
    folder = os.environ.get(
        "QWEN_TOKENIZER"
    )  # 7 MB of Qwen's, not ours to commit; conftest's own tokenizer runs everywhere
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        pytest.skip(
            "needs the real Qwen2.5 tokenizer: QWEN_TOKENIZER=FOLDER with its tokenizer.json and tokenizer_config.json"
        )
    size = {"shortest_edge": 4 * 784, "longest_edge": 256 * 784}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=dict(size)),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLVideoProcessor(size=dict(size)),
    )
    return processor, Tokenizer.from_file(f"{folder}/tokenizer.json")


VISION = "<|vision_start|>{}<|vision_end|>"
TURNS = {
    "system": "<|im_start|>system\nFIND<|im_end|>\n<|im_start|>user\nMEDIA",
    "user": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nFIND\nMEDIA",
}


@pytest.mark.parametrize("style", ["system", "user"])
@pytest.mark.parametrize("with_media", [False, True])
def test_prompts_are_the_real_tokenizer_s_ids(qwen, media, style, with_media):
    processor, tokenizer = qwen
    item, vision = {"text": "a red ball, 42 cm"}, ""
    if with_media:
        item |= {"image": str(media / "i.png"), "video": str(media / "a.mp4")}
        vision = VISION.format("<|video_pad|>" * 16) + VISION.format(
            "<|image_pad|>" * 6
        )  # 4 grids x 2 x 2; 70 x 90 -> 2 x 3
    expected = (
        TURNS[style].replace("FIND", FIND).replace("MEDIA", vision)
        + "a red ball, 42 cm<|im_end|>\n"
    )
    expected += "<|im_start|>assistant\n<|endoftext|>"
    ids = Collator(processor, prompt_style=style)([item], FIND)["input_ids"][0].tolist()
    assert (
        processor.tokenizer.decode(ids) == expected
        and ids == tokenizer.encode(expected, add_special_tokens=False).ids
    )
    assert ids[:3] == [151644, 8948, 198] and ids[-4:] == [
        151644,
        77091,
        198,
        151643,
    ]  # <|im_start|>assistant\n<|endoftext|>
    assert [ids.count(i) for i in (151652, 151653, 151656, 151655)] == (
        [2, 2, 16, 6] if with_media else [0] * 4
    )


def test_corpus_items_carry_the_default_system_turn_whatever_the_style(qwen):
    processor, _ = qwen
    ids = [
        Collator(processor, prompt_style=style)([{"text": "hi"}])["input_ids"][0].tolist()
        for style in ("system", "user")
    ]
    # Qwen's well-known ids of "You are a helpful assistant."; 872 user, 6023 hi
    assert (
        ids[0]
        == ids[1]
        == [
            151644,
            8948,
            198,
            2610,
            525,
            264,
            10950,
            17847,
            13,
            151645,
            198,
            151644,
            872,
            198,
            6023,
            151645,
            198,
            151644,
            77091,
            198,
            151643,
        ]
    )


@pytest.mark.parametrize("style", ["system", "user"])
def test_the_system_style_is_qwen_s_own_chat_template_and_long_texts_keep_the_instruction(
    qwen, style
):
    processor, _ = qwen
    messages = [{"role": "system", "content": FIND}, {"role": "user", "content": "word " * 400}]
    if style == "user":
        messages = [
            {"role": "user", "content": FIND + "\n" + "word " * 400}
        ]  # the template's own default system turn differs
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    template = (
        processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        + "<|endoftext|>"
    )
    item = {"text": "word " * 400}
    assert (
        processor.tokenizer.decode(
            Collator(processor, prompt_style=style)([item], FIND)["input_ids"][0]
        )
        == template
    )
    cut = Collator(processor, prompt_style=style, max_length=100)([item], FIND)["input_ids"][0]
    text = processor.tokenizer.decode(cut)
    assert (
        len(cut) == 100
        and FIND in text
        and text.endswith("<|im_start|>assistant\n<|endoftext|>")
        and text.count("word") < 90
    )
