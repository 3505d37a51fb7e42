"""TRIBE: student, averaged teacher and frozen anchor, with classes balanced, over the norms' parameters.

Su et al., "Towards real-world test-time adaptation: tri-net self-training with balanced normalization", AAAI 2024:
the student learns the teacher's labels where the teacher is sure, and the distance of the predictions to those of a
frozen anchor net keeps both from drifting (weight 0.5, squared error); a normalisation that weighs each class alike
corrects the statistics of batch norms.

Translated to a promptable SAM: the tri-net and its losses as they are, on the cells of each prompt's mask. Balanced
normalisation does not transfer: SAM's layer norms normalise every token by itself and keep no statistics that many
tokens of one class could bend. What remains of its purpose is the balance in the loss, where foreground and background
count alike, and of its parameters the norms' affine ones, which are what is trained. The anchor's answers are kept as
masks, so the distance is that to a mask.
"""

from __future__ import annotations

from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, branches


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """Balanced cross-entropy against the sure part of the teacher's masks, and distance to the anchor's, each [N]."""
    c = config.loss
    b = branches(model, batch, batch.noisy)
    sure = ((2 * b.teacher.sigmoid() - 1).abs() > 2 * config.teacher.confidence - 1).float()
    far = (b.student.sigmoid() - batch.anchor_masks.float()) ** 2
    return {
        "cross_entropy": L.balanced(b.student, b.teacher > 0, sure),
        "anchor": c.anchor * far.mean((1, 2)),
    }


METHOD = Method(
    losses,
    "student, teacher and anchor over the norms' parameters, classes balanced (AAAI 2024)",
    (
        "optim.lr", "optim.weight_decay", "loss.anchor", "teacher.decay", "teacher.confidence", "views.strength",
    ),
    own=("teacher.confidence",),
    defaults={"train": "norms", "teacher.decay": 0.97, "loss.anchor": 0.5},
    fitted={"nano": {"optim.lr": 2e-3}},
)  # fmt: skip
