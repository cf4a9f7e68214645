"""What the user passes to `run.steps` and `run.evaluate`, checked and taken apart.

A map-style data set is fetched by itself. A DataLoader stands for its parts: data set, collate function,
sampler, drop_last, and the settings of its loading workers. Not used of it: its batch size (the batches are
the run's), pin_memory and its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from lightwork.data.batch import Batch
from lightwork.data.batches import Rows, put_together
from lightwork.data.fetch import Fetcher, MapStyle
from lightwork.data.order import Arrangement, Custom, CustomOrder, Ids, Order, Sampled, shuffled, unshuffled
from lightwork.data.stream import Stream
from lightwork.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LoadingWorkers:
    """The processes that load ahead of training, beside each worker; settings as of torch's DataLoader."""

    num_workers: int = 0  #: 0: the worker loads by itself
    prefetch_factor: int = 2  #: batches that each loads ahead
    timeout: float = 0.0  #: seconds to wait for a batch; 0: forever
    worker_init_fn: Callable[[int], None] | None = None
    multiprocessing_context: Any = None  #: None: torch's choice; or "fork", "spawn", "forkserver", a context

    def at_most(self, num_batches: int) -> LoadingWorkers:
        """Return as many of these as load `num_batches` ahead, at least 1."""
        num_workers = min(self.num_workers, num_batches)
        prefetch_factor = min(self.prefetch_factor, num_batches // num_workers)
        return replace(self, num_workers=num_workers, prefetch_factor=prefetch_factor)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What fetches samples and says their order."""

    fetcher: Fetcher
    arrangement: Arrangement
    seed: int
    drop_last: bool = False
    loading_workers: LoadingWorkers = LoadingWorkers()

    def fetch(self, epoch: int, ids: Ids) -> Batch:
        """Return the collated batch of `ids`; see `Fetcher.fetch`."""
        return self.fetcher.fetch(epoch, ids)

    def order(self, *, global_batch: int, micro_batch: int, drop_last: bool | None = None) -> Order:
        """Return the order of samples, in the run's batches; `drop_last` None: as the DataLoader says.

        Raises: DataError when the data set is empty.
        """
        return Order(
            seed=self.seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            arrangement=self.arrangement,
            count_samples=self.fetcher.dataset.__len__,
            data_name=self.fetcher.name,
            drop_last=self.drop_last if drop_last is None else drop_last,
        )


def stream_of(
    data: object,
    *,
    seed: int,
    shuffle: bool | None = None,
    order: CustomOrder | None = None,
    drop_last: bool | None = None,
    batches: bool = False,
) -> Stream | None:
    """Return the stream that an IterableDataset, or a DataLoader of one, stands for; None for anything else.

    The order is the stream's; with shards, theirs is a new permutation each epoch unless `shuffle` is False. With
    `batches`, its items are whole batches, and it is read row by row.

    Raises: UsageError for what a stream can not do.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if batches:
        if isinstance(data, Iterator):
            raise UsageError(
                f"{data!r:.60} is an iterator, which can be read once, by one worker. Pass what it is made from, or an "
                "object whose __iter__ begins anew."
            )
        if not isinstance(data, Iterable):
            raise UsageError(f"batches=True was given with {type(data).__name__}, which can not be iterated.")
        dataset = Rows(data)
    elif not (isinstance(dataset, IterableDataset) or _is_iterated(dataset)):
        return None
    stream = Stream(
        dataset=dataset,
        given=data if batches else None,
        collate=put_together if batches else default_collate,
        seed=seed,
        shuffle=shuffle is not False,
        drop_last=bool(drop_last),
    )
    if order is not None:
        raise UsageError(f"order= was given for {stream.name}, a stream, whose samples have no ids. Leave it out.")
    if shuffle and stream.num_shards is None:
        raise UsageError(
            f"shuffle=True was given for {stream.name}, a stream that is read in its own order. Shuffle in the data "
            "set, or give it shards: num_shards and shard(num_shards=, index=)."
        )
    if batches or not isinstance(data, DataLoader):
        return stream
    _refuse_whole_batches(data)
    return replace(stream, collate=data.collate_fn, drop_last=data.drop_last if drop_last is None else stream.drop_last)


def _is_iterated(data: object) -> bool:
    """Return whether `data` is no torch data set and can only be iterated, again and again."""
    reads = isinstance(data, Iterable) and not isinstance(data, (Iterator, type, str, bytes, Mapping, Set))
    return reads and not isinstance(data, (MapStyle, Dataset))


def source_of(data: object, *, seed: int, shuffle: bool | None = None, order: CustomOrder | None = None) -> Source:
    """Return the source that a data set or DataLoader stands for.

    The order is that of `order`, where given; else of the DataLoader's own sampler; else of `shuffle` (True: a
    new permutation each epoch, False: as numbered); else as the DataLoader shuffles; else shuffled.

    Raises: UsageError when `data` is neither, or of a kind that can not be split over a team.
    """
    if order is not None and shuffle:
        raise UsageError("order= and shuffle=True were both given, and order= says the order. Leave shuffle out.")
    if isinstance(data, DataLoader):
        return _source_of_loader(data, seed, shuffle, order)
    dataset = _check_dataset(data)
    return Source(
        fetcher=Fetcher(dataset, default_collate, seed),
        arrangement=_chosen(shuffle, order) or shuffled,
        seed=seed,
    )


def source_for_evaluation(data: object, *, seed: int) -> Source:
    """Return the source of an evaluation: each sample once, as numbered, and none left out as the last.

    Where a DataLoader has a sampler of its own, its ids are evaluated: it may choose a part of the data set.

    Raises: UsageError as `source_of` does.
    """
    source = source_of(data, seed=seed)
    arrangement = unshuffled if source.arrangement is shuffled else source.arrangement
    return replace(source, arrangement=arrangement, drop_last=False)


def _source_of_loader(loader: DataLoader[Any], seed: int, shuffle: bool | None, order: CustomOrder | None) -> Source:
    dataset = _check_dataset(loader.dataset)
    for sampler in (loader.sampler, loader.batch_sampler):
        inner = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
        if isinstance(inner, DistributedSampler):
            raise UsageError(
                f"the DataLoader has a {type(inner).__name__} for {inner.num_replicas} replicas, and the run "
                "splits the samples over its workers itself. Leave the sampler out; shuffle=True is enough."
            )
    _refuse_whole_batches(loader)
    arrangement = _arrangement_of(loader, len(dataset))
    if isinstance(arrangement, Sampled) and shuffle is not None:
        # A sampler may choose a part of the data set: the other part must not come in by a keyword about order.
        raise UsageError(
            f"shuffle={shuffle} was given, and the DataLoader has a {type(arrangement.sampler).__name__}, which "
            "says the order. Leave shuffle out, or give the DataLoader without its sampler."
        )
    workers = LoadingWorkers(
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor or 2,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    return Source(
        fetcher=Fetcher(dataset, loader.collate_fn, seed),
        arrangement=_chosen(shuffle, order) or arrangement,
        seed=seed,
        drop_last=loader.drop_last,
        loading_workers=workers,
    )


def _refuse_whole_batches(loader: DataLoader[Any]) -> None:
    if loader.batch_sampler is None:
        raise UsageError(
            "the DataLoader has batch_size=None, so its data set hands out whole batches, and batches=False says that "
            "they are samples. Leave batches out, or give the DataLoader a batch size."
        )


def _chosen(shuffle: bool | None, order: CustomOrder | None) -> Arrangement | None:
    if order is not None:
        return Custom(order)
    if shuffle is None:
        return None
    return shuffled if shuffle else unshuffled


def _arrangement_of(loader: DataLoader[Any], num_samples: int) -> Arrangement:
    if loader.batch_size is None and loader.batch_sampler is not None:
        return Sampled(loader.batch_sampler, batched=True)
    sampler = loader.sampler
    if type(sampler) is RandomSampler:
        every = not sampler.replacement and sampler.num_samples == num_samples == len(sampler.data_source)
        return shuffled if every else Sampled(sampler)
    if type(sampler) is SequentialSampler and len(sampler) == num_samples:
        return unshuffled
    return Sampled(sampler)


def _check_dataset(data: object) -> MapStyle:
    name = type(data).__name__
    if isinstance(data, type):
        raise UsageError(f"{name} {data.__name__} was passed itself, not an instance. Write {data.__name__}(...).")
    if not isinstance(data, MapStyle):
        raise UsageError(
            f"{data!r:.80} ({name}) is not a data set: it lacks __len__ or __getitem__. "
            "Pass a map-style torch Dataset, a list of samples, or a DataLoader (itself: not its iterator, nor "
            "enumerate() or a generator over it, which can be read once)."
        )
    return data
