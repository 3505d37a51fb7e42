from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from segment_anything.modeling import Sam
from torch.nn import functional as F

from tests.conftest import first
from tests.wesam.test_adapters import logits, shaken
from wesam import losses as L
from wesam.adapt import adapt, draw, train
from wesam.adapters import AdaptedSam
from wesam.anchor import Anchor
from wesam.config import Config, LoraConfig, PromptKind, Train, Value
from wesam.data import Domain, load_domain
from wesam.errors import InputError
from wesam.export import export_peft
from wesam.methods import METHODS, Batch, checked_method, get_method, method_preset
from wesam.methods.dept import voted
from wesam.methods.shot import nearest_prototype
from wesam.methods.wdass import corrected, to_prototypes
from wesam.methods.wesam_plus import against_label, covered, exclusive
from wesam.prompts import Prompts, tight_boxes
from wesam.sam.promptable import in_pixels
from wesam.training import _start

KINDS: tuple[PromptKind, ...] = ("box", "point", "coarse")


@pytest.fixture(scope="module")
def two() -> Domain:
    return first(load_domain("camouflaged"), train=2, val=1, test=1)


def test_no_weight_is_changed_where_a_gradient_is_not_finite(sam: Sam, two: Domain) -> None:
    config = method_preset("nano", "wesam").replace({"max_instances": 2})
    batch = draw(Anchor(sam, two.split("train"), "box"), config, 0, METHODS["wesam"])
    model = AdaptedSam(sam, config.lora)

    def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, torch.Tensor]:
        return {
            "odd": (sum(p.sum() for p in model.trainable()) * torch.zeros(len(batch.image))).sqrt()
        }  # 0, but not its slope

    before = [p.detach().clone() for p in model.trainable()]
    odd = replace(METHODS["wesam"], losses=losses)
    with pytest.raises(FloatingPointError):
        train(model, torch.optim.Adam(model.trainable(), 1e-3), batch, odd, config)
    assert all(torch.equal(a, b) for a, b in zip(before, model.trainable(), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_learns_from_every_kind_of_weak_label(sam: Sam, two: Domain, name: str, kind: PromptKind) -> None:
    config = method_preset("nano", name).replace({"prompt": kind, "optim.batch_size": 2, "max_instances": 3})
    method = checked_method(config)
    batch = draw(Anchor(sam, two.split("train"), kind), config, 0, method)
    model = AdaptedSam(sam, config.lora, train=config.train, teacher=config.teacher.decay > 0)
    losses = method.losses(model, batch, config)
    assert all(v.shape == batch.image.shape and v.isfinite().all() for v in losses.values())
    before = [p.detach().clone() for p in model.trainable()]
    train(model, torch.optim.Adam(model.trainable(), 1e-3), batch, method, config)
    after = model.trainable()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.isfinite().all() for p in after)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_is_searched_is_a_hyperparameter(name: str) -> None:
    assert set(METHODS[name].searched) <= Config().flat().keys()
    assert set(METHODS[name].own) <= Config().flat().keys()
    preset = method_preset("nano", name)
    assert preset.method == name
    for changes in (METHODS[name].defaults, METHODS[name].fitted.get("nano", {})):
        assert all(preset.flat()[k] == v for k, v in changes.items())
    assert method_preset("vit_b", name).lora.rank == 4  # no preset of its own: the published values


def test_the_help_says_whose_a_hyperparameter_is() -> None:
    for path in Config().flat():
        section, _, name = path.rpartition(".")
        holder = getattr(Config(), section) if section else Config()
        (doc,) = (f.metadata["doc"] for f in fields(holder) if f.name == name)
        said = [word for word in doc.partition(": ")[0].split(", ") if word in METHODS]
        assert said == [name for name, m in METHODS.items() if path in m.own], path


def test_a_method_only_looks_at_masks_if_it_says_so(sam: Sam, two: Domain) -> None:
    for name, method in METHODS.items():
        config = method_preset("nano", name)
        batch = draw(Anchor(sam, two.split("train"), "box"), config, 0, method)
        assert (batch.truth is not None) == (name == "supervised")


def test_a_wrong_method_gets_the_nearest_right_one() -> None:
    with pytest.raises(InputError, match="soft-teacher"):
        get_method("soft_teacher")


TRAINED: dict[Train, tuple[str, ...]] = {
    "norms": ("image_encoder.blocks.0.norm1.weight", "image_encoder.neck.1.bias", "mask_decoder.transformer.norm_fina"),
    "prompts": ("image_encoder.pos_embed", "image_encoder.blocks.5.norm1.bias"),
    "decoder": ("mask_decoder.iou_token.weight", "mask_decoder.transformer.layers.0.mlp.lin1.weight"),
    "encoder": ("image_encoder.patch_embed.proj.weight", "image_encoder.blocks.3.attn.qkv.weight"),
}


@pytest.mark.parametrize("what", get_args(Train))
def test_what_is_trained_is_saved_merged_and_leaves_the_anchor_alone(sam: Sam, tmp_path: Path, what: Train) -> None:
    kept = {k: v.clone() for k, v in sam.state_dict().items()}
    model = AdaptedSam(sam, LoraConfig(rank=2), train=what, teacher=True)
    assert torch.equal(logits(model.sam), logits(sam))
    shaken(model)
    moved = logits(model.sam)
    assert not torch.allclose(moved, logits(sam), atol=1e-2)
    assert torch.equal(logits(model.teacher), logits(sam))
    assert all(torch.equal(v, kept[k]) for k, v in sam.state_dict().items())
    merged = model.merged()
    assert torch.allclose(logits(merged), moved, atol=1e-3)
    changed = {k for k, v in merged.state_dict().items() if not torch.equal(v, kept[k])}
    for part, names in TRAINED.items():
        if part in what.split("+"):
            assert all(any(c.startswith(n) for c in changed) for n in names)
    model.save(tmp_path)
    loaded = AdaptedSam.load(sam, tmp_path)
    assert loaded.train == what
    assert torch.equal(logits(loaded.sam), moved)
    if what != "lora":
        with pytest.raises(InputError, match="use --merge"):
            export_peft(sam, tmp_path, tmp_path / "peft")


def test_an_adapter_that_says_it_trained_something_else_is_refused(sam: Sam, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    AdaptedSam(sam, LoraConfig(), train="norms").save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for said, message in (("decoder", "names or shapes differ"), ("all", "train"), ("lora", "differ|bytes")):
        save_file(tensors, file, {"train": said})
        with pytest.raises(InputError, match=message):
            AdaptedSam.load(sam, tmp_path)


def test_lora_on_queries_and_values_leaves_the_keys(sam: Sam, two: Domain) -> None:
    config = method_preset("nano", "wesam").replace({"lora.targets": "qv", "steps": 2, "lora.rank": 2})
    for report in adapt(sam, two, config):
        model = report.model
    matrices = [p for n, p in model._peft.named_parameters() if "lora_B" in n]
    assert len(matrices) == 6
    assert model.size == 6 * (2 * 144 + 2 * 2 * 144)  # A, and B without a third of its rows
    assert AdaptedSam(sam, LoraConfig(rank=2, targets="qkv")).size == 6 * (2 * 144 + 2 * 3 * 144)
    for b in matrices:
        q, k, v = b.detach().chunk(3)
        assert q.abs().sum() > 0
        assert v.abs().sum() > 0
        assert k.abs().sum() == 0


def test_a_run_that_trains_weights_goes_on_bit_by_bit(sam: Sam, two: Domain, tmp_path: Path) -> None:
    config = method_preset("nano", "tribe").replace({"steps": 3, "eval_every": 3})
    for report in adapt(sam, two, config):
        if report.step == 1:
            report.save(tmp_path)
    again = list(adapt(sam, two, config, resume=tmp_path))[-1].model
    pairs = zip([*report.model.trainable(), *report.model.teacher_parameters()],
                [*again.trainable(), *again.teacher_parameters()], strict=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


def test_entropy_and_balanced_cross_entropy_by_hand() -> None:
    logit = math.log(3.0)  # a probability of 3/4
    values = torch.tensor([[[0.0, logit], [0.0, -logit]]])
    high, low = math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert torch.allclose(L.entropy(values), torch.tensor([(high + low) / 2]))
    target = torch.tensor([[[False, True], [False, False]]])
    background = (math.log(2) * 2 - math.log(0.75)) / 3
    assert torch.allclose(L.balanced(values, target), torch.tensor([0.5 * (background - math.log(0.75))]))
    none = L.balanced(values, torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2))
    assert none.tolist() == [0.0]


def test_clicks_are_looked_up_where_they_are() -> None:
    logits = torch.full((1, 8, 8), -4.0)
    logits[0, 2, 5] = 4.0  # the cell of y 4..6, x 10..12 at a stride of 2
    on, off = torch.tensor([11.0, 5.0]), torch.tensor([3.0, 11.0])
    right = L.at_clicks(logits, torch.stack([on, off])[None], torch.tensor([[1, 0]]), 2.0)
    wrong = L.at_clicks(logits, torch.stack([on, off])[None], torch.tensor([[0, 1]]), 2.0)
    only = L.at_clicks(logits, torch.stack([on, off])[None], torch.tensor([[1, -1]]), 2.0)
    sure = float(F.softplus(torch.tensor(-4.0)))
    assert torch.allclose(right, torch.tensor([sure]))
    assert torch.allclose(wrong, torch.tensor([sure + 4]))
    assert torch.allclose(only, torch.tensor([sure / 2]))


def test_what_two_prompts_claim_belongs_to_the_surer_one() -> None:
    logits = torch.tensor([[[1.0, 3.0, -1.0]], [[2.0, 1.0, -2.0]], [[5.0, 5.0, -1.0]]])
    masks = exclusive(logits, [2, 1])  # the third lies in another image
    assert masks[:, 0].tolist() == [[False, True, False], [True, False, False], [True, True, False]]


@pytest.mark.parametrize("box", [(6.0, 8.0, 19.0, 25.0), (5.0, 9.0, 10.0, 15.0)])
def test_a_mask_fits_its_box_to_a_pixel_though_its_cells_are_coarser(box: tuple[float, ...]) -> None:
    given = Prompts(boxes=torch.tensor([box]))
    logits = torch.zeros(1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        against_label(logits, given, 4).sum().backward()
        optimizer.step()
    masks = in_pixels(logits.detach(), 32) > 0
    assert masks.shape == (1, 32, 32)
    assert (tight_boxes(masks) - given.boxes).abs().max() <= 1
    share = covered(masks, 4)
    assert share.sum() * 16 == masks.sum()
    assert ((share > 0) & (share < 1)).any(), "the edge lies within a cell"


def test_cells_get_the_label_of_the_nearer_prototype() -> None:
    features = torch.tensor([1.0, 0.0])[:, None, None].repeat(1, 4, 4)
    features[:, :, 2:] = torch.tensor([0.0, 1.0])[:, None, None]  # the right half is another thing
    logits = torch.full((1, 8, 8), -3.0)
    logits[:, :, 5:] = 3.0  # a mask that misses some of it
    found = nearest_prototype(features[None], logits, torch.ones(1, 8, 8), torch.tensor([0]))
    assert torch.equal(found[0, 0], torch.tensor([False] * 4 + [True] * 4))


def test_neighbours_outvote_a_cell_that_is_alone() -> None:
    features = torch.tensor([1.0, 0.0])[:, None, None].repeat(1, 4, 4)
    probability = torch.full((1, 8, 8), 0.9)
    probability[0, :2, :2] = 0.4
    found = voted(features[None], probability, torch.tensor([0]), 16)
    assert (found > 0.5).all()
    assert torch.equal(voted(features[None], probability, torch.tensor([0]), 16)[0, 4:], found[0, 4:])


def batch_of(prompts: Prompts, cells: int = 8, stride: float = 2.0) -> Batch:
    n = len(prompts)
    masks = torch.zeros(n, cells, cells, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    image = torch.zeros(n, dtype=torch.long)
    return Batch([], [], [prompts], [prompts], image, masks, torch.eye(n, 3), None, stride)


def test_weak_labels_correct_pseudo_labels() -> None:
    everything = torch.ones(1, 8, 8, dtype=torch.bool)
    boxed = corrected(everything, batch_of(Prompts(boxes=torch.tensor([[4.0, 4.0, 8.0, 16.0]]))))
    assert boxed[0].nonzero().amin(0).tolist() == [2, 2]
    assert boxed[0].nonzero().amax(0).tolist() == [7, 3]
    points = torch.tensor([[[13.0, 13.0], [3.0, 3.0]]])
    clicked = Prompts(points=points, point_labels=torch.tensor([[1, 0]]))
    assert not corrected(everything, batch_of(clicked))[0, 1, 1]
    assert corrected(everything, batch_of(clicked))[0, 7, 1]
    assert corrected(~everything, batch_of(clicked))[0, 6, 6]
    drawn = Prompts(polygons=(torch.tensor([[8.0, 8.0], [12.0, 8.0], [12.0, 12.0], [8.0, 12.0]]),))
    near = corrected(everything, batch_of(drawn))
    assert near[0, 4, 4]
    assert not near[0, 0, 0]


def test_features_are_drawn_to_their_own_prototype() -> None:
    prompts = Prompts(boxes=torch.tensor([[0.0, 0.0, 8.0, 16.0], [8.0, 0.0, 16.0, 16.0]]))
    batch = batch_of(prompts)
    left = torch.zeros(2, 8, 8, dtype=torch.bool)
    left[0, :, :2], left[1, :, 4:6] = True, True
    beside = torch.zeros_like(left)
    beside[0, :, 2:4], beside[1, :, 6:] = True, True
    good = torch.zeros(1, 3, 4, 4)
    good[0, 0, :, 0], good[0, 1, :, 2], good[0, 2, :, 1], good[0, 2, :, 3] = 1, 1, 1, 1
    bad = good[:, [1, 0, 2]]  # each has the other's feature
    losses = [to_prototypes(f, left, beside, batch, 0.3) for f in (good, bad)]
    assert (losses[0] < 0.1).all()
    assert (losses[1] > 3).all()
    empty = to_prototypes(good, torch.zeros_like(left), beside, batch, 0.3)
    assert empty.tolist() == [0.0, 0.0]
    alone = to_prototypes(good, left[:1], beside[:1], batch_of(prompts[torch.tensor([0])]), 0.3)
    batch.anchor_features[1] = 0  # of the second the anchor finds nothing: it is nobody's negative
    assert torch.allclose(to_prototypes(good, left, beside, batch, 0.3), torch.tensor([float(alone), 0.0]))


@pytest.mark.parametrize(
    ("method", "has"),
    [
        ("tent", {"train": "norms"}),
        ("dept", {"train": "prompts", "teacher.decay": 0.97}),
        ("soft-teacher", {"teacher.decay": 0.97}),
        ("wesam+", {"loss.anchor": 0.1}),
        ("wesam", {}),
    ],
)
def test_a_method_is_itself_with_whatever_preset_or_file_it_begins(
    method: str, has: dict[str, Value], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lora.rank": 6}))
    wanted = {"method": method, **get_method(method).defaults, **has}
    for preset, config, rank in (("paper", None, 4), (None, file, 6)):
        found = _start(Namespace(preset=preset, config=config, model="nano", method=method)).flat()
        assert {k: found[k] for k in wanted} == wanted
        assert found["lora.rank"] == rank
        assert found["optim.lr"] == wanted.get("optim.lr", 1e-4)
