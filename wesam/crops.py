"""Windows around the prompts, for instances that are too small in the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from wesam.prompts import Prompts

SMALLEST = 32
"""Side of a window at least, in pixels of the image."""

WHOLE = -1
"""In the place of a prompt's number: the whole image."""


def windows(prompts: Prompts, size: tuple[int, int], crop: float) -> Tensor:
    """A square window for each prompt, int [N, 4], (x0, y0, x1, y1) in pixels.

    size: the image's (height, width). crop: the window's side, in longer sides of what the prompt spans. A window
    at the edge is moved into the image; one that is longer than the image ends with it, and so is no square. It holds
    all that the prompt spans of the image: one that would end within its last pixel is a pixel longer. A prompt
    that spans nothing, such as a single click, says nothing about the object's size: its window is the whole image.
    """
    spans = prompts.extents()
    low, high = spans[:, :2], spans[:, 2:]
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    length = (high - low).amax(1, keepdim=True)
    side = torch.where(length > 0, (crop * length).clamp(min=SMALLEST).ceil(), float(max(size)))
    low, high = low.nan_to_num(0, 0, 0), high.nan_to_num(0, 0, 0)  # no click on the object at all
    begin = ((low + high - side) / 2).floor()
    side += (begin.clamp(min=0) + side < torch.minimum(high, limit)).any(1, keepdim=True)  # the floor has cut its end
    begin = torch.minimum(begin, limit - side).clamp(min=0)
    end = torch.minimum(begin + side, limit)
    return torch.cat([begin, end], 1).int()


def inside(prompts: Prompts, window: Tensor) -> Tensor:
    """The numbers of the prompts that lie in a window (x0, y0, x1, y1) as a whole, int [M]."""
    spans = prompts.extents()
    return ((spans[:, :2] >= window[:2] - 1) & (spans[:, 2:] <= window[2:] + 1)).all(1).nonzero()[:, 0]


def cut(image: Tensor, window: Tensor) -> Tensor:
    """The part [..., h, w] of an image or of masks [..., H, W] that a window shows."""
    x0, y0, x1, y1 = window.tolist()
    return image[..., y0:y1, x0:x1]
