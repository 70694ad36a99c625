"""An Ollama Modelfile whose template writes the prompts of training, character by character.

    check_ollama(source)                        # says before any work what cannot be written so
    text = modelfile(source, "demo.gguf")

The template is found by probing: the tokenizer's own (Jinja) is rendered with marks for the texts, and what
it writes before, between and after them goes into a Go template over Ollama's `.Messages`. That is then run
by burnish's reader of Go templates (go_template.py) and compared with the prompts of training's renderer.

Ollama's templates can neither cut nor trim a text. Where training's does, a comment of the file says so.
https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.conversation import Conversation, Role, Turn
from burnish.data.formats import fields, question
from burnish.data.template import ChatTemplate, Unproven
from burnish.errors import UserError
from burnish.export.go_template import TemplateError, literal, ollama_prompt, parse, string
from burnish.export.modelfile import parse_modelfile, quoted
from burnish.export.source import Source
from burnish.models.tokenizer import Refused

_MARK = "xBURNISHPROMPTx"
_CONTEXT = 4096  # tokens, Ollama's own default; a longer one only where training or answers want it
_ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}
# Conversations that Ollama asks for, and rarer ones: a long chat that it cut at its beginning (`au`), and a
# system message later on. The template may take the rarer ones or not.
_USUAL, _WITH_SYSTEM = ("u", "uau", "uauau"), ("su", "suau", "suauau")
_RARE = (("au", "auau"), ("sau", "sauau"), ("uasu", "uasuau"))
_ELSEWHERE = (
    "burnish export … --to gguf   writes the weights alone; the prompt is then for the caller to write"
)
# Rich in what a template may trip over, and free of white space at its ends.
_TRIALS = ("Why?", 'Say {{ "yes" }} {% x %} & "no"\\n\n\tC:\\new {y}\n\n  <b>为什么？</b> 🙂')


@dataclass(frozen=True)
class _Written:
    """template: Go. system: for the SYSTEM instruction, where that can say it. notes: what differs, in
    sentences.
    """

    template: str
    system: str | None
    notes: tuple[str, ...]


def check_ollama(source: Source) -> None:
    """Raises UserError where Ollama cannot ask this model as it was trained."""
    modelfile(source, "model.gguf")


def modelfile(source: Source, gguf_name: str) -> str:
    """The Modelfile of a model whose weights are in the file `gguf_name` beside it.

    Its prompts and its grammar are checked. Raises UserError as check_ollama.
    """
    written = _chat(source) if _is_chat(source) else _plain(source)
    lines = [f"# {source.name}, trained and exported by burnish", *(f"# {note}" for note in written.notes)]
    name = gguf_name if gguf_name.endswith(".gguf") else f"{gguf_name}.gguf"
    lines.append(f"FROM ./{name}")
    lines.append(f"TEMPLATE {_quoted(written.template, 'the template')}")
    if written.system:
        lines.append(f"SYSTEM {_quoted(written.system, 'data.system')}")
    lines += [f"PARAMETER {key} {value}" for key, value in _parameters(source)]
    license = _license(source)
    if license:
        lines.append(f"LICENSE {license}")
    text = "\n".join(lines) + "\n"
    read = {(i.name, i.key): i.value for i in parse_modelfile(text)}
    assert read["FROM", ""] == f"./{name}", "what was written comes back"
    assert read["TEMPLATE", ""] == written.template, "what was written comes back"
    assert read.get(("SYSTEM", "")) == (written.system or None), "what was written comes back"
    return text


def adds_bos(source: Source) -> bool:
    """Whether llama.cpp must put the beginning-of-sequence token before a prompt, as the GGUF file tells it
    (tokenizer.ggml.add_bos_token); the template leaves it out then.

    A chat template that writes none was trained without it.
    """
    bos = source.tokenizer.bos_id
    if bos is None or not _is_chat(source):
        return bos is not None
    return _template(source).prompt(_talk("u")).text.startswith(_bos(source))


def _is_chat(source: Source) -> bool:
    return not _asked(source).plain


def _bos(source: Source) -> str:
    bos = source.tokenizer.bos_id
    return "" if bos is None else source.tokenizer.decode([bos], True)


def _template(source: Source) -> ChatTemplate:
    return ChatTemplate(source.tokenizer)


# --- what a question becomes ---


def _asked(source: Source) -> Conversation:
    """A question of one mark, as `burnish generate` would ask it. Raises UserError for several columns."""
    data = source.recipe.data
    asked: Any = _MARK
    if source.format == "template" and data.prompt is not None:
        names = list(dict.fromkeys(fields(data.prompt)))
        if len(names) != 1:
            asked = {**dict.fromkeys(names, ""), _one_column(source, names): _MARK}
    return question(asked, data, source.format, source.chat)


def _one_column(source: Source, names: Sequence[str]) -> str:
    """The column that is asked, where the recipe's own questions leave all others empty."""
    given = [a for a in source.recipe.ask if not isinstance(a, str)]
    used = [n for n in names if any(a.get(n, "").strip() for a in given)]
    if len(used) != 1:
        raise UserError(
            f"data.prompt has the columns {', '.join(names) or '(none)'}, and Ollama's prompt is one text",
            _ELSEWHERE,
        )
    return used[0]


