"""What the frozen anchor says about every training image, computed once and kept.

The model is frozen, the prompts are given once, and an image is seen whole or in the window around one of its prompts,
in four flips; so all that the losses ever ask of the
anchor are constants: each prompt's mask and the average of the anchor's features over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from wesam.adapters import autocast
from wesam.config import ComputeConfig, PromptKind
from wesam.crops import WHOLE, cut, inside, windows
from wesam.data.domain import Sample
from wesam.losses import pooled
from wesam.prompts import Prompts, weak_labels
from wesam.sam.promptable import decode, encode, resize
from wesam.views import flip

CHUNK = 64
"""Prompts decoded at once."""

Flips = tuple[bool, bool]
"""Horizontally, vertically."""

Place = tuple[int, int]
"""What is looked at: the image's number, and that of the prompt around which it is cropped, or WHOLE."""


@dataclass(frozen=True)
class Prepared:
    """A training image, or the window around one of its prompts, as the model takes it."""

    image: Tensor
    """uint8 [3, h, w], the longer side at the model's input size."""
    prompts: Prompts
    """The N that lie in it, in pixels of ``image``."""
    masks: Tensor
    """The true masks, bool [N, H, W], before resizing; only a supervised method looks at them."""


@dataclass(frozen=True)
class Answer:
    """The anchor's answers to the prompts of one flipped image."""

    masks: Tensor
    """bool [N, m, m], in SAM's low-resolution frame."""
    features: Tensor
    """float [N, C]: the anchor's feature map averaged over each mask."""


class Anchor:
    """The training images of a domain with the anchor's answers, each made when first asked for and then kept."""

    def __init__(
        self, sam: Sam, split: Sequence[Sample], prompt: PromptKind, crop: float = 0.0,
        compute: ComputeConfig | None = None,
    ) -> None:  # fmt: skip
        self.sam = sam
        self._compute = compute or ComputeConfig()
        self._split, self._prompt, self._crop = split, prompt, crop
        self._labels: dict[int, Prompts] = {}
        self._prepared: dict[Place, Prepared] = {}
        self._answers: dict[tuple[Place, Flips], Answer] = {}

    def __len__(self) -> int:
        return len(self._split)

    def place(self, index: int, generator: torch.Generator) -> Place:
        """The whole image of this number, or where it is cropped, one of its prompts at random."""
        if not self._crop:
            return index, WHOLE
        return index, int(torch.randint(len(self._given(index)), (), generator=generator))

    def _given(self, index: int) -> Prompts:
        if index not in self._labels:
            sample = self._split[index]
            self._labels[index] = weak_labels(sample.masks, self._prompt, sample.key)
        return self._labels[index]

    def prepared(self, place: Place) -> Prepared:
        """What is at this place, resized, with the weak labels that lie in it."""
        if place not in self._prepared:
            index, around = place
            sample, prompts = self._split[index], self._given(index)
            image, masks = sample.image, sample.masks
            if around != WHOLE:
                number = torch.tensor([around])
                window = windows(prompts[number], (image.shape[1], image.shape[2]), self._crop)[0]
                there = inside(prompts, window)
                image, masks, prompts = cut(image, window), cut(masks[there], window), prompts[there].seen_in(window)
            side: int = self.sam.image_encoder.img_size
            self._prepared[place] = Prepared(resize(image, side), prompts.scaled(side / max(image.shape[1:])), masks)
        return self._prepared[place]

    @torch.no_grad()
    def answer(self, place: Place, flips: Flips) -> Answer:
        """The anchor's answers for what is at this place, seen with these flips."""
        at = (place, flips)
        if at not in self._answers:
            item = self.prepared(place)
            size = (item.image.shape[1], item.image.shape[2])
            prompts = item.prompts.flipped(*flips, size)
            with autocast(self.sam, self._compute):
                embedding = encode(self.sam, [flip(item.image, *flips)])
            masks, features = [], []
            for part in torch.arange(len(prompts)).split(CHUNK):
                with autocast(self.sam, self._compute):
                    mask = decode(self.sam, embedding, [prompts[part]]).logits > 0
                features.append(pooled(embedding, torch.zeros_like(part), mask))
                masks.append(mask)
            self._answers[at] = Answer(torch.cat(masks), torch.cat(features))
        return self._answers[at]

    def truth(self, place: Place, flips: Flips, chosen: Tensor) -> Tensor:
        """The true masks of the chosen instances, flipped, in SAM's low-resolution frame: covered share, [n, m, m]."""
        item = self.prepared(place)
        side: int = self.sam.image_encoder.img_size
        h, w = item.image.shape[1:]
        small = F.interpolate(item.masks[chosen][:, None].float(), (h, w), mode="area")[:, 0]
        padded = F.pad(flip(small, *flips), (0, side - w, 0, side - h))
        return F.avg_pool2d(padded, side // (4 * self.sam.prompt_encoder.image_embedding_size[0]))
