"""The anchor's answers, in memory and on disk."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam
from torch.nn import functional as F

import wesam.anchor
from wesam.anchor import Anchor, Memory, Place
from wesam.config import ComputeConfig
from wesam.crops import WHOLE
from wesam.data import Domain, Sample
from wesam.recent import Recent
from wesam.sam import load_sam
from wesam.store import Store
from wesam.views import flip

PLACE, FLIPS = (0, WHOLE), (True, False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path))
    return tmp_path / "anchors"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a model is really asked."""
    calls: list[int] = []
    real = wesam.anchor.encode

    def encode(sam: Sam, images: list[torch.Tensor]) -> torch.Tensor:
        calls.append(len(images))
        return real(sam, images)

    monkeypatch.setattr(wesam.anchor, "encode", encode)
    return calls


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_answers_are_asked_for_once_on_a_machine(sam: Sam, camouflaged: Domain, folder: Path, asked: list[int]) -> None:
    first = Anchor(sam, camouflaged.split("train"), "box").answer(PLACE, FLIPS)
    assert len(asked) == 1
    again = Anchor(load_sam("nano"), camouflaged.split("train"), "box").answer(PLACE, FLIPS)
    assert len(asked) == 1
    assert torch.equal(first.masks, again.masks)
    assert torch.equal(first.features, again.features)
    assert first.masks.dtype == torch.bool
    (file,) = files(folder)
    assert file.stat().st_size < 10_000 * len(first.masks)


def test_whatever_makes_an_answer_makes_another_one(
    sam: Sam, camouflaged: Domain, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = camouflaged.split("train")
    Anchor(sam, split, "box").answer(PLACE, FLIPS)
    Anchor(sam, split, "point").answer(PLACE, FLIPS)
    Anchor(sam, split, "box").answer(PLACE, (False, False))
    Anchor(sam, split, "box").answer((1, WHOLE), FLIPS)
    Anchor(sam, split, "box", 2.0).answer((0, 0), FLIPS)
    Anchor(sam, split, "box", compute=ComputeConfig(precision="bf16")).answer(PLACE, FLIPS)
    other = copy.deepcopy(sam)
    other.mask_decoder.iou_token.weight.data += 1e-3
    Anchor(other, split, "box").answer(PLACE, FLIPS)
    assert len(asked) == 7
    monkeypatch.setattr(wesam.anchor, "FORMAT", 0)
    Anchor(sam, split, "box").answer(PLACE, FLIPS)
    assert len(asked) == 8


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_answer_is_asked_for_again(
    sam: Sam, camouflaged: Domain, folder: Path, asked: list[int], damage: object
) -> None:
    wanted = Anchor(sam, camouflaged.split("train"), "box").answer(PLACE, FLIPS)
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))  # type: ignore[operator]
    found = Anchor(sam, camouflaged.split("train"), "box").answer(PLACE, FLIPS)
    assert len(asked) == 2
    assert torch.equal(found.features, wanted.features)
    assert file.read_bytes() == whole


def _write(folder: Path, number: int) -> None:
    store = Store(folder)
    for i in range(200):
        store.put(f"name{i % 5}", {"x": torch.full((50, 50), i % 5)})
        found = store.get(f"name{(i + number) % 5}")
        assert found is None or (found["x"] == (i + number) % 5).all()


def test_processes_may_write_the_same_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, n)) for n in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert len(files(tmp_path)) == 5


def test_a_folder_that_cannot_be_written_is_only_a_loss_of_time(
    sam: Sam, camouflaged: Domain, folder: Path, asked: list[int]
) -> None:
    folder.write_text("a file where the folder should be")
    anchor = Anchor(sam, camouflaged.split("train"), "box")
    with pytest.warns(UserWarning, match="nothing is kept"):
        anchor.answer(PLACE, FLIPS)
    anchor.answer((1, WHOLE), FLIPS)
    assert len(asked) == 2


SIDE = 400
"""Of :func:`squares`, in pixels; twice a square's side is the model's 192, so that its window is not resized."""


@pytest.fixture
def squares() -> Sample:
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    for mask, (x, y) in zip(masks, ((40, 60), (90, 100), (290, 280)), strict=True):
        mask[y : y + 96, x : x + 96] = True
    pixels = torch.randint(256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return Sample("squares", pixels.to(torch.uint8), masks)


@pytest.mark.parametrize("crop", [0.0, 2.0, 3.0])
def test_truth_is_the_share_of_each_cell_that_the_masks_cover(sam: Sam, squares: Sample, crop: float) -> None:
    anchor, chosen = Anchor(sam, [squares], "box", crop), torch.tensor([1, 0])
    item = anchor.prepared((0, 0 if crop else WHOLE))
    x0, y0, x1, y1 = (0, 0, SIDE, SIDE) if item.window is None else item.window.tolist()
    assert x1 - x0 == (crop * 96 or SIDE)
    seen = squares.masks[:2][chosen, y0:y1, x0:x1]
    for flips in ((False, False), (True, True)):
        wanted = flip(F.interpolate(seen[:, None].float(), (192, 192), mode="area")[:, 0], *flips)
        found = anchor.truth((0, 0 if crop else WHOLE), flips, chosen)
        assert torch.equal(found, F.avg_pool2d(wanted, 2))


@pytest.mark.parametrize("crop", [0.0, 2.0])
def test_what_is_kept_holds_on_to_nothing_larger(sam: Sam, squares: Sample, crop: float) -> None:
    anchor = Anchor(sam, [squares], "box", crop)
    place = (0, 0 if crop else WHOLE)
    anchor.truth(place, FLIPS, torch.tensor([0]))
    item = anchor.prepared(place)
    assert item.prompts.boxes is not None
    kept = [v for v in (*vars(item).values(), item.prompts.boxes) if isinstance(v, torch.Tensor)]
    assert sum(v.untyped_storage().nbytes() for v in kept) < item.nbytes + 200
    assert item.nbytes == 3 * 192 * 192


def test_images_and_answers_are_kept_while_they_fit(
    sam: Sam, squares: Sample, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    resize = wesam.anchor.resize
    monkeypatch.setattr(wesam.anchor, "resize", lambda image, side: made.append(1) or resize(image, side))
    recent = Recent(int(2.5 * 3 * 192 * 192))
    anchor = Anchor(sam, [squares], "box", 2.0, memory=Memory(recent=recent))
    a, b, c = places = [(0, n) for n in range(3)]
    visits: list[tuple[Place, int]] = [(a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (c, 3), (b, 4)]
    for place, count in visits:
        anchor.prepared(place)
        assert len(made) == count
        assert recent.nbytes <= recent.most
    first = [anchor.answer(p, FLIPS) for p in places]
    recent.most = 0
    anchor.prepared(a)
    assert recent.nbytes == 0
    again = [anchor.answer(p, FLIPS) for p in places]
    assert len(asked) == 3, "what memory has dropped is on disk"
    assert all(torch.equal(x.masks, y.masks) for x, y in zip(first, again, strict=True))
