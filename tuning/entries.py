"""What stands in a table: its runs, whether it may be made from them, and its entries."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuning import gap
from tuning.tables import FREE, ON_VAL, Column, Group, Plan, Row, columns, rows
from wesam.data import Domain, load_domain
from wesam.data.domain import pixels_digest, told_shared


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that is done, as MLflow has it."""

    name: str
    key: tuple[str, str, str]
    seed: int
    trained: bool
    run_id: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    ended: float = 0.0
    """When, in seconds since 1970."""


Cells = Mapping[tuple[str, str, str], Sequence[Cell]]
"""The cells of each group, by its key."""


def check_disjoint(domains: Iterable[Domain]) -> list[str]:
    """A line for each domain of which an image is on val and on test, which would choose by what it judges."""
    out = []
    for domain in domains:
        pixels = {split: {pixels_digest(s): s.key for s in domain.split(split)} for split in ("val", "test")}
        if line := told_shared("val", "test", pixels):
            out.append(f"{domain.name}: {line}")
    return out


def check_cells(plan: Plan, wanted: Sequence[Group], cells: Cells) -> list[str]:
    """A line for each cell for which the table must not be made: what it was chosen on, or its budget, is another's."""
    out = []
    seeds = list(range(1, plan.seeds + 1))
    for group in wanted:
        have = sorted(r.seed for r in cells.get(group.key, ()))
        need = seeds if group.row.method else [0]
        if have != need:
            out.append(f"{group.name}: it has the seeds {_listed(have)}, not {_listed(need)}")
        for run in cells.get(group.key, ()):
            if missing := [n for n in group.after if f"test_miou.after_{n}" not in run.metrics]:
                out.append(f"{run.name}: it was not scored after {_listed(missing)} steps")
    every = [r for group in wanted for r in cells.get(group.key, ())]
    for run in every:
        on = run.tags.get("chosen_on", "what nobody says")
        if on != (ON_VAL if run.trained else FREE):
            out.append(f"{run.name}: it was chosen on {on}, not on val")
    out += _odd(every, "instances of an image on test", lambda r: r.params.get("test_instances", "0"))
    trained = [r for r in every if r.trained]
    out += _odd(trained, "steps", lambda r: r.params.get("steps"))
    out += _odd(trained, "images a step", lambda r: r.params.get("optim.batch_size"))
    out += _odd(trained, "trials", lambda r: r.tags.get("trials"))
    out += _odd(every, "weights", lambda r: r.tags.get("weights"))
    for domain in dict.fromkeys(r.key[1] for r in every):
        out += _odd([r for r in every if r.key[1] == domain], "data", lambda r: r.tags.get("data"))
    return out


def _odd(runs: Sequence[Cell], what: str, of: Callable[[Cell], Any]) -> list[str]:
    """A line for each run that has not what most have."""
    counts = Counter(of(r) for r in runs)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    return [
        f"{r.name}: its {what} ({_short(of(r))}) are not those of most cells ({_short(usual)})"
        for r in runs
        if of(r) != usual
    ]


def _short(value: Any) -> str:
    return "unknown" if value is None else str(value)[:12]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


@dataclass(frozen=True)
class Entry:
    """What stands in a row and a column: the values of its seeds."""

    values: tuple[float, ...]
    share: float | None = None
    """Of the gap between Direct and Supervised, how much is closed; None where it means nothing."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample's standard deviation over the seeds; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Block:
    """A table's part about one domain."""

    domain: str
    rows: list[Row]
    columns: list[Column]
    entries: list[list[Entry | None]]
    """By row, then by column."""

    def marks(self) -> dict[tuple[int, int], str]:
        """Row and column -> ``best`` or ``second`` of the rows that learn from no masks; as shown, equals are equal."""
        out: dict[tuple[int, int], str] = {}
        for j, column in enumerate(self.columns):
            if column.unit != "score":
                continue
            pairs = enumerate(zip(self.rows, self.entries, strict=True))
            known = {i: round(e.mean, 3) for i, (row, line) in pairs if (e := line[j]) and not row.needs_masks}
            for place, mean in zip(("best", "second"), sorted(set(known.values()), reverse=True), strict=False):
                out |= {(i, j): place for i, m in known.items() if m == mean}
        return out

    def of(self, key: str) -> list[Entry | None]:
        """The entries of a row; none, where there is no such row."""
        found = next((i for i, row in enumerate(self.rows) if row.key == key), None)
        return [None] * len(self.columns) if found is None else self.entries[found]


def blocks(plan: Plan, cells: Cells) -> list[Block]:
    """A table's entries, from its runs."""
    out = []
    for domain in dict.fromkeys(load_domain(d).name for d in plan.domains):
        block = Block(domain, rows(plan), columns(plan), [])
        for row in block.rows:
            block.entries.append([_entry(cells, row, domain, column) for column in block.columns])
        if plan.kind == "methods":
            _share(block)
        out.append(block)
    return out


def _entry(cells: Cells, row: Row, domain: str, column: Column) -> Entry | None:
    prompt, metric = column.of(row)
    values = [r.metrics[metric] for r in cells.get((row.key, domain, str(prompt)), ()) if metric in r.metrics]
    return Entry(tuple(values)) if values else None


def _share(block: Block) -> None:
    """Gives the entries of the methods for weak labels their shares of the gap."""
    for j, (low, high) in enumerate(zip(block.of("direct"), block.of("supervised"), strict=True)):
        if not low or not high:
            continue
        for i, row in enumerate(block.rows):
            if (entry := block.entries[i][j]) and row.method and not row.needs_masks:
                block.entries[i][j] = Entry(entry.values, gap.closed(low.mean, entry.mean, high.values))