def _around(source: Source) -> tuple[str, str]:
    """What the recipe's prompt writes before and after a question."""
    parts = _asked(source).turns[-1].content.split(_MARK)
    if len(parts) != 2:
        raise UserError("data.prompt names its column more than once, and Ollama's once", _ELSEWHERE)
    return parts[0], parts[1]


def _plain(source: Source) -> _Written:
    """A template of one prompt; training's own begins with BOS, which llama.cpp adds by itself."""
    before, after = _around(source)
    notes = ["Training knew one question at a time; in a chat, Ollama puts the earlier ones before it."]
    data = source.recipe.data
    names = list(dict.fromkeys(fields(data.prompt))) if data.prompt and source.format == "template" else []
    if len(names) > 1:
        notes.append(f"What is asked is the column {_one_column(source, names)}; the others stay empty.")
    template = f"{literal(before)}{{{{ .Prompt }}}}{literal(after)}"
    for trial in _TRIALS:
        got = ollama_prompt(parse(template), [{"role": "user", "content": trial}])
        _compare(before + trial + after, got, "a question")
    return _Written(template, None, tuple(notes))


# --- chat ---


def _chat(source: Source) -> _Written:
    template = _template(source)
    texts = _between(template)
    system, notes = source.system or "", list(_notes(source, template))
    if system and ("", "system") not in texts:
        raise UserError(
            f"the run's system prompt cannot be written for Ollama: {_why_no_system(template)}", _ELSEWHERE
        )
    if _trims(template, "system"):
        system = system.strip()
    before, after = _around(source)
    if _trims(template, "user"):
        before, after = before.lstrip(), after.rstrip()
    inside = system if system and quoted(system) is None else ""
    if inside:
        notes.append("SYSTEM cannot hold this run's system prompt, so the template does, for chats without.")
        for role in ("user", "assistant"):
            if ("system", role) in texts:
                texts["", role] = texts["", "system"] + system + texts["system", role]
    for (prior, role), text in list(texts.items()):  # what the recipe's prompt writes around a question
        text = (after if prior == "user" else "") + text + (before if role == "user" else "")
        texts[prior, role] = text
    if adds_bos(source):
        for role in _ROLES.values():
            if ("", role) in texts:
                texts["", role] = texts["", role].removeprefix(_bos(source))
    written = _Written(_go(texts), None if inside else system or None, tuple(notes))
    _prove(source, written, ("", "system") in texts)
    return written


