"""Temporary folders, of which those of killed processes do not stay for long."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuning.processes import began, machine


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; what processes of this machine that were killed have left of theirs goes first."""
    # other machines, and containers, may have the same folder for theirs
    prefix = f"wesam-{hashlib.sha256(machine().encode()).hexdigest()[:12]}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        its = re.fullmatch(r"(\d+)-\w{8}", left.name.removeprefix(prefix))
        if its and began(int(its[1])) is None:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)
