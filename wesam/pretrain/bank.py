"""The latest procedural scenes, made in the background and kept where the model is trained."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wesam.data.scenes import TRAINING, Style, scene

FIRST = 32
"""Groups of scenes that are there at the first step."""


class Groups(Dataset[tuple[Tensor, Tensor]]):
    """Group j of scenes, a pure function of the seed: images uint8 [n, 3, side, side] and labels uint8 [n, side, side].

    A label is the number of the instance that is seen at a pixel, from 1, and 0 where there is none. rank and world:
    of ``world`` processes that train together, each makes scenes of its own.
    """

    def __init__(
        self, seed: int, count: int, side: int, style: Style = TRAINING, rank: int = 0, world: int = 1
    ) -> None:
        self.seed, self.count, self.side, self.style, self.rank, self.world = seed, count, side, style, rank, world

    def __getitem__(self, group: int) -> tuple[Tensor, Tensor]:
        """This group's scenes."""
        cv2.setNumThreads(1)
        made = [self.scene((group * self.count + k) * self.world + self.rank) for k in range(self.count)]
        images, labels = zip(*made, strict=True)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(labels))

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scene ``index``: image [side, side, 3] and labels [side, side]."""
        rng = np.random.default_rng([self.seed, 8, index])  # domains use other first words: no scene is shared
        image, masks = scene(rng, self.side, self.side, self.style)
        number = np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None]
        return image, (masks * number).max(0)  # visible parts do not overlap


class Bank:
    """The groups that a step may draw from: the latest ``size`` up to its own; the same for the same seed and step."""

    def __init__(self, groups: Groups, size: int, step: int, workers: int, device: torch.device) -> None:
        """step: the first that will be asked for. workers: processes that make scenes; 0 makes them in this one."""
        self._count, self._size = groups.count, size
        self._images = torch.zeros(size * groups.count, 3, groups.side, groups.side, dtype=torch.uint8, device=device)
        self._labels = torch.zeros(size * groups.count, groups.side, groups.side, dtype=torch.uint8, device=device)
        self._next = max(0, step + FIRST - size)
        loader = DataLoader(
            groups,
            batch_size=None,
            sampler=range(self._next, 2**40),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="forkserver" if workers else None,
        )
        self._made: Iterator[tuple[Tensor, Tensor]] = iter(loader)

    def draw(self, step: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """``count`` scenes for this step, images uint8 [count, 3, side, side] and labels [count, side, side]; the steps
        are asked for in order.
        """
        end = step + FIRST
        while self._next < end:
            images, labels = next(self._made)
            at = self._next % self._size * self._count
            self._images[at : at + self._count] = images.to(self._images.device, non_blocking=True)
            self._labels[at : at + self._count] = labels.to(self._labels.device, non_blocking=True)
            self._next += 1
        there = min(end, self._size) * self._count
        chosen = torch.from_numpy(rng.integers(0, there, count)).to(self._images.device)
        return self._images[chosen], self._labels[chosen]
