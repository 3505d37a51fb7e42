"""The one exception that means "what you gave is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message is one line that names the thing and says what to do.

    The command lines print it without a traceback and exit with code 2.
    """


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist: the nearest right one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return InputError(f"unknown {kind} {given!r}: {hint}")
