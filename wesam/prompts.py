"""Weak labels: what a person gives instead of a mask, and the form in which SAM takes it.

Coordinates are continuous pixels, x to the right and y down: the pixel in column i covers [i, i + 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn import functional as F

from wesam.config import PromptKind
from wesam.errors import InputError

POINTS = 5
"""Clicks inside and clicks outside each instance (METHOD: 5 positives, 5 negatives)."""

VERTICES = 8
"""The most vertices of a coarse mask's polygon."""

CHANGED: dict[str, int] = {"coarse": 3, "coarse-box": 3}
"""The version of a kind of label that is not what it first was: the same masks give others, or the model takes them in
another form."""

SAMPLES = 4
"""Along each side of a cell, to find what a polygon covers of it."""

FAR = 2.0
"""No prompt of a person reaches so many sides of the image beyond it."""

NO_CLICK = -1
"""SAM's label of a place in the list of clicks that holds none."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The weak labels of N instances, all of one kind, in one frame; what the kind does not have is None.

    Lists and arrays of these shapes become tensors; raises InputError for other shapes.
    """

    boxes: Tensor | None = None
    """[N, 4] float, (x0, y0, x1, y1)."""
    points: Tensor | None = None
    """[N, P, 2] float, (x, y)."""
    point_labels: Tensor | None = None
    """[N, P] int, 1 inside and 0 outside the instance; -1 is no click."""
    polygons: tuple[Tensor, ...] | None = None
    """N polygons, each [V, 2] float, (x, y)."""
    tight: bool = False
    """Whether a box holds the whole of its object: predicted masks are then cut to it."""

    def __post_init__(self) -> None:
        for name, form, kind in (
            ("boxes", (4,), torch.float32), ("points", (-1, 2), torch.float32), ("point_labels", (-1,), torch.int),
        ):  # fmt: skip
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _shaped(name, given, form, kind))
        if self.polygons is not None:
            polygons = tuple(_shaped("a polygon", p, (2,), torch.float32) for p in self.polygons)
            object.__setattr__(self, "polygons", polygons)
        if sum(x is not None for x in (self.boxes, self.points, self.polygons)) != 1:
            raise ValueError("prompts are of exactly one kind: boxes, points or polygons")
        if self.tight and self.boxes is None:
            raise ValueError("only boxes are tight")
        if (self.points is None) != (self.point_labels is None):
            raise ValueError("points come with their labels")

    def __len__(self) -> int:
        given = self.boxes if self.boxes is not None else self.points if self.points is not None else self.polygons
        assert given is not None
        return len(given)

    def __getitem__(self, index: Tensor) -> Self:
        """The prompts at these places, an int tensor [M]."""
        return replace(
            self,
            boxes=None if self.boxes is None else self.boxes[index],
            points=None if self.points is None else self.points[index],
            point_labels=None if self.point_labels is None else self.point_labels[index],
            polygons=None if self.polygons is None else tuple(self.polygons[i] for i in index.tolist()),
        )

    def alike(self) -> list[tuple[Tensor, Self]]:
        """Groups of prompts with equally many clicks, none of which is NO_CLICK, each with their places, int [M]."""
        if self.points is None or self.point_labels is None or not (self.point_labels == NO_CLICK).any():
            return [(torch.arange(len(self)), self)]
        there = self.point_labels != NO_CLICK
        first = there.int().argsort(dim=1, descending=True, stable=True)
        points = self.points.gather(1, first[..., None].expand(-1, -1, 2))
        labels, counts = self.point_labels.gather(1, first), there.sum(1)
        groups = [(int(n), (counts == n).nonzero()[:, 0]) for n in counts.unique()]
        return [(at, replace(self, points=points[at, :n], point_labels=labels[at, :n])) for n, at in groups]

    def resized(self, before: Sequence[int], after: Sequence[int]) -> Self:
        """The same prompts in an image of the (height, width) ``before`` that is resized to the one ``after``."""
        factor = torch.tensor([after[1] / before[1], after[0] / before[0]], dtype=torch.float32)
        return self._moved(lambda xy: xy * factor.to(xy.device))

    def flipped(self, horizontal: bool, vertical: bool, size: tuple[int, int]) -> Self:
        """The same prompts in an image of this (height, width), mirrored left-right and/or up-down."""
        at = torch.tensor([size[1] if horizontal else 0, size[0] if vertical else 0], dtype=torch.float32)
        sign = torch.tensor([-1.0 if horizontal else 1.0, -1.0 if vertical else 1.0])
        return self._moved(lambda xy: xy * sign + at)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same prompts where ``move`` takes places, [..., 2] -> [..., 2]."""
        boxes = None
        if self.boxes is not None:
            corners = move(self.boxes.unflatten(1, (2, 2)))
            boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
        points = None if self.points is None else move(self.points)
        return replace(self, boxes=boxes, points=points, polygons=self.polygons and tuple(map(move, self.polygons)))

    def longer(self, factor: float) -> Self:
        """Boxes whose sides are this many times as long, about the same centres; they may reach beyond the image."""
        assert self.boxes is not None
        centre, half = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2, (self.boxes[:, 2:] - self.boxes[:, :2]) / 2
        return replace(self, boxes=torch.cat([centre - factor * half, centre + factor * half], 1))

    def halves(self) -> tuple[Self, Self]:
        """Clicks of which every other one on the object, and beside it, is left out; in the second those that the first
        has. A click that is the only one on its object is in both.
        """
        assert self.point_labels is not None
        on, beside = self.point_labels == 1, self.point_labels == 0
        turn = torch.where(on, on.cumsum(1), beside.cumsum(1)) % 2
        alone = on & (on.sum(1, keepdim=True) == 1)
        first, second = (self.point_labels.masked_fill((turn == t) & ~alone, NO_CLICK) for t in (0, 1))
        return replace(self, point_labels=first), replace(self, point_labels=second)

    def noisy(self, amount: float, generator: torch.Generator) -> Self:
        """The prompts as a careless person might have given them; 0 changes nothing.

        Each side of a box and each corner of a polygon moves by up to this many sides of its box, uniformly. Each click
        is left out with this probability, but never the first inside.
        """
        if amount == 0:
            return self

        def moves(shape: torch.Size, sides: Tensor) -> Tensor:
            return amount * sides * (2 * torch.rand(shape, generator=generator) - 1)

        if self.point_labels is not None:
            out = torch.rand(self.point_labels.shape, generator=generator) < amount
            first = (self.point_labels == 1).int().argmax(1)
            out[torch.arange(len(out)), first] = False
            return replace(self, point_labels=self.point_labels.masked_fill(out, NO_CLICK))
        extents = self.extents()
        sides = extents[:, 2:] - extents[:, :2]
        if self.boxes is not None:
            return replace(self, boxes=self.boxes + moves(self.boxes.shape, sides.repeat(1, 2)))
        polygons = zip(self.polygons or (), sides, strict=True)
        return replace(self, polygons=tuple(p + moves(p.shape, s) for p, s in polygons))

    def extents(self) -> Tensor:
        """The bounding boxes of what is given as part of the object (box, clicks inside, polygon), [N, 4]."""
        if self.boxes is not None:
            return self.boxes
        if self.polygons is not None:
            return torch.stack([torch.cat([p.amin(0), p.amax(0)]) for p in self.polygons])
        assert self.points is not None
        assert self.point_labels is not None
        outside = (self.point_labels != 1)[..., None]
        low, high = (self.points.masked_fill(outside, end) for end in (torch.inf, -torch.inf))
        return torch.cat([low.amin(1), high.amax(1)], 1)

    def check_on(self, size: tuple[int, int]) -> None:
        """Raises InputError unless every click lies on an image of this (height, width), and every box and polygon
        meets it and reaches no further beyond it than FAR times its longer side.
        """
        end = torch.tensor([size[1], size[0]])
        if self.points is not None:
            what, far = "a click", torch.zeros(0)
            beside = (self.points < 0) | (self.points > end)
        else:
            what = "the box" if self.boxes is not None else "a polygon"
            extents = self.extents() if len(self) else torch.zeros(0, 4)
            low, high, room = extents[:, :2], extents[:, 2:], FAR * max(size)
            beside, far = (low >= end) | (high <= 0), (low < -room) | (high > end + room)
        for where, wrong in (("lies beside", beside), ("reaches too far beyond", far)):
            if wrong.any():
                raise InputError(f"{what} {where} the image, which has {size[1]} x {size[0]} pixels")

    def seen_in(self, window: Tensor) -> Self:
        """The same prompts in the frame of a window (x0, y0, x1, y1) of the image; clicks beside it are taken away."""
        origin, found = window[:2].float(), self
        if self.points is not None and self.point_labels is not None:
            beside = ((self.points < window[:2]) | (self.points > window[2:])).any(-1)
            found = replace(self, point_labels=self.point_labels.masked_fill(beside, NO_CLICK))
        return found._moved(lambda xy: xy - origin)

    def mask_input(self, size: int, stride: float) -> Tensor:
        """The polygons as SAM's mask input, a cell per ``stride`` pixels: logits [N, 1, size, size], 8 in, -8 out."""
        return (16 * self.covered(size, stride) - 8)[:, None]

    def covered(self, size: int, stride: float) -> Tensor:
        """The share of each cell of ``stride`` pixels a side that the polygons cover, [N, size, size] in 0..1."""
        assert self.polygons is not None
        out = torch.zeros(len(self.polygons), size, size)
        for cells, polygon in zip(out, self.polygons, strict=True):
            corners = polygon / stride
            x0, y0 = (int(c) for c in corners.amin(0).floor().clamp(0, size - 1))
            x1, y1 = (int(c) for c in corners.amax(0).ceil().clamp(1, size))
            near = cells[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
            there = type(self)(polygons=(SAMPLES * (corners - torch.tensor([x0, y0])),))
            drawn = there.filled((SAMPLES * near.shape[0], SAMPLES * near.shape[1]))
            near.copy_(F.avg_pool2d(drawn.float(), SAMPLES)[0])
        return out

    def filled(self, size: tuple[int, int]) -> Tensor:
        """The boxes or polygons filled, bool [N, H, W] for this (height, width): the pixels whose centres they hold, of
        a box at least one.
        """
        if self.boxes is not None:
            middle, half = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2, (self.boxes[:, 2:] - self.boxes[:, :2]) / 2
            y, x = (
                (torch.arange(n) + 0.5 - middle[:, i : i + 1]).abs() <= half[:, i : i + 1].clamp(min=0.5)
                for n, i in ((size[0], 1), (size[1], 0))
            )
            return y[:, :, None] & x[:, None, :]
        assert self.polygons is not None
        if not self.polygons:
            return torch.zeros(0, *size, dtype=torch.bool)
        outlines = [polygon.flatten().tolist() for polygon in self.polygons]
        drawn = rle.decode(rle.frPyObjects(outlines, *size))
        return torch.from_numpy(np.ascontiguousarray(drawn.transpose(2, 0, 1))).bool()

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """The prompts of several images as one, in order; all of the same kind.

        Lists of clicks become as long as the longest: what is added is NO_CLICK at (0, 0).
        """
        if parts[0].polygons is not None:
            return replace(parts[0], polygons=tuple(g for p in parts for g in p.polygons or ()))
        if parts[0].boxes is not None:
            return replace(parts[0], boxes=torch.cat([p.boxes for p in parts if p.boxes is not None]))
        clicks = [(p.points, p.point_labels) for p in parts if p.points is not None and p.point_labels is not None]
        most = max(points.shape[1] for points, _ in clicks)
        return replace(
            parts[0],
            points=torch.cat([F.pad(points, (0, 0, 0, most - points.shape[1])) for points, _ in clicks]),
            point_labels=torch.cat([F.pad(x, (0, most - x.shape[1]), value=NO_CLICK) for _, x in clicks]),
        )


def _shaped(what: str, given: Any, form: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """A tensor [N, *form], in which -1 is any number; raises InputError if it is of another shape."""
    found = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=kind)
    if not isinstance(given, Tensor) and not found.numel():
        found = found.reshape(0, *(abs(n) for n in form))
    if found.ndim != 1 + len(form) or any(n not in (-1, m) for n, m in zip(form, found.shape[1:], strict=True)):
        sizes = ", ".join("P" if n == -1 else str(n) for n in form)
        raise InputError(f"{what} must be [N, {sizes}], got {list(found.shape)}")
    return found


def changed_labels(*kinds: str) -> str:
    """What tells scores with labels of these kinds from those with the labels of before; empty if none has changed."""
    return " ".join(f"{k} {CHANGED[k]}" for k in sorted(set(kinds)) if k in CHANGED)


def weak_labels(masks: Tensor, kind: PromptKind, key: str) -> Prompts:
    """The weak labels that a person would have given once for these instances.

    masks: bool [N, H, W], each with at least one pixel. key: names the image; the same key and mask give the same label
    in every epoch, process and run, whatever other instances there are. Returns prompts in the frame of the masks. A
    mask that fills its image has no clicks outside: they are NO_CLICK.
    """
    if kind in ("box", "tight-box"):
        return Prompts(boxes=tight_boxes(masks), tight=kind == "tight-box")
    if kind in ("coarse", "coarse-box"):
        polygons = Prompts(polygons=tuple(_polygon(m.numpy()) for m in masks))
        return polygons if kind == "coarse" else Prompts(boxes=polygons.extents())
    count = int(kind.removeprefix("point") or POINTS)
    points = [_clicks(_rng(key, m), m, count, count) for m in masks.numpy()]
    labels = torch.tensor([1] * count + [0] * count).repeat(len(masks), 1)
    labels[masks.flatten(1).all(1), count:] = NO_CLICK
    return Prompts(points=torch.from_numpy(np.stack(points)), point_labels=labels)


def tight_boxes(masks: Tensor) -> Tensor:
    """The tight bounding boxes [N, 4] of masks, bool [N, H, W]; all zeros for an empty mask."""
    return torch.cat([_extent(masks.any(1)), _extent(masks.any(2))], 1)[:, [0, 2, 1, 3]]


def vanishing(boxes: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Which instances a model of this input side cannot see, bool [N]: those less than one of its pixels wide or high.

    boxes: [N, 4], in pixels of an image of this (height, width); at most N - 1 vanish: the largest always stays.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]) * (side / max(size))
    gone = (extent < 1).any(1)
    if len(gone) and gone.all():
        gone[extent.prod(1).argmax()] = False
    return gone


