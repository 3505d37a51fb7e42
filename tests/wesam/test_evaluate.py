from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from wesam.config import PromptKind
from wesam.data import Sample, load_domain
from wesam.errors import InputError
from wesam.evaluate import LOOSER, Scores, baseline, evaluate, label_free, overlap, predict
from wesam.prompts import Prompts, weak_labels
from wesam.sam import load_sam


def test_overlap_by_hand() -> None:
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth[:, :2] = True
    predicted = torch.zeros_like(truth)
    predicted[0, 1:3] = True  # intersection 4, union 12
    iou, f1 = overlap(predicted, truth)
    assert iou.tolist() == [pytest.approx(1 / 3), 0]
    assert f1.tolist() == [pytest.approx(0.5), 0]


def test_scores_average_per_image_first() -> None:
    many, one = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0])
    scores = Scores.of([{"miou": many, "f1": many, "label_free": many}, {"miou": one, "f1": one, "label_free": one}])
    assert scores == Scores(2, 4, 0.5, 0.5, 0.5)
    assert (scores.objective, scores.chosen_by) == (0.5, "miou")
    assert Scores.of([{"label_free": many}, {"label_free": one, "miou": one}]).miou is None, "of every image or of none"


@pytest.mark.parametrize("crop", [0, 2])
def test_masks_are_cut_to_boxes_that_are_said_to_be_tight(crop: float) -> None:
    sample = load_domain("clean").split("val")[0]
    masks, iou = predict(load_sam("nano"), sample.image, sample.weak_labels("box"), crop=crop)
    tight = sample.weak_labels("tight-box")
    cut, same = predict(load_sam("nano"), sample.image, tight, crop=crop)
    assert torch.equal(cut, masks & tight.filled((192, 192)))
    assert cut.sum() < masks.sum()
    assert torch.equal(iou, same)


@pytest.mark.parametrize("crop", [0, 2])
@pytest.mark.parametrize(
    "none",
    [
        Prompts(boxes=torch.zeros(0, 4)),
        Prompts(boxes=torch.zeros(0, 4), tight=True),
        Prompts(points=torch.zeros(0, 5, 2), point_labels=torch.zeros(0, 5).int()),
        Prompts(polygons=()),
    ],
    ids=["boxes", "tight boxes", "points", "polygons"],
)
def test_no_prompts_give_no_masks(sam: Sam, none: Prompts, crop: float) -> None:
    masks, iou = predict(sam, torch.zeros(3, 20, 30, dtype=torch.uint8), none, crop=crop)
    assert (masks.shape, masks.dtype) == ((0, 20, 30), torch.bool)
    assert (iou.shape, iou.dtype) == ((0,), torch.float32)


def test_the_label_free_score_of_tight_boxes_is_of_what_the_cut_leaves() -> None:
    sample, sam = load_domain("clean").split("val")[0], load_sam("nano")
    given, size = sample.weak_labels("tight-box"), (192, 192)
    masks, _ = predict(sam, sample.image, given)
    looser, _ = predict(sam, sample.image, replace(given, tight=False).longer(LOOSER))
    flipped = given.flipped(True, False, size)
    mirrored, _ = predict(sam, sample.image.flip(2), flipped)
    assert torch.equal(mirrored, mirrored & flipped.filled(size))
    by_hand = label_free(masks, given, mirrored.flip(2), [looser])
    found = evaluate(sam, [sample], "tight-box", label_free=True)
    assert found.label_free == pytest.approx(float(by_hand.mean()), abs=1e-6)
    whole = evaluate(sam, [sample], "box", label_free=True)
    assert found.label_free is not None
    assert found.label_free > (whole.label_free or 0.0), "what lies beside the box does no harm any more"


def test_given_boxes_may_be_said_to_be_tight() -> None:
    boxes = Prompts(boxes=torch.tensor([[2.0, 2, 6, 4]]))
    sample = Sample("x", torch.zeros(3, 9, 9, dtype=torch.uint8), {"box": boxes})
    assert sample.weak_labels("tight-box").tight
    assert not sample.weak_labels("box").tight


