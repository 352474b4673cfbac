"""extras/baselines.py: golden values of upstream's modules, tensors' names, frames, texts, eval.py.

Golden values (tests/golden/) were computed by each model's own code, tiny and random, in float32.
"""

import dataclasses
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import moving_square
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import v2
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

import eval as ev
from extras import baselines as bl
from support.flags import parse_flags
from support.media import load_image, load_video

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
DUALS = ["CLIP4Clip", "ViCLIP", "VideoCLIP-XL", "LanguageBind"]
DUALS += ["InternVideo2-1B", "InternVideo2-6B"]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def golden(name, prefix=""):
    """Read golden values -> (weights under `prefix`, inputs and outputs)."""
    weights = {}
    values = {}
    for key, tensor in load_file(GOLDEN / f"{name}.safetensors").items():
        if key.startswith("w."):
            weights[prefix + key[2:]] = tensor
        else:
            values[key] = tensor
    return weights, values


def with_settings(name, frames=8, **settings):
    """A baseline's row with other constants, for towers that are smaller than the real one."""
    row = bl.BASELINES[name]
    return dataclasses.replace(row, frames=frames, settings=row.settings | settings)


def check(vectors, expected, tolerance=2e-5):
    difference = (vectors - expected).abs()
    numbers = f"differs by at most {difference.max():.2g}, {difference.mean():.2g} on average"
    assert vectors.shape == expected.shape and difference.max() < tolerance, numbers


# Tiny folders in the layouts of the released files. Names are spelled out here, or transformers'.


def clip_vocabulary():
    """OpenAI's file, cut short: a header, then merges."""
    merges = ["t h", "th e</w>", "r e", "re d</w>", "b a", "l l</w>", "ba ll</w>", "a n", "Ã ©</w>"]
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""]
    return merges, gzip.compress("\n".join(lines).encode())


VOCABULARY = 512 + 9 + 2


def openai_tower(prefix, width, layers):
    """Layers and norms in OpenAI's names."""
    state = {}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}."
        state[block + "attn.in_proj_weight"] = torch.randn(3 * width, width)
        state[block + "attn.in_proj_bias"] = torch.randn(3 * width)
        state[block + "attn.out_proj.weight"] = torch.randn(width, width)
        state[block + "attn.out_proj.bias"] = torch.randn(width)
        state[block + "mlp.c_fc.weight"] = torch.randn(4 * width, width)
        state[block + "mlp.c_fc.bias"] = torch.randn(4 * width)
        state[block + "mlp.c_proj.weight"] = torch.randn(width, 4 * width)
        state[block + "mlp.c_proj.bias"] = torch.randn(width)
        for norm in ("ln_1", "ln_2"):
            state[f"{block}{norm}.weight"] = torch.randn(width)
            state[f"{block}{norm}.bias"] = torch.randn(width)
    return state


def openai_clip(vision, text, positions, width=64, text_width=48, layers=2, dim=24):
    """ViCLIP's and VideoCLIP-XL's tensors: frames of 28 x 28 pixels, 8 of them."""
    state = openai_tower(vision, width, layers) | openai_tower(text, text_width, layers)
    state[vision + "class_embedding"] = torch.randn(width)
    state[vision + "positional_embedding"] = torch.randn(5, width)
    state[vision + "temporal_positional_embedding"] = torch.randn(1, 8, width)
    state[vision + "conv1.weight"] = torch.randn(width, 3, 1, 14, 14)
    state[vision + "proj"] = torch.randn(width, dim)
    state[text + "token_embedding.weight"] = torch.randn(VOCABULARY, text_width)
    state[text + "positional_embedding"] = torch.randn(positions, text_width)
    state[text + "text_projection"] = torch.randn(text_width, dim)
    for norm in ("ln_pre", "ln_post"):
        state[f"{vision}{norm}.weight"] = torch.randn(width)
        state[f"{vision}{norm}.bias"] = torch.randn(width)
    state[text + "ln_final.weight"] = torch.randn(text_width)
    state[text + "ln_final.bias"] = torch.randn(text_width)
    return state


