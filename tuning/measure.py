"""What a worker computes for one cell of a table: a training and its scores, or the scores of what is not trained."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from segment_anything.modeling import Sam

from tuning.trainer import source_model
from wesam import Config, Scores, baseline, evaluate, load_domain
from wesam.compare import train_once
from wesam.config import PromptKind, Value
from wesam.drawings import Drawing
from wesam.memory import reckon
from wesam.sam import REGISTRY, kind_of


@dataclass(frozen=True, kw_only=True)
class Task:
    """A cell, as it travels to a worker."""

    model: str
    domain: str
    """As given."""
    config: Mapping[str, Value]
    tests: tuple[PromptKind, ...]
    """What test is prompted with; of a trial nothing: it does not see test."""
    after: tuple[int, ...]
    trained: bool
    drawing: Drawing | None
    cost: bool
    """Whether the memory of a step is wanted."""
    threads: int


@dataclass(frozen=True)
class Measured:
    """What comes back."""

    metrics: dict[str, float]
    curve: dict[int, float]
    """Step -> mIoU on val."""
    tags: dict[str, str]


def measure(task: Task) -> Measured:
    """Computes a cell."""
    began = time.monotonic()
    sam, domain = source_model(task.model), load_domain(task.domain)
    torch.set_num_threads(task.threads)
    config = Config().replace(task.config)
    test = domain.scored("test", config.test_instances)
    tags = {"hardware": hardware()}
    metrics: dict[str, float] = {}
    curve: dict[int, float] = {}
    if task.drawing:
        metrics |= _named({k: baseline(task.drawing, test, k) for k in task.tests})
    elif not task.trained:
        metrics |= _named({k: evaluate(sam, test, k, crop=config.crop) for k in task.tests})
    else:
        gpu = sam.pixel_mean.device.type == "cuda"
        val = _direct(task.model, task.domain, config.scored_with, config.crop, config.val_instances)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        found = train_once(sam, domain, config, task.tests, val=val, after=task.after, forgiving=True)
        curve = {step: s.objective for step, s in found.curve.items()}
        metrics |= _named(found.test) | {f"test_miou.after_{n}": s.objective for n, s in found.after.items()}
        metrics |= {"best_val": found.best.val.objective, "best_step": found.best.step, "parameters": found.parameters}
        if found.seconds is not None:
            metrics["seconds_per_step"] = found.seconds
        if task.cost:
            metrics["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else _reckoned(sam, config)
        tags |= {"ended": "diverged" if found.diverged else "finished", "memory": "measured" if gpu else "reckoned"}
    return Measured({**metrics, "seconds": time.monotonic() - began}, curve, tags)


def _named(scores: Mapping[PromptKind, Scores]) -> dict[str, float]:
    return {f"test_{name}.{kind}": v for kind, s in scores.items() for name, v in s.known().items()}


@lru_cache(maxsize=64)
def _direct(model: str, domain: str, prompt: PromptKind, crop: float, most: int) -> Scores:
    """The source model's scores on val, computed once in a process."""
    return evaluate(source_model(model), load_domain(domain).scored("val", most), prompt, crop=crop)


def _reckoned(sam: Sam, config: Config) -> float:
    """The memory of a step on a GPU, in GiB: what a process on a CPU holds is mostly other things."""
    entry = REGISTRY[kind_of(sam)]
    return reckon(entry.build, config, config.max_instances)


def hardware() -> str:
    """The GPU's name or, without one, the CPU's, and the number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    names: list[str] = []
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
