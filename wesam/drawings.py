"""What needs no model: masks drawn from the weak labels alone. They cost nothing, and every score is to be read beside
theirs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wesam.config import BOXES, PromptKind
from wesam.errors import InputError
from wesam.prompts import NO_CLICK, Prompts

Drawing = Literal["box", "ellipse", "voronoi", "polygon"]
"""The given box filled; the ellipse inscribed in it; all that is nearer to a click on the object than to one beside it;
the given polygon filled."""

DRAWINGS: dict[Drawing, str] = {
    "box": "box filled", "ellipse": "ellipse in the box", "voronoi": "nearest click", "polygon": "polygon filled",
}  # fmt: skip
"""Their titles."""

DRAWN: dict[str, Drawing] = {
    "box_filled": "box", "ellipse": "ellipse", "nearest_click": "voronoi", "polygon_filled": "polygon",
}  # fmt: skip
"""What a drawing's score is called beside others."""


def drawable(kind: Drawing, prompt: PromptKind) -> bool:
    """Whether labels of this kind are what the drawing is made from."""
    if kind == "voronoi":
        return prompt.startswith("point")
    return prompt == "coarse" if kind == "polygon" else prompt in BOXES


def check_drawable(kind: Drawing, prompt: PromptKind) -> None:
    """Raises InputError, with what can be drawn from what, unless labels of this kind are what it is made from."""
    if not drawable(kind, prompt):
        raise InputError(
            f"{kind} cannot be drawn from {prompt}: box and ellipse are drawn from {', '.join(BOXES)}, voronoi from "
            "point, polygon from coarse"
        )


def draw(kind: Drawing, given: Prompts, size: tuple[int, int]) -> Tensor:
    """The drawing for each of the N labels, bool [N, H, W] for this (height, width); given: in pixels of that image."""
    if kind in ("polygon", "box"):
        return given.filled(size)
    if kind == "voronoi":
        assert given.points is not None
        assert given.point_labels is not None
        pairs = zip(given.points, given.point_labels, strict=True)
        return torch.stack([_voronoi(points, labels, size) for points, labels in pairs])
    assert given.boxes is not None
    return torch.stack([_ellipse(box, size) for box in given.boxes])


def _ellipse(box: Tensor, size: tuple[int, int]) -> Tensor:
    centre, radius = (box[:2] + box[2:]) / 2, ((box[2:] - box[:2]) / 2).clamp(min=0.5)
    y, x = (torch.arange(n) + 0.5 for n in size)
    x, y = ((x - centre[0]) / radius[0])[None, :], ((y - centre[1]) / radius[1])[:, None]
    return x**2 + y**2 <= 1


def _voronoi(points: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """points: [P, 2], labels: [P] -> bool [H, W]."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    points, labels = points[labels != NO_CLICK], labels[labels != NO_CLICK]
    distance = (x[None, None, :] - points[:, 0, None, None]) ** 2 + (y[None, :, None] - points[:, 1, None, None]) ** 2
    return labels[distance.argmin(0)] == 1
