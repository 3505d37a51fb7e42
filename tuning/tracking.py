"""MLflow: study > domain > trial as nested runs of one experiment per study, through explicit run ids and never the
global active run.

All writing is done in order by one thread of the driver: trials that end at once do not meet in SQLite, no trial waits
for a slow server, and what a server that is down cannot take is kept until it can.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunInfo, RunTag
from mlflow.entities import Run as Stored
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.entities import PagedList
from sqlalchemy.engine import make_url

from tuning.plan import lasting, reason_of, shown
from tuning.scratch import scratch
from wesam.config import Config, Value
from wesam.data import NOTES, parted
from wesam.data.files import is_address
from wesam.data.folders import parse_cut
from wesam.errors import InputError

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]
Level = Literal["study", "domain", "trial", "table", "row", "cell"]
"""Of a study, domains and trials; of a table, its rows (each on a domain, with a kind of prompt) and their cells."""

EXPERIMENT = "wesam"
"""What the experiments' names begin with, ``wesam/STUDY``; one of this very name has studies of earlier versions."""

PARENT = "mlflow.parentRunId"
ROLE = "wesam.role"
"""The tag of a trial that is none of the search's own."""
KEY = "wesam.key"
"""The tag by which a run is found that may have been created, or not."""

PATIENCE = 5.0
"""Seconds between two attempts to reach a server that does not answer."""

TRIES, READING = 30, 4
"""Attempts to store artifacts, and to fetch them: what else than a server that is away hinders it, nobody knows."""


MOST_BYTES = 2**30
"""Of an artifact folder; an adapter of rank 256 on every linear layer of the largest SAM has less."""

FULL = 500
"""Metrics in a request; MLflow takes twice as many."""

DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""


@dataclass(frozen=True)
class Data:
    """A domain, as MLflow is told of it."""

    name: str
    digest: str
    source: str
    """A built-in name, a folder or an address, as given."""

    def place(self) -> tuple[str, str]:
        """The type of the source and the source itself, as MLflow has them."""
        place = parse_cut(parted(self.source)[0])[0]
        if place in NOTES:
            return "code", json.dumps({"tags": {"mlflow.source.name": self.source}})
        if not is_address(place):
            return "local", json.dumps({"uri": self.source})
        kind = place.partition("://")[0]
        if kind in ("http", "https"):
            return "http", json.dumps({"url": self.source})
        return kind, json.dumps({"uri": self.source})


BACKLOG = 2000
"""Records that may wait for MLflow; who has more waits until there is room, or memory would be the limit."""

PAGE = 500
"""Runs that MLflow is asked for at once."""


