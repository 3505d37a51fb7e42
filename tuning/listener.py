"""What a domain's Tuner tells the world: every event of its trials goes to MLflow and to the board."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.train import Checkpoint
from ray.tune.experiment import Trial

from tuning.plan import MARGIN, WORDS, Plan
from tuning.progress import Board
from tuning.search import Halving
from tuning.tracking import Run, Tracker
from tuning.trainer import METRIC
from wesam import Scores
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE

LABELS = {"paper": "paper's hyperparameters", "defaults": "model's defaults"}


class Interrupted(Exception):
    """The study is to end now."""


@dataclass
class _Seen:
    """What is known of a trial."""

    number: int
    run: Run
    label: str
    step: int = 0
    best: float = 0.0
    best_step: int = 0
    checkpoint: str | None = None
    """Where Ray Train has put the best one; Tune's own it keeps itself."""


class Listener(tune.Callback):
    """Runs in the driver, in the domain's thread."""

    def __init__(
        self, plan: Plan, tracker: Tracker, board: Board, domain: Run, tags: Mapping[str, str], direct: Scores,
        numbers: Sequence[int], halving: Halving, stop: threading.Event,
    ) -> None:  # fmt: skip
        """domain: its run. tags: of all trials. direct: the source model, on val. numbers: of the trials to come."""
        self._plan, self._tracker, self._board, self._domain = plan, tracker, board, domain
        self._direct, self._best, self._halving, self._stop = direct, direct.objective + MARGIN, halving, stop
        self._numbers, self._tags = numbers, tags
        self._seen: dict[str, _Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray pickles its callbacks at the start, and nobody ever reads that."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called several times a second."""
        if self._stop.is_set():
            raise Interrupted

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, or begins again."""
        if trial.trial_id not in self._seen:
            self._begin(trials.index(trial), trial)

    def _begin(self, index: int, trial: Trial) -> None:
        reference, point = trial.config.get("reference"), trial.config.get("point", {})
        if reference:
            point = self._plan.point(reference) or {}
        number = self._numbers[index]  # actors may start in another order
        tags = {**self._tags, "wesam.trial": str(number), "wesam.point": json.dumps(point)}
        tags |= {"wesam.reference": reference} if reference else {}
        run = self._tracker.start(f"{self._domain.name} {number}", "trial", self._domain, tags)
        config = self._plan.config(trial.config.get("reference"), trial.config.get("point", {}))
        run.log({f"val_{k}": v for k, v in self._direct.known().items()}, step=0, params=config.flat())
        self._seen[trial.trial_id] = _Seen(number, run, LABELS.get(reference or "", "searched"))
        self._board.at(self._domain.name, number, 0)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has been evaluated."""
        seen, step = self._seen[trial.trial_id], result["step"]
        metrics = {**result["metrics"], METRIC: result[METRIC]}
        if "gap" in result:
            metrics["gap"] = result["gap"]
        seen.step = step
        if result["score"] > seen.best:
            seen.best, seen.best_step = result["score"], step
            seen.checkpoint = result.get("checkpoint_path")
        seen.run.log(metrics, step=step)
        self._board.at(self._domain.name, seen.number, step)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has come to its end, or has been stopped."""
        seen = self._seen[trial.trial_id]
        if self._stop.is_set():
            seen.run.close("KILLED")
            return
        if not seen.best_step:
            self._over(seen, "FAILED", "the loss was not finite before the first evaluation")
            return
        pruned = trial.trial_id in self._halving.stopped
        checkpoint = self._checkpoint(trial, seen)
        kept = seen.run.attach(lambda: _adapter(checkpoint), "adapter")
        ended = "pruned" if pruned else "diverged" if seen.step < self._plan.base.steps else "finished"
        tags = {"pruned": str(pruned).lower(), "ended": ended}
        seen.run.log({"best_step": seen.best_step}, step=seen.step, tags=tags, after=kept)
        better = "  best so far" if seen.best > self._best else ""
        self._best = max(self._best, seen.best)
        where = "" if ended == "finished" else f"  {ended} at step {seen.step}"
        gain = round(seen.best - self._direct.objective, 3) + 0.0  # which makes -0.0 a plain 0.0
        self._over(
            seen,
            "FINISHED",
            f"val {WORDS[self._direct.chosen_by]} {seen.best:.3f} ({gain:+.3f} to Direct){where}{better}",
        )

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed for good."""
        if trial.trial_id not in self._seen:
            self._begin(trials.index(trial), trial)
        seen = self._seen[trial.trial_id]
        if self._stop.is_set():
            seen.run.close("KILLED")
        else:
            self._over(seen, "FAILED", f"failed: {_reason(trial)}")

    def _over(self, seen: _Seen, status: Any, text: str) -> None:
        seen.run.close(status)
        self._board.ended(self._domain.name, seen.number, f"{seen.label:<{max(map(len, LABELS.values()))}}  {text}")

    def _checkpoint(self, trial: Any, seen: _Seen) -> Checkpoint:
        """The best one."""
        if seen.checkpoint is not None:
            return Checkpoint(seen.checkpoint, trial.storage.storage_filesystem)
        return cast(Checkpoint, trial.run_metadata.checkpoint_manager.best_checkpoint_result.checkpoint)


def _reason(trial: Any) -> str:
    """The last line of what Tune has written about the trial's end; it is not in the storage yet."""
    file = trial.error_file
    lines = Path(file).read_text().strip().splitlines() if file and Path(file).is_file() else []
    return lines[-1] if lines else "no reason given"


def _adapter(checkpoint: Checkpoint) -> dict[str, bytes]:
    with checkpoint.as_directory() as folder:
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
