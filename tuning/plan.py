"""What a study is to do: read from a file and the command line, checked before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import yaml

from tuning.space import Space, fixed, make_space, space_from_dict, space_to_dict
from wesam.config import Config, Objective, PromptKind, Value, preset
from wesam.data import Domain, load_domain, located
from wesam.drawings import DRAWINGS, DRAWN
from wesam.errors import InputError, at, one_of, reason
from wesam.methods import check_boxes, check_read, checked_method, get_method, method_preset
from wesam.sam import find_model, model_names

REFERENCES = ("paper", "defaults")
"""The configurations that every study tries first: the published one, and the model's own."""

MARGIN = 0.001
"""By how much val mIoU must be above Direct's: a tenth of a point is no reason to carry an adapter around."""

WORDS = {"miou": "mIoU", "f1": "F1", "label_free": "label-free score"}
"""What a score is called."""

COLUMNS = {
    **{name: DRAWINGS[kind] for name, kind in DRAWN.items()},
    "direct": "Direct",
    "paper": "paper's hyperparameters",
    "best": "best found",
    "supervised": "Supervised",
}
"""What a result has, as its tables call it."""


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Those of :data:`COLUMNS` that the tables of a result have, whose rows these are: a drawing if it was made."""
    made = {k for row in rows for k in DRAWN if row.get(k) is not None}
    return {k: title for k, title in COLUMNS.items() if k in made or k not in DRAWN}


def yardstick(scores: Mapping[str, float | None]) -> tuple[str, float] | None:
    """What was drawn without a model, from the given labels if it can be, as tables call it, and its score among these,
    by the drawings' names; None if nothing was.
    """
    made = [(COLUMNS[k], value) for k in DRAWN if (value := scores.get(k)) is not None]
    return made[-1] if made else None


DEMO: dict[str, Any] = {
    "name": "demo",
    "domains": ["camouflaged", "medical", "corrupted"],
    "prompt": "box",
    "trials": 8,
    "steps": 32,
    "seeds": 1,
    "set": {"eval_every": 8, "optim.batch_size": 2},
}
"""The study of ``--demo``: 10 to 15 minutes on two cores."""

KEYS = {
    "name": str, "domains": list, "data": str, "model": str, "prompt": str, "trials": int, "steps": int, "workers": int,
    "seed": int, "seeds": int, "set": dict, "space": dict, "storage": str, "crop": float,
    "sampler": str, "scheduler": str, "objective": str, "minimize": list,
    "joint": str, "hours": float, "gpu_hours": float, "gpus_per_worker": float,
    "optuna": str, "optuna_study": str, "from": str,
}  # fmt: skip
"""What a study's file may hold."""

Sampler = Literal["tpe", "gp", "nsga2", "random"]
Scheduler = Literal["asha", "median", "none"]
Joint = Literal["", "mean", "worst"]
Cost = Literal["size", "seconds"]
"""size: of the adapter in MB; seconds: of a step."""

BUDGET = ("trials", "hours", "gpu_hours")
"""What may be raised when a study goes on."""

_NAMED: dict[str, Any] = {"sampler": Sampler, "scheduler": Scheduler, "objective": Objective, "joint": Joint}
"""Keys with one of a few words."""

HIDDEN = "***"
"""What stands for a password."""

NAMED = 3
"""Domains of which a study gets its name, if it is given none."""

LONGEST = 100
"""Letters of a name."""

WORD = rf"(?!\.*\Z)[\w.+-]{{1,{LONGEST}}}"
"""What names runs, registered models and folders; so no separator, and nothing but dots neither."""

STUDY_KEYS = ("prompt", "crop", "seed")
"""Fields of Config that are given as a study's own keys, not among its hyperparameters."""

METHOD = "wesam+"
"""What a study adapts with if nothing else is said."""

SHARED = (
    "prompt", "val_prompt", "crop", "seed", "steps", "eval_every", "val_instances", "test_instances", "max_instances",
    "optim.batch_size", "grid.points_per_side", "grid.predicted_iou", "grid.stability",
    "compute.precision", "compute.checkpointing", "compute.compile",
)  # fmt: skip
"""Fields of Config that are not a method's own: its data, its budget and how its steps are computed, the same for all
that are compared.
"""


