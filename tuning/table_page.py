"""A table as Markdown, as LaTeX and as plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os.path import isabs, relpath
from shlex import quote
from typing import Any

from tuning.card import score
from tuning.entries import Block, Cell, Cells, Entry, blocks
from tuning.plan import shown
from tuning.report import share
from tuning.table_words import distinct, words
from tuning.tables import LONGER, Column, Kind, Plan, title_of
from wesam.config import Config
from wesam.methods import METHODS

CAPTIONS: dict[Kind, str] = {
    "methods": "Methods side by side: test mIoU with each kind of weak label",
    "losses": "The losses one by one: test mIoU",
    "cross": "Weak labels in training by prompts at test: test mIoU",
    "modules": "What is trained: test mIoU and cost",
    "long": f"{LONGER} times the steps, with and without the anchor loss: test mIoU",
}

ABOUT: dict[Kind, str] = {
    "methods": "Every method adapts the same model to the same images with the same weak labels, in as many steps "
    "of as many images. The first rows need no model: they are drawn from the weak labels alone. Direct is the model "
    "as it is. Supervised learns from the true masks and shows what could be won. In brackets: the share of the gap "
    "between Direct and Supervised that a method closes.",
    "losses": "Self-training takes the model's own masks as its targets; the anchor loss holds it to the unadapted "
    "model, the contrastive loss does so feature by feature. Each row has those that it names, with each kind of weak "
    "label and, as grid, with no labels at all but the clicks that the model itself is sure of (scored with {grid} "
    "prompts).",
    "cross": "Each row is trained with one kind of weak label, and its best checkpoint on val, which is prompted with "
    "the same kind, meets test with every kind.",
    "modules": "Each row trains another part of the model with the same method. Parameters are those that are trained; "
    "memory is the most that the tensors of a step take on a GPU ({memory}); seconds are the median of a step on the "
    "machine named below, with other cells beside it.",
    "long": "Self-training learns from its own mistakes, and can be undone by them. Each row trains {longer} times as "
    "long as usual and shows the checkpoint that is best on val, the model after the usual steps, and that after the "
    "last one, whatever val says of these two.",
}


@dataclass(frozen=True)
class Made:
    """What a table was made with."""

    command: str
    commits: list[str]
    seeds: str
    budget: str
    weights: str
    data: dict[str, str]
    """Domain -> digest."""
    dates: str
    hardware: list[str]


def made(plan: Plan, cells: Cells) -> Made:
    """What the cells say of it."""
    every = [c for found in cells.values() for c in found]
    days = sorted(time.strftime("%Y-%m-%d", time.gmtime(c.ended)) for c in every)
    trials = f"{plan.trials} trials each, chosen on val" if plan.trials > 1 else "1 trial: each method's defaults"
    return Made(
        command=command(plan),
        commits=distinct(c.tags.get("mlflow.source.git.commit", "unknown") for c in every),
        seeds=", ".join(str(s) for s in range(1, plan.seeds + 1)),
        budget=f"{plan.steps} steps of {plan.base.optim.batch_size} images; {trials}",
        weights=f"{plan.model}, SHA-256 {every[0].tags['weights'][:12]}",
        data={c.key[1]: c.tags["data"] for c in every},
        dates=" to ".join(dict.fromkeys((days[0], days[-1]))),
        hardware=distinct(c.tags.get("hardware", "unknown") for c in every),
    )


def command(plan: Plan) -> str:
    """What makes the table, in this folder: a table is handed on, and where all lies on a machine is its owner's."""
    domains = map(_from_here, plan.domains)
    parts = ["python -m tuning table", plan.kind, "--domains", *domains, "--model", _from_here(plan.model)]
    parts += ["--prompts", *plan.prompts, "--methods", *plan.methods, f"--seeds {plan.seeds} --trials {plan.trials}"]
    parts += [f"--steps {plan.base.steps}", *([f"--crop {plan.base.crop:g}"] if plan.base.crop else [])]
    parts += ["--set", *map(quote, plan.fixed)] if plan.fixed else []
    parts += ["--name", plan.name] if plan.name != f"table-{plan.kind}" else []
    return shown(" ".join(parts))


def _from_here(place: str) -> str:
    return quote(relpath(place) if isabs(place) else place)


