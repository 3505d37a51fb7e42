"""Where a domain's Optuna study gets its next trial from: its queue, a point near its best one, or its sampler.

A trial is written to Optuna's database at once, with all that it is to try. Suggested one after the other its
parameters would be a transaction each, and for each the sampler would read the study again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuning.plan import Plan
from tuning.sampler import Point, ask, bounded, decoded, distributions, frozen, own, startup

MOVED = 0.3
"""The share of the hyperparameters in which a trial near the best one differs from it."""


@dataclass(frozen=True)
class Running:
    """A trial of an Optuna study that has not ended."""

    study: optuna.Study
    id: int
    number: int

    def report(self, value: float, step: int) -> None:
        """A score on the way."""
        self.study._storage.set_trial_intermediate_value(self.id, step, value)

    def tell(self, state: TrialState, values: Sequence[float] | None = None) -> None:
        """How it has ended, and with which values; of a failed one there are none."""
        self.study._storage.set_trial_state_values(self.id, state, values)


def propose(study: optuna.Study, plan: Plan, number: int) -> tuple[Running, Point, Mapping[str, Any]]:
    """The study's next trial, which is this one of the plan's; what it is to try; its attributes in Optuna.

    A few steps from what is good are mostly not bad, and in a space of many dimensions a few trials tell a sampler
    little: until it has enough to learn from each trial is near the best one, and from then on each second one.
    """
    everything = study.get_trials(deepcopy=False)
    # of a queue that is shared with others each study has what it has put there itself
    if queued := next((t for t in own(everything, plan) if t.state == TrialState.WAITING), None):
        return _begun(study, plan, queued, number)
    attrs = {"study": plan.owner, "number": number}
    known = bounded(everything)
    draft = _Draft(study, known if plan.sampler == "tpe" else everything, len(everything))
    point = near(known, plan, number) or ask(draft.ask(), plan.space)
    written = frozen(
        plan.space, point, state=TrialState.RUNNING, user_attrs=attrs, system_attrs=draft.trial.system_attrs
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=written)
    return Running(study, trial_id, study._storage.get_trial_number_from_id(trial_id)), point, attrs


def _begun(
    study: optuna.Study, plan: Plan, trial: FrozenTrial, number: int
) -> tuple[Running, Point, Mapping[str, Any]]:
    """As :func:`propose` has it, of a trial that was in the queue."""
    params, storage = trial.system_attrs["fixed_params"], study._storage
    point = decoded(plan.space, params)
    storage.set_trial_user_attr(trial._trial_id, "number", number)
    for name, distribution in distributions(plan.space, point).items():
        storage.set_trial_param(trial._trial_id, name, distribution.to_internal_repr(params[name]), distribution)
    storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)  # last: what is running is known by its number
    return Running(study, trial._trial_id, trial.number), point, {**trial.user_attrs, "number": number}


def near(known: Sequence[FrozenTrial], plan: Plan, number: int) -> Point | None:
    """A point near the best of the trials, if it is the turn of one; number: of the new trial."""
    if plan.sampler in ("random", "nsga2") or (number > startup(plan) and number % 2):
        return None
    done = [t for t in known if t.state == TrialState.COMPLETE]
    best = max(done, key=lambda t: t.values[0], default=None)
    start = decoded(plan.space, best.params) if best else plan.point("defaults")
    if start is None:
        return None
    generator = random.Random(1_000_003 * plan.base.seed + number)
    moved = {p for p in plan.space if generator.random() < MOVED} or {generator.choice(list(plan.space))}
    return {p: axis.near(start[p], generator) if p in moved else start[p] for p, axis in plan.space.items()}


class _Draft:
    """The database as a sampler sees it: with the trials that were read once, and one that is not written there.

    The queue is left out: what others have put there, Optuna would take.
    """

    def __init__(self, study: optuna.Study, trials: Iterable[FrozenTrial], number: int) -> None:
        self._study, self._trials = study, [t for t in trials if t.state != TrialState.WAITING]
        self.trial = create_trial(state=TrialState.RUNNING)
        self.trial.number, self.trial._trial_id = number, -1

    def ask(self) -> optuna.Trial:
        """The trial, whose parameters the study's sampler suggests."""
        view = copy.copy(self._study)
        view._storage = self  # type: ignore[assignment]
        return view.ask()

    def create_new_trial(self, study_id: int) -> int:
        return self.trial._trial_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self.trial if trial_id == self.trial._trial_id else self._study._storage.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [t for t in self._trials if states is None or t.state in states]

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        self.trial.params[name] = distribution.to_external_repr(value)
        self.trial.distributions[name] = distribution

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.trial.system_attrs[key] = value

    def __getattr__(self, name: str) -> Any:
        """All else is the database's."""
        return getattr(self._study._storage, name)
