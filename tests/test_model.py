"""model.py beside transformers' own processor, chat template and model; loading and saving."""

import dataclasses
import json
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QWEN_TEMPLATE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
)

import data
import model
import train
from data import Collator
from model import GVE, fingerprint_weights, last_token_pool, mean_pool, mrope_positions
from support.cache import FeatureStore


@pytest.fixture(scope="module")
def gve(tiny):
    return GVE.from_pretrained(tiny)


@pytest.fixture(scope="module")
def lora(tiny):
    """A model whose LoRA has an effect: B starts at zero, so the fixture draws it."""
    torch.manual_seed(0)
    gve = GVE.from_pretrained(tiny, lora=True)
    with torch.no_grad():
        for name, p in gve.lora_parameters().items():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return gve


def items_of(media):
    """Items of each kind over the media fixture."""
    a, b, wide = str(media / "a.mp4"), str(media / "b.mp4"), str(media / "wide.mp4")
    image, wide_image = str(media / "i.png"), str(media / "wide.png")
    return {
        "text": [{"text": "a red ball"}, {"text": "two blue squares move to the left, then stop"}],
        "image": [{"image": image}, {"text": "the same, at night", "image": wide_image}],
        "video": [{"video": a}, {"video": wide, "text": "moving"}],
        "mixed": [
            {"text": "one"},
            {"video": a, "image": image, "text": "both"},
            {"image": wide_image},
            {"video": {"path": b, "start": 0.5, "end": 1.5}},
        ],
    }


def all_items(media):
    return [item for group in items_of(media).values() for item in group]


def assert_close(ours, theirs, most):
    error = (ours - theirs).abs()
    assert error.max() <= most, f"max {error.max():.2e}, mean {error.mean():.2e}"


# Inputs and hidden states

# The frames that decord is to give: 8 uniform ones of 16, of 20 and of frames 4..11; seconds.
INDICES = {
    "a.mp4": ([0, 2, 4, 6, 9, 11, 13, 15], 2.0),
    "wide.mp4": ([0, 3, 5, 8, 11, 14, 16, 19], 4.0),
    "b.mp4": ([4, 5, 6, 7, 8, 9, 10, 11], 1.0),
}


def by_transformers(tiny, items, instruction):
    """Make a batch with transformers' processor and Qwen's chat template alone."""
    import decord

    processor = Qwen2_5_VLProcessor.from_pretrained(tiny, chat_template=QWEN_TEMPLATE)
    texts = []
    images = []
    videos = []
    seconds = []
    for item in items:
        content = []
        if "video" in item:
            path = item["video"]["path"] if isinstance(item["video"], dict) else item["video"]
            indices, duration = INDICES[Path(path).name]
            frames = decord.VideoReader(path).get_batch(indices).asnumpy()
            videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
            seconds.append(2 * duration / 8)
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

    videos_kwargs = {}
    if videos:
        videos_kwargs = {
            "size": {"shortest_edge": 4 * 784, "longest_edge": 200 * 784},
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "video_metadata": [{"fps": 4.0, "total_num_frames": 8}] * len(videos),
        }
    batch = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        return_tensors="pt",
        images_kwargs={"size": {"shortest_edge": 4 * 784, "longest_edge": 256 * 784}},
        videos_kwargs=videos_kwargs,
    )
    batch.pop("second_per_grid_ts", None)
    return dict(batch), seconds


@pytest.mark.parametrize("kind", ["text", "image", "video", "mixed"])
@pytest.mark.parametrize("instruction", [None, "Find the video."])
def test_inputs_and_hidden_states_equal_transformers(tiny, gve, media, kind, instruction):
    items = items_of(media)[kind]
    theirs, seconds = by_transformers(tiny, items, instruction)
    ours = Collator(gve.processor)(items, instruction)
    assert ours.pop("second_per_grid_ts", torch.zeros(0)).tolist() == pytest.approx(seconds)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key

    batch = {**ours, "second_per_grid_ts": torch.tensor(seconds)}
    backbone = Qwen2_5_VLModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        hidden = backbone(**theirs, position_ids=gve.position_ids(batch)).last_hidden_state
        vectors = gve(batch)
    expected = []
    for row, mask in zip(hidden, theirs["attention_mask"], strict=True):
        expected.append(row[mask.nonzero()[-1, 0]])
    expected = torch.stack(expected)
    assert_close(vectors, expected / expected.norm(dim=-1, keepdim=True), 1e-5)


def test_windows_of_one_length_share_a_call_and_equal_transformers(gve, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    tower = gve.core.visual
    grid = torch.tensor([[4, 6, 10], [1, 10, 20], [2, 8, 8]])  # patches
    shape = int(grid.prod(1).sum()), 3 * 2 * 14 * 14
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(*shape, generator=generator, requires_grad=True)

    results = []
    for implementation in ("flash_windows", "sdpa"):
        assert tower.config._attn_implementation == "flash_windows"
        monkeypatch.setattr(tower.config, "_attn_implementation", implementation)
        out = tower(pixels, grid_thw=grid).pooler_output
        monkeypatch.setattr(tower.config, "_attn_implementation", "flash_windows")
        results.append((out, *torch.autograd.grad(out.square().sum(), pixels)))
        # A window is 8 x 8 patches at most. Layer 1: 4 x (48, 12), (64, 64, 32, 16, 16, 8), 2 x 64,
        # six lengths in 16 windows; layer 2 attends in whole frames: 4 x 60, 200, 2 x 64.
        assert len(calls) == {"flash_windows": 6 + 3, "sdpa": 16 + 7}[implementation]
        calls.clear()
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-5)


