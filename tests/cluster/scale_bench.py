"""A large study with a stand-in for training: what the driver costs, and how busy it keeps the slots.

    python -m tests.cluster.scale_bench --trials 3000
    python -m tests.cluster.scale_bench --trials 256 --nodes 64 --slots 64 --sleep 30
    MLFLOW_TRACKING_USERNAME=... python -m tests.cluster.scale_bench --trials 3000 --tracking-uri http://localhost:5000

Everything in the driver is the real thing: search, Optuna's database, scheduler, Tuner, MLflow, the lines. A trial only
sleeps and reports made-up scores, with the keys and the files of :func:`tuning.trainer.one_worker`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import psutil
import ray
import torch
from ray import tune
from ray.cluster_utils import Cluster
from safetensors.torch import save as tensors

import tuning.domain
from tuning import runtime
from tuning.budget import Budget
from tuning.checkpoint import DIGESTS, PROGRESS_FILE
from tuning.domain import DomainSearch
from tuning.places import Places
from tuning.plan import make_plan
from tuning.progress import Board
from tuning.sampler import open_storage, open_study
from tuning.target import Context, study_tags
from tuning.tracking import Tracker
from tuning.trainer import METRIC
from wesam import Scores
from wesam.adapt import STATE_FILE
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's 15 starves the workers where other work runs)

DOMAIN = "camouflaged"
STEPS, EVERY = 32, 8
DIRECT = Scores(10, 50, 0.5, 0.6, 0.5, 0.0)
LOSSES = ("focal", "dice", "iou", "anchor", "contrastive", "total")


def stand_in(sleep: float, every: int = EVERY) -> Callable[[dict[str, Any]], None]:
    """A trainable that sleeps so many seconds before each of its reports; every: steps between two of them.

    It is made here so that Ray pickles it by value: workers import neither this module nor torch.
    """
    files = {CONFIG_FILE: b"{}", WEIGHTS_FILE: tensors({"a": torch.zeros(100)}), STATE_FILE: bytes(1000)}
    metric, progress, losses, steps = METRIC, PROGRESS_FILE, LOSSES, STEPS
    digests = {DIGESTS: {name: hashlib.blake2b(contents).hexdigest() for name, contents in files.items()}}

    def one_worker(trial: dict[str, Any]) -> None:
        config, number = trial["config"], trial["number"]
        chance = random.Random(number)
        far = abs(math.log10(config["optim.lr"] / 1e-3)) + abs(config["views.strength"] - 0.7)
        reached = 0.75 - 0.1 * far + chance.gauss(0, 0.01)
        best = -math.inf
        for step in range(every, steps + 1, every):
            time.sleep(sleep)
            score = reached * (1 - math.exp(-3 * step / steps)) + chance.gauss(0, 0.005)
            best = max(best, score)
            metrics = {f"val_{k}": score for k in ("miou", "f1", "label_free")} | {f"loss.{k}": 1.0 for k in losses}
            metrics |= dict.fromkeys(("val_collapsed", "seconds_per_step", "waited", "images_per_second"), 1.0)
            metrics |= {f"system/{k}": 1.0 for k in ("cpu", "memory", "memory_percentage")} | {"adapter_mb": 0.3}
            result = {
                "step": step,
                "last": step == steps,
                "saved": False,
                metric: best,
                "metrics": metrics,
                "size": 0.3,
            }
            result |= {"seconds": 1.0, "score": score, "rank": score - 1e-9 * step, "gap": 0.0}
            with tempfile.TemporaryDirectory() as folder:
                for name, contents in files.items():
                    (Path(folder) / name).write_bytes(contents)
                told = {"step": step, "best": best, "best_here": score == best, **digests}
                (Path(folder) / progress).write_text(json.dumps(told))
                tune.report(result, checkpoint=tune.Checkpoint(folder))

    return one_worker


@dataclass(frozen=True)
class Mark:
    """The driver at the end of a trial."""

    wall: float
    cpu: float
    """Seconds of the whole process, all its threads."""
    loop: float
    """Those of the thread that waits for trials: what a report has to wait for."""
    reports: int
    running: int
    rss: int
    waiting: int
    """Records that MLflow has not taken yet."""


COLUMNS = ("wall per trial", "cpu per trial", "cpu per report", "loop per report", "memory", "waiting")
SHOWN = (100, 300, 1000, 3000, 10_000)


def between(marks: Sequence[Mark], first: int, last: int) -> dict[str, float]:
    """What the trials that ended as number ``first`` + 1 to ``last`` cost, in milliseconds; memory in MiB."""
    a, b = marks[first - 1], marks[last - 1]
    trials, reports = (last - first) / 1000, (b.reports - a.reports) / 1000
    return {
        "wall per trial": (b.wall - a.wall) / trials, "cpu per trial": (b.cpu - a.cpu) / trials,
        "cpu per report": (b.cpu - a.cpu) / reports, "loop per report": (b.loop - a.loop) / reports,
        "memory": b.rss / 2**20, "waiting": b.waiting,
    }  # fmt: skip


def row(marks: Sequence[Mark], n: int) -> str:
    """A line for the last fifth of the first n trials."""
    found = between(marks, max(1, n - n // 5), n)
    return "  ".join([f"{n:>6}", *(f"{found[c]:>15.1f}" for c in COLUMNS)])


class Meter(Board):
    """A board that also notes what the driver has cost."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__([DOMAIN], [DOMAIN], 0, STEPS)
        self._writer, self._process = tracker._writer, psutil.Process()
        self.reported: list[float] = []
        self._out = sys.stdout  # the lines themselves go into a file
        self._at: set[str] = set()
        self.begun: list[float] = []
        self.marks: list[Mark] = []

    def at(self, domain: str, trial: str, step: int) -> None:
        super().at(domain, trial, step)
        if step:
            self.reported.append(time.monotonic())
        else:
            self._at.add(trial)
            self.begun.append(time.monotonic())

    def ended(self, domain: str, trial: str, text: str, *, early: bool) -> None:
        super().ended(domain, trial, text, early=early)
        self._at.discard(trial)
        rss, waiting = self._process.memory_info().rss, self._writer._work_queue.qsize()
        clocks = time.monotonic(), time.process_time(), time.thread_time()
        now = Mark(*clocks, len(self.reported), len(self._at) + 1, rss, waiting)
        self.marks.append(now)
        if len(self.marks) in SHOWN:
            print(row(self.marks, len(self.marks)), file=self._out, flush=True)


