"""The search of a study on one domain, or jointly on several: references, trials, and their conclusion."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Mapping, Sequence

import optuna
from mlflow.entities import Run as Stored
from ray import tune

from tuning import joint, runtime
from tuning.conclusion import RESULT, Row, conclude
from tuning.confirm import DIRECT, FINALIST, SEED, SUPERVISED, Confirmation, Proposal, repeated
from tuning.listener import CHECKPOINT, Listener, read_state
from tuning.plan import REFERENCES, WORDS, Plan, reason_of, shown
from tuning.replay import Past, tell
from tuning.sampler import catch_up, ended, enqueue, named
from tuning.schedulers import Stopping, make_scheduler
from tuning.search import Search
from tuning.target import Context, Target
from tuning.tracking import ROLE, Run, Tracker, Trial, begun, trials, trials_by_role
from tuning.trainer import MAX_FAILURES, METRIC, Setting, one_worker, several_workers
from wesam import Config

ERROR = "error.txt"
"""The artifact of a domain's run that says what ended its search, in full."""


class DomainSearch(threading.Thread):
    """A search; afterwards ``rows`` holds the result of each of its domains, or ``error`` and why."""

    def __init__(
        self, context: Context, name: str, domains: Sequence[str], study: optuna.Study, before: Mapping[str, Stored]
    ) -> None:  # fmt: skip
        """name: the domain's, or :data:`tuning.joint.JOINT`. domains: as given. study: in Optuna. before: the runs of
        domains and of a joint search that have been begun already, by name.
        """
        super().__init__(name=name, daemon=True)
        self._c, self._study, self._before = context, study, before.get(name)
        self._targets = targets = [Target(context, given, before) for given in domains]
        self._tags = {
            **targets[0].tags,
            "domain": ", ".join(t.given for t in targets),
            "data": joint.digest(t.domain for t in targets),
        }
        self.rows: list[Row] = [{"domain": t.name, "error": "did not run"} for t in targets]
        self.trials: list[Trial] = []
        self._listener: Listener | None = None
        self._place = context.places.of(name)

    def waiting(self) -> bool:
        """Whether a trial is running that has not yet written a checkpoint because the end is near."""
        return self._listener is not None and self.is_alive() and self._listener.waiting()

    def run(self) -> None:
        """Searches, judges, registers."""
        try:
            self._run()
        finally:
            self._place.end()

    def _run(self) -> None:
        c = self._c
        if self._before is not None and self._before.info.status == "FINISHED" and self._is_done(self._before):
            done = [t.before for t in self._targets if t.before is not None]
            self.rows = [json.loads(c.tracker.files(d.info.run_id, "")[RESULT]) for d in done]
            c.board.expect(self.name, c.plan.trials, c.plan.trials)
            return
        runs = [t.open() for t in self._targets]
        if c.plan.joint:
            runs.append(c.tracker.open(self.name, "domain", c.run, self._tags, self._before))
            runs[-1].use(t.data for t in self._targets)
        try:
            self.rows = self._concluded(runs[-1])
            for target, row in zip(self._targets, self.rows, strict=True):
                text = json.dumps(row, indent=2).encode()
                target.run.attach(lambda text=text: {RESULT: text})  # type: ignore[misc]
                found = f"test {WORDS[row['score']]} {row['best']:.3f} ({row['best'] - row['direct']:+.3f} to Direct)"
                c.board.say(f"{found}: {row['outcome']}", target.name)
            for run in runs:
                run.close("FINISHED")
        except Exception as e:  # the other searches go on
            reason = reason_of(e, last=True)
            self.rows = [{"domain": t.name, "error": reason} for t in self._targets]
            if not c.stop.is_set():
                c.board.say(f"failed: {reason}", self.name)
                lines = shown(traceback.format_exc()).encode()
                for run in runs:
                    run.attach(lambda: {ERROR: lines})
                    run.close("FAILED")

    def _is_done(self, before: Stored) -> bool:
        """Whether the study has not been enlarged since, and no trial can be gone on with; one that had to be begun
        again, or failed at once, has several runs.
        """
        found, more = list(self._c.tracker.each("trial", parent=before.info.run_id)), not self._c.budget.over()
        going_on = any(failed_midway(r) or (more and cut(r)) for r in found)
        return len(begun(found)) >= self._c.plan.trials and not going_on

    def _concluded(self, run: Run) -> list[Row]:
        """run: the parent of the trials."""
        c = self._c
        with c.board.scoring(self.name, "the unadapted model"):
            new = [t.refer() for t in self._targets]
        direct = {t.name: t.direct for t in self._targets}
        if any(new):
            self._trial_zero(run, joint.score(c.plan, direct, direct), joint.metrics(direct))
        c.board.scores(self.name, direct=joint.score(c.plan, direct, direct))
        self._search(run)
        if self.trials:
            c.board.say("search done; the best on val meets test", self.name)
        with c.board.scoring(self.name, "what was found, on test"):
            return conclude(c, run, self._targets)

    def _trial_zero(self, run: Run, score: float, metrics: Mapping[str, float]) -> None:
        """Direct as a run among the trials, to be compared with them in MLflow's pages."""
        about = {"number": 0, "label": "Direct", "point": None}
        tags = {ROLE: DIRECT, "wesam.trial": "0", "label": "Direct", "ended": "finished"}
        tags |= {**self._tags, "wesam.proposal": json.dumps(about)}
        zero = self._c.tracker.start(f"{self.name} Direct", "trial", run, tags)
        zero.use(run.data, "val")
        zero.log(
            {**metrics, METRIC: score, "best_step": 0, "last_step": 0},
            params={**self._c.plan.base.flat(), "method": DIRECT},
        )
        zero.close()

    def _search(self, run: Run) -> None:
        plan, c = self._c.plan, self._c
        direct = {t.name: t.direct for t in self._targets}
        start = joint.score(plan, direct, direct)
        before = trials_by_role(c.tracker, run.id)
        done = before[None]
        unfinished = [] if self._before is None else _unfinished(c.tracker, run.id, plan, more=not c.budget.over())
        going_on = [p for p in unfinished if "role" not in p]
        done = [t for t in done if t.number not in {p["number"] for p in going_on}]
        taken = {t.number for t in done} | {p["number"] for p in going_on}
        left = [n for n in range(1, plan.trials + 1) if n not in taken]
        again = [(role, t.number, t.of) for role in (FINALIST, SEED, SUPERVISED) for t in before[role]]
        confirmation = Confirmation(
            plan, start, {t.number: (t.best, t.flat()) for t in done}, repeated(before[FINALIST]),
            again + [(p["role"], p["number"], p.get("of")) for p in unfinished if "role" in p],
            supervised=all(plan.has_supervised(t.domain) for t in self._targets),
        )  # fmt: skip
        count = len(left) + len(unfinished) + confirmation.most
        c.board.expect(self.name, len(done) + len(again) + count, len(done) + len(again))
        for t in done:
            c.board.scores(self.name, best=t.best, paper=t.best if t.reference == "paper" else None)
        if count:
            known = [*map(vars, done), *going_on, *(t.user_attrs for t in ended(self._study, plan).values())]
            known += [] if self._before is None else _diverged(c.tracker, run.id)
            seen = {name for about in known for name in named(about)}
            catch_up(self._study, plan, done, going_on)
            enqueue(self._study, plan, seen)
            scheduler = make_scheduler(plan, c.budget, start)
            tell(scheduler, [past(c.tracker, t) for t in done])
            resources = runtime.worker_resources(plan.gpus_per_worker)
            setting = Setting(plan=plan, direct={t.given: t.direct for t in self._targets}, resources=resources)
            self._listener = Listener(
                plan, c.tracker, c.board, run, self._tags, direct, max((t.best for t in done), default=start),
                scheduler.stopped, c.budget, c.stop, self._place,
            )  # fmt: skip
            outside = [r for r in REFERENCES if r not in seen and plan.point(r) is None]
            search = Search(
                plan, self._study, left, outside, unfinished, confirmation, c.budget, scheduler.stopped, self._place
            )  # fmt: skip
            _tuner(setting, self.name, count, c.places.side_by_side, search, scheduler, self._listener).fit()
            c.tracker.flush()
        c.board.searched(self.name)
        self._place.ask()
        self.trials = trials(c.tracker, run.id)
        catch_up(self._study, plan, self.trials, ())  # one that had failed before and was gone on with


