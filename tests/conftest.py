"""Fixtures shared by all tests: the embedded model, a small domain, a COCO folder made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from segment_anything.modeling import Sam

from wesam.data import Domain, Split, load_domain
from wesam.sam import load_sam


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what the user keeps; processes that a test starts do not either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WESAM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def fresh_domains() -> Iterator[None]:
    """Domains are read again in this test, and what it makes of them is forgotten after it."""
    load_domain.cache_clear()
    yield
    load_domain.cache_clear()


@pytest.fixture(scope="session")
def sam() -> Sam:
    return load_sam("nano")


def first(domain: Domain, train: int, val: int = 2, test: int = 2) -> Domain:
    """The domain with only its first images."""
    counts = {"train": train, "val": val, "test": test}
    splits = {s: Split(n, lambda i, s=s: domain.split(s)[i]) for s, n in counts.items()}
    return Domain(f"{domain.name}-first", splits, f"{domain.digest}{counts}")


@pytest.fixture(scope="session")
def camouflaged() -> Domain:
    return first(load_domain("camouflaged"), train=6)


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


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """A domain of bright discs and squares, not square itself, with every form of segmentation."""
    folder = tmp_path / "shapes"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        images, annotations = [], []
        for n in range(count):
            h, w = 60, 90 + 10 * n
            pixels = rng.integers(0, 60, (h, w, 3), np.uint8)
            yy, xx = np.mgrid[:h, :w]
            disc = (xx - 30) ** 2 + (yy - 30) ** 2 < 15**2
            pixels[disc] = (240, 200, 40)
            pixels[10:40, 55:80] = (40, 220, 240)
            name = f"images/{split}-{n}.png"
            Image.fromarray(pixels).save(folder / name)
            images.append({"id": n, "file_name": name, "height": h, "width": w})
            packed = rle.encode(np.asfortranarray(disc.astype(np.uint8)))
            packed["counts"] = packed["counts"].decode()
            square = [[55, 10, 80, 10, 80, 40, 55, 40]]
            runs = {"size": [h, w], "counts": [0, h * w]}
            annotations += [
                {"id": 10 * n, "image_id": n, "iscrowd": 0, "segmentation": packed},
                {"id": 10 * n + 1, "image_id": n, "iscrowd": 0, "segmentation": square},
                {"id": 10 * n + 2, "image_id": n, "iscrowd": 1, "segmentation": runs},
            ]
        (folder / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]})
        )
    return folder
