"""An MLflow database in which somebody has put names and paths that lead elsewhere: nothing follows them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.utils.file_utils import local_file_uri_to_path

import wesam
from tuning import registry, report
from tuning.checkpoint import PROGRESS_FILE, Progress, progress_of
from tuning.cli import main
from tuning.conclusion import RESULT
from tuning.domain import _unfinished
from tuning.listener import CHECKPOINT
from tuning.plan import Plan, load_domains, make_plan
from tuning.study import PLAN, resume_study
from tuning.tracking import Tracker
from wesam import AdaptedSam, InputError
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE
from wesam.config import Config, LoraConfig

OUT = ("..", ".", "", "../../up", "/tmp/up", "a/b", "a\\b", "a\0b", "a\nb")
"""Names that are none, or lead out of a folder."""


@pytest.fixture
def registered(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run of the champion of the domain d."""
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    AdaptedSam(wesam.load_sam("nano"), LoraConfig(rank=1, targets="qkv")).save(tmp_path / "made")
    run = tracker.start("t", "trial", None, {})
    run.log(params=Config().flat())
    run.attach(lambda: {f.name: f.read_bytes() for f in (tmp_path / "made").iterdir()}, registry.ADAPTER)
    registry.promote(tracker, "d", run.id, {"model": "nano", "prompt": "box", "domain": "d", "test_miou": "0.5"})
    return run.id


def put(tracker: Tracker, statement: str, *values: str) -> None:
    with sqlite3.connect(tracker.uri.removeprefix("sqlite:///")) as database:
        database.execute(statement, values)


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if ".db" not in f.name}


@pytest.mark.parametrize("name", OUT)
def test_a_name_that_leads_out_is_no_study_s_and_no_domain_s(name: str, tracker: Tracker) -> None:
    plan = make_plan({"domains": ["clean"], "name": "s"}, [])
    stored = json.loads(plan.to_json())
    with pytest.raises(InputError, match=r"--name .*use letters"):
        Plan.from_json(json.dumps({**stored, "name": name}))
    with pytest.raises(InputError, match=r"domain .*use letters"):
        registry.champion(tracker, name)
    with pytest.raises(InputError, match=r"domain .*use letters"):
        registry.best_folder(name, tracker.uri)