@dataclass(frozen=True)
class Measured:
    """A study of the stand-in."""

    slots: int
    sleep: float
    began: float
    begun: Sequence[float]
    reported: Sequence[float]
    """When each trial began, and when the driver had each report."""
    marks: Sequence[Mark]
    """One for each trial, in the order of their ends."""
    flushed: float
    """Seconds that MLflow needed after the last trial."""

    def busy(self) -> tuple[float, float]:
        """The share of the slots' time in which a trial ran, and that in which it slept, from when all slots were first
        taken until the last trial began.
        """
        first, last = self.begun[min(self.slots, len(self.begun)) - 1], self.begun[-1]
        inside = [m for m in self.marks if first <= m.wall <= last]
        if len(inside) < 2:
            return math.nan, math.nan
        first, last = inside[0].wall, inside[-1].wall
        held = sum(m.running * (m.wall - before.wall) for before, m in pairwise(inside))
        slept = sum(max(0.0, min(t, last) - max(t - self.sleep, first)) for t in self.reported)
        whole = self.slots * (last - first)
        return held / whole, slept / whole


def measure(
    folder: Path, trials: int, slots: int, sleep: float, uri: str | None = None, every: int = EVERY, **settings: Any
) -> Measured:
    """Runs such a study on the Ray that has been started; what it writes, its lines too, is in the folder.

    uri: of the MLflow that takes its records; by default a database in the folder.
    """
    name = f"s-{time.time_ns()}" if uri else "s"
    given = {"name": name, "domains": [DOMAIN], "trials": trials, "steps": STEPS, "seeds": 0, "storage": str(folder)}
    plan = make_plan({**given, **settings}, [f"eval_every={every}"])
    tracker = Tracker(uri or f"sqlite:///{folder / 'mlflow.db'}")
    run = tracker.start(plan.name, "study", None, study_tags(plan))
    board = Meter(tracker)
    context = Context(plan, tracker, board, run, Places(slots, [DOMAIN]), Budget(plan), threading.Event())
    study: optuna.Study = open_study(plan, DOMAIN, open_storage(plan.optuna_url()))
    search = DomainSearch(context, DOMAIN, plan.domains, study, {})
    (target,) = search._targets
    target.found = {"direct_val": DIRECT}
    began = time.monotonic()
    with (folder / "lines").open("w") as lines, contextlib.redirect_stdout(lines), _trained_by(stand_in(sleep, every)):
        search._search(target.open())
    flushed = time.monotonic() - board.marks[-1].wall
    tracker.close()
    return Measured(slots, sleep, began, board.begun, board.reported, board.marks, flushed)


