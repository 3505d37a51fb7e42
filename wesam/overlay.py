"""Masks drawn over images, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from wesam.data.domain import Sample
from wesam.prompts import NO_CLICK, Prompts

COLOURS = torch.tensor(
    [[230, 60, 60], [40, 140, 240], [250, 180, 30], [60, 190, 90], [170, 90, 220], [20, 190, 200], [240, 110, 180]]
)


def overlay(image: Tensor, masks: Tensor, prompts: Prompts | None = None) -> Image.Image:
    """The image with each mask tinted and outlined, and the prompts drawn: clicks have its colour, those beside
    it as a rim alone.

    image: uint8 [3, H, W]. masks: bool [N, H, W]. prompts: in pixels of the image.
    """
    canvas = image.permute(1, 2, 0).float()
    for i, mask in enumerate(masks):
        canvas[mask] = 0.55 * canvas[mask] + 0.45 * COLOURS[i % len(COLOURS)]
    pixels = np.ascontiguousarray(canvas.round().clamp(0, 255).to(torch.uint8).numpy())
    for i, mask in enumerate(masks):
        outline, _ = cv2.findContours(mask.numpy().astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outline, -1, COLOURS[i % len(COLOURS)].tolist(), 1)
    picture = Image.fromarray(pixels)
    if prompts is not None:
        _draw(ImageDraw.Draw(picture), prompts, picture.size)
    return picture


def _draw(pen: ImageDraw.ImageDraw, prompts: Prompts, size: tuple[int, int]) -> None:
    """size: (width, height) of the picture, on whose last pixels a box that ends at its edge is drawn."""
    white = (255, 255, 255)
    last = torch.tensor([*size, *size], dtype=torch.float32) - 1
    for box in prompts.boxes.clamp(min=0).minimum(last).tolist() if prompts.boxes is not None else []:
        pen.rectangle(box, outline=white)
    for polygon in prompts.polygons or ():
        corners = [tuple(p) for p in polygon.tolist()]
        pen.line([*corners, corners[0]], fill=white)
    if prompts.points is None or prompts.point_labels is None:
        return
    for i, (clicks, labels) in enumerate(zip(prompts.points.tolist(), prompts.point_labels.tolist(), strict=True)):
        own = tuple(COLOURS[i % len(COLOURS)].tolist())
        for (x, y), label in zip(clicks, labels, strict=True):
            if label != NO_CLICK:
                fill, rim = (own, white) if label else ((0, 0, 0), own)
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=fill, outline=rim)


def contact_sheet(
    split: Sequence[Sample], given: Callable[[int], Prompts], title: str, *, images: int, columns: int = 4
) -> Image.Image:
    """So many images of a split, evenly spread over it, with their masks and weak labels.

    given: the weak labels of an image by its number in the split, in its pixels.
    """
    cell = 300
    rows: list[list[Image.Image]] = []
    for n in range(count := min(images, len(split))):
        number = n * len(split) // count
        sample, prompts = split[number], given(number)
        factor = cell / max(sample.image.shape[1:])
        size = [max(1, round(n * factor)) for n in sample.image.shape[1:]]
        image = F.interpolate(sample.image[None].float(), size, mode="bilinear", antialias=True)[0].to(torch.uint8)
        masks = sample.known_masks()
        masks = F.interpolate(masks[None].float(), size, mode="nearest-exact")[0] > 0 if len(masks) else masks
        if n % columns == 0:
            rows.append([])
        rows[-1].append(overlay(image, masks, prompts.resized(sample.image.shape[1:], size)))
    return sheet(rows, [title] + [""] * (min(columns, count) - 1), cell)


def sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], cell: int = 224, captions: Sequence[str] = ()
) -> Image.Image:
    """Pictures in a grid, a title over each column and, if given, a caption over each row; every picture is scaled to
    fit a square cell of this side.
    """
    head, gap = 26, 6
    fitted = [[_fitted(picture, cell) for picture in row] for row in rows]
    heights = [max((picture.height for picture in row), default=0) for row in fitted]
    width = len(titles) * (cell + gap) + gap
    page = Image.new("RGB", (width, head + sum(h + gap for h in heights) + len(captions) * head + gap), "white")
    pen = ImageDraw.Draw(page)
    for c, title in enumerate(titles):
        pen.text((gap + c * (cell + gap) + 2, 5), title, fill="black", font_size=15)
    y = head
    for r, row in enumerate(fitted):
        if captions:
            pen.text((gap + 2, y + 6), captions[r], fill="#444444", font_size=13)
            y += head
        for c, picture in enumerate(row):
            page.paste(picture, (gap + c * (cell + gap), y))
        y += heights[r] + gap
    return page


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    factor = cell / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS)
