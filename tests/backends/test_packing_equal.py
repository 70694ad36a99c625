"""Packed or one a row, the same examples give the same loss and the same gradient of every adapter tensor.

Each has a negative control: the rows of before with their borders taken away, as a packer without isolation
would train them, must differ by far more than the tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch", reason="tiny models are made with torch and transformers")

from burnish import backends
from burnish.backends.base import Learner
from burnish.backends.torch import attention
from burnish.data.batches import Batch, Cursor, split
from burnish.data.packing import packed_split, packed_steps
from burnish.data.prepare import prepare
from burnish.machine.probe import probe
from burnish.models.spec import read_spec
from burnish.models.tokenizer import load_tokenizer
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import parse
from tests.tiny import random_example, tiny_model, tiny_plan

TOLERANCE, FAR = 1e-5, 1e-2
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BURNISH_DATA", ROOT.parent / "shared" / "data"))
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
B1 = 0.9  # AdamW's; after one step from rest its first moment is (1 - B1) × the gradient

Gradients = Mapping[str, np.ndarray]


class Measured:
    """A learner with an adapter whose B is not zero, put back to rest before each measurement."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.learner: Learner = backends.open(plan)
        self.start, self.folder = folder / "start", folder / "after"
        self.start.mkdir()
        self.folder.mkdir()
        self.learner.save(self.start)
        file, rng = self.start / "adapter_model.safetensors", np.random.default_rng(1)
        weights = {k: rng.normal(0, 0.05, w.shape).astype(w.dtype) for k, w in load_file(file).items()}
        save_file(weights, file)

    def step(self, micros: list[Batch]) -> tuple[float, Gradients]:
        self.learner.load(self.start)
        loss = self.learner.step(micros, 0.0).loss
        self.learner.save(self.folder)
        moments = load_file(self.folder / "optimizer.safetensors")
        found = {k: m / np.float32(1 - B1) for k, m in moments.items() if k.startswith("exp_avg.")}
        assert found and all(g.any() for g in found.values()), "a gradient that is nothing proves nothing"
        return loss, found


def borderless(batch: Batch) -> Batch:
    """Every row one segment whose positions run on."""
    used = batch.segments_BT > 0
    positions = np.broadcast_to(np.arange(used.shape[1]), used.shape).astype(np.int32) * used
    return replace(batch, segments_BT=used.astype(np.int32), positions_BT=positions)


def apart(a: tuple[float, Gradients], b: tuple[float, Gradients]) -> list[float]:
    """Relative differences: the loss, then every tensor's largest against its largest element."""
    assert a[1].keys() == b[1].keys()
    tensors = [float(np.abs(g - b[1][k]).max() / np.abs(g).max()) for k, g in a[1].items()]
    return [abs(a[0] - b[0]) / abs(a[0]), *tensors]


def check(measured: Measured, single: list[Batch], packed: list[Batch]) -> None:
    assert sum(len(b.tokens_BT) for b in packed) < sum(len(b.tokens_BT) for b in single)
    assert packed[0].segments_BT.max() > 1
    alone = measured.step(single)
    same, mixed = (
        apart(alone, measured.step(packed)),
        apart(alone, measured.step([borderless(b) for b in packed])),
    )
    assert max(same) <= TOLERANCE
    assert np.median(mixed) > FAR and min(mixed) > 10 * TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("keep", [0, 3])
def test_tiny_qwen2(tiny_folder: Path, tmp_path: Path, backend: str, keep: int) -> None:
    rng = np.random.default_rng(2)
    examples = [random_example(rng, n, 280) for n in (30, 9, 17, 25, 4, 12, 12, 2)]
    plan = tiny_plan(
        tiny_folder, backend=backend, train={"clip": None, "keep_layers": keep, "weight_decay": 0}
    )
    check(Measured(plan, tmp_path), split(examples, 3, (32,)), packed_split(examples, 2, 64))


def test_a_packed_step_is_the_same_step_of_its_examples(tiny_folder: Path, tmp_path: Path) -> None:
    """The epoch's own way of packing, micro-batches included, against its examples one a forward pass."""
    rng = np.random.default_rng(3)
    examples = [random_example(rng, int(n), 280) for n in rng.integers(2, 30, 12)]
    plan = tiny_plan(tiny_folder, train={"clip": None})
    measured = Measured(plan, tmp_path)
    coming = packed_steps(examples, 12, 1, 5, Cursor(), 64)
    check(measured, split(examples, 1), next(coming)[0])


def test_padding_that_is_computed_changes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on MPS, where rows keep their length: padding is the tail of its row's last example."""
    monkeypatch.setattr("burnish.backends.torch.learner.keeps_padding", lambda device: True)
    rng = np.random.default_rng(4)
    examples = [random_example(rng, n, 280) for n in (30, 9, 17, 25, 4, 12, 12, 2)]
    plan = tiny_plan(tiny_folder, train={"clip": None})
    check(Measured(plan, tmp_path), split(examples, 8), packed_split(examples, 2, 64))


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_rows_that_keep_their_length_are_attended_under_one_mask(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On MPS every new shape compiles: packed rows show attention one shape. Mistral: in a window."""
    shapes: set[tuple[int, ...]] = set()
    real = attention.scaled_dot_product_attention

    def spy(q: Any, k: Any, v: Any, **how: Any) -> Any:
        shapes.add(tuple(q.shape))
        return real(q, k, v, **how)

    monkeypatch.setattr("burnish.backends.torch.learner.keeps_padding", lambda device: True)
    narrow: dict[str, Any] = {"sliding_window": 7} if family == "mistral" else {}
    folder = tiny_model(tmp_path / "model", family, **narrow)
    rng = np.random.default_rng(4)
    examples = [random_example(rng, n, 280) for n in (30, 9, 17, 25, 4, 12, 12, 2)]
    measured = Measured(tiny_plan(folder, train={"clip": None}), tmp_path)
    packed = packed_split(examples, 1, 64)
    assert len(packed) == 2
    check(measured, split(examples, 8), packed)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    measured.step(packed)
    assert len(shapes) == 1


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set BURNISH_DATA")
@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no {MODEL.name} in .cache: make model")
def test_smollm2_on_wikisql(tmp_path: Path) -> None:
    text = f"""
model: {MODEL}
device: cpu
dtype: float32
data: {{train: "{DATA / "wikisql" / "train.jsonl"}", answer_after: "\\nA:", rows: 4}}
lora: {{rank: 8, alpha: 16, targets: attention+mlp}}
train: {{batch_size: 4, clip: null, pack: true}}
"""
    recipe = parse(text)
    prepared = prepare(recipe, load_tokenizer(MODEL))
    examples = prepared.train.examples
    plan = make_plan(recipe, read_spec(MODEL), probe(tmp_path), prepared.stats)
    measured = Measured(plan, tmp_path)
    check(measured, split(examples, 4), packed_split(examples, 4, plan.row_length.value))
