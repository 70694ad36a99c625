"""What a run is made of, read and checked before anything is written or loaded: plan, examples, questions.

    material = gather(recipe, near=out)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from burnish.data.formats import question, takes_chat
from burnish.data.prepare import Prepared, prepare
from burnish.data.render import Renderer
from burnish.data.training_template import NO_TEMPLATE, OWN
from burnish.errors import UserError
from burnish.inference.generate import check_window
from burnish.machine.probe import probe
from burnish.models.spec import ModelSpec, spec_of
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import Recipe


@dataclass(frozen=True)
class Material:
    """What a run is made of, read and checked before anything is written or loaded."""

    plan: Plan
    prepared: Prepared
    tokenizer: Tokenizer
    questions: tuple[tuple[str, list[int]], ...]  # of `ask:`, as text and as the prompt's tokens


def gather(recipe: Recipe, near: Path) -> Material:
    """Read model, data and machine, and plan. Raises UserError for whatever is wrong with any of them."""
    spec = spec_of(recipe)
    plan = make_plan(recipe, spec, probe(near))  # refuses an impossible recipe before the data is read
    prepared = prepare(recipe, load_tokenizer(spec.folder, recipe.trust_remote_code))
    tokenizer = prepared.tokenizer  # with the template that the data is proven under
    _check_vocabulary(prepared, spec)
    wishes = {"train.early_stop": recipe.train.early_stop, "evaluate.task": recipe.evaluate.task}
    for key, wish in wishes.items():
        if wish not in (None, "none") and not prepared.valid.examples:
            raise UserError(
                f"{key}: {wish}, but there are no validation rows",
                "set data.valid=FILE.jsonl or data.valid_share=0.1",
            )
    questions = _questions(recipe, prepared, tokenizer, spec.max_positions)
    return Material(plan.tightened(prepared.stats), prepared, tokenizer, questions)


def _questions(
    recipe: Recipe, prepared: Prepared, tokenizer: Tokenizer, positions: int
) -> tuple[tuple[str, list[int]], ...]:
    renderer, found = Renderer(tokenizer, recipe.data.loss_on), []
    chat = takes_chat(recipe.data, tokenizer.has_chat_template)
    data = recipe.data.model_copy(update={"system": prepared.system})
    for asked in recipe.ask:
        prompt = renderer.prompt(question(asked, data, prepared.format, chat))
        check_window(prompt, positions, "ask: a question")
        found.append((asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False), prompt))
    return tuple(found)


def data_notes(prepared: Prepared) -> Iterator[str]:
    """What a person should know of the data before it is trained."""
    if prepared.template not in (OWN, NO_TEMPLATE):
        yield f"chat template: {prepared.template}, stored with the adapter, for {prepared.template_why}"
    if prepared.bad:
        first = prepared.bad[0]
        yield f"{len(prepared.bad)} rows left out that cannot be used, such as {first.at}: {first.why}"
    if prepared.valid.dropped or prepared.valid.truncated:
        yield (
            f"{prepared.valid.dropped} validation rows left out and {prepared.valid.truncated} cut: "
            "too long, or nothing to score"
        )
    if prepared.normalized:
        yield f"the tokenizer brings Unicode into its normal form: {prepared.normalized} rows differ by that"
    if prepared.trimmed:
        yield f"the chat template removes the outer white space of {prepared.trimmed} texts"


def fingerprint(prepared: Prepared) -> str:
    """A checksum of every example: a run goes on with the data that it began with."""
    digest = hashlib.sha256()
    for e in (*prepared.train.examples, *prepared.valid.examples):
        digest.update(e.tokens.tobytes())
        digest.update(e.weights.tobytes())
    return digest.hexdigest()


def _check_vocabulary(prepared: Prepared, spec: ModelSpec) -> None:
    """A tokenizer with more words than the model has rows for would read beyond its embeddings."""
    examples = [*prepared.train.examples, *prepared.valid.examples]
    most = max(int(e.tokens.max()) for e in examples)
    if most >= spec.vocab_size:
        raise UserError(
            f"the tokenizer gives token {most}, but the model in {spec.folder} has {spec.vocab_size} words",
            "use the tokenizer that came with the model",
        )
