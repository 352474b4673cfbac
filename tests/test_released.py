"""The released checkpoints' form: folders like GVE-3B's, prompts against Qwen2.5's own tokenizer.

QWEN_TOKENIZER=FOLDER python -m pytest tests/test_released.py
FOLDER holds tokenizer.json and tokenizer_config.json of Qwen2.5.
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
    """Return transformers 4.52's name of a tensor for its name before that version."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def lay_out(source, folder, tensors, layout, shards=1):
    """Write a checkpoint folder: the source's processor, a remote-code class, tensors in shards."""
    folder.mkdir()
    for file in Path(source).iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen25VLForEmbedding"]
    config["auto_map"] = {"AutoModel": "modeling.Qwen25VLForEmbedding"}
    (folder / "config.json").write_text(json.dumps(config))

    if layout == "new":
        tensors = {new_name(name): tensor for name, tensor in tensors.items()}
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        shard = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def tensors(tiny):
    loaded = load_file(f"{tiny}/model.safetensors")
    # The layout before 4.52.
    assert "model.layers.0.mlp.up_proj.weight" in loaded
    assert "visual.merger.mlp.0.weight" in loaded
    return loaded


# Qwen2.5-VL-3B-Instruct's config.json as released (flat, before 4.52), with 1 of its 36 layers and 2
# of its vision tower's 32.
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
    shapes = {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (1280,),
    }

    def linear(name, out, inner, bias):
        shapes[f"{name}.weight"] = (out, inner)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    layer = "model.layers.0"
    shapes[f"{layer}.input_layernorm.weight"] = (2048,)
    shapes[f"{layer}.post_attention_layernorm.weight"] = (2048,)
    linear(f"{layer}.self_attn.q_proj", 2048, 2048, True)
    linear(f"{layer}.self_attn.k_proj", 256, 2048, True)
    linear(f"{layer}.self_attn.v_proj", 256, 2048, True)
    linear(f"{layer}.self_attn.o_proj", 2048, 2048, False)
    linear(f"{layer}.mlp.gate_proj", 11008, 2048, False)
    linear(f"{layer}.mlp.up_proj", 11008, 2048, False)
    linear(f"{layer}.mlp.down_proj", 2048, 11008, False)

    for block in ("visual.blocks.0", "visual.blocks.1"):
        shapes[f"{block}.norm1.weight"] = (1280,)
        shapes[f"{block}.norm2.weight"] = (1280,)
        linear(f"{block}.attn.qkv", 3840, 1280, True)
        linear(f"{block}.attn.proj", 1280, 1280, True)
        linear(f"{block}.mlp.gate_proj", 3420, 1280, True)
        linear(f"{block}.mlp.up_proj", 3420, 1280, True)
        linear(f"{block}.mlp.down_proj", 1280, 3420, True)
    linear("visual.merger.mlp.0", 5120, 5120, True)
    linear("visual.merger.mlp.2", 2048, 5120, True)
    return shapes


def test_a_folder_of_gve_3b_s_sizes_loads_in_both_layouts_with_equal_vectors(tiny, media, tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes_3b().items():
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
        if "norm" in name or "ln_q" in name:
            tensors[name].fill_(1)
        else:
            tensors[name][:2000].normal_(0, 0.02)  # the tokens in use; 150,000 embeddings stay zero

    source = tmp_path / "source"
    shutil.copytree(tiny, source, ignore=shutil.ignore_patterns("*.safetensors"))
    config = dict(CONFIG_3B)
    for key, value in json.loads((source / "config.json").read_text()).items():
        if key.endswith("token_id"):  # the small tokenizer's special tokens
            config[key] = value
    (source / "config.json").write_text(json.dumps(config))

    items = [{"text": "a red ball"}, {"image": str(media / "i.png"), "text": "at night"}]
    vectors = {}
    for layout, shards in (("old", 2), ("new", 1)):
        folder = lay_out(source, tmp_path / layout, tensors, layout, shards)
        gve = GVE.from_pretrained(folder, dtype="bfloat16")
        assert gve.dim == 2048
        assert {p.dtype for p in gve.parameters()} == {torch.bfloat16}

        state = gve.core.state_dict()
        assert len(state) == len(tensors)
        assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())
        down = "layers.0.mlp.down_proj.weight"
        assert torch.equal(state["language_model." + down], tensors["model." + down])
        qkv = "visual.blocks.1.attn.qkv.bias"
        assert torch.equal(state[qkv], tensors[qkv])

        vectors[layout] = gve.embed(items, FIND)
        del gve, state
        shutil.rmtree(folder)

    text, image = vectors["old"]
    assert torch.equal(vectors["old"], vectors["new"])
    assert vectors["old"].shape == (2, 2048)
    assert (vectors["old"].norm(dim=1) - 1).abs().max() < 1e-5
    assert (text @ image).abs() < 0.99


