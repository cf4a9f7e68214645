"""Weighted means over micro-batches, summed in the fixed tree: the same bits whoever computed them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from lightwork.spec.tree import combine


def weighted_mean(records: Sequence[tuple[float, float]]) -> float:
    """Return the mean of (value, weight) pairs, summed in the fixed tree; 0 when nothing has weight."""
    total = combine([weight for _, weight in records], operator.add)
    values = combine([value * weight if weight else None for value, weight in records], operator.add)
    return values / total if total and values is not None else 0.0
