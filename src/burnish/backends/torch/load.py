"""From a plan to a model with its adapter on its device."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from burnish.backends.adapter_folder import peft_config
from burnish.backends.torch import attention
from burnish.backends.torch.device import translated
from burnish.backends.torch.learner import TorchLearner
from burnish.backends.torch.lora import FrozenLinear, LoraLinear, Masks, frozen
from burnish.backends.torch.norm import fuse_norms
from burnish.errors import Unsupported, UserError
from burnish.planning.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_torch(plan: Plan) -> TorchLearner:
    """Load the base from its folder and give it a fresh adapter. Raises Unsupported, OutOfMemory or
    UserError.
    """
    with translated():
        return adapt(load_base(plan), plan)


def load_base(plan: Plan) -> nn.Module:
    """The frozen base on its device, in the dtype it is held in."""
    attention.install()
    options: dict[str, Any] = {}
    if plan.quantize.value == "4bit":
        options["quantization_config"] = _nf4(plan)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice is for its own trainer
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(plan.spec.folder),
            dtype=DTYPES[plan.weights.value],
            attn_implementation=attention.NAME,
            device_map={"": plan.device.value},
            local_files_only=True,
            trust_remote_code=plan.recipe.trust_remote_code,
            **options,
        )
    except (ValueError, OSError, KeyError) as e:
        raise UserError(
            f"transformers cannot load {plan.spec.folder}: {str(e).splitlines()[0]}",
            "burnish doctor   shows the installed version of transformers",
        ) from e


def _nf4(plan: Plan) -> Any:
    try:
        import bitsandbytes  # noqa: F401  (transformers' own message does not name our extra)
        from transformers import BitsAndBytesConfig
    except ModuleNotFoundError as e:
        raise UserError(
            "quantize: 4bit on torch needs bitsandbytes, which is not installed",
            "pip install 'burnish[bnb]', or set quantize=none",
        ) from e
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[plan.compute.value]
    )


def adapt(base: nn.Module, plan: Plan) -> TorchLearner:
    """Put the adapter that the plan describes on a loaded base (which is changed in place)."""
    base.requires_grad_(False)
    decoder = base.get_decoder()  # type: ignore[operator]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != plan.spec.n_layers:
        raise Unsupported(f"{type(base).__name__} has no list of {plan.spec.n_layers} decoder layers")
    _freeze_linears(layers)
    fuse_norms(decoder)
    recipe = plan.recipe
    config = LoraConfig(**{**peft_config(plan), "inference_mode": False})
    config._register_custom_module({FrozenLinear: LoraLinear, **_quantized_linears(layers)})
    device = torch.device(plan.device.value)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(recipe.train.seed)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    masks = Masks(recipe.lora.dropout, recipe.train.seed, device)
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear)]
    for number, module in enumerate(adapted):
        module.masks, module.projection = masks, number
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not adapted:
        raise Unsupported(f"PEFT found none of {', '.join(plan.targets.value)} in {type(base).__name__}")
    return TorchLearner(model, plan, masks, DTYPES[plan.compute.value])


def _freeze_linears(root: nn.Module) -> None:
    """Every plain linear layer below `root` becomes a FrozenLinear; quantised ones stay."""
    for name, child in root.named_children():
        if type(child) is nn.Linear:
            setattr(root, name, frozen(child))
        else:
            _freeze_linears(child)


def _quantized_linears(layers: nn.ModuleList) -> dict[type[nn.Module], type[nn.Module]]:
    kinds = {type(m) for m in layers.modules() if isinstance(m, nn.Linear)} - {FrozenLinear}
    return {kind: LoraLinear for kind in kinds}
