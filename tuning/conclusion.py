"""What a domain's search has come to: the winner and the references on test, the registry, the result's row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuning import gap, joint, judge, page, plots, registry
from tuning.confirm import FINALIST, SEED, SUPERVISED, finalists, repeated, winner
from tuning.findings import read
from tuning.plan import MARGIN
from tuning.target import Context, Target
from tuning.tracking import Run, Tracker, Trial, begun, trials_by_role
from wesam import Scores
from wesam.drawings import DRAWN
from wesam.prompts import changed_labels

Row = dict[str, Any]
"""A domain's line of the result; its keys are explained in docs/study.md."""

RESULT, PICTURE, TRIALS = "result.json", "overlay.png", "trials.html"
"""Artifacts of a domain's run; the study's has the first one too."""


@dataclass(frozen=True)
class Verdict:
    """What val says of a search."""

    searched: list[Trial]
    begun: int
    """The number of trials that were begun, whatever became of them."""
    hours: float
    """GPU hours of all runs, those too that have failed or confirm the search."""
    best: Trial | None
    """The trial with the best score, as :func:`tuning.confirm.winner` has it, if that is above Direct's."""
    finalists: list[Trial]
    """The best trial and those nearly as good, trained again with one more seed: the best mean of both is chosen."""
    again: list[Trial]
    """Its configuration with other seeds."""
    beaten: bool
    """Whether Direct is beaten, by the best trial and by the mean of its repetitions."""
    supervised: list[Trial]

    @property
    def chosen(self) -> Trial | None:
        """Whose adapter is handed out: of the winner and its repetitions the one that is best on val."""
        return max((self.best, *self.again), key=lambda t: t.best) if self.beaten and self.best else None

    @property
    def paper(self) -> Trial | None:
        """The trial with the paper's hyperparameters."""
        return next((t for t in self.searched if t.reference == "paper"), None)

    @property
    def tested(self) -> list[Trial]:
        """Those that are to meet test."""
        winners = [self.best, *self.again] if self.beaten else []
        return [t for t in (self.paper, *self.supervised, *winners) if t]


def conclude(c: Context, run: Run, targets: Sequence[Target]) -> list[Row]:
    """Has the winner, its configuration with other seeds and the references meet test, once; registers adapters.

    run: the parent of the trials. targets: the domains that were searched. Returns a row for each. Raises RuntimeError
    if no trial has come to a result.
    """
    direct = {t.name: t.direct for t in targets}
    verdict = _verdict(c.tracker, run.id, joint.score(c.plan, direct, direct))
    return [_row(c, run, target, verdict) for target in targets]


def _verdict(tracker: Tracker, parent: str, direct: float) -> Verdict:
    found = trials_by_role(tracker, parent)
    searched = found[None]
    if not searched:
        raise RuntimeError("no trial has come to a result; what ended each of them is in the lines above")
    scores = {t.number: t.best for t in searched}
    close = finalists(scores, direct)
    final = [t for t in found[FINALIST] if t.of in close]
    number = winner(scores, repeated(final), direct)
    best = next((t for t in searched if t.number == number), None)
    again = [t for t in found[SEED] if best and t.of == best.number]
    score = statistics.mean(t.best for t in again or [best]) if best else direct
    numbers, hours = set[str](), 0.0
    for run in tracker.each("trial", parent=parent):  # a page at a time
        numbers |= begun([run])
        hours += run.data.metrics.get("gpu_hours", 0.0)
    return Verdict(searched, len(numbers), hours, best, final, again, score > direct + MARGIN, found[SUPERVISED])


