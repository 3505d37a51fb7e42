from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wesam.config import PromptKind
from wesam.data import load_domain
from wesam.errors import InputError
from wesam.evaluate import overlap
from wesam.prompts import NO_CLICK, POINTS, VERTICES, Prompts, tight_boxes, weak_labels
from wesam.views import flip

KINDS: tuple[PromptKind, ...] = ("box", "tight-box", "point", "coarse", "coarse-box", "point1", "point10")


def tensors(p: Prompts) -> list[torch.Tensor]:
    return [t for t in (p.boxes, p.points, p.point_labels, *(p.polygons or ())) if t is not None]


def test_tight_boxes_by_hand() -> None:
    masks = torch.zeros(2, 10, 12, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    assert tight_boxes(masks).tolist() == [[3, 2, 9, 5], [0, 0, 0, 0]]


def test_labels_are_the_same_in_every_process() -> None:
    code = (
        "from tests.wesam.test_prompts import KINDS, tensors\n"
        "from wesam.data import load_domain; from wesam.prompts import weak_labels\n"
        "s = load_domain('clean').split('train')[3]\n"
        "print([[t.tolist() for t in tensors(weak_labels(s.masks, k, s.key))] for k in KINDS])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    sample = load_domain("clean").split("train")[3]
    for _ in range(2):
        here = [[t.tolist() for t in tensors(weak_labels(sample.masks, k, sample.key))] for k in KINDS]
        assert str(here) == done.stdout.strip()


def test_clicks_lie_inside_and_outside() -> None:
    for i in range(5):
        sample = load_domain("cluttered").split("val")[i]
        prompts = weak_labels(sample.masks, "point", sample.key)
        assert prompts.points is not None
        assert prompts.points.shape == (len(sample.masks), 2 * POINTS, 2)
        for mask, points in zip(sample.masks, prompts.points.floor().long(), strict=True):
            hit = mask[points[:, 1], points[:, 0]]
            assert hit.tolist() == [True] * POINTS + [False] * POINTS


def test_coarse_masks_have_few_corners_and_cover_the_object_roughly() -> None:
    overlaps = []
    for i in range(8):
        sample = load_domain("clean").split("val")[i]
        big = sample.masks[sample.masks.flatten(1).sum(1) > 400]
        if not len(big):
            continue
        prompts = weak_labels(big, "coarse", sample.key)
        assert prompts.polygons is not None
        assert all(3 <= len(p) <= VERTICES for p in prompts.polygons)
        drawn = prompts.mask_input(192, 1.0)[:, 0] > 0
        overlaps.append(overlap(drawn, big)[0].mean().item())
    assert 0.6 < sum(overlaps) / len(overlaps) < 0.97


def test_a_coarse_mask_is_as_large_at_every_resolution() -> None:
    sample = load_domain("clean").split("val")[0]
    prompts = weak_labels(sample.masks, "coarse", sample.key)
    areas = prompts.filled((192, 192)).sum((1, 2))
    for factor in (2, 5):
        finer = prompts.resized((1, 1), (factor, factor)).filled((factor * 192, factor * 192)).sum((1, 2)) / factor**2
        assert torch.allclose(finer, areas.float(), rtol=0.15)
        assert finer.sum() == pytest.approx(areas.sum().item(), rel=0.03)
    for stride in (2, 4):
        covered = prompts.covered(192 // stride, stride)
        assert torch.allclose(covered.sum((1, 2)) * stride**2, areas.float(), atol=2), "in pixels"
        assert torch.equal(prompts.mask_input(192 // stride, stride)[:, 0] > 0, covered > 0.5)


def test_a_rectangle_is_its_own_coarse_mask() -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 4:9, 10:25] = True
    masks[1, 7, 3] = True
    masks[2, :, 12] = True
    prompts = weak_labels(masks, "coarse", "x")
    assert torch.equal(prompts.extents(), tight_boxes(masks))
    assert torch.equal(prompts.filled((20, 30)), masks)


def test_a_coarse_mask_is_of_the_largest_part() -> None:
    mask = torch.zeros(1, 50, 200, dtype=torch.bool)
    mask[0, 10:40, 10:40] = True
    mask[0, 45, 5:195] = True
    assert weak_labels(mask, "coarse-box", "x").boxes.tolist() == [[10, 10, 40, 40]]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flips", [(True, False), (False, True), (True, True)])
def test_flipped_labels_are_labels_of_the_flipped_image(kind: PromptKind, flips: tuple[bool, bool]) -> None:
    sample = load_domain("clean").split("val")[0]
    size = (sample.masks.shape[1], sample.masks.shape[2])
    prompts = weak_labels(sample.masks, kind, sample.key)
    there = prompts.flipped(*flips, size)
    assert there.tight == (kind == "tight-box")
    if kind in ("box", "tight-box"):
        assert there.boxes is not None
        assert torch.equal(there.boxes, tight_boxes(flip(sample.masks, *flips)))
    elif kind == "coarse-box":
        assert there.boxes is not None
        inner = tight_boxes(flip(sample.masks, *flips))
        assert (there.boxes[:, :2] >= inner[:, :2]).all(), (
            "a polygon of the outline's corners is no larger than the mask"
        )
        assert (there.boxes[:, 2:] <= inner[:, 2:]).all()
    elif kind.startswith("point"):
        count = int(kind.removeprefix("point") or POINTS)
        assert there.points is not None
        for mask, points in zip(flip(sample.masks, *flips), there.points.floor().long(), strict=True):
            assert mask[points[:, 1], points[:, 0]].tolist() == [True] * count + [False] * count
    else:
        mirrored = flip(prompts.mask_input(192, 1.0), *flips) > 0
        agreement = overlap(there.mask_input(192, 1.0)[:, 0] > 0, mirrored[:, 0])[0]
        assert agreement.min() > 0.7  # borders move by a pixel, which is much for the smallest
    back = there.flipped(*flips, size)
    for a, b in zip(tensors(prompts), tensors(back), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_depends_on_no_other_instance(kind: PromptKind) -> None:
    sample = load_domain("clean").split("val")[0]
    order = torch.tensor([2, 0])
    whole, some = (weak_labels(m, kind, sample.key) for m in (sample.masks, sample.masks[order]))
    for a, b in zip(tensors(whole[order]), tensors(some), strict=True):
        assert torch.equal(a, b)
    other = weak_labels(sample.masks, kind, "another image")
    assert kind.startswith("point") != all(
        torch.equal(a, b) for a, b in zip(tensors(whole), tensors(other), strict=True)
    )


def test_tight_boxes_stay_tight_in_whatever_is_made_of_them() -> None:
    boxes = Prompts(boxes=torch.tensor([[10.0, 20, 30, 60], [1, 2, 3, 4]]), tight=True)
    made = (
        boxes.resized((2, 3), (4, 7)), boxes.flipped(True, False, (90, 90)), boxes[torch.tensor([1])],
        boxes.longer(1.1),
        boxes.noisy(0.1, torch.Generator()), boxes.seen_in(torch.tensor([0, 0, 50, 70])),
        Prompts.concatenate([boxes, boxes]),
    )  # fmt: skip
    assert all(p.tight for p in made)
    with pytest.raises(ValueError, match="only boxes are tight"):
        Prompts(polygons=(torch.zeros(3, 2),), tight=True)


def test_clicks_are_concatenated_whatever_their_number() -> None:
    one, two = torch.tensor([[[1.0, 2]]]), torch.tensor([[[3.0, 4], [5, 6]], [[7, 8], [9, 10]]])
    parts = [
        Prompts(points=one, point_labels=torch.tensor([[1]])),
        Prompts(points=two, point_labels=torch.tensor([[1, 0], [1, 1]])),
    ]
    whole = Prompts.concatenate(parts)
    assert whole.points is not None
    assert whole.point_labels is not None
    assert whole.points.tolist() == [[[1, 2], [0, 0]], *two.tolist()]
    assert whole.point_labels.tolist() == [[1, NO_CLICK], [1, 0], [1, 1]]


def test_a_filled_box_holds_the_pixels_whose_centres_it_holds_and_at_least_one() -> None:
    boxes = Prompts(boxes=torch.tensor([[1.0, 2, 4, 4], [1.4, 0.6, 3.4, 2.4], [2.2, 3.1, 2.4, 3.3], [-5, -5, 1, 1]]))
    found = [[(int(x), int(y)) for y, x in mask.nonzero()] for mask in boxes.filled((6, 5))]
    assert found[0] == [(1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (3, 3)]
    assert found[1:] == [[(1, 1), (2, 1)], [(2, 3)], [(0, 0)]]


def test_prompts_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one kind"):
        Prompts(boxes=torch.zeros(1, 4), points=torch.zeros(1, 2, 2), point_labels=torch.zeros(1, 2))


def test_specks_and_full_images_have_labels_of_every_kind() -> None:
    masks = torch.zeros(2, 9, 9, dtype=torch.bool)
    masks[0, 4, 4] = True
    masks[1] = True
    for kind in KINDS:
        assert len(weak_labels(masks, kind, "x")) == 2
    labels = weak_labels(masks, "point1", "x").point_labels
    assert labels is not None
    assert labels.tolist() == [[1, 0], [1, NO_CLICK]], "nothing is beside what fills the image"


def test_noise_moves_boxes_and_leaves_clicks_out_but_never_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = Prompts(boxes=torch.tensor([[10.0, 20, 30, 60]]).repeat(200, 1))
    assert boxes.noisy(0, generator) is boxes
    moved = boxes.noisy(0.1, generator).boxes
    assert moved is not None
    assert boxes.boxes is not None
    off = (moved - boxes.boxes).abs()
    assert (off <= torch.tensor([2.0, 4, 2, 4])).all()
    assert (off.amax(0) > 0.9 * torch.tensor([2.0, 4, 2, 4])).all()
    labels = torch.tensor([[1, 1, 0, 0]]).repeat(200, 1)
    clicks = Prompts(points=torch.zeros(200, 4, 2), point_labels=labels).noisy(0.5, generator)
    assert clicks.point_labels is not None
    assert (clicks.point_labels[:, 0] == 1).all()
    assert 0.4 < (clicks.point_labels[:, 1:] == -1).float().mean() < 0.6
    polygon = Prompts(polygons=(torch.tensor([[0.0, 0], [10, 0], [10, 20]]),)).noisy(0.1, generator).polygons
    assert polygon is not None
    assert not torch.equal(polygon[0], torch.tensor([[0.0, 0], [10, 0], [10, 20]]))


def test_lists_and_arrays_become_tensors() -> None:
    """As a person types them."""
    given: list[Any] = [[[40, 30, 120, 110]], np.array([[40, 30, 120, 110]])]
    for boxes in given:
        made = Prompts(boxes=boxes).boxes
        assert made is not None
        assert torch.equal(made, torch.tensor([[40.0, 30, 120, 110]]))
    xy: Any = [[[1, 2], [3, 4]]]
    labels: Any = [[1, 0]]
    clicks = Prompts(points=xy, point_labels=labels)
    assert clicks.points is not None
    assert clicks.point_labels is not None
    assert (clicks.points.dtype, clicks.point_labels.dtype) == (torch.float32, torch.int)
    outline: Any = ([[1, 2], [9, 2], [4, 8]],)
    assert Prompts(polygons=outline).filled((10, 10)).sum() > 9
    array: Any = np.array([[[1, 2], [9, 2], [4, 8]]])
    assert len(Prompts(polygons=array)) == 1
    nothing: Any = []
    assert (len(Prompts(boxes=nothing)), len(Prompts(points=nothing, point_labels=nothing))) == (0, 0)


def test_what_has_another_shape_is_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"boxes": [40, 30, 120, 110]}, r"boxes must be \[N, 4\], got \[4\]"),
        ({"boxes": [[1, 2, 30]]}, r"boxes must be \[N, 4\], got \[1, 3\]"),
        ({"points": [[1, 2]], "point_labels": [[1]]}, r"points must be \[N, P, 2\]"),
        ({"points": [[[1, 2]]], "point_labels": [1]}, r"point_labels must be \[N, P\]"),
        ({"polygons": [[1, 2], [3, 4]]}, r"a polygon must be \[N, 2\]"),
    ]
    for given, told in wrong:
        with pytest.raises(InputError, match=told):
            Prompts(**given)
