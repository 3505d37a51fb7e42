"""A study's report: one HTML page that needs nothing beside it, its table as Markdown, its pictures as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tuning import page, plots, registry
from tuning.card import score
from tuning.conclusion import PICTURE, RESULT
from tuning.domain import past
from tuning.findings import Findings, Trust, front, read
from tuning.opening import opening
from tuning.plan import WORDS, Plan, checked_name, columns
from tuning.replay import Past, replay
from tuning.sampler import BEST_OF, COST_METRICS
from tuning.study import HOURS, PLAN, TOLD, find_study
from tuning.tracking import Tracker, Trial, trials
from wesam.errors import InputError

PAGE, TABLE = "report.html", "report.md"

SINCE = (
    "The study has gone on since, and has not come to its end: the scores are those of its last end, and trials since "
    "then are in the drawings alone."
)


@dataclass(frozen=True)
class Part:
    """A domain's part of a report."""

    found: Findings
    past: list[Past]
    """The trials, as a scheduler is told of them."""
    picture: bytes | None

    @property
    def row(self) -> dict[str, Any]:
        """Of the result."""
        return self.found.row


@dataclass(frozen=True)
class Collected:
    """All that a report shows."""

    result: dict[str, Any]
    plan: Plan
    tags: dict[str, str]
    parts: list[Part]
    champions: dict[str, int]
    """The version that is now each domain's champion."""
    since: bool
    """Whether the study has gone on since the result, to no new one yet."""


def collect(tracker: Tracker, name: str) -> Collected:
    """Reads a study from MLflow; raises InputError if there is none or if it has not come to its end."""
    run = find_study(name, tracker)
    files = tracker.files(run.info.run_id, "")
    if RESULT not in files:
        raise InputError(f"the study {name!r} has not come to its end: python -m tuning resume {name}")
    result = json.loads(files[RESULT])
    for row in result["domains"]:
        checked_name(row["domain"], "domain")
    plan, status = Plan.from_json(files[PLAN].decode()), run.info.status
    longer = 3600 * run.data.metrics.get(HOURS, 0.0) > result["seconds"] + 3600 * TOLD
    since = status in ("RUNNING", "KILLED") or plan.trials != result["trials"] or longer
    searched: dict[str, tuple[list[Trial], list[Past]]] = {}
    parts = []
    for row in result["domains"]:
        if "error" not in row:
            parent = row["trials_of"]  # one for all domains of a joint search
            if parent not in searched:
                found = trials(tracker, parent)
                searched[parent] = found, [past(tracker, t) for t in found]
            known, pasts = searched[parent]
            parts.append(Part(read(tracker, row, known), pasts, tracker.files(row["run_id"], "").get(PICTURE)))
    held = {r["domain"]: registry.champion(tracker, r["domain"]) for r in result["domains"]}
    champions = {domain: entry.version for domain, entry in held.items() if entry}
    return Collected(result, plan, dict(run.data.tags), parts, champions, since)


