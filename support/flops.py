"""What a training step costs, for MFU."""

import math
import resource

import torch

PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,  # from the maker's data sheets
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def peak_memory_gib(device):
    """Peak GiB: of the GPU where there is one, else of this process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process) / 2**30


def peak_flops(device, dtype):
    """Operations a second that this GPU promises in dense bfloat16; None for others and where nobody has looked it up."""
    return (
        PEAK.get(torch.cuda.get_device_name(device))
        if device.type == "cuda" and dtype == "bfloat16"
        else None
    )


def multiply_adds(gve):
    """Return a function: collated batch -> the multiply-adds that one training step needs for it, the vision tower and the
    language model forward and, for LoRA's sake, the latter backward.

    Not counted: padding, gradients of frozen weights, recomputation, what causality or a vision window hides, norms, the loss.
    Counted although only the pooled token needs it: the last layer of all other tokens.
    """
    text, vision, visual = (
        gve.core.config.text_config,
        gve.core.config.vision_config,
        gve.core.visual,
    )
    layers, merge, full = (
        gve.core.language_model.layers,
        vision.spatial_merge_size,
        len(vision.fullatt_block_indexes),
    )
    weights = {
        name: m.weight.numel()
        for name, m in layers.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    lora = sum(
        n for name, n in weights.items() if ".lora_" in name
    )  # these have a gradient of their own
    first = sum(
        n
        for name, n in weights.items()  # the embeddings, which these read, need none
        if name.startswith("0.self_attn") and ".o_proj" not in name and ".lora_B" not in name
    )
    per_token = 2 * sum(weights.values()) + lora - first
    per_pair = (
        6 * text.num_hidden_layers * text.num_attention_heads * layers[0].self_attn.head_dim
    )  # scores, values; thrice
    matrices = {name: p.numel() for name, p in visual.named_parameters() if p.dim() > 1}
    per_patch = sum(
        n / merge**2 if name.startswith("merger") else n for name, n in matrices.items()
    )
    window = (
        vision.window_size // vision.patch_size // merge
    )  # its side in cells of merge x merge patches

    def count(batch):
        macs = sum(
            n * per_token + n * (n + 1) // 2 * per_pair
            for n in batch["attention_mask"].sum(1).tolist()
        )
        for kind in ("image", "video"):
            grids = batch[f"{kind}_grid_thw"].tolist() if f"{kind}_grid_thw" in batch else []
            known = batch.get(
                f"{kind}_features", [None] * len(grids)
            )  # those from the store cost nothing
            for t, h, w in (
                grid for grid, features in zip(grids, known, strict=True) if features is None
            ):
                sides = (
                    [min(window, n // merge - at) for at in range(0, n // merge, window)]
                    for n in (h, w)
                )
                near = merge**4 * math.prod(
                    sum(n * n for n in side) for side in sides
                )  # pairs of patches that share a window
                macs += t * h * w * per_patch + 2 * vision.hidden_size * t * (
                    full * (h * w) ** 2 + (vision.depth - full) * near
                )
        return macs

    return count
