"""One configuration for several domains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tuning import joint, tracking
from tuning.plan import Plan, make_plan
from tuning.study import best_of, new_study
from tuning.tracking import Tracker
from wesam import AdaptedSam, Scores, evaluate, load_domain, load_sam
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


@pytest.mark.usefixtures("cluster")
def test_a_joint_study_has_one_configuration_and_an_adapter_for_each_domain(
    small: Path, tmp_path: Path, tracker: Tracker
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small, other)
    (other / "train.json").write_text((other / "train.json").read_text() + " ")  # the same data, with another digest
    settings = {
        "name": "s", "domains": [str(small), str(other)], "joint": "worst", "trials": 3, "steps": 6, "seeds": 1,
        "storage": str(tmp_path / "runs"),
    }  # fmt: skip
    made = make_plan(settings, ["eval_every=2", "optim.batch_size=2", "method=supervised"])
    rows = new_study(made, tracker)["domains"]
    assert [r["domain"] for r in rows] == ["small", "other"]
    assert [r.get("error") for r in rows] == [None, None]
    assert rows[0]["config"] == rows[1]["config"]
    assert rows[0]["trials_of"] == rows[1]["trials_of"] not in (rows[0]["run_id"], rows[1]["run_id"])
    assert {r.info.run_name for r in tracker.find("domain")} == {"small", "other", "joint"}
    assert {r.info.status for r in (*tracker.find("domain"), *tracker.find("trial"))} == {"FINISHED"}

    searched = tracking.trials(tracker, rows[0]["trials_of"])
    assert [t.number for t in searched] == [1, 2, 3]
    best = max(searched, key=lambda t: t.best)
    gains = [
        tracker.at(best.run_id, f"val_miou.{r['domain']}", best.best_step) - r["val"]["direct"] for r in rows
    ]  # fmt: skip
    assert best.best == pytest.approx(min(gains))
    (zero,) = tracking.trials(tracker, rows[0]["trials_of"], "direct")
    assert zero.best == 0
    for row in rows:
        folder = tmp_path / f"adapter-{row['domain']}"
        folder.mkdir()
        for name, contents in tracker.files(row["best_run"], f"adapter/{row['domain']}").items():
            (folder / name).write_bytes(contents)
        model, domain = AdaptedSam.load(load_sam(), folder), load_domain(row["given"])
        (run,) = [r for r in tracker.find("trial") if r.info.run_id == row["best_run"]]
        at = int(run.data.metrics["best_step"])
        val = tracker.at(row["best_run"], f"val_miou.{row['domain']}", at)
        assert evaluate(model, domain.split("val"), "box").miou == pytest.approx(val, abs=1e-4)
    assert [where for where, _ in best_of("s", tracker)] == ["s/joint"]
