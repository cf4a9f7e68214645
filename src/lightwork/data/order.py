"""The order of samples: which ids an epoch holds, and which of them a micro-batch holds.

An `Arrangement` says the ids of an epoch; an `Order` checks them and cuts them, first into global batches,
then those into micro-batches. Everything here is a pure function of (seed, epoch, position): the number of
workers is nowhere. No samples are fetched here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightwork.errors import DataError, UsageError
from lightwork.notice import notice
from lightwork.random import derive, seeded

#: Sample ids, int64, one dimension.
Ids = npt.NDArray[np.int64]

#: (seed, epoch, number of samples of the data set) -> the ids of that epoch, in order.
Arrangement = Callable[[int, int, int], Ids]

#: What `order=` takes: the ids of every epoch, or a function from the epoch to its ids.
CustomOrder = Callable[[int], Iterable[int]] | Iterable[int]

#: Epochs whose ids are kept: loading ahead reads the next one while the current one is still trained on.
NUM_CACHED_EPOCHS = 2


class _Arranged(NamedTuple):
    """An epoch."""

    ids: Ids
    bounds: Ids  #: where each micro-batch begins, and the end of the last
    of_step: int  #: micro-batches of a global batch that is not short
    num_steps: int

    def micro_batches(self, step: int) -> tuple[int, int]:
        """Return the first micro-batch of a global batch, counted over the epoch, and the end of its last."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch that has steps 0 to {self.num_steps - 1}")
        return step * self.of_step, min((step + 1) * self.of_step, len(self.bounds) - 1)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The ids of every epoch, cut into global batches and micro-batches.

    An epoch is `num_steps` global batches of `global_batch` samples; the last may hold fewer, unless
    `drop_last`. A global batch is cut into micro-batches of `micro_batch` samples; the last may hold fewer.

    The batches of a batch sampler stay together, as micro-batches, if none of an epoch has more samples than
    `micro_batch`; a global batch is as many of them as it would have micro-batches.
    """

    seed: int
    global_batch: int  #: samples
    micro_batch: int  #: samples
    arrangement: Arrangement
    count_samples: Callable[[], int]  #: len() of the data set, asked once an epoch
    data_name: str = "the data set"  #: for messages
    drop_last: bool = False  #: leave out the global batch that is short
    num_samples: int = field(init=False)  #: when the order was made; it may not change
    _cache: dict[int, _Arranged] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def num_different(self) -> float:
        """All samples, unless the script arranges them."""
        return self.num_samples if self.arrangement in (shuffled, unshuffled) else math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", self.count_samples())
        if self.num_samples < 1:
            raise DataError(
                f"{self.data_name} is empty: its len() is {self.num_samples}. "
                "Check the path or the filter that it is made from."
            )

    def ids(self, epoch: int) -> Ids:
        """Return the ids of an epoch, in order; read-only.

        Blocks: on the arrangement, the first time (20 ms for a permutation of a million, 2026-11).
        Raises: DataError when the data set changed its length, or the order has no ids or impossible ones.
        """
        return self._arranged(epoch).ids

    def _arranged(self, epoch: int) -> _Arranged:
        cached = self._cache.get(epoch)
        if cached is None:
            cached = self._cache[epoch] = self._arrange(epoch)
            while len(self._cache) > NUM_CACHED_EPOCHS:
                del self._cache[next(iter(self._cache))]
        return cached

    def describe(self, epoch: int) -> dict[str, object]:
        """Return what must be the same on every worker."""
        return {
            "samples in the data set": self.num_samples,
            "order of the samples": zlib.crc32(self.ids(epoch).tobytes()),
        }

    def has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Return whether an epoch has this step."""
        return step_in_epoch < self.num_steps(epoch)

    def is_last(self, epoch: int, step_in_epoch: int) -> bool:
        """Return whether a step is the last of its epoch."""
        return not self.has_step(epoch, step_in_epoch + 1)

    def after(self, epoch: int, step_in_epoch: int, goes_on: bool | None) -> tuple[int, int]:
        """Return the epoch and step after one; it need not exist (`has_step`)."""
        return epoch, step_in_epoch + 1

    def num_steps(self, epoch: int) -> int:
        """Return the number of global batches of an epoch."""
        return self._arranged(epoch).num_steps

    def total_steps(self, epochs: int, first: int = 0) -> int:
        """Return the number of global batches of `epochs` epochs from `first` on."""
        if isinstance(self.arrangement, (Custom, Sampled)):  # epochs may differ in length
            return sum(self.num_steps(epoch) for epoch in range(first, first + epochs))
        return epochs * self.num_steps(first) if epochs else 0

    def step_ids(self, epoch: int, step_in_epoch: int) -> Ids:
        """Return the ids of a global batch."""
        arranged = self._arranged(epoch)
        first, end = arranged.micro_batches(step_in_epoch)
        return arranged.ids[arranged.bounds[first] : arranged.bounds[end]]

    def micro_batches(self, epoch: int, step_in_epoch: int) -> int:
        """Return the number of micro-batches of a global batch: M, fewer where it is short."""
        first, end = self._arranged(epoch).micro_batches(step_in_epoch)
        return end - first

    def micro_batch_ids(self, epoch: int, step_in_epoch: int, index: int) -> Ids:
        """Return the ids of micro-batch `index` of a global batch: `micro_batch` of them, or what is left."""
        arranged = self._arranged(epoch)
        first, end = arranged.micro_batches(step_in_epoch)
        if not 0 <= index < end - first:
            raise IndexError(f"micro-batch {index} of step {step_in_epoch} of epoch {epoch}, of {end - first}")
        return arranged.ids[arranged.bounds[first + index] : arranged.bounds[first + index + 1]]

    def _arrange(self, epoch: int) -> _Arranged:
        num_samples = self.count_samples()
        if num_samples != self.num_samples:
            raise DataError(
                f"{self.data_name} changed its length: {self.num_samples} samples when the run began, "
                f"{num_samples} at epoch {epoch}. Keep its len() fixed; order= chooses an epoch's samples."
            )
        bounds: Ids | None = None
        if isinstance(self.arrangement, Sampled) and self.arrangement.batched:
            arranged, sizes = self.arrangement.batches(self.seed, epoch)
            if max(sizes, default=0) <= self.micro_batch:
                bounds = np.cumsum([0, *sizes])
            else:
                notice(
                    f"the batch sampler {type(self.arrangement.sampler).__name__} makes batches of up to {max(sizes)} "
                    f"samples, more than micro_batch={self.micro_batch}: its ids are cut anew, in their order. With "
                    f"micro_batch={max(sizes)} its batches stay together."
                )
        else:
            arranged = self.arrangement(self.seed, epoch, num_samples)
        # Not a view of the caller's array, which may change, nor writable by those whom it is handed to.
        ids = np.array(arranged, dtype=np.int64)
        ids.flags.writeable = False
        if not len(ids):
            raise DataError(
                f"the order of epoch {epoch} holds no ids, of {num_samples} samples in {self.data_name}. "
                "Return at least one id an epoch from order= or the sampler."
            )
        outside = ids[(ids < 0) | (ids >= num_samples)]
        if len(outside):
            raise DataError(
                f"the order of epoch {epoch} holds {len(outside)} ids outside {self.data_name}, the first of "
                f"them {outside[0]}. Its {num_samples} samples have the ids 0 to {num_samples - 1}."
            )
        if self.drop_last and len(ids) < self.global_batch:
            raise DataError(
                f"epoch {epoch} has {len(ids)} samples, fewer than global_batch={self.global_batch}, and "
                "drop_last=True leaves nothing of it. Choose a smaller global batch, or drop_last=False."
            )
        if bounds is None:
            bounds = self._cut(len(ids))
        of_step, num_micro_batches = -(-self.global_batch // self.micro_batch), len(bounds) - 1
        num_steps = num_micro_batches // of_step if self.drop_last else -(-num_micro_batches // of_step)
        return _Arranged(ids, bounds, of_step, num_steps)

    def _cut(self, num_ids: int) -> Ids:
        """Return where micro-batches begin, the first of each global batch among them, and the end of the last."""
        of_step = np.arange(0, self.global_batch, self.micro_batch)
        num_whole, rest = divmod(num_ids, self.global_batch)
        whole = (np.arange(num_whole)[:, None] * self.global_batch + of_step).ravel()
        end = num_whole * self.global_batch
        if rest and not self.drop_last:
            whole = np.concatenate([whole, end + of_step[of_step < rest]])
            end = num_ids
        return np.append(whole, end)


def some_of(ids: Ids) -> str:
    """Return the first ids, and how many there are, for a message."""
    shown = ", ".join(map(str, ids[:16].tolist()))
    return shown if len(ids) <= 16 else f"{shown}, ... ({len(ids)} in all)"


def shuffled(seed: int, epoch: int, num_samples: int) -> Ids:
    """Arrangement: a new permutation each epoch."""
    generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).numpy()


