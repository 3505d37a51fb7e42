"""What a study runs on, for real and on this machine: PostgreSQL, an MLflow server, a Ray cluster, its driver."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import psycopg
import pytest
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors, list_placement_groups

from tests.servers import free_port, running
from tuning.checkpoint import PROGRESS_FILE
from tuning.tracking import ROLE, Stored, Tracker
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds until what is waited for has failed."""


def wait(what: str, until: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """The first true value of a function that is asked several times a second."""
    deadline = time.monotonic() + patience
    while not (found := until()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)
    return found


class Postgres:
    """A PostgreSQL server with the databases ``mlflow`` and ``optuna``."""

    def __init__(self, folder: Path) -> None:
        """folder: one that every user may enter."""
        self._folder, self._port = folder, free_port()
        self._user: list[str] = []
        if os.getuid() == 0:  # which PostgreSQL refuses to run as
            owner = pwd.getpwnam("postgres")
            shutil.chown(folder, owner.pw_uid, owner.pw_gid)
            self._user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        self._do("initdb", "--auth=trust", "--username=wesam", "--no-sync", "--pgdata", str(folder / "data"))
        self.start()
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            for name in ("mlflow", "optuna"):
                connection.execute(f"CREATE DATABASE {name}".encode())

    def url(self, database: str) -> str:
        return f"postgresql://wesam@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        settings = f"-p {self._port} -k {self._folder} -c listen_addresses=127.0.0.1"
        self._control("start", "--log", str(self._folder / "log"), "--options", settings)

    def stop(self) -> None:
        """Without waiting for anyone, as when its machine is lost."""
        self._control("stop", "--mode", "immediate")

    def _control(self, *arguments: str) -> None:
        self._do("pg_ctl", "--wait", "--pgdata", str(self._folder / "data"), *arguments)

    def _do(self, program: str, *arguments: str) -> None:
        command = [*self._user, find_postgres(program), *arguments]
        with (self._folder / "said").open("a+") as said:  # a pipe would stay open as long as the server
            done = subprocess.run(command, stdout=said, stderr=said, cwd=self._folder)
        assert done.returncode == 0, (self._folder / "said").read_text()


def find_postgres(program: str) -> str:
    """The program's path, also where Debian puts it; empty if there is none."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return str(places[-1]) if places else shutil.which(program) or ""


class Mlflow:
    """The MLflow server of cluster/mlflow-server.sh."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self._env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        self._env |= {"MLFLOW_PORT": str(port), "MLFLOW_WORKERS": "1", "MLFLOW_BACKEND_STORE_URI": database}
        self._env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.start()
        self.login = {
            "MLFLOW_TRACKING_URI": self.uri, "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": (folder / "admin-password").read_text().strip(),
        }  # fmt: skip

    def start(self) -> None:
        command = [ROOT / "cluster/mlflow-server.sh", self._folder]
        self._server = self._stack.enter_context(running(command, f"{self.uri}/health", self._folder, self._env))

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._stack.close()


class Nodes:
    """A Ray cluster: a head that runs no trials, and nodes of one CPU each."""

    def __init__(self, folder: Path, count: int) -> None:
        """folder: one with a short path."""
        self._folder, self._names = folder, itertools.count()
        self.cluster = Cluster()
        self.cluster.add_node(
            num_cpus=0, include_dashboard=True, dashboard_port=free_port(), dashboard_agent_listen_port=free_port()
        )  # fmt: skip
        self.fill(count)
        self.jobs = JobSubmissionClient(f"http://{self.cluster.webui_url}")

    def fill(self, count: int) -> None:
        """Adds nodes until there are so many beside the head."""
        while len(self.cluster.worker_nodes) < count:
            # in one folder the nodes would unpack a job's package over each other's
            self.cluster.add_node(num_cpus=1, temp_dir=str(self._folder / f"n{next(self._names)}"))

    def remove(self, worker: psutil.Process) -> None:
        """Kills the node of a worker and all that runs there, as when its machine is lost."""
        self.cluster.remove_node(self._node(worker), allow_graceful=False)

    def take(self, worker: psutil.Process, seconds: int) -> None:
        """Gives the node of a worker so long, as when a spot machine is taken away; then kills it."""
        node, programs = self._node(worker), Path(sys.executable).parent
        env = {**os.environ, "RAY_ADDRESS": self.cluster.address, "PATH": f"{programs}:{os.environ['PATH']}"}
        leave = [ROOT / "cluster/leave.sh", str(seconds), node.node_id]
        done = subprocess.run(leave, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        self.cluster.remove_node(node, allow_graceful=False)

    def _node(self, worker: psutil.Process) -> Any:
        """On which a worker runs."""
        raylets = {n.all_processes["raylet"][0].process.pid: n for n in self.cluster.worker_nodes}
        (node,) = (raylets[p.pid] for p in worker.parents() if p.pid in raylets)
        return node

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for node in self.cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                below = raylet.children(recursive=True)
                found += [p for p in below if "".join(_cmdline(p)).startswith("ray::ImplicitFunc")]
        return found

    def left(self) -> list[str]:
        """Actors, placement groups and workers' processes that somebody still has."""
        address: Any = self.jobs.get_address()
        actors = [a.class_name for a in list_actors(address, filters=[("state", "!=", "DEAD")])]
        groups = [g.placement_group_id for g in list_placement_groups(address, filters=[("state", "!=", "REMOVED")])]
        return [*actors, *groups, *map(str, self.workers())]

    def close(self) -> None:
        self.cluster.shutdown()


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


class Study:
    """A study's command, as a process that joins the cluster or as a job; what it says, and what has come of it."""

    def __init__(self, name: str, folder: Path, nodes: Nodes, mlflow: Mlflow, optuna_url: str, *options: str) -> None:
        self.name, self._folder, self._nodes, self._optuna = name, folder, nodes, optuna_url
        self.command = [
            sys.executable, "-m", "tuning", "run", "--name", name, "--storage", str(folder / "runs"),
            "--optuna", optuna_url, *options,
        ]  # fmt: skip
        self.tracker = Tracker(mlflow.uri)
        self._log = folder / "log"
        self._drivers: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "RAY_ADDRESS": self._nodes.cluster.address}
        with self._log.open("a") as log:
            driver = subprocess.Popen(self.command, cwd=self._folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        self._drivers.append(driver)
        return driver

    def said(self) -> str:
        return self._log.read_text()

    def ended(self, driver: subprocess.Popen[bytes], code: int = 0) -> None:
        """Waits for it to end as it is to."""
        assert driver.wait(PATIENCE) == code, self.said()

    def submit(self) -> str:
        """The id of the job."""
        ray, address = Path(sys.executable).with_name("ray"), self._nodes.jobs.get_address()
        submit = [ray, "job", "submit", "--address", address, "--working-dir", ROOT, "--no-wait", "--"]
        done = subprocess.run([*submit, *self.command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return next(w for w in done.stdout.replace("'", " ").split() if w.startswith("raysubmit_"))

    def driver(self) -> psutil.Process:
        """The job's own process."""
        found = [p for p in psutil.process_iter() if _cmdline(p)[1:6] == ["-m", "tuning", "run", "--name", self.name]]
        return found[0]

    def job_ended(self, job: str, status: str) -> None:
        """Waits for it to end as it is to."""
        jobs = self._nodes.jobs
        wait("the job's end", lambda: jobs.get_job_status(job).is_terminal())
        assert jobs.get_job_status(job) == status, jobs.get_job_logs(job)

    def runs(self) -> dict[str, list[Stored]]:
        """In MLflow, by level, those that began first before others."""
        study = [r for r in self.tracker.find("study") if r.data.tags["wesam.name"] == self.name]
        domains = [d for r in study for d in self.tracker.find("domain", parent=r.info.run_id)]
        return {
            "study": study, "domain": domains,
            "trial": [t for d in domains for t in self.tracker.find("trial", parent=d.info.run_id)],
        }  # fmt: skip

    def finished(self) -> list[Stored]:
        """The search's own trials that have ended well."""
        return [r for r in self.runs()["trial"] if r.info.status == "FINISHED" and ROLE not in r.data.tags]

    def at(self, step: int, since: float = 0.0) -> bool:
        """Whether a worker trains, and some trial has written the checkpoint of this step, or of a later one.

        since: the moment before which that does not count.
        """
        written = self._folder.glob(f"runs/{self.name}/trials/*/trial-*/checkpoint_*/{PROGRESS_FILE}")
        with contextlib.suppress(FileNotFoundError):  # one that is no longer among those to keep
            found = [p for p in written if int(p.parent.name[-6:]) >= step - 1 and p.stat().st_mtime > since]
            return bool(found and self._nodes.workers())
        return False

    def steps(self, run: Stored) -> list[int]:
        """Those of which MLflow has a score, as often as it has one."""
        return sorted(m.step for m in self.tracker.client.get_metric_history(run.info.run_id, "val_miou"))

    def close(self) -> None:
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        self.tracker.close()

    def check(self, trials: int, steps: int, again: int = 0, every: int = 1) -> None:
        """Each trial has ended once, with all of its evaluations and its adapter, and Optuna knows of the same trials.

        again: how many evaluations may have been done twice. every: steps between them.
        """
        ended = self.finished()
        found = {int(r.data.tags["wesam.trial"]): r for r in ended}
        assert sorted(found) == list(range(1, trials + 1)), self.said()
        assert len(ended) == trials
        for run in ended:
            assert sorted(set(self.steps(run))) == list(range(0, steps + 1, every)), run.info.run_name
            assert set(self.tracker.files(run.info.run_id, "adapter")) == {CONFIG_FILE, WEIGHTS_FILE}
        assert sum(len(self.steps(r)) for r in ended) <= trials * (steps // every + 1) + again
        told = {}
        for domain in self.runs()["domain"]:
            study = optuna.load_study(study_name=f"{self.name}-{domain.data.tags['wesam.name']}", storage=self._optuna)
            states = Counter(t.state for t in study.trials)
            assert not states[TrialState.RUNNING], states
            complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
            told = {t.user_attrs["number"]: t.value for t in complete}
            assert len(told) == len(complete), "none is told twice"
        in_space = {n for n, r in found.items() if json.loads(r.data.tags["wesam.proposal"])["point"]}
        assert told == {n: pytest.approx(found[n].data.metrics["best_score"]) for n in in_space}

    def check_nothing_is_left(self) -> None:
        """No process, placement group or temporary folder, and no run that seems to go on."""
        status = Counter(r.info.status for level in self.runs().values() for r in level)
        assert not status["RUNNING"], status
        temporary = Path(os.environ["TMPDIR"])
        left: list[str] = []

        def gone() -> bool:
            folders = [p.name for p in temporary.iterdir() if not p.name.startswith(("ray", "pymp-"))]  # Ray's own
            left[:] = [*self._nodes.left(), *folders]
            return not left

        with contextlib.suppress(AssertionError):
            wait("what is left to go", gone, 30)
        assert left == []
