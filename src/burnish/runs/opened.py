"""A trained model opened for use: from a run, an adapter folder or a model folder, what asking it takes.

opened = open_folder(Path("runs/demo"), [])
opened.recipe, opened.adapter, opened.format
tokenizer = tokenizer_of(opened, spec.folder)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.training_template import NO_TEMPLATE, ending
from burnish.errors import UserError, all_problems
from burnish.models.peft_config import lora_terms
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.recipe import Recipe, Train, dump, load, parse


@dataclass(frozen=True)
class Opened:
    recipe: Recipe
    adapter: Path | None  # None: a model folder, nothing trained
    format: str  # of the rows it was trained on
    template: str  # the name of the chat template it was trained with; '': not told


def open_folder(folder: Path, overrides: list[str]) -> Opened:
    """Of a run, an adapter folder or a model folder. Raises UserError where it is none of them, or an adapter
    that burnish cannot open.
    """
    for place in (folder / "adapter", folder):
        if (place / "adapter_config.json").is_file():
            return _of_adapter(place, overrides)
    if (folder / "recipe.yaml").is_file():
        raise UserError(
            f"{folder} is a run without a finished adapter", "burnish train … --resume   finishes it"
        )
    if (folder / "config.json").is_file():
        return Opened(parse(dump(_for_answers(str(folder))), "recipe", overrides), None, "messages", "")
    raise UserError(
        f"{folder} is no run, no adapter and no model folder", "name a folder that a run has written"
    )


def _of_adapter(place: Path, overrides: list[str]) -> Opened:
    if (place / "recipe.yaml").is_file():
        recipe = load(str(place / "recipe.yaml"), overrides)
        told = _read(place / "burnish.json", ("format",))
        asked = any(o.startswith("data.system") for o in overrides)
        system = recipe.data.system if asked else told.get("system", recipe.data.system)
        data = recipe.data.model_copy(update={"system": system})
        return Opened(
            recipe.model_copy(update={"data": data}), place, told["format"], told.get("template", "")
        )
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
    terms = lora_terms(config)
    if terms.problems:
        raise all_problems(
            f"{place} was made elsewhere, with settings that burnish does not know:",
            terms.problems,
            "plain LoRA of linear layers, with one rank and alpha, can be opened",
        )
    asked = _for_answers(config["base_model_name_or_path"] or "")
    lora = asked.lora.model_copy(
        update={
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "targets": tuple(targets),
            "rslora": bool(config.get("use_rslora")),
        }
    )
    recipe = parse(dump(asked.model_copy(update={"lora": lora})), str(place), overrides)
    return Opened(recipe, place, "messages", "")


def tokenizer_of(opened: Opened, model: Path) -> Tokenizer:
    """The adapter's own, with the template it was trained with, where it has one; else the model's."""
    adapter = opened.adapter
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    place = adapter if own and adapter is not None else model
    tokenizer = load_tokenizer(place, opened.recipe.trust_remote_code, model)
    return tokenizer if opened.template == NO_TEMPLATE else ending(tokenizer)


def _for_answers(model: str) -> Recipe:
    """Lengths of training mean nothing here; the least is one that every model's positions allow."""
    return Recipe(model=model, train=Train(max_length=2))


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    again = "copy the adapter folder again, whole"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there", again) from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}", again) from e
    missing = [k for k in keys if k not in config]
    if missing:
        raise UserError(f"{path} names no {', '.join(missing)}; expected a LoRA adapter of PEFT", again)
    return config
