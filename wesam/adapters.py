"""One frozen SAM in memory, seen three ways: as anchor, as teacher and as student.

The anchor is the SAM itself. Student and teacher are copies of its modules, but not of its weights, with LoRA
matrices from PEFT: adapting adds a fraction of a percent to the memory, and nothing is switched on or off.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from wesam.config import ComputeConfig, Config, LoraConfig, Targets, Train
from wesam.errors import InputError, one_of
from wesam.sam import model_names
from wesam.sam.attention import checkpoint_blocks
from wesam.sam.checkpoints import HEADER_BYTES, own_file, read_tensors, said_of, write_tensors

if TYPE_CHECKING:  # it loads transformers, which takes seconds, and is imported where it is needed
    import peft

_BLOCK = r"image_encoder\.(stages\.\d+\.)?blocks\.\d+\."  # of SAM's ViT, and of TinyViT
_TARGETS: dict[Targets, str] = {
    "qv": _BLOCK + r"attn\.(qkv)",  # the same layers, of whose rows those of the keys stay as they are
    "qkv": _BLOCK + r"attn\.qkv",
    "attention": _BLOCK + r"attn\.(qkv|proj)",
    "encoder": _BLOCK + r"(attn\.(qkv|proj)|mlp\.(lin|fc)[12])",
    "encoder+decoder": _BLOCK
    + r"(attn\.(qkv|proj)|mlp\.(lin|fc)[12])|mask_decoder\.transformer\..*(q_proj|k_proj|v_proj|out_proj|lin[12])",
}
_UNUSED = LoraConfig(rank=1, targets="qkv")
"""The matrices of an adapter that trains none: they stay zero, and so it is loaded and merged as any other."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ABOUT = ("README.md", "config.json")
"""What a registry writes about an adapter beside it: its card, and its hyperparameters."""


