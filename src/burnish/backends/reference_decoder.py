"""A decoder of the Llama line with LoRA, forward and backward, written out in NumPy.

    loss, grads = gradients(read_decoder(plan.spec), adapter, batch, total_weight, loss_slice=64)

The forward pass keeps each layer's input; the backward pass recomputes a layer, takes its derivative and
forgets it (docs/DESIGN.md, the engine), so that peak memory is one layer's work. All of it is in float64, so
that other backends' rounding is measured against numbers that have next to none, and finite differences can
confirm the derivatives.

Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Hu et al. 2021 (LoRA); names and layout are those
of transformers. Axes: B rows, T positions, S keys, D hidden, H heads, K key-value heads, G heads that share
one, d head, V words, R rank, N chosen tokens, I and O the inputs and outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.backends.reference_model import Decoder
from burnish.data.batches import Batch

Grads = dict[str, np.ndarray]


@dataclass(frozen=True)
class Dropout:
    """Masks come from a counter, (seed, step, micro-batch, projection), so drawing again is replaying."""

    p: float
    seed: int
    step: int
    micro: int

    def mask(self, projection: int, shape: tuple[int, ...]) -> np.ndarray:
        counter = np.random.SeedSequence([self.seed, self.step, self.micro, projection])
        kept = np.random.Generator(np.random.Philox(counter)).random(shape) >= self.p
        return kept / (1 - self.p)


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by name: 'model.layers.0.mlp.up_proj.lora_A.weight' [R, I], '….lora_B.weight' [O, R]."""

    modules: Mapping[str, int]  # adapted projection → its number
    weights: Mapping[str, np.ndarray]
    scale: float
    dropout: Dropout | None = None

    @property
    def lowest_layer(self) -> int:
        """The first layer with an adapter: no gradient is needed below its input."""
        return min(int(m.split(".")[2]) for m in self.modules)


@dataclass(frozen=True)
class Linear:
    """y = W x + b + scale · B A (keep ∘ x)"""

    name: str
    W_OI: np.ndarray
    b_O: np.ndarray | None
    A_RI: np.ndarray | None
    B_OR: np.ndarray | None
    scale: float
    keep_BTI: np.ndarray | None  # the dropout mask, 0 or 1/(1-p)

    def forward(self, x_BTI: np.ndarray) -> np.ndarray:
        y_BTO = x_BTI @ self.W_OI.T
        if self.b_O is not None:
            y_BTO = y_BTO + self.b_O
        if self.A_RI is not None and self.B_OR is not None:
            y_BTO = y_BTO + self.scale * (self._dropped(x_BTI) @ self.A_RI.T @ self.B_OR.T)
        return y_BTO

    def backward(self, x_BTI: np.ndarray, dy_BTO: np.ndarray, grads: Grads) -> np.ndarray:
        """dx; the adapter's gradients go into `grads`."""
        dx_BTI = dy_BTO @ self.W_OI
        if self.A_RI is None or self.B_OR is None:
            return dx_BTI
        kept_NI = _rows(self._dropped(x_BTI))
        d_low_BTR = self.scale * (dy_BTO @ self.B_OR)
        grads[f"{self.name}.lora_A.weight"] = _rows(d_low_BTR).T @ kept_NI
        grads[f"{self.name}.lora_B.weight"] = self.scale * (_rows(dy_BTO).T @ (kept_NI @ self.A_RI.T))
        return dx_BTI + self._dropped(d_low_BTR @ self.A_RI)

    def _dropped(self, x_BTI: np.ndarray) -> np.ndarray:
        return x_BTI if self.keep_BTI is None else x_BTI * self.keep_BTI


@dataclass(frozen=True)
class Attend:
    """Who sees whom, and where each token stands."""

    cos_BTd: np.ndarray
    sin_BTd: np.ndarray
    allowed_BTS: np.ndarray  # bool, before a layer's window
    distance_BTS: np.ndarray  # positions from key to query


@dataclass(frozen=True)
class Tape:
    """What one layer's backward pass needs."""

    linears: Mapping[str, Linear]
    x_BTD: np.ndarray
    normed_BTD: np.ndarray
    raw_q_BTHd: np.ndarray  # before q_norm and RoPE
    raw_k_BTKd: np.ndarray
    q_BTHd: np.ndarray
    k_BSKd: np.ndarray
    v_BSKd: np.ndarray
    probs_BKGTS: np.ndarray
    mixed_BTO: np.ndarray  # attention's output before o_proj
    middle_BTD: np.ndarray  # the residual stream between attention and MLP
    normed_middle_BTD: np.ndarray
    gate_BTI: np.ndarray
    up_BTI: np.ndarray


