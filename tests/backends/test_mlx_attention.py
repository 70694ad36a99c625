"""exp, softmax, swiglu and attention on MLX's CPU against float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from burnish.backends.mlx.attention import CPU_BLOCK_ROWS, Mask, additive, attention  # noqa: E402
from burnish.backends.mlx.cpu_math import exp, softmax, swiglu  # noqa: E402

RNG = np.random.default_rng(8)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):
        yield


def wide(x: Any) -> np.ndarray:
    return np.array(x).astype(np.float64)


# --- exp, softmax, swiglu ---


@pytest.mark.parametrize("compiled", [False, True])
def test_exp_is_nearer_than_two_in_ten_million(compiled: bool) -> None:
    x = np.concatenate([np.linspace(-87, 88, 300_001), RNG.normal(0, 1e-3, 1000), [0.0]]).astype(np.float32)
    got = (mx.compile(exp) if compiled else exp)(mx.array(x))
    true = np.exp(x.astype(np.float64))
    assert got.dtype == mx.float32
    assert np.abs(wide(got) / true - 1).max() < 2e-7


def test_exp_beyond_its_range() -> None:
    x = mx.array([float("nan"), -1e30, float("-inf"), -88.0, 89.0])
    nan, *least, most = wide(exp(x))
    assert np.isnan(nan)
    assert all(0 <= v < 1e-37 for v in least)
    assert 1e38 < most < float("inf")


def test_the_gradient_of_exp_is_exp() -> None:
    x = mx.array(np.linspace(-20, 20, 1001), mx.float32)
    dy = mx.array(RNG.normal(size=1001), mx.float32)
    (y,), (dx,) = mx.vjp(exp, [x], [dy])
    np.testing.assert_array_equal(np.array(dx), np.array(dy * y))
    assert np.abs(wide(dx) / (wide(dy) * np.exp(wide(x))) - 1).max() < 3e-7


def test_exp_in_16_bits_is_mlxs_own() -> None:
    x = mx.array(np.linspace(-5, 5, 101)).astype(mx.bfloat16)
    assert exp(x).dtype == mx.bfloat16 and mx.array_equal(exp(x), mx.exp(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax(dtype: str) -> None:
    """Also where much is masked, and where everything is: then all are alike, and nothing is NaN.

    Not for longer rows: MLX adds a row up number by number, over 700 it is 3e-6 off.
    """
    kind, most = getattr(mx, dtype), 1e-6 if dtype == "float32" else 4e-3
    x = RNG.normal(0, 4, (3, 5, 150))
    x[0, 0, 10:] = -1e30
    x[1, 1, :] = -1e30
    given = mx.array(x, mx.float32).astype(kind)
    seen = wide(given.astype(mx.float32))
    e = np.exp(seen - seen.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    got = softmax(given)
    assert got.dtype == kind
    np.testing.assert_allclose(wide(got.astype(mx.float32)), p, atol=most, rtol=0)
    dy = RNG.normal(size=x.shape)
    _, (dx,) = mx.vjp(softmax, [given], [mx.array(dy, mx.float32).astype(kind)])
    true = p * (dy - (p * dy).sum(-1, keepdims=True))
    np.testing.assert_allclose(wide(dx.astype(mx.float32)), true, atol=2 * most, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_swiglu(compiled: bool) -> None:
    gate, x, dy = (RNG.normal(0, 3, (40, 33)).astype(np.float32) for _ in range(3))
    gate[0, :4] = -200, 200, -30, 0
    function: Callable[..., Any] = mx.compile(swiglu) if compiled else swiglu
    (y,), (d_gate, d_x) = mx.vjp(function, [mx.array(gate), mx.array(x)], [mx.array(dy)])
    g, v, d = (a.astype(np.float64) for a in (gate, x, dy))
    s = 1 / (1 + np.exp(-g))
    for got, true in ((y, g * s * v), (d_gate, d * v * s * (1 + g * (1 - s))), (d_x, d * g * s)):
        np.testing.assert_allclose(wide(got), true, atol=1e-6, rtol=1e-6)


# --- attention ---


def plain(q: Any, k: Any, v: Any, do: Any, scale: float, bias: np.ndarray) -> list[np.ndarray]:
    """Output and the gradients of q, k and v, in float64. bias: added to the scores, [B or 1, 1, T, T]."""
    q, k, v, do = (wide(a) for a in (q, k, v, do))
    share = q.shape[1] // k.shape[1]
    K, V = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    S = scale * q @ K.swapaxes(-1, -2) + bias
    e = np.exp(S - S.max(-1, keepdims=True))
    P = e / e.sum(-1, keepdims=True)
    dP = do @ V.swapaxes(-1, -2)
    dS = scale * P * (dP - (P * dP).sum(-1, keepdims=True))

    def added(dx_BHTd: np.ndarray) -> np.ndarray:
        return dx_BHTd.reshape(*k.shape[:2], share, *k.shape[2:]).sum(2)

    return [P @ V, dS @ K, added(dS.swapaxes(-1, -2) @ q), added(P.swapaxes(-1, -2) @ do)]


def masks(form: str, B: int, T: int) -> tuple[Mask, np.ndarray]:
    """A mask as `attention` takes it, and the same as numbers [B or 1, 1, T, T]."""
    causal = np.tri(T, dtype=bool)
    if form == "none":
        return None, np.zeros((1, 1, T, T))
    if form == "causal":
        return "causal", np.where(causal, 0, -1e30)[None, None]
    if form == "window":  # [T, T]
        sees = causal & ~np.tri(T, k=-9, dtype=bool)
        return additive(mx.array(sees), mx.float32), np.where(sees, 0, -1e30)[None, None]
    # Several examples a row, borders of each row's own: [B, 1, T, T].
    numbers = np.arange(T)[None] >= (np.arange(B)[:, None] + 1) * T // (B + 2)
    sees = (numbers[:, :, None] == numbers[:, None, :])[:, None] & causal
    return additive(mx.array(sees), mx.float32), np.where(sees, 0, -1e30)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("T", [7, CPU_BLOCK_ROWS, 2 * CPU_BLOCK_ROWS + 22])
@pytest.mark.parametrize(("H", "K"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("form", ["causal", "window", "packed", "none"])
def test_attention_is_the_plain_formula(form: str, H: int, K: int, T: int, backward: bool) -> None:
    B, d, scale = 2, 16, 0.3
    mask, bias = masks(form, B, T)
    q, do = (mx.array(RNG.normal(size=(B, H, T, d)), mx.float32) for _ in range(2))
    k, v = (mx.array(RNG.normal(size=(B, K, T, d)), mx.float32) for _ in range(2))
    attend = partial(attention, scale=scale, mask=mask, backward=backward)
    (o,), gradients = mx.vjp(attend, [q, k, v], [do])
    for name, got, true in zip(["o", "dq", "dk", "dv"], [o, *gradients], plain(q, k, v, do, scale, bias)):
        assert np.abs(wide(got) - true).max() < 3e-6 * np.abs(true).max(), name


def test_a_compiled_backward_pass_never_holds_all_scores() -> None:
    """Neither all scores nor, as the plain formula's gradient does, several times as much."""
    B, H, T, d = 1, 8, 1024, 16
    all_scores_bytes = B * H * T * T * 4

    def gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
        return mx.compile(lambda q, k, v, do: mx.vjp(attend, [q, k, v], [do])[1])

    def stock(q: Any, k: Any, v: Any) -> Any:
        hidden = mx.where(mx.tri(T).astype(mx.bool_), 0.0, -1e30)
        return mx.softmax(q @ k.swapaxes(-1, -2) * 0.25 + hidden, axis=-1) @ v

    peaks = []
    for attend in (partial(attention, scale=0.25, mask="causal", backward=True), stock):
        arrays = [mx.array(RNG.normal(size=(B, H, T, d)), mx.float32) for _ in range(4)]
        mx.eval(arrays)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradients(attend)(*arrays))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] < 1.5 * all_scores_bytes < peaks[1], peaks
