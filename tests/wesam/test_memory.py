from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wesam.methods.wesam
from wesam.cli import main
from wesam.config import preset
from wesam.memory import _Live, reckon, relief
from wesam.methods import METHODS, Method, method_preset
from wesam.sam import REGISTRY
from wesam.sam.nano import build_nano

SMALL = preset("paper").replace({"optim.batch_size": 2})


def test_what_is_alive_is_counted_once() -> None:
    with _Live(100) as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[1:]  # no memory of its own
        c = b + 1
        assert live.now == 100 + 4000 + 3600
        del c
        assert live.now == 100 + 4000
        a.add_(1)
        del a
        assert live.now == 100 + 4000  # b still needs it
        del b
    assert live.now == 100
    assert live.most == 100 + 4000 + 3600


def test_a_step_needs_more_for_more() -> None:
    plain = reckon(build_nano, SMALL, 8)
    assert 0.1 < plain < 1
    assert reckon(build_nano, SMALL.replace({"optim.batch_size": 4}), 8) == pytest.approx(2 * plain, rel=0.15)
    assert reckon(build_nano, SMALL, 32) > 1.5 * plain
    assert reckon(build_nano, SMALL.replace({"compute.checkpointing": True}), 8) < 0.8 * plain
    assert reckon(build_nano, SMALL.replace({"compute.precision": "bf16"}), 8) < 0.8 * plain
    assert reckon(build_nano, SMALL.replace({"teacher.decay": 0.9}), 8) < 0.7 * plain


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_step_is_reckoned(name: str) -> None:
    changes = {"optim.batch_size": 2, "max_instances": 4}
    assert 0.05 < reckon(build_nano, method_preset("nano", name).replace(changes), 4) < 0.5


def test_what_would_help_is_said_with_figures() -> None:
    text = relief(REGISTRY["nano"].build, SMALL.replace({"max_instances": 8}))
    assert "with optim.batch_size=1 about" in text
    assert "with max_instances=4 about" in text
    assert "with compute.checkpointing=true about" in text


def test_a_full_gpu_is_one_line_and_keeps_what_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def losses(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return wesam.methods.wesam.losses(*arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(METHODS, "wesam", Method(losses, "", ()))
    out = tmp_path / "adapter"
    arguments = ["--domain", "camouflaged", "--steps", "4", "--set", "eval_every=1", "--set", "optim.batch_size=2"]
    assert main(["adapt", *arguments, "--device", "cpu", "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the GPU's memory is full at step 3: a step takes about ")
    assert (out / "adapter_model.safetensors").is_file()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "memory", "--instances", "2", "--json", str(tmp_path / "m.json")]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 6
