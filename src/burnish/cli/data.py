"""`burnish data`"""

from __future__ import annotations

from pathlib import Path

from burnish.cli.show import console, data_text, print_json
from burnish.data.facts import facts
from burnish.data.prepare import prepare
from burnish.models.spec import spec_of
from burnish.models.tokenizer import load_tokenizer
from burnish.recipe import expand, load
from burnish.report.data_page import check_target, write_page
from burnish.training.environment import prepare_environment

PAGE_EXAMPLES = 20  # on a page, where --show does not say


def data_command(name: str, overrides: list[str], show: int | None, json: bool, html: Path | None) -> None:
    recipe = load(name, overrides)
    page = None if html is None else expand(str(html))
    if page is not None:
        check_target(page)
    folder = spec_of(recipe).folder  # lengths are counted in its model's tokens
    prepare_environment()
    prepared = prepare(recipe, load_tokenizer(folder, recipe.trust_remote_code))
    told = facts(prepared, recipe, show if show is not None else PAGE_EXAMPLES if page else 0)
    if page is not None:
        write_page(page, told)
    if json:
        print_json(told)
        return
    out = console()
    out.print(data_text(told, show or 0))
    if page is not None:
        out.print(f"\npage: {page}")
