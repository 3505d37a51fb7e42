"""The manifests for Kubernetes: KubeRay's published schema, what refers to what, and that no password is known."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
FILES = [*KUSTOMIZATION["resources"], "rayjob.yaml"]
OBJECTS = [o for name in FILES for o in yaml.safe_load_all((FOLDER / name).read_text())]
SCHEMA = json.loads((Path(__file__).parent / "kuberay.json").read_text())
EXAMPLES = sorted(FOLDER.glob("*.env.example"))


def of(kind: str) -> list[dict[str, Any]]:
    return [o for o in OBJECTS if o["kind"] == kind]


def pods(node: Any = OBJECTS) -> Iterator[dict[str, Any]]:
    """Every pod template, in whatever holds it."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def containers() -> list[dict[str, Any]]:
    return [c for p in pods() for c in p["spec"]["containers"]]


def keys(example: Path) -> set[str]:
    return {line.split("=")[0] for line in example.read_text().splitlines()}


def valid(thing: Any, schema: dict[str, Any]) -> None:
    jsonschema.validate(thing, {**schema, "$defs": SCHEMA["$defs"]}, jsonschema.Draft202012Validator)


def test_the_parts_that_a_study_needs_are_there() -> None:
    kinds = sorted(o["kind"] for o in OBJECTS)
    assert kinds == [
        "Deployment", "Namespace", "NetworkPolicy", "RayCluster", "RayJob", "Service", "Service", "StatefulSet",
    ]  # fmt: skip
    listed = {*FILES, "kustomization.yaml", *(f for g in KUSTOMIZATION["configMapGenerator"] for f in g["files"])}
    assert listed == {p.name for p in FOLDER.iterdir() if p.suffix in (".yaml", ".ini")}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_ray_s_objects_follow_the_published_schema(kind: str) -> None:
    (thing,) = of(kind)
    valid(thing, SCHEMA[kind])
    with pytest.raises(jsonschema.ValidationError):
        valid({**thing, "spec": {**thing["spec"], "typo": 1}}, SCHEMA[kind])


def test_pods_of_other_objects_follow_it_too() -> None:
    (cluster,) = of("RayCluster")
    for thing in of("Deployment") + of("StatefulSet"):
        pod = {"spec": thing["spec"]["template"]["spec"]}
        valid({**cluster, "spec": {**cluster["spec"], "headGroupSpec": {"template": pod}}}, SCHEMA["RayCluster"])


