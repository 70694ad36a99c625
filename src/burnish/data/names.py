"""The names by which columns are known: one list, for the header of a table and for the formats.

Letter case does not count: `is_known("Prompt")`.
"""

from __future__ import annotations

from typing import Any

# What some format reads: also the names that data.columns can give.
STANDARD = (
    "messages", "conversations", "conversation", "tools", "functions", "system", "prompt", "completion",
    "response", "text", "instruction", "input", "output", "history", "instances", "question", "query",
    "answer", "reasoning", "reasoning_content", "thinking", "think", "cot", "complex_cot", "options",
    "choices", "answer_idx", "answerkey", "opa", "opb", "opc", "opd", "ope", "cop", "exp", "explanation",
    "rationale", "context", "qa_pairs", "description", "problem", "solution", "canonical_solution",
)  # fmt: skip
# What no format reads although it may be what a row is about: it is told where it is left out.
CONTENT = ("source", "target", "content", "code", "sql", "schema", "system_prompt", "distractors")
# Ids, titles and the like, and what is refused: they make a header, and need no word where they are left out.
_LABELS = (
    "dialogue", "dialog", "responses", "chosen", "rejected", "answer_index", "correct_answer", "title",
    "label", "id", "task_id", "name", "category", "subject", "topic", "user", "assistant", "human", "gpt",
    "bot", "test", "entry_point",
)  # fmt: skip
# Spellings with capitals that known data sets have, for those who look a name up as it is written.
_SPELT = ("Question", "Answer", "Complex_CoT", "Response", "QA_pairs", "answerKey")
COLUMNS = frozenset((*STANDARD, *CONTENT, *_LABELS, *_SPELT))


def is_known(name: str) -> bool:
    """Whether a column of this name is one that burnish knows, whatever its letter case."""
    return name in COLUMNS or name.lower() in COLUMNS


def is_told(name: str) -> bool:
    """Whether a column of this name may hold what a row is about, so that leaving it out needs a word."""
    return name.lower() in STANDARD or name.lower() in CONTENT


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "an array", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
