"""WDASS: pseudo labels that the weak labels correct, and features drawn to prototypes.

Das et al., "Weakly-supervised domain adaptive semantic segmentation with prototypical contrastive learning", CVPR 2023:
weak labels of the target domain (image, points or coarse masks) filter pseudo labels and make better prototypes of each
class, and a contrastive loss draws the features to the prototype of their class and away from the others.

Translated to a promptable SAM, and without source data: classes are the prompts' objects and what lies around them.
Pseudo labels come from an averaged teacher and are cut to what the weak label allows: the box, the coarse mask
(widened), the clicks, which decide about the cells around them. A prompt's prototype is the anchor's feature over its
mask, which stands for the source's; the others are those of the image's other prompts and that of the background around
the object.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, branches, given_boxes, regions
from wesam.prompts import Prompts

AROUND = 2
"""How far a click decides, and how far beyond a coarse mask an object may reach, in cells of the mask."""


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """Cross-entropy and dice against the corrected labels, and the contrastive loss, each [N]."""
    c = config.loss
    b = branches(model, batch, batch.noisy)
    labels = corrected(b.teacher > 0, batch)
    beside = regions(batch) & ~labels
    return {
        "cross_entropy": L.balanced(b.student, labels),
        "dice": c.dice * L.dice(b.student, labels),
        "contrastive": c.contrastive * to_prototypes(b.features, labels, beside, batch, c.temperature),
    }


def corrected(masks: Tensor, batch: Batch) -> Tensor:
    """Masks, bool [N, m, m], without what the weak labels exclude and with what they say."""
    given, size = Prompts.concatenate(batch.prompts), masks.shape[-1]
    if given.boxes is not None:
        return masks & given_boxes(batch)
    if given.polygons is not None:
        drawn = given.covered(size, batch.stride).to(masks.device)
        return masks & (F.max_pool2d(drawn, 2 * AROUND + 1, 1, AROUND) > 0)
    assert given.points is not None
    assert given.point_labels is not None
    cell = torch.arange(size, device=masks.device) + 0.5
    place = (given.points / batch.stride).to(masks.device)
    near_x = (cell - place[..., :1]).abs() <= AROUND
    near_y = (cell - place[..., 1:]).abs() <= AROUND
    near = near_y[..., :, None] & near_x[..., None, :]
    labels = given.point_labels.to(masks.device)[..., None, None]
    return (masks & ~(near & (labels == 0)).any(1)) | (near & (labels == 1)).any(1)


def to_prototypes(features: Tensor, labels: Tensor, beside: Tensor, batch: Batch, temperature: float) -> Tensor:
    """InfoNCE of the student's feature over each object, [N]: its own prototype against all others of its image.

    features: [B, C, g, g]; labels, beside: bool [N, m, m], the object and the background around it. Where one of the
    two is empty the loss is 0.
    """
    mine = F.normalize(L.pooled(features, batch.image, labels), dim=1)
    around = F.normalize(L.pooled(features.detach(), batch.image, beside), dim=1)
    prototypes = F.normalize(batch.anchor_features, dim=1)
    known = prototypes.abs().sum(1) > 0  # one that the anchor finds nothing of has no prototype
    among = (batch.image[:, None] == batch.image[None, :]) & (known | torch.eye(len(mine), device=mine.device).bool())
    objects = (mine @ prototypes.T / temperature).masked_fill(~among, -torch.inf)
    ground = (mine * around).sum(1, keepdim=True) / temperature
    loss = torch.cat([objects, ground], 1).logsumexp(1) - objects.diagonal()
    there = labels.any((1, 2)) & beside.any((1, 2)) & known
    return torch.where(there, loss, torch.zeros_like(loss))


METHOD = Method(
    losses,
    "pseudo labels corrected by the weak labels, features drawn to prototypes (CVPR 2023)",
    (
        "lora.rank", "lora.alpha_ratio", "lora.targets", "optim.lr", "loss.dice", "loss.contrastive",
        "loss.temperature", "teacher.decay", "views.strength",
    ),
    defaults={"teacher.decay": 0.97},
    fitted={"nano": {"optim.lr": 2e-3}},
)  # fmt: skip
