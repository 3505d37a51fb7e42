from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wesam.data import load_domain
from wesam.data.procedural import SIZES
from wesam.data.scenes import scene
from wesam.errors import InputError
from wesam.pretrain.bank import FIRST, Bank, Groups
from wesam.pretrain.batch import KINDS, SMALLEST, choose, clicks, make_batch, zoom
from wesam.pretrain.cli import main
from wesam.pretrain.losses import Affinity, all_masks_loss, mask_loss
from wesam.pretrain.train import Options, Schedule, Trainer, resized
from wesam.prompts import tight_boxes
from wesam.sam import load_sam
from wesam.sam.nano import Shape, build_nano

CPU = torch.device("cpu")
TINY = Shape(side=64, patch=4, width=48, depth=2, heads=2, window=4, whole=(1,), channels=32)
SMALL = [
    "--device=cpu", "--workers=0", "--set=batch=2", "--set=prompts=2", "--set=fresh=1", "--set=steps=42",
    "--set=every=21", "--set=shape.side=64", "--set=shape.patch=4", "--set=shape.width=48",
    "--set=shape.depth=2", "--set=shape.heads=2", "--set=shape.window=4", "--set=shape.whole=1",
    "--set=shape.channels=32",
]  # fmt: skip


def scenes(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return Groups(0, count, 192)[3]


@pytest.mark.usefixtures("fresh_domains")
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "val", 2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    main([*SMALL, "--out", str(whole)])
    main([*SMALL, "--out", str(halves), "--minutes", "0"])
    assert torch.load(halves / "checkpoint.pt", weights_only=True)["step"] == 20  # looked at the clock there
    main([*SMALL, "--out", str(halves)])
    one, two = (load_file(d / "nano.safetensors") for d in (whole, halves))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    scores = [[r.split(",")[2:] for r in (d / "curve.csv").read_text().splitlines()] for d in (whole, halves)]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 3
    build_nano(TINY).load_state_dict(one)

    model = load_sam(str(whole / "nano.safetensors"))
    assert (model.image_encoder.img_size, model.image_encoder.blocks[0].window_size) == (64, 4)
    assert all(torch.equal(v, one[k].float()) for k, v in model.state_dict().items())
    for wrong in ('{"side": 64}', '{"whole": [1], "wide": 3}', '{"whole": [1], "patch": 0}', "[]", "{"):
        save_file(one, tmp_path / "wrong.safetensors", {"shape": wrong})
        with pytest.raises(InputError, match=r"what shape its model has|does not hold the weights"):
            load_sam(str(tmp_path / "wrong.safetensors"))


def test_a_run_begins_with_weights_of_a_smaller_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, large = build_nano(TINY), build_nano(replace(TINY, side=128))
    fitted = resized(small.state_dict(), large)
    positions = "image_encoder.pos_embed"
    assert fitted[positions].shape == (1, 32, 32, 48)
    torch.nn.init.normal_(small.image_encoder.pos_embed)
    fitted = resized(small.state_dict(), large)
    back = torch.nn.functional.avg_pool2d(fitted[positions].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (back - small.image_encoder.pos_embed).abs().mean() < 0.3
    save_file(small.state_dict(), start := tmp_path / "small.safetensors")
    options = Options(batch=2, prompts=2, fresh=1, shape=replace(TINY, side=128))
    trainer = Trainer(options, CPU, 0, start=start)
    assert torch.equal(trainer.model.sam.image_encoder.neck[0].weight, small.image_encoder.neck[0].weight)
    assert torch.equal(trainer.average.module.image_encoder.pos_embed, fitted[positions])
    with pytest.raises(InputError, match="another shape"):
        resized(small.state_dict(), build_nano(replace(TINY, width=64)))


def test_several_processes_train_one_model(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "wesam.pretrain", *SMALL, "--out=out"]
    command += ["--set=steps=4", "--set=every=4"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1
    build_nano(TINY).load_state_dict(load_file(tmp_path / "out" / "nano.safetensors"))


@pytest.mark.parametrize(("given", "named"), [("lr", "NAME=VALUE"), ("rate=1", "'rate'"), ("steps=many", "steps")])
def test_wrong_options_are_named(tmp_path: Path, given: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        main(["--out", str(tmp_path / "out"), "--set", given])
    assert not (tmp_path / "out").exists()


def test_training_scenes_are_in_no_domain() -> None:
    groups = Groups(0, 1, 192)
    drawn = {groups.scene(i)[0].tobytes() for i in range(60)}
    domain = load_domain("clean")
    held = {s.image.permute(1, 2, 0).numpy().tobytes() for split in ("val", "test") for s in domain.split(split)[:20]}
    assert len(drawn) == 60
    assert not drawn & held


def test_labels_are_the_scenes_masks() -> None:
    image, labels = Groups(4, 1, 192, rank=1, world=2).scene(5)
    same, masks = scene(np.random.default_rng([4, 8, 5]), 192, 192)
    assert (image == same).all()
    assert all((masks[i - 1] == (labels == i)).all() for i in range(1, len(masks) + 1))


def test_the_bank_holds_the_latest_scenes_whenever_it_starts() -> None:
    groups = Groups(0, 1, 32)
    early = Bank(groups, FIRST + 4, 0, 0, CPU)
    late = Bank(groups, FIRST + 4, 9, 0, CPU)
    for step in range(9):
        early.draw(step, 1, np.random.default_rng(0))
    a, b = (bank.draw(9, 50, np.random.default_rng(1)) for bank in (early, late))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    there = {bytes(groups[j][0].numpy()) for j in range(9 - 4, 9 + FIRST)}
    assert {bytes(x[None].numpy()) for x in a[0]} <= there


def test_a_batch_asks_for_what_is_seen() -> None:
    for seed in range(12):
        batch = make_batch(*scenes(), KINDS[seed % 3], 5, 0.5, np.random.default_rng(seed))
        assert batch.truth.shape == (20, 192, 192)
        assert batch.truth.flatten(1).sum(1).min() >= SMALLEST
        assert all(max(x.shape[1:]) == 192 for x in batch.images)
        for image, part in zip(batch.images, batch.truth.split(5), strict=True):
            assert not part[:, image.shape[1] :].any()
            assert not part[:, :, image.shape[2] :].any()
        assert [len(p) for p in batch.prompts] == [5] * 4


def test_different_instances_are_chosen_while_there_are_any() -> None:
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, :20, :20], labels[0, 30:50, :20], labels[0, :2, 40:42] = 1, 2, 3  # the third is too small
    labels[1, 8:20, 8:20] = 7
    chosen = choose(labels, 4, np.random.default_rng(0))
    assert sorted(chosen[0].tolist()) == [1, 1, 2, 2]
    assert chosen[1].tolist() == [7] * 4


def test_clicks_lie_where_they_should() -> None:
    _, labels = scenes()
    truth = torch.stack([labels[i] == labels[i].max() for i in range(4)])
    points = clicks(truth, 3, 2, np.random.default_rng(0))
    x, y = (points[..., i].long() for i in (0, 1))
    hit = torch.stack([t[b, a] for t, a, b in zip(truth, x, y, strict=True)])
    assert hit.tolist() == [[True] * 3 + [False] * 2] * 4
    assert (points % 1 == 0.5).all()
    boxes = tight_boxes(truth)
    margin = 4 + (boxes[:, 3] - boxes[:, 1]).floor_divide(4)
    assert (points >= (boxes[:, None, :2] - margin[:, None, None])).all()
    assert (points <= (boxes[:, None, 2:] + margin[:, None, None])).all()


def test_zooming_keeps_image_and_labels_together() -> None:
    # an image that shows its labels: every instance has a brightness of its own
    _, labels = scenes(16)
    images = (labels * 4)[:, None].expand(-1, 3, -1, -1).contiguous()
    seen, named = zoom(images, labels, 0.5, np.random.default_rng(0))
    moved = (named != labels).flatten(1).any(1)
    assert 2 < moved.sum() < 14
    inside = torch.nn.functional.max_pool2d(-named[:, None].float(), 3, 1, 1)[:, 0] == -named.float()
    inside &= torch.nn.functional.max_pool2d(named[:, None].float(), 3, 1, 1)[:, 0] == named.float()
    inside &= named > 0
    assert ((seen[:, 0].int() - named.int() * 4).abs()[inside] <= 1).float().mean() > 0.98


def test_the_loss_prefers_the_truth() -> None:
    truth = torch.zeros(1, 32, 32)
    truth[:, 8:20, 8:20] = 1
    sure = (truth * 2 - 1) * 8
    values = [mask_loss(x[:, None], torch.ones(1, 1), truth, 1.0).item() for x in (sure, 0 * sure, -sure)]
    assert values == sorted(values)


def test_of_the_three_outputs_only_the_best_is_taught() -> None:
    truth = torch.zeros(1, 32, 32)
    truth[:, 8:20, 8:20] = 1
    sure = (truth * 2 - 1) * 3
    logits = torch.stack([0 * sure, -sure, sure, 0 * sure], 1).requires_grad_()
    all_masks_loss(logits, torch.zeros(1, 4), truth, 1.0, 0.5).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum((0, 2, 3)) > 0).tolist() == [True, False, True, False]


def test_affinity_is_lowest_where_features_follow_the_instances() -> None:
    _, labels = scenes(1)
    shares = torch.stack([torch.nn.functional.avg_pool2d((labels == i).float(), 8)[0] for i in range(1, 33)])
    head = Affinity(32)
    torch.nn.init.eye_(head.project.weight[:, :32])
    torch.nn.init.zeros_(head.project.bias)
    torch.manual_seed(0)
    noise, rng = torch.randn(shares.shape), np.random.default_rng(0)
    assert head(shares[None], labels, rng) < 0.5 * head(noise[None], labels, rng)


def test_the_rate_falls_when_the_scores_stand_still() -> None:
    options = Options(steps=100_000, every=500, patience=3, gain=0.01)
    schedule = Schedule(options)
    for i, score in enumerate([0.1, 0.3, 0.5, 0.6, 0.605, 0.606]):
        schedule.seen(500 * (i + 1), score)
    assert schedule.falls_from is None
    schedule.seen(3500, 0.607)
    assert schedule.falls_from == 3500
    assert schedule.end == 4900
    assert schedule.factor(3499) == 1
    assert 0 < schedule.factor(4899) < schedule.factor(4000) < 1
    unhurried = Schedule(options)
    assert unhurried.end == 100_000
    assert unhurried.factor(99_999) < 0.001


def test_a_model_of_another_shape_works() -> None:
    sam = build_nano(TINY)
    assert sam.image_encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 32, 16, 16)
