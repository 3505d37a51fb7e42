"""Procedural scenes: dead-leaves images with exact instance masks, of any number, from a seed alone.

A scene is objects laid over one another on a textured background, each cut from a family of shapes and filled from a
family of textures. What tells an object from what lies under it varies: colour, texture alone, an edge, a shade.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator

TEXTURES = {
    "flat": 0.14, "gradient": 0.14, "fractal": 0.24, "stripes": 0.1, "weave": 0.07, "cells": 0.08, "spots": 0.08,
    "maze": 0.08, "grain": 0.07,
}  # fmt: skip
"""Kinds of textures and how often each is drawn."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a kind of scene looks like; the fields are the knobs by which the shifted domains differ."""

    crowd: float = 1.0
    """Factor on the number of objects."""
    contrast: tuple[float, float] = (0.75, 1.15)
    """Range of the factor on the image's contrast, drawn per scene."""
    noise: tuple[float, float] = (0.0, 0.05)
    """Range of the sensor noise's standard deviation, in units of the full range."""
    blur: tuple[float, float] = (0.0, 0.8)
    """Range of the whole image's blur, standard deviation in pixels."""
    soft: tuple[float, float] = (0.0, 1.2)
    """Range of an object's border softness, standard deviation in pixels."""
    grey: float = 0.15
    """Share of grey scenes."""
    hidden: float = 0.22
    """Share of objects that borrow the colours of what lies under them."""
    hidden_gap: tuple[float, float] = (0.10, 0.30)
    """Colour distance of such an object from what lies under it, in units of the full range."""
    families: tuple[str, ...] = (
        "ellipse",
        "blob",
        "polygon",
        "rectangle",
        "stroke",
        "ring",
        "creature",
        "cloud",
        "glyph",
    )
    """Shape families objects are drawn from."""
    ground: tuple[str, ...] = tuple(TEXTURES)
    """Textures of the background."""
    skin: tuple[str, ...] = tuple(TEXTURES)
    """Textures of the objects."""
    cues: float = 1.0
    """Factor on the shares of objects with shading, an outline and a shadow."""
    fade: float = 0.0
    """Depth at which an object has become opaque, in units of its inner radius; 0 is opaque up to its border."""
    fence: float = 0.0
    """Width of the bars of a fence in front of everything, in units of the gap between them."""
    lost: tuple[float, float] = (0.0, 0.0)
    """Range of the share of the image's blocks that were lost and are grey, as after a broken transmission."""
    parts: float = 0.0
    """Share of objects that are made of several parts, each with colours and a texture of its own."""
    kin: float = 0.0
    """Share of objects that differ from what lies under them by texture alone."""
    shine: float = 0.0
    """Share of objects with a highlight."""
    backdrop: float = 0.0
    """Share of scenes whose background is of several regions, none of which is an instance."""
    focus: float = 0.0
    """Share of scenes in which the background, and the objects that lie furthest back, are out of focus."""
    smallest: int = 40
    """Instances with fewer visible pixels than this are none."""


TRAINING = Style(parts=0.4, kin=0.06, shine=0.15, backdrop=0.45, focus=0.2)
"""The scenes that the embedded model is trained on."""

_MEDIUM = Style(smallest=160)  # 0.4 % of the image, about where COCO's medium instances begin
STYLES: dict[str, Style] = {
    "clean": _MEDIUM,
    "corrupted": replace(_MEDIUM, lost=(0.2, 0.35)),
    "medical": replace(
        _MEDIUM, grey=1.0, contrast=(0.35, 0.65), noise=(0.0, 0.02), crowd=0.6, fade=2.0, families=("ellipse", "blob")
    ),
    "camouflaged": replace(
        _MEDIUM, cues=0.3, crowd=0.6, fade=1.0, families=("blob", "creature", "cloud", "polygon")
    ),
    "cluttered": replace(_MEDIUM, crowd=0.7, fence=0.35),
}  # fmt: skip


