"""What the frozen anchor says about every training image, computed once and kept.

The model is frozen, the prompts are given once and there are four flips, so all that the losses ever ask of the
anchor are constants: each prompt's mask and the average of the anchor's features over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from wesam.config import PromptKind
from wesam.data.domain import Sample
from wesam.losses import pooled
from wesam.prompts import Prompts, weak_labels
from wesam.sam.promptable import decode, encode, resize
from wesam.views import flip

CHUNK = 64
"""Prompts decoded at once."""

Flips = tuple[bool, bool]
"""Horizontally, vertically."""


@dataclass(frozen=True)
class Prepared:
    """A training image as the model takes it."""

    image: Tensor
    """uint8 [3, h, w], the longer side at the model's input size."""
    prompts: Prompts
    """In pixels of ``image``."""
    masks: Tensor
    """The true masks, bool [N, H, W], in the frame of the original; only a supervised method looks at them."""


@dataclass(frozen=True)
class Answer:
    """The anchor's answers to the prompts of one flipped image."""

    masks: Tensor
    """bool [N, m, m], in SAM's low-resolution frame."""
    features: Tensor
    """float [N, C]: the anchor's feature map averaged over each mask."""


class Anchor:
    """The training images of a domain with the anchor's answers, each made when first asked for and then kept."""

    def __init__(self, sam: Sam, split: Sequence[Sample], prompt: PromptKind) -> None:
        self.sam = sam
        self._split, self._prompt = split, prompt
        self._prepared: dict[int, Prepared] = {}
        self._answers: dict[tuple[int, Flips], Answer] = {}

    def __len__(self) -> int:
        return len(self._split)

    def prepared(self, index: int) -> Prepared:
        """The resized image at this place and its weak labels."""
        if index not in self._prepared:
            sample = self._split[index]
            side: int = self.sam.image_encoder.img_size
            prompts = weak_labels(sample.masks, self._prompt, sample.key).scaled(side / max(sample.image.shape[1:]))
            self._prepared[index] = Prepared(resize(sample.image, side), prompts, sample.masks)
        return self._prepared[index]

    @torch.no_grad()
    def answer(self, index: int, flips: Flips) -> Answer:
        """The anchor's answers for the image at this place, seen with these flips."""
        at = (index, flips)
        if at not in self._answers:
            item = self.prepared(index)
            size = (item.image.shape[1], item.image.shape[2])
            prompts = item.prompts.flipped(*flips, size)
            embedding = encode(self.sam, [flip(item.image, *flips)])
            masks, features = [], []
            for part in torch.arange(len(prompts)).split(CHUNK):
                mask = decode(self.sam, embedding, [prompts[part]]).logits > 0
                features.append(pooled(embedding, torch.zeros_like(part), mask))
                masks.append(mask)
            self._answers[at] = Answer(torch.cat(masks), torch.cat(features))
        return self._answers[at]

    def truth(self, index: int, flips: Flips, chosen: Tensor) -> Tensor:
        """The true masks of the chosen instances, flipped, in SAM's low-resolution frame: covered share, [n, m, m]."""
        item = self.prepared(index)
        side: int = self.sam.image_encoder.img_size
        h, w = item.image.shape[1:]
        small = F.interpolate(item.masks[chosen][:, None].float(), (h, w), mode="area")[:, 0]
        padded = F.pad(flip(small, *flips), (0, side - w, 0, side - h))
        return F.avg_pool2d(padded, side // (4 * self.sam.prompt_encoder.image_embedding_size[0]))
