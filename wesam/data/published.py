"""The paper's data sets in the layouts in which they are published, with the splits of the paper's code.

Where its code cuts a set, every seventh image (COD10K: fifth, Kvasir-SEG: sixth) in the order of names is for test;
where the set comes with a test split, that is. Of the others every tenth is val: the paper has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from wesam.data.files import Folder
from wesam.data.pairs import Decode, Pair, numbered, values_of_mask
from wesam.errors import InputError

Item = TypeVar("Item")

Parts = dict[str, list[Pair]]


@dataclass(frozen=True)
class Published:
    """A published data set."""

    name: str
    title: str
    url: str
    """Where it is got."""
    terms: str
    """Its licence, in a few words."""
    layout: str
    """What it looks like, for people."""
    marks: tuple[str, ...]
    """Files and folders by which it is known, "|" between alternatives."""
    pairs: Callable[[Folder], Parts] | None = None
    """Images with label images, by split."""
    decode: Decode = numbered
    """What a label image's values mean."""
    listing: tuple[str, str] = ("", "")
    """A COCO listing, and what goes before the names of its images."""
    files: tuple[str, int] = ("", 0)
    """Where its layout is one that others use too: what matches the names of some files, and how many it has of them.
    """
    called: str = ""
    """A part of its folder's name, in small letters, without which it is not known."""

    def is_in(self, folder: Folder) -> bool:
        """Whether this folder is the data set's own."""
        if self.called not in folder.name.lower() or not all(any(map(folder.has, m.split("|"))) for m in self.marks):
            return False
        pattern, count = self.files
        return not count or sum(bool(re.fullmatch(pattern, name)) for name in folder.names) == count

    def find(self, root: str) -> Folder:
        """Its folder: this one, or one at most three levels below; raises InputError if there is none."""
        for folder in Folder(root).within(3):
            if self.is_in(folder):
                return folder
        raise InputError(f"no {self.title} in {root}: {self.layout} is looked for there; got at {self.url}")


def every_nth(items: Sequence[Item], every: int) -> dict[str, list[Item]]:
    """Every n-th for test, every tenth of the others for val."""
    rest = [x for n, x in enumerate(items) if n % every != every - 1]
    return with_val(rest, [x for n, x in enumerate(items) if n % every == every - 1])


def with_val(train: Sequence[Item], test: Sequence[Item]) -> dict[str, list[Item]]:
    """Val cut from train: every tenth image, at least one of several."""
    step = min(10, max(2, len(train)))
    return {
        "train": [x for n, x in enumerate(train) if n % step != step - 1],
        "val": [x for n, x in enumerate(train) if n % step == step - 1],
        "test": list(test),
    }


def _matched(folder: Folder, image: str, label: str) -> list[Pair]:
    """A pair for each file that matches ``image`` and has its label, by name; ``label`` is a template of its groups."""
    there = set(folder.names)
    pairs = []
    for name in folder.names:
        if found := re.fullmatch(image, name):
            wanted = found.expand(label)
            ends = (wanted,) if "." in wanted.rpartition("/")[2] else tuple(f"{wanted}.{e}" for e in ("png", "jpg"))
            pairs += [Pair(name, labels=end) for end in ends if end in there][:1]
    return pairs


def _voc(folder: Folder) -> Parts:
    return every_nth(_matched(folder, r"JPEGImages/(.+)\.jpg", r"SegmentationObject/\1.png"), 7)


def voc_objects(values: np.ndarray, name: str) -> np.ndarray:
    """Objects are numbered from 1, or have colours; 255 is a border that belongs to none."""
    return np.where(values == 255, 0, values)


