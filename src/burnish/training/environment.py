"""What must stand in the environment before a framework is imported: the one place that writes it."""

from __future__ import annotations

import os

_WANTED = {
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizer threads warn and can hang
    "HF_HUB_OFFLINE": "1",  # training reads folders; nothing here may reach for the network
    "TRANSFORMERS_VERBOSITY": "error",  # its advice is for its own trainer
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # and its bars would break our lines
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare_environment() -> None:
    """Set what is not set already; a person's own setting is never overruled."""
    for name, value in _WANTED.items():
        os.environ.setdefault(name, value)
