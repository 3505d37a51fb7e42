"""A study's report: one HTML page that needs nothing beside it, its table as Markdown, its pictures as files."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tuning import plots
from tuning.domain import PICTURE, RESULT
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
    picture: bytes | None


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
    curves: dict[int, plots.Curve] = {
        t.number: sorted(
            (m.step, m.value) for m in tracker.client.get_metric_history(t.run_id, f"val_{row['val']['score']}")
        )
        for t in found
    }
    return Part(row, found, curves, tracker.files(row["run_id"], "").get(PICTURE))


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


def _trials(part: Part, plan: Plan) -> str:
    head = ["trial", "best on val", "at step", "", *plan.space]
    rows = []
    for t in sorted(part.trials, key=lambda t: -t.best):
        note = t.reference or ("stopped early" if t.pruned else "")
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
