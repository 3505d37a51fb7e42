from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wesam import pretrain
from wesam.data import load_domain
from wesam.data.procedural import SIZES
from wesam.sam import load_sam

SMALL = ["--steps", "2", "--every", "1", "--batch", "1", "--prompts", "2", "--device", "cpu"]


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "val", 2)
    pretrain.main([*SMALL, "--out", str(tmp_path / "whole")])
    step = pretrain.train_step

    def interrupted(*given: Any) -> torch.Tensor:
        if given[2] == 1:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(pretrain, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*SMALL, "--out", str(tmp_path / "halves")])
    monkeypatch.setattr(pretrain, "train_step", step)
    pretrain.main([*SMALL, "--out", str(tmp_path / "halves")])
    one, two = (load_file(tmp_path / d / "nano.safetensors") for d in ("whole", "halves"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert (tmp_path / "whole" / "curve.csv").read_text() == (tmp_path / "halves" / "curve.csv").read_text()
    load_sam("nano", tmp_path / "whole" / "nano.safetensors")


def test_training_scenes_are_in_no_domain() -> None:
    bank = pretrain.SceneBank(0)
    drawn = {bank._make(i)[0].tobytes() for i in range(60)}
    domain = load_domain("clean")
    held = {s.image.permute(1, 2, 0).numpy().tobytes() for split in ("val", "test") for s in domain.split(split)[:20]}
    assert len(drawn) == 60
    assert not drawn & held


def test_prompts_of_a_batch_have_one_form() -> None:
    rng = np.random.default_rng(0)
    samples = load_domain("clean").split("val")[:3]
    prompts = [
        pretrain.fewer_clicks(np.random.default_rng(3), pretrain.drawn_prompts(rng, s.masks, "point")) for s in samples
    ]
    assert len({p.points.shape[1] for p in prompts if p.points is not None}) == 1


def test_the_loss_prefers_the_truth() -> None:
    truth = torch.zeros(1, 32, 32)
    truth[:, 8:20, 8:20] = 1
    sure = (truth * 2 - 1) * 8
    values = [pretrain.mask_loss(x, torch.ones(1), truth, 1.0).item() for x in (sure, 0 * sure, -sure)]
    assert values == sorted(values)
