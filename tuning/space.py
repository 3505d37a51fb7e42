"""What is searched, as data: a dotted path of :class:`wesam.config.Config` -> an axis."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from wesam.config import BOXES, Config, PromptKind, Value
from wesam.errors import InputError, at, one_of
from wesam.methods import get_method

Kind = Literal["float", "int", "categorical"]
Log = Literal[True, False, "complement"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One hyperparameter's values: from ``low`` to ``high``, both included, or one of ``choices``."""

    type: Kind
    low: float | None = None
    high: float | None = None
    log: Log = False
    """Whether the logarithm is drawn uniformly; ``complement``: that of 1 - value."""
    zero: bool = False
    """Whether 0, which switches something off, is a value too."""
    choices: tuple[Value, ...] = ()
    prompt: PromptKind | None = None
    """``box``: searched only in a study where boxes are given."""

    def holds(self, value: Value) -> bool:
        """Whether the value lies on the axis."""
        if self.type == "categorical":
            return value in self.choices
        low, high = self.bounds
        whole = self.type != "int" or float(value).is_integer()
        return (self.zero and value == 0) or (whole and low <= float(value) <= high)

    def nearest(self, value: Value, otherwise: Value) -> Value:
        """The value of the axis that is nearest to this one; otherwise: where there is no nearest."""
        if self.holds(value):
            return value
        if self.type != "categorical":
            low, high = self.bounds
            near = min(max(float(value), low), high)
            return round(near) if self.type == "int" else near
        return otherwise if otherwise in self.choices else self.choices[0]

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of an axis that is no categorical."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def place(self, value: Value) -> float:
        """Where the value lies on a line from 0 to 1 on which draws are uniform; a 0 below the range is its foot."""
        if self.type == "categorical":
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        if self.zero and value == 0:
            return 0.0
        low, high, mine = (_to_line(float(v), self.log) for v in (*self.bounds, value))
        share = (mine - low) / (high - low) if high != low else 0.5
        return FOOT + (1 - FOOT) * share if self.zero else share

    def at(self, place: float) -> Value:
        """The value at a place from 0 to 1, the inverse of :meth:`place`; of places outside that of the end."""
        if self.type == "categorical":
            return self.choices[round(min(max(place, 0), 1) * (len(self.choices) - 1))]
        if self.zero and place < FOOT / 2:
            return 0 if self.type == "int" else 0.0
        low, high = self.bounds
        share = min(max((place - FOOT) / (1 - FOOT) if self.zero else place, 0), 1)
        value = _from_line(
            _to_line(low, self.log) + share * (_to_line(high, self.log) - _to_line(low, self.log)), self.log
        )
        value = min(max(value, low), high)
        return round(value) if self.type == "int" else value

    def near(self, value: Value, generator: random.Random) -> Value:
        """A value nearby: a step on the line, normally distributed; another choice, where there is no line."""
        if self.type == "categorical":
            return generator.choice([c for c in self.choices if c != value] or [value])
        return self.at(self.place(value) + generator.gauss(0, STEP))

    def marks(self) -> list[Value]:
        """A few values to label it with: all choices; the ends, the middle or the powers of ten between them, and 0."""
        if self.type == "categorical":
            return list(self.choices)
        low, high = self.bounds
        powers = [10.0**n for n in range(-9, 10)] if self.log else [(low + high) / 2]
        inside = sorted(round(1 - p, 9) if self.log == "complement" else p for p in powers)
        return [*([0] if self.zero else []), low, *(p for p in inside if low < p < high), high]


def _to_line(value: float, log: Log) -> float:
    return math.log(1 - value if log == "complement" else value) if log else value


def _from_line(value: float, log: Log) -> float:
    return value if not log else 1 - math.exp(value) if log == "complement" else math.exp(value)


FOOT = 0.15
"""The part of a line that lies between a 0 and the range above it."""

STEP = 0.15
"""The standard deviation of a step to a value nearby."""

Space = dict[str, Axis]

DEFAULT: Space = {
    "lora.rank": Axis(type="int", low=2, high=64, log=True),
    "lora.targets": Axis(type="categorical", choices=("qkv", "attention", "encoder", "encoder+decoder")),
    "lora.alpha_ratio": Axis(type="float", low=0.5, high=4, log=True),
    "optim.lr": Axis(type="float", low=1e-4, high=5e-3, log=True),
    "optim.weight_decay": Axis(type="float", low=1e-6, high=0.1, log=True),
    "loss.focal": Axis(type="float", low=5, high=200, log=True),
    "loss.dice": Axis(type="float", low=0.1, high=10, log=True),
    "loss.iou": Axis(type="float", low=0.0, high=2.0),
    "loss.anchor": Axis(type="float", low=0.01, high=2, log=True),
    "loss.contrastive": Axis(type="float", low=0.01, high=1, log=True),
    "loss.temperature": Axis(type="float", low=0.05, high=1, log=True),
    "loss.tightness": Axis(type="float", low=0.0, high=3.0, prompt="box"),
    "loss.label": Axis(type="float", low=0.3, high=30, log=True),
    "loss.entropy": Axis(type="float", low=0.1, high=3, log=True),
    "loss.diversity": Axis(type="float", low=0.1, high=3, log=True),
    "loss.pseudo": Axis(type="float", low=0.03, high=3, log=True),
    "loss.consistency": Axis(type="float", low=0.01, high=10, log=True),
    "teacher.decay": Axis(type="float", low=0.9, high=0.9999, log="complement", zero=True),
    "teacher.cut_to_box": Axis(type="categorical", choices=(False, True), prompt="box"),
    "teacher.confidence": Axis(type="float", low=0.5, high=0.99),
    "teacher.neighbours": Axis(type="int", low=1, high=50, log=True),
    "views.strength": Axis(type="float", low=0.0, high=1.5),
    "views.prompt_noise": Axis(type="float", low=0.0, high=0.2),
}
"""Of these, what the method reads (:attr:`wesam.methods.Method.searched`) is searched by default. Adam does not see a
common factor of all weights of losses, so one of them, WeSAM's dice, is the unit and is not among them.
"""

