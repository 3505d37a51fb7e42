"""mIoU and F1 per instance, averaged per image and then over images, with masks compared at the image's own size; and
a score that can be known without true masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from wesam.adapters import AdaptedSam
from wesam.config import Objective, PromptKind
from wesam.crops import cut, windows
from wesam.data.domain import Sample
from wesam.drawings import Drawing, check_drawable, draw
from wesam.errors import InputError
from wesam.prompts import Prompts, tight_boxes
from wesam.sam.promptable import CHUNK, decode, encode, resize, upscale
from wesam.views import flip

NEARLY_ALL = 0.95
"""The share of what the model was shown, from which on a mask means nothing."""

WINDOWS = 16
"""Prompts answered at once, each in its window."""


AT_ONCE = 2**26
"""Pixels of masks that are made at once, of an image however large: in fp32 a quarter of a GiB."""


@dataclass(frozen=True)
class Scores:
    """The evaluation of one split."""

    images: int
    instances: int
    miou: float | None
    """Mean over images of the mean IoU of the image's instances, 0..1; None without true masks."""
    f1: float | None
    """The same mean of F1 = 2 TP / (2 TP + FP + FN), 0..1; None without true masks."""
    label_free: float | None = None
    """The same mean of :func:`label_free`, 0..1; None where it was not asked for."""
    collapsed: float = 0.0
    """The same mean of the share of masks that hold nothing, or all that the model was shown."""

    @property
    def objective(self) -> float:
        """What an adaptation is chosen by: mIoU, or the label-free score where that is not known."""
        return self.value("auto")

    @property
    def chosen_by(self) -> str:
        """The name of ``objective``: ``miou`` or ``label_free``."""
        return self.name("auto")

    def name(self, objective: Objective) -> str:
        """The score that this objective is: ``miou``, ``f1`` or ``label_free``."""
        if objective == "auto":
            return "miou" if self.miou is not None else "label_free"
        return "label_free" if objective == "label-free" else objective

    def value(self, objective: Objective) -> float:
        """The score that this objective is; raises InputError if it is not known."""
        found: float | None = getattr(self, self.name(objective))
        if found is None:
            raise InputError(f"the {objective} of these images is not known: there are no true masks")
        return found

    def known(self) -> dict[str, float]:
        """The scores that are known, by name."""
        named = {"miou": self.miou, "f1": self.f1, "label_free": self.label_free}
        return {k: v for k, v in named.items() if v is not None}

    @classmethod
    def of(cls, per_image: Sequence[Mapping[str, Tensor]]) -> Scores:
        """From each image's scores by name, each [N]; one is known if every image has it."""

        def mean(name: str) -> float | None:
            if not all(name in each for each in per_image):
                return None
            return float(torch.stack([each[name].mean() for each in per_image]).mean())

        instances = sum(len(next(iter(each.values()))) for each in per_image)
        return cls(
            len(per_image), instances, mean("miou"), mean("f1"), mean("label_free"), mean("collapsed") or 0.0
        )  # fmt: skip


