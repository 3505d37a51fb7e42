from __future__ import annotations

import torch

from wesam.data import load_domain
from wesam.views import flip, strong

IMAGE = load_domain("clean").split("val")[0].image


def view(seed: int, strength: float) -> torch.Tensor:
    return strong(IMAGE, strength, torch.Generator().manual_seed(seed))


def test_strong_views_are_seeded_varied_and_keep_the_form() -> None:
    assert torch.equal(view(1, 1.0), view(1, 1.0))
    views = [view(i, 1.0) for i in range(8)]
    assert all(v.shape == IMAGE.shape and v.dtype == torch.uint8 for v in views)
    assert sum(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i]) <= 1


def test_strength_zero_changes_nothing_and_more_changes_more() -> None:
    assert torch.equal(view(0, 0.0), IMAGE)

    def change(strength: float) -> float:
        return sum((view(i, strength).float() - IMAGE.float()).abs().mean().item() for i in range(24))

    assert 0 < change(0.3) < change(1.0) < change(2.0)


def test_geometry_stays() -> None:
    """A bright square stays where it is: a change of colours moves no border."""
    image = torch.full((3, 64, 64), 60, dtype=torch.uint8)
    image[:, 20:40, 10:30] = 180
    for i in range(12):
        out = strong(image, 0.5, torch.Generator().manual_seed(i)).float().mean(0)
        inside = out[22:38, 12:28].mean()
        beside = torch.cat([out[22:38, 32:48].flatten(), out[42:58, 12:28].flatten()]).mean()
        assert (inside - beside).abs() > 15


def test_flips_are_their_own_inverse() -> None:
    for flips in ((True, False), (False, True), (True, True)):
        assert not torch.equal(flip(IMAGE, *flips), IMAGE)
        assert torch.equal(flip(flip(IMAGE, *flips), *flips), IMAGE)
    assert flip(IMAGE, False, False) is IMAGE


def test_an_image_on_a_device_stays_there() -> None:
    """Each change runs where the image is: one with a tensor of the CPU in it would be refused."""
    image = torch.empty(3, 64, 64, dtype=torch.uint8, device="meta")
    assert {strong(image, 1.0, torch.Generator().manual_seed(i)).device.type for i in range(24)} == {"meta"}
