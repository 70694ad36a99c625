"""What was decided, and why: one frozen `Plan` from a recipe, a model spec and a machine.

    plan = make_plan(recipe, spec, machine)           # before the data is read
    plan = plan.tightened(DataStats(longest=214, …))  # once the true lengths are known

A number in the recipe is used as given; if it cannot be, the plan says so and does not fit. Nothing below the
plan decides such a thing again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from burnish.errors import UserError
from burnish.machine.probe import Machine
from burnish.models.spec import ModelSpec
from burnish.planning.choice import Choice, DataStats
from burnish.planning.engine import (
    MLX_UNPACKED,
    check_cache_bits,
    choose_backend,
    choose_budget,
    choose_device,
    choose_dtypes,
    choose_quantize,
)
from burnish.planning.layout import largest, lay_out
from burnish.planning.memory import (
    ANSWERS_AT_ONCE,
    ELEMENT_BYTES,
    Part,
    Shape,
    estimate,
    total,
    trained_layers,
)
from burnish.planning.memory_mlx import LEAST_SLICE, estimate_mlx
from burnish.recipe import Recipe

# Logits of one slice, float32: small enough to be nothing beside a layer, large enough that the head's matrix
# product runs at full speed (64 rows and more on every device tried).
LOSS_SLICE_BYTES = 96 << 20
# With mlx a slice's logits are as wide as what is computed in, and its matrix is unpacked for each slice.
MLX_SLICE_BYTES, MLX_SLICE_MOST = 80 << 20, 2048

Parts = Callable[[Shape], tuple[Part, ...]]


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    spec: ModelSpec
    machine: Machine
    stats: DataStats | None
    backend: Choice[str]
    device: Choice[str]
    weights: Choice[str]  # dtype the frozen base is held in
    compute: Choice[str]  # dtype of activations
    quantize: Choice[str]
    targets: Choice[tuple[str, ...]]  # projections that get an adapter
    layers: Choice[tuple[int, ...]]  # decoder layers that get one
    pack: Choice[bool]  # several examples a row (layout.py)
    row_length: Choice[int]  # positions of a packed row, whether or not rows are packed
    lengths: Choice[tuple[int, ...]]  # rows that are not packed are padded to one of these; (): to none
    micro_batch: Choice[int]  # rows of a forward pass
    length: Choice[int]  # tokens of the longest example
    keep_layers: Choice[int]
    ahead: Choice[int]  # layers that wait for the device while one runs (mlx)
    loss_slice: Choice[int]
    answers_at_once: Choice[int]  # prompts answered side by side, where the recipe has a task or a question
    steps: Choice[int] | None  # optimizer steps; known once the data is
    shape: Shape  # the decided values that memory depends on
    estimate: tuple[Part, ...]
    budget: Choice[int]  # bytes

    @property
    def total_bytes(self) -> int:
        return total(self.estimate)

    @property
    def training(self) -> tuple[Part, ...]:
        """The estimate of steps alone: `estimate` is of answering, where that takes more."""
        steps = replace(self.shape, prompt_tokens=0, answer_tokens=0)
        return parts_of(self.backend.value, self.spec)(steps)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget.value

    @property
    def least_bytes(self) -> int:
        """With nothing spent on speed: one row a pass, nothing kept, nothing ahead, where the recipe leaves
        that open.
        """
        train, s = self.recipe.train, replace(self.shape, ahead=0)
        if train.keep_layers == "auto":
            s = replace(s, keep_layers=0)
        if train.micro_batch == "auto":
            s = replace(s, micro_batch=1, passes=s.passes * s.micro_batch)
        s = replace(s, **_asked(self.recipe, self.length.value, self.stats, 1))
        return min(self.total_bytes, total(parts_of(self.backend.value, self.spec)(s)))

    def tightened(self, stats: DataStats) -> Plan:
        """The same decisions taken again with the data's true lengths."""
        return make_plan(self.recipe, self.spec, self.machine, stats)

    def choices(self) -> dict[str, Choice[Any]]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: c for name, c in found.items() if isinstance(c, Choice)}

    def summary(self) -> dict[str, Any]:
        """What `plan.json` and `--json` hold."""
        return {
            "choices": {k: {"value": c.value, "reason": c.reason} for k, c in self.choices().items()},
            "estimate": [{"part": p.name, "bytes": p.n_bytes, "why": p.why} for p in self.estimate],
            "total_bytes": self.total_bytes,
            "least_bytes": self.least_bytes,
            "budget_bytes": self.budget.value,
            "fits": self.fits,
        }


