"""Lets an autoscaling cluster grow before a study, which counts only what is there when it begins.

As in ``python cluster/scale.py --gpus 8 -- python -m tuning run study.yaml``.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import ray
from ray.autoscaler.sdk import request_resources

POLL = 5.0
"""Seconds between two looks at the cluster."""


def grow(kind: str, count: int, patience: float) -> int:
    """Asks for so many CPUs, or GPUs with a CPU each, and waits for them; returns how many are there in the end.

    The request stays until :func:`release`: workers that are lost are replaced.
    """
    request_resources(bundles=[{"CPU": 1, kind: 1}] * count)
    deadline = time.monotonic() + patience
    while (have := int(ray.cluster_resources().get(kind, 0))) < count:  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            break
        time.sleep(POLL)
    return have


def release() -> None:
    """Takes the request back: what is idle then ends."""
    request_resources(bundles=[])


def main(arguments: list[str] | None = None) -> int:
    """Grows the cluster, runs the command, releases the cluster; returns the command's exit code."""
    parser = argparse.ArgumentParser(description="Run a command once the cluster has grown.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gpus", type=int, metavar="N", help="that the cluster is to have, with a CPU each")
    size.add_argument("--cpus", type=int, metavar="N", help="that the cluster is to have")
    parser.add_argument(
        "--wait", type=float, default=1200, metavar="S", help="begin with what is there after so long (default: 1200)"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args(arguments)
    kind, count = ("GPU", args.gpus) if args.gpus is not None else ("CPU", args.cpus)
    if count < 1:
        parser.error("one at least")
    try:
        print(f"waiting for {count} {kind}s ...", flush=True)
        with _joined():
            have = grow(kind, count, args.wait)
        if have < count:
            print(f"after {args.wait:.0f} s there are {have} of {count} {kind}s", flush=True)
        return _run(args.command) if have else 1
    finally:
        with _joined():
            release()


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    ray.init(address="auto", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _run(command: list[str]) -> int:
    child = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal, and ray job stop, tell the child as well
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
