"""WeSAM with all that the weak labels say: ours.

What is added to WeSAM, none of it from more labels than WeSAM has:

- the weak label itself teaches the student (``loss.label``): with boxes the tightness of the mask in its box (row and
  column maxima, after BoxInst, Tian et al., CVPR 2021), with clicks the cross-entropy at them, with coarse masks dice
  against the polygon;
- pseudo labels never contradict the weak labels: they are cut to the box, and a place that several prompts of an image
  claim belongs to the one whose teacher is surest of it (not with a grid's clicks, of which several may be on a thing);
- a weak anchor, since the weak label now holds the student.

Tried with boxes and left out, since they did not win on val of both camouflaged and corrupted scenes: an averaged
teacher, the decoder's LoRA, for each pseudo label the level at which it fits its box best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wesam import losses as L
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.methods.base import Batch, Method, given_boxes
from wesam.methods.wesam import SEARCHED, self_training
from wesam.prompts import Prompts


def losses(model: AdaptedSam, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The losses of WeSAM on such pseudo labels, and that against the weak label, each [N]."""
    given = Prompts.concatenate(batch.prompts)

    def beside(student: Tensor) -> dict[str, Tensor]:
        return {"label": config.loss.label * against_label(student, given, batch)} if config.loss.label else {}

    def pseudo_labels(teacher: Tensor) -> Tensor:
        found = teacher > 0 if config.prompt == "grid" else exclusive(teacher, batch.image)
        return found if given.boxes is None else found & given_boxes(batch)

    return self_training(model, batch, config, pseudo_labels, beside)


def against_label(logits: Tensor, given: Prompts, batch: Batch) -> Tensor:
    """How badly masks, logits [N, m, m], fit the weak labels that they answer, [N]."""
    if given.boxes is not None:
        return L.tightness(logits, given_boxes(batch))
    if given.polygons is not None:
        filled = given.mask_input(logits.shape[-1], batch.stride)[:, 0] > 0
        return L.dice(logits, filled.to(logits.device))
    assert given.points is not None
    assert given.point_labels is not None
    return L.at_clicks(logits, given.points.to(logits.device), given.point_labels.to(logits.device), batch.stride)


def exclusive(logits: Tensor, image: Tensor) -> Tensor:
    """Masks, bool [N, m, m], from logits [N, m, m]: what several prompts of an image claim has the surest of them."""
    out = torch.zeros_like(logits, dtype=torch.bool)
    for i in image.unique():
        of = image == i
        out[of] = (logits[of] > 0) & (logits[of] == logits[of].amax(0))
    return out


METHOD = Method(
    losses,
    "WeSAM with the weak label as a loss and pseudo labels that do not contradict it (ours)",
    (*SEARCHED, "loss.label"),
    own=("loss.label",),
    defaults={"loss.anchor": 0.1},
    bolder={"lora.targets": "encoder+decoder", "optim.lr": 2e-3, "teacher.decay": 0.97},
)