def shared(config: Config) -> dict[str, Value]:
    """The configuration's fields in :data:`SHARED`."""
    return {k: v for k, v in config.flat().items() if k in SHARED}


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
    sampler: Sampler = "tpe"
    scheduler: Scheduler = "asha"
    objective: Objective = "auto"
    """What trials are chosen by."""
    joint: Joint = ""
    """One configuration for all domains, ranked by its mean gain over Direct or by the worst domain's; else each domain
    has a search of its own.
    """
    minimize: tuple[Cost, ...] = ()
    """What the sampler makes small besides; the best trial is the best by its score all the same."""
    hours: float = math.inf
    """Of wall-clock after which nothing new begins."""
    gpu_hours: float = math.inf
    """Of all trials together; where there is no GPU, of workers."""
    gpus_per_worker: float = 1.0
    seeds: int = 3
    """Other seeds with which the winner, and Supervised beside it, are trained again after the search."""
    optuna: str = ""
    """URL of the database with the Optuna studies."""
    optuna_study: str = ""
    """Their name before the domain's; several studies may share one. Empty: the study's own."""
    warm: tuple[tuple[str, dict[str, Value]], ...] = ()
    """What other studies found best: where, and the configuration's fields."""
    run: str = ""
    """The study's run in MLflow; empty before there is one, and of studies that are older than this field."""

    def __post_init__(self) -> None:
        checked_name(self.name, "--name")

    def config(self, reference: str | None, point: Mapping[str, Value]) -> Config:
        """The configuration of a trial: that of a reference, or the base changed at a point of the space.

        The reference ``paper`` has of the study only what is in :data:`SHARED`: steps, batch, evaluations, seed, ...
        """
        if reference == "paper":
            return preset("paper").replace(shared(self.base))
        return self.base.replace(point)

    def supervised(self) -> Config:
        """The upper reference: the model's defaults for training on real masks, with the study's budget."""
        return method_preset(self.model, "supervised").replace(shared(self.base))

    def bolder(self) -> dict[str, Value] | None:
        """The point of the space that is nearest to the method's bolder configuration; None where it has none."""
        changes = get_method(self.base.method).bolder
        return self.nearest(self.base.replace(changes).flat()) if changes else None

    def has_supervised(self, domain: Domain) -> bool:
        """Whether Supervised is a reference on this domain: its masks are known, and trials do not learn from them."""
        known = domain.split("train")[0].has_masks and domain.split("test")[0].has_masks
        return known and self.base.prompt != "grid" and not get_method(self.base.method).needs_masks

    def point(self, reference: str) -> dict[str, Value] | None:
        """The reference's point of the space; None where the space does not hold it, as of another method."""
        flat = self.config(reference, {}).flat()
        if "method" not in self.space and flat["method"] != self.base.method:
            return None
        point = {path: flat[path] for path in self.space}
        return point if all(self.space[p].holds(v) for p, v in point.items()) else None

    @property
    def owner(self) -> str:
        """By what the study's own trials are known in Optuna's database, which may hold those of its name's past."""
        return self.run or self.name

    def place(self, *parts: str) -> str:
        """A folder of the study's own at its storage; of an address, options like ``?region=x`` stay at its end."""
        cut = self.storage.find("?") if "://" in self.storage else -1
        folder, options = (self.storage, "") if cut < 0 else (self.storage[:cut], self.storage[cut:])
        return "/".join([folder.rstrip("/"), self.name, *parts]) + options

    def optuna_url(self) -> str:
        """Of the database with the Optuna studies: the one given, else a file beside the checkpoints or in ``runs``."""
        if self.optuna:
            return self.optuna
        folder = Path("runs" if "://" in self.storage else self.storage).absolute() / self.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot make {folder} for Optuna's file: {e.strerror}; or give --optuna URL") from None
        from sqlalchemy import URL  # not earlier: it takes a while

        return URL.create("sqlite", database=str(folder / "optuna.db")).render_as_string()

    def nearest(self, flat: Mapping[str, Value]) -> dict[str, Value]:
        """The point of the space that is nearest to a configuration: values beyond an end lie on it."""
        mine = self.base.flat()
        return {path: axis.nearest(flat.get(path, mine[path]), mine[path]) for path, axis in self.space.items()}

    def differs(self, other: Plan) -> str | None:
        """The first thing that the other plan has otherwise, in words, apart from how long to search, and from what the
        studies that they begin with have found meanwhile.
        """

        def compared(plan: Plan) -> dict[str, Any]:
            rest = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in (*BUDGET, "run")}
            started = {source.partition("/")[0] for source, _ in rest.pop("warm")}
            searched = {f"space of {path}": axis for path, axis in rest.pop("space").items()}
            optuna = shown(rest.pop("optuna"))
            return {**rest.pop("base").flat(), **searched, **rest, "from": started, "optuna": optuna}

        mine, others = compared(self), compared(other)
        for name in mine | others:
            if (here := mine.get(name)) != (there := others.get(name)):
                plain = all(isinstance(v, str | int | float) and v != "" for v in (here, there))
                return f"{name} {there}, not {here}" if plain else f"another {name}"
        return None

    def to_json(self) -> str:
        """Everything but the password of the Optuna database, as text that :meth:`from_json` reads."""
        plain = {"base": self.base.flat(), "space": space_to_dict(self.space), "optuna": shown(self.optuna)}
        return json.dumps({**vars(self), **plain}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote; the address of its Optuna database may lack the password."""
        found = json.loads(text)
        found |= {"base": Config().replace(found["base"]), "space": space_from_dict(found["space"])}
        found |= {k: tuple(found[k]) for k in ("domains", "minimize")}
        return cls(**{**found, "warm": tuple((source, point) for source, point in found["warm"])})


_PASSWORDS = (
    r"(://[^:/?#\s]*:)[^/?#\s]*(@)",
    r"(?<!http)(?<!https)(://[^:/@\s]*:)[^@\s]*(@)",  # with a / in it, as databases take it
    r"(?<=http|ttps)(://[^:/@\s]*:)(?!\d{1,5}[/?#])[^@\s]*(@)",  # where digits are a port
    r"(?i)([?&][^=&\s]*(?:password|passwd|pwd|secret|token)=)[^&\s]*()",
)


def shown(text: str) -> str:
    """An address, or a text with addresses in it, without their passwords."""
    for pattern in _PASSWORDS:
        text = re.sub(pattern, rf"\1{HIDDEN}\2", text)
    return text


def reason_of(error: Exception, *, last: bool = False) -> str:
    """The first or last line of what an error says, without passwords, and no longer than one reads."""
    return shown(reason(error, last=last))[:200]


def open_address(address: str) -> str:
    """The address, which runs, results and checkpoints are going to say; raises InputError if a password is in it."""
    try:
        password = urlsplit(address).password if "://" in address else None
    except ValueError:
        password = None
    if password is not None:
        raise InputError(f"{shown(address)} has a password in it, which everyone would see: give it by the environment")
    return address


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a word; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


Lines = dict[tuple[str, ...], int]
"""Where in a file its keys stand, by the keys that lead there."""


def read_study(path: Path) -> tuple[dict[str, Any], Lines]:
    """The contents of a study's file, and its lines; raises InputError with file and line."""
    try:
        text = path.read_text()
        found = yaml.load(text, _Loader)
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
    lines = dict(_lines(yaml.compose(text, _Loader), ()))
    with in_file(path, lines):
        check(found)
    return found, lines


@contextlib.contextmanager
def in_file(path: Path, lines: Lines) -> Iterator[None]:
    """Within this, an InputError about a key of the file names the file and the line."""
    try:
        yield
    except InputError as e:
        known = [e.at[:n] for n in range(len(e.at), 0, -1) if e.at[:n] in lines]
        if not known:
            raise
        raise InputError(f"{path}:{lines[known[0]]}: {e}") from None


def _lines(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (here := (*keys, str(key.value))), key.start_mark.line + 1
            yield from _lines(value, here)


def check(settings: Mapping[str, Any]) -> None:
    """Raises InputError for a key that no study has and for a value of the wrong type."""
    for key, value in settings.items():
        with at(str(key)):
            kind = KEYS[one_of("key", str(key), KEYS)]
            right = isinstance(value, (int, float) if kind is float else kind)
            if not right or isinstance(value, bool):
                raise InputError(f"{key} must be {_TYPES[kind]}, got {value!r}")
            if kind in (int, float) and not abs(value) <= sys.float_info.max and value != math.inf:
                raise InputError(f"{key} must be finite, got {str(value)[:20]}")


_TYPES = {
    str: "a word", list: "a list", int: "a whole number", float: "a number", dict: "a mapping of hyperparameters",
}  # fmt: skip


def found_model(model: str) -> str:
    """The model's name or, of a file, its whole path: workers may have another working directory."""
    find_model(model)
    return model if model in model_names() else str(Path(model).resolve())


def evaluated_in_time(config: Config) -> Config:
    """The same, with four evaluations at least."""
    return config.replace({"eval_every": min(config.eval_every, max(1, config.steps // 4))})


def make_plan(settings: Mapping[str, Any], assignments: list[str]) -> Plan:
    """The plan for these settings (the keys of a study's file) and texts ``path.to.field=value``.

    Raises InputError for whatever cannot be run: unknown names, folders that are no domain, values out of range. Its
    ``at`` says which of the settings is wrong.
    """
    s = settings
    with at("model"):
        model = found_model(s.get("model", "nano"))
    with at("prompt"):
        prompt = one_of("prompt", s.get("prompt", "box"), get_args(PromptKind))
    given = {str(path): value for path, value in s.get("set", {}).items()}
    with at("set", "method"):
        said = (a.partition("=")[2] for a in assignments if a.startswith("method="))
        method = next(said, given.get("method", METHOD))
        base = method_preset(model, str(method)).replace({"prompt": prompt})
    for key in ("seed", "steps", "crop"):
        with at(key):
            base = base.replace({key: s[key]} if key in s else {})
    paths = dict.fromkeys([*given, *(a.partition("=")[0] for a in assignments)], 0)
    for path in STUDY_KEYS:
        if path in paths:
            raise InputError(f"{path} has an option of its own: --{path}, or {path}: in a study's file")
    for path, value in given.items():
        with at("set", path):
            base = base.replace({path: value})
    space, base = make_space(s.get("space", {}), base)
    changed = base.parse(assignments)
    space = fixed(space, paths)
    if s.get("steps") and "eval_every" not in paths:
        changed = evaluated_in_time(changed)
    _check_method(changed, space)
    if not space and s.get("trials", 16) > len(REFERENCES):
        raise InputError("nothing is left to search: every hyperparameter has been given a value")
    _check_numbers(s, changed, space)
    with at("domains"):
        domains = tuple(located(str(d), s.get("data", "")) for d in s.get("domains", ()))
        loaded = load_domains(domains)
    for domain in loaded:
        domain.check(changed, tested=True)
        with at("objective"):
            if s.get("objective") in ("miou", "f1") and not domain.split("val")[0].has_masks:
                raise InputError(
                    f"objective: the {s['objective']} of {domain.name} is not known: it has no masks on val"
                )
    with at("name"):
        first, others = [d.name for d in loaded[:NAMED]], len(loaded) - NAMED
        parts = [*first, *([f"and-{others}-more"] if others > 0 else []), prompt]
        name = checked_name(s.get("name") or "-".join(parts), "--name")
    words: dict[str, Any] = {}
    for key, kind in _NAMED.items():
        with at(key):
            words |= {key: one_of(key, s[key], get_args(kind))} if key in s else {}
    with at("joint"):
        if words.get("joint") and (len(loaded) < 2 or any(d.name == "joint" for d in loaded)):
            raise InputError("--joint needs two or more domains, none of which is called joint")
    with at("minimize"):
        minimize = tuple(dict.fromkeys(one_of("minimize", str(c), get_args(Cost)) for c in s.get("minimize", ())))
        if minimize and s.get("sampler") == "gp":
            raise InputError("--minimize needs the sampler tpe, nsga2 or random")
    with at("storage"):
        storage = _storage(s.get("storage", "runs"))
    numbers: dict[str, Any] = {k: float(s[k]) for k in ("hours", "gpu_hours", "gpus_per_worker") if k in s}
    return Plan(
        name=name, domains=domains, model=model, trials=s.get("trials", 16), workers=s.get("workers", 1),
        seeds=s.get("seeds", 3),
        storage=storage, base=changed, space=space, minimize=minimize, optuna=s.get("optuna", ""),
        optuna_study=s.get("optuna_study", ""), **words, **numbers,
    )  # fmt: skip


def _check_numbers(settings: Mapping[str, Any], base: Config, space: Space) -> None:
    for key, least in (("trials", 1), ("workers", 1), ("seeds", 0)):
        with at(key):
            if settings.get(key, least) < least:
                raise InputError(f"{key} must be at least {least}, got {settings[key]}")
    for key in ("hours", "gpu_hours", "gpus_per_worker"):
        with at(key):
            if not settings.get(key, 1) > 0:
                raise InputError(f"{key} must be above 0, got {settings[key]}")
    with at("gpus_per_worker"):
        share = settings.get("gpus_per_worker", 1)
        if share > 1:
            raise InputError(f"gpus_per_worker must be a share of one GPU, got {share}: workers puts a trial on more")
        if share < 1 and settings.get("workers", 1) > 1:
            raise InputError(f"workers of one trial need a GPU each: gpus_per_worker must be 1, got {share}")
    with at("workers"):
        workers, axis = settings.get("workers", 1), space.get("optim.batch_size")
        sizes = {"set" if axis else "": float(base.optim.batch_size)}  # which the references have
        sizes |= {"space": min(map(float, axis.choices or axis.bounds))} if axis else {}
        for where, size in sizes.items():
            if size < workers:
                said = f" in {where}" if where else ""
                raise InputError(f"{workers} workers share {size:g} images a step: raise optim.batch_size{said}")


def _check_method(base: Config, space: Space) -> None:
    methods = space["method"].choices if "method" in space else (base.method,)
    for method in methods:
        checked_method(base.replace({"method": method}))
    check_read(base, map(str, methods), space)
    check_boxes(space, base.prompt)


def load_domains(domains: tuple[str, ...]) -> list[Domain]:
    """The domains of a study, as given; raises InputError for what none can be named, or name a folder, after."""
    if not domains:
        raise InputError("no domain given: use --domain NAME, once or more, or --demo")
    loaded = [load_domain(open_address(d)) for d in domains]
    for domain in loaded:
        if not re.fullmatch(WORD, domain.name):
            raise InputError(f"a folder's name is its domain's: {domain.name!r} has more than letters, digits and -_.+")
        if sum(d.name == domain.name for d in loaded) > 1:
            raise InputError(f"the domain {domain.name!r} is given twice")
    return loaded


def checked_name(text: str, what: str) -> str:
    """The text, if it may name a folder; raises InputError, which calls it so, if it may not."""
    if len(text) > LONGEST:
        raise InputError(f"{what} {text[:LONGEST]!r}...: {len(text)} letters, of at most {LONGEST}")
    if not re.fullmatch(WORD, text):
        raise InputError(f"{what} {text!r}: use letters, digits, '-', '_', '+' and '.'")
    return text


def lasting(place: Path, option: str) -> Path:
    """The whole path; raises InputError, which names the option, if it lies in the folder that Ray makes for a job."""
    if JOB_FOLDERS in (whole := place.absolute()).parts:
        raise InputError(f"{option} {place} is in the folder of this Ray job, which Ray deletes: give a lasting place")
    return whole


JOB_FOLDERS = "working_dir_files"
"""The part of their paths that the working directories of Ray's jobs share."""


def _storage(text: str) -> str:
    if "://" in text:
        return open_address(text)
    folder = lasting(Path(text), "--storage")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot write to --storage {text}: {e.strerror}") from None
    return str(folder)
