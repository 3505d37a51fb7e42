"""Images whose instances are drawn in label images beside them: read once, then kept as an index."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from wesam.data.files import Folder
from wesam.data.images import may_have_size, read_labels
from wesam.data.listing import Entry, Findings
from wesam.data.segmentations import packed_mask
from wesam.errors import InputError
from wesam.sam.checkpoints import home

FORMAT = 3
"""Changes whenever the same files give another index."""

MOST_INSTANCES = 4096
"""A label image with more different values, or with one for every ten pixels, is none."""

Decode = Callable[[np.ndarray, str], np.ndarray]
"""From a label image's values, int [H, W], and its name to instances by number, int [H, W], 0 where there is none."""


@dataclass(frozen=True)
class Pair:
    """An image and where its instances are: in one image of labels, or in one image each, by their names."""

    image: str
    labels: str = ""
    masks: tuple[str, ...] = ()
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    """Where there are some, the instances are what the label image shows in each (x0, y0, x1, y1)."""


def numbered(values: np.ndarray, name: str) -> np.ndarray:
    """Every value but 0 is an instance; what JPEG has blurred is one instance where it is bright."""
    return values_of_mask(values, name) if _is_jpeg(name) else values


def values_of_mask(values: np.ndarray, name: str) -> np.ndarray:
    """One instance: what is not 0, or, as JPEG blurs, what is bright."""
    if _is_jpeg(name):
        grey = values if values.max() < 256 else values >> 8 & 255
        return np.asarray(grey > 127, np.int64)
    return np.asarray(values != 0, np.int64)


def _is_jpeg(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg"))


def read_pairs(
    folder: Folder, parts: Mapping[str, Sequence[Pair]], decode: Decode, found: Findings
) -> dict[str, list[Entry]]:
    """The images with instances, by split; what has none is left out and listed.

    The label images are read the first time; what was found is kept in ``index`` in the folder of the weights, unless
    one could not be read, which may pass.
    """
    pairs = list(dict.fromkeys(p for part in parts.values() for p in part))
    key = _key(folder, pairs, decode)
    index = _kept(key)
    if index is None:
        index = _read(folder, pairs, decode)
        if not index["fatal"]:
            _keep(key, index)
    found.fatal += index["fatal"]
    found.left_out += index["left_out"]
    known = {
        name: Entry(name, (h, w), [{"size": [h, w], "counts": c.encode("ascii")} for c in codes])
        for name, h, w, codes in index["images"]
    }
    return {split: [known[p.image] for p in part if p.image in known] for split, part in parts.items()}


def digest_of(folder: Folder, entries: Mapping[str, Iterable[Entry]]) -> str:
    """A digest of the splits: each image's name, size in bytes and instances."""
    digest = hashlib.sha256()
    for split, part in entries.items():
        for e in part:
            size = folder.size(e.name) if e.name in folder else 0
            digest.update(f"{split} {e.name} {size} {list(e.instances)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read(folder: Folder, pairs: Sequence[Pair], decode: Decode) -> dict[str, Any]:
    index: dict[str, Any] = {"images": [], "fatal": [], "left_out": []}

    def one(pair: Pair) -> tuple[Pair, tuple[int, int], list[str], str]:
        try:
            size, masks = _instances(folder, pair, decode)
            alike = folder.distant or may_have_size(folder.local(pair.image), size)
        except InputError as e:
            return pair, (0, 0), [], str(e)
        return pair, size, [packed_mask(m)["counts"].decode("ascii") for m in masks] if alike else [], ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = tqdm(pool.map(one, pairs), "reading label images", len(pairs), disable=None, delay=2, leave=False)
        for pair, (h, w), codes, problem in done:
            if problem:
                index["fatal"].append(problem)
            elif not codes:
                index["left_out"].append(f"{folder.path(pair.image)}: its labels have no instance, or another size")
            else:
                index["images"].append([pair.image, h, w, codes])
    return index


def _instances(folder: Folder, pair: Pair, decode: Decode) -> tuple[tuple[int, int], list[np.ndarray]]:
    """The (height, width) of the labels and the instances' masks, none of them empty."""
    if pair.labels:
        numbers = decode(read_labels(folder.local(pair.labels)), pair.labels)
        if pair.boxes:
            numbers = _by_box(numbers, pair)
        found = np.unique(numbers)
        if len(found) > min(MOST_INSTANCES, 2 + numbers.size // 10):
            raise InputError(f"{folder.path(pair.labels)} has {len(found)} different values: it is no label image")
        return (numbers.shape[0], numbers.shape[1]), [numbers == n for n in found if n]
    masks = []
    for name in pair.masks:
        values = read_labels(folder.local(name))
        if len(pair.masks) == 1 and _counts(values, name):  # as Cellpose names its label images
            return (values.shape[0], values.shape[1]), [values == n for n in range(1, int(values.max()) + 1)]
        masks.append(values_of_mask(values, name).astype(bool))
    sizes = {m.shape for m in masks}
    if len(sizes) > 1:
        raise InputError(f"the masks of {folder.path(pair.image)} are not of one size")
    return (masks[0].shape[0], masks[0].shape[1]), [m for m in masks if m.any()]


def _counts(values: np.ndarray, name: str) -> bool:
    """Whether the values are the numbers of several instances, 1, 2, 3 and so on, and not the grey of soft edges."""
    most = int(values.max())
    if not 1 < most <= MOST_INSTANCES or most == 255 or _is_jpeg(name):
        return False
    return np.unique(values).tolist() in (list(range(most + 1)), list(range(1, most + 1)))


def _by_box(shown: np.ndarray, pair: Pair) -> np.ndarray:
    numbers = np.zeros_like(shown)
    for n, (x0, y0, x1, y1) in enumerate(pair.boxes, 1):
        part = slice(max(0, y0), max(0, y1)), slice(max(0, x0), max(0, x1))
        numbers[part][shown[part] > 0] = n
    return numbers


def _key(folder: Folder, pairs: Sequence[Pair], decode: Decode) -> str:
    begin = f"{FORMAT} {folder.place} {decode.__module__}.{decode.__qualname__}"
    digest = hashlib.sha256(begin.encode(errors="surrogateescape"))
    for pair in pairs:
        files = (pair.image, *([pair.labels] if pair.labels else []), *pair.masks)
        stamps = "\n".join(f"{f} {folder.stamp(f)}" for f in files)
        digest.update(f"{stamps} {pair.boxes}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _kept(key: str) -> dict[str, Any] | None:
    try:
        index: dict[str, Any] = json.loads(gzip.decompress((home() / "index" / key).read_bytes()))
    except (OSError, ValueError, EOFError):
        return None
    return index


def _keep(key: str, index: dict[str, Any]) -> None:
    """Keeps an index; where that is impossible, it is made again next time."""
    path = home() / "index" / key
    new = path.with_name(f"{key}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(gzip.compress(json.dumps(index).encode(), 1))
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
