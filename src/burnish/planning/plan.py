"""What was decided, and why: one frozen `Plan` from a recipe, a model spec and a machine.

    plan = make_plan(recipe, spec, machine)           # before the data is read
    plan = plan.tightened(DataStats(longest=214, …))  # once the true lengths are known

A number in the recipe is used as given; if it cannot be, the plan says so and does not fit. Nothing below the
plan decides such a thing again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from burnish.errors import UserError
from burnish.machine.probe import Machine
from burnish.models.spec import ModelSpec
from burnish.planning.choice import Choice, DataStats
from burnish.planning.layout import largest, lay_out
from burnish.planning.memory import Part, Shape, estimate, total
from burnish.recipe import Recipe

# Logits of one slice, float32: small enough to be nothing beside a layer, large enough that the head's matrix
# product runs at full speed (64 rows and more on every device tried).
LOSS_SLICE_BYTES = 96 << 20
# Apple's recommended working set, as a share of RAM, where it cannot be asked: about 2/3 up to 36 GB, 3/4
# above.
METAL_SHARE_SMALL, METAL_SHARE_LARGE, METAL_LARGE_BYTES = 0.66, 0.75, 36 << 30
MARGIN = {"cpu": 0.10, "cuda": 0.04, "mps": 0.08}


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
    loss_slice: Choice[int]
    steps: Choice[int] | None  # optimizer steps; known once the data is
    estimate: tuple[Part, ...]
    budget: Choice[int]  # bytes

    @property
    def total_bytes(self) -> int:
        return total(self.estimate)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget.value

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
            "budget_bytes": self.budget.value,
            "fits": self.fits,
        }


def make_plan(recipe: Recipe, spec: ModelSpec, machine: Machine, stats: DataStats | None = None) -> Plan:
    """Decide everything a run needs. Raises UserError where the recipe asks for what this machine or model
    has not.
    """
    backend = _backend(recipe)
    device = _device(recipe, machine)
    weights, compute = _dtypes(recipe, device.value, machine)
    targets, layers = _targets(recipe, spec), _layers(recipe, spec)
    length = _length(recipe, spec, stats)
    loss_slice = _loss_slice(spec)
    budget = _budget(device.value, machine)
    share = 1.0 if recipe.data.loss_on == "all" or stats is None else stats.trained / max(stats.tokens, 1)
    shape = Shape(
        device.value, weights.value, compute.value, recipe.quantize, recipe.lora.rank, targets.value,
        layers.value, 1, length.value, 0, loss_slice.value, share
    )  # fmt: skip

    def fits(rows: int, row: int) -> bool:
        return total(estimate(spec, replace(shape, micro_batch=rows, length=row))) <= budget.value

    layout = lay_out(recipe.train, device.value, backend.value, length.value, stats, fits)
    shape = replace(shape, micro_batch=layout.micro_batch.value, length=layout.planned)
    keep = _keep_layers(recipe, spec, shape, budget.value)
    shape = replace(shape, keep_layers=keep.value)
    return Plan(
        recipe, spec, machine, stats, backend, device, weights, compute,
        Choice(recipe.quantize, "as the recipe says"), targets, layers,
        layout.pack, layout.row_length, layout.lengths, layout.micro_batch,
        length, keep, loss_slice, _steps(recipe, stats), estimate(spec, shape), budget
    )  # fmt: skip


def _backend(recipe: Recipe) -> Choice[str]:
    if recipe.backend == "mlx":
        raise UserError(
            "backend: mlx is not part of this version; torch and reference are",
            "leave `backend` out, or set backend=torch",
        )
    if recipe.backend == "auto":
        return Choice("torch", "the backend that trains on every device")
    if recipe.backend == "reference" and recipe.quantize != "none":
        raise UserError(
            "the reference backend computes in float32 only; it has no quantised base",
            "set quantize=none or backend=torch",
        )
    return Choice(recipe.backend, "as the recipe says")


def _device(recipe: Recipe, machine: Machine) -> Choice[str]:
    if recipe.backend == "reference":
        if recipe.device not in ("auto", "cpu"):
            raise UserError(
                f"the reference backend runs on the CPU, not on {recipe.device}", "set device=cpu"
            )
        return Choice("cpu", "the reference backend is NumPy")
    have = {
        "cuda": any(g.kind == "cuda" for g in machine.gpus),
        "mps": any(g.kind == "metal" for g in machine.gpus),
        "cpu": True,
    }
    if recipe.device != "auto":
        if not have[recipe.device]:
            there = ", ".join(d for d, yes in have.items() if yes)
            raise UserError(
                f"device: {recipe.device} is not on this machine; there is: {there}", "burnish doctor"
            )
        return Choice(recipe.device, "as the recipe says")
    for device, why in (("cuda", "an NVIDIA GPU is here"), ("mps", "an Apple GPU is here")):
        if have[device]:
            return Choice(device, why)
    return Choice("cpu", "no GPU was found")


def _dtypes(recipe: Recipe, device: str, machine: Machine) -> tuple[Choice[str], Choice[str]]:
    """The dtype the weights are held in, and the one that is computed in."""
    native = {"cuda": machine.gpu_bfloat16, "mps": machine.gpu_bfloat16, "cpu": machine.cpu_bfloat16}[device]
    where = "this CPU" if device == "cpu" else "this GPU"
    if recipe.backend == "reference":
        if recipe.dtype == "bfloat16":
            raise UserError(
                "the reference backend computes in float32; dtype bfloat16 is not for it", "set dtype=float32"
            )
        exact = Choice("float32", "the reference backend is exact")
        return exact, exact
    if recipe.dtype == "float32":
        asked = Choice("float32", "as the recipe says")
        return asked, asked
    if recipe.dtype == "auto" and device == "cpu" and not native:
        plain = Choice("float32", "this CPU has no bfloat16 arithmetic")
        return plain, plain
    held = Choice(
        "bfloat16", "as the recipe says" if recipe.dtype == "bfloat16" else "half of float32's memory"
    )
    if native:
        return held, Choice("bfloat16", f"{where} computes in bfloat16")
    return held, Choice("float32", f"{where} only emulates bfloat16: weights are widened as they are used")


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


def _loss_slice(spec: ModelSpec) -> Choice[int]:
    rows = LOSS_SLICE_BYTES // (4 * spec.vocab_size)
    rows = max(64, rows // 64 * 64)
    return Choice(rows, f"{rows} tokens × {spec.vocab_size} words of float32 logits at a time")


def _budget(device: str, machine: Machine) -> Choice[int]:
    keep = 1 - MARGIN[device]
    if device == "cuda":
        first = next(g for g in machine.gpus if g.kind == "cuda")  # the one that "cuda" means
        return Choice(int(first.free_bytes * keep), f"free GPU memory less a margin of {MARGIN[device]:.0%}")
    if device == "mps":
        share = METAL_SHARE_LARGE if machine.ram_bytes > METAL_LARGE_BYTES else METAL_SHARE_SMALL
        working_set = min(int(machine.ram_bytes * share), machine.free_ram_bytes)
        return Choice(
            int(working_set * keep),
            f"Metal's working set ({share:.0%} of RAM, or what is free) less {MARGIN[device]:.0%}",
        )
    return Choice(int(machine.free_ram_bytes * keep), f"free memory less a margin of {MARGIN[device]:.0%}")


def _keep_layers(recipe: Recipe, spec: ModelSpec, shape: Shape, budget: int) -> Choice[int]:
    asked = recipe.train.keep_layers
    if asked != "auto":
        if asked > spec.n_layers:
            raise UserError(
                f"train.keep_layers: {asked}, but this model has {spec.n_layers} layers",
                f"set train.keep_layers to at most {spec.n_layers}, or to auto",
            )
        return Choice(asked, "as the recipe says")
    n = largest(spec.n_layers, lambda k: total(estimate(spec, replace(shape, keep_layers=k))) <= budget, 0)
    if n == spec.n_layers:
        return Choice(n, "memory allows every layer's activations, so none is recomputed")
    return Choice(n, f"memory allows the activations of {n} layers; {spec.n_layers - n} are recomputed")


def _steps(recipe: Recipe, stats: DataStats | None) -> Choice[int] | None:
    if recipe.train.max_steps is not None:
        return Choice(recipe.train.max_steps, "train.max_steps")
    if stats is None:
        return None
    per_epoch = -(-stats.examples // recipe.train.batch_size)
    n = per_epoch * recipe.train.epochs
    return Choice(n, f"{recipe.train.epochs} × {per_epoch} steps of {recipe.train.batch_size} examples")