def _extent(line: Tensor) -> Tensor:
    """First and one past last true place of each row, [N, L] -> float [N, 2]; zeros where there is none."""
    n = line.shape[1]
    first = line.int().argmax(1)
    last = n - line.flip(1).int().argmax(1)
    return torch.stack([first, last], 1).float() * line.any(1, keepdim=True)


def _rng(key: str, mask: np.ndarray) -> np.random.Generator:
    """The generator of an instance of the image that ``key`` names."""
    digest = hashlib.sha256(key.encode() + np.packbits(mask).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _clicks(rng: np.random.Generator, mask: np.ndarray, inside: int, outside: int) -> np.ndarray:
    """Clicks at pixel centres, float32 [inside + outside, 2]; the ones outside lie around the object."""
    ys, xs = np.nonzero(mask)
    top, left = max(0, ys[0] - (margin := 4 + (ys[-1] - ys[0] + 1) // 4)), max(0, xs.min() - margin)
    near = ~mask[top : ys[-1] + margin + 1, left : xs.max() + margin + 1]
    if near.any():
        oy, ox = np.nonzero(near)
        oy, ox = oy + top, ox + left
    else:
        oy, ox = np.nonzero(~mask) if not mask.all() else (np.array([0]), np.array([0]))
    i, o = rng.integers(0, len(ys), inside), rng.integers(0, len(oy), outside)
    return np.stack([np.r_[xs[i], ox[o]], np.r_[ys[i], oy[o]]], 1).astype(np.float32) + 0.5


def _polygon(mask: np.ndarray) -> Tensor:
    """The outline of the mask's largest part, simplified until it has at most VERTICES corners, float [V, 2]."""
    corners = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.uint8)  # where four pixels meet
    for y, x in np.ndindex(2, 2):
        corners[y : y + mask.shape[0], x : x + mask.shape[1]] |= mask
    contours, _ = cv2.findContours(corners, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(contours, key=cv2.contourArea)
    tolerance = 0.01 * cv2.arcLength(outline, True)
    polygon = outline
    while len(polygon) > VERTICES:
        polygon = cv2.approxPolyDP(outline, tolerance, True)
        tolerance = 1.3 * tolerance + 0.1
    if len(polygon) < 3:  # a line: its box
        x, y, w, h = cv2.boundingRect(outline)
        right, low = x + w - 1, y + h - 1
        return torch.tensor([[x, y], [right, y], [right, low], [x, low]], dtype=torch.float32)
    return torch.from_numpy(polygon[:, 0].astype(np.float32))
