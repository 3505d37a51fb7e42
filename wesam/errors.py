"""The one exception that means "what you gave is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any


class InputError(ValueError):
    """Bad input: each line of the message names one thing that is wrong and says what to do.

    The command lines print it without a traceback and exit with code 2.
    """

    at: tuple[str, ...] = ()
    """Which of the things given is wrong, as the keys that lead to it, where that is known."""


@contextlib.contextmanager
def at(*keys: str) -> Iterator[None]:
    """Within this, an InputError that does not say where it is says that it is here."""
    try:
        yield
    except InputError as e:
        e.at = e.at or keys
        raise


def reason(error: Exception, *, last: bool = False) -> str:
    """The first or last line of what an error says, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1 if last else 0]


def plainly(error: Exception) -> str:
    """What went wrong with a file, which is named beside it, without the error's number and the name once more."""
    return getattr(error, "strerror", None) or reason(error)


def one_of(kind: str, given: str, known: Iterable[str]) -> Any:
    """The given name if it is known; raises InputError with the nearest right one if it is not."""
    if given not in (names := tuple(known)):
        raise unknown(kind, given, names)
    return given


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist: the nearest right one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return InputError(f"unknown {kind} {given!r}: {hint}")
