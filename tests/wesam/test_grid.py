"""Training without labels: clicks on a grid that the source model is sure of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

import wesam.anchor
from wesam.adapt import adapt, draw
from wesam.anchor import Anchor
from wesam.cli import main
from wesam.config import Config, GridConfig, preset
from wesam.crops import WHOLE
from wesam.data import Domain, load_domain
from wesam.errors import InputError
from wesam.evaluate import evaluate, overlap
from wesam.grid import grid_prompts
from wesam.methods import get_method
from wesam.sam.promptable import decode, encode

NANO = preset("nano").grid


@pytest.fixture
def unlabelled(coco_folder: Path) -> Path:
    """A domain of which only val and test have labels."""
    listing = json.loads((coco_folder / "train.json").read_text())
    (coco_folder / "train.json").write_text(json.dumps({**listing, "annotations": []}))
    return coco_folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each image whose clicks are really looked for."""
    calls: list[int] = []

    def counted(sam: Sam, image: torch.Tensor, config: GridConfig) -> wesam.anchor.Prompts:
        calls.append(1)
        return grid_prompts(sam, image, config)

    monkeypatch.setattr(wesam.anchor, "grid_prompts", counted)
    return calls


def test_kept_clicks_are_sure_and_of_different_things(sam: Sam) -> None:
    image = load_domain("clean").split("train")[0].image[:, :150, :180]
    found = grid_prompts(sam, image, NANO)
    assert found.points is not None
    assert 2 <= len(found) <= 60
    assert ((found.points >= 0) & (found.points <= torch.tensor([180, 150]))).all()
    with torch.no_grad():
        out = decode(sam, encode(sam, [image]), [found])
    assert (out.iou >= NANO.predicted_iou).all()
    assert out.iou.tolist() == sorted(out.iou.tolist(), reverse=True)
    high, low = out.logits > 1, out.logits > -1
    assert (overlap(high, low)[0] >= NANO.stability).all()
    masks = out.logits > 0
    for i in range(1, len(masks)):
        assert overlap(masks[i].expand(i, -1, -1), masks[:i])[0].max() <= 0.7


def test_stricter_thresholds_keep_fewer_and_at_least_one(sam: Sam) -> None:
    image = load_domain("clean").split("train")[0].image
    some = len(grid_prompts(sam, image, NANO))
    assert 1 < len(grid_prompts(sam, image, GridConfig(predicted_iou=0.7, stability=0.5))) < some
    assert len(grid_prompts(sam, image, GridConfig(predicted_iou=1.0, stability=1.0))) == 1
    assert len(grid_prompts(sam, image, GridConfig(points_per_side=1, predicted_iou=0.0, stability=0.0))) == 1
    assert len(grid_prompts(sam, image[:, :2], NANO)) >= 1, "a strip narrower than a cell"


def test_clicks_are_looked_for_once_on_a_machine_and_lie_in_the_image(
    sam: Sam, unlabelled: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    train = load_domain(str(unlabelled)).split("train")
    first = Anchor(sam, train, "grid", grid=NANO)
    again = Anchor(sam, train, "grid", grid=NANO)
    for n in range(len(train)):
        a, b = first.given(n).points, again.given(n).points
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
        assert (a < torch.tensor([train[n].image.shape[2], 60])).all()
    assert len(asked) == len(train)
    Anchor(sam, train, "grid", grid=GridConfig(predicted_iou=0.5)).given(0)
    assert len(asked) == len(train) + 1
    seen = first.prepared((0, WHOLE)).prompts.points
    assert seen is not None
    assert seen == pytest.approx(first.given(0).points * 192 / 90)


def test_a_step_draws_the_kept_clicks(sam: Sam, camouflaged: Domain) -> None:
    anchor = Anchor(sam, camouflaged.split("train"), "grid", 3.0, grid=NANO)
    config = preset("nano").replace({"prompt": "grid", "crop": 3.0, "optim.batch_size": 2})
    batch = draw(anchor, config, 0, get_method("wesam"))
    assert all(p.points is not None and p.points.shape[1] == 1 for p in batch.prompts)
    assert len(batch.anchor_masks) == sum(map(len, batch.prompts))
    assert batch.anchor_masks.flatten(1).any(1).all()


@pytest.mark.parametrize("kind", ["box", "point"])
def test_training_without_labels_is_scored_by_those_of_val(sam: Sam, unlabelled: Path, kind: str) -> None:
    domain = load_domain(str(unlabelled))
    changes = {"prompt": "grid", "val_prompt": kind, "steps": 2, "eval_every": 2, "optim.batch_size": 2}
    reports = list(adapt(sam, domain, preset("nano").replace(changes)))
    assert reports[0].val == evaluate(sam, domain.split("val"), kind)  # type: ignore[arg-type]
    assert reports[2].val != reports[0].val
    assert all(torch.isfinite(torch.tensor(list(r.losses.values()))).all() for r in reports)


def test_other_kinds_need_labels(sam: Sam, unlabelled: Path) -> None:
    domain = load_domain(str(unlabelled))
    assert (domain.split("train")[0].labels, domain.split("train").small(8)) == ({}, 0)
    with pytest.raises(InputError, match=r"train-0\.png has no masks, no labels at all: --prompt grid"):
        next(adapt(sam, domain, Config()))
    with pytest.raises(InputError, match="no labels at all: no mIoU"):
        _ = domain.split("train")[0].masks


def test_val_without_labels_is_no_domain(unlabelled: Path) -> None:
    (unlabelled / "val.json").write_text((unlabelled / "train.json").read_text())
    with pytest.raises(InputError, match=r"val\.json has no image with an instance"):
        load_domain(str(unlabelled))


def test_the_commands(unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where, out = str(unlabelled), tmp_path / "a"
    few = ["--steps", "1", "--set", "eval_every=1"]
    assert main(["adapt", "--domain", where, "--prompt", "grid", "--out", str(out), *few]) == 0
    assert json.loads((out / "adaptation.json").read_text())["config"]["val_prompt"] == "box"
    assert main(["show", where, "--prompt", "grid", "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").width > 900
    assert main(["show", where, "--prompt", "box", "--out", str(tmp_path / "s.png")]) == 2
    assert "no labels at all" in capsys.readouterr().err
