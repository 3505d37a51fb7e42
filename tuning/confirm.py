"""What is run beside and after a domain's search: Supervised, and the winner's configuration with other seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tuning.plan import MARGIN, Plan
from wesam.config import Value

Proposal = dict[str, Any]
"""A trial as plain data: ``number``; ``label``, what it is; ``config``, every hyperparameter by path; ``point``, where
it lies in the space, None for one that the space does not hold; ``optuna``, its number in the Optuna study;
``reference`` for one of :data:`tuning.plan.REFERENCES`; and for one that goes on, ``run``, its run in MLflow,
``resume``, the path of its checkpoint, and ``state``, what the listener knew of it. One that is none of the search's
own has a ``role``, SEED or SUPERVISED, its seed as number, and, as ``of``, the trial whose configuration it has.
"""

SEED, SUPERVISED, DIRECT = "seed", "supervised", "direct"
"""Roles of the runs that are no trials of the search; the last one has no training at all."""


def winner(scores: Mapping[int, float], direct: float) -> int | None:
    """The trial with the best score on val; of those that are as good but for MARGIN the first, so that the model's
    defaults are not left for a chance. None if Direct is as good.
    """
    best = max(scores.values(), default=direct)
    return min((n for n, s in scores.items() if s >= best - MARGIN and s > direct + MARGIN), default=None)


class Confirmation:
    """Proposes what comes beside the search, which tells it how its trials have ended."""

    def __init__(
        self, plan: Plan, direct: float, found: Mapping[int, tuple[float, Mapping[str, Value]]],
        done: Collection[tuple[str, int, int | None]], *, supervised: bool,
    ) -> None:  # fmt: skip
        """direct: the source model's score on val. found: score and configuration of the search's trials until now.
        done: role, seed and ``of`` of what has been run or goes on already. supervised: whether masks are known.
        """
        self._plan, self._direct, self._done = plan, direct, set(done)
        self._found = dict(found)
        seeds = [s for s in self._seeds() if (SUPERVISED, s, None) not in self._done] if supervised else []
        self._supervised = [self._proposal(SUPERVISED, s, None) for s in seeds]

    @property
    def most(self) -> int:
        """The number of proposals that may come."""
        return len(self._supervised) + len(self._seeds())

    def learn(self, number: int, score: float, config: Mapping[str, Value]) -> None:
        """A trial of the search has ended with this score on val."""
        self._found[number] = score, config

    def beside(self) -> Proposal | None:
        """The next one that needs not know how the search ends."""
        return self._supervised.pop(0) if self._supervised else None

    def after(self) -> Proposal | None:
        """The next one, when the search has ended."""
        number = winner({n: s for n, (s, _) in self._found.items()}, self._direct)
        if number is None:
            return None
        for seed in self._seeds():
            if (SEED, seed, number) not in self._done:
                self._done.add((SEED, seed, number))
                return self._proposal(SEED, seed, number)
        return None

    def _seeds(self) -> range:
        """Others than the search's, on whose luck its winner may rest."""
        first = self._plan.base.seed + 1
        return range(first, first + self._plan.seeds)

    def _proposal(self, role: str, seed: int, of: int | None) -> Proposal:
        flat = self._plan.supervised().flat() if of is None else dict(self._found[of][1])
        label = f"Supervised, seed {seed}" if of is None else f"trial {of} again, seed {seed}"
        return {
            "number": seed, "label": label, "config": {**flat, "seed": seed}, "point": None, "role": role, "of": of
        }  # fmt: skip
