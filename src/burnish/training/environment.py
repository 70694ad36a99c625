"""What must stand in the environment before a framework is imported: the one place that writes it."""

from __future__ import annotations

import os
import sys

_WANTED = {
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizer threads warn and can hang
    "HF_HUB_OFFLINE": "1",  # training reads folders; nothing here may reach for the network
    "TRANSFORMERS_VERBOSITY": "error",  # its advice is for its own trainer
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # and its bars would break our lines
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # oneDNN and torch keep what they prepared for each shape of a product, a thousand of them, and every
    # length is a shape. SmolLM2 on two cores, 20 steps of rows of many lengths: 2.29 GiB and growing with a
    # thousand; 1.43 GiB with so many, and no slower (143 s against 146 beside other work).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
_WANTED_ELSEWHERE = {
    # MLX on CUDA hands over so many operations, or operations on so much, at a time, and waits at its memory
    # limit only in between. Little at a time keeps the peak low (H100, 14B, every layer kept: 4,781 tokens/s,
    # 4,774 with its own defaults).
    "MLX_MAX_OPS_PER_BUFFER": "6",
    "MLX_MAX_MB_PER_BUFFER": "100",
}
_WANTED_ON_MACS = {
    # macOS ends GPU work that keeps the display waiting: a layer's backward pass at long lengths may.
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
}


def prepare_environment() -> None:
    """Set what is not set already; a person's own setting is never overruled."""
    wanted = _WANTED | (_WANTED_ON_MACS if sys.platform == "darwin" else _WANTED_ELSEWHERE)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