def markdown(plan: Plan, cells: Cells) -> str:
    """The whole page."""
    parts, about = blocks(plan, cells), made(plan, cells)
    out = [f"# {CAPTIONS[plan.kind]}", _about(plan, cells)]
    for block in parts:
        head = ["", *(c.title for c in block.columns)]
        marks = block.marks()
        lines = [head, ["---"] * len(head)]
        for i, (row, entries) in enumerate(zip(block.rows, block.entries, strict=True)):
            pairs = enumerate(zip(entries, block.columns, strict=True))
            texts = [_marked(_text(e, c), marks.get((i, j)), e) for j, (e, c) in pairs]
            lines.append([row.title, *texts])
        out += [f"## {block.domain}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    said = words(plan, parts, cells)
    out += ["## In words", "\n".join(f"- {line}" for line in said)] if said else []
    out += ["## How it was made", _made_text(about)]
    return "\n\n".join(out) + "\n"


def _about(plan: Plan, cells: Cells) -> str:
    memory = {c.tags["memory"] for found in cells.values() for c in found if "peak_gib" in c.metrics}
    said = [ABOUT[plan.kind].format(grid=plan.base.val_prompt, memory=" and ".join(sorted(memory)), longer=LONGER)]
    spread = f" ± sample standard deviation over {plan.seeds} seeds, never the best of them" if plan.seeds > 1 else ""
    said.append(f"Figures are means{spread}. Checkpoints are chosen by mIoU on val; test chooses nothing.")
    if plan.trials > 1:
        said.append(
            f"Hyperparameters are the best on val of {plan.trials} trials for each row, domain and kind of label (of "
            "those that are as good but for a tenth of a point the first: the defaults, where they are among them)."
        )
    if most := plan.base.test_instances:
        said.append(f"Of each image of test at most {most} instances are scored.")
    said.append("Of the rows that learn from no masks the **best** and the _second_ are marked.")
    notes = [f"- {title_of(m)}: {METHODS[m].note}" for m in plan.methods]
    return "\n\n".join([" ".join(said), "\n".join(notes)])


def _text(entry: Entry | None, column: Column) -> str:
    if entry is None:
        return "-"
    if column.unit == "count":
        return f"{entry.mean:,.0f}"
    return f"{entry.mean:.2f}" if column.unit == "GiB" else score(entry.mean, entry.spread)


def _marked(text: str, mark: str | None, entry: Entry | None) -> str:
    around = {"best": "**", "second": "_"}.get(mark or "", "")
    closed = f" ({share(entry.share)})" if entry and entry.share is not None else ""
    return f"{around}{text}{around}{closed}"


def _made_text(about: Made) -> str:
    rows = {
        "command": f"`{about.command}`", "commit": ", ".join(about.commits), "model": about.weights,
        "budget": about.budget, "seeds": about.seeds,
        "data": "; ".join(f"{d} {digest[:16]}" for d, digest in about.data.items()),
        "date": about.dates, "hardware": "; ".join(about.hardware),
    }  # fmt: skip
    return "\n".join(f"- {k}: {v}" for k, v in rows.items())


_ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def escaped(text: str) -> str:
    """The text as LaTeX prints it."""
    return "".join(_ESCAPED.get(c, c) for c in text)


def latex(plan: Plan, cells: Cells) -> str:
    """The table for a paper: booktabs, best bold, second underlined, a part for each domain."""
    parts, about = blocks(plan, cells), made(plan, cells)
    heads = parts[0].columns
    lines = [
        f"% {shown(about.command)}", f"% commit {', '.join(about.commits)}; {about.dates}; {'; '.join(about.hardware)}",
        r"\begin{table}", r"\centering", rf"\caption{{{escaped(CAPTIONS[plan.kind])}}}", rf"\label{{tab:{plan.kind}}}",
        rf"\begin{{tabular}}{{{'l' * (1 + len(heads))}}}", r"\toprule",
        " & ".join(["", *(escaped(c.title) for c in heads)]) + r" \\",
    ]  # fmt: skip
    for block in parts:
        marks = block.marks()
        lines += [r"\midrule", rf"\multicolumn{{{len(heads) + 1}}}{{l}}{{\emph{{{escaped(block.domain)}}}}} \\"]
        for i, (row, entries) in enumerate(zip(block.rows, block.entries, strict=True)):
            texts = [_latex_entry(e, c, marks.get((i, j))) for j, (e, c) in enumerate(zip(entries, heads, strict=True))]
            lines.append(" & ".join([escaped(row.title), *texts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_entry(entry: Entry | None, column: Column, mark: str | None) -> str:
    if entry is None:
        return "--"
    mean, _, spread = _text(entry, column).partition(" ± ")
    macro = {"best": "textbf", "second": "underline"}.get(mark or "")
    out = rf"\{macro}{{{mean}}}" if macro else mean
    out += rf" {{\scriptsize$\pm${spread}}}" if spread else ""
    return out + (rf" ({round(100 * entry.share)}\,\%)" if entry.share is not None else "")


def data(plan: Plan, cells: Cells) -> dict[str, Any]:
    """All values, for programs."""
    parts = blocks(plan, cells)
    return {
        "table": plan.kind, "name": plan.name, "caption": CAPTIONS[plan.kind], **asdict(made(plan, cells)),
        "in_words": words(plan, parts, cells),
        "domains": {block.domain: _rows(block) for block in parts},
        "cells": [_cell(c) for found in cells.values() for c in found],
    }  # fmt: skip


def _rows(block: Block) -> list[dict[str, Any]]:
    marks = block.marks()
    return [
        {
            "row": row.key, "title": row.title,
            "entries": {
                column.title: None if entry is None else {
                    "mean": entry.mean, "sd": entry.spread, "values": list(entry.values), "share": entry.share,
                    "mark": marks.get((i, j)),
                }
                for j, (column, entry) in enumerate(zip(block.columns, entries, strict=True))
            },
        }
        for i, (row, entries) in enumerate(zip(block.rows, block.entries, strict=True))
    ]  # fmt: skip


def _cell(cell: Cell) -> Mapping[str, Any]:
    published, config = Config().flat(), Config.from_texts(cell.params).flat()
    about = {k: cell.tags.get(k) for k in ("hardware", "chosen_on", "trials", "mlflow.source.git.commit")}
    return {
        "name": cell.name, "seed": cell.seed, "run_id": cell.run_id, **about,
        "metrics": dict(cell.metrics), "config": {k: v for k, v in config.items() if v != published[k]},
    }  # fmt: skip
