from __future__ import annotations

import sys

import pytest
import torch
from segment_anything.modeling import Sam

from wesam.data import Sample, load_domain
from wesam.evaluate import Scores, agreement, baseline, evaluate, overlap, predict
from wesam.prompts import Prompts, weak_labels


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
    scores = Scores.of([{"miou": many, "f1": many, "agreement": many}, {"miou": one, "f1": one, "agreement": one}])
    assert scores == Scores(2, 4, 0.5, 0.5, 0.5)
    assert (scores.objective, scores.chosen_by) == (0.5, "miou")
    assert Scores.of([{"agreement": many}, {"agreement": one, "miou": one}]).miou is None, "of every image or of none"


def test_agreement_with_weak_labels_by_hand() -> None:
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[0, 2:6, 2:6] = True
    boxes = Prompts(boxes=torch.tensor([[2.0, 2, 6, 4], [0, 0, 4, 4]]))
    assert agreement(masks, boxes).tolist() == [pytest.approx(8 / 16), 0], "the second mask is empty"
    clicks = torch.tensor([[[3.5, 3.5], [8.5, 8.5], [4.5, 4.5]]]).repeat(2, 1, 1)
    labels = torch.tensor([[1, 1, 0], [1, 1, -1]])
    given = Prompts(points=clicks, point_labels=labels)
    assert agreement(masks, given).tolist() == [pytest.approx((1 / 2 + 0) / 2), 0]
    square = torch.tensor([[2.5, 2.5], [5.5, 2.5], [5.5, 5.5], [2.5, 5.5]])  # through the outer pixels
    filled = agreement(masks, Prompts(polygons=(square, square)))
    assert filled.tolist() == [pytest.approx(1), 0]


def test_without_masks_only_the_agreement_is_known(sam: Sam) -> None:
    known = load_domain("clean").split("val")[:2]
    boxes_only = [Sample(s.key, s.image, {"box": s.weak_labels("box")}) for s in known]
    scores, reference = evaluate(sam, boxes_only, "box"), evaluate(sam, known, "box")
    assert (scores.miou, scores.f1) == (None, None)
    assert scores.agreement == reference.agreement
    assert (scores.objective, scores.chosen_by) == (scores.agreement, "agreement")


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
