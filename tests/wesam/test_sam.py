from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from wesam.config import PromptKind
from wesam.data import load_domain
from wesam.evaluate import overlap, predict
from wesam.prompts import Prompts, weak_labels
from wesam.sam.promptable import decode, encode, resize, upscale


@pytest.mark.parametrize("kind", ["box", "point", "coarse"])
def test_masks_of_a_batch_equal_segment_anythings_own(sam: Sam, kind: PromptKind) -> None:
    """Several images with different numbers of prompts, decoded at once, against Sam.forward, image by image."""
    samples = [load_domain("clean").split("val")[i] for i in range(3)]
    prompts = [weak_labels(s.masks, kind, s.key) for s in samples]
    with torch.no_grad():
        ours = decode(sam, encode(sam, [s.image for s in samples]), prompts)
        theirs = []
        for s, p in zip(samples, prompts, strict=True):
            entry: dict[str, object] = {"image": s.image.float(), "original_size": s.image.shape[1:]}
            if p.boxes is not None:
                entry["boxes"] = p.boxes - 0.5
            if p.points is not None:
                entry |= {"point_coords": p.points - 0.5, "point_labels": p.point_labels}
            if p.polygons is not None:
                entry["mask_inputs"] = p.mask_input(96, 2.0)
            theirs.append(sam([entry], multimask_output=False)[0])
    assert torch.allclose(ours.logits, torch.cat([t["low_res_logits"][:, 0] for t in theirs]), atol=1e-4)
    assert torch.allclose(ours.iou, torch.cat([t["iou_predictions"][:, 0] for t in theirs]), atol=1e-5)


def test_the_answer_to_clicks_does_not_hang_on_what_is_asked_beside_them(sam: Sam) -> None:
    """Lists of clicks of different lengths, as real ones are, of one image and of two."""
    samples = [load_domain("clean").split("val")[i] for i in range(2)]
    own = [weak_labels(s.masks, f"point{n}", s.key) for s, n in zip(samples, (1, 5), strict=True)]  # type: ignore[arg-type]
    with torch.no_grad():
        seen = encode(sam, [s.image for s in samples])
        alone = [decode(sam, seen[i : i + 1], [p]) for i, p in enumerate(own)]
        both = decode(sam, seen, own)
    assert torch.allclose(both.logits, torch.cat([a.logits for a in alone]), atol=1e-4)
    assert torch.allclose(both.iou, torch.cat([a.iou for a in alone]), atol=1e-5)
    mixed = Prompts.concatenate(own)
    order = torch.randperm(len(mixed))
    with torch.no_grad():
        shuffled = decode(sam, seen[:1], [mixed[order]])
        first = decode(sam, seen[:1], [own[0]])
    assert torch.allclose(shuffled.logits[order.argsort()][: len(own[0])], first.logits, atol=1e-4)


@pytest.mark.parametrize("size", [(120, 150), (111, 128), (37, 128), (128, 37)])
def test_predict_equals_sam_predictor_on_an_image_that_is_not_square(sam: Sam, size: tuple[int, int]) -> None:
    """Padding, scaling of prompts by SAM's own code, and the way back to the image's own size."""
    sample = load_domain("clean").split("val")[1]
    image, masks = sample.image[:, : size[0], : size[1]], sample.masks[:, : size[0], : size[1]]
    masks = masks[masks.flatten(1).any(1)]
    prompts = weak_labels(masks, "box", "x")
    predictor = SamPredictor(sam)
    seen = resize(image, 192)
    assert seen.shape[1:] == predictor.transform.get_preprocess_shape(*size, 192)
    predictor.set_torch_image(seen[None].float(), size)
    boxes = predictor.transform.apply_boxes_torch(prompts.boxes, size)
    theirs, _, _ = predictor.predict_torch(None, None, boxes - 0.5, multimask_output=False)
    ours, _ = predict(sam, image, prompts)
    assert ours.shape == masks.shape
    assert (ours != theirs[:, 0]).float().mean() < 1e-4


def test_masks_survive_the_way_to_the_models_frame_and_back() -> None:
    yy, xx = torch.meshgrid(torch.arange(300), torch.arange(400), indexing="ij")
    mask = (((xx - 180) / 90.0) ** 2 + ((yy - 140) / 60.0) ** 2 < 1)[None]
    resized = (144, 192)
    small = torch.nn.functional.interpolate(mask[None].float(), resized, mode="area")[0]
    padded = torch.nn.functional.pad(small, (0, 0, 0, 48))
    low = torch.nn.functional.avg_pool2d(padded, 2)
    back = upscale(low * 2 - 1, 192, resized, (300, 400)) > 0
    assert overlap(back, mask)[0].item() > 0.98


def test_resize_puts_the_longer_side_at_the_models_size() -> None:
    image = torch.randint(0, 255, (3, 100, 50), dtype=torch.uint8)
    assert resize(image, 192).shape == (3, 192, 96)
    assert resize(image, 100) is image


def test_embedded_weights_are_small_and_frozen(sam: Sam) -> None:
    file = Path(__file__).parents[2] / "wesam" / "weights" / "nano.safetensors"
    assert file.stat().st_size <= 4_000_000
    assert not any(p.requires_grad for p in sam.parameters())