# Positions


# Golden values of a run of transformers 4.51.3: 5 text tokens, one video of 8 x 8 patches, 4 text
# tokens; tokens_per_second 4.
@pytest.mark.parametrize(
    "grids, seconds, times, tail",
    [
        (4, 1.0, [5, 9, 13, 17], range(18, 22)),
        (4, 0.5, [5, 7, 9, 11], range(12, 16)),
        (4, 2.5, [5, 15, 25, 35], range(36, 40)),
        (16, 1.0, None, range(66, 70)),
    ],
)
def test_positions_equal_transformers_4_51_3(grids, seconds, times, tail):
    kinds = torch.tensor([[0] * 5 + [2] * 16 * grids + [0] * 4])
    positions = mrope_positions(
        kinds,
        torch.ones_like(kinds),
        None,
        torch.tensor([[grids, 8, 8]]),
        torch.tensor([seconds]),
        tokens_per_second=4,
    )
    assert positions.shape == (3, 1, kinds.shape[1])
    assert positions[:, 0, :5].tolist() == [list(range(5))] * 3
    assert positions[:, 0, -4:].tolist() == [list(tail)] * 3

    t, h, w = positions[:, 0, 5:-4].reshape(3, grids, 4, 4)
    assert times is None or t[:, 0, 0].tolist() == times
    assert h[0, :, 0].tolist() == w[0, 0].tolist() == [5, 6, 7, 8]
    assert (t == t[:, :1, :1]).all()
    assert (h == h[:1, :, :1]).all()
    assert (w == w[:1, :1]).all()


