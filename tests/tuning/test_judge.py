"""A domain's picture: which test images it shows, and what it says of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from tuning import judge
from tuning.judge import PerImage, Task, changed_most
from tuning.trainer import source_model
from wesam import Config, baseline, evaluate, load_domain
from wesam.config import PromptKind


def images(*scores: float, name: str = "miou") -> PerImage:
    return [{name: torch.tensor([s - 0.1, s + 0.1]), "collapsed": torch.zeros(2)} for s in scores]


def test_the_images_that_have_changed_most_are_shown() -> None:
    found = changed_most(images(0.5, 0.5, 0.5, 0.5, 0.5, 0.5), images(0.6, 0.5, 0.8, 0.3, 0.7, 0.45))
    assert list(found) == [2, 4, 5, 3]
    assert found[2] == "mIoU 0.500 -> 0.800, +30.0 points, rank 1 of 6 by gain"
    assert found[3] == "mIoU 0.500 -> 0.300, -20.0 points, rank 6 of 6 by gain"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_of_few_images_each_is_shown_once(count: int) -> None:
    found = changed_most(images(*[0.5] * count), images(*[0.5 + 0.1 * n for n in range(count)]))
    assert list(found) == list(range(count))[::-1]


def test_without_masks_the_caption_says_so() -> None:
    found = changed_most(images(0.5, name="label_free"), images(0.6, name="label_free"))
    assert found == {0: "no masks known, label-free score 0.500 -> 0.600, +10.0 points, rank 1 of 1 by gain"}


def test_references_are_scored_with_so_many_instances_of_an_image(small: Path) -> None:
    base = Config(val_instances=1, test_instances=1)
    for split in ("val", "test"):
        found, _ = judge._references(Task("nano", str(small), base), split)  # type: ignore[arg-type]
        assert {s.instances for s in found.values()} == {found[f"direct_{split}"].images}


@pytest.mark.parametrize(
    ("prompt", "box"), [("box", "box"), ("coarse-box", "coarse-box"), ("point", "box"), ("coarse", "box")]
)
def test_what_is_drawn_is_drawn_in_the_given_box_or_where_none_is_in_the_tight_one(
    small: Path, prompt: PromptKind, box: PromptKind
) -> None:
    found, _ = judge._references(Task("nano", str(small), Config(prompt=prompt)), "test")
    images = load_domain(str(small)).split("test")
    assert found["box_filled_test"] == baseline("box", images, box)
    assert found["ellipse_test"] == baseline("ellipse", images, box)
    assert baseline("box", images, "coarse-box") != baseline("box", images)
    others = {"nearest_click_test": ("point", "voronoi"), "polygon_filled_test": ("coarse", "polygon")}
    for name, (kind, drawing) in others.items():
        assert found.get(name) == (baseline(drawing, images, kind) if kind == prompt else None)  # type: ignore[arg-type]


def test_direct_is_tried_in_other_ways_of_asking(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "TRIED_IMAGES", 1)
    few = load_domain(str(small)).split("val")[:1]
    found, _ = judge._references(Task("nano", str(small), Config()), "val")
    for name, kind, crop in (("asked", "box", 0), ("windows", "box", 2), ("tight", "tight-box", 0)):
        assert found[f"{name}_val"] == evaluate(source_model("nano"), few, kind, crop=crop, label_free=True)  # type: ignore[arg-type]
    assert len({found[f"{n}_val"].miou for n in ("asked", "windows", "tight")}) == 3
    assert "asked_test" not in judge._references(Task("nano", str(small), Config()), "test")[0]


def test_ways_to_ask_are_those_that_a_study_has_not_taken() -> None:
    assert {n: w[0] for n, w in judge.ways(Config(crop=3)).items()} == {"tight": "--prompt tight-box"}
    assert {n: w[0] for n, w in judge.ways(Config(prompt="point3")).items()} == {"windows": "--crop 4"}
    assert judge.ways(Config(prompt="tight-box", crop=2)) == judge.ways(Config(prompt="grid")) == {}


def test_without_an_adapter_the_first_images_are_shown_as_they_are(small: Path) -> None:
    picture = judge._picture(Task("nano", str(small), Config()), None, None)
    with Image.open(io.BytesIO(picture)) as page:
        assert page.width == 2 * (224 + 6) + 6, "the truth and Direct"
        assert page.height > 2 * 224
