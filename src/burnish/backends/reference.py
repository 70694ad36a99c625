"""The reference backend: what a backend does, in NumPy, short enough to read and exact enough to believe.

    learner = open_reference(plan)
    stats = learner.step(micros, lr=2e-4)

It is the living definition of `Learner` and the test double of everything above the backends. Adapter and
moments are held in float32, as they are on disk, so that saving loses nothing; all between them is float64.
It takes a step of a tiny model in milliseconds; real models are for the torch backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from burnish.backends import adapter_folder
from burnish.backends.adapter_folder import State
from burnish.backends.base import Memory, Sampling, Scores, StepStats, Token
from burnish.backends.reference_decoder import (
    Adapter,
    Dropout,
    Past,
    attend_next,
    embed,
    gradients,
    hidden,
    layer_forward,
    logits,
    token_losses,
)
from burnish.backends.reference_model import Decoder, read_decoder
from burnish.backends.sampling import choose, stream
from burnish.data.batches import Batch
from burnish.errors import NonFinite, Unsupported, UserError
from burnish.machine.usage import resident_bytes
from burnish.planning.plan import Plan

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def open_reference(plan: Plan) -> ReferenceLearner:
    """Read the model and start a fresh adapter. Raises Unsupported for what NumPy here does not do."""
    if plan.quantize.value != "none" or plan.compute.value != "float32" or plan.device.value != "cpu":
        asked = f"{plan.device.value}, {plan.compute.value}, quantize {plan.quantize.value}"
        raise Unsupported(f"the reference backend is for cpu, float32, quantize none, not {asked}", "dtype")
    return ReferenceLearner(plan, read_decoder(plan.spec), fresh_state(plan))


def fresh_state(plan: Plan) -> State:
    """A uniform in ±1/sqrt(in), which is PEFT's kaiming_uniform(a=sqrt 5); B zero; the optimizer at rest."""
    rng = np.random.default_rng(plan.recipe.train.seed)
    shapes = adapter_folder.shapes(plan)
    zeros = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    drawn = {
        k: (rng.uniform(-1, 1, shape) / shape[1] ** 0.5).astype(np.float32)
        for k, shape in shapes.items()
        if ".lora_A." in k
    }
    return State(zeros | drawn, zeros, zeros, 0)