def _kvasir(folder: Folder) -> Parts:
    """The file of boxes tells which part of a mask is which polyp; its order is that of the cut."""
    pairs = {p.image.split("/")[-1][:-4]: p for p in _matched(folder, r"images/(.+)\.jpg", r"masks/\1.jpg")}
    file = folder.local("kavsir_bboxes.json")
    try:
        boxes = {
            k: tuple((int(b["xmin"]), int(b["ymin"]), int(b["xmax"]), int(b["ymax"])) for b in v["bbox"])
            for k, v in json.loads(file.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError(f"{file} does not list the boxes of images: {type(e).__name__} {e}") from None
    return every_nth([replace(pairs[k], boxes=b) for k, b in boxes.items() if k in pairs], 6)


def _isic(folder: Folder) -> Parts:
    train, test = (
        _matched(
            folder, rf"ISBI2016_ISIC_Part1_{part}_Data/(.+)\.jpg",
            rf"ISBI2016_ISIC_Part1_{part}_GroundTruth/\1_Segmentation.png",
        )
        for part in ("Training", "Test")
    )  # fmt: skip
    return with_val(train, test)


def _camo(folder: Folder) -> Parts:
    train, test = (_matched(folder, rf"Images/{part}/(.+)\.jpg", r"GT/\1.png") for part in ("Train", "Test"))
    return with_val(train, test)


def _cod10k(folder: Folder) -> Parts:
    return every_nth(_matched(folder, r"Test/Image/(COD10K-CAM-.+)\.jpg", r"Test/GT_Object/\1.png"), 5)


def _chameleon(folder: Folder) -> Parts:
    return every_nth(_matched(folder, r"(?:Imgs?|Images?)/(.+)\.jpg", r"GT/\1.png"), 7)


def _ocid(folder: Folder) -> Parts:
    return every_nth(_matched(folder, r"(.+/seq\d+)/rgb/(.+)\.png", r"\1/label/\2.png"), 7)


def _ocid_objects(values: np.ndarray, name: str) -> np.ndarray:
    """Objects follow what they lie on: 1 is the floor or, above it, a table, which is 2."""
    return np.where(values <= (2 if "table" in name else 1), 0, values)


def _osd(folder: Folder) -> Parts:
    return every_nth(_matched(folder, r"image_color/(.+)\.png", r"annotation/\1.png"), 7)


def _osd_objects(values: np.ndarray, name: str) -> np.ndarray:
    """Objects follow the table, which is 1."""
    return np.where(values <= 1, 0, values)


PUBLISHED = {
    p.name: p
    for p in (
        Published(
            "coco", "COCO 2017 val", "https://cocodataset.org", "annotations CC BY 4.0, images of Flickr's users",
            "annotations/instances_val2017.json, val2017/*.jpg (5000)",
            ("annotations/instances_val2017.json", "val2017"),
            listing=("annotations/instances_val2017.json", "val2017/"), files=(r"val2017/[^/]+\.jpg", 5000),
        ),
        Published(
            "voc", "Pascal VOC 2012", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012", "images of Flickr's users",
            "VOCdevkit/VOC2012/: JPEGImages/*.jpg, SegmentationObject/*.png (2913)",
            ("JPEGImages", "SegmentationObject"), _voc, voc_objects, files=(r"SegmentationObject/[^/]+\.png", 2913),
        ),
        Published(
            "kvasir", "Kvasir-SEG", "https://datasets.simula.no/kvasir-seg", "research and education only",
            "Kvasir-SEG/: images/*.jpg, masks/*.jpg, kavsir_bboxes.json",
            ("images", "masks", "kavsir_bboxes.json"), _kvasir, values_of_mask,
        ),
        Published(
            "isic", "ISIC 2016, part 1", "https://challenge.isic-archive.com/data/#2016", "CC0",
            "ISBI2016_ISIC_Part1_{Training,Test}_Data/*.jpg, .._GroundTruth/*_Segmentation.png",
            ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Test_Data"), _isic, values_of_mask,
        ),
        Published(
            "camo", "CAMO", "https://sites.google.com/view/ltnghia/research/camo", "research only",
            "CAMO-V.1.0-CVIU2019/: Images/{Train,Test}/*.jpg, GT/*.png",
            ("Images/Train", "Images/Test", "GT"), _camo, values_of_mask,
        ),
        Published(
            "cod10k", "COD10K", "https://github.com/DengPingFan/SINet", "research only",
            "COD10K-v3/Test/: Image/COD10K-CAM-*.jpg, GT_Object/*.png",
            ("Test/Image", "Test/GT_Object"), _cod10k, values_of_mask,
        ),
        Published(
            "chameleon", "CHAMELEON", "https://github.com/DengPingFan/SINet", "none stated; research",
            "CHAMELEON/: Imgs/*.jpg, GT/*.png",
            ("Imgs|Img|Image|Images", "GT"), _chameleon, values_of_mask, called="chameleon",
        ),
        Published(
            "ocid", "OCID",
            "https://www.acin.tuwien.ac.at/en/vision-for-robotics/software-tools/object-clutter-indoor-dataset",
            "research only", "OCID-dataset/{ARID20,ARID10,YCB10}/: .../seq*/rgb/*.png, .../label/*.png",
            ("ARID20|ARID10|YCB10",), _ocid, _ocid_objects,
        ),
        Published(
            "osd", "OSD 0.2", "https://www.acin.tuwien.ac.at/en/vision-for-robotics/software-tools/osd",
            "research only", "OSD-0.2-depth/: image_color/*.png, annotation/*.png",
            ("image_color", "annotation"), _osd, _osd_objects,
        ),
    )
}  # fmt: skip
"""By name, in the paper's order."""
