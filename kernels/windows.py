"""Qwen2.5-VL's vision tower without flash-attention: no loop over its windows, and no convolution where a product does.

transformers' sdpa makes one call per window and layer; the windows of any batch have few distinct lengths, so few calls suffice.
"""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_
):
    """Attend inside the vision tower's windows, one call per window length, where transformers' sdpa makes one per window.

    query, key, value (1, H, P, d) in window order; cu_seq_lens_q (windows + 1,) boundaries along P -> (1, P, H, d), None
    """
    out = torch.empty_like(query[0].transpose(0, 1))  # (P, H, d)
    if not hasattr(
        cu_seq_lens_q, "windows"
    ):  # kept on the tensor, which all blocks of a forward share: this waits for the GPU
        lengths = cu_seq_lens_q.diff()  # (windows,)
        cu_seq_lens_q.windows = [
            cu_seq_lens_q[:-1][lengths == n][:, None] + torch.arange(n, device=query.device)
            for n in lengths.unique().tolist()
        ]
    for at in cu_seq_lens_q.windows:  # (W, n) the windows of one length n
        q, k, v = (
            x[0].transpose(0, 1)[at].transpose(1, 2) for x in (query, key, value)
        )  # (W, H, n, d)
        out[at] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out[None], None


NAME = "flash_windows"  # only a "flash" is handed all windows at once
ALL_ATTENTION_FUNCTIONS.register(NAME, window_attention)


class PatchEmbed(Qwen2_5_VisionPatchEmbed):
    """The projection of patches as one matrix product: a kernel as large as its input needs no conv3d, which is slower."""

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)  # (D, C*2*14*14)
        return F.linear(patches.to(weight.dtype), weight)  # (P, D)


def install(visual):
    """Give a loaded vision tower both."""
    visual.config._attn_implementation, visual.patch_embed.__class__ = NAME, PatchEmbed
