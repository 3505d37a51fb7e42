"""What early stopping would have made of a study whose trials have all run to their end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from tuning.budget import Budget
from tuning.plan import Plan
from tuning.schedulers import make_scheduler
from tuning.trainer import METRIC


@dataclass(frozen=True)
class Run:
    """A trial that has run to its end."""

    reference: bool
    curve: Sequence[tuple[int, float]]
    """(step, best score so far) of each evaluation."""


@dataclass(frozen=True)
class Replayed:
    """What is left of a study."""

    steps: int
    """Optimisation steps of all trials."""
    best: float
    """The best score of all trials, as far as they went."""


def replay(plan: Plan, runs: Sequence[Run]) -> Replayed:
    """The same trials, one after the other, under ASHA, which may stop any but the references.

    Who proposes trials might have learned other things from shortened ones: that is not in it.
    """
    whole = replace(plan, scheduler="asha", hours=math.inf, gpu_hours=math.inf)
    scheduler = make_scheduler(whole, Budget(whole))
    steps, best = 0, -math.inf
    for number, run in enumerate(runs):
        trial: Any = SimpleNamespace(trial_id=str(number), config={"reference": ""} if run.reference else {})
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        last = run.curve[-1][0]
        result: dict[str, Any] = {}
        for step, score in run.curve:
            result = {"step": step, METRIC: score, "last": step == last, "training_iteration": step}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(None, trial, result)
        steps, best = steps + result["step"], max(best, result[METRIC])
    return Replayed(steps, best)
