"""From scenes to a step's images, prompts and true masks, all with tensors on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wesam.config import PromptKind
from wesam.prompts import POINTS, Prompts, tight_boxes, weak_labels

KINDS: tuple[PromptKind, ...] = ("box", "point", "coarse")
SHARES = (0.42, 0.43, 0.15)
"""How often each kind of prompt is trained."""

SMALLEST = 40
"""Instances with fewer visible pixels than this are not asked for."""


@dataclass(frozen=True)
class Batch:
    """What one step of training needs: B images with P prompts each."""

    images: list[Tensor]
    """B images, each uint8 [3, h, w], the longer side ``side``."""
    prompts: list[Prompts]
    """B entries of P prompts of one kind."""
    truth: Tensor
    """bool [B * P, side, side]: the instances that the prompts mean, in the padded square."""
    labels: Tensor
    """uint8 [B, side, side]: all instances by number, 0 where there is none."""


def make_batch(
    images: Tensor, labels: Tensor, kind: PromptKind, per_image: int, zoomed: float, rng: np.random.Generator
) -> Batch:
    """A batch from scenes: images uint8 [B, 3, side, side] and labels uint8 [B, side, side]; zoomed: share of them."""
    images, labels = _recolour(*_turn(images, labels, rng), rng)
    images, labels = zoom(images, labels, zoomed, rng)
    sizes = [_padding(rng, images.shape[-1]) for _ in images]
    before = labels
    labels = labels.clone()
    for one, (h, w) in zip(labels, sizes, strict=True):
        one[h:], one[:, w:] = 0, 0
    gone = _areas(labels).amax(1) < SMALLEST
    labels[gone] = before[gone]
    whole = gone.tolist()
    shown = [x if g else x[:, :h, :w] for x, (h, w), g in zip(images, sizes, whole, strict=True)]
    chosen = choose(labels, per_image, rng)
    truth = (labels[:, None] == chosen[..., None, None]).flatten(0, 1)
    all_prompts = draw_prompts(truth, kind, rng)
    at = torch.arange(len(truth)).split(per_image)
    return Batch(shown, [all_prompts[i] for i in at], truth, labels)


def choose(labels: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """``count`` instances of each image, uint8 [B, count]: different ones where there are as many, else again."""
    areas = _areas(labels)
    key = torch.from_numpy(rng.random(areas.shape, dtype=np.float32)).to(labels.device)
    order = (key + (areas >= SMALLEST) * 2).argsort(1, descending=True)
    there = (areas >= SMALLEST).sum(1, keepdim=True).clamp(min=1)
    turn = torch.arange(count, device=labels.device)[None] % there
    return (order.gather(1, turn) + 1).to(torch.uint8)


def draw_prompts(truth: Tensor, kind: PromptKind, rng: np.random.Generator) -> Prompts:
    """Prompts as imprecise as a person's, for masks bool [N, side, side]: jittered boxes, few clicks, polygons."""
    if kind == "coarse":
        return weak_labels(truth.cpu(), "coarse", "")
    if kind == "point":
        inside, outside = POINTS, POINTS
        if rng.random() < 0.5:
            inside, outside = int(rng.integers(1, POINTS + 1)), int(rng.integers(0, POINTS + 1))
        points = clicks(truth, inside, outside, rng)
        labels = torch.tensor([1] * inside + [0] * outside, device=truth.device).expand(len(truth), -1)
        return Prompts(points=points, point_labels=labels)
    boxes = tight_boxes(truth)
    if rng.random() < 0.6:
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        noise = torch.from_numpy(rng.normal(0, 0.05, size.shape).astype(np.float32)).to(truth.device)
        boxes = boxes + (noise * size).clamp(-10, 10)
    return Prompts(boxes=boxes)


