"""support/flops.py: the rule for a step's FLOPs beside torch's own counter."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import Collator  # noqa: E402
from model import GVE  # noqa: E402
from support.flops import peak_flops, peak_memory_gib, step_flops  # noqa: E402


def counted_by_torch(gve, batch):
    """FLOPs of forward and backward as torch counts them. MATH: the fused kernels hide theirs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gve(batch).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["tiny", "mini/base"])
@pytest.mark.parametrize(
    "item",
    [
        {"text": "a text, and no more than that"},
        {"image": "wide.png", "text": "look"},
        {"video": "wide.mp4"},
        {"video": "a.mp4", "text": "at night"},
    ],
)
def test_a_step_costs_what_torch_counts_and_at_most_a_tenth_more(tiny, media, name, item):
    path = tiny if name == "tiny" else ROOT / name
    gve = GVE.from_pretrained(path, lora={"lora_dropout": 0.0}).train()
    item = {kind: value if kind == "text" else str(media / value) for kind, value in item.items()}
    batch = Collator(gve.processor)([item])
    expected = counted_by_torch(gve, batch)
    assert 1 < step_flops(gve)(batch) / expected < 1.1


def test_a_forward_pass_alone_costs_what_torch_counts(tiny, media):
    gve = GVE.from_pretrained(tiny, lora=True)
    batch = Collator(gve.processor)([{"video": str(media / "a.mp4"), "text": "at night"}])
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gve(batch)
    forward = step_flops(gve, backward=False)(batch)
    assert forward == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_trained_weights_cost_half_as_much_again(tiny):
    frozen = GVE.from_pretrained(tiny)
    trained = GVE.from_pretrained(tiny)
    trained.core.language_model.layers.requires_grad_(True)
    batch = Collator(frozen.processor)([{"text": "x"}])
    layers = frozen.core.language_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    tokens = batch["input_ids"].numel()
    more = step_flops(trained)(batch) - step_flops(frozen)(batch)
    assert more == 2 * weights * tokens


def test_padding_and_features_from_disk_cost_nothing(tiny, media):
    gve = GVE.from_pretrained(tiny, lora=True)
    flops = step_flops(gve)
    collate = Collator(gve.processor)
    items = [
        {"text": "x"},
        {"text": "a much longer text", "image": str(media / "i.png")},
        {"image": str(media / "wide.png")},
    ]
    whole = collate(items)
    apart = [flops(collate([item])) for item in items]
    assert flops(whole) == sum(apart)

    known = gve.encode_vision(whole)
    half_known = known | {"image_features": [None, known["image_features"][1]]}
    assert flops(known) < flops(half_known) < flops(whole)
    first = collate(items[1:2])
    tower = apart[1] - flops(gve.encode_vision(first))  # the vision tower over the first image
    assert flops(half_known) - flops(known) == tower


def test_peaks_are_those_of_known_gpus_in_bfloat16(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(cuda, "bfloat16") == 989e12
    assert peak_flops(cuda, "float32") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(cuda, "bfloat16") is None


def test_peak_memory_is_at_least_that_of_the_arrays_held():
    held = torch.ones(64, 2**20)  # 256 MiB
    assert peak_memory_gib(torch.device("cpu")) > held.numel() * 4 / 2**30