def scene(rng: Rng, height: int = 192, width: int = 192, style: Style = TRAINING) -> tuple[Array, Array]:
    """One scene: its image, uint8 [H, W, 3] RGB, and its instances' visible masks, bool [N, H, W], N >= 1."""
    while True:
        canvas = _paint(rng, _texture(rng, height, width, style.ground), _palette(rng))
        masks: list[Array] = []
        areas: list[int] = []
        light = rng.uniform(0, 2 * np.pi)
        if _happens(rng, style.backdrop):
            for _ in range(int(rng.integers(1, 5))):
                canvas = np.where(_region(rng, height, width)[..., None], _surface(rng, height, width, style), canvas)
        outlines = _layout(rng, height, width, style)
        sharp_from = int(rng.integers(0, 1 + len(outlines) // 2)) if _happens(rng, style.focus) else -1
        for i, outline in enumerate(outlines):
            if i == sharp_from:
                canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1, 5))
            alpha = outline.astype(np.float32) / 255
            solid = outline > 127
            if solid.sum() < style.smallest:
                continue
            canvas = _place(rng, canvas, alpha, light, style)
            for m in masks:
                m &= ~solid
            masks.append(solid)
            areas.append(int(solid.sum()))
        kept = [m for m, a in zip(masks, areas, strict=True) if (s := m.sum()) >= style.smallest and s >= 0.3 * a]
        if kept:
            return _expose(rng, canvas, style), np.stack(kept)


def _happens(rng: Rng, share: float) -> bool:
    """True in this share of the cases; asks for no random number where it never is."""
    return share > 0 and rng.random() < share


# -- where the objects are and what outline they have


