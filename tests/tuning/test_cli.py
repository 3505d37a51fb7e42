"""The command line: one-line errors, and an end by Ctrl-C that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuning.cli import main
from tuning.listener import CHECKPOINT
from tuning.plan import make_plan
from tuning.study import PLAN
from tuning.tracking import ROLE, Tracker

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["run"], "no domain given"),
        (["run", "--domain", "camoflaged"], "did you mean 'camouflaged'?"),
        (["run", "--domain", "clean", "--trials", "many"], "invalid int value"),
        (["run", "--domain", "clean", "--set", "lora.rank"], "expected path.to.field=value"),
        (["run", "no-such.yaml"], "cannot read no-such.yaml"),
        (["best", "--out", "x"], "--out needs a DOMAIN"),
        (["best", "birds"], "no champion"),
        (["report", "it's", "--out", "x"], "no study"),
        (["resume", "nothing"], "no study"),
        (["best", "--tracking-uri", "http://127.0.0.1:9"], "cannot reach MLflow"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    try:
        code = main(arguments)
    except SystemExit as e:
        code = int(str(e.code))
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1


def test_a_study_whose_database_has_a_password_goes_on_when_it_is_given_again(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    address = "mysql+nonsense://me:secret@host/x"
    plan = make_plan({"name": "s", "domains": ["clean"], "optuna": address}, [])
    run = tracker.start("s", "study", None, {})
    run.attach(lambda: {PLAN: plan.to_json().encode()})
    tracker.flush()
    for options, message in (
        ([], "'s' are at mysql+nonsense://me:***@host/x: give --optuna URL with its password"),
        (["--optuna", "mysql://me:secret@host/y"], "another optuna: mysql+nonsense://me:***@host/x"),
        (["--optuna", address], "cannot reach the Optuna storage mysql+nonsense://me:***@host/x"),
    ):
        assert main(["resume", "s", "--tracking-uri", tracker.uri, *options]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "secret" not in told
        assert told.count("\n") == 1


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "resume", "best", "report"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    assert "--tracking-uri" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process_and_the_study_can_go_on(
    small: Path, tmp_path: Path, uri: str
) -> None:
    tune = [sys.executable, "-m", "tuning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    fixed = ["eval_every=1", "optim.batch_size=1", "lora.rank=1", "lora.targets=qkv"]
    options = ["--seeds", "1", *(part for f in fixed for part in ("--set", f))]
    run = subprocess.Popen(
        [*tune, "run", "--name", "s", "--domain", str(small), "--trials", "4", "--steps", "6", *options],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if "trial " in line and "/4" in line:
            break
    family = psutil.Process(run.pid).children(recursive=True)
    assert family
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
    interrupted = {
        r.info.run_id for r in tracker.find("trial") if r.info.status == "KILLED" and CHECKPOINT in r.data.tags
    }

    done = subprocess.run([*tune, "resume", "s"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    finished = [r for r in tracker.find("trial") if r.info.status == "FINISHED"]
    searched = [r for r in finished if ROLE not in r.data.tags]
    assert sorted(int(r.data.tags["wesam.trial"]) for r in searched) == [1, 2, 3, 4]
    roles = [r.data.tags[ROLE] for r in finished if ROLE in r.data.tags]
    assert (roles.count("direct"), roles.count("supervised")) == (1, 1)
    assert interrupted <= {r.info.run_id for r in finished}, "what had a checkpoint goes on in its own run"
    for run in interrupted:
        steps = [m.step for m in tracker.client.get_metric_history(run, "val_miou")]
        assert steps == list(range(7)), "and from its checkpoint, not from the beginning"
    assert {r.info.status for level in ("study", "domain") for r in tracker.find(level)} == {"FINISHED"}  # type: ignore[arg-type]
    tracker.close()
