"""MLflow: nested runs, closed runs, servers that are not there, champions."""

from __future__ import annotations

import ast
import errno
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import tuning
from tuning import tracking
from tuning.cli import main
from tuning.tracking import Data, Tracker
from wesam.errors import InputError


def test_runs_are_nested_and_closed_and_none_is_globally_active(tracker: Tracker) -> None:
    study = tracker.start("s", "study", None, {"seed": "0"})
    domain = tracker.start("d", "domain", study, {})
    done = tracker.start(
        "d 1", "trial", domain, {"wesam.trial": "1", "wesam.proposal": '{"label": "searched", "point": null}'}
    )
    done.log({"val_miou": 0.5}, step=2, params={"lora.rank": 4})
    done.log({"val_miou": 0.6, "best_score": 0.6, "best_step": 4, "last_step": 4}, step=4, tags={"ended": "finished"})
    done.attach(lambda: {"a.txt": b"a"}, "adapter")
    done.close()
    tracker.start("d 2", "trial", domain, {"wesam.trial": "2"})
    assert mlflow.active_run() is None
    tracker.close("KILLED")

    after = Tracker(tracker.uri)
    found = {r.info.run_name: r for level in ("study", "domain", "trial") for r in after.find(level)}  # type: ignore[arg-type]
    assert {n: r.info.status for n, r in found.items()} == {
        "s": "KILLED", "d": "KILLED", "d 1": "FINISHED", "d 2": "KILLED"
    }  # fmt: skip
    assert found["d"].data.tags[tracking.PARENT] == found["s"].info.run_id
    assert found["d 1"].data.tags[tracking.PARENT] == found["d"].info.run_id
    (trial,) = tracking.trials(after, found["d"].info.run_id)
    assert (trial.number, trial.best, trial.best_step, trial.config) == (1, 0.6, 4, {"lora.rank": "4"})
    assert after.files(trial.run_id, "adapter") == {"a.txt": b"a"}
    after.close()


