"""Temporary folders, of which those of killed processes do not stay for long."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

PREFIX = "wesam-"
"""After it comes the process."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; what processes that were killed have left of theirs goes first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        process = left.name.split("-")[1]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
        yield Path(folder)
