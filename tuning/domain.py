"""The search on one domain of a study: references, trials, and then what :mod:`tuning.conclusion` makes of them."""

from __future__ import annotations

import json
import threading
import traceback
from dataclasses import asdict, dataclass

import optuna
from mlflow.entities import Run as Stored
from ray import tune

from tuning import judge, runtime
from tuning.budget import Budget
from tuning.conclusion import RESULT, Row, conclude
from tuning.confirm import DIRECT, SEED, SUPERVISED, Confirmation, Proposal
from tuning.listener import CHECKPOINT, Listener
from tuning.plan import REFERENCES, WORDS, Plan
from tuning.progress import Board
from tuning.sampler import catch_up, enqueue
from tuning.schedulers import Stopping, make_scheduler
from tuning.search import Search
from tuning.tracking import ROLE, Run, Tracker, Trial, environment, trials
from tuning.trainer import KEEP, METRIC, Setting, one_worker, several_workers
from wesam import Config, Scores, load_domain

ERROR = "error.txt"
"""The artifact of a domain's run that says what ended its search, in full."""


@dataclass(frozen=True)
class Context:
    """What the threads of a study share."""

    plan: Plan
    tracker: Tracker
    board: Board
    run: Run
    side_by_side: int
    """Trials of a domain at once."""
    budget: Budget
    stop: threading.Event


class DomainSearch(threading.Thread):
    """The search on one domain; afterwards ``row`` holds its result, or ``error`` and why."""

    def __init__(
        self, context: Context, given: str, name: str, study: optuna.Study, before: Stored | None
    ) -> None:  # fmt: skip
        """study: in Optuna. before: the domain's run, if it has been begun already."""
        super().__init__(name=name, daemon=True)
        self._c, self._given, self._study, self._before = context, given, study, before
        self._task = judge.Task(context.plan.model, given, context.plan.base)
        domain = load_domain(given)
        self._tags = {
            **study_tags(context.plan), "domain": given, "data": domain.digest,
            "annotations_left_out": str(len(domain.left_out)),
        }  # fmt: skip
        self.row: Row = {"domain": name, "error": "did not run"}
        self.trials: list[Trial] = []

    def run(self) -> None:
        """Searches, judges, registers."""
        if self._before is not None and self._before.info.status == "FINISHED" and self._is_done(self._before):
            self.row = json.loads(self._c.tracker.files(self._before.info.run_id, "")[RESULT])
            self._c.board.expect(self.name, self._c.plan.trials, self._c.plan.trials)
            return
        run = self._run()
        try:
            self.row = self._row(run)
            run.attach(lambda: {RESULT: json.dumps(self.row, indent=2).encode()})
            run.close("FINISHED")
        except Exception as e:  # the other domains go on
            reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
            self.row = {"domain": self.name, "error": reason}
            if not self._c.stop.is_set():
                self._c.board.say(f"failed: {reason}", self.name)
                told = traceback.format_exc().encode()
                run.attach(lambda: {ERROR: told})
                run.close("FAILED")

    def _is_done(self, before: Stored) -> bool:
        """Whether the study has not been enlarged since."""
        found = self._c.tracker.find("trial", parent=before.info.run_id)
        return sum(ROLE not in r.data.tags for r in found) >= self._c.plan.trials

    def _run(self) -> Run:
        if self._before is not None:
            return self._c.tracker.reopen(self._before)
        return self._c.tracker.start(self.name, "domain", self._c.run, self._tags)

    def _row(self, run: Run) -> Row:
        known = self._known_references()
        found, vanished = (known, 0) if known else judge.references(self._task)
        if not known:
            run.log({f"{k}_{f}": v for k, s in found.items() for f, v in asdict(s).items() if v is not None})
            run.log({"instances_vanished": vanished})
            self._trial_zero(run, found["direct_val"])
        if vanished:
            text = "left out of training, less than a pixel wide or high at the model's input size"
            self._c.board.say(f"{text}: {vanished} instances", self.name)
        direct = found["direct_val"]
        score = direct.name(self._c.plan.objective)
        ellipse = getattr(found.get("ellipse_val"), score, None)
        drawn = f"ellipse in the box {ellipse:.3f}, " if ellipse is not None else ""
        self._c.board.say(f"{WORDS[score]} on val: {drawn}Direct {getattr(direct, score):.3f}", self.name)
        self._c.board.scores(self.name, direct=getattr(direct, score))
        self._search(run, direct)
        self._c.board.say("search done; the best on val meets test", self.name)
        return conclude(self._task, self.name, self._c.plan, self._c.tracker, run, found, self._tags, self._c.budget)

    def _trial_zero(self, run: Run, direct: Scores) -> None:
        """Direct as a run among the trials, to be compared with them in MLflow's pages."""
        tags = {ROLE: DIRECT, "wesam.trial": "0", "label": "Direct", "ended": "finished"}
        about = {"number": 0, "label": "Direct", "point": None}
        zero = self._c.tracker.start(
            f"{self.name} Direct", "trial", run, {**self._tags, **tags, "wesam.proposal": json.dumps(about)}
        )
        score = direct.value(self._c.plan.objective)
        metrics = {f"val_{k}": v for k, v in direct.known().items()} | {"val_collapsed": direct.collapsed}
        zero.log(
            {**metrics, METRIC: score, "best_step": 0, "last_step": 0},
            params={**self._c.plan.base.flat(), "method": DIRECT},
        )
        zero.close()

    def _known_references(self) -> dict[str, Scores]:
        """Those of an earlier run of this study: test is read once."""
        metrics = self._before.data.metrics if self._before else {}
        if "direct_test_images" not in metrics:
            return {}
        names = (*judge.DRAWN, "direct")
        keys = [f"{k}_{s}" for k in names for s in ("val", "test") if f"{k}_{s}_images" in metrics]
        return {
            k: Scores(
                int(metrics[f"{k}_images"]), int(metrics[f"{k}_instances"]), metrics.get(f"{k}_miou"),
                metrics.get(f"{k}_f1"), metrics.get(f"{k}_label_free"), metrics[f"{k}_collapsed"],
            )
            for k in keys
        }  # fmt: skip

    def _search(self, run: Run, direct: Scores) -> None:
        plan, c = self._c.plan, self._c
        done = trials(c.tracker, run.id)
        unfinished = [] if self._before is None else _unfinished(c.tracker, run.id)
        going_on = [p for p in unfinished if "role" not in p]
        taken = {t.number for t in done} | {p["number"] for p in going_on}
        left = [n for n in range(1, plan.trials + 1) if n not in taken]
        again = [(role, t.number, t.of) for role in (SEED, SUPERVISED) for t in trials(c.tracker, run.id, role)]
        confirmation = Confirmation(
            plan, direct.value(plan.objective), {t.number: (t.best, t.flat()) for t in done},
            again + [(p["role"], p["number"], p.get("of")) for p in unfinished if "role" in p],
            supervised=plan.has_supervised(load_domain(self._given)),
        )  # fmt: skip
        count = len(left) + len(unfinished) + confirmation.most
        c.board.expect(self.name, len(done) + len(again) + count, len(done) + len(again))
        for t in done:
            c.board.scores(self.name, best=t.best, paper=t.best if t.reference == "paper" else None)
        if count:
            held = {r for r in REFERENCES if plan.point(r) is not None}
            seen = {t.reference for t in done} | {p.get("reference") for p in going_on}
            missing = [r for r in REFERENCES if r not in seen]
            catch_up(self._study, plan, done, going_on)
            enqueue(self._study, plan, [r for r in missing if r in held])
            scheduler = make_scheduler(plan, c.budget)
            resources = runtime.worker_resources(plan.gpus_per_worker)
            setting = Setting(plan=plan, domain=self._task.domain, direct=direct, resources=resources)
            listener = Listener(
                plan, c.tracker, c.board, run, self._tags, direct, max((t.best for t in done), default=0.0),
                scheduler.stopped, c.budget, c.stop
            )  # fmt: skip
            outside = [r for r in missing if r not in held]
            search = Search(
                plan, self._study, left, outside, unfinished, confirmation, c.budget, scheduler.stopped
            )  # fmt: skip
            _tuner(setting, self.name, count, c.side_by_side, search, scheduler, listener).fit()
            c.tracker.flush()
        self.trials = trials(c.tracker, run.id)


