"""Modelfiles: Ollama's prompts are training's, and what cannot be so is refused; so are broken files.

The oracle of the prompts is transformers alone, on the tokenizer that training chose. For Ollama itself,
burnish's own readers of its Modelfile and of Go's templates stand in.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats import question, takes_chat
from burnish.data.render import Renderer
from burnish.data.training_template import choose, ending
from burnish.errors import UserError
from burnish.export import ollama
from burnish.export.go_template import TemplateError, ollama_prompt, parse
from burnish.export.modelfile import parse_modelfile, quoted
from burnish.export.ollama import adds_bos, check_ollama, modelfile
from burnish.export.source import Source
from burnish.models.spec import read_spec
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.recipe import Recipe, load
from tests.data import templates
from tests.data.templates import SMOL, carrying, says, served, talk, user
from tests.tiny import tiny_model, tiny_tokenizer

STOCK = templates.stock_templates()
needs_trl = pytest.mark.skipif(not STOCK, reason=templates.NO_TRL)
needs_smol = pytest.mark.skipif(not SMOL.is_dir(), reason="SmolLM2 is not there: examples/fetch_smollm2.py")
# Their templates take texts only as lists of parts.
NOT_TEXT = {"idefics3", "llava_next", "smolvlm"}
NO_SYSTEM = {"gemma"}
AWKWARD = (
    '{{ .Prompt }} {% x %} {{"{{"}} "yes" \'no\' """\n\n\\n C:\\new\t{y}\n  <b>为什么？</b>\u3000🙂\u200d.'
)
CHATS = {
    "one": talk(user("Why?")),
    "awkward": talk(user(AWKWARD)),
    "awkward answers": talk(user("Why?"), says(f"Well: {AWKWARD}"), user(AWKWARD)),
    "three": talk(user("Why?"), says("Because."), user("And?"), says("So."), user("Then?")),
    "system": talk(Turn("system", f"Be {AWKWARD}"), user("Why?")),
    "system, three": talk(Turn("system", "Be brief."), user("Why?"), says("Because."), user("And?"),
                          says("So."), user("Then?")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


def _source(
    model: Path, tokenizer: Tokenizer, recipe: Recipe | None = None, format: str = "messages", **changes: Any
) -> Source:
    recipe = recipe or Recipe()
    chat = takes_chat(recipe.data, tokenizer.has_chat_template) and format not in ("text", "code")
    made = Source(
        model, "tiny", recipe, model, read_spec(model), ending(tokenizer), format, chat, recipe.data.system
    )
    return replace(made, **changes)


def _recipe(**data: Any) -> Recipe:
    return Recipe.model_validate({"data": data})


def _values(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for i in parse_modelfile(text):
        found.setdefault(i.key or i.name, []).append(i.value)
    return found


def _asked(text: str, conversation: Conversation) -> str:
    """The prompt of a Modelfile, as Ollama makes it: SYSTEM stands first in chats that have none."""
    values = _values(text)
    messages = [{"role": t.role, "content": t.content} for t in conversation.turns]
    if "SYSTEM" in values and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": values["SYSTEM"][0]})
    return ollama_prompt(parse(values["TEMPLATE"][0]), messages)


def _tokens(source: Source, text: str) -> list[int]:
    """As llama.cpp tokenizes a prompt: BOS by itself, where the GGUF says so."""
    bos = source.tokenizer.bos_id
    first = [bos] if bos is not None and adds_bos(source) else []
    return first + source.tokenizer.encode(text)


def _with(conversation: Conversation, system: str | None) -> Conversation:
    if not system or conversation.turns[0].role == "system":
        return conversation
    return replace(conversation, turns=(Turn("system", system), *conversation.turns))


# --- the prompts ---


@needs_trl
@pytest.mark.parametrize("name", [n for n in STOCK if n not in NOT_TEXT])
@pytest.mark.parametrize("system", [None, 'Be brief.\nAnd "kind" to {{ all }}.', 'a\u3000b"""\n'])
def test_prompts_are_those_of_transformers(folder: Path, model: Path, name: str, system: str | None) -> None:
    tokenizer = carrying(folder, STOCK[name], name)
    tokenizer.stop_ids = tuple(i for i in tokenizer.stop_ids if i is not None)
    source = _source(model, tokenizer, _recipe(system=system))
    if system and name in NO_SYSTEM:
        with pytest.raises(UserError, match="System role not supported"):
            check_ollama(source)
        return
    text = modelfile(source, "m.gguf")
    for case, chat in CHATS.items():
        if name in NO_SYSTEM and chat.turns[0].role == "system":
            with pytest.raises(TemplateError, match="out of range"):
                _asked(text, chat)
            continue
        assert _tokens(source, _asked(text, chat)) == served(tokenizer, _with(chat, system), True), case


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1_distill", "glm4moe", "qwen3_5_think", "gemma"])
@pytest.mark.parametrize("inline", [True, False])
def test_prompts_of_templates_that_training_chose(folder: Path, model: Path, name: str, inline: bool) -> None:
    answer = says("<think>\nHm.\n</think>\n\nA.") if inline else says("A.", "Hm.")
    tokenizer = carrying(folder, STOCK[name], name)
    chosen = choose(tokenizer, [talk(user("Why?"), answer, user("And?"), answer)]).tokenizer
    source = _source(model, chosen)
    text = modelfile(source, "m.gguf")
    for chat in (CHATS["awkward"], CHATS["three"]):
        assert _tokens(source, _asked(text, chat)) == Renderer(chosen, "assistant").prompt(chat)


@needs_smol
def test_smollm2_with_the_demo_recipe() -> None:
    tokenizer = load_tokenizer(SMOL)
    recipe = load("demo")
    source = _source(SMOL, tokenizer, recipe)
    text = modelfile(source, "demo.gguf")
    values = _values(text)
    assert values["FROM"] == ["./demo.gguf"]
    assert values["SYSTEM"] == [recipe.data.system]
    assert values["stop"] == ["<|im_end|>"]
    assert (values["temperature"], values["num_predict"], values["num_ctx"]) == (["0"], ["48"], ["4096"])
    assert "top_p" not in values and "LICENSE" not in values
    for chat in CHATS.values():
        got = _tokens(source, _asked(text, chat))
        assert got == served(tokenizer, _with(chat, recipe.data.system), True)
        assert got[0] == tokenizer.encode("<|im_start|>")[0], (
            "its BOS opens every turn, and is not taken away"
        )


def test_bos_is_left_to_llama_cpp_where_it_is_added(folder: Path, model: Path) -> None:
    plain = load_tokenizer(folder, model=model)
    written = "{{ '<|endoftext|>' }}" + plain.template
    inner = cast(Any, plain)._inner
    inner.bos_token = "<|endoftext|>"
    for tokenizer, template, added, first in (
        (Tokenizer(inner, [2], adds_bos=True), written, True, "<|im_start|>"),
        (Tokenizer(inner, [2], adds_bos=False), written, False, "<|endoftext|>"),
        (Tokenizer(inner, [2], adds_bos=True), plain.template, False, "<|im_start|>"),
    ):
        source = _source(model, tokenizer.with_template(template))
        assert adds_bos(source) is added
        text = modelfile(source, "m.gguf")
        assert _asked(text, CHATS["one"]).startswith(first)
        assert _tokens(source, _asked(text, CHATS["three"])) == served(source.tokenizer, CHATS["three"], True)
    assert adds_bos(_source(model, Tokenizer(inner, [2], True), _recipe(chat_template="never"), "text"))


# --- plain prompts ---


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("text", {"answer_after": "\nA:"}),
        ("alpaca", {"chat_template": "never"}),
        ("prompt/completion", {"chat_template": "never", "system": "ignored, as in training"}),
        ("template", {"prompt": "{{{{ {q} }}}} Q: {q2}".replace("{q2}", "\u3000{{"), "completion": "{a}"}),
        ("template", {"prompt": '"""{q}"""\n{{', "completion": "{a}"}),
        ("template", {"prompt": "Order: {q}\n", "completion": "{a}", "chat_template": "always",
                      "system": "Be brief."}),
        ("template", load("medical-r1-14b").data.model_dump()),
        ("template", load("deepseek-coder-7b").data.model_dump()),
    ],
)  # fmt: skip
def test_a_prompt_is_what_generate_asks(folder: Path, model: Path, format: str, data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({"data": data, "ask": [{"instruction": "x", "input": ""}]})
    source = _source(model, load_tokenizer(folder, model=model), recipe, format)
    text = modelfile(source, "m.gguf")
    for asked in ("Why?", AWKWARD, "为什么？"):
        given: Any = (
            {"instruction": asked, "input": ""} if "{instruction}" in (recipe.data.prompt or "") else asked
        )
        want = question(given, recipe.data, format, source.chat)
        got = _asked(text, talk(user(asked)))
        plain = replace(want, markup=True) if want.plain else want  # Ollama reads control tokens in any text
        assert _tokens(source, got) == Renderer(source.tokenizer, "assistant").prompt(plain)
    assert ("SYSTEM" in _values(text)) == (recipe.data.chat_template == "always")


def test_prompts_of_several_columns_are_refused(folder: Path, model: Path) -> None:
    recipe = Recipe.model_validate(
        {"data": {"prompt": "{a} and {b}", "completion": "{c}"}, "ask": [{"a": "1", "b": "2"}]}
    )
    source = _source(model, load_tokenizer(folder, model=model), recipe, "template")
    with pytest.raises(UserError, match="columns a, b, and Ollama's prompt is one text"):
        check_ollama(source)
    twice = _source(model, source.tokenizer, _recipe(prompt="{a} {a}", completion="{c}"), "template")
    with pytest.raises(UserError, match="more than once"):
        check_ollama(twice)


# --- what cannot be written ---

_LAST = (  # as Mistral's: the system prompt stands in the last question
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and s %}{{ s }}\n{% endif %}{{ m.content }} [/INST]{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}"
)
_NUMBERED = (
    "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SHOUTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.replace('\\n', ' ') }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "system", "told"),
    [
        (_LAST, "Be brief.", "another order"),
        (_NUMBERED, None, "Ollama's template would need to know where"),
        (_SHOUTING, None, "changes the texts"),
    ],
)
def test_what_ollama_cannot_write_is_refused(
    folder: Path, model: Path, template: str, system: str | None, told: str
) -> None:
    tokenizer = load_tokenizer(folder, model=model).with_template(template)
    with pytest.raises(UserError, match=told):
        check_ollama(_source(model, tokenizer, _recipe(system=system)))


def test_a_system_prompt_that_is_not_the_runs_may_be_refused_later(folder: Path, model: Path) -> None:
    source = _source(model, load_tokenizer(folder, model=model).with_template(_LAST))
    text = modelfile(source, "m.gguf")
    assert _asked(text, CHATS["three"]).endswith("[INST] Then? [/INST]")
    with pytest.raises(TemplateError):
        _asked(text, CHATS["system"])


@needs_trl
def test_what_differs_is_said_in_comments(folder: Path, model: Path) -> None:
    def said(name: str) -> str:
        text = modelfile(_source(model, carrying(folder, STOCK[name], name)), "m.gguf")
        return "\n".join(line for line in text.split("FROM ")[0].split("\n"))

    assert "Tools are left out" in said("qwen2_5")
    assert "white space" in said("gemma3")
    assert "reasoning" in said("deepseek_r1_distill")
    assert said("phi3").count("#") == 1


def test_a_chat_that_ollama_cut_at_its_beginning_is_written(folder: Path, model: Path) -> None:
    strict = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        + load_tokenizer(folder, model=model).template
    )
    source = _source(model, load_tokenizer(folder, model=model).with_template(strict))
    cut = talk(says("Because."), user("And?"))
    assert _asked(modelfile(source, "m.gguf"), cut) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("wrong", [("user", "assistant"), ("assistant", "user"), ("user", "")])