def positions_by_hand(kinds, mask, image_grids, video_grids, seconds, tokens_per_second):
    """The written rule as a loop over tokens."""
    out = torch.zeros(3, *kinds.shape, dtype=torch.long)
    images = iter(image_grids)
    videos = iter(zip(video_grids, seconds, strict=True))
    for b in range(len(kinds)):
        position = 0
        i = 0
        columns = [c for c in range(kinds.shape[1]) if mask[b, c]]
        while i < len(columns):
            if kinds[b, columns[i]] == 0:
                out[:, b, columns[i]] = position
                position += 1
                i += 1
                continue
            (t, h, w), s = (next(images), 0.0) if kinds[b, columns[i]] == 1 else next(videos)
            block = []
            for z in range(t):
                for y in range(h // 2):
                    for x in range(w // 2):
                        block.append((int(z * s * tokens_per_second), y, x))
            for offset, place in enumerate(block):
                out[:, b, columns[i + offset]] = torch.tensor(place) + position
            position += max(max(place) for place in block) + 1
            i += len(block)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_positions_equal_the_rule_on_random_batches(seed):
    rng = np.random.default_rng(seed)
    rows = []
    images = []
    videos = []
    seconds = []
    for _ in range(6):
        row = [0] * int(rng.integers(1, 6))
        for kind in rng.choice([1, 2], rng.integers(0, 4)):
            grid = [
                1 if kind == 1 else int(rng.integers(1, 5)),
                2 * int(rng.integers(1, 5)),
                2 * int(rng.integers(1, 5)),
            ]
            (images if kind == 1 else videos).append(grid)
            if kind == 2:
                seconds.append(float(rng.choice([0.25, 0.3125, 1.0, 2.75])))
            row += [int(kind)] * (grid[0] * grid[1] * grid[2] // 4) + [0] * int(rng.integers(1, 4))
        rows.append(row)

    width = max(map(len, rows))
    kinds = torch.zeros(6, width, dtype=torch.long)
    mask = torch.zeros(6, width, dtype=torch.long)
    for b, row in enumerate(rows):
        left_padded = seed % 2
        columns = slice(width - len(row), width) if left_padded else slice(0, len(row))
        kinds[b, columns] = torch.tensor(row)
        mask[b, columns] = 1
    tensors = [torch.tensor(grids) if grids else None for grids in (images, videos)]
    positions = mrope_positions(kinds, mask, *tensors, torch.tensor(seconds), tokens_per_second=2)
    expected = positions_by_hand(kinds, mask, images, videos, seconds, 2)
    assert torch.equal(positions, expected)


# Vectors


@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_do_not_depend_on_padding_side_or_batch(gve, media, side):
    items = all_items(media)
    alone = torch.cat([gve.embed([item]) for item in items])
    collate = Collator(gve.processor, padding_side=side)
    with torch.no_grad():
        together = gve(collate(items))
    assert_close(alone, together, 1e-5)
    distinct = (alone @ alone.T - torch.eye(len(items))).abs().max()
    assert distinct < 0.999999, "two items have one vector"


def test_raw_batches_give_the_bits_of_normalised_ones_at_a_quarter_of_the_bytes(gve, media):
    collate = Collator(gve.processor)
    samples = [collate.prepare(item) for item in all_items(media)]
    normal = collate.batch(samples)
    raw = collate.batch(samples, raw=True)
    for pixels in ("pixel_values", "pixel_values_videos"):
        assert normal[pixels].dtype == torch.float32
        assert raw[pixels].dtype == torch.uint8
        assert raw[pixels].shape == normal[pixels].shape
        assert raw[pixels].float().std() > 10
    with torch.no_grad():
        assert torch.equal(gve(normal), gve(raw))


@pytest.mark.parametrize("item", [{"vidoe": "a.mp4"}, {"text": ""}, {}, "a text"])
def test_what_is_no_item_has_no_vector(gve, item):
    with pytest.raises(ValueError, match="an item needs a non-empty text, image or video"):
        gve.embed([item])


def test_embed_takes_a_list_and_no_items_have_no_vectors(gve):
    with pytest.raises(ValueError, match="a list of items, not one item"):
        gve.embed({"text": "a red ball"})
    assert gve.embed([]).shape == (0, gve.dim)


def test_embed_takes_pathlib_paths_and_repairs_half_an_emoji(gve, media):
    paths = [{"video": media / "a.mp4"}, {"image": {"video": media / "a.mp4", "time": 1}}]
    strings = [
        {"video": str(media / "a.mp4")},
        {"image": {"video": str(media / "a.mp4"), "time": 1}},
    ]
    assert torch.equal(gve.embed(paths), gve.embed(strings))
    halves = [{"text": "half \ud83d emoji"}, {"text": "whole \ud83d\ude00"}]
    whole = [{"text": "half \ufffd emoji"}, {"text": "whole \U0001f600"}]
    assert torch.equal(gve.embed(halves), gve.embed(whole))


def test_embed_loses_no_more_than_the_clips_that_are_damaged_or_crash_their_decoder(
    gve, media, monkeypatch
):
    open_clip = data.open_clip

    def deadly(video, frames):
        if "b.mp4" in str(video):
            os.kill(os.getpid(), signal.SIGKILL)
        return open_clip(video, frames)

    monkeypatch.setattr(data, "open_clip", deadly)
    items = [{"video": str(media / f"{name}.mp4")} for name in ("a", "b", "gone", "c")]
    failed = {}
    vectors = gve.embed(items, workers=1, failed=failed)
    assert sorted(failed) == [1, 2]
    assert "b.mp4" in failed[1] and "crashed" in failed[1]
    assert "gone.mp4: no such" in failed[2]
    assert vectors[[1, 2]].isnan().all()
    assert_close(vectors[[0, 3]], gve.embed([items[0], items[3]]), 1e-6)
    with pytest.raises(ValueError, match="item 1: .*gone.mp4"):
        gve.embed([items[0], items[2]])


def test_in_bfloat16_lora_computes_in_bfloat16_over_float32_weights(tiny, media):
    torch.manual_seed(0)
    no_dropout = {"lora_dropout": 0.0}
    half = GVE.from_pretrained(tiny, dtype="bfloat16", lora=no_dropout)
    full = GVE.from_pretrained(tiny, dtype="float32", lora=no_dropout)
    full_parameters = full.lora_parameters()
    for name, p in half.lora_parameters().items():
        p.data = torch.randn_like(p) * 0.05  # B, too, so that the adapter matters
        full_parameters[name].data = p.data.clone()
        assert p.dtype == torch.float32, name

    seen = set()

    def note_dtypes(module, given, made):
        seen.add((given[0].dtype, made.dtype))

    for module in half.core.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note_dtypes)

    batch = Collator(half.processor)(all_items(media))
    target = torch.randn(10, half.dim, generator=torch.Generator().manual_seed(1))
    grads = []
    for gve in (half, full):
        vectors = gve(batch)
        assert vectors.dtype == torch.float32
        (vectors * target).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in gve.lora_parameters().values()]))
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert grads[0].dtype == torch.float32
    assert torch.cosine_similarity(*grads, dim=0) > 0.98
    assert (vectors * half(batch)).sum(1).min() > 0.999


# Pooling


def test_pool_takes_the_last_attended_token_on_both_sides():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert last_token_pool(hidden, mask).tolist() == [[9, 10, 11], [15, 16, 17]]


def test_mean_pool_is_the_mean_of_the_attended_tokens_on_both_sides():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    hidden[mask == 0] = torch.nan  # padding has no part in it
    assert mean_pool(hidden, mask).tolist() == [[6, 7, 8], [13.5, 14.5, 15.5]]


