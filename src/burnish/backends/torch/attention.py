"""Attention in which a token sees only its own example, at the cost of its own example.

Examples lie one after another in a single row [1, N]; every linear layer sees them as one matrix, without
padding. Attention is taken segment by segment with the plain causal kernel, so no N×N mask exists, examples
cannot leak into one another, and memory and time follow Σ Tᵢ² instead of N². Segments of equal length share
one kernel call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from burnish.errors import Unsupported

NAME = "burnish"


@dataclass
class Segments:
    """Lengths of the examples in a row, and how many attention layers have used them since."""

    lengths: Sequence[int]
    # bool [B, T, T], where rows of equal length hold several examples on a device that compiles every shape:
    # then attention is taken row by row under it, instead of example by example.
    mask_BTT: torch.Tensor | None = None
    seen: int = 0


def install() -> None:
    """Make the attention below known to transformers under NAME (transformers' own registry)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def unused_mask(device: torch.device) -> torch.Tensor:
    """A four-dimensional mask is handed through untouched by transformers, so none of size N×N is built."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D], key and value [1, Hkv, N, D] → [1, N, H, D]. Without `segments` (generation): plain
    SDPA.
    """
    if softcap is not None or s_aux is not None:
        raise Unsupported(
            "this model's attention uses score capping or sinks, which the torch backend does not have"
        )
    if segments is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    segments.seen += 1
    groups = query.shape[1] // key.shape[1]
    native = query.device.type == "cuda"  # the CUDA kernels read grouped heads as they are
    if groups > 1 and not native:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sliding_window is not None and q.shape[2] > sliding_window:
            near = _near(q.shape[2], sliding_window, q.device)
            mask = near if mask is None else near & mask
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=native and groups > 1
        )

    lengths = segments.lengths
    if segments.mask_BTT is not None:
        q, k, v = (_split(t, len(segments.mask_BTT)) for t in (query, key, value))
        out = _joined(attend(q, k, v, segments.mask_BTT[:, None]))
    elif len(lengths) == 1:
        out = attend(query, key, value)
    elif len(set(lengths)) == 1:
        out = _joined(attend(*(_split(t, len(lengths)) for t in (query, key, value))))
    else:
        parts = (t.split(list(lengths), dim=2) for t in (query, key, value))
        out = torch.cat([attend(q, k, v) for q, k, v in zip(*parts, strict=True)], dim=2)
    return out.transpose(1, 2), None


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [T, T]: s is t or one of the window - 1 before it."""
    at = torch.arange(length, device=device)
    apart = at[:, None] - at[None, :]
    return (apart >= 0) & (apart < window)


def _split(t_1HND: torch.Tensor, n: int) -> torch.Tensor:
    """[1, H, n·T, D] → [n, H, T, D]"""
    _, heads, length, size = t_1HND.shape
    return t_1HND[0].view(heads, n, length // n, size).transpose(0, 1)


def _joined(t_nHTD: torch.Tensor) -> torch.Tensor:
    n, heads, length, size = t_nHTD.shape
    return t_nHTD.transpose(0, 1).reshape(1, heads, n * length, size)
