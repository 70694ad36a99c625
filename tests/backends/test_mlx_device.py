"""What MLX's errors mean, which kernels there are for whom, and limits that are put back."""

from __future__ import annotations

from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from burnish.backends.mlx.device import device_of, kernels, limits, meaning, translated  # noqa: E402
from burnish.errors import NonFinite, OutOfMemory, Unsupported  # noqa: E402

# Whole messages, as MLX wrote them.
NO_MEMORY = [
    "[metal::malloc] Attempting to allocate 33554432000 bytes which is greater than the maximum allowed "
    "buffer size of 22613000192 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[malloc] Unable to allocate 1099511627776 bytes.",
    "[malloc_async] Unable to allocate 9663676416 bytes.",
    "cudaMallocAsync(&p, size, stream) failed: out of memory",
]
NO_OPERATION = [
    "[quantized_matmul] No implementation for problem shape: 1x8x16x1 transpose: true, activation: float32, "
    "bits: 4, group size: 64, mode: affine",
]
NEITHER = [
    ValueError("[broadcast_shapes] Shapes (2,3) and (4,) cannot be broadcast."),
    ValueError(
        "[matmul] Last dimension of first input with shape (2,3) must match second to last dimension."
    ),
    RuntimeError("[eval] Attempting to eval an array without a primitive."),
    RuntimeError("There is no Stream(gpu, 1) in current thread."),
]


@pytest.mark.parametrize(("text", "kind"), [(t, OutOfMemory) for t in NO_MEMORY] + [
    (t, Unsupported) for t in NO_OPERATION
])  # fmt: skip
def test_a_message_becomes_a_type_and_keeps_its_words(text: str, kind: type[Exception]) -> None:
    cause = RuntimeError(text)
    assert type(meaning(cause)) is kind
    with pytest.raises(kind) as e, translated():
        raise cause
    assert str(e.value) == text and e.value.__cause__ is cause
    if kind is Unsupported:
        assert e.value.kind == "operation"  # type: ignore[attr-defined]  (a policy may try the CPU)


@pytest.mark.parametrize("error", NEITHER, ids=str)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    assert meaning(error) is None
    with pytest.raises(type(error)) as e, translated():
        raise error
    assert e.value is error and e.value.__cause__ is None


@pytest.mark.parametrize(
    "error", [OutOfMemory("Unable to allocate"), NonFinite("NYI"), Unsupported("NYI", "model")]
)
def test_ours_are_not_translated_again(error: Exception) -> None:
    with pytest.raises(type(error)) as e, translated():
        raise error
    assert e.value is error


def test_pythons_own_error_for_memory() -> None:
    with pytest.raises(OutOfMemory), translated():
        raise MemoryError()


# --- kernels ---

ANY, HALF, SINGLE = (16, 64, 80, 96, 128, 256), (mx.bfloat16, mx.float16), mx.float32
TABLE: list[tuple[str, Any, int, bool, bool, bool]] = [
    *(("cpu", dtype, d, backward, False, False)
      for d in ANY for dtype in (*HALF, SINGLE) for backward in (False, True)),
    *(("metal", dtype, d, False, True, False) for d in (64, 80, 128) for dtype in (*HALF, SINGLE)),
    *(("metal", dtype, d, False, False, False) for d in (16, 96, 256) for dtype in (*HALF, SINGLE)),
    *(("metal", dtype, d, True, False, False) for d in ANY for dtype in (*HALF, SINGLE)),
    *(("cuda", dtype, d, backward, True, True)
      for d in (16, 64, 80, 96, 128) for dtype in HALF for backward in (False, True)),
    *(("cuda", dtype, d, backward, False, False)
      for d in (20, 132, 256) for dtype in HALF for backward in (False, True)),
    *(("cuda", SINGLE, d, backward, False, False) for d in ANY for backward in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "backward", "fused_forward", "fused_backward"),
    TABLE,
    ids=lambda v: str(v).removeprefix("mlx.core."),
)
def test_kernels(
    device: str, dtype: Any, head_dim: int, backward: bool, fused_forward: bool, fused_backward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(mx.metal, "is_available", lambda: device == "metal")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: device == "cuda")
    have = kernels(device_of(device), dtype, head_dim, backward)
    assert (have.fused_forward, have.fused_backward) == (fused_forward, fused_backward)


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    with pytest.raises(Unsupported, match=f"no {name} device"):
        device_of(name)


# --- limits ---


def now() -> tuple[int, int]:
    """MLX's memory limit and cache limit; it tells them only when they are set."""
    memory, cache = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    return memory, cache


@pytest.mark.parametrize("fails", [False, True])
def test_limits_are_set_and_put_back(fails: bool) -> None:
    before, needed, budget = now(), 3 << 30, 4 << 30
    try:
        with limits(needed, budget):
            assert now() == (needed, budget - needed) != before
            with limits(5 << 30, 4 << 30):  # short of memory, one still keeps a little
                assert now() == (5 << 30, 256 << 20)
            with limits(1 << 30, 80 << 30):
                assert now() == (1 << 30, 4 << 30)
            assert now() == (needed, budget - needed)
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert fails
    assert now() == before