def test_a_checkpoint_is_loaded_with_its_own_pooling(lora, media, tmp_path):
    items = all_items(media)
    GVE.from_pretrained(lora.base, pooling="mean").save_pretrained(tmp_path / "base")
    lora.save_pretrained(tmp_path / "last")
    mean = GVE.from_pretrained(tmp_path / "last", pooling="mean")
    mean.save_pretrained(tmp_path / "mean")

    # The mean, from transformers' own hidden states.
    backbone = Qwen2_5_VLModel.from_pretrained(lora.base).eval()
    texts = items_of(media)["text"]
    batch = Collator(lora.processor)(texts)
    with torch.no_grad():
        hidden = backbone(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    means = []
    for row, mask in zip(hidden, batch["attention_mask"], strict=True):
        means.append(row[mask.bool()].mean(0))
    expected = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    assert_close(GVE.from_pretrained(tmp_path / "base").embed(texts), expected, 1e-5)

    loaded = GVE.from_pretrained(tmp_path / "mean")
    assert json.loads((tmp_path / "mean" / "gve.json").read_text())["pooling"] == "mean"
    assert json.loads((tmp_path / "last" / "gve.json").read_text())["pooling"] == "last_token"
    assert loaded.pooling == "mean"
    assert torch.equal(loaded.embed(items), mean.embed(items))
    assert (loaded.embed(items) - lora.embed(items)).abs().max() > 0.01
    last = GVE.from_pretrained(tmp_path / "mean", pooling="last_token")
    assert torch.equal(last.embed(items), lora.embed(items))


def test_a_checkpoint_that_names_no_pooling_takes_the_last_token(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "gve.json").read_text())
    del info["pooling"]
    (tmp_path / "gve.json").write_text(json.dumps(info))
    assert GVE.from_pretrained(tmp_path).pooling == "last_token"


@pytest.mark.parametrize("named_by", ["checkpoint", "caller"])
def test_an_unknown_pooling_is_an_error_that_names_the_accepted_ones(lora, tmp_path, named_by):
    lora.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "gve.json").read_text())
    if named_by == "checkpoint":
        (tmp_path / "gve.json").write_text(json.dumps({**info, "pooling": "no such pooling"}))
    pooling = {"checkpoint": "", "caller": "no such pooling"}[named_by]
    with pytest.raises(ValueError, match=r"'no such pooling'.*accepted: last_token, mean"):
        GVE.from_pretrained(tmp_path, pooling=pooling)


# Backbones


def test_an_unknown_model_type_is_an_error_that_names_the_accepted_ones(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    for model_type in ("qwen9_vl", None):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(
            ValueError, match=f"x/config.json.*{model_type}.*accepted: qwen2_vl, qwen2_5_vl"
        ):
            GVE.from_pretrained(folder)


def test_geometry_is_read_from_the_config(gve):
    vision = dict(
        patch_size=16,
        temporal_patch_size=4,
        in_channels=1,
        spatial_merge_size=3,
        window_size=96,
        tokens_per_second=5,
        depth=6,
        hidden_size=48,
        fullatt_block_indexes=[1, 4],
    )
    expected = dict(
        patch_size=16,
        temporal_patch_size=4,
        patch_values=1 * 4 * 16 * 16,
        merge_size=3,
        token_side=48,
        window_size=96,
        frame_layers=2,
        tower_width=48,
        feature_layers=1,
        tokens_per_second=5,
    )
    spec = model.BACKBONES["qwen2_5_vl"]
    config = Qwen2_5_VLConfig(vision_config=vision)
    assert dataclasses.asdict(spec.read_geometry(config)) == expected

    # Qwen2-VL's config has none of these three.
    for name in ("window_size", "tokens_per_second", "fullatt_block_indexes"):
        vision.pop(name)
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(**vision))
    fallback = {"window_size": 0, "tokens_per_second": 2, "frame_layers": 6}
    assert dataclasses.asdict(spec.read_geometry(config)) == expected | fallback


def test_geometry_agrees_with_the_processor_and_the_table(gve, media):
    batch = Collator(gve.processor)(items_of(media)["mixed"])
    processor = gve.processor.video_processor
    assert batch["pixel_values"].shape[1] == gve.geometry.patch_values
    assert batch["pixel_values_videos"].shape[1] == gve.geometry.patch_values
    assert processor.patch_size == gve.geometry.patch_size
    assert processor.merge_size == gve.geometry.merge_size
    assert processor.temporal_patch_size == gve.geometry.temporal_patch_size
    for spec in model.BACKBONES.values():
        assert spec.token_side == spec.read_geometry(spec.config_class()).token_side


def test_another_family_needs_a_row_and_nothing_else(gve, tiny, media, tmp_path, monkeypatch):
    """A family that adds vision features at a second place and counts positions in 1-D."""
    own = model.BACKBONES["qwen2_5_vl"]
    seen = []

    def language_inputs(core, batch):
        inputs = own.language_inputs(core, batch)
        return {"inputs_embeds": inputs["inputs_embeds"] * 2, "output_attentions": False}

    def positions(token_types, attention_mask, *grids, **geometry):
        seen.append(geometry)
        return (attention_mask.cumsum(1) - 1).expand(3, -1, -1)

    row = dataclasses.replace(
        own,
        name="Other-VL",
        lora_targets=r".*language_model\.layers\.\d+\.self_attn\.o_proj",
        language_inputs=language_inputs,
        positions=positions,
    )
    monkeypatch.setitem(model.BACKBONES, "other_vl", row)
    folder = shutil.copytree(tiny, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "other_vl"}))

    other = GVE.from_pretrained(folder, lora=True)
    vectors = other.embed(items_of(media)["mixed"])
    assert (vectors - gve.embed(items_of(media)["mixed"])).abs().max() > 0.01
    assert seen == [{"tokens_per_second": 2, "merge_size": 2}]
    assert len(other.lora_parameters()) == 2 * 2
    assert all("o_proj" in name for name in other.lora_parameters())


