"""MobileSAM's encoder, on timm's TinyViT: ``vit_t``."""

from __future__ import annotations

import re
from typing import Any

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn


class TinyEncoder(nn.Module):
    """TinyViT-5M without its head, its last stage at the resolution of the one before, and SAM's neck.

    It is to stay in evaluation mode: its batch norms then use what they learnt, whatever the batch.
    """

    def __init__(self, img_size: int = 1024, channels: int = 256) -> None:
        """img_size: pixels of the side of the input, a multiple of 16. channels: of the embedding."""
        super().__init__()
        self.img_size = img_size
        body: Any = TinyVit(
            embed_dims=(64, 128, 160, 320), depths=(2, 2, 6, 2), num_heads=(2, 4, 5, 10), window_sizes=(7, 7, 14, 7),
            drop_path_rate=0.0, num_classes=0,
        )  # fmt: skip
        body.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.patch_embed, self.stages = body.patch_embed, body.stages
        self.neck = nn.Sequential(
            nn.Conv2d(320, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, channels, side / 16, side / 16]."""
        out: Tensor = self.neck(self.stages(self.patch_embed(images)))
        return out


def build_tiny(side: int = 1024) -> Sam:
    """MobileSAM with random weights. side: pixels of the side of its input."""
    grid = side // 16
    return Sam(
        image_encoder=TinyEncoder(side),
        prompt_encoder=PromptEncoder(
            embed_dim=256, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256,
        ),
    )  # fmt: skip


def from_mobile_sam(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``mobile_sam.pt`` under the names that :func:`build_tiny` has; others stay as they are.

    There a stage ends with the downsampling that timm begins the next one with, and a classifier is left over.
    """
    if not any(k.startswith("image_encoder.layers.") for k in state):
        return state
    renamed = {}
    for name, value in state.items():
        if re.match(r"image_encoder\.(head|norm_head)\.", name) or name.endswith("attention_bias_idxs"):
            continue
        new = re.sub(r"\.c\.", ".conv.", name)
        new = re.sub(r"patch_embed\.seq\.([02])\.", lambda m: f"patch_embed.conv{1 + int(m[1]) // 2}.", new)
        new = re.sub(r"encoder\.layers\.(\d)\.downsample", lambda m: f"encoder.stages.{int(m[1]) + 1}.downsample", new)
        renamed[new.replace("encoder.layers.", "encoder.stages.")] = value
    return renamed
