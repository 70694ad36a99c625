"""How far an export may be from the trained model, by type: in nats a token, and in share of the adapter.

Each limit is some three times what was measured of good exports (bench/RESULTS.md), and far below what the
broken ones of `tests/export` give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    mean: float  # |difference| of a target's loss, in nats
    worst: float
    divergence: float  # nats a token
    least: float  # of the adapter's effect
    most: float
    greedy: float  # least share of the same likeliest answers: they alone are made with a cache
    why: str


EXACT = Limits(
    2e-4, 1e-3, 2e-4, 0.99, 1.01, 0.75, "the same numbers in float32: only the order of sums differs"
)
HALF = Limits(2e-2, 0.5, 8e-3, 0.97, 1.03, 0.25, "every weight is rounded once to 8 bits (bfloat16)")
HALF_F16 = Limits(5e-3, 0.1, 2e-3, 0.98, 1.02, 0.5, "every weight is rounded once to 11 bits (float16)")
EIGHT = Limits(
    5e-2, 2.0, 2e-2, 0.95, 1.05, 0.0, "8 bits a weight, a scale a block; llama.cpp rounds inputs as well"
)
SIX = Limits(0.1, 4.0, 5e-2, 0.92, 1.08, 0.0, "6 bits a weight")
# Single tokens are heavy-tailed from here on: what a small model was unsure of, rounding turns over. A wrong
# export is told by the mean and by survival.
FIVE = Limits(0.3, 12.0, 0.4, 0.88, 1.12, 0.0, "5 to 6 bits a weight")
FOUR = Limits(0.4, 12.0, 0.5, 0.8, 1.2, 0.0, "4 to 6 bits a weight, 8 where the adapter needs them")

# (what, type) → limits. An adapter alone is not rounded; its base is the reader's own.
LIMITS = {
    ("hf", "float32"): EXACT,
    ("hf", "float16"): HALF_F16,
    ("hf", "bfloat16"): HALF,
    ("hf", "adapter"): EXACT,
    ("mlx", "16bit"): HALF,
    ("mlx", "8bit"): EIGHT,
    ("mlx", "4bit"): FOUR,
    ("mlx", "adapter"): EXACT,
    # llama.cpp's GELU on a CPU is a table in float16 (Gemma); others are as near as EXACT.
    ("gguf", "f32"): replace(EXACT, mean=5e-3, worst=5e-2, divergence=2e-3),
    ("gguf", "f16"): HALF_F16,
    ("gguf", "bf16"): HALF,
    ("gguf", "q8_0"): EIGHT,
    ("gguf", "q6_k"): SIX,
    ("gguf", "q5_k_m"): FIVE,
    ("gguf", "q4_k_m"): FOUR,
    ("gguf", "adapter"): HALF_F16,
}


def limits_of(what: str, type: str, dtype: str) -> Limits:
    """dtype: that the live model was held in. Where it is no float32, both sides round as they compute, and
    no export is nearer than one of bfloat16.
    """
    own = LIMITS[what, type]
    if dtype == "float32":
        return own
    return Limits(
        max(own.mean, HALF.mean), max(own.worst, HALF.worst), max(own.divergence, HALF.divergence),
        min(own.least, HALF.least), max(own.most, HALF.most), min(own.greedy, HALF.greedy),
        f"{own.why}; the trained model was held in {dtype}",
    )  # fmt: skip
