"""The anchor's answers, in memory and on disk."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import Sam

import wesam.anchor
from wesam.anchor import Anchor
from wesam.config import ComputeConfig
from wesam.crops import WHOLE
from wesam.data import Domain
from wesam.sam import load_sam
from wesam.store import Store

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
