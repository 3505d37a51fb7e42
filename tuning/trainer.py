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

import pyarrow.fs
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

COLLAPSED = 0.9
"""A trial with more of its masks collapsed than this has diverged."""

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
        return self, Config().replace(trial["config"])


@lru_cache(maxsize=4)
def source_model(name: str) -> Sam:
    """The frozen SAM, loaded once in a process, on the GPU that Ray has given it if any."""
    torch.set_num_threads(1)
    return load_sam(name).to("cuda" if torch.cuda.is_available() else "cpu")


def drive(trial: Mapping[str, Any], resume: Path | None, send: Send) -> None:
    """Runs a trial, or the rest of it from a checkpoint, and sends a result at each evaluation after the first step.

    It ends before its last step if it diverges: if a loss is no longer finite, or if nearly all masks on val hold
    nothing or everything and those of the source model do not. What it has reached before counts.
    """
    setting, config = Setting.of(trial)
    plan = setting.plan
    best = json.loads((resume / PROGRESS_FILE).read_text())[METRIC] if resume else 0.0
    losses: dict[str, float] = defaultdict(float)
    seconds, waited, count = 0.0, 0.0, 0
    sam = source_model(plan.model)
    cuda = sam.pixel_mean.device.type == "cuda"
    domain = load_domain(setting.domain)
    reports = adapt(sam, domain, config, resume=resume, direct=setting.direct, label_free=True)
    try:
        for report in reports:
            if report.step == 0:
                continue
            count, seconds, waited = count + 1, seconds + report.seconds, waited + report.waited
            for name, value in report.losses.items():
                losses[name] += value
            if report.val is None:
                continue
            score = report.val.value(plan.objective)
            best = max(best, score)
            size = sum(p.numel() * p.element_size() for p in report.model.trainable()) / 1e6
            metrics = {f"loss.{k}": v / count for k, v in losses.items()}
            metrics |= {f"val_{k}": v for k, v in report.val.known().items()} | {"val_collapsed": report.val.collapsed}
            metrics |= {"seconds_per_step": seconds / count, "waited": waited / seconds, "adapter_mb": size}
            metrics["images_per_second"] = config.optim.batch_size * count / seconds
            if cuda:
                metrics["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
            result = {"step": report.step, "last": report.step == report.steps, METRIC: best, "metrics": metrics}
            result |= {"size": size, "seconds": seconds / count}
            # which checkpoint to keep: the best one, and of equals the first
            result |= {"score": score, "rank": score - 1e-9 * report.step}
            send(result, report)
            if report.val.collapsed > COLLAPSED >= setting.direct.collapsed:
                return
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
    if found is None and "resume" in trial:  # of an earlier run of the study
        storage = Setting.of(trial)[0].plan.storage
        filesystem = pyarrow.fs.FileSystem.from_uri(storage)[0] if "://" in storage else None
        found = ray.train.Checkpoint(trial["resume"], filesystem)
    with found.as_directory() if found else nullcontext() as folder:
        drive(trial, Path(folder) if folder else None, send)


def _write(folder: Path, result: Result, report: Report) -> ray.train.Checkpoint:
    report.save(folder)
    (folder / PROGRESS_FILE).write_text(json.dumps({k: result[k] for k in ("step", METRIC)}))
    return ray.train.Checkpoint.from_directory(folder)
