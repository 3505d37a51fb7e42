"""Told in time: a process is about to be ended, and had better write a checkpoint now."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import ray
import torch
import torch.distributed as dist
from ray.experimental import internal_kv

SPACE = b"wesam"
EVERY = 1.0
"""Seconds between two questions to Ray."""


def tell(study: str) -> None:
    """Asks all trials of a study for a checkpoint: it is about to end."""
    internal_kv._internal_kv_put(study.encode(), b"", namespace=SPACE)


def take_back(study: str) -> None:
    """The study goes on, or begins."""
    internal_kv._internal_kv_del(study.encode(), namespace=SPACE)


@dataclass
class Notice:
    """What a trial's process knows of its own end; looked at after each step."""

    study: str
    device: torch.device
    _asked: float = field(default=0.0, init=False)
    _given: bool = field(default=False, init=False)

    def came(self) -> bool:
        """Whether a checkpoint is wanted now: once, when the node is to be taken away or the study to end.

        With several workers all have to ask after the same step, and all get the same answer.
        """
        if self._given:
            return False
        now = time.monotonic()
        if now - self._asked >= EVERY:
            self._asked = now
            self._given = self._told()
        if dist.is_initialized() and dist.get_world_size() > 1:
            any_of_us = torch.tensor(float(self._given), device=self.device)
            dist.all_reduce(any_of_us, dist.ReduceOp.MAX)
            self._given = bool(any_of_us)
        return self._given

    def _told(self) -> bool:
        drained = ray._private.state.state.get_draining_nodes()  # as Ray Train does it
        here = ray.get_runtime_context().get_node_id()
        return here in drained or internal_kv._internal_kv_exists(self.study.encode(), namespace=SPACE)
