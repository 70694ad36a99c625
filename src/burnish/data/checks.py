"""What is better known before training: rows that repeat, validation rows that were trained on, secrets.

    prints = fingerprints(train)
    duplicates(prints)                            # Repeats: how many, and the first pairs of places
    overlap(prints, fingerprints(valid))
    secrets(train), emails(train)                 # Finding: counts and places, never the text itself

Nothing is removed here. The patterns want the shape that a real key has (its length, its digits), so that
`sk-learn` or `hf_hub_download` is no finding; a password in prose is not found at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from burnish.data.conversation import Conversation, Turn

SHOWN = 5  # places that a finding names


@dataclass(frozen=True)
class Fingerprint:
    """A conversation as two digests: equal where the turns are, but for white space."""

    at: str  # file:line
    whole: bytes
    question: bytes | None  # all before the last answer; None where nothing is asked, as in plain text


@dataclass(frozen=True)
class Repeats:
    """How many rows were there before, and the first of them as (file:line, file:line of the earlier one)."""

    count: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Overlap:
    """Validation rows found among the training rows: as they are, or with another answer."""

    whole: Repeats
    question_only: Repeats


@dataclass(frozen=True)
class Finding:
    """Something that should not be learnt: how often, in how many rows, and the first of these."""

    kind: str
    count: int
    rows: int
    places: tuple[str, ...]  # file:line


def fingerprints(conversations: Sequence[Conversation]) -> list[Fingerprint]:
    return [_fingerprint(c) for c in conversations]


def duplicates(prints: Sequence[Fingerprint]) -> Repeats:
    """Rows that say what an earlier row says."""
    first: dict[bytes, str] = {}
    pairs = []
    for p in prints:
        if p.whole in first:
            pairs.append((p.at, first[p.whole]))
        else:
            first[p.whole] = p.at
    return Repeats(len(pairs), tuple(pairs[:SHOWN]))


def overlap(train: Sequence[Fingerprint], valid: Sequence[Fingerprint]) -> Overlap:
    """Validation rows that are training rows, and others that ask what a training row asks."""
    whole: dict[bytes, str] = {}
    question: dict[bytes, str] = {}
    for p in train:
        whole.setdefault(p.whole, p.at)
        if p.question is not None:
            question.setdefault(p.question, p.at)
    same: list[tuple[str, str]] = []
    asked: list[tuple[str, str]] = []
    for p in valid:
        if p.whole in whole:
            same.append((p.at, whole[p.whole]))
        elif p.question is not None and p.question in question:
            asked.append((p.at, question[p.question]))
    return Overlap(Repeats(len(same), tuple(same[:SHOWN])), Repeats(len(asked), tuple(asked[:SHOWN])))


def secrets(conversations: Sequence[Conversation]) -> tuple[Finding, ...]:
    """Keys, tokens and private keys by kind; kinds that are absent are left out."""
    return _find(conversations, _SECRETS)


def emails(conversations: Sequence[Conversation]) -> Finding:
    """E-mail addresses, but for those at the example.com that is nobody's."""
    found = _find(conversations, _EMAIL)
    return found[0] if found else Finding("e-mail address", 0, 0, ())


def _fingerprint(conversation: Conversation) -> Fingerprint:
    turns = conversation.turns
    last = max((i for i, t in enumerate(turns) if t.role == "assistant"), default=len(turns))
    digest = hashlib.blake2b(digest_size=16)
    for turn in turns[:last]:
        _feed(digest, turn)
    asks = any(t.role in ("user", "tool") and t.content.strip() for t in turns[:last])
    question = digest.digest() if asks and last < len(turns) else None
    for turn in turns[last:]:
        _feed(digest, turn)
    return Fingerprint(conversation.at, digest.digest(), question)


def _feed(digest: hashlib.blake2b, turn: Turn) -> None:
    texts = (turn.role, turn.content, turn.reasoning, *(x for c in turn.calls for x in (c.name, c.arguments)))
    whole = "\x1f".join(" ".join(text.split()) for text in texts) + "\x1e"
    digest.update(whole.encode("utf-8", "surrogatepass"))


# kind → (what every one of them contains, so that most texts cost one substring search; its whole shape)
_Patterns = Mapping[str, tuple[tuple[str, ...], re.Pattern[str]]]


def _shape(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{pattern})", re.ASCII)


_SECRETS: _Patterns = {
    "AWS access key": (("AKIA",), _shape(r"AKIA(?![A-Z0-9]*EXAMPLE)[A-Z0-9]{16}(?!\w)")),
    "Anthropic key": (("sk-ant-",), _shape(r"sk-ant-(?=[\w-]{24})[\w-]*?(?=[A-Za-z]*\d)[A-Za-z0-9]{12}")),
    "sk- key (OpenAI and others)": (
        ("sk-",),
        _shape(r"sk-(?!ant-)(?=[\w-]{20})[\w-]*?(?=[A-Za-z]*\d)[A-Za-z0-9]{16}"),
    ),
    "GitHub token": (("ghp_", "github_pat_"), _shape(r"ghp_[A-Za-z0-9]{36}|github_pat_\w{40}")),
    "Hugging Face token": (("hf_",), _shape(r"hf_[A-Za-z0-9]{30}")),
    "Google API key": (("AIza",), _shape(r"AIza[\w-]{35}")),
    "Slack token": (("xox",), _shape(r"xox[abeoprs]-\d[A-Za-z0-9-]{9}")),
    "JSON web token": (("eyJ",), _shape(r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8}")),
    "private key": (
        ("PRIVATE KEY",),
        re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    ),
}
# One character before the @ is enough to count an address, and keeps long words without one cheap.
_EMAIL: _Patterns = {
    "e-mail address": (
        ("@",),
        re.compile(
            r"[\w%+-](?<!\bgit)@(?!(?:[\w-]+\.)*example\.)(?:[A-Za-z0-9-]+\.)+"
            r"(?!(?:png|jpe?g|gif|svg|webp)\b)[A-Za-z]{2,}",
            re.ASCII,
        ),
    )
}


def _find(conversations: Sequence[Conversation], patterns: _Patterns) -> tuple[Finding, ...]:
    counts = dict.fromkeys(patterns, 0)
    places: dict[str, list[str]] = {kind: [] for kind in patterns}
    for conversation in conversations:
        text = "\n".join(_texts(conversation))
        for kind, (needles, pattern) in patterns.items():
            if not any(needle in text for needle in needles):
                continue
            n = sum(1 for _ in pattern.finditer(text))
            if n:
                counts[kind] += n
                places[kind].append(conversation.at)
    return tuple(Finding(k, n, len(places[k]), tuple(places[k][:SHOWN])) for k, n in counts.items() if n)


def _texts(conversation: Conversation) -> Iterator[str]:
    for turn in conversation.turns:
        yield turn.content
        if turn.reasoning:
            yield turn.reasoning
        for call in turn.calls:
            yield call.arguments
    yield from conversation.tools
