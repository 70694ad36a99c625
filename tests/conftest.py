"""What every test shares: one thread, and one tiny model for the whole session."""

from __future__ import annotations

import os
import sys

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
from burnish.machine.rate import Rate
from tests.tiny import tiny_model
from tests.training.forks import Forks
from tests.world import World

with suppress(ModuleNotFoundError):
    import torch  # noqa: F401  (first: what is loaded next would change its bits)
use_openblas()  # before any test imports mlx

RATE = Rate(flops=2e11, bytes_per_s=2e10, source="measured on the machine of the tests", measured=True)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the caches of whoever runs it, nor does a process that a test starts; and
    `burnish plan` in this process measures no rate: it takes seconds, is another each time, and is not kept
    while the machine is busy.
    """
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        if sys.platform == "darwin":  # where caches are is not in the environment, but the home is
            patch.setenv("HOME", str(folder))
        patch.setattr("burnish.cli.plan.measured_rate", lambda *_: RATE)
        yield folder


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
