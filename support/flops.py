"""The cost of a training step, for MFU: the share of a GPU's peak that the arithmetic makes use of.

    flops = step_flops(gve)
    done = flops(batch)                          # of one collated micro-batch, forward and backward
    mfu = done / seconds / peak_flops(device, "bfloat16")

The rule is that of nanoGPT's estimate_mfu (6N + 12LHQT per token; PaLM, arXiv 2204.02311, appendix
B) with two changes: a frozen weight has no gradient of its own and costs 4 instead of 6, and the
vision tower only runs forward.
"""

import resource

import torch

# Dense bfloat16 FLOPs per second, from the makers' data sheets.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def peak_flops(device, dtype):
    """Return a device's peak in FLOPs per second; None for another dtype or if PEAK lacks it."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return PEAK.get(torch.cuda.get_device_name(device))


def peak_memory_gib(device):
    """Return the peak memory so far in GiB: the GPU's if `device` is one, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def step_flops(gve, backward=True):
    """Return a function: collated micro-batch -> FLOPs (float) of its forward and backward pass.

    backward: False counts the forward pass alone, which is what encoding costs.

    Not counted: padding, features that were on disk, recomputation (GradCache, checkpointing),
    norms, softmax, the loss. Causal attention counts in full, although half of it is masked.
    Against torch's own counter the rule is 1 to 5 % too high on models of two to four layers,
    because it forgets that the first layer's input needs no gradient; the error shrinks with depth
    (tests/test_flops.py).

    The batch should still be on the CPU: reading its counts from a GPU would wait for the GPU.
    """
    text = gve.core.config.text_config
    vision = gve.core.config.vision_config
    geometry = gve.geometry
    layers = gve.core.language_model.layers

    # Language model, per weight and token: 2 forward, 2 for the gradient of the input,
    # and 2 more for the gradient of the weight if it is trained.
    per_token = 0
    for weight in layers.parameters():
        if weight.dim() == 2:
            per_token += 2 * weight.numel()
            if backward:
                per_token += 2 * weight.numel()
            if backward and weight.requires_grad:
                per_token += 2 * weight.numel()

    # Attention, per pair of tokens and channel: 2 for scores, 2 for values, twice that backward.
    channels = text.num_attention_heads * layers[0].self_attn.head_dim
    per_channel = 12 if backward else 4
    per_token_pair = per_channel * channels * text.num_hidden_layers

    # Vision tower, forward only. The merger sees one token where the blocks see several patches.
    per_patch = 0
    for name, weight in gve.core.visual.named_parameters():
        if weight.dim() > 1 and not name.startswith("pos_embed"):  # a table is no product
            patches = geometry.merge_size**2 if "merger" in name else 1
            per_patch += 2 * weight.numel() / patches
    per_patch_pair = 4 * geometry.tower_width

    # Some layers attend within a whole frame, the others within windows of it.
    frame_layers = geometry.frame_layers
    window_layers = vision.depth - frame_layers
    side = geometry.window_size // geometry.patch_size  # of a window, in patches

    def flops(batch):
        tokens = batch["attention_mask"].sum(1).double()  # (B,)
        total = per_token * tokens.sum() + per_token_pair * (tokens**2).sum()

        for kind in ("image", "video"):
            if f"{kind}_grid_thw" not in batch:
                continue
            grids = batch[f"{kind}_grid_thw"]
            features = batch.get(f"{kind}_features") or [None] * len(grids)
            fresh = [i for i, known in enumerate(features) if known is None]
            t, h, w = grids[fresh].double().T
            window = h.clamp(max=side) * w.clamp(max=side)
            pairs = t * h * w * (frame_layers * h * w + window_layers * window)
            total += per_patch * (t * h * w).sum() + per_patch_pair * pairs.sum()
        return float(total)

    return flops
