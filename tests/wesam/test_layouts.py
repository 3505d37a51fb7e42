"""Every layout in its published form, tiny and made on the spot."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from wesam.cli import main
from wesam.config import Config
from wesam.data import SPLITS, Domain, Split, load_domain, located
from wesam.data.files import Folder
from wesam.data.folders import Cut, parse_cut
from wesam.data.images import read_image, read_labels
from wesam.data.published import PUBLISHED
from wesam.errors import InputError
from wesam.options import spare_domain

H, W = 40, 60


pytestmark = pytest.mark.usefixtures("fresh_domains", "few")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO and VOC have as many files as those made here."""
    for name, count in (("coco", 15), ("voc", 14)):
        files = (PUBLISHED[name].files[0], count)
        monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], files=files))


def photo(file: Path, size: tuple[int, int] = (H, W)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(file.stem.encode(), "big") % 2**32
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(file)


def labels(file: Path, *values: int, kind: type = np.uint8, mode: str = "") -> None:
    """A label image with a block of six columns for each value, beginning at columns 4, 14, 24, ..."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((H, W), kind)
    for n, value in enumerate(values):
        pixels[5:25, 4 + 10 * n : 10 + 10 * n] = value
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([v for n in range(256) for v in (n * 37 % 256, n * 91 % 256, n)])
        assert image.mode == "P"
    image.save(file, **({"quality": 95} if file.suffix == ".jpg" else {}))


def columns(domain: Domain, split: str, index: int) -> list[tuple[int, int]]:
    """First and last column of each instance."""
    return [(int(c[0]), int(c[-1])) for m in domain.split(split)[index].masks if len(c := m.any(0).nonzero()[:, 0])]


BLOCKS = [(4, 9), (14, 19), (24, 29)]


def voc(root: Path) -> None:
    for n in range(14):
        photo(root / f"VOCdevkit/VOC2012/JPEGImages/2007_{n:06}.jpg")
        labels(root / f"VOCdevkit/VOC2012/SegmentationObject/2007_{n:06}.png", 1, 2, 255, mode="P")
    photo(root / "VOCdevkit/VOC2012/JPEGImages/2008_000001.jpg")  # most have no segmentation


def kvasir(root: Path) -> None:
    boxes = {}
    for n in range(12):
        photo(root / f"Kvasir-SEG/images/cju{n}.jpg")
        labels(root / f"Kvasir-SEG/masks/cju{n}.jpg", 255, 255)
        boxes[f"cju{n}"] = {
            "height": H,
            "width": W,
            "bbox": [
                {"label": "polyp", "xmin": x, "ymin": 5, "xmax": x + 6, "ymax": 25} for x in (4, 14)
            ],
        }  # fmt: skip
    (root / "Kvasir-SEG/kavsir_bboxes.json").write_text(json.dumps(boxes))


def isic(root: Path) -> None:
    for part, count in (("Training", 10), ("Test", 4)):
        for n in range(count):
            photo(root / f"ISBI2016_ISIC_Part1_{part}_Data/ISIC_{n:07}.jpg")
            labels(root / f"ISBI2016_ISIC_Part1_{part}_GroundTruth/ISIC_{n:07}_Segmentation.png", 255)


def camo(root: Path) -> None:
    top = root / "CAMO-V.1.0-CVIU2019"
    for part, start, count in (("Train", 1, 10), ("Test", 50, 4)):
        for n in range(start, start + count):
            photo(top / f"Images/{part}/camourflage_{n:05}.jpg")
            labels(top / f"GT/camourflage_{n:05}.png", 255)
    photo(top / "Images/Test/camourflage_00099.jpg", (H, W + 2))  # of another size than its labels, as some are
    labels(top / "GT/camourflage_00099.png", 255)


def cod10k(root: Path) -> None:
    for n in range(10):
        name = f"COD10K-CAM-1-Aquatic-{n}-Crab-{n}"
        photo(root / f"COD10K-v3/Test/Image/{name}.jpg")
        labels(root / f"COD10K-v3/Test/GT_Object/{name}.png", 255)
    photo(root / "COD10K-v3/Test/Image/COD10K-NonCAM-5-Other-1-Other-1.jpg")
    labels(root / "COD10K-v3/Test/GT_Object/COD10K-NonCAM-5-Other-1-Other-1.png")


def chameleon(root: Path) -> None:
    for n in range(14):
        photo(root / f"CHAMELEON/Imgs/animal-{n}.jpg")
        labels(root / f"CHAMELEON/GT/animal-{n}.png", 255)


def ocid(root: Path) -> None:
    for n in range(7):
        for place, values in (("table/top", (1, 2, 3, 4)), ("floor/bottom", (1, 2, 3))):
            base = root / f"OCID-dataset/ARID20/{place}/seq01"
            photo(base / f"rgb/result_2018-08-20-{n}.png")
            labels(base / f"label/result_2018-08-20-{n}.png", *values, kind=np.uint16)


def osd(root: Path) -> None:
    for n in range(14):
        photo(root / f"OSD-0.2-depth/image_color/learn{n}.png")
        labels(root / f"OSD-0.2-depth/annotation/learn{n}.png", 1, 2, 3)


def coco(root: Path) -> None:
    images, annotations = [], []
    for n in reversed(range(15)):  # not in the order of their ids
        photo(root / f"val2017/{n:012}.jpg")
        images.append({"id": n, "file_name": f"{n:012}.jpg", "height": H, "width": W})
        if n != 3:  # some have no annotation
            square = [4, 5, 10, 5, 10, 25, 4, 25]
            annotations.append({"id": n, "image_id": n, "iscrowd": 0, "segmentation": [square], "bbox": [4, 5, 6, 20]})
    (root / "annotations").mkdir()
    listing = {"images": images, "annotations": annotations, "categories": []}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(listing))
    (root / "annotations/captions_val2017.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "counts", "first", "tested"),
    [
        (coco, (11, 1, 2), BLOCKS[:1], ("000000000006.jpg", "000000000013.jpg")),
        (voc, (11, 1, 2), BLOCKS[:2], ("2007_000006.jpg", "2007_000013.jpg")),
        (kvasir, (9, 1, 2), BLOCKS[:2], ("cju5.jpg", "cju11.jpg")),
        (isic, (9, 1, 4), BLOCKS[:1], ("ISIC_0000000.jpg", "ISIC_0000003.jpg")),
        (camo, (9, 1, 4), BLOCKS[:1], ("camourflage_00050.jpg", "camourflage_00053.jpg")),
        (cod10k, (7, 1, 2), BLOCKS[:1], ("COD10K-CAM-1-Aquatic-4-Crab-4.jpg", "COD10K-CAM-1-Aquatic-9-Crab-9.jpg")),
        (chameleon, (11, 1, 2), BLOCKS[:1], ("animal-2.jpg", "animal-9.jpg")),
        (ocid, (11, 1, 2), [(14, 19), (24, 29)], ("result_2018-08-20-6.png", "result_2018-08-20-6.png")),
        (osd, (11, 1, 2), [(14, 19), (24, 29)], ("learn2.png", "learn9.png")),
    ],
)  # fmt: skip
def test_published_data_sets_are_read_as_they_are_unpacked(
    make: Callable[[Path], None],
    counts: tuple[int, int, int],
    first: list[tuple[int, int]],
    tested: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path)
    name = make.__name__
    with pytest.raises(InputError, match=f"{name} is a published data set: --data ROOT"):
        load_domain(name)
    monkeypatch.setenv("WESAM_DATA", str(tmp_path))
    domain = load_domain(name)
    assert domain.name == name
    assert domain.published
    assert not load_domain(f"{name}+fog:2").published
    assert PUBLISHED[name].terms in domain.note
    assert tuple(len(domain.split(s)) for s in SPLITS) == counts
    assert columns(domain, "train", 0) == first
    keys = {s: [x.key for x in domain.split(s)] for s in SPLITS}
    assert len({k for part in keys.values() for k in part}) == sum(counts), "no image is in two splits"
    assert tuple(keys["test"][i].rpartition("/")[2] for i in (0, -1)) == tested
    assert len(domain.left_out) == (make is camo)
    again = load_domain(located(name, str(tmp_path)))  # by its folder
    assert again.name == name
    assert again.digest == domain.digest
    assert load_domain(f"{name}+fog:2").name == f"{name}+fog2"


def test_the_readme_says_where_each_is_got_and_on_what_terms() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for data_set in PUBLISHED.values():
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{data_set.name}` |")]
        assert all(text in row for text in (data_set.title, data_set.url, data_set.layout, data_set.terms))


def test_a_table_of_ocid_is_no_object(tmp_path: Path) -> None:
    ocid(tmp_path)
    domain = load_domain(str(tmp_path / "OCID-dataset"))
    on_tables = [(s, i) for s in SPLITS for i, x in enumerate(domain.split(s)) if "table" in x.key]
    assert len(on_tables) == 7
    assert {tuple(columns(domain, s, i)) for s, i in on_tables} == {((24, 29), (34, 39))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_data_set_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"no {re.escape(PUBLISHED[name].title)} in .* is looked for there; got at http"
    ):
        located(name, str(tmp_path))


def maps(root: Path) -> None:
    for n in range(10):
        photo(root / f"images/a/{n}.jpg")
        labels(root / f"labels/a/{n}.png", 7, 300, 41, kind=np.uint16)
    photo(root / "images/a/unlabelled.jpg")


def colours(root: Path) -> None:
    for n in range(10):
        photo(root / f"images/{n}.jpg")
        pixels = np.zeros((H, W, 3), np.uint8)
        for i, colour in enumerate(((255, 0, 0), (0, 0, 255), (0, 255, 0))):
            pixels[5:25, 4 + 10 * i : 10 + 10 * i] = colour
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"masks/{n}.png")


def files(root: Path) -> None:
    """A file for each instance, named after its image; those of the image ``1_x`` are not the image ``1``'s."""
    for name in (*map(str, range(9)), "1_x"):
        photo(root / f"images/{name}.jpg")
        for i in range(3):
            labels(root / f"masks/{name}_{i}.png", *([0] * i + [255]))


def folders(root: Path) -> None:
    for n in range(10):
        photo(root / f"images/{n}.jpg")
        for i in range(3):
            labels(root / f"masks/{n}/nucleus{i}.png", *([0] * i + [1]))


def bowl(root: Path) -> None:
    """As the nuclei of the 2018 Data Science Bowl come: a folder for each image."""
    for n in range(10):
        photo(root / f"{n}f/images/{n}f.png")
        for i in range(3):
            labels(root / f"{n}f/masks/{n * 10 + i}.png", *([0] * i + [255]))


@pytest.mark.parametrize("make", [maps, colours, files, folders, bowl])
def test_images_with_label_images(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "cells")
    domain = load_domain(str(tmp_path / "cells"))
    assert domain.name == "cells"
    assert [len(domain.split(s)) for s in SPLITS] == [7, 1, 2]
    for split in SPLITS:
        for i in range(len(domain.split(split))):
            assert sorted(columns(domain, split, i)) == BLOCKS
    assert "cut at random by seed 0" in domain.note


@pytest.mark.parametrize("parts", [SPLITS, ("train", "val")])
def test_own_data_laid_out_as_coco_are_no_published_set(tmp_path: Path, parts: tuple[str, ...]) -> None:
    listings(tmp_path / "cells", "annotations/instances_{}2017.json", "{}2017", parts)
    with pytest.raises(InputError, match=r"no COCO 2017 val in .* \(5000\) is looked for there"):
        located("coco", str(tmp_path))
    if parts == SPLITS:
        domain = load_domain(str(tmp_path / "cells"))
        assert (domain.name, domain.published) == ("cells", False)
        assert [s.key for s in domain.split("train")] == [f"cells/train/train2017/{n}.png" for n in range(3)]
    else:
        with pytest.raises(InputError, match=r"no annotations/instances_test2017\.json in .*: a domain has"):
            load_domain(str(tmp_path / "cells"))


@pytest.mark.parametrize("coloured", [False, True])
def test_own_data_laid_out_as_voc_are_no_published_set(tmp_path: Path, coloured: bool) -> None:
    for n in range(10):
        photo(tmp_path / f"cells/JPEGImages/{n}.jpg")
        labels(tmp_path / f"cells/SegmentationObject/{n}.png", 1, 2, 255, mode="P")
        if coloured:
            pixels = np.zeros((H, W, 3), np.uint8)
            pixels[5:25, 4:10] = (128, 0, 0)
            pixels[5:25, 14:20] = (0, 0, 255)
            Image.fromarray(pixels).save(tmp_path / f"cells/SegmentationObject/{n}.png")
    domain = load_domain(str(tmp_path / "cells"))
    assert (domain.name, domain.published) == ("cells", False)
    assert [len(domain.split(s)) for s in SPLITS] == [7, 1, 2]
    assert sorted(columns(domain, "train", 0)) == BLOCKS[:2]


def test_folders_of_splits_are_kept(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 5)):
        for n in range(count):
            photo(tmp_path / f"{part}/images/{part}{n}.jpg")
            labels(tmp_path / f"{part}/labels/{part}{n}.png", 1)
    domain = load_domain(str(tmp_path))
    assert [len(domain.split(s)) for s in SPLITS] == [18, 2, 5], "val is cut from train"
    assert all("/test/" in s.key for s in domain.split("test"))
    with pytest.raises(InputError, match="has splits of its own"):
        load_domain(f"{tmp_path}@50/25/25")
    shutil.rmtree(tmp_path / "test")
    load_domain.cache_clear()
    with pytest.raises(InputError, match="has images of train: folders of train and test"):
        load_domain(str(tmp_path))


