"""Levers are what typing them would plan, the largest that fit, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from burnish.errors import UserError
from burnish.machine.known import known_machine
from burnish.machine.probe import Machine, probe
from burnish.models.geometry import spec_of_geometry
from burnish.models.quantized import Quantization
from burnish.models.spec import ModelSpec, TensorInfo, linears_of
from burnish.planning.changes import LEAST_LENGTH, shortened
from burnish.planning.choice import DataStats
from burnish.planning.layout import BUCKET
from burnish.planning.levers import NOTABLE, Lever, levers, room
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import dump, load, parse
from tests import tiny
from tests.machine import recorded

GIB = 1 << 30
# Hidden size, layers, heads, key-value heads, intermediate size, vocabulary.
SIZES = {
    "qwen2-1.5b": (1536, 28, 12, 2, 8960, 151936),
    "qwen2-7b": (3584, 28, 28, 4, 18944, 152064),
    "qwen2-14b": (5120, 48, 40, 8, 13824, 152064),
    "qwen2-32b": (5120, 64, 40, 8, 27648, 152064),
}
ORDER = (
    "train.keep_layers", "train.micro_batch", "train.pack", "dtype", "backend", "train.max_length",
    "quantize", "lora.targets", "lora.last_layers", "lora.rank",
)  # fmt: skip


def spec_of_size(hidden: int, layers: int, heads: int, kv: int, inner: int, words: int) -> ModelSpec:
    narrow = kv * hidden // heads
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), (words, hidden)
    )
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
    tensors = {k: TensorInfo("BF16", shape, "x") for k, shape in shapes.items()}
    return ModelSpec(
        Path("m"), "qwen2", "Qwen2ForCausalLM", layers, hidden, inner, heads, kv, hidden // heads, words,
        131072, False, (), tensors, linears_of(tensors),
    )  # fmt: skip


SPECS = {name: spec_of_size(*sizes) for name, sizes in SIZES.items()}
SPEC_14B = SPECS["qwen2-14b"]
MACHINES = {
    "m1-16": probe(Path("/"), recorded.with_mlx(recorded.M1_16)),
    "m2-pro-32": probe(Path("/"), recorded.with_mlx(recorded.M2_PRO_32)),
    "m2-pro-32-torch": probe(Path("/"), recorded.M2_PRO_32),
    "m4-max-128": probe(Path("/"), recorded.with_mlx(recorded.M4_MAX_128)),
    "rtx-4090": probe(Path("/"), recorded.RTX_4090),
    "h100": probe(Path("/"), recorded.H100),
    "cpu": replace(tiny.MACHINE, ram_bytes=64 * GIB, free_ram_bytes=48 * GIB),
}


@contextmanager
def the_family() -> Iterator[None]:
    """The known models are those of SIZES."""
    ordered = sorted(SPECS, key=lambda n: -SPECS[n].parameters)

    def smaller(s: ModelSpec) -> tuple[str, ...]:
        return tuple(n for n in ordered if SPECS[n].parameters < s.parameters)

    with patch.multiple("burnish.planning.changes", smaller=smaller, spec_of_geometry=SPECS.__getitem__):
        yield


@pytest.fixture(autouse=True)
def _a_family() -> Iterator[None]:
    with the_family():
        yield


def planned(
    where: str | Machine, *overrides: str, spec: ModelSpec = SPEC_14B, stats: DataStats | None = None
) -> Plan:
    machine = MACHINES[where] if isinstance(where, str) else where
    recipe = parse("", "test", overrides)
    return make_plan(recipe, spec, machine, stats and shortened(stats, recipe))


def typed(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan of someone who types the overrides behind the same recipe."""
    recipe = parse(dump(plan.recipe), "test", overrides)
    spec = SPECS[recipe.model] if any(o.startswith("model=") for o in overrides) else plan.spec
    return make_plan(recipe, spec, plan.machine, plan.stats and shortened(plan.stats, recipe))


