"""`burnish generate`"""

from __future__ import annotations

import json as json_
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from burnish import backends
from burnish.cli.show import print_json
from burnish.data.formats import question, takes_chat
from burnish.data.render import Renderer
from burnish.data.training_template import NO_TEMPLATE, ending
from burnish.errors import UserError
from burnish.inference.generate import answer, check_window, sampling
from burnish.machine.probe import probe
from burnish.models.spec import spec_of
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.planning.plan import make_plan
from burnish.recipe import Recipe, Train, dump, expand, load, parse
from burnish.training.environment import prepare_environment


def generate_command(target: str, prompts: list[str], overrides: list[str], raw: bool, json: bool) -> None:
    prepare_environment()
    folder = expand(target)
    recipe, adapter, format = _opened(folder, overrides)
    texts = [t for t in prompts if t != "-"]
    if not texts or "-" in prompts:
        texts.append(sys.stdin.read().rstrip("\n"))
    if not all(texts):
        raise UserError("there is no prompt", f"burnish generate {target} 'your question'")
    spec = spec_of(recipe)
    tokenizer = _tokenizer(adapter, spec.folder, recipe)
    tokens = [_tokens(t, recipe, format, tokenizer, raw) for t in texts]
    for number, prompt in enumerate(tokens, 1):
        check_window(prompt, spec.max_positions, f"prompt {number}")
    learner = backends.open(make_plan(recipe, spec, probe(Path.cwd())))
    try:
        if adapter is not None:
            learner.load_adapter(adapter)
        stream = not json and len(texts) == 1
        how = sampling(recipe.generation, tokenizer)
        given = answer(
            learner,
            tokenizer,
            tokens,
            how,
            recipe.generation.stop,
            (lambda _, piece: print(piece, end="", flush=True)) if stream else None,
        )
    finally:
        learner.close()
    for text, a in zip(texts, given, strict=True):
        if json:
            print_json({"prompt": text, **asdict(a)})
        elif stream:
            print()
        else:
            print(f"# {text}\n{a.text.strip()}\n")
        if a.rung and not json:
            print(f"burnish: answered by a fallback, {a.rung}: {a.reason}", file=sys.stderr)


def _opened(folder: Path, overrides: list[str]) -> tuple[Recipe, Path | None, str]:
    """The recipe, the adapter and the data format of a run, an adapter folder or a model folder."""
    for place in (folder / "adapter", folder):
        if (place / "adapter_config.json").is_file():
            return _of_adapter(place, overrides)
    if (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is a run without a finished adapter", "burnish train … --resume   finishes it"
        )
    if (folder / "config.json").is_file():
        return parse(dump(_for_answers(str(folder))), "recipe", overrides), None, "messages"
    raise UserError(
        f"{folder} is no run, no adapter and no model folder", "name a folder that a run has written"
    )


def _of_adapter(place: Path, overrides: list[str]) -> tuple[Recipe, Path, str]:
    if (place / "recipe.yaml").is_file():
        recipe = load(str(place / "recipe.yaml"), overrides)
        told = _read(place / "burnish.json", ("format",))
        asked = any(o.startswith("data.system") for o in overrides)
        system = recipe.data.system if asked else told.get("system", recipe.data.system)
        data = recipe.data.model_copy(update={"system": system})
        return recipe.model_copy(update={"data": data}), place, told["format"]
    if "fine_tune_type" in _read(place / "adapter_config.json", ()):
        raise UserError(
            f"{place} is an adapter as mlx-lm keeps it; expected a LoRA adapter of PEFT",
            f"burnish convert {place} OUT, then burnish generate OUT",
        )
    config = _read(
        place / "adapter_config.json", ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
    )
    targets = config["target_modules"]
    if config.get("layers_to_transform"):
        raise UserError(
            f"{place} has no recipe.yaml, and its layers_to_transform names some of the layers only",
            "open the adapter folder that the run wrote; others need target_modules on every layer",
        )
    if not isinstance(targets, list):
        raise UserError(
            f"{place} was made elsewhere, with targets that burnish cannot name: {targets!r:.60}",
            "adapters with a list of target_modules on every layer can be opened",
        )
    asked = _for_answers(config["base_model_name_or_path"])
    lora = asked.lora.model_copy(
        update={
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "targets": tuple(targets),
            "rslora": bool(config.get("use_rslora")),
        }
    )
    return parse(dump(asked.model_copy(update={"lora": lora})), str(place), overrides), place, "messages"


def _tokenizer(adapter: Path | None, model: Path, recipe: Recipe) -> Tokenizer:
    """The adapter's own, with the template it was trained with, where the folder has one."""
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    place = adapter if own and adapter is not None else model
    tokenizer = load_tokenizer(place, recipe.trust_remote_code, model)
    told = _read(place / "burnish.json", ()) if (place / "burnish.json").is_file() else {}
    return tokenizer if told.get("template") == NO_TEMPLATE else ending(tokenizer)


def _for_answers(model: str) -> Recipe:
    """Lengths of training mean nothing here; the least is one that every model's positions allow."""
    return Recipe(model=model, train=Train(max_length=2))


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    again = "copy the adapter folder again, whole"
    try:
        config = json_.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there", again) from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}", again) from e
    missing = [k for k in keys if k not in config]
    if missing:
        raise UserError(f"{path} names no {', '.join(missing)}; expected a LoRA adapter of PEFT", again)
    return config


def _tokens(text: str, recipe: Recipe, format: str, tokenizer: Tokenizer, raw: bool) -> list[int]:
    renderer = Renderer(tokenizer, recipe.data.loss_on)
    chat = takes_chat(recipe.data, tokenizer.has_chat_template)
    conversation = question(text, recipe.data, "text" if raw else format, chat and not raw)
    if raw:
        conversation = replace(conversation, plain=True)
    return renderer.prompt(conversation)
