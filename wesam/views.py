"""The weak and the strong view of an image: geometry for all branches, colours for the student alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as T


def flip(image: Tensor, horizontal: bool, vertical: bool) -> Tensor:
    """The image or masks [..., H, W] mirrored left-right and/or up-down."""
    axes = [a for a, on in ((-1, horizontal), (-2, vertical)) if on]
    return image.flip(axes) if axes else image


def strong(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """A photometric change of an image, uint8 [3, H, W] -> the same, on the device where it is; geometry stays.

    Each of posterize, equalize, sharpen, solarize, brightness with contrast, and shadow is applied with probability
    one half. strength: 0 changes nothing, 1 is the usual size of each change, 2 twice that.
    """
    if strength == 0:
        return image

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    if draw(0, 1) < 0.5:
        image = T.posterize(image, bits=max(2, 8 - round(draw(0, 4 * strength))))
    if draw(0, 1) < 0.5:
        image = _mix(image, T.equalize(image), min(1.0, draw(0, strength)))
    if draw(0, 1) < 0.5:
        image = T.adjust_sharpness(image, 1 + draw(0, 3 * strength))
    if draw(0, 1) < 0.5:
        image = T.solarize(image, max(0.0, 255 - draw(0, 64 * strength)))
    if draw(0, 1) < 0.5:
        image = T.adjust_brightness(image, max(0.1, 1 + draw(-0.2, 0.2) * strength))
        image = T.adjust_contrast(image, max(0.1, 1 + draw(-0.2, 0.2) * strength))
    if draw(0, 1) < 0.5:
        image = _shadow(image, min(0.9, draw(0.1, 0.5) * strength), draw(0, 2 * torch.pi), draw(-0.5, 0.5))
    return image


def _mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (a + (b.float() - a.float()) * share).round().clamp(0, 255).to(torch.uint8)


def _shadow(image: Tensor, depth: float, angle: float, offset: float) -> Tensor:
    """Darkens the part of the image on one side of a line, by ``depth`` of its brightness."""
    h, w = image.shape[1:]
    y, x = (torch.linspace(-1, 1, n, device=image.device) for n in (h, w))
    angle_t = torch.tensor(angle)
    side = (x * angle_t.cos() + y[:, None] * angle_t.sin() > offset).float()
    return (image * (1 - depth * side)).to(torch.uint8)
