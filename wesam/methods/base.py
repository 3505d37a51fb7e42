"""What a method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.prompts import Prompts


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
    needs_masks: bool = False
    """Whether it looks at real masks (and so is no method for weak labels)."""
