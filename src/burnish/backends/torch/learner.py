"""The interface on torch: score, step, generate, save and load.

Examples of a batch are laid out one after another without padding (attention.py), decoder layers beyond
`keep_layers` are recomputed in the backward pass, the loss is taken in slices (loss.py), and the optimizer
moves only when every micro-batch has given its gradient and all of it is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from burnish.backends import adapter_folder
from burnish.backends.adapter_folder import State
from burnish.backends.base import Memory, Sampling, Scores, StepStats, Token
from burnish.backends.torch.attention import Segments, unused_mask
from burnish.backends.torch.device import MemoryMeter, free_cache, keeps_padding, translated
from burnish.backends.torch.generate import generate
from burnish.backends.torch.lora import LoraLinear, Masks, narrow
from burnish.backends.torch.loss import Head, SlicedLoss
from burnish.backends.torch.recompute import Recomputation
from burnish.data.batches import Batch
from burnish.data.packing import segment_mask
from burnish.errors import NonFinite, Unsupported, UserError
from burnish.planning.plan import Plan


class TorchLearner:
    """Owns the model, its adapter and the optimizer. Made by `load.open_torch` (or `load.adapt` on a loaded
    base).
    """

    def __init__(self, model: Any, plan: Plan, masks: Masks, compute: torch.dtype) -> None:
        self._model, self.plan, self._masks, self._compute = model, plan, masks, compute
        base = model.get_base_model()
        self._decoder = base.get_decoder()
        self._embed = base.get_input_embeddings()
        self._head = _head(base)
        self._device = self._embed.weight.device
        self._slice = plan.loss_slice.value
        self._n_layers = plan.spec.n_layers
        self._step = 0  # optimizer steps taken; it names the dropout masks
        model.eval()  # the base has no dropout of its own; ours is in Masks
        self._recompute = self._recomputation()
        self._trainable = {_plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = _adamw(list(self._trainable.values()), plan.recipe.train.weight_decay)
        self._adapted = [m for m in model.modules() if isinstance(m, LoraLinear)]
        narrow(self._adapted, compute)
        self._meter = MemoryMeter(self._device)

    # --- Model ---

    def score(self, batch: Batch) -> Scores:
        flat = _flatten(batch, self._device, self._head.weight_VD.shape[0])
        with translated(), torch.inference_mode():
            _, nll, hit = self._loss(flat, flat.weights)
        out = Scores(np.zeros(batch.weights_BT.shape, np.float32), np.zeros(batch.weights_BT.shape, bool))
        out.nll_BT[flat.where] = nll.cpu().numpy()
        out.hit_BT[flat.where] = hit.cpu().numpy()
        return out

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        return generate(self._decoder, self._inputs, self._head.logits, self._device, prompts, how)

    def memory(self) -> Memory:
        return self._meter.read()

    @contextmanager
    def moved(self, device: str, dtype: str) -> Iterator[None]:
        if self.plan.quantize.value != "none":
            raise Unsupported("a quantised base stays where it is and as it is")
        tensors = [*self._model.parameters(), *self._model.buffers()]
        before = [(t, t.device, t.dtype) for t in tensors]
        compute, where = self._compute, self._device
        target = torch.device(device) if device else where
        try:
            with translated():
                for t in tensors:
                    wide = t.is_floating_point() and dtype == "float32"
                    t.data = t.data.to(target, torch.float32 if wide else t.dtype)
            free_cache(where)
            self._device, self._compute = target, torch.float32 if dtype == "float32" else compute
            narrow(self._adapted, self._compute)
            yield
        finally:
            for t, old_device, old_dtype in before:
                t.data = t.data.to(old_device, old_dtype)
            self._device, self._compute = where, compute
            narrow(self._adapted, compute)

    def close(self) -> None:
        """Give the memory back; the learner is of no use afterwards."""
        device = self._device
        self.__dict__.clear()
        free_cache(device)

    # --- Learner ---

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        with self._differentiated(micros) as stats:
            clip = self.plan.recipe.train.clip
            if clip is not None:
                nn.utils.clip_grads_with_norm_(
                    list(self._trainable.values()), clip, torch.tensor(stats.grad_norm)
                )
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            narrow(self._adapted, self._compute)
            self._step += 1
        return stats

    def rehearse(self, micros: Sequence[Batch]) -> None:
        """The update is in place: without it a step needs as much memory."""
        with self._differentiated(micros):
            pass

    def reshape(self, plan: Plan) -> None:
        self.plan, self._slice = plan, plan.loss_slice.value
        self._recompute = self._recomputation()
        free_cache(self._device)

    def _recomputation(self) -> Recomputation:
        plan = self.plan
        return Recomputation(self._decoder.layers, min(plan.layers.value), plan.keep_layers.value)

    def save(self, folder: Path) -> None:
        moments = {n: self._optimizer.state[p] for n, p in self._trainable.items()}
        state = State(
            {n: _array(p) for n, p in self._trainable.items()},
            {n: _array(m["exp_avg"]) for n, m in moments.items()},
            {n: _array(m["exp_avg_sq"]) for n, m in moments.items()},
            self._step,
        )
        adapter_folder.write(folder, self.plan, state)

    def load(self, folder: Path) -> None:
        state = adapter_folder.read(folder, self.plan, self._shapes())  # whole and right, or nothing changes
        self._put(state.weights)
        for name, p in self._trainable.items():
            moments = self._optimizer.state[p]
            moments["exp_avg"].copy_(torch.from_numpy(state.first[name]))
            moments["exp_avg_sq"].copy_(torch.from_numpy(state.second[name]))
            moments["step"].fill_(float(state.step))
        self._step = state.step

    def load_adapter(self, folder: Path) -> None:
        self._put(adapter_folder.read_weights(folder, self.plan, self._shapes()))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in self._trainable.items()}

    def _put(self, weights: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name, p in self._trainable.items():
                p.copy_(torch.from_numpy(weights[name]))
        narrow(self._adapted, self._compute)

    # --- the engine ---

    @contextmanager
    def _differentiated(self, micros: Sequence[Batch]) -> Iterator[StepStats]:
        """Within, the adapter holds the step's gradients, finite all of them; afterwards none."""
        total = sum(m.weight for m in micros)  # known before the first forward pass
        if total <= 0:
            raise UserError(
                "this step has no trained tokens", "burnish data RECIPE --show 3   shows what is trained"
            )
        try:
            with translated():
                with self._recompute:
                    loss = self._gradients(micros, total)
                parameters = self._trainable.values()
                norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
                if not np.isfinite(loss) or not np.isfinite(norm):
                    raise NonFinite(f"loss {loss}, gradient norm {norm} at step {self._step + 1}")
                yield StepStats(loss, norm, total, sum(m.n_tokens for m in micros))
        finally:
            self._masks.off()
            self._optimizer.zero_grad(set_to_none=True)

    def _gradients(self, micros: Sequence[Batch], total: float) -> float:
        """Accumulate d(Σ w·nll / total) into the adapter's gradients; the loss."""
        loss = 0.0
        for number, micro in enumerate(micros):
            if micro.weight == 0:
                continue
            self._masks.at(self._step, number)
            flat = _flatten(micro, self._device, self._head.weight_VD.shape[0])
            value, _, _ = self._loss(flat, flat.weights / total)
            self._meter.sample()
            value.backward()
            self._meter.sample()
            loss += float(value.detach())
        return loss

    def _inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._embed(tokens).to(self._compute)

    def _loss(self, flat: Flat, weights_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segments = Segments(flat.lengths, flat.mask)
        out = self._decoder(
            inputs_embeds=self._inputs(flat.tokens),
            position_ids=flat.positions,
            use_cache=False,
            attention_mask=unused_mask(self._device),
            segments=segments,
        )
        if segments.seen != self._n_layers:
            raise Unsupported(
                f"{segments.seen} of {self._n_layers} layers keep examples apart: this model mixes tokens "
                "by other means than attention"
            )
        hidden = out.last_hidden_state[0]
        return SlicedLoss.apply(hidden[flat.supervised], self._head, flat.targets, weights_M, self._slice)  # type: ignore


@dataclass(frozen=True)
class Flat:
    """A batch as the engine takes it: its N tokens in one row, and its M supervised positions."""

    tokens: torch.Tensor  # int64 [1, N]
    positions: torch.Tensor  # int64 [1, N]
    lengths: tuple[int, ...]  # of the segments, Σ = N
    mask: torch.Tensor | None  # bool [B, T, T], where packed rows keep their length (attention.py)
    supervised: torch.Tensor  # int64 [M], positions in the row
    targets: torch.Tensor  # int64 [M]
    weights: torch.Tensor  # float32 [M]
    where: tuple[np.ndarray, ...]  # the same M positions in the batch


def _flatten(batch: Batch, device: torch.device, n_words: int) -> Flat:
    segments, mask = batch.segments_BT, None
    if keeps_padding(device):
        # Padding becomes the tail of its row's last segment, which causality keeps it out of.
        segments = np.maximum.accumulate(segments, axis=1)
        if segments.max() > 1:
            mask = torch.as_tensor(segment_mask(segments), device=device)
    used = segments > 0
    # Beyond the embedding matrix, CUDA ends the process's use of the GPU and MPS reads whatever lies there.
    most = int(max(batch.tokens_BT.max(), batch.targets_BT.max()))
    assert most < n_words, f"token {most} in a vocabulary of {n_words}"
    row = np.broadcast_to(np.arange(len(segments))[:, None], segments.shape)[used]
    changes = np.flatnonzero(np.diff(row) | np.diff(segments[used])) + 1
    edges = np.concatenate([[0], changes, [used.sum()]])
    lengths = tuple(np.diff(edges).tolist())
    weights = batch.weights_BT[used]
    supervised = np.flatnonzero(weights)
    tensor = partial(torch.as_tensor, device=device)
    return Flat(
        tensor(batch.tokens_BT[used][None].astype(np.int64)),
        tensor(batch.positions_BT[used][None].astype(np.int64)),
        lengths,
        mask,
        tensor(supervised),
        tensor(batch.targets_BT[used][supervised].astype(np.int64)),
        tensor(weights[supervised]),
        np.nonzero((batch.weights_BT != 0) & used),
    )


def _head(base: Any) -> Head:
    config = base.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise Unsupported(f"this model scales its logits ({name}), which the sliced loss does not")
    layer = base.get_output_embeddings()
    return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))


def _adamw(parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW whose state exists from the start, so that memory cannot run out between gradient and update."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, fused=True)
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _plain_name(parameter: str) -> str:
    """PEFT's name of an adapter weight in a model → its name in an adapter folder, less the prefix."""
    return parameter.removeprefix("base_model.model.").replace(".default.weight", ".weight")
