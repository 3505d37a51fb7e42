"""Ray for a study: joined where there is a cluster, started where there is none."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import optuna
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wesam import console
from wesam.errors import InputError, reason


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


def check_storage(storage: str) -> None:
    """Raises InputError if the folder for checkpoints is not the same one on every node of the cluster."""
    nodes = _nodes()
    if "://" in storage or len(nodes) < 2:
        return
    with tempfile.NamedTemporaryFile(dir=storage, prefix=".seen-") as marker:
        blind = sorted(name for (_, name), seen in zip(nodes, _seen(marker.name, nodes), strict=True) if not seen)
    if blind:
        raise InputError(
            f"--storage {storage} is a folder that {', '.join(blind)} {'do' if len(blind) > 1 else 'does'} not see: "
            "give one that all nodes share, or a URL such as s3://bucket/studies"
        )


def _nodes() -> list[tuple[str, str]]:
    """(id, host name) of every node that is up."""
    return [(n["NodeID"], n["NodeManagerHostname"]) for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def _seen(path: str, nodes: Iterable[tuple[str, str]]) -> Iterator[bool]:
    """Whether each node sees the file; a node that has left meanwhile need not."""

    def exists() -> bool:
        return os.path.exists(path)

    look = ray.remote(num_cpus=0)(exists)
    strategies = (NodeAffinitySchedulingStrategy(node, soft=False) for node, _ in nodes)
    for answer in [look.options(scheduling_strategy=s).remote() for s in strategies]:
        try:
            yield ray.get(answer)
        except ray.exceptions.RayError:
            yield True


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
        raise InputError(f"a trial of {workers} workers does not fit on this cluster ({have}): use fewer --workers")
    return count


def room(need: Mapping[str, float]) -> int:
    """How often the cluster has these resources, each time on one node, and a share of a GPU on one card."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    return sum(min(_times(has.get(k, 0), v) for k, v in need.items()) for has in nodes)


def _times(has: float, need: float) -> int:
    return int(has) * int(1 / need + 1e-9) if need < 1 else int(has / need + 1e-9)


def _cluster() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
