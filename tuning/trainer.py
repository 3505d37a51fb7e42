"""One trial: the loop of :func:`wesam.adapt`, in a Tune actor alone or in several workers of Ray Train."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
from ray import tune
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.tune.integration.ray_train import TuneReportCallback
from segment_anything.modeling import Sam

from tuning import joint
from tuning.checkpoint import Progress, at, folder_of, intact, written
from tuning.leaving import Notice
from tuning.plan import Plan
from wesam import Config, InputError, Report, Scores, adapt, load_domain, load_sam

METRIC = "best_score"
"""What is searched for and ranked by: the best :func:`tuning.joint.score` that the trial has reached so far."""

MAX_FAILURES = 2
"""So often a trial begins again at its last checkpoint."""

COLLAPSED = 0.9
"""A trial with more of its masks collapsed than this has diverged."""

Result = dict[str, Any]
Send = Callable[[Result, Progress, Mapping[str, Report]], None]
"""Takes a result, and of what a checkpoint goes with it: how far it is, and each domain's report."""

_idle_since: float | None = None
"""When this process's last trial had its last result, in seconds since the epoch; None before the first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of a domain have in common."""

    plan: Plan
    direct: dict[str, Scores]
    """Domain, as given -> scores of the source model on val."""
    resources: dict[str, float]
    """Of one worker."""

    def space(self) -> dict[str, Any]:
        """Plain data, as it travels with each proposal of :class:`tuning.search.Search`."""
        return {**vars(self), "plan": self.plan.to_json(), "direct": {d: asdict(s) for d, s in self.direct.items()}}

    @classmethod
    def of(cls, trial: Mapping[str, Any]) -> tuple[Setting, Config]:
        """The setting and the hyperparameters of a trial."""
        plan = Plan.from_json(trial["plan"])
        direct = {d: Scores(**s) for d, s in trial["direct"].items()}
        self = cls(plan=plan, direct=direct, resources=trial["resources"])
        return self, Config().replace(trial["config"])


@lru_cache(maxsize=4)
def source_model(name: str) -> Sam:
    """The frozen SAM, loaded once in a process, on the GPU that Ray has given it if any.

    Raises InputError for a GPU that is given and cannot be used: on the CPU instead, it would be taken for nothing.
    """
    torch.set_num_threads(1)
    there = torch.cuda.is_available()
    if not there and ray.is_initialized() and ray.get_gpu_ids():
        raise InputError(f"PyTorch {torch.__version__} cannot use the GPU that Ray gives it: is the driver too old?")
    return load_sam(name).to("cuda" if there else "cpu")


def drive(setting: Setting, config: Config, resume: Path | None, best: float, send: Send) -> None:
    """Runs a trial, or the rest of it from a checkpoint, and sends a result at each evaluation after the first step.

    best: the best score until the checkpoint.

    In a joint study the trial adapts to all its domains, step by step in turn. It ends before its last step if it
    diverges: if a loss is no longer finite, or if nearly all masks on val of a domain hold nothing or everything and
    those of the source model do not. What it has reached before counts. Told that its end is near, it sends a
    checkpoint at once, with a result that is ``saved`` and says nothing new.
    """
    plan = setting.plan
    sums = _Sums()
    sam = source_model(plan.model)
    notice = Notice(plan.name, sam.pixel_mean.device)
    domains = {d: load_domain(d) for d in setting.direct}
    direct = {domains[d].name: s for d, s in setting.direct.items()}
    loops = [
        adapt(
            sam, domain, config, resume=folder_of(resume, domain.name, plan) if resume else None,
            direct=setting.direct[given], label_free=True,
        )
        for given, domain in domains.items()
    ]  # fmt: skip
    try:
        for turn in zip(*loops, strict=True):
            if turn[0].step == 0:
                continue
            sums.add(turn)
            now = {name: r.val for name, r in zip(direct, turn, strict=True) if r.val is not None}
            if not now and not notice.came():
                continue
            reports, step = dict(zip(direct, turn, strict=True)), turn[0].step
            mb = sum(p.numel() * p.element_size() for p in turn[0].model.trainable()) / 1e6
            result: Result = {"step": step, "last": step == turn[0].steps, "saved": not now, "size": mb}
            result["seconds"] = sums.seconds / sums.steps
            if not now:
                send({**result, METRIC: best, "rank": -math.inf}, Progress(step, best, best_here=False), reports)
                continue
            score = joint.score(plan, now, direct)
            best = max(best, score)
            measured = {**joint.metrics(now), **sums.metrics(config), **_machine(sam), "adapter_mb": mb}
            # which checkpoint to keep: the best one, and of equals the first
            result |= {METRIC: best, "score": score, "rank": score - 1e-9 * step, "metrics": measured}
            send(result, Progress(step, best, best_here=score == best), reports)
            if any(s.collapsed > COLLAPSED >= direct[d].collapsed for d, s in now.items()):
                return
            sums = _Sums()
    except FloatingPointError:
        return