def _between(template: ChatTemplate) -> dict[tuple[str, str], str]:
    """What is written between a turn and the next, by their roles; "" before the first, and after the last.

    Raises UserError where that depends on more than those.
    """
    texts: dict[tuple[str, str], str] = {}
    for shape in _USUAL:
        _add(texts, _read(template, shape), shape)
    try:
        found = dict(texts)
        for shape in _WITH_SYSTEM:
            _add(found, _read(template, shape), shape)
        texts = found
    except UserError:
        pass  # it takes no system prompt, or at some other place; `_chat` says so where the run has one
    for shapes in _RARE:
        found = dict(texts)
        try:
            for shape in shapes:
                _add(found, _read(template, shape), shape)
        except UserError:
            continue
        texts = found
    for prior in ("", "system"):
        # Ollama cuts a long chat at its beginning, and then an answer may come first: to an empty question.
        if (prior, "user") in texts:
            texts.setdefault((prior, "assistant"), texts[prior, "user"] + texts["user", "assistant"])
    return texts


def _read(template: ChatTemplate, shape: str) -> dict[tuple[str, str], str]:
    turns = [Turn(_ROLES[c], c) for c in shape]
    try:
        frame = template.frame(turns, ask=True)
    except (Unproven, Refused) as e:
        raise UserError(f"the chat template does not take such a chat: {e}", _ELSEWHERE) from e
    if [i for i, _ in frame.slots] != list(range(len(turns))):
        raise UserError("the chat template puts its texts in another order than they are given", _ELSEWHERE)
    roles = ["", *(t.role for t in turns), ""]
    found: dict[tuple[str, str], str] = {}
    for prior, role, text in zip(roles, roles[1:], frame.texts, strict=False):
        _add(found, {(prior, role): text}, shape)
    return found


def _add(texts: dict[tuple[str, str], str], more: dict[tuple[str, str], str], shape: str) -> None:
    for key, text in more.items():
        if texts.setdefault(key, text) != text:
            raise UserError(
                f"the chat template writes {texts[key]!r:.60} or {text!r:.60} between {key[0] or 'nothing'} "
                f"and {key[1] or 'the answer'}, by what stands elsewhere (in a chat of {shape}); Ollama's "
                "template would need to know where",
                _ELSEWHERE,
            )


def _why_no_system(template: ChatTemplate) -> str:
    try:
        _add(_read(template, "su"), _read(template, "suau"), "suau")
    except UserError as e:
        return e.message
    return "the chat template writes it at another place in a longer chat"


def _go(texts: dict[tuple[str, str], str]) -> str:
    """The texts as a Go template. `$before` is the role of the message before."""
    parts = ['{{- $before := "" }}\n{{- range .Messages }}\n']
    for n, role in enumerate(_ROLES.values()):
        known = {prior: text for (prior, now), text in texts.items() if now == role}
        choices = [
            (f'eq $before "{prior}"' if prior else "not $before", literal(t)) for prior, t in known.items()
        ]
        reason = f"no {role} message here" if known else f"no {role} message"
        tests = "".join(
            f"{{{{ {'else ' * (k > 0)}if {when} }}}}{text}" for k, (when, text) in enumerate(choices)
        )
        body = f"{tests}{{{{ else }}}}{_refusal(reason)}{{{{ end }}}}" if known else _refusal(reason)
        parts.append(f'{{{{- {"else " * (n > 0)}if eq .Role "{role}" }}}}{body}\n')
    parts.append(
        f"{{{{- else }}}}{_refusal('no tools')}\n{{{{- end }}}}{{{{ .Content }}}}{{{{ $before = .Role }}}}\n"
    )
    parts.append(f'{{{{- end }}}}{{{{ if eq $before "user" }}}}{literal(texts["user", ""])}{{{{ end }}}}')
    return "".join(parts)


def _refusal(reason: str) -> str:
    """Ends the rendering with an error, as training's template does; Go has no other way to say so."""
    return f"{{{{ index {string(reason)} 999 }}}}"


def _trims(template: ChatTemplate, role: str) -> bool:
    """Whether the template removes white space around such a text."""
    shape = {"system": "su", "user": "u", "assistant": "uau"}[role]
    turns = [Turn(_ROLES[c], f" {c} ") for c in shape]
    try:
        return f" {role[0]} " not in template.prompt(Conversation(tuple(turns), False, "probe")).text
    except Unproven:
        return False


