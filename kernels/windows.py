"""Qwen-VL's vision tower without flash-attention: few attention calls and no convolution.

transformers' sdpa makes one call per window and layer; in a tower without windows (Qwen2-VL,
Qwen3-VL), a frame is the window. The windows of any batch have few distinct lengths, and windows of
one length can share a call.

Legend: P patches, H heads, d head dim, W windows of one length n.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_
):
    """Attend inside the vision tower's windows, with one call per window length.

    The signature is transformers'. query, key, value (1, H, P, d) in window order;
    cu_seq_lens_q (windows + 1,): boundaries of the windows along P -> (1, P, H, d), None
    """
    # All blocks of a forward share this tensor, so it carries the windows from one to the next:
    # to find them waits for the GPU (a sync point).
    if not hasattr(cu_seq_lens_q, "windows"):
        starts = cu_seq_lens_q[:-1]
        lengths = cu_seq_lens_q.diff()  # (windows,)
        cu_seq_lens_q.windows = []
        for n in lengths.unique().tolist():
            offsets = torch.arange(n, device=query.device)
            cu_seq_lens_q.windows.append(starts[lengths == n][:, None] + offsets)  # (W, n)

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (P, H, d)
    out = torch.empty_like(q)
    for window in cu_seq_lens_q.windows:  # (W, n) indices along P
        attended = F.scaled_dot_product_attention(
            q[window].transpose(1, 2),  # (W, H, n, d)
            k[window].transpose(1, 2),
            v[window].transpose(1, 2),
            scale=scaling,
        )
        out[window] = attended.transpose(1, 2)
    return out[None], None


# transformers hands all windows to one call only if the name of the attention contains "flash".
NAME = "flash_windows"
ALL_ATTENTION_FUNCTIONS.register(NAME, window_attention)


class PatchEmbed(nn.Module):
    """The projection of patches as one matrix product.

    Its convolution has a kernel as large as the input, and conv3d is slower than the product.
    `install` makes an object of this class from the tower's own, so `proj` is the tower's.
    """

    def forward(self, patches):
        """Project flattened patches: (P, channels x frames x height x width) -> (P, width)."""
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def install(visual):
    """Give a loaded vision tower this attention and this projection."""
    visual.config._attn_implementation = NAME
    visual.patch_embed.__class__ = PatchEmbed
