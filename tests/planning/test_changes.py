"""The data as a recipe of shorter rows would leave it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from burnish.planning.changes import shortened
from burnish.recipe import parse
from tests.planning.test_levers import data


def test_shortened_data() -> None:
    stats = data(10, 100, 1000)
    cut = shortened(stats, parse("", "test", ["train.max_length=500", "data.too_long=truncate"]))
    assert cut.lengths == tuple(min(n, 500) for n in stats.lengths) and cut.examples == 10
    left = shortened(stats, parse("", "test", ["train.max_length=500", "data.too_long=drop"]))
    assert left.lengths == tuple(n for n in stats.lengths if n <= 500) and left.examples == 5
    for s in (cut, left):
        assert s.longest == 500 and s.tokens == sum(s.lengths)
        assert s.trained / s.tokens == pytest.approx(stats.trained / stats.tokens, abs=0.01)
    sums = shortened(replace(stats, lengths=()), parse("", "test", ["train.max_length=500"]))
    assert (sums.examples, sums.longest, sums.lengths) == (10, 500, ()) and sums.tokens <= 5000
    assert shortened(stats, parse("", "test", ["train.max_length=1000"])) is stats
