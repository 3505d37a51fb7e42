"""What a study is to do: read from a file and the command line, checked before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from tuning.space import Axis, Space, fixed, make_space
from wesam.config import BOXES, PRESETS, Config, PromptKind, Value, preset
from wesam.data import Domain, load_domain, located
from wesam.errors import InputError, unknown
from wesam.methods import checked_method
from wesam.sam import find_model, model_names

REFERENCES = ("paper", "defaults")
"""The configurations that every study tries first: the published one, and the model's own."""

MARGIN = 0.001
"""By how much val mIoU must be above Direct's: a tenth of a point is no reason to carry an adapter around."""

WORDS = {"miou": "mIoU", "agreement": "agreement"}
"""What a score is called."""

COLUMNS = {
    "ellipse": "ellipse in the box",
    "direct": "Direct",
    "paper": "paper's hyperparameters",
    "best": "best found",
}

DEMO: dict[str, Any] = {
    "name": "demo",
    "domains": ["camouflaged", "medical", "corrupted"],
    "prompt": "box",
    "trials": 8,
    "steps": 32,
    "set": {"eval_every": 8, "optim.batch_size": 2},
}
"""The study of ``--demo``: about seven minutes on two cores."""

_KEYS = {
    "name": str, "domains": list, "data": str, "model": str, "prompt": str, "trials": int, "steps": int, "workers": int,
    "seed": int, "set": dict, "space": dict, "storage": str, "crop": float,
}  # fmt: skip
WORD = r"[\w.+-]{1,100}"
"""What names runs, registered models and folders."""

_OPTIONS = ("prompt", "crop", "seed")
"""Fields of Config that are given as a study's own keys, not among its hyperparameters."""

