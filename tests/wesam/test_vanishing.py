"""Instances smaller than a pixel of the model: dropped from training, counted, and kept where they can be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

from wesam.adapt import draw
from wesam.anchor import Anchor
from wesam.cli import main
from wesam.config import Config
from wesam.crops import WHOLE
from wesam.data import load_domain
from wesam.methods import get_method
from wesam.prompts import Prompts, vanishing

H, W = 400, 600
LARGE, SPECK = [100, 100, 120, 90], [300, 200, 2, 2]
"""x, y, width, height; at 192 px for 600, the speck is 0.64 pixels wide."""

KEYPOINTS = {LARGE[0]: [160, 140, 2], SPECK[0]: [301, 201, 2]}


def annotation(number: int, box: list[int], given: str) -> dict[str, Any]:
    x, y, w, h = box
    shape: dict[str, Any] = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    if given != "masks":
        shape = {"bbox": box} if given == "boxes" else {"keypoints": KEYPOINTS[x]}
    return {"id": number, "image_id": 0, "iscrowd": 0, "category_id": 1, **shape}


def folder(root: Path, given: str) -> Path:
    """A domain whose images have a rectangle and a speck each, with this kind of labels."""
    root.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        pixels = np.full((H, W, 3), 60, np.uint8)
        for x, y, w, h in (LARGE, SPECK):
            pixels[y : y + h, x : x + w] = 220
        Image.fromarray(pixels).save(root / f"{split}.png")
        (root / f"{split}.json").write_text(json.dumps({
            "images": [{"id": 0, "file_name": f"{split}.png", "height": H, "width": W}],
            "annotations": [annotation(1, SPECK, given), annotation(2, LARGE, given)],
            "categories": [{"id": 1, "name": "thing"}],
        }))  # fmt: skip
    return root


def test_the_largest_instance_never_vanishes() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 7, 6], [10, 10, 200, 12]])
    assert vanishing(boxes, (1000, 1000), 100).tolist() == [True, True, False]
    assert vanishing(boxes, (1000, 1000), 1000).tolist() == [False, False, False]


@pytest.mark.parametrize("given", ["masks", "boxes"])
def test_what_the_model_cannot_see_is_not_trained_on(sam: Sam, tmp_path: Path, given: str) -> None:
    train = load_domain(str(folder(tmp_path / given, given))).split("train")
    assert len(train[0]) == 2
    assert [train.small(side) for side in (64, 192, 600)] == [1, 1, 0]
    prepared = Anchor(sam, train, "box").prepared((0, WHOLE))
    assert prepared.prompts.boxes is not None
    width = prepared.prompts.boxes[:, 2] - prepared.prompts.boxes[:, 0]
    assert width.tolist() == pytest.approx([LARGE[2] * 192 / W])
    assert prepared.instances.tolist() == [1], "the speck is the first"


def test_a_window_shows_what_the_whole_image_does_not(sam: Sam, tmp_path: Path) -> None:
    anchor = Anchor(sam, load_domain(str(folder(tmp_path / "masks", "masks"))).split("train"), "box", 3.0)
    places = {anchor.place(0, torch.Generator().manual_seed(seed)) for seed in range(20)}
    assert places == {(0, 0), (0, 1)}
    assert anchor.prepared((0, 0)).prompts.boxes is not None


def test_clicks_do_not_tell_a_size(sam: Sam, tmp_path: Path) -> None:
    train = load_domain(str(folder(tmp_path / "clicks", "clicks"))).split("train")
    assert train.small(64) == 0
    prompts: Prompts = Anchor(sam, train, "point").prepared((0, WHOLE)).prompts
    assert len(prompts) == 2


def test_the_count_is_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(folder(tmp_path / "masks", "masks"))
    few = ["--steps", "1", "--set", "eval_every=1", "--max-instances", "1"]
    for crop, count in (("0", 1), ("3", 0)):
        out = tmp_path / f"adapter-{crop}"
        assert main(["adapt", "--domain", where, "--out", str(out), "--crop", crop, *few]) == 0
        record = json.loads((out / "adaptation.json").read_text())
        assert record["vanished"] == count
        assert record["config"]["max_instances"] == 1
        assert ("1 instances; --crop 3" in capsys.readouterr().err) == bool(count)


def test_at_most_so_many_instances_are_drawn_others_in_each_step(sam: Sam, tmp_path: Path) -> None:
    split = load_domain(str(folder(tmp_path / "clicks", "clicks"))).split("train")
    anchor = Anchor(sam, split, "point")
    config = Config(max_instances=1, prompt="point").replace({"optim.batch_size": 1, "views.flip": False})
    drawn = [draw(anchor, config, step, get_method("wesam")).prompts[0].points for step in range(12)]
    assert {len(p) for p in drawn if p is not None} == {1}
    assert len({tuple(p.flatten().tolist()) for p in drawn if p is not None}) == 2
    again = [draw(anchor, config, step, get_method("wesam")).prompts[0].points for step in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True) if a is not None and b is not None)
