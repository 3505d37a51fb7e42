"""The search on one domain of a study: references, trials, the best one on test, the registry."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from mlflow.entities import Run as Stored
from ray import tune

from tuning import judge, registry, runtime
from tuning.budget import Budget
from tuning.listener import CHECKPOINT, Listener
from tuning.plan import MARGIN, REFERENCES, WORDS, Plan
from tuning.progress import Board
from tuning.sampler import catch_up, enqueue
from tuning.schedulers import Stopping, make_scheduler
from tuning.search import Proposal, Search
from tuning.tracking import Run, Tracker, Trial, environment, trials
from tuning.trainer import KEEP, Setting, one_worker, several_workers
from wesam import Config, Scores, load_domain

Row = dict[str, Any]
"""A domain's line of the result."""

RESULT, PICTURE, ERROR = "result.json", "overlay.png", "error.txt"
"""Artifacts of a domain's run; the study's has the first one too. The last one: what ended the search, in full."""


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
            self._c.board.skip(self._c.plan.trials)
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
        return len(self._c.tracker.find("trial", parent=before.info.run_id)) >= self._c.plan.trials

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
        if vanished:
            text = "left out of training, less than a pixel wide or high at the model's input size"
            self._c.board.say(f"{text}: {vanished} instances", self.name)
        direct = found["direct_val"]
        score = direct.name(self._c.plan.objective)
        ellipse = getattr(found.get("ellipse_val"), score, None)
        drawn = f"ellipse in the box {ellipse:.3f}, " if ellipse is not None else ""
        self._c.board.say(f"{WORDS[score]} on val: {drawn}Direct {getattr(direct, score):.3f}", self.name)
        self._search(run, found["direct_val"])
        return self._conclude(run, found)

    def _known_references(self) -> dict[str, Scores]:
        """Those of an earlier run of this study: test is read once."""
        metrics = self._before.data.metrics if self._before else {}
        if "direct_test_images" not in metrics:
            return {}
        keys = [f"{k}_{s}" for k in ("ellipse", "direct") for s in ("val", "test") if f"{k}_{s}_images" in metrics]
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
        c.board.skip(len(done))
        unfinished = [] if self._before is None else _unfinished(c.tracker, run.id, {t.number for t in done})
        taken = {t.number for t in done} | {p["number"] for p in unfinished}
        left = [n for n in range(1, plan.trials + 1) if n not in taken]
        if left or unfinished:
            held = {r for r in REFERENCES if plan.point(r) is not None}
            seen = {t.reference for t in done} | {p.get("reference") for p in unfinished}
            missing = [r for r in REFERENCES if r not in seen]
            catch_up(self._study, plan, done, unfinished)
            enqueue(self._study, plan, [r for r in missing if r in held])
            scheduler = make_scheduler(plan, c.budget)
            resources = runtime.worker_resources(plan.gpus_per_worker)
            setting = Setting(plan=plan, domain=self._task.domain, direct=direct, resources=resources)
            listener = Listener(
                plan, c.tracker, c.board, run, self._tags, direct, scheduler.stopped, c.budget, c.stop
            )  # fmt: skip
            outside = [r for r in missing if r not in held]
            search = Search(plan, self._study, left, outside, unfinished, c.budget, scheduler.stopped)
            count = len(left) + len(unfinished)
            _tuner(setting, self.name, count, c.side_by_side, search, scheduler, listener).fit()
            c.tracker.flush()
        self.trials = trials(c.tracker, run.id)
        if not self.trials:
            raise RuntimeError("no trial has come to a result; what ended each of them is in the lines above")

    def _conclude(self, run: Run, found: dict[str, Scores]) -> Row:
        c, plan = self._c, self._c.plan
        score = found["direct_val"].name(plan.objective)
        direct = found["direct_val"].value(plan.objective)
        best = max(self.trials, key=lambda t: (t.best, -t.number), default=None)
        winner = best if best and best.best > direct + MARGIN else None
        paper = next((t for t in self.trials if t.reference == "paper"), None)
        wanted = {t.run_id: c.tracker.files(t.run_id, "adapter") for t in (paper, winner) if t}
        c.board.say("search done; the best on val meets test", self.name)
        scores = judge.judged(self._task, wanted)
        picture = judge.picture(self._task, wanted[winner.run_id] if winner else None)
        run.attach(lambda: {PICTURE: picture})
        test = scores[winner.run_id] if winner else found["direct_test"]
        drawn = (found.get("ellipse_val"), found.get("ellipse_test"))
        ellipse = {"val": getattr(drawn[0], score, None), "test": drawn[1].objective if drawn[1] else None}
        row: Row = {
            "domain": self.name, "given": self._given, "run_id": run.id,
            "score": test.chosen_by, "ellipse": ellipse["test"], "direct": found["direct_test"].objective,
            "paper": scores[paper.run_id].objective if paper else None, "best": test.objective,
            "val": {
                "score": score, "ellipse": ellipse["val"], "direct": direct,
                "paper": paper.best if paper else None, "best": winner.best if winner else direct,
            },
            "best_f1": test.f1, "trials": len(self.trials), "pruned": sum(t.pruned for t in self.trials),
            "best_trial": winner.number if winner else None, "best_run": winner.run_id if winner else None,
            "config": winner.config if winner else None,
        }  # fmt: skip
        for split, part in (("test", row), ("val", row["val"])):
            run.log({f"{k}_{split}_{part['score']}": part[k] for k in ("paper", "best") if part[k] is not None})
        lost = missing(plan.trials, self.trials, spent=c.budget.over())
        if winner is None:
            row["outcome"] = "nothing beat Direct on val: use the model as it is; no adapter registered" + lost
            return row
        tags = {
            **self._tags, "study": plan.name, "score": row["val"]["score"],
            f"val_{row['val']['score']}": f"{winner.best:.6f}", f"test_{test.chosen_by}": f"{test.objective:.6f}",
            f"direct_test_{test.chosen_by}": f"{row['direct']:.6f}",
        }  # fmt: skip
        row["version"], outcome = registry.promote(c.tracker, self.name, winner.run_id, tags)
        row["outcome"] = outcome + lost
        return row


def _unfinished(tracker: Tracker, domain_run: str, done: set[int]) -> list[Proposal]:
    """The trials that were interrupted after a checkpoint, to go on with; what has none is closed as failed."""
    found: dict[int, Proposal] = {}
    for stored in tracker.find("trial", parent=domain_run):
        tags, number = stored.data.tags, int(stored.data.tags["wesam.trial"])
        if stored.info.status == "FAILED" or number in done or "wesam.role" in tags:
            continue
        if CHECKPOINT not in tags:
            tracker.reopen(stored).close("FAILED")
            continue
        state = json.loads(tags[CHECKPOINT])
        proposal = {k: v for k, v in json.loads(tags["wesam.proposal"]).items() if v is not None}
        config = Config().parse([f"{k}={v}" for k, v in stored.data.params.items()])
        go_on = {"config": config.flat(), "run": stored.info.run_id, "resume": state["latest"], "state": state}
        found[number] = {"point": None, **proposal, **go_on}
    return [found[n] for n in sorted(found)]


def missing(wanted: int, found: Sequence[Trial], *, spent: bool) -> str:
    """What to say, after a domain's outcome, of the trials that have come to no result, or to no end."""
    if spent:
        cut = sum(t.ended == "budget" for t in found)
        return f"; the budget was spent after {len(found)} of {wanted} trials, {cut} of them not at their last step"
    failed = wanted - len(found)
    return f"; {failed} of {wanted} trials failed" if failed else ""


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
