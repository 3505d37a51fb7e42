"""What is searched, as data: a dotted path of :class:`wesam.config.Config` -> an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wesam.config import BOXES, Config, PromptKind, Value
from wesam.errors import InputError, unknown

Kind = Literal["float", "int", "categorical"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One hyperparameter's values: from ``low`` to ``high``, both included, or one of ``choices``."""

    type: Kind
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()
    prompt: PromptKind | None = None
    """``box``: searched only in a study where boxes are given."""

    def holds(self, value: Value) -> bool:
        """Whether the value lies on the axis."""
        if self.type == "categorical":
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        return self.low <= float(value) <= self.high


Space = dict[str, Axis]

DEFAULT: Space = {
    "lora.rank": Axis(type="int", low=2, high=32, log=True),
    "lora.targets": Axis(type="categorical", choices=("qkv", "attention", "encoder", "encoder+decoder")),
    "lora.alpha_ratio": Axis(type="float", low=0.5, high=4, log=True),
    "optim.lr": Axis(type="float", low=1e-4, high=5e-3, log=True),
    "loss.focal": Axis(type="float", low=5, high=200, log=True),
    "loss.iou": Axis(type="float", low=0.0, high=2.0),
    "loss.anchor": Axis(type="float", low=0.01, high=2, log=True),
    "loss.contrastive": Axis(type="float", low=0.01, high=1, log=True),
    "loss.temperature": Axis(type="float", low=0.05, high=1, log=True),
    "loss.tightness": Axis(type="float", low=0.0, high=3.0, prompt="box"),
    "teacher.decay": Axis(type="categorical", choices=(0.0, 0.9, 0.99, 0.999)),
    "teacher.cut_to_box": Axis(type="categorical", choices=(False, True), prompt="box"),
    "views.strength": Axis(type="float", low=0.0, high=1.5),
}
"""The dice loss keeps its weight: Adam does not see a common factor of all weights, so one of them is the unit."""

OF_THE_STUDY = ("prompt", "val_prompt", "crop", "steps", "eval_every", "seed")
"""Fields of Config that all trials share, or they could not be compared."""


def make_space(changes: Mapping[str, Any], base: Config) -> tuple[Space, Config]:
    """The default space for the configuration's kind of prompt, changed; and the configuration with what is fixed.

    changes: path -> an axis as a mapping (``type, low, high, log, choices``; what is not given stays), which changes
    or adds it; or path -> a single value, which fixes it. Raises InputError that names the path.
    """
    known = {p: v for p, v in base.flat().items() if p not in OF_THE_STUDY}
    space = {p: a for p, a in DEFAULT.items() if a.prompt is None or base.prompt in BOXES}
    for key, change in changes.items():
        path = str(key)
        if path in OF_THE_STUDY:
            raise InputError(f"space: {path} is the same for all trials of a study: give it outside of space")
        if path not in known:
            raise unknown("hyperparameter", path, known)
        if isinstance(change, Mapping):
            space[path] = _axis(path, change, space.get(path) or DEFAULT.get(path), base)
        else:
            space.pop(path, None)
            base = base.replace({path: change})
    return space, base


def fixed(space: Space, paths: Mapping[str, Value]) -> Space:
    """The space without the hyperparameters that have been given a value."""
    return {p: a for p, a in space.items() if p not in paths}


def _axis(path: str, given: Mapping[str, Any], before: Axis | None, base: Config) -> Axis:
    where = f"space: {path}"
    names = [f.name for f in dataclasses.fields(Axis) if f.name != "prompt"]
    for name in given:
        if name not in names:
            raise unknown(f"key in {where}", str(name), names)
    kind: Any = given.get("type", "categorical" if "choices" in given else before.type if before else None)
    if kind not in get_args(Kind):
        raise InputError(f"{where}: type must be float, int or categorical, got {kind!r}")
    foreign = ("low", "high", "log") if kind == "categorical" else ("choices",)
    for name in given:
        if name in foreign:
            raise InputError(f"{where}: a {kind} has no {name}; give its type: too, to change what kind of axis it is")
    merged = {n: getattr(before, n) for n in names} if before is not None and before.type == kind else {}
    merged |= given
    if kind == "categorical":
        return _categorical(where, path, merged, base)
    return _range(where, path, kind, merged, base)


def _categorical(where: str, path: str, given: Mapping[str, Any], base: Config) -> Axis:
    choices = given.get("choices")
    if not isinstance(choices, list | tuple) or not choices:
        raise InputError(f"{where}: a categorical needs choices: [..., ...]")
    # a configuration made with the value has it in its own type and has checked it
    return Axis(type="categorical", choices=tuple(_checked(where, path, c, base) for c in choices))


def _range(where: str, path: str, kind: Kind, given: Mapping[str, Any], base: Config) -> Axis:
    low, high, log = given.get("low"), given.get("high"), given.get("log", False)
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {name} must be a number, got {value!r}")
        if kind == "int" and not float(value).is_integer():
            raise InputError(f"{where}: {name} must be a whole number, got {value!r}")
        _checked(where, path, int(value) if kind == "int" else float(value), base)
    assert low is not None
    assert high is not None
    if not isinstance(log, bool):
        raise InputError(f"{where}: log must be true or false, got {log!r}")
    if low > high:
        raise InputError(f"{where}: low {low} is above high {high}")
    if log and low <= 0:
        raise InputError(f"{where}: with log, low must be above 0, got {low}")
    return Axis(type=kind, low=low, high=high, log=log)


def _checked(where: str, path: str, value: Any, base: Config) -> Value:
    try:
        return base.replace({path: value}).flat()[path]
    except InputError as e:
        raise InputError(f"{where}: {str(e).removeprefix('in the configuration: ')}") from None
