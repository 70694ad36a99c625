"""Every field of a recipe does something: setting it changes what is planned, prepared, trained or said.

Each case names what to look at; the look never contains the recipe itself, so that a field which is only
written down again does not pass. The reference backend trains, for it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from burnish.backends.reference import ReferenceLearner
from burnish.data.prepare import prepare
from burnish.errors import NonFinite, UserError
from burnish.inference.generate import sampling
from burnish.machine.health import Health
from burnish.machine.probe import Gpu
from burnish.models.spec import read_spec
from burnish.models.tokenizer import load_tokenizer
from burnish.planning.plan import DataStats, make_plan
from burnish.recipe import Recipe, expand, known_keys, load
from burnish.runs.events import Event
from burnish.training.environment import prepare_environment
from burnish.training.keeper import Keeper
from burnish.training.orders import Orders
from burnish.training.supervise import supervise
from tests.tiny import MACHINE, tiny_model
from tests.world import World

Look = Callable[[World, tuple[str, ...]], Any]
CUDA = replace(MACHINE, gpus=(Gpu("H100", "cuda", 80 << 30, 79 << 30),))


def recipe_of(world: World, overrides: tuple[str, ...]) -> Recipe:
    return load(str(world.root / "recipe.yaml"), overrides)


def planned(world: World, overrides: tuple[str, ...], machine: Any = MACHINE) -> Any:
    recipe = recipe_of(world, overrides)
    stats = DataStats(20, 30, 600, 200, (30,) * 20)
    plan = make_plan(recipe, read_spec(expand(recipe.model)), machine, stats)
    return {name: choice.value for name, choice in plan.choices().items()}, plan.total_bytes


def planned_with_a_gpu(world: World, overrides: tuple[str, ...]) -> Any:
    return planned(world, overrides, CUDA)


def prepared(world: World, overrides: tuple[str, ...]) -> Any:
    recipe = recipe_of(world, overrides)
    try:
        found = prepare(recipe, load_tokenizer(expand(recipe.model)))
    except UserError:
        return "refused"
    return [
        [(e.tokens.tolist(), e.weights.tolist()) for e in part.examples]
        for part in (found.train, found.valid)
    ]


def sampled(world: World, overrides: tuple[str, ...]) -> Any:
    """How a planned run chooses its tokens."""
    recipe = recipe_of(world, overrides)
    planned(world, overrides)
    return sampling(recipe.generation, load_tokenizer(expand(recipe.model)))


def trained(world: World, overrides: tuple[str, ...]) -> Any:
    """What a run does and leaves: its numbers, its answers, the names of its files."""
    said = world.train(*overrides)
    assert said.code == 0, said.err
    shown = ("event", "step", "loss", "lr", "accuracy", "from_step", "when", "answer", "correct", "total")
    events = [{k: v for k, v in e.items() if k in shown} for e in said.events]
    names = sorted(str(p.relative_to(world.out)) for p in world.out.rglob("*") if p.is_file())
    return events, names


def answered(world: World, overrides: tuple[str, ...]) -> Any:
    events, _ = trained(world, ("ask=[question 1]", *overrides))
    return [e["answer"] for e in events if e["event"] == "answered"]


def adapted(world: World, overrides: tuple[str, ...]) -> Any:
    """Names and shapes of the adapter; None where the recipe is refused."""
    said = world.train(*overrides)
    if said.code:
        assert said.code == 2 and "lora.bias: expected 'none'; got 'all'" in said.err, said.err
        return None
    weights = load_file(world.out / "adapter" / "adapter_model.safetensors")
    return {name: w.shape for name, w in weights.items()}


def printed(world: World, overrides: tuple[str, ...]) -> Any:
    said = world.burnish("train", "recipe.yaml", "--out", "out", *overrides)
    assert said.code == 0, said.err
    return [line.split()[1] for line in said.out.splitlines() if line.startswith("step") and "lr" in line]


def placed(world: World, overrides: tuple[str, ...]) -> Any:
    """Where a run goes that names no folder."""
    assert world.burnish("train", "recipe.yaml", *overrides).code == 0
    return [p.name for p in (world.root / "runs").iterdir()]


def tracked(world: World, overrides: tuple[str, ...]) -> Any:
    heard: list[str] = []
    double = SimpleNamespace(
        init=lambda **_: None, log=lambda *_, **__: heard.append("log"), finish=lambda: None
    )
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "trackio", double)
        trained(world, overrides)
    return heard


def trusted(world: World, overrides: tuple[str, ...]) -> Any:
    """What transformers is told when it loads tokenizer and model."""
    import transformers

    told: list[object] = []
    with pytest.MonkeyPatch.context() as m:
        for loader in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
            real = loader.from_pretrained

            def spy(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                told.append(kwargs["trust_remote_code"])
                return real(*args, **{**kwargs, "trust_remote_code": False})

            m.setattr(loader, "from_pretrained", spy)
        trained(world, ("backend=torch", *overrides))
    assert len(told) == 2
    return told


# --- care: of none of it a trained number may tell


def awake(world: World, overrides: tuple[str, ...]) -> Any:
    """How often a run keeps the machine awake."""
    kept: list[int] = []

    @contextmanager
    def double(pid: int) -> Iterator[str]:
        kept.append(pid)
        yield ""

    with pytest.MonkeyPatch.context() as m:
        m.setattr("burnish.training.job.keep_awake", double)
        trained(world, overrides)
    return len(kept)


HEALTHS = (
    Health(), Health(True, 80), Health(True, 15), Health(True, 5), Health(hot=True),
    Health(pressure="critical"),
)  # fmt: skip


def heeded(world: World, overrides: tuple[str, ...]) -> Any:
    """What a run's keeper says of machines that are not well."""
    made: list[Keeper] = []

    def keeper(*args: Any, **named: Any) -> Keeper:
        made.append(Keeper(*args, **named, read=Health))
        return made[-1]

    with pytest.MonkeyPatch.context() as m:
        m.setattr("burnish.training.job.Keeper", keeper)
        trained(world, overrides)
    said = []
    for made[0]._health in HEALTHS:
        verdict = made[0].verdict()
        said.append((verdict.action, verdict.why))
    return said


