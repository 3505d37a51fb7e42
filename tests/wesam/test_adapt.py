from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import shutil
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from segment_anything.modeling import Sam

from tests.conftest import first
from wesam import losses as L
from wesam.adapt import Best, Report, _restore, adapt, draw, keep_best, warmup
from wesam.adapters import WEIGHTS_FILE, AdaptedSam
from wesam.anchor import Anchor
from wesam.config import Config, PromptKind, preset
from wesam.crops import WHOLE
from wesam.data import SPLITS, Domain, load_domain
from wesam.errors import InputError
from wesam.evaluate import Scores, evaluate
from wesam.methods import get_method
from wesam.sam import load_sam
from wesam.sam.promptable import decode, encode
from wesam.views import flip

SHORT = preset("nano").replace({"steps": 4, "eval_every": 2, "max_instances": 3, "optim.batch_size": 2})
NO_SCORES = Scores(1, 1, 0.0, 0.0)
"""Of a source model that nobody asks about."""


def run(sam: Sam, domain: Domain, config: Config, **more: object) -> list[Report]:
    return list(adapt(sam, domain, config, **more))  # type: ignore[arg-type]


def matrices(report: Report) -> list[torch.Tensor]:
    return [p.detach().clone() for p in report.model.trainable()]


def test_reports_come_before_the_first_step_and_after_every_one(sam: Sam, camouflaged: Domain) -> None:
    reports = run(sam, camouflaged, SHORT)
    assert [r.step for r in reports] == [0, 1, 2, 3, 4]
    assert [r.val is not None for r in reports] == [True, False, True, False, True]
    assert set(reports[1].losses) == {"focal", "dice", "iou", "anchor", "contrastive", "total"}
    parts = [v for k, v in reports[1].losses.items() if k != "total"]
    assert sum(parts) == pytest.approx(reports[1].losses["total"], rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_seeded_runs_are_identical_bit_by_bit(sam: Sam, camouflaged: Domain, decay: float) -> None:
    config = SHORT.replace({"teacher.decay": decay})
    one, two = (run(sam, camouflaged, config) for _ in range(2))
    assert [r.losses for r in one] == [r.losses for r in two]
    assert [r.val for r in one] == [r.val for r in two]
    assert all(torch.equal(a, b) for a, b in zip(matrices(one[-1]), matrices(two[-1]), strict=True))
    other = run(sam, camouflaged, config.replace({"seed": 1}))
    assert other[-1].losses != one[-1].losses


def test_anchor_and_frozen_weights_never_change(sam: Sam, camouflaged: Domain) -> None:
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    last = run(sam, camouflaged, SHORT.replace({"optim.lr": 0.01, "teacher.decay": 0.5}))[-1]
    assert all(torch.equal(v, sam.state_dict()[k]) for k, v in before.items())
    frozen = {k.replace(".base_layer", ""): v for k, v in last.model.sam.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(v, frozen[k]) for k, v in before.items())


def test_teacher_equals_student_at_decay_0_and_lags_behind_at_099(sam: Sam, camouflaged: Domain) -> None:
    shared = run(sam, camouflaged, SHORT)[-1].model
    assert shared.teacher is shared.sam
    for report in adapt(sam, camouflaged, SHORT.replace({"teacher.decay": 0.99, "optim.lr": 0.01})):
        gap = [(t - s).norm() for t, s in zip(report.model.teacher_parameters(), report.model.trainable(), strict=True)]
        assert (sum(gap) > 0) == (report.step > 0)


def test_only_a_shared_teacher_carries_gradient(sam: Sam, camouflaged: Domain) -> None:
    for decay, grows in ((0.0, True), (0.9, False)):
        config = SHORT.replace({"teacher.decay": decay})
        report = next(iter(adapt(sam, camouflaged, config)))
        anchor = Anchor(sam, camouflaged.split("train"), "box")
        method = get_method("wesam")
        found = method.losses(report.model, draw(anchor, config, 0, method), config)
        assert all(v.requires_grad for v in found.values())
        assert any(p.requires_grad for p in report.model.teacher.parameters())
        assert (report.model.teacher is report.model.sam) == grows


def test_a_step_lowers_the_loss_on_a_fixed_batch(sam: Sam, camouflaged: Domain) -> None:
    config = SHORT.replace(
        {
            "max_instances": 50,
            "views.strength": 0.0,
            "views.flip": False,
            "optim.lr": 5e-3,
            "steps": 12,
            "eval_every": 12,
        }
    )
    one = first(camouflaged, train=1)
    supervised = config.replace({"method": "supervised", "optim.batch_size": 1})
    found = [r.losses["total"] for r in run(sam, one, supervised)[1:]]
    assert found[-1] < 0.9 * found[0]


def test_prompts_are_the_same_in_every_epoch(sam: Sam, camouflaged: Domain) -> None:
    anchor, method = Anchor(sam, camouflaged.split("train"), "point"), get_method("wesam")
    config = SHORT.replace({"views.flip": False, "max_instances": 50, "prompt": "point"})
    seen: dict[bytes, set[bytes]] = {}
    for step in range(9):  # three epochs of six images
        batch = draw(anchor, config, step, method)
        for image, prompts in zip(batch.weak, batch.prompts, strict=True):
            assert prompts.points is not None
            clicks = sorted(p.numpy().tobytes() for p in prompts.points)
            seen.setdefault(image.numpy().tobytes(), set()).add(b"".join(clicks))
    assert len(seen) == 6
    assert all(len(v) == 1 for v in seen.values())


@pytest.mark.parametrize("method", ["wesam", "wesam+", "wdass"])
def test_images_of_a_batch_may_have_different_numbers_of_clicks(sam: Sam, method: str, tmp_path: Path) -> None:
    folder, rng = tmp_path / "poses", np.random.default_rng(0)
    folder.mkdir()
    for split in SPLITS:
        images, annotations = [], []
        for n in range(3):
            Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(folder / f"{split}{n}.png")
            images.append({"id": n, "file_name": f"{split}{n}.png", "height": 64, "width": 80})
            clicks = [v for k in range(3) for v in (20 + 9 * k, 30, 2 if k <= n else 0)]
            annotations.append({"id": n, "image_id": n, "keypoints": clicks})
        (folder / f"{split}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    domain = load_domain(str(folder))
    assert [len(s.weak_labels("point").points[0]) for s in domain.split("train")] == [1, 2, 3]  # type: ignore[index]
    config = SHORT.replace({"method": method, "prompt": "point", "optim.batch_size": 3, "steps": 2})
    reports = run(sam, domain, config)
    assert all(math.isfinite(r.losses["total"]) for r in reports[1:])


def test_views_share_one_geometry_with_prompts_and_answers(sam: Sam) -> None:
    """The real masks, flipped as the view is, lie in the prompts' boxes and agree with the anchor about as before."""
    domain = load_domain("clean")
    anchor, method = Anchor(sam, domain.split("train"), "box"), get_method("supervised")
    config = SHORT.replace({"max_instances": 50, "method": "supervised", "optim.batch_size": 4})
    for step in range(2):
        batch = draw(anchor, config, step, method)
        assert batch.truth is not None
        boxes = torch.cat([p.boxes for p in batch.prompts if p.boxes is not None])
        inside = L.box_masks(boxes, 96, batch.stride)
        assert ((batch.truth > 0) & ~inside).sum() == 0
        assert L.tightness((batch.truth - 0.01).sign() * 50, inside).max() < 1e-4
        agreement = 1 - L.dice((batch.truth - 0.5).sign() * 50, batch.anchor_masks)
        assert agreement.mean() > 0.6


def test_answers_equal_those_of_the_anchor_itself(sam: Sam, camouflaged: Domain) -> None:
    anchor = Anchor(sam, camouflaged.split("train"), "box")
    here = (0, WHOLE)
    item, answer = anchor.prepared(here), anchor.answer(here, (True, False))
    with torch.no_grad():
        view = flip(item.image, True, False)
        embedding = encode(sam, [view])
        masks = decode(sam, embedding, [item.prompts.flipped(True, False, (view.shape[1], view.shape[2]))]).logits > 0
    assert torch.equal(answer.masks, masks)
    assert torch.allclose(answer.features, L.pooled(embedding, torch.zeros(len(masks)).long(), masks))
    assert anchor.answer(here, (True, False)).features is answer.features


@pytest.mark.parametrize("prompt", ["box", "point", "coarse"])
def test_cropped_views_share_one_geometry_too(sam: Sam, prompt: PromptKind) -> None:
    """The anchor's answers lie where the real masks are, in every flip of every window."""
    anchor, method = Anchor(sam, load_domain("clean").split("train"), prompt, 2.5), get_method("supervised")
    config = SHORT.replace({"max_instances": 50, "method": "supervised", "optim.batch_size": 4, "crop": 2.5})
    agreements = []
    for step in range(3):
        batch = draw(anchor, config, step, method)
        assert batch.truth is not None
        assert len({*batch.image.tolist()}) == 4, "each window holds at least its own prompt"
        agreements.append(1 - L.dice((batch.truth - 0.5).sign() * 50, batch.anchor_masks))
    assert torch.cat(agreements).mean() > (0.5 if prompt == "point" else 0.7)


def test_an_adapter_remembers_how_it_saw_the_prompts(sam: Sam, camouflaged: Domain, tmp_path: Path) -> None:
    config = SHORT.replace({"crop": 2.0, "optim.lr": 1e-3})
    best = keep_best(adapt(sam, camouflaged, config), tmp_path)
    assert best.direct == evaluate(sam, camouflaged.split("val"), "box", crop=2.0)
    model = AdaptedSam.load(sam, tmp_path)
    assert model.crop == 2
    assert evaluate(model, camouflaged.split("val"), "box") == best.val
    assert evaluate(model, camouflaged.split("val"), "box", crop=0) != best.val


def test_resumed_runs_go_on_bit_by_bit(sam: Sam, camouflaged: Domain, tmp_path: Path) -> None:
    config = SHORT.replace({"teacher.decay": 0.9})
    whole = run(sam, camouflaged, config)
    *_, report = islice(adapt(sam, camouflaged, config), 3)  # two steps
    report.save(tmp_path)
    rest = run(sam, camouflaged, config, resume=tmp_path)
    assert [r.step for r in rest] == [3, 4]
    assert [r.losses for r in rest] == [r.losses for r in whole[3:]]
    assert all(torch.equal(a, b) for a, b in zip(matrices(rest[-1]), matrices(whole[-1]), strict=True))
    with pytest.raises(InputError, match="another lora configuration"):
        run(sam, camouflaged, config.replace({"lora.rank": 7}), resume=tmp_path)


def test_a_resumed_optimiser_is_where_its_parameters_are(sam: Sam, camouflaged: Domain, tmp_path: Path) -> None:
    *_, report = islice(adapt(sam, camouflaged, SHORT, direct=NO_SCORES), 2)  # one step
    report.save(tmp_path)
    model = AdaptedSam(sam, SHORT.lora)
    model._peft.to("meta")  # as good as a GPU for this; the parameters of sam stay where they are
    optimizer = torch.optim.Adam(model.trainable())
    assert _restore(tmp_path, model, optimizer) == 1
    for p in model.trainable():
        state = optimizer.state[p]
        assert (state["exp_avg"].device, state["exp_avg_sq"].device) == (p.device, p.device)
        assert state["step"].device.type == "cpu"


def test_a_model_that_is_let_go_is_freed(camouflaged: Domain) -> None:
    sam = load_sam("nano")
    gone = weakref.ref(sam)
    next(adapt(sam, camouflaged, SHORT, direct=NO_SCORES))
    run(sam, camouflaged, SHORT.replace({"steps": 1}), direct=NO_SCORES)
    del sam
    gc.collect()
    assert gone() is None


def test_adaptations_of_a_model_share_what_is_prepared(
    sam: Sam, camouflaged: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SHORT.replace({"steps": 1, "crop": 2.0})
    run(sam, camouflaged, config, direct=NO_SCORES)
    monkeypatch.setattr("wesam.anchor.resize", None)
    run(sam, camouflaged, config, direct=NO_SCORES)


def test_a_resumed_run_keeps_the_better_adapter_of_before(sam: Sam, camouflaged: Domain, tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "best", tmp_path / "checkpoint"
    direct, good, worse, better = (replace(NO_SCORES, miou=v) for v in (0.1, 0.5, 0.3, 0.6))
    real = islice(adapt(sam, camouflaged, SHORT, direct=NO_SCORES), 3)
    reports = (replace(r, val=v) for r, v in zip(real, (direct, good, worse), strict=True))
    previous = keep_best(islice(reports, 2), folder)
    assert previous == Best(1, good, direct)
    second = next(reports)
    kept = (folder / WEIGHTS_FILE).read_bytes()

    assert keep_best([second], folder, previous=previous) == previous
    second.save(checkpoint)
    finished = SHORT.replace({"steps": 2})
    assert keep_best(adapt(sam, camouflaged, finished, resume=checkpoint), folder, previous=previous) == previous
    for rest in (adapt(sam, camouflaged, finished, resume=checkpoint), [second]):
        with pytest.raises(InputError, match="the previous best"):
            keep_best(rest, folder)
    assert (folder / WEIGHTS_FILE).read_bytes() == kept
    with pytest.raises(InputError, match="no adapter in"):
        keep_best([second], tmp_path / "elsewhere", previous=previous)

    assert keep_best([replace(second, val=better)], folder, previous=previous) == Best(2, better, direct)
    found, wanted = (AdaptedSam.load(sam, f).trainable() for f in (folder, checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_known_scores_of_direct_are_not_computed_again(sam: Sam, camouflaged: Domain) -> None:
    direct = run(sam, camouflaged, SHORT)[0].val
    assert direct is not None
    marked = type(direct)(direct.images, direct.instances, 0.123, 0.456)
    assert run(sam, camouflaged, SHORT, direct=marked)[0].val is marked


def test_val_is_scored_with_so_many_instances_of_an_image(sam: Sam, camouflaged: Domain) -> None:
    val = camouflaged.split("val")
    for most, expected in ((1, len(val)), (2, sum(min(2, len(s)) for s in val)), (0, sum(map(len, val)))):
        found = run(sam, camouflaged, SHORT.replace({"steps": 1, "val_instances": most}))[-1].val
        assert found is not None
        assert found.instances == expected


def test_warm_up_rises_over_at_most_a_quarter_of_the_run() -> None:
    long = Config()
    assert [warmup(s, long) for s in (0, 124, 250, 900)] == pytest.approx([1 / 251, 125 / 251, 1, 1])
    short = Config(steps=8)
    assert [warmup(s, short) for s in range(8)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1])


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    reports = run(load_sam("nano"), first(load_domain("camouflaged"), train=6, val=3), SHORT)
    torch.save(
        {
            "losses": [r.losses for r in reports],
            "val": [r.val and r.val.miou for r in reports],
            "weights": matrices(reports[-1]),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_worker, args=(r, str(tmp_path))) for r in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(180)
        assert w.exitcode == 0
    one, two = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert one["losses"] == two["losses"]
    assert one["val"] == two["val"]
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], two["weights"], strict=True))
    alone = run(load_sam("nano"), first(load_domain("camouflaged"), train=6, val=3), SHORT)
    for a, b in zip(one["losses"], alone, strict=True):
        assert a == pytest.approx(b.losses, rel=1e-4)
    assert one["val"][-1] == pytest.approx(alone[-1].val.miou, abs=2e-3)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ on a CPU")
def test_a_compiled_encoder_learns_the_same(sam: Sam, camouflaged: Domain) -> None:
    plain, compiled = (run(sam, camouflaged, SHORT.replace({"compute.compile": c})) for c in (False, True))
    for a, b in zip(plain, compiled, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)


def test_more_workers_than_images_a_step_is_an_error(
    sam: Sam, camouflaged: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(InputError, match="less than the 3 workers"):
        next(iter(adapt(sam, camouflaged, SHORT)))
