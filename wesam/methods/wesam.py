"""WeSAM: self-training on the teacher's pseudo labels, held by the anchor and by a contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method
from wesam.prompts import Prompts
from wesam.sam.promptable import decode, encode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The three losses of the paper, each [N].

    With decay 0 teacher and student are one model and the weak branch carries gradient, as in the paper. With an
    averaged teacher it carries none, and the contrastive loss is taken on the student's branch instead.
    """
    c, t = config.loss, config.teacher
    shared = t.decay == 0
    with model.autocast():
        with torch.set_grad_enabled(shared):
            teacher_map = encode(model.teacher, batch.weak)
            teacher = decode(model.teacher, teacher_map, batch.prompts).logits
        student_map = encode(model.sam, batch.strong)
        student = decode(model.sam, student_map, batch.noisy)

    boxes = None
    if c.tightness or t.cut_to_box:
        boxes = _given_boxes(batch, student.logits.shape[-1])
    pseudo = teacher.detach() > 0
    if t.cut_to_box and boxes is not None:
        pseudo = pseudo & boxes

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
    if c.tightness and boxes is not None:
        out["tightness"] = c.tightness * L.tightness(student.logits, boxes)
    return out


def _given_boxes(batch: Batch, size: int) -> Tensor:
    boxes = Prompts.concatenate(batch.prompts).boxes
    assert boxes is not None
    return L.box_masks(boxes, size, batch.stride).to(batch.image.device)


METHOD = Method(losses, "self-training with teacher, anchor and contrastive loss (CVPR 2024)")
