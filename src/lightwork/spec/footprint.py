"""How many bytes the holdings of a host take, and in which regions of memory they lie: sums over the table."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from lightwork.spec.holdings import (
    ITEMSIZE,
    MASTERS,
    SUMS,
    WORKING,
    Holdings,
    Home,
    scales_region,
    state_region,
)
from lightwork.spec.layout import spans_of
from lightwork.spec.plan import Part
from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node, fold

_PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A range of the memory of a host's workers, or of a device's."""

    num_bytes: int
    is_mapped: bool = True  #: it lies in the mapping that the host's workers share
    in_units: bool = False  #: an allocation for each bucket, on the device or in host memory that it reads by itself
    on_disk: tuple[tuple[int, int], ...] = ()  #: of the mapping: ranges of bytes that lie in a file
    homes: tuple[Home, ...] = ()  #: of a region in units, by bucket; then that of what is in no bucket


def regions_of(holdings: Holdings, fixed: Mapping[str, int], buffers: Mapping[str, int]) -> dict[str, Region]:
    """Return every region of the memory of a host's workers, by name.

    Args:
        fixed: bytes of those that always lie with the host: the board, mailboxes, flags.
        buffers: bytes of those of the model's buffers, which lie where computation sees them.
    """
    numel, state = holdings.layout.numel, holdings.state
    regions = {name: Region(num_bytes=size) for name, size in fixed.items()}
    regions[MASTERS] = _like_weights(holdings, holdings.widths.part_of_masters, numel, 4)
    regions[WORKING] = _like_weights(holdings, "weights", numel, holdings.widths.working)
    for entry, itemsize in state.itemsizes.items():
        regions[state_region(entry)] = _like_weights(holdings, "optimizer", numel, itemsize)
    flat = {
        "state odd": state.odd_bytes,
        **{scales_region(e): state.num_scales * 4 for e in state.in_8_bits},
        **buffers,
    }
    regions.update({name: Region(num_bytes=n, is_mapped=not holdings.memories.has_device) for name, n in flat.items()})
    regions["state numbers"] = Region(num_bytes=state.number_bytes)
    regions["state made"] = Region(num_bytes=state.num_flags)
    copies = holdings.capacity * holdings.num_places
    regions[SUMS] = _like_weights(holdings, "gradients", numel, ITEMSIZE[holdings.spec.wire], copies)
    return regions


def _like_weights(holdings: Holdings, part: Part, numel: int, itemsize: int, copies: int = 1) -> Region:
    """Return a region that is laid out like the weights, once or several times."""
    homes = holdings.homes_of(part)
    ranges = list(_on_disk(holdings, homes, numel))
    on_disk = [
        ((copy * numel + first) * itemsize, (copy * numel + end) * itemsize)
        for copy in range(copies)
        for first, end in ranges
    ]
    return Region(
        num_bytes=copies * numel * itemsize,
        is_mapped=not holdings.memories.has_device or bool(on_disk),
        in_units=not holdings.memories.in_units.isdisjoint(homes),
        on_disk=_merged(on_disk),
        homes=homes if holdings.memories.has_device else (),
    )