def make_plan(recipe: Recipe, spec: ModelSpec, machine: Machine, stats: DataStats | None = None) -> Plan:
    """Decide everything a run needs. Raises UserError where the recipe asks for what this machine or model
    has not.
    """
    backend = choose_backend(recipe, spec, machine)
    check_cache_bits(recipe, backend.value)
    device = choose_device(recipe, backend.value, machine)
    weights, compute = choose_dtypes(recipe, backend.value, device.value, machine)
    quantize = choose_quantize(recipe, spec, backend.value)
    targets, layers = _targets(recipe, spec), _layers(recipe, spec)
    length = _length(recipe, spec, stats)
    loss_slice = _loss_slice(spec, backend.value, compute.value)
    budget = choose_budget(device.value, machine)
    parts = parts_of(backend.value, spec)
    share = 1.0 if recipe.data.loss_on == "all" or stats is None else stats.trained / max(stats.tokens, 1)
    asked = recipe.train.keep_layers
    shape = Shape(
        device.value, weights.value, compute.value, quantize.value, recipe.lora.rank, targets.value,
        layers.value, 1, length.value, 0 if asked == "auto" else asked, loss_slice.value, share,
        cache_bits=recipe.generation.cache_bits or 0,
    )  # fmt: skip

    def fits(rows: int, row: int) -> bool:
        passes = -(-recipe.train.batch_size // rows)  # at most: packed, a step may have fewer rows
        return total(parts(replace(shape, micro_batch=rows, length=row, passes=passes))) <= budget.value

    def has_room(**changed: Any) -> bool:
        return total(parts(replace(shape, **changed))) <= budget.value

    leaks = backend.value == "mlx" and spec.model_type in MLX_UNPACKED
    alone = f"mlx-lm's {spec.model_type} does not keep the examples of a row apart" if leaks else ""
    layout = lay_out(recipe.train, device.value, backend.value, length.value, stats, fits, alone)
    rows = layout.micro_batch.value
    shape = replace(shape, micro_batch=rows, length=layout.planned, passes=-(-layout.step_rows // rows))
    keep = _keep_layers(recipe, spec, trained_layers(spec, shape), lambda k: has_room(keep_layers=k))
    shape = replace(shape, keep_layers=keep.value)
    ahead = _ahead(backend.value, device.value, lambda n: has_room(ahead=n))
    shape = replace(shape, ahead=ahead.value)
    answers = _answers(recipe, length.value, stats, lambda asked: has_room(**asked))
    shape = replace(shape, **_asked(recipe, length.value, stats, answers.value))
    return Plan(
        recipe, spec, machine, stats, backend, device, weights, compute, quantize, targets, layers,
        layout.pack, layout.row_length, layout.lengths, layout.micro_batch,
        length, keep, ahead, loss_slice, answers, _steps(recipe, stats), shape, parts(shape), budget
    )  # fmt: skip


def parts_of(backend: str, spec: ModelSpec) -> Parts:
    """The estimate of a backend, as a function of a shape."""
    if backend == "reference":  # NumPy in float64, whatever it is asked for
        return lambda s: estimate(spec, replace(s, weights="float64", compute="float64"))
    return partial(estimate_mlx if backend == "mlx" else estimate, spec)


def _targets(recipe: Recipe, spec: ModelSpec) -> Choice[tuple[str, ...]]:
    asked = recipe.lora.targets
    groups = {
        "attention": spec.attention_linears,
        "attention+mlp": spec.attention_linears + spec.mlp_linears,
        "all-linear": spec.attention_linears + spec.mlp_linears,
    }
    if isinstance(asked, str):
        if not groups[asked]:
            raise UserError(
                f"lora.targets: {asked}: no such projections in {spec.folder}", "name them: [q_proj, v_proj]"
            )
        return Choice(groups[asked], f"{asked}: every such projection of a decoder layer")
    known = groups["all-linear"]
    wrong = [t for t in asked if t not in known]
    if wrong:
        raise UserError(
            f"lora.targets: {', '.join(wrong)} not in this model; its decoder layers have {', '.join(known)}"
            + (
                " (the head and the embeddings are not trained)"
                if {"lm_head", "embed_tokens"} & set(wrong)
                else ""
            ),
            "choose from those, or a group: attention, attention+mlp, all-linear",
        )
    return Choice(tuple(asked), "as the recipe says")


def _layers(recipe: Recipe, spec: ModelSpec) -> Choice[tuple[int, ...]]:
    last = recipe.lora.last_layers
    if last is None:
        return Choice(tuple(range(spec.n_layers)), "every decoder layer")
    if last > spec.n_layers:
        raise UserError(
            f"lora.last_layers: {last}, but this model has {spec.n_layers} decoder layers",
            f"set lora.last_layers to at most {spec.n_layers}, or leave it out",
        )
    return Choice(
        tuple(range(spec.n_layers - last, spec.n_layers)), f"the last {last} layers, as the recipe says"
    )


def _length(recipe: Recipe, spec: ModelSpec, stats: DataStats | None) -> Choice[int]:
    asked = recipe.train.max_length
    if spec.max_positions and asked > spec.max_positions:
        raise UserError(
            f"train.max_length: {asked} is more than this model's {spec.max_positions} positions",
            f"set train.max_length={spec.max_positions} or less",
        )
    if stats is not None and stats.longest < asked:
        return Choice(stats.longest, "the longest example of the data")
    return Choice(asked, "train.max_length; the data may turn out shorter")


def _loss_slice(spec: ModelSpec, backend: str, compute: str) -> Choice[int]:
    if backend == "mlx":
        rows = MLX_SLICE_BYTES // (ELEMENT_BYTES[compute] * spec.vocab_size)
        rows = min(MLX_SLICE_MOST, max(LEAST_SLICE, rows // LEAST_SLICE * LEAST_SLICE))
        return Choice(rows, f"{rows} tokens × {spec.vocab_size} words of {compute} logits at a time")
    rows = LOSS_SLICE_BYTES // (4 * spec.vocab_size)
    rows = max(LEAST_SLICE, rows // LEAST_SLICE * LEAST_SLICE)
    return Choice(rows, f"{rows} tokens × {spec.vocab_size} words of float32 logits at a time")


def _keep_layers(
    recipe: Recipe, spec: ModelSpec, trained: int, fits: Callable[[int], bool]
) -> Choice[int]:
    """trained: layers from the first adapted one on; those below it keep nothing anyway."""
    asked = recipe.train.keep_layers
    if asked != "auto":
        if asked > spec.n_layers:
            raise UserError(
                f"train.keep_layers: {asked}, but this model has {spec.n_layers} layers",
                f"set train.keep_layers to at most {spec.n_layers}, or to auto",
            )
        return Choice(asked, "as the recipe says")
    if fits(spec.n_layers):  # asked first: on a CPU all may take less than all but one
        return Choice(spec.n_layers, "memory allows every layer's activations, so none is recomputed")
    n = largest(trained - 1, fits, 0)
    return Choice(n, f"memory allows the activations of {n} layers; {trained - n} are recomputed")


def _ahead(backend: str, device: str, fits: Callable[[int], bool]) -> Choice[int]:
    if backend != "mlx":
        return Choice(0, "torch hands operations over one by one, and memory with them")
    if device == "cpu":  # who encodes and who computes are the same cores
        return Choice(0, "a CPU gains nothing by it")
    if fits(1):
        return Choice(1, "memory allows one layer to wait for the device while another runs")
    return Choice(0, "memory is too short for a second layer's buffers")


def _answers(
    recipe: Recipe, length: int, stats: DataStats | None, fits: Callable[[dict[str, int]], bool]
) -> Choice[int]:
    if recipe.evaluate.task == "none":
        return Choice(1, "questions are answered one by one")
    n = largest(ANSWERS_AT_ONCE, lambda n: fits(_asked(recipe, length, stats, n)), 1)
    if n == ANSWERS_AT_ONCE:
        return Choice(n, "enough prompts to keep the device busy")
    return Choice(n, "as many key-value caches as memory allows")


def _asked(recipe: Recipe, length: int, stats: DataStats | None, rows: int) -> dict[str, int]:
    """Tokens of the prompts answered side by side, and of their answers, at the most."""
    task = recipe.evaluate.task != "none"
    if not task and not recipe.ask:
        return {}
    longest = sorted(stats.sizes)[-rows:] if stats is not None else [length] * rows
    new = recipe.evaluate.max_new_tokens if task else 0
    if recipe.ask:
        new = max(new, recipe.generation.max_new_tokens)
    return {"prompt_tokens": sum(longest), "answer_tokens": rows * new}


def _steps(recipe: Recipe, stats: DataStats | None) -> Choice[int] | None:
    if recipe.train.max_steps is not None:
        return Choice(recipe.train.max_steps, "train.max_steps")
    if stats is None:
        return None
    per_epoch = -(-stats.examples // recipe.train.batch_size)
    n = per_epoch * recipe.train.epochs
    return Choice(n, f"{recipe.train.epochs} × {per_epoch} steps of {recipe.train.batch_size} examples")
