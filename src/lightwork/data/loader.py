"""Loading ahead of training. It never changes what is loaded: a function of (seed, epoch, ids) alone.

The engine predicts which micro-batches will fall to this worker, in order, and asks for them one by one.
Those ahead are loaded either by loading workers (torch's DataLoader processes) while the worker computes, or
by the worker itself while it only waits. A prediction may fail both ways: a micro-batch may be stolen from
another worker, then it is loaded on demand; and a predicted one may go to another worker, then it is dropped
when the run moves past it.

What is not here: who takes which micro-batch (spec/roster), and the random state that training starts
from, which the engine sets after every call.
"""

from __future__ import annotations

import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightwork.data.batch import Batch, aligned
from lightwork.data.fetch import Fetcher
from lightwork.data.order import Ids, Order
from lightwork.data.source import LoadingWorkers, Source
from lightwork.errors import DataError

#: Micro-batches that a worker without loading workers keeps ahead.
MAX_AHEAD = 2


class Position(NamedTuple):
    """Where a micro-batch is in the run. Positions compare in the order in which a run comes by."""

    epoch: int
    step_in_epoch: int
    micro_batch: int


class Loader:
    """The batches of one worker, for one `run.steps` or `run.evaluate`.

    `upcoming` predicts the positions that will fall to this worker, in order; it may be endless, and is read
    only as far as loading runs ahead. With `get` and `idle`, the random state of torch, numpy and random is
    left anywhere. With loading workers, what the script changes in the data set later is not seen by them.

    Owns: the loading workers, until `close` (or, where this process is killed, for a few seconds more).
    """

    def __init__(self, source: Source, order: Order, upcoming: Iterable[tuple[int, int, int]] = ()) -> None:
        self._source = source
        self._order = order
        self._predicted = (Position(*position) for position in upcoming)
        self._reached = Position(-1, 0, 0)  # what was asked for last
        self._ahead: _Idle | _Processes
        if source.loading_workers.num_workers:
            self._ahead = _Processes(source.fetcher, self._pending(), source.loading_workers)
        else:
            self._ahead = _Idle(source.fetcher, self._pending())

    def get(self, epoch: int, step_in_epoch: int, index: int) -> Batch:
        """Return the batch of a micro-batch, its CPU tensors aligned to 64 bytes.

        Blocks: until it is loaded; here and now where it was not predicted.
        Raises: DataError when a sample could not be fetched, naming it.
        """
        position = Position(epoch, step_in_epoch, index)
        self._reached = position
        while self._ahead.positions and self._ahead.positions[0] < position:
            self._ahead.drop_first()
        if self._ahead.positions and self._ahead.positions[0] == position:
            return aligned(self._ahead.take_first())
        return aligned(self._source.fetch(epoch, self._order.micro_batch_ids(*position)))

    def ids(self, epoch: int, step_in_epoch: int, index: int) -> Ids:
        """Return the ids of a micro-batch's samples."""
        return self._order.micro_batch_ids(epoch, step_in_epoch, index)

    def goes_on(self, epoch: int, step_in_epoch: int, index: int) -> bool | None:
        """Return None: the order says how long an epoch is."""
        return None

    def idle(self) -> bool:
        """Load one micro-batch of a later step ahead, while the worker would only be waiting for the others.

        Returns: False when there is nothing to do: enough is ahead, or loading workers do it.
        """
        return self._ahead.load_one(self._reached)

    def close(self) -> None:
        """End the loading workers. What is ahead is lost; `get` still loads on demand."""
        self._ahead.close()
        self._ahead = _Idle(self._source.fetcher, iter(()))

    def _pending(self) -> Iterator[tuple[Position, Ids]]:
        """Yield the predicted positions that the run has not passed, with their ids."""
        try:
            for position in self._predicted:
                if position > self._reached:
                    yield position, self._order.micro_batch_ids(*position)
        except DataError:
            # The next epoch's order can not be had. It is raised again when that epoch is asked for: a fault
            # of what lies ahead must not end the step that is still being trained.
            return


