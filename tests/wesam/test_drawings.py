from __future__ import annotations

import pytest
import torch

from wesam.data import load_domain
from wesam.drawings import draw, drawable
from wesam.errors import InputError
from wesam.evaluate import baseline
from wesam.prompts import NO_CLICK, Prompts


def test_the_nearest_click_decides_and_one_that_is_none_does_not() -> None:
    clicks = torch.tensor([[[1.5, 1.5], [6.5, 1.5], [3.5, 1.5]]])
    given = Prompts(points=clicks, point_labels=torch.tensor([[1, 0, NO_CLICK]]))
    (mask,) = draw("voronoi", given, (4, 8))
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 4
    both = Prompts(points=clicks, point_labels=torch.tensor([[1, 0, 0]]))
    assert draw("voronoi", both, (4, 8))[0].tolist() == [[True] * 3 + [False] * 5] * 4


def test_what_is_drawn_from_a_box_fills_it_or_its_ellipse() -> None:
    boxes = Prompts(boxes=torch.tensor([[2.0, 1, 6, 3]]))
    box, ellipse = draw("box", boxes, (4, 8))[0], draw("ellipse", boxes, (4, 8))[0]
    assert box.sum() == 8
    assert box[1:3, 2:6].all()
    assert (ellipse & ~box).sum() == 0
    assert 0 < ellipse.sum() <= 8


def test_every_drawing_is_from_its_own_kind_of_label_alone() -> None:
    kinds = ("box", "tight-box", "coarse-box", "point", "point1", "coarse", "grid")
    can = {d: tuple(k for k in kinds if drawable(d, k)) for d in ("box", "ellipse", "voronoi", "polygon")}  # type: ignore[arg-type]
    assert can == {
        "box": ("box", "tight-box", "coarse-box"), "ellipse": ("box", "tight-box", "coarse-box"),
        "voronoi": ("point", "point1"), "polygon": ("coarse",),
    }  # fmt: skip


def test_what_cannot_be_drawn_is_refused_with_what_can() -> None:
    with pytest.raises(InputError, match=r"ellipse cannot be drawn from point: box and ellipse are drawn from box"):
        baseline("ellipse", load_domain("clean").split("val")[:1], "point")


@pytest.mark.parametrize(("drawing", "prompt"), [("voronoi", "point"), ("polygon", "coarse"), ("box", "coarse-box")])
def test_drawings_are_scored_like_any_mask(drawing: str, prompt: str) -> None:
    scores = baseline(drawing, load_domain("clean").split("val")[:3], prompt)  # type: ignore[arg-type]
    assert scores.miou is not None
    assert 0.2 < scores.miou < 1
