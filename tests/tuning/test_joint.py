"""One configuration for several domains."""

from __future__ import annotations

import pytest

from tuning import joint
from tuning.plan import Plan, make_plan
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
