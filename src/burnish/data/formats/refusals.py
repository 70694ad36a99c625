"""Files that hold something else than answers to learn, refused by name with what to do instead.

The way past a refusal is data.columns, or templates: who names the columns has decided.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from burnish.data.formats.columns import match, one
from burnish.data.formats.values import File, listed
from burnish.data.rows import Row
from burnish.errors import UserError

_ANSWERS = (
    "messages", "conversations", "conversation", "completion", "response", "output", "answer", "solution"
)  # fmt: skip
_SCORES = (
    "score", "scores", "rank", "ranks", "ranking", "rating", "ratings", "reward", "rewards", "overall_score"
)  # fmt: skip
_SEVERAL = ("responses", "completions", "answers", "candidates", "outputs")
_NUMBERED = re.compile(r"(response|answer|completion|output|conversation)_?[ab0-9]")
_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("anchor", "positive"), ("query", "positive"),
    ("query", "pos"), ("premise", "hypothesis"), ("text1", "text2"), ("embedding",), ("embeddings",),
)  # fmt: skip
_TEXT_ONLY = "burnish trains language models on text; use a data set without them, or keep only its text: "
_BY_NAME = "data.prompt='{QUESTION}' data.completion='{ANSWER}'"


def refuse(file: File) -> None:
    """Raises UserError for a file that burnish knows and cannot train on. Looks at the first 100 rows."""
    if file.settings.columns:
        return
    for look in (_preferences, _labelled, _ranking, _media, _tokens, _pairs):
        found = look(file)
        if found:
            raise UserError(f"{file.path}: {found[0]}", found[1])


def lone_preferences(rows: Sequence[Row]) -> list[Row]:
    """Preference pairs among rows of which most are something else: bad rows, not a file to refuse."""
    found = [r for r in rows if r.values.get("chosen") is not None and r.values.get("rejected") is not None]
    return found if 2 * len(found) < len(rows) else []


def _preferences(file: File) -> tuple[str, str] | None:
    found = match(file.columns, ("chosen",), ("rejected",))
    if not found:
        return None
    good, bad = found.names
    lists = any(isinstance(row.values.get(good), list) for row in file.rows[:100])
    asked = one(file.columns, "prompt", "question", "instruction") or "prompt"
    keep = (
        f"data.columns='{{messages: {good}}}'"
        if lists
        else f"data.prompt='{{{asked}}}' data.completion='{{{good}}}'"
    )
    return (
        f"these are preference pairs ({good}, {bad}); burnish trains on one answer per question",
        f"keep `{good}` as the answer: {keep}",
    )


def _labelled(file: File) -> tuple[str, str] | None:
    label = one(file.columns, "label", "labels", "kto_tag")
    if label is None:
        return None
    answer = one(file.columns, *_ANSWERS)
    values = [row.values.get(label) for row in file.rows[:100]]
    if answer and any(isinstance(v, bool) for v in values):
        return (
            f"these are answers judged good or bad (`{answer}`, `{label}`: true or false), as KTO wants; "
            "burnish trains on good answers only",
            f"keep the rows whose `{label}` is true, and remove the column `{label}`",
        )
    asked = one(file.columns, "text", "sentence", "content", "review")
    if answer or asked is None:
        return None
    return (
        f"these are texts to classify (`{asked}`, `{label}`); burnish trains a model to write",
        f"write the label as an answer: data.prompt='{{{asked}}} Label: ' data.completion='{{{label}}}'",
    )


def _ranking(file: File) -> tuple[str, str] | None:
    several = next((c for c in _SEVERAL if c in file.columns), None)
    numbered = [c for c in file.columns if _NUMBERED.fullmatch(c)]
    rated = [c for c in file.columns if c in _SCORES]
    if several:
        lists = [v for v in (row.values.get(several) for row in file.rows[:100]) if isinstance(v, list)]
        within = {k for v in lists for item in v if isinstance(item, dict) for k in item if k in _SCORES}
        if lists and (rated or within):
            score = (rated or sorted(within))[0]
            return (
                f"these are several scored answers to each question (`{several}`, `{score}`); "
                "burnish trains on one answer per question",
                "write a file with the best answer of each row, as prompt and completion",
            )
    if len(numbered) > 1:
        asked = next((c for c in ("prompt", "question", "instruction") if c in file.columns), "prompt")
        return (
            f"these are several answers to each question ({listed(numbered)}); "
            "burnish trains on one answer per question",
            f"name the one to learn: data.prompt='{{{asked}}}' data.completion='{{{numbered[0]}}}'",
        )
    return None


def _media(file: File) -> tuple[str, str] | None:
    parts = {str(kind) for row in file.rows[:100] for kind in _part_types(list(row.values.values()))}
    for what in ("image", "audio", "video"):
        names = {what, f"{what}s", *(["pixel_values"] if what == "image" else [])}
        column = next((c for c in file.columns if c.lower() in names), None)
        kind = next((k for k in sorted(parts) if k in (what, f"{what}_url", f"input_{what}")), None)
        if column or kind:
            where = f"the column `{column}`" if column else f"parts of type {kind}"
            return f"these rows hold {what}s ({where}), which burnish cannot train on", _TEXT_ONLY + _BY_NAME
    return None


def _part_types(values: list[Any], depth: int = 0) -> Iterator[Any]:
    """Types of the parts in lists of messages: messages → content → parts."""
    for value in values:
        if isinstance(value, list) and depth < 2:
            for item in value:
                if isinstance(item, dict):
                    if depth and isinstance(item.get("type"), str):
                        yield item["type"]
                    yield from _part_types([item.get("content"), item.get("value")], depth + 1)


def _tokens(file: File) -> tuple[str, str] | None:
    if "input_ids" not in file.columns:
        return None
    return (
        "these rows are tokens already (`input_ids`), and which model's cannot be known; expected text",
        "use the file that they were made from",
    )


def _pairs(file: File) -> tuple[str, str] | None:
    pair = next((p for p in _PAIRS if set(p) <= set(file.columns)), None)
    if pair is None or any(c in _ANSWERS for c in file.columns):
        return None
    return (
        f"these are rows for sentence embeddings or comparison ({listed(pair)}); burnish trains "
        "a model to write",
        f"if one column answers another, say so: {_BY_NAME}",
    )