def transformers_clip(width, text_width, heads, text_heads, patch):
    """CLIPModel's tensors: frames of 2 x 2 patches."""
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": heads, "patch_size": patch, "image_size": 2 * patch}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width}
    text |= {"num_hidden_layers": 2, "num_attention_heads": text_heads, "vocab_size": VOCABULARY}
    text |= {"bos_token_id": 521, "eos_token_id": 522, "pad_token_id": 522}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def languagebind_state():
    state = transformers_clip(64, 64, 16, 16, 14).state_dict()
    vision = "vision_model."
    state[vision + "embeddings.class_embedding"] = torch.randn(8, 64)
    patches = state[vision + "embeddings.patch_embedding.weight"]
    state[vision + "embeddings.patch_embedding.weight"] = patches[:, :, None]
    for i in range(2):
        layer = f"{vision}encoder.layers.{i}."
        state[layer + "temporal_embedding"] = torch.randn(1, 8, 64)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state[f"{layer}temporal_attn.{part}.weight"] = torch.randn(64, 64) * 0.1
            state[f"{layer}temporal_attn.{part}.bias"] = torch.randn(64) * 0.1
        state[layer + "temporal_layer_norm1.weight"] = torch.randn(64)
        state[layer + "temporal_layer_norm1.bias"] = torch.randn(64)
    return state


def internvideo2_state(width, prefix="", images=True):
    """Two layers of 2 x 2 patches; a BERT of 20 layers, of which 19 are used."""
    vision = f"{prefix}vision_encoder."
    shapes = {
        vision + "cls_token": (1, 1, width),
        vision + "pos_embed": (1, 1 + 4 * 4, width),
        vision + "clip_pos_embed": (1, 17, width),
        vision + "patch_embed.proj.weight": (width, 3, 1, 14, 14),
        vision + "patch_embed.proj.bias": (width,),
        vision + "clip_decoder.0.head.weight": (20, width),
        vision + "final_clip_decoder.head.weight": (20, 32),
        f"{prefix}vision_proj.weight": (24, 32),
        f"{prefix}vision_proj.bias": (24,),
        f"{prefix}text_proj.weight": (24, 32),
        f"{prefix}text_proj.bias": (24,),
        f"{prefix}itm_head.weight": (2, 32),
        f"{prefix}temp": (),
        f"{prefix}text_encoder.cls.predictions.bias": (len(BERT_WORDS),),
        f"{prefix}text_encoder.bert.encoder.layer.19.crossattention.self.key.weight": (32, width),
    }
    if images:
        shapes[vision + "img_pos_embed"] = (1, 5, width)
    for i in range(2):
        block = f"{vision}blocks.{i}."
        shapes[block + "attn.qkv.weight"] = (3 * width, width)
        shapes[block + "attn.proj.weight"] = (width, width)
        shapes[block + "attn.proj.bias"] = (width,)
        shapes[block + "mlp.fc1.weight"] = (int(width * 48 / 11), width)
        shapes[block + "mlp.fc1.bias"] = (int(width * 48 / 11),)
        shapes[block + "mlp.fc2.weight"] = (width, int(width * 48 / 11))
        shapes[block + "mlp.fc2.bias"] = (width,)
        for name in ("norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight"):
            shapes[block + name] = (width,)
        shapes[block + "ls1.gamma"] = shapes[block + "ls2.gamma"] = (width,)
    pool = vision + "clip_projector."
    for letter in "qkv":
        shapes[f"{pool}norm1_{letter}.weight"] = shapes[f"{pool}norm1_{letter}.bias"] = (width,)
        shapes[f"{pool}cross_attn.{letter}.weight"] = (width, width)
        shapes[f"{pool}cross_attn.{letter}_bias"] = (width,)
    shapes[pool + "cross_attn.proj.weight"] = (32, width)
    shapes[pool + "cross_attn.proj.bias"] = (32,)

    bert = f"{prefix}text_encoder.bert."
    shapes[bert + "embeddings.word_embeddings.weight"] = (len(BERT_WORDS), 32)
    shapes[bert + "embeddings.position_embeddings.weight"] = (512, 32)
    shapes[bert + "embeddings.token_type_embeddings.weight"] = (2, 32)
    shapes[bert + "embeddings.LayerNorm.weight"] = (32,)
    shapes[bert + "embeddings.LayerNorm.bias"] = (32,)
    shapes[bert + "embeddings.position_ids"] = (1, 512)
    linears = {f"attention.self.{part}": (32, 32) for part in ("query", "key", "value")}
    linears |= {"attention.output.dense": (32, 32), "output.dense": (32, 64)}
    linears |= {"intermediate.dense": (64, 32)}
    for i in range(20):
        layer = f"{bert}encoder.layer.{i}."
        for name, shape in linears.items():
            shapes[f"{layer}{name}.weight"] = shape
            shapes[f"{layer}{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (32,)

    state = {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape) * 0.2
    return state


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "##s", "the"]
BERT_WORDS += [chr(letter) for letter in range(ord("b"), ord("z"))]
BERT_WORDS += [f"##{chr(letter)}" for letter in range(ord("a"), ord("z")) if letter != ord("s")]


