"""Where an adapter is that is given by a folder, or by the name of its domain.

wesam itself keeps no adapters. What does, as the study of this project, says so by an entry point of the group
``wesam.adapters``: a function from a domain's name to a folder on this machine that holds the best adapter for it. It
raises InputError if it has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from wesam.adapters import CONFIG_FILE
from wesam.errors import InputError

GROUP = "wesam.adapters"
"""The group of entry points."""


def adapter_folder(given: str, providers: Iterable[EntryPoint] | None = None) -> Path:
    """The folder of an adapter: the given one, or where a provider has put the best one of the domain so named.

    providers: those that are installed, unless given. Raises InputError if none has an adapter for the domain; what can
    only be a path is returned as it is, whatever lies there.
    """
    path = Path(given)
    if (path / CONFIG_FILE).is_file() or len(path.parts) != 1 or given.startswith("."):
        return path
    refusals = []
    for provider in entry_points(group=GROUP) if providers is None else providers:
        try:
            found: Path = provider.load()(given)
            return found
        except InputError as e:
            refusals.append(str(e))
        except ImportError as e:
            refusals.append(f"{provider.value} cannot be loaded: {e}")
    what = f"no adapter in {given}: {CONFIG_FILE} is missing" if path.is_dir() else f"there is no folder {given}"
    why = "; ".join(refusals) or "nothing that knows adapters by their domain is installed: install wesam with [tuning]"
    raise InputError(f"{what}, and {why}")
