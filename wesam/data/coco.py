"""A domain in COCO's instances format: a folder with train.json, val.json and test.json, and images beside them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle

from wesam.data.domain import SPLITS, Domain, Sample, Split
from wesam.errors import InputError


def coco(folder: Path) -> Domain:
    """The domain in this folder, named after it; raises InputError for anything missing or unreadable.

    Each file lists images (``file_name`` relative to the folder) and annotations with a ``segmentation``: polygons,
    compressed or uncompressed RLE. Crowd regions, empty instances and images without annotations are left out; an image
    all of whose instances are empty raises InputError when it is read.
    """
    digest = hashlib.sha256()
    splits: dict[str, Split] = {}
    for name in SPLITS:
        path = folder / f"{name}.json"
        try:
            text = path.read_bytes()
            listing = json.loads(text)
        except OSError:
            raise InputError(f"no {name}.json in {folder}: a domain has train.json, val.json and test.json") from None
        except ValueError as e:
            raise InputError(f"{path} is not JSON: {e}") from None
        digest.update(text)
        splits[name] = _split(path, listing, digest)
    return Domain(folder.resolve().name, splits, digest.hexdigest(), f"COCO instances in {folder}")


def _split(path: Path, listing: Any, digest: hashlib._Hash) -> Split:
    """The split, whose images' sizes in bytes go into the digest."""
    try:
        annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for a in listing["annotations"]:
            if not a.get("iscrowd") and a.get("segmentation"):
                annotations[a["image_id"]].append(a)
        images = [i for i in listing["images"] if annotations[i["id"]]]
        for i in images:
            _ = i["file_name"], i["height"], i["width"]
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is not in COCO instances format: {type(e).__name__} {e}") from None
    if not images:
        raise InputError(f"{path} has no image with an instance mask")
    for i in images:
        file = path.parent / i["file_name"]
        if not file.is_file():
            raise InputError(f"{path} names an image that is not there: {i['file_name']}")
        digest.update(f"{i['file_name']} {file.stat().st_size}\n".encode())
    return Split(len(images), lambda n: _sample(path, images[n], annotations[images[n]["id"]]))


def _sample(path: Path, entry: dict[str, Any], annotations: list[dict[str, Any]]) -> Sample:
    file = path.parent / entry["file_name"]
    pixels = read_image(file)
    h, w = pixels.shape[:2]
    if (h, w) != (entry["height"], entry["width"]):
        raise InputError(f"{file} has {w} x {h} pixels, {path.name} says {entry['width']} x {entry['height']}")
    masks = [m for a in annotations if (m := _mask(path, a, h, w)).any()]
    if not masks:
        raise InputError(f"{path}: every instance of image {entry['file_name']} is empty")
    key = f"{path.parent.resolve().name}/{path.stem}/{entry['file_name']}"
    return Sample(key, torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(np.stack(masks)))


def read_image(file: Path) -> np.ndarray:
    """The image in RGB, uint8 [H, W, 3]; raises InputError if it cannot be read or has more than 8 bits a channel."""
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):
                raise InputError(f"{file} has more than 8 bits a channel: save it with 8, scaled as it should be seen")
            return np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as e:
        raise InputError(f"cannot read the image {file}: {e}") from None


def _mask(path: Path, annotation: dict[str, Any], h: int, w: int) -> np.ndarray:
    given = annotation["segmentation"]
    try:
        if isinstance(given, list):
            given = rle.merge(rle.frPyObjects(given, h, w))
        elif isinstance(given["counts"], list):
            given = rle.frPyObjects(given, h, w)
        mask: np.ndarray = rle.decode(given).astype(bool)
    except Exception as e:  # pycocotools raises bare ones
        raise InputError(f"{path}: annotation {annotation.get('id')} has an unreadable segmentation: {e}") from None
    if mask.shape != (h, w):
        raise InputError(f"{path}: the mask of annotation {annotation.get('id')} has another size than its image")
    return mask
