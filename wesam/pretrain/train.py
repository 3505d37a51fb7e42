"""The training of the embedded model: one step, the schedule, what is kept to go on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from wesam.data.scenes import TRAINING, Style
from wesam.errors import InputError
from wesam.pretrain.bank import Bank, Groups
from wesam.pretrain.batch import KINDS, SHARES, Batch, make_batch
from wesam.pretrain.losses import Affinity, all_masks_loss
from wesam.sam.checkpoints import read_weights
from wesam.sam.nano import Shape, build_nano, said_shape
from wesam.sam.promptable import decode_outputs, encode

WARMUP = 200
"""Steps over which the learning rate rises."""

BALANCED = 4000
"""New weights stay at empty masks unless inside and outside count the same; over these steps that fades."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What makes a run: with the same options, the same seed gives the same weights."""

    seed: int = 0
    batch: int = 8
    """Images a step, over all processes."""
    prompts: int = 6
    """Instances of an image a step."""
    fresh: int = 2
    """New scenes a step, over all processes."""
    bank: int = 3000
    """Scenes kept to draw from."""
    lr: float = 2e-3
    affinity: float = 0.5
    """Weight of the loss that tells instances apart in the embedding."""
    multimask: float = 0.5
    """Weight of the loss of the best of SAM's three outputs for prompts in doubt."""
    zoomed: float = 0.5
    """Share of the images that show a part of a scene, turned by any angle and enlarged or shrunk."""
    plain: bool = False
    """Scenes as those of the clean domain, without all that ``TRAINING`` adds."""
    steps: int = 20000
    """Steps at most."""
    cooldown: float = 0.4
    """The learning rate falls to zero over this share of the steps before."""
    patience: int = 5
    """Evaluations without a gain of ``gain`` after which the rate begins to fall."""
    gain: float = 0.002
    every: int = 500
    """Steps between evaluations."""
    shape: Shape = field(default_factory=Shape)


