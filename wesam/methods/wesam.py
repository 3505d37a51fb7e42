"""WeSAM: self-training on the teacher's pseudo labels, held by the anchor and by a contrastive loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, given_boxes
from wesam.sam.promptable import decode, encode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The three losses of the paper, each [N]."""

    def beside(student: Tensor) -> dict[str, Tensor]:
        if not config.loss.tightness:
            return {}
        return {"tightness": config.loss.tightness * L.tightness(student, given_boxes(batch))}

    def pseudo_labels(teacher: Tensor) -> Tensor:
        return teacher > 0 if not config.teacher.cut_to_box else (teacher > 0) & given_boxes(batch)

    return self_training(model, batch, config, pseudo_labels, beside)


def self_training(
    model: AdaptedSam, batch: Batch, config: Config, pseudo_labels: Callable[[Tensor], Tensor],
    beside: Callable[[Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of the paper, each [N], on pseudo labels made from the teacher's logits, both [N, m, m].

    With decay 0 teacher and student are one model and the weak branch carries gradient, as in the paper. With an
    averaged teacher it carries none, and the contrastive loss is taken on the student's branch instead. beside: more
    losses, each [N], on the student's logits.
    """
    c = config.loss
    shared = config.teacher.decay == 0
    with model.autocast():
        with torch.set_grad_enabled(shared):
            teacher_map = encode(model.teacher, batch.weak)
            teacher = decode(model.teacher, teacher_map, batch.prompts).logits
        student_map = encode(model.sam, batch.strong)
        student = decode(model.sam, student_map, batch.noisy)

    pseudo = pseudo_labels(teacher.detach())
    out = {
        "focal": c.focal * L.focal(student.logits, pseudo, c.focal_alpha, c.focal_gamma),
        "dice": c.dice * L.dice(student.logits, pseudo),
        "iou": c.iou * L.iou_error(student.iou, student.logits, pseudo),
    }
    if c.anchor:
        held = L.dice(student.logits, batch.anchor_masks) + L.dice(teacher, batch.anchor_masks)
        out["anchor"] = c.anchor * 0.5 * held
    if c.contrastive:
        features, mask = (teacher_map, teacher) if shared else (student_map, student.logits)
        branch = L.pooled(features, batch.image, mask.detach() > 0)
        out["contrastive"] = c.contrastive * L.contrastive(branch, batch.anchor_features, batch.image, c.temperature)
    return out | beside(student.logits)


SEARCHED = (
    "lora.rank", "lora.alpha_ratio", "lora.targets", "optim.lr", "loss.focal", "loss.iou", "loss.anchor",
    "loss.contrastive", "loss.temperature", "teacher.decay", "views.strength", "views.prompt_noise",
)  # fmt: skip

METHOD = Method(
    losses,
    "self-training with teacher, anchor and contrastive loss (CVPR 2024)",
    (*SEARCHED, "loss.tightness", "teacher.cut_to_box"),
    own=("loss.tightness", "teacher.cut_to_box"),
)
