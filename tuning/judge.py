"""Scores that are needed once per domain: of what needs no search before it, and on test after it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from tuning.runtime import worker_resources
from tuning.trainer import source_model
from wesam import AdaptedSam, Scores, baseline, evaluate, load_domain, overlay, predict
from wesam.config import Config
from wesam.overlay import sheet

Files = dict[str, bytes]
"""An adapter as it travels between machines: file name -> contents."""

DRAWN: dict[str, Literal["box", "ellipse"]] = {"box_filled": "box", "ellipse": "ellipse"}
"""What is drawn in the given box, as a row of the result and as :func:`wesam.baseline` calls it."""

SHOWN = 4
"""Test images in a domain's picture."""


@dataclass(frozen=True)
class Task:
    """A domain as a study sees it."""

    model: str
    domain: str
    base: Config
    """What all its trials share: kind of prompt, crop."""


def references(task: Task) -> tuple[dict[str, Scores], int]:
    """What is known of a domain before any search.

    Returns the scores of Direct and, where there are masks, of :data:`DRAWN`, on val and test: ``direct_val``,
    ``ellipse_test``, ...; and how many training instances are too small for the model to see.
    """
    found: tuple[dict[str, Scores], int] = _remote(_references, task)
    return found


def judged(task: Task, adapters: Mapping[str, Files]) -> dict[str, Scores]:
    """Each adapter's scores on test; as many at once as there is room for."""
    waiting = {name: _begin(_judged, task, files) for name, files in adapters.items()}
    return {name: ray.get(begun) for name, begun in waiting.items()}


def picture(task: Task, adapter: Files | None) -> bytes:
    """A PNG: a few test images with their true masks, before and, given an adapter, after adaptation."""
    found: bytes = _remote(_picture, task, adapter)
    return found


def _remote(function: Callable[..., Any], *arguments: Any) -> Any:
    return ray.get(_begin(function, *arguments))


def _begin(function: Callable[..., Any], *arguments: Any) -> Any:
    need = worker_resources()
    task: Any = ray.remote(function)
    return task.options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0)).remote(*arguments)


def _references(task: Task) -> tuple[dict[str, Scores], int]:
    sam, domain = source_model(task.model), load_domain(task.domain)
    found = {}
    for split in ("val", "test"):
        if domain.split(split)[0].has_masks:
            for name, kind in DRAWN.items():
                found[f"{name}_{split}"] = baseline(kind, domain.split(split))
        prompt, crop = task.base.scored_with, task.base.crop
        found[f"direct_{split}"] = evaluate(sam, domain.split(split), prompt, crop=crop, label_free=split == "val")
    return found, domain.vanished(task.base, sam.image_encoder.img_size)


def _judged(task: Task, adapter: Files) -> Scores:
    sam, test = source_model(task.model), load_domain(task.domain).split("test")
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(AdaptedSam.load(sam, _unpack(adapter, Path(folder))), test, task.base.scored_with)


def _picture(task: Task, adapter: Files | None) -> bytes:
    sam, test = source_model(task.model), load_domain(task.domain).split("test")
    with tempfile.TemporaryDirectory() as folder:
        models = {"before: Direct": sam}
        if adapter:
            models["after adaptation"] = AdaptedSam.load(sam, _unpack(adapter, Path(folder))).sam
        rows = []
        for i in range(min(SHOWN, len(test))):
            sample = test[i]
            given = sample.weak_labels(task.base.scored_with)
            row = [overlay(sample.image, sample.known_masks(), given)]
            row += [
                overlay(sample.image, predict(m, sample.image, given, crop=task.base.crop)[0]) for m in models.values()
            ]
            rows.append(row)
    out = io.BytesIO()
    sheet(rows, ["truth and prompts", *models]).save(out, "PNG")
    return out.getvalue()


def _unpack(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder
