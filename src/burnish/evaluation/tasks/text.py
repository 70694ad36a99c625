"""Answers that are right when they are the expected text."""


def exact_match(answer: str, expected: str) -> bool:
    """The same characters, but for the whitespace at both ends."""
    return answer.strip() == expected.strip()
