"""Methods, or kinds of weak labels, side by side on one domain: same data and budget, several seeds."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segment_anything.modeling import Sam

from wesam.adapt import Best, Report, adapt, checked, keep_best
from wesam.adapters import AdaptedSam
from wesam.config import Config, PromptKind
from wesam.data.domain import Domain
from wesam.drawings import DRAWN, drawable
from wesam.evaluate import Scores, baseline, evaluate


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one configuration, trained once, has come to."""

    best: Best
    """The checkpoint that is best on val."""
    test: dict[PromptKind, Scores]
    """Its scores on test, by the kind that test is prompted with."""
    after: dict[int, Scores]
    """Scores on test of the model as it was after so many steps, whatever val said, or before it diverged; prompted as
    val was."""
    curve: dict[int, Scores]
    """Step -> scores on val."""
    parameters: int
    """How many are trained."""
    seconds: float | None
    """Median of a step, without evaluations; None if there was none."""
    diverged: bool
    """Whether it ended before its last step, at a loss that was not finite."""


def train_once(
    sam: Sam, domain: Domain, config: Config, kinds: Iterable[PromptKind], *,
    val: Scores | None = None, after: Collection[int] = (), forgiving: bool = False,
) -> Trained:  # fmt: skip
    """Trains one configuration; test is scored with these kinds of prompts, and chooses nothing.

    val: the unadapted model's scores on val, if known. after: steps after which the model meets test as it then is.
    forgiving: a run that diverges counts with what it had reached; else it raises FloatingPointError.
    """
    test = domain.scored("test", config.test_instances)
    later: dict[int, Scores] = {}
    curve: dict[int, Scores] = {}
    seconds: list[float] = []
    parameters, diverged = 0, False

    def reports() -> Iterator[Report]:
        nonlocal diverged
        try:
            for report in adapt(sam, domain, config, direct=val):
                last = report
                yield report
        except FloatingPointError:
            if not forgiving:
                raise
            diverged = True
            if missed := [n for n in after if n > last.step]:  # no weight was changed since
                later.update(dict.fromkeys(missed, evaluate(last.model, test, config.scored_with)))

    def watch(report: Report, better: bool) -> None:
        nonlocal parameters
        parameters = report.model.size
        if report.step:
            seconds.append(report.seconds)
        if report.val is not None:
            curve[report.step] = report.val
        if report.step in after:
            later[report.step] = evaluate(report.model, test, config.scored_with)

    with tempfile.TemporaryDirectory() as folder:
        best = keep_best(reports(), Path(folder), watch=watch)
        model = AdaptedSam.load(sam, Path(folder))
    return Trained(
        best=best, test={k: evaluate(model, test, k) for k in kinds}, after=later, curve=curve, parameters=parameters,
        seconds=statistics.median(seconds) if seconds else None, diverged=diverged,
    )  # fmt: skip


def compare(
    sam: Sam,
    domain: Domain,
    configs: Mapping[str, Config],
    seeds: Iterable[int],
    *,
    watch: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Test mIoU of what can be drawn from the given labels, of the unadapted model and of each method's best checkpoint
    on val.

    configs: by the name of the method; all with one kind of prompt and one crop. Returns, per method, mean and
    standard deviation over the seeds and the list of all; and, where wesam and supervised are among them, the share of
    the gap between Direct and Supervised that WeSAM closes.
    """
    first = next(iter(configs.values()))
    test = domain.scored("test", first.test_instances)
    prompt, crop = first.scored_with, first.crop
    for config in configs.values():
        checked(domain, config)
    row: dict[str, Any] = {
        name: baseline(kind, test, prompt).objective for name, kind in DRAWN.items() if drawable(kind, prompt)
    }
    row["direct"] = direct = evaluate(sam, test, prompt, crop=crop).objective
    watch("  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    val = evaluate(sam, domain.scored("val", first.val_instances), prompt, crop=crop)
    for name, config in configs.items():
        found: list[float] = []
        for seed in seeds:
            trained = train_once(sam, domain, config.replace({"seed": seed}), [prompt], val=val)
            found.append(trained.test[prompt].objective)
            best = trained.best
            watch(f"{name} seed {seed}: test mIoU {found[-1]:.3f} (val {best.val.objective:.3f} at step {best.step})")
        row |= _summary(name, found)
    if {"wesam", "supervised"} <= row.keys() and row["supervised"] > direct:
        row["gap_closed"] = (row["wesam"] - direct) / (row["supervised"] - direct)
    return row


def cross(
    sam: Sam,
    domain: Domain,
    configs: Mapping[PromptKind, Config],
    seeds: Iterable[int],
    *,
    watch: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Test scores (mIoU; without masks, label-free) with each kind of prompt, of the unadapted model and of the best
    checkpoint of each kind trained on.

    configs: by the kind of prompt that they train on. A row for Direct and one for each of these, with the mean over
    the seeds by the kind that test is prompted with (a grid is none), its standard deviation as ``KIND_sd`` and the
    list of all as ``KIND_all``.
    """
    for config in configs.values():
        checked(domain, config)
    asked: list[PromptKind] = list(dict.fromkeys(c.scored_with for c in configs.values()))
    first = next(iter(configs.values()))
    test, crop = domain.scored("test", first.test_instances), first.crop
    scores = {k: evaluate(sam, test, k, crop=crop) for k in asked}
    direct: dict[str, Any] = {k: s.objective for k, s in scores.items()}
    score = scores[asked[0]].chosen_by
    rows: list[dict[str, Any]] = [{"trained_with": None, "score": score, **direct}]
    watch(f"direct: test {score} " + _said(direct, asked))
    for trained, config in configs.items():
        val = evaluate(sam, domain.scored("val", config.val_instances), config.scored_with, crop=crop)
        found: dict[PromptKind, list[float]] = {k: [] for k in asked}
        for seed in seeds:
            once = train_once(sam, domain, config.replace({"seed": seed}), asked, val=val)
            for kind, scores_with in once.test.items():
                found[kind].append(scores_with.objective)
            said = _said({str(k): v[-1] for k, v in found.items()}, asked)
            watch(f"trained with {trained}, seed {seed}: test {said} (best at step {once.best.step})")
        row: dict[str, Any] = {"trained_with": trained, "score": score}
        for name, values in found.items():
            row |= _summary(name, values)
        rows.append(row)
    return rows


def _summary(name: str, values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and all."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.mean(values), f"{name}_sd": spread, f"{name}_all": values}


def _said(row: Mapping[str, Any], kinds: Iterable[str]) -> str:
    return "  ".join(f"{k} {row[k]:.3f}" for k in kinds)
