"""What a study shows while it runs: a line per event and, on a terminal, one that says what is going on now."""

from __future__ import annotations

import sys
import threading
import time

QUIET_SECONDS = 30.0
"""Where nobody looks at a terminal, a line appears at least this often."""


class Board:
    """The lines of a study; any thread may write."""

    def __init__(self, domains: list[str], trials: int, steps: int) -> None:
        self._width = max(map(len, domains))
        self._total, self._trials, self._steps = trials * len(domains), trials, steps
        self._running: dict[tuple[str, int], int] = {}
        self._ended = self._skipped = 0
        self._began = self._last = time.monotonic()
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()

    def say(self, text: str, domain: str | None = None) -> None:
        """A line that stays, under its domain's name if it has one."""
        label = f"{domain:<{self._width}}  " if domain else ""
        with self._lock:
            self._clear()
            print(f"{_clock(time.monotonic() - self._began)}  {label}{text}", flush=True)
            self._last = time.monotonic()

    def skip(self, trials: int) -> None:
        """These trials were done in an earlier run of the study."""
        self._skipped += trials

    def at(self, domain: str, trial: int, step: int) -> None:
        """A trial has reached a step."""
        with self._lock:
            self._running[domain, trial] = step

    def ended(self, domain: str, trial: int, text: str) -> None:
        """A trial is over."""
        with self._lock:
            self._running.pop((domain, trial), None)
            self._ended += 1
        self.say(f"trial {trial}/{self._trials}  {text}", domain)

    def tick(self) -> None:
        """To be called about once a second: refreshes the line of what is going on."""
        now = time.monotonic()
        with self._lock:
            if self._terminal:
                self._clear()
                print(f"{_clock(now - self._began)}  {self._now(now)}"[:120], end="", file=sys.stderr, flush=True)
            quiet = not self._terminal and now - self._last > QUIET_SECONDS
        if quiet:
            self.say(self._now(now))

    def _now(self, now: float) -> str:
        done = self._ended + self._skipped
        left = ""
        if self._ended and done < self._total:
            left = f", about {_clock((now - self._began) / self._ended * (self._total - done)).strip()} left"
        running = [f"{d} {n} at step {s}/{self._steps}" for (d, n), s in sorted(self._running.items())]
        return f"{done} of {self._total} trials done{left}" + (f"; running: {', '.join(running)}" if running else "")

    def _clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"
