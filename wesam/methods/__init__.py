"""The methods that can be compared, by name: each one file, each the same interface."""

from __future__ import annotations

from collections.abc import Iterable

from wesam.config import BOXES, PRESETS, Config, preset
from wesam.errors import InputError, at, unknown
from wesam.methods import dept, shot, soft_teacher, supervised, tent, tribe, wdass, wesam, wesam_plus
from wesam.methods.base import Batch, Method

METHODS: dict[str, Method] = {
    "tent": tent.METHOD, "shot": shot.METHOD, "soft-teacher": soft_teacher.METHOD, "tribe": tribe.METHOD,
    "dept": dept.METHOD, "wdass": wdass.METHOD, "wesam": wesam.METHOD, "wesam+": wesam_plus.METHOD,
    "supervised": supervised.METHOD,
}  # fmt: skip


def get_method(name: str) -> Method:
    """The method of this name; raises InputError with the nearest right one."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def method_preset(model: str, method: str) -> Config:
    """The defaults of a method on a model: the model's, with what the method changes."""
    m = get_method(method)
    base = preset(model if model in PRESETS else "paper")
    return base.replace({"method": method, **m.defaults, **m.fitted.get(model, {})})


def check_read(config: Config, methods: Iterable[str], searched: Iterable[str] = ()) -> None:
    """Raises InputError for what is changed, or searched, and read by other methods alone."""
    names, flat, published = tuple(methods), config.flat(), Config().flat()
    read = {path for name in names for path in get_method(name).own}
    for path in sorted({path for m in METHODS.values() for path in m.own} - read):
        if flat[path] != published[path] or path in searched:
            readers = [name for name, m in METHODS.items() if path in m.own]
            with at("space" if path in searched else "set", path):
                raise InputError(f"{path} has no effect on {' and '.join(names)}: it is for {' and '.join(readers)}")


def checked_method(config: Config) -> Method:
    """The method of this configuration; raises InputError if it cannot train on this kind of prompt."""
    method = get_method(config.method)
    if method.needs_masks and config.prompt == "grid":
        raise InputError(f"{config.method} needs the masks that its prompts mean, and a grid's clicks mean none known")
    check_boxes([path for path, value in config.flat().items() if value], config.prompt)
    return method


def check_boxes(fields: Iterable[str], prompt: str) -> None:
    """Raises InputError if one of these fields, by path, is of use with given boxes alone, and others are given."""
    for path in ("loss.tightness", "teacher.cut_to_box"):
        if path in fields and prompt not in BOXES:
            raise InputError(f"{path} needs given boxes: use --prompt {' or '.join(BOXES)}")


__all__ = ["METHODS", "Batch", "Method", "check_boxes", "check_read", "checked_method", "get_method", "method_preset"]
