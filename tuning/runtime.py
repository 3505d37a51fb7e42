"""Ray for a study: joined where there is a cluster, started where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import optuna
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wesam import console
from wesam.data import place_of
from wesam.errors import InputError, reason
from wesam.sam import REGISTRY, weights_digest


def quiet() -> None:
    """Keeps the terminal for the study's own lines."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(ray|mlflow|optuna)")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("ray", "ray.tune", "ray.train", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def start() -> None:
    """Joins the cluster that RAY_ADDRESS names, as it does inside a Ray job; otherwise starts one on this machine.

    With the dashboard: Ray Train's cleaner asks it which trials are gone before it gives their CPUs back.
    """
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    RayActorManager._actor_task_failed = _task_failed  # type: ignore[method-assign]
    # what Tune sends to trials stands in Ray's logs and dashboard; nodes have their own, or that of the driver here
    ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])
    ray._private.worker.print_to_stdstream = _in_one_line
    Trial.get_pickled_error = _no_error  # type: ignore[method-assign]
    Trial.handle_error = _given_up  # type: ignore[method-assign]
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address, "logging_level": logging.CRITICAL, "log_to_driver": False}
    if not address:
        options |= {"address": "local", "include_dashboard": True}
    try:
        ray.init(**options)
    except Exception:  # on a machine that is busy Ray gives up on its own processes too soon, with a bare Exception
        ray.shutdown()
        try:
            ray.init(**options)
        except Exception as e:
            where = f"join the Ray cluster at RAY_ADDRESS={address}" if address else "start Ray on this machine"
            raise InputError(f"cannot {where}: {reason(e)}") from None
    quiet()  # ray.init sets up its loggers anew


_of_trial = Trial.handle_error


def _given_up(self: Trial, exc: Any = None) -> None:
    """A trial of several workers that Ray Train has given up is not begun again by Tune, too."""
    _of_trial(self, exc)
    if isinstance(exc, RayTaskError) and isinstance(exc.cause, TrainingFailedError):
        self.run_metadata.num_failures = self.max_failures + 1


def _no_error(self: Trial) -> Exception | None:
    """Nothing: Tune's results would hold the error of each failed trial, unpickled from the study's storage."""
    return None


def _in_one_line(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What Ray has to say of the cluster; of a lost node it would print the last pages of that node's log."""
    said = "\n".join(data["lines"]).strip().partition("\n")[0].partition(". ")[0]
    print(f"Ray: {said}", file=sys.stderr)


_of_tune = RayActorManager._actor_task_failed


def _task_failed(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    """A worker that Ray has killed for its memory is a lost worker, like others; Tune would end the whole search."""
    if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
        exception = RayActorError(error_msg=reason(exception))
    _of_tune(self, tracked_actor_task, exception)


STOPPING = (signal.SIGINT, signal.SIGTERM)


def stoppable() -> AbstractContextManager[None]:
    """What is asked to end gets a KeyboardInterrupt, also by SIGTERM, for which Ray has set a handler of its own."""
    return console.stoppable(*STOPPING)


def once_is_enough() -> None:
    """From now on nothing that asks this process to end is heard: it is ending."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def stop() -> None:
    """Leaves the cluster; one that was started here ends."""
    ray.shutdown()


def check_nodes(model: str, domains: Iterable[str], storage: str | None = None) -> None:
    """Raises InputError unless every node of the cluster has the weights of the model that this machine has, and sees
    the folders of the domains and, if one is given, that for checkpoints.
    """
    nodes = _nodes()
    if len(nodes) < 2:
        return
    travels, mark = model in REGISTRY and not REGISTRY[model].url, ""  # with the package
    digest = "" if travels else weights_digest(model)
    places = {p: "domains have to be at the same path on all nodes" for d in domains if os.path.isabs(p := place_of(d))}
    with contextlib.ExitStack() as stack:
        if storage and "://" not in storage:
            mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=storage, prefix=".seen-")).name
            places[mark] = "give a --storage that all nodes share, or a URL such as s3://bucket/studies"
        found = _answers(list(places), "" if travels else model, nodes)
        answers = list(zip((name for _, name in nodes), found, strict=True))
    for place, hint in places.items():
        if blind := sorted(name for name, (seen, _) in answers if place not in seen):
            folder = storage if place == mark else place
            raise InputError(f"{folder} is not there on {', '.join(blind)}: {hint}")
    if other := sorted(name for name, (_, its) in answers if its != digest):
        raise InputError(
            f"{model} has not the weights of this machine, or none, on {', '.join(other)}: bring them there, or let "
            "$WESAM_HOME be a folder that all nodes share"
        )


def _nodes() -> list[tuple[str, str]]:
    """(id, host name) of every node that is up."""
    return [(n["NodeID"], n["NodeManagerHostname"]) for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def _answers(
    places: Collection[str], model: str, nodes: Iterable[tuple[str, str]]
) -> Iterator[tuple[Collection[str], str]]:
    """Which of the files and folders each node sees, and the digest of its weights of this model, "" for none.

    A node that has left meanwhile need not: of it, it is said that it has all.
    """

    def look() -> tuple[Collection[str], str]:
        seen = [p for p in places if os.path.exists(p)]
        if not model:
            return seen, ""
        from wesam.sam import weights_digest

        try:
            return seen, weights_digest(model)
        except (InputError, OSError):
            return seen, ""

    asked: Any = ray.remote(num_cpus=0)(look)
    strategies = (NodeAffinitySchedulingStrategy(node, soft=False) for node, _ in nodes)
    for answer in [asked.options(scheduling_strategy=s).remote() for s in strategies]:
        try:
            yield ray.get(answer)
        except ray.exceptions.RayError:
            yield places, weights_digest(model) if model else ""


def worker_resources(gpus: float = 1.0) -> dict[str, float]:
    """What one worker of a trial takes: a CPU and, where the cluster has some, this many GPUs or this share of one."""
    return {"CPU": 1, "GPU": gpus} if _cluster().get("GPU", 0) else {"CPU": 1}


def slots(workers: int, gpus: float = 1.0) -> int:
    """How many trials of this many workers, which may be on several nodes, the cluster runs at once.

    Raises InputError if not even one.
    """
    need = worker_resources(gpus)
    count = room(need) // workers
    if count < 1:
        total = _cluster()
        have = ", ".join(f"{int(total.get(k, 0))} {k}" for k in need)
        what, hint = f"{workers} workers do", "use fewer --workers, or"
        if workers == 1:
            what, hint = "a trial's worker does", "first"
        raise InputError(f"{what} not fit on this cluster ({have}): {hint} let it grow (cluster/scale.py -- COMMAND)")
    return count


def room(need: Mapping[str, float]) -> int:
    """How often the cluster has these resources, each time on one node, and a share of a GPU on one card."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    return sum(min(_times(has.get(k, 0), v) for k, v in need.items()) for has in nodes)


def _times(has: float, need: float) -> int:
    return int(has) * int(1 / need + 1e-9) if need < 1 else int(has / need + 1e-9)


def _cluster() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
