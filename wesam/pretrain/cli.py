"""Trains the embedded model on procedural scenes alone.

The same seed sees the same scenes and prompts. DIR then holds nano.safetensors (the weights, as wesam uses them),
curve.csv (the scores beside those of what needs no model) and checkpoint.pt, from which the same command goes on
where it stopped. The run ends by itself: once the scores stand still the learning rate falls to zero, and that is it.
On several GPUs: torchrun --nproc-per-node N -m wesam.pretrain ...
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.distributed as dist

from wesam.console import Parser
from wesam.data import load_domain
from wesam.errors import InputError, unknown
from wesam.evaluate import baseline, evaluate
from wesam.pretrain.batch import KINDS
from wesam.pretrain.train import Options, Trainer
from wesam.sam.nano import Shape


def main(arguments: list[str] | None = None) -> None:
    """Trains, from the command line."""
    parser = Parser(
        prog="python -m wesam.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all that the run leaves")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="; ".join(f"{k} ({v})" for k, v in _flat(Options()).items()),
    )  # fmt: skip
    parser.add_argument(
        "--watch", action="append", metavar="D",
        help="domain whose val split is scored, again for more; none is ever trained on (clean)",
    )  # fmt: skip
    parser.add_argument(
        "--start",
        type=Path,
        metavar="WEIGHTS",
        help="begin with these, of a model whose input may be smaller or larger",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=(os.cpu_count() or 2) - 1, help="processes that make scenes")
    args = parser.parse_args(arguments)
    options = _changed(Options(), args.set)
    watched = [load_domain(name) for name in args.watch or ["clean"]]
    args.out.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    stop_at = time.monotonic() + 60 * args.minutes
    with _processes(args.device) as device:
        saved = args.out / "checkpoint.pt"
        trainer = Trainer(options, device, args.workers, saved if saved.exists() else None, args.start)
        first = trainer.rank == 0
        if first:
            names = f"{sum(p.numel() for p in trainer.model.sam.parameters()) / 1e6:.2f} million parameters"
            print(f"{names}, {device}, from step {trainer.step}", flush=True)
        splits = [d.split("val") for d in watched]
        ellipses = [baseline("ellipse", s).objective for s in splits] if first else []
        losses: list[torch.Tensor] = []
        began, begun_at = time.monotonic(), trainer.step
        late = False
        while trainer.step < trainer.schedule.end and not late:
            until = min(trainer.schedule.end, (trainer.step // options.every + 1) * options.every)
            for loss in trainer.run(until):
                losses.append(loss)
                if trainer.step % 100 == 0 or trainer.step == until:
                    value = _finite(losses, trainer.step)
                    pace = (time.monotonic() - began) / (trainer.step - begun_at)
                    if first:
                        end = trainer.schedule.end
                        print(f"step {trainer.step}/{end}  loss {value:.3f}  {pace:.3f} s/step", flush=True)
                if trainer.step % 20 == 0 and (late := _agreed(time.monotonic() >= stop_at)):
                    break
            if trainer.step == until:
                score = 0.0
                if first:
                    row: dict[str, float] = {"step": trainer.step, "loss": _finite(losses, trainer.step)}
                    for domain, split, ellipse in zip(watched, splits, ellipses, strict=True):
                        row |= _scores(trainer, domain.name, split, ellipse)
                    models = [v for k, v in row.items() if k.endswith(KINDS)]
                    score = sum(models) / len(models)
                    _append(args.out / "curve.csv", row)
                    print("  ".join(f"{k} {v:.3f}" for k, v in list(row.items())[2:]), flush=True)
                trainer.schedule.seen(trainer.step, _agreed(score))
                losses.clear()
            if first:
                trainer.save(args.out)
        if first and trainer.step < trainer.schedule.end:
            print(f"stopped at step {trainer.step}: the same command goes on from there", flush=True)


def _scores(trainer: Trainer, name: str, split: Any, ellipse: float) -> dict[str, float]:
    """The averaged model's mIoU on a split, by kind of prompt, beside the ellipse's."""
    model = trainer.average.module.eval()
    found = {str(k): evaluate(model, split, k).objective for k in KINDS}
    return {f"{name} {k}": v for k, v in {"ellipse": ellipse, **found}.items()}


def _agreed(value: Any) -> Any:
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def _finite(losses: list[torch.Tensor], step: int) -> float:
    """The mean of the latest losses."""
    value = float(torch.stack(losses[-100:]).mean())
    if not math.isfinite(value):
        raise FloatingPointError(f"loss is {value} at step {step}: start again with a lower lr")
    return value


@contextmanager
def _processes(name: str) -> Iterator[torch.device]:
    """Joins the others if torchrun has started several; the device that this process trains on."""
    if "WORLD_SIZE" not in os.environ:
        yield torch.device(name)
        return
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(name, local) if name == "cuda" else torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _flat(options: Options) -> dict[str, Any]:
    """The options by name, those of the shape as ``shape.name``."""
    flat = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "shape"}
    return flat | {f"shape.{k}": v for k, v in dataclasses.asdict(options.shape).items()}


def _changed(options: Options, assignments: list[str]) -> Options:
    """The options changed by texts of the form NAME=VALUE."""
    flat = _flat(options)
    for text in assignments:
        name, sep, value = text.partition("=")
        if not sep or name not in flat:
            raise unknown("option", name, flat) if sep else InputError(f"expected NAME=VALUE, got {text!r}")
        try:
            flat[name] = _read(value, type(flat[name]))
        except ValueError:
            raise InputError(f"{name}: cannot read {value!r} as {type(flat[name]).__name__}") from None
    shape = {k.removeprefix("shape."): flat.pop(k) for k in list(flat) if k.startswith("shape.")}
    return Options(**flat, shape=Shape(**shape))


def _read(text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return tuple(int(x) for x in text.split(",")) if kind is tuple else kind(text)


def _append(path: Path, row: dict[str, float]) -> None:
    """Adds a row to a CSV file, with a header where it is new."""
    fresh = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow({k: f"{v:.5g}" for k, v in row.items()})
