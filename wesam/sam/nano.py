"""The embedded model: segment_anything's own classes, small enough to adapt on two processor cores in a minute."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

SHAPE = "shape"
"""Under this name a weights file says, as JSON, what shape its model has, if another than the default."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the model is; the defaults are those of the weights that ship with the project."""

    side: int = 192
    """Pixels of the longer side of the input."""
    patch: int = 8
    """Pixels of the side of a token; masks have 4 x 4 cells a token."""
    width: int = 144
    """Channels of the encoder's tokens."""
    depth: int = 6
    """Blocks of the encoder."""
    heads: int = 3
    """Attention heads of a block."""
    window: int = 8
    """Tokens of the side of an attention window."""
    whole: tuple[int, ...] = (2, 5)
    """The blocks that attend over the whole image."""
    channels: int = 96
    """Channels of the embedding and of the decoder."""


def said_shape(shape: Shape) -> dict[str, str]:
    """What a weights file says of its model's shape."""
    return {SHAPE: json.dumps(dataclasses.asdict(shape))}


def shape_of(sam: Sam) -> Shape:
    """The shape of a model that :func:`build_nano` made."""
    encoder = sam.image_encoder
    windows = [b.window_size for b in encoder.blocks]
    return Shape(
        side=encoder.img_size, patch=encoder.patch_embed.proj.kernel_size[0], width=encoder.pos_embed.shape[-1],
        depth=len(windows), heads=encoder.blocks[0].attn.num_heads, window=max(windows),
        whole=tuple(i for i, w in enumerate(windows) if w == 0), channels=sam.prompt_encoder.embed_dim,
    )  # fmt: skip


def build_nano(shape: Shape | None = None) -> Sam:
    """A SAM with random weights; with the default shape 192 px input, 24 x 24 embedding, masks of 96 x 96."""
    s = shape or Shape()
    grid = s.side // s.patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=s.side, patch_size=s.patch, embed_dim=s.width, depth=s.depth, num_heads=s.heads, mlp_ratio=3,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=False, window_size=s.window,
            global_attn_indexes=s.whole, out_chans=s.channels,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=s.channels, image_embedding_size=(grid, grid), input_image_size=(s.side, s.side), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=s.channels, mlp_dim=4 * s.channels, num_heads=4),
            transformer_dim=s.channels, iou_head_depth=3, iou_head_hidden_dim=s.channels,
        ),
    )  # fmt: skip
