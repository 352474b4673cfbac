"""The true sizes of Qwen2.5-VL-3B and -7B, for arithmetic and for random models of that size.

A config says all that memory and speed depend on; the weights need not be there. The numbers are
those of the checkpoints' config.json (Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct).
"""

from transformers import Qwen2_5_VLConfig

TEXT = {
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
}
TIED = {"3b": True, "7b": False}  # is the output projection the input embedding?


def real_config(size):
    """Return the Qwen2_5_VLConfig of the 3B ("3b") or 7B ("7b") checkpoint."""
    text = TEXT[size] | dict(
        rms_norm_eps=1e-6,
        max_position_embeddings=128000,
        rope_parameters={
            "rope_type": "default",
            "mrope_section": [16, 24, 24],
            "rope_theta": 1000000.0,
        },
        bos_token_id=151643,
        eos_token_id=151645,
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=TEXT[size]["hidden_size"],
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=TIED[size],
    )