def write(found: Collected, out: Path) -> None:
    """Writes the page, the table and one picture per domain into a folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).write_text(_page(found))
        (out / TABLE).write_text(_markdown(found))
        for part in found.parts:
            if part.picture:
                (out / f"overlay-{part.row['domain']}.png").write_bytes(part.picture)
    except OSError as e:
        raise InputError(f"cannot write the report to {out}: {e.strerror}") from None


def _table(found: Collected) -> tuple[list[str], list[list[str]]]:
    """The main table: its head, and a line per domain and split."""
    shown = columns(part.row for part in found.parts)
    rows = []
    for part in found.parts:
        for split, scores in (("test", part.row), ("val", part.row["val"])):
            cells = [score(scores.get(k), scores.get(f"{k}_sd")) for k in shown]
            rows.append([part.row["domain"], split, WORDS[scores["score"]], *cells, share(scores.get("gap_closed"))])
    return ["domain", "split", "score", *shown.values(), "gap closed"], rows


def share(part: float | None) -> str:
    """A share in per cent."""
    return "-" if part is None else f"{round(100 * part)} %"


def _markdown(found: Collected) -> str:
    begun = opening(found.result, found.champions)
    opened = [SINCE if found.since else "", begun.searched, "\n".join(f"- {line}" for line in begun.found), begun.use]
    head, rows = _table(found)
    lines = [" | ".join(r) for r in (head, ["---"] * len(head), *rows)]
    told = [f"- {p.row['domain']}: {p.row['outcome']}" for p in found.parts]
    told += [f"- {p.row['domain']}: {text}" for p in found.parts for text in _told(p, found.plan)]
    body = [*(f"| {line} |" for line in lines), "", _about(found), "", *told, ""]
    return "\n\n".join([f"# Study {found.result['study']}", *(o for o in opened if o), "\n".join(body)])


def _about(found: Collected) -> str:
    r, gap = found.result, found.result["gap_between_trials"]
    per = "" if found.plan.joint else " per domain"
    text = (
        f"{r['prompt']} prompts, model {r['model']}; {r['trials']} trials{per} of at most {r['steps']} "
        f"steps, {r['workers']} worker(s) each, seed {r['seed']}; {r['seconds'] / 60:.1f} minutes"
    )
    text += f"; {gap['median']:.2f} s between trials." if gap else "."
    if most := found.plan.base.test_instances:
        text += f" On test at most {most} instances of an image are scored."
    seeds = r.get("seeds", 0)
    if not seeds:
        return text
    if seeds == 1:
        return f"{text} Best found and Supervised on test: with another seed than the search's."
    return f"{text} Best found and Supervised on test: mean and standard deviation over {seeds} other seeds."


def _page(found: Collected) -> str:
    name, begun = found.result["study"], opening(found.result, found.champions)
    body = [f"<h1>Study {escape(name)}</h1>", f"<p><b>{SINCE}</b></p>" if found.since else ""]
    body.append(f"<p>{page.text(begun.searched)}</p>")
    body += [f"<ul>{''.join(f'<li>{page.text(line)}</li>' for line in begun.found)}</ul>"]
    body += [f"<p><b>{page.text(begun.use)}</b></p>"] if begun.use else []
    body.append(page.table(*_table(found)))
    body += [f"<p><small>{escape(_about(found))}</small></p>", *(_domain(p, found.plan) for p in found.parts)]
    versions = ", ".join(f"{k.removeprefix('version.')} {v}" for k, v in sorted(found.tags.items()) if "version." in k)
    commit = found.tags.get("mlflow.source.git.commit", "unknown")
    body.append(f"<p><small>run {found.result['run_id']}; commit {escape(commit)}; {escape(versions)}</small></p>")
    return page.document(f"Study {name}", "".join(body))


def _domain(part: Part, plan: Plan) -> str:
    row = part.row
    out = [f"<h2>{escape(row['domain'])}</h2><p>{escape(row['outcome'])}</p>"]
    out += [f"<p>{escape(text)}</p>" for text in _told(part, plan)]
    if part.picture:
        data = base64.b64encode(part.picture).decode()
        out.append(f'<img alt="before and after adaptation" src="data:image/png;base64,{data}">')
    if part.found.trials:
        out.append(f'<div class="plots">{"".join(plots.drawings(part.found, plan).values())}</div>')
        out.append(f"<details><summary>all trials</summary>{page.trials(part.found, plan.space)}</details>")
    return "".join(out)


def _told(part: Part, plan: Plan) -> list[str]:
    """What there is to say of a domain, beside its outcome."""
    trust, trials = part.found.trust, part.found.trials
    told = [
        _gap(part.row), _chosen(part.row), _cost(part, plan), _trusted(trust) if trust else None, _warmth(trials),
        _front(trials, plan),
    ]  # fmt: skip
    return [text for text in told if text]


def _gap(row: dict[str, Any]) -> str | None:
    """What can be won at all, and how much of it has been."""
    if row["supervised"] is None:
        return None
    gain, most = 100 * (row["best"] - row["direct"]), 100 * (row["supervised"] - row["direct"])
    if row["gap_closed"] is None:
        more = "" if row["supervised_sd"] is None else " by more than its spread over seeds"
        said = f"it is not above Direct{more}, so there is no gap to close."
    else:
        said = f"{share(row['gap_closed'])} of that gap is closed."
    return (
        f"On test the best found is {gain:+.1f} points above Direct; training on true masks in as many steps "
        f"(Supervised) gives {most:+.1f}: {said}"
    )


def _chosen(row: dict[str, Any]) -> str | None:
    """How one of several trials that are nearly as good was chosen."""
    final = sorted(row.get("finalists", []), key=lambda f: -f["searched"])
    if not final:
        return None
    means = ", ".join(f"trial {f['trial']} {(f['searched'] + f['again']) / 2:.3f}" for f in final)
    chosen = f"; trial {row['best_trial']} was chosen" if row["best_trial"] is not None else ""
    if len(final) == 1:  # what the others came to is not known
        return f"On val others were nearly as good, and one was trained again: the mean of both is {means}{chosen}."
    return (
        f"On val {len(final)} trials were nearly as good, and were trained again with another seed. The means of both: "
        f"{means}{chosen}."
    )


def _cost(part: Part, plan: Plan) -> str:
    cost = part.row["cost"]
    where = "in a joint search, " if part.row["joint"] else ""
    said = (
        f"Cost: {where}{cost['gpu_hours']:.2f} hours of GPUs, or of workers where there are none; the search took "
        f"{cost['steps']} optimisation steps"
    )
    if plan.scheduler != "none":
        full = cost["full_steps"]
        return f"{said}, {share(cost['steps'] / full)} of the {full} that all its trials to their ends would take."
    left = replay(plan, part.past, part.found.direct)
    best = max(t.best for t in part.found.trials)
    return (
        f"{said}. Replayed with ASHA, the same trials take {left.steps} steps ({share(left.steps / cost['steps'])}), "
        f"and the best of them on val is {100 * (best - left.best):.1f} points behind."
    )


def _front(trials: Sequence[Trial], plan: Plan) -> str | None:
    """The trials that no other one beats in everything that the study was to make large or small."""
    if not plan.minimize:
        return None
    names = [COST_METRICS[c] for c in plan.minimize]
    said = [
        f"trial {t.number} ({t.best:.3f}; {', '.join(f'{n} {t.metrics[n]:.3g}' for n in names)})"
        for t in front(trials, names)
    ]
    return f"Pareto front on val: {'; '.join(said)}."


def _trusted(trust: Trust) -> str:
    return (
        f"Without masks: over the trials, the label-free score and mIoU on val have a rank correlation (Spearman) of "
        f"{trust.spearman:.2f}; choosing by it would have cost {100 * trust.regret:.1f} points of mIoU on val."
    )


def _warmth(trials: Sequence[Trial]) -> str | None:
    """What the trials that other studies gave were worth, by the search's own trials after them."""
    given = [t for t in trials if t.label.startswith(BEST_OF)]
    if not given:
        return None
    best = max(given, key=lambda t: t.best)
    own = [t for t in trials if t not in given and t.reference is None]
    behind = next((i for i, t in enumerate(own) if t.best >= best.best), None)
    said = f"Warm start: trial {best.number}, the {best.label}, has {best.best:.3f} on val; "
    if behind is None:
        return said + f"none of the search's own {len(own)} trials is as good."
    needed = sum(t.step for t in own[: behind + 1])
    return said + f"the search's own trials took {behind + 1} and {needed} steps to be as good."
