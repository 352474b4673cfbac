"""Qwen2-VL and Qwen3-VL as backbones, beside transformers' own models and processors."""

import json
import shutil
from pathlib import Path

import decord
import pytest
import torch
from conftest import QWEN_TEMPLATE, SPECIAL, byte_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_flops import counted_by_torch
from test_memory import count_of, count_step
from test_model import INDICES, assert_close, embed_with_store, items_of, positions_by_hand
from test_train import ROOT, assert_same_weights, events, flags_for, go, launch, run
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data import Collator
from memory import BatchShape
from model import GVE
from support.cache import FeatureStore
from support.files import load_jsonl
from support.flops import step_flops

FAMILIES = ["qwen2_vl", "qwen3_vl"]
GENERATION = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
PLAIN = {"qwen2_vl": Qwen2VLModel, "qwen3_vl": Qwen3VLModel}
PROCESSOR = {"qwen2_vl": Qwen2VLProcessor, "qwen3_vl": Qwen3VLProcessor}
SIDE = {"qwen2_vl": 28, "qwen3_vl": 32}  # pixels of a vision token
# Qwen3-VL's processor writes a video's vision blocks in place of its token alone.
TEMPLATE = {
    "qwen2_vl": QWEN_TEMPLATE,
    "qwen3_vl": QWEN_TEMPLATE.replace(
        "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"
    ),
}


def make_config(family, tokenizer):
    """A tiny config: language model 64 wide with three layers, tower 32 wide with three."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )
    tokens = dict(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    if family == "qwen2_vl":
        # Its config calls the tower's width embed_dim, and the language model's hidden_size.
        vision = dict(depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2)
        return Qwen2VLConfig(vision_config=vision, text_config=text, **tokens)

    text["head_dim"] = 24  # not hidden_size / heads, as in the real 2B and 4B
    text["rope_parameters"] |= {"mrope_section": [4, 4, 4], "mrope_interleaved": True}
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    return Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **tokens)


def write_backbone(folder, family):
    """Save a random tiny model of a family with a byte tokenizer, as transformers saves it."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    full = GENERATION[family](make_config(family, tokenizer))
    with torch.no_grad():
        for p in full.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    full.save_pretrained(folder)

    if family == "qwen2_vl":
        images = Qwen2VLImageProcessor()
        videos = Qwen2VLVideoProcessor()
        assert list(images.image_mean) == list(OPENAI_CLIP_MEAN)
        assert list(images.image_std) == list(OPENAI_CLIP_STD)
    else:
        half = [0.5, 0.5, 0.5]
        images = Qwen2VLImageProcessor(patch_size=16, image_mean=half, image_std=half)
        videos = Qwen3VLVideoProcessor()
    processor = PROCESSOR[family](images, tokenizer, videos, chat_template=TEMPLATE[family])
    processor.save_pretrained(folder)
    Path(folder, "gve.json").write_text('{"min_tokens": 4}')
    return folder


