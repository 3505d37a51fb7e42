"""What is run beside and after a domain's search: Supervised, the finalists, the winner with other seeds."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tuning.plan import MARGIN, Plan
from tuning.tracking import Trial
from wesam.config import Value

Proposal = dict[str, Any]
"""A trial as plain data: ``number``; ``label``, what it is; ``config``, every hyperparameter by path; ``point``, where
it lies in the space, None for one that the space does not hold; ``optuna``, its number in the Optuna study;
``reference`` for one of :data:`tuning.plan.REFERENCES`; ``idle``, until when, in seconds since the epoch, there was
nothing to begin; and for one that goes on, ``run``, its run in MLflow,
``resume``, the path of its checkpoint, and ``state``, what the listener knew of it. One that is none of the search's
own has a ``role``, FINALIST, SEED or SUPERVISED, its seed as number, and, as ``of``, the trial whose configuration it
has.
"""

FINALIST, SEED, SUPERVISED, DIRECT = "finalist", "seed", "supervised", "direct"
"""Roles of the runs that are no trials of the search; the last one has no training at all."""

CLOSE = 0.01
"""Trials so near the best on val could be as good: between two seeds of one configuration it is easily as much."""

FINALISTS = 3
"""At most so many of them, the best too, are trained again before one is chosen."""


def name_of(proposal: Mapping[str, Any]) -> str:
    """What a trial is called among its domain's."""
    role = proposal.get("role")
    number = proposal["of"] if role == FINALIST else proposal["number"]
    return f"{role} {number}" if role else str(number)


def decides(proposal: Mapping[str, Any]) -> bool:
    """Whether it has a say in which trial wins."""
    return proposal.get("role") in (None, FINALIST)


def finalists(scores: Mapping[int, float], direct: float) -> list[int]:
    """The trials that could be the best, the best on val first; none if that is one alone, or if Direct is as good."""
    best = max(scores.values(), default=direct)
    close = [n for n, s in scores.items() if s >= best - CLOSE and s > direct + MARGIN]
    return sorted(close, key=lambda n: (-scores[n], n))[:FINALISTS] if len(close) > 1 else []


def repeated(again: Iterable[Trial]) -> dict[int, float]:
    """The scores on val of what was trained again, by the trial whose configuration it has."""
    return {t.of: t.best for t in again if t.of is not None}


def winner(scores: Mapping[int, float], again: Mapping[int, float], direct: float) -> int | None:
    """The trial with the best score on val, for finalists that of both trainings on average; of those that are as good
    but for MARGIN the first, so that the model's defaults are not left for a chance. None if Direct is as good.

    again: the scores of second trainings, by trial; if one of the finalists has any, no other trial can win.
    """
    scores = {n: statistics.mean((scores[n], again[n])) for n in finalists(scores, direct) if n in again} or scores
    best = max(scores.values(), default=direct)
    return min((n for n, s in scores.items() if s >= best - MARGIN and s > direct + MARGIN), default=None)


class Confirmation:
    """Proposes what comes beside the search and after it; is told how the trials that decide have ended."""

    def __init__(
        self, plan: Plan, direct: float, found: Mapping[int, tuple[float, Mapping[str, Value]]],
        again: Mapping[int, float], done: Collection[tuple[str, int, int | None]], *, supervised: bool,
    ) -> None:  # fmt: skip
        """direct: the source model's score on val. found: score and configuration of the search's trials until now.
        again: the scores of finalists, by trial. done: role, seed and ``of`` of what has been run or goes on already.
        supervised: whether masks are known.
        """
        self._plan, self._direct, self._done = plan, direct, set(done)
        self._found, self._again = dict(found), dict(again)
        seeds = self._seeds() if supervised else []
        self._supervised = [s for s in seeds if (SUPERVISED, s, None) not in self._done]
        self._finalists: list[int] | None = None
        """Those still to be trained again; None until the search has ended."""

    @property
    def most(self) -> int:
        """The number of proposals that may come."""
        return len(self._supervised) + len(self._seeds()) + (FINALISTS if self._seeds() else 0)

    def learn(self, proposal: Proposal, score: float) -> None:
        """A trial that decides has ended with this score on val."""
        if "role" in proposal:
            self._again[proposal["of"]] = score
        else:
            self._found[proposal["number"]] = score, proposal["config"]

    def next(self, *, waiting: bool) -> Proposal | None:
        """The next one; None if there is none until those end that decide, or at all.

        waiting: whether any of them has not ended.
        """
        if self._finalists is None and not waiting:
            self._finalists = self._new_finalists()
        if self._finalists:
            return self._proposal(FINALIST, self._deciding_seed, self._finalists.pop(0))
        if not waiting and (found := self._repetition()):
            return found
        return self._proposal(SUPERVISED, self._supervised.pop(0), None) if self._supervised else None

    def _new_finalists(self) -> list[int]:
        close = finalists(self._scores(), self._direct) if self._seeds() else []
        return [n for n in close if (FINALIST, self._deciding_seed, n) not in self._done]

    def _repetition(self) -> Proposal | None:
        """Of the winner, with the next seed."""
        number = winner(self._scores(), self._again, self._direct)
        if number is None:
            return None
        for seed in self._seeds():
            if (SEED, seed, number) not in self._done:
                self._done.add((SEED, seed, number))
                return self._proposal(SEED, seed, number)
        return None

    def _scores(self) -> dict[int, float]:
        """Of the search's trials."""
        return {n: score for n, (score, _) in self._found.items()}

    def _seeds(self) -> range:
        """Others than the search's, on whose luck its winner may rest."""
        first = self._plan.base.seed + 1
        return range(first, first + self._plan.seeds)

    @property
    def _deciding_seed(self) -> int:
        """None of those whose scores are told afterwards: what has been chosen by says too much of what was chosen."""
        return self._seeds().stop

    def _proposal(self, role: str, seed: int, of: int | None) -> Proposal:
        flat = self._plan.supervised().flat() if of is None else dict(self._found[of][1])
        label = f"Supervised, seed {seed}" if of is None else f"trial {of} again, seed {seed}"
        return {
            "number": seed, "label": label, "config": {**flat, "seed": seed}, "point": None, "role": role, "of": of
        }  # fmt: skip