@contextlib.contextmanager
def _trained_by(trainable: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    real, tuning.domain.one_worker = tuning.domain.one_worker, trainable
    try:
        yield
    finally:
        tuning.domain.one_worker = real


@contextlib.contextmanager
def simulated(nodes: int, slots: int) -> Iterator[None]:
    """A Ray on this machine with so many slots: those of one node, or each the only one of a node of its own."""
    common = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    if nodes:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
        for _ in range(nodes):
            cluster.add_node(wait=False, num_cpus=slots // nodes, object_store_memory=common["object_store_memory"])
        cluster.wait_for_nodes(timeout=900)
        ray.init(address=cluster.address, logging_level=logging.CRITICAL, log_to_driver=False)
    else:
        ray.init("local", num_cpus=slots, logging_level=logging.CRITICAL, log_to_driver=False, **common)
    runtime.quiet()
    try:
        yield
    finally:
        ray.shutdown()
        if nodes:
            cluster.shutdown()


def show(found: Measured) -> None:
    """Prints what was found."""
    count = len(found.marks)
    if count not in SHOWN:
        print(row(found.marks, count))
    whole = between(found.marks, 1, count)
    loop = f"{whole['loop per report']:.1f} of them in the thread that waits for trials"
    print(f"all: {whole['cpu per report']:.1f} ms of CPU per report, {loop}; {found.marks[-1].reports} reports")
    held, slept = found.busy()
    filled = found.begun[min(found.slots, count) - 1] - found.began
    print(f"{found.slots} slots, all taken after {filled:.1f} s: then {held:.1%} held a trial, {slept:.1%} slept")
    most = max(m.waiting for m in found.marks)
    print(f"MLflow had everything {found.flushed:.1f} s after the last trial; at most {most} records waited for it")
    during = max(m.rss for m in found.marks) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"the driver's memory: {during:.0f} MiB at most, {peak:.0f} with what came after the last trial")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=0, help="simulated nodes; 0: one node with all slots")
    parser.add_argument("--slots", type=int, default=16, help="trials at once, spread evenly over the nodes")
    parser.add_argument("--sleep", type=float, default=0.1, help="seconds before each report")
    parser.add_argument("--every", type=int, default=EVERY, help=f"steps between two reports, of {STEPS} in a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", default="asha")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--tracking-uri", help="MLflow; default: SQLite, inside the driver")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    slots = max(args.slots, args.nodes)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        runtime.quiet()
        began = time.monotonic()
        stack.enter_context(simulated(args.nodes, slots))
        print(f"{args.nodes or 1} nodes up after {time.monotonic() - began:.1f} s", flush=True)
        settings = {"seed": args.seed, "scheduler": args.scheduler, "sampler": args.sampler}
        print("  ".join([f"{'n':>6}", *(f"{c:>15}" for c in COLUMNS)]), flush=True)
        show(measure(folder, args.trials, slots, args.sleep, args.tracking_uri, args.every, **settings))


if __name__ == "__main__":
    main()
