"""The journal of a host: what a worker is about to change lies there as it was, so that another one can begin again.

An update works in place, and a worker may be killed in its middle. Bits of a half-made update can not be told from
others, nor made undone by arithmetic. So each worker has room for one record, the *granule* that it updates (neighbours
in memory, `Span`), and whoever is given a bucket that somebody has left in its middle puts the record back first.

    [Note: the order of a granule]
    It is copied to the record, **marked** as begun by this worker, changed (masters, state, working weights), and said
    to be **done** for this step. Killed before the mark: nothing was changed. Between mark and done: its record is put
    back. After done: it is left alone. The next granule overwrites the record, of which the mark then tells a granule
    that is done. Who puts a record back may be killed over it: the mark stands until its own covers the same values.

What nobody could take over is not recorded: a `Journal` keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch

from lightwork.spec.holdings import MASTERS
from lightwork.spec.layout import Layout, span_of, spans_of
from lightwork.state.state_layout import StateLayout
from lightwork.store.regions import Regions

_WORDS, _RECORDS = "journal", "journal records"
_WORD = 8

#: Bytes; a record's parts begin at multiples.
_ALIGNMENT = 64

#: Steps come before it in a mark, granules after.
_MAX_GRANULES = 1 << 31


class Granule(NamedTuple):
    """Neighbouring blocks that are updated at once."""

    number: int
    first: int  #: of its blocks, in the bucket
    end: int


class _Range(NamedTuple):
    """Bytes of a region."""

    region: str
    first: int
    end: int


class Journal:
    """Keeps nothing: where a worker is alone, or the team can not go on without it. A bucket is one granule."""

    def __init__(self, layout: Layout) -> None:
        numbers = range(len(layout.buckets))
        self._granules = [[Granule(bucket, 0, len(layout.block_indices(bucket)))] for bucket in numbers]

    def granules(self, bucket: int) -> Sequence[Granule]:
        """Return the granules of a bucket."""
        return self._granules[bucket]

    def begin_step(self, step: int) -> None:
        """Be in `step`."""

    def begin(self, granule: Granule) -> bool:
        """Begin to update a granule; return False if it is done already, by a worker that died later."""
        return True

    def end(self, granule: Granule) -> None:
        """Say that a granule is done."""

    def forget(self) -> None:
        """Forget everything, as steps come that were there before. Nobody is in a step."""


@final
class UndoJournal(Journal):
    """Keeps a record for each worker of a host."""

    def __init__(self, layout: Layout, state: StateLayout, memory: Regions, local_rank: int, num_workers: int) -> None:
        super().__init__(layout)
        self._granules = granules(layout)
        self._own = local_rank
        self._num_workers = num_workers
        self._step = 0
        num_granules = sum(map(len, self._granules))
        words = memory.region(_WORDS).cast("q")
        self._done, self._marks = words[:num_granules], words[num_granules:]
        self._memory = memory
        self._kept = [changed_ranges(layout, state, bucket, granule) for bucket, granule in _in_order(self._granules)]
        self._record_bytes = _record_bytes(self._kept)
        self._copies: dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def begin_step(self, step: int) -> None:
        """Be in `step`."""
        self._step = step

    def begin(self, granule: Granule) -> bool:
        """Copy a granule to this worker's record, after putting it back as it was if another one has begun it.

        See [Note: the order of a granule].
        """
        number = granule.number
        if self._done[number] == self._step + 1:
            return False
        mark = (self._step + 1) * _MAX_GRANULES + number
        if mark in self._marks:
            dead = self._marks.tolist().index(mark)
            records, places = self._tensors(dead, number)
            torch._foreach_copy_(places, records)
        records, places = self._tensors(self._own, number)
        torch._foreach_copy_(records, places)
        self._marks[self._own] = mark
        return True

    def end(self, granule: Granule) -> None:
        """Say that a granule is done."""
        self._done[granule.number] = self._step + 1

    def forget(self) -> None:
        """Forget everything, as steps come that were there before. Nobody is in a step."""
        for words in (self._done, self._marks):
            for at in range(len(words)):
                words[at] = 0

    def _tensors(self, local_rank: int, number: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the parts of a worker's record that a granule takes, and where they come from."""
        known = self._copies.get((local_rank, number))
        if known is None:
            records, places = [], []
            at = local_rank * self._record_bytes
            for region, first, end in self._kept[number]:
                records.append(self._memory.tensor(_RECORDS, torch.uint8, at, end - first))
                places.append(self._memory.tensor(region, torch.uint8, first, end - first))
                at += _up(end - first)
            known = self._copies[local_rank, number] = records, places
        return known


def journal_bytes(layout: Layout, state: StateLayout, num_workers: int) -> dict[str, int]:
    """Return the bytes of the regions of a journal for so many workers, by name."""
    kept = [changed_ranges(layout, state, bucket, granule) for bucket, granule in _in_order(granules(layout))]
    return {_WORDS: _WORD * (len(kept) + num_workers), _RECORDS: num_workers * _record_bytes(kept)}


def granules(layout: Layout) -> list[list[Granule]]:
    """Return the granules of each bucket."""
    found: list[list[Granule]] = []
    number = 0
    for bucket in layout.buckets:
        first, of_bucket = 0, []
        for span in spans_of(layout, bucket):
            of_bucket.append(Granule(number, first, first + len(span.blocks)))
            first += len(span.blocks)
            number += 1
        found.append(of_bucket)
    return found


def _in_order(granules: Sequence[Sequence[Granule]]) -> Iterator[tuple[int, Granule]]:
    return ((bucket, granule) for bucket, of_bucket in enumerate(granules) for granule in of_bucket)


def changed_ranges(layout: Layout, state: StateLayout, bucket: int, granule: Granule) -> list[_Range]:
    """Return where everything lies that an update of a granule changes, but for working weights."""
    first_block = layout.buckets[bucket].first_block
    blocks = range(first_block + granule.first, first_block + granule.end)
    first, last = (span_of(layout, layout.blocks[index]) for index in (blocks[0], blocks[-1]))
    ranges = [_Range(MASTERS, first.start * 4, last.end * 4)]
    ranges += [_Range(*found) for found in state.ranges_of(blocks, first.start, last.end)]
    return [found for found in ranges if found.end > found.first]


def _record_bytes(kept: Sequence[Sequence[_Range]]) -> int:
    return max((sum(_up(end - first) for _, first, end in of_granule) for of_granule in kept), default=0)


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
