"""How long a study may go on: by the clock, and by the GPU hours of all its trials."""

from __future__ import annotations

import threading
import time

from tuning.plan import Plan


class Budget:
    """The clock of a study, which all its domains share; any thread may ask."""

    def __init__(
        self, plan: Plan, search: float = 0.0, rest: float = 0.0, *, share: float = 1.0, before: float = 0.0
    ) -> None:
        """search, rest: GPU hours of the study until it was interrupted, of the search and of what confirms it. share:
        of a GPU that a worker has; 1 where there are none. before: hours by the clock until it was interrupted.
        """
        self._plan, self._share, self._before = plan, share, before
        self._spent = {True: search, False: rest}
        """By whether it is the search's."""
        self._began = time.monotonic()
        self._running: dict[tuple[str, str], tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Ray pickles what knows of it at the start, and nobody ever reads that."""
        return {}

    def begin(self, domain: str, trial: str, *, search: bool = True) -> None:
        """A trial of this id takes its workers; search: whether it is one of the search, whose budget this is."""
        with self._lock:
            self._running.setdefault((domain, trial), (time.monotonic(), search))

    def of(self, domain: str, trial: str) -> float:
        """The GPU hours that a running trial has had until now."""
        with self._lock:
            began, _ = self._running.get((domain, trial), (time.monotonic(), True))
            return self._cost(began)

    def end(self, domain: str, trial: str) -> float:
        """It gives them back; the GPU hours that it has had."""
        with self._lock:
            began, search = self._running.pop((domain, trial), (time.monotonic(), True))
            cost = self._cost(began)
            self._spent[search] += cost
            return cost

    def gpu_hours(self, *, search: bool = False) -> float:
        """Those spent until now, running trials included; without GPUs, workers' hours. search: its trials' alone."""
        with self._lock:
            running = sum(self._cost(began) for began, its in self._running.values() if its or not search)
            return self._spent[True] + (0.0 if search else self._spent[False]) + running

    def hours(self) -> float:
        """By the clock, for as long as the study was run."""
        return self._before + (time.monotonic() - self._began) / 3600

    def over(self) -> bool:
        """Whether nothing new may begin."""
        return self.hours() >= self._plan.hours or self.gpu_hours(search=True) >= self._plan.gpu_hours

    def _cost(self, began: float) -> float:
        return (time.monotonic() - began) / 3600 * self._plan.workers * self._share
