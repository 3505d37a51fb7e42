"""A domain of a study: its run in MLflow, and what is known of it before any search."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mlflow.entities import Run as Stored

from tuning import judge
from tuning.budget import Budget
from tuning.opening import Row, compared, worth
from tuning.places import Places
from tuning.plan import WORDS, Plan, yardstick
from tuning.progress import Board
from tuning.tracking import Data, Run, Tracker, environment
from wesam import Scores, load_domain
from wesam.drawings import DRAWN
from wesam.sam import weights_digest


@dataclass(frozen=True)
class Context:
    """What the threads of a study share."""

    plan: Plan
    tracker: Tracker
    board: Board
    run: Run
    places: Places
    budget: Budget
    stop: threading.Event


class Target:
    """A domain that is searched, alone or jointly with others."""

    def __init__(self, context: Context, given: str, before: Mapping[str, Stored]) -> None:
        """before: the runs of domains that have been begun already, by name."""
        self._c, self.given = context, given
        self.domain = load_domain(given)
        self.name = self.domain.name
        self.before = before.get(self.name)
        self.task = judge.Task(context.plan.model, given, context.plan.base, context.plan.gpus_per_worker)
        self.tags = {
            **study_tags(context.plan), "domain": given, "data": self.domain.digest,
            "annotations_left_out": str(len(self.domain.left_out)),
        }  # fmt: skip
        self.found: dict[str, Scores] = {}
        """``direct_val``, ``ellipse_test``, ...; see :func:`tuning.judge.references`."""

    def open(self) -> Run:
        """Begins the domain's run, or goes on with it."""
        self.run = self._c.tracker.open(self.name, "domain", self._c.run, self.tags, self.before)
        self.run.use([self.data])
        return self.run

    @property
    def data(self) -> Data:
        """As MLflow is told of it."""
        return Data(self.name, self.domain.digest, self.given)

    @property
    def direct(self) -> Scores:
        """The source model's scores on val."""
        return self.found["direct_val"]

    def refer(self) -> bool:
        """Finds what needs no search, and says it; whether that had not been done by an earlier run of the study."""
        known = self._known()
        self.found, vanished = (known, 0) if known else judge.references(self.task)
        if not known:
            found = {f"{k}_{f}": v for k, s in self.found.items() for f, v in asdict(s).items() if v is not None}
            self.run.log({**found, "instances_vanished": vanished})
        if vanished:
            text = "left out of training, less than a pixel wide or high at the model's input size"
            self._c.board.say(f"{text}: {vanished} instances", self.name)
        score = self.direct.name(self._c.plan.objective)
        made = yardstick({k: getattr(self.found.get(f"{k}_val"), score, None) for k in DRAWN})
        drawn = f"{made[0]} {made[1]:.3f}, " if made else ""
        self._c.board.say(f"{WORDS[score]} on val: {drawn}Direct {getattr(self.direct, score):.3f}", self.name)
        if (tried := self.tried()) and (better := worth(tried)):
            self._c.board.say(f"without any training {compared(tried, better)}", self.name)
        return not known

    def tried(self) -> Row | None:
        """What Direct has on a part of val in other ways of asking, by option; None where there is no other."""
        if "asked_val" not in self.found:
            return None
        objective, asked = self._c.plan.objective, self.found["asked_val"]
        others = {option: self.found[f"{n}_val"] for n, (option, _, _) in judge.ways(self._c.plan.base).items()}
        if asked.name(objective) == "label_free":  # which is another one where masks are cut
            others = {option: scores for option, scores in others.items() if "tight" not in option}
        return {
            "images": asked.images, "asked": asked.value(objective),
            "others": {option: scores.value(objective) for option, scores in others.items()},
        }  # fmt: skip

    def _known(self) -> dict[str, Scores]:
        """The scores of an earlier run of this study: test is read once."""
        metrics = self.before.data.metrics if self.before else {}
        if "direct_test_images" not in metrics:
            return {}
        names = (*DRAWN, "direct", "asked", *judge.ways(self._c.plan.base))
        keys = [f"{k}_{s}" for k in names for s in ("val", "test") if f"{k}_{s}_images" in metrics]
        return {
            k: Scores(
                int(metrics[f"{k}_images"]), int(metrics[f"{k}_instances"]), metrics.get(f"{k}_miou"),
                metrics.get(f"{k}_f1"), metrics.get(f"{k}_label_free"), metrics[f"{k}_collapsed"],
            )
            for k in keys
        }  # fmt: skip


def study_tags(plan: Plan) -> dict[str, str]:
    """What every run of a study is tagged with, beside its hyperparameters: all that its numbers depend on."""
    return {
        **environment(),
        "model": plan.model,
        "weights": weights_digest(plan.model),
        "prompt": plan.base.prompt,
        "val_prompt": plan.base.scored_with,
        "seed": str(plan.base.seed),
    }