def _notes(source: Source, template: ChatTemplate) -> Iterator[str]:
    if "tools" in source.tokenizer.template:
        yield "Tools are left out: the model knows them as training's template writes them, Ollama does not."
    if _trims(template, "user") or _trims(template, "assistant"):
        yield "Training's template removes white space around a text, which Ollama's cannot: send it without."
    thought = "<think>\nr\n</think>\n\na"
    try:
        kept = thought in template.prompt(_talk("uau", thought)).text
    except Unproven:
        kept = False
    if not kept and "think" in source.tokenizer.template:
        yield "Training's template cuts reasoning out of earlier answers, which Ollama's cannot: send none."


# --- the proof ---


def _talk(shape: str, answer: str = "a", text: str = "u") -> Conversation:
    said = {"a": answer, "s": f"Be brief. {text}", "u": text}
    return Conversation(tuple(Turn(_ROLES[c], said[c]) for c in shape), False, "probe")


def _prove(source: Source, written: _Written, takes_system: bool) -> None:
    """Ollama's prompts and training's, of several chats, are the same text. Raises UserError."""
    template, go = _template(source), parse(written.template)
    before, after = _around(source)
    skip = _bos(source) if adds_bos(source) else ""
    for shape in (*_USUAL, *_WITH_SYSTEM * takes_system):
        for trial in _TRIALS:
            chat = _talk(shape, "Because, 因为 {{ it }}.", trial)
            messages = [{"role": t.role, "content": t.content} for t in chat.turns]
            own = source.system and chat.turns[0].role != "system"
            if own and written.system:
                messages.insert(0, {"role": "system", "content": written.system})
            trained = [Turn(t.role, before + trial + after) if t.role == "user" else t for t in chat.turns]
            if own:
                trained.insert(0, Turn("system", source.system or ""))
            try:
                want = template.prompt(Conversation(tuple(trained), False, "probe")).text
                got = ollama_prompt(go, messages)
            except (Unproven, TemplateError) as e:
                raise UserError(f"no template for Ollama could be written: {e}", _ELSEWHERE) from e
            _compare(want.removeprefix(skip), got, f"a chat of {shape}")


def _compare(want: str, got: str, what: str) -> None:
    if want == got:
        return
    n = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    raise UserError(
        f"Ollama's template would not write the prompt of training for {what}: expected "
        f"{want[n : n + 40]!r}, got {got[n : n + 40]!r} after {want[max(0, n - 20) : n]!r}",
        _ELSEWHERE,
    )


# --- the rest of the file ---


def _parameters(source: Source) -> Iterator[tuple[str, str]]:
    recipe, tokenizer = source.recipe, source.tokenizer
    how = recipe.generation
    ends = [tokenizer.decode([i], True) for i in tokenizer.stop_ids]
    for text in dict.fromkeys([*ends, *how.stop]):
        if text:
            yield "stop", _quoted(text, "a text of generation.stop")
    yield "temperature", "0" if how.greedy else _number(how.temperature)
    if not how.greedy:
        yield "top_p", _number(how.top_p)
        yield "top_k", str(how.top_k)
    yield "repeat_penalty", _number(how.repetition_penalty)
    if how.repetition_penalty != 1:
        yield "repeat_last_n", "-1"  # burnish's looks at the whole context
    wanted = max(_CONTEXT, recipe.train.max_length + how.max_new_tokens)
    yield "num_ctx", str(min(wanted, source.base.max_positions or wanted))
    yield "num_predict", str(how.max_new_tokens)
    yield "seed", str(how.seed)


def _number(value: float) -> str:
    return f"{value:.10g}"


def _quoted(text: str, what: str) -> str:
    found = quoted(text)
    if found is None:
        odd = next((c for c in text if not c.isprintable() and c not in "\n\r\t"), None)
        why = f"it holds U+{ord(odd):04X}, which Ollama drops" if odd else "a line of it ends with quotes"
        raise UserError(f"{what} cannot be written in a Modelfile: {why}: {text!r:.60}", _ELSEWHERE)
    return found


def _license(source: Source) -> str | None:
    """The base's own licence, from its folder; None where there is none, or a Modelfile cannot hold it."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        path = source.base.folder / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
            return quoted("".join(c for c in text if c.isprintable() or c in "\n\t").strip())
    return None