def overflowed(world: World, overrides: tuple[str, ...]) -> Any:
    """A run whose second step is NaN, and still is when it is computed again."""
    step, calls = ReferenceLearner.step, []

    def nan(self: ReferenceLearner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 3):
            raise NonFinite("loss nan")
        return step(self, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(ReferenceLearner, "step", nan)
        said = world.train(*overrides)
    return said.code, [e["step"] for e in said.events if e["event"] == "skipped"]


def supervised(world: World, overrides: tuple[str, ...], script: str) -> Any:
    """How often a process that does what `script` says is begun anew, and how it ends."""
    orders = Orders(recipe_of(world, overrides), world.out, resume=False, skip_before=True)
    command = [sys.executable, "-S", "-c", f"import os, time; {script}"]
    events: list[Event] = []
    try:
        for event in supervise(orders, lambda: False, command, back_off=(0,)):
            events.append(event)
    except UserError as e:
        return len(events), e.message
    return len(events), ""


def dying(world: World, overrides: tuple[str, ...]) -> Any:
    return supervised(world, overrides, "os.kill(os.getpid(), 9)")


def silent(world: World, overrides: tuple[str, ...]) -> Any:
    end = {"step": 1, "adapter": "", "from_step": 1, "seconds": 1.0, "estimated_bytes": 1, "peak_bytes": 1}
    line = json.dumps({"event": "finished", **end})
    return supervised(world, ("care.restarts=0", *overrides), f"time.sleep(2); print({line!r})")


def limited(world: World, overrides: tuple[str, ...]) -> Any:
    """What PyTorch finds in its environment."""
    found: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "environ", found)
        prepare_environment(recipe_of(world, overrides).care)
    return {k: v for k, v in found.items() if "MPS" in k}


