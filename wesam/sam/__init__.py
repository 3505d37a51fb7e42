"""The SAMs that can be adapted, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from wesam.errors import InputError, reason, unknown
from wesam.sam import checkpoints
from wesam.sam.attention import fuse
from wesam.sam.nano import SHAPE, Shape, build_nano, said_shape, shape_of
from wesam.sam.tiny import build_tiny, from_mobile_sam


@dataclass(frozen=True)
class Entry:
    """One row of the registry."""

    build: Callable[[], Sam]
    """Makes the model with random weights."""
    note: str
    file: str
    """The name of the weights file: of this package, or in the folder of the weights where there is a URL."""
    url: str = ""
    """Where the file is published; empty for one that ships with the project."""
    sha256: str = ""
    """The published file's digest."""

    @property
    def path(self) -> Path:
        """Where the file lies, or is to be put."""
        return checkpoints.home() / self.file if self.url else Path(str(files("wesam") / "weights" / self.file))


def _published(name: str) -> Sam:
    return fuse(sam_model_registry[name]())


_META = "https://dl.fbaipublicfiles.com/segment_anything/"
_MOBILE = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/"
REGISTRY = {
    "nano": Entry(build_nano, "trained on procedural scenes", "nano.safetensors"),
    "vit_t": Entry(
        build_tiny, "MobileSAM", "mobile_sam.pt", _MOBILE + "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "vit_b": Entry(
        partial(_published, "vit_b"), "SAM, as published", "sam_vit_b_01ec64.pth", _META + "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": Entry(
        partial(_published, "vit_l"), "SAM, as published", "sam_vit_l_0b3195.pth", _META + "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": Entry(
        partial(_published, "vit_h"), "SAM, as published", "sam_vit_h_4b8939.pth", _META + "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}  # fmt: skip


def model_names() -> list[str]:
    """The names that :func:`load_sam` knows."""
    return list(REGISTRY)


def kind_of(sam: Sam) -> str:
    """The name in the registry of the model that this is, whatever its weights; empty if it was not loaded by name."""
    return str(getattr(sam, "name_or_path", "")).partition("-")[0]


def find_model(model: str) -> Path:
    """The weights file that :func:`load_sam` reads for this model; raises InputError, with what to do, without one."""
    return _find(model)[1]


def fetch_model(name: str) -> Path:
    """Downloads the weights of this model, unless they are there, and checks them; the path of the file.

    Raises InputError for an unknown name, and where there is no way to the server or the wrong file behind it.
    """
    if name not in REGISTRY:
        raise unknown("model", name, REGISTRY)
    entry = REGISTRY[name]
    if entry.url and not (entry.path.is_file() and checkpoints.sha256(entry.path) == entry.sha256):
        checkpoints.fetch(entry.url, entry.path, entry.sha256)
    return entry.path


def load_sam(model: str = "nano") -> Sam:
    """A SAM, frozen and in evaluation mode, on the CPU.

    model: a name, or the path of a weights file of one of these models, such as somebody's fine-tuned SAM; which one is
    told from what the file holds. Raises InputError for an unknown name and for weights that are absent, damaged, not
    those that were published under the name, or of no model here.
    """
    entry, path = _find(model)
    digest = checkpoints.sha256(path)
    if entry and entry.sha256 and digest != entry.sha256:
        raise InputError(
            f"{path} is not the file published as {model} (SHA-256 {digest[:12]}..., not {entry.sha256[:12]}...): "
            f"wesam fetch {model} replaces it; if it is yours, give its path as the model, under another name"
        )
    state = from_mobile_sam(checkpoints.read_weights(path))
    own = None if entry else _own_nano(path, state)
    name = model if entry else "nano" if own else _identify(state, path)
    sam = own or REGISTRY[name].build()
    _check(state, sam, name, path)
    sam.load_state_dict(state)
    # where PEFT looks for it: adapters remember for which weights they are made
    sam.name_or_path = name if digest == REGISTRY[name].sha256 else f"{name}-{digest[:12]}"
    return sam.eval().requires_grad_(False)


def weights_digest(model: str) -> str:
    """The SHA-256 of the weights that :func:`load_sam` reads for this model, hexadecimal."""
    path = _find(model)[1]
    return _digest(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache
def _digest(path: Path, changed: int, size: int) -> str:
    """Of a file as it is since it was changed: large ones are not read each time."""
    return checkpoints.sha256(path)


def write_weights(sam: Sam, path: Path) -> None:
    """Writes the weights of a plain SAM, so that :func:`load_sam` reads them again by this path.

    path: ``.pth``, which segment_anything's own registry loads too where the model is one of its, or ``.safetensors``.
    Raises InputError for another ending, for ``.pth`` of a nano that has another shape than the one of that name, and
    for a file that cannot be written.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in sam.state_dict().items()}
    nano = kind_of(sam) == "nano"
    if nano and path.suffix == ".pth" and shape_of(sam) != Shape():
        raise InputError(f"cannot write {path}: of a nano of another shape only a .safetensors file says which")
    try:
        if path.suffix == ".pth":
            torch.save(state, path)
        elif path.suffix == ".safetensors":
            checkpoints.write_tensors(state, path, said_shape(shape_of(sam)) if nano else None)
        else:
            raise InputError(f"cannot write {path}: weights are written as .pth or .safetensors")
    except (OSError, RuntimeError, SafetensorError) as e:
        raise InputError(f"cannot write {path}: {reason(e)}") from None


def random_sam(name: str, seed: int = 0) -> Sam:
    """A SAM of this name with random weights, frozen and in evaluation mode: for measuring what it costs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = REGISTRY[name].build()
    sam.name_or_path = f"{name}-random"
    return sam.eval().requires_grad_(False)


def describe(name: str) -> tuple[int, int]:
    """The number of parameters of a model, and its input's side in pixels."""
    with torch.device("meta"):
        sam = REGISTRY[name].build()
    return sum(p.numel() for p in sam.parameters()), sam.image_encoder.img_size


def _find(model: str) -> tuple[Entry | None, Path]:
    """The model's entry, if it is given by name, and its weights file."""
    if model in REGISTRY:
        entry = REGISTRY[model]
        if not entry.path.is_file():
            raise InputError(f"no weights of {model}: wesam fetch {model} downloads them, or put {entry.url} in "
                             f"{entry.path.parent}")  # fmt: skip
        return entry, entry.path
    path = Path(model)
    if path.is_file():
        return None, path
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"no weights file {model}")
    raise unknown("model", model, REGISTRY)


def _own_nano(path: Path, state: dict[str, Tensor]) -> Sam | None:
    """A nano, with random weights, of the shape that the file of one says, if that is the shape of its tensors."""
    said = checkpoints.read_metadata(path).get(SHAPE)
    if said is None:
        return None
    try:
        given = json.loads(said)
        shape = Shape(**{**given, "whole": tuple(given["whole"])})
        if shape.depth > len(state):
            raise ValueError("more blocks than tensors")
        with torch.device("meta"):  # nothing is made that the file does not fill
            _check(state, build_nano(shape), "nano", path)
        return build_nano(shape)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, ArithmeticError, AssertionError, RuntimeError):
        raise InputError(f"{path} does not say in its metadata what shape its model has: {said[:80]}") from None


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in state.items()}


def _identify(state: dict[str, Tensor], path: Path) -> str:
    """The name of the model that has these weights, or the one that fits most of them."""
    given = set(_shapes(state).items())

    def fit(name: str) -> float:
        with torch.device("meta"):
            wanted = set(_shapes(REGISTRY[name].build().state_dict()).items())
        return len(wanted & given) / len(wanted | given)

    fits = {name: fit(name) for name in REGISTRY}
    best = max(fits, key=lambda name: fits[name])
    if fits[best] == 0:
        held = ", ".join(list(state)[:3])
        raise InputError(f"{path} is of no model here ({', '.join(REGISTRY)}): it holds {held}, ...")
    return best


def _check(state: dict[str, Tensor], sam: Sam, name: str, path: Path) -> None:
    """Raises InputError with what is missing and left over unless the weights are those of the model."""
    given, wanted = _shapes(state), _shapes(sam.state_dict())
    if given == wanted:
        return

    def some(keys: list[str]) -> str:
        return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

    parts = []
    if missing := [k for k in wanted if k not in given]:
        parts.append(f"it lacks {some(missing)}")
    if extra := [k for k in given if k not in wanted]:
        parts.append(f"it has left over {some(extra)}")
    if wrong := [k for k in wanted if k in given and given[k] != wanted[k]]:
        parts.append(f"other shapes have {some(wrong)}")
    likely = _identify(state, path)
    hint = f"; it looks like {likely}" if likely != name else ""
    raise InputError(f"{path} does not hold the weights of {name}: {'; '.join(parts)}{hint}")
