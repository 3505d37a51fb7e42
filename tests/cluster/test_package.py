"""What `ray job submit --working-dir .` would upload, by Ray's own packaging."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.validation import parse_and_validate_env_vars, parse_and_validate_pip

ROOT = Path(__file__).parents[2]
LITTER = (
    ".git/config", ".venv/bin/python", "data/cells/train.json", "vit_b.pth", "weights/vit_b.pth", "adapter/config.json",
    "runs/s/optuna.db", "mlflow.db", "mlartifacts/0/a", "tuning/__pycache__/a.pyc", ".mypy_cache/a",
    "cluster/kubernetes/mlflow.env", "cluster/kubernetes/bucket.env", "build/lib/wesam/a.py", "wesam.egg-info/PKG-INFO",
)  # fmt: skip


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split("\n")) - {""}


@pytest.fixture(scope="module")
def package(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a clean checkout in which someone has worked."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in (*LITTER, "study.yaml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(1000))
    target = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(checkout), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return target


def test_it_is_small_and_has_what_a_job_needs(package: Path, tracked: set[str]) -> None:
    assert package.stat().st_size < 5e6
    names = {n for n in zipfile.ZipFile(package).namelist() if not n.endswith("/")}
    needed = {n for n in tracked if n.split("/")[0] in ("wesam", "tuning", "cluster")}
    assert needed | {"constraints.txt", "pyproject.toml", "README.md", "study.yaml"} == names
    assert "wesam/weights/nano.safetensors" in names


def test_the_runtime_environment_is_ray_s_format() -> None:
    env = yaml.safe_load((ROOT / "cluster/runtime-env.yaml").read_text())
    assert set(env) == {"pip", "env_vars"}
    wanted = b"".join((ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml"))
    told = f"# of {hashlib.sha256(wanted).hexdigest()[:12]}"
    assert told in env["pip"]["packages"], f"runtime-env.yaml must say {told!r}, or nodes keep the packages of before"
    assert parse_and_validate_pip(env["pip"])["packages"] == env["pip"]["packages"]
    assert parse_and_validate_env_vars(env["env_vars"]) == env["env_vars"]