def _on_disk(holdings: Holdings, homes: tuple[Home, ...], numel: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements whose home is on disk."""
    *of_buckets, rest = homes
    spans = [
        (s.start, s.end, home)
        for b, home in zip(holdings.layout.buckets, of_buckets, strict=True)
        for s in spans_of(holdings.layout, b)
    ]
    if rest is not Home.DISK:
        yield from ((start, end) for start, end, home in spans if home is Home.DISK)
        return
    at = 0
    for start, end in sorted((start, end) for start, end, home in spans if home is not Home.DISK):
        yield (at, start)
        at = end
    yield (at, numel)


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges in order, with neighbours as one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > first:
            merged.append((first, end))
    return tuple(merged)


def expected_bytes(holdings: Holdings, homes: Container[Home] = frozenset(Home)) -> dict[str, int]:
    """Return the bytes that training on this host takes of what has its home in `homes`, by part.

    For P trained parameters on H hosts, of each host, as in "ZeRO: Memory Optimizations Toward Training Trillion
    Parameter Models" (Rajbhandari et al., 2020), sections 3 and 5, with what this design keeps besides:

        weights     2 P under bf16, 4 P under fp32; P / H of them with zero3 (frozen ones stay everywhere)
        optimizer   the state (8 P for Adam), and 4 P for masters under bf16; 1 / H of them from zero1 on
        gradients   with several hosts the sum over all, in the wire format: 4 P or 2 P; 1 / H of it from zero1 on.
                    The workers' partial sums: up to log2(m) + 1 for m micro-batches each. On a host of one worker
                    the last gradient is not kept, nor where the update is in backward.
    """
    wire = ITEMSIZE[holdings.spec.wire]
    totals = holdings.num_places - holdings.num_slots  # slots for the sum over all hosts: one, or none
    slots = {keeps_sent: _slots(holdings, keeps_sent=keeps_sent) for keeps_sent in (True, False)}
    found = dict.fromkeys(("weights", "optimizer", "gradients"), 0)
    of_parts = {part: holdings.homes_of(part) for part in _PARTS}
    if of_parts["weights"][-1] in homes:
        found["weights"] += sum(p.numel * ITEMSIZE[p.dtype] for p in holdings.layout.parameters if p.group is None)
    for row in holdings.rows:
        sizes = dict.fromkeys(found, 0)
        size = row.numel * 4 - row.num_narrow * 2
        if row.is_own or not row.weights_stay_with_owner:
            sizes["weights"] = size
        if row.is_own:
            sizes["optimizer"] = row.num_narrow * 4 + row.numel * sum(
                holdings.state.of_bucket(holdings.layout.buckets[row.bucket]).values()
            )
            sizes["gradients"] = row.numel * wire * totals
        leaf = min(row.numel * wire, size)
        of_row = slots[row.keeps_sent_sums]
        sizes["gradients"] += sum(leaf if of_leaves else row.numel * wire for of_leaves in of_row)
        for part in _PARTS:
            if of_parts[part][row.bucket] in homes:
                found[part] += sizes[part]
    return found


def _slots(holdings: Holdings, *, keeps_sent: bool) -> list[bool]:
    """Return for each slot that the workers of this host fill whether it holds leaf gradients alone."""
    micro_batches = len(holdings.roster.micro_batches(holdings.host, holdings.spec.num_micro_batches))
    alone = Roster.of_sizes((1,) * holdings.num_workers)
    return [
        of_leaves
        for rank in range(holdings.num_workers)
        for of_leaves in _slots_of(holdings, alone.micro_batches(rank, micro_batches), keeps_sent=keeps_sent)
    ]


def _slots_of(holdings: Holdings, micro_batches: range, *, keeps_sent: bool) -> list[bool]:
    held: dict[Node, int] = {}
    slots: dict[int, bool] = {}
    for index in micro_batches:
        chain, node = fold(index - micro_batches.start, len(micro_batches), held)
        is_sent = index in holdings.sent_at_once(holdings.roster, holdings.spec.num_micro_batches)
        if (is_sent or holdings.updates_in_backward) and not (chain and keeps_sent):
            continue
        slot = next(s for s in range(len(held) + 1) if s not in held.values())
        slots[slot] = slots.get(slot, True) and not chain
        for old in chain:
            del held[old]
        held[node] = slot
    return list(slots.values())


def working_set_bytes(holdings: Holdings) -> int:
    """Return what a worker needs beside the parts, at most.

    Scratch of an update and, in an elastic team, a record of what it changes; the largest parameter in backward (its
    weight, its gradient as autograd makes it, and its partial sum); with several hosts, the gradients that are on their
    way, and with zero3 the weights. On a device also the buckets of what is offloaded that come, are updated and leave.
    (What is read ahead from disk is not mapped.)
    """
    depths, wire = holdings.depths, ITEMSIZE[holdings.spec.wire]
    spans = [[s.numel for s in spans_of(holdings.layout, bucket)] for bucket in holdings.layout.buckets]
    of_bucket = max(map(sum, spans), default=0)
    record = max(map(max, spans), default=0) * (4 + sum(holdings.state.itemsizes.values())) * holdings.dials.elastic
    largest = max((p.numel * (2 * ITEMSIZE[p.dtype] + 4) for p in holdings.layout.parameters), default=0)
    totals = holdings.num_places - holdings.num_slots
    between_hosts = totals * of_bucket * wire * (depths.backlog + 2 * depths.turns * holdings.roster.num_hosts)
    coming = depths.kept + depths.ahead + 1 if holdings.shares_weights else 0
    if not holdings.memories.seen.issuperset(holdings.homes_of("weights")):
        # A bucket that leaves keeps its memory until the device has done what reads it: up to `kept` more.
        coming = 2 * depths.kept + depths.ahead + 1
    weights = of_bucket * holdings.widths.weight * coming
    if not holdings.memories.has_device:
        entries = len(holdings.state.itemsizes) + 2  # beside the state: master and gradient
        return of_bucket * 4 * (entries + 2) + record + largest + between_hosts + weights
    staged = 0
    if any(home is not Home.HERE for home in holdings.homes_of("optimizer")):
        staged = sum(holdings.state.itemsizes.values()) + holdings.widths.master_apart
    return of_bucket * (4 + wire + staged * (depths.leaving + 2)) + largest + between_hosts + weights
