"""How many bytes a run needs with MLX, part by part, where layers run backward one by one.

The engine evaluates layer after layer and frees what it no longer needs, so less lives at one time than under
autograd: a recomputed layer's input is gone by the time its gradient is there. The constants are counts of
the tensors that the engine is known to hold; each is named, so that it can be fitted from a measured peak.
"""

from __future__ import annotations

import math

from burnish.models.spec import ModelSpec
from burnish.planning.memory import (
    ELEMENT_BYTES,
    Part,
    Shape,
    adapter_parameters,
    held_as,
    supervised_tokens,
    trained_layers,
)

GROUP = 64  # weights that share a scale and a bias
# Values of a token that live at once while one layer runs forward again and backward: so many as wide as the
# MLP, as the hidden state, as the queries.
WORK_INTERMEDIATE, WORK_HIDDEN, WORK_QUERIES = 6, 10, 3
WIDENED = 2  # weights that are dequantised or widened at one time
SCORES_BLOCK_BYTES = 32 << 20  # of attention's scores, float32, in one block
SCORES_BLOCKS = 8  # scores, probabilities, the gradients of both, and what is widened of them
# Families that compute their scores themselves: all heads' at once, and the gradient's copies of them.
OWN_ATTENTION, OWN_SCORES = ("gemma2",), 6
HEAD_TILE = 16384  # words of the head that are multiplied at one time
# What mx.get_peak_memory does not count: the context (CUDA) or the driver's own (Metal); on the CPU Python
# and what the allocator keeps.
FRAMEWORK_BYTES = {"cpu": 700 << 20, "cuda": 600 << 20, "metal": 300 << 20}


def estimate_mlx(spec: ModelSpec, s: Shape) -> tuple[Part, ...]:
    tokens, element = s.micro_batch * s.length, ELEMENT_BYTES[s.compute]
    adapter = adapter_parameters(spec, s)
    depth = trained_layers(spec, s)
    kept = min(s.keep_layers, depth)
    inputs, gradients = (depth - kept) * tokens * spec.hidden_size * element, 4 * adapter
    # Over the first micro-batch of a step inputs go as gradients come; over a second, both are there.
    saved = max(inputs, gradients) if s.passes == 1 else inputs + gradients
    activations = kept * layer_activation_bytes(spec, s)
    moments = {
        "one layer's backward pass": layer_work(spec, s),
        "the loss slice": loss_bytes(spec, s),
        # New adapter and new AdamW moments beside the old ones, when only gradients are left of the rest.
        "the update": max(0, 12 * adapter - (saved - gradients) - activations),
    }
    moment = max(moments, key=lambda name: moments[name])
    return (
        Part(
            "weights", weight_bytes(spec, s), f"{spec.parameters / 1e9:.2f} billion parameters, {held_as(s)}"
        ),
        Part("adapter", 4 * adapter, f"rank {s.rank}, {len(s.targets)} projections × {len(s.layers)} layers"),
        Part("optimizer", 8 * adapter, "AdamW: two float32 moments per adapter weight"),
        Part(
            "saved inputs, then gradients",
            saved,
            f"of {depth - kept} recomputed layers"
            + (", the larger of the two" if s.passes == 1 else f", both: {s.passes} passes a step"),
        ),
        Part("kept activations", activations, f"{kept} of {spec.n_layers} layers are kept"),
        Part("largest moment", moments[moment], f"{moment}, the largest of the three"),
        Part("batch", 24 * tokens, "tokens, targets, weights, positions"),
        Part("framework", FRAMEWORK_BYTES[s.device], "the framework's own, without any model"),
    )


def weight_bytes(spec: ModelSpec, s: Shape) -> int:
    """Matrices in 4 or 8 bits, embedding and head among them, with a scale and a bias a group, stored as the
    folder's numbers or as wide as is computed in; the rest in the dtype it is held in. A folder that is
    packed already keeps its bits.
    """
    held, least = ELEMENT_BYTES[s.weights], ELEMENT_BYTES[s.compute]
    if spec.quantization is not None:
        packed, scales = spec.unpacked.keys(), (".scales", ".biases")
        return sum(
            t.n_bytes
            if name in packed
            else max(t.n_bytes, least * math.prod(t.shape))
            if name.endswith(scales)
            else held * math.prod(t.shape)
            for name, t in spec.tensors.items()
        )
    if s.quantize == "none":
        return spec.parameters * held
    matrices = [t for t in spec.tensors.values() if len(t.shape) == 2 and t.shape[1] % GROUP == 0]
    weights = sum(math.prod(t.shape) for t in matrices)
    stored = max((t.n_bytes // math.prod(t.shape) for t in matrices), default=0)
    per_weight = int(s.quantize.removesuffix("bit")) / 8 + 2 * max(least, stored) / GROUP
    return round(weights * per_weight) + (spec.parameters - weights) * held


def layer_activation_bytes(spec: ModelSpec, s: Shape) -> int:
    """What is kept of one decoder layer for one micro-batch: its input, and the outputs of its projections.

    The last projection's output is the next layer's input and is not kept twice; the layer's own input is
    just as wide, so that the sum over all projections counts both.
    """
    per_token = sum(out for out, _ in spec.linears.values())
    return ELEMENT_BYTES[s.compute] * s.micro_batch * s.length * per_token


def layer_work(spec: ModelSpec, s: Shape) -> int:
    """One layer run forward again and backward."""
    element = ELEMENT_BYTES[s.compute]
    per_token = (
        WORK_INTERMEDIATE * spec.intermediate_size
        + WORK_HIDDEN * spec.hidden_size
        + WORK_QUERIES * spec.n_heads * spec.head_dim
    )
    widest = max((math.prod(shape) for shape in spec.linears.values()), default=0)
    widened = WIDENED * widest * element if s.quantize != "none" or s.weights != s.compute else 0
    return element * s.micro_batch * s.length * per_token + widened + scores_bytes(spec, s)


def scores_bytes(spec: ModelSpec, s: Shape) -> int:
    """Attention's scores, block by block; a fused kernel for CUDA in bfloat16 writes none."""
    every = 4 * spec.n_heads * s.micro_batch * s.length**2
    if spec.model_type in OWN_ATTENTION:
        return OWN_SCORES * every
    if s.device == "cuda" and s.compute == "bfloat16" and spec.head_dim <= 128:
        return 0
    return SCORES_BLOCKS * min(SCORES_BLOCK_BYTES, every)


def loss_bytes(spec: ModelSpec, s: Shape) -> int:
    """Logits and their gradient for one slice, one float32 copy, one tile of the head, hidden states and
    gradient of all targets.
    """
    element, targets = ELEMENT_BYTES[s.compute], supervised_tokens(s)
    logits = min(s.loss_slice, max(targets, 1)) * spec.vocab_size * (2 * element + 4)
    tile = min(HEAD_TILE, spec.vocab_size) * spec.hidden_size * element
    return logits + tile + 2 * targets * spec.hidden_size * element
