"""The command line: one-line errors, and help."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning import registry
from tuning.cli import main, summary
from tuning.plan import make_plan
from tuning.study import PLAN
from tuning.tracking import Tracker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["run"], "no domain given"),
        (["run", "--domain", "camoflaged"], "did you mean 'camouflaged'?"),
        (["run", "--domains", "clean", "camoflaged", "--domain", "clean"], "did you mean 'camouflaged'?"),
        (["run", "--domain", "clean", "--trials", "many"], "invalid int value"),
        (["run", "--domain", "clean", "--set", "lora.rank"], "expected path.to.field=value"),
        (["run", "no-such.yaml"], "cannot read no-such.yaml"),
        (["best", "--out", "x"], "--out needs a DOMAIN"),
        (["best", "birds"], "no champion"),
        (["report", "it's", "--out", "x"], "no study"),
        (["resume", "nothing"], "no study"),
        (["best", "--tracking-uri", "http://127.0.0.1:9"], "cannot reach MLflow"),
        (["table", "methods"], "--domains"),
        (["table", "methods", "--domain", "clean", "--domain", "camoflaged"], "did you mean 'camouflaged'?"),
        (["table", "methds", "--domains", "clean"], "did you mean 'methods'"),
        (["table", "methods", "--domains", "clean", "--cpus-per-cell", "0"], "--cpus-per-cell must be at least 1"),
        (["table", "methods", "--domains", "clean", "--no-run"], "no table"),
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
        (["--optuna", "mysql://me:secret@host/y"], "'s' are mysql+nonsense://me:***@host/x: give no other --optuna"),
        (["--optuna", address], "cannot reach the Optuna storage mysql+nonsense://me:***@host/x"),
    ):
        assert main(["resume", "s", "--tracking-uri", tracker.uri, *options]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "secret" not in told
        assert told.count("\n") == 1


def test_a_result_does_not_replace_what_is_searched(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (small / "train.json").read_bytes()
    assert main(["run", "--domains", str(small), "--storage", str(tmp_path), "--json", str(small / "train.json")]) == 2
    assert "would be overwritten: give another file" in capsys.readouterr().err
    assert (small / "train.json").read_bytes() == before

    (file := tmp_path / "s.yaml").write_text(f"name: s\ndomains: [{small}]\nstorage: {tmp_path}")
    assert main(["run", str(file), "--json", str(file)]) == 2
    assert "s.yaml is read, and would be overwritten" in capsys.readouterr().err


def test_the_result_of_a_study_that_goes_on_does_not_replace_what_is_searched(
    small: Path, tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan({"name": "s", "domains": [str(small)], "storage": str(tmp_path)}, [])
    with registry.opened(uri) as tracker:
        run = tracker.start("s", "study", None, {})
        run.attach(lambda: {PLAN: plan.to_json().encode()})
        run.close("KILLED")
        tracker.flush()
    assert main(["resume", "s", "--tracking-uri", uri, "--json", str(small / "train.json")]) == 2
    assert "train.json lies in the folder of" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "resume", "best", "report", "table"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    assert "--tracking-uri" in capsys.readouterr().out


@pytest.mark.parametrize(("seeds", "said"), [(0, False), (1, True), (3, False)])
def test_what_one_seed_does_not_tell_is_said(seeds: int, said: bool) -> None:
    row = {"domain": "d", "outcome": "registered"}
    text = summary({"domains": [row], "gap_between_trials": None, "seconds": 60.0, "seeds": seeds})
    assert ("one seed each" in text) == said
