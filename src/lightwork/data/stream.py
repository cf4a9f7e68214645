"""Streams: data sets that are iterated, not indexed. Who reads what, and how a team sees the end of an epoch.

A micro-batch is a function of (step, index) here too, so that any worker can make any of them:

    a plain stream    its samples in order, cut into global batches and those into micro-batches. Every worker reads
                      the stream from its beginning and keeps what falls to it.
    with shards       (`num_shards` and `shard(num_shards=, index=)`, as those of Hugging Face datasets have) M lanes,
                      one for each micro-batch of a step: lane i takes the shards i, i + M, i + 2 M, ... of the epoch's
                      order, one after the other. A worker reads the shards of its own lanes alone, and of another
                      one's lane only when it takes over a late worker's micro-batch.

Nobody knows how long an epoch is. So each micro-batch says whether samples follow it, and the team ends the epoch
after the step in which none does. A lane that ends early gives empty micro-batches until then.

torch, numpy and random are seeded from (seed, epoch, lane) before an epoch's iterator is made, and from (seed, epoch,
lane, position) before each sample is taken from it. Reading begins anew where a worker goes back, as after a resume:
samples before that place are read and dropped (skipped, if the data set has `skip`).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lightwork.data.batch import Batch, aligned
from lightwork.data.fetch import Collate, as_in_a_loading_worker, collated, described
from lightwork.data.order import Ids, shuffled, unshuffled
from lightwork.errors import DataError
from lightwork.random import derive, seed_all


@runtime_checkable
class _Sharded(Protocol):
    @property
    def num_shards(self) -> int: ...

    def shard(self, *, num_shards: int, index: int) -> Iterable[Any]: ...


@runtime_checkable
class _Skips(Protocol):
    def skip(self, n: int, /) -> Iterable[Any]: ...


@runtime_checkable
class _KnowsEpochs(Protocol):
    def set_epoch(self, epoch: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A data set that is iterated, and what is done with its samples."""

    dataset: Iterable[Any]
    collate: Collate
    seed: int
    given: object = None  #: what the script has given, where that is read by something else
    shuffle: bool  #: the shards, anew each epoch
    drop_last: bool = False  #: end an epoch before the global batch that is short

    @property
    def name(self) -> str:
        """The data set, for messages."""
        return f"the data set {type(self.known_as).__name__}"

    @property
    def known_as(self) -> object:
        """What the script has given."""
        return self.dataset if self.given is None else self.given

    @property
    def num_shards(self) -> int | None:
        """The shards that it has; None for a plain stream, which is read as a whole."""
        return self.dataset.num_shards if isinstance(self.dataset, _Sharded) and self.dataset.num_shards > 1 else None

    @property
    def can_skip(self) -> bool:
        """Whether reading can begin anywhere."""
        return self.num_shards is None and isinstance(self.dataset, _Skips)

    def lane(self, epoch: int, lane: int, num_lanes: int, skip: int = 0) -> Iterator[Any]:
        """Return the samples of a lane, or of a plain stream; from `skip` on, where it can."""
        seed_all(derive(self.seed, "stream", epoch, lane))
        if isinstance(self.known_as, _KnowsEpochs):
            self.known_as.set_epoch(epoch)
        num_shards = self.num_shards
        if num_shards is None:
            return iter(self.dataset.skip(skip) if skip and isinstance(self.dataset, _Skips) else self.dataset)
        arrange = shuffled if self.shuffle else unshuffled
        return self._chained(arrange(self.seed, epoch, num_shards)[lane::num_lanes].tolist(), num_shards)

    def _chained(self, shards: list[int], num_shards: int) -> Iterator[Any]:
        if not isinstance(self.dataset, _Sharded):
            raise TypeError(f"{self.name} has no shards")
        for index in shards:
            yield from self.dataset.shard(num_shards=num_shards, index=index)


