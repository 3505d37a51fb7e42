"""TENT: the affine parameters of the norms, trained until the masks are sure of themselves.

Wang et al., "Tent: fully test-time adaptation by entropy minimization", ICLR 2021: the entropy of the predictions
(section 3.1) over the parameters gamma and beta of the norms (3.2).

Translated to a promptable SAM: a prediction is a cell of a prompt's mask, foreground or not. SAM has layer norms, which
keep no statistics, so of TENT's two halves, new statistics and new affine parameters, the second remains. The published
method adapts online, in one pass over the test images; here it has the same steps on the train split as all others.
"""

from __future__ import annotations

from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method
from wesam.sam.promptable import decode, encode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The entropy of the masks on the weak view, [N]."""
    with model.autocast():
        logits = decode(model.sam, encode(model.sam, batch.weak), batch.prompts).logits
    return {"entropy": config.loss.entropy * L.entropy(logits)}


METHOD = Method(
    losses,
    "entropy of the masks over the norms' parameters (ICLR 2021)",
    ("optim.lr", "optim.weight_decay"),
    own=("loss.entropy",),
    defaults={"train": "norms"},
)
