"""One configuration for several domains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tuning import conclusion, joint, judge, registry
from tuning.conclusion import Verdict
from tuning.plan import Plan, make_plan
from tuning.tracking import Trial
from wesam import Scores
from wesam.errors import InputError


def plan(how: str) -> Plan:
    return make_plan({"domains": ["camouflaged", "medical"], "joint": how}, [])


def test_a_joint_study_is_ranked_by_what_it_gains() -> None:
    direct = {"a": Scores(1, 1, 0.5, 0.6), "b+fog:5": Scores(1, 1, 0.7, 0.8)}
    now = {"a": Scores(1, 1, 0.6, 0.6), "b+fog:5": Scores(1, 1, 0.68, 0.9, collapsed=0.5)}
    assert joint.score(plan("mean"), now, direct) == pytest.approx(0.04)
    assert joint.score(plan("worst"), now, direct) == pytest.approx(-0.02)
    assert joint.score(plan(""), {"a": now["a"]}, direct) == 0.6
    assert joint.word(plan("worst"), direct) == "least gain in mIoU"
    found = joint.metrics(now)
    assert found["val_miou"] == pytest.approx(0.64)
    assert found["val_collapsed"] == 0.25
    assert (found["val_miou.a"], found["val_f1.b.fog.5"]) == (0.6, 0.9)
    assert "val_label_free" not in found


def test_a_single_domain_is_not_searched_jointly() -> None:
    with pytest.raises(InputError, match="--joint needs two or more domains"):
        make_plan({"domains": ["camouflaged"], "joint": "mean"}, [])
    with pytest.raises(InputError, match="unknown joint"):
        make_plan({"domains": ["camouflaged", "medical"], "joint": "sum"}, [])


def test_where_a_joint_winner_loses_on_val_the_domain_keeps_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(2, 2, 0.6, 0.7)
    registered: list[str] = []
    monkeypatch.setattr(judge, "judged", lambda task, adapters: dict.fromkeys(adapters, scores))
    monkeypatch.setattr(judge, "picture", lambda *given: b"")
    monkeypatch.setattr(conclusion, "_drawings", lambda c, row, searched: {})
    monkeypatch.setattr(Scores, "of", lambda images: Scores(2, 2, 0.65, 0.7))

    def promote(tracker: Any, domain: str, *given: Any) -> tuple[int, str]:
        registered.append(domain)
        return 1, "champion"

    monkeypatch.setattr(registry, "promote", promote)
    best = Trial(
        number=3, run_id="r", label="searched", reference=None, point={}, config={"steps": "8"}, best=0.05,
        best_step=8, step=8, ended="finished", gap=None, metrics={},
    )  # fmt: skip
    verdict = Verdict([best], 16, 0.5, best, [], [], True, [])
    reached = {"val_miou.a": 0.7, "val_miou.b": 0.55}
    tracker = SimpleNamespace(files=lambda *given: {}, at=lambda run, name, step: reached[name])
    context: Any = SimpleNamespace(plan=plan("mean"), tracker=tracker)
    run: Any = SimpleNamespace(id="r", attach=lambda f: f(), log=lambda *given: None)
    rows = []
    for name in ("a", "b"):
        target: Any = SimpleNamespace(
            name=name, given=name, found={"direct_test": scores}, task=None, direct=scores, run=run, tags={},
            tried=lambda: None,
        )  # fmt: skip
        rows.append(conclusion._row(context, run, target, verdict))
    assert registered == ["a"]
    assert [(r["best_trial"], r["best"]) for r in rows] == [(3, 0.65), (None, 0.6)]
    assert "use the model as it is" in rows[1]["outcome"]
    assert "gains on the other domains" in rows[1]["outcome"]
