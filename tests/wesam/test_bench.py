from __future__ import annotations

import json
from pathlib import Path

import pytest

from wesam.cli import main


def test_a_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {}
    for decay in (0.0, 0.9):
        arguments = ["--instances", "2", "--steps", "1", "--device", "cpu", "--set", f"teacher.decay={decay}"]
        assert main(["bench", "step", *arguments, "--json", str(tmp_path / "b.json")]) == 0
        costs[decay] = json.loads((tmp_path / "b.json").read_text())
    assert "tflop" in capsys.readouterr().out
    for cost in costs.values():
        assert set(cost["parts"]) == {"teacher", "student", "decoder", "losses", "backward", "optimizer"}
        assert sum(cost["parts"].values()) == pytest.approx(1)
        assert min(cost["parts"].values()) >= 0
        assert cost["seconds"] > 0
        assert cost["peak_gib"] > 0
        assert cost["of_peak"] is None
    # an averaged teacher needs no backward pass of its own: student and teacher forward, student backward
    assert 0.6 < costs[0.9]["tflop"] / costs[0.0]["tflop"] < 0.85


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--img", "1000"], "nano takes images of 192 px"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--model", "nanno"], "did you mean 'nano'"),
        (["--set", "teacher.dekay=1"], "teacher.decay"),
        (["--device", "cudda"], "cudda"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    try:
        code = main(["bench", "step", *arguments])
    except SystemExit as e:
        code = int(str(e.code))
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
