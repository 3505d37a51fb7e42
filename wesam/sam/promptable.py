"""SAM's three parts as two functions: images to embeddings, embeddings and prompts to masks.

Unlike ``segment_anything.Sam.forward``, the prompts of all images of a batch are decoded at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from wesam.prompts import Prompts

CHUNK = 64
"""Prompts of an image decoded at once, where no gradient is wanted."""


@dataclass(frozen=True)
class Masks:
    """The masks predicted for N prompts."""

    logits: Tensor
    """[N, m, m] float in SAM's low-resolution frame: m cells span the padded square input; > 0 is foreground."""
    iou: Tensor
    """[N] float: the quality that the IoU head predicts."""


def resize(image: Tensor, side: int) -> Tensor:
    """The image, uint8 [3, H, W], resized so that its longer side has ``side`` pixels, as SAM wants it.

    The other side is rounded as SAM does it, half a pixel up; what SAM's own code resizes to nothing has one.
    """
    h, w = image.shape[-2:]
    factor = side / max(h, w)
    if factor == 1:
        return image
    size = (max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5)))
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return small[0].round().clamp(0, 255).to(torch.uint8)


def encode(sam: Sam, images: list[Tensor]) -> Tensor:
    """Embeddings, float [B, C, g, g], of images, each uint8 [3, h, w] with its longer side at the input size."""
    side = sam.image_encoder.img_size
    mean, std = sam.pixel_mean, sam.pixel_std
    padded = [F.pad((x.to(mean.device) - mean) / std, (0, side - x.shape[2], 0, side - x.shape[1])) for x in images]
    with record_function("wesam.encode"):
        out: Tensor = sam.image_encoder(torch.stack(padded))
        return out.float()


def decode(sam: Sam, embeddings: Tensor, prompts: list[Prompts]) -> Masks:
    """The masks of all prompts of a batch, in order.

    embeddings: [B, C, g, g]. prompts: one entry per image, in the frame of the resized image. One mask a prompt:
    the first output token, as SAM gives with ``multimask_output=False``.
    """
    with record_function("wesam.decode"):
        logits, iou = decode_outputs(sam, embeddings, prompts, 1)
        return Masks(logits[:, 0].float(), iou[:, 0].float())


def decode_outputs(sam: Sam, embeddings: Tensor, prompts: list[Prompts], count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` of SAM's four outputs for each prompt: logits [N, count, m, m] and predicted IoU [N, count].

    The first output is for prompts that leave no doubt, the other three are for those that do, as a single click.
    embeddings, prompts: as :func:`decode` has them. SAM attends to what is no click, too, of which it adds one itself:
    those that make lists of clicks equally long are left out, or an answer would hang on what is asked beside it.
    """
    image = torch.tensor([i for i, p in enumerate(prompts) for _ in range(len(p))], dtype=torch.long)
    groups = Prompts.concatenate(prompts).alike()
    found = [_decoded(sam, embeddings, image[at], given, count) for at, given in groups]
    if len(found) == 1:
        return found[0]
    order = torch.cat([at for at, _ in groups]).argsort().to(embeddings.device)
    logits, iou = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    return logits, iou


def _decoded(sam: Sam, embeddings: Tensor, image: Tensor, prompts: Prompts, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`decode_outputs`, of prompts with equally many clicks; image: int [N], whose embedding each is for."""
    image = image.to(embeddings.device)
    sparse, dense = _embed(sam, prompts, embeddings.device)
    decoder = sam.mask_decoder
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(image), -1, -1), sparse], 1)
    # channels last: the transformer's tokens are then contiguous, which halves its time on a CPU
    last = {"memory_format": torch.channels_last}
    source = (embeddings[image] + dense).contiguous(**last)
    position = sam.prompt_encoder.get_dense_pe().contiguous(**last)
    hidden, source = decoder.transformer(source, position, tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, embeddings.shape[2:]))
    networks = decoder.output_hypernetworks_mlps[:count]
    weights = torch.stack([network(hidden[:, 1 + i]) for i, network in enumerate(networks)], 1)
    logits = torch.einsum("nkc,nchw->nkhw", weights, upscaled)
    return logits, decoder.iou_prediction_head(hidden[:, 0])[:, :count]


def _embed(sam: Sam, prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    encoder = sam.prompt_encoder
    points = boxes = masks = None
    if prompts.points is not None and prompts.point_labels is not None:
        points = (prompts.points.to(device) - 0.5, prompts.point_labels.to(device))  # SAM adds the half pixel itself
    elif prompts.boxes is not None:
        boxes = prompts.boxes.to(device) - 0.5
    else:
        size = encoder.mask_input_size[0]
        masks = prompts.mask_input(size, sam.image_encoder.img_size / size).to(device)
    sparse, dense = encoder(points=points, boxes=boxes, masks=masks)
    return sparse, dense


def upscale(logits: Tensor, side: int, resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Low-resolution logits [N, m, m] as logits at the image's own size, [N, H, W].

    side: the model's input size. resized: the image's (height, width) at that input size. size: its own (H, W).
    """
    full = in_pixels(logits, side)[:, None, : resized[0], : resized[1]]
    return F.interpolate(full, size, mode="bilinear", align_corners=False)[:, 0]


def in_pixels(logits: Tensor, side: int) -> Tensor:
    """Low-resolution logits [N, m, m] in the pixels of the model's input, [N, side, side]."""
    return F.interpolate(logits[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
