"""What a study survives: a cluster of several nodes, its job server, an MLflow server and PostgreSQL, all real, die."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.parts import ROOT, Mlflow, Nodes, Postgres, Study, find_postgres, wait
from tuning import registry
from tuning.listener import CHECKPOINT

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not find_postgres("initdb"), reason="no PostgreSQL on this machine"),
]
STEPS = 6
SETTINGS = ("eval_every=1", "optim.batch_size=1", "lora.rank=1", "lora.targets=qkv")


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder that all users may enter, whose path is short enough for sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="f-"))
    folder.chmod(0o755)
    yield folder

    def removed() -> bool:
        shutil.rmtree(folder, ignore_errors=True)  # Ray's last processes may still write there
        return not folder.exists()

    wait("the folder to be removed", removed, 30)


@pytest.fixture(scope="module")
def postgres(short: Path) -> Iterator[Postgres]:
    (folder := short / "postgres").mkdir()
    postgres = Postgres(folder)
    yield postgres
    postgres.stop()


@pytest.fixture(scope="module")
def mlflow(short: Path, postgres: Postgres) -> Iterator[Mlflow]:
    (folder := short / "mlflow").mkdir()
    mlflow = Mlflow(folder, postgres.url("mlflow"))
    yield mlflow
    mlflow.stop()


@pytest.fixture(scope="module")
def nodes(short: Path, mlflow: Mlflow) -> Iterator[Nodes]:
    """Two of them, which know how to log in to MLflow."""
    (temporary := short / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        env = {**mlflow.login, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", "TMPDIR": str(temporary)}
        for name, value in env.items():
            patch.setenv(name, value)
        nodes = Nodes(short, 2)
        yield nodes
        nodes.close()


Begin = Callable[..., Study]


@pytest.fixture
def begin(
    nodes: Nodes, mlflow: Mlflow, postgres: Postgres, small: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Begin]:
    """Makes a study of this test's name with these options."""
    studies = []

    def made(*options: str) -> Study:
        given = [part for s in SETTINGS for part in ("--set", s)]
        given += ["--domain", str(small), "--steps", str(STEPS), "--scheduler", "none", "--seeds", "0"]
        name = request.node.name.removeprefix("test_")[:40]
        studies.append(Study(name, tmp_path, nodes, mlflow, postgres.url("optuna"), *given, *options))
        return studies[-1]

    yield made
    for study in studies:
        study.close()
    nodes.fill(2)


def loses(begin: Begin, nodes: Nodes, lose: Callable[[psutil.Process], None]) -> None:
    """A study in the middle of which something is done to a worker; its trial goes on from its last checkpoint."""
    study = begin("--trials", "3")
    driver = study.start()
    wait("a trial in its middle", lambda: study.at(2))
    lose(nodes.workers()[0])
    study.ended(driver)
    assert "state-dump" not in study.said(), "of what Ray logs a line is enough"
    study.check(3, STEPS, again=1)
    study.check_nothing_is_left()


def test_a_killed_worker_s_trial_goes_on_from_its_last_checkpoint(begin: Begin, nodes: Nodes) -> None:
    loses(begin, nodes, psutil.Process.kill)


def test_trials_of_a_node_that_is_lost_go_on_elsewhere(begin: Begin, nodes: Nodes) -> None:
    loses(begin, nodes, nodes.remove)


def test_trials_of_a_node_that_is_taken_away_write_a_checkpoint_first(begin: Begin, nodes: Nodes) -> None:
    every, steps = 60, 120
    study = begin("--trials", "2", "--steps", str(steps), "--set", f"eval_every={every}")
    driver = study.start()
    wait("a trial's first checkpoint", lambda: study.at(1))
    nodes.take(nodes.workers()[0], 4)
    study.ended(driver)
    from_ = [r.data.metrics["went_on_from"] for r in study.finished() if "went_on_from" in r.data.metrics]
    assert from_
    assert all(step % every for step in from_), "not the one that it would have written anyway"
    study.check(2, steps, every=every)
    study.check_nothing_is_left()


