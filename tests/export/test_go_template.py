"""The reader of Go templates: what Go prints for each, and where it stops."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.export.go_template import TemplateError, literal, ollama_prompt, parse, string

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And?"},
]
DATA: dict[str, Any] = {
    "System": "S", "Prompt": "", "N": 3, "Yes": True, "No": False,
    "Messages": [{"Role": "user", "Content": "u"}, {"Role": "assistant", "Content": "é"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{ .System }} b", "a S b"),
        ("a \n{{- .System -}} \n b", "aSb"),
        ("a {{-  .System }} b", "aS b"),
        ("{{ 3 }}{{ -3 }}{{ true }}{{.No}}", "3-3truefalse"),
        ('{{ "a\\n\\"\\u4e2d\\x41\\\\" }}{{ `a\\n"` }}', 'a\n"中A\\a\\n"'),
        ("a{{/* not\nthis */}}b {{- /* nor this */ -}} c", "abc"),
        ("{{ if .System }}1{{ else }}2{{ end }}{{ if .Prompt }}3{{ end }}", "1"),
        ("{{ if .Prompt }}1{{ else if eq .N 3 }}2{{ else }}3{{ end }}", "2"),
        ("{{ if .Prompt }}1{{ else if eq .N 4 }}2{{ else }}3{{ end }}", "3"),
        ("{{ range .Messages }}[{{ .Role }} {{ $.System }}]{{ end }}", "[user S][assistant S]"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Content }}{{ .Content }}{{ end }}", "0uu1éé"),
        ("{{ range $m := .Messages }}{{ $m.Role }}{{ break }}{{ end }}", "user"),
        ("{{ range .Messages }}{{ if eq .Role `user` }}{{ continue }}{{ end }}{{ .Role }}{{ end }}",
         "assistant"),
        ("{{ range slice .Messages 2 }}a{{ else }}none{{ end }}", "none"),
        ("{{ with .System }}{{ . }}{{ end }}{{ with .Prompt }}a{{ else }}b{{ end }}", "Sb"),
        ('{{ $b := "" }}{{ range .Messages }}{{ $b }}-{{ $b = .Role }}{{ end }}{{ $b }}', "-user-assistant"),
        ("{{ $b := 1 }}{{ if .Yes }}{{ $b := 2 }}{{ $b }}{{ end }}{{ $b }}", "21"),
        ("{{ len .Messages }}{{ len (index .Messages 1).Content }}", "22"),  # bytes, as Go counts
        ("{{ index .Messages 0 | len }}{{ (index .Messages 0).Role }}", "2user"),
        ("{{ eq .N 1 2 3 }}{{ ne .N 3 }}{{ lt 1 2 }}{{ le 2 2 }}{{ gt 1 2 }}{{ ge 1 2 }}",
         "truefalsetruetruefalsefalse"),
        ("{{ and .System .N }}{{ and .Prompt .N }}{{ or .Prompt .N }}{{ not .Prompt }}", "33true"),
        ("{{ and .No (index .Messages 9) }}{{ or .Yes (index .Messages 9) }}", "falsetrue"),
        ("{{ if eq (len (slice $.Messages 1)) 1 }}last{{ end }}", "last"),
        ('{{ .N | eq 3 }}{{ json "a\\"" }}', 'true"a\\""'),
        ("a } }} {b", "a } }} {b"),
    ],
)  # fmt: skip
def test_it_prints_what_go_prints(template: str, text: str) -> None:
    assert parse(template).render(DATA) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("a\n {{ if .A }}b", "2:5: this has no"),
        ("a\n{{ end }}", "2:4: {{ end }} without"),
        ("{{ else }}", "1:4: {{ else }} without"),
        ("{{ if .A }}{{ else }}{{ else }}{{ end }}", "1:25: {{ else }} without"),
        ("{{ .A", "1:6: this action is not closed"),
        ("{{ }}", "1:1: an empty action"),
        ("{{{ .A }}", "1:3: not understood"),
        ('{{ "a\n" }}', "1:4: not understood"),
        ('{{ "\\q" }}', "1:4: unknown escape"),
        ("{{ $x }}", "1:4: undefined variable $x"),
        ("{{ if .A }}{{ $x := 1 }}{{ end }}{{ $x }}", "1:37: undefined variable"),
        ("{{ $x = 1 }}", "undefined variable $x"),
        ("\n{{ upper .A }}", "2:4: function 'upper' is not defined"),
        ("{{ .A .B }}", "1:4: what is no function"),
        ("{{ (eq .A 1 }}", "1:4: a bracket is not closed"),
        ("{{ .A) }}", "')' does not belong here"),
        ("{{ .A | }}", "a value is missing"),
        ("{{ if }}{{ end }}", "a value is missing"),
        ("{{ break }}", "inside a range"),
        ("{{ template `x` }}", "template is not known"),
        ("{{ .A := 1 }}", "only a variable"),
        ("{{ range .A }}{{ else if .B }}{{ end }}", "only `if` may follow"),
    ],
)
def test_what_is_no_template_is_told_with_its_place(template: str, error: str) -> None:
    with pytest.raises(TemplateError) as e:
        parse(template)
    assert error in str(e.value)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("\n {{ .Nowhere }}", "2:5: there is no .Nowhere"),
        ("{{ range .Messages }}{{ .System }}{{ end }}", "1:25: there is no .System"),
        ("{{ index .Messages 2 }}", "1:4: index: out of range: 2"),
        ('{{ index "no tools" 999 }}', "out of range: 999"),
        ("{{ eq .N `3` }}", "incompatible types"),
        ("{{ .Messages }}", "cannot be printed"),
        ("{{ range .System }}{{ end }}", "range wants a list"),
        ("{{ len .N }}", "len: "),
        ("{{ eq .N }}", "wants two values"),
    ],
)
def test_what_fails_while_it_runs_is_told_with_its_place(template: str, error: str) -> None:
    with pytest.raises(TemplateError) as e:
        parse(template).render(DATA)
    assert error in str(e.value)


@pytest.mark.parametrize(
    "text",
    ["{", "{{", "{{{", "a {", "{\n", '"""', 'a""', "}}", "{{ .A }}", "  a \n", "\t\r\n", "a\u3000b\xa0\u200d",
     "中文｜▁", "\\n", '{{ "x" }}', "", "🙂\x00", "{%- x -%}"],
)  # fmt: skip
def test_a_literal_writes_its_text(text: str) -> None:
    source = f"{literal(text)}{{{{ .A }}}}{literal(text)}"
    assert parse(source).render({"A": "|"}) == f"{text}|{text}"
    assert all(c.isprintable() or c == "\n" for c in source)
    assert '"""' not in source
    assert parse(f"{{{{ {string(text)} }}}}").render({}) == text


def test_ollama_gives_messages_and_joins_neighbours() -> None:
    # ChatML, as Ollama's documentation has it
    chatml = parse(
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    )
    twice = [*TALK, {"role": "user", "content": "Well?"}]
    assert ollama_prompt(chatml, twice) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>user\nAnd?\n\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = parse("{{ .System }}|{{ range .Messages }}{{ end }}")
    assert ollama_prompt(system, [*TALK, {"role": "system", "content": "Now."}]) == "Be brief.\n\nNow.|"


def test_ollama_runs_a_template_without_messages_for_each_question() -> None:
    old = parse(
        "{{ if .System }}<s>{{ .System }}{{ end }}{{ if .Prompt }}<u>{{ .Prompt }}{{ end }}"
        "<a>{{ .Response }}<e>"
    )
    assert ollama_prompt(old, TALK) == "<s>Be brief.<u>Why?<a>Because.<e><u>And?<a>"
    assert ollama_prompt(parse("Q: {{ .Prompt }}\nA:"), TALK) == "Q: Why?\nA:Because.Q: And?\nA:"
