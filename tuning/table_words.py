"""What there is to say of a table in words, so that nobody overlooks it."""

from __future__ import annotations

from collections.abc import Iterable

from tuning.entries import Block, Cells, Entry
from tuning.tables import Plan

BELOW = 0.02
"""What is below Direct by more than so much mIoU has to be said."""


def words(plan: Plan, parts: Iterable[Block], cells: Cells) -> list[str]:
    """What a reader must not overlook, a sentence or two each."""
    out = []
    for block in parts:
        out += _against_direct(block)
        out += _no_gap(block) if plan.kind == "methods" else []
        out += _effects(block) if plan.kind == "losses" else []
        out += _decay(block) if plan.kind == "long" else []
    if plan.kind == "methods" and "supervised" not in plan.methods:
        out.append("Supervised is not among the methods: what share of what could be won they win is not known.")
    if plan.seeds == 1:
        out.append("One seed each: no spread is known, and any difference may be luck.")
    diverged = [c.name for found in cells.values() for c in found if c.tags.get("ended") == "diverged"]
    if diverged:
        out.append(f"Diverged before the last step, and counted with what had been reached: {', '.join(diverged)}.")
    commits = distinct(c.tags.get("mlflow.source.git.commit", "unknown") for found in cells.values() for c in found)
    if len(commits) > 1:
        out.append(f"The cells were computed at {len(commits)} commits, which are named below.")
    return out


def _against_direct(block: Block) -> list[str]:
    """Who is well below Direct, and of whom the spread leaves it open on which side of it they are."""
    far, near = [], []
    direct = block.of("direct")
    for row, entries in zip(block.rows, block.entries, strict=True):
        for column, entry, low in zip(block.columns, entries, direct, strict=True):
            if not row.method or entry is None or low is None or column.unit != "score":
                continue
            gain, spread = entry.mean - low.mean, entry.spread
            where = f"{block.domain}, {column.title}: {row.title} is {_points(gain)} Direct"
            if gain < -BELOW:
                far.append(f"{where} ({entry.mean:.3f} against {low.mean:.3f}): it does harm here.")
            if spread is not None and abs(gain) < spread:
                near.append(f"{where}, less than its spread over the seeds ({100 * spread:.1f}): it may be luck.")
    return far + near


def _no_gap(block: Block) -> list[str]:
    pairs = zip(block.columns, block.of("direct"), block.of("supervised"), strict=True)
    return [
        f"{block.domain}, {column.title}: Supervised is not above Direct, so there is no gap to close."
        for column, low, high in pairs
        if low and high and high.mean <= low.mean
    ]


def _effects(block: Block) -> list[str]:
    """What each loss adds to self-training alone."""
    out = []
    for row in block.rows:
        if not row.method or row.key == "self":
            continue
        for column, entry, alone in zip(block.columns, block.of(row.key), block.of("self"), strict=True):
            if entry and alone:
                out.append(f"{block.domain}, {column.title}: {row.title} is {_compared(entry, alone)} "
                           "self-training alone.")  # fmt: skip
    return out


def _decay(block: Block) -> list[str]:
    """Whether self-training decays, and whether the anchor holds it."""
    out = []
    for j in range(0, len(block.columns), 3):
        ends = {k: block.of(f"{k}-anchor")[j : j + 3] for k in ("with", "without")}
        where = f"{block.domain}, {block.columns[j].prompt}"
        for k, (_, first, last) in ends.items():
            if first and last:
                fall = "decays" if last.mean < first.mean - _wider(first, last) else "does not decay"
                out.append(
                    f"{where}: {k} the anchor loss self-training {fall}: after the last step it is "
                    f"{_compared(last, first)} what it was after the usual steps."
                )
        held, free = ends["with"][2], ends["without"][2]
        if held and free:
            gain = _compared(held, free)
            out.append(f"{where}: after the last step, with the anchor loss it is {gain} what it is without.")
    return out


def _compared(entry: Entry, other: Entry) -> str:
    gain, spread = entry.mean - other.mean, _wider(entry, other)
    doubt = f" (less than the spread, {100 * spread:.1f})" if abs(gain) < spread else ""
    return f"{100 * abs(gain):.1f} points{doubt} {'below' if gain < 0 else 'above'}"


def _wider(entry: Entry, other: Entry) -> float:
    return max(entry.spread or 0.0, other.spread or 0.0)


def _points(gain: float) -> str:
    return f"{100 * abs(gain):.1f} points {'below' if gain < 0 else 'above'}"


def distinct(texts: Iterable[str]) -> list[str]:
    """The different ones, in order."""
    return sorted(set(texts))