def single(folder: Path, count: int = 10) -> None:
    images, annotations = [], []
    for n in range(count):
        photo(folder / f"images/{n}.png")
        images.append({"id": n, "file_name": f"{n}.png", "height": H, "width": W})
        square = [4, 5, 10, 5, 10, 25, 4, 25]
        annotations.append({"id": n, "image_id": n, "segmentation": [square]})
    listing = {"images": images, "annotations": annotations, "categories": []}
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_default.json").write_text(json.dumps(listing))


def listings(folder: Path, listing: str, images: str, parts: tuple[str, ...] = SPLITS) -> None:
    """Three images for each part, ``{}`` in the names being the part; all parts have files of the same names."""
    for part in parts:
        single(whole := folder / f"whole-{part}", 3)
        shutil.copytree(whole / "images", folder / images.format(part), dirs_exist_ok=True)
        (folder / listing.format(part)).parent.mkdir(exist_ok=True)
        shutil.move(whole / "annotations/instances_default.json", folder / listing.format(part))
        shutil.rmtree(whole)


@pytest.mark.parametrize("images", ["", "images", "{}", "images/{}"])
@pytest.mark.parametrize("listing", ["{}.json", "annotations/instances_{}.json", "annotations/{}.json"])
def test_a_listing_for_each_split_and_its_images_where_they_usually_are(
    tmp_path: Path, listing: str, images: str
) -> None:
    listings(tmp_path / "cells", listing, images)
    domain = load_domain(str(tmp_path / "cells"))
    assert domain.name == "cells"
    for split in SPLITS:
        place = f"{images.format(split)}/" if images else ""
        assert [s.key for s in domain.split(split)] == [f"cells/{split}/{place}{n}.png" for n in range(3)]
    with pytest.raises(InputError, match="has splits of its own"):
        load_domain(f"{tmp_path}/cells@70/10/20")
    file = tmp_path / "cells" / listing.format("train")
    assert [len(load_domain(str(file)).split(s)) for s in SPLITS] == [1, 1, 1]
    file.with_name(listing.format("test").rpartition("/")[2]).unlink()
    load_domain.cache_clear()
    with pytest.raises(InputError, match=rf"no {listing.format('test')} in .*cells: a domain has .*cut at random"):
        load_domain(str(tmp_path / "cells"))


