"""Lets an autoscaling cluster grow before a study, which counts only what is there when it begins.

As in ``python cluster/scale.py --gpus 8 -- python -m tuning run study.yaml``. The autoscaler knows one request for all
that runs on the cluster. It is the sum of what is asked for by those that are still there; each has an entry in Ray's
store of keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import ray
from ray._private.state import jobs
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

POLL = 5.0
"""Seconds between two looks at the cluster."""

AGAIN = 60.0
"""Seconds after which a running command's request is made again."""

NAMESPACE = b"wesam.scale"
"""Where in Ray's store of keys the entries are: a driver's job id -> how many of which resource it asks for."""


def grow(kind: str, count: int, patience: float) -> tuple[int, int]:
    """Asks for so many CPUs, or GPUs with a CPU each, beside what others ask for, and waits for all of them.

    Returns how many are there in the end, and how many all ask for. The request stays until :func:`release`: workers
    that are lost are replaced.
    """
    _internal_kv_put(_own(), json.dumps({kind: count}).encode(), namespace=NAMESPACE)
    deadline = time.monotonic() + patience
    while True:
        wanted = ask()[kind]  # each time: another may have begun, or ended
        have = int(ray.cluster_resources().get(kind, 0))  # type: ignore[no-untyped-call]
        if have >= wanted or time.monotonic() > deadline:
            return have, wanted
        time.sleep(POLL)


def release() -> None:
    """Takes the request back: what is idle, and nobody else has asked for, then ends."""
    _internal_kv_del(_own(), namespace=NAMESPACE)
    ask()


def ask() -> Counter[str]:
    """Asks the autoscaler for what those want that are still there, and forgets the others; how much that is."""
    there = {job["JobID"].encode() for job in jobs() if not job["IsDead"]}  # type: ignore[no-untyped-call]
    wanted: Counter[str] = Counter()
    for driver in _internal_kv_list(b"", namespace=NAMESPACE):
        if driver not in there:  # it was killed
            _internal_kv_del(driver, namespace=NAMESPACE)
        elif entry := _internal_kv_get(driver, namespace=NAMESPACE):
            wanted.update(json.loads(entry))
    request_resources(bundles=[{"CPU": 1, kind: 1} for kind, count in wanted.items() for _ in range(count)])
    return wanted


def main(arguments: list[str] | None = None) -> int:
    """Grows the cluster, runs the command, releases the cluster; returns the command's exit code."""
    parser = argparse.ArgumentParser(description="Run a command once the cluster has grown.")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--gpus", type=int, metavar="N", help="that the cluster is to have, with a CPU each")
    size.add_argument("--cpus", type=int, metavar="N", help="that the cluster is to have")
    size.add_argument("--release", action="store_true", help="only take back what killed commands had asked for")
    parser.add_argument(
        "--wait", type=float, default=1200, metavar="S", help="begin with what is there after so long (default: 1200)"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    args = parser.parse_args(arguments)
    if args.release:
        with _joined():
            left = ask()
        print(f"asked for now: {', '.join(f'{n} {kind}s' for kind, n in left.items()) or 'nothing'}")
        return 0
    kind, count = ("GPU", args.gpus) if args.gpus is not None else ("CPU", args.cpus)
    if count < 1:
        parser.error("one at least")
    if not args.command:
        parser.error("give the command that is to run, after --")
    with _joined():  # as long as the command runs: by that others know that the request is still wanted
        try:
            print(f"waiting for {count} {kind}s ...", flush=True)
            have, wanted = grow(kind, count, args.wait)
            if have < wanted:
                print(f"after {args.wait:.0f} s there are {have} of {wanted} {kind}s", flush=True)
            return _run(args.command) if have else 1
        finally:
            release()


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    ray.init(address="auto", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _own() -> bytes:
    """This driver's entry."""
    return str(ray.get_runtime_context().get_job_id()).encode()


def _run(command: list[str]) -> int:
    child = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal, and ray job stop, tell the child as well
    while True:
        try:
            return child.wait(AGAIN)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(Exception):  # whatever becomes of the request, the command goes on
                ask()  # two that asked at once may have overwritten each other's request


if __name__ == "__main__":
    sys.exit(main())