def test_whatever_is_named_exists() -> None:
    secrets = {g["name"]: keys(FOLDER / f"{g['envs'][0]}.example") for g in KUSTOMIZATION["secretGenerator"]}
    maps = {g["name"] for g in KUSTOMIZATION["configMapGenerator"]}
    claims = {c["metadata"]["name"] for s in of("StatefulSet") for c in s["spec"]["volumeClaimTemplates"]}
    services = {s["metadata"]["name"] for s in of("Service")}
    used: set[str] = set()
    for pod in pods():
        volumes = {v["name"] for v in pod["spec"].get("volumes", [])} | claims
        for volume in pod["spec"].get("volumes", []):
            assert volume["configMap"]["name"] in maps
        for c in pod["spec"]["containers"]:
            assert {m["name"] for m in c.get("volumeMounts", [])} <= volumes
            for source in c.get("envFrom", []):
                used.add(source["secretRef"]["name"])
            for variable in c.get("env", []):
                if "valueFrom" in variable:
                    ref = variable["valueFrom"]["secretKeyRef"]
                    assert ref["key"] in secrets[ref["name"]]
                    used.add(ref["name"])
                elif match := re.search(r"://(?:\w+@)?(\w+)", variable["value"]):
                    assert match[1] in services
    assert used == set(secrets), "of secrets, some is not used or does not exist"
    (stateful,) = of("StatefulSet")
    assert stateful["spec"]["serviceName"] in services
    (job,) = of("RayJob")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": of("RayCluster")[0]["metadata"]["name"]}
    (head,) = of("RayCluster")[0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (studies,) = head["volumeMounts"]
    (generated,) = [g for g in KUSTOMIZATION["configMapGenerator"] if g["name"] == "studies"]
    assert f"{studies['mountPath']}/{generated['files'][0]}" in job["spec"]["entrypoint"].split()
    assert (ROOT / "cluster/scale.py").exists()
    assert "/opt/wesam/cluster/scale.py" in job["spec"]["entrypoint"].split()


def test_selectors_and_ports_agree() -> None:
    for thing in of("Deployment") + of("StatefulSet"):
        assert thing["spec"]["selector"]["matchLabels"] == thing["spec"]["template"]["metadata"]["labels"]
    for service in of("Service"):
        assert service["spec"]["type"] == "ClusterIP"
        (pod,) = [p for p in pods() if p.get("metadata", {}).get("labels") == service["spec"]["selector"]]
        ports = {p["name"]: p["containerPort"] for c in pod["spec"]["containers"] for p in c["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    (policy,) = of("NetworkPolicy")
    labels = [p["metadata"]["labels"] for p in pods() if "metadata" in p]
    (rule,) = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"] in labels
    assert rule["from"][0]["podSelector"]["matchLabels"] in labels


def test_pods_have_bounds_pinned_images_and_few_rights() -> None:
    for pod in pods():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for c in containers():
        assert {"cpu", "memory"} <= set(c["resources"]["requests"])
        assert "memory" in c["resources"]["limits"]
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?", c["image"]), c["image"]
        assert c["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_cluster_has_a_token_and_spot_workers_and_scales() -> None:
    spec = of("RayCluster")[0]["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    groups = {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "spot"}
    assert "nodeSelector" in groups["spot"]["template"]["spec"]
    assert "nodeSelector" not in groups["gpu"]["template"]["spec"]
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        pod = group["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        (*_, told) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        script, seconds = told.partition(";")[0].split()
        assert (ROOT / script.removeprefix("/opt/wesam/")).is_file()
        assert int(seconds) < pod["terminationGracePeriodSeconds"]


def test_mlflow_asks_for_a_login() -> None:
    (server,) = of("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert " ".join(server["args"]).startswith("mlflow server --app-name basic-auth")
    (head,) = of("RayCluster")[0]["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    address = next(e["value"] for e in head["env"] if e["name"] == "MLFLOW_TRACKING_URI").split("//")[1]
    allowed = next(e["value"] for e in server["env"] if e["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")
    assert address in allowed.split(",")


def test_no_password_stands_in_a_file() -> None:
    for c in containers():
        for variable in c.get("env", []):
            if re.search("PASSWORD|SECRET|TOKEN|KEY", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, variable["name"]
    for example in EXAMPLES:
        assert all(re.fullmatch(r"\w+=", line) for line in example.read_text().splitlines())
    assert "password" not in (FOLDER / "basic_auth.ini").read_text()
    listed = subprocess.run(["git", "ls-files", "*.env"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout == ""


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    """A copy of the manifests beside a kubectl that writes down how it was called."""
    shutil.copytree(FOLDER, tmp_path / "kubernetes", ignore=shutil.ignore_patterns("*.env"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text('#!/bin/sh\necho "$@" > ../called\n')
    (tmp_path / "bin/kubectl").chmod(0o755)
    return tmp_path


def deploy(folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([folder / "kubernetes/deploy.sh"], env=env, capture_output=True, text=True)


def fill(folder: Path, value: str = "x") -> None:
    for example in EXAMPLES:
        text = example.read_text().replace("=\n", f"={value}\n")
        (folder / "kubernetes" / example.stem).write_text(text)


def test_nothing_is_applied_without_secrets(deployed: Path) -> None:
    done = deploy(deployed)
    assert (done.returncode, done.stderr.count("\n")) == (2, len(EXAMPLES))
    assert "copy mlflow.env.example" in done.stderr
    fill(deployed, "")
    done = deploy(deployed)
    assert (done.returncode, done.stderr.count("\n")) == (2, sum(len(keys(e)) for e in EXAMPLES))
    assert "mlflow.env: POSTGRES_PASSWORD has no value" in done.stderr
    assert not (deployed / "called").exists()
    fill(deployed)
    assert deploy(deployed).returncode == 0
    assert (deployed / "called").read_text() == "apply --kustomize .\n"


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_kustomize_builds_it(deployed: Path) -> None:
    fill(deployed)
    done = subprocess.run(["kubectl", "kustomize", deployed / "kubernetes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    generated = KUSTOMIZATION["secretGenerator"] + KUSTOMIZATION["configMapGenerator"]
    assert len(built) == len(OBJECTS) - 1 + len(generated), "all but the RayJob, and what is generated"
    assert all(o["metadata"].get("namespace", "wesam") == "wesam" for o in built)
    images = {c["image"] for p in pods(built) for c in p["spec"]["containers"]}
    assert images == {"postgres:16.6", "registry.example/wesam:0.1.0", "registry.example/wesam-mlflow:0.1.0"}