_BUDGET = (
    "prompt", "val_prompt", "crop", "seed", "steps", "eval_every", "max_instances", "optim.batch_size",
    "grid.points_per_side", "grid.predicted_iou", "grid.stability",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study: its domains, its budget, its space."""

    name: str
    domains: tuple[str, ...]
    """Names or folders, as given."""
    model: str
    trials: int
    """Per domain."""
    workers: int
    """Per trial."""
    storage: str
    """Folder or URL that all workers reach; checkpoints go there."""
    base: Config
    """The configuration of every trial, apart from what is searched."""
    space: Space

    def config(self, reference: str | None, point: Mapping[str, Value]) -> Config:
        """The configuration of a trial: that of a reference, or the base changed at a point of the space.

        The reference ``paper`` shares nothing with the study but its budget: steps, batch, evaluations, seed.
        """
        if reference == "paper":
            return preset("paper").replace({k: v for k, v in self.base.flat().items() if k in _BUDGET})
        return self.base.replace(point)

    def point(self, reference: str) -> dict[str, Value] | None:
        """The reference's point of the space; None where the space does not hold it."""
        flat = self.config(reference, {}).flat()
        point = {path: flat[path] for path in self.space}
        return point if all(self.space[p].holds(v) for p, v in point.items()) else None

    def to_json(self) -> str:
        """Everything, as text that :meth:`from_json` reads."""
        space = {p: {k: v for k, v in vars(a).items() if v not in (None, ())} for p, a in self.space.items()}
        return json.dumps({**vars(self), "base": self.base.flat(), "space": space}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote."""
        found = json.loads(text)
        space = {p: Axis(**{**a, "choices": tuple(a.get("choices", ()))}) for p, a in found.pop("space").items()}
        base, domains = Config().replace(found.pop("base")), tuple(found.pop("domains"))
        return cls(**found, domains=domains, base=base, space=space)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a word; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_study(path: Path) -> dict[str, Any]:
    """The contents of a study's file; raises InputError with file and line."""
    try:
        found = yaml.load(path.read_text(), _Loader)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: {getattr(e, 'problem', None) or 'not valid YAML'}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected keys such as domains: and trials:")
    try:
        check(found)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    return found


def check(settings: Mapping[str, Any]) -> None:
    """Raises InputError for a key that no study has and for a value of the wrong type."""
    for key, value in settings.items():
        if key not in _KEYS:
            raise unknown("key", str(key), _KEYS)
        kind = _KEYS[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise InputError(f"{key} must be {_TYPES[kind]}, got {value!r}")


_TYPES = {str: "a word", list: "a list", int: "a whole number", float: "a number", dict: "a mapping of hyperparameters"}


def make_plan(settings: Mapping[str, Any], assignments: list[str]) -> Plan:
    """The plan for these settings (the keys of a study's file) and texts ``path.to.field=value``.

    Raises InputError for whatever cannot be run: unknown names, folders that are no domain, values out of range.
    """
    model, prompt = settings.get("model", "nano"), settings.get("prompt", "box")
    find_model(model)
    if model not in model_names():  # a file: workers may have another working directory
        model = str(Path(model).resolve())
    if prompt not in get_args(PromptKind):
        raise unknown("prompt", prompt, get_args(PromptKind))
    chosen = {"prompt": prompt, **{k: settings[k] for k in ("seed", "steps", "crop") if k in settings}}
    base = preset(model if model in PRESETS else "paper").replace(chosen)
    given = {str(path): value for path, value in settings.get("set", {}).items()}
    paths = dict.fromkeys([*given, *(a.partition("=")[0] for a in assignments)], 0)
    for path in _OPTIONS:
        if path in paths:
            raise InputError(f"{path} has an option of its own: --{path}, or {path}: in a study's file")
    space, base = make_space(settings.get("space", {}), base.replace(given))
    changed = base.parse(assignments)
    space = fixed(space, paths)
    if settings.get("steps") and "eval_every" not in paths:
        changed = changed.replace({"eval_every": min(changed.eval_every, max(1, changed.steps // 4))})
    _check_method(changed, space)
    if not space and settings.get("trials", 16) > len(REFERENCES):
        raise InputError("nothing is left to search: every hyperparameter has been given a value")
    for key in ("trials", "workers"):
        if settings.get(key, 1) < 1:
            raise InputError(f"{key} must be at least 1, got {settings[key]}")
    workers = settings.get("workers", 1)
    if changed.optim.batch_size < workers:
        raise InputError(f"{workers} workers share {changed.optim.batch_size} images a step: raise optim.batch_size")
    domains = tuple(located(str(d), settings.get("data", "")) for d in settings.get("domains", ()))
    loaded = _load(domains)
    for domain in loaded:
        domain.check(changed)
    names = [d.name for d in loaded]
    return Plan(
        name=_name(settings.get("name") or f"{'-'.join(names)}-{prompt}"),
        domains=domains, model=model, trials=settings.get("trials", 16), workers=workers,
        storage=_storage(settings.get("storage", "runs")), base=changed, space=space,
    )  # fmt: skip


def _check_method(base: Config, space: Space) -> None:
    for method in space["method"].choices if "method" in space else (base.method,):
        checked_method(base.replace({"method": method}))
    for path in ("loss.tightness", "teacher.cut_to_box"):
        if path in space and base.prompt not in BOXES:
            raise InputError(f"{path} needs given boxes: use --prompt {' or '.join(BOXES)}")


def _load(domains: tuple[str, ...]) -> list[Domain]:
    if not domains:
        raise InputError("no domain given: use --domain NAME, once or more, or --demo")
    loaded = [load_domain(d) for d in domains]
    for domain in loaded:
        if not re.fullmatch(WORD, domain.name):
            raise InputError(f"a folder's name is its domain's: {domain.name!r} has more than letters, digits and -_.+")
        if sum(d.name == domain.name for d in loaded) > 1:
            raise InputError(f"the domain {domain.name!r} is given twice")
    return loaded


def _name(text: str) -> str:
    if not re.fullmatch(WORD, text):
        raise InputError(f"--name {text!r}: use letters, digits, '-', '_', '+' and '.'")
    return text


def _storage(text: str) -> str:
    if "://" in text:
        return text
    folder = Path(text).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to --storage {text}: {e.strerror}") from None
    return str(folder)
