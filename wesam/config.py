"""Every hyperparameter, once: its meaning, unit, range and default.

The defaults are the published values (CVPR 2024, and the authors' code where the paper is silent);
:func:`preset` gives the same values scaled for a model. A dotted path such as ``lora.rank`` names a field from the
command line, from a study's file and in MLflow.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from wesam.errors import InputError, plainly, unknown

PromptKind = Literal[
    "box", "tight-box", "point", "coarse", "coarse-box",
    "point1", "point2", "point3", "point4", "point5", "point6", "point7", "point8", "point9", "point10", "grid",
]  # fmt: skip
"""Kinds of weak labels: the tight box; the same, said to hold the whole object, so that masks are cut to it; 5 clicks
inside and 5 outside (pointN: N and N); a polygon of few vertices as a mask, or its bounding box; no labels at all but
the clicks of a grid that the source model is sure of."""
BOXES: tuple[PromptKind, ...] = ("box", "tight-box", "coarse-box")
"""The kinds that give the model a box."""
Targets = Literal["qv", "qkv", "attention", "encoder", "encoder+decoder"]
Train = Literal["lora", "norms", "prompts", "decoder", "encoder", "lora+norms", "lora+decoder"]
Precision = Literal["auto", "fp32", "bf16"]
Objective = Literal["auto", "miou", "f1", "label-free"]
"""What the best is chosen by on val; auto: mIoU where true masks are known, else the label-free score."""
Value = int | float | bool | str


def _hp(default: Any, doc: str, low: float | None = None, high: float | None = None) -> Any:
    """A field with its meaning and its range, both ends included."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