def overlap(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and F1 of masks, both bool [N, H, W] -> each [N]; a truth is never empty."""
    both, total = _area(predicted & truth), _area(predicted) + _area(truth)
    return both / (total - both), 2 * both / total


def _area(masks: Tensor) -> Tensor:
    """Pixels of each mask, bool [N, H, W] -> double [N]; for a sum PyTorch would make 64 bits of each pixel."""
    return torch.tensor([np.count_nonzero(m) for m in masks.cpu().numpy()], dtype=torch.float64)


RING = 3.0
"""The part of the image beside an object from which the clicks beside it were drawn, in areas of the object."""


LOOSER = 1.15
"""By how much the looser box of the label-free score is longer than the given one."""


def less_told(prompts: Prompts) -> tuple[Prompts, ...]:
    """What the label-free score asks a model besides, to see whether it finds what it was not told.

    With boxes those that are longer by :data:`LOOSER`, with clicks either half of them.
    """
    return (prompts.longer(LOOSER),) if prompts.boxes is not None else prompts.halves()


def label_free(masks: Tensor, prompts: Prompts, mirrored: Tensor | None = None, less: Sequence[Tensor] = ()) -> Tensor:
    """How right masks, bool [N, H, W], seem by the weak labels that they answer alone, [N], 0..1; no truth is asked.

    mirrored: the masks for the mirrored image, mirrored back. less: the masks for the prompts of :func:`less_told`.
    Both are asked for with boxes and clicks. The score is, with

    - boxes: IoU of the mask's tight box and the given one, times the same for the mask of the looser box, times IoU of
      the mask and the mirrored one. The first says nothing about what happens inside the box, and would reward masks
      that fill whatever box they are shown, which the second gives away: it asks for a box that the model was not
      told. The third alone would reward masks that hold nothing, or everything.
    - tight boxes: the mean of the same three, where the first and the third are of masks that are cut to the box, as
      they are used, and those of the looser box are whole. What the cut leaves differs little, and in a product each
      factor would add its noise to the others.
    - clicks: the IoU that they let expect, r / (1 + RING * f), where r of the clicks on the object lie in the mask and
      f of those beside it, times IoU of the mask and the mirrored one. Each click is looked for in the mask of that
      half of the clicks in which it is not: a model learns to answer those that it is told, whatever its masks are.
    - polygons: IoU of the mask and the polygon filled.
    """
    if prompts.polygons is not None:
        return overlap(masks, prompts.filled((masks.shape[1], masks.shape[2])))[0]
    if prompts.boxes is not None:
        given = prompts.boxes.double()
        parts = [_box_iou(tight_boxes(m).double(), given) for m in (masks, *less)]
        if prompts.tight:
            parts += [] if mirrored is None else [_same(masks, mirrored)]
            return torch.stack(parts).mean(0)
        score = torch.stack(parts).prod(0)
    else:
        score = _expected_by_clicks(masks, prompts, less)
    return score if mirrored is None else score * _same(masks, mirrored)


def _expected_by_clicks(masks: Tensor, prompts: Prompts, less: Sequence[Tensor]) -> Tensor:
    assert prompts.points is not None
    assert prompts.point_labels is not None
    place = prompts.points.floor().long()
    x, y = place[..., 0].clamp(0, masks.shape[2] - 1), place[..., 1].clamp(0, masks.shape[1] - 1)
    each = torch.arange(len(masks))[:, None]
    hit = masks[each, y, x]
    for half, found in zip(prompts.halves(), less, strict=False):
        assert half.point_labels is not None
        hit = torch.where(half.point_labels == prompts.point_labels, hit, found[each, y, x])
    on, beside = prompts.point_labels == 1, prompts.point_labels == 0
    recalled = (hit & on).sum(1).double() / on.sum(1).clamp(min=1)
    wrong = (hit & beside).sum(1).double() / beside.sum(1).clamp(min=1)
    return recalled / (1 + RING * wrong)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """IoU of masks, both bool [N, H, W], pair by pair -> [N]; 1 where both are empty."""
    both, either = _area(a & b), _area(a | b)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes, both [N, 4], pair by pair -> [N]; 0 where one has no area."""
    both = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    either = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    return both / either.clamp(min=1e-9)


@torch.no_grad()
def predict(
    model: Sam | AdaptedSam, image: Tensor, prompts: Prompts, *, crop: float | None = None
) -> tuple[Tensor, Tensor]:
    """The masks for the prompts of one image.

    image: uint8 [3, H, W], RGB. prompts: N of them, in pixels of this image. crop: show the model, for each prompt,
    only a square window around it, whose side is this many longer sides of what the prompt spans; 0 shows the whole
    image, None does as the model was adapted. Returns masks, bool [N, H, W], and the IoU that the model predicts for
    each, float [N]. The masks of boxes that are said to be tight are cut to them. N may be 0. Raises InputError for an
    image of another form, and for boxes that have no area.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        hint = "; of an array [H, W, 3]: torch.from_numpy(array).permute(2, 0, 1)"
        raise InputError(f"the image must be a tensor, uint8 [3, H, W], got {_form(image)}{hint}")
    if not len(prompts):
        return torch.zeros(0, *image.shape[1:], dtype=torch.bool), torch.zeros(0)
    if (boxes := prompts.boxes) is not None and not (boxes[:, 2:] > boxes[:, :2]).all():
        raise InputError("each box must be x0, y0, x1, y1, with x1 above x0 and y1 above y0")
    crop = crop_of(model, crop)
    where = windows(prompts, (image.shape[1], image.shape[2]), crop) if crop else None
    return _predict(model, image, prompts, where)


def _form(image: Any) -> str:
    """What an image is, in words."""
    return f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', []))}"


def crop_of(model: Sam | AdaptedSam, crop: float | None) -> float:
    """The crop that is asked for or, for None, the model's own."""
    return crop if crop is not None else 0.0 if isinstance(model, Sam) else model.crop


def _predict(model: Sam | AdaptedSam, image: Tensor, prompts: Prompts, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`predict` with each prompt in the window of the same place, int [N, 4]; None shows the whole image."""
    sam = model if isinstance(model, Sam) else model.sam
    masks, iou = _predict_whole(sam, image, prompts) if where is None else _predict_windows(sam, image, prompts, where)
    return _cut(masks, prompts), iou


def _cut(masks: Tensor, prompts: Prompts) -> Tensor:
    """Masks, bool [N, H, W], cut to the boxes that they answer, if these are tight."""
    return masks & prompts.filled((masks.shape[1], masks.shape[2])) if prompts.tight else masks


def _predict_whole(sam: Sam, image: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Each prompt sees the whole image, which is encoded once."""
    side: int = sam.image_encoder.img_size
    small = resize(image, side)
    given = prompts.resized(image.shape[1:], small.shape[1:])
    embedding = encode(sam, [small])
    masks = torch.empty(len(prompts), *image.shape[1:], dtype=torch.bool)
    ious = torch.empty(len(prompts))
    size = (int(image.shape[1]), int(image.shape[2]))
    for part in torch.arange(len(given)).split(CHUNK):
        out = decode(sam, embedding, [given[part]])
        ious[part] = out.iou.cpu()
        for some in torch.arange(len(part)).split(max(1, AT_ONCE // (size[0] * size[1]))):
            full = upscale(out.logits[some], side, (small.shape[1], small.shape[2]), size)
            masks[part[some]] = (full > 0).cpu()
    return masks, ious


def _predict_windows(sam: Sam, image: Tensor, prompts: Prompts, where: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is foreground outside of a prompt's window; one that prompts of a part share is encoded once."""
    side: int = sam.image_encoder.img_size
    masks = torch.zeros(len(prompts), *image.shape[1:], dtype=torch.bool)
    ious = torch.zeros(len(prompts))
    by_window = torch.unique(where, dim=0, return_inverse=True)[1].argsort(stable=True)
    for part in by_window.split(WINDOWS):
        shown, counts = torch.unique_consecutive(where[part], dim=0, return_counts=True)
        groups = part.split(counts.tolist())
        images = [cut(image, window) for window in shown]
        small = [resize(x, side) for x in images]
        given = [
            prompts[i].seen_in(window).resized(x.shape[1:], s.shape[1:])
            for i, window, x, s in zip(groups, shown, images, small, strict=True)
        ]
        out = decode(sam, encode(sam, small), given)
        for i, window, logits, *pair in zip(
            groups, shown, out.logits.split(counts.tolist()), small, images, strict=True
        ):
            sizes = [(int(x.shape[1]), int(x.shape[2])) for x in pair]
            cut(masks, window)[i] = (upscale(logits, side, *sizes) > 0).cpu()
        ious[part] = out.iou.cpu()
    return masks, ious


def evaluate(
    model: Sam | AdaptedSam,
    split: Sequence[Sample],
    prompt: PromptKind,
    *,
    crop: float | None = None,
    label_free: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """The model's scores on these images with prompts of this kind; crop: as :func:`predict` has it.

    label_free: whether the label-free score is wanted too, which with boxes and clicks takes twice as long; where there
    are no true masks, it is the only one.
    """
    return Scores.of(measure(model, split, prompt, crop=crop, label_free=label_free, progress=progress))


def measure(
    model: Sam | AdaptedSam,
    split: Sequence[Sample],
    prompt: PromptKind,
    *,
    crop: float | None = None,
    label_free: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Each image's scores by name, each [N]; the arguments are those of :func:`evaluate`."""
    out = []
    crop = crop_of(model, crop)
    for i in range(len(split)):
        sample = split[i]
        given = sample.weak_labels(prompt)
        if label_free or not sample.has_masks:
            masks, found = _label_free(model, sample.image, given, crop)
            scores = {"label_free": found}
        else:
            masks, scores = predict(model, sample.image, given, crop=crop)[0], {}
        scores["collapsed"] = _collapsed(masks, given, crop)
        if sample.has_masks:
            scores |= _against(masks, sample.masks)
        out.append(scores)
        if progress:
            progress(i + 1, len(split))
    return out


def _label_free(model: Sam | AdaptedSam, image: Tensor, given: Prompts, crop: float) -> tuple[Tensor, Tensor]:
    """The masks for the prompts, and their label-free scores."""
    if given.polygons is not None:
        masks, _ = predict(model, image, given, crop=crop)
        return masks, label_free(masks, given)
    size = (int(image.shape[1]), int(image.shape[2]))
    whole = replace(given, tight=False)  # a looser box than a tight one is none
    asked = [whole, *less_told(whole)]
    own = given.boxes is not None and crop < 2 * LOOSER - 1  # the given box's window has no room for the looser one
    where = torch.cat([windows(p if own else given, size, crop) for p in asked]) if crop else None
    masks, *less = _predict(model, image, Prompts.concatenate(asked), where)[0].chunk(len(asked))
    masks = _cut(masks, given)
    mirrored, _ = predict(model, flip(image, True, False), given.flipped(True, False, size), crop=crop)
    return masks, label_free(masks, given, flip(mirrored, True, False), less)


def baseline(kind: Drawing, split: Sequence[Sample], prompt: PromptKind = "box") -> Scores:
    """What needs no model, drawn from weak labels of this kind; raises InputError if it cannot be drawn from them."""
    check_drawable(kind, prompt)
    out = []
    for i in range(len(split)):
        masks = split[i].masks
        drawn = draw(kind, split[i].weak_labels(prompt), (masks.shape[1], masks.shape[2]))
        out.append(_against(drawn, masks))
    return Scores.of(out)


def _against(masks: Tensor, truth: Tensor) -> dict[str, Tensor]:
    return dict(zip(("miou", "f1"), overlap(masks, truth), strict=True))


def _collapsed(masks: Tensor, prompts: Prompts, crop: float) -> Tensor:
    """Which masks hold nothing, or nearly all of what the model was shown for them, float [N]."""
    size = (masks.shape[1], masks.shape[2])
    area = _area(masks)
    shown = torch.full_like(area, size[0] * size[1])
    if crop:
        seen = windows(prompts, size, crop)
        shown = (seen[:, 2:] - seen[:, :2]).prod(1).double()
    return ((area == 0) | (area >= NEARLY_ALL * shown)).double()
