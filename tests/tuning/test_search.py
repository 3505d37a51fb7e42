"""Who proposes trials and who stops them, without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from tuning.plan import REFERENCES, Plan, make_plan
from tuning.search import Halving, Search


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = {"domains": ["camouflaged"], "steps": 8, "trials": 6, "storage": str(tmp_path)}
    return make_plan(settings, ["eval_every=2"])


def result(score: float, step: int) -> dict[str, Any]:
    return {"best_miou": score, "step": step, "training_iteration": step, "last": step == 8}


def test_the_references_come_first_and_then_points_of_the_space(plan: Plan) -> None:
    search = Search(plan, REFERENCES)
    assert search.suggest("a") == {"reference": "paper"}
    assert search.suggest("b") == {"reference": "defaults"}
    for name, score in (("a", 0.5), ("b", 0.6)):
        search.on_trial_result(name, result(score, 8))
        search.on_trial_complete(name, result(score, 8))
    proposal = search.suggest("c")
    assert proposal is not None
    assert set(proposal["point"]) == set(plan.space)
    assert all(plan.space[p].holds(v) for p, v in proposal["point"].items())


def test_a_seed_decides_the_proposals_and_a_resumed_study_makes_others(plan: Plan) -> None:
    tried = plan.point("paper")
    assert tried is not None
    first, again, later = Search(plan, ()), Search(plan, ()), Search(plan, (), [(tried, 0.5)])
    assert first.suggest("a") == again.suggest("a")
    assert first.suggest("b") != later.suggest("b")


def test_a_trial_without_any_result_does_no_harm(plan: Plan) -> None:
    search = Search(plan, ())
    search.suggest("a")
    search.on_trial_result("a", {"done": True})
    search.on_trial_complete("a", {"done": True})
    assert search.suggest("b")


def test_what_is_behind_is_stopped_but_never_the_papers_trial(plan: Plan) -> None:
    halving = Halving(plan)

    def trial(name: str, config: dict[str, Any]) -> Any:
        made = SimpleNamespace(trial_id=name, config=config)
        halving.on_trial_add(None, made)
        return made

    good = trial("good", {"point": {}})
    assert halving.on_trial_result(None, good, result(0.9, 2)) == TrialScheduler.CONTINUE
    paper, bad = trial("paper", {"reference": "paper"}), trial("bad", {"point": {}})
    assert halving.on_trial_result(None, paper, result(0.1, 2)) == TrialScheduler.CONTINUE
    assert halving.on_trial_result(None, bad, result(0.1, 2)) == TrialScheduler.STOP
    assert halving.stopped == {"bad"}
    assert halving.on_trial_result(None, good, result(0.1, 8)) == TrialScheduler.CONTINUE
