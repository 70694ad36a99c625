"""The fixed validation set as batches, longest rows together."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.data.batches import Batch, Example, split
from burnish.planning.plan import Plan


def validation_batches(plan: Plan, examples: Sequence[Example]) -> list[Batch]:
    return split(examples, plan.micro_batch.value, plan.length_multiple.value) if examples else []
