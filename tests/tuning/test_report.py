"""What a report works out by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tuning.conclusion import missing
from tuning.report import Trust, _warmth
from tuning.tracking import Trial


def test_trust_in_the_label_free_score_by_hand() -> None:
    direct = (0.5, 0.6)
    trials = [[(0.4, 0.5), (0.6, 0.7)], [(0.7, 0.75), (0.2, 0.9)], [(0.8, 0.72)]]
    found = Trust.of(direct, trials)
    assert found is not None
    assert found.spearman == pytest.approx(0.5), "ranks 1 2 3 against 1 3 2"
    assert found.regret == pytest.approx(0.9 - 0.72)
    assert Trust.of(direct, trials[:2]) is None, "too few to tell"
    assert Trust.of(direct, [[(0.5, 0.6)]] * 4) is None, "nothing to rank"
    alone = Trust.of((0.99, 0.6), trials)
    assert alone is not None
    assert alone.regret == pytest.approx(0.9 - 0.6), "Direct is a candidate"


def trial(number: int, best: float, label: str = "searched", reference: str | None = None) -> Trial:
    return Trial(
        number=number, run_id="", label=label, reference=reference, point={}, config={}, best=best, best_step=10,
        step=20, ended="finished", gap=None, metrics={},
    )  # fmt: skip


def test_trials_that_are_missing_have_failed_or_the_budget_was_spent() -> None:
    found = [trial(1, 0.5), trial(2, 0.5)]
    assert missing(2, found, spent=False) == ""
    assert missing(3, found, spent=False) == "; 1 of 3 trials failed"
    cut = replace(found[1], ended="budget")
    assert "after 2 of 9 trials, 1 of them not at their last step" in missing(9, [found[0], cut], spent=True)


def test_what_a_warm_start_was_worth_is_told_by_the_trials_after_it() -> None:
    first = [
        trial(1, 0.9, "paper's hyperparameters", "paper"),
        trial(2, 0.6, "best of a/x"),
        trial(3, 0.7, "best of a/y"),
    ]
    assert _warmth(first[:1]) is None
    told = _warmth([*first, trial(4, 0.5), trial(5, 0.75)])
    assert told is not None
    assert "trial 3, the best of a/y, has 0.700" in told
    assert "took 2 and 40 steps" in told
    assert "none of the search's own 1 trials" in (_warmth([*first, trial(4, 0.5)]) or "")
