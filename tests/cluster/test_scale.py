"""Growing a cluster before a study, without a cluster."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import scale


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the autoscaler, which gives a GPU at each look."""
    asked: list[Any] = []
    looks = iter(range(100))
    kept: dict[bytes, bytes] = {}
    monkeypatch.setattr(scale, "_own", lambda: b"mine")
    monkeypatch.setattr(scale, "jobs", lambda: [{"JobID": "mine", "IsDead": False}])
    monkeypatch.setattr(scale, "_internal_kv_put", lambda key, value, namespace: kept.update({key: value}))
    monkeypatch.setattr(scale, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(scale, "_internal_kv_list", lambda prefix, namespace: list(kept))
    monkeypatch.setattr(scale, "_internal_kv_del", lambda key, namespace: kept.pop(key, None))
    monkeypatch.setattr(scale, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(scale.ray, "cluster_resources", lambda: {"CPU": 1.0, "GPU": float(next(looks))})
    monkeypatch.setattr(scale, "_joined", contextlib.nullcontext)
    monkeypatch.setattr(scale.signal, "signal", lambda *_: None)
    monkeypatch.setattr(scale, "POLL", 0.0)
    return asked


def run(tmp_path: Path, code: str, *options: str) -> int:
    return scale.main([*options, "--", sys.executable, "-c", code.format(repr(str(tmp_path / "ran")))])


def test_the_command_runs_on_the_grown_cluster_which_then_shrinks(requests: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path, "import sys; open({}, 'w'); sys.exit(3)", "--gpus", "2") == 3
    assert (tmp_path / "ran").exists()
    assert requests == [*[[{"CPU": 1, "GPU": 1}] * 2] * 3, []]


def test_a_command_that_goes_on_asks_again(
    requests: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "AGAIN", 0.1)
    assert run(tmp_path, "import time; open({}, 'w'); time.sleep(1)", "--gpus", "1") == 0
    assert len(requests) > 4
    assert all(asked == [{"CPU": 1, "GPU": 1}] for asked in requests[:-1])
    assert requests[-1] == []


def test_it_begins_with_what_is_there_when_the_wait_is_over(
    requests: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "open({}, 'w')", "--cpus", "5", "--wait", "0") == 0
    assert "1 of 5 CPUs" in capsys.readouterr().out
    assert requests[-1] == []


def test_nothing_runs_on_nothing(requests: list[Any], tmp_path: Path) -> None:
    assert run(tmp_path, "open({}, 'w')", "--gpus", "5", "--wait", "-1") == 1
    assert not (tmp_path / "ran").exists()
    assert requests[-1] == []


SEVERAL = """
import os, signal, subprocess, sys, time
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

def scale(*arguments):
    command = [sys.executable, "cluster/scale.py", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)

def end(process, number):
    os.killpg(process.pid, number)
    process.wait()

def asked():
    return (_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]").count(b"{")

def until(count):
    end = time.monotonic() + 60
    while asked() != count and time.monotonic() < end:
        time.sleep(0.1)
    return asked()

first = scale("--cpus", "1", "--", "sleep", "600")
found = [until(1)]
second = scale("--cpus", "2", "--", "sleep", "600")
found.append(until(3))
end(second, signal.SIGTERM)
found.append(asked())
third = scale("--cpus", "2", "--", "true")
third.wait()
found.append(asked())
end(first, signal.SIGKILL)
found.append(asked())
scale("--release").wait()
found.append(asked())
print(found)
"""


@pytest.mark.slow
def test_what_several_ask_for_is_added_up_until_each_has_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["[1, 3, 1, 1, 1, 0]"], done.stderr
