"""The one place that asks which device MLX computes on: limits, counters, kernels, and what an error's text
means.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import mlx.core as mx

from burnish.backends.base import Memory, translating
from burnish.errors import NonFinite, OutOfMemory, Unsupported
from burnish.machine.usage import available_bytes, give_back, peak_resident_bytes, resident_bytes

# Texts as MLX writes them (0.32); tests hold whole recorded messages.
_OUT_OF_MEMORY = (
    "[metal::malloc] Attempting to allocate",  # … N bytes which is greater than the maximum allowed …
    "[metal::malloc] Resource limit",  # … (499000) exceeded: too many buffers, none of them large
    "Insufficient Memory",  # Command buffer execution failed: … (kIOGPUCommandBufferCallbackErrorOutOfMemory)
    "Unable to allocate",  # [malloc_async] Unable to allocate N bytes.
    "out of memory",  # cudaMallocAsync(…) failed: out of memory
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_MISSING_OPERATION = (
    "No implementation for",  # [quantized_matmul] No implementation for problem shape …
    "not yet implemented",
    "NYI",
    "has no CUDA implementation",
    "Not implemented for",
)
METAL_HEADS = (64, 80, 128)
# Freed buffers that MLX may hold on to, for the next layer to use again.
_MIN_CACHE_BYTES, _MAX_CACHE_BYTES = 256 << 20, 4 << 30


@dataclass(frozen=True)
class Kernels:
    """Which of attention's passes MLX does without holding all scores."""

    fused_forward: bool
    fused_backward: bool


def kernels(device: mx.Device, dtype: mx.Dtype, head_dim: int, backward: bool) -> Kernels:
    """What there is for heads of this size. backward: within a backward pass that runs the layer again.

    Metal has a forward pass, for three sizes, and takes the plain formula where a gradient is traced; CUDA,
    through cuDNN, has both in 16 bits and heads of at most 128.
    """
    if device == mx.cpu:
        return Kernels(False, False)
    if mx.metal.is_available():
        return Kernels(not backward and head_dim in METAL_HEADS, False)
    cudnn = dtype in (mx.bfloat16, mx.float16) and head_dim <= 128 and head_dim % 8 == 0
    return Kernels(cudnn, cudnn)


def device_of(name: str) -> mx.Device:
    """'cpu', 'metal', 'cuda' → MLX's device. Raises Unsupported where this MLX has no such device."""
    if name == "cpu":
        return mx.Device(mx.cpu)
    there = mx.metal.is_available() if name == "metal" else mx.cuda.is_available()
    if not there:
        raise Unsupported(f"the installed MLX has no {name} device")
    return mx.Device(mx.gpu)


def meaning(error: BaseException) -> Exception | None:
    """The typed error that MLX's error stands for; None where it is none of ours."""
    if isinstance(error, (OutOfMemory, NonFinite, Unsupported)):
        return None
    text = str(error)
    if isinstance(error, MemoryError) or any(t in text for t in _OUT_OF_MEMORY):
        return OutOfMemory(text)
    if isinstance(error, NotImplementedError) or any(t in text for t in _MISSING_OPERATION):
        return Unsupported(text, "operation")
    return None


def translated() -> AbstractContextManager[None]:
    """Framework errors inside come out as OutOfMemory or Unsupported; all others pass unchanged."""
    return translating(meaning)


@contextmanager
def limits(needed_bytes: int, budget_bytes: int) -> Iterator[None]:
    """Within, MLX waits for work to finish rather than run ahead into more than `needed_bytes`.

    MLX encodes operations faster than a GPU runs them, and every buffer between the two is held: a layer's
    temporaries add up instead of following one another. Told a limit, it waits when it is reached (H100: a
    chain of products held 10.7 GiB freely and 1.2 GiB under a limit, 4 % slower). The limit is soft: where
    nothing is left to wait for, it is exceeded.
    """
    cache_bytes = min(max(budget_bytes - needed_bytes, _MIN_CACHE_BYTES), _MAX_CACHE_BYTES)
    before = mx.set_memory_limit(needed_bytes), mx.set_cache_limit(cache_bytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])


def wire(device: mx.Device, budget_bytes: int) -> None:
    """Let Metal keep up to `budget_bytes` from being paged out, in this process; elsewhere do nothing."""
    if device == mx.cpu or not mx.metal.is_available():
        return
    # macOS refuses more than the recommended working set.
    most = int(mx.device_info()["max_recommended_working_set_size"])
    mx.set_wired_limit(min(budget_bytes, most))


def free_cache() -> None:
    gc.collect()
    mx.clear_cache()
    give_back()


class MemoryMeter:
    """Bytes in MLX's arrays on a GPU; on the CPU the process's resident memory, as for the other backends."""

    def __init__(self, device: mx.Device, limit_bytes: int) -> None:
        self._cpu, self._limit = device == mx.cpu, limit_bytes
        mx.reset_peak_memory()

    def read(self) -> Memory:
        if self._cpu:
            now = resident_bytes()
            return Memory(now, peak_resident_bytes(), now + available_bytes())
        return Memory(mx.get_active_memory(), mx.get_peak_memory(), self._limit)
