"""A study's report: one HTML page that needs nothing beside it, its table as Markdown, its pictures as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from tuning import joint, plots
from tuning.card import score
from tuning.conclusion import PICTURE, RESULT
from tuning.domain import past
from tuning.listener import ENDED
from tuning.plan import COLUMNS, WORDS, Plan
from tuning.replay import Past, replay
from tuning.sampler import BEST_OF, COST_METRICS, SEARCHED
from tuning.study import PLAN, find_study
from tuning.tracking import Tracker, Trial, trials
from wesam.errors import InputError

PAGE, TABLE = "report.html", "report.md"

HEAD = ["domain", "split", "score", *COLUMNS.values(), "gap closed"]
"""Of the main table."""


@dataclass(frozen=True)
class Part:
    """A domain's part of a report."""

    row: dict[str, Any]
    trials: list[Trial]
    curves: dict[int, plots.Curve]
    past: list[Past]
    """The trials, as a scheduler is told of them."""
    trust: Trust | None
    picture: bytes | None


@dataclass(frozen=True)
class Trust:
    """How well the label-free score would have chosen, where masks are known to tell."""

    spearman: float
    """Rank correlation, over the trials, of the best label-free score of each with the mIoU on val at that step."""
    regret: float
    """The best mIoU on val of all evaluations, Direct's too, less that of the one with the best label-free score."""

    @classmethod
    def of(cls, direct: tuple[float, float], trials: Sequence[Sequence[tuple[float, float]]]) -> Trust | None:
        """From (label-free score, mIoU) of Direct and of each trial's evaluations; None for fewer than three trials."""
        chosen = [max(t) for t in trials if t]
        everything = [direct, *(e for t in trials for e in t)]
        if len(chosen) < 3 or len({s for s, _ in chosen}) < 2 or len({m for _, m in chosen}) < 2:
            return None
        spearman = float(spearmanr([s for s, _ in chosen], [m for _, m in chosen]).statistic)
        return cls(spearman, max(m for _, m in everything) - max(everything)[1])


@dataclass(frozen=True)
class Collected:
    """All that a report shows."""

    result: dict[str, Any]
    plan: Plan
    tags: dict[str, str]
    parts: list[Part]


def collect(tracker: Tracker, name: str) -> Collected:
    """Reads a study from MLflow; raises InputError if there is none or if it has not come to its end."""
    run = find_study(name, tracker)
    files = tracker.files(run.info.run_id, "")
    if RESULT not in files:
        raise InputError(f"the study {name!r} has not come to its end: python -m tuning resume {name}")
    result = json.loads(files[RESULT])
    parts = [_part(tracker, row) for row in result["domains"] if "error" not in row]
    return Collected(result, Plan.from_json(files[PLAN].decode()), dict(run.data.tags), parts)


def _part(tracker: Tracker, row: dict[str, Any]) -> Part:
    found = trials(tracker, row["trials_of"])

    def curve(trial: Trial, called: str) -> plots.Curve:
        name = joint.metric(f"val_{called}", row["domain"]) if row["joint"] else f"val_{called}"
        return sorted((m.step, m.value) for m in tracker.client.get_metric_history(trial.run_id, name))

    curves = {t.number: curve(t, row["val"]["score"]) for t in found}
    pairs = [_pairs(curve(t, "label_free"), curve(t, "miou")) for t in found]
    trust = Trust.of(pairs[0][0], [p[1:] for p in pairs]) if pairs and all(pairs) else None
    return Part(
        row, found, curves, [past(tracker, t) for t in found], trust, tracker.files(row["run_id"], "").get(PICTURE)
    )


def _pairs(scores: plots.Curve, mious: plots.Curve) -> list[tuple[float, float]]:
    """Both scores of each evaluation that has both; the first is Direct's, at step 0."""
    known = dict(mious)
    return [(value, known[step]) for step, value in scores if step in known]


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


def _cells(found: Collected) -> list[list[str]]:
    """The main table: a line per domain and split."""
    rows = []
    for part in found.parts:
        for split, scores in (("test", part.row), ("val", part.row["val"])):
            cells = [score(scores.get(k), scores.get(f"{k}_sd")) for k in COLUMNS]
            rows.append([part.row["domain"], split, WORDS[scores["score"]], *cells, share(scores.get("gap_closed"))])
    return rows


def share(part: float | None) -> str:
    """A share in per cent."""
    return "-" if part is None else f"{100 * part:.0f} %"


def _markdown(found: Collected) -> str:
    lines = [" | ".join(r) for r in (HEAD, ["---"] * len(HEAD), *_cells(found))]
    told = [f"- {p.row['domain']}: {p.row['outcome']}" for p in found.parts]
    told += [f"- {p.row['domain']}: {text}" for p in found.parts for text in _told(p, found.plan)]
    return f"# Study {found.result['study']}\n\n{_about(found)}\n\n" + "\n".join(
        [*(f"| {line} |" for line in lines), "", *told, ""]
    )