def test_a_study_whose_driver_is_killed_goes_on_when_it_is_submitted_again(begin: Begin) -> None:
    study = begin("--trials", "4")
    for step in (1, 4):
        job = study.submit()
        wait("a trial in its middle", lambda at=step: study.at(at))
        study.driver().kill()
        study.job_ended(job, "FAILED")
    before = {r.info.run_id: r.info.end_time for r in study.finished()}
    study.job_ended(study.submit(), "SUCCEEDED")
    after = {r.info.run_id: r.info.end_time for r in study.finished()}
    assert before.items() <= after.items(), "what was finished is left as it was"
    study.check(4, STEPS, again=4)
    study.check_nothing_is_left()


def test_nothing_is_missing_when_mlflow_is_away_for_a_while(begin: Begin, mlflow: Mlflow) -> None:
    study = begin("--trials", "3")
    driver = study.start()
    wait("a trial in its middle", lambda: study.at(2))
    mlflow.stop()
    wait("a trial's end meanwhile", lambda: study.at(STEPS))
    mlflow.start()
    study.ended(driver)
    assert study.said().count("does not answer; waiting for it, nothing is lost") == 1
    study.check(3, STEPS)
    study.check_nothing_is_left()


def test_nothing_is_missing_when_postgresql_starts_again(begin: Begin, postgres: Postgres) -> None:
    study = begin("--trials", "3")
    driver = study.start()
    wait("a trial in its middle", lambda: study.at(2))
    postgres.stop()
    wait("it to be missed", lambda: "does not answer" in study.said())  # by Optuna, by MLflow's thread, or by both
    postgres.start()
    study.ended(driver)
    study.check(3, STEPS)
    study.check_nothing_is_left()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """The folder for checkpoints, which holds only a few megabytes."""
    (folder := tmp_path / "runs").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Takes all room that there is, and all that falls free meanwhile."""
    enough, file = threading.Event(), (folder / "filling").open("wb", buffering=0)

    def fill() -> None:
        while not enough.wait(0.01):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        yield
    finally:
        enough.set()
        filling.join()
        file.close()
        (folder / "filling").unlink()


def test_a_study_whose_storage_was_full_goes_on_from_what_it_had(begin: Begin, room: Path) -> None:
    study = begin("--trials", "2")
    driver = study.start()
    wait("a trial in its middle", lambda: study.at(2))
    with full(room):
        study.ended(driver, 1)
    assert "failed: OSError: [Errno 28]" in study.said()
    assert f"tuning resume {study.name}" in study.said()
    begun = {r.info.run_id for r in study.runs()["trial"] if CHECKPOINT in r.data.tags}
    assert begun
    study.check_nothing_is_left()
    study.ended(study.start())
    assert begun <= {r.info.run_id for r in study.finished()}, "what had a checkpoint goes on in its own run"
    study.check(2, STEPS, again=2)
    study.check_nothing_is_left()


def test_each_of_24_trials_ends_once_through_20_kills(begin: Begin, nodes: Nodes, mlflow: Mlflow) -> None:
    random_ = random.Random(0)
    learning = ("method=supervised", "lora.targets=encoder+decoder", "optim.lr=0.005", "optim.warmup_steps=0")
    study = begin("--trials", str(trials := 24), *(part for s in learning for part in ("--set", s)))
    job, kills = study.submit(), ["worker"] * 12 + ["driver"] * 5 + ["mlflow"] * 3
    random_.shuffle(kills)
    for kill in kills:
        before = time.time()
        wait("a trial to go on", lambda since=before: study.at(1, since))
        time.sleep(random_.uniform(0, 0.5))
        if kill == "worker":
            random_.choice(nodes.workers()).kill()
        elif kill == "driver":
            study.driver().kill()
            study.job_ended(job, "FAILED")
            job = study.submit()
        else:
            mlflow.stop()
            mlflow.start()
    study.job_ended(job, "SUCCEEDED")
    if len(study.finished()) < trials:  # one trial was hit too often
        study.job_ended(study.submit(), "SUCCEEDED")
    study.check(trials, STEPS, again=2 * len(kills))
    assert registry.champion(study.tracker, "small")
    study.check_nothing_is_left()
