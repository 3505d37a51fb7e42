"""A study: one Tuner per domain, side by side on one cluster, begun or gone on with."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow.entities import Run as Stored

from tuning import joint, leaving, runtime
from tuning.budget import Budget
from tuning.claim import held, refuse_second
from tuning.conclusion import RESULT
from tuning.domain import DomainSearch, failed_midway
from tuning.joint import JOINT
from tuning.places import Places
from tuning.plan import BUDGET, HIDDEN, Plan, load_domains, shown
from tuning.progress import Board
from tuning.sampler import open_storage, open_study
from tuning.target import Context, study_tags
from tuning.tracking import ROLE, Tracker, trials_page
from wesam import Domain
from wesam.config import Config, Value
from wesam.errors import InputError, unknown
from wesam.sam import weights_digest

PLAN = "plan.json"
"""The study's artifact with all that resuming it needs."""

HOURS = "hours"
"""The metric of the study's run that says for how long it has been run, by the clock, resumed or not."""

TOLD = 1 / 60
"""Hours between two values of it."""

GRACE = 10.0
"""Seconds that trials have to write a last checkpoint."""

PATIENCE = 10.0
"""Seconds that the domains' threads have then to end by themselves."""


def new_study(plan: Plan, tracker: Tracker, *, rename: bool = False) -> dict[str, Any]:
    """Runs a study, or goes on with the one of this name; returns its result, which is also an artifact of its run.

    rename: whether a study whose name is taken gets the next free one, ``name-2`` and so on, instead. Raises InputError
    if the one of this name differs in more than how long to search.
    """
    taken = _studies(tracker)
    if plan.name not in taken:
        return _study(plan, tracker, None)
    if rename:
        name = next(n for n in (f"{plan.name}-{k}" for k in range(2, len(taken) + 3)) if n not in taken)
        print(f"there is a study {plan.name!r} already, which 'resume {plan.name}' goes on with; this is {name!r}")
        return _study(replace(plan, name=name), tracker, None)
    stored = taken[plan.name]
    before = _plan(tracker, stored)
    if before is None:
        return _study(plan, tracker, stored)
    if differs := plan.differs(before):
        raise InputError(f"the study {plan.name!r} at {tracker.uri} has {differs}: give another --name")
    same = {k: getattr(plan, k) for k in (*BUDGET, "optuna")}
    return _go_on(replace(before, **same), before, tracker, stored)


def resume_study(
    name: str, tracker: Tracker, budget: Mapping[str, Any] | None = None, optuna: str = ""
) -> dict[str, Any]:
    """Goes on with a study: finished trials count, domains that are done are left as they are unless it is enlarged.

    budget: what to change of :data:`tuning.plan.BUDGET`. optuna: the URL of its Optuna studies, which is needed if it
    has a password: MLflow is not told that.
    """
    stored, before = begun_study(name, tracker)
    plan = replace(before, **(budget or {}), optuna=optuna or before.optuna)
    if plan.differs(before):
        where = shown(before.optuna) or "in a file of its own"
        raise InputError(f"the Optuna studies of {name!r} are {where}: give no other --optuna")
    if HIDDEN in plan.optuna:
        raise InputError(f"the Optuna studies of {name!r} are at {plan.optuna}: give --optuna URL with its password")
    return _go_on(plan, before, tracker, stored)


def begun_study(name: str, tracker: Tracker) -> tuple[Stored, Plan]:
    """The run and the plan of a study; raises InputError if there is none."""
    stored = find_study(name, tracker)
    plan = _plan(tracker, stored)
    if plan is None:
        raise InputError(f"the study {name!r} was ended before it had begun: start it with python -m tuning run")
    return stored, plan


def _go_on(plan: Plan, before: Plan, tracker: Tracker, stored: Stored) -> dict[str, Any]:
    if plan.trials < before.trials:
        raise InputError(f"the study {plan.name!r} has {before.trials} trials per domain: it can have more, not fewer")
    enlarged = any(getattr(plan, k) > getattr(before, k) for k in BUDGET)
    if stored.info.status == "FINISHED" and not enlarged and not _is_lacking(tracker, stored):
        raise InputError(
            f"the study {plan.name!r} is finished: python -m tuning report {plan.name} --out DIR shows it, "
            f"and python -m tuning resume {plan.name} --trials N enlarges it"
        )
    return _study(plan, tracker, stored)