def data(n: int, shortest: int, longest: int) -> DataStats:
    lengths = tuple(shortest + i * (longest - shortest) // max(n - 1, 1) for i in range(n))
    return DataStats(n, max(lengths), sum(lengths), sum(lengths) // 2, lengths)


def key(lever: Lever) -> str:
    return lever.overrides[0].split("=")[0]


def is_single(lever: Lever) -> bool:
    """One change; what becomes of the data that is too long comes with shorter rows."""
    return len([o for o in lever.overrides if not o.startswith("data.too_long=")]) == 1


def single(found: Sequence[Lever], name: str) -> Lever | None:
    return next((v for v in found if is_single(v) and key(v) == name), None)


def with_memory(machine: Machine, n_bytes: int) -> Machine:
    gpus = tuple(replace(g, total_bytes=n_bytes, free_bytes=n_bytes) for g in machine.gpus)
    return replace(machine, ram_bytes=n_bytes, free_ram_bytes=n_bytes, gpus=gpus)


def with_budget(where: str, n_bytes: int) -> Machine:
    """The machine with so much free memory that plans may use `n_bytes`."""
    machine = with_memory(MACHINES[where], 1 << 40)
    share = planned(machine).budget.value / (1 << 40)
    if machine.gpus and machine.gpus[0].kind == "cuda":
        return with_memory(machine, int(n_bytes / share) + 1)
    margin = share / (0.75 if machine.gpus else 1)
    return replace(machine, free_ram_bytes=int(n_bytes / margin) + 1)


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "train.max_length": st.sampled_from((512, 1000, 2048, 8192)),
        "train.keep_layers": st.sampled_from((0, 7, 28)),
        "train.micro_batch": st.sampled_from((1, 4, 8)),
        "train.pack": st.sampled_from(("true", "false")),
        "dtype": st.sampled_from(("float32", "bfloat16")),
        "backend": st.sampled_from(("torch", "mlx", "reference")),
        "quantize": st.sampled_from(("4bit", "8bit")),
        "data.too_long": st.sampled_from(("drop", "truncate")),
        "data.loss_on": st.just("all"),
        "lora.targets": st.sampled_from(("attention", "[q_proj, v_proj]")),
        "lora.rank": st.sampled_from((1, 8, 64)),
        "lora.last_layers": st.sampled_from((1, 12)),
        "lora.dropout": st.just("0.1"),
    },
).map(lambda found: tuple(f"{k}={v}" for k, v in found.items()))
DATA = st.none() | st.builds(data, st.integers(1, 60), st.integers(2, 400), st.integers(401, 8192))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    machine = with_memory(MACHINES[draw(st.sampled_from(sorted(MACHINES)))], draw(st.integers(4, 160)) * GIB)
    spec, stats = SPECS[draw(st.sampled_from(sorted(SPECS)))], draw(DATA)
    try:
        return planned(machine, *draw(OVERRIDES), spec=spec, stats=stats)
    except UserError:
        assume(False)
        raise


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans())
def test_each_lever_is_what_typing_it_plans_and_helps(plan: Plan) -> None:
    found = levers(plan)
    assert not (plan.fits and found)
    for lever in found:
        then = typed(plan, lever.overrides)
        assert (then.total_bytes, then.fits) == (lever.total_bytes, lever.fits)
        saved, too_much = plan.total_bytes - lever.total_bytes, plan.total_bytes - plan.budget.value
        assert saved > 0 and (lever.fits or saved >= NOTABLE * too_much)
        assert lever.cost and not lever.cost.endswith(".")
    assert len({v.overrides for v in found}) == len(found)
    order = [ORDER.index(key(v)) for v in found if is_single(v) and key(v) != "model"]
    assert order == sorted(order)
    # Several at once only where no single change does it, and only if that is enough.
    several = [v for v in found if not is_single(v)]
    assert len(several) <= 1 and all(v.fits for v in several)
    keeps_model = [v for v in found if is_single(v) and key(v) != "model"]
    assert not (several and any(v.fits for v in keeps_model))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans())
def test_what_fits_alone_is_offered_and_one_more_does_not_fit(plan: Plan) -> None:
    assume(not plan.fits)
    found = levers(plan)
    for words in ("quantize=4bit", "lora.targets=attention", "train.micro_batch=auto"):
        try:
            then = typed(plan, [words])
        except UserError:
            continue
        if then.fits:
            assert (words,) in [v.overrides for v in found]
    for lever in found:
        if not is_single(lever) or key(lever) not in ("train.max_length", "lora.last_layers", "lora.rank"):
            continue
        first, *others = lever.overrides
        n, most = int(first.split("=")[1]), {"lora.last_layers": len(plan.layers.value)}
        above = {"train.max_length": n + BUCKET, "lora.last_layers": n + 1, "lora.rank": 2 * n}[key(lever)]
        assert lever.fits
        if above < most.get(key(lever), plan.length.value if "length" in first else plan.recipe.lora.rank):
            assert not typed(plan, [f"{key(lever)}={above}", *others]).fits


def test_what_the_recipe_fixed_comes_first_and_changes_no_result() -> None:
    found = levers(planned("h100", "train.keep_layers=48", "train.micro_batch=8"))
    assert [v.overrides for v in found[:2]] == [("train.keep_layers=auto",), ("train.micro_batch=auto",)]
    assert not found[0].changes_result and not found[1].changes_result
    assert all(v.changes_result for v in found[2:])
    assert found[0].fits


def test_another_mask_is_another_result() -> None:
    found = levers(planned("h100", "train.keep_layers=48", "train.micro_batch=8", "lora.dropout=0.1"))
    by_key = {key(v): v for v in found if is_single(v)}
    assert not by_key["train.keep_layers"].changes_result or by_key["train.keep_layers"].fits
    assert by_key["train.micro_batch"].changes_result


