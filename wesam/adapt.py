"""The adaptation of a SAM to a domain, as a generator: whoever drives it decides where the reports go.

Inside a ``torch.distributed`` process group every worker runs this same loop on its share of each step's images, and
gradients are summed once a step; the result does not depend on the number of workers beyond rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor
from torch.profiler import record_function

from wesam.adapters import AdaptedSam, made_for
from wesam.anchor import Anchor, Memory
from wesam.config import Config, Objective
from wesam.data.domain import Domain
from wesam.errors import InputError
from wesam.evaluate import Scores, measure
from wesam.methods import Batch, Method, checked_method
from wesam.sam.checkpoints import read_tensors
from wesam.views import flip, strong

STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class Report:
    """What is known after a step."""

    step: int
    """Steps done; 0 is the report before the first, whose scores are those of the source model (Direct)."""
    steps: int
    losses: dict[str, float]
    """Each weighted loss and their ``total``, averaged over the step's images; empty at step 0."""
    seconds: float
    """Time of this step without its evaluation."""
    waited: float
    """Seconds of it until the step's images, prompts and anchor's answers were there."""
    val: Scores | None
    """Scores on val, at step 0, every ``eval_every`` steps and at the last one; None in between."""
    model: AdaptedSam = field(repr=False)
    """The model as it is now; it goes on changing."""
    optimizer: torch.optim.Adam = field(repr=False)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint, an adapter with its optimiser, from which ``resume`` goes on, on a CPU bit by bit."""
        self.model.save(directory)
        state: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for i, p in enumerate(self.model.trainable()):
            state |= {f"{k}.{i}": v for k, v in self.optimizer.state.get(p, {}).items()}
        state |= {f"teacher.{i}": p.detach().clone() for i, p in enumerate(self.model.teacher_parameters())}
        save_file(state, directory / STATE_FILE)


def adapt(
    sam: Sam, domain: Domain, config: Config, *, resume: Path | None = None, direct: Scores | None = None,
    label_free: bool = False,
) -> Iterator[Report]:  # fmt: skip
    """Adapts the SAM to the domain's train split; yields a report before the first step and after every one.

    sam: the frozen source model, never changed. resume: a folder written by :meth:`Report.save` under the same
    configuration; reports are then of the steps after it alone, and none if it was the last. direct: the source model's
    scores on val, if known, to save computing them again. label_free: whether the scores on val are to have the
    label-free one where there are true masks, too.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.optim.batch_size < world:
        raise InputError(f"optim.batch_size {config.optim.batch_size} is less than the {world} workers that share it")
    method = checked(domain, config)
    decay = config.teacher.decay
    model = AdaptedSam(
        sam, config.lora, train=config.train, teacher=decay > 0, seed=config.seed, crop=config.crop,
        compute=config.compute,
    )  # fmt: skip
    parameters = model.trainable()
    optimizer = torch.optim.Adam(parameters, config.optim.lr, weight_decay=config.optim.weight_decay)
    anchor = _anchor(sam, domain, config)
    val = domain.scored("val", config.val_instances)

    def scores() -> Scores:
        mine = val if world == 1 else val[rank::world]
        return _gathered(measure(model, mine, config.scored_with, label_free=label_free), len(val))

    done = _restore(resume, model, optimizer) if resume else 0
    if not 0 <= done <= config.steps:
        raise InputError(f"cannot go on from {resume}: it is from step {done} of {config.steps}")
    if done == 0:
        yield Report(0, config.steps, {}, 0.0, 0.0, direct or scores(), model, optimizer)
    for step in range(done, config.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * warmup(step, config)
        batch = draw(anchor, config, step, method, rank, world)
        waited = time.perf_counter() - began
        try:
            named = train(model, optimizer, batch, method, config)
        except FloatingPointError as e:
            raise FloatingPointError(f"{e}, at step {step + 1}: lower optim.lr or optim.clip_norm") from None
        except torch.OutOfMemoryError:
            raise torch.OutOfMemoryError(_too_much(sam, config, step)) from None
        seconds = time.perf_counter() - began
        last = step + 1 == config.steps
        found = scores() if last or (step + 1) % config.eval_every == 0 else None
        yield Report(step + 1, config.steps, named, seconds, waited, found, model, optimizer)


def checked(domain: Domain, config: Config) -> Method:
    """The method of this configuration; raises InputError if it, or the domain's labels, do not fit its prompts, or if
    there are no masks for a method that learns from them.
    """
    method = checked_method(config)
    domain.check(config)
    if method.needs_masks and not domain.split("train")[0].has_masks:
        raise InputError(f"{domain.name} has no masks on train: there is nothing for {config.method} to learn from")
    return method


def train(
    model: AdaptedSam, optimizer: torch.optim.Adam, batch: Batch, method: Method, config: Config
) -> dict[str, float]:
    """One optimisation step on this worker's part of the batch; each weighted loss and their ``total``.

    Raises FloatingPointError, before any weight is changed, if the loss is not finite, or its gradient is not.
    """
    parameters = model.trainable()
    optimizer.zero_grad()
    losses = backward(model, batch, method, config)
    with record_function("wesam.optimizer"):
        values = _sum_over_workers(parameters, torch.stack(list(losses.values())))
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.stack([*values, norm]).isfinite().all():
            raise FloatingPointError("loss is not finite")
        if config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_norm, norm)
        optimizer.step()
        model.follow(config.teacher.decay)
    return dict(zip(losses, values.tolist(), strict=True))