class Tracker:
    """A tracking server or database, and the one thread that writes to it."""

    def __init__(self, uri: str) -> None:
        """Raises InputError if it cannot be reached now."""
        self.uri = shown(uri)
        """Where it is, without a password."""
        self._writer = ThreadPoolExecutor(1, "mlflow")
        self._room = threading.BoundedSemaphore(BACKLOG)
        self._hurry = threading.Event()
        self._away = False
        self._stuck = False
        """Whether the store of artifacts has not taken the last ones, however often they were brought."""
        self._open: list[Run] = []
        self._lock = threading.Lock()
        if ":" not in uri and uri != "databricks":
            raise InputError(f"--tracking-uri {uri} is no address: that of a database file is sqlite:///{uri}")
        if file := sqlite_file(uri):
            lasting(file, "--tracking-uri")
        try:
            self.client = MlflowClient(uri, uri)
            self.client.search_experiments(max_results=1)
        except Exception as e:  # every store has errors of its own
            raise InputError(f"cannot reach MLflow at {self.uri}: {reason_of(e)}") from None

    def _experiment(self, name: str) -> str:
        """The id of the experiment of this name, which is made if there is none."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            path = sqlite_file(self.uri)
            artifacts = (path.parent / "mlartifacts").as_uri() if path else None
            return str(self.client.create_experiment(name, artifact_location=artifacts))
        if found.lifecycle_stage == "deleted":
            raise InputError(f"MLflow's experiment {name!r} is deleted: give another --name, or restore it")
        return str(found.experiment_id)

    def _experiments(self) -> list[str]:
        """The ids of all that studies are in."""
        found = pages(partial(self.client.search_experiments, filter_string=f"name LIKE '{EXPERIMENT}%'"))
        return [e.experiment_id for e in found if e.name.split("/")[0] == EXPERIMENT]

    def later(self, write: Callable[[], T]) -> Future[T]:
        """Has the thread do this after all that it was given before; ``.result()`` waits for it."""
        self._room.acquire()
        given = self._writer.submit(self._until_done, write)
        given.add_done_callback(lambda _: self._room.release())
        return given

    def start(self, name: str, level: Level, parent: Run | None, tags: Mapping[str, str]) -> Run:
        """A new run of this name under its parent; one without a parent gets an experiment of its own.

        Raises InputError if that has been deleted.
        """
        tags = {"wesam.level": level, "wesam.name": name, **tags}
        own = self.later(lambda: self._experiment(f"{EXPERIMENT}/{name}")).result() if parent is None else ""

        key, tried = uuid.uuid4().hex, False

        def create() -> RunInfo:
            nonlocal tried
            nested = {PARENT: parent.id} if parent else {}
            experiment = parent.info.experiment_id if parent else own
            if tried and (made := self.client.search_runs([experiment], f"tags.`{KEY}` = '{key}'")):
                return made[0].info  # at an earlier attempt, whose answer was lost with the server
            tried = True
            return self.client.create_run(experiment, tags={**tags, **nested, KEY: key}, run_name=name).info

        return self._opened(Run(self, name, self.later(create)))

    def reopen(self, run: Stored) -> Run:
        """A run of before, to be gone on with."""

        def update() -> RunInfo:
            self.client.update_run(run.info.run_id, "RUNNING")
            return run.info

        return self._opened(Run(self, str(run.data.tags["wesam.name"]), self.later(update)))

    def open(self, name: str, level: Level, parent: Run | None, tags: Mapping[str, str], before: Stored | None) -> Run:
        """The run of before, if there is one, else a new one."""
        return self.start(name, level, parent, tags) if before is None else self.reopen(before)

    def find(self, level: Level, *, parent: str | None = None) -> list[Stored]:
        """The runs at this level, oldest first."""
        return list(self.each(level, parent=parent))

    def each(self, level: Level, *, parent: str | None = None) -> Iterator[Stored]:
        """The same, a page at a time: ten thousand of MLflow's runs fill hundreds of megabytes."""
        wanted = {"wesam.level": level, PARENT: parent}
        query = " and ".join(f"tags.`{k}` = '{v}'" for k, v in wanted.items() if v is not None)
        experiments = self.ask(self._experiments)
        search = partial(self.client.search_runs, experiments, query, order_by=["start_time ASC"], max_results=PAGE)
        if experiments:
            yield from pages(lambda page_token: self.ask(partial(search, page_token=page_token)))

    def ask(self, read: Callable[[], T]) -> T:
        """What MLflow answers, without regard to what is still to be written; a server that is away is waited for.

        Raises InputError if its store of artifacts does not give what is asked for.
        """
        return self._until_done(read, reading=True)

    def flush(self) -> None:
        """Waits until all that was given so far is written."""
        self.later(lambda: None).result()

    def files(self, run_id: str, path: str) -> dict[str, bytes]:
        """The files of an artifact folder by name; raises InputError if they are too large."""
        size = sum(f.file_size or 0 for f in self.ask(lambda: self.client.list_artifacts(run_id, path)))
        if size > MOST_BYTES:
            raise InputError(f"the artifacts of run {run_id} in {path or '.'} have {size} bytes: not fetched")
        with scratch() as folder:
            local = Path(self.ask(lambda: self.client.download_artifacts(run_id, path, str(folder))))
            return {f.name: f.read_bytes() for f in sorted(local.iterdir()) if f.is_file() and not f.is_symlink()}

    def at(self, run_id: str, metric: str, step: int) -> float:
        """A metric's value at a step; KeyError if it has none there."""
        return {m.step: float(m.value) for m in self.history(run_id, metric)}[step]

    def history(self, run_id: str, metric: str) -> list[Metric]:
        """All values of a metric."""
        return list(self.ask(lambda: self.client.get_metric_history(run_id, metric)))

    def run(self, run_id: str) -> Stored:
        """A run as MLflow has it now."""
        return self.ask(lambda: self.client.get_run(run_id))

    def close(self, left: Status = "FAILED") -> None:
        """Closes the runs that are still open, innermost first; does not wait for a server that is away."""
        self._hurry.set()
        for run in reversed(self._open.copy()):
            run.close(left)
        self._writer.shutdown(wait=True)

    def _opened(self, run: Run) -> Run:
        self._open.append(run)
        return run

    def _closed(self, run: Run) -> bool:
        """Forgets the run; whether it was open."""
        with self._lock:
            was_open = run in self._open
            if was_open:
                self._open.remove(run)
            return was_open

    def _until_done(self, call: Callable[[], T], *, reading: bool = False) -> T:
        tries = 0
        while True:
            try:
                done = call()
                self._away = False
                return done
            except InputError:
                raise
            except MlflowException as e:
                if not _unreachable(e) or self._hurry.is_set():
                    if not reading:
                        print(f"MLflow has not taken a record: {reason_of(e)}", file=sys.stderr)
                    raise
                if not self._away:
                    print(f"MLflow at {self.uri} does not answer; waiting for it, nothing is lost", file=sys.stderr)
                self._away = True
            except Exception as e:  # a store of artifacts has exceptions of its own
                tries += 1
                if tries >= (READING if reading else 1 if self._stuck else TRIES) or self._hurry.is_set():
                    if reading:
                        raise InputError(f"MLflow's artifacts at {self.uri}: {reason_of(e)}") from None
                    print(f"MLflow has not taken a record: {reason_of(e)}", file=sys.stderr)
                    self._stuck = True
                    raise
                if tries == 1:
                    print(f"MLflow's artifacts: {reason_of(e)}; trying again", file=sys.stderr)
            self._hurry.wait(PATIENCE)


