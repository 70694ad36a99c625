"""Repeats, overlap, secrets and addresses; the secrets are made up, and joined so that none stands here."""

from __future__ import annotations

import pytest

from burnish.data.checks import SHOWN, duplicates, emails, fingerprints, overlap, secrets
from burnish.data.conversation import Conversation, ToolCall, Turn


def chat(*texts: str, at: str = "a:1", plain: bool = False) -> Conversation:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    return Conversation(tuple(Turn(roles[i % 2], t) for i, t in enumerate(texts)), plain, at)


def rows(*pairs: tuple[str, str], file: str = "train") -> list[Conversation]:
    return [chat(q, a, at=f"{file}:{n}") for n, (q, a) in enumerate(pairs, 1)]


def test_duplicates_are_the_rows_after_the_first():
    found = duplicates(fingerprints(rows(("a", "b"), ("c", "d"), (" a\n", "b "), ("a", "b"))))
    assert found.count == 2
    assert found.pairs == (("train:3", "train:1"), ("train:4", "train:1"))


def test_rows_on_one_line_can_repeat_one_another():
    one = chat("a", "b", at="f:1")
    assert duplicates(fingerprints([one, one])).pairs == (("f:1", "f:1"),)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("a", "b"), chat("a", "B")),
        (chat("a b", "c"), chat("a", "b c")),
        (chat("ab", "c"), chat("a b", "c")),
        (chat("a", "b"), Conversation((Turn("system", "a"), Turn("assistant", "b")), False, "")),
        (chat("a", "b"), chat("a", "b", "a", "b")),
        (chat("a", "b"), Conversation((Turn("user", "a"), Turn("assistant", "b", "hm")), False, "")),
        (chat("a", "bc"), Conversation((Turn("user", "a"), Turn("assistant", "b", "c")), False, "")),
        (
            Conversation((Turn("user", "a"), Turn("assistant", calls=(ToolCall("f", "{}"),))), False, ""),
            Conversation((Turn("user", "a"), Turn("assistant", calls=(ToolCall("g", "{}"),))), False, ""),
        ),
    ],
)
def test_what_differs_is_no_duplicate(one: Conversation, other: Conversation):
    a, b = fingerprints([one, other])
    assert a.whole != b.whole


def test_many_duplicates_are_all_counted_and_a_few_named():
    found = duplicates(fingerprints(rows(*[("a", "b")] * 30)))
    assert (found.count, len(found.pairs)) == (29, SHOWN)


def test_overlap_by_the_whole_and_by_the_question():
    train = fingerprints(rows(("a", "1"), ("b", "2"), ("c", "3")))
    valid = fingerprints(rows(("b", "2"), ("c", "other"), ("d", "4"), file="valid"))
    found = overlap(train, valid)
    assert found.whole.count == 1 and found.whole.pairs == (("valid:1", "train:2"),)
    assert found.question_only.count == 1 and found.question_only.pairs == (("valid:2", "train:3"),)


def test_the_question_is_everything_before_the_last_answer():
    train = fingerprints([chat("a", "b", "c", "d")])
    assert overlap(train, fingerprints([chat("a", "b", "c", "e")])).question_only.count == 1
    assert overlap(train, fingerprints([chat("a", "x", "c", "e")])).question_only.count == 0
    assert overlap(train, fingerprints([chat("a", "b")])).question_only.count == 0


def test_plain_texts_share_no_question():
    train, valid = (
        fingerprints([chat("", "text one", plain=True)]),
        fingerprints([chat("", "two", plain=True)]),
    )
    assert train[0].question is None
    assert overlap(train, valid).question_only.count == 0


LETTERS = "aB3dE5gH1jK7mN9pQ2sT4vW6yZ8"  # no key of anyone's
SECRETS = {
    "AWS access key": "AKIA" + "QX7RT2LMNB4CVZ5D",
    "Anthropic key": "sk-ant-" + "api03-" + LETTERS * 3,
    "sk- key (OpenAI and others)": "sk-" + "proj-" + LETTERS * 2,
    "GitHub token": "ghp_" + (LETTERS * 2)[:36],
    "Hugging Face token": "hf_" + (LETTERS * 2)[:34],
    "Google API key": "AIza" + (LETTERS * 2)[:35],
    "Slack token": "xoxb-" + "123456789012-" + LETTERS,
    "JSON web token": "eyJ" + LETTERS + ".eyJ" + LETTERS + "." + LETTERS,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("frame", ["{}", 'key = "{}"', "说{}。", "a\n{}\nb", "TOKEN={},"])
def test_a_secret_is_found_once_under_its_kind(kind: str, frame: str):
    (found,) = secrets([chat("q", frame.format(SECRETS[kind]), at="f:7"), chat("q", "nothing")])
    assert (found.kind, found.count, found.rows, found.places) == (kind, 1, 1, ("f:7",))
    assert SECRETS[kind] not in repr(found)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("GitHub token", "github_pat_" + LETTERS + "_" + LETTERS),
        ("sk- key (OpenAI and others)", "sk-" + "0123456789abcdef" * 2),
        ("private key", "-----BEGIN " + "PRIVATE KEY-----"),
        ("private key", "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----"),
    ],
)
def test_other_shapes_of_a_secret(kind: str, text: str):
    assert [f.kind for f in secrets([chat("q", text)])] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "a risk-based approach to task-oriented-dialogue-systems-2023-and-more",
        "sk-learn-compatible-estimators-for-everyone-in-2024", "sk-internationalization-of-everything-2",
        "#sk-container-id-12 div.sk-estimator-doc-link-fitted",
        "from huggingface_hub import hf_hub_download, hf_" + "transfer",
        "sk-..., sk-" + "xxxx", "AKIAIOSFODNN7EXAMPLE", "AKIA", "xoxb-your-token-here", "ghp_xxx",
        "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "eyJ is how base64 of a JSON begins",
        "password = hunter2",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_none(text: str):
    assert secrets([chat("q", text)]) == ()


def test_secrets_are_found_wherever_a_row_holds_text():
    key = SECRETS["Hugging Face token"]
    turns = (Turn("user", "q"), Turn("assistant", "a", key, (ToolCall("f", f'{{"k": "{key}"}}'),)))
    (found,) = secrets([Conversation(turns, False, "f:1", (f'{{"note": "{key}"}}',))])
    assert (found.count, found.rows) == (3, 1)


def test_many_secrets_are_all_counted_and_a_few_named():
    key = SECRETS["Google API key"]
    (found,) = secrets([chat("q", f"{key} {key}", at=f"f:{n}") for n in range(20)])
    assert (found.count, found.rows, len(found.places)) == (40, 20, SHOWN)


def test_addresses_are_counted_by_row():
    said = ["ann@firm.co.uk and bob.b+x@mail.org", "no one", "写信给li@qq.com吧"]
    found = emails([chat("q", text, at=f"f:{n}") for n, text in enumerate(said, 1)])
    assert (found.count, found.rows, found.places) == (3, 2, ("f:1", "f:3"))


@pytest.mark.parametrize(
    "text",
    [
        "@app.route('/')", "npm i react@18.2.0", "icon@2x.png", "git@github.com:a/b", "user@example.com",
        "a@b", "me@mail.example.org", "x @ y.com",
    ],
)  # fmt: skip
def test_what_only_looks_like_an_address_is_none(text: str):
    assert emails([chat("q", text)]).count == 0
