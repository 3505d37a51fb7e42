"""One frozen SAM in memory, seen three ways: as anchor, as teacher and as student.

The anchor is the SAM itself. Student and teacher are copies of its modules, but not of its weights, with LoRA
matrices from PEFT: adapting adds a fraction of a percent to the memory, and nothing is switched on or off.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import cast

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn

from wesam.config import ComputeConfig, Config, LoraConfig, Targets
from wesam.errors import InputError
from wesam.sam.attention import checkpoint_blocks

_BLOCK = r"image_encoder\.(stages\.\d+\.)?blocks\.\d+\."  # of SAM's ViT, and of TinyViT
_TARGETS: dict[Targets, str] = {
    "qkv": _BLOCK + r"attn\.qkv",
    "attention": _BLOCK + r"attn\.(qkv|proj)",
    "encoder": _BLOCK + r"(attn\.(qkv|proj)|mlp\.(lin|fc)[12])",
    "encoder+decoder": _BLOCK
    + r"(attn\.(qkv|proj)|mlp\.(lin|fc)[12])|mask_decoder\.transformer\..*(q_proj|k_proj|v_proj|out_proj|lin[12])",
}
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class AdaptedSam:
    """A SAM with a student's LoRA on it and, if wanted, a teacher's.

    sam: the frozen source model; it is shared and never changed. lora: where the matrices sit. teacher: whether the
    teacher has matrices of its own, a moving average; otherwise it is the student. seed: of the matrices A. crop:
    how it sees a prompt, as :func:`wesam.predict` has it. compute: how the steps of training are computed.
    """

    def __init__(
        self, sam: Sam, lora: LoraConfig, *, teacher: bool = False, seed: int = 0, crop: float = 0.0,
        compute: ComputeConfig | None = None,
    ) -> None:  # fmt: skip
        self.anchor = sam
        self.crop = crop
        self.compute = compute or ComputeConfig()
        self._peft = _wrap(sam, _peft_config(sam, lora), seed)
        self._teacher = _wrap(sam, _peft_config(sam, lora), seed) if teacher else self._peft
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
        """The student's LoRA matrices, always in the same order."""
        return [p for n, p in self._peft.named_parameters() if "lora_" in n]

    def teacher_parameters(self) -> list[nn.Parameter]:
        """The teacher's LoRA matrices, in the same order."""
        return [p for n, p in self._teacher.named_parameters() if "lora_" in n]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the teacher: its matrices become decay * teacher + (1 - decay) * student."""
        if self._teacher is not self._peft:
            for t, s in zip(self.teacher_parameters(), self.trainable(), strict=True):
                t.lerp_(s, 1 - decay)

    def merged(self) -> Sam:
        """A plain SAM with the student's matrices added to its weights: what inference costs is unchanged.

        A plain SAM knows of no crop: give :func:`wesam.predict` this model's.
        """
        return cast(Sam, copy.deepcopy(self._peft).merge_and_unload())

    def save(self, directory: Path) -> None:
        """Writes the student in PEFT's format: adapter_config.json and adapter_model.safetensors, which holds crop."""
        directory.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._peft.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(str(directory))
        state = {k: v.contiguous() for k, v in _state(self._peft).items()}
        save_file(state, directory / WEIGHTS_FILE, {"crop": str(self.crop)})

    @classmethod
    def load(cls, sam: Sam, directory: Path) -> AdaptedSam:
        """The adapter that :meth:`save` wrote, on the same SAM; raises InputError if it is none or another SAM's."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise InputError(f"no adapter in {directory}: {name} is missing")
        try:
            config = peft.LoraConfig.from_pretrained(str(directory))
            state = load_file(directory / WEIGHTS_FILE)
            with safe_open(directory / WEIGHTS_FILE, "pt") as f:
                crop = float((f.metadata() or {}).get("crop", 0))
        except (OSError, ValueError, TypeError, SafetensorError) as e:
            raise InputError(f"cannot read the adapter in {directory}: {e}") from None
        if config.base_model_name_or_path != _name(sam):
            wanted = config.base_model_name_or_path
            raise InputError(f"the adapter in {directory} is for the model {wanted}, not {_name(sam)}")
        config.inference_mode = False
        self = cls.__new__(cls)
        self.anchor, self.crop, self.compute = sam, Config(crop=crop).crop, ComputeConfig()
        self._peft = self._teacher = _wrap(sam, config, 0)
        expected = {
            k: v.shape for k, v in peft.get_peft_model_state_dict(self._peft, save_embedding_layers=False).items()
        }
        if {k: v.shape for k, v in state.items()} != expected:
            raise InputError(f"the adapter in {directory} does not fit its own configuration: names or shapes differ")
        peft.set_peft_model_state_dict(self._peft, state)
        return self


def made_for(directory: Path) -> str:
    """The name of the model that the adapter in a folder is for, as :func:`wesam.load_sam` knows it.

    Whether it has the very weights, :meth:`AdaptedSam.load` sees. Raises InputError if no model is named.
    """
    try:
        name = json.loads((directory / CONFIG_FILE).read_text())["base_model_name_or_path"]
        return str(name).partition("-")[0]
    except FileNotFoundError:
        raise InputError(f"no adapter in {directory}: {CONFIG_FILE} is missing") from None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise InputError(f"cannot read the adapter in {directory}: {e}") from None


def autocast(sam: Sam, compute: ComputeConfig) -> torch.autocast:
    """The precision of forward passes of this model, for a ``with`` statement."""
    kind = sam.pixel_mean.device.type
    half = compute.precision == "bf16" or (
        compute.precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(kind, torch.bfloat16, enabled=half)


def _state(model: peft.PeftModel) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def _name(sam: Sam) -> str:
    return str(getattr(sam, "name_or_path", "sam"))


def _peft_config(sam: Sam, lora: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank * lora.alpha_ratio,  # type: ignore[arg-type]
        target_modules=_TARGETS[lora.targets],
        base_model_name_or_path=_name(sam),
    )


def _wrap(sam: Sam, config: peft.LoraConfig, seed: int) -> peft.PeftModel:
    """A copy of the SAM's modules that shares all its weights, with fresh LoRA matrices."""
    shared = {id(t): t for t in (*sam.parameters(), *sam.buffers())}
    body = copy.deepcopy(sam, shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(peft.PeftModel, peft.get_peft_model(body, config))
