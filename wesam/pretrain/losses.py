"""What the embedded model is trained to do: masks from all of SAM's outputs, and features that tell instances apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mask_loss(logits: Tensor, iou: Tensor, truth: Tensor, balance: float) -> Tensor:
    """10 focal + dice + squared error of the IoU head + ``balance`` times a class-balanced cross-entropy, [N, K].

    logits: [N, K, m, m], K answers to a prompt; iou: [N, K]; truth: [N, m, m] in 0..1, the covered share of each cell.
    The balanced term averages inside, near and far background apart: without it a new model stays at empty masks.
    """
    near = (F.max_pool2d(F.max_pool2d(truth, (1, 13), 1, (0, 6)), (13, 1), 1, (6, 0)) > 0.5).float() * (1 - truth)
    inside, around, away = (
        x / x.sum((1, 2), keepdim=True).clamp(min=1) for x in (truth, near, (1 - near) * (1 - truth))
    )
    share = 0.4 * inside + 0.4 * around + 0.2 * away
    truth = truth[:, None].expand_as(logits)
    ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p = logits.sigmoid()
    cells = logits.shape[-2] * logits.shape[-1]
    focal_and_balanced = (ce * ((p - truth) ** 2 * (10 / cells) + balance * share[:, None])).sum((2, 3))
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    with torch.no_grad():
        hit, real = logits > 0, truth > 0.5
        actual = (hit & real).sum((2, 3)) / (hit | real).sum((2, 3)).clamp(min=1)
    return focal_and_balanced + dice + (iou - actual) ** 2


def all_masks_loss(logits: Tensor, iou: Tensor, truth: Tensor, balance: float, others: float) -> Tensor:
    """The loss of SAM's outputs, a scalar: the first's, and ``others`` times that of the best of the other three, which
    alone of them is taught, as in SAM.

    logits: [N, K, m, m]; iou: [N, K], K 1 or 4; truth: [N, m, m].
    """
    if logits.shape[1] == 1:
        return mask_loss(logits, iou, truth, balance).mean()
    with torch.no_grad():  # the best by its dice score
        p = logits[:, 1:].sigmoid()
        both = torch.einsum("nkij,nij->nk", p, truth)
        best = 1 + (both / (p.sum((2, 3)) + truth.sum((1, 2))[:, None] + 1)).argmax(1, keepdim=True)
    taught = torch.cat([torch.zeros_like(best), best], 1)
    logits = logits.gather(1, taught[..., None, None].expand(-1, -1, *logits.shape[2:]))
    each = mask_loss(logits, iou.gather(1, taught), truth, balance).mean(0)
    return each[0] + others * each[1]


class Affinity(nn.Module):
    """Tells from the embedding whether two of its cells show the same instance; needed in training only.

    It teaches the encoder about all instances of an image at once, where prompts ask for a few.
    """

    def __init__(self, channels: int, width: int = 64, asked: int = 64) -> None:
        super().__init__()
        self.project = nn.Linear(channels, width)
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.asked = asked

    def forward(self, embedding: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """The balanced cross-entropy, a scalar, over pairs of which one is a cell that shows an instance.

        embedding: [B, C, g, g]. labels: uint8 [B, side, side], instances by number. The target of a pair is the
        chance that a pixel of each, drawn at random, belongs to one instance.
        """
        b, _, g, _ = embedding.shape
        step = labels.shape[-1] // g // 4  # every step-th pixel is enough to tell a cell's shares
        seen = labels[:, step // 2 :: step, step // 2 :: step].long()
        cells = seen.view(b, g, 4, g, 4).permute(0, 1, 3, 2, 4).reshape(b, g * g, 16)
        shares = torch.zeros(b, g * g, 64, device=labels.device)
        shares.scatter_add_(2, cells, torch.full_like(cells, 1 / 16, dtype=shares.dtype))
        shares = shares[..., 1:]
        features = F.normalize(self.project(embedding.flatten(2).transpose(1, 2)), dim=2)
        noise = torch.from_numpy(rng.random((b, g * g), dtype=np.float32)).to(labels.device)
        order = (shares.amax(2) + noise).argsort(1, descending=True)
        asked = order[:, : self.asked, None]  # cells that show instances, mostly
        left = features.gather(1, asked.expand(-1, -1, features.shape[2]))
        logits = self.scale * left @ features.transpose(1, 2) + self.bias
        target = shares.gather(1, asked.expand(-1, -1, shares.shape[2])) @ shares.transpose(1, 2)
        ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        same, apart = target, 1 - target
        return 0.5 * ((ce * same).sum() / same.sum().clamp(min=1) + (ce * apart).sum() / apart.sum())
