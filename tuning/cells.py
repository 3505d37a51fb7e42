"""The cells of a table, which are runs of MLflow: what each is to have, and which of them are there.

What has been finished with the very same configuration, data, weights and budget is never computed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import optuna
from mlflow.entities import Run as Stored
from optuna.trial import TrialState

from tuning.confirm import winner
from tuning.entries import Cell
from tuning.measure import Task
from tuning.plan import Plan as Study
from tuning.sampler import ask, frozen, make_sampler
from tuning.tables import FREE, ON_VAL, Group, Plan
from tuning.tracking import PARENT, Tracker, environment
from wesam.config import Config
from wesam.data import load_domain
from wesam.prompts import changed_labels

TRIAL = "trial"
"""What a cell is called that belongs to a search; others by their seed."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A cell that a table needs: one training, or one evaluation of what is not trained."""

    group: Group
    config: Config
    number: int
    """Its seed, 0 where nothing is trained; or its place in the search."""
    trial: bool = False

    @property
    def name(self) -> str:
        """As it is called in lines, and as its run is."""
        if not self.group.row.method:
            return self.group.name
        return f"{self.group.name} {TRIAL if self.trial else 'seed'} {self.number}"

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What tells it from the others of its table."""
        return (*self.group.key, f"{TRIAL} {self.number}" if self.trial else str(self.number))

    @property
    def tests(self) -> tuple[str, ...]:
        """What it meets test with: a trial does not."""
        return () if self.trial else self.group.tests


@dataclass(frozen=True)
class Bench:
    """What the cells of a table have in common."""

    plan: Plan
    weights: str
    cpus: int
    gpus: float

    def params(self, cell: Wanted) -> dict[str, str]:
        """The cell's parameters in MLflow."""
        return {k: str(v) for k, v in cell.config.flat().items()}

    def tags(self, cell: Wanted) -> dict[str, str]:
        """What must be the same, beside its parameters, for a run to be this cell's."""
        group = cell.group
        trials = 0 if cell.trial or not group.row.method else self.plan.trials
        return {
            "data": load_domain(group.given).digest, "weights": self.weights, "trials": str(trials),
            "method": group.row.method or group.row.drawing or "direct", "tests": " ".join(cell.tests),
            "labels": changed_labels(cell.config.prompt, *cell.tests),
            "after": " ".join(map(str, () if cell.trial else group.after)), "cost": str(group.cost),
        }  # fmt: skip

    def told(self, cell: Wanted) -> dict[str, str]:
        """All tags of the cell's run, but for what its worker says."""
        names = (f"cell.{k}" for k in ("row", "domain", "prompt", "number"))
        return {
            **environment(), **dict(zip(names, cell.place, strict=True)), **self.tags(cell), "model": self.plan.model,
            "domain": cell.group.given, "prompt": cell.group.prompt, "seed": str(cell.config.seed),
            "chosen_on": ON_VAL if cell.group.row.method else FREE,
        }  # fmt: skip

    def task(self, cell: Wanted) -> Task:
        """What a worker is to do."""
        g = cell.group
        return Task(
            model=self.plan.model, domain=g.given, config=cell.config.flat(), tests=() if cell.trial else g.tests,
            after=() if cell.trial else g.after, trained=bool(g.row.method), drawing=g.row.drawing,
            cost=g.cost and not cell.trial, threads=self.cpus,
        )  # fmt: skip


Work = Generator[list[Wanted], list[Cell], list[Cell]]
"""The cells of a group, as they become known: asks for some, is given them done, and so on."""


def work(plan: Plan, group: Group) -> Work:
    """A search, if there is to be one, and then its best configuration with each of the seeds; returns the latter."""
    if not group.row.method:
        return (yield [Wanted(group=group, config=group.config, number=0)])
    config = group.config
    if plan.trials > 1:
        config = yield from _search(plan, group)
    seeds = range(1, plan.seeds + 1)
    return (yield [Wanted(group=group, config=config.replace({"seed": s}), number=s) for s in seeds])


