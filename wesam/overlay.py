"""Masks drawn over images, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

COLOURS = torch.tensor(
    [[230, 60, 60], [40, 140, 240], [250, 180, 30], [60, 190, 90], [170, 90, 220], [20, 190, 200], [240, 110, 180]]
)


def overlay(image: Tensor, masks: Tensor, *, boxes: Tensor | None = None, points: Tensor | None = None) -> Image.Image:
    """The image with each mask tinted and outlined, and prompts drawn.

    image: uint8 [3, H, W]. masks: bool [N, H, W]. boxes: [N, 4] and points: [N, P, 2], in pixels of the image.
    """
    canvas = image.permute(1, 2, 0).float()
    for i, mask in enumerate(masks):
        canvas[mask] = 0.55 * canvas[mask] + 0.45 * COLOURS[i % len(COLOURS)]
    pixels = np.ascontiguousarray(canvas.round().clamp(0, 255).to(torch.uint8).numpy())
    for i, mask in enumerate(masks):
        outline, _ = cv2.findContours(mask.numpy().astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outline, -1, COLOURS[i % len(COLOURS)].tolist(), 1)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for box in boxes.tolist() if boxes is not None else []:
        pen.rectangle(box, outline=(255, 255, 255))
    for x, y in points.reshape(-1, 2).tolist() if points is not None else []:
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 255, 255), outline=(0, 0, 0))
    return picture


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], cell: int = 224) -> Image.Image:
    """Pictures in a grid, a title over each column; every picture is scaled to fit a square cell of this side."""
    head, gap = 26, 6
    width = len(titles) * (cell + gap) + gap
    page = Image.new("RGB", (width, head + len(rows) * (cell + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    for c, title in enumerate(titles):
        pen.text((gap + c * (cell + gap) + 2, 5), title, fill="black", font_size=15)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            factor = cell / max(picture.size)
            fitted = picture.resize(
                (round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS
            )
            page.paste(fitted, (gap + c * (cell + gap), head + r * (cell + gap)))
    return page