def _unfinished(tracker: Tracker, domain_run: str) -> list[Proposal]:
    """The trials that were interrupted after a checkpoint, to go on with; what has none is closed as failed."""
    found: list[tuple[bool, int, Proposal]] = []
    for stored in tracker.find("trial", parent=domain_run):
        tags = stored.data.tags
        if stored.info.status in ("FAILED", "FINISHED"):
            continue
        if CHECKPOINT not in tags:
            tracker.reopen(stored).close("FAILED")
            continue
        state = json.loads(tags[CHECKPOINT])
        proposal = {k: v for k, v in json.loads(tags["wesam.proposal"]).items() if v is not None}
        config = Config().parse([f"{k}={v}" for k, v in stored.data.params.items()])
        go_on = {"config": config.flat(), "run": stored.info.run_id, "resume": state["latest"], "state": state}
        found.append((ROLE in tags, proposal["number"], {"point": None, **proposal, **go_on}))
    return [proposal for _, _, proposal in sorted(found, key=lambda f: f[:2])]


def study_tags(plan: Plan) -> dict[str, str]:
    """What every run of a study is tagged with, beside its hyperparameters: all that its numbers depend on."""
    return {
        **environment(),
        "model": plan.model,
        "prompt": plan.base.prompt,
        "val_prompt": plan.base.scored_with,
        "seed": str(plan.base.seed),
    }


def _tuner(
    setting: Setting, name: str, count: int, side_by_side: int, search: Search, scheduler: Stopping, listener: Listener
) -> tune.Tuner:
    plan = setting.plan
    alone = plan.workers == 1
    # a trial that only watches over its workers must take something, but no CPU that the workers need
    need: dict[str, float] = setting.resources if alone else {"CPU": 0, "memory": 1}
    return tune.Tuner(
        tune.with_resources(one_worker if alone else several_workers, tune.PlacementGroupFactory([need])),
        param_space=setting.space(),
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=scheduler, num_samples=count, max_concurrent_trials=side_by_side,
            reuse_actors=alone, trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=f"{plan.storage}/{plan.name}/trials", verbose=0, callbacks=[listener],
            checkpoint_config=tune.CheckpointConfig(**KEEP) if alone else None,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip
