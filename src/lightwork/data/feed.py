"""From what the user passes to `run.steps` or `run.evaluate` to an order of micro-batches and a loader of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch.utils.data import DataLoader

from lightwork.data.batch import Batch
from lightwork.data.batches import loader_in, looks_like_batches, without_progress_bar
from lightwork.data.identity import Fingerprint, fingerprint_of, fingerprint_of_stream
from lightwork.data.loader import Loader
from lightwork.data.order import CustomOrder, Ids, Order
from lightwork.data.source import Source, source_for_evaluation, source_of, stream_of
from lightwork.data.stream import StreamLoader, StreamOrder
from lightwork.errors import UsageError

#: Positions that will fall to this worker, in order: epoch, step in it, micro-batch.
Upcoming = Iterable[tuple[int, int, int]]


class Schedule(Protocol):
    """The steps and micro-batches of every epoch, as far as they are known."""

    def describe(self, epoch: int) -> dict[str, object]:
        """Return what must be the same on every worker."""

    @property
    def num_different(self) -> float:
        """The samples of which an epoch takes each once; infinite where it does not, or that is not known."""

    def total_steps(self, epochs: int, first: int = 0) -> int | None:
        """Return the steps of `epochs` epochs from `first` on; None where only reading shows them."""

    def has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Return whether an epoch has this step, as far as is known."""

    def is_last(self, epoch: int, step_in_epoch: int) -> bool | None:
        """Return whether a step is the last of its epoch; None where only reading shows it."""

    def after(self, epoch: int, step_in_epoch: int, goes_on: bool | None) -> tuple[int, int]:
        """Return the epoch and step that follow; `goes_on` is the team's vote (`Batches.goes_on`), None without one."""

    def micro_batches(self, epoch: int, step_in_epoch: int) -> int:
        """Return the number of micro-batches of a step."""


class Batches(Protocol):
    """The micro-batches of one worker."""

    def ids(self, epoch: int, step_in_epoch: int, index: int) -> Ids:
        """Return the ids of a micro-batch's samples; none where a stream has ended."""

    def get(self, epoch: int, step_in_epoch: int, index: int) -> Batch:
        """Return the collated micro-batch."""

    def goes_on(self, epoch: int, step_in_epoch: int, index: int) -> bool | None:
        """Return a micro-batch's vote, whether another step follows; one False ends the epoch, None is no vote."""

    def idle(self) -> bool:
        """Load something ahead; return whether there was anything to do."""

    def close(self) -> None:
        """Let go of what was loaded, and end the loading workers."""


def walk(order: Schedule, epoch: int, step_in_epoch: int) -> Iterator[tuple[int, int]]:
    """Yield the steps of all epochs, as far as is known, from a place on that may lie behind its epoch's end."""
    while True:
        while not order.has_step(epoch, step_in_epoch):
            epoch, step_in_epoch = epoch + 1, 0
        yield epoch, step_in_epoch
        step_in_epoch += 1


def upcoming(
    order: Schedule, epoch: int, step_in_epoch: int, num_steps: int | None, share: Callable[[int], Iterable[int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield the micro-batches that fall to a worker if nobody is late, in order, from a step on.

    `share` returns those of a step with so many; `num_steps` None goes on for ever, unless none falls to the worker: a
    stream, whose steps are not counted, has the same number of micro-batches in each.
    """
    for place in itertools.islice(walk(order, epoch, step_in_epoch), num_steps):
        own = list(share(order.micro_batches(*place)))
        if not own and num_steps is None:
            return
        for index in own:
            yield (*place, index)


def total_steps(order: Schedule, first: int, epochs: int | None, max_steps: int | None) -> int | None:
    """Return how many steps a loop from epoch `first` on makes in all; None where epochs of unknown lengths come."""
    of_epochs = order.total_steps(epochs, first) if epochs is not None else None
    return min((limit for limit in (max_steps, of_epochs) if limit is not None), default=None)


@dataclass(frozen=True)
class Feed:
    """An order of micro-batches, and how to load them."""

    order: Schedule
    load: Callable[[Upcoming], Batches]
    data: object  #: the data set itself
    fingerprint: Callable[[], Fingerprint]


def feed_of(
    data: Any,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    shuffle: bool | None = None,
    order: CustomOrder | None = None,
    drop_last: bool | None = None,
    batches: bool | None = None,
) -> Feed:
    """Return the feed of training; arguments as those of `Run.steps` and `distribute`.

    Raises: UsageError when `data` is no data set, or of a kind that can not be split over a team; DataError when it is
    empty.
    """
    data, batches = _settled(data, batches, (global_batch, micro_batch))
    stream = stream_of(data, seed=seed, shuffle=shuffle, order=order, drop_last=drop_last, batches=batches)
    if stream is not None:
        return _of_stream(StreamOrder(stream=stream, global_batch=global_batch, micro_batch=micro_batch))
    source = source_of(data, seed=seed, shuffle=shuffle, order=order)
    return _of_source(source, source.order(global_batch=global_batch, micro_batch=micro_batch, drop_last=drop_last))


def feed_for_evaluation(
    data: Any, *, seed: int, micro_batch: int, world_size: int, batches: bool | None = None
) -> Feed:
    """Return the feed of an evaluation: each sample once, in steps of one micro-batch, to be shared by `world_size`.

    What loading workers load ahead is claimed, so they load ahead at most half of a fair share.

    Raises: as `feed_of`.
    """
    data, batches = _settled(data, batches, (micro_batch,))
    stream = stream_of(data, seed=seed, shuffle=False, drop_last=False, batches=batches)
    if stream is not None:
        return _of_stream(StreamOrder(stream=stream, global_batch=micro_batch, micro_batch=micro_batch))
    source = source_for_evaluation(data, seed=seed)
    ids = source.order(global_batch=micro_batch, micro_batch=micro_batch, drop_last=False)
    if source.loading_workers.num_workers:
        share = -(-ids.num_steps(0) // world_size)
        source = replace(source, loading_workers=source.loading_workers.at_most(-(-share // 2)))
    return _of_source(source, ids)


def _settled(data: Any, batches: bool | None, sizes: tuple[int, ...]) -> tuple[Any, bool]:
    """Return what is to be read, and whether its items are whole batches.

    Raises: UsageError for a collection whose items may be either, and of which the script does not say it.
    """
    data = without_progress_bar(data)
    if batches is None and (
        loader_in(data) is not None or (isinstance(data, DataLoader) and data.batch_sampler is None)
    ):
        return data, True
    if batches and isinstance(data, DataLoader) and data.batch_sampler is not None:
        raise UsageError(
            "batches=True was given with a DataLoader, whose data set has samples: the run makes the batches. Leave it "
            "out; a DataLoader with batch_size=None hands out batches."
        )
    if batches is None and isinstance(data, Sequence) and len(data):
        num = looks_like_batches(data[0], sizes)
        if num is not None:
            raise UsageError(
                f"{data!r:.40}... ({type(data).__name__}) may be samples, or batches of {num} of them. Say which: "
                "batches=True for whole batches, batches=False for samples."
            )
    return data, bool(batches)


def _of_stream(steps: StreamOrder) -> Feed:
    return Feed(
        steps, partial(StreamLoader, steps), steps.stream.known_as, partial(fingerprint_of_stream, steps.stream)
    )


def _of_source(source: Source, ids: Order) -> Feed:
    return Feed(ids, partial(Loader, source, ids), source.fetcher.dataset, partial(fingerprint_of, source.fetcher))
