"""The MLX engine from inside: what is compiled for whom, what a failure leaves, dropout, heads, files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("torch", reason="tiny models are made with torch and transformers")

from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import activations, base, llama  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from burnish import backends  # noqa: E402
from burnish.backends.base import Sampling  # noqa: E402
from burnish.backends.mlx.decoder import Call  # noqa: E402
from burnish.backends.mlx.learner import MlxLearner  # noqa: E402
from burnish.backends.mlx.projection import PLAIN, Context, Projection  # noqa: E402
from burnish.backends.mlx.quantize import quantize_folder  # noqa: E402
from burnish.errors import UserError  # noqa: E402
from tests.backends.peft_truth import scores  # noqa: E402
from tests.tiny import random_batch, tiny_model, tiny_plan  # noqa: E402

VOCAB, LAYERS = 280, 6
BATCH = random_batch(np.random.default_rng(3), 3, 24, VOCAB)
PACKED = random_batch(np.random.default_rng(4), 3, 24, VOCAB, segments=2)


def opened(folder: Path, **overrides: Any) -> MlxLearner:
    learner = backends.open(tiny_plan(folder, **{"backend": "mlx", **overrides}))
    assert isinstance(learner, MlxLearner)
    return learner


def weights(learner: MlxLearner, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    learner.save(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("deep") / "model", "llama", num_hidden_layers=LAYERS)


# --- what is compiled ---


def kinds(learner: MlxLearner) -> Counter[tuple[str, bool]]:
    """How many functions there are: by kind, and by whether products' outcomes are kept."""
    return Counter((name[0], name[4]) for name in learner._engine._compiled)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers whose own code has been run: compiled functions run it as they are traced, and only then."""
    called, to = [], Call.to

    def noted(self: Call, layer: nn.Module, *arguments: Any) -> Any:
        called.append(layer)
        return to(self, layer, *arguments)

    monkeypatch.setattr(Call, "to", noted)
    return called


FORWARD, BACKWARD, LAST = "forward", "backward", "last backward"


@pytest.mark.parametrize(("lora", "keep", "expected"), [
    ({}, 0, {(FORWARD, False): 1, (BACKWARD, False): 1, (LAST, False): 1}),
    ({}, 3, {(FORWARD, False): 1, (FORWARD, True): 1, (BACKWARD, False): 1, (BACKWARD, True): 1,
             (LAST, False): 1}),
    ({}, LAYERS, {(FORWARD, True): 1, (BACKWARD, True): 1, (LAST, True): 1}),
    # Layers without an adapter are of another shape, and have no backward pass.
    ({"last_layers": 2}, 0, {(FORWARD, False): 2, (BACKWARD, False): 1, (LAST, False): 1}),
])  # fmt: skip
def test_equal_layers_share_what_is_compiled(
    deep: Path,
    lora: dict[str, Any],
    keep: int,
    expected: dict[tuple[str, bool], int],
    traced: list[nn.Module],
) -> None:
    learner = opened(deep, lora=lora, train={"keep_layers": keep})
    traced.clear()  # those of the checks
    learner.step([BATCH], 0.01)
    assert kinds(learner) == expected
    assert len(traced) == sum(expected.values())
    learner.step([BATCH, BATCH], 0.01)
    assert kinds(learner) == expected and len(traced) == sum(expected.values()), "compiled again"
    learner.step([PACKED], 0.01)  # with a mask where there was none
    assert kinds(learner) == {k: 2 * n for k, n in expected.items()}


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_layers_that_differ_do_not_share(deep: Path, keep: int, tmp_path: Path) -> None:
    """Every third layer sees all, the others a window: two kinds of layer, each compiled once."""
    folder = Path(shutil.copytree(deep, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 8, "layer_types": types}))
    learner, kept = opened(folder, train={"keep_layers": keep}), keep > 0
    assert learner.score(BATCH).nll_BT.max() != opened(deep).score(BATCH).nll_BT.max()
    learner.step([BATCH], 0.01)
    # A score keeps nothing; the first layer's backward pass has no gradient of its input.
    plain = Counter({(FORWARD, False): 2})
    assert kinds(learner) == plain | {(FORWARD, kept): 2, (BACKWARD, kept): 2, (LAST, kept): 1}


def test_learners_share_nothing(deep: Path, tmp_path: Path) -> None:
    """A compiled function holds its own learner's modules and settings."""
    one, other = opened(deep), opened(deep, lora={"alpha": 16})
    before = weights(other, tmp_path / "before")
    losses = [one.step([BATCH], 0.01).loss for _ in range(2)]
    after = weights(other, tmp_path / "after")
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    alone = opened(deep, lora={"alpha": 16})
    assert [other.step([BATCH], 0.01) for _ in range(2)] == [alone.step([BATCH], 0.01) for _ in range(2)]
    one_alone = opened(deep)
    assert losses == [one_alone.step([BATCH], 0.01).loss for _ in range(2)]
    functions = [{id(f) for f in learner._engine._compiled.values()} for learner in (one, other)]
    assert functions[0] and not functions[0] & functions[1]