class _Batch:
    """Metrics, parameters and tags of a run that MLflow is told in one request."""

    def __init__(self) -> None:
        self._metrics: list[Metric] = []
        self._params: list[Param] = []
        self._tags: dict[str, RunTag] = {}
        self._taken = False
        self._lock = threading.Lock()

    def add(self, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]) -> bool:
        """Whether there is still time, and room, for these."""
        with self._lock:
            if self._taken or len(self._metrics) + len(metrics) > FULL:
                return False
            self._metrics += metrics
            self._params += params
            self._tags |= {t.key: t for t in tags}
            return True

    def take(self) -> tuple[list[Metric], list[Param], list[RunTag]]:
        """All of it; nothing can be added afterwards."""
        with self._lock:
            self._taken = True
            return self._metrics, self._params, list(self._tags.values())


class Run:
    """One run, open until :meth:`close`."""

    def __init__(self, tracker: Tracker, name: str, created: Future[RunInfo]) -> None:
        self._tracker, self.name, self._created = tracker, name, created
        self._batch: _Batch | None = None
        """The last thing that this run has asked to be written, if it was a record."""
        self.data: tuple[Data, ...] = ()
        """What it is about; see :meth:`use`."""
        self._attached: list[Future[None]] = []

    @property
    def info(self) -> RunInfo:
        """What MLflow knows of the run itself; waits until it has been created."""
        return self._created.result()

    @property
    def id(self) -> str:
        """The run's id; waits until MLflow has given it."""
        return str(self.info.run_id)

    def use(self, data: Iterable[Data], splits: str = "train, val, test") -> None:
        """Logs what it is about, and which splits it sees, as MLflow's dataset inputs."""
        self.data = tuple(data)
        inputs = [
            DatasetInput(
                Dataset(d.name, d.digest[:DIGEST], *d.place()),
                [InputTag("mlflow.data.context", splits)],
            )
            for d in self.data
        ]
        self._later(lambda: self._tracker.client.log_inputs(self.id, inputs))

    def log(
        self,
        metrics: Mapping[str, float] | None = None,
        *,
        step: int = 0,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        after: Future[None] | None = None,
    ) -> None:
        """Metrics at a step, parameters, tags; after: something that must have been written, or this is not, either.

        Several in a row that MLflow has not taken yet become one request: half of what a report costs is that.
        """
        now = int(time.time() * 1000)
        m = [Metric(k, float(v), now, step) for k, v in (metrics or {}).items()]
        p = [Param(k, str(v)) for k, v in (params or {}).items()]
        t = [RunTag(k, str(v)) for k, v in (tags or {}).items()]
        while len(m) > FULL:  # of a joint study of many domains
            self._record(m[:FULL], [], [], after)
            m = m[FULL:]
        self._record(m, p, t, after)

    def _record(self, m: Sequence[Metric], p: Sequence[Param], t: Sequence[RunTag], after: Future[None] | None) -> None:
        if after is None and self._batch is not None and self._batch.add(m, p, t):
            return
        batch = _Batch()
        batch.add(m, p, t)

        def write() -> None:
            if after is None or after.exception() is None:  # one thread writes: it is done by now
                self._tracker.client.log_batch(self.id, *batch.take())

        self._later(write)
        self._batch = batch if after is None else None

    def attach(self, files: Callable[[], Mapping[str, bytes]], folder: str | None = None) -> Future[None]:
        """Files among the run's artifacts, in this folder of them; the function is called when it is time to write."""

        def write() -> None:
            with scratch() as local:
                for name, contents in files().items():
                    path = local / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(contents)
                self._tracker.client.log_artifacts(self.id, str(local), folder)
            self._tracker._stuck = False

        self._attached.append(kept := self._later(write))
        return kept

    def leave(self) -> None:
        """Forgets the run, which is another process's."""
        self._tracker._closed(self)

    def delete(self) -> None:
        """Takes the run back."""
        if self._tracker._closed(self):
            self._tracker.later(lambda: self._tracker.client.delete_run(self.id)).result()

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the run, once; one of which MLflow has not taken all files has FAILED."""

        def end() -> None:
            lost = status == "FINISHED" and any(
                f.exception() for f in self._attached
            )  # one thread writes: all are done
            self._tracker.client.set_terminated(self.id, "FAILED" if lost else status)

        if self._tracker._closed(self):
            self._later(end)

    def _later(self, write: Callable[[], T]) -> Future[T]:
        """As :meth:`Tracker.later`; what is logged from now on comes after it."""
        self._batch = None
        return self._tracker.later(write)


@dataclass(frozen=True)
class Trial:
    """A trial that has ended, as MLflow has it."""

    number: int
    """Among the search's trials; the seed of one that has a role."""
    run_id: str
    label: str
    reference: str | None
    point: dict[str, Any]
    """Where in the space; empty for a reference that the space does not hold."""
    config: dict[str, str]
    """Every hyperparameter, as text."""
    best: float
    """Best score on val: mIoU, or label-free where no masks are known."""
    best_step: int
    step: int
    """The last one that was evaluated."""
    ended: str
    """``finished``, ``pruned`` (was behind), ``plateau`` (past its best), ``diverged``, or ``budget`` (was spent)."""
    gap: float | None
    """Seconds that the worker was idle before it."""
    metrics: dict[str, float]
    """The last value of each."""
    of: int | None = None
    """The trial whose configuration this is, trained again."""

    def flat(self) -> dict[str, Value]:
        """Every hyperparameter, as :meth:`wesam.Config.flat` has it."""
        return Config.from_texts(self.config).flat()

    @property
    def pruned(self) -> bool:
        """Whether it was stopped because it was behind."""
        return self.ended == "pruned"