# --- small parts ---


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _norm_backward(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    dy = dy * weight
    return r * (dy - x * r * r * (dy * x).mean(-1, keepdims=True))


def _rope(x_BTHd: np.ndarray, cos_BTd: np.ndarray, sin_BTd: np.ndarray) -> np.ndarray:
    """A rotation; its transpose, which the backward pass needs, is the one by -sin."""
    first, second = np.split(x_BTHd, 2, axis=-1)
    return x_BTHd * cos_BTd[:, :, None] + np.concatenate([-second, first], -1) * sin_BTd[:, :, None]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def angles(decoder: Decoder, positions_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = decoder.head_dim
    frequencies = decoder.theta ** (-np.arange(0, d, 2) / d)
    a_BTd = np.tile(positions_BT[..., None] * frequencies, 2)
    return np.cos(a_BTd), np.sin(a_BTd)


def attend(decoder: Decoder, batch: Batch) -> Attend:
    """Tokens see their own segment, and of it what came before. Padding is segment 0 and sees padding, which
    keeps its softmax finite and touches nobody else."""
    cos, sin = angles(decoder, batch.positions_BT)
    t = np.arange(batch.tokens_BT.shape[1])
    same_BTS = batch.segments_BT[:, :, None] == batch.segments_BT[:, None, :]
    distance_BTS = np.broadcast_to(t[:, None] - t[None], same_BTS.shape)
    return Attend(cos, sin, same_BTS & (distance_BTS >= 0), distance_BTS)


def attend_next(decoder: Decoder, n_past: int, n_new: int) -> Attend:
    """`n_new` tokens of one sequence behind `n_past` cached ones."""
    query, key = n_past + np.arange(n_new), np.arange(n_past + n_new)
    cos, sin = angles(decoder, query[None])
    distance_BTS = (query[:, None] - key[None])[None]
    return Attend(cos, sin, distance_BTS >= 0, distance_BTS)


def _linear(decoder: Decoder, adapter: Adapter, name: str, n_rows: int, n_tokens: int) -> Linear:
    W_OI, b_O = decoder.tensors[f"{name}.weight"], decoder.tensors.get(f"{name}.bias")
    if name not in adapter.modules:
        return Linear(name, W_OI, b_O, None, None, 0.0, None)
    # float32 weights widened here, so that their products are float64 like all others
    A_RI, B_OR = (adapter.weights[f"{name}.lora_{m}.weight"].astype(np.float64) for m in "AB")
    keep = None
    if adapter.dropout is not None:
        keep = adapter.dropout.mask(adapter.modules[name], (n_rows, n_tokens, W_OI.shape[1]))
    return Linear(name, W_OI, b_O, A_RI, B_OR, adapter.scale, keep)


# --- one layer ---

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
Past = tuple[np.ndarray, np.ndarray]  # k_BSKd (rotated), v_BSKd


def layer_forward(
    decoder: Decoder, adapter: Adapter, i: int, x_BTD: np.ndarray, where: Attend, past: Past | None = None
) -> tuple[np.ndarray, Tape]:
    B, T, _ = x_BTD.shape
    at, w = f"model.layers.{i}", decoder.tensors
    names = {n: f"{at}.self_attn.{n}" for n in _ATTENTION} | {n: f"{at}.mlp.{n}" for n in _MLP}
    f = {n: _linear(decoder, adapter, full, B, T) for n, full in names.items()}

    normed = _norm(x_BTD, w[f"{at}.input_layernorm.weight"], decoder.eps)
    raw_q = f["q_proj"].forward(normed).reshape(B, T, decoder.n_heads, decoder.head_dim)
    raw_k = f["k_proj"].forward(normed).reshape(B, T, decoder.n_kv_heads, decoder.head_dim)
    v = f["v_proj"].forward(normed).reshape(B, T, decoder.n_kv_heads, decoder.head_dim)
    q, k = raw_q, raw_k
    if f"{at}.self_attn.q_norm.weight" in w:  # Qwen3
        q = _norm(q, w[f"{at}.self_attn.q_norm.weight"], decoder.eps)
        k = _norm(k, w[f"{at}.self_attn.k_norm.weight"], decoder.eps)
    q, k = _rope(q, where.cos_BTd, where.sin_BTd), _rope(k, where.cos_BTd, where.sin_BTd)
    if past is not None:
        k, v = np.concatenate([past[0], k], 1), np.concatenate([past[1], v], 1)
    window = decoder.windows[i]
    allowed = where.allowed_BTS if window is None else where.allowed_BTS & (where.distance_BTS < window)
    mixed, probs = _attention(q, k, v, allowed)
    middle = x_BTD + f["o_proj"].forward(mixed)

    normed_middle = _norm(middle, w[f"{at}.post_attention_layernorm.weight"], decoder.eps)
    gate, up = f["gate_proj"].forward(normed_middle), f["up_proj"].forward(normed_middle)
    y_BTD = middle + f["down_proj"].forward(gate * _sigmoid(gate) * up)
    return y_BTD, Tape(f, x_BTD, normed, raw_q, raw_k, q, k, v, probs, mixed, middle, normed_middle, gate, up)


def _grouped(q_BTHd: np.ndarray, n_kv_heads: int) -> np.ndarray:
    B, T, H, d = q_BTHd.shape
    return q_BTHd.reshape(B, T, n_kv_heads, H // n_kv_heads, d).transpose(0, 2, 3, 1, 4)  # BKGTd


def _attention(
    q_BTHd: np.ndarray, k_BSKd: np.ndarray, v_BSKd: np.ndarray, allowed_BTS: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The heads' outputs side by side [B, T, H·d], and the probabilities [B, K, G, T, S]."""
    B, T, H, d = q_BTHd.shape
    q_BKGTd = _grouped(q_BTHd, k_BSKd.shape[2])
    scores = np.einsum("bkgtd,bskd->bkgts", q_BKGTd, k_BSKd, optimize=True) / np.sqrt(d)
    scores = np.where(allowed_BTS[:, None, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    mixed_BTKGd = np.einsum("bkgts,bskd->btkgd", probs, v_BSKd, optimize=True)
    return mixed_BTKGd.reshape(B, T, H * d), probs


def _attention_backward(tape: Tape, d_mixed_BTO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    B, T, H, d = tape.q_BTHd.shape
    n_kv = tape.k_BSKd.shape[2]
    d_mixed = _grouped(d_mixed_BTO.reshape(B, T, H, d), n_kv)
    dv_BSKd = np.einsum("bkgts,bkgtd->bskd", tape.probs_BKGTS, d_mixed, optimize=True)
    d_probs = np.einsum("bkgtd,bskd->bkgts", d_mixed, tape.v_BSKd, optimize=True)
    d_scores = tape.probs_BKGTS * (d_probs - (d_probs * tape.probs_BKGTS).sum(-1, keepdims=True)) / np.sqrt(d)
    dq = np.einsum("bkgts,bskd->btkgd", d_scores, tape.k_BSKd, optimize=True).reshape(B, T, H, d)
    dk = np.einsum("bkgts,bkgtd->bskd", d_scores, _grouped(tape.q_BTHd, n_kv), optimize=True)
    return dq, dk, dv_BSKd


def layer_backward(
    decoder: Decoder, i: int, tape: Tape, where: Attend, dy_BTD: np.ndarray, grads: Grads
) -> np.ndarray:
    """dx; the gradients of this layer's adapters go into `grads`."""
    B, T, _ = dy_BTD.shape
    at, w, f = f"model.layers.{i}", decoder.tensors, tape.linears
    sigmoid = _sigmoid(tape.gate_BTI)
    silu = tape.gate_BTI * sigmoid
    d_product = f["down_proj"].backward(silu * tape.up_BTI, dy_BTD, grads)
    d_gate = d_product * tape.up_BTI * (sigmoid + silu * (1 - sigmoid))
    d_normed = f["gate_proj"].backward(tape.normed_middle_BTD, d_gate, grads)
    d_normed = d_normed + f["up_proj"].backward(tape.normed_middle_BTD, d_product * silu, grads)
    norm = w[f"{at}.post_attention_layernorm.weight"]
    d_middle = dy_BTD + _norm_backward(tape.middle_BTD, norm, decoder.eps, d_normed)

    dq, dk, dv = _attention_backward(tape, f["o_proj"].backward(tape.mixed_BTO, d_middle, grads))
    dq, dk = _rope(dq, where.cos_BTd, -where.sin_BTd), _rope(dk, where.cos_BTd, -where.sin_BTd)
    if f"{at}.self_attn.q_norm.weight" in w:
        dq = _norm_backward(tape.raw_q_BTHd, w[f"{at}.self_attn.q_norm.weight"], decoder.eps, dq)
        dk = _norm_backward(tape.raw_k_BTKd, w[f"{at}.self_attn.k_norm.weight"], decoder.eps, dk)
    d_normed = f["q_proj"].backward(tape.normed_BTD, dq.reshape(B, T, -1), grads)
    d_normed = d_normed + f["k_proj"].backward(tape.normed_BTD, dk.reshape(B, T, -1), grads)
    d_normed = d_normed + f["v_proj"].backward(tape.normed_BTD, dv.reshape(B, T, -1), grads)
    return d_middle + _norm_backward(tape.x_BTD, w[f"{at}.input_layernorm.weight"], decoder.eps, d_normed)


# --- the whole model ---


def embed(decoder: Decoder, tokens_BT: np.ndarray) -> np.ndarray:
    return decoder.tensors["model.embed_tokens.weight"][tokens_BT]


def logits(decoder: Decoder, x_ND: np.ndarray) -> np.ndarray:
    return _norm(x_ND, decoder.tensors["model.norm.weight"], decoder.eps) @ decoder.head_VD.T


def hidden(decoder: Decoder, adapter: Adapter, batch: Batch) -> np.ndarray:
    """The residual stream after the last layer [B, T, D]."""
    where, x_BTD = attend(decoder, batch), embed(decoder, batch.tokens_BT)
    for i in range(decoder.n_layers):
        x_BTD, _ = layer_forward(decoder, adapter, i, x_BTD, where)
    return x_BTD


def slices(n: int, size: int) -> Sequence[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def token_losses(
    decoder: Decoder, x_ND: np.ndarray, targets_N: np.ndarray, loss_slice: int
) -> tuple[np.ndarray, np.ndarray]:
    """nll_N and hit_N of the chosen tokens; full logits never exist."""
    nll_N, hit_N = np.zeros(len(targets_N)), np.zeros(len(targets_N), bool)
    for s in slices(len(targets_N), loss_slice):
        z_NV = logits(decoder, x_ND[s])
        z_NV -= z_NV.max(-1, keepdims=True)
        nll_N[s] = np.log(np.exp(z_NV).sum(-1)) - np.take_along_axis(z_NV, targets_N[s, None], 1)[:, 0]
        hit_N[s] = z_NV.argmax(-1) == targets_N[s]
    return nll_N, hit_N


def _head_backward(
    decoder: Decoder, x_ND: np.ndarray, targets_N: np.ndarray, share_N: np.ndarray, loss_slice: int
) -> tuple[float, np.ndarray]:
    """Σ share·nll, and its derivative by x_ND, one slice of logits at a time."""
    loss, dx_ND = 0.0, np.zeros_like(x_ND)
    norm = decoder.tensors["model.norm.weight"]
    for s in slices(len(targets_N), loss_slice):
        z_NV = logits(decoder, x_ND[s])
        z_NV -= z_NV.max(-1, keepdims=True)
        p_NV = np.exp(z_NV)
        total_N = p_NV.sum(-1)
        n = np.arange(len(total_N))
        loss += float(share_N[s] @ (np.log(total_N) - z_NV[n, targets_N[s]]))
        p_NV /= total_N[:, None]
        p_NV[n, targets_N[s]] -= 1
        dx_ND[s] = _norm_backward(x_ND[s], norm, decoder.eps, (p_NV * share_N[s, None]) @ decoder.head_VD)
    return loss, dx_ND


def gradients(
    decoder: Decoder,
    adapter: Adapter,
    batch: Batch,
    total_weight: float,
    loss_slice: int,
    keep_layers: int = 0,
) -> tuple[float, Grads]:
    """This micro-batch's part of the step's loss, Σ w·nll / total_weight, and of its gradient by the adapter.

    The last `keep_layers` layers keep their tape; of the others only the input is kept.
    """
    where, x_BTD = attend(decoder, batch), embed(decoder, batch.tokens_BT)
    lowest, inputs, tapes = adapter.lowest_layer, {}, {}
    for i in range(decoder.n_layers):
        inputs[i] = x_BTD if i >= lowest else None
        x_BTD, tape = layer_forward(decoder, adapter, i, x_BTD, where)
        if i >= max(lowest, decoder.n_layers - keep_layers):
            tapes[i] = tape
        del tape

    chosen_BT = batch.weights_BT != 0
    share_N = batch.weights_BT[chosen_BT].astype(np.float64) / total_weight
    loss, dx_ND = _head_backward(decoder, x_BTD[chosen_BT], batch.targets_BT[chosen_BT], share_N, loss_slice)
    dx_BTD = np.zeros_like(x_BTD)
    dx_BTD[chosen_BT] = dx_ND

    grads: Grads = {}
    for i in range(decoder.n_layers - 1, lowest - 1, -1):
        x_BTD = inputs.pop(i)
        tape = tapes.pop(i) if i in tapes else layer_forward(decoder, adapter, i, x_BTD, where)[1]
        dx_BTD = layer_backward(decoder, i, tape, where, dx_BTD, grads)
        del tape
    return loss, grads
