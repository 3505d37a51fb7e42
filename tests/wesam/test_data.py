from __future__ import annotations

import json
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from wesam.data import SPLITS, Domain, Sample, domain_names, load_domain
from wesam.data.published import PUBLISHED
from wesam.data.scenes import STYLES, scene
from wesam.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_every_procedural_domain_has_disjoint_splits_of_real_instances() -> None:
    assert set(domain_names()) == {*STYLES, *PUBLISHED}
    for name in STYLES:
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


def test_the_instances_that_val_is_scored_with_lie_evenly_in_its_list(camouflaged: Domain) -> None:
    sample = Sample("x", torch.zeros(3, 4, 10), torch.eye(10, dtype=torch.bool)[:, None].expand(-1, 4, -1))
    assert sample.only(4).masks[:, 0].nonzero()[:, 1].tolist() == [0, 2, 5, 7]
    assert torch.equal(sample.only(4).weak_labels("point").points, sample.weak_labels("point").points[[0, 2, 5, 7]])
    given = Sample("x", sample.image, {"box": sample.weak_labels("box"), "point": sample.weak_labels("point")})
    assert torch.equal(given.only(4).weak_labels("box").boxes, sample.only(4).weak_labels("box").boxes)
    unlabelled = Sample("x", sample.image, {})
    assert (sample.only(0), sample.only(10), unlabelled.only(4)) == (sample, sample, unlabelled)
    assert [len(s) for s in camouflaged.scored("val", 1)] == [1] * len(camouflaged.split("val"))


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


def image(**changes: object) -> Callable[[Path], None]:
    return rewrite(lambda d: d["images"][0].update(changes))


def annotation(**changes: object) -> Callable[[Path], None]:
    return rewrite(lambda d: d["annotations"][0].update(changes))


