"""What was asked: a frozen recipe, read from YAML, changed by `section.key=value`, kept in the run folder.

A recipe says what a person wants; what is *decided* from it is the plan's business, and the recipe is never
changed after it is read. Every field does something: `tests/test_recipe_fields.py` sets each and sees a run
or plan change.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from burnish.errors import UserError, all_problems

_KEYS = "burnish recipes --schema   prints every key"
_SAMPLE = "burnish recipes demo   prints one to copy"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Path_ = str  # kept as written; `expand` makes it absolute where it is used


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Which rows, and what of them is trained."""

    train: Path_ = Field(
        default="", description="file to train on, or hf:OWNER/NAME and ms:OWNER/NAME for a data set of a hub"
    )
    valid: Path_ = Field(default="", description="validation file; empty: `valid_share` of the training rows")
    valid_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the training rows held out to validate on, without a `valid` file"
    )
    rows: Positive | None = Field(default=None, description="use only the first N training rows")
    columns: dict[str, str] = Field(
        default={}, description="standard column: the file's own, as in {prompt: frage, completion: antwort}"
    )
    prompt: str | None = Field(default=None, description="prompt template over the columns: 'Q: {Question}'")
    completion: str | None = Field(default=None, description="completion template over them: '{Response}'")
    system: str | None = Field(default=None, description="system message for conversations that have none")
    answer_after: str | None = Field(
        default=None, description="for `text` rows: what follows the last of these is the completion"
    )
    chat_template: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: for `messages`, and `prompt`/`completion` if the tokenizer has one"
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="train every answer, only a conversation's last one, or every token"
    )
    thinking: Literal["keep", "drop", "require"] = Field(
        default="keep", description="reasoning: as given, cut out, or every answer must have it"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="rows that cannot be used end the run, or are left out and counted"
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error", description="rows longer than train.max_length"
    )

    @model_validator(mode="after")
    def _templates_together(self) -> Data:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion templates go together: give both or neither")
        if self.prompt is not None and self.answer_after is not None:
            raise ValueError("answer_after is for `text` rows; it cannot be used with prompt and completion")
        return self


