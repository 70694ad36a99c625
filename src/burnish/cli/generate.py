"""`burnish generate`"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

from burnish import backends
from burnish.cli.show import print_json
from burnish.data.formats import question, takes_chat
from burnish.data.render import Renderer
from burnish.errors import UserError
from burnish.inference.generate import answer, check_window, sampling
from burnish.machine.probe import probe
from burnish.models.spec import spec_of
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import make_plan
from burnish.recipe import Recipe, expand
from burnish.runs.opened import open_folder, tokenizer_of
from burnish.training.environment import prepare_environment


def generate_command(target: str, prompts: list[str], overrides: list[str], raw: bool, json: bool) -> None:
    prepare_environment()
    folder = expand(target)
    opened = open_folder(folder, overrides)
    recipe, adapter, format = opened.recipe, opened.adapter, opened.format
    texts = [t for t in prompts if t != "-"]
    if not texts or "-" in prompts:
        texts.append(sys.stdin.read().rstrip("\n"))
    if not all(texts):
        raise UserError("there is no prompt", f"burnish generate {target} 'your question'")
    spec = spec_of(recipe)
    tokenizer = tokenizer_of(opened, spec.folder)
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


def _tokens(text: str, recipe: Recipe, format: str, tokenizer: Tokenizer, raw: bool) -> list[int]:
    renderer = Renderer(tokenizer, recipe.data.loss_on)
    chat = takes_chat(recipe.data, tokenizer.has_chat_template)
    conversation = question(text, recipe.data, "text" if raw else format, chat and not raw)
    if raw:
        conversation = replace(conversation, plain=True)
    return renderer.prompt(conversation)
