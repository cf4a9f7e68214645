"""Fetching: from the ids of a micro-batch to the batch, the same bits in any process and in any order.

1. Each sample: torch (CPU), numpy and random are seeded from (seed, epoch, sample id), then `dataset[id]`.
2. The collate function: they are seeded from (seed, epoch, first id), then it gets the list of samples.

Both run with one thread and without autocast, as in a loading worker, whatever the process trains with.

A `TensorDataset`, and a `Subset` of one, draws no random numbers and is gathered in one call a tensor
instead; the result is that of collating sample by sample. `__getitems__` is not used: with it one sample's
augmentation would depend on its neighbours. Not covered: data sets that keep other state between samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from lightwork.data.batch import Batch
from lightwork.data.order import Ids, some_of
from lightwork.errors import DataError
from lightwork.random import derive, seed_all

Collate = Callable[[list[Any]], Batch]


@runtime_checkable
class MapStyle(Protocol):
    """A map-style data set: len() and []."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return the sample of an id, from 0 to len() - 1."""
        ...


class Fetcher:
    """Fetches batches of one data set. It can be pickled wherever data set and collate function can."""

    def __init__(self, dataset: MapStyle, collate: Collate, seed: int) -> None:
        self.dataset = dataset
        self._collate = collate
        self._seed = seed
        self._num_samples = len(dataset)
        self._gathered = _gathered(dataset) if collate is default_collate else None

    @property
    def name(self) -> str:
        """The data set, for messages."""
        return f"the data set {type(self.dataset).__name__}"

    def fetch(self, epoch: int, ids: Ids) -> Batch:
        """Return the collated batch of `ids`.

        The random state of torch, numpy and random is left anywhere: the caller seeds what it runs next. 10
        us a sample besides the data set's own time, nothing a sample where it is gathered (2026-11).

        Raises: DataError when a sample or the collate function raised, with the cause.
        """
        if self._gathered is not None:
            return self._gathered.fetch(ids)
        with as_in_a_loading_worker():
            samples = [self.sample(epoch, sample_id) for sample_id in ids.tolist()]
            seed_all(derive(self._seed, "collate", epoch, int(ids[0])))
            return collated(self._collate, self.name, epoch, ids, samples)

    def sample(self, epoch: int, sample_id: int) -> Any:
        """Return one sample, with the random state of (seed, epoch, sample id). Raises: DataError."""
        seed_all(derive(self._seed, "sample", epoch, sample_id))
        try:
            return self.dataset[sample_id]
        except Exception as error:
            num_samples = len(self.dataset)
            if isinstance(error, IndexError) and num_samples != self._num_samples:
                raise DataError(
                    f"{self.name} shrank: sample {sample_id} is gone at epoch {epoch}, {self._num_samples} "
                    f"samples when the run began, {num_samples} now. Keep its len() fixed, and choose each "
                    "epoch's samples with order=."
                ) from error
            raise DataError(
                f"sample {sample_id} of {self.name} could not be fetched at epoch {epoch}: "
                f"{described(error)}. Its len() is {num_samples}, so dataset[{sample_id}] must work; the "
                "traceback shows the cause."
            ) from error


class _Gathered:
    """A pure data set of tensors, gathered by id."""

    def __init__(self, columns: tuple[torch.Tensor, ...], rows: torch.Tensor | None) -> None:
        self._columns = columns
        self._rows = rows  #: of the tensors, by sample id; None where a sample's id is its row

    def fetch(self, ids: Ids) -> Batch:
        rows = torch.from_numpy(ids.copy())  # torch warns of arrays that can not be written
        if self._rows is not None:
            rows = self._rows.index_select(0, rows)
        # A list, as default_collate makes of samples that are tuples.
        return [column.index_select(0, rows) for column in self._columns]

    def through(self, indices: Any) -> _Gathered | None:
        """Return the gathered form of a subset, or None where its indices are not rows."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        num_rows = len(self._columns[0]) if self._rows is None else len(self._rows)
        chosen = torch.where(chosen < 0, chosen + num_rows, chosen)
        if chosen.ndim != 1 or bool(((chosen < 0) | (chosen >= num_rows)).any()):
            return None  # fetched one by one, which names the sample that is not there
        return _Gathered(self._columns, chosen if self._rows is None else self._rows.index_select(0, chosen))


def _gathered(dataset: object) -> _Gathered | None:
    """Return how to gather a data set, or None. Subclasses are not gathered: their `[]` may be another."""
    if type(dataset) is Subset:
        inner = _gathered(dataset.dataset)
        return inner.through(dataset.indices) if inner else None
    if type(dataset) is not TensorDataset or not dataset.tensors:
        return None
    for tensor in dataset.tensors:
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain:
            return None
    return _Gathered(dataset.tensors, None)


def collated(collate: Collate, name: str, epoch: int, ids: Ids, samples: list[Any]) -> Batch:
    """Return the batch that a collate function makes of samples; `name` is their data set's.

    Raises: DataError when it raised, with the cause.
    """
    try:
        return collate(samples)
    except Exception as error:
        raise DataError(
            f"the collate function failed on samples {some_of(ids)} of {name}, epoch {epoch}: "
            f"{described(error)}. Samples of different shapes need a collate function: pass a "
            "DataLoader with collate_fn= in place of the data set."
        ) from error


@contextmanager
def as_in_a_loading_worker() -> Iterator[None]:
    """Run with one thread and without autocast."""
    num_threads = torch.get_num_threads()
    autocast = torch.is_autocast_enabled("cpu")
    if num_threads != 1:
        torch.set_num_threads(1)
    if autocast:
        torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        if num_threads != 1:
            torch.set_num_threads(num_threads)
        if autocast:
            torch.set_autocast_enabled("cpu", True)


def described(error: Exception) -> str:
    """Return an error's type and text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
