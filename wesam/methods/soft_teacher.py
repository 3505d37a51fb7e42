"""Soft Teacher: an averaged teacher's masks, each cell and each prompt weighted by how reliable it is.

Xu et al., "End-to-end semi-supervised object detection with soft teacher", ICCV 2021: an averaged teacher labels the
weak view for the student's strong one; what it calls foreground counts where it is sure (threshold 0.9), what it calls
background by its own background score (equations 4 and 5), and a box as little as it changes when it is jittered
(equations 6 and 7).

Translated to a promptable SAM: a cell of the mask stands for a candidate box of the detector. What is jittered is the
prompt (by ``views.prompt_noise``), and a prompt's reliability is the IoU of the teacher's two masks. The losses are
cross-entropy, half foreground and half background, and dice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, branches
from wesam.sam.promptable import decode


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """Weighted cross-entropy and dice against the teacher's masks, each [N]."""
    c = config.loss
    b = branches(model, batch, batch.prompts)
    with torch.no_grad(), model.autocast():
        jittered = decode(model.teacher, b.seen, batch.noisy).logits
    mask, other = b.teacher > 0, jittered > 0
    reliable = (mask & other).sum((1, 2)) / (mask | other).sum((1, 2)).clamp(min=1)
    sure = (b.teacher.sigmoid() > config.teacher.confidence).float()
    weight = torch.where(mask, sure, 1 - b.teacher.sigmoid())
    return {
        "cross_entropy": reliable * L.balanced(b.student, mask, weight),
        "dice": c.dice * reliable * L.dice(b.student, mask),
    }


METHOD = Method(
    losses,
    "an averaged teacher's masks, weighted by their reliability (ICCV 2021)",
    (
        "lora.rank", "lora.alpha_ratio", "lora.targets", "optim.lr", "loss.dice", "teacher.decay", "teacher.confidence",
        "views.strength", "views.prompt_noise",
    ),
    own=("teacher.confidence",),
    defaults={"teacher.decay": 0.97, "views.prompt_noise": 0.06},
    fitted={"nano": {"optim.lr": 2e-3}},
)  # fmt: skip
