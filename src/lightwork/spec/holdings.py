"""Holdings: of each bucket who owns it and, of each of its parts, where that lies on one host, and in how many bytes.

A pure table, made from model, spec and plan before there is any memory. Everything that asks where a value is, or how
large, reads it: the regions that are reserved, the check that there is room for them, the choice of what to offload,
who updates a bucket, which weights are fetched. Five tensors are kept for a parameter, in four places:

    [Note: five tensors, four places]
    master           the fp32 weight that the optimizer updates
    working weight   the weight that forward and backward read. Where it is fp32 too, it is the master
    state            what the optimizer keeps of a parameter beside its master
    leaf gradient    of one micro-batch, in the type of the working weight
    partial sum      of the leaf gradients of neighbouring micro-batches, in the wire format

    here             where computation sees a tensor: the host's memory for workers on CPUs, else the device's
    home             where it is kept from step to step: here, the host's memory, or disk. What has its home elsewhere
                     comes here before it is used, and leaves after
    owner            the host that has it where others do not: where weights or state are shared out
    wire             on its way between hosts
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import get_args

from lightwork.errors import SpecError
from lightwork.spec.hosts import Hosts
from lightwork.spec.layout import Cut, Layout, ParameterSpec, cut_for, spans_of
from lightwork.spec.plan import Part, Place, Placement
from lightwork.spec.spec import Spec
from lightwork.spec.tree import Node, fold, max_partial_sums

_PARTS: tuple[Part, ...] = get_args(Part)

#: The regions of the parts that are laid out like the weights; those of the state are `state_region(entry)`.
MASTERS, WORKING, SUMS = "masters", "working", "partial sums"

#: Bytes of an element, by the name of its type.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2}


def state_region(entry: str) -> str:
    """Return the region of an entry of the optimizer's state."""
    return f"state {entry}"


def scales_region(entry: str) -> str:
    """Return the region of the scales of an entry that is kept in 8 bits."""
    return f"scales {entry}"


class Home(Enum):
    """Where a part of a bucket is kept from step to step."""

    HERE = "where computation sees it, always"
    HOST = "in the memory of the host, from which it comes to the device"
    DISK = "in a file, of which what is used is mapped"
    OWNER = "on another host"


@dataclass(frozen=True, kw_only=True)
class Depths:
    """How far what is on its way may run ahead. No bit depends on it."""

    kept: int = 4  #: buckets of weights that stay here while nobody uses them
    ahead: int = 2  #: buckets of weights that are asked for before they are needed
    leaving: int = 2  #: buckets of state that may be on their way home before the next one comes
    turns: int = 3  #: turns between hosts: one begins, one is added up, and of one the sums arrive
    backlog: int = 8  #: buckets that backward may complete before they are taken
    piece: int = 4 * 2**20  #: elements of a gradient that are folded at once where partial sums lie on disk
    early: int = 16 * 2**20  #: elements of a model from which on its update is worth doing within backward


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes that are the same for every run, and other ones in tests. The cut changes the bits of a norm."""

    block: int | None = None  #: elements; None: as is best for the device
    bucket: int | None = None  #: elements
    depths: Depths = field(default_factory=Depths)

    def cut_for(self, device: str) -> Cut:
        """Return how parameters are cut for workers on this kind of device."""
        cut = cut_for(device)
        return replace(cut, block=self.block or cut.block, bucket=self.bucket or cut.bucket)


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """What an optimizer keeps, in numbers."""

    itemsizes: Mapping[str, int]  #: bytes of an element of each entry of the parameters' shape
    in_8_bits: frozenset[str] = frozenset()  #: of these entries
    num_scales: int = 0  #: of each entry in 8 bits
    odd_bytes: int = 0  #: of entries of other shapes
    number_bytes: int = 0  #: of those of them that lie with the host


@dataclass(frozen=True, kw_only=True)
class Dials:
    """What a plan says of a bucket."""

    placement: Placement = "replicate"
    offload: Mapping[str, Place] = field(default_factory=dict)  #: by part


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A part of a bucket on this host."""

    dtype: str  #: of its elements; of working weights, that of the narrow ones
    num_bytes: int  #: wherever they lie
    home: Home

    @property
    def comes_and_goes(self) -> bool:
        """Whether it is here only while it is used."""
        return self.home is not Home.HERE