def test_no_size_of_a_patch_is_written_outside_the_table():
    """1176 = 3 * 2 * 14 * 14 and 28 = 2 * 14 hold for some families only."""
    lines = Path(model.__file__).read_text().splitlines()
    found = [line for line in lines if {"1176", "14", "28"} & set(re.findall(r"\d+", line))]
    assert {line.strip() for line in found} == {"token_side=28,"}


def test_loading_switches_cudnn_attention_off(tiny, monkeypatch):
    # The flag is the process's: it may be off already, so the call itself is watched.
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    GVE.from_pretrained(tiny)
    assert calls == [False]


# The prompt


def test_the_saved_chat_template_is_the_one_that_checkpoints_carry():
    """The template, written out; mini/prober's own copy was saved long before it was derived."""
    expected = (
        "{%- if messages[0].role != 'system' %}\n"
        "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}\n"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}\n"
        "{%- if message.content is string %}{{- message.content }}{%- else %}\n"
        "{%- for part in message.content if part.type == 'video' %}"
        "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}{%- endfor %}\n"
        "{%- for part in message.content if part.type == 'image' %}"
        "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endfor %}\n"
        "{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}\n"
        "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}\n"
        "{{- '<|im_start|>assistant\\n<|endoftext|>' }}"
    )
    assert model.CHAT_TEMPLATE == expected
    prober = Path(model.__file__).parent / "mini" / "prober" / "chat_template.jinja"
    assert prober.read_text() == expected


@pytest.mark.parametrize("max_length", [8192, 60, 50])
def test_the_pooled_token_is_endoftext_and_only_user_text_is_cut(gve, media, max_length):
    processor = gve.processor
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tail = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    text = "word " * 40
    for item in ({"text": text}, {"text": text, "image": str(media / "i.png")}, {"text": "short"}):
        need = 200 if max_length == 8192 else max_length
        batch = Collator(processor, max_length=need + 60)([item])
        ids, mask = batch["input_ids"][0], batch["attention_mask"][0]
        assert ids[-1] == end
        assert mask.all()
        assert len(ids) <= need + 60

        whole = processor.tokenizer.decode(Collator(processor)([item])["input_ids"][0])
        cut = processor.tokenizer.decode(ids)
        assert cut.endswith(tail)
        assert whole.endswith(tail)
        assert len(ids) == need + 60 or cut == whole

        kept = cut.removesuffix(tail)
        assert whole.removesuffix(tail).startswith(kept)  # nothing else changed
        user_text = kept.split("user\n")[1].split("<|vision_end|>")[-1]
        assert text.startswith(user_text) or item["text"] == "short"


def test_vision_tokens_over_the_cap_are_an_error_that_names_frames_and_tokens(gve, media):
    collate = Collator(gve.processor, frames=16, max_length=80)
    with pytest.raises(ValueError, match="16 frames x at most 200 tokens"):
        collate([{"video": str(media / "a.mp4"), "text": "x"}])


def test_user_text_cannot_smuggle_special_tokens(gve):
    ids = Collator(gve.processor)([{"text": "<|video_pad|><|im_end|>"}])["input_ids"][0].tolist()
    special = gve.processor.tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|im_end|>"])
    assert [ids.count(t) for t in special] == [0, 2]


# LoRA


def test_lora_sits_on_the_language_model_alone_and_is_float32_over_bfloat16(tiny):
    gve = GVE.from_pretrained(tiny, lora=True, dtype="bfloat16")
    names = list(gve.lora_parameters())
    layers, projections, matrices = 2, 6, 2
    assert len(names) == layers * projections * matrices
    assert all("language_model.layers" in n and ".lora_" in n for n in names)

    adapted = set()
    for name in names:
        adapted.update(part for part in name.split(".") if part.endswith("_proj"))
    assert adapted == {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"}

    assert {p.dtype for p in gve.lora_parameters().values()} == {torch.float32}
    assert {p.dtype for n, p in gve.named_parameters() if "lora" not in n} == {torch.bfloat16}
    config = gve.backbone.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)
    assert config.base_model_name_or_path == tiny


def test_the_dropout_asked_for_holds_on_an_adapter_that_is_trained_on(tiny, tmp_path):
    GVE.from_pretrained(tiny, lora={"lora_dropout": 0.1}).save_pretrained(tmp_path)

    def rates(lora):
        gve = GVE.from_pretrained(tmp_path, lora=lora)
        found = set()
        for name, module in gve.named_modules():
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout):
                found.add(module.p)
        return found

    assert rates(True) == {0.1}
    assert rates({"lora_dropout": 0.3}) == {0.3}
    assert rates({"lora_dropout": 0.0}) == set()


# Saving and loading


