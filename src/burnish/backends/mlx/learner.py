"""The interface on MLX: score, step, generate, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from burnish.backends import adapter_folder
from burnish.backends.adapter_folder import State
from burnish.backends.base import Memory, Sampling, Scores, StepStats, Token
from burnish.backends.mlx.decoder import Decoder
from burnish.backends.mlx.device import MemoryMeter, free_cache, limits, translated, wire
from burnish.backends.mlx.engine import Arrays, Engine
from burnish.backends.mlx.generate import PrefixCache, generate
from burnish.backends.mlx.loss import SlicedLoss, Targets
from burnish.backends.mlx.optimizer import AdamW
from burnish.backends.mlx.projection import Context
from burnish.backends.reference import fresh_state, total_weight
from burnish.data.batches import Batch
from burnish.data.packing import segment_mask
from burnish.errors import NonFinite, UserError
from burnish.planning.plan import Plan


class MlxLearner:
    """Owns the model, its adapter and the optimizer. Made by `load.open_mlx` (or `load.adapt` on a loaded
    base). For one thread: MLX's limits, and what is replaced in mlx-lm while a layer is traced, are the
    process's.
    """

    def __init__(self, decoder: Decoder, context: Context, plan: Plan, device: mx.Device) -> None:
        self._decoder, self._context, self.plan, self._device = decoder, context, plan, device
        self._n_words = plan.spec.vocab_size
        self._ahead, self._waits_at_bytes = _pace(plan)
        self._build()
        self._shapes = adapter_folder.shapes(plan)
        state = fresh_state(plan)
        zeros = {k: mx.zeros(shape, mx.float32) for k, shape in self._shapes.items()}
        self._optimizer = AdamW(plan.recipe.train.weight_decay, zeros)
        self._step = 0  # optimizer steps taken; it names the dropout masks
        self._prefixes = PrefixCache()
        self._put({k: mx.array(v) for k, v in state.weights.items()})
        mx.eval(self._weights)
        wire(device, plan.budget.value)
        self._meter = MemoryMeter(device, plan.budget.value)

    def _build(self) -> None:
        """What is compiled for one device and dtype; compiling itself waits for the first use."""
        first, keep = min(self.plan.layers.value), self.plan.keep_layers.value
        self._engine = Engine(self._decoder, self._context, first, keep, self._ahead)
        self._loss = SlicedLoss(self._decoder.logits, self.plan.loss_slice.value)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On this learner's device, within its limits, MLX's errors as ours."""
        with (
            mx.stream(mx.default_stream(self._device)),
            limits(self._waits_at_bytes, self.plan.budget.value),
            translated(),
        ):
            yield

    # --- Model ---

    def score(self, batch: Batch) -> Scores:
        out = Scores(np.zeros(batch.weights_BT.shape, np.float32), np.zeros(batch.weights_BT.shape, bool))
        targets = _targets(batch)
        with self._here():
            hidden, _ = self._engine.forward(*self._rows(batch), train=False)
            nll, hit = self._loss.score(hidden, targets)
        out.nll_BT.reshape(-1)[targets.at_M], out.hit_BT.reshape(-1)[targets.at_M] = nll, hit
        return out

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        beyond = [t for p in prompts for t in p if not 0 <= t < self._n_words]
        if beyond:  # MLX would read whatever lies there
            raise UserError(
                f"a prompt holds token {beyond[0]}, but the model has {self._n_words} words",
                "use the tokenizer that came with the model",
            )
        tokens = generate(self._decoder.model, prompts, how, self._prefixes)
        try:
            while True:
                with self._here():  # not across a yield: others may compute in between
                    token = next(tokens, None)
                if token is None:
                    return
                yield token
        finally:
            tokens.close()  # type: ignore[attr-defined]

    def memory(self) -> Memory:
        return self._meter.read()

    @contextmanager
    def moved(self, device: str, dtype: str) -> Iterator[None]:
        """MLX's arrays belong to no device; what is packed stays so, and is unpacked into `dtype`."""
        before = self._device, self._context.compute
        self._device = mx.Device(mx.cpu) if device == "cpu" else before[0]
        self._context.compute = mx.float32 if dtype == "float32" else before[1]
        self._prefixes.clear()
        self._build()
        try:
            yield
        finally:
            self._device, self._context.compute = before
            self._prefixes.clear()
            self._build()

    def close(self) -> None:
        """Give the memory back; the learner is of no use afterwards."""
        self.__dict__.clear()
        free_cache()

    # --- Learner ---

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        optimizer, weights, stats = self._stepped(micros, lr)
        self._optimizer, self._step = optimizer, self._step + 1
        self._put(weights)
        return stats

    def rehearse(self, micros: Sequence[Batch]) -> None:
        """What is compiled for these shapes stays compiled."""
        self._stepped(micros, 0.0)

    def _stepped(self, micros: Sequence[Batch], lr: float) -> tuple[AdamW, dict[str, mx.array], StepStats]:
        """Optimizer and weights as they would be after this step; the learner's own have not changed."""
        total = total_weight(micros)
        with self._here():
            loss, gradients = self._gradients(micros, total)
            norm = _norm(gradients)
            if not np.isfinite(loss) or not np.isfinite(norm):
                raise NonFinite(f"loss {loss}, gradient norm {norm} at step {self._step + 1}")
            clip = self.plan.recipe.train.clip
            shrink = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            optimizer, weights = self._optimizer.stepped(self._weights, gradients, shrink, lr)
        return optimizer, weights, StepStats(loss, norm, total, sum(m.n_tokens for m in micros))

    def reshape(self, plan: Plan) -> None:
        """Compiled anew at first use. The adapter's arrays are its own, the engine's names for them too."""
        self.plan = plan
        self._ahead, self._waits_at_bytes = _pace(plan)
        self._prefixes.clear()
        self._build()
        self._put(self._weights)
        free_cache()

    def save(self, folder: Path) -> None:
        arrays = self._weights, self._optimizer.first, self._optimizer.second
        weights, first, second = ({k: np.array(v) for k, v in some.items()} for some in arrays)
        adapter_folder.write(folder, self.plan, State(weights, first, second, self._step))

    def load(self, folder: Path) -> None:
        state = adapter_folder.read(folder, self.plan)  # whole and right, or nothing changes
        with self._here():
            optimizer = self._optimizer.at(state.first, state.second, state.step)
            self._put({k: mx.array(v) for k, v in state.weights.items()})
        self._optimizer = optimizer
        self._step = state.step

    def load_adapter(self, folder: Path) -> None:
        weights = adapter_folder.read_weights(folder, self.plan)
        with self._here():
            self._put({k: mx.array(v) for k, v in weights.items()})

    def _put(self, weights: Mapping[str, mx.array]) -> None:
        """Make these the adapter's weights; keys are those of `adapter_folder.shapes`."""
        self._weights = dict(weights)
        self._prefixes.clear()
        for i in self.plan.layers.value:
            names = self._engine.adapter_names(i)
            self._engine.put(i, [self._weights[_key(i, name)] for name in names])

    # --- the engine ---

    def _gradients(self, micros: Sequence[Batch], total: float) -> tuple[float, dict[str, mx.array]]:
        """The loss, and d(Σ w·nll / total) by the adapter's weights."""
        loss, sums = 0.0, {}
        for number, micro in enumerate(micros):
            if micro.weight == 0:
                continue
            hidden, done = self._engine.forward(*self._rows(micro), self._keys(number), train=True)
            value, slope = self._loss.gradient(hidden, _targets(micro), total)
            del hidden  # not needed going back
            for i, arrays in self._engine.backward(done, slope).items():
                self._add(sums, i, arrays)
            del done, slope
            mx.eval(sums, value)
            loss += float(value)
        return loss, sums

    def _add(self, sums: dict[str, mx.array], layer: int, arrays: Arrays) -> None:
        for name, array in zip(self._engine.adapter_names(layer), arrays, strict=True):
            key = _key(layer, name)
            sums[key] = sums[key] + array if key in sums else array

    def _keys(self, micro: int) -> mx.array | None:
        """uint32 [layers, projections, 2]: names the dropout masks of this step and micro-batch."""
        if not self.plan.recipe.lora.dropout:
            return None
        shape = (self.plan.spec.n_layers, len(self._shapes) // (2 * len(self.plan.layers.value)), 2)
        named = np.random.SeedSequence([self.plan.recipe.train.seed, self._step, micro])
        return mx.array(named.generate_state(int(np.prod(shape)), np.uint32).reshape(shape))

    def _rows(self, batch: Batch) -> tuple[mx.array, mx.array | None]:
        """Tokens [B, T], and who may see whom where rows hold several examples.

        Padding needs no mask: it stands at a row's end, where causality keeps it from everything else.
        """
        # Beyond the embedding matrix MLX reads whatever lies there.
        most = int(max(batch.tokens_BT.max(), batch.targets_BT.max()))
        assert most < self._n_words, f"token {most} in a vocabulary of {self._n_words}"
        packed = batch.segments_BT.max() > 1
        segments = mx.array(segment_mask(batch.segments_BT))[:, None] if packed else None
        return mx.array(batch.tokens_BT), segments


def _pace(plan: Plan) -> tuple[int, int]:
    """Layers that may wait for the device, and the bytes in arrays at which MLX waits for work to finish.

    MLX counts its arrays, not the framework around them. It goes beyond the limit by what it has handed over
    at once, so where memory is short the limit is set below what is needed.
    """
    parts, ahead = {p.name: p.n_bytes for p in plan.training}, plan.ahead.value
    needed = sum(parts.values()) - parts["framework"]
    return ahead, needed if ahead else needed - parts["largest moment"] // 3


def _targets(batch: Batch) -> Targets:
    at = np.flatnonzero(batch.weights_BT.reshape(-1))
    return Targets(at, batch.targets_BT.reshape(-1)[at], batch.weights_BT.reshape(-1)[at])


def _key(layer: int, name: str) -> str:
    """'self_attn.q_proj.lora_a' of a layer → its name in an adapter folder, less the prefix."""
    module, kind = name.rsplit(".", 1)
    return f"model.layers.{layer}.{module}.{'lora_A' if kind == 'lora_a' else 'lora_B'}.weight"


def _norm(gradients: Mapping[str, mx.array]) -> float:
    squares = mx.stack([(g * g).sum() for g in gradients.values()])
    return float(np.sqrt(np.array(squares, np.float64).sum()))
