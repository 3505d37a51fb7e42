"""What a domain's Tuner tells the world: every event of its trials goes to MLflow and to the board."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow.fs
from ray import tune
from ray.train import Checkpoint
from ray.tune.experiment import Trial

from tuning import joint
from tuning.budget import Budget
from tuning.checkpoint import folder_of, progress_of
from tuning.confirm import name_of
from tuning.places import Place
from tuning.plan import MARGIN, Plan
from tuning.progress import Board
from tuning.tracking import Run, Tracker
from tuning.trainer import METRIC
from wesam import Scores
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE
from wesam.errors import InputError

PROPOSED = ("number", "label", "point", "optuna", "reference", "role", "of")
"""What of a proposal is kept in its run's tags; its configuration is in the run's parameters."""

WIDTH = 23
"""Of what a trial is called."""


class Interrupted(Exception):
    """The study is to end now."""


@dataclass
class _Seen:
    """What is known of a trial."""

    name: str
    """Among the domain's trials."""
    run: Run
    label: str
    steps: int
    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    hours: float = 0.0
    """GPU hours that it had in earlier runs of the study."""
    latest: str | None = None
    checkpoint: str | None = None
    """Paths of the last checkpoint and of the best one."""
    leaving: bool = False
    """Whether the last result is there only because the end is near."""
    saved: bool = False
    """Whether its checkpoint has been written."""
    over: bool = False

    def go_back(self, step: int, best: float, path: str | None) -> None:
        """Checkpoints after this one are damaged; best: its score, -inf if another had been better."""
        self.step = step
        if path is None or path != self.checkpoint:
            known = best > -math.inf
            self.best, self.best_step, self.checkpoint = best, step if known else 0, path if known else None

    def kept(self, path: str) -> None:
        """A checkpoint of the last result has been written."""
        self.latest, self.saved = path, self.leaving
        if self.best_step == self.step:
            self.checkpoint = path
        self.run.log(tags={CHECKPOINT: json.dumps({k: getattr(self, k) for k in STATE})})


CHECKPOINT = "wesam.checkpoint"
"""The tag from which an interrupted trial can be gone on with."""

STATE = ("step", "best", "best_step", "latest", "checkpoint")


def read_state(tag: str, plan: Plan) -> dict[str, Any]:
    """What the tag CHECKPOINT says; raises InputError if it is none, or its checkpoints are not among the study's."""
    own = plan.place()
    root = PurePosixPath(pyarrow.fs.FileSystem.from_uri(own)[1] if "://" in own else own)
    try:
        found = json.loads(tag)
        paths = [PurePosixPath(p) for p in (found["latest"], found["checkpoint"]) if p is not None]
        state = {k: found[k] for k in STATE}
    except (ValueError, TypeError, KeyError) as e:
        raise InputError(f"the tag {CHECKPOINT} of a trial is none: {e}") from None
    if any(not p.is_relative_to(root) or ".." in p.parts for p in paths):
        raise InputError(f"the tag {CHECKPOINT} of a trial names a checkpoint that is not in {root}: not read")
    return state


