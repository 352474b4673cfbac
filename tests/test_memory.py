"""memory.py: the arithmetic beside every storage that torch makes, and beside a process."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLConfig

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from real_size import real_config  # noqa: E402

import memory  # noqa: E402
import train  # noqa: E402
from kernels.infonce import CPU_BLOCK, info_nce_dist  # noqa: E402
from memory import (  # noqa: E402
    BatchShape,
    PeakMemory,
    StepMemory,
    largest_that_fits,
    loss_bytes,
    peak_bytes,
)
from model import BACKBONES, GVE, add_adapter  # noqa: E402
from support.flags import parse_flags  # noqa: E402


class StorageTracker(TorchDispatchMode):
    """Follow every storage from the operation that makes it to its end; peak: most bytes at once.

    Knows nothing of the arithmetic, and sees what autograd saves, as well as what it computes.
    """

    def __init__(self, existing=()):
        super().__init__()
        self.alive = {}  # the storage's address: (bytes, a reference that tells of its end)
        self.now = 0
        self.peak = 0
        for tensor in existing:
            self.follow(tensor)

    def follow(self, tensor):
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.alive:
            return
        size = storage.nbytes()
        self.alive[address] = size, weakref.ref(storage, lambda _: self.forget(address))
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, address):
        size, _ = self.alive.pop(address)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        return made


SIZES = {
    "tiny": dict(hidden=64, intermediate=176, layers=2, vision=32, vision_layers=2),
    "middle": dict(hidden=192, intermediate=768, layers=5, vision=80, vision_layers=3),
}


def make_gve(size, dtype, dropout, checkpointing):
    """A random Qwen2.5-VL with LoRA, ready to train."""
    sizes = SIZES[size]
    head = sizes["hidden"] // 4
    mrope_section = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    rope = {"rope_type": "default", "mrope_section": mrope_section, "rope_theta": 1e4}
    text = dict(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        bos_token_id=1,
        eos_token_id=1,
        rope_parameters=rope,
    )
    vision = dict(
        depth=sizes["vision_layers"],
        hidden_size=sizes["vision"],
        intermediate_size=2 * sizes["vision"],
        num_heads=2,
        out_hidden_size=sizes["hidden"],
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    torch.manual_seed(0)
    spec = BACKBONES["qwen2_5_vl"]
    core = spec.model_class._from_config(config, dtype=dtype, attn_implementation="sdpa")
    core.requires_grad_(False)
    spec.install_fixes(core.visual)
    backbone = add_adapter(core, spec, {"lora_dropout": dropout})
    for module in backbone.modules():  # as GVE.from_pretrained does
        module.cast_input_dtype_enabled = dtype != torch.bfloat16
    gve = GVE(backbone, None, spec).train()
    if checkpointing:
        gve.core.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return gve


def make_batch(kind, items, length):
    """A collated micro-batch of random texts or videos -> (batch, its shape)."""
    ids = torch.randint(10, 300, (items, length))
    types = torch.zeros_like(ids)
    batch = {"input_ids": ids, "mm_token_type_ids": types}
    patches = 0
    if kind == "videos":
        grid = (4, 8, 2 * ((length - 20) // 16))  # in patches; four of them are a token
        tokens = grid[0] * grid[1] * grid[2] // 4
        ids[:, 8 : 8 + tokens] = 6
        types[:, 8 : 8 + tokens] = 2
        patches = items * 4 * tokens
        batch["pixel_values_videos"] = torch.randn(patches, 1176)
        batch["video_grid_thw"] = torch.tensor([grid] * items)
        batch["second_per_grid_ts"] = torch.ones(items)
    batch["attention_mask"] = torch.ones_like(ids)
    if items > 1:
        batch["attention_mask"][-1, -1] = 0
    return batch, BatchShape(items, length, patches)


def count_step(gve, batch, grad_cache):
    """Run two steps of one micro-batch -> bytes at the peak of each moment of the second."""
    lora = gve.lora_parameters().values()
    optimizer = torch.optim.AdamW(lora)
    for _ in range(2):
        # The second step finds gradients and AdamW's state.
        existing = list(gve.parameters())
        existing += [p.grad for p in lora if p.grad is not None]
        for state in optimizer.state.values():
            existing += [state["exp_avg"], state["exp_avg_sq"]]

        peaks = {}
        with StorageTracker([*existing, *batch.values()]) as tracker:
            encoded = batch
            if "pixel_values_videos" in batch:
                pixels = batch["pixel_values_videos"].nbytes
                encoded = gve.encode_vision(batch)
                # A real loader's pixels are bytes, which stay beside the floats followed here.
                peaks["vision tower"] = tracker.peak + pixels // 4
                tracker.now -= pixels  # dropped once they are features
                tracker.peak = tracker.now
            cache = train.GradCache(gve, torch.zeros(0, gve.dim))
            vectors = cache.forward([encoded]) if grad_cache else gve(encoded)
            vectors.square().sum().backward()
            if grad_cache:
                cache.backward()
            peaks["language model"] = tracker.peak
        optimizer.step()
        del encoded, vectors, cache
    return peaks


def count_of(gve, grad_cache=True, checkpointing=True, dropout=0.0):
    """The arithmetic of a model on a CPU."""
    return StepMemory(
        gve.core,
        grad_cache=grad_cache,
        checkpointing=checkpointing,
        dropout=dropout,
        device_type="cpu",
    )


def predicted_and_counted(size, kind, dtype, checkpointing, dropout, grad_cache, items, length):
    """Peaks of one micro-batch by the arithmetic and by the tracker -> {moment: (bytes, bytes)}."""
    gve = make_gve(size, dtype, dropout, checkpointing)
    batch, shape = make_batch(kind, items, length)
    count = count_of(gve, grad_cache, checkpointing, dropout)
    moments = count.micro_batch(shape)
    counted = count_step(gve, batch, grad_cache)
    return {name: (sum(moments[name].values()), peak) for name, peak in counted.items()}


OPTIONS = [
    # size, kind, dtype, checkpointing, dropout, GradCache
    ("middle", "texts", torch.bfloat16, True, 0.1, True),  # the gve presets'
    ("middle", "videos", torch.float32, False, 0.0, False),  # the mini preset's
]
MORE_OPTIONS = []
for size in SIZES:
    for kind in ("texts", "videos"):
        for dtype in (torch.float32, torch.bfloat16):
            for checkpointing in (False, True):
                for dropout in (0.0, 0.1):
                    for cached in (False, True):
                        MORE_OPTIONS.append((size, kind, dtype, checkpointing, dropout, cached))


@pytest.mark.parametrize(
    "option",
    [*OPTIONS, *[pytest.param(option, marks=pytest.mark.slow) for option in MORE_OPTIONS]],
    ids=lambda option: "-".join(str(part).removeprefix("torch.") for part in option),
)
def test_the_arithmetic_is_within_a_twentieth_of_every_storage_that_a_step_makes(option):
    peaks = predicted_and_counted(*option, items=4, length=132)
    for moment, (predicted, counted) in peaks.items():
        assert abs(predicted / counted - 1) < 0.05, (moment, predicted, counted)


def test_an_item_alone_has_no_mask():
    option = ("tiny", "texts", torch.float32, True, 0.0, True)
    peaks = predicted_and_counted(*option, items=1, length=600)
    predicted, counted = peaks["language model"]
    assert abs(predicted / counted - 1) < 0.05, (predicted, counted)


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_takes_what_the_arithmetic_says(fused, negatives):
    rows, dim = 1500, 72
    made = []
    for count in (rows, rows, rows * negatives):
        made.append(F.normalize(torch.randn(count, dim), dim=1).requires_grad_())
    ids = torch.arange(rows * (2 + negatives))
    p_ids = ids[:rows]
    n_ids = ids[2 * rows :]

    with StorageTracker(made) as tracker:
        q, p, n = [vectors[torch.arange(len(vectors))] for vectors in made]
        names = dict(p_ids=p_ids, n_ids=n_ids, q_ids=p_ids, margin=0.1)
        if fused:
            loss = info_nce_dist(q, p, 1 / 0.03, n=n, **names, impl="torch")
        else:
            loss = train.contrastive_loss(q, p, n, tau=0.03, **names)
        loss.backward()
        train.curve_sums(q, p, n, p_ids, n_ids, p_ids)
    workspace = 2 * CPU_BLOCK**2 * 4 if fused else None
    predicted = loss_bytes(rows, rows * (1 + negatives), dim, workspace=workspace)
    assert abs(predicted / tracker.peak - 1) < 0.1, (predicted, tracker.peak)


def embed_role(gve, cache, encoded, grad_cache):
    """A role's micro-batches, as train.py's loop embeds them -> (n, D)."""
    if grad_cache:
        return cache.forward(encoded)
    return torch.cat([*map(gve, encoded)])


@pytest.mark.parametrize(
    ("grad_cache", "checkpointing"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_a_whole_step_keeps_what_the_arithmetic_says(grad_cache, checkpointing):
    gve = make_gve("tiny", torch.float32, dropout=0.0, checkpointing=checkpointing)
    batches = {"texts": [], "videos": []}
    roles = []
    for kind, length in (("texts", 40), ("videos", 180)):
        for _ in range(6):
            batch, shape = make_batch(kind, 2, length)
            batches[kind].append(batch)
        roles.append(shape.resized(12))

    lora = gve.lora_parameters().values()
    for parameter in lora:
        parameter.grad = torch.zeros_like(parameter)
    with StorageTracker([*gve.parameters(), *[p.grad for p in lora]]) as tracker:
        caches = {kind: train.GradCache(gve, torch.zeros(0, gve.dim)) for kind in batches}
        vectors = {}
        for kind in batches:
            encoded = map(gve.encode_vision, batches[kind])
            vectors[kind] = embed_role(gve, caches[kind], encoded, grad_cache)
        (vectors["texts"] @ vectors["videos"].T).sum().backward()
        for cache in caches.values():
            if grad_cache:
                cache.backward()

    count = count_of(gve, grad_cache, checkpointing)
    moments = count.step(roles, loss_bytes(12, 12, gve.dim), micro_batch=2, micro_tokens=0)
    sums = {}
    for moment, terms in moments.items():
        sums[moment] = sum(terms.values()) - terms["AdamW"]  # no optimiser here
    sums["vision tower"] -= moments["vision tower"]["inputs"]  # the loader's, not followed here
    assert abs(max(sums.values()) / tracker.peak - 1) < 0.1, (sums, tracker.peak)


def test_a_step_counts_its_other_micro_batches_in_every_moment():
    """By hand: with GradCache, three int64 a token, and a feature of 64 floats a vision token."""
    count = count_of(make_gve("tiny", torch.float32, dropout=0.0, checkpointing=True))
    texts = BatchShape(12, 40)
    videos = BatchShape(12, 180, patches=12 * 640)
    moments = count.step([texts, videos], loss=0, micro_batch=2, micro_tokens=0)
    of_texts = 40 * 3 * 8
    of_videos = 180 * 3 * 8 + 160 * 64 * 4
    everything = 12 * (of_texts + of_videos)
    assert moments["loss"]["other micro-batches"] == everything
    for moment in ("vision tower", "language model"):  # two videos are under way
        assert moments[moment]["other micro-batches"] == everything - 2 * of_videos


def test_as_many_items_fit_as_the_memory_holds():
    gve = make_gve("tiny", torch.float32, dropout=0.1, checkpointing=True)
    count = count_of(gve, dropout=0.1)
    shape = BatchShape(1, 300)
    for free in (5e7, 3e8):
        items = largest_that_fits(count, shape, free)
        assert peak_bytes(count.micro_batch(shape.resized(items))) <= free
        assert peak_bytes(count.micro_batch(shape.resized(items + 1))) > free
    assert largest_that_fits(count, shape, 1e6) == 0


def test_the_peak_of_a_process_is_measured():
    with PeakMemory(torch.device("cpu")) as peak:
        held = torch.ones(40, 2**20)  # 160 MiB
        del held
    assert abs(peak.rise / (160 * 2**20) - 1) < 0.05


# The command


def parse(*words):
    """The flags of a dry run of train.py."""
    return parse_flags(train.Flags, presets=train.PRESETS, argv=["--dry-run", *words])


def config_folder(folder, size):
    """A folder that holds a released checkpoint's config.json and nothing else."""
    real_config(size).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