def test_a_listing_may_be_called_as_folders_of_splits_are(tmp_path: Path) -> None:
    listings(tmp_path / "cells", "{}.json", "images/{}")
    (tmp_path / "cells/val.json").rename(tmp_path / "cells/valid.json")
    (tmp_path / "cells/images/val").rename(tmp_path / "cells/images/valid")
    assert [len(load_domain(str(tmp_path / "cells")).split(s)) for s in SPLITS] == [3, 3, 3]


def test_one_listing_in_annotations_is_no_split(tmp_path: Path) -> None:
    listings(tmp_path, "annotations/instances_{}.json", "{}", ("train",))
    assert [len(load_domain(str(tmp_path)).split(s)) for s in SPLITS] == [1, 1, 1]


def test_a_listing_is_named_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings(tmp_path / "cells", "annotations/instances_{}2014.json", "{}2014", ("train", "val"))
    with pytest.raises(InputError, match="several COCO listings: name one of"):
        load_domain(str(tmp_path / "cells"))
    name = "annotations/instances_val2014.json"
    monkeypatch.chdir(tmp_path / "cells")
    assert len(load_domain(name).split("train")) == 1
    monkeypatch.chdir(tmp_path / "cells/annotations")
    assert load_domain(located(Path(name).name)).name == "cells"

    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "cells")
    with pytest.raises(InputError, match="several COCO listings: name one of") as e:
        load_domain(f"zip://::{archive}")
    given = next(word.rstrip(",") for word in str(e.value).split() if name in word)
    assert given == f"zip://{name}::{archive}"
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    assert len(load_domain(located(given)).split("train")) == 1


