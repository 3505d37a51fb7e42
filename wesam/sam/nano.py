"""The embedded model: segment_anything's own classes, small enough to adapt on two processor cores in a minute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the model is; the defaults are those of the weights that ship with the project."""

    side: int = 192
    """Pixels of the longer side of the input."""
    patch: int = 8
    """Pixels of the side of a token; masks have 4 x 4 cells a token."""
    stem: bool = False
    """Tokens come from a few strided convolutions, instead of SAM's single one."""
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


class Stem(nn.Module):
    """Strided 3 x 3 convolutions from pixels to tokens, in place of SAM's PatchEmbed.

    [B, 3, side, side] -> [B, side / patch, side / patch, width]; patch is a power of two.
    """

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        widths = [3, *(max(24, width >> i) for i in range(halvings - 1, 0, -1)), width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(1, after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The tokens of normalised images."""
        out: Tensor = self.layers(images).permute(0, 2, 3, 1)
        return out


def build_nano(shape: Shape | None = None) -> Sam:
    """A SAM with random weights; with the default shape 192 px input, 24 x 24 embedding, masks of 96 x 96."""
    s = shape or Shape()
    grid = s.side // s.patch
    sam = Sam(
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
    if s.stem:
        sam.image_encoder.patch_embed = Stem(s.patch, s.width)
    return sam