def _is_lacking(tracker: Tracker, study: Stored) -> bool:
    """Whether some trial failed after a checkpoint, from which it can be gone on with, or some domain has no result."""
    domains = tracker.find("domain", parent=study.info.run_id)
    return any(d.info.status != "FINISHED" for d in domains) or any(
        failed_midway(t) for d in domains for t in tracker.each("trial", parent=d.info.run_id)
    )


def _plan(tracker: Tracker, stored: Stored) -> Plan | None:
    """That of a study; None where it was ended before it had begun."""
    files = tracker.files(stored.info.run_id, "")
    return Plan.from_json(files[PLAN].decode()) if PLAN in files else None


def best_of(name: str, tracker: Tracker) -> tuple[tuple[str, dict[str, Value]], ...]:
    """The best configurations that a study has found, each with where: ``STUDY/DOMAIN``; for :attr:`Plan.warm`."""
    files = tracker.files(find_study(name, tracker).info.run_id, "")
    rows = json.loads(files[RESULT])["domains"] if RESULT in files else []
    texts = {f"{name}/{JOINT if row['joint'] else row['domain']}": row["config"] for row in rows if row.get("config")}
    if not texts:
        raise InputError(f"the study {name!r} has found nothing to begin with: no domain has a best trial yet")
    return tuple((where, Config.from_texts(t).flat()) for where, t in texts.items())


def find_study(name: str, tracker: Tracker) -> Stored:
    """The study's run; raises InputError if there is none."""
    known = _studies(tracker)
    if name in known:
        return known[name]
    raise unknown("study", name, known) if known else InputError(f"no study at {tracker.uri} yet")


def _studies(tracker: Tracker) -> dict[str, Stored]:
    return {r.data.tags["wesam.name"]: r for r in tracker.find("study")}


