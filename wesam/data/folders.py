"""Any folder as a domain: which layout it has, and how it is cut into train, val and test."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from wesam.data.coco import is_listing, listed
from wesam.data.domain import SPLITS, Domain
from wesam.data.files import Folder, is_address
from wesam.data.listing import Entry, Findings, by_name, domain, told
from wesam.data.pairs import Decode, Pair, digest_of, numbered, read_pairs
from wesam.data.published import PUBLISHED, Published, every_nth, voc_objects
from wesam.errors import InputError

Item = TypeVar("Item")

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

LABEL_IMAGES: tuple[tuple[str, Sequence[str], Decode], ...] = (
    ("images", ("labels", "masks"), numbered),
    ("JPEGImages", ("SegmentationObject",), voc_objects),
)
"""The folder of images, those that may hold their label images, and what these mean."""

MANY = 50
"""Folders within one that is no domain are looked at, whether they are any, up to so many."""

NAMES_OF_SPLITS = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing"),
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How a domain without splits of its own gets them: at random, by a seed."""

    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Of train, val and test; they add up to 1."""
    seed: int = 0

    def __call__(self, items: Sequence[Item]) -> dict[str, list[Item]]:
        """Each split's items, at least one each; raises InputError for less than three."""
        count = len(items)
        if count < 3:
            raise InputError(f"{count} images with instances are too few for train, val and test")
        order = np.random.default_rng(self.seed).permutation(count)
        val, test = (max(1, round(share * count)) for share in self.shares[1:])
        train = max(1, count - val - test)
        if train + val + test > count:
            val, test = min(val, (count - train) // 2), count - train - min(val, (count - train) // 2)
        parts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
        return {k: [items[i] for i in sorted(v)] for k, v in parts.items()}


def parse_cut(place: str) -> tuple[str, Cut | None]:
    """A place and the cut behind it, as in ``cells@70/10/20`` or, with a seed, ``cells@0.7/0.1/0.2@5``."""
    found = re.fullmatch(r"(.+?)@([\d.]+)/([\d.]+)/([\d.]+)(?:@(\d+))?", place)
    if not found:
        return place, None
    try:
        shares = [float(s) for s in found.groups()[1:4]]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) <= 0:
        raise InputError(f"the shares of train, val and test in {place!r} must be three numbers above 0")
    train, val, test = (s / sum(shares) for s in shares)
    return found[1], Cut((train, val, test), int(found[5] or 0))


def read_folder(place: str) -> Domain:
    """The domain in a folder, a COCO file or an fsspec address, with the cut behind it (:func:`parse_cut`).

    Raises InputError, with a line for each thing that makes it unusable, or with what was looked for if it has none of
    the layouts.
    """
    place, cut = parse_cut(place)
    if place.partition("::")[0].endswith(".json"):
        return _one_listing(*_rooted(place), cut)
    folder = Folder(place)
    splits = _listings(folder)
    if splits:
        return _uncut(cut, _three_listings(folder, splits), place)
    for layout in PUBLISHED.values():
        if layout.is_in(folder):
            return _uncut(cut, _read_published(folder, layout), place)
    listings = _loose_listings(folder)
    if len(listings) == 1:
        return _one_listing(folder, listings[0], cut)
    if len(listings) > 1:
        raise InputError(f"{place} has several COCO listings: name one of {', '.join(map(folder.path, listings))}")
    strange: list[str] = []
    for images, labels, decode in LABEL_IMAGES:
        unlike = Findings()
        if found := _pairs(folder.names, images, labels, unlike):
            return _label_images(folder, _own_splits(place, found), cut, decode, unlike)
        strange += unlike.left_out
    if strange:
        raise InputError(f"{place} is no domain: no labels have the name of an image{told(strange)}")
    within = () if is_address(place) else sorted(p for p in Path(place).iterdir() if p.is_dir())[:MANY]
    if inner := [p.name for p in within if has_layout(str(p))]:
        raise InputError(f"{place} is no domain, but {', '.join(inner)} in it {'is one' if len(inner) == 1 else 'are'}")
    raise InputError(
        f"{place} is no domain: it has no train.json, val.json and test.json, no COCO listing, no images/ with labels/ "
        "or masks/ beside it, no JPEGImages/ with SegmentationObject/, and is none of the published data sets "
        f"({', '.join(PUBLISHED)})"
    )


def has_layout(place: str) -> bool:
    """Whether there is something in a folder that :func:`read_folder` would read, be it right or wrong."""
    folder = Folder(place)
    return bool(
        _listings(folder)
        or any(layout.is_in(folder) for layout in PUBLISHED.values())
        or _loose_listings(folder)
        or any(_pairs(folder.names, images, labels, Findings()) for images, labels, _ in LABEL_IMAGES)
    )