# --- a failure while a layer is traced ---


@pytest.mark.parametrize("keep", [0, 3, LAYERS])
@pytest.mark.parametrize("at", [1, 5, 7, 11, 14])  # projections: 1 to 7 in a forward pass, or beyond
def test_a_failure_in_the_middle_leaves_no_trace(
    deep: Path, keep: int, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"lora": {"dropout": 0.2}, "train": {"keep_layers": keep}}
    learner, untouched = opened(deep, **how), opened(deep, **how)
    start = weights(learner, tmp_path / "start")
    arrays = [{k: id(v) for k, v in tree_flatten(m.parameters())} for m in learner._decoder.layers]
    calls, call = 0, Projection.__call__

    def fails_once(self: Projection, x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("in the middle")
        return call(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(Projection, "__call__", fails_once)
        with pytest.raises(RuntimeError, match="in the middle"):
            learner.step([BATCH], 0.01)
    assert calls == at
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert llama.swiglu is activations.swiglu  # type: ignore[attr-defined]
    context = learner._context
    assert (context.mode, context.keys, context.outcomes, context.order) == (PLAIN, None, [], None)
    after = [{k: id(v) for k, v in tree_flatten(m.parameters())} for m in learner._decoder.layers]
    assert after == arrays
    for key, value in weights(learner, tmp_path / "after").items():
        np.testing.assert_array_equal(value, start[key])
    for _ in range(2):
        assert learner.step([BATCH], 0.01) == untouched.step([BATCH], 0.01)
    expected = weights(untouched, tmp_path / "untouched")
    for key, value in weights(learner, tmp_path / "stepped").items():
        np.testing.assert_array_equal(value, expected[key])


# --- dropout ---

P, SCALE = 0.1, 2.0
WORK = ("y", "dx", "dA", "dB")


def projection(compute: Any, dropout: float, outs: int) -> Projection:
    """A matrix of zeros with an adapter of rank 1, so that all of y is the adapter's."""
    rng, context = np.random.default_rng(5), Context(compute, dropout)
    if dropout:
        context.keys = mx.array([[3, 4]], mx.uint32)
    made = Projection(nn.Linear(16, outs, bias=False), context)
    made.weight = mx.zeros((outs, 16), compute)
    A, B = drawn(rng, (1, 16), compute), drawn(rng, (outs, 1), compute)
    made.adapt(A.astype(mx.float32), B.astype(mx.float32), SCALE, 0)
    return made


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    return mx.array(rng.uniform(0.5, 1.5, shape), mx.float32).astype(dtype)


def exactly(x: Any) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def adapters_work(made: Projection, x: Any, dy: Any) -> list[np.ndarray]:
    """y, and the gradients of x, A and B."""

    def run(x: Any, A: Any, B: Any) -> Any:
        made.lora_a, made.lora_b = A, B
        return made(x)

    A, B = made.lora_a, made.lora_b
    (y,), found = mx.vjp(run, [x, A, B], [dy])
    return [exactly(a) for a in (y, *found)]


@pytest.mark.parametrize(("compute", "part"), [
    (compute, part) for compute in ("float32", "bfloat16") for part in WORK
])  # fmt: skip
def test_what_dropout_keeps_counts_exactly(compute: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing dropped, all is 1/(1-p) of what it would be: 0.16 % off at p = 0.1 in 16 bits. Single
    products' roundings are as large, but their mean is not.
    """
    kind, outs, rows = getattr(mx, compute), 700, 300
    with mx.stream(mx.cpu):
        monkeypatch.setattr(mx.random, "bernoulli", lambda p, shape, key: mx.ones(shape, mx.bool_))
        rng, made = np.random.default_rng(6), projection(kind, P, outs)
        x, dy = drawn(rng, (rows, 16), kind), drawn(rng, (rows, outs), kind)
        assert made._mask(x) is not None
        A, B, X, dY = (exactly(a) for a in (made.lora_a, made.lora_b, x, dy))
        got = adapters_work(made, x, dy)[WORK.index(part)]
    s = SCALE / (1 - P)
    true = {"y": s * X @ A.T @ B.T, "dx": s * dY @ B @ A, "dA": s * (dY @ B).T @ X, "dB": s * dY.T @ X @ A.T}
    assert abs((got / true[part]).mean() - 1) < (1e-6 if compute == "float32" else 6e-4)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dropout_leaves_the_mean_of_the_adapters_work(compute: str) -> None:
    kind, rows = getattr(mx, compute), 20_000
    with mx.stream(mx.cpu):
        one, made = drawn(np.random.default_rng(7), (1, 16), kind), projection(kind, 0.3, 4)
        means = exactly(made(mx.broadcast_to(one, (rows, 16)))).mean(0)
        without = SCALE * exactly(one) @ exactly(made.lora_a).T @ exactly(made.lora_b).T
    # 16 terms of about one size: a row is some sqrt(0.3 / 0.7 / 16) off, the mean of all rows 0.0012.
    assert np.abs(means / without[0] - 1).max() < 0.005


# --- heads, files, tokens ---


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stored_head_is_a_head_where_the_config_does_not_say(family: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    folder = tiny_model(tmp_path / "model", family, tied=False, **wide)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (folder / "config.json").write_text(json.dumps(config))
    learner = opened(folder)
    weights(learner, tmp_path / "adapter")
    mine, true = learner.score(BATCH).nll_BT, scores(tmp_path / "adapter", BATCH)
    np.testing.assert_allclose(mine, true, atol=2e-4)
    torchs = backends.open(tiny_plan(folder, backend="torch")).score(BATCH).nll_BT
    np.testing.assert_allclose(mine, torchs, atol=2e-4)

    quantize_folder(folder, tmp_path / "eight", 8)
    assert "lm_head.weight" in load_file(tmp_path / "eight" / "model.safetensors")
    assert json.loads((tmp_path / "eight" / "config.json").read_text())["tie_word_embeddings"] is False
    packed = opened(tmp_path / "eight").score(BATCH).nll_BT
    assert 0 < np.abs(packed - mine).mean() < 0.05
    # With the embeddings in the head's place, for comparison.
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert np.abs(opened(folder).score(BATCH).nll_BT - mine).mean() > 0.5


def test_a_stray_file_of_weights_is_named(deep: Path, tmp_path: Path) -> None:
    """mlx-lm would read it as well, and the last file read would win."""
    folder = Path(shutil.copytree(deep, tmp_path / "model"))
    shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors")
    with pytest.raises(UserError, match=r"model-old\.safetensors"):
        opened(folder)
    with pytest.raises(UserError, match=r"model-old\.safetensors"):
        quantize_folder(folder, tmp_path / "out", 4, group_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_token_beyond_the_vocabulary_is_refused(deep: Path) -> None:
    learner, how = opened(deep), Sampling(max_new_tokens=4)
    before = list(learner.generate([[5, 9]], how))
    for prompts in ([[VOCAB]], [[5, 9], [5, VOCAB + 100_000, 9]]):
        with pytest.raises(UserError, match=f"token {max(map(max, prompts))}.*{VOCAB} words"):
            list(learner.generate(prompts, how))
    assert list(learner.generate([[5, 9]], how)) == before
    assert list(learner.generate([[VOCAB - 1]], how)), "the last word is one"


# --- closing ---


def test_closing_twice_and_what_outlives_a_learner(deep: Path) -> None:
    learner = opened(deep)
    begun = learner.generate([[5, 9], [7]], Sampling(max_new_tokens=4))
    next(begun)
    never = learner.generate([[5]], Sampling(max_new_tokens=4))
    held = mx.get_active_memory()
    learner.close()
    begun.close()  # type: ignore[attr-defined]
    never.close()  # type: ignore[attr-defined]
    learner.close()
    assert mx.get_active_memory() < held
    assert opened(deep).step([BATCH], 0.01).weight == BATCH.weight