class _Idle:
    """Ahead is what the worker loaded while it waited."""

    def __init__(self, fetcher: Fetcher, pending: Iterator[tuple[Position, Ids]]) -> None:
        self._fetcher = fetcher
        self._pending = pending
        self.positions: deque[Position] = deque()
        self._batches: deque[Batch] = deque()

    def load_one(self, reached: Position) -> bool:
        if len(self.positions) >= MAX_AHEAD:
            return False
        for position, ids in self._pending:
            # Whoever waits has seen every micro-batch of its step taken.
            if position[:2] == reached[:2]:
                continue
            try:
                batch = self._fetcher.fetch(position.epoch, ids)
            except DataError:
                return True  # as above; on demand it fails again
            self.positions.append(position)
            self._batches.append(batch)
            return True
        return False

    def drop_first(self) -> None:
        self.take_first()

    def take_first(self) -> Batch:
        self.positions.popleft()
        return self._batches.popleft()

    def close(self) -> None:
        self.positions.clear()
        self._batches.clear()


class _Processes:
    """Ahead is what torch's DataLoader processes load, in order."""

    def __init__(self, fetcher: Fetcher, pending: Iterator[tuple[Position, Ids]], settings: LoadingWorkers) -> None:
        self._name = fetcher.name
        self.positions: deque[Position] = deque()
        with warnings.catch_warnings():
            # More processes than cores: the DataLoader that the user made has warned of it.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                cast("Dataset[Any]", _ByIds(fetcher)),
                batch_size=None,  # a "sample" is a whole micro-batch
                sampler=self._tasks(pending),
                collate_fn=_unchanged,
                num_workers=settings.num_workers,
                prefetch_factor=settings.prefetch_factor,
                timeout=settings.timeout,
                worker_init_fn=partial(_prepare_process, settings.worker_init_fn),
                multiprocessing_context=settings.multiprocessing_context,
                generator=torch.Generator(),  # their base seed, not drawn from the global state
            )
            self._batches: Iterator[Batch] | None = iter(loader)

    def load_one(self, reached: Position) -> bool:
        return False

    def drop_first(self) -> None:
        self._next()

    def take_first(self) -> Batch:
        batch = self._next()
        if isinstance(batch, _Failure):
            raise DataError(f"{batch.message}\n\nIn the loading worker:\n{batch.traceback}")
        return batch

    def close(self) -> None:
        self._batches = None  # the last reference: the iterator ends its processes
        self.positions.clear()

    def _tasks(self, pending: Iterator[tuple[Position, Ids]]) -> Iterator[tuple[int, Ids]]:
        # Run by the DataLoader in this process, each time that it hands out a task.
        for position, ids in pending:
            self.positions.append(position)
            yield position.epoch, ids

    def _next(self) -> Batch:
        if self._batches is None:
            raise RuntimeError("a closed loader was asked for a batch that it no longer has")
        position = self.positions.popleft()
        try:
            return next(self._batches)
        except RuntimeError as error:  # the processes' own exceptions come as values
            raise DataError(
                f"the loading workers of {self._name} failed at epoch {position.epoch}, step "
                f"{position.step_in_epoch} of it, micro-batch {position.micro_batch}: {error} Look for a "
                "crash or a lack of memory; num_workers=0 loads in the training process and shows more."
            ) from error


@dataclass(frozen=True)
class _Failure:
    """What a loading worker sends in place of a batch that it could not load."""

    message: str
    traceback: str


class _ByIds:
    """The data set that torch's loading workers see: one item is the batch of (epoch, ids)."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher

    def __getitem__(self, key: tuple[int, Ids]) -> Batch | _Failure:
        try:
            return self.fetcher.fetch(*key)
        except DataError as error:
            return _Failure(str(error), "".join(traceback.format_exception(error.__cause__ or error)))


def _unchanged(batch: Batch) -> Batch:
    return batch


def _prepare_process(worker_init_fn: Any, worker_id: int) -> None:
    info = get_worker_info()
    if info is not None and isinstance(info.dataset, _ByIds):
        # The user's function opens files in `get_worker_info().dataset`: their data set, not ours around it.
        # The record is frozen, and each process has its own.
        object.__setattr__(info, "dataset", info.dataset.fetcher.dataset)
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
