"""What a study shows while it runs: on a terminal a live table below its lines, elsewhere lines alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

QUIET_SECONDS = 30.0
"""Where nobody looks at a terminal, a line appears at least this often."""


@dataclass
class _Domain:
    """What is known of a domain's search."""

    trials: int
    """How many are to be run in all, at most: those of earlier runs and those that confirm the winner too."""
    steps: int
    """Of a trial that runs to its end."""
    skipped: int = 0
    """Trials of earlier runs."""
    running: dict[str, int] = field(default_factory=dict)
    """Trial -> step."""
    ended: list[int] = field(default_factory=list)
    """Steps of the trials that are over."""
    stopped: int = 0
    """How many of them did not run to their end."""
    scored: str = ""
    """What is being scored beside trials; empty if nothing is."""
    direct: float | None = None
    paper: float | None = None
    best: float | None = None
    """Scores on val."""

    @property
    def done(self) -> int:
        return self.skipped + len(self.ended)

    @property
    def steps_done(self) -> int:
        return sum(self.ended) + sum(self.running.values())

    @property
    def steps_left(self) -> float:
        """As many as there will be if trials go on being stopped as they have been."""
        usual = sum(self.ended) / len(self.ended) if self.ended else self.steps
        return max(0.0, (self.trials - self.done) * usual - sum(self.running.values()))


class Board:
    """The lines and the table of a study; any thread may write."""

    def __init__(self, searches: Sequence[str], domains: Sequence[str], trials: int, steps: int) -> None:
        """searches: what the table has a line for. trials: per search, but for :meth:`expect`; steps: of a trial."""
        self._width = max(map(len, (*searches, *domains)))
        self._domains = {s: _Domain(trials, steps) for s in searches}
        self._began = self._last = time.monotonic()
        self._first: float | None = None
        self._lock = threading.RLock()
        self._live: Live | None = None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._live = Live(console=Console(highlight=False), auto_refresh=False, transient=True)

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, domain: str | None = None) -> None:
        """A line that stays, under its domain's name if it has one."""
        label = f"{domain:<{self._width}}  " if domain else ""
        with self._lock:
            line = f"{clock(time.monotonic() - self._began)}  {label}{text}"
            if self._live:
                self._live.console.print(line, markup=False, soft_wrap=True)
            else:
                print(line, flush=True)
            self._last = time.monotonic()

    def expect(self, domain: str, trials: int, done: int) -> None:
        """So many trials in all, of which so many were done in earlier runs of the study."""
        with self._lock:
            self._domains[domain].trials, self._domains[domain].skipped = trials, done

    def searched(self, domain: str) -> None:
        """No trial is to come any more: of those that might have come some were not needed."""
        with self._lock:
            self._domains[domain].trials = self._domains[domain].done

    @contextmanager
    def scoring(self, domain: str, what: str) -> Iterator[None]:
        """While something is scored, before there are any trials or after them."""
        now = self._domains[domain]
        now.scored = what
        try:
            yield
        finally:
            now.scored = ""

    def scores(
        self, domain: str, *, direct: float | None = None, paper: float | None = None, best: float | None = None
    ) -> None:
        """Scores on val that are known now; the best of those given as ``best``, and Direct, is kept."""
        with self._lock:
            now = self._domains[domain]
            now.direct = now.direct if direct is None else direct
            now.paper = now.paper if paper is None else paper
            now.best = max((b for b in (now.best, direct, best) if b is not None), default=None)

    def at(self, domain: str, trial: str, step: int) -> None:
        """A trial has reached a step."""
        with self._lock:
            self._first = self._first or time.monotonic()
            self._domains[domain].running[trial] = step

    def ended(self, domain: str, trial: str, text: str, *, early: bool) -> None:
        """A trial is over; early: it did not run to its end."""
        with self._lock:
            now = self._domains[domain]
            now.ended.append(now.running.pop(trial, 0))
            now.stopped += early
        self.say(text, domain)

    def tick(self) -> None:
        """To be called about once a second: refreshes the table, or says a line when there has been none for long."""
        with self._lock:
            if self._live:
                self._live.update(self._table(), refresh=True)
            elif time.monotonic() - self._last > QUIET_SECONDS:
                self.say(self._now())

    def _left(self) -> float | None:
        """Seconds until the last trial's end, if they go on at the pace until now."""
        rows = self._domains.values()
        done = sum(r.steps_done for r in rows)
        if self._first is None or not done:
            return None
        return sum(r.steps_left for r in rows) * (time.monotonic() - self._first) / done

    def _now(self) -> str:
        rows = self._domains.values()
        left = self._left()
        said = f"{sum(r.done for r in rows)} of {sum(r.trials for r in rows)} trials done"
        said += f", about {clock(left).strip()} left" if left else ""
        running = [f"{d} {n} at step {s}" for d, r in self._domains.items() for n, s in sorted(r.running.items())]
        scored = [f"{d}, {r.scored}" for d, r in self._domains.items() if r.scored]
        said += f"; scoring {'; '.join(scored)}" if scored else ""
        return said + (f"; running: {', '.join(running)}" if running else "")

    def _table(self) -> Table:
        left = self._left()
        title = f"{clock(time.monotonic() - self._began).strip()} gone"
        title += f", about {clock(left).strip()} left" if left else ""
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("domain")
        for head in ("done", "running", "stopped early", "Direct", "paper's", "best so far", "gain"):
            table.add_column(head, justify="right")
        for name, r in self._domains.items():
            known = r.best is not None and r.direct is not None
            gain = f"{100 * (r.best - r.direct):+.1f}" if known else ""  # type: ignore[operator]
            scores = ("" if s is None else f"{s:.3f}" for s in (r.direct, r.paper, r.best))
            table.add_row(name, f"{r.done}/{r.trials}", str(len(r.running)), str(r.stopped), *scores, gain)
        return table


def clock(seconds: float) -> str:
    """Minutes and seconds, as ``12:05``."""
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"
