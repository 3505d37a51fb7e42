"""A domain's Optuna study: where it is kept, what proposes, and how a point of the space is written in it."""

from __future__ import annotations

import heapq
import sqlite3
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState, create_trial

from tuning.plan import REFERENCES, Plan, reason_of, shown
from tuning.space import Axis, Space, space_to_dict
from tuning.storage import PatientStorage, StudyStorage
from tuning.tracking import Trial
from wesam.config import Value
from wesam.errors import InputError
from wesam.sam import weights_digest

Point = dict[str, Value]
"""Dotted path -> value, for every axis of the space."""

Params = dict[str, Any]
"""The same as Optuna has it: some axes are two parameters there."""

SEARCHED, BOLDER, BEST_OF = "searched", "method's bolder start", "best of "
"""What trials are called that are no references; after the last one comes where that was found."""

BEST, RECENT = 50, 250
"""Of more trials a proposal looks at the best, of which TPE never takes more than 25 for good, and at the last ones:
what it costs would grow with their number.
"""

COST_METRICS = {"size": "adapter_mb", "seconds": "seconds_per_step"}
"""What a cost is called in MLflow."""


NO_MATTER = ("seed", "prompt", "test_instances", "compute.precision", "compute.checkpointing", "compute.compile")
"""What trials of one Optuna study may have of their own: none of it changes what their scores mean."""


def open_storage(url: str) -> RDBStorage:
    """The database with the Optuna studies, made if it is not there; raises InputError if it cannot be reached."""
    try:
        if not url.startswith("sqlite"):
            return PatientStorage(url)
        return StudyStorage(url, engine_kwargs={"connect_args": {"timeout": 60, "factory": _Unhurried}})
    except ImportError as e:
        raise InputError(f"--optuna {shown(url)} needs a package that is not installed: {e}") from None
    except Exception as e:  # every database has errors of its own
        raise InputError(f"cannot reach the Optuna storage {shown(url)}: {reason_of(e)}") from None