def test_the_label_free_score_by_hand() -> None:
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, 2:6, 2:6] = True
    boxes = Prompts(boxes=torch.tensor([[2.0, 2, 6, 4], [0, 0, 4, 4]]))
    assert label_free(masks, boxes).tolist() == [pytest.approx(8 / 16), 0], "the second mask is empty"
    mirrored = torch.zeros_like(masks)
    mirrored[0, 2:6, 2:4] = True
    assert label_free(masks, boxes, mirrored).tolist() == [pytest.approx(8 / 16 * 8 / 16), 0]
    looser = torch.zeros_like(masks)
    looser[0, 2:6, 1:7] = True
    assert label_free(masks, boxes, mirrored, [looser]).tolist() == [pytest.approx(8 / 16 * 8 / 16 * 8 / 24), 0]
    clicks = torch.tensor([[[3.5, 3.5], [8.5, 8.5], [4.5, 4.5]]]).repeat(2, 1, 1)
    labels = torch.tensor([[1, 1, 0], [1, 1, -1]])
    given = Prompts(points=clicks, point_labels=labels)
    assert label_free(masks, given).tolist() == [pytest.approx((1 / 2) / (1 + 3 * 1)), 0], (
        "one of two on it, one of one beside it"
    )
    first, second = given.halves()
    assert first.point_labels is not None
    assert second.point_labels is not None
    assert first.point_labels.tolist() == [[1, -1, 0], [1, -1, -1]], "the second click on it is left out"
    assert second.point_labels.tolist() == [[-1, 1, -1], [-1, 1, -1]], "what the first has"
    halves = torch.zeros(2, 2, 10, 10, dtype=torch.bool)
    halves[0, 0, 8, 8] = halves[1, 0, 3, 3] = halves[1, 1, 3, 3] = True  # each finds what it was not told
    assert label_free(masks, given, less=list(halves)).tolist() == [1, pytest.approx(1 / 2)]
    assert label_free(masks, given, mirrored, list(halves)).tolist() == [pytest.approx(8 / 16), pytest.approx(1 / 2)]
    alone = Prompts(points=clicks[:1, :2], point_labels=torch.tensor([[1, 0]]))
    assert [h.point_labels.tolist() for h in alone.halves() if h.point_labels is not None] == [[[1, 0]], [[1, -1]]]
    square = torch.tensor([[2.0, 2.0], [6.0, 2.0], [6.0, 6.0], [2.0, 6.0]])
    filled = label_free(masks, Prompts(polygons=(square, square)))
    assert filled.tolist() == [pytest.approx(1), 0]


def test_without_masks_only_the_label_free_score_is_known(sam: Sam) -> None:
    known = load_domain("clean").split("val")[:2]
    boxes_only = [Sample(s.key, s.image, {"box": s.weak_labels("box")}) for s in known]
    scores, reference = evaluate(sam, boxes_only, "box"), evaluate(sam, known, "box", label_free=True)
    assert (scores.miou, scores.f1) == (None, None)
    assert scores.label_free == reference.label_free
    assert evaluate(sam, known, "box").label_free is None, "not asked for"
    with pytest.raises(InputError, match="no true masks"):
        scores.value("miou")
    assert (scores.objective, scores.chosen_by) == (scores.label_free, "label_free")


def test_masks_that_fill_whatever_box_they_are_shown_have_a_low_label_free_score(
    sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such masks fit their boxes best, and are the same in the mirrored image."""
    known = load_domain("clean").split("val")[:3]
    good = evaluate(sam, known, "box", label_free=True)

    def filled(
        model: Sam, image: torch.Tensor, prompts: Prompts, where: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = (int(image.shape[1]), int(image.shape[2]))
        assert prompts.boxes is not None
        masks = torch.stack([_inside(b, size) for b in prompts.boxes])
        return masks, torch.ones(len(masks))

    monkeypatch.setattr(sys.modules["wesam.evaluate"], "_predict", filled)
    bad = evaluate(sam, known, "box", label_free=True)
    assert good.miou is not None
    assert good.label_free is not None
    assert bad.miou is not None
    assert bad.label_free is not None
    assert bad.miou < good.miou - 0.1
    assert bad.label_free == pytest.approx(1 / 1.15**2, abs=0.05)


@pytest.mark.parametrize("crop", [1.0, 1.1, 2.0])
def test_a_window_does_not_cut_masks_that_fill_a_looser_box_to_the_given_one(
    sam: Sam, monkeypatch: pytest.MonkeyPatch, crop: float
) -> None:
    """Cut by the window of the given box they would fit it. Half of the clicks span less than all: in a window of its
    own it would lose clicks, and be asked about another part of the image.
    """
    shown: list[torch.Tensor] = []

    def filled(
        model: Sam, image: torch.Tensor, prompts: Prompts, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = (int(image.shape[1]), int(image.shape[2]))
        shown.append(where)
        boxes = prompts if prompts.boxes is not None else Prompts(boxes=prompts.extents())
        return boxes.filled(size) & Prompts(boxes=where.float()).filled(size), torch.ones(len(prompts))

    monkeypatch.setattr(sys.modules["wesam.evaluate"], "_predict", filled)
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    known = [Sample("x", image, {"box": Prompts(boxes=torch.tensor([[100.0, 100, 200, 200]]))})]
    assert evaluate(sam, known, "box", crop=crop).label_free == pytest.approx(1 / 1.15**2, abs=0.02)
    shown.clear()
    clicks = torch.tensor([[[100.5, 100.5], [120.5, 110.5], [150.5, 190.5], [180.5, 120.5]]])
    known = [Sample("x", image, {"point": Prompts(points=clicks, point_labels=torch.ones(1, 4).int())})]
    evaluate(sam, known, "point", crop=crop)
    assert len(shown[0]) == 3
    assert len(shown[0].unique(dim=0)) == 1


def _inside(box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    return ((y > box[1]) & (y < box[3]))[:, None] & ((x > box[0]) & (x < box[2]))[None, :]


def test_baselines_by_hand() -> None:
    yy, xx = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(200) + 0.5, indexing="ij")
    disc = ((xx - 100) ** 2 + (yy - 90) ** 2 <= 60**2)[None]
    split = [Sample("x", torch.zeros(3, 200, 200, dtype=torch.uint8), disc)]
    assert baseline("ellipse", split).miou > 0.99
    assert baseline("box", split).miou == pytest.approx(torch.pi / 4, abs=0.01)


def test_many_prompts_are_decoded_in_parts_with_the_same_result(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = load_domain("cluttered").split("val")[0]
    prompts = weak_labels(sample.masks, "box", sample.key)
    whole, iou = predict(sam, sample.image, prompts)
    monkeypatch.setattr(sys.modules["wesam.evaluate"], "CHUNK", 3)
    parts, part_iou = predict(sam, sample.image, prompts)
    assert (whole != parts).float().mean() < 1e-4
    assert torch.allclose(iou, part_iou, atol=1e-5)


def test_progress_counts_every_image(sam: Sam) -> None:
    seen: list[tuple[int, int]] = []
    scores = evaluate(sam, load_domain("clean").split("val")[:3], "box", progress=lambda n, of: seen.append((n, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert scores.images == 3


@pytest.mark.parametrize("prompt", ["box", "point"])
def test_the_embedded_model_beats_the_ellipse_on_clean_scenes(sam: Sam, prompt: str) -> None:
    split = load_domain("clean").split("test")[:24]
    assert evaluate(sam, split, prompt).miou > baseline("ellipse", split).miou + 0.03  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["box", "point", "coarse"])
@pytest.mark.parametrize("crop", [0.0, 2.0])
def test_the_label_free_score_falls_where_masks_get_worse_and_collapse_is_seen(
    sam: Sam, prompt: PromptKind, crop: float
) -> None:
    """A model whose masks are all or nothing is sure of itself, and the score must not be."""
    known = load_domain("clean").split("val")[:3]
    worse = copy.deepcopy(sam)
    good = evaluate(sam, known, prompt, crop=crop, label_free=True)
    assert good.label_free is not None
    assert good.collapsed == 0
    final = worse.mask_decoder.output_hypernetworks_mlps[0].layers[-1]
    for bias in (-1e4, 1e4):  # nothing, then everything
        upscaled = worse.mask_decoder.output_upscaling[-1]
        worse.mask_decoder.output_upscaling[-1] = Everywhere(1.0)
        final.weight.data.zero_()
        final.bias.data.fill_(bias)
        bad = evaluate(worse, known, prompt, crop=crop, label_free=True)
        worse.mask_decoder.output_upscaling[-1] = upscaled
        assert bad.label_free is not None
        assert bad.label_free < good.label_free - 0.2
        assert bad.collapsed > 0.9


class Everywhere(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.value)


def test_what_is_no_image_and_what_is_no_box_is_refused(sam: Sam) -> None:
    """A float image in 0..1, the common form elsewhere, would be nearly black."""
    image, boxes = torch.zeros(3, 20, 30, dtype=torch.uint8), Prompts(boxes=torch.tensor([[1.0, 2, 9, 9]]))
    for wrong, told in (
        (image.float(), r"float32 \[3, 20, 30\]"), (image.permute(1, 2, 0), r"uint8 \[20, 30, 3\]"),
        (image[0], r"uint8 \[20, 30\]"), (image.numpy(), r"uint8 \[3, 20, 30\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"must be a tensor, uint8 .*, got .*{told}"):
            predict(sam, wrong, boxes)
    for box in ([9.0, 2, 1, 9], [1.0, 2, 1, 9], [1.0, 2, float("nan"), 9]):
        with pytest.raises(InputError, match="x1 above x0"):
            predict(sam, image, Prompts(boxes=torch.tensor([box])))
    assert len(predict(sam, image, boxes)[0]) == 1
    assert len(predict(sam, image, Prompts(boxes=torch.zeros(0, 4)))[0]) == 0