def test_names_in_the_registry_lead_nowhere(
    registered: str, tracker: Tracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    kept = registry.best_folder("d", tracker.uri)
    assert kept.parent == tmp_path / "home/adapters"
    for name in ("wesam-../../up", "wesam-..", "wesam-/tmp/up", "wesam-a\nb"):
        put(tracker, "INSERT INTO registered_models (name) VALUES (?)", name)
        put(
            tracker,
            "INSERT INTO registered_model_aliases (name, alias, version) VALUES (?, 'champion', 1)",
            name,
        )
    assert [e.domain for e in registry.champions(tracker)] == ["d"]
    put(tracker, "UPDATE model_versions SET run_id = ?", "../../../up")
    for command in (["best"], ["best", "d", "--out", str(tmp_path / "out")]):
        assert main([*command, "--tracking-uri", tracker.uri]) == 2
        assert "is of the run '../../../up': use letters" in capsys.readouterr().err
    with pytest.raises(InputError, match="is of the run"):
        registry.best_folder("d", tracker.uri)
    assert {n for n in names(tmp_path) - before if not n.startswith("home")} == set()


def test_only_an_adapter_is_fetched_and_only_from_its_folder(registered: str, tracker: Tracker, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    root = Path(local_file_uri_to_path(tracker.client.get_run(registered).info.artifact_uri))
    (root / registry.ADAPTER / ".bashrc").write_text("evil")
    (root / registry.ADAPTER / "adapter_model.bin").write_text("evil")
    registry.fetch(tracker, "d", tmp_path / "out")
    assert names(tmp_path / "out") == {CONFIG_FILE, WEIGHTS_FILE, registry.SETTINGS, registry.CARD}

    card = root / registry.MODEL / registry.CARD
    card.unlink()
    card.symlink_to(secret)
    with pytest.raises(Exception, match=r"(?i)path|link"):
        registry.fetch(tracker, "d", tmp_path / "linked")
    card.unlink()

    for spoil in (
        lambda f: (f / CONFIG_FILE).write_text("[]"),
        lambda f: (f / CONFIG_FILE).write_text(
            (tmp_path / "made" / CONFIG_FILE).read_text().replace('"r": 1', '"r": 9999')
        ),
        lambda f: (f / CONFIG_FILE).unlink(),
        lambda f: (f / WEIGHTS_FILE).open("r+b").truncate(2**41),
    ):
        spoil(root / registry.ADAPTER)
        for get in (
            lambda: registry.fetch(tracker, "d", tmp_path / "bad"),
            lambda: registry.best_adapter("d", tracker.uri),
        ):
            with pytest.raises(InputError, match=f"run {registered}"):
                get()
    assert not names(tmp_path / "home")


def test_an_artifact_uri_that_leads_elsewhere_gives_no_file_of_this_machine(
    registered: str, tracker: Tracker, tmp_path: Path
) -> None:
    (tmp_path / "private" / registry.ADAPTER).mkdir(parents=True)
    (tmp_path / "private" / registry.ADAPTER / "id_rsa").write_text("mine")
    put(tracker, "UPDATE runs SET artifact_uri = ?", (tmp_path / "private").as_uri())
    with pytest.raises(InputError, match=f"{CONFIG_FILE} is missing"):
        registry.fetch(tracker, "d", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")


@pytest.fixture
def begun(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, object]], None]:
    """Attaches a JSON file to the run of a study that has begun, in place of the one that is there."""
    monkeypatch.chdir(tmp_path)
    run = tracker.start("s", "study", None, {})

    def attach(name: str, content: dict[str, object]) -> None:
        run.attach(lambda: {name: json.dumps(content).encode()}).result()

    return attach


def test_a_plan_and_a_result_whose_names_lead_out_are_refused(
    begun: Callable[[str, dict[str, object]], None], tracker: Tracker, tmp_path: Path
) -> None:
    plan = json.loads(make_plan({"domains": ["clean"], "name": "s"}, []).to_json())
    begun(PLAN, {**plan, "name": "../../up"})
    with pytest.raises(InputError, match=r"'\.\./\.\./up': use letters"):
        resume_study("s", tracker)
    begun(PLAN, plan)
    begun(RESULT, {"study": "s", "domains": [{"domain": "/../../up", "error": "x"}]})
    with pytest.raises(InputError, match=r"domain '/\.\./\.\./up': use letters"):
        report.collect(tracker, "s")
    (tmp_path / "a b").mkdir()
    with pytest.raises(InputError):
        load_domains((str(tmp_path / "a b"),))


@pytest.mark.parametrize(
    ("trials", "status", "since"), [(4, "FINISHED", False), (4, "KILLED", True), (9, "FAILED", True)]
)
def test_a_report_of_a_study_that_has_gone_on_since_says_so(
    tracker: Tracker, tmp_path: Path, trials: int, status: Any, since: bool
) -> None:
    plan = json.loads(make_plan({"domains": ["clean"], "name": "s"}, []).to_json())
    result = {
        "study": "s", "run_id": "r", "model": "nano", "prompt": "box", "trials": 4, "steps": 60, "workers": 1,
        "seed": 0, "seeds": 1, "seconds": 60.0, "gap_between_trials": None,
        "domains": [{"domain": "clean", "error": "none"}],
    }  # fmt: skip
    run = tracker.start("s", "study", None, {})
    files = {PLAN: {**plan, "trials": trials}, RESULT: result}
    run.attach(lambda: {name: json.dumps(content).encode() for name, content in files.items()})
    run.close(status)
    tracker.flush()
    report.write(report.collect(tracker, "s"), tmp_path)
    for name in (report.PAGE, report.TABLE):
        assert ("The study has gone on since" in (tmp_path / name).read_text()) == since


@pytest.mark.parametrize(
    ("storage", "path", "good"),
    [
        ("/runs", "/runs/s/trials/d/checkpoint_000001", True),
        ("s3://bucket/studies/?region=x", "bucket/studies/s/trials/d/checkpoint_000001", True),
        ("s3://bucket/studies?scheme=http&endpoint_override=localhost:9000", "bucket/studies/s/workers/d", True),
        ("gs://anonymous@bucket/x", "bucket/x/s/trials/d", True),
        ("abfss://box@account.dfs.core.windows.net/x", "box/x/s/trials/d", True),
        ("file:///my%20runs", "/my runs/s/trials/d", True),
        ("/runs", "/runs/s/../../etc", False),
        ("/runs", "/runs/other/trials", False),
        ("/runs", "/etc", False),
        ("/runs", "s/trials", False),
        ("s3://bucket/studies?region=x", "other/studies/s/trials", False),
        ("/runs", 7, False),
    ],
)
def test_an_interrupted_trial_goes_on_only_from_checkpoints_of_its_study(
    storage: str, path: str, good: bool, tracker: Tracker
) -> None:
    made = json.loads(make_plan({"domains": ["clean"], "name": "s"}, []).to_json())
    plan = Plan.from_json(json.dumps({**made, "storage": storage}))
    parent = tracker.start("s", "study", None, {})
    state = {"step": 1, "best": 0.5, "best_step": 1, "latest": path, "checkpoint": path, "evil": 1}
    tags = {CHECKPOINT: json.dumps(state), "wesam.proposal": json.dumps({"number": 1, "label": "x"})}
    tracker.start("t", "trial", parent, tags).log(params=Config().flat())
    tracker.flush()
    if good:
        (found,) = _unfinished(tracker, parent.id, plan)
        assert (found["resume"], found["state"]) == (path, {k: v for k, v in state.items() if k != "evil"})
    else:
        with pytest.raises(InputError, match=f"the tag {CHECKPOINT} of a trial"):
            _unfinished(tracker, parent.id, plan)


def test_what_the_budget_has_cut_goes_on_when_there_is_more_of_it(tracker: Tracker) -> None:
    plan = make_plan({"domains": ["clean"], "name": "s", "storage": "/runs"}, [])
    parent = tracker.start("s", "study", None, {})
    state = {"step": 1, "best": 0.5, "best_step": 1, "latest": "/runs/s/x", "checkpoint": "/runs/s/x"}
    for number, ended in enumerate(("finished", "budget", "pruned")):
        tags = {CHECKPOINT: json.dumps(state), "wesam.proposal": json.dumps({"number": number, "label": "x"})}
        run = tracker.start("t", "trial", parent, {**tags, "ended": ended})
        run.log(params=Config().flat())
        run.close()
    tracker.flush()
    assert _unfinished(tracker, parent.id, plan) == []
    assert [p["number"] for p in _unfinished(tracker, parent.id, plan, more=True)] == [1]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", "{}", "\0", None]
    + [f'{{"step": 3, "best": {best}, "best_here": true, "files": {{}}}}' for best in ("NaN", "[1]")],
)
def test_a_checkpoint_s_progress_is_a_number(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / PROGRESS_FILE).write_text(text)
    with pytest.raises(InputError, match="damaged"):
        progress_of(tmp_path)
    (tmp_path / PROGRESS_FILE).write_text('{"step": 3, "best": 0.5, "best_here": true, "files": {}}')
    assert progress_of(tmp_path) == Progress(3, 0.5, best_here=True)