@pytest.mark.parametrize("layout", ["old", "new", "bare"])
@pytest.mark.parametrize("head", ["tied away", "tied and stored", "untied"])
def test_every_layout_and_head_gives_the_same_vectors(tiny, tensors, tmp_path, layout, head):
    named = {}
    for name, tensor in tensors.items():
        if name.startswith("lm_head"):
            continue
        if layout == "bare":  # as Qwen2_5_VLModel itself is saved
            name = new_name(name).removeprefix("model.")
        if name.endswith("embed_tokens.weight"):
            embedding = tensor
        named[name] = tensor
    folder = lay_out(tiny, tmp_path / "x", named, layout, shards=3)

    if head != "tied away":
        weight = embedding.clone() if head == "tied and stored" else torch.randn_like(embedding)
        save_file({"lm_head.weight": weight}, folder / "head.safetensors", {"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = head != "untied"
    (folder / "config.json").write_text(json.dumps(config))

    items = [{"text": "a red ball"}, {"text": "two"}]
    expected = GVE.from_pretrained(tiny).embed(items)
    assert torch.equal(GVE.from_pretrained(folder).embed(items), expected)


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("damage", ["renamed", "missing", "extra", "both layouts", "shape"])
def test_one_wrong_tensor_is_named(tiny, tensors, tmp_path, layout, damage):
    tensors = dict(tensors)
    name = "model.layers.1.self_attn.k_proj.bias"
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
    system = GVE.from_pretrained(tiny, lora=True)
    user = GVE.from_pretrained(tiny, prompt_style="user", lora=True)
    assert torch.equal(system.embed(items), user.embed(items))
    assert not torch.equal(system.embed(items, FIND), user.embed(items, FIND))

    user.save_pretrained(tmp_path)
    assert GVE.from_pretrained(tmp_path).prompt_style == "user"
    assert GVE.from_pretrained(tmp_path, prompt_style="system").prompt_style == "system"
    with pytest.raises(ValueError, match="'sistem' .system or user"):
        GVE.from_pretrained(tiny, prompt_style="sistem").embed(items)


@pytest.fixture(scope="module")
def qwen():
    """The real tokenizer, 7 MB of Qwen's and not ours to commit; conftest's own runs everywhere."""
    folder = os.environ.get("QWEN_TOKENIZER")
    if not folder or not (Path(folder) / "tokenizer.json").is_file():
        pytest.skip(
            "needs the real Qwen2.5 tokenizer: QWEN_TOKENIZER=FOLDER with its tokenizer.json and "
            "tokenizer_config.json"
        )
    size = {"shortest_edge": 4 * 784, "longest_edge": 256 * 784}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=dict(size)),
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLVideoProcessor(size=dict(size)),
    )
    return processor, Tokenizer.from_file(f"{folder}/tokenizer.json")


DEFAULT_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TURNS = {
    "system": "<|im_start|>system\nFIND<|im_end|>\n<|im_start|>user\nMEDIA",
    "user": DEFAULT_TURN + "<|im_start|>user\nFIND\nMEDIA",
}
ANSWER = "<|im_start|>assistant\n<|endoftext|>"
ANSWER_IDS = [151644, 77091, 198, 151643]
VISION_IDS = [151652, 151653, 151656, 151655]  # start, end, video pad, image pad


@pytest.mark.parametrize("style", ["system", "user"])
@pytest.mark.parametrize("with_media", [False, True])
def test_prompts_are_the_real_tokenizer_s_ids(qwen, media, style, with_media):
    processor, tokenizer = qwen
    item = {"text": "a red ball, 42 cm"}
    vision = ""
    counts = [0, 0, 0, 0]
    if with_media:
        item |= {"image": str(media / "i.png"), "video": str(media / "a.mp4")}
        video_pads = "<|video_pad|>" * 16  # 4 grids x 2 x 2
        image_pads = "<|image_pad|>" * 6  # 70 x 90 pixels -> 2 x 3
        for pads in (video_pads, image_pads):
            vision += f"<|vision_start|>{pads}<|vision_end|>"
        counts = [2, 2, 16, 6]

    turns = TURNS[style].replace("FIND", FIND).replace("MEDIA", vision)
    expected = turns + "a red ball, 42 cm<|im_end|>\n" + ANSWER
    ids = Collator(processor, prompt_style=style)([item], FIND)["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids) == expected
    assert ids == tokenizer.encode(expected, add_special_tokens=False).ids
    assert ids[:3] == [151644, 8948, 198]
    assert ids[-4:] == ANSWER_IDS
    assert [ids.count(i) for i in VISION_IDS] == counts


def test_corpus_items_carry_the_default_system_turn_whatever_the_style(qwen):
    processor, _ = qwen
    # Qwen's well-known ids of "You are a helpful assistant."; 872 user, 6023 hi.
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 6023, 151645, 198]
    for style in ("system", "user"):
        ids = Collator(processor, prompt_style=style)([{"text": "hi"}])["input_ids"][0].tolist()
        assert ids == system + user + ANSWER_IDS


@pytest.mark.parametrize("style", ["system", "user"])
def test_the_system_style_is_qwen_s_own_chat_template_and_long_texts_keep_the_instruction(
    qwen, style
):
    processor, _ = qwen
    text = "word " * 400
    messages = [{"role": "system", "content": FIND}, {"role": "user", "content": text}]
    if style == "user":
        # The template's own default system turn differs, so it is given here.
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": FIND + "\n" + text},
        ]
    template = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = Collator(processor, prompt_style=style)([{"text": text}], FIND)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == template + "<|endoftext|>"

    collate = Collator(processor, prompt_style=style, max_length=100)
    ids = collate([{"text": text}], FIND)["input_ids"][0]
    cut = processor.tokenizer.decode(ids)
    assert len(ids) == 100
    assert FIND in cut
    assert cut.endswith(ANSWER)
    assert cut.count("word") < 90
