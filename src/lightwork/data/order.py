"""The order of samples: which ids an epoch holds, and which of them a micro-batch holds.

An `Arrangement` says the ids of an epoch; an `Order` checks them and cuts them, first into global batches,
then those into micro-batches. Everything here is a pure function of (seed, epoch, position): the number of
workers is nowhere. No samples are fetched here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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
    _cache: dict[int, Ids] = field(init=False, repr=False, compare=False, default_factory=dict)
    #: Of an epoch whose micro-batches are a batch sampler's: where each begins, and the end of the last.
    _bounds: dict[int, Ids] = field(init=False, repr=False, compare=False, default_factory=dict)

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
        cached = self._cache.get(epoch)
        if cached is None:
            cached = self._arrange(epoch)
            self._cache[epoch] = cached
            while len(self._cache) > NUM_CACHED_EPOCHS:
                self._bounds.pop(next(iter(self._cache)), None)
                del self._cache[next(iter(self._cache))]
        return cached

    def _bounds_of(self, epoch: int) -> Ids | None:
        self.ids(epoch)
        return self._bounds.get(epoch)

    @property
    def _most(self) -> int:
        """The micro-batches of a global batch that is not short."""
        return -(-self.global_batch // self.micro_batch)

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
        bounds = self._bounds_of(epoch)
        num, of_step = (len(self.ids(epoch)), self.global_batch) if bounds is None else (len(bounds) - 1, self._most)
        return num // of_step if self.drop_last else -(-num // of_step)

    def total_steps(self, epochs: int, first: int = 0) -> int:
        """Return the number of global batches of `epochs` epochs from `first` on."""
        if isinstance(self.arrangement, (Custom, Sampled)):  # epochs may differ in length
            return sum(self.num_steps(epoch) for epoch in range(first, first + epochs))
        return epochs * self.num_steps(first) if epochs else 0

    def step_ids(self, epoch: int, step_in_epoch: int) -> Ids:
        """Return the ids of a global batch."""
        num_steps = self.num_steps(epoch)
        if not 0 <= step_in_epoch < num_steps:
            raise IndexError(f"step {step_in_epoch} of epoch {epoch}, which has steps 0 to {num_steps - 1}")
        bounds = self._bounds_of(epoch)
        if bounds is not None:
            end = min((step_in_epoch + 1) * self._most, len(bounds) - 1)
            return self.ids(epoch)[bounds[step_in_epoch * self._most] : bounds[end]]
        return self.ids(epoch)[step_in_epoch * self.global_batch : (step_in_epoch + 1) * self.global_batch]

    def micro_batches(self, epoch: int, step_in_epoch: int) -> int:
        """Return the number of micro-batches of a global batch: M, fewer where it is short."""
        bounds = self._bounds_of(epoch)
        if bounds is not None and self.has_step(epoch, step_in_epoch):
            return min(self._most, len(bounds) - 1 - step_in_epoch * self._most)
        return -(-len(self.step_ids(epoch, step_in_epoch)) // self.micro_batch)

    def micro_batch_ids(self, epoch: int, step_in_epoch: int, index: int) -> Ids:
        """Return the ids of micro-batch `index` of a global batch: `micro_batch` of them, or what is left."""
        ids, bounds = self.step_ids(epoch, step_in_epoch), self._bounds_of(epoch)
        if bounds is not None and index < self.micro_batches(epoch, step_in_epoch):
            at = step_in_epoch * self._most + index
            return self.ids(epoch)[bounds[at] : bounds[at + 1]]
        first = index * self.micro_batch
        if not 0 <= first < len(ids):
            raise IndexError(
                f"micro-batch {index} of step {step_in_epoch} of epoch {epoch}, which has {len(ids)} samples"
            )
        return ids[first : first + self.micro_batch]

    def _arrange(self, epoch: int) -> Ids:
        num_samples = self.count_samples()
        if num_samples != self.num_samples:
            raise DataError(
                f"{self.data_name} changed its length: {self.num_samples} samples when the run began, "
                f"{num_samples} at epoch {epoch}. Keep its len() fixed; order= chooses an epoch's samples."
            )
        # Not a view of the caller's array, which may change, nor writable by those whom it is handed to.
        if isinstance(self.arrangement, Sampled) and self.arrangement.batched:
            arranged, sizes = self.arrangement.batches(self.seed, epoch)
            if max(sizes, default=0) <= self.micro_batch:
                self._bounds[epoch] = np.cumsum([0, *sizes])
            elif epoch not in self._cache:
                notice(
                    f"the batch sampler {type(self.arrangement.sampler).__name__} makes batches of up to {max(sizes)} "
                    f"samples, more than micro_batch={self.micro_batch}: its ids are cut anew, in their order. With "
                    f"micro_batch={max(sizes)} its batches stay together."
                )
        else:
            arranged = self.arrangement(self.seed, epoch, num_samples)
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
        return ids


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
