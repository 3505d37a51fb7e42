"""What a domain is: a name and three disjoint splits of images with instance masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image and its instances."""

    key: str
    """Names the image among all images: domain, split, file."""
    image: Tensor
    """uint8 [3, H, W], RGB."""
    masks: Tensor
    """bool [N, H, W], N >= 1, each with at least one pixel."""


KEPT_BYTES = 2**30
"""What one split keeps in memory at most; images beyond that are read again each time."""


class Split(Sequence[Sample]):
    """The images of one split, read when asked for and then kept while they fit."""

    def __init__(self, size: int, read: Callable[[int], Sample]) -> None:
        self.read = read
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
            self._bytes += sample.image.nbytes + sample.masks.nbytes
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

    def split(self, name: str) -> Split:
        """The images of ``train``, ``val`` or ``test``."""
        return self.splits[name]
