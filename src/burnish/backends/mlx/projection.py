"""The linear layers of a model, frozen, with or without an adapter, as the engine wants them.

    y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ

W may be quantised or held narrower than is computed in: it is widened for the moment of its product, which
for many rows is faster than a product with packed numbers (H100, 2,048 rows, 4 bits: 457 TFLOP/s against 127)
and whose backward pass needs only W again. A and B are float32; they are narrowed as they are used.

A projection does one of three things, as its `Context` says. PLAIN: the product. RECORD: the product, whose
outcome is noted. REPLAY: no product, the noted outcome is taken; only the gradient is computed. So a layer
whose activations are kept is run again in the backward pass without its products.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx import nn

from burnish.planning.memory_mlx import HEAD_TILE

PLAIN, RECORD, REPLAY = "plain", "record", "replay"
# With fewer rows than this a product with packed numbers is faster than to unpack them first.
FEW_ROWS = 32

# Of a projection: y, and drop(x) Aᵀ where it has an adapter. What no gradient asks for is None.
Outcome = tuple[mx.array | None, mx.array | None]


@dataclass
class Order:
    """The newest product of a layer's pass, which the next matrix waits for."""

    forward: mx.array | None = None
    back: mx.array | None = None


@dataclass
class Context:
    """What the projections of one model share. The engine sets it before it calls a layer."""

    compute: mx.Dtype
    dropout: float = 0.0
    mode: str = PLAIN
    outcomes: list[Outcome] = field(default_factory=list)  # noted, or still to be taken
    keys: mx.array | None = None  # uint32 [projections, 2]: names this layer's dropout masks; None: none
    order: Order | None = None  # a new one for every pass of the engine over a layer


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix W [out, in] and its bias b [out], as they were when it was made.

    A gradient is asked for after the layer has run, when the module may hold another layer's arrays.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bias: mx.array | None
    packing: dict[str, Any]  # group_size, bits, mode; empty: not packed

    def rows(self, at: slice | mx.array, dtype: mx.Dtype) -> mx.array:
        """Some rows of W in `dtype`."""
        scales, biases = (None if part is None else part[at] for part in (self.scales, self.biases))
        return self._widened(self.weight[at], scales, biases, dtype)

    def full(self, dtype: mx.Dtype) -> mx.array:
        return self._widened(self.weight, self.scales, self.biases, dtype)

    def _widened(
        self, weight: mx.array, scales: mx.array | None, biases: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        if scales is None:
            return weight.astype(dtype)
        return mx.dequantize(weight, scales, biases, **self.packing).astype(dtype)

    def after(self, *done: mx.array | None) -> Matrix:
        """The same matrix, not to be unpacked or widened before `done` are there. The first is what it is
        multiplied with.

        MLX takes what is ready first, and a matrix always is: without this a layer's matrices would all be
        unpacked before the first product.
        """
        given = [d for d in done if d is not None]
        if self.scales is None and self.weight.dtype == given[0].dtype:
            return self
        parts = [part for part in (self.weight, self.scales, self.biases) if part is not None]
        weight, *rest = mx.depends(parts, given)
        return replace(self, weight=weight, **dict(zip(("scales", "biases"), rest)))

    def product(self, x_ND: mx.array, order: Order | None = None) -> mx.array:
        """x Wᵀ + b, [N, out]."""
        if self.scales is not None and x_ND.shape[0] < FEW_ROWS:
            packed = self.weight, self.scales, self.biases
            y = mx.quantized_matmul(x_ND, *packed, transpose=True, **self.packing).astype(x_ND.dtype)
            return y if self.bias is None else y + self.bias.astype(x_ND.dtype)
        W = self.after(x_ND, order and order.forward).full(x_ND.dtype)
        y = x_ND @ W.T if self.bias is None else mx.addmm(self.bias.astype(x_ND.dtype), x_ND, W.T)
        if order is not None:
            order.forward = y
        return y

    def back(self, dy_NE: mx.array, order: Order | None = None) -> mx.array:
        """The gradient of x: dy W, [N, in]."""
        dx = dy_NE @ self.after(dy_NE, order and order.back).full(dy_NE.dtype)
        if order is not None:
            order.back = dx
        return dx


class Weight(nn.Module):
    """A module around a Matrix: the arrays of an nn.Linear, an nn.Embedding or a quantised one."""

    weight: mx.array

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "scales", "biases", "bias"):
            if name in source:
                setattr(self, name, source[name])
        self.packing: dict[str, Any] = {}
        if "scales" in source:
            self.packing = {"group_size": source.group_size, "bits": source.bits, "mode": source.mode}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.weight.shape
        return rows, columns * 32 // int(self.packing["bits"]) if self.packing else columns

    def matrix(self) -> Matrix:
        scales, biases, bias = (self.get(name) for name in ("scales", "biases", "bias"))
        return Matrix(self.weight, scales, biases, bias, self.packing)


