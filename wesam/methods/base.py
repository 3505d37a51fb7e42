"""What a method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config, Value
from wesam.prompts import Prompts, tight_boxes
from wesam.sam.promptable import decode, encode


@dataclass(frozen=True)
class Batch:
    """B images with N prompts in all, in SAM's frames and with one geometry for all views."""

    weak: list[Tensor]
    """B images, uint8 [3, h, w]: the weak view, for anchor and teacher."""
    strong: list[Tensor]
    """The same images with changed colours: the strong view, for the student."""
    prompts: list[Prompts]
    """One entry per image, in pixels of the views."""
    noisy: list[Prompts]
    """The same prompts as the student is given them."""
    image: Tensor
    """int [N]: which image a prompt belongs to."""
    anchor_masks: Tensor
    """bool [N, m, m]: the anchor's masks."""
    anchor_features: Tensor
    """float [N, C]: the anchor's features over its masks."""
    truth: Tensor | None
    """[N, m, m] in 0..1: the real masks, only for a method that asks for them."""
    stride: float
    """Pixels of the views per cell of the mask frame."""


@dataclass(frozen=True)
class Method:
    """A way to adapt: its losses per prompt, already weighted; what is trained is their sum."""

    losses: Callable[[AdaptedSam, Batch, Config], dict[str, Tensor]]
    """Name -> [N]."""
    note: str
    searched: tuple[str, ...]
    """The hyperparameters that it reads, by dotted path, as far as they are worth searching."""
    own: tuple[str, ...] = ()
    """Those that most other methods do not read: set or searched for these, they would have no effect."""
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """In what its configuration differs from the model's own."""
    fitted: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    """The same for one model alone, by the model's name."""
    bolder: Mapping[str, Value] = field(default_factory=dict)
    """Changes to the defaults that move more in as many steps: worth a try where these are too timid."""
    needs_masks: bool = False
    """Whether it looks at real masks (and so is no method for weak labels)."""


def given_boxes(batch: Batch) -> Tensor:
    """The batch's boxes as masks, bool [N, m, m]."""
    boxes = Prompts.concatenate(batch.prompts).boxes
    assert boxes is not None
    return L.box_masks(boxes, batch.anchor_masks.shape[-1], batch.stride).to(batch.image.device)


def regions(batch: Batch) -> Tensor:
    """Each object's surroundings, bool [N, m, m]: the given box; with other prompts that of the anchor's mask."""
    if batch.prompts[0].boxes is not None:
        return given_boxes(batch)
    boxes = tight_boxes(batch.anchor_masks.cpu()).to(batch.image.device)
    return L.box_masks(boxes, batch.anchor_masks.shape[-1], 1.0)


@dataclass(frozen=True)
class Branches:
    """What a teacher that gets no gradient sees in the weak view, and the student in the strong one."""

    seen: Tensor
    """[B, C, g, g]: the teacher's feature maps."""
    teacher: Tensor
    """[N, m, m]: the teacher's logits."""
    features: Tensor
    """[B, C, g, g]: the student's feature maps."""
    student: Tensor
    """[N, m, m]: the student's logits."""


def branches(model: AdaptedSam, batch: Batch, student: list[Prompts]) -> Branches:
    """Both branches; student: the prompts that the student is given."""
    with model.autocast(), torch.no_grad():
        seen = encode(model.teacher, batch.weak)
        teacher = decode(model.teacher, seen, batch.prompts).logits
    with model.autocast():  # anew: what the first has cast may be of the same weights, and has no gradient
        features = encode(model.sam, batch.strong)
        return Branches(seen, teacher, features, decode(model.sam, features, student).logits)
