"""The SAMs that can be adapted, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import Sam

from wesam.errors import InputError, unknown
from wesam.sam.nano import build_nano


@dataclass(frozen=True)
class Entry:
    """One row of the registry."""

    build: Callable[[], Sam]
    """Makes the model with random weights."""
    weights: str
    """Where the weights are: a file of this package."""
    note: str


REGISTRY = {
    "nano": Entry(build_nano, "nano.safetensors", "ships with the project, 192 px, trained on procedural scenes")
}


def model_names() -> list[str]:
    """The names that :func:`load_sam` knows."""
    return list(REGISTRY)


def load_sam(name: str = "nano", weights: Path | None = None) -> Sam:
    """The SAM of this name, frozen and in evaluation mode; raises InputError for an unknown name or unusable weights.

    weights: a safetensors file to read instead of the model's own.
    """
    if name not in REGISTRY:
        raise unknown("model", name, REGISTRY)
    entry = REGISTRY[name]
    path = weights or Path(str(files("wesam") / "weights" / entry.weights))
    sam = entry.build()
    try:
        state = {k: v.float() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot read the weights of {name} from {path}: {e}") from None
    expected = {k: v.shape for k, v in sam.state_dict().items()}
    if {k: v.shape for k, v in state.items()} != expected:
        raise InputError(f"{path} does not hold weights of {name}: names or shapes differ")
    sam.load_state_dict(state)
    sam.name_or_path = name  # where PEFT looks for it
    return sam.eval().requires_grad_(False)