def _uncut(cut: Cut | None, found: Domain, place: str) -> Domain:
    if cut is not None:
        raise InputError(f"{place} has splits of its own: leave the shares away")
    return found


def _rooted(file: str) -> tuple[Folder, str]:
    """The folder that a listing is of, and its name there: one in ``annotations/`` is of the folder above that."""
    file, chain, rest = file.partition("::")
    parts = file.split("/")
    name = "/".join(parts[-2:] if parts[-2:-1] == ["annotations"] else parts[-1:])
    return Folder(file.removesuffix(name) + chain + rest or "."), name


def _listings(folder: Folder) -> dict[str, tuple[str, Sequence[str]]]:
    """The listing of each split and the places where its images may be; empty for another layout.

    One listing alone in ``annotations/`` is no split, whatever it is called: it is cut at random.
    """
    forms = [("{}.json", 1), ("annotations/instances_{}.json", 2), ("annotations/{}.json", 2)]
    if not PUBLISHED["coco"].is_in(folder):
        forms.append(("annotations/instances_{}2017.json", 2))
    for form, least in forms:
        names = {s: _first(folder, map(form.format, NAMES_OF_SPLITS[s])) for s in SPLITS}
        if sum(name in folder for name in names.values()) >= least:
            return {s: (name, _places(name)) for s, name in names.items()}
    nested = {
        s: d for s, names in NAMES_OF_SPLITS.items() for d in names if f"{d}/_annotations.coco.json" in folder
    }  # fmt: skip
    if not nested:
        return {}
    return {s: (f"{d}/_annotations.coco.json", (f"{d}/",)) for s in SPLITS for d in (nested.get(s, s),)}


def _first(folder: Folder, names: Iterable[str]) -> str:
    """The first of these files that is there; the first one, if none is."""
    known = list(names)
    return next((n for n in known if n in folder), known[0])


def _loose_listings(folder: Folder) -> list[str]:
    """The COCO listings in the folder itself and in ``annotations/``, whatever they are called."""
    return [n for n in folder.names if re.fullmatch(r"(annotations/)?[^/]+\.json", n) and is_listing(folder, n)]


def _places(name: str) -> Sequence[str]:
    """Where in a domain's folder the images of a listing may be; ``a`` for one called a or instances_a."""
    file = PurePosixPath(name)
    part = file.stem.removeprefix("instances_")
    own = f"{file.parent}/" if "/" in name else ""
    return tuple(dict.fromkeys(("", "images/", f"{part}/", f"images/{part}/", own)))


def _three_listings(folder: Folder, listings: Mapping[str, tuple[str, Sequence[str]]]) -> Domain:
    digest, found = hashlib.sha256(), Findings()
    entries = {}
    for split, (name, places) in listings.items():
        if name not in folder:
            wanted = [n for n, _ in listings.values()]
            found.fatal.append(
                f"no {name} in {folder.place}: a domain has {wanted[0]}, {wanted[1]} and {wanted[2]}; "
                "one that is named itself is cut at random"
            )
        else:
            entries[split] = listed(folder, name, places, digest, found, unlabelled=split == "train") or []
    note = f"COCO instances in {folder.place}"
    return domain(folder, entries, found, digest.hexdigest(), note, keyed_by_split=True)


def _one_listing(folder: Folder, name: str, cut: Cut | None) -> Domain:
    digest, found = hashlib.sha256(), Findings()
    cut = cut or Cut()
    entries = listed(folder, name, _places(name), digest, found)
    if entries is None or (found.fatal and len(entries) < len(SPLITS)):
        raise InputError("\n".join(found.fatal))
    digest.update(f"{cut}".encode())
    note = f"COCO instances in {folder.path(name)}, cut at random by seed {cut.seed}"
    return domain(folder, _cut(cut, by_name(entries), found), found, digest.hexdigest(), note)


def _cut(cut: Cut, entries: Sequence[Entry], found: Findings) -> dict[str, list[Entry]]:
    """As the cut has it; where there are too few, the error says what is left out, and why."""
    try:
        return cut(entries)
    except InputError as e:
        raise InputError(f"{e}{told(found.left_out)}") from None


def _label_images(
    folder: Folder, found: Mapping[str, Sequence[Pair]], cut: Cut | None, decode: Decode, findings: Findings
) -> Domain:
    """Images with label images, in folders of their splits or all in one; findings: what is known of them already."""
    if cut and len(found) > 1:
        raise InputError(f"{folder.place} has splits of its own: leave the shares away")
    entries = read_pairs(folder, found, decode, findings)
    note = f"images with label images in {folder.place}"
    if len(found) == 1:
        cut = cut or Cut()
        (only,) = entries.values()
        if not findings.fatal or len(only) >= len(SPLITS):
            entries = _cut(cut, only, findings)
        note += f", cut at random by seed {cut.seed}"
    return domain(folder, entries, findings, digest_of(folder, entries), note)