@dataclass(frozen=True)
class Case:
    look: Look
    change: str
    base: tuple[str, ...] = ()


VALID = ("data.valid_share=0.25", "train.eval_every=1", "train.max_steps=4")
DRAWN = ("generation.greedy=false", "generation.temperature=1.5", "generation.max_new_tokens=8")
TEMPLATES = ("data.prompt=Q: {prompt}", "data.completion={completion}")
LONG = (*DRAWN, "generation.max_new_tokens=24")
LEARNT = (*VALID, "data.train=same.jsonl", "train.lr=0.05", "train.max_steps=20", "train.eval_every=20")
ONCE = ("train.max_steps=null",)

CASES = {
    "name": Case(placed, "other"),
    "model": Case(trained, "another"),
    "backend": Case(planned, "torch", ("device=cpu",)),
    "device": Case(planned_with_a_gpu, "cpu", ("backend=torch", "device=auto")),
    "dtype": Case(planned, "bfloat16", ("backend=torch",)),
    "quantize": Case(planned, "4bit", ("backend=torch",)),
    "trust_remote_code": Case(trusted, "true"),
    "ask": Case(trained, "[question 1]"),
    "trackers": Case(tracked, "[trackio]"),
    "care.keep_awake": Case(awake, "false"),
    "care.on_battery": Case(heeded, "slow"),
    "care.min_battery": Case(heeded, "10"),
    "care.when_hot": Case(heeded, "go-on"),
    "care.under_pressure": Case(heeded, "go-on"),
    "care.non_finite": Case(overflowed, "skip"),
    "care.restarts": Case(dying, "2"),
    "care.silence_s": Case(silent, "1"),
    "care.mps_limit": Case(limited, "none"),
    "data.train": Case(prepared, "text.jsonl"),
    "data.valid": Case(prepared, "other.jsonl"),
    "data.valid_share": Case(prepared, "0.25"),
    "data.rows": Case(prepared, "3"),
    "data.columns": Case(prepared, "{prompt: completion, completion: prompt}"),
    "data.prompt": Case(prepared, "Question: {prompt}", TEMPLATES),
    "data.completion": Case(prepared, "{completion}!", TEMPLATES),
    "data.system": Case(prepared, "Be brief.", ("train.max_length=128",)),
    "data.answer_after": Case(prepared, "A:", ("data.train=text.jsonl",)),
    "data.chat_template": Case(prepared, "never"),
    "data.loss_on": Case(prepared, "all"),
    "data.thinking": Case(prepared, "drop", ("data.train=thought.jsonl",)),
    "data.on_bad_row": Case(prepared, "skip", ("data.train=bad.jsonl",)),
    "data.too_long": Case(prepared, "truncate", ("train.max_length=24", "data.too_long=drop")),
    "lora.rank": Case(adapted, "3"),
    "lora.alpha": Case(trained, "32"),
    "lora.dropout": Case(trained, "0.5"),
    "lora.targets": Case(adapted, "[q_proj]"),
    "lora.last_layers": Case(adapted, "1"),
    "lora.rslora": Case(trained, "true"),
    "lora.bias": Case(adapted, "all"),  # 'none' is all there is; anything else is refused, not ignored
    "train.epochs": Case(planned, "2", ONCE),
    "train.max_steps": Case(planned, "3"),
    "train.batch_size": Case(trained, "3"),
    "train.micro_batch": Case(planned, "1"),
    "train.pack": Case(planned, "true"),
    "train.keep_layers": Case(planned, "2"),
    "train.lr": Case(trained, "0.02"),
    "train.schedule": Case(trained, "cosine"),
    "train.warmup_steps": Case(trained, "2"),
    "train.warmup_ratio": Case(trained, "0.5"),
    "train.weight_decay": Case(trained, "1"),
    "train.clip": Case(trained, "0.001"),
    "train.seed": Case(trained, "1"),
    "train.max_length": Case(prepared, "24", ("data.too_long=truncate",)),
    "train.save_every": Case(trained, "1"),
    "train.eval_every": Case(trained, "2", VALID),
    "train.log_every": Case(printed, "2"),
    "train.keep_last": Case(trained, "3", ("train.save_every=1",)),
    "train.best": Case(trained, "false", VALID),
    "train.early_stop": Case(trained, "1", (*VALID, "train.lr=1")),
    "generation.max_new_tokens": Case(answered, "2"),
    "generation.temperature": Case(answered, "0.1", DRAWN),
    "generation.top_p": Case(answered, "0.05", DRAWN),
    "generation.top_k": Case(answered, "1", DRAWN),
    "generation.repetition_penalty": Case(answered, "9"),
    "generation.greedy": Case(answered, "true", DRAWN),
    "generation.stop": Case(answered, "[a, e, i, o, n, r, s, t, u]", LONG),
    "generation.seed": Case(answered, "1", DRAWN),
    "generation.cache_bits": Case(sampled, "4", ("backend=mlx",)),
    "evaluate.task": Case(trained, "exact-match", (*VALID, "evaluate.max_new_tokens=4")),
    "evaluate.rows": Case(trained, "1", (*VALID, "evaluate.task=exact-match", "evaluate.max_new_tokens=4")),
    "evaluate.max_new_tokens": Case(
        trained, "1", (*LEARNT, "evaluate.task=exact-match", "evaluate.max_new_tokens=8")
    ),
}


