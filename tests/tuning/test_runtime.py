"""Ray as a study uses it: folders that only some nodes see, workers that are lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.tune.experiment import Trial

from tuning import runtime, trainer
from wesam.errors import InputError
from wesam.sam import find_model, weights_digest

NODES = [("a", "head"), ("b", "worker-1"), ("c", "worker-2")]


WEIGHTS = weights_digest("nano")


@pytest.mark.parametrize(
    ("storage", "nodes", "seeing", "told"),
    [
        ("", NODES[:1], [False], None),
        ("s3://bucket/studies", NODES, [False, False, False], None),
        ("", NODES, [True, True, True], None),
        ("", NODES, [True, False, True], "is not there on worker-1: give a --storage"),
        ("", NODES, [True, False, False], "is not there on worker-1, worker-2: give a --storage"),
    ],
)
def test_every_node_has_to_see_the_folder_for_checkpoints(
    storage: str, nodes: list[tuple[str, str]], seeing: list[bool], told: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def answers(places: list[str], model: str, asked: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
        assert all(Path(p).exists() for p in places)
        assert asked == nodes
        assert not model, "it ships with the project"
        return [(places if sees else [], "") for sees in seeing]

    monkeypatch.setattr(runtime, "_nodes", lambda: nodes)
    monkeypatch.setattr(runtime, "_answers", answers)
    if told is None:
        runtime.check_nodes("nano", ["clean"], storage or str(tmp_path))
    else:
        with pytest.raises(InputError, match=f"^{tmp_path} {told}.*s3://"):
            runtime.check_nodes("nano", ["clean"], str(tmp_path))
    assert not list(tmp_path.iterdir()), "the marker is left behind"


@pytest.mark.parametrize(
    ("given", "there", "weights", "told"),
    [
        ("{}@0.7/0.1/0.2+fog:3", True, WEIGHTS, None),
        ("{}@0.7/0.1/0.2+fog:3", False, WEIGHTS, "^{} is not there on worker-1: domains have to be"),
        ("medical+fog:3", False, WEIGHTS, None),
        ("{}", True, "", "mine.safetensors has not the weights of this machine, or none, on worker-1"),
        ("{}", True, "0" * 64, "mine.safetensors has not the weights of this machine, or none, on worker-1"),
    ],
)
def test_every_node_has_to_have_the_domains_and_the_weights(
    given: str, there: bool, weights: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(places: list[str], model: str, asked: list[tuple[str, str]]) -> list[tuple[list[str], str]]:
        return [(places, WEIGHTS), (places if there else [], weights), (places, WEIGHTS)]

    own = str(tmp_path / "mine.safetensors")
    shutil.copy(find_model("nano"), own)
    monkeypatch.setattr(runtime, "_nodes", lambda: NODES)
    monkeypatch.setattr(runtime, "_answers", answers)
    if told is None:
        runtime.check_nodes(own, [given.format(tmp_path)])
    else:
        with pytest.raises(InputError, match=told.format(tmp_path)):
            runtime.check_nodes(own, [given.format(tmp_path)])


def test_a_gpu_that_cannot_be_used_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(trainer.ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(trainer.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="cannot use the GPU that Ray gives it"):
        trainer.source_model.__wrapped__("nano")


@pytest.mark.parametrize(("error", "failures"), [(WorkerGroupError("its workers", {}), 3), (ValueError("else"), 1)])
def test_what_ray_train_has_given_up_is_not_begun_again(error: Exception, failures: int) -> None:
    trial: Any = SimpleNamespace(
        run_metadata=SimpleNamespace(num_failures=0, invalidate_cache=lambda: None), max_failures=2, local_path=None,
        is_restoring=False,
    )  # fmt: skip
    trial._handle_ray_task_error = lambda exc: Trial._handle_ray_task_error(trial, exc)
    runtime._given_up(trial, RayTaskError("t", "trace", error))
    assert trial.run_metadata.num_failures == failures


def test_a_worker_killed_for_its_memory_is_a_lost_one() -> None:
    lost: list[Exception] = []
    manager: Any = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    actor = SimpleNamespace(actor_id="a", _on_error=lambda actor, e: lost.append(e))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    runtime._task_failed(manager, tracked_actor_task=task, exception=OutOfMemoryError("1 worker was killed\nmuch more"))
    assert [str(e) for e in lost] == ["1 worker was killed"]
    with pytest.raises(RuntimeError):
        runtime._task_failed(manager, tracked_actor_task=task, exception=ValueError("else"))


def test_of_a_lost_node_ray_says_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = "\nRaylet is terminated. Possible reasons include: many\n    [state-dump] much\n"
    runtime._in_one_line({"lines": [message], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr().err == "Ray: Raylet is terminated\n"


TWO_NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from tuning import runtime
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
nodes = runtime._nodes()
print(len(nodes), list(runtime._answers([sys.argv[1], sys.argv[1] + "-not"], "nano", nodes)))
"""


@pytest.mark.slow
def test_nodes_of_a_real_cluster_are_asked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [f"2 {[([str(tmp_path)], WEIGHTS)] * 2}"], done.stderr


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "slots"),
    [
        ([{"CPU": 8.0}], 1.0, 1, 8),
        ([{"CPU": 8.0, "GPU": 1.0}] * 8, 0.4, 1, 16),
        ([{"CPU": 8.0, "GPU": 1.0}] * 2, 0.25, 1, 8),
        ([{"CPU": 3.0, "GPU": 1.0}] * 2, 0.25, 1, 6),
        ([{"CPU": 8.0, "GPU": 1.0}] * 3, 1.0, 2, 1),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], 1.0, 1, 4),
        ([{"CPU": 8.0, "GPU": 1.0}] * 4, 2.0, 1, 0),
    ],
)
def test_a_worker_is_on_one_node_and_its_share_of_a_gpu_on_one_card(
    nodes: list[dict[str, float]], gpus: float, workers: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = {k: sum(n.get(k, 0.0) for n in nodes) for k in ("CPU", "GPU")}
    monkeypatch.setattr(runtime, "_cluster", lambda: total)
    monkeypatch.setattr(runtime.ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    if slots:
        assert runtime.slots(workers, gpus) == slots
    else:
        with pytest.raises(InputError, match="does not fit"):
            runtime.slots(workers, gpus)
