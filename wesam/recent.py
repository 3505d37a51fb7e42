"""Things kept in memory in a bounded number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar


class Sized(Protocol):
    """Anything that knows how many bytes it takes."""

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""


Thing = TypeVar("Thing", bound=Sized)


class Recent:
    """Things by name, in at most so many bytes together; the least recently used are dropped."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.nbytes = 0
        self._kept: dict[Hashable, Any] = {}  # the least recently used first

    def get(self, name: Hashable, make: Callable[[], Thing]) -> Thing:
        """The thing of this name, made where it is not kept; one larger than all that may be kept is not."""
        found: Thing | None = self._kept.pop(name, None)
        if found is None:
            found = make()
            self.nbytes += found.nbytes
        self._kept[name] = found
        while self.nbytes > self.most:
            self.nbytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return found
