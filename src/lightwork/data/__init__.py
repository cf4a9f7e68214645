"""Samples: their order, how they are fetched and collated, and loading ahead of training."""

from lightwork.data.batch import Batch, aligned, count_tokens, map_tensors, tensors
from lightwork.data.loader import Loader, Position
from lightwork.data.order import CustomOrder, Ids, Order
from lightwork.data.source import Source, source_for_evaluation, source_of

__all__ = [
    "Batch",
    "CustomOrder",
    "Ids",
    "Loader",
    "Order",
    "Position",
    "Source",
    "aligned",
    "count_tokens",
    "map_tensors",
    "source_for_evaluation",
    "source_of",
    "tensors",
]
