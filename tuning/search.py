"""What a domain's Tuner asks for its next trial: the references first, then what the Optuna study proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tuning.budget import Budget
from tuning.plan import Plan
from tuning.sampler import Point, ask
from tuning.trainer import METRIC

Proposal = dict[str, Any]
"""A trial as plain data: ``number``; ``label``, what it is; ``config``, every hyperparameter by path; ``point``, where
it lies in the space, None for one that the space does not hold; ``optuna``, its number in the Optuna study;
``reference`` for one of :data:`tuning.plan.REFERENCES`; and for one that goes on, ``run``, its run in MLflow,
``resume``, the path of its checkpoint, and ``state``, what the listener knew of it.
"""

LABELS = {"paper": "paper's hyperparameters", "defaults": "model's defaults"}


class Search(Searcher):
    """Hands Optuna's trials to Tune, and Tune's results to Optuna.

    A trial that is stopped early is PRUNED there; one that diverges or dies is FAIL, from which no sampler learns.
    """

    def __init__(
        self, plan: Plan, study: optuna.Study, numbers: Sequence[int], references: Sequence[str],
        unfinished: Sequence[Proposal], budget: Budget, stopped: Mapping[str, str],
    ) -> None:  # fmt: skip
        """numbers: of the new trials. references: those still to be run that the space does not hold, which Optuna
        never sees. unfinished: trials of an earlier run, to go on with. stopped: what the scheduler has stopped, by
        trial, and why.
        """
        super().__init__(metric=METRIC, mode="max")
        self._plan, self._study, self._budget, self._stopped = plan, study, budget, stopped
        self._numbers, self._references, self._unfinished = list(numbers), list(references), list(unfinished)
        self._trials: dict[str, optuna.Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves its searchers again and again, and nobody ever reads that."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is to be kept is in the Optuna study."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: as :meth:`save`."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial's proposal, or that there is none when the budget is spent."""
        if self._unfinished:
            return self._go_on(trial_id, self._unfinished.pop(0))
        if self._budget.over():
            return Searcher.FINISHED
        number = self._numbers.pop(0)
        if self._references:
            return self._proposal(number, None, self._references.pop(0))
        trial = self._study.ask()
        self._trials[trial_id] = trial
        point = ask(trial, self._plan.space)
        for key, value in (("study", self._plan.name), ("number", number)):
            trial.set_user_attr(key, value)
        found = self._proposal(number, point, trial.user_attrs.get("reference"), trial.user_attrs.get("from"))
        return {**found, "optuna": trial.number}

    def _proposal(
        self, number: int, point: Point | None, reference: str | None = None, source: str | None = None
    ) -> Proposal:
        label = LABELS[reference] if reference else f"best of {source}" if source else "searched"
        config = self._plan.config(reference, point or {}).flat()
        found: Proposal = {"number": number, "label": label, "config": config, "point": point}
        return found | ({"reference": reference} if reference else {})

    def _go_on(self, trial_id: str, found: Proposal) -> Proposal:
        if "optuna" in found:
            frozen = next(t for t in self._study.get_trials(deepcopy=False) if t.number == found["optuna"])
            if frozen.state == TrialState.RUNNING:
                self._trials[trial_id] = optuna.Trial(self._study, frozen._trial_id)
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tells Optuna how a trial is doing."""
        trial = self._trials.get(trial_id)
        if trial and METRIC in result and not self._plan.minimize:  # with several objectives Optuna has no place for it
            trial.report(result[METRIC], result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how a trial has ended."""
        trial = self._trials.pop(trial_id, None)
        if trial is None:
            return
        if error or not result or METRIC not in result or (not result["last"] and trial_id not in self._stopped):
            self._study.tell(trial, state=TrialState.FAIL)
            return
        values = [result[METRIC], *(result[c] for c in self._plan.minimize)]
        if trial_id in self._stopped and not self._plan.minimize:
            trial.report(values[0], result["step"])  # Tune does not hand it on when it stops a trial
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, values)
