"""How many bytes a run needs, part by part: pure arithmetic on a model spec and a handful of decided values.

`estimate` is for torch and the reference backend; `memory_mlx.estimate_mlx` is its like for MLX.

The tensors that the engine is known to hold are counted (docs/DESIGN.md, the engine). Not all live at one
time: a step has a few moments that may be its largest (`Moment`), and the largest of them is the peak. What
counting does not give, such as the temporaries of a layer's backward pass, is in `fitted.py`.

On a CPU what one moment frees is still resident at the next (`left_over`), so there the peak is nearer to
the sum of the moments than to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from burnish.models.spec import ModelSpec
from burnish.planning.fitted import FITTED, Fitted

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
# With what 64 weights share: NF4's float32 scale, or MLX's scale and bias in 16 bits.
QUANTIZED_BYTES_PER_WEIGHT = {"4bit": 0.5 + 4 / 64, "8bit": 1 + 4 / 64}
# What torch's CUDA allocator gives a tensor of 10 MiB or more: whole pages of 2 MiB, of which it splits off
# again only what is more than 1 MiB (c10/cuda/CUDACachingAllocator).
LARGE_BYTES, PAGE_BYTES, SPLIT_BYTES = 10 << 20, 2 << 20, 1 << 20
ANSWERS_AT_ONCE = 16  # prompts answered side by side


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
    ahead: int = 0  # layers that wait for the device while one runs (mlx)
    prompt_tokens: int = 0  # of all prompts that are answered side by side; 0: nothing is asked
    answer_tokens: int = 0  # of their answers
    cache_bits: int = 0  # of the key-value cache; 0: as wide as is computed in

    @property
    def widens(self) -> bool:
        """Is the base held narrower than is computed in, and widened for its products?"""
        return self.quantize != "none" or self.weights != self.compute


@dataclass(frozen=True)
class Moment:
    """What lives at one moment of a step beside weights, adapter, optimizer and batch."""

    name: str
    saved: int = 0  # inputs of recomputed layers
    kept: int = 0  # activations of kept layers
    gradients: int = 0  # of the adapter
    work: int = 0  # what this moment itself takes

    @property
    def n_bytes(self) -> int:
        return self.saved + self.kept + self.gradients + self.work


def estimate(spec: ModelSpec, s: Shape) -> tuple[Part, ...]:
    fit, adapter = FITTED["torch", s.device], adapter_parameters(spec, s)
    activations, loss = layer_activation_bytes(spec, s), loss_slice_bytes(spec, s, fit)
    largest = peak(spec, s, activations, lambda share: layer_work(spec, s, fit, share), fit, loss, 0)
    narrow = 2 * adapter if s.compute == "bfloat16" else 0  # a copy in the dtype that is computed in
    work = layer_work(spec, s, fit, share_of_work(spec, s, fit)) + loss
    left = left_over(spec, s, fit, activations, work, largest)
    loading = loading_bytes(spec, s) - 12 * adapter - narrow  # which are made afterwards
    if loading > largest.n_bytes + left:
        largest, left = Moment("loading", work=loading), 0
    beyond = rounding_bytes(spec, s) + fit.workspace_bytes + left
    return parts(spec, s, fit, weight_bytes(spec, s), narrow, largest, beyond)


def parts(
    spec: ModelSpec, s: Shape, fit: Fitted, weights: int, narrow: int, largest: Moment, beyond: int
) -> tuple[Part, ...]:
    """What both backends' estimates consist of. narrow: bytes of the adapter beside its float32 weights;
    beyond: what the allocator has besides.
    """
    adapter = adapter_parameters(spec, s)
    adapted = f"rank {s.rank}, {len(s.targets)} projections × {len(s.layers)} layers"
    why = "freed, and not given back" if s.device == "cpu" else "whole pages, and workspace of libraries"
    return (
        Part("weights", weights, f"{spec.parameters / 1e9:.2f} billion parameters, {held_as(s)}"),
        Part("adapter", 4 * adapter + narrow, adapted),
        Part("optimizer", 8 * adapter, "AdamW: two float32 moments per adapter weight"),
        *_moment_parts(spec, s, largest),
        Part("batch", 24 * s.micro_batch * s.length, "tokens, targets, weights, positions"),
        *((Part("allocator", beyond, why),) if beyond else ()),
        Part("framework", fit.framework_bytes, "the framework's own, without any model"),
    )


def peak(
    spec: ModelSpec,
    s: Shape,
    activations: int,
    work: Callable[[float], int],
    fit: Fitted,
    loss: int,
    update: int,
) -> Moment:
    """The largest moment of a step, or of answering.

    activations: bytes that one kept layer keeps. work: of one layer's backward pass, given the share of its
    values that are not counted as kept. Inputs go and gradients come as the backward pass walks down, so
    either end may be the larger one. From a step's second micro-batch on all gradients are there throughout.
    Validation is a step's forward pass with nothing kept, and so never the largest.
    """
    trained = trained_layers(spec, s)
    kept = min(s.keep_layers, trained)
    inputs = s.micro_batch * s.length * spec.hidden_size * ELEMENT_BYTES[s.compute]
    gradients = 4 * adapter_parameters(spec, s)
    before = gradients if s.passes > 1 else 0
    halfway = max(before, gradients * kept // max(trained, 1))
    saved, held = (trained - kept) * inputs, kept * activations
    recomputed, last = work(1.0), work(fit.kept_work if kept else 1.0)
    first = recomputed if kept < trained else last + activations
    return max(
        (
            Moment("one layer's backward pass", saved, held, before, last),
            Moment("the loss slice", saved, held, before, loss),
            Moment("one layer's backward pass", saved, 0, halfway, recomputed if kept < trained else 0),
            Moment("one layer's backward pass", inputs, 0, gradients, first),
            Moment("the update", 0, 0, gradients, update),
            Moment("answering", work=answer_bytes(spec, s)),
        ),
        key=lambda m: m.n_bytes,
    )


def _moment_parts(spec: ModelSpec, s: Shape, m: Moment) -> tuple[Part, ...]:
    trained = trained_layers(spec, s)
    kept = min(s.keep_layers, trained)
    return (
        Part("saved inputs", m.saved, f"of {trained - kept} recomputed layers, where memory is at its peak"),
        Part("kept activations", m.kept, f"{kept} of {spec.n_layers} layers are kept"),
        Part("gradients", m.gradients, "one per adapter weight, float32, as many as are there at the peak"),
        Part("largest moment", m.work, f"{m.name}, the largest of all"),
    )


def left_over(spec: ModelSpec, s: Shape, fit: Fitted, activations: int, work: int, largest: Moment) -> int:
    """On a CPU: what the other moments than the largest have freed and is resident all the same.

    work: of a layer's backward pass and of the loss. glibc keeps freed pieces among others that stay, MLX
    keeps its buffers for the next array of their size, and what the next moment asks for has other sizes.
    From a step's second micro-batch on, kept activations do not all fit where the first one's lay.
    """
    if s.device != "cpu":
        return 0
    trained = trained_layers(spec, s)
    kept = min(s.keep_layers, trained)
    saved = (trained - kept) * s.micro_batch * s.length * spec.hidden_size * ELEMENT_BYTES[s.compute]
    every = saved + kept * activations + 4 * adapter_parameters(spec, s) + work
    again = round(fit.retained * kept * activations) if s.passes > 1 else 0
    return max(every - largest.n_bytes, 0) + again


def share_of_work(spec: ModelSpec, s: Shape, fit: Fitted) -> float:
    """Of a layer's work: all of it where one is recomputed."""
    return 1.0 if s.keep_layers < trained_layers(spec, s) else fit.kept_work


