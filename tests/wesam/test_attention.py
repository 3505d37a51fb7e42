"""Our attention against segment_anything's own, which is written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

import wesam.sam.attention
from wesam.adapters import AdaptedSam
from wesam.config import ComputeConfig, LoraConfig
from wesam.prompts import Prompts
from wesam.sam.attention import Attention, _by_kernel, _in_parts, fuse
from wesam.sam.promptable import decode, encode
from wesam.sam.tiny import build_tiny


def small_vit() -> Sam:
    """A SAM as the published ones, with relative positions and windows that do not divide the grid, but small."""
    torch.manual_seed(0)
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=160, patch_size=16, embed_dim=48, depth=3, num_heads=3,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=4,
            global_attn_indexes=(2,), out_chans=32,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(10, 10), input_image_size=(160, 160), mask_in_chans=4
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4),
            transformer_dim=32,
        ),
    )  # fmt: skip
    for name, p in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(p, 0, 0.3)
    return sam.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wesam.sam.attention, "SCORES", 700)


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 160, 120), (3, 100, 160))]


PROMPTS = {
    "box": [
        Prompts(boxes=torch.tensor([[10.0, 20, 90, 100], [0, 0, 50, 40]])),
        Prompts(boxes=torch.tensor([[5.0, 5, 60, 70]])),
    ],
    "point": [
        Prompts(points=torch.tensor([[[30.0, 40], [80, 90]]]), point_labels=torch.tensor([[1, 0]])),
        Prompts(points=torch.tensor([[[60.0, 60], [10, 90]]]), point_labels=torch.tensor([[1, 1]])),
    ],
    "coarse": [Prompts(polygons=[torch.tensor([[10.0, 10], [80, 20], [50, 90]])])] * 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_masks_equal_those_of_segment_anything(kind: str) -> None:
    theirs = small_vit()
    ours = fuse(copy.deepcopy(theirs))
    assert sum(type(m) is Attention for m in ours.modules()) == 3
    with torch.no_grad():
        embeddings = [encode(sam, images()) for sam in (theirs, ours)]
        masks = [decode(sam, e, PROMPTS[kind]) for sam, e in zip((theirs, ours), embeddings, strict=True)]
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-4
    assert (masks[0].logits - masks[1].logits).abs().max() < 1e-4
    assert (masks[0].iou - masks[1].iou).abs().max() < 1e-4


@pytest.mark.slow
def test_vit_b_at_its_own_size_equals_segment_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    theirs = sam_model_registry["vit_b"]().eval().requires_grad_(False)
    for name, p in theirs.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    image = torch.randint(0, 256, (3, 1024, 700), dtype=torch.uint8)
    with torch.no_grad():
        wanted = encode(theirs, [image])
        wanted_masks = [decode(theirs, wanted, PROMPTS[kind][:1]).logits for kind in PROMPTS]
        fuse(theirs)
        found = encode(theirs, [image])
        masks = [decode(theirs, found, PROMPTS[kind][:1]).logits for kind in PROMPTS]
    assert (found - wanted).abs().max() < 1e-4
    for a, b in zip(masks, wanted_masks, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_embeddings_in_half_precision() -> None:
    theirs = small_vit()
    ours = fuse(copy.deepcopy(theirs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = encode(ours, images()).float(), encode(theirs, images()).float()
    with torch.no_grad():
        exact = encode(theirs, images())
    # no further from the exact ones than segment_anything's own in half precision
    assert (found - exact).abs().mean() < 1.2 * (wanted - exact).abs().mean()
    assert (found - wanted).abs().mean() < 2e-2


def test_gradients_of_lora_equal_those_of_segment_anything() -> None:
    theirs = small_vit()
    gradients = []
    for sam in (theirs, fuse(copy.deepcopy(theirs))):
        model = AdaptedSam(sam, LoraConfig(targets="encoder", rank=4))
        for i, p in enumerate(model.trainable()):
            torch.nn.init.normal_(p, 0, 0.2, generator=torch.Generator().manual_seed(i))
        decode(model.sam, encode(model.sam, images()), PROMPTS["box"]).logits.square().mean().backward()
        gradients.append([p.grad for p in model.trainable()])
    assert len(gradients[0]) == 24
    for wanted, found in zip(*gradients, strict=True):
        assert wanted is not None
        assert found is not None
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("build", [small_vit, lambda: build_tiny(64).eval().requires_grad_(False)], ids=["vit", "tiny"])
def test_checkpointing_changes_no_gradient(build: Callable[[], Sam]) -> None:
    torch.manual_seed(0)
    sam = build()
    image = torch.randint(0, 256, (3, sam.image_encoder.img_size, 50), dtype=torch.uint8)
    gradients, kept = [], []
    for on in (False, True):
        model = AdaptedSam(sam, LoraConfig(targets="encoder"), compute=ComputeConfig(checkpointing=on))
        for i, p in enumerate(model.trainable()):
            torch.nn.init.normal_(p, 0, 0.1, generator=torch.Generator().manual_seed(i))
        count = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = encode(model.sam, [image]).square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.trainable()])
        kept.append(count)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.allclose(plain, checkpointed)
    assert kept[1] < kept[0] / 2


def test_steps_in_half_precision_differ_by_rounding_only(sam: Sam) -> None:
    model = AdaptedSam(sam, LoraConfig(), compute=ComputeConfig(precision="bf16"))
    image = torch.randint(0, 256, (3, 192, 192), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    boxes = [Prompts(boxes=torch.tensor([[20.0, 30, 90, 120]]))]
    with torch.no_grad():
        exact = decode(model.sam, encode(model.sam, [image]), boxes)
        with model.autocast():
            rounded = decode(model.sam, encode(model.sam, [image]), boxes)
    assert rounded.logits.dtype == torch.float32
    assert not torch.equal(rounded.logits, exact.logits)
    assert ((rounded.logits > 0) != (exact.logits > 0)).float().mean() < 0.01


@pytest.mark.parametrize("attend", [_in_parts, _by_kernel])
def test_attention_on_a_grid_that_is_not_square(attend: object) -> None:
    torch.manual_seed(0)
    b, heads, h, w, c = 2, 3, 4, 6, 8
    given = [torch.randn(b, heads, h * w, d, dtype=torch.float64, requires_grad=True) for d in (c, c, c, h, w)]
    q, k, v, rows, columns = given
    scores = 0.3 * q @ k.mT + (rows[..., :, None] + columns[..., None, :]).flatten(3)
    wanted = scores.softmax(3) @ v
    gradients = torch.autograd.grad(wanted.sin().sum(), given)
    found = attend(q, k, v, rows, columns, 0.3)  # type: ignore[operator]
    assert torch.allclose(found, wanted)
    for a, b_ in zip(torch.autograd.grad(found.sin().sum(), given), gradients, strict=True):
        assert torch.allclose(a, b_)
