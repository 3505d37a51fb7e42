"""The fifteen common corruptions of Hendrycks and Dietterich (2019), for images of any size.

Parameters are those of the benchmark's version for detection and segmentation (imagecorruptions 1.1), whose code no
longer runs. Three are not the same pixel by pixel: the frost is generated, as the benchmark's own is photographs; glass
swaps its pixels in another order; zooms are about the image's centre.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wesam.data.domain import Domain, Sample, Split
from wesam.errors import InputError, unknown

Array = NDArray[Any]
Rng = np.random.Generator

ALL = "all"
"""Instead of a corruption's name: each image has one of them, drawn by its key."""

FORMAT = 1
"""Changes whenever the same image is corrupted otherwise."""

HARDEST = 5
"""The severity where none is given, the paper's."""


def parse_corruption(text: str) -> tuple[str, int]:
    """A corruption's name and severity, as in ``fog:3``; HARDEST where none is given."""
    found = re.fullmatch(r"(.*?):?(\d*)", text, re.DOTALL)
    assert found
    return found[1], int(found[2] or HARDEST)


def is_corruption(text: str) -> bool:
    """Whether this names one, or ``all`` of them, whatever its severity."""
    return parse_corruption(text)[0] in {ALL, *CORRUPTIONS}


def corrupted(domain: Domain, text: str) -> Domain:
    """The domain as a corruption leaves it, its masks and weak labels as they were.

    text: ``NAME`` or ``NAME:SEVERITY``, of ``CORRUPTIONS`` or ``all``. The new domain's name is the old one's, "+", the
    corruption and its severity. Raises InputError for an unknown name or severity.
    """
    name, severity = parse_corruption(text)
    if name not in {ALL, *CORRUPTIONS}:
        raise unknown("corruption", name, [*CORRUPTIONS, ALL])
    if not 1 <= severity <= HARDEST:
        raise InputError(f"the severity of {name} is 1 to {HARDEST}, got {severity}")
    names = list(CORRUPTIONS) if name == ALL else [name]

    def changed(split: Split) -> Split:
        def read(index: int) -> Sample:
            sample = split.read(index)
            one = names[int(_rng(sample.key, ALL).integers(len(names)))]
            return replace(sample, image=corrupt(sample.image, one, severity, sample.key))

        return Split(len(split), read, split.small, split.unclicked)

    digest = hashlib.sha256(f"{domain.digest} {name} {severity} {FORMAT}".encode()).hexdigest()
    splits = {k: changed(v) for k, v in domain.splits.items()}
    note = f"{domain.note}; {name}, severity {severity} of 5"
    return replace(domain, name=f"{domain.name}+{name}{severity}", splits=splits, digest=digest, note=note)


def corrupt(image: Tensor, name: str, severity: int, key: str) -> Tensor:
    """The image as this corruption leaves it.

    image: uint8 [3, H, W], RGB. name: of ``CORRUPTIONS``. severity: 1 to 5. key: names the image, which with the same
    key is corrupted the same way in every process and on every machine. Returns uint8 [3, H, W]; nothing moves by more
    than a few pixels, so that masks stay valid.
    """
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    changed = CORRUPTIONS[name](pixels, severity - 1, _rng(key, name))
    if changed.dtype != np.uint8:
        changed = np.clip(changed * 255, 0, 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(changed)).permute(2, 0, 1).contiguous()


# Each takes uint8 [H, W, 3], the severity from 0 and a source of chance; returns uint8 in 0..255 or floats in 0..1.


def _gaussian_noise(x: Array, s: int, rng: Rng) -> Array:
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[s]
    return _unit(x) + scale * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: Array, s: int, rng: Rng) -> Array:
    photons = (60, 25, 12, 5, 3)[s]
    return rng.poisson(_unit(x) * photons).astype(np.float32) / photons


def _impulse_noise(x: Array, s: int, rng: Rng) -> Array:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    chance = rng.random(x.shape, np.float32)
    out = x.copy()
    out[chance < amount] = 255
    out[chance < amount / 2] = 0
    return out


def _defocus_blur(x: Array, s: int, rng: Rng) -> Array:
    radius, smooth = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    reach = max(8, radius)
    yy, xx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (xx**2 + yy**2 <= radius**2).astype(np.float32)
    size = 3 if radius <= 8 else 5
    kernel = cv2.GaussianBlur(disk / disk.sum(), (size, size), smooth)
    return np.asarray(cv2.filter2D(_unit(x), -1, kernel))