def total(found: Iterable[Part]) -> int:
    return sum(p.n_bytes for p in found)


def trained_layers(spec: ModelSpec, s: Shape) -> int:
    """Layers below the first adapted one carry no gradient, so nothing of them is kept."""
    return spec.n_layers - min(s.layers) if s.layers else 0


def supervised_tokens(s: Shape) -> int:
    """Of one micro-batch."""
    return math.ceil(s.micro_batch * s.length * s.loss_share)


def held_as(s: Shape) -> str:
    return s.weights if s.quantize == "none" else f"{s.quantize}, the rest {s.weights}"


def weight_bytes(spec: ModelSpec, s: Shape) -> int:
    linear = spec.n_layers * spec.layer_weights
    if s.quantize == "none":
        return spec.parameters * ELEMENT_BYTES[s.weights]
    quantized = round(linear * QUANTIZED_BYTES_PER_WEIGHT[s.quantize])
    return quantized + (spec.parameters - linear) * ELEMENT_BYTES[s.weights]


def rounding_bytes(spec: ModelSpec, s: Shape) -> int:
    """What torch's CUDA allocator gives the weights beyond their size; 1 % of a 14B model in bfloat16."""
    if s.device != "cuda":
        return 0
    packed = QUANTIZED_BYTES_PER_WEIGHT.get(s.quantize)

    def beyond(name: str, shape: Sequence[int]) -> int:
        per_weight = 0.5 if packed and ".layers." in name else ELEMENT_BYTES[s.weights]
        size = int(math.prod(shape) * per_weight)
        rest = -size % PAGE_BYTES
        return rest if size >= LARGE_BYTES and rest <= SPLIT_BYTES else 0

    return sum(beyond(name, t.shape) for name, t in spec.tensors.items())