def test_missing_images_are_one_line(tmp_path: Path) -> None:
    listings(tmp_path, "annotations/instances_{}.json", "images/{}")
    (tmp_path / "images/val/1.png").unlink()
    with pytest.raises(InputError) as caught:
        load_domain(str(tmp_path))
    file = tmp_path / "annotations/instances_val.json"
    assert str(caught.value) == f"1 of 3 images of {file} are missing, such as 1.png; looked in {tmp_path}/images/val"
    shutil.rmtree(tmp_path / "images/val")
    load_domain.cache_clear()
    with pytest.raises(InputError) as caught:
        load_domain(str(tmp_path))
    looked = ", ".join(f"{tmp_path}{p}" for p in ("", "/images", "/val", "/images/val", "/annotations"))
    assert str(caught.value) == f"3 of 3 images of {file} are missing, such as 0.png; looked in {looked}"


def test_one_listing_is_cut_by_shares_and_seed(tmp_path: Path) -> None:
    single(tmp_path / "cells")
    place = str(tmp_path / "cells")

    def tested(name: str) -> set[str]:
        return {s.key for s in load_domain(name).split("test")}

    assert [len(load_domain(place).split(s)) for s in SPLITS] == [7, 1, 2]
    assert [len(load_domain(f"{place}@0.4/0.3/0.3").split(s)) for s in SPLITS] == [4, 3, 3]
    assert tested(place) == tested(f"{place}@70/10/20@0")
    assert len({frozenset(tested(f"{place}@70/10/20@{seed}")) for seed in range(4)}) > 1
    assert load_domain(f"{place}@70/10/20@1").digest != load_domain(place).digest
    assert load_domain(f"{place}@40/30/30@1+fog:1").name == "cells+fog1"
    file = f"{place}/annotations/instances_default.json"
    assert located(f"{place}@70/10/20") == f"{place}@70/10/20"
    assert load_domain(file).name == "cells"
    assert load_domain(file).digest == load_domain(place).digest
    with pytest.raises(InputError, match="three numbers above 0"):
        load_domain(f"{place}@70/0/30")
    (tmp_path / "cells/other.json").write_text(Path(file).read_text())
    load_domain.cache_clear()
    with pytest.raises(
        InputError, match=r"several COCO listings: name one of .*instances_default\.json, .*other\.json"
    ):
        load_domain(place)
    assert len(load_domain(f"{place}/other.json").split("train")) == 7


def test_images_of_the_same_file_are_one(tmp_path: Path) -> None:
    single(tmp_path)
    file = tmp_path / "annotations/instances_default.json"
    listing = json.loads(file.read_text())
    listing["images"] += [{**i, "id": i["id"] + 10} for i in listing["images"]]
    other = [24, 5, 30, 5, 30, 25, 24, 25]
    listing["annotations"] += [{"id": n, "image_id": n, "segmentation": [other]} for n in range(10, 20)]
    file.write_text(json.dumps(listing))
    domain = load_domain(str(tmp_path))
    assert [len(domain.split(s)) for s in SPLITS] == [7, 1, 2]
    assert len({s.key for part in SPLITS for s in domain.split(part)}) == 10
    assert columns(domain, "test", 0) == [(4, 9), (24, 29)]