@pytest.mark.parametrize(
    "content, arguments, expected",
    [
        (None, {}, (128, "mrope")),  # a released checkpoint
        ({"pooling": "last_token"}, {}, (4, "mrope")),  # one of ours that is older than the rule
        ({"min_tokens": 50, "positions": "1d"}, {}, (50, "1d")),
        (
            {"min_tokens": 50, "positions": "1d"},
            {"min_tokens": 9, "positions": "mrope"},
            (9, "mrope"),
        ),
    ],
)
def test_min_tokens_and_positions_are_the_argument_s_else_gve_json_s(
    tiny, tmp_path, content, arguments, expected
):
    folder = shutil.copytree(tiny, tmp_path / "base")
    (folder / "gve.json").unlink()
    if content:
        (folder / "gve.json").write_text(json.dumps(content))
    gve = GVE.from_pretrained(folder, lora=True, **arguments)
    assert (gve.min_tokens, gve.positions) == expected

    # Saving keeps them, for other programs as well; a bare adapter takes those of its base.
    gve.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "gve.json").read_text())
    assert (saved["min_tokens"], saved["positions"]) == expected
    processor = Qwen2_5_VLProcessor.from_pretrained(tmp_path / "out")
    assert processor.video_processor.size["shortest_edge"] == expected[0] * 28 * 28
    assert processor.image_processor.size["shortest_edge"] == 4 * 28 * 28
    (tmp_path / "out" / "gve.json").unlink()
    bare = GVE.from_pretrained(tmp_path / "out")
    if not arguments:
        assert (bare.min_tokens, bare.positions) == expected


def test_unknown_positions_are_an_error_that_names_the_accepted_ones(tiny):
    with pytest.raises(ValueError, match="positions '2d' is unknown; accepted: mrope, 1d"):
        GVE.from_pretrained(tiny, positions="2d")


@pytest.mark.parametrize(
    "size, least, tokens",  # per temporal grid, as counted beside the released code
    [((320, 240), 128, 140), ((320, 240), 4, 99), ((224, 224), 128, 144), ((224, 224), 4, 64)],
)
def test_small_frames_are_enlarged_to_min_tokens_and_images_are_not(
    tiny, tmp_path, size, least, tokens
):
    (tmp_path / "frames").mkdir()
    for i in range(2):
        Image.new("RGB", size).save(tmp_path / "frames" / f"{i}.png")
    Image.new("RGB", (56, 84)).save(tmp_path / "i.png")
    gve = GVE.from_pretrained(tiny, min_tokens=least)
    item = {"video": str(tmp_path / "frames"), "image": str(tmp_path / "i.png")}
    batch = gve.collator()([item])
    assert (batch["mm_token_type_ids"] == 2).sum() == 4 * tokens
    assert (batch["mm_token_type_ids"] == 1).sum() == 2 * 3


def test_stored_features_are_those_of_their_min_tokens(gve, media, tmp_path):
    files = set()
    for least in (4, 5):
        collate = Collator(gve.processor, min_tokens=least, store=FeatureStore(tmp_path))
        files.add(collate.prepare({"video": str(media / "a.mp4")})["video_file"])
    assert len(files) == 2
    with pytest.raises(ValueError, match="max_tokens 100 .at least min_tokens, 128"):
        Collator(gve.processor, max_tokens=100, min_tokens=128)


@pytest.mark.parametrize("preset, least", [("mini", 4), ("gve-3b", 128), ("gve-7b", 128)])
def test_training_s_flags_reach_the_model_and_its_collator(tiny, preset, least):
    words = ["--preset", preset, "--base", tiny, "--features", "", "--positions", "1d"]
    flags = train.parse_flags(train.Flags, words, presets=train.PRESETS)
    gve, _, collate = train.build_model(flags, 0, torch.device("cpu"))
    assert (gve.min_tokens, gve.positions) == (least, "1d")
    assert collate.min_tokens == {"image": 4, "video": least}


def test_1d_positions_equal_transformers_forward_with_a_plain_arange(tiny, media):
    gve = GVE.from_pretrained(tiny, positions="1d")
    backbone = Qwen2_5_VLModel.from_pretrained(tiny).eval()
    for item in all_items(media):
        theirs, _ = by_transformers(tiny, [item], None)
        length = theirs["input_ids"].shape[1]
        with torch.no_grad():
            # Of two dimensions, transformers takes positions for all three axes.
            hidden = backbone(**theirs, position_ids=torch.arange(length)[None]).last_hidden_state
        expected = torch.nn.functional.normalize(hidden[:, -1], dim=-1)
        assert_close(gve.embed([item]), expected, 1e-5)

    # Padding and the rest of the batch do not matter, and the switch does.
    items = all_items(media)
    one_by_one = torch.cat([gve.embed([item]) for item in items])
    assert_close(gve.embed(items), one_by_one, 1e-5)
    with_video = items_of(media)["video"]
    assert (gve.embed(with_video) - GVE.from_pretrained(tiny).embed(with_video)).abs().max() > 1e-3