def loading_bytes(spec: ModelSpec, s: Shape) -> int:
    """On a CPU the file is resident beside the weights made of it, where their dtypes differ."""
    copied = s.device == "cpu" and s.quantize == "none" and spec.weight_bytes != weight_bytes(spec, s)
    return spec.weight_bytes if copied else 0


def adapter_parameters(spec: ModelSpec, s: Shape) -> int:
    """A and B of every adapted projection: rank × (in + out)."""
    per_layer = sum(
        s.rank * sum(shape) for name, shape in spec.linears.items() if name.rsplit(".", 1)[-1] in s.targets
    )
    return per_layer * len(s.layers)


def layer_activation_bytes(spec: ModelSpec, s: Shape) -> int:
    """What autograd keeps of one decoder layer for one micro-batch.

    The inputs and outputs of two norms; q, k, v; attention's output; gate, up, activation and product of the
    MLP; the rank-sized products of the adapter. Only CUDA's kernels read grouped key-value heads as they are;
    elsewhere they are repeated. On MPS, without a fused attention backward, the scores too.
    """
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    kv = kv if s.device == "cuda" else q
    per_token = ELEMENT_BYTES[s.compute] * (
        4 * spec.hidden_size + 2 * q + 2 * kv + 4 * spec.intermediate_size + s.rank * len(s.targets)
    )
    scores = 3 * 4 * spec.n_heads * s.micro_batch * s.length**2 if s.device == "mps" else 0
    return per_token * s.micro_batch * s.length + scores


def layer_work(spec: ModelSpec, s: Shape, fit: Fitted, share: float) -> int:
    """A layer that runs forward again and backward: its activations, and the gradients among them. share: of
    that, for a layer whose activations are kept.

    Where the base is held narrower than computed in, weights are widened one at a time.
    """
    widest = max((math.prod(shape) for shape in spec.linears.values()), default=0)
    widened = round(fit.widened * widest) * ELEMENT_BYTES[s.compute] if s.widens else 0
    scores = 4 * 4 * spec.n_heads * s.micro_batch * s.length**2 if s.device == "mps" else 0
    values = round(share * work_values(spec, s, fit))
    return values * ELEMENT_BYTES[s.compute] + widened + scores


def work_values(spec: ModelSpec, s: Shape, fit: Fitted) -> int:
    per_token = (
        fit.work_intermediate * spec.intermediate_size
        + fit.work_hidden * spec.hidden_size
        + fit.work_queries * spec.n_heads * spec.head_dim
    )
    return round(s.micro_batch * s.length * per_token)


def loss_slice_bytes(spec: ModelSpec, s: Shape, fit: Fitted) -> int:
    """One slice's logits and the copies of them; hidden states and gradient of all targets."""
    supervised = supervised_tokens(s)
    logits = min(s.loss_slice, max(supervised, 1)) * spec.vocab_size * 4
    copies = fit.logits + (0.5 if s.compute == "bfloat16" else 0.0)  # one as wide as is computed in
    return round(copies * logits) + 2 * supervised * spec.hidden_size * ELEMENT_BYTES[s.compute]


def answer_bytes(spec: ModelSpec, s: Shape) -> int:
    """The key-value cache of all answers at their full length, one layer's forward pass over the prompts, and
    the logits of the next token.
    """
    if not s.prompt_tokens:
        return 0
    element = ELEMENT_BYTES[s.compute]
    per_token = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim
    held = s.cache_bits / 8 + 4 / 64 if s.cache_bits else element
    cache = round((s.prompt_tokens + s.answer_tokens) * per_token * held)
    forward = s.prompt_tokens * element * (3 * spec.intermediate_size + 4 * spec.hidden_size)
    return cache + forward + 2 * 4 * ANSWERS_AT_ONCE * spec.vocab_size
