"""WeSAM with all that the weak labels say: ours.

What is added to WeSAM, none of it from more labels than WeSAM has:

- the weak label itself teaches the student (``loss.label``): with boxes the tightness of the mask in its box (row and
  column maxima, after BoxInst, Tian et al., CVPR 2021), with clicks the cross-entropy at them, with coarse masks dice
  against the polygon;
- pseudo labels never contradict the weak labels: they are cut to the box, and a place that several prompts of an image
  claim belongs to the one whose teacher is surest of it (not with a grid's clicks, of which several may be on a thing);
- both are taken in the pixels that the model sees, not in the four times coarser cells of its masks, in which the edge
  of a small object would be moved by up to a cell: targets are the share of each cell that is covered;
- a weak anchor, since the weak label now holds the student.

Tried with boxes and left out, since they did not win on val of both camouflaged and corrupted scenes: an averaged
teacher, the decoder's LoRA, for each pseudo label the level at which it fits its box best, that neighbouring cells of
one colour belong together (BoxInst's other loss), and of SAM's four outputs the one that fits its box best: as pseudo
label it is learnt twice as fast, until masks fill their boxes; as the anchor's mask it helps on one domain of six.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method
from wesam.methods.wesam import SEARCHED, self_training
from wesam.prompts import Prompts
from wesam.sam.promptable import in_pixels


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The losses of WeSAM on such pseudo labels, and that against the weak label, each [N]."""
    given, stride = Prompts.concatenate(batch.prompts), int(batch.stride)

    def beside(student: Tensor) -> dict[str, Tensor]:
        return {"label": config.loss.label * against_label(student, given, stride)} if config.loss.label else {}

    def pseudo_labels(teacher: Tensor) -> Tensor:
        seen = in_pixels(teacher, stride * teacher.shape[-1])
        found = seen > 0 if config.prompt == "grid" else exclusive(seen, [len(p) for p in batch.prompts])
        if given.boxes is not None:
            found &= box_pixels(given.boxes, seen)
        return covered(found, stride)

    return self_training(model, batch, config, pseudo_labels, beside)


def against_label(logits: Tensor, given: Prompts, stride: int) -> Tensor:
    """How badly masks, logits [N, m, m], fit the weak labels that they answer, [N]; stride: pixels per cell."""
    if given.boxes is not None:
        seen = in_pixels(logits, stride * logits.shape[-1])
        return L.tightness(seen, box_pixels(given.boxes, seen))
    if given.polygons is not None:
        return L.dice(logits, given.covered(logits.shape[-1], stride).to(logits.device))
    assert given.points is not None
    assert given.point_labels is not None
    return L.at_clicks(logits, given.points.to(logits.device), given.point_labels.to(logits.device), stride)


def box_pixels(boxes: Tensor, like: Tensor) -> Tensor:
    """The pixels that boxes [N, 4] touch, bool, of the shape of ``like``, [N, S, S]."""
    return L.box_masks(boxes.to(like.device), like.shape[-1], 1.0)


def covered(masks: Tensor, stride: int) -> Tensor:
    """The share of each cell that is covered: bool [N, stride * m, stride * m] -> [N, m, m] in 0..1."""
    return F.avg_pool2d(masks[:, None].float(), stride)[:, 0]


def exclusive(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Masks, bool [N, S, S], from logits [N, S, S]: what several prompts of an image claim has the surest of them.

    counts: how many of the N prompts each image has, in order.
    """
    surest = [part == part.amax(0) for part in logits.split(list(counts)) if len(part)]
    return (logits > 0) & torch.cat(surest)


METHOD = Method(
    losses,
    "WeSAM with the weak label as a loss and pseudo labels that do not contradict it (ours)",
    (*SEARCHED, "loss.label"),
    own=("loss.label",),
    defaults={"loss.anchor": 0.1},
    bolder={"lora.targets": "encoder+decoder", "optim.lr": 2e-3, "teacher.decay": 0.97},
)