@dataclass(frozen=True, kw_only=True)
class Row:
    """A bucket on this host."""

    bucket: int
    owner: int  #: the host that adds up its gradient and, where it is shared out, updates it
    is_own: bool  #: whether this host updates it: the owner, or every host where nothing is shared out
    dials: Dials
    numel: int
    num_narrow: int  #: elements whose working weight is not the master
    parts: Mapping[str, Holding]  #: by region


@dataclass(frozen=True, kw_only=True)
class Region:
    """A range of the memory of a host's workers, or of a device's."""

    num_bytes: int
    is_mapped: bool = True  #: it lies in the mapping that the host's workers share
    in_units: bool = False  #: an allocation for each bucket, on the device or in host memory that it reads by itself
    on_disk: tuple[tuple[int, int], ...] = ()  #: of the mapping: ranges of bytes that lie in a file
    homes: tuple[Home, ...] = ()  #: of a region in units, by bucket; then that of what is in no bucket


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """The holdings of one host."""

    layout: Layout
    spec: Spec
    hosts: Hosts
    host: int
    state: StateShape
    dials: Dials = field(default_factory=Dials)
    dials_of: Mapping[int, Dials] = field(default_factory=dict)  #: of buckets for which the plan says something else
    depths: Depths = field(default_factory=Depths)

    def __post_init__(self) -> None:
        if max(self.hosts.sizes) > 1 and any(self._placement(dials) == "zero3" for dials in self._all_dials()):
            raise SpecError(
                f"placement='zero3' shares weights out among workers with memories of their own, and here up to "
                f"{max(self.hosts.sizes)} workers of a machine share one. Choose transport='group', or "
                "placement='zero2'."
            )

    def with_offload(self, offload: Mapping[str, Place]) -> Holdings:
        """Return the holdings under another choice of what to offload."""
        return replace(self, dials=replace(self.dials, offload=dict(offload)))

    # --- the table --------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each bucket."""
        return tuple(self._row(bucket) for bucket in range(len(self.layout.buckets)))

    @property
    def num_workers(self) -> int:
        """The workers of this host."""
        return self.hosts.sizes[self.host]

    @property
    def num_slots(self) -> int:
        """Partial sums that one worker may hold."""
        return max_partial_sums(self.spec.num_micro_batches)

    @property
    def num_places(self) -> int:
        """Slots of a worker: for its partial sums and, with several hosts, for the sum of all (the leader's)."""
        return self.num_slots + (len(self.hosts) > 1)

    @property
    def has_device(self) -> bool:
        """Whether computation sees another memory than the host's."""
        return self.spec.device != "cpu"

    @cached_property
    def narrow(self) -> str | None:
        """The type of working weights that are not masters; None where there are none."""
        return next((p.dtype for p in self.layout.parameters if p.dtype != "float32"), None)

    @cached_property
    def own_buckets(self) -> tuple[int, ...]:
        """The buckets that this host updates."""
        return tuple(row.bucket for row in self.rows if row.is_own)

    @cached_property
    def shares_state(self) -> bool:
        """Whether any bucket is updated by one host alone."""
        return any(self._placement(row.dials) != "replicate" for row in self.rows)

    @cached_property
    def shares_weights(self) -> bool:
        """Whether the weights of any bucket stay with its owner."""
        return any(self._placement(row.dials) == "zero3" for row in self.rows)

    @cached_property
    def fetches_from_home(self) -> bool:
        """Whether weights come to a device just before they are read."""
        return self.has_device and any(self._offload(dials, "weights") for dials in self._all_dials())

    @cached_property
    def weights_on_disk(self) -> bool:
        """Whether a file holds masters or working weights, of which forward and backward read some."""
        parts: tuple[Part, ...] = ("weights", "optimizer") if self.narrow else ("weights",)
        return any(self._home(dials, part) is Home.DISK for dials in self._all_dials() for part in parts)

    def dtype_of(self, region: str) -> str:
        """Return the type of the elements of the region of masters, or of that of working weights."""
        return self.narrow or "float32" if region == WORKING else "float32"

    @property
    def updates_in_backward(self) -> bool:
        """Whether a bucket is updated as soon as its gradient is there."""
        needs_norm = self.spec.clip_grad_norm is not None or self.spec.precision == "fp16"
        is_alone = self.hosts.world_size == 1 and self.spec.num_micro_batches == 1
        return is_alone and not needs_norm and self.layout.numel >= self.depths.early

    def is_shared_out(self, bucket: int) -> bool:
        """Return whether one host alone updates a bucket."""
        return self._placement(self.rows[bucket].dials) != "replicate"

    def keeps_sent_sums(self, bucket: int) -> bool:
        """Return whether a bucket's partial sums keep their memory when they have left for its owner."""
        return self._placement(self.rows[bucket].dials) not in ("zero2", "zero3")

    def home_of_weights(self, bucket: int) -> Home:
        """Return where a bucket's working weights are kept."""
        return self.rows[bucket].parts[WORKING if self.narrow else MASTERS].home

    def weights_are_fetched(self, bucket: int) -> bool:
        """Return whether a bucket's working weights are here only while they are read, from home or from the owner."""
        home = self.home_of_weights(bucket)
        return home is Home.OWNER or (self.has_device and home is not Home.HERE)

    def masters_are_here(self) -> bool:
        """Return whether this host has every master where computation sees it."""
        return all(row.parts[MASTERS].home is Home.HERE or not self.has_device for row in self.rows) and not (
            self.shares_state
        )

    def _row(self, bucket: int) -> Row:
        dials = self.dials_of.get(bucket, self.dials)
        blocks = self.layout.blocks_of(bucket)
        numel = sum(block.end - block.start for block in blocks)
        narrow = sum(b.end - b.start for b in blocks if self.layout.parameters[b.parameter].dtype != "float32")
        owner, placement = self.hosts.owner(bucket), self._placement(dials)
        is_own = placement == "replicate" or owner == self.host
        away = None if is_own else Home.OWNER
        weights_away = away if placement == "zero3" else None
        of_state, of_weights = self._home(dials, "optimizer"), self._home(dials, "weights")
        of_masters = (away or of_state) if self.narrow else (weights_away or of_weights)
        parts = {MASTERS: Holding(dtype="float32", num_bytes=numel * 4, home=of_masters)}
        if self.narrow:
            size = narrow * ITEMSIZE[self.narrow]
            kept = of_weights if narrow else Home.HERE  # weights that are fp32 all the same are few
            parts[WORKING] = Holding(dtype=self.narrow, num_bytes=size, home=weights_away or kept)
        for entry, itemsize in self.state.itemsizes.items():
            kind = "uint8" if entry in self.state.in_8_bits else f"{itemsize} bytes"
            parts[state_region(entry)] = Holding(dtype=kind, num_bytes=numel * itemsize, home=away or of_state)
        wire = self.spec.wire
        parts[SUMS] = Holding(dtype=wire, num_bytes=numel * ITEMSIZE[wire], home=self._home(dials, "gradients"))
        return Row(
            bucket=bucket,
            owner=owner,
            is_own=is_own,
            dials=dials,
            numel=numel,
            num_narrow=narrow,
            parts=parts,
        )

    def _placement(self, dials: Dials) -> Placement:
        return dials.placement if len(self.hosts) > 1 else "replicate"

    def _offload(self, dials: Dials, part: Part) -> Place | None:
        """Return where a part is offloaded to, if it is: a CPU's memory is the host's."""
        place = dials.offload.get(part)
        return place if self.has_device or place == "disk" else None

    def _home(self, dials: Dials, part: Part) -> Home:
        place = self._offload(dials, part)
        return Home.HERE if place is None else Home.HOST if place == "host" else Home.DISK

    def _all_dials(self) -> Iterator[Dials]:
        yield self.dials
        yield from self.dials_of.values()

    # --- regions ----------------------------------------------------------------------------------------------------

    def regions(self, fixed: Mapping[str, int], buffers: Mapping[str, int]) -> dict[str, Region]:
        """Return every region of the memory of this host's workers, by name.

        Args:
            fixed: bytes of those that always lie with the host: the board, mailboxes, flags.
            buffers: bytes of those of the model's buffers, which lie where computation sees them.
        """
        numel = self.layout.numel
        regions = {name: Region(num_bytes=size) for name, size in fixed.items()}
        regions[MASTERS] = self._elements("optimizer" if self.narrow else "weights", numel, 4)
        regions[WORKING] = self._elements("weights", numel if self.narrow else 0, 2)
        for entry, itemsize in self.state.itemsizes.items():
            regions[state_region(entry)] = self._elements("optimizer", numel, itemsize)
        for entry in self.state.in_8_bits:
            regions[scales_region(entry)] = self._flat(self.state.num_scales * 4)
        regions["state odd"] = self._flat(self.state.odd_bytes)
        regions["state numbers"] = Region(num_bytes=self.state.number_bytes)
        regions["state initialised"] = Region(num_bytes=len(self.layout.blocks))
        regions.update({name: self._flat(size) for name, size in buffers.items()})
        copies = self.num_workers * self.num_places
        regions[SUMS] = self._elements("gradients", numel, ITEMSIZE[self.spec.wire], copies)
        return regions

    def _flat(self, num_bytes: int) -> Region:
        return Region(num_bytes=num_bytes, is_mapped=not self.has_device)

    def _elements(self, part: Part, numel: int, itemsize: int, copies: int = 1) -> Region:
        """Return a region that is laid out like the weights, once or several times."""
        homes = [self._home(self.dials_of.get(b, self.dials), part) for b in range(len(self.layout.buckets))]
        homes.append(self._home(self.dials, part))
        on_disk: list[tuple[int, int]] = []
        for copy in range(copies if Home.DISK in homes else 0):
            on_disk += [
                ((copy * numel + first) * itemsize, (copy * numel + end) * itemsize)
                for first, end in self._ranges(homes, numel)
            ]
        return Region(
            num_bytes=copies * numel * itemsize,
            is_mapped=not self.has_device or bool(on_disk),
            in_units=self.has_device and any(home is not Home.DISK for home in homes),
            on_disk=_merged(on_disk),
            homes=tuple(homes) if self.has_device else (),
        )

    def _ranges(self, homes: list[Home], numel: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of elements whose home is on disk."""
        *of_buckets, rest = homes
        if all(home is rest for home in of_buckets):
            yield (0, numel)
            return
        spans = {bucket: spans_of(self.layout, self.layout.buckets[bucket]) for bucket in range(len(of_buckets))}
        if rest is not Home.DISK:
            yield from ((s.start, s.end) for b, home in enumerate(of_buckets) if home is Home.DISK for s in spans[b])
            return
        at = 0
        for start, end in sorted((s.start, s.end) for b, h in enumerate(of_buckets) if h is not rest for s in spans[b]):
            yield (at, start)
            at = end
        yield (at, numel)

    # --- bytes ------------------------------------------------------------------------------------------------------

    def expected_bytes(self, homes: Container[Home] = frozenset(Home)) -> dict[str, int]:
        """Return the bytes that training on this host takes, by the parts that can be offloaded.

        Of what has its home in `homes`.

        For P trained parameters on H hosts, of each host, as in "ZeRO: Memory Optimizations Toward Training Trillion
        Parameter Models" (Rajbhandari et al., 2020), sections 3 and 5, with what this design keeps besides:

            weights     2 P under bf16, 4 P under fp32; P / H of them with zero3 (frozen ones stay everywhere)
            optimizer   the state (8 P for Adam), and 4 P for masters under bf16; 1 / H of them from zero1 on
            gradients   with several hosts the sum over all, in the wire format: 4 P or 2 P; 1 / H of it from zero1 on.
                        The workers' partial sums: up to log2(m) + 1 for m micro-batches each. On a host of one worker
                        the last gradient is not kept, nor where the update is in backward.
        """
        wire = ITEMSIZE[self.spec.wire]
        slots = {keeps_sent: self._slots(keeps_sent=keeps_sent) for keeps_sent in (True, False)}
        found = dict.fromkeys(("weights", "optimizer", "gradients"), 0)
        if self._home(self.dials, "weights") in homes:
            found["weights"] += sum(_bytes_of(p) for p in self.layout.parameters if p.group is None)
        for row in self.rows:
            sizes = dict.fromkeys(found, 0)
            size = row.numel * 4 - row.num_narrow * 2
            if row.is_own or self._placement(row.dials) != "zero3":
                sizes["weights"] = size
            if row.is_own:
                sizes["optimizer"] = row.num_narrow * 4 + row.numel * sum(self.state.itemsizes.values())
                sizes["gradients"] = row.numel * wire if len(self.hosts) > 1 else 0
            leaf = row.numel * wire if self.spec.wire == "bf16" else size
            of_row = slots[self.keeps_sent_sums(row.bucket)]
            sizes["gradients"] += sum(leaf if of_leaves else row.numel * wire for of_leaves in of_row)
            for part in _PARTS:
                if self._home(row.dials, part) in homes:
                    found[part] += sizes[part]
        return found

    def _slots(self, *, keeps_sent: bool) -> list[bool]:
        """Return for each slot that the workers of this host fill whether it holds leaf gradients alone."""
        micro_batches = len(self.hosts.micro_batches(self.host, self.spec.num_micro_batches))
        alone = Hosts((1,) * self.num_workers)
        return [
            of_leaves
            for rank in range(self.num_workers)
            for of_leaves in self._slots_of(alone.micro_batches(rank, micro_batches), keeps_sent=keeps_sent)
        ]

    def _slots_of(self, micro_batches: range, *, keeps_sent: bool) -> list[bool]:
        held: dict[Node, int] = {}
        slots: dict[int, bool] = {}
        for index in micro_batches:
            chain, node = fold(index - micro_batches.start, len(micro_batches), held)
            is_sent = len(self.hosts) > 1 and self.num_workers == 1 and index == micro_batches[-1]
            if (is_sent or self.updates_in_backward) and not (chain and keeps_sent):
                continue
            slot = next(s for s in range(len(held) + 1) if s not in held.values())
            slots[slot] = slots.get(slot, True) and not chain
            for old in chain:
                del held[old]
            held[node] = slot
        return list(slots.values())

    def working_set_bytes(self) -> int:
        """Return what a worker needs beside the parts, at most.

        Scratch of an update; the largest parameter in backward (its weight, its gradient as autograd makes it, and its
        partial sum); with several hosts, the gradients that are on their way, and with zero3 the weights. On a device
        also the buckets of what is offloaded that come, are updated and leave. (What is read ahead from disk is not
        mapped.)
        """
        depths, wire = self.depths, ITEMSIZE[self.spec.wire]
        sizes = [sum(s.numel for s in spans_of(self.layout, bucket)) for bucket in self.layout.buckets]
        of_bucket = max(sizes, default=0)
        largest = max((p.numel * (2 * ITEMSIZE[p.dtype] + 4) for p in self.layout.parameters), default=0)
        between_hosts = 0
        if len(self.hosts) > 1:
            between_hosts = of_bucket * wire * (depths.backlog + 2 * depths.turns * len(self.hosts))
        coming = depths.kept + depths.ahead + 1 if self.shares_weights else 0
        if self.fetches_from_home:
            coming = 2 * depths.kept + depths.ahead + 1  # of these, as many wait for computation to be done with them
        weights = of_bucket * (2 if self.narrow else 4) * coming
        if not self.has_device:
            entries = len(self.state.itemsizes) + 2  # beside the state: master and gradient
            return of_bucket * 4 * (entries + 2) + largest + between_hosts + weights
        staged = 0
        if any(self._offload(dials, "optimizer") for dials in self._all_dials()):
            staged = sum(self.state.itemsizes.values()) + (4 if self.narrow else 0)
        return of_bucket * (4 + wire + staged * (depths.leaving + 2)) + largest + between_hosts + weights


def _bytes_of(parameter: ParameterSpec) -> int:
    return parameter.numel * ITEMSIZE[parameter.dtype]


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges in order, with neighbours as one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > first:
            merged.append((first, end))
    return tuple(merged)