def slow(value):
    """A parameter of a test that runs with -m slow."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: str(write_backbone(tmp_path_factory.mktemp(family), family)) for family in FAMILIES
    }


@pytest.fixture(scope="module")
def models(folders):
    return {family: GVE.from_pretrained(folders[family]) for family in FAMILIES}


def make_lora(folder):
    """A model whose LoRA has an effect: B starts at zero, so it is drawn."""
    gve = GVE.from_pretrained(folder, lora=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in gve.lora_parameters().items():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return gve


def by_transformers(folder, family, items, instruction, padding_side):
    """Make a batch with the family's processor and a chat template alone."""
    processor = PROCESSOR[family].from_pretrained(folder, padding_side=padding_side)
    texts = []
    images = []
    videos = []
    metadata = []
    for item in items:
        content = []
        if "video" in item:
            is_window = isinstance(item["video"], dict)
            path = item["video"]["path"] if is_window else item["video"]
            indices, duration = INDICES[Path(path).name]
            frames = decord.VideoReader(path).get_batch(indices).asnumpy()
            videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
            n = max(indices) - min(indices) + 1
            # A window is timed from its own first frame, as if it were cut out.
            metadata.append(
                {
                    "fps": n / duration,
                    "total_num_frames": n,
                    "frames_indices": [i - indices[0] for i in indices],
                }
            )
            content.append({"type": "video"})
        if "image" in item:
            images.append(Image.open(item["image"]).convert("RGB"))
            content.append({"type": "image"})
        if "text" in item:
            content.append({"type": "text", "text": item["text"]})
        messages = [{"role": "system", "content": instruction}] if instruction else []
        messages.append({"role": "user", "content": content})
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        texts.append(text + "<|endoftext|>")

    pixels = SIDE[family] ** 2
    # Qwen3-VL's limits are those of all eight frames together.
    counted = 8 if family == "qwen3_vl" else 1
    options = {
        "images_kwargs": {"size": {"shortest_edge": 4 * pixels, "longest_edge": 256 * pixels}}
    }
    if videos:
        limits = {"shortest_edge": 4 * pixels * counted, "longest_edge": 200 * pixels * counted}
        options["videos_kwargs"] = {
            "size": limits,
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "video_metadata": metadata,
        }
    batch = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        return_tensors="pt",
        **options,
    )
    return dict(batch)


# Inputs, positions and vectors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["mixed", *[slow(kind) for kind in ("text", "image", "video")]])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_vectors_equal_transformers(models, folders, media, family, kind, side):
    gve = models[family]
    items = items_of(media)[kind]
    instruction = "Find the video." if side == "left" else None
    theirs = by_transformers(folders[family], family, items, instruction, side)
    ours = gve.collator(padding_side=side)(items, instruction)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key

    core = PLAIN[family].from_pretrained(folders[family]).eval()
    positions = None  # transformers' own
    if family == "qwen2_vl":
        # From 4.52 on, text may begin inside a video's time range; see the test of positions.
        positions = gve.position_ids(ours)
    with torch.no_grad():
        hidden = core(**theirs, position_ids=positions).last_hidden_state
        vectors = gve(ours)
    expected = []
    for row, mask in zip(hidden, theirs["attention_mask"], strict=True):
        expected.append(row[mask.nonzero()[-1, 0]])
    expected = torch.stack(expected)
    assert_close(vectors, expected / expected.norm(dim=-1, keepdim=True), 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_qwen2_positions_follow_the_written_rule_and_transformers(models, media, side):
    gve = models["qwen2_vl"]
    items = items_of(media)["mixed"] + items_of(media)["video"]
    batch = gve.collator(padding_side=side)(items)
    grids = batch["video_grid_thw"].tolist()
    expected = positions_by_hand(
        batch["mm_token_type_ids"],
        batch["attention_mask"],
        batch["image_grid_thw"].tolist(),
        grids,
        [1.0] * len(grids),  # whatever a video's seconds: its temporal grids count by one
        1,
    )
    assert torch.equal(gve.position_ids(batch), expected)

    # Four temporal grids of 3 x 6 tokens: here transformers' versions agree.
    wide = [{"video": str(media / "wide.mp4"), "text": "moving"}, {"image": str(media / "i.png")}]
    batch = gve.collator(padding_side=side)(wide)
    theirs, _ = gve.core.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        batch["image_grid_thw"],
        batch["video_grid_thw"],
        batch["attention_mask"],
    )
    assert torch.equal(gve.position_ids(batch), theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_qwen3_positions_equal_transformers(models, media, side):
    gve = models["qwen3_vl"]
    items = items_of(media)["mixed"] + items_of(media)["video"]
    batch = gve.collator(padding_side=side)(items)
    theirs, _ = gve.core.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        batch["image_grid_thw"],
        batch["video_grid_thw"],
        batch["attention_mask"],
    )
    assert torch.equal(gve.position_ids(batch), theirs)


