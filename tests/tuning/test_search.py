"""Who proposes trials and who stops them, without a cluster."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from tuning.plan import REFERENCES, Plan, make_plan
from tuning.search import Halving, Search, draw
from tuning.space import Axis


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = {"domains": ["camouflaged"], "steps": 8, "trials": 6, "storage": str(tmp_path)}
    return make_plan(settings, ["eval_every=2"])


def result(score: float, step: int) -> dict[str, Any]:
    return {"best_score": score, "step": step, "training_iteration": step, "last": step == 8}


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


def test_the_search_begins_around_the_defaults(plan: Plan) -> None:
    search, defaults = Search(plan, ()), plan.point("defaults")
    assert defaults is not None
    shares = []
    for i in range(4):
        proposal = search.suggest(str(i))
        assert proposal is not None
        point = proposal["point"]
        assert set(point) == set(plan.space)
        assert all(plan.space[p].holds(v) for p, v in point.items())
        shares.append(sum(point[p] == v for p, v in defaults.items()) / len(defaults))
        search.on_trial_complete(str(i), result(0.5, 8))
    assert 0.3 < sum(shares) / 4 < 0.85
    learned = search.suggest("tpe")
    assert learned is not None
    assert set(learned["point"]) == set(plan.space)


def test_draws_fill_an_axis_to_its_ends() -> None:
    generator = random.Random(0)
    drawn = [draw(Axis(type="int", low=1, high=4, log=True), generator) for _ in range(200)]
    assert set(drawn) == {1, 2, 3, 4}
    found = [draw(Axis(type="float", low=1e-4, high=1.0, log=True), generator) for _ in range(400)]
    assert 0.4 < sum(v < 1e-2 for v in found) / 400 < 0.6, "half of the draws in half of the decades"
    assert {draw(Axis(type="categorical", choices=(False, True)), generator) for _ in range(20)} == {False, True}


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


def test_what_is_behind_is_stopped_but_never_a_reference_nor_before_it_has_warmed_up(plan: Plan) -> None:
    halving = Halving(plan)

    def trial(name: str, config: dict[str, Any]) -> Any:
        made = SimpleNamespace(trial_id=name, config=config)
        halving.on_trial_add(None, made)
        return made

    good = trial("good", {"point": {}})
    assert halving.on_trial_result(None, good, result(0.9, 4)) == TrialScheduler.CONTINUE
    paper, bad = trial("paper", {"reference": "paper"}), trial("bad", {"point": {}})
    assert halving.on_trial_result(None, paper, result(0.1, 4)) == TrialScheduler.CONTINUE
    assert halving.on_trial_result(None, bad, result(0.1, 2)) == TrialScheduler.CONTINUE
    assert halving.on_trial_result(None, bad, result(0.1, 4)) == TrialScheduler.STOP
    assert halving.stopped == {"bad"}
    assert halving.on_trial_result(None, good, result(0.1, 8)) == TrialScheduler.CONTINUE
