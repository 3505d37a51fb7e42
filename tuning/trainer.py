"""One trial: the loop of :func:`wesam.adapt`, in a Tune actor alone or in several workers of Ray Train."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from segment_anything.modeling import Sam

from tuning.plan import Plan
from wesam import Config, Report, Scores, adapt, load_domain, load_sam

METRIC = "best_score"
"""What is searched for and ranked by: the best val mIoU that the trial has reached so far."""

PROGRESS_FILE = "progress.json"
"""Beside the adapter in a checkpoint: the step it is from and the METRIC by then."""

Result = dict[str, Any]
Send = Callable[[Result, Report], None]

_idle_since: float | None = None
"""When this process's last trial had its last result; None before the first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of a domain have in common."""

    plan: Plan
    domain: str
    direct: Scores
    """Of the source model on val."""
    resources: dict[str, float]
    """Of one worker."""

    def space(self) -> dict[str, Any]:
        """Plain data, as it travels with each proposal of :class:`tuning.search.Search`."""
        return {**vars(self), "plan": self.plan.to_json(), "direct": asdict(self.direct)}

    @classmethod
    def of(cls, trial: Mapping[str, Any]) -> tuple[Setting, Config]:
        """The setting and the hyperparameters of a trial."""
        plan = Plan.from_json(trial["plan"])
        self = cls(plan=plan, domain=trial["domain"], direct=Scores(**trial["direct"]), resources=trial["resources"])
        return self, plan.config(trial.get("reference"), trial.get("point", {}))


@lru_cache(maxsize=4)
def source_model(name: str) -> Sam:
    """The frozen SAM, loaded once in a process, on the GPU that Ray has given it if any."""
    torch.set_num_threads(1)
    return load_sam(name).to("cuda" if torch.cuda.is_available() else "cpu")


def drive(trial: Mapping[str, Any], resume: Path | None, send: Send) -> None:
    """Runs a trial, or the rest of it from a checkpoint, and sends a result at each evaluation after the first step.

    A loss that is no longer finite ends the trial: what it has reached before counts.
    """
    setting, config = Setting.of(trial)
    best = json.loads((resume / PROGRESS_FILE).read_text())[METRIC] if resume else 0.0
    losses: dict[str, float] = defaultdict(float)
    seconds, waited, count = 0.0, 0.0, 0
    reports = adapt(
        source_model(setting.plan.model), load_domain(setting.domain), config, resume=resume, direct=setting.direct
    )
    try:
        for report in reports:
            if report.step == 0:
                continue
            count, seconds, waited = count + 1, seconds + report.seconds, waited + report.waited
            for name, value in report.losses.items():
                losses[name] += value
            if report.val is None:
                continue
            best = max(best, report.val.objective)
            metrics = {f"loss.{k}": v / count for k, v in losses.items()}
            metrics |= {f"val_{k}": v for k, v in report.val.known().items()}
            metrics |= {"seconds_per_step": seconds / count, "waited": waited / seconds}
            score = report.val.objective
            result = {"step": report.step, "last": report.step == report.steps, METRIC: best, "metrics": metrics}
            # which checkpoint to keep: the best one, and of equals the first
            result |= {"score": score, "rank": score - 1e-9 * report.step}
            send(result, report)
            losses.clear()
            seconds, waited, count = 0.0, 0.0, 0
    except FloatingPointError:
        return


def one_worker(config: Result) -> None:
    """A Tune function trainable: the whole trial in this process, which goes on to the next one afterwards."""
    global _idle_since
    gap = {} if _idle_since is None else {"gap": time.monotonic() - _idle_since}

    def send(result: Result, report: Report) -> None:
        global _idle_since
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = _write(Path(folder), result, report)
            _idle_since = time.monotonic()  # Tune may end the trial here
            tune.report({**result, **gap}, checkpoint=tune.Checkpoint(checkpoint.path))
        gap.clear()

    _from_checkpoint(config, tune.get_checkpoint(), send)


def several_workers(config: Result) -> None:
    """A Tune function trainable that only watches over a TorchTrainer, which has the workers."""
    setting, _ = Setting.of(config)
    report: Any = TuneReportCallback()  # type: ignore[no-untyped-call]
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=setting.plan.workers,
            use_gpu="GPU" in setting.resources,
            resources_per_worker=setting.resources,
        ),
        run_config=ray.train.RunConfig(
            name=tune.get_context().get_trial_id(),  # the same after a restart, which so finds its checkpoints
            storage_path=f"{setting.plan.storage}/{setting.plan.name}/workers",
            failure_config=ray.train.FailureConfig(max_failures=2),
            checkpoint_config=ray.train.CheckpointConfig(**KEEP),
            callbacks=[report],
        ),
    )
    trainer.fit()


KEEP: dict[str, Any] = {"num_to_keep": 1, "checkpoint_score_attribute": "rank", "checkpoint_score_order": "max"}
"""The best checkpoint; Ray keeps the last one besides, to go on from."""


def _worker(config: dict[str, Any]) -> None:
    """The loop in one of several workers, all of which take part in every report."""
    first = ray.train.get_context().get_world_rank() == 0

    def send(result: Result, report: Report) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = _write(Path(folder), result, report) if first else None
            ray.train.report(result, checkpoint=checkpoint)

    _from_checkpoint(config, ray.train.get_checkpoint(), send)


def _from_checkpoint(trial: Mapping[str, Any], found: ray.train.Checkpoint | None, send: Send) -> None:
    with found.as_directory() if found else nullcontext() as folder:
        drive(trial, Path(folder) if folder else None, send)


def _write(folder: Path, result: Result, report: Report) -> ray.train.Checkpoint:
    report.save(folder)
    (folder / PROGRESS_FILE).write_text(json.dumps({k: result[k] for k in ("step", METRIC)}))
    return ray.train.Checkpoint.from_directory(folder)