def test_qwen3_writes_the_time_of_each_temporal_grid_before_its_block(models, media):
    gve = models["qwen3_vl"]
    # b.mp4 has 8 frames a second; these are its frames 4 to 11, timed from the first of them.
    item = {"video": {"path": str(media / "b.mp4"), "start": 0.5, "end": 1.5}, "text": "x"}
    ids = gve.collator().prepare(item)["ids"]
    prompt = gve.processor.tokenizer.decode(ids)
    pads = "<|video_pad|>" * (ids.count(gve.core.config.video_token_id) // 4)
    expected = "<|im_start|>user\n"
    for time in ("0.1", "0.3", "0.6", "0.8"):  # the means of 0 and 1/8, of 2/8 and 3/8, ...
        expected += f"<{time} seconds><|vision_start|>{pads}<|vision_end|>"
    assert expected + "x<|im_end|>" in prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_text_leaves_media_and_pooled_token_whole(models, media, family):
    gve = models[family]
    item = {"video": str(media / "a.mp4"), "text": "abc" * 30}
    whole = gve.collator().prepare(item)["ids"]
    cut = gve.collator(max_length=len(whole) - 40).prepare(item)["ids"]
    tail = len("<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")  # bytes, at least as many ids
    end = whole[-tail:][whole[-tail:].index(2) :]  # from <|im_end|> on
    assert cut == whole[: len(cut) - len(end)] + end
    with pytest.raises(ValueError, match="vision tokens"):
        gve.collator(max_length=60).prepare(item)


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_the_processor_s_and_the_tower_s(models, media, family):
    gve = models[family]
    batch = gve.collator()(items_of(media)["mixed"])
    assert batch["pixel_values"].shape[1] == gve.geometry.patch_values
    assert gve.geometry.token_side == gve.spec.token_side == SIDE[family]
    assert gve.geometry.window_size == 0
    assert gve.geometry.frame_layers == 3
    assert gve.geometry.tower_width == gve.core.visual.patch_embed.proj.out_channels == 32
    features = gve.encode_vision(batch)["image_features"]
    shapes = {"qwen2_vl": (64,), "qwen3_vl": (3, 64)}  # the end's and two inner layers'
    assert features[0].shape[1:] == shapes[family]
    assert gve.geometry.feature_layers == features[0][0].numel() // 64


@pytest.mark.parametrize("family", FAMILIES)
def test_limits_hold_for_each_frame(models, media, family):
    """wide.mp4 has 3 x 6 vision tokens a frame."""
    gve = models[family]
    item = {"video": str(media / "wide.mp4")}
    for limits, sides in (({"max_tokens": 8}, (2, 4)), ({"min_tokens": 32}, (4, 8))):
        collate = Collator(gve.processor, timed_grids=gve.spec.timed_grids, **limits)
        assert collate([item])["video_grid_thw"].tolist() == [[4, 2 * sides[0], 2 * sides[1]]]


# The prompt of Qwen3-VL-Embedding


def test_qwen3_vl_embedding_has_a_prompt_of_its_own(folders, media, tmp_path):
    folder = shutil.copytree(folders["qwen3_vl"], tmp_path / "Qwen3-VL-Embedding-2B")
    (folder / "gve.json").unlink()  # as on the hub
    gve = GVE.from_pretrained(folder)
    assert gve.min_tokens == 128

    head = (
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    written = {
        None: "Represent the user's input.",
        "Find the video": "Find the video.",
        "Which one? ": "Which one?",
    }
    decode = gve.processor.tokenizer.decode
    for instruction, system in written.items():
        ids = gve.collator().prepare({"text": "a red ball"}, instruction)["ids"]
        assert decode(ids) == head.format(system, "a red ball")

    # Its tokenizer may append a token to every text. Then that is the one that is pooled.
    collate = gve.collator(max_length=100)
    collate.appended = [collate.end]
    ids = collate.prepare({"text": "a" * 200})["ids"]
    assert len(ids) == 100
    assert decode(ids).endswith("a<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")


def test_a_checkpoint_s_own_style_wins_over_its_name(folders, tmp_path):
    folder = shutil.copytree(folders["qwen3_vl"], tmp_path / "my-Qwen3-VL-Embedding")
    (folder / "gve.json").write_text('{"prompt_style": "user"}')
    assert GVE.from_pretrained(folder).prompt_style == "user"


# LoRA, saving and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_lands_on_exactly_the_language_model_s_projections(folders, family):
    gve = GVE.from_pretrained(folders[family], lora=True)
    adapted = set()
    for name, module in gve.core.named_modules():
        if hasattr(module, "lora_A"):
            adapted.add(name)
    expected = set()
    for layer in range(3):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.up", "mlp.gate", "mlp.down"):
            expected.add(f"language_model.layers.{layer}.{name}_proj")
    assert adapted == expected


@pytest.mark.parametrize("merge", [slow(False), True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_gives_the_same_vectors(folders, media, tmp_path, family, merge):
    gve = make_lora(folders[family])
    items = items_of(media)["mixed"]
    before = gve.embed(items)
    gve.save_pretrained(tmp_path, merge=merge)
    assert_close(GVE.from_pretrained(tmp_path).embed(items), before, 1e-5 if merge else 0)
    if not merge:
        return

    # transformers itself reads the merged folder, and its processor with the template in it.
    full, report = GENERATION[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = PROCESSOR[family].from_pretrained(tmp_path, padding_side="right")
    image = Image.open(media / "i.png").convert("RGB")
    content = [{"type": "text", "text": "both"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        vector = full.model(**inputs).last_hidden_state[0, -1]
    ours = gve.embed([{"text": "both", "image": str(media / "i.png")}])[0]
    assert_close(ours, vector / vector.norm(), 2e-5)


def test_a_saved_qwen3_processor_writes_our_video_prompt(folders, media, tmp_path):
    gve = GVE.from_pretrained(folders["qwen3_vl"], lora=True)
    gve.save_pretrained(tmp_path)
    item = {"video": str(media / "wide.mp4"), "text": "moving"}
    ours = gve.collator()([item])

    processor = Qwen3VLProcessor.from_pretrained(tmp_path)
    indices, duration = INDICES["wide.mp4"]
    frames = decord.VideoReader(item["video"]).get_batch(indices).asnumpy()
    content = [{"type": "video"}, {"type": "text", "text": "moving"}]
    theirs = processor(
        text=[processor.apply_chat_template([{"role": "user", "content": content}])],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        videos_kwargs={
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "video_metadata": [
                {"fps": 20 / duration, "total_num_frames": 20, "frames_indices": list(indices)}
            ],
        },
        return_tensors="pt",
    )
    for key in ("input_ids", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(theirs[key], ours[key]), key


def test_old_names_of_qwen2_vl_load(models, folders, media, tmp_path):
    """Before transformers 4.52 the language model's tensors lay under "model." alone."""
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "old")
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[name] = tensor
    assert any(name.startswith("visual.blocks") for name in renamed)
    assert any(name.startswith("model.layers") for name in renamed)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    # The config, too, had no level of its own for the language model.
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    (folder / "config.json").write_text(json.dumps(text | config))
    items = items_of(media)["mixed"]
    assert torch.equal(GVE.from_pretrained(folder).embed(items), models["qwen2_vl"].embed(items))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_without_a_place_is_an_error_that_names_the_family(folders, tmp_path, family):
    folder = shutil.copytree(folders[family], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "visual.merger" in name)
    tensors[name + "x"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"do not fit Qwen{family[4]}-VL.*missing.*unexpected"):
        GVE.from_pretrained(folder)


# Features on disk, FLOPs, memory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_store_gives_the_same_vectors_and_decodes_nothing_twice(
    models, media, tmp_path, family, monkeypatch
):
    gve = models[family]
    items = items_of(media)["mixed"] + items_of(media)["video"]
    plain = gve.embed(items)
    stored = gve.collator(store=FeatureStore(tmp_path))
    embed_with_store(gve, stored, items[:2])
    assert torch.equal(embed_with_store(gve, stored, items), plain), "part from the store"

    def closed(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("data.open_clip", closed)
    monkeypatch.setattr("data.load_image", closed)
    monkeypatch.setattr(gve.core.visual, "forward", closed)
    assert torch.equal(embed_with_store(gve, stored, items), plain), "all from the store"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_costs_what_torch_counts_and_at_most_a_tenth_more(folders, media, tmp_path, family):
    # The large picture's cost is attention in the tower, for the most part.
    Image.new("RGB", (448, 448)).save(tmp_path / "large.png")
    gve = GVE.from_pretrained(folders[family], lora={"lora_dropout": 0.0}).train()
    items = [
        {"video": str(media / "wide.mp4"), "text": "x"},
        {"image": str(tmp_path / "large.png")},
    ]
    for item in items:
        batch = gve.collator()([item])
        assert 1 < step_flops(gve)(batch) / counted_by_torch(gve, batch) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["videos", "texts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("economical", [False, True])  # checkpointing and GradCache
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_within_a_twentieth_of_every_storage_that_a_step_makes(
    folders, tmp_path, family, economical, dtype, kind
):
    gve = GVE.from_pretrained(folders[family], dtype=dtype, lora={"lora_dropout": 0.0}).train()
    if economical:
        gve.core.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    items = [{"text": "a" * 150}] * 3 + [{"text": "a" * 151}]
    if kind == "videos":
        for i in range(8):
            Image.new("RGB", (224, 224)).save(tmp_path / f"{i}.png")
        items = [{"video": str(tmp_path)}] * 3 + [{"video": str(tmp_path), "text": "ab"}]
    batch = gve.collator()(items)
    patches = len(batch.get("pixel_values_videos", []))
    moments = count_of(gve, economical, economical).micro_batch(
        BatchShape(4, batch["input_ids"].shape[1], patches)
    )
    for moment, counted in count_step(gve, batch, economical).items():
        predicted = sum(moments[moment].values())
        assert predicted == pytest.approx(counted, rel=0.05), moment


# Training


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(folders, mixture, tmp_path, family):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    more = "--steps 6 --schedule uniform --save-every 2 --lr 0.01 --keep 9"
    go(*flags_for(folders[family], mixture, whole, more))

    # As if it had been killed after its second step.
    shutil.copytree(whole, parts)
    (parts / "adapter_model.safetensors").unlink()
    for state in ("step-00000004", "step-00000006"):
        shutil.rmtree(parts / "state" / state)
    go(*flags_for(folders[family], mixture, parts, more, "--resume auto"))
    assert_same_weights(parts, whole)
    assert len(events(load_jsonl(parts / "log.jsonl"), "resume")) == 1
    vectors = GVE.from_pretrained(parts).embed([{"text": "a red ball"}])
    before = GVE.from_pretrained(folders[family]).embed([{"text": "a red ball"}])
    assert (vectors - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_grad_cache_features_and_two_ranks_equal_one_plain_process(
    folders, mixture, tmp_path, family
):
    common = "--steps 5 --schedule uniform --dropout 0 --lr 0.01"
    plain = tmp_path / "plain"
    go(*flags_for(folders[family], mixture, plain, common, "--features ''"))

    shared = tmp_path / "shared"
    features = f"--features {tmp_path / 'features'}"
    flags = flags_for(folders[family], mixture, shared, common, "--grad-cache", features)
    done = run(*launch(2), ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "features").rglob("*.safetensors"))
    ours = load_file(shared / "adapter_model.safetensors")
    for name, tensor in load_file(plain / "adapter_model.safetensors").items():
        assert_close(ours[name], tensor, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dry_run_takes_each_backbone(folders, mixture, tmp_path, family, capsys):
    go(*flags_for(folders[family], mixture, tmp_path / "out", "--dry-run"))
    said = capsys.readouterr().out
    assert "GiB at peak" in said
