"""The file for `ray up` on AWS: Ray's own schema, one head, spot workers, and nothing open but ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    return found


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(prepared := prepare_config(config))
    assert prepared["available_node_types"].keys() == {"head", "gpu-spot"}
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "typo": 1})


def test_one_head_and_spot_workers(config: dict[str, Any]) -> None:
    head, *workers = config["available_node_types"].values()
    assert config["head_node_type"] == next(iter(config["available_node_types"]))
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}
    for worker in workers:
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]


def test_nothing_is_open_but_ssh(config: dict[str, Any]) -> None:
    group = config["provider"]["security_group"]
    assert set(group) == {"GroupName"}, "rules are added to ssh"
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert not any("0.0.0.0" in command or "client-server" in command for command in starts)
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert "IamInstanceProfile" in node["node_config"], "workers need one too: checkpoints go to S3"
