"""PEFT's adapter_config.json: read, and what it says of a LoRA's numbers.

    config, text = read_adapter_config(folder)
    terms = lora_terms(config)          # rank, scale, and what a plain LoRA does not have
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import UserError
from burnish.models.folder import ADAPTER

# Settings under which the change to a matrix is not s·B·A of one rank.
_NOT_PLAIN = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "target_parameters",
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# Ways to begin after which the rest of the base is no longer the one that others have.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Terms:
    rank: int
    scale: float  # what B·A is multiplied by: alpha / rank, or alpha / √rank with rsLoRA
    problems: tuple[str, ...]  # what is not of a plain LoRA or DoRA; rank and scale are 1 where not known


def read_adapter_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The object, and the text as it stands, line ends included. Raises UserError where there is none."""
    path = folder / ADAPTER
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text)
    except FileNotFoundError as e:
        raise UserError(f"{folder} holds no {ADAPTER}, so it is not an adapter folder") from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}", "copy the adapter folder again, whole") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value, text


def lora_terms(config: Mapping[str, Any]) -> Terms:
    problems = [f"{key}: {config[key]!r:.60}" for key in _NOT_PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: expected LORA, got {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias: expected none, got {config['bias']}")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGE_THE_BASE):
        problems.append(f"init_lora_weights: {start} begins from a changed base model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        problems.append(f"r and lora_alpha: expected numbers, got {rank!r} and {alpha!r}")
        return Terms(1, 1.0, tuple(problems))
    return Terms(rank, alpha / (rank**0.5 if config.get("use_rslora") else rank), tuple(problems))
