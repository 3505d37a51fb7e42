"""What a domain's Tuner asks for its next trial: the references, what the Optuna study proposes, what confirms it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tuning.budget import Budget
from tuning.confirm import Confirmation, Proposal, decides
from tuning.places import Place
from tuning.plan import Plan
from tuning.proposals import Running, propose
from tuning.sampler import SEARCHED, Point, decoded, ended, running
from tuning.schedulers import PLATEAU
from tuning.trainer import METRIC

LABELS = {"paper": "paper's hyperparameters", "defaults": "model's defaults"}


class Search(Searcher):
    """Hands Optuna's trials to Tune, and Tune's results to Optuna.

    A trial that is stopped because it is behind is PRUNED there, one past its best is COMPLETE; one that diverges or
    dies is FAIL, from which no sampler learns.
    """

    def __init__(
        self, plan: Plan, study: optuna.Study, numbers: Sequence[int], references: Sequence[str],
        unfinished: Sequence[Proposal], confirmation: Confirmation, budget: Budget, stopped: Mapping[str, str],
        place: Place,
    ) -> None:  # fmt: skip
        """numbers: of the new trials. references: those still to be run that the space does not hold, which Optuna
        never sees. unfinished: trials of an earlier run, to go on with. confirmation: what comes beside and after the
        search, on whatever budget. stopped: what the scheduler has stopped, by trial, and why.
        """
        super().__init__(metric=METRIC, mode="max")
        self._plan, self._study, self._budget, self._stopped, self._place = plan, study, budget, stopped, place
        self._numbers, self._references, self._unfinished = list(numbers), list(references), list(unfinished)
        self._lost = {n: t for n, t in ended(study, plan).items() if n in numbers}
        """Trials of which Optuna has the result, but MLflow nothing: its driver was killed. They are run again."""
        self._confirmation = confirmation
        self._trials: dict[str, Running] = {}
        self._idle = 0.0
        """When there was last nothing to begin."""
        self._live: dict[str, Proposal] = {}
        """The trials that have not ended and on which it depends what is run after them."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray saves its searchers again and again, and nobody ever reads that."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is to be kept is in the Optuna study."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: as :meth:`save`."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial's proposal; None while that depends on other trials; or that there is none."""
        found = self._suggest(trial_id) if self._place.take(trial_id) else None
        if isinstance(found, dict):
            return {**found, "idle": self._idle}
        self._place.leave(trial_id)
        self._idle = time.time()
        return found

    def _suggest(self, trial_id: str) -> Any:
        if self._unfinished:
            found: Proposal | None = self._go_on(trial_id, self._unfinished.pop(0))
        elif self._numbers and not self._budget.over():
            found = self._next(trial_id, self._numbers.pop(0))
        else:
            found = self._confirmation.next(waiting=bool(self._live))
            if not found and self._live:
                return None
        if found and decides(found):
            self._live[trial_id] = found
        return found or Searcher.FINISHED

    def _next(self, trial_id: str, number: int) -> Proposal:
        if self._references:
            return self._proposal(number, None, self._references.pop(0))
        if known := self._lost.get(number):
            return self._proposed(number, decoded(self._plan.space, known.params), known.number, known.user_attrs)
        trial, point, attrs = propose(self._study, self._plan, number)
        self._trials[trial_id] = trial
        return self._proposed(number, point, trial.number, attrs)

    def _proposed(self, number: int, point: Point, optuna_number: int, attrs: Mapping[str, Any]) -> Proposal:
        found = self._proposal(number, point, attrs.get("reference"), attrs.get("label"))
        return {**found, "optuna": optuna_number}

    def _proposal(
        self, number: int, point: Point | None, reference: str | None = None, label: str | None = None
    ) -> Proposal:
        label = LABELS[reference] if reference else label or SEARCHED
        config = self._plan.config(reference, point or {}).flat()
        found: Proposal = {"number": number, "label": label, "config": config, "point": point}
        return found | ({"reference": reference} if reference else {})

    def _go_on(self, trial_id: str, found: Proposal) -> Proposal:
        if "optuna" in found:
            frozen = running(self._study, self._plan).get(found["number"])
            if frozen:
                self._trials[trial_id] = Running(self._study, frozen._trial_id, frozen.number)
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tells Optuna how a trial is doing."""
        trial = self._trials.get(trial_id)
        if (
            trial and METRIC in result and not result.get("saved") and not self._plan.minimize
        ):  # with several objectives Optuna has no place for it
            trial.report(result[METRIC], result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna, and what confirms the search, how a trial has ended."""
        self._place.leave(trial_id)
        proposal = self._live.pop(trial_id, None)
        if proposal and not error:
            state = proposal.get("state", {})  # of one that had come to its last step before, nothing more is reported
            if result and METRIC in result:
                self._confirmation.learn(proposal, result[METRIC])
            elif state.get("best_step"):
                self._confirmation.learn(proposal, state["best"])
        trial = self._trials.pop(trial_id, None)
        if trial is None:
            return
        if error or not result or METRIC not in result or (not result["last"] and trial_id not in self._stopped):
            trial.tell(TrialState.FAIL)
            return
        values = [result[METRIC], *(result[c] for c in self._plan.minimize)]
        pruned = self._stopped.get(trial_id, PLATEAU) != PLATEAU and not self._plan.minimize
        if pruned:
            trial.report(values[0], result["step"])  # Tune does not hand it on when it stops a trial
        trial.tell(TrialState.PRUNED if pruned else TrialState.COMPLETE, values)
