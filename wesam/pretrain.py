"""Trains the embedded model on procedural scenes alone: ``python -m wesam.pretrain --out DIR``.

Runs on a CPU or a GPU, goes on from DIR where it stopped, and writes the curve to DIR/curve.csv. The same seed sees
the same scenes and prompts. The learning rate holds after warm-up and falls to zero over the last ``--cooldown``
share of the steps, so that a run may be lengthened by starting it again with more ``--steps``.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from wesam.config import PromptKind
from wesam.console import Parser, guarded
from wesam.data.procedural import procedural
from wesam.data.scenes import scene
from wesam.evaluate import baseline, evaluate
from wesam.prompts import Prompts, weak_labels
from wesam.sam.nano import SIDE, build_nano
from wesam.sam.promptable import decode, encode

KINDS: tuple[PromptKind, ...] = ("box", "point", "coarse")
SHARES = (0.42, 0.43, 0.15)
"""How often each kind of prompt is trained."""

BANK = 3000
"""Scenes kept; each is used a few times, mirrored, turned and recoloured."""

FRESH = 2
"""New scenes a step."""


class SceneBank:
    """The latest scenes; a pure function of the seed and the step, so that a resumed run sees the same ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._scenes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def sample(self, step: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Images uint8 [3, h, w] and masks bool [N, h, w] for this step."""
        last = 256 + FRESH * step
        first = max(0, last - BANK)
        for old in [i for i in self._scenes if i < first]:
            del self._scenes[old]
        for i in range(first, last):
            if i not in self._scenes:
                self._scenes[i] = self._make(i)
        rng = np.random.default_rng([self._seed, 7, step])
        return [self._augment(rng, *self._scenes[int(i)]) for i in rng.integers(first, last, count)]

    def _make(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._seed, 8, index])  # domains use other first words: no scene is shared
        height, width = SIDE, SIDE
        if rng.random() < 0.35:  # an image that is not square is padded
            height, width = (
                (SIDE, int(rng.integers(112, SIDE))) if rng.random() < 0.5 else (int(rng.integers(112, SIDE)), SIDE)
            )
        return scene(rng, height, width)

    @staticmethod
    def _augment(rng: np.random.Generator, image: np.ndarray, masks: np.ndarray) -> tuple[Tensor, Tensor]:
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        image, masks = np.rot90(image, turns), np.rot90(masks, turns, axes=(1, 2))
        if mirrored:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
        image = image[..., rng.permutation(3)]
        if rng.random() < 0.2:
            image = 255 - image
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(masks.copy())


def drawn_prompts(rng: np.random.Generator, masks: Tensor, kind: PromptKind) -> Prompts:
    """Prompts as imprecise as a person's: jittered boxes; clicks; coarse polygons."""
    prompts = weak_labels(masks, kind, str(rng.integers(2**62)))
    if prompts.boxes is None:
        return prompts
    size = (prompts.boxes[:, 2:] - prompts.boxes[:, :2]).repeat(1, 2)
    noise = torch.from_numpy(rng.normal(0, 0.05, size.shape).astype(np.float32)) * (rng.random() < 0.6)
    return Prompts(boxes=prompts.boxes + (noise * size).clamp(-10, 10))


def fewer_clicks(rng: np.random.Generator, prompts: Prompts) -> Prompts:
    """Sometimes fewer than all clicks, the same number for every instance of a batch."""
    if prompts.points is None or prompts.point_labels is None or rng.random() < 0.5:
        return prompts
    half = prompts.points.shape[1] // 2
    keep = [*range(int(rng.integers(1, half + 1))), *range(half, half + int(rng.integers(0, half + 1)))]
    return Prompts(points=prompts.points[:, keep], point_labels=prompts.point_labels[:, keep])


def mask_loss(logits: Tensor, iou: Tensor, truth: Tensor, balance: float) -> Tensor:
    """10 focal + dice + squared error of the IoU head, and a class-balanced cross-entropy of weight ``balance``.

    logits, truth: [N, m, m], truth in 0..1 (the covered share of each cell). The balanced term averages inside, near
    and far background apart: without it a new model stays at empty masks.
    """
    ce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    inside = truth
    near = (F.max_pool2d(truth[:, None], 13, 1, 6)[:, 0] > 0.5).float() * (1 - truth)
    far = (1 - near) * (1 - truth)
    shares = [(ce * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (inside, near, far)]
    p = logits.sigmoid()
    missed = (p - truth).abs()
    focal = (ce * missed**2).mean((1, 2))
    dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
    with torch.no_grad():
        hit, real = logits > 0, truth > 0.5
        actual = (hit & real).sum((1, 2)) / (hit | real).sum((1, 2)).clamp(min=1)
    balanced = (2 * shares[0] + 2 * shares[1] + shares[2]) / 5
    return (10 * focal + dice + balance * balanced + (iou - actual) ** 2).mean()


def train_step(
    net: nn.Module, bank: SceneBank, step: int, steps: int, batch: int, per_image: int, seed: int, device: torch.device
) -> Tensor:
    """The loss of one step, with its graph."""
    rng = np.random.default_rng([seed, 9, step])
    kind = KINDS[int(rng.choice(len(KINDS), p=SHARES))]
    images, prompts, truths = [], [], []
    for image, masks in bank.sample(step, batch):
        chosen = masks[torch.from_numpy(rng.permutation(len(masks))[:per_image])]
        images.append(image)
        prompts.append(drawn_prompts(rng, chosen, kind))
        padded = F.pad(chosen.float(), (0, SIDE - chosen.shape[2], 0, SIDE - chosen.shape[1]))
        truths.append(F.avg_pool2d(padded, 2))
    few = int(rng.integers(2**31))
    prompts = [fewer_clicks(np.random.default_rng(few), p) for p in prompts]
    with torch.autocast(device.type, torch.bfloat16):
        out = decode(net, encode(net, images), prompts)
    balance = 1.0 - 0.8 * min(1.0, step / (0.4 * steps))
    return mask_loss(out.logits.float(), out.iou.float(), torch.cat(truths).to(device), balance)


def optimizers(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in net.named_parameters():
        hidden = ("blocks" in name or "transformer" in name) and p.ndim == 2
        (matrices if hidden else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def rate(step: int, steps: int, cooldown: float) -> float:
    """The learning rate's factor: warm-up over 200 steps, constant, then down to zero."""
    return min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (cooldown * steps)))


def main(arguments: list[str] | None = None) -> None:
    """Trains, from the command line."""
    parser = Parser(prog="python -m wesam.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and weights")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--prompts", type=int, default=5, help="instances of an image a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--cooldown", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations and checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    net = build_nano().to(device)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=False
    )
    optims = optimizers(net, args.lr)
    checkpoint = args.out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        for o, s in zip(optims, state["optims"], strict=True):
            o.load_state_dict(s)
        start = state["step"]
        print(f"going on from step {start}", flush=True)
    bank = SceneBank(args.seed)
    val = procedural("clean").split("val")
    ellipse = baseline("ellipse", val).miou
    losses: list[float] = []
    began = time.monotonic()
    for step in range(start, args.steps):
        factor = rate(step, args.steps, args.cooldown)
        for o in optims:
            for group in o.param_groups:
                group["lr"] = args.lr * factor
        loss = train_step(net, bank, step, args.steps, args.batch, args.prompts, args.seed, device)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for o in optims:
            o.step()
            o.zero_grad()
        average.update_parameters(net)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"loss is {losses[-1]} at step {step}: lower --lr and start again from {checkpoint}"
            )
        done = step + 1
        if done % 100 == 0:
            pace = (time.monotonic() - began) / (done - start)
            print(f"step {done}/{args.steps}  loss {np.mean(losses[-100:]):.3f}  {pace:.2f} s/step", flush=True)
        if done % args.every == 0 or done == args.steps:
            scores = {"ellipse": ellipse} | {str(k): evaluate(average.module, val, k).miou for k in KINDS}
            _append(args.out / "curve.csv", {"step": done, "loss": float(np.mean(losses[-args.every :])), **scores})
            print("val mIoU  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
            torch.save(
                {"net": net.state_dict(), "average": average.state_dict(), "step": done,
                 "optims": [o.state_dict() for o in optims]}, checkpoint.with_suffix(".tmp"),
            )  # fmt: skip
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            half = {k: v.half().contiguous() for k, v in average.module.state_dict().items()}
            save_file(half, args.out / "nano.safetensors")


def _append(path: Path, row: dict[str, float]) -> None:
    """Adds a row to a CSV file, with a header where it is new."""
    fresh = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(guarded(main))
