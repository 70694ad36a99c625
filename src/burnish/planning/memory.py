"""How many bytes a run needs, part by part: pure arithmetic on a model spec and a handful of decided values.

First version: the formulas count the tensors that the engine is known to hold (docs/DESIGN.md, the engine).
Every run writes the measured peak beside this estimate, so that the constants can be fitted from evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from burnish.models.spec import ModelSpec

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
QUANTIZED_BYTES_PER_WEIGHT = {
    "4bit": 0.5 + 4 / 64
}  # NF4: half a byte, and one float32 scale for each 64 weights
# The framework itself: CUDA context and library workspaces, or the Python process beside the weights.
# Measured with a model of a few megabytes; the device's allocator adds slack on top, which the margin covers.
FRAMEWORK_BYTES = {"cpu": 400 << 20, "cuda": 600 << 20, "mps": 600 << 20}


@dataclass(frozen=True)
class Part:
    name: str
    n_bytes: int
    why: str


@dataclass(frozen=True)
class Shape:
    """The decided values that memory depends on."""

    device: str
    weights: str  # dtype the frozen base is held in
    compute: str  # dtype of activations
    quantize: str
    rank: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]  # adapted decoder layers
    micro_batch: int
    length: int
    keep_layers: int
    loss_slice: int
    loss_share: float  # share of tokens that are targets


def estimate(spec: ModelSpec, s: Shape) -> tuple[Part, ...]:
    tokens, element = s.micro_batch * s.length, ELEMENT_BYTES[s.compute]
    adapter = adapter_parameters(spec, s)
    work = layer_activation_bytes(spec, s)
    # Layers below the first adapted one carry no gradient, so nothing of them is kept.
    trained_depth = spec.n_layers - min(s.layers) if s.layers else 0
    kept = min(s.keep_layers, trained_depth)
    supervised = math.ceil(tokens * s.loss_share)
    return (
        Part(
            "weights", weight_bytes(spec, s), f"{spec.parameters / 1e9:.2f} billion parameters, {held_as(s)}"
        ),
        Part(
            "adapter",
            4 * adapter,
            f"LoRA rank {s.rank} on {len(s.targets)} projections × {len(s.layers)} layers, float32",
        ),
        Part("gradients", 4 * adapter, "one per adapter weight, float32"),
        Part("optimizer", 8 * adapter, "AdamW: two float32 moments per adapter weight"),
        Part(
            "saved inputs",
            (trained_depth - kept) * tokens * spec.hidden_size * element,
            f"the input of each recomputed layer, {tokens} tokens × {spec.hidden_size}",
        ),
        Part("kept activations", kept * work, f"{kept} of {spec.n_layers} layers are not recomputed"),
        Part(
            "one layer's work",
            2 * work,
            "a layer's activations, and their gradients, during its backward pass",
        ),
        Part(
            "loss slice",
            3 * min(s.loss_slice, max(supervised, 1)) * spec.vocab_size * 4
            + 2 * supervised * spec.hidden_size * element,
            f"logits, probabilities and gradient of {s.loss_slice} tokens × {spec.vocab_size} words, float32",
        ),
        Part("batch", 24 * tokens, "tokens, targets, weights, positions"),
        Part("framework", FRAMEWORK_BYTES[s.device], "the framework's own, without any model"),
    )


def total(parts: Iterable[Part]) -> int:
    return sum(p.n_bytes for p in parts)


def held_as(s: Shape) -> str:
    return s.weights if s.quantize == "none" else f"{s.quantize}, the rest {s.weights}"


def weight_bytes(spec: ModelSpec, s: Shape) -> int:
    linear = spec.n_layers * sum(math.prod(shape) for shape in spec.linears.values())
    if s.quantize == "none":
        return spec.parameters * ELEMENT_BYTES[s.weights]
    quantized = round(linear * QUANTIZED_BYTES_PER_WEIGHT[s.quantize])
    return quantized + (spec.parameters - linear) * ELEMENT_BYTES[s.weights]


def adapter_parameters(spec: ModelSpec, s: Shape) -> int:
    """A and B of every adapted projection: rank × (in + out)."""
    per_layer = sum(
        s.rank * sum(shape) for name, shape in spec.linears.items() if name.rsplit(".", 1)[-1] in s.targets
    )
    return per_layer * len(s.layers)


def layer_activation_bytes(spec: ModelSpec, s: Shape) -> int:
    """What autograd keeps of one decoder layer for one micro-batch.

    Two norms (input, float32 copy, output), q k v and their rotated copies, attention output, two residual
    sums, and gate, up, activation and product of the MLP. On a device without a fused attention backward
    (MPS) the scores too.
    """
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    per_token = ELEMENT_BYTES[s.compute] * (
        6 * spec.hidden_size + 2 * (q + kv) + kv + q + 4 * spec.intermediate_size
    )
    per_token += 4 * 2 * spec.hidden_size  # the norms compute in float32
    scores = 3 * 4 * spec.n_heads * s.micro_batch * s.length**2 if s.device == "mps" else 0
    return per_token * s.micro_batch * s.length + scores
