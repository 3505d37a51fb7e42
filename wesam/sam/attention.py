"""segment_anything's attention in less time and memory: the same weights, answers and gradients.

Written out, attention among the 64 x 64 tokens of an image keeps 16 million scores a head several times over. Here they
are never all there at once. On a GPU that is what PyTorch's kernels do, which carry the relative positions inside the
head's dimension. On a CPU those kernels are slower than plain matrix products (docs/speed.md), so that there a few rows
of scores at a time are made, in the forward and again in the backward pass, small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from segment_anything.modeling import Sam, image_encoder
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SCORES = 2 * 2**20
"""Scores that are there at a time on a CPU: 8 MiB."""


_kernels: ContextVar[bool] = ContextVar("kernels", default=False)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it attention is computed by PyTorch's kernels on a CPU too, as it is on a GPU."""
    token = _kernels.set(True)
    try:
        yield
    finally:
        _kernels.reset(token)


def fuse(sam: Sam) -> Sam:
    """The same SAM; its encoder's attention is replaced by what follows, where it has relative positions."""
    for module in sam.modules():
        if type(module) is image_encoder.Attention and module.use_rel_pos:
            module.__class__ = Attention
    return sam


def checkpoint_blocks(sam: Sam) -> None:
    """Makes the encoder keep only what enters each block for the backward pass, and compute the rest again there."""
    for module in sam.image_encoder.modules():
        if isinstance(module, (image_encoder.Block, TinyVitBlock)):
            kind = type(module)
            module.__class__ = type(kind.__name__, (_Checkpointed, kind), {})


class _Checkpointed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        return cast(Tensor, checkpoint(super().forward, x, use_reentrant=False))


class Attention(image_encoder.Attention):  # type: ignore[misc]
    """Attention among the tokens of an image or of a window, with SAM's decomposed relative positions."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, h, w, _ = x.shape
        q, k, v = self.qkv(x).view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        grid = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, image_encoder.get_rel_pos(h, h, self.rel_pos_h)).flatten(2, 3)
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, image_encoder.get_rel_pos(w, w, self.rel_pos_w)).flatten(2, 3)
        attend = _by_kernel if x.is_cuda or _kernels.get() else _in_parts
        out = attend(q, k, v, rows, columns, self.scale).transpose(1, 2).reshape(b, h, w, -1)
        result: Tensor = self.proj(out)
        return result


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attention by PyTorch's kernels; arguments and result as :func:`_in_parts` has them.

    Relative positions ride in the head's dimension: a query brings what it adds to the scores of each row and column,
    and a key says by ones and zeros in which it lies.
    """
    h, w, width = rows.shape[-1], columns.shape[-1], v.shape[-1]
    lies = torch.cat([
        torch.eye(h, device=q.device, dtype=q.dtype).repeat_interleave(w, 0),
        torch.eye(w, device=q.device, dtype=q.dtype).repeat(h, 1),
    ], 1)  # fmt: skip
    q = torch.cat([q, rows / scale, columns / scale], 3)
    k = torch.cat([k, lies.expand(*k.shape[:2], -1, -1)], 3)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, h + w)), scale=scale)[..., :width]


def _in_parts(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attention by matrix products of a few rows at a time.

    q, k, v: [B, heads, T, c]. rows: [B, heads, T, H] and columns: [B, heads, T, W], what is added to the scores of the
    keys in each row and each column of the H x W = T tokens. Result: [B, heads, T, c].
    """
    flat = [t.flatten(0, 1) for t in (q * scale, k, v, rows, columns)]
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Parts.apply(*flat)
    result: Tensor = out.unflatten(0, q.shape[:2])
    return result


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for n, t in _parts(q):
            out[n, t] = torch.bmm(_weights(q, k, rows, columns, n, t), v[n])
        ctx.save_for_backward(q, k, v, rows, columns, out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v, rows, columns, out = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        drows, dcolumns = torch.empty_like(rows), torch.empty_like(columns)
        mean = (g * out).sum(2, keepdim=True)
        for n, t in _parts(q):
            weights, part = _weights(q, k, rows, columns, n, t), g[n, t]
            dv[n].baddbmm_(weights.transpose(1, 2), part)
            scores = torch.bmm(part, v[n].transpose(1, 2)).sub_(mean[n, t]).mul_(weights)
            dq[n, t] = torch.bmm(scores, k[n])
            dk[n].baddbmm_(scores.transpose(1, 2), q[n, t])
            grid = scores.unflatten(2, (rows.shape[2], columns.shape[2]))
            drows[n, t], dcolumns[n, t] = grid.sum(3), grid.sum(2)
        return dq, dk, dv, drows, dcolumns


def _parts(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the heads and of the tokens, of all of which about SCORES scores are made at a time."""
    heads, tokens, _ = q.shape
    some = min(heads, max(1, SCORES // (tokens * min(tokens, 256))))
    few = min(tokens, max(1, SCORES // (some * tokens)))
    for n in range(0, heads, some):
        for t in range(0, tokens, few):
            yield slice(n, n + some), slice(t, t + few)


def _weights(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, n: slice, t: slice) -> Tensor:
    """What the tokens ``t`` of the heads ``n`` take of each token, [n, t, T]."""
    scores = torch.bmm(q[n, t], k[n].transpose(1, 2))
    grid = scores.unflatten(2, (rows.shape[2], columns.shape[2]))
    grid.add_(rows[n, t, :, None]).add_(columns[n, t, None, :])
    return scores.softmax(2)
