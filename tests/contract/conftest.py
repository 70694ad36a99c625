"""One tiny model for the whole suite, and `make`, which opens a learner on it for the backend under test."""

from __future__ import annotations

import os

# Before NumPy and torch load: on a busy machine, matrices this small lose a hundredfold to thread barriers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator
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


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


@pytest.fixture(params=["reference", "torch", pytest.param("torch-cuda", marks=[pytest.mark.cuda, NO_CUDA])])
def make(request: pytest.FixtureRequest, model: Path) -> Make:
    backend, _, device = request.param.partition("-")
    return maker(model, backend, device or "cpu")


@pytest.fixture
def make_reference(model: Path) -> Make:
    return maker(model, "reference")