def backward(model: AdaptedSam, batch: Batch, method: Method, config: Config) -> dict[str, Tensor]:
    """Adds this worker's gradients to the student's; each weighted loss and their ``total``, scalars."""
    with record_function("wesam.losses"):
        losses = {k: _mean_over_images(v, batch.image, config) for k, v in method.losses(model, batch, config).items()}
        total = torch.stack(list(losses.values())).sum()
    with record_function("wesam.backward"):
        total.backward()
    return {**{k: v.detach() for k, v in losses.items()}, "total": total.detach()}


def _too_much(sam: Sam, config: Config, step: int) -> str:
    """What a person can do whose GPU is too small."""
    from wesam.memory import relief  # it runs a step of this module
    from wesam.sam import REGISTRY, kind_of

    entry = REGISTRY.get(kind_of(sam))
    hint = relief(entry.build, config) if entry else "lower optim.batch_size or max_instances"
    return f"the GPU's memory is full at step {step + 1}: {hint}"


@dataclass(frozen=True)
class Best:
    """The best checkpoint of an adaptation, by its objective on val; step 0 is the unadapted model."""

    step: int
    val: Scores
    direct: Scores
    """Of the unadapted model, on val."""


def keep_best(
    reports: Iterable[Report], directory: Path, *, objective: Objective = "auto",
    watch: Callable[[Report, bool], None] | None = None, previous: Best | None = None,
) -> Best:  # fmt: skip
    """Drives an adaptation to its end and leaves its best adapter in the folder.

    objective: the score on val that the best one is chosen by. watch: called with every report and whether it was the
    best so far. previous: of a resumed adaptation, the best until its checkpoint, whose adapter is in the folder: it
    stays there unless a later one is better. Whatever ends the run early, an interrupt too, leaves the best adapter
    until then. Raises InputError if the reports do not begin with the unadapted model and no previous best is given, or
    if its adapter is not in the folder.
    """
    if previous is not None:
        made_for(directory)
    best = previous
    for report in reports:
        if best is None and report.step:
            break
        better = report.val is not None and (best is None or report.val.value(objective) > best.val.value(objective))
        if report.val is not None and better:
            report.model.save(directory)
            best = Best(report.step, report.val, best.direct if best else report.val)
        if watch:
            watch(report, better)
    if best is None:
        raise InputError("of a resumed adaptation keep_best needs to know the previous best, and got none")
    return best


