"""The search on one domain of a study: references, trials, the best one on test, the registry."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from typing import Any

from mlflow.entities import Run as Stored
from ray import tune

from tuning import judge, registry, runtime
from tuning.listener import Listener
from tuning.plan import MARGIN, REFERENCES, WORDS, Plan
from tuning.progress import Board
from tuning.search import Halving, Search
from tuning.tracking import Run, Tracker, Trial, environment, trials
from tuning.trainer import KEEP, Setting, one_worker, several_workers
from wesam import Scores, load_domain

Row = dict[str, Any]
"""A domain's line of the result."""

RESULT, PICTURE = "result.json", "overlay.png"
"""Artifacts of a domain's run; the study's has the first one too."""


@dataclass(frozen=True)
class Context:
    """What the threads of a study share."""

    plan: Plan
    tracker: Tracker
    board: Board
    run: Run
    side_by_side: int
    """Trials of a domain at once."""
    stop: threading.Event


class DomainSearch(threading.Thread):
    """The search on one domain; afterwards ``row`` holds its result, or ``error`` and why."""

    def __init__(self, context: Context, given: str, name: str, before: Stored | None) -> None:
        super().__init__(name=name, daemon=True)
        self._c, self._given, self._before = context, given, before
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
        if self._before is not None and self._before.info.status == "FINISHED":
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
                run.close("FAILED")

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
        drawn = f"ellipse in the box {found['ellipse_val'].objective:.3f}, " if "ellipse_val" in found else ""
        self._c.board.say(f"{WORDS[direct.chosen_by]} on val: {drawn}Direct {direct.objective:.3f}", self.name)
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
                int(metrics[f"{k}_images"]), int(metrics[f"{k}_instances"]),
                *(metrics.get(f"{k}_{name}") for name in ("miou", "f1", "agreement")),
            )
            for k in keys
        }  # fmt: skip

    def _search(self, run: Run, direct: Scores) -> None:
        plan, c = self._c.plan, self._c
        done = trials(c.tracker, run.id)
        c.board.skip(len(done))
        taken = {t.number for t in done}
        left = [n for n in range(1, plan.trials + 1) if n not in taken]
        if left:
            references = [r for r in REFERENCES if r not in {t.reference for t in done}]
            halving = Halving(plan)
            setting = Setting(plan=plan, domain=self._task.domain, direct=direct, resources=runtime.worker_resources())
            listener = Listener(plan, c.tracker, c.board, run, self._tags, direct, left, halving, c.stop)
            search = Search(plan, references, [(t.point, t.best) for t in done if t.point])
            _tuner(setting, self.name, len(left), c.side_by_side, search, halving, listener).fit()
            c.tracker.flush()
        self.trials = trials(c.tracker, run.id)
        if not self.trials:
            raise RuntimeError("no trial has come to a result; what ended each of them is in the lines above")

    def _conclude(self, run: Run, found: dict[str, Scores]) -> Row:
        c, plan = self._c, self._c.plan
        direct = found["direct_val"].objective
        best = max(self.trials, key=lambda t: (t.best, -t.number), default=None)
        winner = best if best and best.best > direct + MARGIN else None
        paper = next((t for t in self.trials if t.reference == "paper"), None)
        wanted = {t.run_id: c.tracker.files(t.run_id, "adapter") for t in (paper, winner) if t}
        c.board.say("search done; the best on val meets test", self.name)
        scores = judge.judged(self._task, wanted)
        picture = judge.picture(self._task, wanted[winner.run_id] if winner else None)
        run.attach(lambda: {PICTURE: picture})
        test = scores[winner.run_id] if winner else found["direct_test"]
        ellipse = {s: found[f"ellipse_{s}"].objective if f"ellipse_{s}" in found else None for s in ("val", "test")}
        row: Row = {
            "domain": self.name, "given": self._given, "run_id": run.id,
            "score": test.chosen_by, "ellipse": ellipse["test"], "direct": found["direct_test"].objective,
            "paper": scores[paper.run_id].objective if paper else None, "best": test.objective,
            "val": {
                "score": found["direct_val"].chosen_by, "ellipse": ellipse["val"], "direct": direct,
                "paper": paper.best if paper else None, "best": winner.best if winner else direct,
            },
            "best_f1": test.f1, "trials": len(self.trials), "pruned": sum(t.pruned for t in self.trials),
            "best_trial": winner.number if winner else None, "best_run": winner.run_id if winner else None,
            "config": winner.config if winner else None,
        }  # fmt: skip
        for split, part in (("test", row), ("val", row["val"])):
            run.log({f"{k}_{split}_{part['score']}": part[k] for k in ("paper", "best") if part[k] is not None})
        failed = plan.trials - len(self.trials)
        lost = f"; {failed} of {plan.trials} trials failed" if failed else ""
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
    setting: Setting, name: str, count: int, side_by_side: int, search: Search, halving: Halving, listener: Listener
) -> tune.Tuner:
    plan = setting.plan
    alone = plan.workers == 1
    # a trial that only watches over its workers must take something, but no CPU that the workers need
    need: dict[str, float] = setting.resources if alone else {"CPU": 0, "memory": 1}
    return tune.Tuner(
        tune.with_resources(one_worker if alone else several_workers, tune.PlacementGroupFactory([need])),
        param_space=setting.space(),
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=halving, num_samples=count, max_concurrent_trials=side_by_side,
            reuse_actors=alone, trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=f"{plan.storage}/{plan.name}/trials", verbose=0, callbacks=[listener],
            checkpoint_config=tune.CheckpointConfig(**KEEP) if alone else None,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip
