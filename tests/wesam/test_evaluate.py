from __future__ import annotations

import sys

import pytest
import torch
from segment_anything.modeling import Sam

from wesam.data import Sample, load_domain
from wesam.evaluate import Scores, baseline, evaluate, overlap, predict
from wesam.prompts import weak_labels


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
    scores = Scores.of([(many, many), (one, one)])
    assert (scores.images, scores.instances, scores.miou, scores.f1) == (2, 4, 0.5, 0.5)


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
