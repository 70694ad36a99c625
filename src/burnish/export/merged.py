"""The base's weights with the adapter added, some rows at a time.

    merged = Merged(base, adapter_folder)
    for rows in merged.chunks("model.layers.0.self_attn.q_proj.weight"):     # float32 [n, in]
        …

W + s·B·A is summed in float32 from the base's original weights, so nothing is lost before whoever writes it
rounds once to the dtype that was asked for (LoRA: Hu et al. 2021, section 4.1). Only one chunk of W, and all
of the adapter, are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from burnish.errors import UserError, all_problems
from burnish.export.adapter import Adapter, read_adapter
from burnish.models.spec import ModelSpec
from burnish.models.weights import CHUNK_BYTES, Weights


class Merged:
    """What a model is after training, as tensors of Hugging Face's names and shapes."""

    def __init__(self, base: ModelSpec, adapter: Path | Adapter) -> None:
        """Raises UserError for an adapter that does not fit the base, or a base whose weights are packed."""
        check_unpacked(base)
        self.base = base
        self.adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        self._weights = Weights(base)
        check_fits(base, self.adapter)

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Rows [n, in] in float32, in order; a vector is one chunk [1, n]."""
        module, at = name.removesuffix(".weight"), 0
        for found in self._weights.chunks(name, chunk_bytes):
            if module in self.adapter.modules:
                found += self.adapter.change(module, at, at + len(found))
                at += len(found)
            yield found


def check_unpacked(base: ModelSpec) -> None:
    """Raises UserError for packed weights."""
    if base.quantization is not None:
        raise UserError(
            f"{base.folder} holds weights packed to {base.quantization.bits} bits: an adapter merged "
            "into them would be rounded away",
            "name the folder of the original 16-bit weights with --base FOLDER",
        )


def check_fits(base: ModelSpec, adapter: Adapter) -> None:
    problems = []
    for module, shape in adapter.shapes.items():
        info = base.tensors.get(f"{module}.weight")
        if info is None:
            problems.append(f"{module}: the base has no such weight")
        elif info.shape != shape:
            problems.append(f"{module}: expected (out, in) {info.shape}, got {shape}")
        elif base.tied and module.rpartition(".")[2] == "lm_head":
            problems.append(f"{module}: the head is the embedding matrix, so a stored one is not read")
    if problems:
        raise all_problems(
            f"{adapter.folder} is not an adapter of {base.folder}:",
            problems,
            "use the model that the adapter was trained on: its adapter_config.json names it",
        )