def dry_run(capsys, *words):
    """What `python train.py --dry-run` prints, in this process."""
    assert train.main(parse(*words)) is None  # nothing was tried
    return capsys.readouterr().out


# Parameters of the released checkpoints' towers and language models, their files' sum without the
# output projection; six projections of every layer with LoRA of rank 16.
WEIGHTS = {"3b": ("3,754,622,976", "27,574,272"), "7b": ("7,747,169,280", "37,158,912")}


@pytest.mark.parametrize("size", ["3b", pytest.param("7b", marks=pytest.mark.slow)])
def test_a_config_alone_is_enough_for_the_arithmetic(size, tmp_path, capsys):
    base = config_folder(tmp_path / "base", size)
    out = tmp_path / "out"
    printed = dry_run(capsys, "--preset", f"gve-{size}", "--base", base, "--out", str(out))
    frozen, trained = WEIGHTS[size]
    assert f"{frozen} frozen weights in bfloat16, {trained} of LoRA" in printed
    assert "no weights, so nothing was tried" in printed
    assert "A whole step of the source that needs most" in printed
    assert not out.exists()

    # bfloat16: two bytes; LoRA in float32 with AdamW: sixteen
    weights = int(frozen.replace(",", "")) * 2 / 2**30
    lora = int(trained.replace(",", "")) * 16 / 2**30
    rows = {}
    for line in printed.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(name, [float(c) for c in cells if re.fullmatch(r"[0-9.]+", c)])
    assert abs(rows["base weights"][0] - weights) < 1e-3
    total = rows["LoRA weights"][0] + rows["LoRA gradients"][0] + rows["AdamW"][0]
    assert abs(total - lora) < 2e-3


