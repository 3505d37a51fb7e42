"""The losses of all methods, each a pure function that gives one value per prompt.

N prompts; m x m is SAM's low-resolution mask frame; g x g the embedding's. Logits are float [N, m, m]; targets are
[N, m, m], bool or in 0..1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def focal(logits: Tensor, target: Tensor, alpha: float = 0.8, gamma: float = 2.0) -> Tensor:
    """Focal loss averaged over the mask's cells, [N]; alpha weighs foreground, 1 - alpha background."""
    t = target.float()
    ce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    p = logits.sigmoid()
    weight, wrong = alpha * t + (1 - alpha) * (1 - t), p + t - 2 * p * t
    if gamma < 1:  # at 0 its derivative would be infinite
        wrong = wrong.clamp(min=1e-6)
    return (weight * wrong**gamma * ce).mean((1, 2))


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice loss, [N]: 1 - 2 |p t| / (|p| + |t|), smoothed by one cell."""
    p, t = logits.sigmoid(), target.float()
    return 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)


def iou_error(predicted: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Squared error of the IoU head, [N], against the IoU that the mask (logits > 0) really has with the target.

    predicted: [N]. Two empty masks have IoU 0.
    """
    mask, t = logits.detach() > 0, target > 0.5
    actual = (mask & t).sum((1, 2)) / (mask | t).sum((1, 2)).clamp(min=1)
    return (predicted - actual) ** 2


def pooled(features: Tensor, image: Tensor, masks: Tensor) -> Tensor:
    """Each prompt's feature: its image's feature map averaged over its mask, [N, C]; zeros for an empty mask.

    features: [B, C, g, g]. image: int [N], which of the B images a prompt belongs to. masks: [N, m, m], m a multiple
    of g; a cell of the feature map counts by the share of it that the mask covers.
    """
    g = features.shape[-1]
    cover = F.avg_pool2d(masks.float()[:, None], masks.shape[-1] // g)[:, 0].flatten(1)
    cover = cover / cover.sum(1, keepdim=True).clamp(min=1e-6)
    # every mask over every image, and then its own: the feature maps are not repeated for each prompt
    everywhere = torch.einsum("nk,bck->nbc", cover, features.flatten(2))
    return everywhere[torch.arange(len(image), device=image.device), image]


def contrastive(branch: Tensor, anchor: Tensor, image: Tensor, temperature: float = 0.3) -> Tensor:
    """InfoNCE between a branch's features and the anchor's, [N].

    branch, anchor: [N, C]. Positive: the same prompt's anchor feature; negatives: those of the other prompts of the
    same image; cosine similarity over the temperature. A prompt whose mask is empty in either branch (its feature is
    zero) is no positive and no negative, and has loss 0.
    """
    similar = F.normalize(branch, dim=1) @ F.normalize(anchor, dim=1).T / temperature
    there = (branch.detach().abs().sum(1) > 0) & (anchor.abs().sum(1) > 0)
    comparable = (image[:, None] == image[None, :]) & there[None, :]
    comparable = comparable | torch.eye(len(image), dtype=torch.bool, device=image.device)
    loss = similar.masked_fill(~comparable, -torch.inf).logsumexp(1) - similar.diagonal()
    return torch.where(there, loss, torch.zeros_like(loss))


def box_masks(boxes: Tensor, size: int, stride: float) -> Tensor:
    """Boxes as masks in SAM's low-resolution frame, bool [N, size, size]: the cells that a box touches.

    boxes: [N, 4], (x0, y0, x1, y1) in pixels of the resized image; stride: pixels per cell.
    """
    cell = torch.arange(size, device=boxes.device)
    low, high = (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()
    x = (cell >= low[:, :1]) & (cell < high[:, :1])
    y = (cell >= low[:, 1:]) & (cell < high[:, 1:])
    return y[:, :, None] & x[:, None, :]


def at_clicks(logits: Tensor, points: Tensor, labels: Tensor, stride: float) -> Tensor:
    """Cross-entropy of the mask at the clicks, [N]: mean of those inside and mean of those outside; not in the paper.

    points: [N, P, 2], (x, y) in pixels of the resized image; labels: [N, P], 1 inside, 0 outside, -1 no click; stride:
    pixels per cell. Between cells the mask is interpolated.
    """
    size = logits.shape[-1]
    place = (2 * points / (stride * size) - 1).to(logits)
    seen = F.grid_sample(logits[:, None], place[:, None], padding_mode="border", align_corners=False)[:, 0, 0]
    total = torch.zeros(len(logits), device=logits.device)
    for label in (0, 1):
        there = (labels == label).to(logits)
        ce = F.softplus(seen if label == 0 else -seen)
        total = total + 0.5 * (ce * there).sum(1) / there.sum(1).clamp(min=1)
    return total


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each cell's foreground, in nats, averaged over the mask's cells, [N]."""
    return (F.softplus(logits) - logits * logits.sigmoid()).mean((1, 2))


def balanced(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy, [N]: the mean over the target's foreground and that over its background, half each.

    weight: [N, m, m], of the cells within their class. A class of which no cell has a weight counts nothing.
    """
    t = target.float()
    ce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    w = torch.ones_like(t) if weight is None else weight
    return 0.5 * (weighted(ce, w * t) + weighted(ce, w * (1 - t)))


def weighted(values: Tensor, weight: Tensor) -> Tensor:
    """The mean over the cells, [N], of values and weights, both [N, m, m]; 0 where nothing has a weight."""
    return (values * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-6)


def tightness(logits: Tensor, boxes: Tensor) -> Tensor:
    """How badly the mask fills its box, [N]: dice of its row and column maxima against the box's; not in the paper.

    boxes: bool [N, m, m] as :func:`box_masks` gives. A mask that touches all four sides of its box and does not leave
    it has loss 0.
    """
    p = logits.sigmoid()
    total = torch.zeros(len(logits), device=logits.device)
    for axis in (1, 2):
        seen, given = p.amax(axis), boxes.any(axis).float()
        total = total + 0.5 * (1 - 2 * (seen * given).sum(1) / (seen**2 + given**2).sum(1).clamp(min=1e-6))
    return total
