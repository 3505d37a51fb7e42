"""Who may begin a trial, where the searches of a study share a cluster."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Places:
    """Keeps a place for each search that has begun no trial yet, or is to be concluded.

    Tune begins a trial as soon as the one before has ended, in the same actor: a search that has all places would keep
    them until it has no more trials, and what others need, their first trial or their scores on test, would wait for
    that. A search never has fewer than one: where there are more searches than places, some do wait.
    """

    def __init__(self, count: int, searches: Iterable[str]) -> None:
        """count: of the trials that the cluster runs at once."""
        self._count, self._lock = count, threading.Lock()
        self._taken: dict[str, set[str]] = {name: set() for name in searches}
        self._waiting = set(self._taken)
        self.side_by_side = min(count, max(2, -(-count // len(self._taken))))
        """Trials of a search at once, with those that wait for a place: while one waits, Tune keeps an actor for it."""

    def of(self, search: str) -> Place:
        """The view of one search."""
        return Place(self, search)


class Place:
    """What a search has of :class:`Places`."""

    def __init__(self, places: Places, search: str) -> None:
        self._all, self._search = places, search

    def take(self, trial: str) -> bool:
        """Whether the search may have one more trial now; if so, it has it until :meth:`leave`."""
        p = self._all
        with p._lock:
            others = len(p._waiting - {self._search})
            if others and p._taken[self._search] and sum(map(len, p._taken.values())) + others >= p._count:
                return False
            p._taken[self._search].add(trial)
            return True

    def leave(self, trial: str) -> None:
        """The trial has ended, or there was none."""
        with self._all._lock:
            self._all._taken[self._search].discard(trial)

    def begun(self) -> None:
        """A trial has its place on the cluster."""
        with self._all._lock:
            self._all._waiting.discard(self._search)

    def ask(self) -> None:
        """There are no more trials; a place is wanted for what comes after them, until :meth:`end`."""
        with self._all._lock:
            self._all._taken[self._search].clear()
            self._all._waiting.add(self._search)

    def end(self) -> None:
        """No place is wanted any more."""
        self.begun()
        with self._all._lock:
            self._all._taken[self._search].clear()
