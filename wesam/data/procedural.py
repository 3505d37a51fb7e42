"""The five procedural domains: scenes shifted as the paper's five kinds of data are. No files needed."""

from __future__ import annotations

import hashlib
import inspect

import numpy as np
import torch

from wesam.data import scenes
from wesam.data.domain import SPLITS, Domain, Sample, Split
from wesam.data.scenes import STYLES, scene

SIZES = {"train": 64, "val": 24, "test": 64}
"""Images a split."""

NOTES = {
    "clean": "unseen scenes like those that the embedded model was trained on",
    "corrupted": "blocks of the image are lost, as after a broken transmission",
    "medical": "grey, faded contrast, objects that fade towards their borders",
    "camouflaged": "objects that fade into what lies under them, without shadows or outlines",
    "cluttered": "behind a fence that belongs to no object",
}


def procedural(name: str) -> Domain:
    """The procedural domain of this name, a key of ``scenes.STYLES``; the same on every machine."""
    source = hashlib.sha256(f"{name} {SIZES} {inspect.getsource(scenes)}".encode()).hexdigest()
    splits = {s: Split(SIZES[s], lambda i, s=s: _sample(name, s, i)) for s in SPLITS}  # type: ignore[misc]
    return Domain(name, splits, source, f"procedural: {NOTES[name]}")


def _sample(name: str, split: str, index: int) -> Sample:
    rng = np.random.default_rng([1 + SPLITS.index(split), index, *name.encode()])
    image, masks = scene(rng, style=STYLES[name])
    return Sample(
        f"{name}/{split}/{index}", torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(masks)
    )
