"""A search's drawings, for the report and for MLflow's pages: data in, SVG out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.study import create_study
from optuna.trial import create_trial

from tuning.findings import Curve, Findings, Pair, Trust, front
from tuning.plan import WORDS, Plan
from tuning.sampler import COST_METRICS, distributions, encoded
from tuning.space import Axis, Space
from tuning.tracking import Trial

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import NullFormatter

FEWEST_FOR_IMPORTANCE = 10
"""Trials, and no fewer than hyperparameters: below that, importances are noise."""

ENOUGH_FOR_IMPORTANCE, MOST_FOR_IMPORTANCE = 30, 200
"""With fewer, the hyperparameter that decides is often not the one with the longest bar."""

CLOSE = 0.06
"""Of an axis: two texts nearer than this would overlap."""

BLUE, RED, GREY = "#1f77b4", "#d62728", "#bbbbbb"


def drawings(found: Findings, plan: Plan) -> dict[str, str]:
    """All that can be drawn of a domain's search, by the name of its file, in the order in which it is shown."""
    trials, space, word = found.trials, plan.space, WORDS[found.row["val"]["score"]]
    drawn = {
        "history.svg": by_trial(trials, found.direct, found.drawn, found.word),
        "steps.svg": by_step(found.curves, found.row["best_trial"], word),
        "label-free.svg": against_label_free(found.pairs, found.trust),
        "pareto.svg": pareto(trials, [COST_METRICS[c] for c in plan.minimize], found.direct, found.word),
        "importances.svg": importances(trials, space),
        "parallel-coordinates.svg": parallel_coordinates(trials, space, found.direct, found.word),
        "hyperparameters.svg": against_score(trials, space),
    }
    return {name: svg for name, svg in drawn.items() if svg}


def by_trial(trials: Sequence[Trial], direct: float, drawn: tuple[str, float] | None, score: str) -> str:
    """Each trial's best score on val, the best so far, and what needs no search."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    numbers, scores = [t.number for t in trials], [t.best for t in trials]
    best = [max(scores[: i + 1]) for i in range(len(scores))]
    axes.step(numbers, best, where="post", color=BLUE, label="best so far")
    for pruned, marker, label in ((False, "o", "trial"), (True, "x", "stopped early")):
        chosen = [t for t in trials if t.pruned is pruned]
        axes.scatter([t.number for t in chosen], [t.best for t in chosen], marker=marker, color=BLUE, label=label)
    paper = [t for t in trials if t.reference == "paper"]
    axes.scatter([t.number for t in paper], [t.best for t in paper], marker="s", color=RED, label="paper's")
    axes.axhline(direct, color="black", linestyle="--", linewidth=1, label="Direct")
    if drawn:
        axes.axhline(drawn[1], color="grey", linestyle=":", linewidth=1, label=drawn[0])
    axes.set(xlabel="trial", ylabel=f"best val {score}")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def by_step(curves: Mapping[int, Curve], best: int | None, score: str) -> str:
    """Each trial's score on val by step; the best trial's stands out. One that fell far leaves the picture below."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    reached = [v for curve in curves.values() for _, v in curve]
    top = max(reached)
    lowest = _lowest(reached, min(curve[0][1] for curve in curves.values()))
    margin = 0.002 + 0.05 * (top - lowest)
    axes.set_ylim(lowest - margin, top + margin)
    for number, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        style: dict[str, Any] = {"color": BLUE, "linewidth": 2.2} if number == best else {"color": GREY}
        axes.plot(steps, values, marker=".", **style)
    axes.set(xlabel="step", ylabel=f"val {score}", title=f"trial {best} stands out" if best else "no trial beat Direct")
    axes.title.set_fontsize(9)
    return _svg(figure)


def _lowest(scores: Sequence[float], direct: float, room: float = 2) -> float:
    """Where a picture ends: at the worst score, but not so far below Direct that the others could not be told apart."""
    return max(min(scores), direct - max(room * (max(scores) - direct), 0.05))


