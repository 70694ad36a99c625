"""One tiny model for the whole suite, and `make`, which opens a learner on it for the backend under test."""

from __future__ import annotations

import os

# Before NumPy and torch load: on a busy machine, matrices this small lose a hundredfold to thread barriers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import burnish.backends
from burnish.backends.base import Learner
from tests.contract.clauses import Make
from tests.tiny import tiny_model, tiny_plan

torch = pytest.importorskip("torch", reason="tiny models are made with torch and transformers")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "qwen2")


def maker(model: Path, backend: str, device: str = "cpu") -> Make:
    def make(**overrides: Any) -> Learner:
        return burnish.backends.open(tiny_plan(model, **{"backend": backend, "device": device, **overrides}))

    return make


def mlx_has(gpu: str) -> bool:
    """Was this MLX built for 'metal' or 'cuda', and is such a GPU here?"""
    if find_spec("mlx") is None:
        return False
    import mlx.core as mx

    return {"metal": mx.metal, "cuda": mx.cuda}[gpu].is_available()


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
NO_MLX = pytest.mark.skipif(
    find_spec("mlx") is None or find_spec("mlx_lm") is None, reason="mlx or mlx-lm is not installed"
)
NO_MLX_CUDA = pytest.mark.skipif(not mlx_has("cuda"), reason="no NVIDIA GPU, or mlx is not built for it")
NO_MLX_METAL = pytest.mark.skipif(not mlx_has("metal"), reason="no Apple GPU, or mlx is not built for it")
BACKENDS = [
    "reference",
    "torch",
    pytest.param("torch-cuda", marks=[pytest.mark.cuda, NO_CUDA]),
    pytest.param("mlx", marks=NO_MLX),  # on the CPU, wherever it runs
    pytest.param("mlx-cuda", marks=[pytest.mark.cuda, NO_MLX, NO_MLX_CUDA]),
    pytest.param("mlx-metal", marks=[pytest.mark.metal, NO_MLX, NO_MLX_METAL]),
]


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, model: Path) -> Make:
    backend, _, device = request.param.partition("-")
    return maker(model, backend, device or "cpu")


@pytest.fixture
def make_reference(model: Path) -> Make:
    return maker(model, "reference")