def _diverged(tracker: Tracker, domain_run: str) -> list[Proposal]:
    """The search's trials that had diverged before they had a score: they would again."""
    runs = tracker.each("trial", parent=domain_run)
    return [json.loads(r.data.tags["wesam.proposal"]) for r in runs if r.data.tags.get("ended") == "diverged"]


def past(tracker: Tracker, trial: Trial) -> Past:
    """A finished trial, as a scheduler is told of it."""
    history = tracker.history(trial.run_id, METRIC)
    curve = sorted({m.step: float(m.value) for m in history}.items())
    return Past(int(trial.config["steps"]), trial.reference, curve)


def failed_midway(trial: Stored) -> bool:
    """Whether what ended it was none of its own doing, as a full disk is not, and it can be gone on with."""
    tags = trial.data.tags
    return trial.info.status == "FAILED" and CHECKPOINT in tags and tags.get("ended", "budget") == "budget"


def cut(trial: Stored) -> bool:
    """Whether it ended with the budget, and can be gone on with when there is more of that."""
    return (
        trial.info.status == "FINISHED" and CHECKPOINT in trial.data.tags and trial.data.tags.get("ended") == "budget"
    )


def _unfinished(tracker: Tracker, domain_run: str, plan: Plan, *, more: bool = False) -> list[Proposal]:
    """The trials that were interrupted or failed after a checkpoint, to go on with; more: whether there is budget for
    those too that it has cut.

    What was interrupted before it had a checkpoint is closed as failed.
    """
    found: list[tuple[bool, int, Proposal]] = []
    for stored in tracker.each("trial", parent=domain_run):
        tags = stored.data.tags
        over = stored.info.status in ("FAILED", "FINISHED")
        if over and not failed_midway(stored) and not (more and cut(stored)):
            continue
        if CHECKPOINT not in tags:
            tracker.reopen(stored).close("FAILED")
            continue
        state = read_state(tags[CHECKPOINT], plan)
        proposal = {k: v for k, v in json.loads(tags["wesam.proposal"]).items() if v is not None}
        config = Config.from_texts(stored.data.params)
        go_on = {"config": config.flat(), "run": stored.info.run_id, "resume": state["latest"], "state": state}
        found.append((ROLE in tags, proposal["number"], {"point": None, **proposal, **go_on}))
    return [proposal for _, _, proposal in sorted(found, key=lambda f: f[:2])]


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
            reuse_actors=alone,  # one of several that is stopped stays in its TorchTrainer, and so does its actor
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=plan.place("trials"), verbose=0, callbacks=[listener],
            # no checkpoint_config, the listener removes old checkpoints: with one Tune saves all trials at each result
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )  # fmt: skip
