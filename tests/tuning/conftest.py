"""One Ray for the whole session, an MLflow database for each test, a server on demand."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tuning.runtime
import wesam
from tests.servers import free_port, running
from tuning.tracking import Tracker

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's 15 lets a study wait for the tests beside it)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray, as a study starts it."""
    tuning.runtime.quiet()
    tuning.runtime.start()
    yield
    tuning.runtime.stop()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that is made once: its migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    Tracker(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """A tracking URI with nothing in it."""
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(database.read_bytes())
    return f"sqlite:///{copy}"


@pytest.fixture
def tracker(uri: str) -> Iterator[Tracker]:
    tracker = Tracker(uri)
    yield tracker
    tracker.close()


@contextlib.contextmanager
def served(arguments: list[str], alive: str, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a server of MLflow's on a free port, which answers at the path ``alive``."""
    port = free_port()
    env = {
        **os.environ, "PYTHONPATH": str(Path(wesam.__file__).parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/{alive}", folder, env):
        yield url
