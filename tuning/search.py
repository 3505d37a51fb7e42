"""Who proposes a domain's trials, Optuna after the references, and who stops them, ASHA."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tuning.plan import Plan
from tuning.space import Axis
from tuning.trainer import METRIC
from wesam.config import Value

Point = dict[str, Value]


class Search(OptunaSearch):
    """Proposes the references first, whether or not they lie in the space, then variants of the model's defaults, each
    with about half of its values drawn anew, and, once there are enough trials to learn from, what TPE thinks of.

    A proposal is ``{"reference": name}`` or ``{"point": {path: value}}``.
    """

    def __init__(
        self, plan: Plan, references: Sequence[str], known: Sequence[tuple[Mapping[str, Value], float]] = ()
    ) -> None:
        """references: those still to be run. known: points that have been tried already, with their scores."""
        seed = (plan.base.seed + 1_000_003 * len(known)) % 2**32  # a resumed study must not repeat its proposals
        start = min(10, max(4, plan.trials // 2))
        sampler = TPESampler(
            seed=seed,
            multivariate=True,
            constant_liar=True,  # trials side by side keep apart
            n_startup_trials=start,
        )
        space = {path: distribution(axis) for path, axis in plan.space.items()}
        super().__init__(space=space, metric=METRIC, mode="max", sampler=sampler)
        self._left = list(references)
        self._points = {r: plan.point(r) for r in references}
        self._axes, self._defaults = plan.space, plan.point("defaults")
        self._variants = start - len(known) if self._defaults else 0
        self._random = random.Random(seed)
        self._own: dict[str, Point | None] = {}
        for point, score in known:
            self.add_evaluated_point(dict(point), score)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's proposal."""
        if self._left:
            reference = self._left.pop(0)
            self._own[trial_id] = self._points[reference]
            return {"reference": reference}
        if self._defaults and self._variants > 0:
            self._variants -= 1
            drawn = {p: draw(axis, self._random) for p, axis in self._axes.items() if self._random.random() < 0.5}
            self._own[trial_id] = point = {**self._defaults, **drawn}
            return {"point": point}
        return {"point": super().suggest(trial_id)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tells Optuna how a trial is doing."""
        if trial_id not in self._own and METRIC in result:  # one that diverged at once has no score
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how a trial has ended; one that it has not proposed, too, if it is a point of the space."""
        if trial_id not in self._own:
            super().on_trial_complete(trial_id, result, error)
            return
        point = self._own[trial_id]
        if point and result and METRIC in result:
            self.add_evaluated_point(point, result[METRIC])


class Halving(ASHAScheduler):
    """ASHA, which stops what is behind at an evaluation; never a reference, with which all are compared.

    Nothing is judged before twice its warm-up: until then a trial has hardly moved, and its score tells nothing.
    """

    def __init__(self, plan: Plan) -> None:
        steps, every = plan.base.steps, min(plan.base.eval_every, plan.base.steps)
        warm = 2 * min(plan.base.optim.warmup_steps, steps // 4)
        super().__init__(
            time_attr="step",
            metric=METRIC,
            mode="max",
            grace_period=max(1, -(-warm // every)) * every,
            max_t=max(every, steps - 1),  # who has reached the last step is done anyway
            reduction_factor=3,
            stop_last_trials=False,
        )
        self.stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        last = bool(result.get("last"))
        if decision == TrialScheduler.STOP and not last and "reference" not in trial.config:
            self.stopped.add(trial.trial_id)
            return decision
        return TrialScheduler.CONTINUE


def draw(axis: Axis, generator: random.Random) -> Value:
    """A value of the axis at random; uniform in its logarithm where the axis is logarithmic."""
    if axis.type == "categorical":
        return generator.choice(axis.choices)
    assert axis.low is not None
    assert axis.high is not None
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
    value = generator.uniform(low, high)
    value = min(max(math.exp(value) if axis.log else value, axis.low), axis.high)
    return round(value) if axis.type == "int" else value


def distribution(axis: Axis) -> BaseDistribution:
    """The axis in Optuna's words."""
    if axis.type == "categorical":
        return CategoricalDistribution(axis.choices)
    assert axis.low is not None
    assert axis.high is not None
    if axis.type == "int":
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)