def warmup(step: int, config: Config) -> float:
    """The factor on the learning rate at this step: a linear rise, of at most a quarter of the run, then 1."""
    rise = min(config.optim.warmup_steps, config.steps // 4)
    return min(1.0, (step + 1) / (rise + 1))


def draw(anchor: Anchor, config: Config, step: int, method: Method, rank: int = 0, world: int = 1) -> Batch:
    """This worker's images of a step; a function of seed and step alone, so nothing is lost by a restart."""
    size, device = config.optim.batch_size, anchor.sam.pixel_mean.device
    weak, strongs, prompts, noisy = [], [], [], []
    masks: list[Tensor] = []
    features: list[Tensor] = []
    truths: list[Tensor] = []
    image: list[Tensor] = []
    for slot in range(rank, size, world):
        epoch, turn = divmod(step * size + slot, len(anchor))
        index = int(torch.randperm(len(anchor), generator=_generator(config.seed, 1, epoch))[turn])
        generator = _generator(config.seed, 2, step, slot)
        place = anchor.place(index, generator)
        item = anchor.prepared(place)
        chosen = torch.randperm(len(item.prompts), generator=generator)[: config.max_instances]
        coins = torch.rand(2, generator=generator) < 0.5
        flips = (bool(coins[0]), bool(coins[1])) if config.views.flip else (False, False)
        view = flip(item.image, *flips).to(device)  # colours are changed there: on a CPU it can take as long as a step
        answer = anchor.answer(place, flips)
        weak.append(view)
        strongs.append(strong(view, config.views.strength, generator))
        prompts.append(item.prompts[chosen].flipped(*flips, (view.shape[1], view.shape[2])))
        noisy.append(prompts[-1].noisy(config.views.prompt_noise, generator))
        masks.append(answer.masks[chosen])
        features.append(answer.features[chosen])
        image.append(torch.full((len(chosen),), len(image)))
        if method.needs_masks:
            truths.append(anchor.truth(place, flips, chosen))
    all_masks = torch.cat(masks).to(device)
    stride = anchor.sam.image_encoder.img_size / all_masks.shape[-1]
    truth = torch.cat(truths).to(device) if truths else None
    return Batch(
        weak, strongs, prompts, noisy, torch.cat(image).to(device), all_masks, torch.cat(features).to(device), truth,
        stride,
    )  # fmt: skip


_MEMORIES: WeakKeyDictionary[Sam, Memory] = WeakKeyDictionary()


def _anchor(sam: Sam, domain: Domain, config: Config) -> Anchor:
    """The anchor; what it keeps is shared by all adaptations of this model to this domain in this process."""
    memory = _MEMORIES.setdefault(sam, Memory())
    key = (domain.name, domain.digest, config.prompt, config.crop, config.compute.precision, config.grid)
    return Anchor(
        sam, domain.split("train"), config.prompt, config.crop, config.compute, config.grid, memory=memory, key=key
    )


def _generator(*words: int) -> torch.Generator:
    """A generator seeded by all these words."""
    seed = 0
    for word in words:
        seed = (seed * 1_000_003 + word + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def _mean_over_images(values: Tensor, image: Tensor, config: Config) -> Tensor:
    """Per prompt [N] -> mean over an image's prompts, then over all images of the step, those of other workers too."""
    prompts = (image[:, None] == image[None, :]).sum(1)
    return (values / prompts).sum() / config.optim.batch_size


def _sum_over_workers(parameters: list[torch.nn.Parameter], values: Tensor) -> Tensor:
    """Sums gradients, in place, and the values over all workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    flat = torch.cat([*(p.grad.flatten() for p in parameters if p.grad is not None), values])
    dist.all_reduce(flat)
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
    return flat[at:]


def _gathered(mine: list[dict[str, Tensor]], total: int) -> Scores:
    """The scores over all workers' images, in their one order, so that every worker has the same."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Scores.of(mine)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return Scores.of([parts[i % len(parts)][i // len(parts)] for i in range(total)])


def _restore(directory: Path, model: AdaptedSam, optimizer: torch.optim.Adam) -> int:
    """Loads a checkpoint into the model and the optimiser; returns the steps it had done."""
    saved = AdaptedSam.load(model.anchor, directory)
    student, teacher = model.trainable(), model.teacher_parameters()
    if [p.shape for p in student] != [p.shape for p in saved.trainable()]:
        raise InputError(f"the checkpoint in {directory} was made with another lora configuration")
    adam = {f"{k}.{i}": p.shape for i, p in enumerate(student) for k in ("exp_avg", "exp_avg_sq")}
    adam |= {f"step.{i}": torch.Size() for i in range(len(student))}
    shapes = {"step": torch.Size(), **adam, **{f"teacher.{i}": p.shape for i, p in enumerate(teacher)}}
    try:
        state, _ = read_tensors(directory / STATE_FILE, shapes, optional=adam.keys())
    except InputError as e:
        raise InputError(f"cannot go on from {directory}: {e}") from None
    with torch.no_grad():
        for i, (p, q) in enumerate(zip(student, saved.trainable(), strict=True)):
            p.copy_(q)
            names = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{i}" in state]
            where = {k: "cpu" if k == "step" else p.device for k in names}  # Adam counts on the CPU
            optimizer.state[p] = {k: state[f"{k}.{i}"].to(d, copy=True) for k, d in where.items()}
        for i, t in enumerate(teacher):
            t.copy_(state[f"teacher.{i}"])
    return int(state["step"])