def test_a_cut_gives_each_split_something() -> None:
    for count in range(3, 40):
        for shares in ((0.7, 0.1, 0.2), (0.98, 0.01, 0.01), (0.01, 0.01, 0.98), (0.01, 0.98, 0.01)):
            parts = Cut(shares)(range(count))
            assert sorted(x for p in parts.values() for x in p) == list(range(count))
            assert all(parts[s] for s in SPLITS)
    with pytest.raises(InputError, match="too few"):
        Cut()(range(2))
    assert parse_cut("a@b/c") == ("a@b/c", None)


@pytest.mark.parametrize("make", [maps, files, single, coco])
def test_a_folder_called_as_a_built_in_domain_is_asked_about(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "medical")
    monkeypatch.chdir(tmp_path)
    for name in ("medical", "medical+fog:1"):
        with pytest.raises(InputError, match=r"'medical' is a built-in domain and a folder .*: write \./medical for"):
            load_domain(located(name))
    assert load_domain("./medical").note.startswith(("images", "COCO"))


def test_a_built_in_domain_minds_no_folder_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "medical/sheet.png")
    (tmp_path / "medical/adapter_config.json").write_text("{}")
    (tmp_path / "clean").mkdir()
    assert [load_domain(n).note.partition(":")[0] for n in ("medical", "clean")] == ["procedural"] * 2


def test_what_a_folder_without_a_layout_lacks_is_said(tmp_path: Path) -> None:
    photo(tmp_path / "photos/1.jpg")
    with pytest.raises(InputError, match=r"is no domain: it has no train\.json.*no images/ with labels/ or masks/"):
        load_domain(str(tmp_path))
    with pytest.raises(InputError, match=r"no such file: .*x\.json"):
        load_domain(str(tmp_path / "x.json"))


def test_label_images_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps(tmp_path)
    before = load_domain(str(tmp_path)).digest
    load_domain.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("wesam.data.pairs.read_labels", lambda file: pytest.fail(f"{file} is read again"))
        assert load_domain(str(tmp_path)).digest == before
    labels(tmp_path / "labels/a/3.png", 1)
    load_domain.cache_clear()
    assert load_domain(str(tmp_path)).digest != before, "a label image was changed"


