"""What stops trials early: those that are behind, and all when the budget is spent."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tuning.budget import Budget
from tuning.plan import MARGIN, Plan
from tuning.trainer import METRIC

KEPT = "paper"
"""The reference that has a column of its own in the result, and so all of its steps."""

PLATEAU = "plateau"
"""Why a trial was stopped that was past its best: what it has reached is all that there is to know of it."""


ENOUGH = 3
"""So many trials must have come to a step before one of them is called behind there: of fewer a third is none."""


class Stopping(TrialScheduler):
    """Beside one of Tune's schedulers: never stops the trial with the paper's hyperparameters, with which all others
    are compared, what confirms a search, nor a trial at its last step, nor one that is behind fewer than two. Nor are
    the model's defaults ever behind: they are known to be sound, and slower than many that learn fast and end lower.

    Stops, from the grace period on, a trial that has been better than Direct and whose best score is as old as half of
    its steps: the best checkpoint is kept, and self-training that has passed its best falls. When the budget is spent,
    it stops whatever of the search has been evaluated.
    """

    def watch(self, budget: Budget, grace: float, direct: float) -> None:
        """To be called once, before the first trial.

        grace: steps before which none is stopped for its score. direct: the score of the model as it is.
        """
        self._budget, self._grace, self._direct = budget, grace, direct
        self._risen: dict[str, tuple[float, int]] = {}
        """Trial -> its best score, but for less than MARGIN, and the step at which it had reached that."""
        self._come: Counter[int] = Counter()
        """Step -> how many trials have come to it."""
        self.stopped: dict[str, str] = {}
        """Trial -> ``pruned``, ``plateau`` or ``budget``."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first that waits, and then one that was paused; Tune would look at all trials that there ever were."""
        live = sorted(tune_controller.get_live_trials(), key=lambda t: t.trial_id)
        ready = [t for status in (Trial.PENDING, Trial.PAUSED) for t in live if t.status == status]
        return ready[0] if ready else None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if "role" in trial.config or result.get("saved"):
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if result.get("last"):
            return TrialScheduler.CONTINUE
        if self._budget.over():
            self.stopped[trial.trial_id] = "budget"
            return TrialScheduler.STOP
        flat = self._flat(trial.trial_id, result[METRIC], result["step"])
        self._come[result["step"]] += 1
        reference = trial.config.get("reference")
        behind = decision == TrialScheduler.STOP and self._come[result["step"]] >= ENOUGH and reference is None
        if (behind or flat) and reference != KEPT:
            self.stopped[trial.trial_id] = "pruned" if behind else PLATEAU
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE  # nor is any paused for others to catch up

    def _flat(self, trial_id: str, best: float, step: int) -> bool:
        known, since = self._risen.get(trial_id, (-math.inf, step))
        if best > known + MARGIN:
            self._risen[trial_id] = known, since = best, step
        return known > self._direct + MARGIN and step >= self._grace and 2 * since <= step

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nobody is measured by what only confirms the search, such as Supervised."""
        if "role" not in trial.config:
            super().on_trial_complete(tune_controller, trial, result)


class Halving(Stopping, ASHAScheduler):
    """Asynchronous successive halving."""


class Median(Stopping, MedianStoppingRule):
    """Stops what is below the median of the others' averages."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on; Tune's rule takes what it has called behind for ended, and fails if it goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.CONTINUE:
            self._stopped_trials.discard(trial)
        return decision


class Patient(Stopping, FIFOScheduler):
    """Stops nothing early."""


def make_scheduler(plan: Plan, budget: Budget, direct: float) -> Stopping:
    """The plan's scheduler, on optimisation steps, so that the number of workers does not matter.

    direct: the score of the model as it is.
    Nothing is judged before twice the warm-up: until then a trial has hardly moved, and its score tells nothing.
    """
    steps, every = plan.base.steps, min(plan.base.eval_every, plan.base.steps)
    warm = 2 * min(plan.base.optim.warmup_steps, steps // 4)
    grace: float = max(1, -(-warm // every)) * every
    common: dict[str, Any] = {"time_attr": "step", "metric": METRIC, "mode": "max", "grace_period": grace}
    made: Stopping
    if plan.scheduler == "asha":
        last = max(every, steps - 1)  # who has reached the last step is done anyway
        made = Halving(**common, max_t=last, reduction_factor=3, stop_last_trials=False)
    elif plan.scheduler == "median":
        made = Median(**common)
    else:
        made, grace = Patient(), math.inf  # type: ignore[no-untyped-call]
    made.watch(budget, grace, direct)
    return made