class AdaptedSam:
    """A SAM with a student's LoRA on it and, if wanted, a teacher's.

    sam: the frozen source model; it is shared and never changed. lora: where the matrices sit. train: what is trained;
    weights that are have a copy in student and teacher. teacher: whether the teacher has parameters of its own, a
    moving average; otherwise it is the student. seed: of the matrices A. crop: how it sees a prompt, as
    :func:`wesam.predict` has it. compute: how the steps of training are computed.
    """

    def __init__(
        self, sam: Sam, lora: LoraConfig, *, train: Train = "lora", teacher: bool = False, seed: int = 0,
        crop: float = 0.0, compute: ComputeConfig | None = None,
    ) -> None:  # fmt: skip
        self.anchor, self.train, self.crop = sam, train, crop
        self.compute = compute or ComputeConfig()
        if "lora" not in train:
            lora = _UNUSED
        config = _peft_config(sam, lora)
        self._peft = _wrap(sam, config, train, seed)
        self._teacher = _wrap(sam, config, train, seed) if teacher else self._peft
        if self.compute.checkpointing:
            checkpoint_blocks(self.sam)
        if self.compute.compile:
            for model in {id(m): m for m in (self.sam, self.teacher)}.values():
                model.image_encoder.compile()

    def autocast(self) -> torch.autocast:
        """The precision of a training step's forward passes, for a ``with`` statement."""
        return autocast(self.anchor, self.compute)

    @property
    def sam(self) -> Sam:
        """The student: what is trained and what is used afterwards."""
        return cast(Sam, self._peft.base_model.model)

    @property
    def teacher(self) -> Sam:
        """The model that makes the pseudo labels; the student itself if it has no matrices of its own."""
        return cast(Sam, self._teacher.base_model.model)

    def trainable(self) -> list[nn.Parameter]:
        """The student's parameters that are trained, always in the same order."""
        return [p for p in self._peft.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        keys = cast("peft.LoraConfig", self._peft.peft_config["default"]).target_modules == _TARGETS["qv"]
        return sum(
            p.numel() - (p.numel() // 3 if keys and "lora_B" in n else 0)
            for n, p in self._peft.named_parameters()
            if p.requires_grad
        )

    def teacher_parameters(self) -> list[nn.Parameter]:
        """The teacher's, in the same order."""
        return [p for p in self._teacher.parameters() if p.requires_grad]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the teacher: its parameters become decay * teacher + (1 - decay) * student."""
        if self._teacher is not self._peft:
            for t, s in zip(self.teacher_parameters(), self.trainable(), strict=True):
                t.lerp_(s, 1 - decay)

    def merged(self) -> Sam:
        """A plain SAM with the student's matrices added to its weights: what inference costs is unchanged.

        A plain SAM knows of no crop: give :func:`wesam.predict` this model's.
        """
        return cast(Sam, copy.deepcopy(self._peft).merge_and_unload())

    def save(self, directory: Path) -> None:
        """Writes the student in PEFT's format: adapter_config.json and adapter_model.safetensors, which holds crop.

        Weights of SAM's own that are trained are in the second, too, where PEFT itself does not look for them.
        """
        directory.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._peft.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(str(directory))
        state = {k: v.contiguous() for k, v in _state(self._peft).items()}
        own = dict(zip(_own(self.anchor, self.train), _copied(self._peft), strict=True))
        state |= {_WEIGHT + n: p.detach() for n, p in own.items()}
        write_tensors(state, directory / WEIGHTS_FILE, {"crop": str(self.crop), "train": self.train})

    @classmethod
    def load(cls, sam: Sam, directory: Path | str) -> AdaptedSam:
        """The adapter that :meth:`save` wrote, on the same SAM.

        Raises InputError if it is none, or another SAM's: before any of its tensors is read for a file that holds
        anything but what such an adapter needs, or is a link that leads out of the folder.
        """
        import peft

        directory = Path(directory)
        with _reading(directory):
            base, lora, alpha = _said(directory)
            if base != _name(sam):
                raise InputError(f"it is for the model {base}, not {_name(sam)}")
            about = said_of(directory / WEIGHTS_FILE)
            train = Config(train=cast(Train, about.get("train", "lora"))).train
            crop = Config(crop=_number(about.get("crop", "0"))).crop
            own = {_WEIGHT + n: tuple(p.shape) for n, p in _own(sam, train).items()}
            state, _ = read_tensors(directory / WEIGHTS_FILE, {**_lora_shapes(sam, lora), **own})
            if not all(t.isfinite().all() for t in state.values()):
                raise InputError(f"{WEIGHTS_FILE} holds numbers that are not finite")
        config = _peft_config(sam, lora)
        config.lora_alpha = alpha  # type: ignore[assignment]
        self = cls.__new__(cls)
        self.anchor, self.train, self.crop, self.compute = sam, train, crop, ComputeConfig()
        self._peft = self._teacher = _wrap(sam, config, train, 0)
        peft.set_peft_model_state_dict(self._peft, {k: v for k, v in state.items() if k not in own})
        with torch.no_grad():
            for name, p in zip(own, _copied(self._peft), strict=True):
                p.copy_(state[name])
        return self


def made_for(directory: Path) -> str:
    """The name of the model that the adapter in a folder is for, as :func:`wesam.load_sam` knows it.

    Whether it has the very weights, :meth:`AdaptedSam.load` sees. Raises InputError if there is no adapter, and
    for one of no model here.
    """
    with _reading(directory):
        name: str = one_of("model", _said(directory)[0].partition("-")[0], model_names())
        return name


def is_adapter(directory: Path) -> bool:
    """Whether the folder holds an adapter as :meth:`AdaptedSam.save` writes it, by its configuration."""
    try:
        _said(directory)
    except InputError:
        return False
    return True


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Within this, an InputError says which adapter it is about; without a configuration there is none."""
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"no adapter in {directory}: {CONFIG_FILE} is missing")
    try:
        yield
    except InputError as e:
        raise InputError(f"cannot read the adapter in {directory}: {e}") from None


def _said(directory: Path) -> tuple[str, LoraConfig, float]:
    """What an adapter's configuration says: the model's name, where the matrices sit, and alpha.

    Raises InputError if it says anything that :meth:`AdaptedSam.save` does not.
    """
    import peft

    path = own_file(directory / CONFIG_FILE)
    try:
        if path.stat().st_size > HEADER_BYTES:
            raise ValueError("it is too long")
        given = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{CONFIG_FILE}: {e}") from None
    if not isinstance(given, dict):
        raise InputError(f"{CONFIG_FILE} is no object of fields")
    plain = cast(dict[str, Any], peft.LoraConfig().to_dict())  # type: ignore[no-untyped-call]
    for field, value in given.items():
        if field not in _OWN and value != plain.get(field) and value not in (None, False, {}, []):
            raise InputError(f"{CONFIG_FILE}: {field[:100]!r} is not known here, or not with this value")
    base, rank, alpha = given.get("base_model_name_or_path"), given.get("r"), given.get("lora_alpha")
    targets = [t for t, pattern in _TARGETS.items() if pattern == given.get("target_modules")]
    if not isinstance(base, str) or not re.fullmatch(r"[\w.-]{1,100}", base):
        raise InputError(f"{CONFIG_FILE}: base_model_name_or_path is no model's name")
    if len(targets) != 1:
        raise InputError(f"{CONFIG_FILE}: target_modules are not those of an adapter made here")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise InputError(f"{CONFIG_FILE}: r and lora_alpha must be numbers")
    try:
        ratio = float(f"{alpha / max(rank, 1):.12g}")  # without what dividing leaves at the end
        return base, LoraConfig(rank=rank, alpha_ratio=ratio, targets=targets[0]), alpha
    except (InputError, ArithmeticError) as e:
        raise InputError(f"{CONFIG_FILE}: {e}") from None


_WEIGHT = "weight."
"""Before the names of SAM's own weights in an adapter's file."""

_PROMPTS = rf"image_encoder\.pos_embed|{_BLOCK}(attn\.norm|norm1)\.bias"
"""What is added to the encoder's tokens, of each place, and of all places at each block."""

_OWN = ("base_model_name_or_path", "inference_mode", "lora_alpha", "peft_version", "r", "target_modules")
"""Fields of an adapter's configuration that are not PEFT's defaults."""


def _lora_shapes(sam: Sam, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The matrices A and B of each linear layer that has them, by their names in a file."""
    layers = {n: m for n, m in sam.named_modules() if re.fullmatch(_TARGETS[lora.targets], n)}
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = (lora.rank, layer.in_features)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, lora.rank)
    return shapes


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{WEIGHTS_FILE}: crop must be a number, got {text[:100]!r}") from None


def autocast(sam: Sam, compute: ComputeConfig) -> torch.autocast:
    """The precision of forward passes of this model, for a ``with`` statement."""
    kind = sam.pixel_mean.device.type
    half = compute.precision == "bf16" or (
        compute.precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(kind, torch.bfloat16, enabled=half)


def _state(model: peft.PeftModel) -> dict[str, Tensor]:
    import peft

    return cast(dict[str, Tensor], peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def _name(sam: Sam) -> str:
    return str(getattr(sam, "name_or_path", "sam"))


def _peft_config(sam: Sam, lora: LoraConfig) -> peft.LoraConfig:
    import peft

    if lora.targets == "qv" and not isinstance(sam.image_encoder, ImageEncoderViT):
        raise InputError(f"lora.targets qv: {_name(sam)} mixes queries, keys and values; use qkv")
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.alpha_ratio,  # type: ignore[arg-type]
        target_modules=_TARGETS[lora.targets],
        base_model_name_or_path=_name(sam),
    )


def _wrap(sam: Sam, config: peft.LoraConfig, train: Train, seed: int) -> peft.PeftModel:
    """A copy of the SAM's modules that shares all its weights but those that are trained, with fresh LoRA matrices."""
    import peft

    own = {id(p) for p in _own(sam, train).values()}
    shared = {id(t): t for t in (*sam.parameters(), *sam.buffers()) if id(t) not in own}
    body = copy.deepcopy(sam, shared)
    copies = list(_own(body, train).values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast("peft.PeftModel", peft.get_peft_model(body, config))
    for name, p in model.named_parameters():
        if "lora_" not in name:
            continue
        p.requires_grad_("lora" in train)
        if config.target_modules == _TARGETS["qv"] and "lora_B" in name and p.requires_grad:
            p.register_hook(_without_keys)
    for p in copies:
        p.requires_grad_()
    return model


def _copied(model: peft.PeftModel) -> list[nn.Parameter]:
    """The SAM's own weights that are trained, in the order of :func:`_own`."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]


def _own(sam: Sam, train: Train) -> dict[str, nn.Parameter]:
    """The weights of SAM's own that are trained, by name, in the model's order."""
    parts = train.split("+")
    if "norms" in parts:
        norms = (nn.LayerNorm, nn.BatchNorm2d, LayerNorm2d)
        found = {n for n, m in sam.named_modules() if isinstance(m, norms) and not n.startswith("prompt_encoder")}
        return {n: p for n, p in sam.named_parameters() if n.rpartition(".")[0] in found}
    patterns = {"decoder": r"mask_decoder\..*", "encoder": r"image_encoder\..*", "prompts": _PROMPTS}
    chosen = [pattern for part, pattern in patterns.items() if part in parts]
    return {n: p for n, p in sam.named_parameters() if chosen and re.fullmatch(chosen[0], n)}


def _without_keys(gradient: Tensor) -> Tensor:
    """The gradient of a matrix B, [3 C, r] for queries, keys and values, with none for the keys."""
    size = len(gradient) // 3
    return torch.cat([gradient[:size], torch.zeros_like(gradient[size : 2 * size]), gradient[2 * size :]])
