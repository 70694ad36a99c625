"""What transformers and PEFT compute by themselves, and a learner's gradients, to hold side by side.

    mine = Measured(plan, tmp_path).step(micros)          # tests/backends/test_packing_equal.py
    theirs = truth(tmp_path / "start", micros)            # the same adapter, one example a forward pass
    assert_same(mine, theirs)

`truth` knows nothing of burnish's batches but their arrays: every example goes through stock layers alone,
with eager attention, so neither padding nor packing nor a mask of ours takes part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from burnish.data.batches import Batch

Gradients = Mapping[str, np.ndarray]


def peft_model(adapter: Path, base: Path | None = None) -> Any:
    """base + adapter in float32, after a check that PEFT took every tensor of the file (it only warns)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    folder = str(base or config["base_model_name_or_path"])
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(stock, str(adapter), is_trainable=True).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, p in trainable(model).items():
        np.testing.assert_array_equal(p.detach().numpy(), stored.pop(name), err_msg=name)
    assert not stored, f"PEFT has no place for {sorted(stored)[:3]}"
    return model


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """By the names of adapter_model.safetensors."""
    named = model.named_parameters()
    return {n.replace(".default.weight", ".weight"): p for n, p in named if p.requires_grad}


def logprobs(model: Any, batch: Batch) -> list[tuple[np.ndarray, torch.Tensor]]:
    """For each example of a batch: where it lies (indices into the flat batch), and its targets' nll."""
    found = []
    for row, segments in enumerate(batch.segments_BT):
        for number in range(1, int(segments.max()) + 1):
            at = np.flatnonzero(segments == number)
            ids = torch.from_numpy(batch.tokens_BT[row, at].astype(np.int64))
            targets = torch.from_numpy(batch.targets_BT[row, at].astype(np.int64))
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            found.append((row * batch.tokens_BT.shape[1] + at, nll))
    return found


def truth(adapter: Path, micros: Sequence[Batch], base: Path | None = None) -> tuple[float, Gradients]:
    """Σ w·nll / Σ w over all micro-batches, and every adapter tensor's gradient, named as `Measured` does."""
    model = peft_model(adapter, base)
    total, weight = torch.zeros((), dtype=torch.float64), sum(m.weight for m in micros)
    for micro in micros:
        for at, nll in logprobs(model, micro):
            total = total + (torch.from_numpy(micro.weights_BT.reshape(-1)[at]).double() * nll).sum() / weight
    total.backward()
    gradients = {f"exp_avg.{n}": p.grad.numpy() for n, p in trainable(model).items() if p.grad is not None}
    return float(total.detach()), gradients


def scores(adapter: Path, batch: Batch, base: Path | None = None) -> np.ndarray:
    """nll_BT as `Learner.score` gives it: 0 where the weight is 0."""
    flat = np.zeros(batch.tokens_BT.size, np.float32)
    with torch.no_grad():
        for at, nll in logprobs(peft_model(adapter, base), batch):
            flat[at] = nll.numpy()
    return np.where(batch.weights_BT != 0, flat.reshape(batch.tokens_BT.shape), 0)


def assert_same(
    mine: tuple[float, Gradients], theirs: tuple[float, Gradients], loss: float = 1e-5, rest: float = 2e-4
) -> None:
    """Losses within `loss`; each tensor's largest difference within `rest` of its largest element."""
    assert abs(mine[0] - theirs[0]) <= loss * max(1, abs(theirs[0])), (mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    far = {}
    for name, g in theirs[1].items():
        apart = float(np.abs(mine[1][name] - g).max() / np.abs(g).max())
        if apart > rest:
            far[name] = apart
    assert not far, f"{len(far)} of {len(theirs[1])} gradients differ; the first: {list(far.items())[:6]}"
