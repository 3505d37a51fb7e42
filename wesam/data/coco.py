"""A domain in COCO's instances format: a folder with train.json, val.json and test.json, and images beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from wesam.data.domain import SPLITS, Domain, Sample, Split
from wesam.data.images import MOST_PIXELS, may_have_size, read_image
from wesam.data.segmentations import packed, unpacked
from wesam.errors import InputError

Json = dict[str, Any]


@dataclass
class _Findings:
    """What is wrong with a domain's files."""

    fatal: list[str] = field(default_factory=list)
    """What makes it unusable."""
    left_out: list[str] = field(default_factory=list)
    """Annotations that are not used, and why."""


def coco(folder: Path) -> Domain:
    """The domain in this folder, named after it.

    Each file lists images (``file_name`` relative to the folder) and annotations with a ``segmentation``: polygons,
    compressed or uncompressed RLE. Crowd regions and images without instances are left out; annotations that are wrong
    are left out too, and listed in ``Domain.left_out``. Raises InputError with a line for each thing that makes the
    folder unusable; images are opened, but not decoded.
    """
    digest = hashlib.sha256()
    found = _Findings()
    splits = {name: _split(folder / f"{name}.json", digest, found) for name in SPLITS}
    if found.fatal:
        raise InputError("\n".join(found.fatal))
    kept = {name: split for name, split in splits.items() if split}
    note = f"COCO instances in {folder}"
    return Domain(folder.resolve().name, kept, digest.hexdigest(), note, tuple(found.left_out))


def _split(path: Path, digest: hashlib._Hash, found: _Findings) -> Split | None:
    """The split, whose listing and images' sizes in bytes go into the digest; None if it is unusable."""
    try:
        text = path.read_bytes()
        listing = json.loads(text)
    except OSError:
        found.fatal.append(f"no {path.name} in {path.parent}: a domain has train.json, val.json and test.json")
        return None
    except json.JSONDecodeError as e:
        found.fatal.append(f"{path} is not JSON: {e.msg} in line {e.lineno}, column {e.colno}")
        return None
    except (ValueError, RecursionError) as e:
        found.fatal.append(f"{path} is not JSON: {e}")
        return None
    digest.update(text)
    for key in ("images", "annotations"):
        if not isinstance(listing, dict) or not isinstance(listing.get(key), list):
            found.fatal.append(f"{path} is not in COCO instances format: it has no list of {key}")
            return None
    before = len(found.fatal)
    images = _images(path, listing["images"], found)
    masks = _masks(path, listing["annotations"], images, found)
    used = [i for i in images.values() if masks[i["id"]]]
    for image in used:
        if problem := _unusable(path, image):
            found.fatal.append(problem)
        else:
            digest.update(f"{image['file_name']} {(path.parent / image['file_name']).stat().st_size}\n".encode())
    if not used and len(found.fatal) == before:
        found.fatal.append(f"{path} has no image with an instance mask")
    return Split(len(used), lambda n: _sample(path, used[n], masks[used[n]["id"]]))


def _images(path: Path, given: list[Any], found: _Findings) -> dict[Any, Json]:
    """The images by id."""
    images: dict[Any, Json] = {}
    for n, image in enumerate(given):
        wrong = _wrong_image(image)
        if wrong is None and image["id"] in images:
            wrong = f"its id {image['id']} is that of another"
        if wrong is not None:
            found.fatal.append(f"{path}: image {n} of the list: {wrong}")
        else:
            images[image["id"]] = image
    return images


def _wrong_image(image: Any) -> str | None:
    """What is wrong with an image's entry, if anything is."""
    if not isinstance(image, dict):
        return "it is no object"
    if missing := [k for k in ("id", "file_name", "height", "width") if k not in image]:
        return f"it has no {missing[0]}"
    if not isinstance(image["id"], int | str):
        return f"its id is {image['id']!r}"
    sides = image["height"], image["width"]
    if any(type(s) is not int or s < 1 for s in sides) or sides[0] * sides[1] > MOST_PIXELS:
        return f"its size is {image['width']!r} x {image['height']!r}"
    name = image["file_name"]
    if not isinstance(name, str) or not name or "\0" in name:
        return f"its file_name is {name!r}"
    if any(p(name).is_absolute() or ".." in p(name).parts for p in (PurePosixPath, PureWindowsPath)):
        return f"its file_name {name!r} leads out of the folder: refused"
    return None


def _masks(path: Path, given: list[Any], images: dict[Any, Json], found: _Findings) -> dict[Any, list[Json]]:
    """The instances' compressed RLEs, by their image's id."""
    masks: dict[Any, list[Json]] = {i: [] for i in images}
    seen = set()
    for n, a in enumerate(given):
        name = a["id"] if isinstance(a, dict) and "id" in a else f"{n} of the list"
        try:
            if not isinstance(a, dict):
                raise ValueError("it is no object")
            if a.get("iscrowd"):
                continue
            image = a.get("image_id")
            if not isinstance(image, int | str) or image not in images:
                raise ValueError(f"it is of image {image!r}, which is not listed")
            if str(name) in seen:
                raise ValueError("its id is that of another")
            size = images[image]["height"], images[image]["width"]
            masks[image].append(packed(a.get("segmentation"), *size))
            seen.add(str(name))
        except ValueError as e:
            found.left_out.append(f"{path}: annotation {name}: {e}")
    return masks


def _unusable(path: Path, image: Json) -> str | None:
    """What is wrong with an image's file, by its header, if anything is."""
    file, size = path.parent / image["file_name"], (image["height"], image["width"])
    if not file.is_file():
        return f"{path} names an image that is not there: {image['file_name']}"
    try:
        if not may_have_size(file, size):
            return f"{file} is not of {size[1]} x {size[0]} pixels, as {path.name} says"
    except InputError as e:
        return str(e)
    return None


def _sample(path: Path, image: Json, codes: list[Json]) -> Sample:
    file, (h, w) = path.parent / image["file_name"], (image["height"], image["width"])
    pixels = read_image(file, (h, w))
    if pixels.shape[:2] != (h, w):
        raise InputError(f"{file} has changed its size since the domain was loaded")
    masks = np.stack([unpacked(code) for code in codes])
    key = f"{path.parent.resolve().name}/{path.stem}/{image['file_name']}"
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return Sample(key, tensor, torch.from_numpy(masks))