def picture(save: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda f: save(f / "images" / "test-0.png") and None


def too_large(file: Path) -> None:
    """The header of a PNG of 30,000 x 30,000 px, and little else."""
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        file.write_bytes(file.read_bytes() + struct.pack(">I", len(data)) + name + data + checksum)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val.json").unlink(), r"no val\.json in .*shapes"),
        (lambda f: (f / "val.json").write_text("{"), r"val\.json is not JSON: .* in line 1, column 2"),
        (lambda f: (f / "val.json").write_bytes(b"\xff\xfe{"), r"val\.json is not JSON"),
        (lambda f: (f / "val.json").write_text("[]"), r"val\.json is not in COCO instances format"),
        (lambda f: (f / "val.json").write_text('{"images": 3}'), r"it has no list of images"),
        (
            lambda f: shutil.rmtree(f / "images"),
            r"3 of 3 images of .*train\.json are missing, such as images/train-0\.png; looked in .*shapes, .*/images",
        ),
        (rewrite(lambda d: d["images"][0].pop("height")), r"test\.json: image 0 of the list: it has no height"),
        (rewrite(lambda d: d["images"].insert(0, 7)), r"image 0 of the list: it is no object"),
        (rewrite(lambda d: d["images"].append(d["images"][0])), r"image 2 of the list: its id 0 is that of another"),
        (image(height=float("nan")), r"its size is 90 x nan"),
        (image(width=-90), r"its size is -90 x 60"),
        (image(id=[1]), r"its id is \[1\]"),
        (image(file_name=None), r"its file_name is None"),
        (image(file_name="../shapes/images/test-0.png"), r"leads out of the folder: refused"),
        (image(file_name="/etc/passwd"), r"leads out of the folder: refused"),
        (image(file_name="C:\\test.png"), r"leads out of the folder: refused"),
        (rewrite(lambda d: d["annotations"].clear()), r"test\.json has no image with an instance$"),
        (
            rewrite(lambda d: [a.update(image_id=str(a["image_id"])) for a in d["annotations"]]),
            r"test\.json has no image with an instance; left out: .*annotation 0.*, and \d+ more",
        ),
        (image(height=61), r"test-0\.png is not of 90 x 61 pixels, as its labels are"),
        (picture(lambda f: f.write_bytes(b"no image")), r"cannot read the image .*test-0\.png"),
        (picture(lambda f: f.write_bytes(f.read_bytes()[:300])), r"cannot read the image .*test-0\.png"),
        (picture(lambda f: Image.new("I;16", (90, 60)).save(f)), r"more than 8 bits a channel"),
        (picture(too_large), r"test-0\.png has .*more than 150 million"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(
    coco_folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(coco_folder)
    with pytest.raises(InputError, match=message) as caught:
        load_domain(str(coco_folder)).split("test")[0]
    assert len(str(caught.value).splitlines()) == (3 if "train-0" in message else 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (annotation(segmentation={"size": [60, 90]}), "counts that are none"),
        (
            annotation(segmentation={"size": [90, 60], "counts": [0, 5400]}),
            r"of size \[90, 60\], its image of \[60, 90\]",
        ),
        (annotation(segmentation={"size": [60, 90], "counts": [0, 5401]}), "counts 5401 pixels, its image has 5400"),
        (annotation(segmentation={"size": [60, 90], "counts": [-5, 5405]}), "counts that are none"),
        (annotation(segmentation={"size": [60, 90], "counts": "PPPPPP"}), "RLE"),
        (annotation(segmentation={"size": [60, 90], "counts": "o"}), "ends within a count"),
        (annotation(segmentation={"size": [60, 90], "counts": [5400]}), "it is empty"),
        (annotation(segmentation=[[1, 1, 20, 20]]), "has 2 points"),
        (annotation(segmentation=[[1, 1, 20, 20, float("nan"), 3]]), "no list of coordinates"),
        (annotation(segmentation=[[1, 1, 20, 20, 10**400, 3]]), "no list of coordinates"),
        (annotation(segmentation=[[1, 1, 20, 20, 1e12, 3]]), "far beyond the image"),
        (annotation(segmentation=[[-30, -30, -20, -30, -20, -20]]), "it is empty"),
        (annotation(segmentation=None), "it has no segmentation"),
        (annotation(image_id=99), "of image 99, which is not listed"),
        (annotation(image_id=None), "of image None, which is not listed"),
        (annotation(id=1), "its id is that of another"),
        (rewrite(lambda d: d["annotations"].append("x")), "annotation 6 of the list: it is no object"),
    ],
)
def test_wrong_annotations_are_left_out_and_listed(
    coco_folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(coco_folder)
    domain = load_domain(str(coco_folder))
    (line,) = domain.left_out
    assert re.search(message, line)
    assert "test.json: annotation" in line
    samples = list(domain.split("test"))
    assert sum(len(s.masks) for s in samples) == (4 if "no object" in message else 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_images_of_any_mode_become_rgb(coco_folder: Path, mode: str) -> None:
    file = coco_folder / "images" / "test-0.png"
    seen = Image.open(file).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    seen.save(file, kind)
    sample = load_domain(str(coco_folder)).split("test")[0]
    assert sample.image.shape == (3, 60, 90)
    expected = np.asarray(seen.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert np.abs(sample.image.numpy().astype(int) - expected).mean() < 5


@pytest.mark.parametrize(("labelled", "turned"), [((60, 90), True), ((90, 60), False)])
def test_images_are_turned_as_their_labels_were(coco_folder: Path, labelled: tuple[int, int], turned: bool) -> None:
    """A camera held upright stores the image lying, with a note; labels may be of either."""
    file = coco_folder / "images" / "test-0.png"
    seen = Image.open(file).copy()
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6  # turn clockwise to see it
    seen.transpose(Image.Transpose.ROTATE_90).save(file, exif=note)
    image(height=labelled[0], width=labelled[1])(coco_folder)
    square = [10, 10, 40, 10, 40, 40, 10, 40]
    rewrite(lambda d: d.update(annotations=[{"id": n, "image_id": n, "segmentation": [square]} for n in (0, 1)]))(
        coco_folder
    )
    sample = load_domain(str(coco_folder)).split("test")[0]
    assert sample.image.shape[1:] == labelled
    assert (sample.image.permute(1, 2, 0).numpy() == np.asarray(seen)).all() == turned if turned else True


def test_a_thousand_random_damages_give_a_report_or_a_refusal(coco_folder: Path) -> None:
    rng = random.Random(0)
    files = sorted(f for f in coco_folder.rglob("*") if f.is_file())
    texts = {f: f.read_bytes() for f in files}
    values: list[object] = [None, -1, 0, 1e30, float("nan"), "x", "", [], {}, [[1]], True, 2**70, "../../x"]
    outcomes: Counter[str] = Counter()
    for turn in range(1000):
        file = rng.choice(files if turn % 4 == 0 else [f for f in files if f.suffix == ".json"])
        if file.suffix == ".json" and turn % 2:
            damaged = json.dumps(_spoiled(rng, json.loads(texts[file]), values)).encode()
        else:
            raw = bytearray(texts[file])
            for _ in range(rng.randint(1, 4)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            damaged = bytes(raw[: rng.randint(0, len(raw))] if rng.random() < 0.3 else raw)
        file.write_bytes(damaged)
        load_domain.cache_clear()
        try:
            domain = load_domain(str(coco_folder))
            for split in SPLITS:
                for sample in domain.split(split):
                    assert sample.masks.flatten(1).any(1).all()
            outcomes["left out" if domain.left_out else "fine"] += 1
        except InputError:
            outcomes["refused"] += 1
        file.write_bytes(texts[file])
    assert min(outcomes[k] for k in ("left out", "fine", "refused")) > 50, outcomes


def _spoiled(rng: random.Random, tree: Any, values: list[object]) -> Any:
    """The tree with one place in it, at any depth, given another value, taken away or doubled."""
    here = tree
    while True:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        inner = here[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            break
        here = inner
    what = rng.random()
    if what < 0.2:
        del here[key]
    elif what < 0.3 and isinstance(here, list):
        here.append(here[key])
    else:
        here[key] = rng.choice(values)
    return tree


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
