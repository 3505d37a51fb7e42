"""Whole studies on a real local Ray, with real MLflow and Optuna, on a very small domain.

All that starts Ray is in this file, which pytest-xdist gives to one process with --dist loadfile: two local Rays
starve each other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import psutil
import pytest
import ray
import requests
from pycocotools import mask as rle
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.tune.execution import class_cache

from tuning import confirm, domain, registry, report, runtime, tracking, trainer
from tuning.cli import main, summary
from tuning.confirm import FINALIST, finalists, repeated, winner
from tuning.domain import DomainSearch
from tuning.listener import CHECKPOINT
from tuning.plan import Plan, make_plan
from tuning.study import best_of, new_study, resume_study
from tuning.tracking import ROLE, Tracker
from wesam import AdaptedSam, evaluate, load_domain, load_sam
from wesam.errors import InputError

ROOT = Path(__file__).parents[2]
on_ray = pytest.mark.usefixtures("cluster")


def test_a_study_that_was_ended_before_it_had_begun_says_so(tracker: Tracker) -> None:
    tracker.start("s", "study", None, {}).close("KILLED")
    tracker.flush()
    with pytest.raises(InputError, match="'s' was ended before it had begun: start it"):
        resume_study("s", tracker)


def test_an_enlarged_domain_is_not_done_however_often_its_trials_had_to_be_begun(tracker: Tracker) -> None:
    domain = tracker.start("d", "domain", None, {})
    for number, status in ((1, "FINISHED"), (2, "FAILED"), (2, "FINISHED"), (3, "FINISHED")):
        run = tracker.start(f"d {number}", "trial", domain, {"wesam.trial": str(number)})
        run.close(status)  # type: ignore[arg-type]
    tracker.flush()

    def is_done(trials: int, *, more: bool = True) -> bool:
        plan, budget = SimpleNamespace(trials=trials), SimpleNamespace(over=lambda: not more)
        search: Any = SimpleNamespace(_c=SimpleNamespace(tracker=tracker, plan=plan, budget=budget))
        return DomainSearch._is_done(search, tracker.run(domain.id))

    assert (is_done(3), is_done(4)) == (True, False)
    tags = {"wesam.trial": "4", "ended": "budget", CHECKPOINT: "{}"}
    tracker.start("d 4", "trial", domain, tags).close()
    tracker.flush()
    assert (is_done(4, more=False), is_done(4)) == (True, False), "what the budget has cut goes on when there is more"


def test_ctrl_c_keeps_what_is_there_and_leaves_no_process_and_the_study_can_go_on(
    small: Path, tmp_path: Path, uri: str
) -> None:
    tune = [sys.executable, "-m", "tuning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"{uri}?password={WORDS[0]}"}
    environment |= {**dict(zip(SECRETS, WORDS[2:], strict=True)), "PYTHONWARNINGS": "ignore:Query string argument"}
    optuna = ["--optuna", f"sqlite:///{tmp_path}/optuna.db?password={WORDS[1]}"]
    fixed = ["eval_every=30", "optim.batch_size=1", "lora.rank=1", "lora.targets=qkv"]
    options = ["--seeds", "1", *optuna, *(part for f in fixed for part in ("--set", f))]
    run = subprocess.Popen(
        [*tune, "run", "--name", "s", "--domain", str(small), "--trials", "4", "--steps", "30", *options],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    said = ""
    for line in run.stdout:
        said += line
        if "trial " in line and "/4" in line:
            break
    family = psutil.Process(run.pid).children(recursive=True)
    assert family
    second = Tracker(uri)
    with pytest.raises(InputError, match=f"'s' is running already, in process {run.pid}"):
        resume_study("s", second, optuna=optuna[1])
    second.close()
    time.sleep(3)  # the next trial has begun to train
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=120) == 130
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(p.is_running() and p.status() != "zombie" for p in family):
        time.sleep(0.2)
    assert [p for p in family if p.is_running() and p.status() != "zombie"] == []

    tracker = Tracker(uri)
    ended = [r.info.status for r in tracker.find("trial")]
    assert "FINISHED" in ended
    assert {r.info.status for level in ("study", "domain") for r in tracker.find(level)} == {"KILLED"}  # type: ignore[arg-type]
    assert "RUNNING" not in ended
    killed = [r for r in tracker.find("trial") if r.info.status == "KILLED"]
    reached = {r.info.run_id: json.loads(r.data.tags[CHECKPOINT])["step"] for r in killed if CHECKPOINT in r.data.tags}
    assert reached
    assert all(0 < step < 30 for step in reached.values()), "none has been evaluated yet: it was told in time"

    done = subprocess.run(
        [*tune, "resume", "s", *optuna], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    finished = [r for r in tracker.find("trial") if r.info.status == "FINISHED"]
    assert tracking.trials_page("http://127.0.0.1:5000", finished[0].info.experiment_id) in done.stdout
    searched = [r for r in finished if ROLE not in r.data.tags]
    assert sorted(int(r.data.tags["wesam.trial"]) for r in searched) == [1, 2, 3, 4]
    roles = [r.data.tags[ROLE] for r in finished if ROLE in r.data.tags]
    assert (roles.count("direct"), roles.count("supervised")) == (1, 1)
    assert reached.keys() <= {r.info.run_id for r in finished}, "what had a checkpoint goes on in its own run"
    for trial, step in reached.items():
        (began,) = tracker.client.get_metric_history(trial, "went_on_from")
        assert (began.value, [m.step for m in tracker.client.get_metric_history(trial, "val_miou")]) == (step, [0, 30])
    assert {r.info.status for level in ("study", "domain") for r in tracker.find(level)} == {"FINISHED"}  # type: ignore[arg-type]
    tracker.close()
    _no_secret_is_anywhere(said + done.stdout, tmp_path, run.pid)


SECRETS = ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
WORDS = [f"{n}hush{'0123456789abcdef' * 2}" for n in range(2 + len(SECRETS))]
"""Passwords in the URIs of MLflow and of Optuna, and those secrets."""


def _no_secret_is_anywhere(said: str, folder: Path, process: int) -> None:
    """Not in what was printed, nor in the databases, artifacts, checkpoints and report, nor in Ray's logs."""
    assert (folder / "runs/s/report/report.html").exists()
    sessions = list((Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray").glob(f"session_*_{process}"))
    assert sessions
    files = [f for place in (folder, *sessions) for f in place.rglob("*") if f.is_file()]
    kinds = {f.suffix for f in files}
    assert kinds >= {".db", ".safetensors", ".json", ".html", ".svg", ".log"}
    for word in WORDS:
        assert word not in said
        assert not [f for f in files if word.encode() in f.read_bytes()]


@on_ray
def test_a_ray_of_its_own_asks_for_a_token_and_listens_on_the_loopback_alone() -> None:
    address = str(ray._private.worker.get_dashboard_url())
    port = int(address.rsplit(":", 1)[1])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}
    for head in ({}, {"Authorization": "Bearer 0123456789abcdef"}):
        assert requests.get(f"http://{address}/api/jobs/", headers=head, timeout=60).status_code in (401, 403)
    kept = class_cache.ENV_VARS_TO_PROPAGATE
    assert not [name for name in kept if "AWS" in name], "Tune would hand them on where everybody can read them"
    assert "RAY_CHDIR_TO_TRIAL_DIR" in kept


def make(small: Path, tmp_path: Path, **settings: Any) -> Plan:
    given = {"name": "s", "domains": [str(small)], "trials": 4, "steps": 6, "seeds": 2}
    given["storage"] = str(tmp_path / "runs")
    # supervised: with so few steps on so few images, only real masks are sure to beat Direct on val
    return make_plan({**given, **settings}, ["eval_every=2", "optim.batch_size=2", "method=supervised"])


def check(plan: Plan, result: dict[str, Any], tracker: Tracker, small: Path, tmp_path: Path) -> None:
    """What holds for every study: nested and closed runs, a fetched adapter that scores what was logged."""
    (row,) = result["domains"]
    assert "error" not in row, row
    assert mlflow.active_run() is None
    runs = {level: tracker.find(level) for level in ("study", "domain", "trial")}  # type: ignore[arg-type]
    final = tracking.trials(tracker, row["run_id"], FINALIST)
    count = plan.trials + 1 + len(final) + plan.seeds
    assert [len(r) for r in runs.values()] == [1, 1, count], "Direct is one, finalists and the winner again are more"
    assert {r.info.status for level in runs.values() for r in level} == {"FINISHED"}
    assert runs["domain"][0].data.tags[tracking.PARENT] == result["run_id"]
    assert {r.data.tags[tracking.PARENT] for r in runs["trial"]} == {row["run_id"]}
    found = tracking.trials(tracker, row["run_id"])
    assert [t.number for t in found] == list(range(1, plan.trials + 1))
    assert [t.reference for t in found[:3]] == ["paper", "defaults", None][: plan.trials]
    assert not found[0].pruned
    for tags in (r.data.tags for r in runs["trial"]):
        assert tags["data"] == load_domain(str(small)).digest
        assert {"seed", "prompt", "model", "domain", "version.torch", "mlflow.source.git.commit"} <= set(tags)
    scores, direct = {t.number: t.best for t in found}, row["val"]["direct"]
    assert {t.of for t in final} == set(finalists(scores, direct))
    assert row["best_trial"] == winner(scores, repeated(final), direct) is not None, "no trial beat Direct"
    best = next(t for t in found if t.number == row["best_trial"])
    for t in final:
        assert {**t.config, "seed": "0"} == next(f for f in found if f.number == t.of).config
        assert t.config["seed"] == str(plan.seeds + 1)
    again = tracking.trials(tracker, row["run_id"], "seed")
    assert [(t.number, t.of, t.config["seed"]) for t in again] == [
        (s, best.number, str(s)) for s in range(1, plan.seeds + 1)
    ]
    assert {**again[0].config, "seed": "0"} == best.config
    assert row["val"]["best"] == pytest.approx(sum(t.best for t in again) / len(again))
    (zero,) = tracking.trials(tracker, row["run_id"], "direct")
    assert (zero.number, zero.best, zero.config.keys()) == (0, row["val"]["direct"], best.config.keys())

    entry, config = registry.fetch(tracker, "small", tmp_path / "adapter")
    chosen = max((best, *again), key=lambda t: t.best)
    assert (entry.run_id, {k: str(v) for k, v in config.items()}) == (chosen.run_id, chosen.config)
    model = AdaptedSam.load(load_sam(), tmp_path / "adapter")
    domain = load_domain(str(small))
    assert evaluate(model, domain.split("val"), "box").miou == pytest.approx(chosen.best, abs=1e-4)
    test = evaluate(model, domain.split("test"), "box").miou
    assert test == pytest.approx(float(entry.tags["adapter_test"]), abs=1e-4)
    assert row["best"] == pytest.approx(float(entry.tags["test_miou"]), abs=1e-4)
    assert row["best"] == pytest.approx(sum(row["best_seeds"]) / plan.seeds)
    assert row["supervised"] is None, "trials learn from masks themselves"
    assert "small" in summary(result)


@on_ray
def test_trials_of_one_worker_share_their_actors(
    small: Path, tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm, "CLOSE", 1.0)  # whatever beats Direct could be the best
    plan = make(small, tmp_path)
    result = new_study(plan, tracker)
    check(plan, result, tracker, small, tmp_path)
    assert result["gap_between_trials"]["max"] < 2.0  # 0.1 on a machine with nothing else to do

    folders = list((tmp_path / "runs" / "s" / "trials" / "small").glob("trial-*"))
    left = [len(list(f.glob("checkpoint_*"))) for f in folders]
    assert len(left) == plan.trials + len(result["domains"][0]["finalists"]) + plan.seeds
    assert max(left) <= 2, "the last checkpoint and the best one"
    kept = tracker.files(result["domains"][0]["run_id"], "")
    assert kept["history.svg"].startswith(b"<svg")
    assert kept["parallel-coordinates.svg"].startswith(b"<svg")
    assert b"model&#x27;s defaults" in kept["trials.html"]
    first = tracker.find("trial")[-1].data.metrics
    assert 0 < first["system/system_memory_usage_percentage"] < 100
    (stored,) = tracker.find("domain")
    assert [i.dataset.name for i in stored.inputs.dataset_inputs] == ["small"]
    report.write(report.collect(tracker, "s"), tmp_path / "report")
    page = (tmp_path / "report" / report.PAGE).read_text()
    assert "data:image/png;base64" in page
    assert page.count("<svg") >= 3
    assert "rank correlation (Spearman)" in page
    assert "| small | test |" in (tmp_path / "report" / report.TABLE).read_text()
    assert (tmp_path / "report" / "overlay-small.png").stat().st_size > 1000

    _enlarged_and_begun_with(small, tmp_path, tracker)
    with pytest.raises(InputError, match=r"the study 's' at .* has seed"):
        new_study(make(small, tmp_path, seed=1), tracker)
    for again in (lambda: new_study(make(small, tmp_path, trials=5), tracker), lambda: resume_study("s", tracker)):
        with pytest.raises(InputError, match="is finished"):
            again()
    with pytest.raises(InputError, match="it can have more, not fewer"):
        resume_study("s", tracker, {"trials": 4, "hours": 1.0, "gpu_hours": 9.0})
    with pytest.raises(InputError, match="unknown study 'u'"):
        resume_study("u", tracker)


def _enlarged_and_begun_with(small: Path, tmp_path: Path, tracker: Tracker) -> None:
    """A finished study goes on to more trials, and another one begins with its best."""
    before = {r.info.run_id: r.info.end_time for r in tracker.find("trial")}
    again = {t.run_id for t in tracking.trials(tracker, tracker.find("domain")[0].info.run_id, "seed")}
    hours = tracker.find("study")[0].data.metrics["hours"]
    result = resume_study("s", tracker, {"trials": 5})
    assert result["trials"] == 5
    assert result["seconds"] > 3600 * hours > 0, "of both runs"
    after = {r.info.run_id: r.info.end_time for r in tracker.find("trial")}
    assert {k: after[k] for k in before} == before, "what was finished is left as it was"
    (row,) = result["domains"]
    assert "champion" in row["outcome"]
    found = tracking.trials(tracker, row["run_id"])
    assert len(found) == 5
    best = max(found, key=lambda t: t.best).number
    assert row["best_trial"] == best
    confirmed = [t for t in tracking.trials(tracker, row["run_id"], "seed") if t.of == best]
    assert len(confirmed) == 2
    assert {t.run_id for t in confirmed} == again or best == 5, "once is enough"

    ((where, config),) = warm = best_of("s", tracker)
    assert where == "s/small"
    plan = replace(make(small, tmp_path, name="t", trials=3, steps=4, seeds=0), warm=warm)
    found = tracking.trials(tracker, new_study(plan, tracker)["domains"][0]["run_id"])
    assert [t.label for t in found] == ["paper's hyperparameters", "model's defaults", "best of s/small"]
    assert {p: found[2].config[p] for p in plan.space} == {p: str(v) for p, v in plan.nearest(config).items()}


@pytest.mark.parametrize(("workers", "reused"), [(1, True), (2, False)])
def test_an_actor_goes_on_to_the_next_trial_unless_it_waits_for_workers(
    workers: int, reused: bool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of several workers that is stopped is still in its TorchTrainer: Tune would lose the one after it."""
    monkeypatch.setattr(domain.tune, "Tuner", lambda *given, **named: named)
    setting = trainer.Setting(plan=make(small, tmp_path, workers=workers), direct={}, resources={"CPU": 1})
    nothing: Any = None
    made: Any = domain._tuner(setting, "d", 1, 1, nothing, nothing, nothing)
    assert made["tune_config"].reuse_actors == reused


@pytest.mark.filterwarnings("ignore:`get_trial_id`")
@on_ray
def test_of_several_rays_on_a_machine_a_trial_s_workers_know_their_own(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "another:1")
    told: dict[str, str] = {}
    fits = SimpleNamespace(fit=lambda: told.update(get_env_vars_to_propagate()))
    monkeypatch.setattr(trainer, "TorchTrainer", lambda *given, **named: fits)
    monkeypatch.setattr(trainer, "TuneReportCallback", ray.train.UserCallback)
    plan = make(small, tmp_path, workers=2)
    setting = trainer.Setting(plan=plan, direct={}, resources={"CPU": 1})
    trainer.several_workers({**setting.space(), "config": plan.base.flat()})
    assert told["RAY_ADDRESS"] == ray.get_runtime_context().gcs_address


@pytest.mark.slow
@on_ray
def test_trials_of_two_workers(small: Path, tmp_path: Path, tracker: Tracker) -> None:
    """With windows around the prompts, which the fetched adapter must remember to score again what was logged."""
    plan = make(small, tmp_path, workers=2, crop=3.0, trials=2, seeds=1)
    check(plan, new_study(plan, tracker), tracker, small, tmp_path)
    assert tracker.find("trial")[0].data.params["crop"] == "3.0"


@on_ray
def test_when_every_trial_fails_the_domain_has_failed_and_changed_data_are_not_gone_on_with(
    small: Path, tmp_path: Path, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    for file in sorted(broken.glob("train-*.png"))[1:]:  # they end early, which only reading them tells
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    plan = make_plan(
        {"name": "s", "domains": [str(broken)], "trials": 2, "seeds": 0, "storage": str(tmp_path / "runs")}, []
    )
    (row,) = new_study(plan, tracker)["domains"]
    assert "no trial has come to a result" in row["error"]
    assert "cannot read the image" in capsys.readouterr().out
    assert {r.info.status for r in tracker.find("domain")} == {"FAILED"}
    ended = {r.data.tags["label"]: r.info.status for r in tracker.find("trial")}
    assert ended.pop("Direct") == "FINISHED"
    assert set(ended.values()) == {"FAILED"}

    with pytest.MonkeyPatch.context() as m:
        m.setattr("tuning.study.weights_digest", lambda model: "another")
        with pytest.raises(InputError, match="the weights of nano have changed since the study began"):
            resume_study("s", tracker)
    (broken / "val.json").write_text((broken / "val.json").read_text() + " ")
    load_domain.cache_clear()
    with pytest.raises(InputError, match="'broken' has changed since the study began"):
        resume_study("s", tracker)


@on_ray
def test_when_nothing_beats_direct_nothing_is_registered(small: Path, tmp_path: Path, tracker: Tracker) -> None:
    plan = make_plan(
        {"name": "s", "domains": [str(small)], "trials": 2, "seeds": 1, "storage": str(tmp_path / "runs")},
        ["steps=1", "eval_every=1", "optim.batch_size=1", "optim.lr=0"],
    )
    tracker.start("s", "study", None, {}).close("FINISHED")
    tracker.flush()
    result = new_study(plan, tracker, rename=True)
    assert result["study"] == "s-2", "the name was taken"
    (row,) = result["domains"]
    assert "nothing beat Direct" in row["outcome"]
    assert row["best"] == row["direct"]
    (supervised,) = tracking.trials(tracker, row["run_id"], "supervised")
    assert (supervised.config["method"], supervised.number) == ("supervised", 1)
    assert len(row["supervised_seeds"]) == 1
    assert registry.champions(tracker) == []
    with pytest.raises(InputError, match="'s-2' has found nothing to begin with"):
        best_of("s-2", tracker)


@on_ray
def test_a_study_where_only_boxes_are_known(
    small: Path, tmp_path: Path, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = tmp_path / "boxes"
    shutil.copytree(small, boxes)
    for split in ("train", "val", "test"):
        found = json.loads((boxes / f"{split}.json").read_text())
        for annotation in found["annotations"]:
            annotation["bbox"] = rle.toBbox(annotation.pop("segmentation")).tolist()
        if split == "train":
            found["annotations"].append({"id": 99, "image_id": 0, "iscrowd": 0, "bbox": [5, 5, 0.1, 0.1]})
        (boxes / f"{split}.json").write_text(json.dumps(found))
    plan = make_plan(
        {"name": "s", "domains": [str(boxes)], "trials": 3, "steps": 15, "seeds": 1, "storage": str(tmp_path / "runs")},
        ["eval_every=5", "optim.batch_size=2", "optim.lr=0.002", "loss.label=5", "loss.focal=0"],
    )
    (row,) = new_study(plan, tracker)["domains"]
    assert "error" not in row, row
    assert (row["score"], row["ellipse"], row["best_f1"]) == ("label_free", None, None)
    assert list(row["tried"]["others"]) == ["--crop 2"], "that a mask is cut to its box is no merit of its"
    (domain,) = tracker.find("domain")
    assert domain.data.metrics["instances_vanished"] == 1
    assert not [name for name in domain.data.metrics if "miou" in name or "ellipse" in name]
    assert row["direct"] == pytest.approx(domain.data.metrics["direct_test_label_free"])
    assert row["best_trial"], "no trial beat Direct"
    assert row["val"]["best"] > row["val"]["direct"]
    entry, _ = registry.fetch(tracker, "boxes", tmp_path / "adapter")
    assert float(entry.tags["test_label_free"]) == pytest.approx(row["best"], abs=1e-4)
    assert main(["best", "boxes", "--tracking-uri", tracker.uri, "--out", str(tmp_path / "got")]) == 0
    assert f"--split test --label-free --adapter {tmp_path}/got" in capsys.readouterr().out
    assert main(["best", "--tracking-uri", tracker.uri, "--json", str(tmp_path / "best.json")]) == 0
    (listed,) = json.loads((tmp_path / "best.json").read_text())
    assert (listed["score"], listed["test"]) == ("label_free", pytest.approx(row["best"], abs=1e-4))
    report.write(report.collect(tracker, "s"), tmp_path / "report")
    assert "label-free" in (tmp_path / "report" / report.TABLE).read_text()


@on_ray
def test_a_joint_study_has_one_configuration_and_an_adapter_for_each_domain(
    small: Path, tmp_path: Path, tracker: Tracker
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small, other)
    (other / "train.json").write_text((other / "train.json").read_text() + " ")  # the same data, with another digest
    settings = {
        "name": "s", "domains": [str(small), str(other)], "joint": "worst", "trials": 3, "steps": 6, "seeds": 1,
        "storage": str(tmp_path / "runs"), "scheduler": "none",  # or which trial is first decides who may go on
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


@on_ray
def test_a_table_is_made_only_from_runs_that_are_all_there(
    small: Path, tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "stop", lambda: None)  # the next test has the same Ray
    out = tmp_path / "out"
    make = ["table", "methods", "--domains", str(small), "--prompts", "box", "--seeds", "1", "--steps", "2"]
    make += ["--methods", "wesam", "supervised", "--set", "optim.batch_size=1", "lora.rank=1", "max_instances=2"]
    make += ["--tracking-uri", tracker.uri, "--out", str(out)]

    def found() -> dict[str, tuple[str, str, int]]:
        return {
            f"{level} {r.info.run_name}": (r.info.run_id, r.info.status, r.info.end_time)
            for level in ("table", "row", "cell")
            for r in tracker.find(level)  # type: ignore[arg-type]
        }

    assert main(make) == 0
    said = capsys.readouterr().out
    assert "5 of 5 done" in said
    assert "| ellipse in the box |" in said
    assert {f.name for f in out.iterdir()} == {"methods.md", "methods.tex", "methods.json"}
    first = found()
    assert len(first) == 1 + 5 + 5
    (table,) = tracker.find("table")
    kept = Path(tracker.client.download_artifacts(table.info.run_id, "", str(tmp_path)))
    assert all((kept / f.name).read_text() == f.read_text() for f in out.iterdir()), "MLflow has them too"
    assert {status for _, status, _ in first.values()} == {"FINISHED"}
    assert mlflow.active_run() is None
    cell = tracker.run(first["cell wesam-small-box seed 1"][0])
    assert cell.data.tags[tracking.PARENT] == first["row wesam-small-box"][0]
    assert (cell.data.tags["chosen_on"], cell.data.tags["data"]) == ("val", load_domain(str(small)).digest)
    assert (cell.data.params["steps"], cell.data.params["seed"]) == ("2", "1")
    entries = json.loads((out / "methods.json").read_text())["domains"]["small"]
    assert entries[-2]["entries"]["box"]["values"] == [cell.data.metrics["test_miou.box"]]

    assert main(make) == 0
    assert main([*make, "--no-run"]) == 0
    assert found() == first, "what is finished is left as it is"
    capsys.readouterr()

    def refused(*more: str) -> str:
        assert main([*make, "--no-run", *more]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == told.count("error: ")
        return told

    assert "wesam-small-box seed 1: its run has another steps" in refused("--steps", "3")
    tracker.client.delete_run(first["cell supervised-small-box seed 1"][0])
    assert refused() == "error: supervised-small-box seed 1: its run is missing\n"
    tracker.client.set_tag(cell.info.run_id, "chosen_on", "test")
    tracker.client.update_run(first["cell direct-small-box"][0], "RUNNING")
    assert "direct-small-box: its run has not come to its end: RUNNING" in refused()

    assert main(make) == 2, "a driver that was killed left it running"
    again = tracker.find("cell")
    assert [r.info.status for r in again if r.info.run_name == "direct-small-box"] == ["FAILED", "FINISHED"]
    assert len(again) == 5 + 1
    assert "wesam-small-box seed 1: it was chosen on test, not on val" in capsys.readouterr().err
