from __future__ import annotations

import math

import pytest
import torch

from wesam import losses as L


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_focal_by_hand() -> None:
    # one foreground cell at p = 0.9, one background cell at p = 0.2
    logits, target = torch.tensor([[[logit(0.9), logit(0.2)]]]), torch.tensor([[[1.0, 0.0]]])
    expected = (0.8 * 0.1**2 * -math.log(0.9) + 0.2 * 0.2**2 * -math.log(0.8)) / 2
    assert L.focal(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_focal_with_gamma_zero_is_weighted_cross_entropy() -> None:
    logits, target = torch.randn(3, 4, 4), torch.rand(3, 4, 4) > 0.5
    expected = 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    assert torch.allclose(L.focal(logits, target, 0.5, 0.0), expected.mean((1, 2)))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_of_a_mask_that_is_as_sure_as_can_be_has_a_gradient(gamma: float) -> None:
    logits = torch.full((1, 4, 4), 40.0, requires_grad=True)
    L.focal(logits, torch.ones(1, 4, 4), gamma=gamma).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_dice_by_hand() -> None:
    logits, target = torch.tensor([[[logit(0.5), logit(0.25)]]]), torch.tensor([[[True, False]]])
    assert L.dice(logits, target).item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.75 + 1 + 1))


def test_dice_of_a_sure_and_right_mask_is_zero_and_of_a_wrong_one_nearly_one() -> None:
    target = torch.zeros(1, 20, 20)
    target[:, 5:15, 5:15] = 1
    sure = (target * 2 - 1) * 50
    assert L.dice(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert L.dice(-sure, target).item() > 0.99


def test_iou_error_by_hand() -> None:
    logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    target = torch.tensor([[[True, False, True, False]]])  # intersection 1, union 3
    assert L.iou_error(torch.tensor([0.5]), logits, target).item() == pytest.approx((0.5 - 1 / 3) ** 2)
    assert L.iou_error(torch.tensor([0.5]), -torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).item() == pytest.approx(0.25)


def test_pooled_is_the_average_over_the_mask_of_the_prompts_own_image() -> None:
    features = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :] = True  # upper half of image 1
    masks[1, 4:, :4] = True  # lower left quarter of image 0
    out = L.pooled(features, torch.tensor([1, 0]), masks)
    assert torch.allclose(out[0], features[1, :, 0, :].mean(1))
    assert torch.allclose(out[1], features[0, :, 1, 0])


def test_contrastive_by_hand() -> None:
    branch = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    anchor = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    expected = math.log(math.exp(1 / 0.3) + 1) - 1 / 0.3
    assert torch.allclose(L.contrastive(branch, anchor, torch.zeros(2).long(), 0.3), torch.full((2,), expected))


def test_contrastive_ignores_other_images_scale_and_order() -> None:
    branch, anchor, image = torch.randn(5, 8), torch.randn(5, 8), torch.tensor([0, 0, 0, 1, 1])
    whole = L.contrastive(branch, anchor, image)
    assert torch.allclose(whole[:3], L.contrastive(branch[:3], anchor[:3], image[:3]), atol=1e-6)
    assert torch.allclose(whole, L.contrastive(branch * 7, anchor / 3, image), atol=1e-5)
    order = torch.randperm(5)
    assert torch.allclose(whole[order], L.contrastive(branch[order], anchor[order], image[order]), atol=1e-6)


def test_contrastive_with_an_empty_mask_is_zero_for_it_and_unchanged_for_the_others() -> None:
    branch, anchor, image = torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4).long()
    branch[1] = 0
    anchor[3] = 0
    out = L.contrastive(branch.requires_grad_(), anchor, image)
    assert out[1] == 0
    assert out[3] == 0
    # prompt 1 is still nobody's negative by its own branch, but its anchor feature is there
    assert torch.allclose(out[[0, 2]], L.contrastive(branch[[0, 1, 2]], anchor[[0, 1, 2]], image[:3])[[0, 2]])
    out.sum().backward()
    assert branch.grad is not None
    assert branch.grad.isfinite().all()


def test_contrastive_of_a_lone_prompt_is_zero() -> None:
    assert L.contrastive(torch.randn(1, 8), torch.randn(1, 8), torch.zeros(1).long()).item() == pytest.approx(0)


def test_box_masks_cover_the_cells_a_box_touches() -> None:
    box = L.box_masks(torch.tensor([[2.0, 4.0, 7.0, 8.0]]), 6, 2.0)[0]
    assert box.nonzero().tolist() == [[r, c] for r in (2, 3) for c in (1, 2, 3)]


def test_tightness_is_zero_for_any_mask_that_fills_its_box_and_grows_when_it_does_not() -> None:
    box = torch.zeros(1, 12, 12, dtype=torch.bool)
    box[:, 2:10, 3:9] = True
    cross = torch.full((1, 12, 12), -30.0)
    cross[:, 2:10, 5] = 30
    cross[:, 6, 3:9] = 30
    small, outside = cross.clone(), cross.clone()
    small[:, 2:5] = -30
    outside[:, 6, 9:] = 30
    assert L.tightness(cross, box).item() == pytest.approx(0, abs=1e-5)
    assert L.tightness(small, box).item() > 0.02
    assert L.tightness(outside, box).item() > 0.02


@pytest.mark.parametrize("loss", [L.focal, L.dice])
def test_mirrored_masks_have_the_same_loss(loss) -> None:  # type: ignore[no-untyped-def]
    logits, target = torch.randn(3, 8, 8), torch.rand(3, 8, 8) > 0.6
    assert torch.allclose(loss(logits, target), loss(logits.flip(2), target.flip(2)), atol=1e-6)
    assert torch.allclose(loss(logits, target)[1:], loss(logits[1:], target[1:]))
