"""k-quants: made by llama.cpp, whichever of its programs is there, and what is said where it makes others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from burnish.errors import UserError
from burnish.export import gguf, gguf_quantise
from burnish.export.gguf import check_gguf, gguf_bytes, write_gguf
from burnish.models.convert import open_gguf, widened
from burnish.models.gguf_config import read_layout
from tests.export.gguf_world import Tuned, gap, tuned, whole


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tuned(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Rows of 256 and of 512, as llama.cpp's k-quants want them."""
    return tuned(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512, num_hidden_layers=2)


@pytest.mark.llama
@pytest.mark.parametrize(
    ("type", "named", "limit"), [("q6_k", "Q6_K", 0.02), ("q5_k_m", "Q5_K", 0.04), ("q4_k_m", "Q4_K", 0.08)]
)
def test_k_quants(
    type: str, named: str, limit: float, tmp_path: Path, wide: Tuned, monkeypatch: pytest.MonkeyPatch
):
    """By weights: a random model this wide turns any rounding into nats. Rows in another order would be 1.4
    away. llama.cpp computes it all the same.
    """
    monkeypatch.setenv("PATH", "")  # the binding, whatever else is installed
    report = write_gguf(wide.merged, wide.source, tmp_path / "m.gguf", type)
    assert report.stored_as[named] > 0 and set(report.stored_as) <= {"F32", "Q4_K", "Q5_K", "Q6_K"}
    assert not report.notes
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert report.bytes <= gguf_bytes(wide.spec, type)
    assert np.isfinite(gap(wide, tmp_path / "m.gguf"))
    layout = read_layout(open_gguf(tmp_path / "m.gguf"))
    for name in wide.merged.base.tensors:
        exact = whole(wide.merged, name)
        away = np.concatenate(list(widened(layout, name))).reshape(exact.shape) - exact
        assert np.sqrt(np.mean(away**2) / np.mean(exact**2)) < limit, name


@pytest.mark.llama
def test_what_llama_cpp_stores_otherwise_is_said(
    tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    report = write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", "q4_k_m")
    assert "23 matrices have rows that are no multiple of 256" in report.notes[0]
    assert "Q4_K" not in report.stored_as and "Q5_0" in report.stored_as


def tool(folder: Path, body: str) -> None:
    folder.mkdir()
    (folder / "llama-quantize").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "llama-quantize").chmod(0o755)


def test_the_tool_on_the_path_comes_first(tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch):
    tool(tmp_path / "bin", f'cp "$1" "$2" && echo "$3" > {tmp_path / "asked"}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    write_gguf(llama.merged, llama.source, tmp_path / "out" / "m.gguf", "q5_k_m")
    assert (tmp_path / "asked").read_text() == "Q5_K_M\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.gguf"]


def test_a_tool_that_fails_leaves_nothing(tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch):
    tool(tmp_path / "bin", 'echo half > "$2"; echo no space left >&2; exit 3')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="code 3: no space left"):
        write_gguf(llama.merged, llama.source, tmp_path / "out" / "m.gguf", "q6_k")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.llama
def test_a_binding_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gguf, "_write", lambda *args: args[4].write_bytes(b"GGUF and no more"))
    with pytest.raises(UserError, match=r"could not quantise .* to q6_k \(code 1\): \w*(gguf|quantize)"):
        write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", "q6_k")
    assert not list(tmp_path.iterdir())


def test_no_quantiser(llama: Tuned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gguf_quantise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as e:
        check_gguf(llama.source, "q4_k_m")
    assert "burnish[gguf]" in e.value.hint and "llama-quantize" in e.value.hint
    check_gguf(llama.source, "q8_0")
