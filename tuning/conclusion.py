"""What a domain's search has come to: the winner and the references on test, the registry, the result's row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tuning import judge, registry
from tuning.budget import Budget
from tuning.confirm import SEED, SUPERVISED, winner
from tuning.plan import MARGIN, Plan
from tuning.tracking import Run, Tracker, Trial, trials
from wesam import Scores

Row = dict[str, Any]
"""A domain's line of the result; its keys are explained in docs/study.md."""

RESULT, PICTURE = "result.json", "overlay.png"
"""Artifacts of a domain's run; the study's has the first one too."""


def conclude(
    task: judge.Task, name: str, plan: Plan, tracker: Tracker, run: Run, found: Mapping[str, Scores],
    tags: Mapping[str, str], budget: Budget,
) -> Row:  # fmt: skip
    """Has the winner, its configuration with other seeds and the references meet test, once; registers an adapter.

    run: the domain's. found: scores of :func:`tuning.judge.references`. tags: of the adapter's version. Raises
    RuntimeError if no trial has come to a result.
    """
    searched = trials(tracker, run.id)
    if not searched:
        raise RuntimeError("no trial has come to a result; what ended each of them is in the lines above")
    direct = found["direct_val"].value(plan.objective)
    best = _trial(searched, winner({t.number: t.best for t in searched}, direct))
    again = [t for t in trials(tracker, run.id, SEED) if best and t.of == best.number]
    supervised = trials(tracker, run.id, SUPERVISED)
    paper = next((t for t in searched if t.reference == "paper"), None)
    repeated = statistics.mean(t.best for t in again or [best]) if best else direct
    held = best if repeated > direct + MARGIN else None
    wanted = {t.run_id: t for t in (paper, *supervised, *([held, *again] if held else ())) if t}
    adapters = {i: tracker.files(i, "adapter") for i in wanted}
    on_test = judge.judged(task, adapters)
    # of the winner and its repetitions the one that is best on val is handed out
    chosen = max((held, *again), key=lambda t: t.best) if held else None
    picture = judge.picture(task, adapters[chosen.run_id] if chosen else None)
    run.attach(lambda: {PICTURE: picture})

    test = found["direct_test"]
    scores = [on_test[t.run_id].objective for t in again or [held]] if held else [test.objective]
    upper = [on_test[t.run_id].objective for t in supervised]
    row: Row = {
        "domain": name, "given": task.domain, "run_id": run.id, "score": test.chosen_by,
        **{k: s.objective if (s := found.get(f"{k}_test")) else None for k in judge.DRAWN},
        "direct": test.objective, "paper": on_test[paper.run_id].objective if paper else None,
        **_summary("best", scores), **_summary("supervised", upper),
        "gap_closed": _share(test.objective, statistics.mean(scores), statistics.mean(upper) if upper else None),
        "best_f1": on_test[chosen.run_id].f1 if chosen else test.f1,
        "val": {
            "score": (name_on_val := found["direct_val"].name(plan.objective)),
            **{k: getattr(found.get(f"{k}_val"), name_on_val, None) for k in judge.DRAWN},
            "direct": direct, "paper": paper.best if paper else None, "best": repeated if held else direct,
            "supervised": statistics.mean(t.best for t in supervised) if supervised else None,
        },
        "trials": len(searched), "pruned": sum(t.pruned for t in searched),
        "best_trial": held.number if held else None, "best_run": chosen.run_id if chosen else None,
        "config": held.config if held else None, "cost": _cost(searched, again + supervised),
    }  # fmt: skip
    for split, part in (("test", row), ("val", row["val"])):
        run.log({f"{k}_{split}_{part['score']}": part[k] for k in LOGGED if part.get(k) is not None})
    lost = missing(plan.trials, searched, spent=budget.over())
    if chosen is None or held is None:
        row["outcome"] = _unbeaten(best, repeated, direct) + lost
        return row
    registered = {
        **tags, "study": plan.name, "trial": str(held.number), "crop": str(plan.base.crop),
        "score": row["val"]["score"], f"val_{row['val']['score']}": f"{repeated:.6f}",
        "adapter_test": f"{on_test[chosen.run_id].objective:.6f}", "test_seeds": json.dumps([t.number for t in again]),
        **_as_tags(row, test.chosen_by),
    }  # fmt: skip
    row["version"], outcome = registry.promote(tracker, name, chosen.run_id, registered)
    row["outcome"] = outcome + lost
    return row


LOGGED = ("paper", "best", "best_sd", "supervised", "supervised_sd", "gap_closed")
"""What of a row is a metric of the domain's run, beside the references found before the search."""


def missing(wanted: int, found: Sequence[Trial], *, spent: bool) -> str:
    """What to say, after a domain's outcome, of the trials that have come to no result, or to no end."""
    if spent:
        cut = sum(t.ended == "budget" for t in found)
        return f"; the budget was spent after {len(found)} of {wanted} trials, {cut} of them not at their last step"
    failed = wanted - len(found)
    return f"; {failed} of {wanted} trials failed" if failed else ""


def _trial(found: Sequence[Trial], number: int | None) -> Trial | None:
    return next((t for t in found if t.number == number), None)


def _unbeaten(best: Trial | None, repeated: float, direct: float) -> str:
    said = "nothing beat Direct on val: use the model as it is; no adapter registered"
    if best is None:
        return said
    return (
        f"{said} (trial {best.number} seemed to, with {best.best:.3f} to {direct:.3f}, but trained again with other "
        f"seeds it has {repeated:.3f})"
    )


def _summary(name: str, scores: Sequence[float]) -> Row:
    """Mean, standard deviation and all scores of several seeds."""
    return {
        name: statistics.mean(scores) if scores else None,
        f"{name}_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        f"{name}_seeds": list(scores),
    }


def _share(direct: float, best: float, supervised: float | None) -> float | None:
    """Of the gap between Direct and Supervised, how much is closed."""
    return (best - direct) / (supervised - direct) if supervised is not None and supervised > direct else None


def _cost(searched: Sequence[Trial], others: Sequence[Trial]) -> Row:
    hours = sum(t.metrics.get("gpu_hours", 0.0) for t in (*searched, *others))
    full = sum(int(t.config["steps"]) for t in searched)
    return {"gpu_hours": hours, "steps": sum(t.step for t in searched), "full_steps": full}


def _as_tags(row: Row, score: str) -> dict[str, str]:
    """What a version is tagged with of the scores on test."""
    names = {
        "best": f"test_{score}", "best_sd": f"test_{score}_sd", "gap_closed": "gap_closed",
        **{k: f"{k}_test_{score}" for k in (*judge.DRAWN, "direct", "paper", "supervised")},
        "supervised_sd": f"supervised_test_{score}_sd",
    }  # fmt: skip
    return {name: f"{row[key]:.6f}" for key, name in names.items() if row[key] is not None}
