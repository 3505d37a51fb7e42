"""Prompts where there are no labels at all: clicks on a grid, of which the source model keeps those that it is sure of.

What SAM's automatic mask generator does, with the mask that the rest of this package uses: a click is kept if the mask
that answers it has a high predicted IoU and is stable, and of clicks that are answered by the same mask the surest.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import calculate_stability_score
from torch import Tensor

from wesam.config import GridConfig
from wesam.prompts import Prompts
from wesam.sam.promptable import CHUNK, decode, encode

OVERLAP = 0.7
"""Masks of a higher IoU are of the same thing. SAM's own, there of the masks' boxes."""


@torch.no_grad()
def grid_prompts(sam: Sam, image: Tensor, config: GridConfig) -> Prompts:
    """The clicks that this model keeps in an image, uint8 [3, h, w] with its longer side at the input size.

    Returns M >= 1 prompts of one click on the object each, in pixels of this image, the surest first. If the model is
    sure of none, the one that it is surest of.
    """
    given = _grid(sam, image, config.points_per_side)
    embedding = encode(sam, [image])
    masks, ious, stable = [], [], []
    for part in torch.arange(len(given)).split(CHUNK):
        out = decode(sam, embedding, [given[part]])
        masks.append((out.logits > 0).flatten(1).cpu())
        ious.append(out.iou.cpu())
        stable.append(calculate_stability_score(out.logits, 0.0, 1.0).cpu())
    iou, stability = torch.cat(ious), torch.cat(stable).nan_to_num()
    sure = (iou >= config.predicted_iou) & (stability >= config.stability)
    if not sure.any():
        sure[(iou * stability).argmax()] = True
    candidates = sure.nonzero()[:, 0]
    candidates = candidates[iou[candidates].argsort(descending=True, stable=True)]
    return given[candidates[_distinct(torch.cat(masks)[candidates])]]


def _grid(sam: Sam, image: Tensor, most: int) -> Prompts:
    """A click at the centre of each cell of a square grid, those in the image; [N, 1, 2]."""
    side = sam.image_encoder.img_size
    count = min(most, sam.prompt_encoder.image_embedding_size[0])
    line = (torch.arange(count) + 0.5) * (side / count)
    y, x = (g.flatten() for g in torch.meshgrid(line, line, indexing="ij"))
    inside = (x < image.shape[2]) & (y < image.shape[1])
    if not inside.any():  # a strip narrower than half a cell
        inside[0], x, y = True, x.clamp(max=image.shape[2] / 2), y.clamp(max=image.shape[1] / 2)
    points = torch.stack([x[inside], y[inside]], 1)[:, None]
    return Prompts(points=points, point_labels=torch.ones(len(points), 1, dtype=torch.long))


def _distinct(masks: Tensor) -> Tensor:
    """The places of the masks, bool [N, P], that overlap no earlier kept one too much (non-maximum suppression)."""
    values = masks.float()
    area = values.sum(1)
    both = values @ values.T
    same = both / (area[:, None] + area[None, :] - both).clamp(min=1) > OVERLAP
    kept: list[int] = []
    for i in range(len(masks)):
        if not same[i, kept].any():
            kept.append(i)
    return torch.tensor(kept)
