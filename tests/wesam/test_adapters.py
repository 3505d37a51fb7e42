from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from wesam.adapters import AdaptedSam
from wesam.config import LoraConfig, Targets
from wesam.data import load_domain
from wesam.errors import InputError
from wesam.prompts import weak_labels
from wesam.sam import load_sam, random_sam, write_weights
from wesam.sam.promptable import decode, encode


def logits(model: Sam) -> torch.Tensor:
    sample = load_domain("clean").split("val")[0]
    with torch.no_grad():
        return decode(model, encode(model, [sample.image]), [weak_labels(sample.masks, "box", sample.key)]).logits


def shaken(model: AdaptedSam) -> AdaptedSam:
    """With matrices that change something, as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.trainable():
            p.normal_(0, 0.05)
    return model


@pytest.mark.parametrize("targets", ["qkv", "attention", "encoder", "encoder+decoder"])
def test_lora_at_start_changes_nothing(sam: Sam, targets: Targets) -> None:
    model = AdaptedSam(sam, LoraConfig(targets=targets))
    assert torch.equal(logits(model.sam), logits(sam))
    assert sum(p.numel() for p in model.trainable()) < 0.1 * sum(p.numel() for p in sam.parameters())


def test_wider_targets_train_more(sam: Sam) -> None:
    sizes = [len(AdaptedSam(sam, LoraConfig(targets=t)).trainable()) for t in ("qkv", "attention", "encoder")]
    assert sizes == [2 * 6, 4 * 6, 8 * 6]  # two matrices for 1, 2, 4 weights in each of six blocks
    assert len(AdaptedSam(sam, LoraConfig(targets="encoder+decoder")).trainable()) > sizes[-1]


@pytest.mark.parametrize("targets", ["qkv", "encoder+decoder"])
def test_merged_equals_unmerged(sam: Sam, targets: Targets) -> None:
    model = shaken(AdaptedSam(sam, LoraConfig(rank=8, alpha_ratio=2.0, targets=targets)))
    assert not torch.allclose(logits(model.sam), logits(sam), atol=1e-2)
    assert torch.allclose(logits(model.merged()), logits(model.sam), atol=1e-3)


@pytest.mark.slow
def test_merged_weights_are_loaded_by_segment_anything_itself(tmp_path: Path) -> None:
    model = shaken(AdaptedSam(random_sam("vit_b"), LoraConfig()))
    merged = model.merged()
    write_weights(merged, tmp_path / "merged.pth")
    theirs = sam_model_registry["vit_b"](checkpoint=str(tmp_path / "merged.pth")).eval()
    image = load_domain("clean").split("val")[0].image
    view = torch.nn.functional.interpolate(image[None].float(), (1024, 1024), mode="bilinear")[0]
    with torch.no_grad():
        ours, original = (m.image_encoder(m.preprocess(view)[None]) for m in (model.sam, theirs))
    assert torch.allclose(ours, original, atol=1e-3)
    assert not torch.allclose(ours, model.anchor.image_encoder(model.anchor.preprocess(view)[None]), atol=1e-2)


def test_weights_are_written_in_two_forms(sam: Sam, tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        write_weights(sam, tmp_path / name)
        assert torch.equal(logits(load_sam(str(tmp_path / name))), logits(sam))
    with pytest.raises(InputError, match=r"as \.pth or \.safetensors"):
        write_weights(sam, tmp_path / "w.bin")
    with pytest.raises(InputError, match="cannot write"):
        write_weights(sam, tmp_path / "none" / "w.pth")


def test_one_base_in_memory(sam: Sam) -> None:
    model = AdaptedSam(sam, LoraConfig(), teacher=True)
    base = {p.data_ptr() for p in sam.parameters()}
    for view in (model.sam, model.teacher):
        frozen = [p for n, p in view.named_parameters() if "lora_" not in n]
        assert {p.data_ptr() for p in frozen} == base
        assert not any(p.requires_grad for p in frozen)
    assert model.anchor is sam
    assert all(p.requires_grad for p in model.trainable())


def test_teacher_is_the_student_or_lags_behind(sam: Sam) -> None:
    assert AdaptedSam(sam, LoraConfig()).teacher is not None
    shared = AdaptedSam(sam, LoraConfig())
    assert shared.teacher is shared.sam
    model = AdaptedSam(sam, LoraConfig(), teacher=True)
    start = [p.clone() for p in model.teacher_parameters()]
    shaken(model)
    model.follow(0.99)
    for before, t, s in zip(start, model.teacher_parameters(), model.trainable(), strict=True):
        assert torch.allclose(t, 0.99 * before + 0.01 * s, atol=1e-6)
    model.follow(0.0)
    assert torch.equal(logits(model.teacher), logits(model.sam))


def test_saved_adapters_come_back_and_are_pefts(sam: Sam, tmp_path: Path) -> None:
    model = shaken(AdaptedSam(sam, LoraConfig(rank=3, targets="attention")))
    model.save(tmp_path / "a")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(logits(AdaptedSam.load(sam, tmp_path / "a").sam), logits(model.sam))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(sam), str(tmp_path / "a"))
    assert torch.equal(logits(theirs.base_model.model), logits(model.sam))


def test_unusable_adapters_are_refused_in_words(sam: Sam, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        AdaptedSam.load(sam, tmp_path)
    AdaptedSam(sam, LoraConfig()).save(tmp_path)
    config = tmp_path / "adapter_config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "base_model_name_or_path": "vit_b"}))
    with pytest.raises(InputError, match="for the model vit_b, not nano"):
        AdaptedSam.load(sam, tmp_path)
    config.write_text(json.dumps({**good, "r": 7}))
    with pytest.raises(InputError, match="names or shapes differ"):
        AdaptedSam.load(sam, tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match="cannot read the adapter"):
        AdaptedSam.load(sam, tmp_path)