def trials(tracker: Tracker, domain_run: str, role: str | None = None) -> list[Trial]:
    """The finished trials of a domain that have an adapter, in order: the search's own, or those of another role."""
    return trials_by_role(tracker, domain_run)[role]


def begun(runs: Iterable[Stored]) -> set[str]:
    """Of a domain's runs, the numbers of the search's trials that have been begun, whatever became of them; one may
    have several runs.
    """
    return {run.data.tags["wesam.trial"] for run in runs if ROLE not in run.data.tags}


def trials_by_role(tracker: Tracker, domain_run: str) -> Mapping[str | None, list[Trial]]:
    """The finished trials of a domain that have an adapter, in order, by role; None: the search's own."""
    found: dict[str | None, list[Trial]] = defaultdict(list)
    for run in tracker.each("trial", parent=domain_run):
        tags, metrics = run.data.tags, {sys.intern(k): v for k, v in run.data.metrics.items()}
        if run.info.status == "FINISHED" and "best_step" in metrics:
            proposal = json.loads(tags["wesam.proposal"])
            found[tags.get(ROLE)].append(
                Trial(
                    number=int(tags["wesam.trial"]),
                    run_id=run.info.run_id,
                    label=proposal["label"],
                    reference=tags.get("wesam.reference"),
                    point={sys.intern(k): v for k, v in (proposal["point"] or {}).items()},
                    config={sys.intern(k): sys.intern(v) for k, v in run.data.params.items()},
                    best=metrics["best_score"],
                    best_step=int(metrics["best_step"]),
                    step=int(metrics["last_step"]),
                    ended=tags["ended"],
                    gap=metrics.get("gap"),
                    metrics=metrics,
                    of=proposal.get("of"),
                )
            )
    for role in found.values():
        role.sort(key=lambda t: t.number)
    return found


