"""The numbers that counting does not give, for each backend and device, fitted to measured peaks.

Measured are bench/memory/*.jsonl; `python bench/memory_fit.py` shows how well these do and fits them anew.
Those of mps and metal are the CUDA ones, where nothing says otherwise: no Mac has been measured, so what they
give is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Fitted:
    # Values of a token that live at once while one layer runs forward again and backward: so many as wide as
    # the MLP, as the hidden state, as the queries.
    work_intermediate: float
    work_hidden: float
    work_queries: float
    kept_work: float  # of that, what a layer takes whose activations are kept: they are counted apart
    # Copies of one slice's logits: torch, in float32, beside one as wide as is computed in where that is
    # narrower; mlx, two of what counting gives.
    logits: float
    widened: float  # weights that are widened or dequantised at one time, each as large as the widest matrix
    framework_bytes: int  # without any model: context and kernels of a GPU; on a CPU Python and the libraries
    workspace_bytes: int = 0  # of the libraries below, that the framework's allocator counts
    ahead: float = 0.0  # more of a layer's work, where one layer waits for the device while another runs
    ahead_widened: float = 0.0  # whole layers that are dequantised meanwhile
    # On a CPU freed memory is not always given back: so much of the largest moment is resident besides, where
    # layers are recomputed (pieces come and go between others that stay), and where all are kept, for each of
    # two passes.
    retained: float = 0.0
    retained_kept: float = 0.0


FITTED = {
    ("torch", "cuda"): Fitted(6.2, 6.8, 0.0, 0.33, 1.0, 1.0, 768 * MIB, 64 * MIB),
    ("torch", "mps"): Fitted(6.2, 6.8, 0.0, 0.33, 1.0, 1.0, 600 * MIB),
    ("torch", "cpu"): Fitted(9.9, 9.9, 0.0, 0.4, 0.95, 1.0, 443 * MIB, retained=1.13, retained_kept=0.31),
    ("mlx", "cuda"): Fitted(6.0, 10.0, 3.0, 0.75, 2.0, 2.0, 600 * MIB, 0, 0.7, 2.0),
    ("mlx", "metal"): Fitted(6.0, 10.0, 3.0, 0.75, 2.0, 2.0, 300 * MIB, 0, 0.7, 2.0),
    ("mlx", "cpu"): Fitted(12.0, 15.5, 4.2, 1.3, 4.0, 2.0, 340 * MIB, retained=0.54, retained_kept=0.29),
}