@dataclass
class _Sums:
    """Of the steps since the last evaluation, of all domains."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    domains: int = 1

    def add(self, turn: Sequence[Report]) -> None:
        self.steps, self.domains = self.steps + 1, len(turn)
        for report in turn:
            self.seconds, self.waited = self.seconds + report.seconds, self.waited + report.waited
            for name, value in report.losses.items():
                self.losses[name] += value

    def metrics(self, config: Config) -> dict[str, float]:
        count = self.steps * self.domains
        return {
            **{f"loss.{k}": v / count for k, v in self.losses.items()},
            "seconds_per_step": self.seconds / self.steps, "waited": self.waited / self.seconds,
            "images_per_second": config.optim.batch_size * count / self.seconds,
        }  # fmt: skip


def _machine(sam: Sam) -> dict[str, float]:
    """How busy the worker's machine is, as MLflow's tab of system metrics has it; and the memory of its GPU."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),  # since the last evaluation
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if sam.pixel_mean.device.type == "cuda":
        found["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def one_worker(trial: Result) -> None:
    """A Tune function trainable: the whole trial in this process, which goes on to the next one afterwards."""
    global _idle_since
    setting, config = Setting.of(trial)
    _give_back()
    gap = {} if _idle_since is None else {"gap": max(0.0, time.time() - max(_idle_since, trial.get("idle", 0.0)))}

    def send(result: Result, progress: Progress, reports: Mapping[str, Report]) -> None:
        global _idle_since
        with written(progress, reports, setting.plan) as checkpoint:
            _idle_since = time.time()  # Tune may end the trial here
            tune.report({**result, **gap}, checkpoint=tune.Checkpoint(checkpoint.path))
        gap.clear()

    _from_checkpoint(setting, config, trial.get("resume"), tune.get_checkpoint(), send)


def _give_back() -> None:
    """Has glibc give freed memory back: of each trial, which has a thread of its own, it would keep some 500 MB."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def several_workers(trial: Result) -> None:
    """A Tune function trainable that only watches over a TorchTrainer, which has the workers."""
    setting, _ = Setting.of(trial)
    # or Ray Train's cleaner asks the Ray that was started last on this machine, and each trial's end waits for that
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    report: Any = TuneReportCallback()  # type: ignore[no-untyped-call]
    trainer = TorchTrainer(
        _worker,
        train_loop_config=trial,
        scaling_config=ray.train.ScalingConfig(
            num_workers=setting.plan.workers,
            use_gpu="GPU" in setting.resources,
            resources_per_worker=setting.resources,
        ),
        run_config=ray.train.RunConfig(
            name=tune.get_context().get_trial_id(),  # the same after a restart, which so finds its checkpoints
            storage_path=setting.plan.place("workers"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(**KEEP),
            callbacks=[report],
        ),
    )
    trainer.fit()


KEEP: dict[str, Any] = {"num_to_keep": 1, "checkpoint_score_attribute": "rank", "checkpoint_score_order": "max"}
"""Of several workers: the best checkpoint; Ray keeps the last one besides, to go on from."""


def _worker(trial: Result) -> None:
    """The loop in one of several workers, all of which take part in every report."""
    setting, config = Setting.of(trial)
    first = ray.train.get_context().get_world_rank() == 0

    def send(result: Result, progress: Progress, reports: Mapping[str, Report]) -> None:
        with written(progress, reports, setting.plan) if first else nullcontext() as checkpoint:
            ray.train.report(result, checkpoint=checkpoint)

    _from_checkpoint(setting, config, trial.get("resume"), ray.train.get_checkpoint(), send)


def _from_checkpoint(
    setting: Setting, config: Config, resume: str | None, found: ray.train.Checkpoint | None, send: Send
) -> None:
    """Goes on from the last checkpoint that is intact; the first result tells from which.

    resume: the path of a checkpoint of an earlier run of the study, which counts where this one has none.
    """
    if found is None and resume is not None:
        found = at(resume, setting.plan.storage)
    with intact(found) as (used, folder, reached):
        best, told = reached.best, {}
        if found:
            damaged = used is None or used.path != found.path
            if damaged and not reached.best_here:
                best = -math.inf  # who knows whether that one is still there
            told = {"from": {"step": reached.step, "best": best, "path": used and used.path, "damaged": damaged}}

        def send_on(result: Result, progress: Progress, reports: Mapping[str, Report]) -> None:
            send({**result, **told}, progress, reports)
            told.clear()

        drive(setting, config, folder, best, send_on)