class Training(nn.Module):
    """All that is trained: the model and the head that only training needs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sam: Sam = build_nano(shape)
        self.affinity = Affinity(shape.channels)


@dataclass
class Schedule:
    """The learning rate's factor: rises, holds, and falls to zero once the scores stand still or steps run out."""

    options: Options
    falls_from: int | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The number of steps after which the run is over, as far as is known."""
        if self.falls_from is None:
            return self.options.steps
        return min(self.options.steps, math.ceil(self.falls_from * (1 + self.options.cooldown)))

    def factor(self, step: int) -> float:
        """The factor at this step."""
        begin, end = self._fall()
        return min(1.0, (step + 1) / WARMUP, max(0.0, (end - step) / max(1, end - begin)))

    def seen(self, step: int, score: float) -> None:
        """Takes note of a score after ``step`` steps, higher is better."""
        self.scores.append(score)
        p = self.options.patience
        still = len(self.scores) > p and max(self.scores[-p:]) < max(self.scores[:-p]) + self.options.gain
        if self.falls_from is None and still and step < self._fall()[0]:
            self.falls_from = step

    def _fall(self) -> tuple[int, int]:
        latest = round(self.options.steps / (1 + self.options.cooldown))
        return (latest, self.options.steps) if self.falls_from is None else (self.falls_from, self.end)


class Trainer:
    """A run that can be saved after any step and goes on from there."""

    def __init__(
        self, options: Options, device: torch.device, workers: int, saved: Path | None = None, start: Path | None = None
    ) -> None:
        """workers: processes that make scenes. saved: a checkpoint to go on from. start: weights to begin with, of a
        model that differs in the size of its input at most.
        """
        self.options, self.device = options, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(options.seed)
        self.model = Training(options.shape).to(device)
        self._trained = start is not None
        if start and not saved:
            self.model.sam.load_state_dict(resized(read_weights(start), self.model.sam))
        self.average = AveragedModel(self.model.sam, avg_fn=_latest, use_buffers=False)
        self.optimizers = optimizers(self.model, options.lr)
        self.schedule = Schedule(options)
        self.step = 0
        if saved:
            self._load(torch.load(saved, map_location=device, weights_only=True))
        style = Style() if options.plain else TRAINING
        count = options.fresh // self.world or 1
        groups = Groups(options.seed, count, options.shape.side, style, self.rank, self.world)
        self._bank = Bank(groups, max(1, options.bank // options.fresh), self.step, workers, device)

    def run(self, until: int) -> Iterator[Tensor]:
        """Trains up to this step; yields each step's loss, a scalar on the device."""
        while self.step < until:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.options.lr * self.schedule.factor(self.step)
            rng = np.random.default_rng([self.options.seed, 9, self.step, self.rank])
            scenes = self._bank.draw(self.step, self.options.batch // self.world or 1, rng)
            # all processes have prompts of one kind, as they must have gradients for the same parameters
            kind = KINDS[int(np.random.default_rng([self.options.seed, 10, self.step]).choice(len(KINDS), p=SHARES))]
            loss = self.loss(make_batch(*scenes, kind, self.options.prompts, self.options.zoomed, rng), rng)
            loss.backward()
            self._share_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.average.update_parameters(self.model.sam)
            self.step += 1
            yield loss.detach()

    def loss(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """The loss of a batch, with its graph."""
        sam, shape = self.model.sam, self.options.shape
        truth = F.avg_pool2d(batch.truth.float(), shape.patch // 4)
        with torch.autocast(self.device.type, torch.bfloat16):
            embedding = encode(sam, batch.images)
            logits, iou = decode_outputs(sam, embedding, batch.prompts, 4 if self.options.multimask else 1)
        balance = 1.0 - 0.8 * (1.0 if self._trained else min(1.0, self.step / BALANCED))
        loss = all_masks_loss(logits.float(), iou.float(), truth, balance, self.options.multimask)
        if self.options.affinity:
            loss = loss + self.options.affinity * self.model.affinity(embedding.float(), batch.labels, rng)
        return loss

    def save(self, folder: Path) -> None:
        """Writes ``checkpoint.pt`` to go on from and ``nano.safetensors``, the averaged weights in half precision."""
        state = {
            "options": dataclasses.asdict(self.options),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "falls_from": self.schedule.falls_from,
            "scores": self.schedule.scores,
        }
        torch.save(state, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
        half = {k: v.half().cpu().contiguous() for k, v in self.average.module.state_dict().items()}
        save_file(half, folder / "nano.safetensors", said_shape(self.options.shape))

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.schedule = Schedule(self.options, state["falls_from"], state["scores"])
        self.step = state["step"]

    def _share_gradients(self) -> None:
        """Averages the gradients over the processes, all in one message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g) / self.world)


def _latest(average: Tensor, now: Tensor, count: Tensor | int) -> Tensor:
    """The average of about the latest thousand steps; of fewer in the beginning, lest the first weights stay in it."""
    return average.lerp(now, 1 - min(0.999, (1 + int(count)) / (10 + int(count))))


def resized(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """Weights of a nano for another size of its input: the positions [1, g, g, C] of the tokens are interpolated.

    Raises InputError if the models differ in more than that.
    """
    key, wanted = "image_encoder.pos_embed", {k: v.shape for k, v in sam.state_dict().items()}
    if key in state and state[key].ndim == 4:
        positions = F.interpolate(state[key].permute(0, 3, 1, 2), wanted[key][1:3], mode="bicubic", antialias=True)
        state = {**state, key: positions.permute(0, 2, 3, 1)}
    if {k: v.shape for k, v in state.items()} != wanted:
        raise InputError(
            "the weights to begin with are of a model of another shape: give the same --set shape. options"
        )
    return state


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        hidden = ("blocks" in name or "transformer" in name) and p.ndim == 2
        (matrices if hidden else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
