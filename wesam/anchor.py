"""What the frozen anchor says about every training image, computed once and kept, in memory while it fits.

The model is frozen, the prompts are given once, and an image is seen whole or in the window around one of its prompts,
in four flips; so all that the losses ever ask of the anchor are constants: each prompt's mask and the average of the
anchor's features over it. They are kept on disk too, in ``anchors`` in the folder of the weights, some ten kilobytes a
prompt, for all trials and workers of a machine; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from wesam.adapters import autocast
from wesam.config import ComputeConfig, GridConfig, PromptKind
from wesam.crops import WHOLE, cut, inside, windows
from wesam.data.domain import KEPT_BYTES, Sample
from wesam.errors import InputError
from wesam.grid import grid_prompts
from wesam.losses import pooled
from wesam.prompts import Prompts
from wesam.recent import Recent
from wesam.sam.checkpoints import home
from wesam.sam.promptable import CHUNK, decode, encode, resize
from wesam.store import Store
from wesam.views import flip

FORMAT = 3
"""Changes whenever the same inputs give other answers, or they are kept in another form."""

Flips = tuple[bool, bool]
"""Horizontally, vertically."""

Place = tuple[int, int]
"""What is looked at: the image's number, and that of the prompt around which it is cropped, or WHOLE."""


@dataclass(frozen=True)
class Prepared:
    """A training image, or the window around one of its prompts, as the model takes it."""

    image: Tensor
    """uint8 [3, h, w], the longer side at the model's input size."""
    prompts: Prompts
    """The N that lie in it, in pixels of ``image``."""
    instances: Tensor
    """Which of the sample's instances these are, int [N]; none, int [0], of the clicks of a grid."""
    window: Tensor | None
    """What is seen of the image, int (x0, y0, x1, y1) in its own pixels; None if all is."""

    @property
    def nbytes(self) -> int:
        """What it takes in memory, but for weak labels."""
        return self.image.nbytes


@dataclass(frozen=True)
class Answer:
    """The anchor's answers to the prompts of one flipped image."""

    packed: Tensor
    """uint8 [N, m, ceil(m / 8)]: the masks, eight cells of a row in a byte."""
    features: Tensor
    """float [N, C]: the anchor's feature map averaged over each mask."""

    @property
    def masks(self) -> Tensor:
        """bool [N, m, m], in SAM's low-resolution frame."""
        bits = np.unpackbits(self.packed.numpy(), axis=2, count=self.packed.shape[1])
        return torch.from_numpy(bits.view(bool))

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.packed.nbytes + self.features.nbytes


@dataclass(frozen=True)
class Memory:
    """What the anchors of a model keep in memory. It does not lead to the model, which may be freed before it."""

    labels: dict[Hashable, tuple[Tensor, Prompts]] = field(default_factory=dict)
    """Of each image, as an anchor uses them; they are small."""
    recent: Recent = field(default_factory=lambda: Recent(KEPT_BYTES))
    """What was prepared and answered, for all anchors together."""


