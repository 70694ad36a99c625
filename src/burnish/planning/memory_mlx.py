"""How many bytes a run needs with MLX, part by part, where layers run backward one by one.

The engine evaluates layer after layer and frees what it no longer needs, so less lives at one time than under
autograd: a recomputed layer's input is gone by the time its gradient is there. The constants are counts of
the tensors that the engine is known to hold, and `fitted.py` has what counting does not give. Where one layer
waits for the device while another runs (`Shape.ahead`), the buffers of both are there: MLX hands out memory
when work is queued.

On a CPU nothing that was freed is given back while a step runs: MLX keeps it, up to a limit, for the next
array of nearly the same size (`backends/mlx/device.py`, `limits`). What a layer, the loss and the update take
one after another has other sizes and so adds up: `kept_for_reuse`. The resident peak repeats to the MiB.
"""

from __future__ import annotations

import math

from burnish.models.spec import ModelSpec
from burnish.planning.fitted import FITTED, Fitted
from burnish.planning.memory import (
    ELEMENT_BYTES,
    Moment,
    Part,
    Shape,
    adapter_parameters,
    left_over,
    parts,
    peak,
    share_of_work,
    supervised_tokens,
    work_values,
)

GROUP = 64  # weights that share a scale and a bias
SCORES_BLOCK_BYTES = 32 << 20  # of attention's scores, float32, in one block
SCORES_BLOCKS = 8  # scores, probabilities, the gradients of both, and what is widened of them
# Families that compute their scores themselves: all heads' at once, and the gradient's copies of them.
OWN_ATTENTION, OWN_SCORES = ("gemma2",), 6
LEAST_SLICE = 64  # rows of a slice of the loss: fewer make the head's product no faster
HEAD_TILE = 16384  # words of the head that are multiplied at one time
CPU_BLOCK_ROWS = 64  # queries of a block of scores on a CPU (backends/mlx/attention.py)
MOST_REUSED_BYTES = 4 << 30  # of freed buffers that are kept (backends/mlx/device.py)


def estimate_mlx(spec: ModelSpec, s: Shape) -> tuple[Part, ...]:
    fit, activations = FITTED["mlx", s.device], layer_activation_bytes(spec, s)
    update = 12 * adapter_parameters(spec, s)  # a new adapter and new AdamW moments, beside the old ones
    loss = loss_bytes(spec, s, fit)
    largest = peak(spec, s, activations, lambda share: layer_work(spec, s, fit, share), fit, loss, update)
    beyond = kept_for_reuse(spec, s, fit, activations, loss, largest) + lingering_bytes(spec, s)
    return parts(spec, s, fit, weight_bytes(spec, s), 0, largest, beyond)


def kept_for_reuse(
    spec: ModelSpec, s: Shape, fit: Fitted, activations: int, loss: int, largest: Moment
) -> int:
    """On a CPU: the buffers of all other moments than the largest, each of its own size."""
    if s.device != "cpu":
        return 0
    work = round(share_of_work(spec, s, fit) * ELEMENT_BYTES[s.compute] * work_values(spec, s, fit))
    work += reused_scores_bytes(spec, s, fit)
    if s.quantize != "none":  # a layer unpacked; the head, on the way forward and on the way back
        head = 2 * spec.vocab_size * spec.hidden_size
        work += ELEMENT_BYTES[s.compute] * (round(fit.widened * spec.layer_weights) + head)
    return min(left_over(spec, s, fit, activations, work + loss, largest), MOST_REUSED_BYTES)


def reused_scores_bytes(spec: ModelSpec, s: Shape, fit: Fitted) -> int:
    """A block of scores for every number of keys that a block's queries see, several copies of each."""
    if spec.model_type in OWN_ATTENTION:
        return scores_bytes(spec, s)
    blocks = spec.n_heads * s.micro_batch * s.length * (s.length + CPU_BLOCK_ROWS) // 2
    return round(fit.scores * 4 * blocks)


def lingering_bytes(spec: ModelSpec, s: Shape) -> int:
    """On a CPU: what an update has replaced, and of a file that is narrower than the weights are held."""
    if s.device != "cpu":
        return 0
    held = weight_bytes(spec, s)
    return 12 * adapter_parameters(spec, s) + (spec.weight_bytes // 4 if spec.weight_bytes < held else 0)


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


def layer_work(spec: ModelSpec, s: Shape, fit: Fitted, share: float) -> int:
    """One layer run forward again and backward, and what waits behind it. share: of its values, for a layer
    whose products are kept.
    """
    values = share * (1 + s.ahead * fit.ahead) * work_values(spec, s, fit)
    widest = max((math.prod(shape) for shape in spec.linears.values()), default=0)
    widened = fit.ahead_widened * spec.layer_weights if s.ahead else fit.widened * widest
    return round(ELEMENT_BYTES[s.compute] * (values + widened * s.widens)) + scores_bytes(spec, s)


def scores_bytes(spec: ModelSpec, s: Shape) -> int:
    """Attention's scores, block by block; a fused kernel for CUDA in bfloat16 writes none."""
    every = 4 * spec.n_heads * s.micro_batch * s.length**2
    if spec.model_type in OWN_ATTENTION:
        return OWN_SCORES * every
    if s.device == "cuda" and s.compute == "bfloat16" and spec.head_dim <= 128:
        return 0
    block = SCORES_BLOCK_BYTES
    if s.device == "cpu":
        block = min(block, 4 * spec.n_heads * s.micro_batch * s.length * CPU_BLOCK_ROWS)
    return SCORES_BLOCKS * min(block, every)


def slice_rows(targets: int, most: int) -> int:
    """Rows of a slice of the loss, in tokens: one of few sizes, so that few graphs are compiled."""
    rows = LEAST_SLICE
    while rows < min(targets, most):
        rows *= 2
    return min(rows, most)


def loss_bytes(spec: ModelSpec, s: Shape, fit: Fitted) -> int:
    """Logits and their gradient for one slice, one float32 copy; a tile of the head, or all of it where none
    waits for another; hidden states and gradient of all targets.
    """
    element, targets = ELEMENT_BYTES[s.compute], supervised_tokens(s)
    logits = slice_rows(targets, s.loss_slice) * spec.vocab_size * (2 * element + 4)
    words = spec.vocab_size if s.ahead and s.widens else min(HEAD_TILE, spec.vocab_size)
    tile = words * spec.hidden_size * element
    return round(fit.logits / 2 * logits) + tile + 2 * targets * spec.hidden_size * element
