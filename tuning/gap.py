"""The gap between Direct and Supervised: what true masks would win, and how much of it weak labels do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def is_one(direct: float, supervised: Sequence[float]) -> bool:
    """Whether Supervised is above Direct by more than its spread: a share of anything less would be one of chance.

    supervised: its scores, one a seed; of one seed no spread is known.
    """
    spread = statistics.stdev(supervised) if len(supervised) > 1 else 0.0
    return bool(supervised) and statistics.mean(supervised) - direct > spread


def closed(direct: float, found: float, supervised: Sequence[float]) -> float | None:
    """Of the gap, the share that a score of ``found`` closes; None where there is none."""
    if not is_one(direct, supervised):
        return None
    return (found - direct) / (statistics.mean(supervised) - direct)
