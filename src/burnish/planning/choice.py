"""What a plan is made of: a decided value with its reason, and what is known of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    value: T
    reason: str


@dataclass(frozen=True)
class DataStats:
    """True lengths of the data, in tokens."""

    examples: int
    longest: int  # of training and validation
    tokens: int
    trained: int
    lengths: tuple[int, ...] = ()  # of each training example; () where only the sums are known

    @property
    def sizes(self) -> tuple[int, ...]:
        """`lengths`; where they are not known, one longest example and the others as long as the mean."""
        if self.lengths:
            return self.lengths
        mean = max(2, round(self.tokens / max(self.examples, 1)))
        return (self.longest, *(min(mean, self.longest) for _ in range(self.examples - 1)))
