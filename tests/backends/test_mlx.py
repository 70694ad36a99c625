"""The MLX backend against transformers and PEFT: losses, every adapter gradient, scores, adapters, memory.

Gradients are read from what is saved: AdamW's first moment after one step from rest, with lr 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("torch", reason="tiny models are made with torch and transformers")

from mlx import nn  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from burnish import backends  # noqa: E402
from burnish.data.batches import Batch, Example, split  # noqa: E402
from burnish.data.packing import packed_split  # noqa: E402
from burnish.errors import Unsupported  # noqa: E402
from burnish.planning.choice import Choice  # noqa: E402
from burnish.planning.plan import Plan  # noqa: E402
from tests.backends.peft_truth import assert_same, peft_model, scores, truth  # noqa: E402
from tests.backends.test_packing_equal import Measured, apart, borderless  # noqa: E402
from tests.tiny import random_batch, random_example, tiny_model, tiny_plan  # noqa: E402

VOCAB, LAYERS, SIZES = 280, 3, (30, 9, 17, 25, 4, 12, 12, 2)
MODELS: list[dict[str, Any]] = [
    {"family": "qwen2", "tied": True},
    {"family": "qwen2", "tied": False},
    {"family": "qwen3", "tied": True},
    {"family": "qwen3", "tied": False},
    {"family": "llama"},
    {"family": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    {"family": "mistral"},
    {"family": "mistral", "sliding_window": 5},  # shorter than most examples
]
LORAS: list[dict[str, Any]] = [
    {},
    {"rank": 8, "alpha": 8, "rslora": True},
    {"last_layers": 1},
    {"targets": ["q_proj", "down_proj"]},
    {"targets": ["v_proj"], "last_layers": 2, "rank": 1, "alpha": 3},
    {"targets": "attention"},
]


def name(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ",".join(f"{k}={v}" for k, v in value.items()) or "plain"


def plan_of(model: Path, **overrides: Any) -> Plan:
    train = {"clip": None, "weight_decay": 0, **overrides.pop("train", {})}
    return tiny_plan(model, **{"backend": "mlx", **overrides}, train=train)


def examples(sizes: tuple[int, ...] = SIZES, seed: int = 2) -> list[Example]:
    """Random examples whose weights are 0, 0.5, 1 and 2."""
    rng = np.random.default_rng(seed)
    return [random_example(rng, n, VOCAB) for n in sizes]


LAYOUTS: dict[str, Callable[[], list[Batch]]] = {
    "alone": lambda: split(examples(), 8),
    "micros": lambda: split(examples(), 3, (8, 16, 32)),
    "packed": lambda: packed_split(examples(), 4, 64),
    "packed-micros": lambda: packed_split(examples(), 1, 40),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "qwen2")


# --- loss and gradients ---


@pytest.mark.parametrize("layout", ["micros", "packed"])
@pytest.mark.parametrize("options", MODELS, ids=name)
def test_gradients_of_every_family(options: dict[str, Any], layout: str, tmp_path: Path) -> None:
    measured = Measured(plan_of(tiny_model(tmp_path / "model", **options)), tmp_path)
    micros = LAYOUTS[layout]()
    assert {0, 0.5, 1, 2} <= {float(w) for m in micros for w in m.weights_BT.ravel()}
    assert_same(measured.step(micros), truth(measured.start, micros))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0, 1, LAYERS])
def test_gradients_whatever_is_kept(model: Path, keep: int, layout: str, tmp_path: Path) -> None:
    measured = Measured(plan_of(model, train={"keep_layers": keep}), tmp_path)
    micros = LAYOUTS[layout]()
    assert_same(measured.step(micros), truth(measured.start, micros))


@pytest.mark.parametrize("keep", [0, LAYERS])
@pytest.mark.parametrize("lora", LORAS, ids=name)
def test_gradients_of_every_adapter(model: Path, lora: dict[str, Any], keep: int, tmp_path: Path) -> None:
    measured = Measured(plan_of(model, lora=lora, train={"keep_layers": keep}), tmp_path)
    micros = LAYOUTS["packed"]()
    assert_same(measured.step(micros), truth(measured.start, micros))


@pytest.mark.parametrize("options", [MODELS[0], MODELS[7]], ids=name)
def test_gradients_are_the_references(options: dict[str, Any], tmp_path: Path) -> None:
    folder, micros = tiny_model(tmp_path / "model", **options), LAYOUTS["packed"]()
    found = {}
    for backend in ("mlx", "reference", "torch"):
        place = tmp_path / backend
        place.mkdir()
        measured = Measured(plan_of(folder, backend=backend), place)
        if found:  # every backend draws its own start
            shutil.copy(tmp_path / "mlx" / "start" / "adapter_model.safetensors", measured.start)
        found[backend] = measured.step(micros)
    assert_same(found["mlx"], found["reference"])
    assert_same(found["mlx"], found["torch"])


def test_the_size_of_a_loss_slice_changes_nothing(model: Path, tmp_path: Path) -> None:
    micros, found = LAYOUTS["packed"](), []
    for rows in (1, 7, 10_000):
        place = tmp_path / str(rows)
        place.mkdir()
        plan = replace(plan_of(model), loss_slice=Choice(rows, "asked"))
        found.append(Measured(plan, place).step(micros))
    for other in found[1:]:
        assert max(apart(found[0], other)) < 1e-5


def test_one_target_in_the_whole_step(model: Path, tmp_path: Path) -> None:
    """A micro-batch without a target beside one that has a single one."""
    micros = split(examples(), 4)
    for m in micros:
        m.weights_BT[:] = 0
    micros[1].weights_BT[0, 9] = 0.5
    measured = Measured(plan_of(model), tmp_path)
    assert_same(measured.step(micros), truth(measured.start, micros))


def test_padding_is_nothing(model: Path, tmp_path: Path) -> None:
    """Whatever tokens stand in it, and however much of it there is."""
    measured = Measured(plan_of(model), tmp_path)
    (plain,), (wide,) = split(examples(), 8), split(examples(), 8, (57,))
    wide.tokens_BT[wide.segments_BT == 0] = 77
    assert max(apart(measured.step([plain]), measured.step([wide]))) < 2e-5


def test_a_large_vocabulary_costs_no_accuracy(tmp_path: Path) -> None:
    """Added one by one in float32, the many words that are hardly likely are lost: some 2e-4 of the loss."""
    words = 98_304
    folder = tiny_model(tmp_path / "model", "llama", vocab_size=words, num_hidden_layers=1, tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 3  # logits as far apart as a trained model's
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    learner = backends.open(plan_of(folder))
    learner.save(tmp_path)
    batch = random_batch(np.random.default_rng(3), 2, 20, words)
    assert np.abs(learner.score(batch).nll_BT - scores(tmp_path, batch)).max() < 3e-5
    assert learner.step([batch], 0.0).loss == pytest.approx(truth(tmp_path, [batch])[0], abs=1e-5)


# --- packing ---


@pytest.mark.parametrize("keep", [0, LAYERS])
@pytest.mark.parametrize("options", [MODELS[0], MODELS[2], MODELS[7]], ids=name)
def test_packed_rows_are_their_examples(options: dict[str, Any], keep: int, tmp_path: Path) -> None:
    """And without borders they would not be: by loss and by most gradients."""
    folder = tiny_model(tmp_path / "model", **options)
    measured = Measured(plan_of(folder, train={"keep_layers": keep}), tmp_path)
    packed = LAYOUTS["packed"]()
    assert packed[0].segments_BT.max() > 2
    alone = measured.step(LAYOUTS["alone"]())
    assert max(apart(alone, measured.step(packed))) < 5e-5
    mixed = apart(alone, measured.step([borderless(b) for b in packed]))
    assert np.median(mixed) > 1e-2 and min(mixed) > 1e-4


# --- long rows: attention's backward in blocks ---


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("keep", [0, 2])
def test_long_rows(window: int | None, keep: int, tmp_path: Path) -> None:
    wide: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
    folder = tiny_model(tmp_path / "model", "mistral", sliding_window=window, **wide)
    measured = Measured(plan_of(folder, train={"keep_layers": keep, "max_length": 1024}), tmp_path)
    alone = split(examples((334, 601)), 2)
    packed = packed_split(examples((301, 258, 17, 334)), 1, 600)
    assert len(packed) == 2 and packed[0].segments_BT.max() == 2
    for micros in (alone, packed):
        assert_same(measured.step(micros), truth(measured.start, micros))


def test_a_long_row_never_holds_all_its_scores(tmp_path: Path) -> None:
    """Unbounded, attention's backward holds scores, weights and both gradients: four [heads, T, T]."""
    length, heads = 4096, 4
    folder = tiny_model(tmp_path, "llama", num_hidden_layers=1, max_position_embeddings=length)
    learner = backends.open(plan_of(folder, train={"keep_layers": 0, "max_length": length}))
    micros = split(examples((length + 1,)), 1)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    learner.step(micros, 1e-3)
    assert mx.get_peak_memory() - before < 2.5 * (heads * length * length * 4)


