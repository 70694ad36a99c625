"""From a plan to a model with its adapter: mlx-lm loads it, its linear layers become ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn

from burnish.backends import adapter_folder
from burnish.backends.mlx.check import check_packed, check_whole
from burnish.backends.mlx.decoder import Decoder
from burnish.backends.mlx.device import device_of, translated
from burnish.backends.mlx.families import as_mlx_lm_reads, check_attends, check_window, put_right
from burnish.backends.mlx.learner import MlxLearner
from burnish.backends.mlx.projection import Context, Embedding, Head, Projection, Weight
from burnish.backends.mlx.quantize import DTYPES, cast, check_folder, open_folder, pack
from burnish.errors import Unsupported
from burnish.models.spec import read_config
from burnish.planning.memory_mlx import GROUP
from burnish.planning.plan import Plan

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


def open_mlx(plan: Plan) -> MlxLearner:
    """Load the base from its folder and give it a fresh adapter. Raises Unsupported, OutOfMemory or
    UserError.
    """
    device = device_of(plan.device.value)
    with mx.stream(mx.default_stream(device)), translated():
        return adapt(load_base(plan), plan)


def check_model(plan: Plan) -> None:
    """Raises Unsupported or UserError where `open_mlx` is known to, before a weight is read."""
    spec, config = plan.spec, read_config(plan.spec.folder)
    said = as_mlx_lm_reads(spec, config, plan.length.value)
    if "model_file" not in config:  # else the folder brings its own class
        check_folder(spec, said)


def load_base(plan: Plan) -> nn.Module:
    """mlx-lm's model, in the dtype it is held in, quantised if the plan says so; read layer by layer."""
    spec = plan.spec
    config = as_mlx_lm_reads(spec, read_config(spec.folder), plan.length.value)
    model = open_folder(spec, config, trust_remote_code=plan.recipe.trust_remote_code)
    put_right(model, spec)
    prepare(model, plan)
    return model


def prepare(model: nn.Module, plan: Plan) -> None:
    """Cast and quantise, one module at a time, so that no second copy of the model exists."""
    if plan.quantize.value != "none" and plan.spec.quantization is None:
        pack(model, int(plan.quantize.value.removesuffix("bit")), GROUP)
    model.freeze()
    held, compute = DTYPES[plan.weights.value], DTYPES[plan.compute.value]

    def dtype_of(name: str, value: mx.array) -> mx.Dtype:
        # Scales and biases of packed numbers are what their precision hangs on: widened, never narrowed.
        if name.endswith((".scales", ".biases")):
            return compute if compute == mx.float32 else value.dtype
        return held

    cast(model, dtype_of)
    for module in model.modules():
        mx.eval([v for v in module.values() if isinstance(v, mx.array)])
    mx.clear_cache()


def adapt(model: nn.Module, plan: Plan) -> MlxLearner:
    """Put the adapter that the plan describes on a loaded base (which is changed in place)."""
    compute = DTYPES[plan.compute.value]
    decoder, context = Decoder(model, plan.spec.n_layers), Context(compute, plan.recipe.lora.dropout)
    check_attends(model)
    check_window(decoder, plan.spec.window, plan.length.value)
    for i, layer in enumerate(decoder.layers):
        _replace(layer, lambda linear: Projection(linear, context), context)
        if i in plan.layers.value:
            _give_adapter(layer, i, plan)
    _replace(model, Head, context)
    check_whole(decoder, plan.spec.vocab_size, exact=compute == mx.float32)
    if plan.pack.value:
        check_packed(decoder, plan.spec.vocab_size, exact=compute == mx.float32)
    return MlxLearner(decoder, context, plan, device_of(plan.device.value))


def _replace(module: nn.Module, linear: Callable[[nn.Module], nn.Module], context: Context) -> None:
    """Every linear layer and embedding below `module` becomes one of ours; the arrays are shared."""

    def ours(child: Any) -> Any:
        if type(child) in _LINEAR:
            return linear(child)
        if type(child) in _EMBEDDING:
            return Embedding(child, context)
        if isinstance(child, nn.Module) and not isinstance(child, Weight):
            _replace(child, linear, context)
        elif isinstance(child, list):
            return [ours(c) for c in child]
        return child

    for name, child in list(module.items()):
        if isinstance(child, (nn.Module, list)):
            module[name] = ours(child)


def _give_adapter(layer: nn.Module, number: int, plan: Plan) -> None:
    """A of zeros and B of zeros, to be filled by the learner, on the layer's targets."""
    start, rank = f"model.layers.{number}.", plan.recipe.lora.rank
    paths = [m.removeprefix(start) for m in adapter_folder.modules(plan) if m.startswith(start)]
    inside = {name: m for name, m in layer.named_modules() if isinstance(m, Projection)}
    for place, path in enumerate(paths):
        if path not in inside:
            raise Unsupported(
                f"mlx-lm's {plan.spec.model_type} has no linear layer {path} in its decoder layers; it has "
                + ", ".join(sorted(inside)),
                "model",
            )
        if "router" in path.split("."):
            problem = f"{path} chooses experts; it is not adapted"
            raise Unsupported(problem, "model", "set lora.targets=attention")
        projection = inside[path]
        outs, ins = projection.shape
        A, B = mx.zeros((rank, ins), mx.float32), mx.zeros((outs, rank), mx.float32)
        projection.adapt(A, B, adapter_folder.scale(plan), place)