def _search(plan: Plan, group: Group) -> Generator[list[Wanted], list[Cell], Config]:
    """The configuration that is best on val of so many: the defaults, then what Optuna proposes, one after the other.
    It is chosen as a study does it (:func:`tuning.confirm.winner`).

    What it proposes depends on the seed and on the results alone: a search that was stopped finds its trials again.
    """
    search = Study(
        name=group.name, domains=(), model=plan.model, trials=plan.trials, workers=1, storage="", base=group.config,
        space=plan.space(group.row, group.prompt),
    )  # fmt: skip
    study = optuna.create_study(direction="maximize", sampler=make_sampler(search, 0))
    tried: dict[int, Config] = {}
    scores: dict[int, float] = {}
    for number in range(1, plan.trials + 1):
        asked = study.ask() if number > 1 else None
        config = search.config(None, ask(asked, search.space) if asked else {})
        (done,) = yield [Wanted(group=group, config=config, number=number, trial=True)]
        found = done.metrics["best_val"]
        if asked:
            study.tell(asked, found)
        elif point := search.point("defaults"):
            study.add_trial(frozen(search.space, point, state=TrialState.COMPLETE, values=[found]))
        tried[number], scores[number] = config, found
    chosen = winner(scores, {}, float("-inf"))
    assert chosen is not None
    return tried[chosen]


class Known:
    """The cells of a table that MLflow has."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.table = next((r for r in tracker.find("table") if r.data.tags["wesam.name"] == name), None)
        self.rows: dict[str, Stored] = {}
        self._by_place: dict[tuple[str, ...], list[Stored]] = defaultdict(list)
        self.left: list[Stored] = []
        """Those that seem to be running: their driver was killed."""
        if self.table is None:
            return
        self.rows = {r.data.tags["wesam.name"]: r for r in tracker.find("row", parent=self.table.info.run_id)}
        ids = {r.info.run_id for r in self.rows.values()}
        for run in tracker.find("cell"):
            if run.data.tags.get(PARENT) in ids:
                place = tuple(run.data.tags.get(f"cell.{k}", "") for k in ("row", "domain", "prompt", "number"))
                self._by_place[place].append(run)
                if run.info.status == "RUNNING":
                    self.left.append(run)

    def find(self, bench: Bench, cell: Wanted) -> Cell | None:
        """The cell's last finished run, if there is one with all that it is to have."""
        for run in reversed(self._by_place.get(cell.place, [])):
            if run.info.status == "FINISHED" and _differs(bench, cell, run) is None:
                data, info = run.data, run.info
                return cell_of(cell, info.run_id, data.params, data.tags, data.metrics, (info.end_time or 0) / 1000)
        return None

    def why_not(self, bench: Bench, cell: Wanted) -> str:
        """What is wrong with a cell that :meth:`find` does not find."""
        runs = self._by_place.get(cell.place, [])
        finished = [r for r in runs if r.info.status == "FINISHED"]
        if finished:
            return f"its run has another {_differs(bench, cell, finished[-1])}"
        if not runs:
            return "its run is missing"
        status, error = runs[-1].info.status, runs[-1].data.tags.get("error")
        return f"its run has failed: {error}" if error else f"its run has not come to its end: {status}"


def _differs(bench: Bench, cell: Wanted, run: Stored) -> str | None:
    """The first thing that a run has not as the cell is to have it; a hyperparameter that is newer than the run was
    at its published value.
    """
    params = {**{k: str(v) for k, v in Config().flat().items()}, **run.data.params}
    tags = {"labels": "", **run.data.tags}
    pairs = ((bench.params(cell), params), (bench.tags(cell), tags))
    return next((k for wanted, have in pairs for k in wanted if have.get(k) != wanted[k]), None)


def cell_of(
    cell: Wanted, run_id: str, params: Mapping[str, str], tags: Mapping[str, str], metrics: Mapping[str, float],
    ended: float = 0.0,
) -> Cell:  # fmt: skip
    """The cell that is wanted, done."""
    return Cell(
        name=cell.name, key=cell.group.key, seed=cell.number, trained=bool(cell.group.row.method), run_id=run_id,
        params=dict(params), tags=dict(tags), metrics=dict(metrics), ended=ended,
    )  # fmt: skip