class Projection(Weight):
    """A linear layer of a decoder layer."""

    def __init__(self, source: nn.Module, context: Context) -> None:
        super().__init__(source)
        self._context = context
        self.number, self.scale = 0, 0.0

    def adapt(self, A: mx.array, B: mx.array, scale: float, number: int) -> None:
        """Give it an adapter. number: its place among the adapted projections of its layer."""
        self.lora_a, self.lora_b = A, B
        self.scale, self.number = scale, number

    def __call__(self, x: mx.array) -> mx.array:
        x_ND = x.reshape(-1, x.shape[-1])
        return self._of(x_ND).reshape(*x.shape[:-1], -1)

    def _of(self, x_ND: mx.array) -> mx.array:
        context = self._context
        noted = context.outcomes.pop(0) if context.mode == REPLAY else None
        mask = self._mask(x_ND)
        if "lora_a" not in self:
            y, h = self._frozen(x_ND, noted), None
        else:
            y, h = self._adapted(x_ND, mask, noted)
        if context.mode == RECORD:
            context.outcomes.append((y, h))
        return y

    def _mask(self, x_ND: mx.array) -> mx.array | None:
        """0 with probability p, else 1: drawn from the key, so drawn again alike. What is kept counts
        1/(1-p), which is put into the scale: in 16 bits it would be rounded.
        """
        context = self._context
        if context.keys is None or not context.dropout or "lora_a" not in self:
            return None
        kept = mx.random.bernoulli(1 - context.dropout, x_ND.shape, key=context.keys[self.number])
        return kept.astype(x_ND.dtype)

    def _frozen(self, x_ND: mx.array, noted: Outcome | None) -> mx.array:
        W, order = self.matrix(), self._context.order

        @mx.custom_function
        def product(x: mx.array) -> mx.array:
            return W.product(x, order) if noted is None or noted[0] is None else noted[0]

        @product.vjp
        def _(primals: mx.array, dy: mx.array, _: mx.array) -> mx.array:
            return W.back(dy, order)

        return product(x_ND)  # type: ignore[return-value]

    def _adapted(
        self, x_ND: mx.array, mask: mx.array | None, noted: Outcome | None
    ) -> tuple[mx.array, mx.array]:
        W, order = self.matrix(), self._context.order
        scale = self.scale if mask is None else self.scale / (1 - self._context.dropout)
        a, b = self.lora_a.astype(x_ND.dtype), self.lora_b.astype(x_ND.dtype)

        def low(x: mx.array) -> mx.array:
            return (x if mask is None else x * mask) @ a.T

        # Outside of what is differentiated: the backward pass below has its own way with it.
        h_NR = low(mx.stop_gradient(x_ND)) if noted is None or noted[1] is None else noted[1]

        @mx.custom_function
        def product(x: mx.array, A: mx.array, B: mx.array) -> mx.array:
            if noted is not None and noted[0] is not None:
                return noted[0]
            return mx.addmm(W.product(x, order), h_NR, b.T, alpha=scale)

        @product.vjp
        def _(primals: tuple[mx.array, ...], dy: mx.array, _: mx.array) -> tuple[mx.array, ...]:
            x, _, B = primals
            # Scaled in float32: beside 16 bits MLX would round the scale itself.
            dh = dy @ (B * scale).astype(dy.dtype)
            dA = dh.T @ (x if mask is None else x * mask)
            dB = (dy.T @ h_NR).astype(mx.float32) * scale
            dx = W.back(dy, order)
            dx = mx.addmm(dx, dh, a) if mask is None else dx + (dh @ a) * mask
            return dx, dA.astype(mx.float32), dB

        y: mx.array = product(x_ND, self.lora_a, self.lora_b)  # type: ignore[assignment]
        return y, h_NR


class Head(Weight):
    """The output layer: logits, a tile of words at a time where its matrix must be unpacked or widened."""

    def __call__(self, x: mx.array) -> mx.array:
        x_ND, W = x.reshape(-1, x.shape[-1]), self.matrix()
        few = W.scales is not None and x_ND.shape[0] < FEW_ROWS
        ready = W.scales is None and W.weight.dtype == x.dtype
        y = W.product(x_ND) if few or ready else _tiled(W, x_ND)
        return y.reshape(*x.shape[:-1], -1)


def _tiled(W: Matrix, x_ND: mx.array) -> mx.array:
    tiles = [slice(i, i + HEAD_TILE) for i in range(0, W.weight.shape[0], HEAD_TILE)]

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        parts = [x]
        for at in tiles:
            parts.append(x @ W.after(parts[-1]).rows(at, x.dtype).T)
        return mx.concatenate(parts[1:], axis=-1)

    @product.vjp
    def _(primals: mx.array, dy: mx.array, _: mx.array) -> mx.array:
        dx = mx.zeros((dy.shape[0], x_ND.shape[1]), mx.float32)
        for at in tiles:
            dx = dx + dy[:, at] @ W.after(dx).rows(at, dy.dtype)
        return dx.astype(dy.dtype)

    y: mx.array = product(x_ND)  # type: ignore[assignment]
    return y if W.bias is None else y + W.bias.astype(x_ND.dtype)


class Embedding(Head):
    """Rows of the matrix in the dtype that is computed in; as a head, its transpose."""

    def __init__(self, source: nn.Module, context: Context) -> None:
        super().__init__(source)
        self._context = context

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.matrix().rows(tokens, self._context.compute)

    def as_linear(self, x: mx.array) -> mx.array:
        return super().__call__(x)
