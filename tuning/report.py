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

from tuning import plots
from tuning.conclusion import PICTURE, RESULT
from tuning.listener import ENDED
from tuning.plan import COLUMNS, WORDS, Plan
from tuning.study import PLAN, find_study
from tuning.tracking import Tracker, Trial, trials
from wesam.errors import InputError

PAGE, TABLE = "report.html", "report.md"


@dataclass(frozen=True)
class Part:
    """A domain's part of a report."""

    row: dict[str, Any]
    trials: list[Trial]
    curves: dict[int, plots.Curve]
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
    found = trials(tracker, row["run_id"])

    def curve(trial: Trial, score: str) -> plots.Curve:
        return sorted((m.step, m.value) for m in tracker.client.get_metric_history(trial.run_id, f"val_{score}"))

    curves = {t.number: curve(t, row["val"]["score"]) for t in found}
    pairs = [_pairs(curve(t, "label_free"), curve(t, "miou")) for t in found]
    trust = Trust.of(pairs[0][0], [p[1:] for p in pairs]) if pairs and all(pairs) else None
    return Part(row, found, curves, trust, tracker.files(row["run_id"], "").get(PICTURE))


def _pairs(scores: plots.Curve, mious: plots.Curve) -> list[tuple[float, float]]:
    """Both scores of each evaluation that has both; the first is Direct's, at step 0."""
    known = dict(mious)
    return [(score, known[step]) for step, score in scores if step in known]


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
            rows.append([part.row["domain"], split, WORDS[scores["score"]], *(_number(scores[k]) for k in COLUMNS)])
    return rows


def _markdown(found: Collected) -> str:
    head = ["domain", "split", "score", *COLUMNS.values()]
    lines = [" | ".join(r) for r in (head, ["---"] * len(head), *_cells(found))]
    told = [f"- {p.row['domain']}: {p.row['outcome']}" for p in found.parts]
    told += [f"- {p.row['domain']}: {_trusted(p.trust)}" for p in found.parts if p.trust]
    return f"# Study {found.result['study']}\n\n{_about(found)}\n\n" + "\n".join(
        [*(f"| {line} |" for line in lines), "", *told, ""]
    )


def _about(found: Collected) -> str:
    r, gap = found.result, found.result["gap_between_trials"]
    text = (
        f"{r['prompt']} prompts, model {r['model']}; {r['trials']} trials per domain of at most {r['steps']} "
        f"steps, {r['workers']} worker(s) each, seed {r['seed']}; {r['seconds'] / 60:.1f} minutes"
    )
    return text + (f"; {gap['median']:.2f} s between trials." if gap else ".")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: left }
tr { border-bottom: 1px solid #ddd } .plots { display: flex; flex-wrap: wrap; gap: 1em } img, svg { max-width: 100% }
code { background: #f3f3f3; padding: 0 .3em } small { color: #666 }
"""


def _page(found: Collected) -> str:
    name = escape(found.result["study"])
    head = ["domain", "split", "score", *COLUMNS.values()]
    failed = [r for r in found.result["domains"] if "error" in r]
    body = [f"<h1>Study {name}</h1><p>{escape(_about(found))}</p>", _table(head, _cells(found))]
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
    told = [_trusted(part.trust) if part.trust else None, _warmth(part.trials)]
    out += [f"<p>{escape(text)}</p>" for text in told if text]
    if part.picture:
        data = base64.b64encode(part.picture).decode()
        out.append(f'<img alt="before and after adaptation" src="data:image/png;base64,{data}">')
    if part.trials:
        drawings = [
            plots.by_trial(part.trials, val["direct"], val["ellipse"], WORDS[val["score"]]),
            plots.by_step(part.curves, row["best_trial"], WORDS[val["score"]]),
            plots.importances(part.trials, plan.space),
            plots.against_score(part.trials, plan.space),
        ]
        out.append(f'<div class="plots">{"".join(d for d in drawings if d)}</div>')
        out.append(_trials(part, plan))
    return "".join(out)


def _trusted(trust: Trust) -> str:
    return (
        f"Without masks: over the trials, the label-free score and mIoU on val have a rank correlation (Spearman) of "
        f"{trust.spearman:.2f}; choosing by it would have cost {100 * trust.regret:.1f} points of mIoU on val."
    )


def _warmth(trials: Sequence[Trial]) -> str | None:
    """What the trials that other studies gave were worth, by the search's own trials after them."""
    given = [t for t in trials if t.label.startswith("best of ")]
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
        named = t.label if t.reference or t.label.startswith("best of ") else ""
        note = ", ".join(n for n in (named, ENDED.get(t.ended, "")) if n)
        rows.append(
            [str(t.number), _number(t.best), str(t.best_step), note, *(_short(t.config[p]) for p in plan.space)]
        )
    return f"<details><summary>all trials</summary>{_table(head, rows)}</details>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in r)}</tr>" for r in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text