@lru_cache
def environment() -> dict[str, str]:
    """What a number depends on besides its configuration: versions and the git commit, as tags."""
    names = ("torch", "ray", "optuna", "mlflow", "peft", "wesam")
    tags = {f"version.{n}": _version(n) for n in names}
    tags["version.python"] = sys.version.split()[0]
    return {**tags, "mlflow.source.git.commit": _commit() or "unknown"}


def _commit() -> str:
    """That of this checkout; empty if it is none, or if there is no git to ask."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return found.stdout.strip()
    return ""


def pages(search: Callable[..., PagedList[T]]) -> Iterator[T]:
    """All that one of MLflow's searches finds, page by page."""
    page = search(page_token=None)
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def trials_page(server: str, experiment: str) -> str:
    """The address of MLflow's page of an experiment's trials, the best first.

    Without more said, MLflow opens an experiment as one of language models, whose page is empty, and folds trials into
    their study. server: where MLflow answers. experiment: its id.
    """
    order = "workflowType=machine_learning&orderByKey=metrics.%60best_score%60&orderByAsc=false"
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs?{order}"


def sqlite_file(uri: str) -> Path | None:
    """The database file that a tracking URI names, if it names one."""
    return Path(make_url(uri).database or "").absolute() if uri.startswith("sqlite:///") else None


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def _unreachable(e: MlflowException) -> bool:
    """Whether the same call may well succeed later: no answer, an overloaded server, a locked database."""
    if isinstance(e, RestException):
        return bool(e.error_code in ("TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED"))
    return e.error_code == "TEMPORARILY_UNAVAILABLE" or "API request to" in str(e)