def against_label_free(pairs: Sequence[Sequence[Pair]], trust: Trust | None) -> str | None:
    """The label-free score of every evaluation against its mIoU, and what choosing by either would choose."""
    if trust is None:
        return None
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    direct, trials = pairs[0][0], [p[1:] for p in pairs]
    everything = [direct, *(e for t in trials for e in t)]
    named: list[tuple[str, list[Pair], dict[str, Any]]] = [
        ("evaluation", everything, {"s": 8, "color": GREY}),
        ("trial, by its label-free score", [max(t) for t in trials], {"s": 22, "color": BLUE}),
        ("Direct", [direct], {"s": 40, "color": "black", "marker": "D"}),
        ("best label-free score of all", [max(everything)], {"s": 110, "facecolors": "none", "edgecolors": RED}),
        ("best mIoU of all", [max(everything, key=lambda e: e[1])], {"s": 60, "color": RED, "marker": "+"}),
    ]
    for label, shown, style in named:
        axes.scatter([s for s, _ in shown], [m for _, m in shown], label=label, **style)
    axes.set(xlabel="val label-free score", ylabel="val mIoU")
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(f"Spearman {trust.spearman:.2f}, regret {100 * trust.regret:.1f} points of mIoU", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def pareto(trials: Sequence[Trial], costs: Sequence[str], direct: float, score: str) -> str | None:
    """Each trial's score on val against each cost; the front stands out. What fell far leaves the picture below."""
    if not costs:
        return None
    best = front(trials, costs)
    figure, grid = plt.subplots(1, len(costs), figsize=(1 + 4.2 * len(costs), 3.2), sharey=True, squeeze=False)
    for axes, cost in zip(grid.flat, costs, strict=True):
        axes.scatter([t.metrics[cost] for t in trials], [t.best for t in trials], s=14, color=GREY, label="trial")
        line = "-" if len(costs) == 1 else ""
        x, y = [t.metrics[cost] for t in best], [t.best for t in best]
        axes.plot(x, y, marker="o", linestyle=line, linewidth=1, color=BLUE, label="Pareto front")
        for t in best:
            axes.annotate(str(t.number), (t.metrics[cost], t.best), (4, -9), textcoords="offset points", fontsize=7)
        axes.axhline(direct, color="black", linestyle="--", linewidth=1, label="Direct")
        axes.margins(0.1)
        axes.set_xlabel(cost)
    scores = [direct, *(t.best for t in trials)]
    margin = 0.002 + 0.05 * (max(scores) - (low := _lowest(scores, direct, room=0.5)))
    grid[0, 0].set(ylabel=f"best val {score}", ylim=(low - margin, max(scores) + margin))
    grid[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(figure)


def parallel_coordinates(trials: Sequence[Trial], space: Space, direct: float, score: str) -> str | None:
    """Each trial as a line over its hyperparameters and its score, which is its colour; the best one stands out.

    What the space does not hold has only its score: Direct and, where it is of another method, the paper's trial.
    """
    inside = sorted((t for t in trials if t.point), key=lambda t: t.best)
    if len(inside) < 2 or not space:
        return None
    scores = [direct, *(t.best for t in inside)]
    top, low = max(scores), _lowest(scores, direct, room=0.5)
    last = Axis(type="float", low=round(low, 3), high=round(top, 3))
    axes_of = {**space, f"val\n{score}": last}
    figure, axes = plt.subplots(figsize=(11, 3.6))
    norm, colours = Normalize(low, max(top, low + 1e-6)), plt.get_cmap("viridis")
    for t in inside:
        places = [*(axis.place(t.point[path]) for path, axis in space.items()), min(max(last.place(t.best), 0), 1)]
        colour, width = (RED, 2.5) if t is inside[-1] else (colours(norm(t.best)), 1.0)
        axes.plot(range(len(places)), places, color=colour, linewidth=width)
    for n, axis in enumerate(axes_of.values()):
        axes.axvline(n, color="#888888", linewidth=0.6, zorder=0)
        shown = -1.0
        for value in axis.marks():
            if (place := axis.place(value)) - shown > CLOSE:
                text = f"{value:.4g}" if isinstance(value, float) else str(value).replace("+", "+\n")
                axes.text(n + 0.05, place, text, fontsize=6, va="center", bbox=_BACKGROUND)
                shown = place
    outside = [("Direct", direct)] + [("paper's", t.best) for t in trials if t.reference == "paper" and not t.point]
    spots = [(text, min(max(last.place(value), 0), 1)) for text, value in outside]
    if spots[-1][1] - spots[0][1] < CLOSE:  # its best is never below Direct's
        spots = [(", ".join(text for text, _ in spots), spots[0][1])]
    for text, place in spots:
        axes.plot(len(space), place, marker="D", markersize=4, color="black")
        axes.text(len(space) - 0.06, place, text, fontsize=6, va="center", ha="right", bbox=_BACKGROUND)
    axes.set_xticks(range(len(axes_of)), [name.replace(".", ".\n") for name in axes_of], fontsize=6.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(f"trial {inside[-1].number}, the best of these on val, in red", fontsize=9)
    figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, pad=0.04, fraction=0.03, label=f"best val {score}"
    ).ax.tick_params(labelsize=6)
    return _svg(figure)


_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}


def importances(trials: Sequence[Trial], space: Space) -> str | None:
    """How much of the variance between trials each hyperparameter explains (fANOVA); None for too few trials.

    Of many trials, the time for which grows with their square, at most :data:`MOST_FOR_IMPORTANCE`, evenly chosen.
    """
    inside = [t for t in trials if t.point]
    inside = inside[:: -(-len(inside) // MOST_FOR_IMPORTANCE) or 1]
    if len(inside) < max(FEWEST_FOR_IMPORTANCE, len(space)) or len({t.best for t in inside}) < 2 or not space:
        return None
    study = create_study(direction="maximize")
    for t in inside:
        held = distributions(space, t.point)
        study.add_trial(create_trial(params=encoded(space, t.point), distributions=held, value=t.best))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    names = list(found)[::-1]
    figure, axes = plt.subplots(figsize=(5.2, 0.9 + 0.2 * len(names)))
    axes.barh(names, [found[n] for n in names], color=BLUE)
    axes.tick_params(labelsize=7)
    few = f": of {len(inside)} trials, no more than a hint" if len(inside) < ENOUGH_FOR_IMPORTANCE else ""
    axes.set_xlabel(f"share of the variance between trials{few}", fontsize=8)
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
        axes.scatter(values, [t.best for t in inside], s=10, color=BLUE)
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
