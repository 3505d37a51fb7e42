"""A small domain in a folder, one Ray for the whole session, an MLflow database for each test, a server on demand."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

import tuning.runtime
import wesam
from tests.servers import free_port, running
from tuning.tracking import Tracker
from wesam.data import load_domain

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's 15 lets a study wait for the tests beside it)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first camouflaged images as a COCO folder: evaluating it takes a fraction of a second."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        images, annotations = [], []
        for n in range(count):
            sample = load_domain("camouflaged").split(split)[n]
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / f"{split}-{n}.png")
            h, w = sample.image.shape[1:]
            images.append({"id": n, "file_name": f"{split}-{n}.png", "height": h, "width": w})
            for mask in sample.masks:
                packed = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                packed["counts"] = packed["counts"].decode()
                annotations.append(
                    {"id": len(annotations), "image_id": n, "category_id": 1, "iscrowd": 0, "segmentation": packed}
                )
        found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
        (folder / f"{split}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray, as a study starts it."""
    tuning.runtime.quiet()
    tuning.runtime.start()
    yield
    tuning.runtime.stop()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that is made once: its migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    Tracker(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    """A tracking URI with nothing in it."""
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(database.read_bytes())
    return f"sqlite:///{copy}"


@pytest.fixture
def tracker(uri: str) -> Iterator[Tracker]:
    tracker = Tracker(uri)
    yield tracker
    tracker.close()


@contextlib.contextmanager
def served(arguments: list[str], alive: str, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a server of MLflow's on a free port, which answers at the path ``alive``."""
    port = free_port()
    env = {
        **os.environ, "PYTHONPATH": str(Path(wesam.__file__).parents[1]),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment,
    }  # fmt: skip
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/{alive}", folder, env):
        yield url