def _about(found: Collected) -> str:
    r, gap = found.result, found.result["gap_between_trials"]
    text = (
        f"{r['prompt']} prompts, model {r['model']}; {r['trials']} trials per domain of at most {r['steps']} "
        f"steps, {r['workers']} worker(s) each, seed {r['seed']}; {r['seconds'] / 60:.1f} minutes"
    )
    text += f"; {gap['median']:.2f} s between trials." if gap else "."
    seeds = r.get("seeds", 0)
    if not seeds:
        return text
    if seeds == 1:
        return f"{text} Best found and Supervised on test: with another seed than the search's."
    return f"{text} Best found and Supervised on test: mean and standard deviation over {seeds} other seeds."


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: left }
tr { border-bottom: 1px solid #ddd } .plots { display: flex; flex-wrap: wrap; gap: 1em } img, svg { max-width: 100% }
code { background: #f3f3f3; padding: 0 .3em } small { color: #666 }
"""


def _page(found: Collected) -> str:
    name = escape(found.result["study"])
    failed = [r for r in found.result["domains"] if "error" in r]
    body = [f"<h1>Study {name}</h1><p>{escape(_about(found))}</p>", _table(HEAD, _cells(found))]
    body += [f"<p><b>{escape(r['domain'])}</b> failed: {escape(r['error'])}</p>" for r in failed]
    body += [_domain(p, found.plan) for p in found.parts]
    versions = ", ".join(f"{k.removeprefix('version.')} {v}" for k, v in sorted(found.tags.items()) if "version." in k)
    commit = found.tags.get("mlflow.source.git.commit", "unknown")
    body.append(f"<p><small>run {found.result['run_id']}; commit {escape(commit)}; {escape(versions)}</small></p>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Study {name}</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _domain(part: Part, plan: Plan) -> str:
    row, val = part.row, part.row["val"]
    out = [f"<h2>{escape(row['domain'])}</h2><p>{escape(row['outcome'])}</p>"]
    out += [f"<p>{escape(text)}</p>" for text in _told(part, plan)]
    if part.picture:
        data = base64.b64encode(part.picture).decode()
        out.append(f'<img alt="before and after adaptation" src="data:image/png;base64,{data}">')
    if part.trials:
        drawings = [
            plots.by_trial(part.trials, 0.0, None, joint.JOINTLY[row["joint"]])
            if row["joint"]
            else plots.by_trial(part.trials, val["direct"], val["ellipse"], WORDS[val["score"]]),
            plots.by_step(part.curves, row["best_trial"], WORDS[val["score"]]),
            plots.importances(part.trials, plan.space),
            plots.against_score(part.trials, plan.space),
        ]
        out.append(f'<div class="plots">{"".join(d for d in drawings if d)}</div>')
        out.append(_trials(part, plan))
    return "".join(out)


def _told(part: Part, plan: Plan) -> list[str]:
    """What there is to say of a domain, beside its outcome."""
    told = [
        _gap(part.row), _cost(part, plan), _trusted(part.trust) if part.trust else None, _warmth(part.trials),
        _front(part, plan),
    ]  # fmt: skip
    return [text for text in told if text]


def _gap(row: dict[str, Any]) -> str | None:
    """What can be won at all, and how much of it has been."""
    if row["gap_closed"] is None:
        return None
    gain, most = 100 * (row["best"] - row["direct"]), 100 * (row["supervised"] - row["direct"])
    return (
        f"On test the best found is {gain:+.1f} points above Direct; training on true masks in as many steps "
        f"(Supervised) gives {most:+.1f}: {share(row['gap_closed'])} of that gap is closed."
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
    left = replay(plan, part.past)
    best = max(t.best for t in part.trials)
    return (
        f"{said}. Replayed with ASHA, the same trials take {left.steps} steps ({share(left.steps / cost['steps'])}), "
        f"and the best of them on val is {100 * (best - left.best):.1f} points behind."
    )


def _front(part: Part, plan: Plan) -> str | None:
    """The trials that no other one beats in everything that the study was to make large or small."""
    if not plan.minimize:
        return None
    names = [COST_METRICS[c] for c in plan.minimize]
    rows = [(t, (-t.best, *(t.metrics[n] for n in names))) for t in part.trials]
    front = [
        (t, values) for t, values in rows
        if not any(all(a <= b for a, b in zip(o, values, strict=True)) and o != values for _, o in rows)
    ]  # fmt: skip
    said = [
        f"trial {t.number} ({t.best:.3f}; " + ", ".join(f"{n} {v:.3g}" for n, v in zip(names, v[1:], strict=True)) + ")"
        for t, v in sorted(front, key=lambda f: f[1])
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


def _trials(part: Part, plan: Plan) -> str:
    head = ["trial", "best on val", "at step", "", *plan.space]
    rows = []
    for t in sorted(part.trials, key=lambda t: -t.best):
        named = "" if t.label == SEARCHED else t.label
        note = ", ".join(n for n in (named, ENDED.get(t.ended, "")) if n)
        rows.append([str(t.number), score(t.best), str(t.best_step), note, *(_short(t.config[p]) for p in plan.space)])
    return f"<details><summary>all trials</summary>{_table(head, rows)}</details>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in r)}</tr>" for r in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text