def name_base(adapter, base):
    """Let an adapter name another base."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


def test_an_adapter_on_its_own_merged_base_is_refused(lora, tmp_path):
    lora.save_pretrained(tmp_path / "adapter")
    lora.save_pretrained(tmp_path / "merged", merge=True)
    with pytest.warns(UserWarning, match="merged holds other weights than"):
        twice = GVE.from_pretrained(tmp_path / "adapter", base=tmp_path / "merged")
    assert "merged holds other weights" in twice.wrong_base  # the programs refuse it

    name_base(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="adapter: .*merged holds other weights than"):
        GVE.from_pretrained(tmp_path / "adapter")
    # An adapter made before there were fingerprints loads as ever.
    info = json.loads((tmp_path / "adapter" / "gve.json").read_text())
    info.pop("base_fingerprint")
    (tmp_path / "adapter" / "gve.json").write_text(json.dumps(info))
    GVE.from_pretrained(tmp_path / "adapter")


def test_a_moved_base_is_found_by_the_argument_in_any_layout_and_precision(lora, tiny, tmp_path):
    lora.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", "/old/machine/base")
    with pytest.raises(ValueError, match="adapter: the base .*'/old/machine/base'.*--base"):
        GVE.from_pretrained(tmp_path / "adapter")

    # The same weights in other files: several shards of the headless class.
    moved = tmp_path / "moved"
    half = GVE.from_pretrained(tiny, dtype="bfloat16")
    shutil.copytree(tiny, moved, ignore=shutil.ignore_patterns("*.safetensors"))
    half.core.save_pretrained(moved, max_shard_size="100KB")
    assert len(list(moved.glob("*.safetensors"))) > 1
    again = GVE.from_pretrained(tmp_path / "adapter", base=moved)
    assert again.wrong_base == ""


@pytest.mark.parametrize(
    "base, message",
    [
        ("base/that/moved", "adapter: the base of this adapter is not here: 'base/that/moved'"),
        ("no-such/model", "adapter: the base of this adapter: no-such/model: no such folder, and"),
    ],
)
def test_a_missing_base_is_told_from_a_missing_adapter(lora, tmp_path, base, message):
    lora.save_pretrained(tmp_path / "adapter")
    name_base(tmp_path / "adapter", base)
    with pytest.raises(ValueError, match=message):
        GVE.from_pretrained(tmp_path / "adapter")


def test_a_faulty_base_is_told_from_its_adapter_whatever_their_names(lora, tmp_path):
    lora.save_pretrained(tmp_path / "adapter")
    base = tmp_path / "adapter-base"  # begins like the adapter
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "other"}')
    name_base(tmp_path / "adapter", str(base))
    with pytest.raises(ValueError, match="adapter: the base of this adapter: .*'other' is unknown"):
        GVE.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("merge", [False, True])
def test_saved_folder_gives_the_same_vectors(lora, media, tmp_path, merge):
    items = all_items(media)
    expected = lora.embed(items)
    lora.save_pretrained(tmp_path / "out", merge=merge, info={"step": 3})
    again = GVE.from_pretrained(tmp_path / "out")
    assert_close(again.embed(items), expected, 1e-5 if merge else 0)
    assert again.info["step"] == 3
    assert not list(tmp_path.glob("*.part"))

    without = GVE.from_pretrained(lora.base).embed(items)
    assert (expected - without).abs().max() > 0.01, "the adapter has no effect"
    assert torch.equal(lora.embed(items), expected), "saving changed the model"


def test_the_core_is_no_second_copy_of_the_weights(lora):
    assert lora.core is lora.backbone.get_base_model()
    assert all(name.startswith("backbone.") for name in lora.state_dict())
    assert "core" not in dict(lora.named_children())


def test_merged_folder_is_read_by_transformers_itself(lora, tmp_path):
    lora.save_pretrained(tmp_path, merge=True)
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    processor = Qwen2_5_VLProcessor.from_pretrained(tmp_path)
    content = [{"type": "text", "text": "hi"}, {"type": "image"}]
    messages = [{"role": "system", "content": "Find."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nFind.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
    pixels = 28 * 28
    sizes = {"shortest_edge": 4 * pixels, "longest_edge": 256 * pixels}
    assert dict(processor.image_processor.size) == sizes
    assert dict(processor.video_processor.size) == sizes | {"longest_edge": 200 * pixels}


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
@pytest.mark.parametrize("merge", [False, True])
def test_sentence_transformers_loads_the_folder_and_gives_our_vectors(
    lora, media, tmp_path, merge, pooling, monkeypatch
):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(lora, "pooling", pooling)
    lora.save_pretrained(tmp_path, merge=merge)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    texts = ["a red ball", "one"]
    for instruction in (None, "Find the video."):
        expected = lora.embed([{"text": text} for text in texts], instruction).numpy()
        error = np.abs(theirs.encode(texts, prompt=instruction) - expected).max()
        assert error < 1e-5, f"text: {error:.2e}"

    images = [str(media / "i.png"), str(media / "wide.png")]
    expected = lora.embed([{"image": image} for image in images]).numpy()
    error = np.abs(theirs.encode([Image.open(image) for image in images]) - expected).max()
    assert error < 1e-5, f"image: {error:.2e}"


@pytest.mark.parametrize("damage", ["renamed", "missing", "extra"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_tensor_without_a_place_is_an_error(lora, tiny, tmp_path, damage, kind):
    folder = tmp_path / "x"
    if kind == "adapter":
        lora.save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
    else:
        shutil.copytree(tiny, folder)
        file = folder / "model.safetensors"

    tensors = load_file(file)
    name = next(k for k in tensors if "layers.1" in k and "q_proj" in k)
    tensor = tensors[name].clone()
    if damage != "extra":
        del tensors[name]
    if damage != "missing":
        tensors[name.replace("layers.1", "layers.7")] = tensor
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="layers.7" if damage != "missing" else "layers.1"):
        GVE.from_pretrained(folder)


def test_an_adapter_trained_on_the_generation_model_loads(lora, media, tmp_path):
    lora.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        renamed[name.replace("base_model.model.", "base_model.model.model.")] = tensor
    save_file(renamed, file)
    items = items_of(media)["mixed"]
    assert torch.equal(GVE.from_pretrained(tmp_path).embed(items), lora.embed(items))


@pytest.mark.parametrize(
    "missing, message",
    [
        ("processor", "no usable processor"),
        ("config.json", "cannot be loaded.*config"),
        ("model.safetensors", "cannot be loaded"),
    ],
)
def test_incomplete_folders_give_one_clear_error(tiny, tmp_path, missing, message):
    folder = tmp_path / "x"
    shutil.copytree(tiny, folder)
    files = [missing]
    if missing == "processor":
        files = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    for file in files:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=message):
        GVE.from_pretrained(folder)


@pytest.mark.parametrize(
    "path, message",
    [
        ("./nowhere", "./nowhere: neither a checkpoint folder nor a hub id"),
        ("a/b/c", "a/b/c: neither a checkpoint folder nor a hub id"),
        ("owner/name", "owner/name: no such folder, and the hub gives no config.json"),
    ],
)
def test_a_path_without_a_checkpoint_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        GVE.from_pretrained(path)


def test_adapter_without_its_base_names_it(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(ValueError, match="gone"):
        GVE.from_pretrained(tmp_path)


# The feature store


def embed_with_store(gve, collate, items):
    """Embed items as training does: encode, keep the new features, forward."""
    batch = gve.encode_vision(collate(items))
    collate.store.keep(batch)
    with torch.no_grad():
        return gve(batch)


def test_a_store_gives_the_same_vectors_and_decodes_nothing_twice(
    gve, media, tmp_path, monkeypatch
):
    folder = shutil.copytree(media, tmp_path / "media")
    items = items_of(folder)["mixed"] + items_of(folder)["video"]
    plain = gve.embed(items)
    stored = Collator(gve.processor, store=FeatureStore(tmp_path / "store"))
    embed_with_store(gve, stored, items[:2])
    vectors = embed_with_store(gve, stored, items)
    assert torch.equal(vectors, plain), "part from the store, part computed"

    def closed(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("data.open_clip", closed)
        patch.setattr("data.load_image", closed)
        patch.setattr(gve.core.visual, "forward", closed)
        assert torch.equal(embed_with_store(gve, stored, items), plain), "all from the store"
        for other in ({"frames": 4}, {"max_tokens": 9}):
            collate = Collator(gve.processor, store=stored.store, **other)
            with pytest.raises(AssertionError, match="decoded again"):
                collate([{"video": str(folder / "a.mp4")}])

    shutil.copy(folder / "c.mp4", folder / "a.mp4")
    expected = gve.embed(items)
    assert not torch.equal(expected, plain)
    vectors = embed_with_store(gve, stored, items)
    assert torch.equal(vectors, expected), "a changed file is another medium"


def test_a_store_sees_changed_files_by_their_times_and_replaces_damaged_ones(gve, tmp_path):
    stored = Collator(gve.processor, store=FeatureStore(tmp_path / "store"))
    (tmp_path / "frames").mkdir()
    items = [{"image": str(tmp_path / "p.bmp")}, {"video": str(tmp_path / "frames")}]

    # The files keep their size, and the folder of frames keeps its own time.
    for seed, time in ((1, 1_000_000_000), (2, 2_000_000_000)):
        for picture in (tmp_path / "p.bmp", tmp_path / "frames" / "0.bmp"):
            pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(picture)
            os.utime(picture, ns=(time, time))
        os.utime(tmp_path / "frames", ns=(1, 1))
        assert torch.equal(embed_with_store(gve, stored, items), gve.embed(items))

    for file in (tmp_path / "store").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    vectors = embed_with_store(gve, stored, items)
    assert torch.equal(vectors, gve.embed(items)), "a damaged file is made anew"
    whole = [f for f in (tmp_path / "store").rglob("*.safetensors") if f.stat().st_size > 40]
    assert len(whole) == 2


def test_a_fingerprint_tells_models_apart():
    def weights():
        torch.manual_seed(0)
        return {"a": torch.randn(100, 100), "b": torch.randn(3)}

    before = fingerprint_weights(weights())
    assert fingerprint_weights(weights()) == before
    shifted, renamed, reshaped = weights(), weights(), weights()
    shifted["a"] += 1e-3
    renamed["c"] = renamed.pop("b")
    reshaped["a"] = reshaped["a"].reshape(50, 200)
    for other in (shifted, renamed, reshaped):
        assert fingerprint_weights(other) != before
