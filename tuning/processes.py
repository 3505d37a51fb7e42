"""Which process of which machine something belongs to, and whether it lives."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import psutil


def machine() -> str:
    """This machine since it was started, and of its containers this one."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):  # Linux
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(parts)


def began(pid: int) -> float | None:
    """When a process of this machine began, which tells it from another that got its number; None if it has ended.

    On Linux in ticks since the machine was started: a time by the clock is another one once the clock has been set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        with contextlib.suppress(OSError):
            return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return process.create_time()
    except psutil.NoSuchProcess:
        return None