def _row(c: Context, run: Run, target: Target, verdict: Verdict) -> Row:
    plan, found, paper, best = c.plan, target.found, verdict.paper, verdict.best
    folder = registry.place_of(registry.ADAPTER, target.name, plan.joint)
    adapters = {t.run_id: c.tracker.files(t.run_id, folder) for t in verdict.tested}
    measured = judge.judged(target.task, adapters)
    on_test = {run_id: Scores.of(images) for run_id, images in measured.items()}

    test, direct = found["direct_test"], target.direct.value(plan.objective)
    repeated = verdict.again or ([best] if best else [])
    upper = [on_test[t.run_id].objective for t in verdict.supervised]
    on_val = target.direct.name(plan.objective)
    key = joint.metric(f"val_{on_val}", target.name) if plan.joint else ""

    def val(of: Sequence[Trial]) -> float | None:
        """A joint study's trials are ranked by their gain; this is the domain's own score at that evaluation."""
        return statistics.mean(c.tracker.at(t.run_id, key, t.best_step) if key else t.best for t in of) if of else None

    # a joint search's winner gains on all domains together, and may lose on one: that is left as it is
    chosen = verdict.chosen if (val(repeated) or 0.0) > direct + MARGIN else None
    winners = [on_test[t.run_id].objective for t in repeated] if chosen else [test.objective]
    picture = judge.picture(target.task, *((adapters[chosen.run_id], measured[chosen.run_id]) if chosen else ()))

    row: Row = {
        "domain": target.name, "given": target.given, "run_id": target.run.id, "trials_of": run.id,
        "joint": plan.joint, "score": test.chosen_by,
        **{k: s.objective if (s := found.get(f"{k}_test")) else None for k in DRAWN},
        "direct": test.objective, "paper": on_test[paper.run_id].objective if paper else None,
        **_summary("best", winners), **_summary("supervised", upper),
        "gap_closed": gap.closed(test.objective, statistics.mean(winners), upper),
        "best_f1": on_test[chosen.run_id].f1 if chosen else test.f1,
        "val": {
            "score": on_val, **{k: getattr(found.get(f"{k}_val"), on_val, None) for k in DRAWN},
            "direct": direct, "paper": val([paper] if paper else []),
            "best": val(repeated) if chosen else direct,
            "supervised": val(verdict.supervised),
        },
        "tried": target.tried(),
        "trials": len(verdict.searched), "pruned": sum(t.pruned for t in verdict.searched),
        "finalists": _finalists(verdict),
        "best_trial": best.number if chosen and best else None, "best_run": chosen.run_id if chosen else None,
        "config": best.config if chosen and best else None,
        "cost": _cost(verdict),
    }  # fmt: skip
    target.run.attach(lambda: {PICTURE: picture, **_drawings(c, row, verdict.searched)})
    for split, part in (("test", row), ("val", row["val"])):
        target.run.log({f"{k}_{split}_{part['score']}": part[k] for k in LOGGED if part.get(k) is not None})
    lost = missing(plan.trials, verdict.begun, verdict.searched)
    if chosen is None or best is None:
        row["outcome"] = _unbeaten(verdict) + lost
        return row
    tags = {
        **target.tags, "study": plan.name, "trial": str(best.number), "crop": str(plan.base.crop), "joint": plan.joint,
        "test_instances": str(plan.base.test_instances),
        "labels": changed_labels(plan.base.prompt, plan.base.scored_with), "finalists": str(len(row["finalists"])),
        "score": on_val, f"val_{on_val}": f"{row['val']['best']:.6f}",
        "adapter_test": f"{on_test[chosen.run_id].objective:.6f}",
        "test_seeds": json.dumps([t.number for t in verdict.again]), **_as_tags(row, test.chosen_by),
    }  # fmt: skip
    row["version"], outcome = registry.promote(c.tracker, target.name, chosen.run_id, tags)
    row["outcome"] = outcome + lost
    return row


LOGGED = ("paper", "best", "best_sd", "supervised", "supervised_sd", "gap_closed")
"""What of a row is a metric of the domain's run, beside the references found before the search."""


def missing(wanted: int, count: int, found: Sequence[Trial]) -> str:
    """What to say, after a domain's outcome, of the trials that have come to no result, or to no end.

    count: of those that were begun. found: those that have a result.
    """
    said, cut = "", sum(t.ended == "budget" for t in found)
    if count < wanted or cut:
        said = f"; the budget was spent after {count} of {wanted} trials, {cut} of them not at their last step"
    return said + (f"; {count - len(found)} of {wanted} trials failed" if count > len(found) else "")


def _drawings(c: Context, row: Row, searched: list[Trial]) -> dict[str, bytes]:
    """What the report draws of the search, and the table of its trials, for MLflow's pages."""
    found = read(c.tracker, row, searched)
    shown = page.document("trials", page.trials(found, c.plan.space))
    return {name: text.encode() for name, text in {**plots.drawings(found, c.plan), TRIALS: shown}.items()}


def _unbeaten(verdict: Verdict) -> str:
    said = "nothing beat Direct on val: use the model as it is; no adapter registered"
    if verdict.best is None:
        return said
    if verdict.beaten:
        return f"{said} (the joint configuration, trial {verdict.best.number}, gains on the other domains)"
    return f"{said} (trial {verdict.best.number} seemed to, but not when it was trained again with other seeds)"


def _summary(name: str, scores: Sequence[float]) -> Row:
    """Mean, standard deviation and all scores of several seeds."""
    return {
        name: statistics.mean(scores) if scores else None,
        f"{name}_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        f"{name}_seeds": list(scores),
    }


def _finalists(verdict: Verdict) -> list[Row]:
    """Of each its score on val in the search and with one more seed."""
    scores = {t.number: t.best for t in verdict.searched}
    return [{"trial": n, "searched": scores[n], "again": s} for n, s in repeated(verdict.finalists).items()]


def _cost(verdict: Verdict) -> Row:
    taken = sum(t.step for t in verdict.searched)
    full = sum(int(t.config["steps"]) for t in verdict.searched)
    return {"gpu_hours": verdict.hours, "steps": taken, "full_steps": full}


def _as_tags(row: Row, score: str) -> dict[str, str]:
    """What a version is tagged with of the scores on test."""
    names = {
        "best": f"test_{score}", "best_sd": f"test_{score}_sd", "gap_closed": "gap_closed",
        **{k: f"{k}_test_{score}" for k in (*DRAWN, "direct", "paper", "supervised")},
        "supervised_sd": f"supervised_test_{score}_sd",
    }  # fmt: skip
    return {name: f"{row[key]:.6f}" for key, name in names.items() if row[key] is not None}
