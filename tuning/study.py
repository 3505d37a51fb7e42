"""A study: one Tuner per domain, side by side on one cluster, begun or gone on with."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

from mlflow.entities import Run as Stored

from tuning import runtime
from tuning.domain import RESULT, Context, DomainSearch, study_tags
from tuning.plan import Plan
from tuning.progress import Board
from tuning.tracking import Run, Tracker
from wesam.data import load_domain
from wesam.errors import InputError, unknown

PLAN = "plan.json"
"""The study's artifact with all that resuming it needs."""

STOPPING = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 10.0
"""Seconds that the domains' threads have to end by themselves."""


def new_study(plan: Plan, tracker: Tracker, *, rename: bool = False) -> dict[str, Any]:
    """Runs a study; returns its result, which is also an artifact of its MLflow run.

    rename: whether a study whose name is taken gets the next free one, ``name-2`` and so on, or is refused.
    """
    taken = _studies(tracker)
    if plan.name in taken and not rename:
        raise InputError(
            f"there is a study {plan.name!r} at {tracker.uri} already: give another --name, "
            f"or go on with it: python -m tuning resume {plan.name}"
        )
    names = (plan.name, *(f"{plan.name}-{n}" for n in range(2, len(taken) + 3)))
    plan = replace(plan, name=next(n for n in names if n not in taken))
    runtime.start()
    slots = runtime.slots(plan.workers)
    run = tracker.start(plan.name, "study", None, study_tags(plan))
    run.attach(lambda: {PLAN: plan.to_json().encode()})
    return _study(plan, tracker, run, slots, {})


def resume_study(name: str, tracker: Tracker) -> dict[str, Any]:
    """Goes on with a study that was stopped: finished trials count, domains that are done are left as they are."""
    stored = find_study(name, tracker)
    if stored.info.status == "FINISHED":
        raise InputError(f"the study {name!r} is finished: python -m tuning report {name} --out DIR shows it")
    plan = Plan.from_json(tracker.files(stored.info.run_id, "")[PLAN].decode())
    domains = {r.data.tags["wesam.name"]: r for r in tracker.find("domain", parent=stored.info.run_id)}
    for given in plan.domains:
        now = load_domain(given)
        if now.name in domains and domains[now.name].data.tags["data"] != now.digest:
            raise InputError(f"the data of {now.name!r} has changed since the study began: start a new study")
    runtime.start()
    return _study(plan, tracker, tracker.reopen(stored), runtime.slots(plan.workers), domains)


def find_study(name: str, tracker: Tracker) -> Stored:
    """The study's run; raises InputError if there is none."""
    known = _studies(tracker)
    if name in known:
        return known[name]
    raise unknown("study", name, known) if known else InputError(f"no study at {tracker.uri} yet")


def _studies(tracker: Tracker) -> dict[str, Stored]:
    return {r.data.tags["wesam.name"]: r for r in tracker.find("study")}


def _study(plan: Plan, tracker: Tracker, run: Run, slots: int, before: dict[str, Stored]) -> dict[str, Any]:
    began = time.monotonic()
    domains = [load_domain(d) for d in plan.domains]
    names = [d.name for d in domains]
    board = Board(names, plan.trials, plan.base.steps)
    side_by_side = min(slots, max(2, -(-slots // len(names))))
    stop = threading.Event()
    context = Context(plan, tracker, board, run, side_by_side, stop)
    board.say(
        f"study {plan.name!r}: {len(names)} domains, {plan.trials} trials each of {plan.base.steps} steps, "
        f"model {plan.model}, {plan.base.prompt} prompts, {slots} trials at once"
    )
    for domain in domains:
        if domain.left_out:
            board.say(f"{domain.name}: {len(domain.left_out)} wrong annotations are left out: wesam check lists them")
    pairs = zip(plan.domains, names, strict=True)
    searches = [DomainSearch(context, given, name, before.get(name)) for given, name in pairs]
    with _stoppable():
        try:
            for search in searches:
                search.start()
            while any(s.is_alive() for s in searches):
                board.tick()
                time.sleep(0.5)
        except KeyboardInterrupt:
            stop.set()
            board.say("stopping; finished trials are kept")
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)  # once is enough
            deadline = time.monotonic() + PATIENCE
            for search in searches:
                search.join(timeout=max(0.0, deadline - time.monotonic()))
            runtime.stop()  # before the last records, which a server that is away can hold up
            tracker.close("KILLED")
            raise
    rows = [s.row for s in searches]
    gaps = [t.gap for s in searches for t in s.trials if t.gap is not None]
    result = {
        "study": plan.name, "run_id": run.id, "tracking_uri": tracker.uri, "model": plan.model,
        "prompt": plan.base.prompt, "trials": plan.trials, "steps": plan.base.steps, "workers": plan.workers,
        "seed": plan.base.seed, "seconds": round(time.monotonic() - began, 1),
        "gap_between_trials": {"median": statistics.median(gaps), "max": max(gaps)} if gaps else None,
        "domains": rows,
    }  # fmt: skip
    run.attach(lambda: {RESULT: json.dumps(result, indent=2).encode()})
    if gaps:
        run.log({"gap_between_trials": statistics.median(gaps)})
    run.close("FAILED" if any("error" in r for r in rows) else "FINISHED")
    tracker.flush()
    return result


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """What is asked to end gets a KeyboardInterrupt, also by SIGTERM, for which Ray has set a handler of its own."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in STOPPING}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
