"""The report's pictures: data in, an SVG drawing out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from optuna.importance import get_param_importances
from optuna.study import create_study
from optuna.trial import create_trial

from tuning.sampler import distributions, encoded
from tuning.space import Space
from tuning.tracking import Trial

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

FEWEST_FOR_IMPORTANCE = 10
"""Trials, and no fewer than hyperparameters: below that, importances are noise."""

Curve = Sequence[tuple[int, float]]
"""(step, score on val)."""


def by_trial(trials: Sequence[Trial], direct: float, ellipse: float | None, score: str) -> str:
    """Each trial's best score on val, the best so far, and what needs no search."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    numbers, scores = [t.number for t in trials], [t.best for t in trials]
    best = [max(scores[: i + 1]) for i in range(len(scores))]
    axes.step(numbers, best, where="post", color="#1f77b4", label="best so far")
    for pruned, marker, label in ((False, "o", "trial"), (True, "x", "stopped early")):
        chosen = [t for t in trials if t.pruned is pruned]
        axes.scatter([t.number for t in chosen], [t.best for t in chosen], marker=marker, color="#1f77b4", label=label)
    paper = [t for t in trials if t.reference == "paper"]
    axes.scatter([t.number for t in paper], [t.best for t in paper], marker="s", color="#d62728", label="paper's")
    axes.axhline(direct, color="black", linestyle="--", linewidth=1, label="Direct")
    if ellipse is not None:
        axes.axhline(ellipse, color="grey", linestyle=":", linewidth=1, label="ellipse in the box")
    axes.set(xlabel="trial", ylabel=f"best val {score}")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def by_step(curves: Mapping[int, Curve], best: int | None, score: str) -> str:
    """Each trial's score on val by step; the best trial's stands out. One that fell far leaves the picture below."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    reached = [v for curve in curves.values() for _, v in curve]
    top, start = max(reached), min(curve[0][1] for curve in curves.values())
    lowest = max(min(reached), start - max(2 * (top - start), 0.05))
    margin = 0.002 + 0.05 * (top - lowest)
    axes.set_ylim(lowest - margin, top + margin)
    for number, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        style: dict[str, Any] = {"color": "#1f77b4", "linewidth": 2.2} if number == best else {"color": "#bbbbbb"}
        axes.plot(steps, values, marker=".", **style)
    axes.set(xlabel="step", ylabel=f"val {score}", title=f"trial {best} stands out" if best else "no trial beat Direct")
    axes.title.set_fontsize(9)
    return _svg(figure)


def importances(trials: Sequence[Trial], space: Space) -> str | None:
    """How much of the difference between trials each hyperparameter explains (PED-ANOVA); None for too few trials."""
    inside = [t for t in trials if t.point]
    if len(inside) < max(FEWEST_FOR_IMPORTANCE, len(space)) or len({t.best for t in inside}) < 2 or not space:
        return None
    study = create_study(direction="maximize")
    for t in inside:
        held = distributions(space, t.point)
        study.add_trial(create_trial(params=encoded(space, t.point), distributions=held, value=t.best))
    found = get_param_importances(study)
    names = list(found)[::-1]
    figure, axes = plt.subplots(figsize=(5.2, 0.9 + 0.2 * len(names)))
    axes.barh(names, [found[n] for n in names], color="#1f77b4")
    axes.tick_params(labelsize=7)
    axes.set(xlabel="importance")
    return _svg(figure)


def against_score(trials: Sequence[Trial], space: Space) -> str | None:
    """One small plot per hyperparameter: its value in each trial against the trial's best score on val."""
    inside = [t for t in trials if t.point]
    if not inside or not space:
        return None
    columns = 5
    rows = -(-len(space) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(11, 1.7 * rows), sharey=True, squeeze=False)
    for axes in grid.flat[len(space) :]:
        axes.set_visible(False)
    for axes, (path, axis) in zip(grid.flat, space.items(), strict=False):
        values = [str(t.point[path]) if axis.type == "categorical" else t.point[path] for t in inside]
        complement = axis.log == "complement"
        values = [1 - float(v) for v in values] if complement else values
        axes.scatter(values, [t.best for t in inside], s=10, color="#1f77b4")
        if axis.log:
            near_zero = {"linthresh": axis.low} if axis.zero and not complement else {}
            axes.set_xscale("symlog" if near_zero else "log", **near_zero)
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"1 - {path}" if complement else path, fontsize=8)
        axes.tick_params(labelsize=6)
    return _svg(figure)


def _svg(figure: Any) -> str:
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