def test_kept_layers_cost_memory_and_no_number(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", num_hidden_layers=6, max_position_embeddings=1024)
    micros, peaks, found = split(examples((500, 500)), 2), [], []
    for keep in (0, 3, 6):
        place = tmp_path / str(keep)
        place.mkdir()
        measured = Measured(plan_of(folder, train={"keep_layers": keep, "max_length": 1024}), place)
        measured.step(micros)  # what is set up once
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found.append(measured.step(micros))
        peaks.append(mx.get_peak_memory() - before)
    # A kept layer holds at least what its projections read: normed input twice, attention, the MLP's middle.
    assert peaks[0] + 2 * 1000 * (3 * 32 + 48) * 4 < peaks[1] < peaks[2], peaks
    for other in found[1:]:
        assert max(apart(found[0], other)) < 1e-5


def test_memory_is_told(model: Path) -> None:
    learner = backends.open(plan_of(model))
    weights = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    before = learner.memory()
    assert before.peak_bytes >= before.now_bytes >= weights
    learner.step(LAYOUTS["alone"](), 1e-3)
    after = learner.memory()
    assert after.peak_bytes > before.now_bytes and after.limit_bytes > after.peak_bytes
    learner.step(LAYOUTS["alone"](), 1e-3)
    again = learner.memory()
    assert again.now_bytes - after.now_bytes < weights / 4, "a step leaves memory behind"


# --- scores and adapters ---


@pytest.mark.parametrize("options", [MODELS[1], MODELS[2], MODELS[5], MODELS[7]], ids=name)
def test_adapters_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    """Trained here, read by torch, by PEFT and here again; trained by torch, stored by PEFT, read here."""
    folder = tiny_model(tmp_path / "model", **options)
    lora = {"rank": 4, "alpha": 6, "rslora": True}
    batch = random_batch(np.random.default_rng(7), 4, 40, VOCAB, segments=2)
    begun = backends.open(plan_of(folder, lora=lora))
    fresh = begun.score(batch).nll_BT
    for trainer in ("mlx", "torch"):
        learner = backends.open(plan_of(folder, backend=trainer, lora=lora))
        for _ in range(3):
            learner.step([batch], 0.02)
        mine = learner.score(batch).nll_BT
        assert np.abs(mine - fresh).max() > 0.05, "the adapter does nothing, so nothing is compared"
        place, again, stored = (tmp_path / f"{trainer} {what}" for what in ("adapter", "again", "by PEFT"))
        place.mkdir()
        learner.save(place)
        np.testing.assert_allclose(scores(place, batch), mine, atol=2e-4)
        peft_model(place).save_pretrained(str(stored))
        for reader in ("mlx", "torch"):
            for source in (place, stored):
                other = backends.open(plan_of(folder, backend=reader, lora=lora))
                other.load_adapter(source)
                np.testing.assert_allclose(other.score(batch).nll_BT, mine, atol=2e-4)
            again.mkdir(exist_ok=True)
            other.save(again)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                assert (again / file).read_bytes() == (place / file).read_bytes(), "the round trip"


def test_weights_held_in_bfloat16(model: Path) -> None:
    """The numbers are those of torch with the same rounded weights, computed in float32."""
    batch = random_batch(np.random.default_rng(1), 4, 30, VOCAB, segments=2)
    mine, torch = (backends.open(plan_of(model, backend=b, dtype="bfloat16")) for b in ("mlx", "torch"))
    exact = backends.open(plan_of(model))
    np.testing.assert_allclose(mine.score(batch).nll_BT, torch.score(batch).nll_BT, atol=2e-4)
    assert np.abs(mine.score(batch).nll_BT - exact.score(batch).nll_BT).max() > 1e-3, "nothing was rounded"


def test_moving_there_and_back_leaves_every_bit(model: Path) -> None:
    learner = backends.open(plan_of(model, dtype="bfloat16"))
    batch = random_batch(np.random.default_rng(1), 4, 30, VOCAB)
    learner.step([batch], 0.02)
    before = learner.score(batch).nll_BT
    with learner.moved("cpu", "float32"):
        np.testing.assert_allclose(learner.score(batch).nll_BT, before, atol=1e-3)
    np.testing.assert_array_equal(learner.score(batch).nll_BT, before)


@pytest.mark.skipif(mx.default_device().type == mx.cpu, reason="this MLX has no GPU that it would prefer")
def test_a_plan_for_the_cpu_computes_on_the_cpu(model: Path) -> None:
    """A GPU rounds otherwise: with it as MLX's default, every bit must be as with the CPU as the default."""
    batch, found = random_batch(np.random.default_rng(1), 4, 30, VOCAB), []
    default = mx.default_device()
    for device in (mx.cpu, default):
        mx.set_default_device(device)
        learner = backends.open(plan_of(model))
        stats = learner.step([batch], 0.02)
        found.append((stats, learner.score(batch).nll_BT.tobytes()))
    mx.set_default_device(default)
    assert found[0] == found[1]


# --- dropout ---


@pytest.mark.parametrize("layout", ["micros", "packed"])
def test_dropout_recomputed_is_dropout_kept(model: Path, layout: str, tmp_path: Path) -> None:
    found = {}
    for dropout, keep in ((0.3, 0), (0.3, 1), (0.3, LAYERS), (0.0, 0)):
        place = tmp_path / f"{dropout} {keep}"
        place.mkdir()
        plan = plan_of(model, lora={"rank": 4, "dropout": dropout}, train={"keep_layers": keep})
        found[dropout, keep] = Measured(plan, place).step(LAYOUTS[layout]())
    kept = found[0.3, LAYERS]
    assert max(apart(kept, found[0.3, 0])) < 1e-5 and max(apart(kept, found[0.3, 1])) < 1e-5
    assert np.median(apart(kept, found[0.0, 0])) > 1e-2, "dropout does nothing, so nothing is compared"


def along(measured: Measured, micros: list[Batch], size: float) -> tuple[float, float]:
    """The loss's slope in a random direction of all adapter weights: by differences, and by the gradient."""
    start = measured.start / "adapter_model.safetensors"
    weights, rng = load_file(start), np.random.default_rng(6)
    toward = {k: rng.normal(size=w.shape).astype(np.float32) for k, w in weights.items()}
    gradients = measured.step(micros)[1]
    slope = sum(float((gradients[f"exp_avg.{k}"] * d).sum()) for k, d in toward.items())
    ends = []
    for sign in (1, -1):
        save_file({k: w + np.float32(sign * size) * toward[k] for k, w in weights.items()}, start)
        ends.append(measured.step(micros)[0])
    save_file(weights, start)
    return (ends[0] - ends[1]) / (2 * size), slope


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_the_gradient_under_dropout_is_of_the_loss_that_was_measured(
    model: Path, keep: int, tmp_path: Path
) -> None:
    """A step asked again draws its masks again, so that the loss is a function that can be differentiated."""
    plan = plan_of(model, lora={"rank": 4, "dropout": 0.3}, train={"keep_layers": keep})
    by_differences, by_gradient = along(Measured(plan, tmp_path), LAYOUTS["micros"](), 1e-3)
    assert abs(by_gradient) > 1e-2
    assert abs(by_differences - by_gradient) < 1e-2 * abs(by_gradient)


def test_stock_recomputation_trains_on_a_wrong_gradient() -> None:
    """The negative control: nn.Dropout under mx.checkpoint draws a new mask on the way back."""
    mx.random.seed(0)
    weights = [mx.random.normal((32, 32)) * 0.2 for _ in range(4)]
    x, drop = mx.random.normal((16, 32)), nn.Dropout(0.3)

    def layer(w: Any, x: Any) -> Any:
        return x + mx.tanh(drop(x) @ w)

    def run(one_layer: Callable[[Any, Any], Any]) -> tuple[float, np.ndarray]:
        def loss(ws: list[Any]) -> Any:
            y = x
            for w in ws:
                y = one_layer(w, y)
            return (y * y).mean()

        mx.random.seed(1)
        value, gradients = mx.value_and_grad(loss)(weights)
        return float(value), np.stack([np.array(g) for g in gradients])

    (value, true), (same, recomputed), (again, repeated) = run(layer), run(mx.checkpoint(layer)), run(layer)
    assert abs(value - same) < 1e-5 and abs(value - again) < 1e-5, "forward, both drew the same masks"
    norm = np.linalg.norm
    assert norm(true - repeated) < 1e-5 * norm(true)
    assert norm(true - recomputed) > 0.1 * norm(true)


# --- what is not for this backend ---


def test_a_model_that_mlx_lm_does_not_have_is_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "quinoa7"}))
    with pytest.raises(Unsupported, match="quinoa7"):
        backends.open(plan_of(folder))


@pytest.mark.parametrize("targets", [("w_proj",), ("q_proj", "w_proj")])
def test_a_target_that_is_not_there_is_named(model: Path, targets: tuple[str, ...]) -> None:
    """The plan knows the folder's names; mlx-lm may have others. Never train a part in silence."""
    plan = plan_of(model)
    spec = replace(plan.spec, linears={**plan.spec.linears, "self_attn.w_proj": (32, 32)})
    with pytest.raises(Unsupported, match="w_proj"):
        backends.open(replace(plan, spec=spec, targets=Choice(targets, "asked")))
