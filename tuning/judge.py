"""Scores that are needed once per domain: of what needs no search before it, and on test after it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from PIL import Image
from torch import Tensor

from tuning.plan import WORDS
from tuning.runtime import worker_resources
from tuning.scratch import scratch
from tuning.trainer import source_model
from wesam import AdaptedSam, Scores, baseline, evaluate, load_domain, overlay, predict
from wesam.config import Config, PromptKind
from wesam.data.domain import Split
from wesam.drawings import DRAWN, drawable
from wesam.evaluate import measure
from wesam.overlay import sheet

Files = dict[str, bytes]
"""An adapter as it travels between machines: file name -> contents."""

SHOWN = 2
"""Test images in a domain's picture on which the adapter gains most, and as many on which it gains least."""

TRIED_IMAGES, TRIED_INSTANCES = 16, 4
"""Other ways to ask are tried on so many images of val at most, and so many instances of each: in a window each
instance costs a pass of the encoder.
"""

PerImage = list[dict[str, Tensor]]
"""Scores as :func:`wesam.evaluate.measure` has them."""


@dataclass(frozen=True)
class Task:
    """A domain as a study sees it."""

    model: str
    domain: str
    base: Config
    """What all its trials share: kind of prompt, crop."""
    gpus: float = 1.0
    """The share of a GPU that scoring takes, where there are some: as much as a trial, beside which it finds room."""


def ways(base: Config) -> dict[str, tuple[str, PromptKind, float]]:
    """Other ways to ask the model than a study's, which cost no training: name -> option, kind of prompt, crop."""
    prompt, crop = base.prompt, base.crop
    found: dict[str, tuple[str, PromptKind, float]] = {}
    if not crop and prompt != "grid":
        shown = 4.0 if prompt.startswith("point") else 2.0  # clicks lie within the object, and span less than it
        found["windows"] = f"--crop {shown:g}", prompt, shown
    if prompt == "box":
        found["tight"] = "--prompt tight-box", "tight-box", crop
    return found


def references(task: Task) -> tuple[dict[str, Scores], int]:
    """What is known of a domain before any search.

    Returns the scores of Direct and, where there are masks, of what can be drawn (:data:`DRAWN`), on val and test:
    ``direct_val``, ``ellipse_test``, ..., and of Direct on a part of val, as it is asked and in the other :func:`ways`:
    ``asked_val``, ``windows_val``, ``tight_val``; and how many training instances are too small for the model to see.
    """
    (on_val, vanished), (on_test, _) = ray.get([_begin(_references, task, split) for split in ("val", "test")])
    return {**on_val, **on_test}, vanished


def judged(task: Task, adapters: Mapping[str, Files]) -> dict[str, PerImage]:
    """Each adapter's scores on the images of test; as many adapters at once as there is room for."""
    waiting = {name: _begin(_judged, task, files) for name, files in adapters.items()}
    return {name: ray.get(begun) for name, begun in waiting.items()}


def picture(task: Task, adapter: Files | None = None, after: PerImage | None = None) -> bytes:
    """A PNG: a few test images with their true masks and Direct's.

    Given an adapter, and what it has on test, these are the images on which it gains and loses most, with its masks.
    """
    found: bytes = ray.get(_begin(_picture, task, adapter, after))
    return found


def _begin(function: Callable[..., Any], task: Task, *arguments: Any) -> Any:
    need = worker_resources(task.gpus)
    remote: Any = ray.remote(function)
    return remote.options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0)).remote(task, *arguments)


def _references(task: Task, split: Literal["val", "test"]) -> tuple[dict[str, Scores], int]:
    sam, domain = source_model(task.model), load_domain(task.domain)
    images = _scored(task, split)
    prompt, crop = task.base.scored_with, task.base.crop
    found = {}
    if images[0].has_masks:
        for name, kind in DRAWN.items():
            if drawable(kind, prompt):
                found[f"{name}_{split}"] = baseline(kind, images, prompt)
            elif drawable(kind, "box"):  # the tight one, though it is not given: a yardstick all the same
                found[f"{name}_{split}"] = baseline(kind, images)
    found[f"direct_{split}"] = evaluate(sam, images, prompt, crop=crop, label_free=split == "val")
    if split == "val" and (others := ways(task.base)):
        few = [images[i].only(TRIED_INSTANCES) for i in range(0, len(images), -(-len(images) // TRIED_IMAGES))]
        for name, (_, given, shown) in {"asked": ("", prompt, crop), **others}.items():
            found[f"{name}_val"] = evaluate(sam, few, given, crop=shown, label_free=True)
    return found, domain.vanished(task.base, sam.image_encoder.img_size) if split == "val" else 0


def _scored(task: Task, split: Literal["val", "test"]) -> Split:
    """The images of this split, with what of their instances the study scores."""
    most = task.base.val_instances if split == "val" else task.base.test_instances
    return load_domain(task.domain).scored(split, most)


def _judged(task: Task, adapter: Files) -> PerImage:
    sam, test = source_model(task.model), _scored(task, "test")
    with scratch() as folder:
        return measure(AdaptedSam.load(sam, _unpack(adapter, folder)), test, task.base.scored_with)


def _picture(task: Task, adapter: Files | None, after: PerImage | None) -> bytes:
    sam, domain = source_model(task.model), load_domain(task.domain)
    test, prompt, crop = _scored(task, "test"), task.base.scored_with, task.base.crop
    before = measure(sam, test if after else test[: 2 * SHOWN], prompt, crop=crop)
    chosen = changed_most(before, after) if after else {i: _told(scores) for i, scores in enumerate(before)}
    rows: list[list[Image.Image]] = []
    with scratch() as folder:
        models = {"before: Direct": sam}
        if adapter:
            models["after adaptation"] = AdaptedSam.load(sam, _unpack(adapter, folder)).sam
        for i in chosen:
            sample = test[i]
            given = sample.weak_labels(prompt)
            masks = [predict(m, sample.image, given, crop=crop)[0] for m in models.values()]
            rows.append(
                [overlay(sample.image, sample.known_masks(), given), *(overlay(sample.image, m) for m in masks)]
            )
    captions = [f"{test[i].key.removeprefix(f'{domain.name}/')}: {told}" for i, told in chosen.items()]
    first = "truth and prompts" if test[0].has_masks else "prompts"
    out = io.BytesIO()
    sheet(rows, [first, *models], captions=captions).save(out, "PNG")
    return out.getvalue()


def changed_most(before: PerImage, after: PerImage) -> dict[int, str]:
    """The images whose score has risen most, and least, by their numbers, the largest gain first, with what to say."""
    gains = [_score(a) - _score(b) for b, a in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: -gains[i])
    ends = [n for n in range(len(order)) if n < SHOWN or n >= len(order) - SHOWN]
    return {
        (i := order[n]): f"{_told(before[i])} -> {_score(after[i]):.3f}, {100 * gains[i]:+.1f} points, "
        f"rank {n + 1} of {len(order)} by gain"
        for n in ends
    }


def _score(image: Mapping[str, Tensor]) -> float:
    """The mean over an image's instances of mIoU or, where no masks are known, of the label-free score."""
    return float(image["miou" if "miou" in image else "label_free"].mean())


def _told(image: Mapping[str, Tensor]) -> str:
    return f"{WORDS['miou'] if 'miou' in image else 'no masks known, label-free score'} {_score(image):.3f}"


def _unpack(files: Files, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder
