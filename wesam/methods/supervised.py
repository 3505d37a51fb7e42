"""Supervised: the same LoRA trained on the real masks; what the weak labels are measured against."""

from __future__ import annotations

from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method
from wesam.sam.promptable import decode, encode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """Focal, dice and IoU loss against the real masks on the weak view, each [N]."""
    assert batch.truth is not None
    c = config.loss
    with model.autocast():
        out = decode(model.sam, encode(model.sam, batch.weak), batch.prompts)
    return {
        "focal": c.focal * L.focal(out.logits, batch.truth, 0.5, c.focal_gamma),
        "dice": c.dice * L.dice(out.logits, batch.truth),
        "iou": c.iou * L.iou_error(out.iou, out.logits, batch.truth),
    }


METHOD = Method(
    losses,
    "the same adapter trained on real masks: the upper reference",
    ("lora.rank", "lora.alpha_ratio", "lora.targets", "optim.lr", "loss.focal", "loss.iou"),
    fitted={"nano": {"lora.targets": "encoder+decoder", "optim.lr": 2e-3, "loss.focal": 20.0, "loss.dice": 1.0}},
    needs_masks=True,
)