class Anchor:
    """The training images of a domain with the anchor's answers, each made when asked for and kept while it fits.

    memory: where they are kept. key: what tells this anchor's from those of others in the same memory.
    """

    def __init__(
        self, sam: Sam, split: Sequence[Sample], prompt: PromptKind, crop: float = 0.0,
        compute: ComputeConfig | None = None, grid: GridConfig | None = None, *,
        memory: Memory | None = None, key: Hashable = None,
    ) -> None:  # fmt: skip
        self.sam = sam
        self._compute, self._grid = compute or ComputeConfig(), grid or GridConfig()
        self._split, self._prompt, self._crop = split, prompt, crop
        self._memory, self._key = memory or Memory(), key
        self._store = Store(home() / "anchors")

    def __len__(self) -> int:
        return len(self._split)

    def place(self, index: int, generator: torch.Generator) -> Place:
        """The whole image of this number, or where it is cropped, one of its prompts at random."""
        if not self._crop or self._prompt == "grid":  # a single click does not tell a size
            return index, WHOLE
        return index, int(torch.randint(len(self.given(index)), (), generator=generator))

    def given(self, index: int) -> Prompts:
        """The N prompts of an image, in its pixels."""
        return self._given(index)[1]

    def _given(self, index: int) -> tuple[Tensor, Prompts]:
        """The numbers of an image's instances, [N], without those that vanish when it is seen whole; their labels.

        Of a grid no instances are known, and the clicks are those that the anchor is sure of.
        """
        labels, at = self._memory.labels, (self._key, index)
        if at not in labels:
            sample = self._split[index]
            if self._prompt == "grid":
                labels[at] = torch.arange(0), self._clicks(sample.image)
                return labels[at]
            prompts = sample.weak_labels(self._prompt)
            used = torch.arange(len(prompts)) if self._crop else sample.visible(self.sam.image_encoder.img_size)
            labels[at] = used, prompts[used]
        return labels[at]

    def _clicks(self, image: Tensor) -> Prompts:
        """The grid's clicks in an image, uint8 [3, H, W], in its pixels."""
        side: int = self.sam.image_encoder.img_size
        view = resize(image, side)
        name = self._name(repr(self._grid), view)
        kept = self._store.get(name)
        if kept is None:
            found = grid_prompts(self.sam, view, self._grid)
            assert found.points is not None
            assert found.point_labels is not None
            kept = {"points": found.points, "labels": found.point_labels}
            self._store.put(name, kept)
        return Prompts(points=kept["points"], point_labels=kept["labels"]).resized(view.shape[1:], image.shape[1:])

    def prepared(self, place: Place) -> Prepared:
        """What is at this place, resized, with the weak labels that lie in it."""
        return self._memory.recent.get((self._key, place), lambda: self._prepare(place))

    def _prepare(self, place: Place) -> Prepared:
        """The same, from the split."""
        index, around = place
        image, (used, prompts) = self._split[index].image, self._given(index)
        window = None
        if around != WHOLE:
            number = torch.tensor([around])
            window = windows(prompts[number], (image.shape[1], image.shape[2]), self._crop)[0]
            there = inside(prompts, window)
            # a copy, since where nothing is to be resized a view would keep the whole image in memory
            image, used, prompts = cut(image, window).clone(), used[there], prompts[there].seen_in(window)
        side: int = self.sam.image_encoder.img_size
        view = resize(image, side)
        return Prepared(view, prompts.resized(image.shape[1:], view.shape[1:]), used, window)

    @torch.no_grad()
    def answer(self, place: Place, flips: Flips) -> Answer:
        """The anchor's answers for what is at this place, seen with these flips."""
        return self._memory.recent.get((self._key, place, flips), lambda: self._answer(place, flips))

    def _answer(self, place: Place, flips: Flips) -> Answer:
        """The same, from disk, or from the model."""
        item = self.prepared(place)
        view = flip(item.image, *flips)
        prompts = item.prompts.flipped(*flips, (view.shape[1], view.shape[2]))
        half = autocast(self.sam, self._compute)
        given = (prompts.boxes, prompts.points, prompts.point_labels, *(prompts.polygons or ()))
        name = self._name(f"{half.device} {half._enabled}", view, *given)
        kept = self._store.get(name)
        if kept is None:
            kept = self._ask(view, prompts)
            self._store.put(name, kept)
        return Answer(kept["masks"], kept["features"])

    def _ask(self, view: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """The anchor's answers: its features, float [N, C], and masks with eight cells of a row in a byte."""
        with autocast(self.sam, self._compute):
            embedding = encode(self.sam, [view])
        masks, features = [], []
        for part in torch.arange(len(prompts)).split(CHUNK):
            with autocast(self.sam, self._compute):
                mask = decode(self.sam, embedding, [prompts[part]]).logits > 0
            features.append(pooled(embedding, torch.zeros_like(part, device=mask.device), mask))
            masks.append(mask)
        packed = np.packbits(torch.cat(masks).cpu().numpy(), axis=2)
        return {"masks": torch.from_numpy(packed), "features": torch.cat(features).cpu()}

    def _name(self, how: str, *parts: Tensor | None) -> str:
        """A digest of all that makes an answer: weights, how it is asked, pixels, prompts, the form it is kept in."""
        digest = hashlib.blake2b(f"{FORMAT} {how}".encode(), digest_size=24)
        digest.update(_weights_digest(self.sam))
        for part in parts:
            if part is not None:
                digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def truth(self, place: Place, flips: Flips, chosen: Tensor) -> Tensor:
        """The true masks of the chosen instances, flipped, in SAM's low-resolution frame: covered share, [n, m, m].

        They are looked up each time: in the image's own pixels, all of them may be many times as large as the image.
        """
        item, sample = self.prepared(place), self._split[place[0]]
        if self._prompt == "grid" or not sample.has_masks:
            raise InputError(f"{sample.key} has no masks: nothing to be supervised by")
        masks = sample.masks[item.instances[chosen]]
        if item.window is not None:
            masks = cut(masks, item.window)
        side: int = self.sam.image_encoder.img_size
        h, w = item.image.shape[1:]
        small = F.interpolate(masks[:, None].float(), (h, w), mode="area")[:, 0]
        padded = F.pad(flip(small, *flips), (0, side - w, 0, side - h))
        return F.avg_pool2d(padded, side // (4 * self.sam.prompt_encoder.image_embedding_size[0]))


_DIGESTS: WeakKeyDictionary[Sam, bytes] = WeakKeyDictionary()


def _weights_digest(sam: Sam) -> bytes:
    """A digest of the model's weights, which are frozen: made once."""
    if sam not in _DIGESTS:
        digest = hashlib.blake2b(digest_size=24)
        for name, value in sam.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        _DIGESTS[sam] = digest.digest()
    return _DIGESTS[sam]