class ReferenceLearner:
    """Implements `Learner` (backends/base.py). A step is atomic: its last act is to replace `state`."""

    def __init__(self, plan: Plan, decoder: Decoder, state: State) -> None:
        self.plan, self.state = plan, state
        self._decoder: Decoder | None = decoder
        self._modules = {name: i for i, name in enumerate(adapter_folder.modules(plan))}
        self._peak_bytes = resident_bytes()

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None, "the learner is closed"
        return self._decoder

    def adapter(self, micro: int | None = None) -> Adapter:
        """The adapter as it is now; with dropout where it is micro-batch `micro` of a step that is meant."""
        train, p = self.plan.recipe.train, self.plan.recipe.lora.dropout
        dropout = Dropout(p, train.seed, self.state.step, micro) if p and micro is not None else None
        return Adapter(self._modules, self.state.weights, adapter_folder.scale(self.plan), dropout)

    # --- Model ---

    def score(self, batch: Batch) -> Scores:
        x_BTD = hidden(self.decoder, self.adapter(), batch)
        chosen_BT = batch.weights_BT != 0
        nll_BT, hit_BT = np.zeros(chosen_BT.shape, np.float32), np.zeros(chosen_BT.shape, bool)
        nll_BT[chosen_BT], hit_BT[chosen_BT] = token_losses(
            self.decoder, x_BTD[chosen_BT], batch.targets_BT[chosen_BT], self.plan.loss_slice.value
        )
        self._note_peak()
        return Scores(nll_BT, hit_BT)

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        if not all(len(p) for p in prompts):
            raise UserError("a prompt is empty: generation needs at least one token to start from")
        if how.cache_bits:
            raise Unsupported(
                "generation.cache_bits: a quantised key-value cache is for backend mlx, not reference"
            )
        return self._generate([list(p) for p in prompts], how)

    def _generate(self, prompts: list[list[int]], how: Sampling) -> Iterator[Token]:
        """Row by row: each has its own cache and its own stream, so no row can know of another."""
        rows = {i: (prompt, prompt, _Cache(), stream(how.seed, i)) for i, prompt in enumerate(prompts)}
        for n in range(how.max_new_tokens):
            for i, (seen, new, cache, rng) in list(rows.items()):
                token, logprob = choose(self._next_logits(new, cache), seen, how, rng)
                stop, last = token in how.stop_ids, n + 1 == how.max_new_tokens
                if stop or last:
                    del rows[i]
                else:
                    rows[i] = ([*seen, token], [token], cache, rng)
                yield Token(i, token, logprob, "stop" if stop else "length" if last else "")

    def _next_logits(self, tokens: list[int], cache: _Cache) -> np.ndarray:
        """Logits [V] after `tokens`, which follow what is cached; the cache grows by them."""
        decoder, adapter = self.decoder, self.adapter()
        where = attend_next(decoder, cache.n_tokens, len(tokens))
        x_BTD = embed(decoder, np.array([tokens]))
        for i in range(decoder.n_layers):
            x_BTD, tape = layer_forward(decoder, adapter, i, x_BTD, where, cache.layers.get(i))
            cache.layers[i] = (tape.k_BSKd, tape.v_BSKd)
        cache.n_tokens += len(tokens)
        return logits(decoder, x_BTD[0, -1:])[0]

    def memory(self) -> Memory:
        """Resident bytes of this process. The peak is the largest value seen at the end of a verb or here."""
        self._note_peak()
        return Memory(resident_bytes(), self._peak_bytes, self.plan.budget.value)

    def _note_peak(self) -> None:
        self._peak_bytes = max(self._peak_bytes, resident_bytes())

    @contextmanager
    def moved(self, device: str, dtype: str) -> Iterator[None]:
        if device not in ("", "cpu"):
            raise Unsupported(f"the reference backend is for the CPU, not for {device}")
        if dtype not in ("", "float32"):
            raise Unsupported(f"the reference backend is for float32, not for {dtype}", kind="dtype")
        yield

    def close(self) -> None:
        self._decoder = None

    # --- Learner ---

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        self.state, stats = self._stepped(micros, lr)
        return stats

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self._stepped(micros, 0.0)

    def _stepped(self, micros: Sequence[Batch], lr: float) -> tuple[State, StepStats]:
        """What the state would be after this step; it is not yet."""
        weight = total_weight(micros)
        loss, grads = self.gradients(micros, weight)
        norm = float(np.sqrt(sum(float((g * g).sum()) for g in grads.values())))
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise NonFinite(f"loss {loss}, gradient norm {norm}; nothing was updated")
        clip = self.plan.recipe.train.clip
        shrink = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        state = adamw(self.state, grads, shrink, lr, self.plan.recipe.train.weight_decay)
        return state, StepStats(loss, norm, weight, sum(b.n_tokens for b in micros))

    def gradients(self, micros: Sequence[Batch], weight: float) -> tuple[float, Mapping[str, np.ndarray]]:
        """The loss of a step over its micro-batches, and its gradient by the adapter (float64); no update."""
        loss, sums = 0.0, {k: np.zeros(v.shape) for k, v in self.state.weights.items()}
        slice_, keep = self.plan.loss_slice.value, self.plan.keep_layers.value
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows ends as NonFinite
            for i, batch in enumerate(micros):
                part, grads = gradients(self.decoder, self.adapter(i), batch, weight, slice_, keep)
                loss += part
                for k, g in grads.items():
                    sums[k] += g
                self._note_peak()
        return loss, sums

    def reshape(self, plan: Plan) -> None:
        self.plan = plan

    def save(self, folder: Path) -> None:
        adapter_folder.write(folder, self.plan, self.state)

    def load(self, folder: Path) -> None:
        self.state = adapter_folder.read(folder, self.plan)

    def load_adapter(self, folder: Path) -> None:
        self.state = replace(self.state, weights=adapter_folder.read_weights(folder, self.plan))


class _Cache:
    """Keys and values of one row, by layer."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.layers: dict[int, Past] = {}


def total_weight(micros: Sequence[Batch]) -> float:
    """Σ w of a step, known before any forward pass. Raises UserError where nothing would be trained."""
    weight = sum(b.weight for b in micros)
    if weight == 0:
        raise UserError(
            f"this step has no trained tokens: all weights of its {len(micros)} micro-batches are 0",
            "burnish data RECIPE --show 3   shows what is trained",
        )
    return weight


def adamw(
    state: State, grads: Mapping[str, np.ndarray], shrink: float, lr: float, weight_decay: float
) -> State:
    """One step of AdamW (Loshchilov & Hutter 2019), in float64, in torch.optim.AdamW's order.

    shrink multiplies the gradients: the clipping.
    """
    step = state.step + 1
    weights, first, second = {}, {}, {}
    for k, w in state.weights.items():
        g = grads[k] * shrink
        m = BETA1 * state.first[k].astype(np.float64) + (1 - BETA1) * g
        v = BETA2 * state.second[k].astype(np.float64) + (1 - BETA2) * g * g
        update = m / (1 - BETA1**step) / (np.sqrt(v / (1 - BETA2**step)) + EPS)
        weights[k] = (w.astype(np.float64) * (1 - lr * weight_decay) - lr * update).astype(np.float32)
        first[k], second[k] = m.astype(np.float32), v.astype(np.float32)
    return replace(state, weights=weights, first=first, second=second, step=step)
