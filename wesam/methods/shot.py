"""SHOT: information maximisation and labels of the nearest prototype, under a decoder that stays as it is.

Liang et al., "Do we really need to access the source data? Source hypothesis transfer for unsupervised domain
adaptation", ICML 2020: the entropy of each prediction is to be small (equation 2, first term), that of their mean large
(second term), and predictions are to agree with the label of the nearest class centroid in feature space, beta = 0.3
(equations 4 to 7), with the classifier, the source's hypothesis, frozen.

Translated to a promptable SAM: the frozen hypothesis is prompt encoder and mask decoder, what is trained is the encoder
(through LoRA, as in all methods here). The classes are a prompt's object and what lies around it, and the predictions
over which the mean is taken are the cells of the box around the prompt (the given box; with clicks and coarse masks,
the box of the anchor's mask), of which an object covers around a half: over the whole image the wish for equal classes
would be wrong. Centroids are those of the encoder's cells in that box, once weighted by the prediction and once by the
labels so found, as the paper has it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, regions
from wesam.sam.promptable import decode, encode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The two parts of information maximisation and the cross-entropy against the centroids' labels, each [N]."""
    c = config.loss
    with model.autocast():
        features = encode(model.sam, batch.weak)
        logits = decode(model.sam, features, batch.prompts).logits
    region = regions(batch).float()
    labels = nearest_prototype(features.detach(), logits.detach(), region, batch.image)
    mean = L.weighted(logits.sigmoid(), region).clamp(1e-6, 1 - 1e-6)
    spread = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    return {
        "entropy": c.entropy * L.weighted(F.softplus(logits) - logits * logits.sigmoid(), region),
        "diversity": -c.diversity * spread,
        "pseudo": c.pseudo
        * L.weighted(F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none"), region),
    }


def nearest_prototype(features: Tensor, logits: Tensor, region: Tensor, image: Tensor) -> Tensor:
    """The label of each cell by the nearer of its prompt's two centroids, bool [N, m, m].

    features: [B, C, g, g]; logits: [N, m, m]; region: [N, m, m] in 0..1, the cells that make the centroids; image: int
    [N], which of the B images a prompt belongs to. Nearness is the cosine's.
    """
    g, m = features.shape[-1], logits.shape[-1]
    shown = F.avg_pool2d(region[:, None], m // g).flatten(1)
    inside = F.avg_pool2d(logits.sigmoid()[:, None], m // g).flatten(1)
    cells = F.normalize(features.flatten(2), dim=1)[image]
    for _ in range(2):
        weights = torch.stack([inside * shown, (1 - inside) * shown], 1)
        centroids = F.normalize(torch.einsum("nkp,ncp->nkc", weights, cells), dim=2)
        near = torch.einsum("nkc,ncp->nkp", centroids, cells)
        inside = (near[:, 0] > near[:, 1]).float()
    return F.interpolate(inside.unflatten(1, (1, g, g)), size=(m, m))[:, 0] > 0.5


METHOD = Method(
    losses,
    "information maximisation and labels of the nearest prototype, decoder fixed (ICML 2020)",
    (
        "lora.rank", "lora.alpha_ratio", "optim.lr", "loss.entropy", "loss.diversity", "loss.pseudo",
    ),
    own=("loss.entropy", "loss.diversity", "loss.pseudo"),
    defaults={"lora.targets": "encoder"},
)  # fmt: skip
