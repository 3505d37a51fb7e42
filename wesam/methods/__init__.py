"""The methods that can be compared, by name: each one file, each the same interface."""

from __future__ import annotations

from wesam.errors import unknown
from wesam.methods import supervised, wesam
from wesam.methods.base import Batch, Method

METHODS: dict[str, Method] = {"wesam": wesam.METHOD, "supervised": supervised.METHOD}


def get_method(name: str) -> Method:
    """The method of this name; raises InputError with the nearest right one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


__all__ = ["METHODS", "Batch", "Method", "get_method"]
