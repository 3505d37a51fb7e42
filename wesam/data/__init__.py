"""Domains: where images and their weak labels come from."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from wesam.data.corruptions import corrupted, is_corruption
from wesam.data.domain import SPLITS, Domain, Sample, Split
from wesam.data.files import is_address
from wesam.data.folders import find_published, has_layout, parse_cut, read_folder
from wesam.data.procedural import NOTES, procedural
from wesam.data.published import PUBLISHED
from wesam.errors import InputError, unknown


def domain_names() -> list[str]:
    """The names that :func:`load_domain` knows besides folders."""
    return [*NOTES, *PUBLISHED]


def parted(name: str) -> tuple[str, str]:
    """What a domain is given as, in two: the name or the folder, and the corruption behind its last "+" or "".

    A "+" with a "/" behind it is part of a name, and so is one with no corruption behind it, unless what is before it
    is there.
    """
    base, _, corruption = name.rpartition("+")
    if not base or not corruption or "/" in corruption or Path(name).exists():
        return name, ""
    if is_corruption(corruption) or base in domain_names() or Path(parse_cut(base)[0]).exists():
        return base, corruption
    return name, ""


def place_of(name: str) -> str:
    """The folder, file or address of a domain, or its name, without what is to be done with it (:func:`located`)."""
    return parse_cut(parted(name)[0])[0]


def located(name: str, root: str = "") -> str:
    """The same domain, named so that it is found from any working directory.

    root: where the published data sets are, or ``$WESAM_DATA``. Raises InputError if one is not there.
    """
    base, corruption = parted(name)
    if base in PUBLISHED:
        base = _published(base, root)
    place = parse_cut(base)[0]
    if base not in NOTES and Path(place).exists():
        base = str(Path(place).absolute()) + base[len(place) :]
    return f"{base}+{corruption}" if corruption else base


def _published(name: str, root: str = "") -> str:
    """The folder of a published data set."""
    root = root or os.environ.get("WESAM_DATA", "")
    if not root:
        raise InputError(f"{name} is a published data set: --data ROOT, or $WESAM_DATA, says where it lies")
    return find_published(name, root)


@lru_cache(maxsize=16)
def load_domain(name: str) -> Domain:
    """The domain of this name, or in this folder, COCO file or fsspec address (:func:`wesam.data.folders.read_folder`).

    A published data set is looked for in the folder ``$WESAM_DATA`` and three levels below.
    With ``+CORRUPTION:SEVERITY`` after it, as in ``clean+fog:3``, corrupted: :func:`wesam.data.corruptions.corrupted`.
    A process loads a domain once. Raises InputError for an unknown name and for a folder that is no domain.
    """
    base, corruption = parted(name)
    if corruption:
        return replace(corrupted(load_domain(base), corruption), published=False)
    if name in NOTES:
        if Path(name).is_dir() and has_layout(name):
            raise InputError(
                f"{name!r} is a built-in domain and a folder of images here: write ./{name} for the folder, or go to "
                "another folder for the built-in one"
            )
        return procedural(name)
    if name in PUBLISHED:
        return read_folder(_published(name))
    place = parse_cut(name)[0]
    if is_address(place) or Path(place).is_dir() or (place.endswith(".json") and Path(place).is_file()):
        return read_folder(name)
    if Path(place).is_file():
        raise InputError(f"{place} is a file: a domain is a folder, or a COCO listing (.json)")
    if "/" in place or place.endswith(".json"):
        raise InputError(f"no such {'file' if place.endswith('.json') else 'folder'}: {place}")
    raise unknown("domain", name, domain_names())


__all__ = [
    "NOTES",
    "PUBLISHED",
    "SPLITS",
    "Domain",
    "Sample",
    "Split",
    "domain_names",
    "load_domain",
    "located",
    "parted",
]
