"""What must stand in the environment before a framework is imported: the one place that writes it."""

from __future__ import annotations

import os
import sys

from burnish.recipe import Care

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


# PyTorch begins to give cached memory back at this share of its limit.
_GIVES_BACK = 0.9


def prepare_environment(care: Care | None = None) -> None:
    """Set what is not set already; a person's own setting is never overruled. care: of the recipe."""
    wanted = _WANTED | (_WANTED_ON_MACS if sys.platform == "darwin" else _WANTED_ELSEWHERE)
    limits = mps_limits(care or Care())
    if not any(name in os.environ for name in limits):  # one beside a person's own may be refused
        wanted = wanted | limits
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def mps_limits(care: Care) -> dict[str, str]:
    """PyTorch's limits on an Apple GPU, by the recommended working set. Its own default is 1.7 times that,
    which is more than the memory of most Macs: they swap, and stand still, where an error would be mended by
    a smaller cut. 0.0 is no limit at all; the seed guide warns that the system may go down with it.
    """
    high = 0.0 if care.mps_limit == "none" else care.mps_limit
    # The lower mark may not be above the upper one, or PyTorch refuses both.
    low = 0.0 if high == 0 else _GIVES_BACK * high
    return {
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": f"{high:g}", "PYTORCH_MPS_LOW_WATERMARK_RATIO": f"{low:g}"
    }  # fmt: skip
