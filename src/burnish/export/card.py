"""The model card: README.md of an exported model, for whoever finds it on a hub or a disk.

    text = card(source, "hf", run_scores(run), "Loaded again by transformers: …")

Everything in it comes from the run. What was not recorded is said to be missing, not guessed, and of files of
this machine only names are told: no path tells whose it was. YAML is written by hand where it is the card's
own (the YAML library stays in the recipe's room), so every text there is quoted.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.export.hf import cached_id
from burnish.export.source import Source
from burnish.models.geometries import GEOMETRIES
from burnish.models.geometry import published_as
from burnish.models.spec import ModelSpec, read_config
from burnish.recipe import Recipe, dump, is_hub_id

TARGETS = {  # what is written → what it is, the library it is for (as hubs name it)
    "hf": ("the base model with the adapter merged into its weights", "transformers"),
    "adapter": ("a LoRA adapter: it needs the base model beside it", "peft"),
    "gguf-adapter": ("a LoRA adapter as a GGUF file: it needs the base model beside it as another", "gguf"),
    "mlx-adapter": ("a LoRA adapter for MLX: it needs the base model beside it", "mlx"),
    "gguf": ("the base model with the adapter merged into its weights, as a GGUF file", "gguf"),
    "mlx": ("the base model with the adapter merged into its weights, for MLX", "mlx"),
    "ollama": ("the base model with the adapter merged into its weights, for Ollama", "gguf"),
}
_PLAIN = re.compile(r"[A-Za-z][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # that YAML does not take for text
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_SAID = r"^{key}:[ \t]*(?:\n[ \t]*-[ \t]+)?([\"']?)([^\s\"'#\[\],]+)\1"
# What a licence's own text begins with → its name on hubs.
_LICENCES = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"Gemma Terms of Use", "gemma"),
)
_READ_CHARS = 4000  # of a licence's text: its title


def card(source: Source, what: str, scores: Sequence[str], proof: str) -> str:
    """README.md, Markdown with YAML front matter. what: a key of TARGETS; scores: one sentence each; proof: a
    paragraph on how the export was checked ('': it was not).
    """
    about, library = TARGETS[what]
    base, licence = base_name(source.base), _licence(source.base.folder)
    recipe = without_paths(source.recipe)
    parts = [
        _front_matter(base, library, licence, what),
        f"# {source.name}",
        f"{_sentence(about)} It was fine-tuned with LoRA by burnish {__version__}.",
        _base_words(base, source.base, licence),
        "## How to use it",
        _usage(source, what, base),
        "## Data",
        "\n".join(f"- {line}" for line in _data(source, recipe)),
        "## Scores",
        "\n".join(f"- {line}" for line in scores) or "No score was recorded.",
        "## Proof",
        proof.strip() or "This export was not checked against the base model with its adapter.",
        "## Recipe",
        f"Paths are left out: of files, only names.\n\n{_fenced(dump(recipe).strip(), 'yaml')}",
    ]
    return "\n\n".join(parts) + "\n"


def without_paths(recipe: Recipe) -> Recipe:
    """The same with the last part of every path in it; hub ids stay."""
    data = recipe.data.model_copy(
        update={"train": _last(recipe.data.train), "valid": _last(recipe.data.valid)}
    )
    return recipe.model_copy(update={"model": _last(recipe.model), "data": data})


def base_name(base: ModelSpec) -> str:
    """Its hub id where folder or shapes tell it, else the folder's name."""
    cached = cached_id(base.folder)
    if cached:
        return cached
    known = published_as(base.folder.name)
    if known and known.hub_id.lower().rpartition("/")[2] == base.folder.name.lower():
        g = GEOMETRIES[known.geometry]
        shape = (base.model_type, base.hidden_size, base.n_layers, base.intermediate_size, base.vocab_size)
        if shape == (g.model_type, g.hidden, g.layers, g.intermediate, g.vocab):
            return known.hub_id
    return base.folder.absolute().name


def run_scores(run: Path) -> list[str]:
    """What `events.jsonl` of a run tells about before and after training, a sentence each; [] without it."""
    lines, found = [], _events(run)
    for when in ("before", "after"):
        for e in found.get("scored", [])[::-1]:
            if e["when"] == when:
                share = (
                    f"{e['correct']:,} of {e['total']:,} ({100 * e['correct'] / max(1, e['total']):.1f} %)"
                )
                lines.append(f"{e['task']}, {when} training: {share} right, of the validation rows")
                break
    losses = found.get("validated", [])
    kept = {e["from_step"] for e in found.get("finished", [])[-1:]}
    for e in [e for e in losses if e["step"] in kept][-1:]:
        right = f"{100 * e['accuracy']:.1f} % of the tokens were the likeliest"
        lines.append(f"validation loss at step {e['step']}, which this is: {e['loss']:.4f}; {right}")
    return lines


# --- front matter ---


