"""Trials of before, told to a scheduler: for a study that goes on, or to see what early stopping would have saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from tuning.budget import Budget
from tuning.plan import Plan
from tuning.schedulers import Stopping, make_scheduler
from tuning.trainer import METRIC


@dataclass(frozen=True)
class Past:
    """A trial of before."""

    steps: int
    """That it was to have."""
    reference: str | None
    """One of :data:`tuning.plan.REFERENCES`, or None."""
    curve: Sequence[tuple[int, float]]
    """(step, best score so far) of each of its evaluations, at least one."""


@dataclass(frozen=True)
class Replayed:
    """What is left of a study."""

    steps: int
    """Optimisation steps of all trials."""
    best: float
    """The best score of all trials, as far as they went."""


@dataclass(eq=False)
class _Trial:
    """All that a scheduler asks of a trial."""

    trial_id: str
    config: dict[str, Any]


_NOTHING_RUNS: Any = SimpleNamespace(get_live_trials=list)
"""All that a scheduler asks of Tune."""


def replay(plan: Plan, past: Sequence[Past], direct: float) -> Replayed:
    """The same trials, one after the other, under ASHA, as :mod:`tuning.schedulers` has it; direct: Direct's score.

    Who proposes trials might have learned other things from shortened ones: that is not in it.
    """
    whole = replace(plan, scheduler="asha", hours=math.inf, gpu_hours=math.inf)
    return tell(make_scheduler(whole, Budget(whole), direct), past)


def tell(scheduler: Stopping, past: Sequence[Past]) -> Replayed:
    """Lets a scheduler see trials, one after the other; what it would have stopped ends there."""
    steps, best = 0, -math.inf
    for number, one in enumerate(past):
        trial: Any = _Trial(f"past {number}", {"reference": one.reference})
        scheduler.on_trial_add(_NOTHING_RUNS, trial)
        result: dict[str, Any] = {}
        for step, score in one.curve:
            result = {"step": step, METRIC: score, "last": step == one.steps, "training_iteration": step}
            if scheduler.on_trial_result(_NOTHING_RUNS, trial, result) == TrialScheduler.STOP:
                break
        scheduler.on_trial_complete(_NOTHING_RUNS, trial, result)
        steps, best = steps + result["step"], max(best, result[METRIC])
    return Replayed(steps, best)
