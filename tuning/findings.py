"""What a domain's search has shown, as MLflow has it: what its drawings and the report are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from tuning import joint
from tuning.plan import WORDS, yardstick
from tuning.tracking import Tracker, Trial

Curve = Sequence[tuple[int, float]]
"""(step, score on val)."""

Pair = tuple[float, float]
"""(label-free score, mIoU) on val of one evaluation."""


@dataclass(frozen=True)
class Trust:
    """How well the label-free score would have chosen, where masks are known to tell."""

    spearman: float
    """Rank correlation, over the trials, of the best label-free score of each with the mIoU on val at that step."""
    regret: float
    """The best mIoU on val of all evaluations, Direct's too, less that of the one with the best label-free score."""

    @classmethod
    def of(cls, direct: Pair, trials: Sequence[Sequence[Pair]]) -> Trust | None:
        """From those of Direct and of each trial's evaluations; None for fewer than three trials."""
        chosen = [max(t, key=lambda e: e[0]) for t in trials if t]  # of those that tie the first, as a study chooses
        everything = [direct, *(e for t in trials for e in t)]
        if len(chosen) < 3 or len({s for s, _ in chosen}) < 2 or len({m for _, m in chosen}) < 2:
            return None
        spearman = float(spearmanr([s for s, _ in chosen], [m for _, m in chosen]).statistic)
        return cls(spearman, max(m for _, m in everything) - max(everything, key=lambda e: e[0])[1])


@dataclass(frozen=True)
class Findings:
    """A domain's search."""

    row: dict[str, Any]
    """Of the study's result, as :func:`tuning.conclusion.conclude` has it."""
    trials: list[Trial]
    curves: dict[int, Curve]
    """By trial, the domain's own score; at step 0 it is Direct's."""
    pairs: list[list[Pair]]
    """Of each trial, Direct's first; empty where no masks are known."""

    @property
    def direct(self) -> float:
        """What Direct has of the score that trials are ranked by."""
        return 0.0 if self.row["joint"] else float(self.row["val"]["direct"])

    @property
    def drawn(self) -> tuple[str, float] | None:
        """What was drawn without a model, if it can be from the given labels, and the same of it; None for nothing."""
        return None if self.row["joint"] else yardstick(self.row["val"])

    @property
    def word(self) -> str:
        """What the score that trials are ranked by is called."""
        own = WORDS[self.row["val"]["score"]]
        return f"{joint.JOINTLY[self.row['joint']]} in {own}" if self.row["joint"] else own

    @property
    def trust(self) -> Trust | None:
        """In the label-free score."""
        known = self.pairs and all(self.pairs)
        return Trust.of(self.pairs[0][0], [p[1:] for p in self.pairs]) if known else None


def read(tracker: Tracker, row: dict[str, Any], found: list[Trial]) -> Findings:
    """The search that a row of the result is about; found: its trials."""

    def curve(trial: Trial, called: str) -> Curve:
        name = joint.metric(f"val_{called}", row["domain"]) if row["joint"] else f"val_{called}"
        return sorted((m.step, m.value) for m in tracker.history(trial.run_id, name))

    known = [{called: curve(t, called) for called in {"label_free", "miou", row["val"]["score"]}} for t in found]
    pairs = [_pairs(curves["label_free"], curves["miou"]) for curves in known]
    own = {t.number: curves[row["val"]["score"]] for t, curves in zip(found, known, strict=True)}
    return Findings(row, found, own, pairs)


def _pairs(scores: Curve, mious: Curve) -> list[Pair]:
    """Both scores of each evaluation that has both."""
    known = dict(mious)
    return [(value, known[step]) for step, value in scores if step in known]


def front(trials: Sequence[Trial], costs: Sequence[str]) -> list[Trial]:
    """The Pareto front, the best score first: trials that no other one beats in score and costs together.

    costs: metrics that are to be small.
    """
    values = [(-t.best, *(t.metrics[c] for c in costs)) for t in trials]

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(o != mine and all(a <= b for a, b in zip(o, mine, strict=True)) for o in values)

    kept = [(v, t) for v, t in zip(values, trials, strict=True) if not beaten(v)]
    return [t for _, t in sorted(kept, key=lambda k: k[0])]