def test_a_label_image_that_could_not_be_fetched_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps(tmp_path)
    whole, address = Folder.fetch, f"file://{tmp_path}"

    def broken(folder: Folder, name: str, path: Path) -> None:
        if name.endswith("3.png"):
            raise InputError(f"cannot fetch {folder.path(name)}: connection reset")
        whole(folder, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "fetch", broken)
        with pytest.raises(InputError, match="connection reset"):
            load_domain(address)
    assert sum(len(load_domain(address).split(s)) for s in SPLITS) == 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:60]), r"cannot read the image .*3\.png"),
        (lambda f: photo(f), r"3\.png has \d+ different values: it is no label image"),
    ],
)
def test_label_images_that_are_none(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    maps(tmp_path)
    for name in ("3", "4"):
        spoil(tmp_path / f"labels/a/{name}.png")
    with pytest.raises(InputError, match=message) as caught:
        load_domain(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 2, "all of them are listed"


def test_labels_of_another_size_or_without_instances_are_left_out(tmp_path: Path) -> None:
    maps(tmp_path)
    photo(tmp_path / "images/a/3.jpg", (H, W + 1))
    labels(tmp_path / "labels/a/4.png")
    domain = load_domain(str(tmp_path))
    assert sum(len(domain.split(s)) for s in SPLITS) == 8
    assert [re.search(r"(\w+)\.jpg", line)[1] for line in domain.left_out] == ["unlabelled", "3", "4"]  # type: ignore[index]


def test_what_is_unlike_is_said(tmp_path: Path) -> None:
    maps(tmp_path)
    labels(tmp_path / "labels/a/stray.png", 1)
    (one, other) = load_domain(str(tmp_path)).left_out
    assert one == "images/a/unlabelled.jpg: there are no labels of its name in labels/a"
    assert other == "labels/a/stray.png: there is no image of its name in images/a"
    photo(tmp_path / "images/a/3.tif")
    load_domain.cache_clear()
    with pytest.raises(InputError, match=r"images/a/3\.jpg and images/a/3\.tif would have the same labels"):
        load_domain(str(tmp_path))


def test_labels_that_have_no_image_s_name_are_no_layout_and_too_few_images_say_why(tmp_path: Path) -> None:
    for n in range(4):
        photo(tmp_path / f"a/images/{n}_img.png")
        labels(tmp_path / f"a/masks/{n}_mask.png", 1)
    with pytest.raises(InputError, match=r"have the name of an image; left out: images/0_img\.png.*, and 5 more"):
        load_domain(str(tmp_path / "a"))
    for n in range(4):
        photo(tmp_path / f"b/images/{n}.png")
        labels(tmp_path / f"b/labels/{n}.png", *([1] if n < 2 else []))
    with pytest.raises(InputError, match=r"2 images .* too few.*; left out: .*2\.png: its labels have no instance"):
        load_domain(str(tmp_path / "b"))


def test_label_images_may_be_called_as_masks_are(tmp_path: Path) -> None:
    """As Cellpose writes them; soft edges of a mask's one instance are no numbers of several."""
    for n in range(4):
        photo(tmp_path / f"images/{n}.png")
        labels(tmp_path / f"masks/{n}_cp_masks.png", 1, 2, 3)
    labels(tmp_path / "masks/0_cp_masks.png", 10, 128, 255)
    domain = load_domain(str(tmp_path))
    found = {s.key[-5:]: columns(domain, k, i) for k in SPLITS for i, s in enumerate(domain.split(k))}
    assert found == {"0.png": [(4, 29)], **{f"{n}.png": BLOCKS for n in (1, 2, 3)}}


def test_folders_may_be_links_but_none_is_entered_twice(tmp_path: Path) -> None:
    maps(tmp_path / "real")
    (tmp_path / "cells").mkdir()
    for name in ("images", "labels"):
        (tmp_path / "cells" / name).symlink_to(tmp_path / "real" / name)
    for name in ("one", "two"):  # both are entered
        (tmp_path / "real/images" / name).symlink_to(tmp_path / "elsewhere")
    photo(tmp_path / "elsewhere/x.png")
    (tmp_path / "cells/back").symlink_to(tmp_path / "cells")
    (tmp_path / "real/images/up").symlink_to(tmp_path)
    assert Folder(str(tmp_path / "cells")).names == [
        n for n in Folder(str(tmp_path / "real")).names if n.startswith(("images/", "labels/"))
    ]
    assert {"images/one/x.png", "images/two/x.png"} <= set(Folder(str(tmp_path / "cells")).names)
    assert sum(len(load_domain(str(tmp_path / "cells")).split(s)) for s in SPLITS) == 10
    for out in (tmp_path / "elsewhere/x.png", tmp_path / "real/labels/a/3.png"):
        with pytest.raises(InputError, match="lies in the folder of"):
            spare_domain(out, str(tmp_path / "cells"))
    spare_domain(tmp_path / "other.png", str(tmp_path / "cells"))


def test_what_lies_in_a_place_that_is_not_taken_is_nothing_unlike(tmp_path: Path) -> None:
    for n in range(4):
        photo(tmp_path / f"images/{n}.png")
        labels(tmp_path / f"masks/{n}.png", 1)
    labels(tmp_path / "labels/legend.png", 1)
    assert load_domain(str(tmp_path)).left_out == ()


@pytest.mark.parametrize("name", ["colour.png", "colour.tif", "colour.ppm", "planes.tif"])
@pytest.mark.parametrize("labelled", [False, True])
def test_colours_of_16_bits_are_refused(tmp_path: Path, name: str, labelled: bool) -> None:
    pixels = np.full((H, W, 3), 4000, np.uint16)
    if name == "planes.tif":
        tifffile(tmp_path / name, pixels)
    else:
        cv2.imwrite(str(tmp_path / name), pixels)
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        read_labels(tmp_path / name) if labelled else read_image(tmp_path / name)


def tifffile(file: Path, pixels: np.ndarray) -> None:
    """A TIFF of 16 bits a channel, plane after plane and not compressed, which Pillow does not write."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype("<u2")
    size = planes[0].nbytes
    entries = [
        (256, 3, 1, W), (257, 3, 1, H), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 140),
        (277, 3, 1, 3), (278, 3, 1, H), (279, 4, 3, 152), (284, 3, 1, 2),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    rest = struct.pack("<I3H3I3I", 0, 16, 16, 16, *(164 + n * size for n in range(3)), *[size] * 3)
    assert len(head + rest) == 164
    file.write_bytes(head + rest + planes.tobytes())


@pytest.mark.parametrize(("tag", "value", "pages"), [(254, 4, 0), (254, 1, 0), (254, 0, 2), (259, 33005, 0)])
def test_a_page_that_is_a_mask_or_cannot_be_read_is_no_second_image(
    tmp_path: Path, tag: int, value: int, pages: int
) -> None:
    """As what shows what is transparent, a copy of the same size, or a page of a compression that is not known."""
    page, other = Image.fromarray(np.full((H, W), 9, np.uint8)), TiffImagePlugin.ImageFileDirectory_v2()
    other[254] = value if tag == 254 else 0
    with TiffImagePlugin.AppendingTiffWriter(out := io.BytesIO(), True) as writer:
        page.save(writer, format="TIFF")
        writer.newFrame()
        page.save(writer, format="TIFF", tiffinfo=other)
        writer.newFrame()
    content = out.getvalue()
    if tag == 259:
        entry = struct.pack("<HHI", 259, 3, 1)
        at = content.rindex(entry) + len(entry)
        content = content[:at] + struct.pack("<H", value) + content[at + 2 :]
    (tmp_path / "x.tif").write_bytes(content)
    if pages:
        with pytest.raises(InputError, match="2 pages"):
            read_image(tmp_path / "x.tif")
    else:
        assert (read_image(tmp_path / "x.tif") == 9).all()


def test_a_stack_is_refused_and_a_smaller_copy_of_the_image_is_none(tmp_path: Path) -> None:
    page = Image.fromarray(np.zeros((H, W), np.uint8))
    page.save(file := tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    for read in (read_image, read_labels):
        with pytest.raises(InputError, match=r"stack\.tif has 3 pages: save the one that is meant"):
            read(file)
    page.save(file, save_all=True, append_images=[page.resize((W // 2, H // 2))])
    assert read_image(file).shape == (H, W, 3)


@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str], listed: bool) -> None:
    odd = os.fsdecode(b"zelle\xf6")
    if listed:
        single(tmp_path / odd)
        (file := tmp_path / odd / "images/3.png").rename(file.with_stem(odd))
        (listing,) = (tmp_path / odd).rglob("*.json")
        listing.write_text(listing.read_text().replace('"3.png"', json.dumps(f"{odd}.png")))
    else:
        maps(tmp_path / odd)
        for file in sorted((tmp_path / odd).rglob("3.*")):
            file.rename(file.with_stem(odd))
        labels(tmp_path / odd / "labels/a/4.png")
    for place in (f"{tmp_path}/{odd}", f"{tmp_path}/{odd}+all"):
        domain = load_domain(place)
        samples = [s for split in SPLITS for s in domain.split(split)]
        (key,) = [s.key for s in samples if "zelle" in s.key.rpartition("/")[2]]
        assert key.endswith("/zelle\\xf6" + Path(key).suffix)
        for sample in samples:
            sample.weak_labels("point")
    assert main(["check", f"{tmp_path}/{odd}"]) == 0
    assert "zelle\\udcf6 is usable" in capsys.readouterr().out


def test_weak_labels_given_as_such(tmp_path: Path) -> None:
    """A listing that has boxes or clicks and no masks."""
    for split in SPLITS:
        images = [{"id": n, "file_name": f"{split}{n}.png", "height": H, "width": W} for n in range(3)]
        for image in images:
            photo(tmp_path / str(image["file_name"]))
        annotations = [
            {"id": 0, "image_id": 0, "bbox": [4, 5, 6, 20], "keypoints": [5, 6, 2, 40, 30, 1, 0, 0, 0]},
            {"id": 1, "image_id": 0, "bbox": [-4, -5, 20, 20], "keypoints": [5, 6, 2, 7, 7, 2, 30, 30, 1]},
            {"id": 2, "image_id": 1, "bbox": [4, 5, 0, 20], "keypoints": [5, 6, 2]},
            {"id": 3, "image_id": 1, "bbox": [90, 5, 6, 20], "keypoints": [5, 6, 2]},
            {"id": 4, "image_id": 1, "bbox": [4, float("nan"), 6, 20], "keypoints": [5, 6, 2]},
            {"id": 5, "image_id": 1, "bbox": [4, 5, 6], "keypoints": [5, 6, 2]},
            {"id": 6, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [5, 6, 1]},
            {"id": 7, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [99, 6, 2]},
            {"id": 8, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [5, 6, 3]},
            {"id": 9, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [5, 6]},
            {"id": 10, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [5, 6, 0, 7]},
            {"id": 11, "image_id": 1, "bbox": [4, 5, 10**400, 20], "keypoints": [5, 6, 2]},
            {"id": 12, "image_id": 1, "bbox": [4, 5, 6, 20], "keypoints": [-(10**400), 6, 2]},
            {"id": 13, "image_id": 2, "bbox": [1, 1, 6, 20], "keypoints": [5, 6, 2]},
        ]
        (tmp_path / f"{split}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    domain = load_domain(str(tmp_path))
    assert [len(domain.split(s)) for s in SPLITS] == [2, 2, 2]
    assert [re.search(r"annotation (\d+)", line)[1] for line in domain.left_out[:11]] == [*map(str, range(2, 13))]  # type: ignore[index]
    sample = domain.split("train")[0]
    assert len(sample) == 2
    assert sample.weak_labels("box").boxes.tolist() == [[4, 5, 10, 25], [0, 0, 16, 15]]  # type: ignore[union-attr]
    clicks = sample.weak_labels("point")
    assert clicks.point_labels.tolist() == [[1, 0, -1], [1, 1, 0]]  # type: ignore[union-attr]
    assert torch.equal(clicks.extents(), torch.tensor([[5.0, 6, 5, 6], [5, 6, 7, 7]]))
    domain.check(Config(prompt="point"))
    with pytest.raises(InputError, match="has no masks, only weak labels: --prompt box or point"):
        sample.weak_labels("coarse")
    with pytest.raises(InputError, match=r"has no masks, only weak labels \(box, point\): no mIoU"):
        _ = sample.masks


def test_boxes_without_keypoints_are_boxes(tmp_path: Path) -> None:
    single(tmp_path)
    file = tmp_path / "annotations/instances_default.json"
    listing = json.loads(file.read_text())
    listing["annotations"] = [
        {"id": 4 * n + k, "image_id": n, "bbox": [4 + 9 * k, 5, 6, 20], **clicks}
        for n in range(10)
        for k, clicks in enumerate(
            [{"keypoints": [5, 6, 2]}]
            if n % 2
            else [{"keypoints": [5, 6, 2]}, {}, {"keypoints": []}, {"keypoints": [0, 0, 0] * 3, "num_keypoints": 0}]
        )
    ]
    file.write_text(json.dumps(listing))
    domain = load_domain(str(tmp_path))
    assert domain.left_out == ()
    for sample in (s for part in SPLITS for s in domain.split(part)):
        odd = int(Path(sample.key).stem) % 2
        assert (len(sample), list(sample.labels)) == ((1, ["box", "point"]) if odd else (4, ["box"]))
    domain.check(Config(prompt="box"))
    with pytest.raises(InputError, match=r"3 of 7 images of .* have boxes without keypoints: --prompt box"):
        domain.check(Config(prompt="point"))
    (clicked, *_) = [s for part in SPLITS for s in domain.split(part) if "point" in s.labels]
    fine = Split(3, lambda i: clicked)
    mixed = replace(domain, splits={"train": fine, "val": fine, "test": Split(3, lambda i: clicked, unclicked=2)})
    mixed.check(Config(prompt="point"))
    with pytest.raises(InputError, match=r"2 of 3 images of .*, test, have boxes without keypoints"):
        mixed.check(Config(prompt="point"), tested=True)


def test_a_domain_may_lie_anywhere_fsspec_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    maps(tmp_path / "cells")
    single(tmp_path / "listed")
    system = fsspec.filesystem("memory")
    for name in ("cells", "listed"):
        system.put(str(tmp_path / name), "/bucket/", recursive=True)
        here, there = load_domain(str(tmp_path / name)), load_domain(f"memory://bucket/{name}")
        assert there.name == name
        assert there.left_out == here.left_out
        for split in SPLITS:
            for a, b in zip(here.split(split), there.split(split), strict=True):
                assert a.key == b.key
                assert torch.equal(a.image, b.image)
                assert torch.equal(a.masks, b.masks)
    with pytest.raises(InputError, match="is no domain"):
        load_domain("memory://bucket/nothing")
    with pytest.raises(InputError, match="cannot read nosuch://bucket"):
        load_domain("nosuch://bucket/cells")
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("inner", ["", "deep/cells"])
def test_a_domain_may_lie_in_an_archive(inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    maps(tmp_path / "whole" / inner)
    archive = shutil.make_archive(str(tmp_path / "cells"), "zip", tmp_path / "whole")
    here, there = load_domain(str(tmp_path / "whole" / inner)), load_domain(located(f"zip://{inner}::{archive}"))
    for split in SPLITS:
        for a, b in zip(here.split(split), there.split(split), strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.masks, b.masks)
    assert Folder(f"zip://{inner}::{archive}").path("a/1.png") == f"zip://{Path(inner) / 'a/1.png'}::{archive}"
    cached = load_domain(f"simplecache::file://{tmp_path}/whole/{inner}")
    assert [len(cached.split(s)) for s in SPLITS] == [7, 1, 2]


def test_a_distant_file_that_has_changed_is_fetched_again_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    system = fsspec.filesystem("memory")
    stamps = set()
    for content in (b"one", b"two"):
        system.pipe("/far/a.bin", content)
        folder = Folder("memory://far")
        assert folder.names == ["a.bin"]
        with monkeypatch.context() as patch:
            patch.setattr(type(system), "info", lambda *given: pytest.fail("the listing has told it already"))
            stamps.add(folder.stamp("a.bin"))
        assert folder.local("a.bin").read_bytes() == content
    assert len(stamps) == 2
    monkeypatch.setattr(Folder, "fetch", lambda *given: pytest.fail("it is kept already"))
    assert Folder("memory://far").local("a.bin").read_bytes() == b"two"
    system.rm("/far", recursive=True)


def test_the_cache_of_distant_files_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    monkeypatch.setenv("WESAM_CACHE_GB", "0.00001")  # ten files of a thousand bytes
    system = fsspec.filesystem("memory")
    for n in range(30):
        system.pipe(f"/far/{n}.bin", bytes([n]) * 1000)
    folder = Folder("memory://far")
    for n in range(30):
        file = folder.local(f"{n}.bin")
        assert file.read_bytes() == bytes([n]) * 1000
        kept = [f for f in (tmp_path / "cache").glob("*/*") if f.is_file()]
        assert file in kept
        assert sum(f.stat().st_size for f in kept) <= 11_000
    assert len(kept) >= 8
    with pytest.raises(InputError, match=r"cannot fetch memory://far/nothing\.bin"):
        folder.local("nothing.bin")
    monkeypatch.setenv("WESAM_CACHE_GB", "much")
    with pytest.raises(InputError, match="WESAM_CACHE_GB must be a number above 0"):
        folder.local("0.bin")
    system.rm("/far", recursive=True)


def test_a_name_that_cannot_be_looked_for_is_not_there(tmp_path: Path) -> None:
    assert not Folder(str(tmp_path)).has("x" * 300)
    assert "x" * 300 not in Folder(str(tmp_path))
