"""How many bytes a run needs, part by part: pure arithmetic on a model spec and a handful of decided values.

`estimate` is for torch and the reference backend; `memory_mlx.estimate_mlx` is its like for MLX.

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
# The framework itself: CUDA context and library workspaces; on the CPU the Python process (about 400 MiB) and
# what glibc keeps of freed pieces (about 300 MiB measured, bench/RESULTS.md).
FRAMEWORK_BYTES = {"cpu": 700 << 20, "cuda": 600 << 20, "mps": 600 << 20}


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
    passes: int = 1  # micro-batches of a step


def estimate(spec: ModelSpec, s: Shape) -> tuple[Part, ...]:
    tokens, element = s.micro_batch * s.length, ELEMENT_BYTES[s.compute]
    adapter = adapter_parameters(spec, s)
    trained_depth = trained_layers(spec, s)
    kept = min(s.keep_layers, trained_depth)
    per_weight = 4 if s.compute == "float32" else 6  # float32, and a copy in the dtype that is computed in
    work, loss = layer_work(spec, s), loss_slice_bytes(spec, s)
    moment = "the loss slice" if loss > work else "one layer's backward pass"
    recomputed = trained_depth - kept
    return (
        Part(
            "weights", weight_bytes(spec, s), f"{spec.parameters / 1e9:.2f} billion parameters, {held_as(s)}"
        ),
        Part(
            "adapter",
            per_weight * adapter,
            f"rank {s.rank}, {len(s.targets)} projections × {len(s.layers)} layers",
        ),
        Part("gradients", 4 * adapter, "one per adapter weight, float32"),
        Part("optimizer", 8 * adapter, "AdamW: two float32 moments per adapter weight"),
        Part(
            "saved inputs",
            recomputed * tokens * spec.hidden_size * element,
            f"of {recomputed} recomputed layers",
        ),
        Part(
            "kept activations",
            kept * layer_activation_bytes(spec, s),
            f"{kept} of {spec.n_layers} layers are kept",
        ),
        Part("largest moment", max(work, loss), f"{moment}, the larger of the two"),
        Part("batch", 24 * tokens, "tokens, targets, weights, positions"),
        Part("framework", FRAMEWORK_BYTES[s.device], "the framework's own, without any model"),
    )


def total(parts: Iterable[Part]) -> int:
    return sum(p.n_bytes for p in parts)


def trained_layers(spec: ModelSpec, s: Shape) -> int:
    """Layers below the first adapted one carry no gradient, so nothing of them is kept."""
    return spec.n_layers - min(s.layers) if s.layers else 0


def supervised_tokens(s: Shape) -> int:
    """Of one micro-batch."""
    return math.ceil(s.micro_batch * s.length * s.loss_share)


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

    The inputs and outputs of two norms; q, k, v; attention's output; gate, up, activation and product of the
    MLP. Only CUDA's kernels read grouped key-value heads as they are; elsewhere they are repeated. On MPS,
    without a fused attention backward, the scores too. Measured at Qwen2-7B, 2,048 tokens on CUDA: 0.351 GiB
    a layer, this gives 0.375 (bench/RESULTS.md).
    """
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    kv = kv if s.device == "cuda" else q
    per_token = ELEMENT_BYTES[s.compute] * (
        4 * spec.hidden_size + 2 * q + 2 * kv + 4 * spec.intermediate_size
    )
    scores = 3 * 4 * spec.n_heads * s.micro_batch * s.length**2 if s.device == "mps" else 0
    return per_token * s.micro_batch * s.length + scores


def layer_work(spec: ModelSpec, s: Shape) -> int:
    """A layer's activations while it runs backward, and the gradients among them.

    Measured at Qwen2-7B on CUDA: 1.4 times the activations. Where the base is held narrower than computed in,
    one weight widened at a time comes on top.
    """
    widest = max((math.prod(shape) for shape in spec.linears.values()), default=0)
    widened = 4 * widest if s.weights != s.compute else 0
    return layer_activation_bytes(spec, s) * 3 // 2 + widened


def loss_slice_bytes(spec: ModelSpec, s: Shape) -> int:
    """One slice's logits, their probabilities and room for the product; hidden states and gradient of all
    targets.
    """
    supervised = supervised_tokens(s)
    logits = 3 * min(s.loss_slice, max(supervised, 1)) * spec.vocab_size * 4
    return logits + 2 * supervised * spec.hidden_size * ELEMENT_BYTES[s.compute]
