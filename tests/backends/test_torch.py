"""What is the torch backend's own: the fused adapter, held and computed dtypes, moving, and what errors mean.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from burnish import backends  # noqa: E402
from burnish.backends.base import Sampling  # noqa: E402
from burnish.backends.torch.device import meaning, translated  # noqa: E402
from burnish.backends.torch.learner import TorchLearner  # noqa: E402
from burnish.backends.torch.loss import Head, SlicedLoss  # noqa: E402
from burnish.data.batches import Batch, Example, collate  # noqa: E402
from burnish.errors import OutOfMemory, Unsupported  # noqa: E402
from tests.tiny import random_batch, tiny_model, tiny_plan  # noqa: E402

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "qwen2")


def opened(model: Path, **overrides: object) -> TorchLearner:
    learner = backends.open(tiny_plan(model, **{"backend": "torch", **overrides}))
    assert isinstance(learner, TorchLearner)
    return learner


def noisy(learner: TorchLearner) -> TorchLearner:
    """An adapter whose B is not zero, so that every part of it matters."""
    generator = torch.Generator().manual_seed(1)
    for p in learner._trainable.values():
        p.data.normal_(0, 0.1, generator=generator)
    return learner


def batch(learner: TorchLearner, rows: int = 3, length: int = 24) -> Batch:
    return random_batch(np.random.default_rng(1), rows, length, learner.plan.spec.vocab_size)


def test_loss_and_gradients_are_those_of_transformers_and_peft(model: Path) -> None:
    """Stock layers, stock padded batch with a mask, stock loss with labels of -100, to 1e-5."""
    learner = noisy(opened(model, lora={"dropout": 0.0}))
    sizes = (19, 11, 7)
    tokens = [RNG.integers(3, 200, n).astype(np.int32) for n in sizes]
    examples = [Example(t, (np.arange(len(t)) >= 3).astype(np.float32)) for t in tokens]
    micro = collate(examples)
    with learner._recompute:
        loss = learner._gradients([micro], micro.weight)
    lora, targets = learner.plan.recipe.lora, learner.plan.targets.value
    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(
            r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(targets), task_type="CAUSAL_LM"
        ),
    )
    theirs = {n: p for n, p in stock.named_parameters() if p.requires_grad}
    ours = {
        f"base_model.model.{n}".replace(".weight", ".default.weight"): p
        for n, p in learner._trainable.items()
    }
    assert theirs.keys() == ours.keys()
    for name, p in theirs.items():
        p.data.copy_(ours[name])
    ids, labels, mask = (torch.zeros((3, 19), dtype=torch.int64) for _ in range(3))
    labels[:] = -100
    for row, e in enumerate(examples):
        n = len(e.tokens)
        ids[row, :n], mask[row, :n] = torch.tensor(e.tokens), 1
        labels[row, 3:n] = torch.tensor(e.tokens[3:].astype(np.int64))
    expected = stock(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name].grad, p.grad, atol=1e-5, rtol=1e-4)


def test_weights_held_in_bfloat16_and_computed_in_float32(model: Path) -> None:
    """The numbers are exactly those of a float32 model whose weights were rounded once."""
    held = opened(model, dtype="bfloat16")
    assert (held.plan.weights.value, held.plan.compute.value) == ("bfloat16", "float32")
    rounded = opened(model, dtype="float32")
    for p in rounded._model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16().float()
    b = batch(held)
    np.testing.assert_allclose(held.score(b).nll_BT, rounded.score(b).nll_BT, atol=1e-5)
    assert held.step([b], 1e-2).loss == pytest.approx(rounded.step([b], 1e-2).loss, abs=1e-5)
    # Adam turns a gradient's rounding into a whole step where the gradient is almost 0, so later steps drift
    # a little.
    assert held.step([b], 1e-2).loss == pytest.approx(rounded.step([b], 1e-2).loss, abs=1e-3)
    assert {p.dtype for p in held._model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_slice_size_changes_no_number(model: Path) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16), torch.randn(101, 16)
    targets, weights = torch.randint(0, 101, (37,)), torch.rand(37)
    logits = hidden @ weight.T
    for cap in (None, 5.0):
        capped = logits if cap is None else cap * torch.tanh(logits / cap)
        x = hidden.clone().requires_grad_()
        reference = x @ weight.T if cap is None else cap * torch.tanh(x @ weight.T / cap)
        nll = torch.nn.functional.cross_entropy(reference, targets, reduction="none")
        (nll * weights).sum().backward()
        for rows in (1, 5, 37, 64):
            y = hidden.clone().requires_grad_()
            total, each, hit = SlicedLoss.apply(y, Head(weight, None, cap), targets, weights, rows)
            total.backward()
            torch.testing.assert_close(each, nll.detach())
            torch.testing.assert_close(y.grad, x.grad, atol=1e-5, rtol=1e-4)
            assert torch.equal(hit, capped.argmax(1) == targets)


def test_moving_there_and_back_leaves_every_bit(model: Path) -> None:
    learner = noisy(opened(model, dtype="bfloat16"))
    before = {n: (p.dtype, p.clone()) for n, p in learner._model.named_parameters()}
    b = batch(learner)
    scores = learner.score(b).nll_BT
    with learner.moved("cpu", "float32"):
        assert {p.dtype for p in learner._model.parameters()} == {torch.float32}
        np.testing.assert_allclose(learner.score(b).nll_BT, scores, atol=1e-5)
    for name, p in learner._model.named_parameters():
        assert p.dtype == before[name][0] and torch.equal(p, before[name][1]), name
    assert np.array_equal(learner.score(b).nll_BT, scores)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_rows_do_not_see_each_other_in_any_family(family: str, tmp_path: Path) -> None:
    learner = noisy(opened(tiny_model(tmp_path, family)))
    b = random_batch(np.random.default_rng(2), 3, 30, learner.plan.spec.vocab_size, segments=2)
    whole = learner.score(b).nll_BT
    tokens = b.tokens_BT.copy()
    tokens[1] = (tokens[1] + 7) % 100 + 3
    other = type(b)(tokens, b.targets_BT, b.weights_BT, b.segments_BT, b.positions_BT)
    changed = learner.score(other).nll_BT
    np.testing.assert_allclose(changed[[0, 2]], whole[[0, 2]], atol=1e-6)
    assert np.abs(changed[1] - whole[1]).max() > 0.1


def test_padding_kept_as_on_mps_changes_no_number(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = noisy(opened(model))
    b = batch(learner)
    plain = learner.score(b).nll_BT
    monkeypatch.setattr("burnish.backends.torch.learner.keeps_padding", lambda device: True)
    np.testing.assert_allclose(learner.score(b).nll_BT, plain, atol=1e-5)


def test_only_the_last_layers_are_adapted_and_lower_ones_keep_nothing(model: Path) -> None:
    learner = opened(model, lora={"last_layers": 1})
    layers = {int(n.split(".layers.")[1].split(".")[0]) for n in learner._trainable}
    assert layers == {learner.plan.spec.n_layers - 1}
    before = learner.step([batch(learner)], 1e-2).loss
    assert learner.step([batch(learner)], 1e-2).loss < before


def test_a_model_that_mixes_tokens_without_attention_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = opened(model)
    monkeypatch.setattr(learner, "_n_layers", learner._n_layers + 1)
    with pytest.raises(Unsupported, match="mixes tokens by other means"):
        learner.score(batch(learner))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_four_bit_base_learns(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    learner = opened(model, quantize="4bit")
    b = batch(learner)
    losses = [learner.step([b], 3e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert any("4bit" in type(m).__name__.lower() for m in learner._model.modules())
    tokens = list(learner.generate([[5, 6, 7]], Sampling(3)))
    assert len(tokens) == 3
    with pytest.raises(Unsupported, match="stays where it is"), learner.moved("cpu", "float32"):
        pass


# As the frameworks wrote them: kind and what is meant, then the message.
MESSAGES = [
    (
        OutOfMemory,
        "",
        "MPS backend out of memory (MPS allocated: 26.50 GB, other allocations: 9.28 GB, max "
        "allowed: 36.27 GB). Tried to allocate 1.07 GB on private pool. Use "
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may "
        "cause system failure).",
    ),
    (
        OutOfMemory,
        "",
        "CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 79.11 GiB of"
        " which 1.02 GiB is free.",
    ),
    (
        OutOfMemory,
        "",
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (OutOfMemory, "", "could not create a primitive"),  # oneDNN under RLIMIT_DATA
    (
        OutOfMemory,
        "",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    (
        OutOfMemory,
        "",
        "Invalid buffer size: 40.00 GiB",
    ),
    (
        Unsupported,
        "dtype",
        "'mps.add' op requires the same element type for all operands and results",
    ),
    (
        Unsupported,
        "dtype",
        "expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16",
    ),
    (
        Unsupported,
        "operation",
        "The operator 'aten::_linalg_svd.U' is not currently implemented for the MPS device. If you"
        " want this op to be considered for addition please comment on the issue",
    ),
    (
        Unsupported,
        "operation",
        "\"addmm_impl_cpu_\" not implemented for 'Half'",
    ),
    (
        Unsupported,
        "operation",
        "gather_kernel_1: missing buffer binding at index 2",
    ),
]


@pytest.mark.parametrize(("kind", "what", "text"), MESSAGES)
def test_recorded_messages_become_typed_errors(kind: type[Exception], what: str, text: str) -> None:
    with pytest.raises(kind) as e, translated():
        raise RuntimeError(text)
    assert getattr(e.value, "kind", "") == what


def test_other_errors_pass_unchanged() -> None:
    assert meaning(RuntimeError("shape '[2, 3]' is invalid for input of size 5")) is None
    with pytest.raises(RuntimeError, match="invalid for input"), translated():
        raise RuntimeError("shape '[2, 3]' is invalid for input of size 5")


def test_a_real_allocation_failure_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory), translated():
        torch.empty(1 << 50, dtype=torch.uint8)