def _study(plan: Plan, tracker: Tracker, stored: Stored | None) -> dict[str, Any]:
    """stored: the study's run, if it has been begun already."""
    if stored is not None:
        refuse_second(tracker, stored)
    domains = load_domains(plan.domains)
    searched = (
        {JOINT: plan.domains} if plan.joint else {d.name: (g,) for d, g in zip(domains, plan.domains, strict=True)}
    )
    before: dict[str, Stored] = {}
    if stored is not None:
        before = {r.data.tags["wesam.name"]: r for r in tracker.find("domain", parent=stored.info.run_id)}
    _check_unchanged(plan, domains, stored, before)
    storage = open_storage(plan.optuna_url())
    data = {JOINT: joint.digest(domains)} if plan.joint else {d.name: d.digest for d in domains}
    studies = {name: open_study(plan, name, storage, data[name]) for name in searched}
    runtime.start()
    runtime.check_nodes(plan.model, plan.domains, plan.storage)
    slots = runtime.slots(plan.workers, plan.gpus_per_worker)
    share = runtime.worker_resources(plan.gpus_per_worker).get("GPU", 1.0)
    spent = stored.data.metrics.get(HOURS, 0.0) if stored else 0.0
    budget = Budget(plan, *_spent(tracker, before.values()), share=share, before=spent)
    run = tracker.open(plan.name, "study", None, study_tags(plan), stored)
    if not before:
        plan = replace(plan, run=run.id)
    if stored is None:
        run.attach(lambda: {PLAN: plan.to_json().encode()})
    board = Board(list(searched), [d.name for d in domains], plan.trials, plan.base.steps)
    stop = threading.Event()
    context = Context(plan, tracker, board, run, Places(slots, searched), budget, stop)
    count = f"{len(domains)} domain{'s' if len(domains) > 1 else ''}{' jointly' if plan.joint else ''}"
    per = "" if plan.joint else " each"
    board.say(
        f"study {plan.name!r}: {count}, {plan.trials} trials{per} of {plan.base.steps} steps, "
        f"model {plan.model}, {plan.base.prompt} prompts, {slots} trials at once"
    )
    if tracker.uri.startswith("http"):
        board.say(f"MLflow has its trials, the best first: {trials_page(tracker.uri, run.info.experiment_id)}")
    for domain in domains:
        if domain.left_out:
            board.say(
                f"{domain.name}: {len(domain.left_out)} annotations or images are left out: wesam check lists them"
            )
    searches = [DomainSearch(context, name, given, studies[name], before) for name, given in searched.items()]
    with runtime.stoppable(), held(tracker, run, plan.name, stored), board:
        if stored is not None:  # now that nobody else runs it
            run.attach(lambda: {PLAN: plan.to_json().encode()})
        leaving.take_back(plan.name)
        try:
            for search in searches:
                search.start()
            while any(s.is_alive() for s in searches):
                board.tick()
                if budget.hours() - spent > TOLD:
                    run.log({HOURS: (spent := budget.hours())})
                time.sleep(0.5)
        except KeyboardInterrupt:
            runtime.once_is_enough()
            board.say("stopping; finished trials are kept")
            # in a thread: if Ray has been asked to end as well, it does not answer
            threading.Thread(target=leaving.tell, args=(plan.name,), daemon=True).start()
            deadline = time.monotonic() + GRACE
            while any(s.waiting() for s in searches) and time.monotonic() < deadline:
                time.sleep(0.1)
            stop.set()
            deadline = time.monotonic() + PATIENCE
            for search in searches:
                search.join(timeout=max(0.0, deadline - time.monotonic()))
            run.log({HOURS: budget.hours()})
            runtime.stop()  # before the last records, which a server that is away can hold up
            tracker.close("KILLED")
            raise
    result = _result(context, searches)
    run.attach(lambda: {RESULT: json.dumps(result, indent=2).encode()})
    gap = result["gap_between_trials"]
    run.log({HOURS: budget.hours()} | ({"gap_between_trials": gap["median"]} if gap else {}))
    run.close("FAILED" if any("error" in r for r in result["domains"]) else "FINISHED")
    tracker.flush()
    return result


def _check_unchanged(
    plan: Plan, domains: Sequence[Domain], stored: Stored | None, before: Mapping[str, Stored]
) -> None:
    """Raises InputError if data or weights are not those with which the study was begun."""
    for domain in domains:
        if domain.name in before and before[domain.name].data.tags["data"] != domain.digest:
            raise InputError(f"the data of {domain.name!r} has changed since the study began: start a new study")
    if stored is not None and stored.data.tags.get("weights", weights := weights_digest(plan.model)) != weights:
        raise InputError(f"the weights of {plan.model} have changed since the study began: start a new study")


def _result(context: Context, searches: Sequence[DomainSearch]) -> dict[str, Any]:
    """What a finished study says, as :data:`RESULT` and ``--json`` have it."""
    plan, tracker, run, budget = context.plan, context.tracker, context.run, context.budget
    gaps = [t.gap for s in searches for t in s.trials if t.gap is not None]
    return {
        "study": plan.name, "run_id": run.id, "tracking_uri": tracker.uri, "experiment_id": run.info.experiment_id,
        "model": plan.model, "prompt": plan.base.prompt, "trials": plan.trials, "steps": plan.base.steps,
        "workers": plan.workers, "seed": plan.base.seed, "seeds": plan.seeds,
        "seconds": round(3600 * budget.hours(), 1), "gpu_hours": round(budget.gpu_hours(), 4),
        "gap_between_trials": {"median": statistics.median(gaps), "max": max(gaps)} if gaps else None,
        "domains": [row for s in searches for row in s.rows],
    }  # fmt: skip


def _spent(tracker: Tracker, domains: Iterable[Stored]) -> tuple[float, float]:
    """GPU hours until now of the search's trials, and of what confirms it."""
    search = rest = 0.0
    for run in (r for d in domains for r in tracker.each("trial", parent=d.info.run_id)):
        hours = run.data.metrics.get("gpu_hours", 0.0)
        search, rest = (search, rest + hours) if ROLE in run.data.tags else (search + hours, rest)
    return search, rest