def find_published(name: str, root: str) -> str:
    """The folder of a published data set, under this root; raises InputError if it is not there."""
    return PUBLISHED[name].find(root).place


def _read_published(folder: Folder, layout: Published) -> Domain:
    """A published data set, unpacked in this folder, with the paper's splits."""
    findings = Findings()
    if layout.pairs:
        entries = read_pairs(folder, layout.pairs(folder), layout.decode, findings)
        digest = digest_of(folder, entries)
    else:
        made = hashlib.sha256()
        name, place = layout.listing
        images = listed(folder, name, [place], made, findings, all_images=True) or []
        entries = {k: [e for e in part if e.instances] for k, part in every_nth(by_name(images), 7).items()}
        digest = made.hexdigest()
    note = f"{layout.title} in {folder.place}; terms: {layout.terms}"
    return replace(domain(folder, entries, findings, digest, note, name=layout.name), published=True)


def _pairs(names: Iterable[str], top: str, others: Sequence[str], unlike: Findings) -> dict[str, list[Pair]]:
    """The images with label images, by the split that a folder of theirs names, "" for none.

    unlike: is told of images without labels (of JPEGImages most are), of labels without an image, and of images with
    the same labels.

    top, others: as in LABEL_IMAGES. An image P/images/Q/STEM.png has its labels in P/labels/Q/STEM.png or
    P/masks/Q/STEM.png, or its masks, one for each instance, in the folder P/masks/Q/STEM, in files P/masks/Q/STEM_*,
    or, where it is the only one in its folder, in all files of P/masks.
    """
    inside: dict[str, list[PurePosixPath]] = {}
    for name in names:
        if name.lower().endswith(PICTURES):
            file = PurePosixPath(name)
            inside.setdefault(str(file.parent), []).append(file)
    found: dict[str, list[Pair]] = {}
    strange: list[str] = []
    for where, images in inside.items():
        parts = where.split("/")
        if top not in parts:
            continue
        at = len(parts) - 1 - parts[::-1].index(top)
        places = ["/".join([*parts[:at], other, *parts[at + 1 :]]) for other in others]
        split = next((s for s, known in NAMES_OF_SPLITS.items() if set(known) & set(parts)), "")
        for place in places:
            own = Findings()
            if pairs := _paired(images, place, inside, own):
                found.setdefault(split, []).extend(pairs)
                if top == "images":
                    unlike.fatal += own.fatal
                    unlike.left_out += own.left_out
                break
            strange += own.left_out
    if not found:
        unlike.left_out += strange
    return found


def _paired(
    images: Sequence[PurePosixPath], place: str, inside: Mapping[str, list[PurePosixPath]], unlike: Findings
) -> list[Pair]:
    """The images of one folder that have labels in this place."""
    stems = {f.stem for f in images}
    beside = inside.get(place, [])
    own = {f.stem: str(f) for f in beside if f.stem in stems}
    parts: dict[str, list[str]] = {s: [str(f) for f in inside.get(f"{place}/{s}", [])] for s in stems}
    for f in beside:
        owner = f.stem
        while owner and owner not in stems:
            owner = owner.rpartition("_")[0]
        if owner and f.stem not in stems:
            parts[owner].append(str(f))
    if len(images) == 1 and beside and not own and not any(parts.values()):
        parts[images[0].stem] = [str(f) for f in beside]
    pairs = [Pair(str(f), labels=own.get(f.stem, ""), masks=tuple(parts[f.stem])) for f in images]
    known = [p for p in pairs if p.labels or p.masks]
    used, first = {n for p in known for n in (p.labels, *p.masks)}, dict[str, str]()
    if beside or known:
        alone = (p.image for p in pairs if not (p.labels or p.masks))
        unlike.left_out += [f"{image}: there are no labels of its name in {place}" for image in alone]
        strange = (str(f) for f in beside if str(f) not in used)
        unlike.left_out += [f"{file}: there is no image of its name in {images[0].parent}" for file in strange]
    for p in known:
        if (other := first.setdefault(PurePosixPath(p.image).stem, p.image)) != p.image:
            unlike.fatal.append(f"{other} and {p.image} would have the same labels: leave one of them away")
    return known


def _own_splits(place: str, found: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """The splits that the folders have, val cut from train where there is none; all in one, "", for none at all."""
    if set(found) == {""}:
        return found
    if "" in found or not {"train", "test"} <= set(found):
        there = ", ".join(sorted(s or "neither" for s in found))
        raise InputError(f"{place} has images of {there}: folders of train and test, or of no split at all, are needed")
    train = found["train"]
    if "val" not in found and len(train) > 1:
        found = {**found, "train": [p for n, p in enumerate(train) if n % 10], "val": train[::10]}
    return {s: found[s] for s in SPLITS}
