"""Has the cells of a table computed on Ray, many at once, and writes them to MLflow: table > row > cell, as runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from tuning import runtime
from tuning.cells import Bench, Known, Wanted, Work, cell_of, work
from tuning.claim import held, refuse_second
from tuning.entries import Cell, Cells, check_cells, check_disjoint
from tuning.measure import Measured, measure
from tuning.plan import load_domains, reason_of
from tuning.progress import QUIET_SECONDS, clock
from tuning.scratch import scratch
from tuning.tables import Group, Plan, groups
from tuning.tracking import Data, Run, Tracker, environment
from wesam.data import load_domain
from wesam.errors import InputError, unknown
from wesam.sam import weights_digest

RETRIES = 2
"""So often a cell begins again whose worker has died."""


@dataclass
class _Going:
    """A group at work."""

    group: Group
    work: Work
    asked: list[Wanted] = field(default_factory=list)
    done: dict[int, Cell] = field(default_factory=dict)
    result: list[Cell] | None = None


def collect(plan: Plan, tracker: Tracker, *, compute: bool = True, cpus: int = 1, gpus: float = 1.0) -> Cells:
    """All cells of a table by group, as MLflow has them.

    compute: whether those that it does not have are computed; if not, they are faults. cpus, gpus: of each cell; a GPU
    only where the cluster has some. Raises InputError, with a line for each cell, if the table must not be made of
    them.
    """
    if faults := check_disjoint(load_domains(plan.domains)):
        raise InputError("\n".join(faults))
    bench = Bench(plan, weights_digest(plan.model), cpus, gpus)
    known = Known(tracker, plan.name)
    if known.table is None and not compute:
        names = {r.data.tags["wesam.name"] for r in tracker.find("table")}
        raise unknown("table", plan.name, names) if names else InputError(f"no table at {tracker.uri} yet")
    driver = _Driver(bench, tracker, known)
    left_open = known.table is not None and known.table.info.status == "RUNNING"
    if compute and (driver.queue or left_open):
        driver.compute()
        known = Known(tracker, plan.name)
        driver = _Driver(bench, tracker, known)
    found = {g.group.key: g.result for g in driver.going if g.result is not None}
    faults = [f"{c.name}: {known.why_not(bench, c)}" for _, _, c in driver.queue]
    faults = faults or check_cells(plan, [g.group for g in driver.going], found)
    if faults:
        raise InputError("\n".join(faults))
    return found


def keep(tracker: Tracker, name: str, files: Mapping[str, str]) -> None:
    """Puts a table's files among the artifacts of its run, where MLflow's pages show them.

    Raises InputError if its store does not take them.
    """
    table = Known(tracker, name).table
    assert table is not None
    run_id = table.info.run_id
    with scratch() as folder:
        for file, text in files.items():
            (folder / file).write_text(text)
        try:
            tracker.later(lambda: tracker.client.log_artifacts(run_id, str(folder))).result()
        except Exception as e:  # a store of artifacts has exceptions of its own
            raise InputError(f"the table is written, but MLflow has not taken it: {reason_of(e)}") from None


class _Driver:
    """Has the cells of a table computed that are not known; what is known its groups are given at once."""

    def __init__(self, bench: Bench, tracker: Tracker, known: Known) -> None:
        self._bench, self._tracker, self._known = bench, tracker, known
        self.going = [_Going(g, work(bench.plan, g)) for g in groups(bench.plan)]
        self.queue: deque[tuple[_Going, int, Wanted]] = deque()
        """What is to be computed: its group, its place among what that has asked for, itself."""
        self._running: dict[Any, tuple[_Going, int, Wanted, Run]] = {}
        self._rows: dict[str, Run] = {}
        self._failed: set[str] = set()
        """The names of the rows of which a cell has."""
        self._kept = self._computed = self._trained = 0
        self._began = self._said = time.monotonic()
        for going in self.going:
            self._advance(going, None)

    def _advance(self, going: _Going, results: list[Cell] | None) -> None:
        """Gives a group what it has asked for; what it asks for then is taken from what is known, or queued."""
        while True:
            try:
                going.asked = going.work.send(results)  # type: ignore[arg-type]
            except StopIteration as end:
                going.result = end.value
                return
            going.done = {}
            for i, cell in enumerate(going.asked):
                if done := self._known.find(self._bench, cell):
                    going.done[i] = done
                    self._kept += 1
                else:
                    self.queue.append((going, i, cell))
            if len(going.done) < len(going.asked):
                return
            results = list(going.done.values())

    @property
    def _total(self) -> int:
        """Cells in all, those too that are not yet asked for."""
        plan = self._bench.plan
        each = plan.seeds + (plan.trials if plan.trials > 1 else 0)
        return sum(each if g.group.row.method else 1 for g in self.going)

    def compute(self) -> None:
        """Computes what is queued, and what becomes of it, many cells at once."""
        plan, tracker = self._bench.plan, self._tracker
        if self._known.table is not None:
            refuse_second(tracker, self._known.table)
        runtime.start()
        runtime.check_nodes(plan.model, plan.domains)
        need = runtime.worker_resources(self._bench.gpus) | {"CPU": self._bench.cpus}
        slots = runtime.room(need)
        if slots < 1:
            raise InputError(
                f"a cell of {self._bench.cpus} CPUs does not fit on this cluster: use fewer --cpus-per-cell"
            )
        self._began = self._said = time.monotonic()
        about = {**environment(), "model": plan.model, "kind": plan.kind}
        before = self._known.table
        table = tracker.open(plan.name, "table", None, about, before)
        self._say(f"table {plan.name!r}: {self._total} cells, {self._kept} of them are known; {slots} at once")
        with runtime.stoppable(), held(tracker, table, plan.name, before, level="table"):
            for left in self._known.left:
                tracker.later(lambda r=left: tracker.client.set_terminated(r.info.run_id, "FAILED")).result()  # type: ignore[misc]
            self._rows = {n: tracker.reopen(r) for n, r in self._known.rows.items() if r.info.status == "RUNNING"}
            try:
                while self.queue or self._running:
                    while self.queue and len(self._running) < slots:
                        self._start(*self.queue.popleft(), table, need)
                    self._wait()
            except KeyboardInterrupt:
                runtime.once_is_enough()
                for ref in self._running:
                    ray.cancel(ref, force=True)
                runtime.stop()
                tracker.close("KILLED")
                self._say("stopped; finished cells are kept, and the same command goes on")
                raise
        for name, row in self._rows.items():
            row.close("FAILED" if name in self._failed else "FINISHED")
        table.close("FAILED" if self._failed else "FINISHED")
        tracker.flush()

    def _start(self, going: _Going, i: int, cell: Wanted, table: Run, need: Mapping[str, float]) -> None:
        group, name = cell.group, cell.group.name
        if name not in self._rows:
            self._rows[name] = self._tracker.open(name, "row", table, environment(), self._known.rows.get(name))
        run = self._tracker.start(cell.name, "cell", self._rows[name], self._bench.told(cell))
        seen = "train, val" + ("" if cell.trial else ", test") if group.row.method else "test"
        run.use([Data(group.domain, load_domain(group.given).digest, group.given)], seen)
        run.log(params=self._bench.params(cell))
        task: Any = ray.remote(measure)
        options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0), "max_retries": RETRIES}
        self._running[task.options(**options).remote(self._bench.task(cell))] = going, i, cell, run

    def _wait(self) -> None:
        """For the next cell to end, for half a second."""
        ended, _ = ray.wait(list(self._running), timeout=0.5)
        for ref in ended:
            going, i, cell, run = self._running.pop(ref)
            try:
                found: Measured = ray.get(ref)
            except ray.exceptions.RayError as e:
                why = reason_of(e, last=True)
                run.log(tags={"error": why})
                run.close("FAILED")
                self._failed.add(cell.group.name)
                self._say(f"{cell.name}: failed: {why}")
                continue
            self._computed += 1
            self._trained += bool(cell.group.row.method)
            for step, value in found.curve.items():
                run.log({"val_miou": value}, step=step)
            run.log(found.metrics, tags=found.tags)
            run.close()
            bench = self._bench
            going.done[i] = cell_of(cell, run.id, bench.params(cell), bench.told(cell) | found.tags, found.metrics)
            self._say(f"{cell.name}: {_scores(found)}; {self._progress()}")
            if len(going.done) == len(going.asked):
                self._advance(going, [going.done[i] for i in range(len(going.asked))])
        if time.monotonic() - self._said > QUIET_SECONDS:
            self._say(self._progress())

    def _progress(self) -> str:
        done = self._kept + self._computed
        left = self._total - done
        said = f"{done} of {self._total} done"
        if not left or not self._trained:  # what is not trained takes no time to speak of
            return said
        return f"{said}, about {clock((time.monotonic() - self._began) * left / self._trained).strip()} left"

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"{clock(self._said - self._began)}  {text}", flush=True)


def _scores(found: Measured) -> str:
    """What there is to say of a cell."""
    said = [f"test {k.removeprefix('test_miou.')} {v:.3f}" for k, v in found.metrics.items() if "test_miou" in k]
    if "best_val" in found.metrics:
        said.append(f"val {found.metrics['best_val']:.3f} at step {found.metrics['best_step']:.0f}")
    return ", ".join(said) + (", diverged" if found.tags.get("ended") == "diverged" else "")