def clicks(truth: Tensor, inside: int, outside: int, rng: np.random.Generator) -> Tensor:
    """Clicks at pixel centres, float [N, inside + outside, 2], as :func:`wesam.prompts.weak_labels` draws them: the
    first inside the masks, bool [N, side, side], the others around them.
    """
    side = truth.shape[-1]
    boxes = tight_boxes(truth)
    margin = 4 + (boxes[:, 3] - boxes[:, 1]).floor_divide(4)
    at = torch.arange(side, device=truth.device) + 0.5
    across = (at > boxes[:, :1] - margin[:, None]) & (at < boxes[:, 2:3] + margin[:, None])
    down = (at > boxes[:, 1:2] - margin[:, None]) & (at < boxes[:, 3:] + margin[:, None])
    near = (down[:, :, None] & across[:, None, :]) & ~truth
    generator = torch.Generator(truth.device).manual_seed(int(rng.integers(2**62)))
    key = torch.rand(truth.shape, generator=generator, device=truth.device)
    found = []
    for where, count in ((truth, inside), (near, outside)):
        if count:
            # the largest of random keys: drawn without replacement; anywhere at all where there are too few
            pixel = (key + where).flatten(1).topk(count, 1).indices
            found.append(torch.stack([pixel % side, pixel.div(side, rounding_mode="floor")], -1) + 0.5)
    return torch.cat(found, 1)


def zoom(images: Tensor, labels: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """This share of the images turned by any angle around one instance, which then spans 15 to 75 % of the side.

    What lies beyond the border is mirrored and belongs to no instance. An image in which nothing would be left to ask
    for stays as it is.
    """
    count, side = len(images), images.shape[-1]
    chosen = choose(labels, 1, rng)
    boxes = tight_boxes(labels == chosen[..., None])
    extent = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1)
    draws = torch.from_numpy(rng.random((5, count), dtype=np.float32)).to(images.device)
    factor = ((0.15 + 0.6 * draws[0]) * side / extent).clamp(0.7, 5)
    angle = 2 * torch.pi * draws[1]
    span = (side / factor)[:, None]  # the part of the scene that is seen, in its pixels
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 + (draws[2:4].T - 0.5) * (span - extent[:, None]).clamp(min=0) * 0.7
    middle = torch.maximum(torch.minimum(middle, side - span / 2), span / 2).where(span < side, side / 2)
    cos, sin = angle.cos() / factor, angle.sin() / factor
    shift = middle / side * 2 - 1
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [count, 1, side, side], align_corners=False)
    seen = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    seen = seen.round().clamp(0, 255).to(torch.uint8)
    named = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    named = named[:, 0].to(torch.uint8)
    use = (draws[4] < share) & (_areas(named).amax(1) >= SMALLEST)
    return torch.where(use[:, None, None, None], seen, images), torch.where(use[:, None, None], named, labels)


def _turn(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The whole batch by a multiple of 90 degrees, mirrored half of the time."""
    turns = int(rng.integers(4))
    images, labels = images.rot90(turns, (2, 3)), labels.rot90(turns, (1, 2))
    return (images.flip(3), labels.flip(2)) if rng.integers(2) else (images, labels)


def _recolour(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The batch with its channels in any order; a fifth of the images as their negatives."""
    images = images[:, torch.from_numpy(rng.permutation(3))]
    negative = torch.from_numpy(rng.random(len(images)) < 0.2).to(images.device)
    return torch.where(negative[:, None, None, None], 255 - images, images), labels


def _padding(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """The (height, width) that is shown; an image that is not square is padded."""
    short = int(rng.integers(int(0.58 * side), side))
    return ((side, side), (side, short), (short, side))[int(rng.choice(3, p=(0.65, 0.175, 0.175)))]


def _areas(labels: Tensor) -> Tensor:
    """Visible pixels of the instances 1 to 63, int [B, 63]."""
    count = len(labels)
    index = labels.flatten(1).long() + 64 * torch.arange(count, device=labels.device)[:, None]
    return torch.bincount(index.flatten().clamp(max=64 * count - 1), minlength=64 * count).view(count, 64)[:, 1:]