def write_folder(name, folder, state=None):
    """Write a tiny random baseline with the files that the released one has -> its state dict."""
    torch.manual_seed(len(name))
    folder.mkdir(parents=True, exist_ok=True)
    merges, vocabulary = clip_vocabulary()
    if state is not None:
        pass
    elif name == "CLIP4Clip":
        state = transformers_clip(48, 64, 12, 8, 32).state_dict()
    elif name == "ViCLIP":
        state = openai_clip("vision_encoder.", "text_encoder.", 32)
        state["temp"] = torch.ones(())
    elif name == "VideoCLIP-XL":
        state = openai_clip("vision_model.vision_encoder.", "text_model.", 248)
        state["text_model.positional_embedding_res"] = torch.randn(248, 48)
        state["logit_scale"] = state["vision_model.temp"] = torch.ones(())
    elif name == "LanguageBind":
        state = languagebind_state()
    elif name == "InternVideo2-1B":
        state = internvideo2_state(48)
    else:
        state = internvideo2_state(400, "model.", images=False)

    if name.startswith("InternVideo2"):
        (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    elif name.endswith(("Bind", "Clip")):
        bl.read_openai_vocabulary(write_bytes(folder / "bpe.gz", vocabulary)).save_pretrained(
            folder
        )
    else:
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(vocabulary)

    state = {key: tensor.contiguous() for key, tensor in state.items()}
    file = bl.BASELINES[name].weights
    if name == "InternVideo2-1B":
        torch.save({"module": state, "global_steps": 3}, folder / file)
    elif file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return state


def write_bytes(path, content):
    path.write_bytes(content)
    return path


# Forward passes


def test_viclip_equals_upstream(tmp_path):
    vision, v = golden("viclip_vision", "vision_encoder.")
    text, t = golden("viclip_text", "text_encoder.")
    save_tokenizer_of_64(tmp_path)
    save_file(vision | text, tmp_path / "model.safetensors")
    row = with_settings("ViCLIP", frames=4, heads=(2, 2), text_tokens=8)
    dual = bl.load_clip(row, str(tmp_path), "cpu")
    clips = v["x"].transpose(1, 2)
    check(dual.encode_video(dual.towers, clips), v["y"])
    check(dual.encode_video(dual.towers, clips[:, :1]), v["y1"])
    check(dual.encode_text(dual.towers, t["ids"], None), t["y"])


def save_tokenizer_of_64(folder):
    """Golden texts are ids below 64, of which 62 begins and 63 ends a text."""
    letters = [chr(ord("A") + i) for i in range(62)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def test_languagebind_equals_upstream(tmp_path):
    weights, values = golden("languagebind")
    save_tokenizer_of_64(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    row = with_settings("LanguageBind", frames=4, heads=(2, 2), text_tokens=8)
    dual = bl.load_clip(row, str(tmp_path), "cpu")
    check(dual.encode_video(dual.towers, values["x"].transpose(1, 2)), values["y"])
    check(dual.encode_text(dual.towers, values["ids"], values["mask"]), values["t"])


def test_internvideo2_equals_upstream(tmp_path):
    vision, v = golden("internvideo2_sep", "vision_encoder.")
    text, t = golden("internvideo2_bert", "text_encoder.")
    projections = {"vision_proj.weight": torch.randn(10, 24), "vision_proj.bias": torch.randn(10)}
    projections |= {"text_proj.weight": torch.randn(10, 32), "text_proj.bias": torch.randn(10)}
    write_folder("InternVideo2-1B", tmp_path, vision | text | projections)
    small = {"heads": 4, "pooling_heads": 4, "text_heads": 2, "text_layers": 3}
    dual = bl.load_internvideo2(with_settings("InternVideo2-1B", **small), str(tmp_path), "cpu")

    for x, y in (("x", "y"), ("x8", "y8"), ("x1", "y1")):  # 4 frames, 8, an image
        check(dual.towers["vision_encoder"](v[x].transpose(1, 2)), v[y])
    projected = F.linear(v["y"], projections["vision_proj.weight"], projections["vision_proj.bias"])
    check(dual.encode_video(dual.towers, v["x"].transpose(1, 2)), projected, 1e-4)
    states = dual.towers["text_encoder"]["bert"](t["ids"], attention_mask=t["mask"])
    check(states.last_hidden_state, t["y"])
    projected = F.linear(
        t["y"][:, 0], projections["text_proj.weight"], projections["text_proj.bias"]
    )
    check(dual.encode_text(dual.towers, t["ids"], t["mask"]), projected, 1e-4)


def test_internvideo2_of_one_table_gives_an_image_the_mean_of_its_times():
    vision, _ = golden("internvideo2_sep")
    sizes = {"width": 48, "heads": 4, "layers": 3, "inner": 209, "patch": 14, "places": 4}
    sizes |= {"frames": 4, "pool_heads": 4, "dim": 24}
    model = bl.InternVideo2Vision(**sizes, image_positions=False)
    with torch.no_grad():
        model.pos_embed.copy_(vision["pos_embed"])
    expected = vision["pos_embed"][:, :5].clone()
    for place in range(4):
        expected[:, 1 + place] = vision["pos_embed"][:, 1 + place :: 4].mean(1)
    check(model.positions(1), expected, 1e-6)


def openai_text(state, prefix, ids, heads):
    """OpenAI's text tower on torch's own attention -> the vector at the end token."""
    x = state[prefix + "token_embedding.weight"][ids]
    positions = state[prefix + "positional_embedding"].clone()
    positions[20:] = state[prefix + "positional_embedding_res"][20:]
    x = x + positions[: len(ids)]
    width = x.shape[-1]
    causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(2):
        block = {}
        start = f"{prefix}transformer.resblocks.{i}."
        for name, tensor in state.items():
            if name.startswith(start):
                block[name.removeprefix(start)] = tensor
        attention = nn.MultiheadAttention(width, heads)
        attention.load_state_dict(
            {name[5:]: tensor for name, tensor in block.items() if name.startswith("attn.")}
        )
        y = F.layer_norm(x, (width,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=causal)[0]
        y = F.layer_norm(x, (width,), block["ln_2.weight"], block["ln_2.bias"])
        y = F.linear(y, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    x = F.layer_norm(
        x, (width,), state[prefix + "ln_final.weight"], state[prefix + "ln_final.bias"]
    )
    return x[-1] @ state[prefix + "text_projection"]


@torch.no_grad()
def test_videoclip_xl_reads_248_positions_from_two_tables(tmp_path):
    state = write_folder("VideoCLIP-XL", tmp_path)
    for name in list(state):  # smaller, as vectors of random weights grow
        if name.endswith(("weight", "bias")) and "ln_" not in name:
            state[name] = state[name] * 0.2
    torch.save(state, tmp_path / "VideoCLIP-XL.bin")
    dual = bl.load_clip(bl.BASELINES["VideoCLIP-XL"], str(tmp_path), "cpu")
    ids = [521, *np.random.default_rng(0).integers(0, 521, 120).tolist(), 522]
    padded = torch.tensor([ids + [0] * 6])
    expected = openai_text(state, "text_model.", ids, 12)
    scale = expected.norm()
    check(dual.encode_text(dual.towers, padded, None)[0] / scale, expected / scale)


@torch.no_grad()
def test_clip4clip_is_the_mean_of_the_unit_vectors_of_frames(tmp_path):
    torch.manual_seed(0)
    clip = transformers_clip(48, 64, 12, 8, 32)
    write_folder("CLIP4Clip", tmp_path, clip.state_dict())
    encoder = bl.make_encoder(bl.BASELINES["CLIP4Clip"], str(tmp_path), "cpu")
    frames = np.random.default_rng(1).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    text = torch.tensor([[521, 5, 6, 522]])

    pixels = (torch.tensor(frames).movedim(-1, 1) / 255 - CLIP_MEAN) / CLIP_STD
    vectors = F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1)
    check(encoder([{"video": frames}])[0], F.normalize(vectors.mean(0), dim=-1), 1e-5)
    check(encoder([{"image": frames[0]}])[0], vectors[0], 1e-5)

    # A text and a medium: the sum of the projected vectors.
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    text = torch.tensor([tokenizer("the red ball")["input_ids"]])
    said = clip.get_text_features(text).pooler_output[0]
    both = encoder([{"text": "the red ball", "video": frames}], "Find it.")[0]
    check(both, F.normalize(said + vectors.mean(0), dim=-1), 1e-5)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    check(bl.compose([a, b], "unit sum"), F.normalize(torch.tensor([0.6, 1.8]), dim=-1), 1e-6)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("CLIP4Clip", 151.3),
        ("ViCLIP", 427.6),
        ("VideoCLIP-XL", 427.8),
        pytest.param("LanguageBind", 1196.4, marks=pytest.mark.slow),
    ],
)
def test_real_sizes_have_the_parameters_of_the_released_files(name, millions):
    """By files' sizes in float32: ViCLIP and VideoCLIP-XL 1.71 GB, LanguageBind 4.79 GB. OpenAI's
    ViT-B/32 has 151.3M. VideoCLIP-XL's file holds a second table of text positions."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    text = {"hidden_size": 768, "num_hidden_layers": 12}
    dim = 768
    if name == "CLIP4Clip":
        vision = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32}
        text = {"hidden_size": 512, "num_hidden_layers": 12}
        dim = 512
    if name == "LanguageBind":
        vision = {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14}
        text = {"hidden_size": 1024, "num_hidden_layers": 24}
        dim = 1024
    row = bl.BASELINES[name]
    for tower, heads in zip((vision, text), row.settings["heads"], strict=True):
        tower["intermediate_size"] = 4 * tower["hidden_size"]
        tower["num_attention_heads"] = heads
        assert tower["hidden_size"] % heads == 0
    text["max_position_embeddings"] = row.settings["text_tokens"]
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=dim)
    with torch.device("meta"):
        clip = bl.build_clip(config, row)
    assert sum(p.numel() for p in clip.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


# Frames


def odd_frames():
    """Three frames each of odd sizes, wide, high and smaller than the tower's."""
    rng = np.random.default_rng(4)
    for height, width in ((331, 517), (405, 299), (131, 97)):
        rows = [moving_square(3, height, width, seed=height)]
        rows.append(rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8))
        yield from rows


def pixels_of(name, frames):
    dual = bl.Dual(
        bl.BASELINES[name],
        nn.Linear(1, 1),
        None,
        224,
        None,
        None,
        fingerprint="",
        dim=1,
        parameters=0,
        protocol={},
    )
    return bl.normalise_colours(dual, dual.prepare(frames)[None])[0]


def linear(x):
    return (1 - np.abs(x)).clip(0)


def cubic(x, a=-0.75):
    """Keys' kernel with the constant of PyTorch and OpenCV."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resize(frames, size, kernel):
    """Resize frames (F, H, W, 3) by definition: half-pixel centres, edges repeated, rounded."""
    for axis in (1, 2):
        n = frames.shape[axis]
        at = (np.arange(size) + 0.5) * n / size - 0.5
        total = 0
        for tap in (-1, 0, 1, 2):
            source = np.floor(at) + tap
            weights = kernel(at - source)
            weights = weights[:, None, None] if axis == 1 else weights[:, None]
            taken = np.take(frames, source.clip(0, n - 1).astype(int), axis)
            total = total + weights * taken
        frames = total
    pixels = torch.tensor(frames.clip(0, 255).round())
    return pixels.movedim(-1, 1).float() / 255


def reference_pixels(name, frames):
    """Frames by each model's own rule, computed with other tools -> (F, 3, 224, 224)."""
    tensors = torch.from_numpy(frames).movedim(-1, 1)
    if name == "CLIP4Clip":
        chain = v2.Compose([v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        images = [np.asarray(chain(Image.fromarray(frame))) for frame in frames]
        pixels = torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255
        return (pixels - CLIP_MEAN) / CLIP_STD, CLIP_STD
    if name == "LanguageBind":
        pixels = (tensors / 255 - CLIP_MEAN) / CLIP_STD
        height, width = frames.shape[1:3]
        scale = 224 / min(height, width)
        shape = (max(224, int(height * scale)), max(224, int(width * scale)))
        pixels = F.interpolate(pixels, shape, mode="bilinear", align_corners=False)
        return v2.CenterCrop(224)(pixels), CLIP_STD
    kernel = cubic if name.startswith("InternVideo2") else linear
    pixels = resize(frames, 224, kernel)
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD, IMAGENET_STD


@pytest.mark.parametrize("name", ["CLIP4Clip", "ViCLIP", "LanguageBind", "InternVideo2-1B"])
def test_frames_are_prepared_by_each_models_own_rule(name):
    for frames in odd_frames():
        pixels = pixels_of(name, frames)
        expected, std = reference_pixels(name, frames)
        difference = ((pixels - expected) * std).abs()  # of colours from 0 to 1
        assert difference.max() <= 1 / 255 + 1e-5, (name, frames.shape, difference.max() * 255)


# Texts


def plain_bpe(word, merges):
    """Byte pairs of a word, the highest merge first -> its pieces."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in (merge.split() for merge in merges):
        i = 0
        while i < len(pieces) - 1:
            if pieces[i] == left and pieces[i + 1] == right:
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


def test_openai_vocabulary_gives_the_ids_of_plain_byte_pairs(tmp_path):
    merges, content = clip_vocabulary()
    tokenizer = bl.read_openai_vocabulary(write_bytes(tmp_path / "v.gz", content))
    # GPT-2's letters of bytes: printable ones in order, then those that have no own letter.
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    id_of = {}
    for i, byte in enumerate(order):
        letter = chr(byte) if i < 188 else chr(256 + i - 188)
        id_of[letter] = i
        id_of[letter + "</w>"] = 256 + i
    for i, merge in enumerate(merges):
        id_of[merge.replace(" ", "")] = 512 + i

    expected = [521]
    for word in ("the", "red", "ball", "'s", "cafÃ©", "4", "2", ",", "an", "!?"):
        expected += [id_of[piece] for piece in plain_bpe(word, merges)]
    assert tokenizer("The  red ball's\ncafé 42, AN !?")["input_ids"] == [*expected, 522]


def test_texts_are_cut_as_upstream_does_and_counted(tmp_path):
    for name, limit in (("CLIP4Clip", 77), ("ViCLIP", 32), ("VideoCLIP-XL", 248)):
        write_folder(name, tmp_path / name)
        dual = bl.load_clip(bl.BASELINES[name], str(tmp_path / name), "cpu")
        ids, mask = bl.tokenize(dual, ["a" + " red" * 300, "red", "red " * (limit - 2)])
        assert ids.shape == (3, limit) and mask.sum(1).tolist() == [limit, 3, limit]
        assert ids[0, 0] == 521 and ids[0, -1] == 522 == ids[1, 2]
        assert dual.protocol["texts_cut"] == 1
    assert bl.tokenize(dual, ["&amp;lt;"])[0].tolist() == bl.tokenize(dual, ["<"])[0].tolist()

    write_folder("InternVideo2-1B", tmp_path / "iv")
    row = bl.BASELINES["InternVideo2-1B"]
    dual = bl.load_internvideo2(row, str(tmp_path / "iv"), "cpu")
    long = "a, red-ball/ball! " * 30
    judge = BertTokenizer(str(tmp_path / "iv" / "vocab.txt"))
    clean = " ".join(["a red ball ball"] * 30)
    expected = judge(clean, truncation=True, max_length=40)["input_ids"]
    ids, _ = bl.tokenize(dual, [long, "a"])
    assert ids[0].tolist() == expected and len(expected) == 40
    assert dual.protocol["texts_cut"] == 1


# Files


def save(name, folder, state):
    file = bl.BASELINES[name].weights
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["ViCLIP", slow("VideoCLIP-XL"), slow("LanguageBind"), slow("InternVideo2-1B")]
)
def test_a_missing_renamed_or_extra_tensor_is_named(name, tmp_path):
    state = write_folder(name, tmp_path)
    layer = {"LanguageBind": "vision_model.encoder.layers.1.layer_norm2.bias"}
    layer |= {"ViCLIP": "text_encoder.transformer.resblocks.0.attn.in_proj_bias"}
    layer |= {"VideoCLIP-XL": "vision_model.vision_encoder.transformer.resblocks.1.ln_2.bias"}
    layer |= {"InternVideo2-1B": "text_encoder.bert.encoder.layer.18.output.dense.bias"}
    victim = layer[name]
    path = str(tmp_path)

    def load():
        bl.make_encoder(bl.BASELINES[name], path, "cpu")

    load()
    tensor = state.pop(victim)
    save(name, tmp_path, state)
    with pytest.raises(ValueError, match=rf"{name}: .*1 missing: {re.escape(victim)}$"):
        load()
    save(name, tmp_path, state | {victim + "x": tensor})
    expected = f"1 missing: {re.escape(victim)}; 1 unexpected: {re.escape(victim)}x"
    with pytest.raises(ValueError, match=expected):
        load()
    save(name, tmp_path, state | {victim: tensor, "adapter": torch.ones(2)})
    with pytest.raises(ValueError, match="1 unexpected: adapter"):
        load()
    save(name, tmp_path, state | {victim: tensor[1:]})
    with pytest.raises(ValueError, match=rf"of another shape: {re.escape(victim)} \(expected"):
        load()


def test_a_folder_of_another_family_an_unsafe_pickle_and_no_folder_are_refused(tmp_path):
    write_folder("ViCLIP", tmp_path / "v")
    write_folder("InternVideo2-1B", tmp_path / "i")
    shutil.copy(tmp_path / "v" / "model.safetensors", tmp_path / "i")
    with pytest.raises(ValueError, match="expected a tensor vision_encoder.patch_embed.proj.weigh"):
        bl.make_encoder(bl.BASELINES["InternVideo2-1B"], str(tmp_path / "i"))
    with pytest.raises(
        ValueError, match="expected a tensor vision_model.embeddings.patch.* found .*enc"
    ):
        bl.make_encoder(bl.BASELINES["LanguageBind"], str(tmp_path / "v"))

    file = write_bytes(tmp_path / "VideoCLIP-XL.bin", pickle.dumps({"a": Path("b")}))
    with pytest.raises(ValueError, match="VideoCLIP-XL.bin is no file of tensors"):
        bl.make_encoder(bl.BASELINES["VideoCLIP-XL"], str(file.parent))
    with pytest.raises(ValueError, match="i has no pytorch_model.bin, or the hub is out"):
        shutil.move(tmp_path / "i" / "model.safetensors", tmp_path / "moved")
        bl.make_encoder(bl.BASELINES["CLIP4Clip"], str(tmp_path / "i"))
    with pytest.raises(ValueError, match="gone is neither a folder nor a hub id"):
        bl.make_encoder(bl.BASELINES["CLIP4Clip"], str(tmp_path / "v" / "gone"))


def test_the_hub_not_giving_weights_says_so_once(monkeypatch):
    def refuse(path, name):
        raise OSError(f"You are trying to access a gated repo {path}.\nMake sure to have access")

    monkeypatch.setattr(bl, "checkpoint_file", refuse)
    expected = r"ViCLIP: \S+ cannot be read: .*gated repo.*BASELINE=FOLDER"
    with pytest.raises(ValueError, match=expected) as caught:
        bl.make_encoder(bl.BASELINES["ViCLIP"])
    assert "\n" not in str(caught.value)


def test_the_registry_holds_the_fourteen_and_an_unknown_name_lists_them():
    models = json.loads((REPO / "published.json").read_text())["models"]
    assert set(bl.BASELINES) == {name for name in models if not name.startswith("GVE")}
    with pytest.raises(ValueError, match="no baseline 'CLIP'; accepted: CLIP4Clip, .*UniME-7B"):
        bl.__getattr__("CLIP")
    for row in bl.ROWS:
        json.dumps(row.settings)


# eval.py


def test_an_encoder_takes_paths_or_prepared_arrays(tmp_path, media, monkeypatch, capsys):
    for name in ("InternVideo2-6B", "LanguageBind"):
        write_folder(name, tmp_path / name)
        monkeypatch.setenv("BASELINE", str(tmp_path / name))
        encoder = getattr(bl, name)
        video, image = str(media / "a.mp4"), str(media / "i.png")
        frames = encoder.prepare(load_video(video, encoder.frames)[0])
        picture = encoder.prepare(load_image(image)[None])
        assert frames.shape == (8, 28, 28, 3)
        paths = [
            {"video": {"path": video, "start": 0, "end": 2}, "text": "red"},
            {"video": str(media / "gone.mp4"), "text": "lost"},
            {"image": image},
            {"text": "the ball"},
        ]
        arrays = [{"video": frames, "text": "red"}, {"image": picture}, {"text": "the ball"}]
        vectors = encoder(paths, "Find it.")
        assert vectors.isnan().all(1).tolist() == [False, True, False, False]
        assert "gone.mp4" in capsys.readouterr().out
        check(vectors[[0, 2, 3]], encoder(arrays), 1e-6)
        check(vectors[[0, 2, 3]].norm(dim=-1), torch.ones(3), 1e-5)

        assert encoder.published == encoder.protocol["baseline"] == name
        assert encoder.protocol["composed"] == "sum" and encoder.protocol["frames"] == 8
        assert encoder.model.protocol["texts_cut"] == 0
        with pytest.raises(ValueError, match="expected 8 frames, got 1"):
            encoder([{"video": frames[:1]}])
    encoder([{"text": "red " * 90}])
    assert encoder.model.protocol["texts_cut"] == 1 and "texts_cut" not in encoder.protocol

    # The fingerprint is one of weights and settings.
    row = with_settings("LanguageBind", composed="unit sum")
    other = bl.make_encoder(row, str(tmp_path / "LanguageBind"))
    assert other.fingerprint != encoder.fingerprint
    state = write_folder("LanguageBind", tmp_path / "other")
    expected = sum(v.numel() for name, v in state.items() if "position_ids" not in name)
    assert encoder.parameters == expected - 1  # logit_scale


@pytest.fixture
def interpreter(monkeypatch):
    """Put back what --encoder changes: its file stands in for the program that runs."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    before = {name: sys.modules.get(name) for name in ("__main__", "__mp_main__")}
    yield
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module


def test_eval_scores_a_baseline_by_its_name(tmp_path, media, monkeypatch, interpreter, capsys):
    corpus = [{"id": name, "video": f"{name}.mp4"} for name in "abcd"]
    queries = [{"id": "q0", "text": "red " * 90}, {"id": "q1", "text": "the ball"}]
    queries.append({"id": "q2", "text": "an", "image": str(media / "i.png")})
    instances = [{"qid": f"q{i}", "pos": ["abcd"[i]]} for i in range(3)]
    files = {"corpus": corpus, "queries": queries, "instances": instances}
    folder = tmp_path / "uvrb" / "MSRVTT" / "jsonl"
    folder.mkdir(parents=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"MSRVTT": {"queries": 3, "corpus": 4}}
    (tmp_path / "uvrb" / "benchmark.json").write_text(
        json.dumps({"name": "tiny-UVRB", "datasets": sizes})
    )
    state = write_folder("CLIP4Clip", tmp_path / "weights")
    monkeypatch.setenv("BASELINE", str(tmp_path / "weights"))
    spec = f"{REPO / 'extras' / 'baselines.py'}:CLIP4Clip"
    args = ["--encoder", spec, "--uvrb", tmp_path / "uvrb", "--root", media]
    ev.main(parse_flags(ev.Flags, [str(a) for a in [*args, "--out", tmp_path / "out"]]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["datasets"]["MSRVTT"]
    assert results["model"].endswith("CLIP4Clip") and entry["complete"] and entry["n"] == 3

    # The judge: the same vectors, every item alone.
    encoder = bl.make_encoder(bl.BASELINES["CLIP4Clip"], str(tmp_path / "weights"), "cpu")
    videos = torch.cat([encoder([{"video": str(media / row["video"])}]) for row in corpus])
    items = [{key: row[key] for key in ("text", "image") if key in row} for row in queries]
    ranked = torch.cat([encoder([item]) for item in items]) @ videos.T
    hits = (ranked.argmax(1) == torch.arange(3)).float()
    assert entry["R@1"] == pytest.approx(hits.mean().item())
    assert encoder.parameters == sum(tensor.numel() for tensor in state.values()) - 1
    with pytest.raises(ValueError, match="no baseline 'CLIP5'; accepted: CLIP4Clip, "):
        args[1] = spec.replace("4Clip", "5")
        ev.main(parse_flags(ev.Flags, [str(a) for a in args]))


def run_eval(*args, cwd, weights):
    return subprocess.run(
        [sys.executable, str(REPO / "eval.py"), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"BASELINE": str(weights)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DUALS)
def test_each_scores_mini_uvrb_near_chance(name, tmp_path):
    uvrb = REPO / "runs" / "mini" / "uvrb"
    if not uvrb.is_dir():
        pytest.skip("needs the mini world: python -m mini render")
    write_folder(name, tmp_path / "weights")
    spec = f"{REPO / 'extras' / 'baselines.py'}:{name}"
    what = ("--encoder", spec, "--uvrb", uvrb, "--out", tmp_path / "out")
    done = run_eval(*what, cwd=tmp_path, weights=tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert "Table 1" in done.stdout and "Table 2" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["datasets"]) == 16
    scores = []
    chances = []
    for entry in results["datasets"].values():
        assert entry["n"] == entry["expected"] and entry["complete"]
        assert np.isfinite(entry["score"])
        scores.append(entry["score"])
        chances.append(entry["chance"])
    # Random towers see colours, hence a little above chance.
    assert np.mean(scores) < np.mean(chances) + 0.1
    print(name, np.mean(scores), np.mean(chances))