class _Reader:
    """One lane of one epoch, read forwards."""

    def __init__(self, stream: Stream, epoch: int, lane: int, num_lanes: int) -> None:
        self._stream = stream
        self._epoch, self._lane, self._num_lanes = epoch, lane, num_lanes
        self._kept: deque[Any] = deque()
        self._first = 0  # position of the first sample that is kept
        self._samples: Iterator[Any] | None = None
        self._has_ended = False

    def forget(self, before: int) -> None:
        """Let go of the samples before a position; of all and begin anew if it was passed."""
        if before < self._first or self._samples is None:
            first = before if self._stream.can_skip else 0
            with as_in_a_loading_worker():
                self._samples = self._stream.lane(self._epoch, self._lane, self._num_lanes, first)
            self._kept.clear()
            self._first, self._has_ended = first, False
        while self._first < before and self.has(self._first):
            self._kept.popleft()
            self._first += 1

    def has(self, position: int) -> bool:
        """Read up to a position; return whether there is a sample."""
        with as_in_a_loading_worker():
            while not self._has_ended and self._first + len(self._kept) <= position:
                self._read()
        return position < self._first + len(self._kept)

    def take(self, first: int, count: int) -> list[Any]:
        """Return the samples from a position on, fewer where the lane ends."""
        self.has(first + count - 1)
        return list(itertools.islice(self._kept, first - self._first, first - self._first + count))

    def _read(self) -> None:
        position = self._first + len(self._kept)
        samples = self._samples
        if samples is None:
            raise ValueError("forget() comes before reading")
        seed_all(derive(self._stream.seed, "stream", self._epoch, self._lane, position))
        try:
            self._kept.append(next(samples))
        except StopIteration:
            self._has_ended = True
        except Exception as error:
            raise DataError(
                f"{self._stream.name} failed at sample {position} of epoch {self._epoch}"
                f"{f', lane {self._lane}' if self._stream.num_shards else ''}: {described(error)}. The traceback shows "
                "the cause."
            ) from error


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The steps of every epoch of a stream, as far as they are known."""

    stream: Stream
    global_batch: int
    micro_batch: int
    _ends: dict[int, int] = field(init=False, repr=False, default_factory=dict)

    @property
    def num_different(self) -> float:
        """Not known."""
        return math.inf

    def describe(self, epoch: int) -> dict[str, object]:
        """Return what must be the same on every worker."""
        return {"kind of data set": type(self.stream.known_as).__name__, "shards of it": self.stream.num_shards}

    def total_steps(self, epochs: int, first: int = 0) -> int | None:
        """Return None: it shows only as the stream is read."""
        return None

    def has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Return whether an epoch has this step, as far as is known."""
        return step_in_epoch < self._ends.get(epoch, step_in_epoch + 1)

    def is_last(self, epoch: int, step_in_epoch: int) -> None:
        """Return None: it shows only as the stream is read."""

    def after(self, epoch: int, step_in_epoch: int, goes_on: bool | None) -> tuple[int, int]:
        """Return the epoch and step after one: the epoch ends where no micro-batch, or not every one, has samples."""
        if goes_on:
            return epoch, step_in_epoch + 1
        self._ends[epoch] = step_in_epoch + 1
        return epoch + 1, 0

    def micro_batches(self, epoch: int, step_in_epoch: int) -> int:
        """Return the number of micro-batches of a global batch; the last may be empty."""
        return -(-self.global_batch // self.micro_batch)


class StreamLoader:
    """The batches of one worker, for one `run.steps` or `run.evaluate`, read from a stream."""

    def __init__(self, order: StreamOrder, upcoming: Iterable[tuple[int, int, int]] = ()) -> None:
        self._order = order
        self._stream = order.stream
        self._upcoming = iter(upcoming)
        self._next: tuple[int, int, int] | None = None
        self._readers: dict[int, _Reader] = {}
        self._epoch = -1
        self._step = 0

    def ids(self, epoch: int, step_in_epoch: int, index: int) -> Ids:
        """Return the positions of a micro-batch's samples in its lane, or in the plain stream; empty at the end.

        Blocks: until they are read.
        Raises: DataError when reading failed.
        """
        self._go_to(epoch, step_in_epoch)
        reader, first = self._place(epoch, step_in_epoch, index)
        count = self._size(index)
        samples = reader.take(first, count)
        if not samples and index == 0 and step_in_epoch == 0 and self._stream.num_shards is None:
            raise DataError(f"{self._stream.name} gave no sample in epoch {epoch}. Check what it reads.")
        if len(samples) < count and self._stream.drop_last and step_in_epoch == 0:
            raise DataError(
                f"{self._stream.name} has fewer samples than one global batch of {self._order.global_batch}, and "
                "drop_last=True leaves nothing of it. Choose a smaller global batch, or drop_last=False."
            )
        return np.arange(first, first + len(samples), dtype=np.int64)

    def get(self, epoch: int, step_in_epoch: int, index: int) -> Batch:
        """Return the collated micro-batch, its CPU tensors aligned to 64 bytes.

        Raises: DataError when reading or the collate function failed.
        """
        reader, first = self._place(epoch, step_in_epoch, index)
        samples = reader.take(first, self._size(index))
        ids = np.arange(first, first + len(samples), dtype=np.int64)
        with as_in_a_loading_worker():
            seed_all(derive(self._stream.seed, "collate", epoch, step_in_epoch, index))
            return aligned(collated(self._stream.collate, self._stream.name, epoch, ids, samples))

    def goes_on(self, epoch: int, step_in_epoch: int, index: int) -> bool | None:
        """Return the vote of a micro-batch: yes if samples follow in its lane; where a step must be full, no if not.

        Without lanes the last micro-batch of a step votes for all.
        """
        is_full = self._has_more(epoch, step_in_epoch, index)
        return None if not is_full and not self._stream.drop_last else is_full

    def _has_more(self, epoch: int, step_in_epoch: int, index: int) -> bool | None:
        """Return whether enough samples follow those of a micro-batch; None: another micro-batch tells."""
        count = self._order.micro_batches(epoch, step_in_epoch)
        if self._stream.num_shards is None:
            if index != count - 1:
                return None
            needed = self._order.global_batch if self._stream.drop_last else 1
            return self._reader(epoch, 0).has((step_in_epoch + 1) * self._order.global_batch + needed - 1)
        reader, _ = self._place(epoch, step_in_epoch + 1, index)
        needed = self._size(index) if self._stream.drop_last else 1
        return reader.has((step_in_epoch + 1) * self._size(index) + needed - 1)

    def idle(self) -> bool:
        """Read one of this worker's micro-batches of the next step, while it would only be waiting for the others.

        Returns: False when there is nothing to do.
        """
        while self._next is None or self._next[:2] <= (self._epoch, self._step):
            self._next = next(self._upcoming, None)
            if self._next is None:
                return False
        epoch, step_in_epoch, index = self._next
        if (epoch, step_in_epoch) != (self._epoch, self._step + 1):
            return False
        reader, first = self._place(epoch, step_in_epoch, index)
        reader.take(first, self._size(index))
        self._next = None
        return True

    def close(self) -> None:
        """Let go of what was read."""
        self._readers.clear()

    def _size(self, index: int) -> int:
        """Return the samples of a micro-batch."""
        return min(self._order.micro_batch, self._order.global_batch - index * self._order.micro_batch)

    def _go_to(self, epoch: int, step_in_epoch: int) -> None:
        """Let go of what lies before a step."""
        if epoch != self._epoch:
            self._readers.clear()
        self._epoch, self._step = epoch, step_in_epoch

    def _place(self, epoch: int, step_in_epoch: int, index: int) -> tuple[_Reader, int]:
        """Return the reader of a micro-batch and its first position there."""
        if self._stream.num_shards is None:
            reader, per_step, first = self._reader(epoch, 0), self._order.global_batch, index * self._order.micro_batch
        else:
            reader, per_step, first = self._reader(epoch, index), self._size(index), 0
        reader.forget(min(self._step, step_in_epoch) * per_step)
        return reader, step_in_epoch * per_step + first

    def _reader(self, epoch: int, lane: int) -> _Reader:
        if lane not in self._readers:
            lanes = self._order.micro_batches(epoch, 0)
            self._readers[lane] = _Reader(self._stream, epoch, lane, lanes)
        return self._readers[lane]
