"""model.py against transformers' own processor, chat template and model; pooling, M-RoPE, loading and saving."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QWEN_TEMPLATE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Collator  # noqa: E402
from model import GVE, last_token_pool, mrope_positions  # noqa: E402


@pytest.fixture(scope="module")
def gve(tiny):
    return GVE.from_pretrained(tiny)


@pytest.fixture(scope="module")
def lora(tiny):
    """A model whose LoRA does something: B starts at zero, so it is drawn here."""
    torch.manual_seed(0)
    model = GVE.from_pretrained(tiny, lora=True)
    with torch.no_grad():
        for name, p in model.lora_parameters().items():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return model.eval()


def items_of(media):
    return {
        "text": [{"text": "a red ball"}, {"text": "two blue squares move to the left, then stop"}],
        "image": [
            {"image": str(media / "i.png")},
            {"text": "the same, at night", "image": str(media / "wide.png")},
        ],
        "video": [
            {"video": str(media / "a.mp4")},
            {"video": str(media / "wide.mp4"), "text": "moving"},
        ],
        "mixed": [
            {"text": "one"},
            {"video": str(media / "a.mp4"), "image": str(media / "i.png"), "text": "both"},
            {"image": str(media / "wide.png")},
            {"video": {"path": str(media / "b.mp4"), "start": 0.5, "end": 1.5}},
        ],
    }


# What decord must deliver, written out: 8 uniform frames of 16, of 20 and of frames 4..11.
INDICES = {
    "a.mp4": ([0, 2, 4, 6, 9, 11, 13, 15], 2.0),
    "wide.mp4": ([0, 3, 5, 8, 11, 14, 16, 19], 4.0),
    "b.mp4": ([4, 5, 6, 7, 8, 9, 10, 11], 1.0),
}


def by_transformers(tiny, items, instruction):
    """Inputs of a batch through transformers' processor and Qwen's chat template alone."""
    import decord

    processor = Qwen2_5_VLProcessor.from_pretrained(tiny, chat_template=QWEN_TEMPLATE)
    texts, images, videos, seconds = [], [], [], []
    for item in items:
        content = []
        if "video" in item:
            path = item["video"]["path"] if isinstance(item["video"], dict) else item["video"]
            indices, duration = INDICES[Path(path).name]
            videos.append(
                torch.from_numpy(decord.VideoReader(path).get_batch(indices).asnumpy()).permute(
                    0, 3, 1, 2
                )
            )
            seconds.append(2 * duration / 8)
            content.append({"type": "video"})
        if "image" in item:
            images.append(Image.open(item["image"]).convert("RGB"))
            content.append({"type": "image"})
        if "text" in item:
            content.append({"type": "text", "text": item["text"]})
        messages = [{"role": "system", "content": instruction}] if instruction else []
        messages += [{"role": "user", "content": content}]
        texts.append(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            + "<|endoftext|>"
        )
    made = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        return_tensors="pt",
        images_kwargs={"size": {"shortest_edge": 4 * 784, "longest_edge": 256 * 784}},
        videos_kwargs={
            "size": {"shortest_edge": 4 * 784, "longest_edge": 200 * 784},
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "video_metadata": [{"fps": 4.0, "total_num_frames": 8}] * len(videos),
        }
        if videos
        else {},
    )
    made.pop("second_per_grid_ts", None)
    return dict(made), seconds


@pytest.mark.parametrize("kind", ["text", "image", "video", "mixed"])
@pytest.mark.parametrize("instruction", [None, "Find the video."])
def test_inputs_and_hidden_states_equal_transformers(tiny, gve, media, kind, instruction):
    items = items_of(media)[kind]
    theirs, seconds = by_transformers(tiny, items, instruction)
    ours = Collator(gve.processor)(items, instruction)
    assert ours.pop("second_per_grid_ts", torch.zeros(0)).tolist() == pytest.approx(seconds)
    positions = gve.positions({**ours, "second_per_grid_ts": torch.tensor(seconds)})
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    backbone = Qwen2_5_VLModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        expected = backbone(**theirs, position_ids=positions).last_hidden_state
        expected = torch.stack(
            [
                row[mask.nonzero()[-1, 0]]
                for row, mask in zip(expected, theirs["attention_mask"], strict=True)
            ]
        )
        vectors = gve({**ours, "second_per_grid_ts": torch.tensor(seconds)})
    error = (vectors - expected / expected.norm(dim=-1, keepdim=True)).abs()
    assert error.max() <= 1e-5, f"max {error.max():.2e}, mean {error.mean():.2e}"


def test_windows_of_one_length_share_a_call_and_equal_transformers(gve, monkeypatch):
    attend, tower, made, count = (
        torch.nn.functional.scaled_dot_product_attention,
        gve.core.visual,
        [],
        [],
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: count.append(1) or attend(*a, **k),
    )
    grid = torch.tensor([[4, 6, 10], [1, 10, 20], [2, 8, 8]])  # patches
    pixels = torch.randn(
        int(grid.prod(1).sum()),
        1176,
        generator=torch.Generator().manual_seed(0),
        requires_grad=True,
    )
    for implementation in ("flash_windows", "sdpa"):
        assert tower.config._attn_implementation == "flash_windows"
        tower.config._attn_implementation = implementation
        out = tower(pixels, grid_thw=grid).pooler_output
        tower.config._attn_implementation = "flash_windows"
        made.append((out, *torch.autograd.grad(out.square().sum(), pixels)))
        # A window is 8 x 8 patches at most. Layer 1: 4 x (48, 12), (64, 64, 32, 16, 16, 8), 2 x 64, six lengths in 16 windows;
        # layer 2 attends in whole frames: 4 x 60, 200, 2 x 64.
        assert len(count) == {"flash_windows": 6 + 3, "sdpa": 16 + 7}[implementation]
        count.clear()
    for ours, theirs in zip(*made, strict=True):
        error = (ours - theirs).abs()
        assert error.max() <= 1e-5, f"max {error.max():.2e}, mean {error.mean():.2e}"


# PEERS' golden run of transformers 4.51.3: 5 text tokens, one video of 8 x 8 patches, 4 text tokens; tokens_per_second 4.
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
    got = mrope_positions(
        kinds,
        torch.ones_like(kinds),
        None,
        torch.tensor([[grids, 8, 8]]),
        torch.tensor([seconds]),
        tokens_per_second=4,
    )
    assert got.shape == (3, 1, kinds.shape[1])
    t, h, w = got[:, 0, 5:-4].reshape(3, grids, 4, 4)
    assert times is None or t[:, 0, 0].tolist() == times
    assert (t == t[:, :1, :1]).all() and h[0, :, 0].tolist() == w[0, 0].tolist() == [5, 6, 7, 8]
    assert (h == h[:1, :, :1]).all() and (w == w[:1, :1]).all()
    assert (
        got[:, 0, :5].tolist() == [list(range(5))] * 3
        and got[:, 0, -4:].tolist() == [list(tail)] * 3
    )


def positions_by_hand(kinds, mask, image_grids, video_grids, seconds, tokens_per_second):
    """The written rule as a loop over tokens."""
    out = torch.zeros(3, *kinds.shape, dtype=torch.long)
    images, videos = iter(image_grids), iter(zip(video_grids, seconds, strict=True))
    for b in range(len(kinds)):
        at, i = 0, 0
        columns = [c for c in range(kinds.shape[1]) if mask[b, c]]
        while i < len(columns):
            if kinds[b, columns[i]] == 0:
                out[:, b, columns[i]] = at
                at, i = at + 1, i + 1
                continue
            (t, h, w), s = (next(images), 0.0) if kinds[b, columns[i]] == 1 else next(videos)
            block = [
                (int(z * s * tokens_per_second), y, x)
                for z in range(t)
                for y in range(h // 2)
                for x in range(w // 2)
            ]
            for offset, place in enumerate(block):
                out[:, b, columns[i + offset]] = torch.tensor(place) + at
            at, i = at + max(max(place) for place in block) + 1, i + len(block)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_positions_equal_the_rule_on_random_batches(seed):
    rng = np.random.default_rng(seed)
    rows, images, videos, seconds = [], [], [], []
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
    left = seed % 2
    kinds, mask = torch.zeros(6, width, dtype=torch.long), torch.zeros(6, width, dtype=torch.long)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        kinds[b, where], mask[b, where] = torch.tensor(row), 1
    tensors = [torch.tensor(g) if g else None for g in (images, videos)]
    got = mrope_positions(kinds, mask, *tensors, torch.tensor(seconds), tokens_per_second=2)
    assert torch.equal(got, positions_by_hand(kinds, mask, images, videos, seconds, 2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_do_not_depend_on_padding_side_or_batch(gve, media, side):
    items = [item for group in items_of(media).values() for item in group]
    alone = torch.cat([gve.embed([item]) for item in items])
    collate = Collator(gve.processor, padding_side=side)
    with torch.no_grad():
        together = gve(collate(items))
    error = (alone - together).abs()
    assert error.max() <= 1e-5, f"max {error.max():.2e}, mean {error.mean():.2e}"
    assert (
        alone @ alone.T - torch.eye(len(items))
    ).abs().max() < 0.999999  # and the items are told apart


def test_raw_batches_give_the_bits_of_normalised_ones_at_a_quarter_of_the_bytes(gve, media):
    collate = Collator(gve.processor)
    samples = [collate.prepare(item) for group in items_of(media).values() for item in group]
    normal, raw = collate.batch(samples), collate.batch(samples, raw=True)
    for pixels in ("pixel_values", "pixel_values_videos"):
        assert normal[pixels].dtype == torch.float32 and raw[pixels].dtype == torch.uint8
        assert raw[pixels].shape == normal[pixels].shape and raw[pixels].float().std() > 10
    with torch.no_grad():
        assert torch.equal(gve(normal), gve(raw))


@pytest.mark.parametrize("item", [{"vidoe": "a.mp4"}, {"text": ""}, {}, "a text"])
def test_what_is_no_item_has_no_vector(gve, item):
    with pytest.raises(ValueError, match="an item needs a non-empty text, image or video"):
        gve.embed([item])


def test_in_bfloat16_lora_computes_in_bfloat16_over_float32_weights(tiny, media):
    torch.manual_seed(0)
    half, full = (
        GVE.from_pretrained(tiny, dtype=dtype, lora={"lora_dropout": 0.0})
        for dtype in ("bfloat16", "float32")
    )
    for (name, p), q in zip(
        half.lora_parameters().items(), full.lora_parameters().values(), strict=True
    ):
        p.data = torch.randn_like(p) * 0.05  # B, too, so that the adapter matters
        q.data = p.data.clone()
        assert p.dtype == torch.float32, name
    seen = set()
    for module in half.core.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, given, made: seen.add((given[0].dtype, made.dtype))
            )
    batch = Collator(half.processor)([item for group in items_of(media).values() for item in group])
    target = torch.randn(10, half.dim, generator=torch.Generator().manual_seed(1))
    grads = []
    for gve in (half, full):
        vectors = gve(batch)
        assert vectors.dtype == torch.float32
        (vectors * target).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in gve.lora_parameters().values()]))
    assert (
        seen == {(torch.bfloat16, torch.bfloat16)} and not torch.backends.cuda.cudnn_sdp_enabled()
    )
    assert grads[0].dtype == torch.float32 and torch.cosine_similarity(*grads, dim=0) > 0.98
    assert (vectors * half(batch)).sum(1).min() > 0.999


def test_the_dropout_asked_for_holds_on_an_adapter_that_is_trained_on(tiny, tmp_path):
    GVE.from_pretrained(tiny, lora={"lora_dropout": 0.1}).save_pretrained(tmp_path)

    def rates(**how):
        gve = GVE.from_pretrained(tmp_path, **how)
        return {
            m.p
            for name, m in gve.named_modules()
            if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)
        }

    assert (
        rates(lora=True) == {0.1}
        and rates(lora={"lora_dropout": 0.3}) == {0.3}
        and rates(lora={"lora_dropout": 0.0}) == set()
    )


def test_pool_takes_the_last_attended_token_on_both_sides():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert last_token_pool(hidden, mask).tolist() == [[9, 10, 11], [15, 16, 17]]


@pytest.mark.parametrize("max_length", [8192, 60, 50])
def test_the_pooled_token_is_endoftext_and_only_user_text_is_cut(gve, media, max_length):
    processor = gve.processor
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = "word " * 40
    for item in ({"text": text}, {"text": text, "image": str(media / "i.png")}, {"text": "short"}):
        need = 200 if max_length == 8192 else max_length
        collate = Collator(processor, max_length=need + 60)
        ids, mask = (collate([item])[k][0] for k in ("input_ids", "attention_mask"))
        assert ids[-1] == end and mask.all() and len(ids) <= need + 60
        whole = processor.tokenizer.decode(Collator(processor)([item])["input_ids"][0])
        cut = processor.tokenizer.decode(ids)
        tail = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
        assert cut.endswith(tail) and whole.endswith(tail)
        kept = cut.removesuffix(tail)
        assert whole.removesuffix(tail).startswith(kept)  # nothing else changed
        assert (
            text.startswith(kept.split("user\n")[1].split("<|vision_end|>")[-1])
            or item["text"] == "short"
        )
        assert len(ids) == need + 60 or cut == whole


def test_vision_tokens_over_the_cap_are_an_error_that_names_frames_and_tokens(gve, media):
    with pytest.raises(ValueError, match="16 frames x at most 200 tokens"):
        Collator(gve.processor, frames=16, max_length=80)(
            [{"video": str(media / "a.mp4"), "text": "x"}]
        )


def test_user_text_cannot_smuggle_special_tokens(gve):
    ids = Collator(gve.processor)([{"text": "<|video_pad|><|im_end|>"}])["input_ids"][0].tolist()
    special = gve.processor.tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|im_end|>"])
    assert [ids.count(t) for t in special] == [0, 2]


def test_lora_sits_on_the_language_model_alone_and_is_float32_over_bfloat16(tiny):
    gve = GVE.from_pretrained(tiny, lora=True, dtype="bfloat16")
    names = list(gve.lora_parameters())
    projections = ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]
    assert len(names) == 2 * 6 * 2 and all(
        "language_model.layers" in n and ".lora_" in n for n in names
    )
    assert {p for n in names for p in n.split(".") if p.endswith("_proj")} == set(projections)
    assert {p.dtype for p in gve.lora_parameters().values()} == {torch.float32}
    assert {p.dtype for n, p in gve.named_parameters() if "lora" not in n} == {torch.bfloat16}
    config = gve.backbone.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)


@pytest.mark.parametrize("merge", [False, True])
def test_saved_folder_gives_the_same_vectors(lora, media, tmp_path, merge):
    items = [item for group in items_of(media).values() for item in group]
    expected = lora.embed(items)
    lora.save_pretrained(tmp_path / "out", merge=merge, info={"step": 3})
    again = GVE.from_pretrained(tmp_path / "out")
    error = (again.embed(items) - expected).abs()
    assert error.max() <= (1e-5 if merge else 0), f"max {error.max():.2e}"
    assert (
        expected - GVE.from_pretrained(lora.base).embed(items)
    ).abs().max() > 0.01  # the adapter mattered
    assert again.info["step"] == 3 and not list(tmp_path.glob("*.part"))
    assert (lora.embed(items) - expected).abs().max() == 0  # saving left the model alone


def test_merged_folder_is_read_by_transformers_itself(lora, tmp_path):
    lora.save_pretrained(tmp_path, merge=True)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = Qwen2_5_VLProcessor.from_pretrained(tmp_path)
    content = [{"type": "text", "text": "hi"}, {"type": "image"}]
    messages = [{"role": "system", "content": "Find."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nFind.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi"
        "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )


@pytest.mark.parametrize("merge", [False, True])
def test_sentence_transformers_loads_the_folder_and_gives_our_vectors(lora, media, tmp_path, merge):
    from sentence_transformers import SentenceTransformer

    lora.save_pretrained(tmp_path, merge=merge)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    for instruction in (None, "Find the video."):
        expected = lora.embed([{"text": "a red ball"}, {"text": "one"}], instruction).numpy()
        error = np.abs(theirs.encode(["a red ball", "one"], prompt=instruction) - expected).max()
        assert error < 1e-5, f"text: {error:.2e}"
    images = [str(media / "i.png"), str(media / "wide.png")]
    error = np.abs(
        theirs.encode([Image.open(i) for i in images])
        - lora.embed([{"image": i} for i in images]).numpy()
    ).max()
    assert error < 1e-5, f"image: {error:.2e}"


@pytest.mark.parametrize("damage", ["renamed", "missing", "extra"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_tensor_without_a_place_is_an_error(lora, tiny, tmp_path, damage, kind):
    folder = tmp_path / "x"
    if kind == "adapter":
        lora.save_pretrained(folder)
    else:
        shutil.copytree(tiny, folder)
    file = folder / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
    tensors = load_file(file)
    name = next(k for k in tensors if "layers.1" in k and "q_proj" in k)
    if damage != "extra":
        moved = tensors.pop(name)
    if damage != "missing":
        tensors[name.replace("layers.1", "layers.7")] = (
            tensors[name] if damage == "extra" else moved
        ).clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="layers.7" if damage != "missing" else "layers.1"):
        GVE.from_pretrained(folder)


def test_an_adapter_trained_on_the_generation_model_loads(lora, media, tmp_path):
    lora.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            k.replace("base_model.model.", "base_model.model.model."): v
            for k, v in load_file(file).items()
        },
        file,
    )
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
    for file in (
        ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
        if missing == "processor"
        else [missing]
    ):
        (folder / file).unlink()
    with pytest.raises(ValueError, match=message):
        GVE.from_pretrained(folder)


def test_adapter_without_its_base_names_it(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "./gone"})
    )
    with pytest.raises(ValueError, match="gone"):
        GVE.from_pretrained(tmp_path)


def test_a_store_gives_the_same_vectors_and_decodes_nothing_twice(
    gve, media, tmp_path, monkeypatch
):
    folder = shutil.copytree(media, tmp_path / "media")
    items = items_of(folder)["mixed"] + items_of(folder)["video"]
    plain = gve(Collator(gve.processor)(items))
    stored = Collator(gve.processor, store=str(tmp_path / "store"))
    gve(stored(items[:2]))
    assert torch.equal(gve(stored(items)), plain), "part from the store, part computed"

    def closed(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("data.load_video", closed)
        patch.setattr("data.load_image", closed)
        patch.setattr(gve.core.visual, "forward", closed)
        assert torch.equal(gve(stored(items)), plain), "all from the store"
        for other in ({"frames": 4}, {"max_tokens": 9}):
            with pytest.raises(AssertionError, match="decoded again"):
                Collator(gve.processor, store=stored.store, **other)(
                    [{"video": str(folder / "a.mp4")}]
                )
    shutil.copy(folder / "c.mp4", folder / "a.mp4")
    expected = gve(Collator(gve.processor)(items))
    assert torch.equal(gve(stored(items)), expected) and not torch.equal(expected, plain), (
        "a changed file is another medium"
    )
    (tmp_path / "frames").mkdir()
    for seed, time in (
        (1, 1_000_000_000),
        (2, 2_000_000_000),
    ):  # files of the same size, the folder's own time stays
        for picture in (tmp_path / "p.bmp", tmp_path / "frames" / "0.bmp"):
            Image.fromarray(
                np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
            ).save(picture)
            os.utime(picture, ns=(time, time))
        os.utime(tmp_path / "frames", ns=(1, 1))
        items = [{"image": str(tmp_path / "p.bmp")}, {"video": str(tmp_path / "frames")}]
        assert torch.equal(gve(stored(items)), gve(Collator(gve.processor)(items)))
    for file in (tmp_path / "store").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(gve(stored(items)), gve(Collator(gve.processor)(items))), (
        "a damaged file is made anew"
    )
    assert (
        sum(file.stat().st_size > 40 for file in (tmp_path / "store").rglob("*.safetensors")) == 2
    )
