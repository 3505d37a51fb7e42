"""DePT: visual prompts trained on a teacher's labels that neighbours in feature space have voted on.

Gao et al., "Visual prompt tuning for test-time domain adaptation", 2022 (arXiv 2210.04831): only prompts, and a
classification head, are trained; labels come from an averaged teacher, refined by the soft vote of the nearest
neighbours in feature space, and a hierarchical regularisation has the features of student and teacher agree.

Translated to a promptable SAM: its encoder works in windows on a grid of tokens, to which no further tokens can be
prepended; the prompts are therefore added to the tokens, the variant "add" that visual prompt tuning (Jia et al., ECCV
2022) compares: one vector for each place at the input and one for all places at each block, which its attention sees
but, being the bias of the norm before that, not the block's shortcut. The neighbours that vote are cells of the same
image, and what is regularised are the features averaged over each prompt's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, branches


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """Cross-entropy and dice against the voted labels, and the distance of the features, each [N]."""
    c = config.loss
    b = branches(model, batch, batch.noisy)
    labels = voted(b.seen, b.teacher.sigmoid(), batch.image, config.teacher.neighbours) > 0.5
    mine, theirs = (L.pooled(f, batch.image, labels) for f in (b.features, b.seen))
    return {
        "cross_entropy": L.balanced(b.student, labels),
        "dice": c.dice * L.dice(b.student, labels),
        "consistency": c.consistency * (1 - F.cosine_similarity(mine, theirs)) * labels.any((1, 2)),
    }


def voted(features: Tensor, probability: Tensor, image: Tensor, count: int) -> Tensor:
    """Each cell's probability of foreground, and of its neighbours in feature space, half each, [N, m, m].

    features: [B, C, g, g]; probability: [N, m, m]; image: int [N], which of the B images a prompt belongs to; count: of
    the nearest cells of the same image, by cosine, that vote.
    """
    g, m = features.shape[-1], probability.shape[-1]
    coarse = F.avg_pool2d(probability[:, None], m // g).flatten(1)
    cells = F.normalize(features.flatten(2), dim=1)
    near = torch.stack([(c.T @ c).topk(min(count, g * g), dim=1).indices for c in cells])[image]
    out = coarse.gather(1, near.flatten(1)).unflatten(1, (g * g, -1)).mean(2)
    vote = F.interpolate(out.unflatten(1, (1, g, g)), size=(m, m), mode="bilinear")[:, 0]
    return 0.5 * (probability + vote)


METHOD = Method(
    losses,
    "prompts of the encoder, trained on labels that neighbours have voted on (2022)",
    (
        "optim.lr", "optim.weight_decay", "loss.dice", "loss.consistency", "teacher.decay", "teacher.neighbours",
        "views.strength",
    ),
    own=("loss.consistency", "teacher.neighbours"),
    defaults={"train": "prompts", "teacher.decay": 0.97},
)  # fmt: skip
