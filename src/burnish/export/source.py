"""What is exported: a run's adapter, the weights it was trained on, and the prompt it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from burnish.data.formats import takes_chat
from burnish.data.training_template import NO_TEMPLATE
from burnish.errors import UserError
from burnish.models.spec import ModelSpec, spec_of
from burnish.models.tokenizer import Tokenizer
from burnish.recipe import Recipe
from burnish.runs.opened import open_folder, tokenizer_of

_LONGEST = 2048  # tokens of a row that an adapter made elsewhere is compared on: nothing says its own


@dataclass(frozen=True)
class Source:
    folder: Path  # as given
    name: str
    recipe: Recipe
    adapter: Path  # PEFT's folder; tokenizer files, recipe.yaml and burnish.json are in it too
    base: ModelSpec  # of the folder of the original weights
    tokenizer: Tokenizer  # with the template it was trained with
    format: str  # of the rows
    chat: bool  # prompts go through the chat template
    system: str | None


def open_source(folder: Path, base: Path | None, overrides: list[str]) -> Source:
    """A run or an adapter folder. base: where the original weights are, if not where the run took them from.

    Raises UserError for a folder that nothing was trained in, or whose base model is not there.
    """
    opened = open_folder(folder, [*overrides, *([f"model={base}"] if base else [])])
    if opened.adapter is None:
        raise UserError(
            f"{folder} is a model folder that nothing was trained in",
            f"burnish convert {folder} OUT   changes its form",
        )
    spec = spec_of(opened.recipe)
    tokenizer = tokenizer_of(opened, spec.folder)
    chat = opened.template != NO_TEMPLATE and takes_chat(opened.recipe.data, tokenizer.has_chat_template)
    recipe = opened.recipe
    made_elsewhere = not (opened.adapter / "recipe.yaml").is_file()
    if made_elsewhere and not any(o.startswith("train.max_length=") for o in overrides):
        longest = {"max_length": min(_LONGEST, spec.max_positions)}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=longest)})
    return Source(
        folder, recipe.name, recipe, opened.adapter, spec, tokenizer, opened.format, chat, recipe.data.system
    )