class _Unhurried(sqlite3.Connection):
    """A trial is some ten transactions, and the driver is not to wait for the disk after each.

    What a machine that loses its power forgets of the last ones, :func:`catch_up` finds in MLflow.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
            self.execute(f"PRAGMA {pragma}")


def open_study(plan: Plan, domain: str, storage: RDBStorage, data: str = "") -> optuna.Study:
    """The Optuna study of this domain in this study, ``NAME-DOMAIN``, which may hold trials of other jobs too.

    data: the domain's digest. Raises InputError if there is one of that name whose trials cannot be compared: of
    another space, objective, data or weights, or with another value of what is fixed, such as the number of steps.
    """
    name = f"{plan.optuna_study or plan.name}-{domain}"
    directions: list[Any] = ["maximize", *("minimize" for _ in plan.minimize)]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    study.sampler = make_sampler(plan, len(study.get_trials(deepcopy=False)))
    about = {
        "space": space_to_dict(plan.space),
        "score": plan.objective,
        "prompt": plan.base.prompt,
        "weights": weights_digest(plan.model),
        "joint": plan.joint,
        "data": data,
        **{k: v for k, v in plan.base.flat().items() if k not in plan.space and k not in NO_MATTER},
    }
    before = study.user_attrs.get("about")
    if before is not None and "weights" not in before:  # of a version that knew them by the model's name
        about["model"] = plan.model
    if before is None:
        study.set_user_attr("about", about)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that names are experimental
            study.set_metric_names(["score", *plan.minimize])
    elif changed := next((k for k in about if k in before and before[k] != about[k]), None):
        raise InputError(f"the Optuna study {name!r} exists with another {changed}: give another name")
    return study


def make_sampler(plan: Plan, known: int) -> BaseSampler:
    """The plan's sampler; known: how many trials there are already, or a resumed study would repeat its proposals."""
    seed = (plan.base.seed + 1_000_003 * known) % 2**32
    start = startup(plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that groups are experimental
        if plan.sampler == "tpe":
            return TPESampler(
                seed=seed,
                multivariate=True,
                group=True,  # parameters that are there only with others
                constant_liar=True,  # trials side by side keep apart
                n_startup_trials=start,
            )
        if plan.sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=start, warn_independent_sampling=False)
        if plan.sampler == "nsga2":  # of whose generations those that were pruned are no part
            return NSGAIISampler(seed=seed, population_size=max(4, start // 2))
        return RandomSampler(seed=seed)


def bounded(trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
    """What is to be learned from: the best trials, the last ones and those that have not ended, in their order."""
    early, last = trials[:-RECENT], trials[-RECENT:]
    if len(early) <= BEST:
        return trials
    best = heapq.nlargest(BEST, (t for t in early if t.state == TrialState.COMPLETE), key=lambda t: t.values[0])
    seen = [*best, *(t for t in early if not t.state.is_finished()), *last]
    return sorted(seen, key=lambda t: t.number)


def startup(plan: Plan) -> int:
    """Trials before the sampler has enough to learn from."""
    return min(10, max(4, plan.trials // 2))


def enqueue(study: optuna.Study, plan: Plan, seen: Container[str | None]) -> None:
    """Has the study begin with the references that lie in the space, what other studies found best, and the method's
    bolder configuration, if it has one.

    seen: references and labels of those that are not to be run any more.
    """
    first: dict[str, tuple[dict[str, str], Mapping[str, Value]]] = {}
    for reference in REFERENCES:
        if (known := plan.point(reference)) is not None:
            first[reference] = {"reference": reference}, known
    for source, flat in plan.warm:
        first[BEST_OF + source] = {"label": BEST_OF + source}, plan.nearest(flat)
    if plan.sampler != "random" and (bolder := plan.bolder()):
        first[BOLDER] = {"label": BOLDER}, bolder
    wanted = [name for name in first if name not in seen]
    waiting = [t for t in own(study.get_trials(deepcopy=False), plan) if t.state == TrialState.WAITING]
    if [name for t in waiting for name in named(t.user_attrs)] == wanted:
        return
    for t in waiting:  # what is put into Optuna's queue comes last, and these have an order
        study._storage.set_trial_state_values(t._trial_id, TrialState.FAIL)
    for name in wanted:
        about, point = first[name]
        study.enqueue_trial(encoded(plan.space, point), user_attrs={**about, "study": plan.owner})


def named(about: Mapping[str, Any]) -> list[str]:
    """The reference, or the label, that a trial has by these attributes of it; nothing of one that was searched."""
    return [about[k] for k in ("reference", "label") if about.get(k)]


def catch_up(study: optuna.Study, plan: Plan, done: Iterable[Trial], unfinished: Iterable[Mapping[str, Any]]) -> None:
    """Tells the study what became of the trials of an earlier run, whatever it missed of that.

    If its database is new, that is all of it. unfinished: proposals of :class:`tuning.search.Search`, to be gone on
    with.
    """
    going_on = {p["number"]: p["point"] for p in unfinished if "optuna" in p}
    for number, t in running(study, plan).items():
        if number not in going_on:
            study.tell(t.number, state=TrialState.FAIL)
    known = {**ended(study, plan), **running(study, plan)}

    def write(number: int, point: Mapping[str, Value], **given: Any) -> None:
        attrs = {"study": plan.owner, "number": number}
        study.add_trial(frozen(plan.space, point, user_attrs=attrs, **given))

    for trial in done:
        told = known.get(trial.number)  # of one that was cut and has gone on since, how it was when it was cut
        cut = told and told.state == TrialState.PRUNED and trial.ended in ("finished", "plateau")
        if (cut or not told) and trial.point and trial.ended != "diverged":
            values = [trial.best, *(trial.metrics[COST_METRICS[c]] for c in plan.minimize)]
            write(trial.number, trial.point, state=TrialState.COMPLETE, values=values)
    for number, point in going_on.items():
        if number not in known:
            write(number, point, state=TrialState.RUNNING)


def own(trials: Iterable[FrozenTrial], plan: Plan) -> list[FrozenTrial]:
    """This study's trials, of all that the Optuna study has."""
    return [t for t in trials if t.user_attrs.get("study") == plan.owner]


def ended(study: optuna.Study, plan: Plan) -> dict[int, FrozenTrial]:
    """This study's trials of which Optuna has the result, by their numbers in the search."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return {t.user_attrs["number"]: t for t in own(trials, plan)}


def running(study: optuna.Study, plan: Plan) -> dict[int, FrozenTrial]:
    """This study's trials that have not ended, as far as Optuna knows, by their numbers in the search."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {t.user_attrs["number"]: t for t in own(trials, plan)}


def ask(trial: BaseTrial, space: Space) -> Point:
    """The point that the trial is to try."""
    return {path: _suggest(trial, path, axis) for path, axis in space.items()}


def encoded(space: Space, point: Mapping[str, Value]) -> Params:
    """The point in Optuna's parameters."""
    return {name: value for path, axis in space.items() for name, (_, value) in _coded(path, axis, point[path]).items()}


def decoded(space: Space, params: Params) -> Point:
    """The point that :func:`encoded` wrote."""
    return ask(FixedTrial(params), space)


def frozen(space: Space, point: Mapping[str, Value], **given: Any) -> FrozenTrial:
    """A trial of this point as Optuna has it; given: what else :func:`optuna.trial.create_trial` takes."""
    return create_trial(params=encoded(space, point), distributions=distributions(space, point), **given)


def distributions(space: Space, point: Mapping[str, Value]) -> dict[str, BaseDistribution]:
    """Those of the parameters that the point has."""
    return {name: d for path, axis in space.items() for name, (d, _) in _coded(path, axis, point[path]).items()}


def _suggest(trial: BaseTrial, path: str, axis: Axis) -> Value:
    if axis.zero and not trial.suggest_categorical(f"{path} > 0", (False, True)):
        return 0 if axis.type == "int" else 0.0
    name, d = _parameter(path, axis)
    if isinstance(d, CategoricalDistribution):
        return cast(Value, trial.suggest_categorical(name, d.choices))
    if isinstance(d, IntDistribution):
        return trial.suggest_int(name, d.low, d.high, log=d.log)
    value = trial.suggest_float(name, d.low, d.high, log=d.log)
    return _round(1 - value) if axis.log == "complement" else value


def _coded(path: str, axis: Axis, value: Value) -> dict[str, tuple[BaseDistribution, Any]]:
    out: dict[str, tuple[BaseDistribution, Any]] = {}
    if axis.zero:
        out[f"{path} > 0"] = CategoricalDistribution((False, True)), value != 0
        if value == 0:
            return out
    name, distribution = _parameter(path, axis)
    return out | {name: (distribution, _round(1 - float(value)) if axis.log == "complement" else value)}


def _parameter(path: str, axis: Axis) -> tuple[str, CategoricalDistribution | IntDistribution | FloatDistribution]:
    """The name and the range of what Optuna draws."""
    if axis.type == "categorical":
        return path, CategoricalDistribution(axis.choices)
    low, high = axis.bounds
    if axis.type == "int":
        return path, IntDistribution(int(low), int(high), log=bool(axis.log))
    if axis.log == "complement":
        return f"1 - {path}", FloatDistribution(_round(1 - high), _round(1 - low), log=True)
    return path, FloatDistribution(low, high, log=bool(axis.log))


def _round(value: float) -> float:
    """Without what subtracting from 1 leaves at the end: 1 - 0.9 is 0.1."""
    return float(f"{value:.12g}")
