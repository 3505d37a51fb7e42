"""What the embedded model, and the methods at its defaults, are worth on whole test splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from wesam.adapt import adapt, keep_best
from wesam.adapters import AdaptedSam
from wesam.config import method_preset
from wesam.data import load_domain
from wesam.evaluate import baseline, evaluate, measure

pytestmark = pytest.mark.slow
SHIFTED = ("corrupted", "medical", "camouflaged", "cluttered")


def per_image(model: Sam | AdaptedSam, domain: str) -> Tensor:
    """The mean IoU of each test image, [64]."""
    return torch.stack([iou.mean() for iou, _ in measure(model, load_domain(domain).split("test"), "box")])


def gain(sam: Sam, domain: str, method: str, folder: Path) -> tuple[float, float]:
    """What the method's best checkpoint on val adds to Direct's mIoU on test, and this gain's standard error."""
    keep_best(adapt(sam, load_domain(domain), method_preset("nano", method)), folder)
    change = per_image(AdaptedSam.load(sam, folder), domain) - per_image(sam, domain)
    return float(change.mean()), float(change.std()) / len(change) ** 0.5


def test_the_embedded_model_is_far_above_an_ellipse_in_the_box(sam: Sam) -> None:
    test = load_domain("clean").split("test")
    assert evaluate(sam, test, "box").miou >= baseline("ellipse", test).miou + 0.12
    assert evaluate(sam, test, "point").miou >= 0.72


@pytest.mark.parametrize("domain", SHIFTED)
def test_the_shift_of_a_domain_costs_the_unadapted_model_eight_points(sam: Sam, domain: str) -> None:
    assert per_image(sam, domain).mean() <= per_image(sam, "clean").mean() - 0.08


@pytest.mark.parametrize("domain", SHIFTED)
def test_supervised_adaptation_wins_four_points_back(sam: Sam, domain: str, tmp_path: Path) -> None:
    assert gain(sam, domain, "supervised", tmp_path)[0] >= 0.04


@pytest.mark.parametrize("domain", SHIFTED)
def test_weak_labels_win_more_than_chance(sam: Sam, domain: str, tmp_path: Path) -> None:
    mean, error = gain(sam, domain, "wesam", tmp_path)
    assert mean >= 3 * error, f"a gain of {mean:.4f} +- {error:.4f}"
