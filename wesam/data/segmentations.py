"""Masks from the forms in which COCO's files write them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pycocotools import mask as rle

LARGEST = sys.float_info.max
"""Of a file's numbers, which may have any number of digits; infinity is larger, and NaN is not as small."""


def packed(given: Any, height: int, width: int) -> dict[str, Any]:
    """The compressed RLE of a ``segmentation``: polygons, compressed or uncompressed RLE.

    Raises ValueError, in words, for anything that is not one, reaches far beyond the image or is empty.
    """
    if isinstance(given, list):
        code = rle.merge(rle.frPyObjects([_polygon(p, height, width) for p in _some(given)], height, width))
    elif isinstance(given, dict):
        if given.get("size") != [height, width]:
            raise ValueError(f"its RLE is of size {given.get('size')}, its image of {[height, width]}")
        counts = given.get("counts")
        runs = _counts(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(_whole(r) and r >= 0 for r in runs):
            raise ValueError("its RLE has counts that are none")
        if sum(runs) != height * width:
            raise ValueError(f"its RLE counts {sum(runs)} pixels, its image has {height * width}")
        code = rle.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        raise ValueError("it has no segmentation")
    if not rle.area(code):
        raise ValueError("it is empty")
    return dict(code)


def unpacked(code: dict[str, Any]) -> np.ndarray:
    """The mask, bool [H, W], of a compressed RLE that :func:`packed` has made."""
    mask: np.ndarray = rle.decode(code).astype(bool)
    return mask


def packed_mask(mask: np.ndarray) -> dict[str, Any]:
    """The compressed RLE of a mask, bool [H, W]."""
    return dict(rle.encode(np.asfortranarray(mask, dtype=np.uint8)))


def _some(given: list[Any]) -> list[Any]:
    if not given:
        raise ValueError("it has no segmentation")
    return given


def _polygon(given: Any, height: int, width: int) -> list[float]:
    numbers = isinstance(given, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in given)
    if not numbers or len(given) % 2 or not all(abs(v) <= LARGEST for v in given):
        raise ValueError("a polygon of it is no list of coordinates x, y, x, y, ...")
    if len(given) < 6:
        raise ValueError(f"a polygon of it has {len(given) // 2} points")
    for values, length in ((given[::2], width), (given[1::2], height)):
        if min(values) < -length or max(values) > 2 * length:
            raise ValueError("a polygon of it reaches far beyond the image")
    return [float(v) for v in given]


def _counts(text: str) -> list[int]:
    """The counts that COCO packs into a string: five bits a letter, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError("its RLE has letters that are none of a count")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its RLE ends within a count")
    return runs


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