class _Checked:
    """Refuses values of the wrong type or out of range as soon as a configuration is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, f.name), hints[f.name]
            if dataclasses.is_dataclass(hint):
                continue
            choices = typing.get_args(hint)
            if choices:
                if value not in choices:
                    raise unknown(f.name, str(value), map(str, choices))
                continue
            if hint is float and type(value) is int:
                object.__setattr__(self, f.name, value := float(value))
            if type(value) is not hint:
                raise InputError(f"{f.name} must be {_TYPE_NAMES[hint]}, got {value!r}")
            low, high = f.metadata.get("low"), f.metadata.get("high")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise InputError(f"{f.name} must lie in [{low}, {'inf' if high is None else high}], got {value!r}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(_Checked):
    """Where the low-rank matrices sit and how large they are (the paper: theta + AB)."""

    rank: int = _hp(4, "rank of the two matrices", 1, 256)
    alpha_ratio: float = _hp(1.0, "alpha / rank: the factor on BA (1 in the published code)", 0.01, 64)
    targets: Targets = _hp(
        "encoder",
        "qkv: the encoder's attention inputs (qv: without the keys, as the published code has it); attention: + its "
        "outputs; encoder: + the MLPs, as in the paper; encoder+decoder: + the mask decoder's linear layers",
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Checked):
    """Weights and constants of the losses of all methods."""

    focal: float = _hp(20.0, "weight of the focal loss against the teacher's pseudo labels", 0)
    dice: float = _hp(1.0, "weight of the dice loss against the teacher's pseudo labels", 0)
    iou: float = _hp(1.0, "weight of the IoU head's squared error", 0)
    anchor: float = _hp(1.0, "weight of the anchor loss, half for the student and half for the teacher", 0)
    contrastive: float = _hp(1.0, "weight of the contrastive loss", 0)
    temperature: float = _hp(0.3, "temperature tau of the contrastive loss", 0.001, 100)
    focal_alpha: float = _hp(0.8, "focal loss: weight of foreground; background has 1 - alpha", 0, 1)
    focal_gamma: float = _hp(2.0, "focal loss: focusing exponent", 0, 10)
    tightness: float = _hp(0.0, "wesam: weight of the box-tightness loss; not in the paper, only with boxes", 0)
    label: float = _hp(
        3.0,
        "wesam+: weight of the loss against the weak label itself: tightness in the box, cross-entropy at the clicks, "
        "dice against the coarse mask",
        0,
    )
    entropy: float = _hp(1.0, "tent, shot: weight of the entropy of the masks", 0)
    diversity: float = _hp(1.0, "shot: weight of the entropy of the mean over the box, which is to be large", 0)
    pseudo: float = _hp(0.3, "shot: weight of the cross-entropy against the labels of the nearest prototype", 0)
    consistency: float = _hp(1.0, "dept: weight of the distance between the features of student and teacher", 0)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(_Checked):
    """The teacher that makes the pseudo labels."""

    decay: float = _hp(
        0.0, "decay of the teacher's moving average; 0 shares the student's weights, as in the paper", 0, 1
    )
    cut_to_box: bool = _hp(False, "wesam: cut pseudo labels to the given box; not in the paper, only with boxes")
    confidence: float = _hp(
        0.9, "soft-teacher, tribe: cells of which the teacher is less sure than this teach nothing", 0.5, 0.999
    )
    neighbours: int = _hp(10, "dept: cells that vote, by their features, on the label of each", 1, 100)


@dataclass(frozen=True, kw_only=True)
class ViewConfig(_Checked):
    """The two augmented views of an image."""

    flip: bool = _hp(True, "weak view: random horizontal and vertical flips")
    strength: float = _hp(1.0, "strength of the strong view's photometric changes; 0 is none", 0, 2)
    prompt_noise: float = _hp(
        0.0,
        "student: how far corners of boxes and polygons move, in sides of the box, and the share of clicks left out; "
        "not in the paper",
        0, 0.5,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GridConfig(_Checked):
    """The clicks to train on where there are no labels (:func:`wesam.grid.grid_prompts`); SAM's own thresholds."""

    points_per_side: int = _hp(32, "clicks in a row of the grid; at most one in a cell of the embedding", 1, 256)
    predicted_iou: float = _hp(0.88, "a click is kept if the IoU that the model predicts is at least this", 0, 1)
    stability: float = _hp(0.95, "and if its masks at logits above 1 and above -1 have at least this IoU", 0, 1)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Checked):
    """Adam and its schedule."""

    lr: float = _hp(1e-4, "learning rate after warm-up", 0, 1)
    weight_decay: float = _hp(1e-4, "weight decay", 0, 1)
    warmup_steps: int = _hp(250, "steps of linear warm-up; never more than a quarter of the run", 0)
    clip_norm: float = _hp(1.0, "gradients are scaled to at most this norm; 0 never clips", 0)
    batch_size: int = _hp(4, "images a step, over all workers", 1)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(_Checked):
    """How the steps are computed; what they are is the same, but for rounding."""

    precision: Precision = _hp(
        "auto", "auto: bf16 autocast on a GPU that has it, else fp32; evaluations are always in fp32"
    )
    checkpointing: bool = _hp(False, "keep less for the backward pass and compute it again: slower, far less memory")
    compile: bool = _hp(False, "torch.compile the encoder: a slow first step, then faster ones on a GPU")


@dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """One adaptation: the method, its budget, and all its hyperparameters."""

    method: str = _hp("wesam", "the method: a name from wesam.methods")
    train: Train = _hp(
        "lora",
        "what is trained: LoRA matrices; weights themselves: of the norms, the mask decoder, the whole encoder, or the "
        "prompts that are added to the encoder's inputs; or both",
    )
    prompt: PromptKind = _hp("box", "kind of weak label")
    val_prompt: PromptKind = _hp("box", "kind of weak label that scores are taken with where prompt is grid")
    crop: float = _hp(
        0.0, "0 shows the whole image; else a square around each prompt of this many of its lengths", 0, 16
    )
    steps: int = _hp(1000, "optimisation steps", 1)
    eval_every: int = _hp(100, "steps between two evaluations on val", 1)
    val_instances: int = _hp(16, "instances of an image of val that are scored, at most; 0 takes all", 0)
    test_instances: int = _hp(0, "instances of an image of test that are scored, at most; 0 takes all", 0)
    max_instances: int = _hp(50, "instances of an image used in one step; more are drawn at random", 1)
    seed: int = _hp(0, "seed of all that is random in the run", 0, 2**32 - 1)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.crop < 1:
            raise InputError(f"crop must be 0 (the whole image) or at least 1, got {self.crop!r}")
        if self.val_prompt == "grid":
            raise InputError("val_prompt must be a kind that a person gives: a grid cannot tell what is right")

    @property
    def scored_with(self) -> PromptKind:
        """The kind of prompt that val and test are scored with: the one trained on, but for a grid."""
        return self.val_prompt if self.prompt == "grid" else self.prompt

    def replace(self, changes: Mapping[str, Value]) -> Self:
        """A copy with the fields at these dotted paths changed; raises InputError for a wrong path or value."""
        tops: dict[str, Any] = {}
        known = self.flat()
        for path, value in changes.items():
            if path not in known:
                raise unknown("hyperparameter", path, known)
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise InputError(f"in the configuration: {path} must be finite, got {str(value)[:20]}")
            section, _, name = path.rpartition(".")
            if section:
                tops.setdefault(section, {})[name] = value
            else:
                tops[name] = value
        try:
            return dataclasses.replace(
                self,
                **{
                    k: dataclasses.replace(getattr(self, k), **v) if isinstance(v, dict) else v for k, v in tops.items()
                },
            )
        except InputError as e:
            raise InputError(f"in the configuration: {e}") from None

    def parse(self, assignments: list[str]) -> Self:
        """A copy changed by texts of the form ``path.to.field=value``, as given on a command line."""
        changes: dict[str, Value] = {}
        known = self.flat()
        for text in assignments:
            path, sep, value = text.partition("=")
            if not sep:
                raise InputError(f"expected path.to.field=value, got {text!r}")
            if path not in known:
                raise unknown("hyperparameter", path, known)
            changes[path] = _parse(path, value, type(known[path]))
        return self.replace(changes)

    @classmethod
    def from_texts(cls, fields: Mapping[str, Any]) -> Self:
        """The published values but for these fields, by dotted path, of which a value may be its text, as in MLflow."""
        return cls().parse([f"{path}={value}" for path, value in fields.items()])

    def flat(self) -> dict[str, Value]:
        """All fields by dotted path."""
        out: dict[str, Value] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if dataclasses.is_dataclass(value):
                out.update({f"{f.name}.{k.name}": getattr(value, k.name) for k in dataclasses.fields(value)})
            else:
                out[f.name] = value
        return out


def _parse(path: str, text: str, kind: type) -> Value:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            return typing.cast(Value, kind(text))
        except ValueError:
            pass
    raise InputError(f"{path} must be {_TYPE_NAMES[kind]}, got {text!r}")


PRESETS: dict[str, dict[str, Value]] = {
    "paper": {},
    "nano": {
        "lora.rank": 16, "lora.alpha_ratio": 2.0, "loss.focal": 60.0, "loss.dice": 0.3,
        "loss.anchor": 0.1, "loss.contrastive": 0.05, "optim.lr": 5e-4, "optim.warmup_steps": 10,
        "steps": 60, "eval_every": 10, "max_instances": 8, "grid.predicted_iou": 0.6, "grid.stability": 0.5,
    },
}  # fmt: skip
"""What differs from the published values, by model; a model without a preset uses the published ones."""


def preset(name: str) -> Config:
    """The configuration of this preset: ``paper``, or the defaults of a model by its name."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return Config().replace(PRESETS[name])


def read_config(file: Path) -> Config:
    """The configuration in a JSON file: fields by dotted path, alone, or under ``config`` as ``wesam adapt`` has it.

    What the file does not name has its published value. Raises InputError for a file that cannot be read, and for a
    wrong path or value.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read the configuration {file}: {plainly(e)}") from None
    fields = found.get("config", found) if isinstance(found, dict) else None
    if not isinstance(fields, dict):
        raise InputError(f'{file} is no configuration: expected an object of fields, as {{"lora.rank": 8}}')
    try:
        return Config.from_texts(fields)
    except InputError as e:
        raise InputError(f"{file}: {e}") from None