LOOKS = list(dict.fromkeys(c.look for c in CASES.values()))


def leaves() -> set[str]:
    keys = known_keys()
    sections = {k.partition(".")[0] for k in keys if "." in k}
    return set(keys) - sections


def test_every_field_has_a_case():
    assert set(CASES) == leaves()


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("another") / "model", seed=1)


@pytest.fixture
def make(tmp_path: Path, tiny_folder: Path, another: Path) -> Callable[[str], World]:
    def world(name: str) -> World:
        root = tmp_path / name
        root.mkdir()
        world = World(root, tiny_folder)
        world.rows([{"text": f"Q: question {i} A: answer {i}"} for i in range(4)], "text.jsonl")
        world.rows([{"prompt": "question 40", "completion": "answer 4"}], "other.jsonl")
        world.rows([{"prompt": f"question {i}", "completion": "the answer"} for i in range(8)], "same.jsonl")
        thought = {"prompt": "question 1", "completion": "<think>so</think>\nanswer 1"}
        world.rows([thought], "thought.jsonl")
        good = {"prompt": "question 1", "completion": "answer 1"}
        world.rows([good, {"prompt": "question 2"}], "bad.jsonl")
        (root / "another").symlink_to(another)
        world.rows(
            [
                {"prompt": f"question {i}" + " why" * (i % 8), "completion": f"answer {i % 5}"}
                for i in range(12)
            ]
        )
        world.recipe(backend="reference", train={"max_steps": 4})
        return world

    return world


@pytest.fixture(scope="module")
def seen() -> dict[tuple[Look, tuple[str, ...]], Any]:
    """Looks that several cases begin from, so that each is had once."""
    return {}


@pytest.mark.parametrize("key", CASES)
def test_setting_a_field_changes_something(
    key: str, make: Callable[[str], World], monkeypatch: pytest.MonkeyPatch, seen: dict[Any, Any]
):
    def look(name: str, *overrides: str) -> Any:
        world = make(name)
        monkeypatch.chdir(world.root)
        return case.look(world, overrides)

    case = CASES[key]
    if (case.look, case.base) not in seen:
        seen[case.look, case.base] = look("as it was", *case.base)
    changed = look("changed", *case.base, f"{key}={case.change}")
    assert changed != seen[case.look, case.base], f"{key}={case.change} changes nothing"


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_a_look_sees_the_same_twice(
    look: Look, make: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
):
    """Else every field would seem to change it."""
    looks = []
    for name in ("once", "again"):
        world = make(name)
        monkeypatch.chdir(world.root)
        looks.append(look(world, ()))
    assert looks[0] == looks[1]
    assert str(make("third").root.parent) not in json.dumps(looks, default=str)
