"""What every test shares: one thread, and one tiny model for the whole session."""

from __future__ import annotations

import os

# Before NumPy and torch load, here and in every process a test starts: on a busy machine, matrices this small
# lose a hundredfold to thread barriers.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# As the command line sets them before it loads anything; here transformers is loaded before any command runs.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from burnish.machine.blas import use_openblas
from tests.tiny import tiny_model
from tests.training.forks import Forks
from tests.world import World

with suppress(ModuleNotFoundError):
    import torch  # noqa: F401  (first: what is loaded next would change its bits)
use_openblas()  # before any test imports mlx


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of three layers and 256 positions, with a ChatML tokenizer. Not to be changed: copy it."""
    pytest.importorskip("torch", reason="tiny models are made with torch and transformers")
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def world(tmp_path: Path, tiny_folder: Path) -> World:
    return World(tmp_path, tiny_folder)


@pytest.fixture(scope="session")
def forks(tiny_folder: Path) -> Iterator[Forks]:
    """Runs of the command line in processes that may die."""
    with Forks(tiny_folder) as server:
        yield server
