"""Adapters for transformers: SamModel and PEFT themselves give the masks that wesam gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from transformers import SamModel, SamProcessor

from wesam import AdaptedSam, InputError, Prompts
from wesam.config import LoraConfig
from wesam.export import BASE, export_peft, renamed
from wesam.sam import load_sam, random_sam
from wesam.sam.attention import fuse
from wesam.sam.nano import Shape, build_nano
from wesam.sam.promptable import decode, encode

BOXES = Prompts(boxes=torch.tensor([[20.0, 30.5, 80.0, 70.0], [5.0, 5.0, 60.25, 100.0]]))
POINTS = Prompts(
    points=torch.tensor([[[40.5, 50.5], [90.0, 20.0]], [[10.0, 64.5], [20.5, 20.5]]]),
    point_labels=torch.tensor([[1, 0], [1, 1]]),
)


def with_relative_positions() -> Sam:
    """SAM's ViT-B, but small: 128 px, windows that do not divide the grid of 8 x 8 tokens."""
    torch.manual_seed(0)
    sam = build_nano(Shape(side=128, patch=16, width=48, depth=4, heads=3, channels=32))
    sam.image_encoder = ImageEncoderViT(
        img_size=128, patch_size=16, embed_dim=48, depth=4, num_heads=3, mlp_ratio=4, out_chans=32, use_rel_pos=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), window_size=5, global_attn_indexes=(1, 3),
    )  # fmt: skip
    with torch.no_grad():
        for module in sam.modules():
            if isinstance(module, Attention):
                module.rel_pos_h.normal_(std=0.5)
                module.rel_pos_w.normal_(std=0.5)
        sam.image_encoder.pos_embed.normal_()
    sam.name_or_path = "vit_b-small"
    return fuse(sam).eval().requires_grad_(False)


def adapted(sam: Sam, folder: Path, targets: str) -> AdaptedSam:
    """An adapter that changes something, written to the folder."""
    model = AdaptedSam(sam, LoraConfig(rank=2, targets=targets))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.trainable():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    model.save(folder)
    return model


def given(prompts: Prompts) -> dict[str, Tensor]:
    """Prompts in the frame of the resized image, as SamModel wants them."""
    if prompts.boxes is not None:
        return {"input_boxes": prompts.boxes[None] - 0.5}
    assert prompts.points is not None
    assert prompts.point_labels is not None
    return {"input_points": prompts.points[None] - 0.5, "input_labels": prompts.point_labels[None]}


@pytest.mark.parametrize("targets", ["qkv", "encoder+decoder"])
@pytest.mark.parametrize("kind", ["nano", "relative positions"])
def test_transformers_and_peft_give_the_same_logits(kind: str, targets: str, tmp_path: Path) -> None:
    sam = load_sam("nano") if kind == "nano" else with_relative_positions()
    side = sam.image_encoder.img_size
    model = adapted(sam, tmp_path / "adapter", targets)
    base = export_peft(sam, tmp_path / "adapter", tmp_path / "peft")
    assert base == str(tmp_path / "peft" / BASE)
    plain = SamModel.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    torch.manual_seed(2)
    image = torch.randint(0, 256, (3, side * 3 // 4, side), dtype=torch.uint8)
    pixels = torch.nn.functional.pad((image - sam.pixel_mean) / sam.pixel_std, (0, 0, 0, side - image.shape[1]))[None]
    with torch.no_grad():
        for prompts in (BOXES, POINTS):
            ours = decode(model.sam, encode(model.sam, [image]), [prompts])
            out = theirs(pixel_values=pixels, multimask_output=False, **given(prompts))
            scale = max(1.0, float(ours.logits.abs().max()))
            assert (out.pred_masks[0, :, 0] - ours.logits).abs().max() < 1e-4 * scale
            assert (out.iou_scores[0, :, 0] - ours.iou).abs().max() < 1e-4
            source = decode(sam, encode(sam, [image]), [prompts])
            assert (source.logits - ours.logits).abs().max() > 0.01 * scale, "the adapter changes something"


def test_the_written_processor_prepares_images_as_the_model_wants_them(sam: Sam, tmp_path: Path) -> None:
    adapted(sam, tmp_path / "adapter", "qkv")
    base = export_peft(sam, tmp_path / "adapter", tmp_path / "peft")
    image = torch.randint(0, 256, (3, 144, 192), dtype=torch.uint8)
    found = SamProcessor.from_pretrained(base)(image, input_boxes=[[[20, 30, 80, 70]]], return_tensors="pt")
    wanted = torch.nn.functional.pad((image - sam.pixel_mean) / sam.pixel_std, (0, 0, 0, 48))
    assert torch.allclose(found["pixel_values"][0], wanted, atol=1e-4)
    assert found["input_boxes"].tolist() == [[[20, 30, 80, 70]]]


def test_published_models_are_named_as_on_the_hub_and_written_only_when_asked_for(tmp_path: Path) -> None:
    sam = with_relative_positions()
    sam.name_or_path = "vit_b"
    adapted(sam, tmp_path / "adapter", "attention")
    assert export_peft(sam, tmp_path / "adapter", tmp_path / "peft") == "facebook/sam-vit-base"
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "facebook/sam-vit-base"
    assert not (tmp_path / "peft" / BASE).exists()
    assert export_peft(sam, tmp_path / "adapter", tmp_path / "peft", base=True) == str(tmp_path / "peft" / BASE)
    assert (tmp_path / "peft" / BASE / "model.safetensors").is_file()


def test_every_tensor_of_the_published_model_has_its_place() -> None:
    with torch.device("meta"):
        from wesam.export import transformers_config
        from wesam.sam import REGISTRY

        sam = REGISTRY["vit_b"].build()
        theirs = SamModel(transformers_config(sam)).state_dict()
    ours = {renamed(k): v.shape for k, v in sam.state_dict().items()}
    shared = "shared_image_embedding.positional_embedding"
    assert {**ours, shared: theirs[shared].shape} == {k: v.shape for k, v in theirs.items()}


def test_what_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    sam = random_sam("vit_t")
    adapted(sam, tmp_path / "adapter", "qkv")
    with pytest.raises(InputError, match="transformers has no vit_t"):
        export_peft(sam, tmp_path / "adapter", tmp_path / "peft")


def test_an_adapter_of_ours_is_not_overwritten_by_one_for_transformers(sam: Sam, tmp_path: Path) -> None:
    for name in ("adapter", "other"):
        adapted(sam, tmp_path / name, "qkv")
    for name in ("adapter", "other"):
        with pytest.raises(InputError, match=f"{name} holds an adapter of wesam's, which would be overwritten"):
            export_peft(sam, tmp_path / "adapter", tmp_path / name)
        AdaptedSam.load(sam, tmp_path / name)
