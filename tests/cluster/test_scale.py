"""Growing a cluster before a study, without a cluster."""

from __future__ import annotations

import contextlib
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
    assert requests == [[{"CPU": 1, "GPU": 1}] * 2, []]


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
