"""HTML that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from tuning.card import score
from tuning.findings import Findings
from tuning.listener import ENDED
from tuning.sampler import SEARCHED
from tuning.space import Space

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: left }
tr { border-bottom: 1px solid #ddd } .plots { display: flex; flex-wrap: wrap; gap: 1em } img, svg { max-width: 100% }
code { background: #f3f3f3; padding: 0 .3em } small { color: #666 } .wide { overflow-x: auto; font-size: 11px }
.wide th, .wide td { padding: .2em .4em; vertical-align: top } .best { font-weight: bold }
"""


def document(title: str, body: str) -> str:
    """A page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>{body}</html>\n"
    )


def text(plain: str) -> str:
    """A sentence in which what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(plain))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> str:
    """best: the row that stands out."""
    cells = "".join(f"<th>{_breakable(h)}</th>" for h in head)
    lines = "".join(
        f"<tr{' class=best' if i == best else ''}>{''.join(f'<td>{_breakable(c)}</td>' for c in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _breakable(name: str) -> str:
    return re.sub(r"([._+])(?=[a-z])", r"\1<wbr>", escape(name))


def trials(found: Findings, space: Space) -> str:
    """The table of a search's trials, the best first."""
    head = ["trial", f"best val {found.word}", "at step", "", *space]
    rows = []
    ranked = sorted(found.trials, key=lambda t: -t.best)
    for t in ranked:
        note = ", ".join(n for n in ("" if t.label == SEARCHED else t.label, ENDED.get(t.ended, "")) if n)
        rows.append([str(t.number), score(t.best), str(t.best_step), note, *(_short(t.config[p]) for p in space)])
    best = next((i for i, t in enumerate(ranked) if t.number == found.row["best_trial"]), None)
    return f'<div class="wide">{table(head, rows, best=best)}</div>'


def _short(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
