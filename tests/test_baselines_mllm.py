"""extras/baselines_mllm.py against upstream's values (golden/), transformers and PEFT."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SPECIAL, byte_tokenizer, moving_square
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
)
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

from extras import baselines_mllm as mllm
from model import BACKBONES, GVE, load_backbone

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
SIDE = 56  # pixels along the side of a tile of the tiny LLaVAs, 4 x 4 patches
GRID = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
QWEN2VL = ("GME-2B", "GME-7B", "Unite-2B", "Unite-7B", "VLM2Vec-V2", "B3-7B")
VIDEO = moving_square(8, 70, 90, seed=1)
IMAGE = moving_square(1, 61, 47, seed=2)[0]
ITEMS = [
    {"text": "a red ball"},
    {"image": IMAGE},
    {"video": VIDEO},
    {"text": "now in blue", "image": IMAGE},
    {"text": "and then?", "video": VIDEO},
    {"text": "another, rather longer text"},
]


def equal(a, b, tolerance=2e-5):
    difference = (a - b).abs()
    assert difference.max() <= tolerance, f"max {difference.max()}, mean {difference.mean()}"


# Tiny random folders in the layout that the released ones have


def save_random(network, folder, rename=None):
    """Save a network with weights large enough that inputs show, under a released one's names."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    network.save_pretrained(folder)
    if rename:
        file = folder / "model.safetensors"
        renamed = {re.sub(*rename, key): value for key, value in load_file(file).items()}
        save_file(renamed, file, {"format": "pt"})
    return folder


TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=0,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_hidden_layers=2,
    image_size=SIDE,
    patch_size=14,
)
# transformers 5.17 saves a tower without the level that released folders have.
TOWER_LEVEL = (r"^vision_tower\.", "vision_tower.vision_model.")


