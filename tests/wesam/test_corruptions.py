from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tuning.plan import make_plan
from wesam.data import load_domain, parted
from wesam.data.corruptions import CORRUPTIONS, corrupt
from wesam.errors import InputError
from wesam.prompts import weak_labels


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return load_domain("clean").split("test")[0].image[:, :150, :] // 2


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_changes_more_the_more_severe_it_is(picture: Tensor, name: str) -> None:
    found = [corrupt(picture, name, s, "key") for s in range(1, 6)]
    for image in found:
        assert image.shape == picture.shape
        assert image.dtype == torch.uint8
    moved = [(f.float() - picture.float()).abs().mean().item() for f in found]
    assert moved[0] > 1
    assert moved[4] > moved[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_the_key_alone_and_leaves_the_image(picture: Tensor, name: str) -> None:
    before = picture.clone()
    one, two, other = (corrupt(picture, name, 3, k) for k in ("a", "a", "b"))
    assert torch.equal(one, two)
    assert torch.equal(picture, before)
    chance = name not in {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert torch.equal(one, other) != chance


MEANS = {
    "gaussian_noise": 128.1,
    "shot_noise": 124.9,
    "impulse_noise": 128.8,
    "defocus_blur": 128.4,
    "glass_blur": 128.6,
    "motion_blur": 129.4,
    "zoom_blur": 127.8,
    "snow": 192.5,
    "frost": 203.6,
    "fog": 147.9,
    "brightness": 169.9,
    "contrast": 128.0,
    "elastic_transform": 127.8,
    "pixelate": 129.0,
    "jpeg_compression": 128.8,
}
DIGESTS = {"impulse_noise": "9d88790c8e22", "pixelate": "ff8d7d08919c", "jpeg_compression": "72869716ef3e"}


def test_pixels_are_the_same_on_every_machine() -> None:
    """What the corruptions made of one image when this was written."""
    grid = np.mgrid[:96, :128].sum(0)
    picture = torch.from_numpy(np.stack([grid % 256, (3 * grid) % 256, 255 - grid % 200])).to(torch.uint8)
    found = {n: corrupt(picture, n, 3, "key").int() for n in CORRUPTIONS}
    assert {n: float(v.double().mean()) for n, v in found.items()} == pytest.approx(MEANS, abs=0.06)
    exact = {n: hashlib.sha256(found[n].to(torch.uint8).numpy().tobytes()).hexdigest()[:12] for n in DIGESTS}
    assert exact == DIGESTS


def test_a_corrupted_domain_keeps_its_masks_and_weak_labels() -> None:
    clean, foggy = load_domain("clean"), load_domain("clean+fog:2")
    assert foggy.name == "clean+fog2"
    assert load_domain("clean+fog2").digest == foggy.digest
    assert len({clean.digest, foggy.digest, load_domain("clean+fog:3").digest, load_domain("clean+snow:2").digest}) == 4
    a, b = clean.split("val")[1], foggy.split("val")[1]
    assert torch.equal(a.masks, b.masks)
    assert not torch.equal(a.image, b.image)
    one, two = (weak_labels(s.masks, "point", s.key).points for s in (a, b))
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)


def test_all_gives_each_image_one_of_the_fifteen() -> None:
    clean, mixed = load_domain("clean").split("val"), load_domain("clean+all").split("val")
    used = {
        n for i in range(len(clean)) for n in CORRUPTIONS
        if torch.equal(mixed[i].image, corrupt(clean[i].image, n, 5, clean[i].key))
    }  # fmt: skip
    assert len(used) > 7


def test_a_folder_can_be_corrupted_and_searched(coco_folder: Path, tmp_path: Path) -> None:
    given = f"{coco_folder}+contrast"
    assert load_domain(given).name == "shapes+contrast5"
    assert make_plan({"domains": [given], "storage": str(tmp_path)}, []).domains == (given,)
    plus = coco_folder.rename(coco_folder.parent / "a+b")
    assert parted(str(plus)) == (str(plus), "")
    assert load_domain(f"{plus}+snow:1").name == "a+b+snow1"


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (30, 3)])
def test_small_images_are_corrupted_too(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 100, dtype=torch.uint8)
    for name in CORRUPTIONS:
        for severity in (1, 5):
            assert corrupt(image, name, severity, "key").shape == image.shape


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("c++/cells@80/10/10", ("c++/cells@80/10/10", "")),
        ("c++/cells@80/10/10@3+fog:1", ("c++/cells@80/10/10@3", "fog:1")),
        ("c++/cells+frosty", ("c++/cells", "frosty")),
        ("c++/cells/", ("c++/cells/", "")),
        ("a+b@60/20/20", ("a+b@60/20/20", "")),
        ("s3://bucket/a+b", ("s3://bucket/a+b", "")),
        ("s3://bucket/a+b+fog", ("s3://bucket/a+b", "fog")),
        ("s3://bucket/a+b/c+all:2", ("s3://bucket/a+b/c", "all:2")),
        ("coco+frosty", ("coco", "frosty")),
    ],
)
def test_a_plus_may_be_part_of_a_name(
    name: str, parts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++/cells").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parted(name) == parts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clean+frosty", "unknown corruption 'frosty': did you mean 'frost'"),
        ("clean+fog:6", "the severity of fog is 1 to 5, got 6"),
        ("clean+", "unknown domain 'clean\\+'"),
        ("clear+fog", "unknown domain 'clear'"),
    ],
)
def test_wrong_corruptions_are_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_domain(name)