class Listener(tune.Callback):
    """Runs in the driver, in the domain's thread."""

    def __init__(
        self, plan: Plan, tracker: Tracker, board: Board, domain: Run, tags: Mapping[str, str],
        direct: Mapping[str, Scores], best: float, stopped: Mapping[str, str], budget: Budget, stop: threading.Event,
        place: Place,
    ) -> None:  # fmt: skip
        """domain: its run. tags: of all trials. direct: the source model on val, by domain. best: the best score of
        trials of an earlier run. stopped: what the scheduler has stopped, by trial, and why.
        """
        self._plan, self._tracker, self._board, self._domain = plan, tracker, board, domain
        self._direct, self._start, self._word = direct, joint.score(plan, direct, direct), joint.word(plan, direct)
        self._best = max(best, self._start + MARGIN)
        self._stopped, self._budget, self._stop, self._tags, self._place = stopped, budget, stop, tags, place
        self._seen: dict[str, _Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles its callbacks at the start, and nobody ever reads that."""
        return {}

    def waiting(self) -> bool:
        """Whether a trial is running that has not yet written a checkpoint because the end is near."""
        return any(not (s.over or s.saved) for s in list(self._seen.values()))

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called several times a second."""
        if self._stop.is_set():
            raise Interrupted

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, or begins again."""
        self._budget.begin(self._domain.name, trial.trial_id, search="role" not in trial.config)
        self._place.begun()
        if trial.trial_id not in self._seen:
            self._begin(trial.config, trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has lost its worker, and waits for another: that costs nothing."""
        spent = self._budget.end(self._domain.name, trial.trial_id)
        if seen := self._seen.get(trial.trial_id):  # it may have been lost before it had begun
            seen.hours += spent

    def _begin(self, proposal: Mapping[str, Any], trial_id: str) -> None:
        number, name = proposal["number"], name_of(proposal)
        hours = 0.0
        if "run" in proposal:
            stored = self._tracker.run(proposal["run"])
            run, hours = self._tracker.reopen(stored), stored.data.metrics.get("gpu_hours", 0.0)
        else:
            about = {k: proposal.get(k) for k in PROPOSED}
            tags = {**self._tags, "wesam.trial": str(number), "wesam.proposal": json.dumps(about)}
            tags |= {"label": proposal["label"]} | {
                f"wesam.{k}": str(proposal[k]) for k in ("reference", "role") if k in proposal
            }
            run = self._tracker.start(f"{self._domain.name} {name}", "trial", self._domain, tags)
            run.use(self._domain.data, "train, val")
            run.log(joint.metrics(self._direct), step=0, params=proposal["config"])
        steps = int(proposal["config"]["steps"])
        state = proposal.get("state", {})
        self._seen[trial_id] = seen = _Seen(name, run, proposal["label"], steps, hours=hours, **state)
        self._board.at(self._domain.name, name, seen.step)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has been evaluated."""
        seen, step = self._seen[trial.trial_id], result["step"]
        if begun := result.get("from"):
            seen.run.log({"went_on_from": begun["step"]}, step=step)
            if begun["damaged"]:
                seen.go_back(begun["step"], begun["best"], begun["path"])
                said = f"trial {seen.name}: its last checkpoint is damaged; it went on from step {begun['step']}"
                self._board.say(said, self._domain.name)
        seen.step, seen.leaving = step, result["saved"]
        spent = seen.hours + self._budget.of(self._domain.name, trial.trial_id)
        seen.run.log({"gpu_hours": spent}, step=step)  # what is interrupted, or fails, has cost that much
        if not seen.leaving:
            metrics = {**result["metrics"], METRIC: result[METRIC]}
            if "gap" in result:
                metrics["gap"] = result["gap"]
            if result["score"] > seen.best:
                seen.best, seen.best_step = result["score"], step
            seen.run.log(metrics, step=step)
        if result.get("checkpoint_path"):  # Ray Train has written it; Tune's own comes after this
            seen.kept(result["checkpoint_path"])
        self._board.at(self._domain.name, seen.name, step)

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Checkpoint, **info: Any
    ) -> None:
        """A trial's last result has been kept; the last checkpoint and the best one are all that is needed."""
        seen = self._seen[trial.trial_id]
        before = {p for p in (seen.latest, seen.checkpoint) if p}
        seen.kept(checkpoint.path)
        for path in before - {seen.latest, seen.checkpoint}:
            self._tracker.later(partial(_remove, checkpoint.filesystem, path))  # once MLflow names another one

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has come to its end, or has been stopped."""
        seen, spent = self._seen[trial.trial_id], self._budget.end(self._domain.name, trial.trial_id)
        _forget(trial)
        seen.run.log({"gpu_hours": seen.hours + spent}, step=seen.step)
        if self._stop.is_set():
            seen.run.close("KILLED")
            return
        if not seen.best_step:
            seen.run.log(tags={"ended": "diverged"})
            self._over(seen, "FAILED", "diverged: the loss was not finite before the first evaluation", early=True)
            return
        assert seen.checkpoint is not None
        checkpoint = Checkpoint(seen.checkpoint, cast(Any, trial).storage.storage_filesystem)
        kept = seen.run.attach(lambda: _adapter(checkpoint, self._plan, self._direct), "adapter")
        ended = self._stopped.get(trial.trial_id, "finished" if seen.step == seen.steps else "diverged")
        seen.run.log(
            {"best_step": seen.best_step, "last_step": seen.step}, step=seen.step, tags={"ended": ended}, after=kept
        )
        better = ""
        if "role" not in trial.config and seen.best > self._best:
            self._best, better = seen.best, "  the search's best so far"
        where = "" if ended == "finished" else f"  {ENDED[ended]} at step {seen.step}"
        gain = round(seen.best - self._start, 3) + 0.0  # which makes -0.0 a plain 0.0
        if "role" not in trial.config:
            paper = seen.best if trial.config.get("reference") == "paper" else None
            self._board.scores(self._domain.name, paper=paper, best=seen.best)
        against = f"{gain:+.3f}" if self._plan.joint else f"{seen.best:.3f} ({gain:+.3f} to Direct)"
        said = f"val {self._word} {against}{where}{better}"
        self._over(seen, "FINISHED", said, early=ended != "finished")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed for good."""
        spent = self._budget.end(self._domain.name, trial.trial_id)
        _forget(trial)
        if trial.trial_id not in self._seen:
            self._begin(trial.config, trial.trial_id)
        seen = self._seen[trial.trial_id]
        seen.run.log({"gpu_hours": seen.hours + spent}, step=seen.step)
        if self._stop.is_set():
            seen.run.close("KILLED")
        else:
            self._over(seen, "FAILED", f"failed: {_reason(trial)}", early=True)

    def _over(self, seen: _Seen, status: Any, text: str, *, early: bool) -> None:
        seen.run.close(status)
        seen.over = True
        count = f"trial {seen.name}/{self._plan.trials}" if seen.name.isdecimal() else ""
        self._board.ended(self._domain.name, seen.name, f"{count:<11} {seen.label:<{WIDTH}}  {text}", early=early)


ENDED = {
    "pruned": "stopped early", "plateau": "past its own best", "budget": "the budget was spent", "diverged": "diverged"
}  # fmt: skip
"""What a trial's tag ``ended`` means, but for ``finished``."""


def _reason(trial: Any) -> str:
    """The last line of what Tune has written about the trial's end; it is not in the storage yet."""
    file = trial.error_file
    lines = Path(file).read_text().strip().splitlines() if file and Path(file).is_file() else []
    return lines[-1] if lines else "no reason given"


def _forget(trial: Trial) -> None:
    """Frees what Tune keeps of a trial that is over: its means over some reports, each result that had a checkpoint,
    and its configuration once more. Nobody asks for that, and of ten thousand trials it is half a gigabyte.
    """
    kept, checkpoints = trial.run_metadata, trial.run_metadata.checkpoint_manager
    assert checkpoints is not None
    for each in (kept.metric_analysis, kept.metric_n_steps, checkpoints._checkpoint_results):
        each.clear()
    latest = checkpoints._latest_checkpoint_result
    for result in (kept.last_result, latest.metrics if latest else {}):
        for name in ("config", "metrics"):
            result.pop(name, None)
    kept.invalidate_cache()  # type: ignore[no-untyped-call]


def _remove(filesystem: Any, path: str) -> None:
    """Removes a checkpoint; one that cannot be removed only takes room."""
    with contextlib.suppress(OSError):
        filesystem.delete_dir(path)


def _adapter(checkpoint: Checkpoint, plan: Plan, domains: Iterable[str]) -> dict[str, bytes]:
    """The files of the adapter, or of each domain's adapter, by their paths in the checkpoint."""
    with checkpoint.as_directory() as place:
        root = Path(place)
        progress_of(root)  # raises InputError if it is damaged
        files = [folder_of(root, d, plan) / f for d in domains for f in (CONFIG_FILE, WEIGHTS_FILE)]
        return {str(f.relative_to(root)): f.read_bytes() for f in files}