def _glass_blur(x: Array, s: int, rng: Rng) -> Array:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    out = cv2.GaussianBlur(x, (0, 0), sigma)
    h, w = out.shape[:2]
    step = 2 * reach
    for _ in range(rounds):
        # pixels of one lattice change places with neighbours in squares that do not meet
        for turn in rng.permutation(step * step):
            y, x = np.arange(reach + turn // step, h - reach, step), np.arange(reach + turn % step, w - reach, step)
            rows, columns = np.meshgrid(y, x, indexing="ij")
            dy, dx = rng.integers(-reach, reach, (2, *rows.shape))
            here, there = (rows, columns), (rows + dy, columns + dx)
            out[here], out[there] = out[there], out[here]
    return np.asarray(cv2.GaussianBlur(out, (0, 0), sigma))


def _motion_blur(x: Array, s: int, rng: Rng) -> Array:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return _moved(_unit(x), radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(x: Array, s: int, rng: Rng) -> Array:
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    image = _unit(x)
    zooms = np.arange(1, last, step)
    out = image.copy()
    for factor in zooms:
        out += _zoomed(image, factor)
    return out / (len(zooms) + 1)


def _snow(x: Array, s: int, rng: Rng) -> Array:
    mean, spread, zoom, threshold, radius, sigma, mix = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]  # fmt: skip
    image = _unit(x)
    flakes = _zoomed(mean + spread * rng.standard_normal(x.shape[:2], np.float32), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = np.round(_moved(flakes, radius, sigma, rng.uniform(-135, -45)) * 255) / 255
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    white = mix * image + (1 - mix) * np.maximum(image, grey * 1.5 + 0.5)
    return np.asarray(white + (flakes + flakes[::-1, ::-1])[..., None])


def _frost(x: Array, s: int, rng: Rng) -> Array:
    image, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    return image * _unit(x) + ice * _ice(rng, *x.shape[:2])


def _fog(x: Array, s: int, rng: Rng) -> Array:
    density, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[s]
    image = _unit(x)
    h, w = x.shape[:2]
    brightest = image.max()
    cloud = _plasma(rng, 1 << (max(h, w) - 1).bit_length(), decay)[:h, :w, None]
    return np.asarray((image + density * cloud) * brightest / (brightest + density))


def _brightness(x: Array, s: int, rng: Rng) -> Array:
    """HSV's value is raised; hue and saturation stay, so the channels keep their proportions."""
    image = _unit(x)
    value = image.max(2, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[s], 1)
    return np.where(value > 0, image * (raised / np.maximum(value, 1e-6)), raised)


def _contrast(x: Array, s: int, rng: Rng) -> Array:
    image = _unit(x)
    mean = image.mean((0, 1), dtype=np.float64).astype(np.float32)
    return (image - mean) * np.float32((0.4, 0.3, 0.2, 0.1, 0.05)[s]) + mean


def _elastic_transform(x: Array, s: int, rng: Rng) -> Array:
    h, w = x.shape[:2]
    strength = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[s]
    reach = 0.005 * h
    sizes = (2 * round(0.03 * w) + 1, 2 * round(0.03 * h) + 1)  # three standard deviations to each side
    dx, dy = (
        strength * cv2.GaussianBlur(rng.uniform(-reach, reach, (h, w)).astype(np.float32), sizes, 0.01 * w,
                                    sigmaY=0.01 * h, borderType=cv2.BORDER_REFLECT)
        for _ in range(2)
    )  # fmt: skip
    yy, xx = np.mgrid[:h, :w].astype(np.float32)
    return np.asarray(cv2.remap(_unit(x), xx + dx, yy + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _pixelate(x: Array, s: int, rng: Rng) -> Array:
    h, w = x.shape[:2]
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = Image.fromarray(x).resize((max(1, int(w * share)), max(1, int(h * share))), Image.Resampling.BOX)
    return np.array(small.resize((w, h), Image.Resampling.NEAREST))


def _jpeg_compression(x: Array, s: int, rng: Rng) -> Array:
    packed = io.BytesIO()
    Image.fromarray(x).save(packed, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return np.array(Image.open(packed))


CORRUPTIONS: dict[str, Callable[[Array, int, Rng], Array]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""The corruptions by name, in the benchmark's order."""


def _rng(*words: object) -> Rng:
    """A source of chance that these words seed."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _unit(x: Array) -> Array:
    return x.astype(np.float32) / 255


def _moved(x: Array, radius: int, sigma: float, angle: float) -> Array:
    """x, float32 [H, W] or [H, W, 3], smeared along a line by half a Gaussian of 2 radius + 1 pixels."""
    length = 2 * radius + 1
    weights = np.exp(-(np.arange(length) ** 2) / (2 * sigma**2))
    along = np.arange(length)
    dy = np.ceil(along * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    dx = np.ceil(along * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
    np.add.at(kernel, (length + dy, length + dx), weights / weights.sum())
    return np.asarray(cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE))


def _zoomed(x: Array, factor: float) -> Array:
    """x, float32 [H, W] or [H, W, 3], enlarged about its centre, in its own size."""
    h, w = x.shape[:2]
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    back = np.concatenate([np.eye(2) / factor, (centre - centre / factor)[:, None]], 1)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(x, back, (w, h), flags=flags, borderMode=cv2.BORDER_REPLICATE))


def _plasma(rng: Rng, size: int, decay: float) -> Array:
    """A cloud by diamonds and squares, float32 [size, size] in 0..1, size a power of two; joins at opposite borders."""
    cloud = np.zeros((size, size), np.float32)
    step, reach = size, 100.0
    while step >= 2:
        half = step // 2

        def jittered(total: Array, reach: float = reach) -> Array:
            return total / 4 + reach * rng.uniform(-reach, reach, total.shape).astype(np.float32)

        corners = cloud[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        cloud[half::step, half::step] = centres = jittered(rows + np.roll(rows, -1, 1))
        # left of each centre lies the middle of a vertical edge, above it that of a horizontal one
        cloud[half::step, ::step] = jittered(centres + np.roll(centres, 1, 1) + rows)
        cloud[::step, half::step] = jittered(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        step, reach = half, reach / decay
    low, high = cloud.min(), cloud.max()
    return (cloud - low) / max(high - low, 1e-6)


def _ice(rng: Rng, h: int, w: int) -> Array:
    """Frost on a pane, float32 [h, w, 3] in 0..1: needles that branch from a few seeds, bluish, over haze."""
    n = max(h, w)
    size = 1 << (n - 1).bit_length()
    haze = _plasma(rng, size, 1.9)[:h, :w]
    needles = np.zeros((h, w), np.uint8)
    for _ in range(int(rng.integers(6, 12))):
        x, y, turn = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, np.pi)
        for arm in range(int(rng.integers(1, 5))):
            _needle(rng, needles, x, y, turn + arm * np.pi / 3, rng.uniform(0.1, 0.4) * n, 0)
    grain = cv2.GaussianBlur(rng.standard_normal((h, w), np.float32), (0, 0), 0.8)
    lines = needles / np.float32(255)
    glow = cv2.GaussianBlur(lines, (0, 0), 0.006 * n + 0.5)
    ice = np.clip(0.5 + 0.22 * haze + 0.1 * grain + 0.25 * lines + 0.25 * glow, 0, 1)
    return np.asarray(ice[..., None] * np.array([0.86, 0.94, 1.0], np.float32))


def _needle(rng: Rng, canvas: Array, x: float, y: float, angle: float, length: float, depth: int) -> None:
    """Draws a needle and, at 60 degrees, those that grow from it."""
    if length < 3 or depth > 3:
        return
    x1, y1 = x + length * np.cos(angle), y + length * np.sin(angle)
    shade = int(rng.integers(120, 256)) >> (depth // 2)
    ends = [(int(a * 16), int(b * 16)) for a, b in ((x, y), (x1, y1))]
    cv2.line(canvas, ends[0], ends[1], shade, 1 + (depth == 0), cv2.LINE_AA, 4)
    for t in np.arange(0.15, 0.95, 0.16 if depth else 0.1):
        for side in (-1, 1):
            at = x + t * (x1 - x), y + t * (y1 - y)
            _needle(rng, canvas, *at, angle + side * np.pi / 3, length * (1 - t) * rng.uniform(0.2, 0.5), depth + 1)