class Lora(Section):
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["attention", "attention+mlp", "all-linear"] | tuple[str, ...] = Field(
        default="attention+mlp", description="a group, or names such as [q_proj, v_proj]"
    )
    last_layers: Positive | None = Field(default=None, description="adapt only the last N decoder layers")
    rslora: bool = Field(
        default=False, description="scale by alpha/sqrt(rank), not alpha/rank (arXiv 2312.03732)"
    )
    bias: Literal["none"] = Field(default="none", description="biases of the base model stay frozen")

    @field_validator("targets")
    @classmethod
    def _some_target(cls, v: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not v:
            raise ValueError("name at least one projection, or a group: attention, attention+mlp, all-linear")
        return v


class Train(Section):
    epochs: Positive = 1
    max_steps: Positive | None = Field(
        default=None, description="stop after this many optimizer steps, whatever `epochs` says"
    )
    batch_size: Positive = Field(default=8, description="examples per optimizer step")
    micro_batch: Positive | Literal["auto"] = Field(default="auto", description="rows per forward pass")
    pack: bool | Literal["auto"] = Field(
        default="auto", description="several examples a row, kept apart from one another"
    )
    keep_layers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="layers whose activations are kept; the others are recomputed going back"
    )
    lr: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Share | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="largest gradient norm; null: no clipping"
    )
    seed: Annotated[int, Field(ge=0)] = 8137
    max_length: Annotated[int, Field(ge=2)] = Field(default=2048, description="tokens, prompt included")
    save_every: Positive = Field(default=100, description="steps between checkpoints")
    eval_every: Positive = Field(default=100, description="steps between validations")
    log_every: Positive = Field(default=1, description="steps between progress lines and tracker records")
    keep_last: Positive = Field(default=2, description="checkpoints kept")
    best: bool = Field(
        default=True, description="the adapter of lowest validation loss is the result, not the last one"
    )
    early_stop: Positive | None = Field(
        default=None, description="stop after this many validations without a better loss"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Train:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch_size {self.batch_size}")
        return self


class Generation(Section):
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0: all tokens")
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    greedy: bool = Field(
        default=False, description="always the most likely token; temperature, top_p and top_k are not used"
    )
    stop: tuple[str, ...] = Field(default=(), description="strings that end an answer")
    seed: Annotated[int, Field(ge=0)] = 0
    cache_bits: Literal[4, 8] | None = Field(
        default=None,
        description="keep the key-value cache in 4 or 8 bits: long contexts in less memory; backend mlx only",
    )


class Evaluate(Section):
    """The score printed before and after training, over the validation rows."""

    task: Literal["none", "exact-match"] = "none"
    rows: Positive | None = Field(default=None, description="only the first N validation rows")
    max_new_tokens: Positive = 128


class Care(Section):
    """How a run looks after itself and the machine. None of it is part of what is trained, so a run may go on
    with other values than it began with.
    """

    keep_awake: bool = Field(default=True, description="the machine does not fall asleep while a run goes")
    on_battery: Literal["go-on", "slow", "pause"] = Field(
        default="go-on", description="slow: at half speed; pause: a checkpoint, then wait for mains power"
    )
    min_battery: Annotated[int, Field(ge=0, le=100)] = Field(
        default=20, description="on battery with less percent than this a run pauses; 0: never"
    )
    when_hot: Literal["go-on", "slow", "pause"] = Field(
        default="slow", description="when heat holds the machine back"
    )
    under_pressure: Literal["go-on", "pause"] = Field(
        default="pause", description="when the system is critically short of memory"
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="a step that is NaN twice: end the run, or leave that step out, once"
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        default=6, description="new processes after a crash, in a row without a new checkpoint"
    )
    silence_s: Positive | Literal["auto"] = Field(
        default="auto", description="seconds without a word from the training process until it counts as hung"
    )
    mps_limit: Annotated[float, Field(gt=0, le=2)] | Literal["none"] = Field(
        default=1.0,
        description="PyTorch's most memory on an Apple GPU, by the recommended working set; none: no limit, "
        "and macOS may freeze",
    )


Tracker = Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"]


class Recipe(Section):
    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")] = "run"
    model: Path_ = Field(
        default="",
        description="model folder (config.json, safetensors, tokenizer); to plan only, also hf:OWNER/NAME",
    )
    backend: Literal["auto", "torch", "mlx", "reference"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps", "metal"] = Field(
        default="auto", description="mps and metal are two words for the Apple GPU"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["none", "4bit", "8bit"] = Field(
        default="none", description="how the frozen base is held; 8bit: backend mlx only"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code of the model folder")
    data: Data = Data()
    lora: Lora = Lora()
    train: Train = Train()
    generation: Generation = Generation()
    ask: tuple[str | dict[str, str], ...] = Field(
        default=(), description="questions answered before and after training"
    )
    evaluate: Evaluate = Evaluate()
    care: Care = Care()
    trackers: tuple[Tracker, ...] = ()


def is_hub_id(value: str) -> bool:
    """`hf:…` and `ms:…` name a model or a data set of a hub, not a path."""
    return value.startswith(("hf:", "ms:"))


def expand(path: str) -> Path:
    """An absolute path, `~` expanded."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as e:
        raise UserError(f"{path}: there is no such user whose home `~` could mean",
                        "write the whole path, or ~/… for your own home") from e


def shipped() -> list[str]:
    """Names of the recipes that come with burnish."""
    folder = files("burnish") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    if name not in shipped():
        raise UserError(f"there is no recipe {name!r}; shipped: {', '.join(shipped())}", "burnish recipes")
    return (files("burnish") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def schema() -> str:
    """The JSON schema of a recipe."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False)


def load(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, and apply `section.key=value` overrides.

    Raises UserError naming every problem with its line, what was expected, and the nearest known key.
    """
    path = expand(recipe)
    if path.is_file():
        try:
            text, where = path.read_text(encoding="utf-8"), recipe
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{recipe}: cannot be read as UTF-8 text: {e}", "save it as UTF-8") from e
    elif recipe in shipped():
        text, where = shipped_text(recipe), f"{recipe} (shipped)"
    else:
        near = difflib.get_close_matches(recipe, shipped(), 1)
        hint = f"burnish recipes {near[0]}" if near else "burnish recipes   lists what ships with burnish"
        raise UserError(f"there is no recipe file {recipe}, and no shipped recipe of that name", hint)
    return parse(text, where, overrides)


def parse(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        asked = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or e
        raise UserError(f"{where}{line}: this is not YAML: {problem}", _SAMPLE) from e
    asked = {} if asked is None else asked
    if not isinstance(asked, dict):
        got = type(asked).__name__
        raise UserError(f"{where}:1: expected sections such as `model:` and `train:`, got {got}", _SAMPLE)
    sources = _lines(node, where)
    for name in {k.partition(".")[0] for k in known_keys() if "." in k}:
        if name in asked and asked[name] is None:  # `lora:` with every line under it commented out
            asked[name] = {}
    for override in overrides:
        _apply(asked, override)
        sources[tuple(override.split("=", 1)[0].strip().split("."))] = f"override {override}"
    try:
        return Recipe.model_validate(asked)
    except ValidationError as e:
        problems = _sentences(e.errors(), sources, where)
        raise all_problems(
            f"{where}: the recipe has {len(problems)} problem{'s' * (len(problems) > 1)}:",
            problems,
            _KEYS,
        ) from e


def dump(recipe: Recipe) -> str:
    """YAML that `parse` reads back to an equal recipe."""
    asked = recipe.model_dump(mode="json")
    text = yaml.safe_dump(asked, allow_unicode=True, sort_keys=False, width=100)
    if yaml.safe_load(text) == asked:
        return text
    return yaml.safe_dump(asked, sort_keys=False, width=100)  # U+0085 and its like: newlines to YAML


def differences(a: Recipe, b: Recipe) -> list[str]:
    """`key: old → new` for every value of the training in which two recipes differ; `care` is none of it."""
    flat_a, flat_b = (_flat(r.model_dump(mode="json", exclude={"care"})) for r in (a, b))
    changed = [k for k in flat_a | flat_b if flat_a.get(k) != flat_b.get(k)]
    return [f"{k}: {flat_a.get(k)!r} → {flat_b.get(k)!r}" for k in changed]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _apply(asked: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: expected section.key=value, such as train.lr=1e-4", _KEYS)
    for i, part in enumerate(parts[:-1]):
        asked = asked.setdefault(part, {})
        if not isinstance(asked, dict):
            section = ".".join(parts[: i + 1])
            raise UserError(f"override {override!r}: {section} is a value, not a section", _KEYS)
    asked[parts[-1]] = _value(key.strip(), value)


def _value(key: str, text: str) -> Any:
    """What the right side of an override means: YAML, but text as it stands where the key takes text.

    So `data.prompt={Question}` is a template, not a mapping, and `name=2024` a name; quotes, null are YAML's.
    """
    annotation = _annotations().get(key)
    is_text = annotation in (str, str | None)
    is_null = annotation == str | None and text in ("null", "~")
    if is_text and not is_null and not text.startswith(("'", '"')):
        return text
    try:
        parsed = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        return text
    if isinstance(parsed, str) and not is_text:
        try:
            return float(parsed)  # YAML 1.1 reads 1e-4 as a string; a person means the number
        except ValueError:
            pass
    return parsed


def _lines(node: yaml.Node | None, where: str, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Key path → 'file:line'. Raises UserError for a key given twice: YAML would silently take the last."""
    found: dict[tuple[str, ...], str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, at = (*path, str(key.value)), f"{where}:{key.start_mark.line + 1}"
            if here in found:
                twice = ".".join(here)
                raise UserError(f"{at}: {twice} is given twice; first at {found[here]}", "keep one of them")
            found[here] = at
            found |= _lines(value, where, here)
    return found


def _annotations() -> dict[str, Any]:
    """`section.key` → the type it takes."""
    found: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        found[name] = inner
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= {f"{name}.{k}": f.annotation for k, f in inner.model_fields.items()}
    return found


def known_keys() -> list[str]:
    """Every key of a recipe, as `section.key`."""
    return list(_annotations())


def _sentences(errors: Sequence[Any], sources: Mapping[tuple[str, ...], str], where: str) -> list[str]:
    """A sentence for each key that is wrong; what the branches of a union say is joined by 'or'."""
    known = known_keys()
    said: dict[str, list[str]] = {}
    tails: dict[str, str] = {}
    for error in errors:
        path = tuple(str(p) for p in error["loc"])
        at = next((sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), None)
        at = at or next((s for key, s in sources.items() if key[: len(path)] == path), where)
        key = ".".join(path)
        if error["type"] == "extra_forbidden":
            said[f"{at}: {key} is not a recipe key{_nearest(key)}"] = []
            continue
        # a union's branches end the path with a type's name; the key is what a person wrote
        key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), key)
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = _PLAIN.get(error["type"]) or message
        said.setdefault(f"{at}: {key}: ", []).append(message)
        tails[f"{at}: {key}: "] = "" if isinstance(error["input"], dict) else f"; got {error['input']!r}"
    return [start + " or ".join(dict.fromkeys(messages)).replace(" or expected", " or") + tails.get(start, "")
            for start, messages in said.items()]


# pydantic's words where they speak of Python and not of a recipe
_PLAIN = {
    "tuple_type": "expected a list, such as [a, b]",
    "model_type": "expected a section with keys of its own",
    "string_type": "expected text (put quotes around it)",
    "dict_type": "expected `column: text` pairs",
}
# What other tools call it (Transformers, PEFT, TRL, Unsloth, mlx-lm), where the spelling is too far off.
_ELSEWHERE = {
    "learning_rate": "train.lr", "lr_scheduler_type": "train.schedule", "max_grad_norm": "train.clip",
    "gradient_accumulation_steps": "train.micro_batch", "per_device_train_batch_size": "train.micro_batch",
    "iters": "train.max_steps", "save_steps": "train.save_every", "eval_steps": "train.eval_every",
    "steps_per_eval": "train.eval_every", "logging_steps": "train.log_every",
    "steps_per_report": "train.log_every",
    "gradient_checkpointing": "train.keep_layers", "grad_checkpoint": "train.keep_layers", "r": "lora.rank",
    "lora_layers": "lora.last_layers", "num_layers": "lora.last_layers", "load_in_4bit": "quantize",
    "mask_prompt": "data.loss_on", "report_to": "trackers", "do_sample": "generation.greedy",
    "dataset": "data.train", "model_name": "model", "model_path": "model", "torch_dtype": "dtype",
}  # fmt: skip


def _nearest(key: str) -> str:
    """'; did you mean …?' — by the whole key, by another tool's name for it, then by its last word."""
    known, last = known_keys(), key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, 1, 0.75)
    near = near or [_ELSEWHERE[w] for w in (last,) if w in _ELSEWHERE]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = near or [
        k for w in difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in known], 1, 0.6)
        for k in known if k.rsplit(".", 1)[-1] == w
    ]
    near = near or difflib.get_close_matches(key, known, 1, 0.4)
    return f"; did you mean {near[0]}?" if near else ""
