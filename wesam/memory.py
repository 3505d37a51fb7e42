"""How much memory a step needs on a GPU, reckoned on any machine: ``wesam bench memory``.

The step runs on tensors that have a shape but no content, with the kernels that a GPU would use, and whatever it
allocates and frees is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wesam.adapt import backward
from wesam.adapters import AdaptedSam
from wesam.bench import random_batch
from wesam.config import Config
from wesam.methods import get_method
from wesam.sam.attention import as_on_a_gpu


def reckon(build: Callable[[], Sam], config: Config, instances: int) -> float:
    """The most that a step's tensors take on a GPU at a time, in GiB.

    build: makes the SAM. instances: prompts an image, of boxes. Not counted: CUDA's own half a gigabyte or more, what
    its kernels use inside, and what an allocator cannot fill.
    """
    config = config.replace({"compute.compile": False})
    with torch.device("meta"):
        sam = build().eval().requires_grad_(False)
        sam.name_or_path = "without content"
        model = AdaptedSam(
            sam, config.lora, train=config.train, teacher=config.teacher.decay > 0, compute=config.compute
        )
    with FakeTensorMode(), as_on_a_gpu():
        emptied: dict[int, Tensor] = {}
        for part in (sam, model.sam, model.teacher):
            _empty(part, emptied)
        lora = sum(p.numel() * p.element_size() for p in model.trainable())
        batch = random_batch(sam, config.optim.batch_size, instances)
        live = _Live(sum(t.numel() * t.element_size() for t in emptied.values()))
        with live:
            backward(model, batch, get_method(config.method), config)
    return (live.most + 2 * lora) / 2**30  # Adam's two averages


def relief(build: Callable[[], Sam], config: Config) -> str:
    """What would take less memory, and how much, for a person whose GPU was too small."""
    now = reckon(build, config, config.max_instances)
    changes: list[dict[str, int | bool]] = []
    if config.optim.batch_size > 1:
        changes.append({"optim.batch_size": config.optim.batch_size // 2})
    if config.max_instances > 1:
        changes.append({"max_instances": config.max_instances // 2})
    if not config.compute.checkpointing:
        changes.append({"compute.checkpointing": True})
    options = []
    for change in changes:
        other = config.replace(change)
        ((name, value),) = change.items()
        text = f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        options.append(f"{text} about {reckon(build, other, other.max_instances):.1f} GiB")
    return f"a step takes about {now:.1f} GiB; with " + ", with ".join(options)


def _empty(module: nn.Module, done: dict[int, Tensor]) -> None:
    """Puts tensors without content in the place of the module's."""
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for kept in tables:
            for name, old in kept.items():
                if old is None or isinstance(old, FakeTensor):
                    continue
                if id(old) not in done:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    done[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                kept[name] = done[id(old)]


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self, before: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = before
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._storages:
                    self._storages.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self.now -= size
