"""What there is to say of a table in words, so that nobody overlooks it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tuning import gap
from tuning.entries import Block, Cells, Entry
from tuning.plan import load_domains
from tuning.tables import Plan, Row

BELOW = 0.02
"""What is below Direct by more than so much mIoU has to be said."""

NOTHING = 0.0005
"""A difference in mIoU that is none when it is written in points."""

IN_THE_PAPER = {
    ("coco", "box"): "WeSAM has 0.801 in the paper, and about 0.765 in many runs of the published code by a user of it",
}
"""Published values, by domain and kind of prompt, as far as a public record says them: issue 18 of the paper's code."""


def words(plan: Plan, blocks: Sequence[Block], cells: Cells) -> list[str]:
    """What a reader must not overlook: a line for each row of which there is something to say."""
    out = [*_harm(blocks), *_luck(blocks)]
    if plan.kind == "methods":
        out += [*_drawn(blocks), *_no_gap(plan, blocks), *_published(plan, blocks)]
    if plan.kind == "losses":
        out += _effects(blocks)
    if plan.kind == "long":
        out += [line for block in blocks for line in _decay(block)]
    out += _unmoved(blocks, cells)
    if plan.seeds == 1:
        out.append("One seed each: no spread is known, and any difference may be luck.")
    every = [c for found in cells.values() for c in found]
    if diverged := [c.name for c in every if c.tags.get("ended") == "diverged"]:
        out.append(f"Diverged before the last step, and counted with what had been reached: {', '.join(diverged)}.")
    commits = distinct(c.tags.get("mlflow.source.git.commit", "unknown") for c in every)
    if len(commits) > 1:
        out.append(f"The cells were computed at {len(commits)} commits, which are named below.")
    return out


def distinct(texts: Iterable[str]) -> list[str]:
    """The different ones, in order."""
    return sorted(set(texts))


def _beside(blocks: Iterable[Block], key: str) -> Iterator[tuple[Row, str, Entry, Entry]]:
    """Each score of each other row that is trained: the row, where it is, itself, and the same of the row ``key``."""
    for block in blocks:
        other = block.of(key)
        for row, entries in zip(block.rows, block.entries, strict=True):
            for column, entry, beside in zip(block.columns, entries, other, strict=True):
                if row.method and row.key != key and column.unit == "score" and entry and beside:
                    yield row, f"{block.domain} {column.title}", entry, beside


def _by_row(found: Iterable[tuple[Row, str]]) -> dict[str, list[str]]:
    """Title -> what there is to say of the row."""
    out: dict[str, list[str]] = defaultdict(list)
    for row, said in found:
        out[row.title].append(said)
    return out


def _harm(blocks: Sequence[Block]) -> list[str]:
    """Who is well below Direct."""
    found = _by_row(
        (row, f"{where} {_points(entry, low)} ({entry.mean:.3f} against {low.mean:.3f})")
        for row, where, entry, low in _beside(blocks, "direct")
        if entry.mean - low.mean < -BELOW
    )
    return [
        f"**{title} does harm**, more than {100 * BELOW:.0f} points below Direct: {'; '.join(said)}."
        for title, said in found.items()
    ]


def _luck(blocks: Sequence[Block]) -> list[str]:
    """Of whom the spread leaves it open on which side of Direct they are."""
    found = _by_row(
        (row, f"{where} {_points(entry, low)} (spread {100 * entry.spread:.1f})")
        for row, where, entry, low in _beside(blocks, "direct")
        if entry.spread is not None and NOTHING < abs(entry.mean - low.mean) < entry.spread
    )
    return [
        f"{title} is above or below Direct by less than its spread over seeds, which may be luck: {'; '.join(said)}."
        for title, said in found.items()
    ]


def _unmoved(blocks: Sequence[Block], cells: Cells) -> list[str]:
    """Where val preferred the model as it is to every step of a training."""
    found: list[tuple[Row, str]] = []
    for block in blocks:
        for row in block.rows:
            for prompt in row.prompts if row.method else ():
                runs = cells.get((row.key, block.domain, prompt), ())
                if still := sum(c.metrics.get("best_step") == 0 for c in runs):
                    found.append((row, f"{block.domain} {prompt} {still} of {len(runs)}"))
    return [
        f"{title}: no step was better on val than the model as it is, which then counts, with so many seeds: "
        f"{'; '.join(said)}."
        for title, said in _by_row(found).items()
    ]


