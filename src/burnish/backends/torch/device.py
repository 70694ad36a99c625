"""The one place that asks which device this is: memory counters, cache, and what an error's text means."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager

import torch

from burnish.backends.base import Memory, translating
from burnish.errors import NonFinite, OutOfMemory, Unsupported
from burnish.machine.usage import available_bytes, give_back, peak_resident_bytes, resident_bytes

# Texts as the frameworks write them (torch 2.6 to 2.15, bitsandbytes 0.50); tests hold whole recorded
# messages.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA out of memory. Tried to allocate …; MPS backend out of memory (MPS allocated: …
    "can't allocate memory",  # DefaultCPUAllocator: can't allocate memory: …
    "not enough memory",  # DefaultCPUAllocator: not enough memory: you tried to allocate … bytes.
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Invalid buffer size",  # MPS: one buffer above the device's limit
)
# oneDNN on a CPU whose memory is limited (RLIMIT_DATA): the whole message. Of what it cannot do at all, it
# says more than that ("… a primitive descriptor for …").
_NOTHING_LEFT = ("could not create a primitive", "could not execute a primitive")
_MIXED_DTYPES = (
    "requires the same element type",  # 'mps.add' op requires … for all operands and results
    "to have the same dtype",  # expected mat1 and mat2 to have the same dtype, but got: …
    "must have the same dtype",
    "must match the dtype",
    "dtype mismatch",
)
_MISSING_OPERATION = (
    "not currently implemented for the MPS device",
    "is not currently supported on the MPS backend",
    "not implemented for",  # "addmm_impl_cpu_" not implemented for 'Half'
    "validateComputeFunctionArguments",
    "missing buffer binding",
)


def meaning(error: BaseException) -> Exception | None:
    """The typed error that a framework's error stands for; None where it is none of ours."""
    if isinstance(error, (OutOfMemory, NonFinite, Unsupported)):
        return None
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in text for t in _OUT_OF_MEMORY):
        return OutOfMemory(text)
    if text.strip() in _NOTHING_LEFT:
        return OutOfMemory(text)
    if any(t in text for t in _MIXED_DTYPES):
        return Unsupported(text, "dtype")
    if isinstance(error, NotImplementedError) or any(t in text for t in _MISSING_OPERATION):
        return Unsupported(text, "operation")
    return None


def translated() -> AbstractContextManager[None]:
    """Framework errors inside come out as OutOfMemory or Unsupported; all others pass unchanged."""
    return translating(meaning)


def free_cache(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        give_back()


def keeps_padding(device: torch.device) -> bool:
    """MPS compiles a graph for every new shape and keeps it (torch#132596), so there rows keep their common
    length.
    """
    return device.type == "mps"


class MemoryMeter:
    """Bytes on the device. MPS has no peak counter, so `sample` is called where a peak is expected."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def sample(self) -> None:
        if self._device.type == "mps":
            self._peak = max(self._peak, torch.mps.driver_allocated_memory())

    def read(self) -> Memory:
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            return Memory(
                torch.cuda.memory_allocated(self._device),
                torch.cuda.max_memory_allocated(self._device),
                total,
            )
        if self._device.type == "mps":
            self.sample()
            return Memory(torch.mps.driver_allocated_memory(), self._peak, torch.mps.recommended_max_memory())
        now = resident_bytes()
        return Memory(now, peak_resident_bytes(), now + available_bytes())
