"""The embedded model: segment_anything's own classes, small enough to adapt on two processor cores in a minute."""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

SIDE, PATCH, WIDTH, DEPTH, HEADS, CHANNELS = 192, 8, 144, 6, 3, 96


def build_nano() -> Sam:
    """A SAM with random weights: 192 px input, 24 x 24 embedding of 96 channels, masks of 96 x 96."""
    grid = SIDE // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=3,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=False, window_size=8,
            global_attn_indexes=(2, 5), out_chans=CHANNELS,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=CHANNELS, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=384, num_heads=4),
            transformer_dim=CHANNELS, iou_head_depth=3, iou_head_hidden_dim=CHANNELS,
        ),
    )  # fmt: skip
