"""Imports go one way, cluster -> tuning -> wesam, and the method needs no study around it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"wesam": {"ray", "mlflow", "optuna", "tuning", "cluster"}, "tuning": {"cluster"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN[package], f"{file}:{node.lineno} imports {name}"


def test_the_method_loads_without_ray_mlflow_and_optuna_and_before_it_is_needed_without_peft() -> None:
    code = "import sys, wesam, wesam.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "wesam" in loaded
    assert not {"ray", "mlflow", "optuna", "peft", "transformers"} & set(loaded), "the last two take seconds"
