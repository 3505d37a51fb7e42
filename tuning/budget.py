"""How long a study may go on: by the clock, and by the GPU hours of all its trials."""

from __future__ import annotations

import threading
import time

from tuning.plan import Plan


class Budget:
    """The clock of a study, which all its domains share; any thread may ask."""

    def __init__(self, plan: Plan, spent: float = 0.0) -> None:
        """spent: GPU hours of earlier runs of the study."""
        self._plan, self._spent = plan, spent
        self._began = time.monotonic()
        self._running: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Ray pickles what knows of it at the start, and nobody ever reads that."""
        return {}

    def begin(self, domain: str, trial: str) -> None:
        """A trial of this id takes its workers."""
        with self._lock:
            self._running.setdefault((domain, trial), time.monotonic())

    def end(self, domain: str, trial: str) -> float:
        """It gives them back; the GPU hours that it has had."""
        with self._lock:
            began = self._running.pop((domain, trial), None)
            cost = 0.0 if began is None else self._cost(time.monotonic() - began)
            self._spent += cost
            return cost

    def gpu_hours(self) -> float:
        """Those spent until now, running trials included; where there is no GPU, hours of workers."""
        now = time.monotonic()
        with self._lock:
            return self._spent + sum(self._cost(now - began) for began in self._running.values())

    def left(self) -> float | None:
        """Hours by the clock; None where there is no limit."""
        limit = self._plan.hours
        return None if limit == float("inf") else limit - (time.monotonic() - self._began) / 3600

    def over(self) -> bool:
        """Whether nothing new may begin."""
        left = self.left()
        return (left is not None and left <= 0) or self.gpu_hours() >= self._plan.gpu_hours

    def _cost(self, seconds: float) -> float:
        return seconds / 3600 * self._plan.workers * self._plan.gpus_per_worker
