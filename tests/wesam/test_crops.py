from __future__ import annotations

import sys

import pytest
import torch
from segment_anything.modeling import Sam

from wesam.crops import cut, inside, windows
from wesam.data import load_domain
from wesam.evaluate import baseline, evaluate, predict
from wesam.prompts import Prompts, weak_labels
from wesam.sam.promptable import Masks, decode


def test_windows_by_hand() -> None:
    boxes = torch.tensor([[100.0, 100, 140, 120], [0, 0, 40, 40], [290, 195, 300, 200], [0, 50, 300, 60]])
    found = windows(Prompts(boxes=boxes), (200, 300), 2.0).tolist()
    assert found[0] == [80, 70, 160, 150], "twice the longer side, around the middle"
    assert found[1] == [0, 0, 80, 80], "moved into the image"
    assert found[2] == [268, 168, 300, 200], "never smaller than 32"
    assert found[3] == [0, 0, 300, 200], "no larger than the image"


def test_a_window_holds_all_that_the_prompt_spans() -> None:
    clicks = torch.tensor([[[10.5, 60.5], [50.5, 20.5]], [[50.5, 20.5], [10.5, 60.5]]])
    given = Prompts(points=clicks, point_labels=torch.ones(2, 2, dtype=torch.int))
    found = windows(given, (200, 200), 1.0)
    assert found.tolist() == [[10, 20, 51, 61]] * 2
    assert given.seen_in(found[0]).point_labels.tolist() == [[1, 1]] * 2  # type: ignore[union-attr]
    generator, limit = torch.Generator().manual_seed(0), torch.tensor([90, 60])
    corners = torch.rand(4000, 2, 2, generator=generator) * (limit + 20) - 10
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes = boxes[((boxes[:, :2] < limit) & (boxes[:, 2:] > 0)).all(1)]
    for part in (boxes, (2 * boxes).round() / 2):
        for crop in (1.0, 1.1, 2.0):
            window = windows(Prompts(boxes=part), (60, 90), crop)
            assert (window[:, :2] <= part[:, :2].clamp(min=0)).all()
            assert (window[:, 2:] >= torch.minimum(part[:, 2:], limit)).all()


def test_a_single_click_shows_the_whole_image() -> None:
    one = Prompts(points=torch.tensor([[[50.0, 60], [10, 10]]]), point_labels=torch.tensor([[1, 0]]))
    none = Prompts(points=torch.tensor([[[50.0, 60]]]), point_labels=torch.tensor([[0]]))
    for prompts in (one, none):
        assert windows(prompts, (100, 200), 2.0).tolist() == [[0, 0, 200, 100]]


def test_a_click_beside_the_window_is_none_and_prompts_inside_are_found() -> None:
    points = torch.tensor([[[50.0, 50], [52, 54], [10, 10]], [[150, 20], [170, 60], [55, 55]]])
    labels = torch.tensor([[1, 1, 0], [1, 1, 0]])
    prompts = Prompts(points=points, point_labels=labels)
    window = windows(prompts, (200, 200), 2.0)[0]
    assert window.tolist() == [35, 36, 67, 68]
    assert inside(prompts, window).tolist() == [0]
    seen = prompts[torch.tensor([0])].seen_in(window)
    assert seen.points is not None
    assert seen.point_labels is not None
    assert seen.points[0, 0].tolist() == [15, 14]
    assert seen.point_labels.tolist() == [[1, 1, -1]]


def test_a_mask_is_put_back_where_its_window_is(sam: Sam) -> None:
    """Seen in a window, the object is segmented as in the window alone, and nothing outside of it."""
    sample = load_domain("clean").split("val")[1]
    prompts = weak_labels(sample.masks, "coarse", sample.key)
    masks, iou = predict(sam, sample.image, prompts, crop=2.0)
    assert iou.shape == (len(prompts),)
    for i, window in enumerate(windows(prompts, (sample.image.shape[1], sample.image.shape[2]), 2.0)):
        alone, _ = predict(sam, cut(sample.image, window), prompts[torch.tensor([i])].seen_in(window))
        assert (cut(masks[i], window) != alone[0]).float().mean() < 1e-3
        assert cut(masks[i], window).sum() == masks[i].sum()


def test_prompts_that_share_a_window_are_answered_as_each_alone_and_few_at_once(
    sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = load_domain("cluttered").split("val")[0]
    boxes = weak_labels(sample.masks[:3], "box", sample.key)
    prompts = Prompts.concatenate([boxes, boxes])
    module = sys.modules["wesam.evaluate"]
    at_once: list[int] = []
    alone = [predict(sam, sample.image, boxes[torch.tensor([i % 3])], crop=2.0) for i in range(6)]

    def counted(sam: Sam, embedding: torch.Tensor, given: list[Prompts]) -> Masks:
        at_once.append(sum(len(g) for g in given))
        return decode(sam, embedding, given)

    monkeypatch.setattr(module, "WINDOWS", 4)
    monkeypatch.setattr(module, "decode", counted)
    masks, iou = predict(sam, sample.image, prompts, crop=2.0)
    assert at_once == [4, 2]
    assert (masks != torch.cat([m for m, _ in alone])).float().mean() < 1e-4
    assert torch.allclose(iou, torch.cat([i for _, i in alone]), atol=1e-5)


def test_windows_help_where_instances_are_small(sam: Sam) -> None:
    split = load_domain("clean").split("test")[:8]
    cropped = evaluate(sam, split, "box", crop=2.0).miou
    assert cropped > evaluate(sam, split, "box").miou
    assert cropped > baseline("ellipse", split).miou + 0.1