def test_the_global_active_run_is_used_nowhere() -> None:
    fluent = {"start_run", "active_run", "set_tracking_uri", "set_experiment", "log_metric", "log_param", "autolog"}
    for file in Path(tuning.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mlflow":
                assert node.attr not in fluent, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db", "nonsense://x"])
def test_a_server_that_is_not_there_is_an_error_at_once(uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="cannot reach MLflow at"):
        Tracker(uri)
    assert time.monotonic() - began < 30


def test_the_password_of_a_server_is_not_told(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = Tracker(f"{uri}?password=secret")
    assert there.uri == f"{uri}?password=***"
    there.start("s", "study", None, {}).close()
    there.close()
    for command in (["best"], ["best", "d"], ["report", "x", "--out", str(tmp_path)]):
        main([*command, "--tracking-uri", f"{uri}?password=secret"])
        main([*command, "--tracking-uri", "http://me:secret@127.0.0.1:9"])
    printed = "".join(capsys.readouterr())
    assert printed.count("cannot reach MLflow at http://me:***@127.0.0.1:9") == 3
    assert "secret" not in printed


def test_a_server_that_is_away_for_a_while_loses_nothing(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    failures = [MlflowException("API request to http://x failed with exception y")] * 2

    def write() -> str:
        if failures:
            raise failures.pop()
        return "written"

    first = tracker.later(write)
    assert tracker.later(lambda: "after it").result() == "after it"
    assert first.result() == "written"
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_who_is_too_far_ahead_of_mlflow_waits(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "BACKLOG", 2)
    tracker, busy, told = Tracker(uri), threading.Event(), threading.Event()
    tracker.later(busy.wait)
    tracker.later(lambda: None)
    third = threading.Thread(target=lambda: (tracker.later(lambda: None), told.set()))
    third.start()
    assert not told.wait(0.2)
    busy.set()
    assert told.wait(10)
    third.join()
    tracker.close()


def test_what_a_run_logs_while_mlflow_is_busy_is_one_request_but_nothing_comes_before_what_it_follows(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.start("s", "study", None, {})
    tracker.flush()
    monkeypatch.setattr(tracking, "FULL", 3)
    busy, log_batch, requests = threading.Event(), tracker.client.log_batch, []

    def counted(run_id: str, metrics: list[Any], params: list[Any], tags: list[Any]) -> None:
        requests.append((len(metrics), len(params), len(tags)))
        log_batch(run_id, metrics, params, tags)

    monkeypatch.setattr(tracker.client, "log_batch", counted)
    tracker.later(busy.wait)
    run.log({"a": 0.0}, step=0, params={"p": 1})
    run.log({"a": 1.0, "b": 1.0}, step=1, tags={"t": "old"})
    run.log(tags={"t": "new"})
    run.log({"a": 2.0}, step=2)
    failed = run.attach(lambda: {}[0])
    run.log({"b": 3.0}, step=3, after=failed)
    run.log({"c": 4.0}, step=4)
    monkeypatch.setattr(tracking, "TRIES", 1)
    busy.set()
    tracker.flush()
    assert requests == [(3, 1, 1), (1, 0, 0), (1, 0, 0)]
    data = tracker.client.get_run(run.id).data
    assert (data.metrics, data.params, data.tags["t"]) == ({"a": 2.0, "b": 1.0, "c": 4.0}, {"p": "1"}, "new")
    assert [m.value for m in tracker.client.get_metric_history(run.id, "a")] == [0.0, 1.0, 2.0]


def test_more_metrics_than_a_request_takes_are_several_and_nothing_is_left_out(tracker: Tracker) -> None:
    run = tracker.start("s", "study", None, {})
    wanted = {f"miou.{i}": i / 1000 for i in range(2 * tracking.FULL + 1)}
    run.log(wanted, step=3, params={"p": 1}, tags={"t": "x"})
    tracker.flush()
    data = tracker.client.get_run(run.id).data
    assert (data.metrics, data.params, data.tags["t"]) == (wanted, {"p": "1"}, "x")


def test_a_run_whose_files_are_not_taken_has_failed_and_others_are_not_waited_for_as_long(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    study = tracker.start("s", "study", None, {})
    store, tried = MlflowClient.log_artifacts, []

    def full(self: MlflowClient, *given: Any) -> None:
        tried.append(given)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MlflowClient, "log_artifacts", full)
    runs = [tracker.start(name, "domain", study, {}) for name in "abc"]
    for run in runs[:2]:
        run.attach(lambda: {"result.json": b"{}"})
        run.close()
    tracker.flush()
    assert len(tried) == tracking.TRIES + 1
    said = capsys.readouterr().err
    assert said.count("trying again") == 1
    assert said.count("MLflow has not taken a record: [Errno 28] No space left on device") == 2
    monkeypatch.setattr(MlflowClient, "log_artifacts", store)
    runs[2].attach(lambda: {"result.json": b"{}"})
    runs[2].close()
    study.close()
    tracker.flush()
    ended = {r.data.tags["wesam.name"]: r.info.status for r in tracker.find("domain")}
    assert ended == {"a": "FAILED", "b": "FAILED", "c": "FINISHED"}
    assert not tracker._stuck


def test_artifacts_that_cannot_be_fetched_are_one_line(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)

    def broken(self: MlflowClient, *given: Any) -> None:
        raise OSError("500 Server Error for url: http://me:secret@mlflow/x")

    monkeypatch.setattr(MlflowClient, "list_artifacts", broken)
    with pytest.raises(InputError, match="500 Server Error for url") as e:
        tracker.files("0" * 32, "")
    assert "secret" not in str(e.value)


def test_a_server_that_is_away_when_a_study_begins_is_waited_for(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    failures = [MlflowException("API request to http://x failed with exception y")] * 2

    def away(method: str) -> None:
        answer = getattr(MlflowClient, method)

        def call(self: MlflowClient, *given: Any, **options: Any) -> Any:
            if failures:
                raise failures.pop()
            return answer(self, *given, **options)

        monkeypatch.setattr(MlflowClient, method, call)

    away("get_experiment_by_name")
    away("search_experiments")
    run = tracker.start("s", "study", None, {})
    tracker.flush()
    failures.append(MlflowException("API request to http://x failed with exception y"))
    assert [r.info.run_id for r in tracker.find("study")] == [run.id]
    run.close()
    tracker.client.delete_experiment(run.info.experiment_id)
    with pytest.raises(InputError, match="is deleted"):
        tracker.start("s", "study", None, {})


def test_a_run_whose_creation_was_not_answered_is_created_once(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    study, create, answers = tracker.start("s", "study", None, {}), MlflowClient.create_run, [True, False]

    def lost(self: MlflowClient, *given: Any, **options: Any) -> Any:
        made = create(self, *given, **options)
        if not answers.pop():
            raise MlflowException("API request to http://x failed with exception y")
        return made

    tracker.flush()
    monkeypatch.setattr(MlflowClient, "create_run", lost)
    created = tracker.start("d", "domain", study, {}).id
    assert [r.info.run_id for r in tracker.find("domain")] == [created]
    assert answers == [True], "it was asked for once"


@pytest.mark.parametrize(
    ("given", "kind", "loaded"),
    [
        ("clean+fog:3", "code", {"tags": {"mlflow.source.name": "clean+fog:3"}}),
        ("/data/cells@70/20/10", "local", {"uri": "/data/cells@70/20/10"}),
        ("https://host/cells", "http", {"url": "https://host/cells"}),
        ("s3://bucket/cells", "s3", {"uri": "s3://bucket/cells"}),
    ],
)
def test_mlflow_is_told_where_data_come_from(given: str, kind: str, loaded: dict[str, Any], tracker: Tracker) -> None:
    run = tracker.start("s", "study", None, {})
    run.use([Data("d", "0", given)])
    tracker.flush()
    (found,) = tracker.client.get_run(run.id).inputs.dataset_inputs
    source = mlflow.data.get_source(found.dataset)
    assert (source._get_source_type(), source.to_dict()) == (kind, loaded)


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tracking.environment.__wrapped__()["mlflow.source.git.commit"] == "unknown"


def test_an_address_without_a_scheme_is_told_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"mlflow.db is no address: .* sqlite:///mlflow.db"):
        Tracker("mlflow.db")