@pytest.fixture(scope="session")
def qwen2vl_folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen2VLConfig(
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2),
        text_config=TEXT
        | dict(
            vocab_size=len(tokenizer),
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    folder = tmp_path_factory.mktemp("qwen2vl")
    save_random(Qwen2VLForConditionalGeneration(config), folder)
    names = set(load_file(folder / "model.safetensors"))
    assert {"model.layers.0.mlp.up_proj.weight", "visual.blocks.0.attn.qkv.weight"} <= names
    tokenizer.save_pretrained(folder)
    # The one file that released folders have for images and videos.
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def llava_tokenizer():
    tokenizer = byte_tokenizer()
    added = ["<s>", "<image>", "<video>", "<instruct>", "<query>"]
    tokenizer.add_special_tokens({"additional_special_tokens": added, "bos_token": "<s>"})
    return tokenizer


@pytest.fixture(scope="session")
def llava_next_folder(tmp_path_factory):
    torch.manual_seed(1)
    tokenizer = llava_tokenizer()
    config = LlavaNextConfig(
        vision_config=VISION | dict(model_type="clip_vision_model", projection_dim=32),
        text_config=TEXT | dict(model_type="mistral", vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=GRID[1:],
    )
    folder = tmp_path_factory.mktemp("llava_next")
    save_random(LlavaNextForConditionalGeneration(config), folder, TOWER_LEVEL)
    tokenizer.save_pretrained(folder)
    LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=GRID[1:],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_onevision_folder(tmp_path_factory):
    torch.manual_seed(2)
    tokenizer = llava_tokenizer()
    config = LlavaOnevisionConfig(
        vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
        text_config=TEXT | dict(model_type="qwen2", vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
    )
    folder = tmp_path_factory.mktemp("llava_onevision")
    save_random(LlavaOnevisionForConditionalGeneration(config), folder, TOWER_LEVEL)
    tokenizer.save_pretrained(folder)
    LlavaOnevisionImageProcessor(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=GRID,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(qwen2vl_folder, llava_next_folder, llava_onevision_folder):
    """Each of the eight names over the tiny folder of its family -> {name: Mllm}."""
    loaded = {}
    qwen2vl = mllm.load_qwen2vl(mllm.MLLMS["GME-2B"], qwen2vl_folder, "cpu")
    for name in QWEN2VL:
        # The tiny models see a few tokens a frame, so that the tests take seconds.
        row = dataclasses.replace(mllm.MLLMS[name], frame_tokens=12)
        loaded[name] = dataclasses.replace(qwen2vl, row=row)
    row = dataclasses.replace(mllm.MLLMS["BGE-VL"], image_side=2 * SIDE)
    loaded["BGE-VL"] = mllm.load_llava(row, llava_next_folder, "cpu")
    loaded["UniME-7B"] = mllm.load_llava(mllm.MLLMS["UniME-7B"], llava_onevision_folder, "cpu")
    return loaded


def embed(model, items, instruction=None):
    if isinstance(model.network, GVE):
        return mllm.embed_qwen2vl(model, items, instruction)
    return mllm.embed_llava(model, items, instruction)


# Upstream's values


def test_qwen2vl_equals_the_upstream_modules():
    golden = load_file(GOLDEN / "qwen2vl.safetensors")
    spec = BACKBONES["qwen2_vl"]
    backbone = load_backbone(str(GOLDEN / "qwen2vl"), spec, torch.float32)
    gve = GVE(backbone, None, spec, positions="1d").eval()
    for ids, mask, expected in (("ids", "mask", "unite"), ("ids2", "mask2", "vlm2vec")):
        for flip in (False, True):  # padded on the right, then on the left
            columns = torch.arange(golden[ids].shape[1]).expand_as(golden[ids])
            if flip:
                columns = golden[mask].sort(dim=1, stable=True).indices
            batch = {
                "input_ids": golden[ids].gather(1, columns),
                "attention_mask": golden[mask].gather(1, columns),
                "pixel_values_videos": golden["pixels"],
                "video_grid_thw": golden["grid"],
            }
            with torch.no_grad():
                equal(gve(batch), golden[expected])


def golden_llava():
    """The LLaVA-NeXT of golden/ as an Mllm, whose tokenizer knows <image> alone."""
    network = mllm.load_strictly(
        LlavaNextForConditionalGeneration, str(GOLDEN / "llava_next"), torch.float32
    )

    class Tokenizer:
        def convert_tokens_to_ids(self, tokens):
            return [80 for _ in tokens]

    return mllm.Mllm(
        row=mllm.MLLMS["BGE-VL"],
        network=network.eval(),
        tokenizer=Tokenizer(),
        image_processor=None,
        video_processor=None,
        placeholders={"image": "<image>"},
        start=[],
        frame_side=28,
        dim=32,
        fingerprint="",
        parameters=0,
        protocol={},
    )


@torch.no_grad()
def test_llava_next_equals_the_upstream_module():
    golden = load_file(GOLDEN / "llava.safetensors")
    model = golden_llava()
    core = model.network.model
    features = core.get_image_features(golden["pixels"], golden["sizes"]).pooler_output

    ids = golden["ids"][0].tolist()
    samples = [
        {"ids": ids, "features": list(features)},
        {"ids": ids[:2], "features": []},  # padded
    ]
    vectors = mllm.forward_llava(model, samples)
    equal(vectors[0], F.normalize(golden["h"][0, -1], dim=0))
    equal(vectors[1], F.normalize(golden["h"][0, 1], dim=0))  # causal: as in the longer row

    tiles = mllm.encode_tiles(core, golden["pixels"][0, :1], 0)
    equal(tiles[0], features[0][:4])  # the base tile


@torch.no_grad()
def test_frames_of_llava_next_are_pooled_as_in_llava_next_video(models):
    core = models["BGE-VL"].network.model
    pixels = torch.randn(3, 3, SIDE, SIDE)
    pooled = mllm.encode_tiles(core, pixels, 2)
    assert pooled.shape == (3, 4, 32)

    config = LlavaNextVideoConfig(
        vision_config=core.config.vision_config,
        spatial_pool_mode="average",
        spatial_pool_stride=2,
    )
    states = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    equal(pooled, core.multi_modal_projector(LlavaNextVideoPooler(config)(states)))


def hugging_face_vector(network, inputs):
    """The last token's vector by transformers' own forward, a batch of one."""
    out = network(**inputs, output_hidden_states=True)
    return F.normalize(out.hidden_states[-1][0, -1], dim=0)


@torch.no_grad()
def test_unime_equals_transformers(models):
    model = models["UniME-7B"]
    processor = LlavaOnevisionProcessor(
        model.image_processor,
        model.tokenizer,
        LlavaOnevisionVideoProcessor(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    video = [np.asarray(Image.fromarray(f).resize((SIDE, SIDE), 3)) for f in VIDEO]
    media = [
        {},
        {"images": Image.fromarray(IMAGE).resize((SIDE, SIDE), 3)},
        {"videos": [np.stack(video)]},
        {"images": Image.fromarray(IMAGE).resize((SIDE, SIDE), 3)},
        {"videos": [np.stack(video)]},
    ]
    words = [
        "\na red ball\nSummary above sentence",
        "<image>\nSummary above image",
        "<video>\nSummary above video",
        "<image>\nnow in blue\nSummary above image and sentence",
        "<video>\nand then?\nSummary above video and sentence",
    ]
    vectors = embed(model, ITEMS, "not used")
    for i, (medium, text) in enumerate(zip(media, words, strict=True)):
        text = f"<|im_start|>user {text} in one word:\n<|im_end|><|im_start|>assistant\n"
        inputs = processor(text=text, **medium, return_tensors="pt")
        equal(vectors[i], hugging_face_vector(model.network, inputs))


@torch.no_grad()
def test_bge_vl_equals_transformers(models):
    model = models["BGE-VL"]
    processor = LlavaNextProcessor(
        model.image_processor,
        model.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image = Image.fromarray(IMAGE).resize((2 * SIDE, 2 * SIDE), 3)
    texts = [
        "<s>[INST] \n <instruct> Find it. <query>  a red ball \n [/INST]",
        "<s>[INST] \n <instruct> Find it. <query>  <image> [/INST]",
        "<s>[INST] \n <instruct> Find it. <query>  now in blue \n <image> [/INST]",
    ]
    vectors = embed(model, [ITEMS[0], ITEMS[1], ITEMS[3]], "Find it.")
    for vector, text in zip(vectors, texts, strict=True):
        medium = {"images": image} if "<image>" in text else {}
        inputs = processor(text=text, **medium, return_tensors="pt")
        equal(vector, hugging_face_vector(model.network, inputs))


@torch.no_grad()
def test_bge_vl_shows_a_video_as_eight_images(models):
    model = models["BGE-VL"]
    vector = embed(model, [ITEMS[4]], "Find it.")[0]
    # By hand: 8 placeholders of 2 x 2 tokens, a frame's pooled tile in each.
    text = "[INST] \n <instruct> Find it. <query>  and then? \n" + (" " + "<image>" * 4) * 8
    ids = model.tokenizer(f"<s>{text} [/INST]", return_tensors="pt").input_ids
    frames = [np.array(Image.fromarray(f).resize((SIDE, SIDE), 3)) for f in VIDEO]
    processor = model.image_processor
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"][:, 0]  # base tiles
    core = model.network.model
    states = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    grids = states.view(8, 2, 2, 2, 2, 32).mean((2, 4)).view(8, 4, 32)
    embeds = core.get_input_embeddings()(ids)
    embeds[ids == model.network.config.image_token_id] = core.multi_modal_projector(grids).flatten(
        0, 1
    )
    hidden = core.language_model(inputs_embeds=embeds).last_hidden_state
    equal(vector, F.normalize(hidden[0, -1], dim=0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["GME-2B", "VLM2Vec-V2"])
def test_qwen2vl_equals_transformers(models, qwen2vl_folder, name):
    model = models[name]
    network = Qwen2VLModel.from_pretrained(qwen2vl_folder).eval()
    processor = Qwen2VLProcessor.from_pretrained(qwen2vl_folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 12 * 28 * 28}
    frames = list(torch.from_numpy(VIDEO).movedim(-1, 1))
    if name == "GME-2B":
        block = "<|vision_start|><|image_pad|><|vision_end|>"
        text = (
            "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n" + block * 8 + "and then?"
            "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        )
        inputs = processor(
            text=text, images=frames, images_kwargs={"size": size}, return_tensors="pt"
        )
    else:
        options = {"size": size, "do_sample_frames": False, "cap_pixels_per_frame": False}
        text = "<|video_pad|> Find it. and then?"
        inputs = processor(
            text=text, videos=[torch.stack(frames)], videos_kwargs=options, return_tensors="pt"
        )
    places = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    hidden = network(**inputs, position_ids=places).last_hidden_state
    vector = embed(model, [ITEMS[4]], "Find it.")[0]
    equal(vector, F.normalize(hidden[0, -1], dim=0))


# Prompts, as BASELINES' readings of upstream have them


def prompt(name, text="", kind="", instruction="", n=1):
    pads = {"bge_vl": "<image>", "unime": f"<{kind}>"}
    placeholders = [pads.get(name, f"<|{kind}_pad|>")] * n if kind else []
    return mllm.PROMPTS[name](mllm.Turn(kind, placeholders, text, instruction))


def test_prompts_are_those_that_the_models_were_trained_on():
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    video = "<|vision_start|><|video_pad|><|vision_end|>"

    assert prompt("gme", "a dog") == default + "a dog" + end
    assert prompt("gme", "a dog", "image", "Find it.", n=2) == (
        "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n" + image * 2 + "a dog" + end
    )

    one_word = " in one word:" + end
    assert prompt("unite", "a dog", "", "no") == (
        default + "a dog\nSummary above sentence" + one_word
    )
    assert prompt("unite", "", "image") == default + image + "\nSummary above image" + one_word
    assert prompt("unite", "a dog", "video") == (
        default + video + "a dog\nSummary above sentence and video" + one_word
    )

    assert prompt("vlm2vec", "a dog") == "a dog"
    assert prompt("vlm2vec", "a dog", "image", "Find it.") == "<|image_pad|> Find it. a dog"
    assert prompt("vlm2vec", "", "video") == (
        "<|video_pad|> Understand the content of the provided video."
    )

    assert prompt("b3", "a dog", "", "Find it.") == "Find it. a dog"
    assert prompt("b3", "a dog", "image", "Find it.") == "<|image_pad|>\nFind it. a dog"
    assert prompt("b3", "", "video") == "<|video_pad|>\nRepresent the given video."

    assert prompt("bge_vl", "a dog", "image", "Find it.") == (
        "[INST] \n <instruct> Find it. <query>  a dog \n <image> [/INST]"
    )
    assert prompt("bge_vl", "", "image", "Find it.") == (
        "[INST] \n <instruct> Find it. <query>  <image> [/INST]"
    )
    assert prompt("bge_vl", "a dog") == "[INST]  a dog \n [/INST]"
    assert prompt("bge_vl", "", "video", n=2) == "[INST]  <image> <image> [/INST]"

    answer = " in one word:\n<|im_end|><|im_start|>assistant\n"
    assert prompt("unime", "a dog", "", "no") == (
        "<|im_start|>user \na dog\nSummary above sentence" + answer
    )
    assert prompt("unime", "", "video") == (
        "<|im_start|>user <video>\nSummary above video" + answer
    )
    assert prompt("unime", "a dog", "image") == (
        "<|im_start|>user <image>\na dog\nSummary above image and sentence" + answer
    )


def decoded(model, item, instruction, counts, kind=""):
    ids = mllm.tokenise(model, item, instruction, kind, counts)
    return model.tokenizer.decode(ids)


def test_users_write_no_special_tokens(models):
    text = "a <|im_end|> b <image> \ud83d"
    assert decoded(models["VLM2Vec-V2"], {"text": text}, "<|im_start|>", []) == (
        "< |im_start|> a < |im_end|> b <image> \ufffd"
    )
    assert decoded(models["BGE-VL"], {"text": text}, "<query>", []) == (
        "<s>[INST] \n <instruct> < query> <query>  a < |im_end|> b < image> \ufffd \n [/INST]"
    )


@pytest.mark.parametrize("name", list(mllm.MLLMS))
def test_a_long_text_loses_its_tail_and_is_counted(models, name):
    row = dataclasses.replace(models[name].row, max_length=300)
    model = dataclasses.replace(models[name], row=row, protocol={"texts_cut": 0})
    kind = "image" if name == "BGE-VL" else "video"
    counts = [20, 20] if row.video == "images" else [40]

    short = decoded(model, {"text": "abc", "video": VIDEO}, None, counts, kind)
    before, after = short.split("abc")
    assert model.protocol["texts_cut"] == 0
    long = decoded(model, {"text": "abc" * 200, "video": VIDEO}, None, counts, kind)
    assert long.startswith(before + "abcabc") and long.endswith(after)
    ids = mllm.tokenise(model, {"text": "abc" * 200}, None, kind, counts)
    assert len(ids) == 300  # bytes are tokens here
    assert model.protocol["texts_cut"] == 2

    # Vision tokens are never cut.
    with pytest.raises(ValueError, match="400 vision tokens .*8 frames per video.* exceed 300"):
        mllm.tokenise(model, {"text": "abc"}, None, kind, [400])


# Items


@pytest.mark.parametrize("name", list(mllm.MLLMS))
def test_items_of_every_kind(models, name):
    model = models[name]
    with torch.no_grad():
        vectors = embed(model, ITEMS, "Find it.")
        alone = torch.cat([embed(model, [item], "Find it.") for item in ITEMS])
    assert vectors.shape == (6, 32)
    equal(vectors.norm(dim=1), torch.ones(6), 1e-5)
    equal(vectors, alone, 1e-5)  # neither padding nor neighbours show
    similar = vectors @ vectors.T - 2 * torch.eye(6)
    assert similar.max() < 0.9999  # all of an item shows


def test_a_video_is_never_a_single_frame(models, capsys):
    for model in models.values():
        vectors = embed(model, [{"video": VIDEO[:1]}, {"text": "a"}])
        assert vectors[0].isnan().all() and vectors[1].isfinite().all()
        assert "1 frames in place of 8" in capsys.readouterr().err

    # Every frame shows in the vector of the whole.
    for name in ("GME-2B", "VLM2Vec-V2", "BGE-VL", "UniME-7B"):
        whole = embed(models[name], [{"video": VIDEO}])
        for i in range(8):
            changed = VIDEO.copy()
            changed[i] = 255 - changed[i]
            other = embed(models[name], [{"video": changed}])
            assert (whole - other).abs().max() > 1e-4, (name, i)


def test_frames_become_pixels_as_the_reference_processors_make_them(models):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 13, 17, 3), np.uint8)
    for height, width in ((61, 47), (101, 333), (271, 480)):
        large = [Image.fromarray(frame).resize((width, height), 2) for frame in coarse]
        frames = np.stack([np.asarray(frame) for frame in large])
        channels_first = torch.from_numpy(frames).movedim(-1, 1)

        model = models["UniME-7B"]
        reference = LlavaOnevisionVideoProcessor(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )([channels_first], return_tensors="pt")["pixel_values_videos"][0]
        own = mllm.normalise_frames(model.prepare(frames), model.image_processor)
        equal(own * 0.5, reference * 0.5, 1.01 / 255)

        model = models["BGE-VL"]
        processor = model.image_processor
        reference = processor(images=list(channels_first), return_tensors="pt")["pixel_values"]
        own = mllm.normalise_frames(model.prepare(frames), processor)
        std = torch.tensor(processor.image_std)[:, None, None]
        equal(own * std, reference[:, 0] * std, 1.01 / 255)

        model = models["GME-2B"]
        size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 12 * 28 * 28}
        reference = model.image_processor(
            list(channels_first), size=size, do_normalize=False, return_tensors="pt"
        )
        own = mllm.cut_patches(model, "video", model.prepare(frames))
        assert own["image_grid_thw"].tolist() == reference["image_grid_thw"].tolist()
        equal(own["pixel_values"] / 255, reference["pixel_values"], 1.01 / 255)

        for prepared in models.values():  # once more changes nothing
            small = prepared.prepare(frames)
            assert np.array_equal(prepared.prepare(small), small)


# Loading


def dora_adapter(folder, base, seed=3):
    """Let PEFT make a DoRA adapter as VLM2Vec-V2's, under the names of its time."""
    torch.manual_seed(seed)
    targets = "qkv_proj,o_proj,gate_up_proj,down_proj,k_proj,q_proj,out_proj,v_proj"
    config = LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=targets.split(","),
        use_dora=True,
        init_lora_weights="gaussian",
    )
    network = Qwen2VLModel.from_pretrained(base)
    network.name_or_path = str(base)
    adapted = get_peft_model(network, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.add_(torch.rand_like(p) * 0.2)
    adapted.save_pretrained(folder)

    file = folder / "adapter_model.safetensors"
    tensors = {
        key.replace("base_model.model.language_model.", "base_model.model.model."): value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file)
    (folder / "README.md").unlink(missing_ok=True)
    return tensors


def test_a_dora_adapter_is_merged_with_its_magnitudes(qwen2vl_folder, models, tmp_path):
    tensors = dora_adapter(tmp_path, qwen2vl_folder)
    model = mllm.load_qwen2vl(mllm.MLLMS["VLM2Vec-V2"], tmp_path, "cpu")
    merged = model.network.core.state_dict()
    base = load_file(qwen2vl_folder / "model.safetensors")

    magnitudes = [key for key in tensors if key.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 10  # q, k, v, o and down in two layers
    for key in magnitudes:
        name = key.removesuffix(".lora_magnitude_vector")
        a = tensors[f"{name}.lora_A.weight"]
        b = tensors[f"{name}.lora_B.weight"]
        module = name.removeprefix("base_model.model.")  # model.layers.0...
        weight = base[f"{module}.weight"] + 64 / 4 * b @ a
        # arXiv 2402.09353, Equation 5: the magnitude times the direction of each row.
        weight = tensors[key][:, None] * weight / weight.norm(dim=1, keepdim=True)
        equal(merged[module.replace("model.", "language_model.", 1) + ".weight"], weight, 1e-5)

    plain = models["VLM2Vec-V2"]
    model = dataclasses.replace(model, row=plain.row)
    assert (embed(model, ITEMS) - embed(plain, ITEMS)).abs().max() > 0.01
    assert model.fingerprint != plain.fingerprint
    assert model.parameters == sum(p.numel() for p in plain.network.parameters())


def test_an_adapter_tensor_without_a_place_is_named(qwen2vl_folder, tmp_path):
    tensors = dora_adapter(tmp_path, qwen2vl_folder)
    file = tmp_path / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    row = mllm.MLLMS["VLM2Vec-V2"]

    rest = {name: value for name, value in tensors.items() if name != key}
    save_file(rest, file)
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.self_attn\.q_proj\.lora_magn"):
        mllm.load_qwen2vl(row, tmp_path, "cpu")

    save_file(rest | {key.replace("q_proj", "f_proj"): tensors[key]}, file)
    with pytest.raises(ValueError, match=r"without a place .*layers\.1\.self_attn\.f_proj\.lora_m"):
        mllm.load_qwen2vl(row, tmp_path, "cpu")

    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="weights_only=True"):
        mllm.load_qwen2vl(row, tmp_path, "cpu")


@pytest.mark.parametrize("family", ["qwen2vl", "llava_next", "llava_onevision"])
def test_a_folder_that_does_not_fit_says_what_is_wrong(family, request, tmp_path):
    source = request.getfixturevalue(f"{family}_folder")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load, name = mllm.load_llava, "UniME-7B"
    if family == "qwen2vl":
        load, name = mllm.load_qwen2vl, "B3-7B"
    if family == "llava_next":
        name = "BGE-VL"
    row = mllm.MLLMS[name]
    assert load(row, tmp_path, "cpu").parameters > 10_000

    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    rest = {name: value for name, value in tensors.items() if name != key}
    save_file(rest, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.1\.mlp\.up_proj\.weight"):
        load(row, tmp_path, "cpu")
    save_file(tensors | {f"{key}s": tensors[key].clone()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected_keys.*up_proj\.weights"):
        load(row, tmp_path, "cpu")
    save_file(tensors | {key: tensors[key][:4].clone()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mismatched_keys.*up_proj\.weight"):
        load(row, tmp_path, "cpu")

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(ValueError, match="'clip'; expected .* tensors such as"):
        load(row, tmp_path, "cpu")
    with pytest.raises(ValueError, match="nobody/nothing: no config.json"):
        load(row, "nobody/nothing", "cpu")


def test_positions_and_prompts_stand_in_the_protocol(models):
    model = models["GME-2B"]
    assert model.protocol["positions"] == "1d" and model.network.positions == "1d"
    assert model.protocol["query_prompt"] == (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n<|vision_start|>{video}"
        "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    assert "frame_pool" not in model.protocol
    assert models["BGE-VL"].protocol["frame_pool"] == 2
    json.dumps(model.protocol)


def test_the_rows_name_models_of_the_paper():
    published = json.loads((ROOT / "published.json").read_text())
    for name, row in mllm.MLLMS.items():
        assert name in published["models"]
        assert row.prompt in mllm.PROMPTS
        assert row.frames == 8 and row.max_length == 8192  # section 4.1


# eval.py on the mini world's benchmark. The file stands for extras/baselines.py's registry.
ENCODER = """
import dataclasses, sys
sys.path.insert(0, {root!r})
from data import load_image, load_video
from extras import baselines_mllm as mllm
row = dataclasses.replace(mllm.MLLMS[{name!r}], **{changes!r})
model = mllm.load_{family}(row, {folder!r}, "cpu")
DECODE = {{"image": lambda image: load_image(image), "video": lambda v: load_video(v, 8)[0]}}
def encode(items, instruction):
    decoded = []
    for item in items:
        media = {{kind: DECODE[kind](item[kind]) for kind in DECODE if item.get(kind)}}
        decoded.append(item | media)
    return mllm.embed_{family}(model, decoded, instruction)
"""


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "runs/mini/uvrb").is_dir(), reason="needs `python -m mini render`")
@pytest.mark.parametrize("name", list(mllm.MLLMS))
def test_eval_scores_every_dataset(models, request, name, tmp_path):
    row = models[name].row
    folder = (
        "qwen2vl" if name in QWEN2VL else "llava_next" if name == "BGE-VL" else "llava_onevision"
    )
    changed = ("frame_tokens", "image_side")
    text = ENCODER.format(
        root=str(ROOT),
        name=name,
        changes={field: getattr(row, field) for field in changed},
        family=folder.partition("_")[0],
        folder=str(request.getfixturevalue(f"{folder}_folder")),
    )
    (tmp_path / "encoder.py").write_text(text)
    encoder = f"{tmp_path / 'encoder.py'}:encode"
    command = [sys.executable, "eval.py", "--encoder", encoder, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Table 1" in done.stdout and "Table 2" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["datasets"]) == 16
    for entry in results["datasets"].values():
        assert entry["complete"] and "note" not in entry
        assert entry["score"] <= entry["chance"] + 0.3  # random weights
