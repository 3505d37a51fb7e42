"""How long one step of an adaptation takes, of what, and how much memory: ``wesam bench step``."""

from __future__ import annotations

import os
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from wesam.adapt import train
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods import Batch, get_method
from wesam.prompts import Prompts

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12}
"""Operations a second in half precision, dense, as NVIDIA states them, by a word of a GPU's name."""


@dataclass(frozen=True)
class StepBench:
    """What a step costs; all in fp32 on a CPU, on a GPU as ``compute.precision`` says."""

    seconds: float
    """Median of the steps."""
    tflop: float
    """Floating-point operations of a step, in units of 1e12, as PyTorch counts them."""
    peak_gib: float
    """On a GPU the most memory allocated, on a CPU the most that the process held, in GiB."""
    parts: dict[str, float]
    """Shares of a step, which add up to 1: teacher, student (their encoders), decoder, losses, backward, optimizer."""
    of_peak: float | None
    """On a GPU that is known: operations a second as a share of what the chip can do in half precision."""


def bench_step(
    sam: Sam, config: Config, instances: int, steps: int, watch: Callable[[str], None] = lambda _: None
) -> StepBench:
    """Measures steps of an adaptation on random images with random boxes, on the SAM's device.

    Speed does not depend on what the weights and images are. watch: called with a line on what is going on.
    """
    device = sam.pixel_mean.device
    gpu = device.type == "cuda"
    method = get_method(config.method)
    model = AdaptedSam(
        sam, config.lora, train=config.train, teacher=config.teacher.decay > 0, seed=config.seed, crop=config.crop,
        compute=config.compute,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.trainable(), config.optim.lr)
    batch = random_batch(sam, config.optim.batch_size, instances)

    def step() -> float:
        began = time.perf_counter()
        train(model, optimizer, batch, method, config)
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    watch("first step ...")
    step()
    seconds = []
    for i in range(steps):
        seconds.append(step())
        watch(f"step {i + 1} of {steps}: {seconds[-1]:.3f} s")
    peak = torch.cuda.max_memory_allocated(device) if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    watch("counting operations and parts ...")
    parts = _parts(step, gpu)
    with FlopCounterMode(display=False) as counter:
        step()
    median, flop = statistics.median(seconds), counter.get_total_flops()
    name = torch.cuda.get_device_name(device) if gpu else ""
    chip = next((v for k, v in PEAKS.items() if k in re.split(r"[\s-]", name)), None)
    return StepBench(median, flop / 1e12, peak / 2**30, parts, flop / median / chip if chip else None)


def random_batch(sam: Sam, size: int, instances: int) -> Batch:
    """Images of noise that fill the model's input, each with as many boxes of a third of its side."""
    generator = torch.Generator().manual_seed(0)
    side, grid = sam.image_encoder.img_size, sam.prompt_encoder.image_embedding_size[0]
    cells, total, device = 4 * grid, size * instances, sam.pixel_mean.device
    views = [
        [torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8).to(device) for _ in range(size)]
        for _ in range(2)
    ]
    corners = torch.rand(size, instances, 2, generator=generator) * 0.6 * side
    boxes = torch.cat([corners, corners + 0.3 * side], 2)
    masks = torch.rand(total, cells, cells, generator=generator) < 0.5
    features = torch.randn(total, sam.prompt_encoder.embed_dim, generator=generator)
    image = torch.arange(size).repeat_interleave(instances)

    def on(x: Tensor) -> Tensor:
        return x.to(device)

    prompts = [Prompts(boxes=b) for b in boxes]
    return Batch(
        views[0], views[1], prompts, prompts, on(image), on(masks), on(features), on(masks).float(), side / cells
    )


def _parts(step: Callable[[], float], gpu: bool) -> dict[str, float]:
    """The shares of a step's parts, from a step under PyTorch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports on stderr that there is no GPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    found: dict[str, list[float]] = {}
    for event in sorted(profiler.events(), key=lambda e: e.time_range.start):
        if event.name.startswith("wesam.") and (str(event.device_type).endswith("CUDA") == gpu):
            found.setdefault(event.name.removeprefix("wesam."), []).append(float(event.time_range.elapsed_us()))
    encoders, decoders = found["encode"], found["decode"]
    teacher = encoders[0] if len(encoders) > 1 else 0.0
    student = sum(encoders) - teacher
    times = {
        "teacher": teacher, "student": student, "decoder": sum(decoders),
        "losses": sum(found["losses"]) - sum(encoders) - sum(decoders),
        "backward": sum(found["backward"]), "optimizer": sum(found["optimizer"]),
    }  # fmt: skip
    total = sum(times.values())
    return {k: v / total for k, v in times.items()}
