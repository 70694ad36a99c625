"""Where a recipe's model is, and what it is: a folder here, a hub, or the table of known models.

    spec, source = find_spec(recipe)      # source: '' for a folder, else a few words for a person

For planning, which needs no weights; whoever needs them takes `spec.spec_of`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from burnish.errors import UserError
from burnish.models.fetch import Hub, is_offline, remote_facts
from burnish.models.geometry import published_as, spec_of_geometry
from burnish.models.spec import ModelSpec, how_to_get, read_spec
from burnish.recipe import Recipe, expand, is_hub_id

# A path that begins with `.`, `~` or `/` is never a hub's id.
_ID = re.compile(r"(?:(hf|ms):)?(\w[\w.-]*/[\w.-]+)")


def find_spec(recipe: Recipe) -> tuple[ModelSpec, str]:
    """The spec of the recipe's model, and in a few words where it comes from if not from a local folder.

    A folder that exists is read. `hf:OWNER/NAME`, `ms:OWNER/NAME` and OWNER/NAME are asked of the hub,
    without weights. Where HF_HUB_OFFLINE is set or the hub does not tell, the table of known models is asked,
    and so it is where a folder that does not exist has a known model's name. Raises UserError where none of
    these knows the model, with the command that downloads it.
    """
    model = recipe.model
    if not model:
        raise UserError("the recipe names no model", "set model=FOLDER, or model=hf:OWNER/NAME to plan only")
    if not is_hub_id(model) and expand(model).exists():
        return read_spec(expand(model)), ""
    found = _ID.fullmatch(model)
    if found:
        return _of_hub(cast(Hub, found[1] or "hf"), found[2], here="" if found[1] else model)
    if is_hub_id(model):
        raise UserError(
            f"{model} is no model id: expected {model[:3]}OWNER/NAME", "such as hf:Qwen/Qwen2.5-7B"
        )
    return _of_table(Path(model.rstrip("/")).name, model)


def _of_hub(hub: Hub, name: str, here: str) -> tuple[ModelSpec, str]:
    """here: the model as written, if it could have been a folder."""
    model = published_as(name) or (published_as(Path(name).name) if here else None)
    why = "HF_HUB_OFFLINE is set"
    if not is_offline():
        try:
            return remote_facts(name, hub)
        except UserError as e:
            if model is None:
                raise UserError(_also(e.message, here), e.hint, e.exit_code) from e
            why = f"{hub}:{name} could not be read"
    if model is None:
        raise UserError(
            _also(f"{hub}:{name} is not on this machine, burnish does not know its shapes, and {why}", here),
            f"with a network: {how_to_get(name, hub)}",
        )
    return spec_of_geometry(model.hub_id), f"the published config of {model.hub_id}; {why}"


def _of_table(name: str, written: str) -> tuple[ModelSpec, str]:
    try:
        spec = spec_of_geometry(name)
    except UserError as e:
        raise UserError(
            f"model folder {expand(written)} does not exist, and {e.message}",
            f"hf download OWNER/NAME --local-dir {written}   downloads it; model=hf:OWNER/NAME plans without",
        ) from e
    model = published_as(name)
    assert model is not None
    return spec, f"the published config of {model.hub_id}; {written} is not there"


def _also(message: str, here: str) -> str:
    return f"{message} ({expand(here)} is not there either)" if here else message