def unshuffled(seed: int, epoch: int, num_samples: int) -> Ids:
    """Arrangement: the ids as they are numbered."""
    return np.arange(num_samples, dtype=np.int64)


@dataclass(frozen=True)
class Custom:
    """Arrangement: the ids that the user's `order=` gives."""

    order: CustomOrder

    def __post_init__(self) -> None:
        if isinstance(self.order, Iterator):
            raise UsageError(
                f"order= is an iterator ({type(self.order).__name__}), which is used up after one epoch. "
                "Pass a sequence of ids, or a function from the epoch to its ids."
            )
        if not callable(self.order):
            _checked_ids(self.order, "order=")

    def __call__(self, seed: int, epoch: int, num_samples: int) -> Ids:
        """Return the ids of an epoch; a function is called with the random state of (seed, epoch)."""
        if not callable(self.order):
            return _checked_ids(self.order, "order=")
        with seeded(derive(seed, "order", epoch)):
            return _checked_ids(self.order(epoch), f"order({epoch})")


@runtime_checkable
class _EpochSampler(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Sampled:
    """Arrangement: what a sampler (or a batch sampler, flattened) yields, iterated once an epoch.

    torch, numpy, random and the generator of torch's own samplers have the state of (seed, epoch) meanwhile,
    and their former state afterwards. `set_epoch` is called where the sampler has one. Not covered: a sampler
    that keeps other state between epochs gives another order after a resume.
    """

    sampler: Iterable[Any]
    batched: bool = False  #: it yields lists of ids

    def __call__(self, seed: int, epoch: int, num_samples: int) -> Ids:
        """Return the ids of an epoch."""
        if self.batched:
            return self.batches(seed, epoch)[0]
        return _checked_ids(self._drawn(seed, epoch), f"the sampler {type(self.sampler).__name__}")

    def batches(self, seed: int, epoch: int) -> tuple[Ids, list[int]]:
        """Return the ids of an epoch, and the sizes of the batches in which they come."""
        batches = [list(batch) for batch in self._drawn(seed, epoch)]
        ids = _checked_ids([i for batch in batches for i in batch], f"the sampler {type(self.sampler).__name__}")
        return ids, [len(batch) for batch in batches if batch]

    def _drawn(self, seed: int, epoch: int) -> list[Any]:
        value = derive(seed, "order", epoch)
        with seeded(value), _seeded_generator(self.sampler, value):
            if isinstance(self.sampler, _EpochSampler):
                self.sampler.set_epoch(epoch)
            return list(self.sampler)


def _checked_ids(ids: Iterable[int], where: str) -> Ids:
    """Return ids as an array.

    Raises: UsageError when they are not whole numbers in one dimension.
    """
    listed = ids if isinstance(ids, Sequence | np.ndarray | torch.Tensor) else list(ids)
    array = np.asarray(listed)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"{where} gives {array.dtype} values of shape {array.shape}, such as {array.flat[0]!r}. "
            "Give whole numbers, the ids of samples, in one dimension."
        )
    return array.astype(np.int64, copy=False)


@contextmanager
def _seeded_generator(sampler: object, value: int) -> Iterator[None]:
    """Seed the generator that one of torch's samplers was given, if any, and put its state back."""
    generator: torch.Generator | None = None
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        generator = sampler.generator
    if generator is None:
        yield
        return
    state = generator.get_state()
    generator.manual_seed(value)
    try:
        yield
    finally:
        generator.set_state(state)
