"""Listings in COCO's instances format: images and annotations with masks, or with boxes or clicks alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from wesam.data.files import Folder, leads_out
from wesam.data.images import MOST_PIXELS
from wesam.data.listing import Click, Entry, Findings, Given, Size, told
from wesam.data.segmentations import LARGEST, packed
from wesam.errors import InputError

Json = dict[str, Any]

SOME = 20
"""So many images, the first of a listing, tell in which folder its images are."""


def listed(
    folder: Folder, name: str, places: Sequence[str], digest: hashlib._Hash, found: Findings, *,
    all_images: bool = False, unlabelled: bool = False,
) -> list[Entry] | None:  # fmt: skip
    """The images with instances in the listing of this name that are there, in its order; None if it is unusable.

    places: what may go before each ``file_name``, a folder with "/" at its end, or nothing: one of them for the whole
    listing. Images of the same file are one, with the instances of all. all_images: those without instances too.
    unlabelled: all images, if there is no annotation. Masks are polygons, compressed or uncompressed RLE. Where no
    annotation of the listing has a ``segmentation``, its ``bbox`` and ``keypoints`` are the given weak labels: a
    keypoint with v = 2 is a click on the object, with v = 1 one beside it; a box may be without. Crowd regions are left
    out; annotations that are wrong are left out too, and listed in ``found``, as is, in one line, how many images are
    missing. The listing and its images' sizes in bytes go into the digest.
    """
    path = folder.path(name)
    try:
        text = folder.local(name).read_bytes()
        listing = json.loads(text)
    except OSError as e:
        found.fatal.append(f"cannot read {path}: {e.strerror}")
        return None
    except InputError as e:
        found.fatal.append(str(e))
        return None
    except json.JSONDecodeError as e:
        found.fatal.append(f"{path} is not JSON: {e.msg} in line {e.lineno}, column {e.colno}")
        return None
    except (ValueError, RecursionError) as e:
        found.fatal.append(f"{path} is not JSON: {e}")
        return None
    digest.update(text)
    if problem := _no_listing(listing):
        found.fatal.append(f"{path} is not in COCO instances format: {problem}")
        return None
    before, so_far = len(found.fatal), len(found.left_out)
    known = _images(path, listing["images"], found)
    instances = _instances(path, listing["annotations"], known, found)
    place = _place(folder, [i["file_name"] for i in known.values()], places)
    joined: dict[tuple[str, Size], list[Any]] = {}
    for key, image in known.items():
        joined.setdefault((place + image["file_name"], (image["height"], image["width"])), []).extend(instances[key])
    entries = [
        Entry(file, size, given)
        for (file, size), given in joined.items()
        if given or all_images or (unlabelled and not listing["annotations"])
    ]
    if not entries and len(found.fatal) == before:
        found.fatal.append(f"{path} has no image with an instance{told(found.left_out[so_far:])}")
    missing = []
    for entry in entries:
        if entry.name in folder:
            digest.update(f"{entry.name} {folder.size(entry.name)}\n".encode(errors="surrogateescape"))
        elif entry.instances or not all_images:
            missing.append(entry.name)
    if missing:
        looked = places if len(missing) == len(entries) else [place]
        found.fatal.append(
            f"{len(missing)} of {len(entries)} images of {path} are missing, such as "
            f"{missing[0].removeprefix(place)}; looked in {', '.join(folder.path(p).rstrip('/') for p in looked)}"
        )
    gone = set(missing)
    return [e for e in entries if e.name not in gone]


def _place(folder: Folder, names: Sequence[str], places: Sequence[str]) -> str:
    """The place that holds most of the first images; of several the first one."""
    return max(places, key=lambda place: sum(place + name in folder for name in names[:SOME]))


def is_listing(folder: Folder, name: str) -> bool:
    """Whether a JSON file lists images and annotations."""
    try:
        return _no_listing(json.loads(folder.local(name).read_bytes())) is None
    except (OSError, ValueError, RecursionError):
        return False


def _no_listing(listing: Any) -> str | None:
    for key in ("images", "annotations"):
        if not isinstance(listing, dict) or not isinstance(listing.get(key), list):
            return f"it has no list of {key}"
    return None


def _images(path: str, given: list[Any], found: Findings) -> dict[Any, Json]:
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
    if leads_out(name):
        return f"its file_name {name!r} leads out of the folder: refused"
    return None


def _instances(path: str, annotations: list[Any], images: dict[Any, Json], found: Findings) -> dict[Any, Sequence[Any]]:
    """The instances by their image's id, all as compressed RLEs or all as :class:`Given`."""
    objects = [a for a in annotations if isinstance(a, dict) and not a.get("iscrowd")]
    masks = any(a.get("segmentation") for a in objects)
    kinds = [] if masks else [k for k in ("bbox", "keypoints") if any(a.get(k) for a in objects)]
    instances: dict[Any, list[Any]] = {i: [] for i in images}
    seen = set()
    for n, a in enumerate(annotations):
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
            instances[image].append(_given(a, kinds, size) if kinds else packed(a.get("segmentation"), *size))
            seen.add(str(name))
        except ValueError as e:
            found.left_out.append(f"{path}: annotation {name}: {e}")
    return dict(instances)


def _given(annotation: Json, kinds: list[str], size: Size) -> Given:
    """The weak labels of these kinds, a box perhaps without clicks; raises ValueError, in words, if one is missing or
    wrong.
    """
    box = _box(annotation.get("bbox"), size) if "bbox" in kinds else None
    keypoints = annotation.get("keypoints")
    none = not keypoints or (_numbers(keypoints) and len(keypoints) % 3 == 0 and not any(keypoints[2::3]))
    return Given(box, () if "keypoints" not in kinds or (box and none) else _clicks(keypoints, size))


def _box(given: Any, size: Size) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1), cut to the image, from COCO's x, y, width, height."""
    if not _numbers(given) or len(given) != 4:
        raise ValueError(f"its bbox is {given!r}, not x, y, width, height")
    x, y, w, h = map(float, given)
    if not (w > 0 and h > 0):
        raise ValueError(f"its bbox is {w:g} x {h:g} pixels")
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(size[1])), min(y + h, float(size[0]))
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("its bbox lies beside the image")
    return box


def _clicks(given: Any, size: Size) -> tuple[Click, ...]:
    if not _numbers(given) or not given or len(given) % 3:
        raise ValueError("its keypoints are no list of x, y, v, x, y, v, ...")
    clicks = []
    for x, y, v in zip(given[::3], given[1::3], given[2::3], strict=True):
        if v not in (0, 1, 2):
            raise ValueError(f"a keypoint of it has v = {v!r}, not 0, 1 or 2")
        if v and not (0 <= x <= size[1] and 0 <= y <= size[0]):
            raise ValueError("a keypoint of it lies beside the image")
        if v:
            clicks.append((float(x), float(y), int(v) - 1))
    if not any(label for _, _, label in clicks):
        raise ValueError("no keypoint of it lies on the object (v = 2)")
    return tuple(clicks)


def _numbers(given: Any) -> bool:
    return isinstance(given, list) and all(type(v) in (int, float) and abs(v) <= LARGEST for v in given)
