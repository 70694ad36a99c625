"""The interface between burnish and a framework, cut at the verbs of training.

NumPy arrays, Python numbers, paths and the dataclasses below cross it; tensors never do. The learning rate is
an argument, the loss is Σ w·nll / Σ w over every micro-batch of a step, and a step that raises leaves no
trace. `tests/contract` holds the clauses; every backend runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from burnish.data.batches import Batch
from burnish.planning.plan import Plan


@dataclass(frozen=True)
class Scores:
    """Per target token, in the shape of the batch; 0 and False where the weight is 0."""

    nll_BT: np.ndarray  # float32, negative log-likelihood in nats
    hit_BT: np.ndarray  # bool, the target was the most likely token


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did. loss: Σ w·nll / Σ w before the update; grad_norm: before clipping."""

    loss: float
    grad_norm: float
    weight: float  # Σ w
    tokens: int  # tokens run through the model, padding not counted


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off.

    repetition_penalty divides positive (multiplies negative) logits of every token seen in the prompt or
    answer (Keskar et al. 2019, as transformers applies it). A row draws from its own stream, seeded by (seed,
    row).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    cache_bits: int = 0  # bits of the key-value cache's numbers; 0: as computed


@dataclass(frozen=True)
class Token:
    """One generated token of prompt `row`. finish: '' (more to come), 'stop' (`id` is a stop id), 'length'.
    """

    row: int
    id: int
    logprob: float  # of the model's own distribution, before temperature and filters
    finish: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes in use on the device (resident memory on the CPU), the peak since opening, and the limit."""

    now_bytes: int
    peak_bytes: int
    limit_bytes: int


@contextmanager
def translating(meaning: Callable[[BaseException], Exception | None]) -> Iterator[None]:
    """A framework's errors inside are raised as what `meaning` takes them for; unchanged where it is None."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:  # NotImplementedError is a RuntimeError
        ours = meaning(e)
        if ours is None:
            raise
        raise ours from e


class Model(Protocol):
    def score(self, batch: Batch) -> Scores: ...

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        """Tokens as they come, rows interleaved. Closing the iterator frees the cache.

        A batch of prompts gives what the prompts give one by one.
        """
        ...

    def memory(self) -> Memory: ...

    def moved(self, device: str, dtype: str) -> AbstractContextManager[None]:
        """The model on another device or in another dtype ('' keeps either) for as long as the context lasts.
        """
        ...

    def close(self) -> None: ...


class Learner(Model, Protocol):
    @property
    def plan(self) -> Plan:
        """As steps are cut now."""
        ...

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        """One optimizer step over all micro-batches; atomic: if it raises, nothing has changed."""
        ...

    def rehearse(self, micros: Sequence[Batch]) -> None:
        """What `step` does over these micro-batches, in as much memory, and nothing of it kept: the step
        after it is the one there would have been without. Raises what `step` raises.
        """
        ...

    def reshape(self, plan: Plan) -> None:
        """Cut steps as `plan` says from now on: layers kept, a layer ahead, the loss slice. Adapter,
        optimizer and random state stay, and what is free goes back to the system, for this follows running
        out of memory.

        plan: the one it was opened with but for these.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the adapter (PEFT layout), the optimizer and every random state into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote; the next step equals the one that would have followed the save, bit for
        bit.
        """
        ...

    def load_adapter(self, folder: Path) -> None:
        """Only the adapter's weights, from any PEFT folder for this model and these targets."""
        ...