def test_an_adapter_is_counted_from_its_base_s_config():
    core, _ = memory.backbone_on_meta(parse("--base", str(ROOT / "mini/prober")))
    config = json.loads((ROOT / "mini/prober/adapter_config.json").read_text())
    assert memory.lora_rank(core) == config["r"]
    assert all(weight.is_meta for weight in core.parameters())
    stored = load_file(ROOT / "mini/prober/adapter_model.safetensors")
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    assert trained == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("T", (1, 128, 0)),
        ("I", (1, 256 + 22, 1024)),
        ("TI", (1, 256 + 22 + 128, 1024)),
        ("V", (1, 4 * 196 + 22, 3136)),
        ("TV", (1, 4 * 196 + 22 + 128, 3136)),
    ],
)
def test_a_task_s_items_have_their_media_s_tokens(form, shape):
    # 200 tokens a frame are 14 x 14, two frames a grid; four patches a token.
    shapes = memory.item_shapes(parse(), prompt=20, merge=4)
    assert dataclasses.astuple(memory.item_of_form(form, shapes)) == shape


@pytest.mark.slow
def test_a_hub_id_of_which_only_the_config_is_cached(tmp_path):
    folder = tmp_path / "models--someone--a-model"
    config_folder(folder / "snapshots" / ("0" * 40), "3b")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    words = ["--preset", "gve-3b", "--base", "someone/a-model", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", "--dry-run", *words]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "someone/a-model: no weights, so nothing was tried" in run.stdout


MINI = [
    "--micro-tokens 6500 --max-length 3000",
    "--micro-tokens 6500 --max-length 3000 --fused on --dropout 0.1",
    "--micro-tokens 16384 --max-length 3000 --checkpointing --fused off",
    "--micro-tokens 16384 --max-length 3000 --checkpointing --grad-cache --fused on",
    "--micro-tokens 6500 --max-length 3000 --grad-cache --dropout 0.1",
    "--micro-tokens 16384 --max-length 3000 --grad-cache --checkpointing --dtype bfloat16",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", MINI)
def test_a_process_takes_what_the_dry_run_of_the_mini_model_says(words):
    command = [sys.executable, "train.py", "--dry-run", "--device", "cpu", *words.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    line = r"\d+ (\w+) of \d+ tokens in a forward: (.*) GiB at peak, (.*) GiB by arithmetic"
    tried = re.findall(line, run.stdout)
    print(words, tried)
    assert [kind for kind, _, _ in tried] == ["videos", "texts"]
    for kind, measured, predicted in tried:
        assert abs(float(predicted) / float(measured) - 1) < 0.1, (kind, measured, predicted)
