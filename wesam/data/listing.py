"""What the readers of all layouts make of a folder: its images by split, each with its instances, not yet decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from wesam.config import PromptKind
from wesam.data.domain import Domain, Sample, Split, Unusable
from wesam.data.files import Folder
from wesam.data.images import may_have_size, read_image
from wesam.data.segmentations import unpacked
from wesam.errors import InputError
from wesam.prompts import NO_CLICK, Prompts, vanishing

Size = tuple[int, int]
"""(height, width) in pixels."""

Click = tuple[float, float, int]
"""x, y in pixels, and 1 on the object or 0 beside it."""


@dataclass
class Findings:
    """What is wrong with a domain's files."""

    fatal: list[str] = field(default_factory=list)
    """What makes it unusable."""
    left_out: list[str] = field(default_factory=list)
    """Annotations and images that are not used, and why."""


SHOWN = 3
"""Of what is left out, where a line tells of it."""


def told(left_out: Sequence[str]) -> str:
    """The end of a line: the first of what is left out, and how much there is besides; empty for nothing."""
    more = f", and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"; left out: {'; '.join(left_out[:SHOWN])}{more}" if left_out else ""


@dataclass(frozen=True)
class Given:
    """The weak labels of an instance whose mask is not known."""

    box: tuple[float, float, float, float] | None = None
    """(x0, y0, x1, y1) in pixels."""
    clicks: tuple[Click, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An image and its instances: masks as compressed RLEs, or weak labels; none, where nothing is known of it."""

    name: str
    """Its file, relative to the domain's folder."""
    size: Size
    instances: Sequence[dict[str, Any]] | Sequence[Given]


def by_name(entries: Sequence[Entry]) -> list[Entry]:
    """The images sorted by the names of their files."""
    return sorted(entries, key=lambda e: e.name)


def domain(
    folder: Folder, entries: Mapping[str, Sequence[Entry]], found: Findings, digest: str, note: str, *, name: str = "",
    keyed_by_split: bool = False,
) -> Domain:  # fmt: skip
    """The domain of these images.

    name: the folder's where none is given. keyed_by_split: the same file may be in several splits. Raises Unusable
    with a line for each thing that is fatal.
    """
    name = _printable(name or folder.name)
    wrong = set()
    for entry in {(e.name, e.size): e for part in entries.values() for e in part}.values():
        if problem := _unusable(folder, entry):
            found.fatal.append(problem)
            wrong.add(entry.name)
    for split, part in entries.items():
        if not part and not found.fatal:
            found.fatal.append(f"{folder.place}: no image with an instance is left for {split}")
    splits = {}
    for split, whole in entries.items():
        part = [e for e in whole if e.name not in wrong]
        prefix = f"{name}/{split}" if keyed_by_split else name
        splits[split] = Split(
            len(part), lambda n, part=part, prefix=prefix: _sample(folder, part[n], prefix),  # type: ignore[misc]
            small=lambda side, part=part: sum(_vanishing(e, side) for e in part),  # type: ignore[misc]
            unclicked=sum(any(isinstance(i, Given) and not i.clicks for i in e.instances) for e in part),
        )  # fmt: skip
    made = Domain(name, splits, digest, note, tuple(found.left_out))
    if found.fatal:
        raise Unusable(found.fatal, made)
    return made


def _printable(name: str) -> str:
    """A name as the system has it, with what of it is not UTF-8 escaped."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _unusable(folder: Folder, entry: Entry) -> str | None:
    """What is wrong with an image's file, by its header, if anything is; of a distant one only that it is there."""
    if entry.name not in folder:
        return f"{folder.place} has no image {entry.name}, which is listed"
    if folder.distant:
        return None
    try:
        if not may_have_size(folder.local(entry.name), entry.size):
            return f"{folder.path(entry.name)} is not of {entry.size[1]} x {entry.size[0]} pixels, as its labels are"
    except InputError as e:
        return str(e)
    return None


def _sample(folder: Folder, entry: Entry, prefix: str) -> Sample:
    key = f"{prefix}/{_printable(entry.name)}"
    pixels = read_image(folder.local(entry.name), entry.size)
    if pixels.shape[:2] != entry.size:
        h, w = entry.size
        raise InputError(f"{folder.path(entry.name)} is not of {w} x {h} pixels, as its labels are")
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    given = [i for i in entry.instances if isinstance(i, Given)]
    if given or not entry.instances:
        return Sample(key, image, _prompts(given))
    return Sample(key, image, torch.from_numpy(np.stack([unpacked(code) for code in entry.instances])))  # type: ignore[arg-type]


def _prompts(given: Sequence[Given]) -> dict[PromptKind, Prompts]:
    """What all of them have, by kind."""
    prompts: dict[PromptKind, Prompts] = {}
    if not given:
        return prompts
    boxes = [g.box for g in given if g.box is not None]
    if len(boxes) == len(given):
        prompts["box"] = Prompts(boxes=torch.tensor(boxes, dtype=torch.float32))
    if all(g.clicks for g in given):
        most = max(len(g.clicks) for g in given)
        padded = [[*g.clicks, *[(0.0, 0.0, NO_CLICK)] * (most - len(g.clicks))] for g in given]
        clicks = torch.tensor(padded, dtype=torch.float64)
        prompts["point"] = Prompts(points=clicks[..., :2].float(), point_labels=clicks[..., 2].long())
    return prompts


def _vanishing(entry: Entry, side: int) -> int:
    boxes = [i.box for i in entry.instances if isinstance(i, Given) and i.box is not None]
    codes = [i for i in entry.instances if isinstance(i, dict)]
    if codes:
        found = torch.from_numpy(rle.toBbox(codes)).float().view(-1, 4)
        extents = torch.cat([found[:, :2], found[:, :2] + found[:, 2:]], 1)
    else:
        extents = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    gone: Tensor = vanishing(extents, entry.size, side)
    return int(gone.sum())
