from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from wesam.data import SPLITS, domain_names, load_domain
from wesam.data.scenes import STYLES, scene
from wesam.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_every_procedural_domain_has_disjoint_splits_of_real_instances() -> None:
    assert set(domain_names()) == set(STYLES)
    for name in domain_names():
        domain = load_domain(name)
        seen = set()
        for split in SPLITS:
            for sample in domain.split(split)[:4]:
                assert sample.image.shape == (3, 192, 192)
                assert sample.masks.dtype == torch.bool
                assert sample.masks.flatten(1).sum(1).min() >= STYLES[name].smallest
                seen.add(sample.image.numpy().tobytes())
        assert len(seen) == 12


def test_scenes_come_from_their_seed_alone() -> None:
    one, two = (scene(np.random.default_rng(5), 100, 140) for _ in range(2))
    assert one[0].shape == (100, 140, 3)
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])


def test_visible_masks_of_a_scene_do_not_overlap() -> None:
    for i in range(5):
        _, masks = scene(np.random.default_rng(i), style=STYLES["cluttered"])
        assert masks.sum(0).max() == 1


def test_splits_are_sequences() -> None:
    val = load_domain("clean").split("val")
    assert len(list(val[:3])) == 3
    assert val[-1].key == val[len(val) - 1].key
    with pytest.raises(IndexError):
        val[len(val)]


def test_coco_reads_every_kind_of_segmentation_and_skips_crowds(coco_folder: Path) -> None:
    domain = load_domain(str(coco_folder))
    assert domain.name == "shapes"
    assert [len(domain.split(s)) for s in SPLITS] == [3, 2, 2]
    sample = domain.split("train")[2]
    assert sample.image.shape == (3, 60, 110)
    assert sample.masks.shape == (2, 60, 110)
    square = sample.masks[1].nonzero()
    assert square.min(0).values.tolist() == [10, 55]
    assert square.max(0).values.tolist() == [39, 79]
    assert domain.split("train")[2] is sample  # read once


def test_uncompressed_rle_is_read(coco_folder: Path) -> None:
    listing = json.loads((coco_folder / "val.json").read_text())
    runs = [0, 60, 60 * 90 - 60]  # the first column
    listing["annotations"] = [
        {"id": 1, "image_id": 0, "iscrowd": 0, "segmentation": {"size": [60, 90], "counts": runs}}
    ]
    (coco_folder / "val.json").write_text(json.dumps(listing))
    masks = load_domain(str(coco_folder)).split("val")[0].masks
    assert masks[0, :, 0].all()
    assert masks.sum() == 60


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def apply(folder: Path) -> None:
        listing = json.loads((folder / "test.json").read_text())
        change(listing)
        (folder / "test.json").write_text(json.dumps(listing))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val.json").unlink(), r"no val\.json in .*shapes"),
        (lambda f: (f / "val.json").write_text("{"), r"val\.json is not JSON"),
        (lambda f: (f / "val.json").write_text("[]"), r"val\.json is not in COCO instances format"),
        (lambda f: shutil.rmtree(f / "images"), r"names an image that is not there: images/train-0\.png"),
        (
            rewrite(lambda d: d["images"][0].pop("height")),
            r"test\.json is not in COCO instances format: KeyError 'height'",
        ),
        (rewrite(lambda d: d["annotations"].clear()), r"test\.json has no image with an instance"),
        (rewrite(lambda d: d["images"][0].update(height=61)), r"90 x 60 pixels, test\.json says 90 x 61"),
        (
            rewrite(lambda d: d["annotations"][0].update(segmentation={"size": [60, 90]})),
            "annotation 0 has an unreadable",
        ),
        (lambda f: (f / "images" / "test-0.png").write_bytes(b"no image"), r"cannot read the image .*test-0\.png"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(
    coco_folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(coco_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_domain(str(coco_folder)).split("test")[0]
    assert "\n" not in str(caught.value)


def test_unknown_domains_get_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'camouflaged'"):
        load_domain("camouflage")
    with pytest.raises(InputError, match="no such folder: no/such/place"):
        load_domain("no/such/place")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the two real domains are not here")
@pytest.mark.parametrize(("name", "counts"), [("nuclei", (160, 40, 100)), ("natural", (150, 50, 100))])
def test_real_domains_are_read(name: str, counts: tuple[int, int, int]) -> None:
    domain = load_domain(str(SHARED / name))
    assert tuple(len(domain.split(s)) for s in SPLITS) == counts
    sample = domain.split("val")[0]
    assert sample.masks.flatten(1).any(1).all()