def test_the_check_sees_a_wrong_text(
    folder: Path, model: Path, wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: a template that differs by one new line is not let through."""
    real = ollama._between
    monkeypatch.setattr(
        ollama, "_between", lambda t: {k: v + "\n" * (k == wrong) for k, v in real(t).items()}
    )
    with pytest.raises(UserError, match="would not write the prompt of training"):
        check_ollama(_source(model, load_tokenizer(folder, model=model)))


# --- parameters ---


def test_parameters_come_from_the_recipe(folder: Path, model: Path) -> None:
    how = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "seed": 7,
           "max_new_tokens": 99, "stop": ["\n\n", '"', "<|im_end|>", "结束 "]}  # fmt: skip
    recipe = Recipe.model_validate({"generation": how, "train": {"max_length": 8000}})
    source = _source(model, load_tokenizer(folder, model=model), recipe)
    values = _values(modelfile(source, "a b"))
    assert values["FROM"] == ["./a b.gguf"]
    assert values["stop"] == ["<|im_end|>", "\n\n", '"', "结束 "]
    one = {k: v[0] for k, v in values.items()}
    assert one["temperature"] == "0.3" and one["top_p"] == "0.9" and one["top_k"] == "20"
    assert one["repeat_penalty"] == "1.1" and one["repeat_last_n"] == "-1" and one["seed"] == "7"
    assert one["num_predict"] == "99"
    assert one["num_ctx"] == "256", "no more than the model has positions"
    long = replace(source, base=replace(source.base, max_positions=100_000))
    assert _values(modelfile(long, "m.gguf"))["num_ctx"] == ["8099"]
    odd = recipe.model_copy(
        update={"generation": recipe.generation.model_copy(update={"stop": ("a\u3000",)})}
    )
    with pytest.raises(UserError, match="U\\+3000"):
        check_ollama(replace(source, recipe=odd))


def test_the_bases_licence_goes_with_it(folder: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text('The "MIT" Licence\x0c\n\nDo as you like.\n')
    source = _source(model, load_tokenizer(folder, model=model))
    source = replace(source, base=replace(source.base, folder=tmp_path))
    assert _values(modelfile(source, "m.gguf"))["LICENSE"] == ['The "MIT" Licence\n\nDo as you like.']


# --- the grammar ---

GOOD = 'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER top_k 3\n'


def test_a_good_file_is_read() -> None:
    text = f'# a comment\n\n{GOOD}system Be "brief".\nMESSAGE user "Why?"\nLICENSE """a\n"b" c"""\nLICENSE d'
    found = [(i.name, i.key, i.value, i.line) for i in parse_modelfile(text)]
    assert found == [
        ("FROM", "", "./m.gguf", 3), ("TEMPLATE", "", "{{ .Prompt }}\n", 4),
        ("PARAMETER", "stop", "<|im_end|>", 6), ("PARAMETER", "top_k", "3", 7),
        ("SYSTEM", "", 'Be "brief".', 8), ("MESSAGE", "user", "Why?", 9),
        ("LICENSE", "", 'a\n"b" c', 10), ("LICENSE", "", "d", 12),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "1: expected a FROM line"),
        ("# nothing\n", "1: expected a FROM line"),
        ("\nTEMPLATE x\nFROM y\n", "2: expected FROM first, got TEMPLATE"),
        ("FROM\n", "1: FROM  has no value"),
        (GOOD + "TEMPERATURE 1\n", "6: expected one of"),
        (GOOD + "PARAMETER topk 3\n", "6: expected a parameter of"),
        (GOOD + "PARAMETER top_k 3.5\n", "6: top_k: expected a whole number, got '3.5'"),
        (GOOD + "PARAMETER temperature warm\n", "6: temperature: expected a number"),
        (GOOD + "PARAMETER temperature nan\n", "6: temperature: expected a finite number"),
        (GOOD + "PARAMETER temperature\n", "6: PARAMETER temperature has no value"),
        (GOOD + 'PARAMETER stop ""\n', "6: an empty stop"),
        (GOOD + 'SYSTEM """Be brief.\n', "6: the quotation of SYSTEM is not closed"),
        (GOOD + 'SYSTEM """Be brief.""\nLICENSE x\n', "6: the quotation of SYSTEM is not closed"),
        (GOOD + 'SYSTEM "Be brief.\n', "6: the quotation of SYSTEM is not closed"),
        (GOOD + 'SYSTEM """a"""\nb"""\n', "7: expected one of"),
        (GOOD + 'SYSTEM """a\nb\u3000"""\n', "7: Ollama drops the character U\\+3000"),
        (GOOD + "MESSAGE tool x\n", "6: expected a role of"),
        (GOOD + "TEMPLATE x\n", "6: a second TEMPLATE"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(UserError, match=f"Modelfile:{told}"):
        parse_modelfile(text)


def test_whatever_is_quoted_comes_back() -> None:
    draw, refused = random.Random(3), 0
    for _ in range(3000):
        text = "".join(draw.choice('""""a \n中\t\r') for _ in range(draw.randint(1, 9)))
        written = quoted(text)
        refused += written is None
        if written is not None and text.strip():
            found = parse_modelfile(f"FROM x\nSYSTEM {written}\nLICENSE y\n")
            assert [i.value for i in found] == ["x", text, "y"]
    assert 0 < refused < 1000
    assert quoted(' """\r""""') is None
    assert quoted('a"""\nb') is None, "a line that ends with the quotes closes them, and there is no escape"
    assert quoted("a\u200db") is None
