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
    retained: float = 0.0  # on a CPU: of the kept activations, what a step's second pass takes anew
    scores: float = 0.0  # mlx on a CPU: copies of attention's scores that are kept for reuse


FITTED = {
    ("torch", "cuda"): Fitted(6.2, 6.8, 0.0, 0.33, 1.0, 1.0, 768 * MIB, 64 * MIB),
    ("torch", "mps"): Fitted(6.2, 6.8, 0.0, 0.33, 1.0, 1.0, 600 * MIB),
    ("torch", "cpu"): Fitted(11.7, 13.8, 0.0, 0.91, 2.19, 1.0, 407 * MIB, retained=0.81),
    ("mlx", "cuda"): Fitted(6.0, 10.0, 3.0, 0.75, 2.0, 2.0, 600 * MIB, 0, 0.7, 2.0),
    ("mlx", "metal"): Fitted(6.0, 10.0, 3.0, 0.75, 2.0, 2.0, 300 * MIB, 0, 0.7, 2.0),
    ("mlx", "cpu"): Fitted(7.0, 14.0, 0.0, 1.0, 6.5, 5.5, 294 * MIB, scores=15.4),
}