OF_THE_STUDY = ("prompt", "val_prompt", "crop", "steps", "eval_every", "val_instances", "test_instances", "seed")
"""Fields of Config that all trials share, or they could not be compared."""


def make_space(changes: Mapping[str, Any], base: Config) -> tuple[Space, Config]:
    """The default space for the configuration's method and kind of prompt, changed; and the configuration with what is
    fixed.

    changes: path -> an axis as a mapping (``type, low, high, log, choices``; what is not given stays), which changes
    or adds it; or path -> a single value, which fixes it. Raises InputError that names the path.
    """
    known = {p: v for p, v in base.flat().items() if p not in OF_THE_STUDY}
    method = changes.get("method", base.method)
    space, with_boxes = default_space(method, base.prompt), default_space(method, "box")
    for key, change in changes.items():
        path = str(key)
        with at("space", path):
            if path in OF_THE_STUDY:
                raise InputError(f"space: {path} is the same for all trials of a study: give it outside of space")
            one_of("hyperparameter", path, known)
            if isinstance(change, Mapping):
                space[path] = _axis(path, change, space.get(path) or with_boxes.get(path), base)
            else:
                space.pop(path, None)
                base = base.replace({path: change})
    return space, base


def default_space(method: Any, prompt: PromptKind) -> Space:
    """What is searched if nothing else is said; method: a name, or an axis of names as a mapping."""
    choices = method.get("choices") if isinstance(method, Mapping) else (method,)
    names = choices if isinstance(choices, list | tuple) else ()  # whatever else it is is told with its path
    read = {path for name in names for path in get_method(str(name)).searched}
    return {p: a for p, a in DEFAULT.items() if p in read and (a.prompt is None or prompt in BOXES)}


def space_to_dict(space: Space) -> dict[str, Any]:
    """The space as plain data, the same before and after JSON."""
    return {path: {**vars(axis), "choices": list(axis.choices)} for path, axis in space.items()}


def space_from_dict(found: Mapping[str, Any]) -> Space:
    """The space that :func:`space_to_dict` wrote."""
    return {p: Axis(**{**a, "choices": tuple(a["choices"])}) for p, a in found.items()}


def fixed(space: Space, paths: Mapping[str, Value]) -> Space:
    """The space without the hyperparameters that have been given a value."""
    return {p: a for p, a in space.items() if p not in paths}


def _axis(path: str, given: Mapping[str, Any], before: Axis | None, base: Config) -> Axis:
    where = f"space: {path}"
    names = [f.name for f in dataclasses.fields(Axis) if f.name != "prompt"]
    for name in given:
        with at("space", path, str(name)):
            one_of(f"key in {where}", str(name), names)
    kind: Any = given.get("type", "categorical" if "choices" in given else before.type if before else None)
    if kind not in get_args(Kind):
        raise InputError(f"{where}: type must be float, int or categorical, got {kind!r}")
    foreign = ("low", "high", "log", "zero") if kind == "categorical" else ("choices",)
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
    low, high, log, zero = given.get("low"), given.get("high"), given.get("log", False), given.get("zero", False)
    for name, value in (("low", low), ("high", high)):
        with at("space", path, name):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{where}: {name} must be a number, got {value!r}")
            if not abs(value) <= sys.float_info.max:
                raise InputError(f"{where}: {name} must be finite, got {str(value)[:20]}")
            if kind == "int" and not float(value).is_integer():
                raise InputError(f"{where}: {name} must be a whole number, got {value!r}")
            _checked(where, path, int(value) if kind == "int" else float(value), base)
    assert low is not None
    assert high is not None
    if log not in get_args(Log) or (isinstance(log, int | float) and not isinstance(log, bool)):
        raise InputError(f"{where}: log must be true, false or complement, got {log!r}")
    if not isinstance(zero, bool):
        raise InputError(f"{where}: zero must be true or false, got {zero!r}")
    if low > high:
        raise InputError(f"{where}: low {low} is above high {high}")
    if log is True and low <= 0:
        raise InputError(f"{where}: with log, low must be above 0, got {low}")
    if log == "complement" and (kind == "int" or high >= 1):
        raise InputError(f"{where}: log: complement is for a float whose high is below 1, got {high}")
    if zero:
        _checked(where, path, 0 if kind == "int" else 0.0, base)
        if low <= 0:
            raise InputError(f"{where}: with zero, low must be above 0, got {low}")
    return Axis(type=kind, low=low, high=high, log=log, zero=zero)


def _checked(where: str, path: str, value: Any, base: Config) -> Value:
    try:
        return base.replace({path: value}).flat()[path]
    except InputError as e:
        raise InputError(f"{where}: {str(e).removeprefix('in the configuration: ')}") from None
