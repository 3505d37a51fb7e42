"""What a domain is: a name and three disjoint splits of images with instances."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from wesam.config import Config, PromptKind
from wesam.errors import InputError
from wesam.prompts import Prompts, tight_boxes, vanishing, weak_labels

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image and its instances."""

    key: str
    """Names the image among all images: domain, split, file."""
    image: Tensor
    """uint8 [3, H, W], RGB."""
    labels: Tensor | Mapping[PromptKind, Prompts]
    """The instances' masks, bool [N, H, W], N >= 1, each with at least one pixel; or, where no masks are known, the
    weak labels that were given, N of each kind; no kind, where nothing is known, to train on the clicks of a grid."""

    @property
    def masks(self) -> Tensor:
        """The instances' masks, bool [N, H, W]; raises InputError if none are known."""
        if isinstance(self.labels, Tensor):
            return self.labels
        known = f"only weak labels ({', '.join(self.labels)})" if self.labels else "no labels at all"
        raise InputError(f"{self.key} has no masks, {known}: no mIoU")

    @property
    def has_masks(self) -> bool:
        """Whether its masks are known."""
        return isinstance(self.labels, Tensor)

    def known_masks(self) -> Tensor:
        """The instances' masks, or none, bool [0, H, W], where they are not known."""
        return self.labels if isinstance(self.labels, Tensor) else self.image.new_zeros(0, *self.image.shape[1:]).bool()

    def __len__(self) -> int:
        """The number of instances; 0 where none are known."""
        return len(self.labels if isinstance(self.labels, Tensor) else next(iter(self.labels.values()), ()))

    def weak_labels(self, kind: PromptKind) -> Prompts:
        """The N weak labels of this kind, as given, or drawn from the masks: always the same ones.

        Raises InputError if there are no masks and none of this kind are given, and for ``grid``, which is no label.
        """
        if kind == "grid":
            raise InputError(
                "grid is no label of a person's, but what a model is sure of: to train on, not to score by"
            )
        if isinstance(self.labels, Tensor):
            return weak_labels(self.labels, kind, self.key)
        if kind == "tight-box" and "box" in self.labels:
            return replace(self.labels["box"], tight=True)
        if kind not in self.labels:
            known = "only weak labels" if self.labels else "no labels at all"
            raise InputError(f"{self.key} has no masks, {known}: --prompt {' or '.join(self.labels or ['grid'])}")
        return self.labels[kind]

    @property
    def boxes(self) -> Tensor | None:
        """The instances' tight boxes, [N, 4], in pixels; None where neither masks nor boxes are known."""
        if isinstance(self.labels, Tensor):
            return tight_boxes(self.labels)
        return self.labels["box"].boxes if "box" in self.labels else None

    def only(self, most: int) -> Sample:
        """The same image with at most so many of its instances, evenly over the list of them; 0 keeps all."""
        count = len(self)
        if not 0 < most < count:
            return self
        chosen = torch.arange(most) * count // most
        labels = self.labels
        few = labels[chosen] if isinstance(labels, Tensor) else {k: given[chosen] for k, given in labels.items()}
        return Sample(self.key, self.image, few)

    def visible(self, side: int) -> Tensor:
        """The numbers of the instances that a model of this input side can see, int [M], by their boxes.

        Where only clicks are given, nothing says how large an instance is: all are.
        """
        boxes = self.boxes
        if boxes is None:
            return torch.arange(len(self))
        return (~vanishing(boxes, (self.image.shape[1], self.image.shape[2]), side)).nonzero()[:, 0]

    @property
    def nbytes(self) -> int:
        """What it takes in memory, but for weak labels."""
        return self.image.nbytes + (self.labels.nbytes if isinstance(self.labels, Tensor) else 0)


KEPT_BYTES = 2**30
"""What one split keeps in memory at most; images beyond that are read again each time."""


class Split(Sequence[Sample]):
    """The images of one split, read when asked for and then kept while they fit."""

    def __init__(
        self, size: int, read: Callable[[int], Sample], small: Callable[[int], int] = lambda side: 0,
        unclicked: int = 0,
    ) -> None:  # fmt: skip
        self.read = read
        self.small = small
        """How many of all instances are too small for a model of this input side (:meth:`Sample.visible`)."""
        self.unclicked = unclicked
        """How many images have a given box without clicks, and so no clicks to prompt with."""
        self._kept: list[Sample | None] = [None] * size
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample = self._kept[index]
        if sample is None:
            sample = self.read(range(len(self))[index])
            self._bytes += sample.nbytes
            if self._bytes <= KEPT_BYTES:
                self._kept[index] = sample
        return sample


@dataclass(frozen=True, eq=False)
class Domain:
    """A domain and its splits by name."""

    name: str
    splits: dict[str, Split]
    digest: str
    """Hexadecimal digest of the data; for a folder, of its annotations and of its images' sizes in bytes."""
    note: str = ""
    """One line of description, with the licence where there is one."""
    left_out: tuple[str, ...] = ()
    """A line for each annotation that is wrong and not used, with the reason."""
    published: bool = False
    """Whether it is the published data set of its name, with the paper's splits."""

    def split(self, name: str) -> Split:
        """The images of ``train``, ``val`` or ``test``."""
        return self.splits[name]

    def scored(self, name: str, most: int) -> Split:
        """The images of a split with at most so many instances of each, as :meth:`Sample.only` has it; 0 keeps all."""
        whole = self.split(name)
        return Split(len(whole), lambda i: whole[i].only(most)) if most else whole

    def check(self, config: Config, *, tested: bool = False) -> None:
        """Raises InputError if it lacks the labels that this configuration trains on or is scored with; tested: on
        test, too.
        """
        used: dict[str, PromptKind] = {"train": config.prompt, "val": config.scored_with}
        used |= {"test": config.scored_with} if tested else {}
        for name, kind in used.items():
            split = self.split(name)
            if kind == "point" and 0 < split.unclicked < len(split):
                raise InputError(
                    f"{split.unclicked} of {len(split)} images of {self.name}, {name}, have boxes without keypoints: "
                    "--prompt box, or leave those annotations away"
                )
            if name != "train" or kind != "grid":
                split[0].weak_labels(kind)

    def vanished(self, config: Config, side: int) -> int:
        """How many training instances a model of this input side is not trained on, since it could not see them."""
        return 0 if config.crop or config.prompt == "grid" else self.split("train").small(side)


def told_shared(one: str, other: str, pixels: Mapping[str, Mapping[bytes, str]]) -> str:
    """A line about the images that two splits have in common, pixel by pixel; empty if there are none.

    pixels: of each split the images' keys by :func:`pixels_digest`.
    """
    both = [(key, pixels[other][digest]) for digest, key in pixels[one].items() if digest in pixels[other]]
    if not both:
        return ""
    first, second = both[0]
    return f"{one} and {other} share {len(both)} image{'s' if len(both) > 1 else ''}, {first} is {second}"


def pixels_digest(sample: Sample) -> bytes:
    """A digest of the image's size and pixels, whatever its file."""
    return hashlib.blake2b(sample.image.contiguous().numpy().tobytes() + repr(sample.image.shape).encode()).digest()


class Unusable(InputError):
    """A domain that has faults, a line for each."""

    def __init__(self, faults: Sequence[str], rest: Domain) -> None:
        super().__init__("\n".join(faults))
        self.rest = rest
        """What is left without the images that are known to be at fault; a split may be empty."""