@pytest.mark.parametrize(
    ("longest", "policy", "says"), [(2048, "truncate", "lose their end"), (640, "drop", "left out")]
)
def test_shorter_rows_say_how_many_examples_they_cost(longest: int, policy: str, says: str) -> None:
    # All but one example have 100…600 tokens, or the lengths go evenly up to the longest.
    stats = data(200, 100, longest) if policy == "truncate" else data(200, 100, 600)
    if policy == "drop":
        lengths = (*stats.lengths[:-1], 4000)
        stats = DataStats(200, 4000, sum(lengths), sum(lengths) // 2, lengths)
    plan = planned(
        "h100", "train.max_length=4096", "train.keep_layers=48", "train.micro_batch=8", stats=stats
    )
    lever = single(levers(plan), "train.max_length")
    assert lever is not None and lever.fits and lever.changes_result
    length = int(lever.overrides[0].split("=")[1])
    longer = sum(n > length for n in stats.lengths)
    assert longer > 0 and lever.overrides[1:] == (f"data.too_long={policy}",)
    assert lever.cost.startswith(f"{longer} of 200 examples") and says in lever.cost


def test_the_recipes_own_policy_stays() -> None:
    plan = planned(
        "h100",
        "train.keep_layers=48",
        "train.micro_batch=8",
        "data.too_long=drop",
        stats=data(200, 100, 2048),
    )
    lever = single(levers(plan), "train.max_length")
    assert lever is not None and len(lever.overrides) == 1 and "left out" in lever.cost


def test_four_bits_and_shorter_rows_where_neither_is_enough() -> None:
    plan = planned("m2-pro-32", "train.max_length=16384")
    found = levers(plan)
    assert not any(v.fits for v in found if is_single(v) and key(v) != "model")
    both = next(v for v in found if not is_single(v))
    assert both.fits and {o.split("=")[0] for o in both.overrides} == {"quantize", "train.max_length"}
    length = next(int(o.split("=")[1]) for o in both.overrides if o.startswith("train.max_length"))
    more = [
        o if not o.startswith("train.max") else f"train.max_length={length + BUCKET}" for o in both.overrides
    ]
    assert length >= LEAST_LENGTH and not typed(plan, more).fits


def test_a_little_too_much_is_mended_by_any_change_in_the_order_of_its_cost() -> None:
    needs = planned(with_memory(MACHINES["rtx-4090"], 4 * GIB), "lora.rank=64").total_bytes
    found = levers(planned(with_budget("rtx-4090", needs - GIB // 2), "lora.rank=64"))
    keys = ["train.max_length", "quantize", "lora.targets", "lora.last_layers", "lora.rank", "model"]
    assert [key(v) for v in found] == keys and all(v.fits and v.changes_result for v in found)
    assert found[4].overrides == ("lora.rank=32",)


def test_rows_keep_half_of_their_length_before_bits_are_kept() -> None:
    asked = ("train.max_length=8192", "data.too_long=drop")
    small = with_memory(MACHINES["m2-pro-32"], 4 * GIB)
    quarter = planned(small, *asked, "train.max_length=2048", "quantize=8bit").total_bytes
    plan = planned(with_budget("m2-pro-32", quarter + GIB // 8), *asked)
    several = next(v for v in levers(plan) if not is_single(v) and "model=" not in " ".join(v.overrides))
    assert several.overrides[0] == "quantize=4bit"
    assert int(several.overrides[1].split("=")[1]) >= 4096


def test_a_smaller_model_in_fewer_bits_comes_before_what_leaves_little_of_the_training() -> None:
    """14B on 16 GB: 128 tokens and half of the layers would fit, and so do 7B in 4 bits."""
    recipe = load("medical-r1-14b")
    found = levers(make_plan(recipe, spec_of_geometry("r1-distill-qwen-14b"), known_machine("m1-16gb")))
    fitting = [" ".join(v.overrides) for v in found if v.fits]
    assert fitting[0] == "quantize=4bit model=qwen2-7b"
    assert any("train.max_length=" in words for words in fitting[1:])
    assert all(v.least_bytes <= v.total_bytes for v in found)


def test_what_was_fixed_and_four_bits_together_and_nothing_that_is_not_needed() -> None:
    found = levers(planned("m2-pro-32", "train.keep_layers=48", "train.pack=true"))
    several = next(v for v in found if not is_single(v))
    assert several.overrides == ("train.keep_layers=auto", "quantize=4bit")
    # Four rows a pass are too many alone, and are not once the rest is done.
    found = levers(planned("rtx-4090", "train.keep_layers=48", "train.micro_batch=4"))
    assert single(found, "train.micro_batch") is not None
    assert next(v for v in found if not is_single(v)).overrides == ("train.keep_layers=auto", "quantize=4bit")


def test_a_smaller_model_comes_last_and_is_the_largest_that_fits() -> None:
    found = levers(planned("m2-pro-32"))
    assert found[-1].overrides == ("model=qwen2-7b",) and found[-1].fits and found[-1].changes_result
    tight = with_memory(MACHINES["m2-pro-32"], 12 * GIB)
    assert "model=qwen2-1.5b" in levers(planned(tight))[-1].overrides


def test_a_smaller_model_in_four_bits_where_nothing_else_is_enough() -> None:
    plan = planned(with_memory(MACHINES["m2-pro-32"], 4 * GIB))
    found = levers(plan)
    assert not any(v.fits for v in found[:-1])
    assert found[-1].fits and "model=qwen2-1.5b" in found[-1].overrides and len(found[-1].overrides) > 1


def test_eight_bits_only_where_the_backend_has_them() -> None:
    def bits(where: str) -> list[str]:
        return [v.overrides[0] for v in levers(planned(where)) if is_single(v) and key(v) == "quantize"]

    assert bits("m2-pro-32") == ["quantize=8bit", "quantize=4bit"]
    assert bits("rtx-4090") == ["quantize=4bit"]
    assert bits("m2-pro-32-torch") == ["quantize=4bit"]


def test_a_packed_folder_is_not_packed_again() -> None:
    packed = replace(SPEC_14B, quantization=Quantization(4, 64))
    found = levers(planned(with_memory(MACHINES["m2-pro-32"], 16 * GIB), spec=packed))
    assert found and not any(o.startswith("quantize") for v in found for o in v.overrides)


def test_the_reference_backend_gets_no_quantised_base() -> None:
    found = levers(planned("cpu", "backend=reference", spec=SPECS["qwen2-32b"]))
    assert found and not any(o.startswith("quantize") for v in found for o in v.overrides)


def test_what_must_be_installed_is_said() -> None:
    four = single(levers(planned("rtx-4090")), "quantize")
    assert four is not None and "burnish[bnb]" in four.cost
    there = replace(MACHINES["rtx-4090"], versions={**MACHINES["rtx-4090"].versions, "bitsandbytes": "0.50"})
    four = single(levers(planned(there)), "quantize")
    assert four is not None and "install" not in four.cost


def test_a_recipe_file_with_the_overrides_plans_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: m\ntrain: {max_length: 4096, keep_layers: 48}\nlora: {rank: 32}\n", encoding="utf-8"
    )
    plan = make_plan(load(str(path)), SPEC_14B, MACHINES["rtx-4090"])
    found = levers(plan)
    assert found
    for lever in found:
        recipe = load(str(path), lever.overrides)
        spec = SPECS.get(recipe.model, SPEC_14B)
        assert make_plan(recipe, spec, plan.machine).total_bytes == lever.total_bytes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(plans())
def test_room_names_at_most_three_and_what_typing_them_plans(plan: Plan) -> None:
    found = room(plan)
    assert len(found) <= 3 and (plan.fits or not found)
    for lever in found:
        if lever.overrides != ("backend=mlx",) or all(
            plan.machine.versions.get(p) for p in ("mlx", "mlx-lm")
        ):
            then = typed(plan, lever.overrides)
            assert (then.total_bytes, then.fits) == (lever.total_bytes, lever.fits)
        assert lever.cost


def test_room_for_all_layers_and_longer_rows() -> None:
    rows = planned("h100").micro_batch.value
    plan = planned("h100", f"train.micro_batch={rows}")
    kept, bits = (lever for lever in room(plan) if lever.overrides != ("train.micro_batch=auto",))
    assert kept.overrides == ("train.keep_layers=48",) and not kept.fits and not kept.changes_result
    assert bits.overrides == ("quantize=4bit",) and bits.fits and "rows of up to" in bits.cost


def test_room_names_what_the_recipe_holds_back() -> None:
    found = room(planned("h100", "train.keep_layers=0", "train.micro_batch=1", spec=SPECS["qwen2-7b"]))
    assert [v.overrides for v in found[:2]] == [("train.keep_layers=auto",), ("train.micro_batch=auto",)]
    assert all(v.fits and not v.changes_result for v in found[:2])


def test_room_on_a_mac_without_mlx() -> None:
    first = room(planned("m2-pro-32-torch", "quantize=4bit"))[0]
    assert first.overrides == ("backend=mlx",) and "pip install 'burnish[mlx]'" in first.cost
    with_it = planned("m2-pro-32", "quantize=4bit", "backend=mlx")
    assert first.total_bytes == with_it.total_bytes
    assert "backend=mlx" not in [o for v in room(planned("m2-pro-32", "quantize=4bit")) for o in v.overrides]
