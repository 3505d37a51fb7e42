"""Domains: where images and their weak labels come from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from wesam.data.coco import coco
from wesam.data.corruptions import corrupted
from wesam.data.domain import SPLITS, Domain, Sample, Split
from wesam.data.procedural import NOTES, procedural
from wesam.errors import InputError, unknown


def domain_names() -> list[str]:
    """The names that :func:`load_domain` knows besides folders."""
    return list(NOTES)


def parted(name: str) -> tuple[str, str]:
    """What a domain is given as, in two: the name or the folder, and the corruption behind its last "+" or ""."""
    base, plus, corruption = name.rpartition("+")
    return (base, corruption) if plus and not Path(name).is_dir() else (name, "")


@lru_cache(maxsize=16)
def load_domain(name: str) -> Domain:
    """The domain of this name, or in this folder (train.json, val.json, test.json in COCO instances format).

    With ``+CORRUPTION:SEVERITY`` after it, as in ``clean+fog:3``, corrupted: :func:`wesam.data.corruptions.corrupted`.
    A process loads a domain once. Raises InputError for an unknown name and for a folder that is no domain.
    """
    base, corruption = parted(name)
    if corruption:
        return corrupted(load_domain(base), corruption)
    if name in NOTES:
        if (Path(name) / "train.json").is_file():
            raise InputError(f"{name!r} is a built-in domain and a folder here: write ./{name} for the folder")
        return procedural(name)
    folder = Path(name)
    if folder.is_dir():
        return coco(folder)
    if "/" in name:
        raise InputError(f"no such folder: {name}")
    raise unknown("domain", name, NOTES)


__all__ = ["SPLITS", "Domain", "Sample", "Split", "domain_names", "load_domain", "parted"]
