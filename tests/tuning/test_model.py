"""A registered adapter as MLflow has it: no pickle, and the masks that wesam gives, in Python and over HTTP."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from pycocotools import mask as rle

import wesam
from tests.tuning.conftest import served
from tests.tuning.test_registry import SAME, adapter
from tuning import registry
from tuning.tracking import Tracker
from wesam import AdaptedSam, Prompts

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
BOXES = [[5, 5, 30, 30], [20.5, 8, 55, 38]]
POINTS, LABELS = [[[12, 20]], [[40, 20], [5, 5]], [[30, 30]]], [[1], [1, 0], [1]]


def sent(**prompts: Any) -> dict[str, Any]:
    """An image with prompts, as it is sent."""
    Image.fromarray(PIXELS).save(out := io.BytesIO(), "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode(), **prompts}


def wanted(model: AdaptedSam, prompts: Prompts) -> tuple[np.ndarray, list[float]]:
    """What wesam itself answers."""
    masks, iou = wesam.predict(model, torch.from_numpy(PIXELS).permute(2, 0, 1), prompts)
    return masks.numpy(), iou.tolist()


def unpacked(answers: list[dict[str, Any]]) -> np.ndarray:
    """The masks of an image's answers, bool [N, H, W]."""
    return np.stack([rle.decode({"size": a["size"], "counts": a["counts"]}) for a in answers]).astype(bool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def packaged(folder: Path, tmp_path: Path) -> Path:
    registry.package(folder, tmp_path / "model")
    return tmp_path / "model"


def test_it_answers_as_wesam_does(folder: Path, packaged: Path) -> None:
    own = AdaptedSam.load(wesam.load_sam("nano"), folder)
    served = mlflow.pyfunc.load_model(str(packaged))
    boxes, clicks, outlines = served.predict([
        sent(boxes=BOXES), sent(points=POINTS, labels=LABELS), sent(polygons=[[[5, 5], [30, 8], [20, 30]]])
    ])  # fmt: skip
    asked = {
        "boxes": (boxes, Prompts(boxes=torch.tensor(BOXES))),
        "polygons": (outlines, Prompts(polygons=(torch.tensor([[5.0, 5.0], [30.0, 8.0], [20.0, 30.0]]),))),
    }
    (cut,) = served.predict([sent(boxes=BOXES, tight=True)])
    asked["tight"] = cut, Prompts(boxes=torch.tensor(BOXES), tight=True)
    for answers, prompts in asked.values():
        masks, iou = wanted(own, prompts)
        assert np.array_equal(unpacked([a.model_dump() for a in answers]), masks)
        assert [a.predicted_iou for a in answers] == pytest.approx(iou)
    for n, answer in enumerate(clicks):
        given = Prompts(points=torch.tensor([POINTS[n]]).float(), point_labels=torch.tensor([LABELS[n]]).int())
        masks, iou = wanted(own, given)
        assert np.array_equal(unpacked([answer.model_dump()]), masks), "clicks are answered in their order"
    assert served.predict([sent(boxes=[])]) == [[]]
    labelled, plain = served.predict([sent(points=[[[12, 20]]], labels=[[1]]), sent(points=[[[12, 20]]])])
    assert labelled == plain


def test_nothing_in_it_is_a_pickle_or_an_address(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f for f in packaged.rglob("*") if f.is_file()]
    places = [str(packaged.parent).encode(), str(registry.CODE.parent).encode()]
    assert not [f for f in files for place in places if place in f.read_bytes()]
    assert {f.suffix for f in files} == {"", ".json", ".safetensors", ".txt", ".yaml", ".py"}
    assert not [f for f in files if f.read_bytes()[:1] == b"\x80"]
    requirements = (packaged / "requirements.txt").read_text().split()
    assert all("==" in r and "/" not in r and "@" not in r for r in requirements)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something is unpickled")

    for name in ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"):
        monkeypatch.setattr(name, refuse)
    assert len(mlflow.pyfunc.load_model(str(packaged)).predict([sent(boxes=BOXES)])[0]) == 2


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nano-000000000000"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    registry.package(folder, tmp_path / "model")
    with pytest.raises(wesam.InputError, match="is for the model nano-000000000000, not nano-"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    with pytest.raises(wesam.InputError, match="no weights file no/where"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"model": "no/where.pth"})


def test_wrong_input_is_told_in_a_line(packaged: Path) -> None:
    served = mlflow.pyfunc.load_model(str(packaged))
    good = sent(boxes=BOXES)
    wrong = {
        "image 1 needs boxes, points or polygons": sent(),
        "and of these only one": sent(boxes=BOXES, points=POINTS),
        "labels are those of points": sent(boxes=BOXES, labels=LABELS),
        "tight is said of boxes": sent(points=POINTS, labels=LABELS, tight=True),
        "expected a box x0, y0, x1, y1": sent(boxes=[[5, 5, 5, 9]]),
        "must have a number for every click": sent(points=POINTS, labels=[[1]]),
        "at least one with 1": sent(points=[[[1, 2]]], labels=[[0]]),
        "expected clicks": sent(points=[[[1, 2, 3]]]),
        "expected a polygon": sent(polygons=[[[1, 2], [3, 4]]]),
        "with 3 corners or more, got": sent(polygons=[[[1, 2], [3, 4], [1, 2]]]),
        "labels must have a number": sent(points=POINTS, labels=[]),
        "image 1: the box lies beside the image": sent(boxes=[[60, 0, 70, 9]]),
        "the box reaches too far beyond": sent(boxes=[[0, 0, 1e300, 1e300]]),
        "a click lies beside the image": sent(points=[[[12, 20], [1e300, 9]]]),
        "a polygon lies beside": sent(polygons=[[[0, 41], [5, 41], [5, 44]]]),
        "a polygon reaches too far": sent(polygons=[[[0, 0], [1e9, 0], [0, 1e9]]]),
        "image 1 is not in base64": {"image": "*", "boxes": BOXES},
        "cannot read the image image 1": {"image": "aaaa", "boxes": BOXES},
    }
    for message, given in wrong.items():
        with pytest.raises(MlflowException, match=message) as e:
            served.predict([good, given])
        assert e.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="box"):
        served.predict([{**good, "box": [1, 2, 3, 4]}])


@pytest.mark.slow
def test_the_champion_is_served_over_http(folder: Path, tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start("t", "trial", None, {})
    run.attach(lambda: {f.name: f.read_bytes() for f in folder.iterdir()}, "adapter")
    registry.promote(tracker, "d", run.id, {**SAME, "test_miou": "0.5"})
    command = ["models", "serve", "-m", "models:/wesam-d@champion", "--env-manager", "local"]
    with served(command, "ping", tmp_path, MLFLOW_TRACKING_URI=tracker.uri) as address:

        def ask(given: dict[str, Any]) -> Any:
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/invocations", json.dumps({"inputs": [given]}).encode(), head)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["predictions"][0]

        answers = ask(sent(boxes=BOXES))
        masks, iou = wanted(AdaptedSam.load(wesam.load_sam("nano"), folder), Prompts(boxes=torch.tensor(BOXES)))
        assert np.array_equal(unpacked(answers), masks)
        assert [a["predicted_iou"] for a in answers] == pytest.approx(iou)
        with pytest.raises(urllib.error.HTTPError) as e:
            ask(sent(boxes=[[5, 5, 5, 9]]))
        assert e.value.code == 400
        told = e.value.read().decode()
        assert "expected a box" in told
        assert len(told) < 300, "the image is not sent back"
