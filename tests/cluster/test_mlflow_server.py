"""The MLflow server with logins, started for real on SQLite; and its Compose file."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from tests.servers import free_port, running

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.relative_to(ROOT) for p in (ROOT / "cluster").rglob("*.sh"))
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_are_right(script: Path) -> None:
    checkers = [["bash", "-n"]] + ([["shellcheck"]] if shutil.which("shellcheck") else [])
    for checker in checkers:
        done = subprocess.run([*checker, script], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server's address, and its folder."""
    folder, port = tmp_path_factory.mktemp("mlflow") / "server", free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    env |= {"MLFLOW_PORT": str(port), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    url = f"http://127.0.0.1:{port}"
    with running([ROOT / "cluster/mlflow-server.sh", folder], f"{url}/health", folder.parent, env):
        yield url, folder


@pytest.mark.slow
def test_only_the_admin_s_own_password_opens_it(server: tuple[str, Path]) -> None:
    url, folder = server
    password = (folder / "admin-password").read_text().strip()
    assert len(password) == 32
    for auth in (None, ("admin", ""), ("admin", "password"), ("admin", "password1234"), ("admin", "admin")):
        assert requests.get(url + SEARCH, auth=auth, timeout=60).status_code == 401, auth
    assert requests.get(url + SEARCH, auth=("admin", password), timeout=60).status_code == 200
    assert {stat.S_IMODE((folder / n).stat().st_mode) for n in ("admin-password", "secret-key", "basic_auth.ini")} == {
        0o600
    }


@pytest.mark.slow
def test_it_listens_on_the_loopback_alone(server: tuple[str, Path]) -> None:
    port = int(server[0].rsplit(":", 1)[1])
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    assert listening == {"127.0.0.1"}


def test_the_compose_file_is_loopback_only_and_has_no_password() -> None:
    services = yaml.safe_load((ROOT / "cluster/compose.yaml").read_text())["services"]
    assert set(services) == {"postgres", "mlflow"}
    assert "ports" not in services["postgres"]
    assert all(str(p).startswith("127.0.0.1:") for p in services["mlflow"]["ports"])
    assert re.fullmatch(r"postgres:\d+\.\d+", services["postgres"]["image"])
    names = set()
    for service in services.values():
        for key, value in service["environment"].items():
            if key == "MLFLOW_SERVER_ALLOWED_HOSTS":
                assert value == f"${{{key}:-}}", "empty: MLflow's own"
            elif re.search("PASSWORD|KEY", key):
                names.add(re.fullmatch(r"\$\{(\w+):\?.+\}", value)[1])  # type: ignore[index]
    example = dict(line.split("=", 1) for line in (ROOT / "cluster/env.example").read_text().splitlines())
    assert example == dict.fromkeys([*names, "MLFLOW_SERVER_ALLOWED_HOSTS"], "")
    for volume in [v for s in services.values() for v in s["volumes"] if v.startswith(".")]:
        assert (ROOT / "cluster" / volume.split(":")[0]).exists(), volume