def _layout(rng: Rng, h: int, w: int, style: Style) -> list[Array]:
    """Outlines from back to front, each uint8 [h, w] with anti-aliased values 0..255."""
    mode = rng.choice(["leaves", "swarm", "large", "rows"], p=[0.5, 0.22, 0.18, 0.1])
    side = min(h, w)
    if mode == "leaves":
        n = int(style.crowd * rng.integers(5, 16))
        radii = side * np.minimum(0.38, 0.035 * (1 - rng.random(n)) ** -0.75)
        radii = np.sort(radii)[::-1]
    elif mode == "large":
        n = max(1, int(style.crowd * rng.integers(1, 5)))
        radii = side * rng.uniform(0.15, 0.42, n)
    else:
        n = int(style.crowd * rng.integers(8, 28))
        radii = side * rng.uniform(0.035, 0.1) * rng.uniform(0.75, 1.3, n)
    xy = rng.random((n, 2)) * (w, h)
    if mode == "rows":
        cols = int(np.ceil(np.sqrt(n)))
        grid = np.stack([np.arange(n) % cols, np.arange(n) // cols], 1) + 0.5
        xy = grid / cols * (w, h) + rng.normal(0, 0.08, (n, 2)) * side / cols
    family = str(rng.choice(style.families))
    alike = mode in ("swarm", "rows") and rng.random() < 0.8
    out = []
    for (x, y), r in zip(xy, radii, strict=True):
        if not alike:
            family = str(rng.choice(style.families))
        out.append(_outline(rng, family, h, w, float(x), float(y), float(r)))
    return out


def _outline(rng: Rng, family: str, h: int, w: int, x: float, y: float, r: float) -> Array:
    m = np.zeros((h, w), np.uint8)
    stretch = float(np.exp(rng.normal(0, 0.35)))
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    def fill(points: Array, value: int = 255) -> None:
        p = points * (r * stretch**0.5, r / stretch**0.5) @ turn.T + (x, y)
        cv2.fillPoly(m, [np.round(p * 16).astype(np.int32)], value, cv2.LINE_AA, 4)

    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = np.stack([np.cos(t), np.sin(t)], 1)
    if family == "ellipse":
        e = rng.uniform(0.7, 1.4)
        fill(np.sign(circle) * np.abs(circle) ** e)
    elif family == "blob":
        k = np.arange(2, 8)
        wave = (rng.normal(0, 0.45, 6) / k**0.8)[:, None] * np.cos(k[:, None] * t + rng.uniform(0, 6.3, (6, 1)))
        fill(circle * np.clip(1 + wave.sum(0), 0.2, 2)[:, None])
    elif family == "polygon":
        n = int(rng.integers(3, 9))
        a = np.sort(rng.uniform(0, 2 * np.pi, n))
        fill(np.stack([np.cos(a), np.sin(a)], 1) * rng.uniform(0.45, 1.3, (n, 1)))
    elif family == "rectangle":
        c = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (1.0, rng.uniform(0.25, 1))
        fill(c + rng.normal(0, 0.08, (4, 2)))
    elif family == "ring":
        fill(circle)
        fill(circle * rng.uniform(0.3, 0.8) + rng.normal(0, 0.22, 2), 0)
    elif family == "glyph":
        text = chr(int(rng.integers(65, 91)))
        scale = r / 11
        cv2.putText(m, text, (int(x - r), int(y + r)), int(rng.integers(0, 8)), scale, 255,
                    max(2, int(r * rng.uniform(0.15, 0.45))), cv2.LINE_AA)  # fmt: skip
    elif family == "stroke":
        steps = rng.normal(rng.normal(0, 0.5, 2), 0.7, (int(rng.integers(2, 7)), 2)).cumsum(0)
        path = (steps - steps.mean(0)) / max(1e-3, np.abs(steps - steps.mean(0)).max()) * r * 1.5 + (x, y)
        width = max(2, int(r * rng.uniform(0.08, 0.4)))
        cv2.polylines(m, [np.round(path * 16).astype(np.int32)], False, 255, width, cv2.LINE_AA, 4)
    elif family == "creature":
        fill(circle * (1.0, rng.uniform(0.35, 0.75)))
        for _ in range(int(rng.integers(2, 7))):
            side = rng.uniform(0, 2 * np.pi)
            tip = np.array([np.cos(side), np.sin(side)]) * rng.uniform(0.9, 1.6)
            fill(circle * (rng.uniform(0.12, 0.4), rng.uniform(0.08, 0.3)) + tip * 0.9)
            across = np.array([-tip[1], tip[0]]) * rng.uniform(0.06, 0.2)
            fill(np.stack([-across, tip - across * 0.5, tip + across * 0.5, across]))
    else:  # cloud
        yy, xx = np.mgrid[:h, :w].astype(np.float32)
        fall = ((xx - x) ** 2 * stretch + (yy - y) ** 2 / stretch) / (r * r)
        field = 1.1 - fall + (_fractal(rng, h, w, 1.0, base=192 / max(r, 8)) - 0.5) * 2.2
        labels = cv2.connectedComponentsWithStats((field > 0).astype(np.uint8))
        if labels[0] > 1:
            m[labels[1] == 1 + int(np.argmax(labels[2][1:, cv2.CC_STAT_AREA]))] = 255
        m = np.asarray(cv2.GaussianBlur(m, (0, 0), 0.7))
    return m


# -- what they are filled with


def _fractal(rng: Rng, h: int, w: int, roughness: float, base: float = 3.0) -> Array:
    """Noise of several octaves in 0..1, float32 [h, w]; a larger ``roughness`` has more of the fine ones."""
    out = np.zeros((h, w), np.float32)
    cells, amplitude = base, 1.0
    while cells < max(h, w) and amplitude > 0.02:
        n = int(np.ceil(cells)) + 1
        out += amplitude * cv2.resize(rng.standard_normal((n, n), np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        cells, amplitude = cells * 2.3, amplitude * 0.62 * roughness
    return _unit(out)


def _unit(x: Array) -> Array:
    low, high = float(x.min()), float(x.max())
    return (x - low) / (high - low + 1e-6)


def _texture(rng: Rng, h: int, w: int, kinds: tuple[str, ...]) -> Array:
    """A pattern of one of these kinds in 0..1, float32 [h, w]."""
    shares = np.array([TEXTURES[k] for k in kinds])
    kind = rng.choice(kinds, p=shares / shares.sum())
    if kind == "flat":
        return np.full((h, w), 0.5, np.float32)
    yy, xx = np.mgrid[:h, :w].astype(np.float32)
    a = rng.uniform(0, 2 * np.pi)
    along, across = xx * np.cos(a) + yy * np.sin(a), yy * np.cos(a) - xx * np.sin(a)
    if kind == "gradient":
        return _unit(along + rng.uniform(0, 40) * _fractal(rng, h, w, 0.6))
    if kind == "fractal":
        return _fractal(rng, h, w, rng.uniform(0.5, 1.5), base=rng.uniform(2, 14))
    if kind in ("stripes", "weave"):
        period = np.exp(rng.uniform(np.log(4), np.log(36)))
        bend = rng.uniform(0, 1.5) * period * _fractal(rng, h, w, 0.5)
        f = np.sin((along + bend) * 2 * np.pi / period)
        if kind == "weave":
            f = f * np.sin((across + bend) * 2 * np.pi / period)
        return (0.5 + 0.5 * np.tanh(f * rng.uniform(0.8, 6))).astype(np.float32)
    if kind == "maze":
        s = rng.uniform(1.2, 4)
        raw = rng.standard_normal((h, w), np.float32)
        band = cv2.GaussianBlur(raw, (0, 0), s) - cv2.GaussianBlur(raw, (0, 0), 1.8 * s)
        return (0.5 + 0.5 * np.tanh(band / (band.std() + 1e-6) * rng.uniform(0.7, 3))).astype(np.float32)
    if kind == "grain":
        return _unit(cv2.GaussianBlur(rng.standard_normal((h, w), np.float32), (0, 0), rng.uniform(0.4, 1.5)))
    n = max(2, int(h * w / np.exp(rng.uniform(np.log(40), np.log(1500)))))
    seeds = np.ones((h, w), np.uint8)
    seeds[rng.integers(0, h, n), rng.integers(0, w, n)] = 0
    dist, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    if kind == "cells":
        return rng.random(int(label.max()) + 1, np.float32)[label]
    radius = rng.uniform(0.25, 0.7) * np.sqrt(h * w / n)
    return np.clip(radius - dist + 0.5, 0, 1).astype(np.float32)


def _palette(rng: Rng) -> Array:
    """Two colours, float32 [2, 3] in 0..1: often shades of one hue, as in nature."""
    first = rng.random(3)
    second = rng.random(3)
    if rng.random() < 0.65:
        second = np.clip(first * rng.uniform(0.4, 1.6) + rng.normal(0, 0.06, 3), 0, 1)
    return np.stack([first, second]).astype(np.float32)


def _paint(rng: Rng, pattern: Array, palette: Array) -> Array:
    fine = 0.04 * rng.random() * rng.standard_normal(pattern.shape, np.float32)
    return palette[0] + (pattern + fine)[..., None] * (palette[1] - palette[0])


def _surface(rng: Rng, h: int, w: int, style: Style) -> Array:
    """Something painted, float32 [h, w, 3]."""
    return _paint(rng, _texture(rng, h, w, style.skin), _palette(rng))


def _region(rng: Rng, h: int, w: int) -> Array:
    """A part of a window, bool [h, w]: beside a line, a band, a spot, or a shape as that of a cloud."""
    kind = rng.choice(["side", "band", "spot", "cloud"])
    if kind == "cloud":
        return np.asarray(_fractal(rng, h, w, 0.7, base=rng.uniform(1.5, 4)) > rng.uniform(0.4, 0.65))
    yy, xx = np.mgrid[:h, :w].astype(np.float32)
    y, x, a = rng.uniform(0.1, 0.9) * h, rng.uniform(0.1, 0.9) * w, rng.uniform(0, 2 * np.pi)
    bend = 0.3 * rng.random() * min(h, w) * (_fractal(rng, h, w, 0.4, base=2) - 0.5)
    along = (xx - x) * np.cos(a) + (yy - y) * np.sin(a) + bend
    if kind == "side":
        return np.asarray(along > 0)
    if kind == "band":
        return np.asarray(np.abs(along) < rng.uniform(0.05, 0.25) * min(h, w))
    across = (yy - y) * np.cos(a) - (xx - x) * np.sin(a)
    return np.asarray(along**2 + (across * rng.uniform(0.6, 1.7)) ** 2 < (rng.uniform(0.1, 0.35) * min(h, w)) ** 2)


def _place(rng: Rng, canvas: Array, alpha: Array, light: float, style: Style) -> Array:
    """The canvas with one more object on it; computed in the object's own window of the canvas."""
    ys, xs = np.nonzero(alpha.max(1))[0], np.nonzero(alpha.max(0))[0]
    pad = 8
    y0, y1 = max(0, int(ys[0]) - pad), min(alpha.shape[0], int(ys[-1]) + pad + 1)
    x0, x1 = max(0, int(xs[0]) - pad), min(alpha.shape[1], int(xs[-1]) + pad + 1)
    under, a = canvas[y0:y1, x0:x1], alpha[y0:y1, x0:x1]
    h, w = a.shape

    beneath = under[a > 0.5]
    if style.fade:
        depth = cv2.distanceTransform((a > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        a = a * np.clip(depth / max(2.0, style.fade * float(depth.max())), 0.1, 1)
    soft = rng.uniform(*style.soft)
    if soft > 0.3:
        a = cv2.GaussianBlur(a, (0, 0), soft)
    kin = _happens(rng, style.kin)
    if kin:  # the colours change places in another pattern
        mean, spread = beneath.mean(0), beneath.std(0) + 0.03
        palette = np.stack([mean - 2 * spread, mean + 2 * spread]).astype(np.float32)
    elif rng.random() < style.hidden:
        mean, spread = beneath.mean(0), beneath.std(0) + 0.02
        step = rng.normal(0, 1, 3)
        step *= rng.uniform(*style.hidden_gap) / (np.abs(step).max() + 1e-6)
        palette = np.stack([mean + step - spread, mean + step + spread]).astype(np.float32)
    else:
        palette = _palette(rng)
    body = _paint(rng, _texture(rng, h, w, style.skin), palette)
    if not kin and _happens(rng, style.parts):
        for _ in range(int(rng.integers(1, 4))):
            other = palette + rng.normal(0, 0.15, 3) if rng.random() < 0.4 else _palette(rng)
            part = _paint(rng, _texture(rng, h, w, style.skin), other.astype(np.float32))
            body = np.where(_region(rng, h, w)[..., None], part, body)

    if rng.random() < 0.55 * style.cues:  # shaded as if it were round
        size = max(1.0, float(np.sqrt((a > 0.5).sum())) * rng.uniform(0.05, 0.25))
        hill = cv2.GaussianBlur(a, (0, 0), size) * size
        slope = cv2.Sobel(hill, cv2.CV_32F, 1, 0) * np.cos(light) + cv2.Sobel(hill, cv2.CV_32F, 0, 1) * np.sin(light)
        body = body * (1 + rng.uniform(0.05, 0.3) * np.clip(slope, -2, 2))[..., None]
    if _happens(rng, style.shine):
        y, x = rng.uniform(0.2, 0.8, 2) * (h, w)
        yy, xx = np.mgrid[:h, :w].astype(np.float32)
        spot = np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (rng.uniform(0.05, 0.2) * min(h, w) + 1) ** 2)
        body = body + rng.uniform(0.2, 0.7) * spot[..., None] * (1 - body)
    if rng.random() < 0.18 * style.cues:  # an outline of its own
        rim = np.clip(a - cv2.erode(a, np.ones((3, 3), np.uint8)), 0, 1)[..., None]
        body = body * (1 - rim) + rim * body * rng.uniform(0.2, 1.7)
    if rng.random() < 0.3 * style.cues:  # a shadow on what lies under it
        shift = rng.uniform(1, 6)
        move = np.array([[1, 0, -shift * np.cos(light)], [0, 1, -shift * np.sin(light)]], np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(a, move, (w, h)), (0, 0), rng.uniform(0.6, 3))
        under = under * (1 - rng.uniform(0.2, 0.6) * shadow)[..., None]

    canvas[y0:y1, x0:x1] = under * (1 - a[..., None]) + body * a[..., None]
    return canvas


def _expose(rng: Rng, canvas: Array, style: Style) -> Array:
    """The camera: light over the scene, blur, contrast, noise, compression."""
    h, w = canvas.shape[:2]
    if style.fence:
        bars = _fence(rng, h, w, style.fence)
        canvas = canvas * (1 - bars) + bars * rng.random(3, np.float32)
    if rng.random() < 0.5:
        canvas = canvas * (rng.uniform(0.6, 0.95) + 0.5 * _fractal(rng, h, w, 0.3))[..., None]
    if rng.random() < style.grey:
        canvas = np.repeat(canvas @ rng.dirichlet((4, 4, 4)).astype(np.float32)[:, None], 3, 2)
    blur = rng.uniform(*style.blur)
    if blur > 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur)
    canvas = (canvas - 0.5) * rng.uniform(*style.contrast) + 0.5 + rng.normal(0, 0.04)
    canvas = canvas + rng.uniform(*style.noise) * rng.standard_normal(canvas.shape, np.float32)
    pale = 1 - rng.random() ** 0.5  # few cameras see colours as they are
    canvas = canvas + pale * (canvas.mean(2, keepdims=True) - canvas)
    if any(style.lost):
        canvas[_lost(rng, h, w, rng.uniform(*style.lost))] = 0.5
    image = (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.25:
        quality = int(rng.integers(35, 95))
        packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    return image


def _fence(rng: Rng, h: int, w: int, width: float) -> Array:
    """Crossed bars, float32 [h, w, 1]: 1 on a bar, 0 in a gap."""
    period, turn = rng.uniform(14, 30), rng.uniform(0, np.pi)
    yy, xx = np.mgrid[:h, :w].astype(np.float32)
    across = [np.abs((xx * np.cos(a) + yy * np.sin(a)) % period - period / 2) for a in (turn, turn + np.pi / 2)]
    return np.asarray(np.clip(width * period / 2 - np.minimum(*across) + 0.5, 0, 1)[..., None], np.float32)


def _lost(rng: Rng, h: int, w: int, share: float, size: int = 8) -> Array:
    """Square blocks, bool [h, w], of which this share is True; size: their side in pixels."""
    blocks = rng.random((-(-h // size), -(-w // size))) < share
    return np.asarray(blocks.repeat(size, 0).repeat(size, 1)[:h, :w])