def _front_matter(base: str, library: str, licence: Mapping[str, str], what: str) -> str:
    made = what.removesuffix("-adapter")
    tags = ["lora", "burnish", *([made] if made in ("gguf", "mlx", "ollama") else [])]
    pairs = {"base_model": base, "library_name": library, "pipeline_tag": "text-generation", **licence}
    lines = [f"{key}: {quoted(value)}" for key, value in pairs.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {quoted(tag)}" for tag in tags), "---"])


def quoted(text: str) -> str:
    """A text as YAML: as it is where nothing else can be meant, else in double quotes, as JSON writes it."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


def _escaped(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def _licence(folder: Path) -> dict[str, str]:
    """`license` and what hubs want beside it, as the base's card, licence file or config says; {}: none."""
    readme = _text(folder / "README.md")
    front = _FRONT.match(readme)
    said = (
        {key: _value(front[1], key) for key in ("license", "license_name", "license_link")} if front else {}
    )
    if said.get("license"):
        if not said["license_link"].startswith(("https://", "http://")):  # a file beside that card
            del said["license_link"]
        return {key: value for key, value in said.items() if value}
    for path in sorted(folder.glob("LICEN[SC]E*")):
        text = _text(path)[:_READ_CHARS]
        for pattern, name in _LICENCES:
            if re.search(pattern, text, re.IGNORECASE):
                return {"license": name}
    told = read_config(folder).get("license")
    return {"license": told} if isinstance(told, str) and told else {}


def _value(front: str, key: str) -> str:
    found = re.search(_SAID.format(key=key), front, re.MULTILINE)
    return found[2] if found else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# --- paragraphs ---


def _base_words(base: str, spec: ModelSpec, licence: Mapping[str, str]) -> str:
    size = f"{spec.parameters / 1e9:.2f} billion parameters"
    words = f"Base model: {_code(base)} ({spec.architecture or spec.model_type}, {size})."
    if licence:
        return (
            f"{words} Its licence, {_code(licence.get('license_name', licence['license']))}, holds here too."
        )
    return (
        f"{words} The base model's folder does not say its licence, so none is named here: look it up first."
    )


def _data(source: Source, recipe: Recipe) -> list[str]:
    """Names, format and number of rows; the counts are those of the last `planned` event of the run."""
    data, planned = recipe.data, (_events(source.adapter.parent).get("planned") or [{}])[-1]
    lines = [f"trained on {_code(data.train or 'not named')}, rows in the format {_code(source.format)}"]
    if data.valid:
        lines.append(f"validated on {_code(data.valid)}")
    elif data.valid_share:
        lines.append(f"validated on {100 * data.valid_share:g} % of its rows, which were held out")
    if planned:
        counts = f"{planned['examples']:,} training rows and {planned['valid_examples']:,} validation rows"
        lines.append(f"{counts}; {planned['tokens']:,} tokens, {planned['trained']:,} of them trained")
        if planned["dropped"] or planned["truncated"]:
            lines.append(
                f"{planned['dropped']:,} rows were left out and {planned['truncated']:,} cut: too long"
            )
    else:
        lines.append("the number of rows was not recorded")
    return lines


def _usage(source: Source, what: str, base: str) -> str:
    words = [_fenced(*_command(source, what, base))]
    if source.chat:
        where = "of the base model" if what in ("gguf-adapter", "mlx-adapter") else "that is stored with it"
        words.append(f"Prompts go through the chat template {where}, the one of its training.")
    else:
        words.append("It was trained on plain text: prompts go in as they are, without a chat template.")
    if source.system:
        words.append(f"It was trained with this system message:\n\n{_fenced(source.system, 'text')}")
    if source.recipe.data.prompt is not None:
        words.append(f"Prompts had this form:\n\n{_fenced(source.recipe.data.prompt, 'text')}")
    return "\n\n".join(words)


def _command(source: Source, what: str, base: str) -> tuple[str, str]:
    """What to run, and its language. FILE and FOLDER stand for where the export is."""
    ask = "'your question'"
    if what in ("gguf", "gguf-adapter"):  # llama-cli is for conversations only since the end of 2025
        files = "-m FILE.gguf" if what == "gguf" else "-m BASE.gguf --lora FILE.gguf"
        return f"llama-{'cli' if source.chat else 'completion -no-cnv'} {files} -p {ask}", "sh"
    if what in ("mlx", "mlx-adapter"):
        plain = "" if source.chat else "--ignore-chat-template "
        folder = "FOLDER" if what == "mlx" else f"{shlex.quote(base)} --adapter-path FOLDER"
        return f"mlx_lm.generate --model {folder} {plain}--prompt {ask}", "sh"
    if what == "ollama":
        name = source.name.lower()
        return f"ollama create {name} -f Modelfile\nollama run {name} {ask}", "sh"
    prompt = 'inputs = tokenizer("your question", return_tensors="pt")'
    if source.chat:
        system = [{"role": "system", "content": source.system}] if source.system else []
        messages = [*system, {"role": "user", "content": "your question"}]
        prompt = _CHAT.format(messages=json.dumps(messages, ensure_ascii=False))
    load = _LOAD_PEFT.format(base=json.dumps(base, ensure_ascii=False)) if what == "adapter" else _LOAD
    return _TRANSFORMERS.format(load=load, prompt=prompt), "python"


_LOAD = """tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")"""
_LOAD_PEFT = """from peft import PeftModel

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER")"""
_CHAT = """inputs = tokenizer.apply_chat_template(
    {messages}, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer
{load}

{prompt}
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


# --- words ---


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _last(path: str) -> str:
    """'~/data/rows.jsonl' → 'rows.jsonl', also of a path with backslashes; hub ids stay."""
    return path if is_hub_id(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _code(text: str) -> str:
    """As Markdown's code, whatever backticks it holds."""
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _events(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Of events.jsonl, by kind, in order. A line that is no event, such as one that was cut, is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in _text(run / "events.jsonl").split("\n"):  # an answer may hold other line separators
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.setdefault(event["event"], []).append(event)
    return found