def _drawn(blocks: Sequence[Block]) -> list[str]:
    """Who is below the best of what is drawn from the weak labels alone."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for block in blocks:
        for j, column in enumerate(block.columns):
            scores = [(row, e.mean) for row, line in zip(block.rows, block.entries, strict=True) if (e := line[j])]
            drawn = [(mean, row.title) for row, mean in scores if row.drawing]
            others = [(mean, row.title) for row, mean in scores if not row.drawing]
            most, title = max(drawn, default=(0.0, ""))
            if beaten := [t for mean, t in others if mean < most]:
                whom = "all others" if len(beaten) == len(others) else ", ".join(beaten)
                found[title, whom].append(f"{block.domain} {column.title}")
    return [
        f"{title[:1].upper()}{title[1:]}, which needs no model, is above {whom}: {', '.join(places)}."
        for (title, whom), places in found.items()
    ]


def _no_gap(plan: Plan, blocks: Sequence[Block]) -> list[str]:
    if "supervised" not in plan.methods:
        return ["Supervised is not among the methods: what share of what could be won they win is not known."]
    places = [
        where
        for row, where, entry, low in _beside(blocks, "direct")
        if row.key == "supervised" and not gap.is_one(low.mean, entry.values)
    ]
    said = "Supervised is not above Direct by more than its spread, so there is no gap to close"
    return [f"{said}: {'; '.join(places)}."] if places else []


def _published(plan: Plan, blocks: Sequence[Block]) -> list[str]:
    """The paper's own values, where model, weights, data and what the model is shown are the paper's."""
    if plan.model != "vit_b" or plan.base.crop:  # by its name a model is read from the published weights alone
        return []
    real = {d.name for d in load_domains(plan.domains) if d.published}
    return [
        f"{block.domain} {column.title}: {said}."
        for block in blocks
        if block.domain in real
        for column in block.columns
        if (said := IN_THE_PAPER.get((block.domain, str(column.prompt))))
    ]


def _effects(blocks: Sequence[Block]) -> list[str]:
    """What each loss adds to self-training alone."""
    found = _by_row((row, f"{where} {_effect(entry, alone)}") for row, where, entry, alone in _beside(blocks, "self"))
    return [f"{title}, beside self-training alone: {'; '.join(said)}." for title, said in found.items()]


def _decay(block: Block) -> list[str]:
    """Whether self-training decays, and whether the anchor holds it."""
    out = []
    for j in range(0, len(block.columns), 3):
        ends = {k: block.of(f"{k}-anchor")[j : j + 3] for k in ("with", "without")}
        where = f"{block.domain} {block.columns[j].prompt}"
        for k, (best, first, last) in ends.items():
            if best and first and last:
                fall = "decays" if last.mean < best.mean - _wider(best, last) else "does not decay"
                out.append(
                    f"{where}: {k} the anchor loss self-training {fall}: {_effect(last, best)} from the step that is "
                    f"best on val to the last one, {_effect(last, first)} from the usual number of steps."
                )
        held, free = ends["with"][2], ends["without"][2]
        if held and free:
            out.append(f"{where}: after the last step the anchor loss makes {_effect(held, free)}.")
    return out


def _points(entry: Entry, other: Entry) -> str:
    return f"{100 * (entry.mean - other.mean):+.1f} points"


def _effect(entry: Entry, other: Entry) -> str:
    """A difference, with the spread where that is larger."""
    if abs(entry.mean - other.mean) <= NOTHING:
        return "no difference"
    spread = _wider(entry, other)
    doubt = f" (less than the spread, {100 * spread:.1f})" if abs(entry.mean - other.mean) < spread else ""
    return _points(entry, other) + doubt


def _wider(entry: Entry, other: Entry) -> float:
    return max(entry.spread or 0.0, other.spread or 0.0)
