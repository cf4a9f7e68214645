"""Loaders that hand out whole batches: recognised, and read row by row, so that the run makes micro-batches of them.

What wraps a DataLoader (a prefetcher, a progress bar), a DataLoader with batch_size=None, and whatever the script says
so of (`batches=True`). A stream of batches is read as a stream of their rows. Where the rows of a micro-batch are those
of one batch, they are that batch, or a slice of it; where they come from several, slices of these are put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightwork.data.batch import Batch, map_tensors, tensors
from lightwork.errors import UsageError
from lightwork.notice import notice

#: Attributes deep, in which a wrapper's loader is looked for.
_DEPTH = 3


def loader_in(data: object) -> DataLoader[Any] | None:
    """Return the DataLoader that an object wraps, neither loader nor data set itself; None without one."""
    return None if isinstance(data, (DataLoader, Dataset)) else _loader_in(data, _DEPTH)


def _loader_in(data: object, depth: int) -> DataLoader[Any] | None:
    if isinstance(data, DataLoader):
        return data
    if depth == 0 or not isinstance(data, Iterable) or isinstance(data, (type, str, bytes, Mapping, list, tuple)):
        return None
    try:
        attributes = list(vars(data).values())
    except TypeError:  # it has none that can be listed
        return None
    found = (_loader_in(value, depth - 1) for value in attributes)
    return next((loader for loader in found if loader is not None), None)


def without_progress_bar(data: Any) -> Any:
    """Return what a progress bar of tqdm's is around, or the object itself."""
    if type(data).__module__.partition(".")[0] == "tqdm" and "iterable" in vars(data):
        notice("tqdm's bar stands still: the run reads what is in it, in its own batches, and shows progress itself.")
        return vars(data)["iterable"]
    return data


def looks_like_batches(item: Any, sizes: Iterable[int]) -> int | None:
    """Return the rows of an item that may be a whole batch rather than a sample; None for one that is none.

    It may be where all its tensors begin with one size, and this is one of `sizes`, those of the run's batches; or
    where some tensors have that dimension alone, as labels have.
    """
    found = list(tensors(item))
    if not found or any(tensor.dim() == 0 for tensor in found) or all(tensor.dim() == 1 for tensor in found):
        return None
    rows = {tensor.shape[0] for tensor in found}
    num = rows.pop()
    if rows or num < 2:
        return None
    has_labels = any(tensor.dim() == 1 for tensor in found)
    return num if has_labels or num in set(sizes) else None


@dataclass(frozen=True, eq=False)
class _Whole:
    """A batch that was handed out, and the rows that it has."""

    batch: Batch
    num: int


@dataclass(frozen=True)
class Row:
    """A row of a batch."""

    whole: _Whole
    index: int


class Rows:
    """A stream of batches, row by row."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Row]:
        for batch in self._batches:
            whole = _Whole(batch, _num_rows(batch))
            yield from (Row(whole, index) for index in range(whole.num))


def put_together(rows: list[Row]) -> Batch:
    """Return the batch that has these rows."""
    parts = []
    for _, run in groupby(rows, key=lambda row: id(row.whole)):
        of_one = list(run)
        whole, first, end = of_one[0].whole, of_one[0].index, of_one[-1].index + 1
        parts.append(whole.batch if end - first == whole.num else _cut(whole.batch, first, end, whole.num))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _num_rows(batch: Batch) -> int:
    """Return the rows of a batch. Raises: UsageError where its tensors differ in them, or it has none."""
    shapes = [tuple(tensor.shape) for tensor in tensors(batch) if tensor.dim()]
    rows = {shape[0] for shape in shapes}
    if len(rows) != 1:
        what = "no tensors" if not shapes else f"tensors of shapes {', '.join(map(str, shapes[:4]))}"
        raise UsageError(
            f"a loader hands out batches with {what}, which do not say how many samples they have. Give the data set "
            "of single samples to run.steps, or a DataLoader of it."
        )
    return rows.pop()


def _cut(batch: Batch, first: int, end: int, num: int) -> Batch:
    """Return rows of a batch; what is no tensor is cut where it is a list of as many things, and goes with all else."""
    if isinstance(batch, list) and len(batch) == num and not any(True for _ in tensors(batch)):
        return batch[first:end]
    if isinstance(batch, dict):
        return type(batch)({key: _cut(value, first, end, num) for key, value in batch.items()})
    if type(batch) in (list, tuple):
        return type(batch)(_cut(value, first, end, num) for value in batch)
    return map_tensors(batch, lambda tensor: tensor[first:end] if tensor.dim() else tensor)


def _joined(parts: list[Batch]) -> Batch:
    """Return batches as one."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.dim() else first
    if isinstance(first, dict):
        return type(first)({key: _joined([part[key] for part in parts]) for key in first})
    if isinstance(first, list) and not any(True for _ in tensors(first)):
        return [one for part in parts for one in part]
    if type(first) in (list, tuple):
        return type(first)(_joined([part[i] for part in parts]) for i in range(len(first)))
    if isinstance(first, (str, int, float, bool, type(None))):
        return first
    raise UsageError(
        f"a loader hands out batches of type {type(first).__name__}, of which a micro-batch would need parts of two. "
        "Choose a micro_batch that divides the loader's batch size."
    )
