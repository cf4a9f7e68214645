"""Holdings: of each bucket who owns it and, of each of its parts, where that lies on one host, and in how many bytes.

A pure table, made from model, spec and plan before there is any memory. Whatever asks where a value is, or how large,
reads it: the regions, the choice of what to offload. Five tensors are kept for a parameter, in four places:

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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from lightwork.errors import SpecError
from lightwork.spec.layout import Bucket, Cut, Layout, cut_for
from lightwork.spec.plan import Part, Place, Placement
from lightwork.spec.roster import Roster
from lightwork.spec.spec import Spec
from lightwork.spec.tree import max_partial_sums, spare_partial_sums

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
class Memories:
    """How the memory that computation sees and that of the host are related."""

    homes: Mapping[Place | None, Home]  #: by what a plan says of a part; None where it says nothing
    seen: frozenset[Home]  #: what computation sees where it is kept
    in_units: frozenset[Home]  #: what takes room bucket by bucket
    on_host: Home  #: what is kept in the memory of the host
    nearest: Place  #: where a part goes first, to make room for computation
    of_process: int  #: bytes that a worker's process takes of the memory that computation sees, tensors left out
    has_device: bool


#: A CPU's memory is the host's, and what lies on disk is mapped into it.
ONE_MEMORY = Memories(
    homes={None: Home.HERE, "host": Home.HERE, "disk": Home.DISK},
    seen=frozenset({Home.HERE, Home.DISK}),
    in_units=frozenset(),
    on_host=Home.HERE,
    nearest="disk",
    of_process=48 * 2**20,  # Python objects, the board, mailboxes, stacks of threads; an estimate, not measured
    has_device=False,
)

#: A device sees its own.
TWO_MEMORIES = Memories(
    homes={None: Home.HERE, "host": Home.HOST, "disk": Home.DISK},
    seen=frozenset({Home.HERE}),
    in_units=frozenset({Home.HERE, Home.HOST}),
    on_host=Home.HOST,
    nearest="host",
    of_process=0,
    has_device=True,
)


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
    of_group: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  #: the same of a parameter group; else all
    num_flags: int = 0  #: entries of all blocks, whatever their shape
    num_scales: int = 0  #: of each entry in 8 bits
    odd_bytes: int = 0  #: of entries of other shapes that lie where computation sees them
    number_bytes: int = 0  #: of entries of other shapes that lie with the host, such as counts of steps

    def of_bucket(self, bucket: Bucket) -> Mapping[str, int]:
        """Return the same of a bucket: 0 bytes for what takes none before a setting is switched on."""
        return self.of_group.get(bucket.group, self.itemsizes)


@dataclass(frozen=True, kw_only=True)
class Dials:
    """What a plan says of a bucket."""

    placement: Placement = "replicate"
    offload: Mapping[str, Place] = field(default_factory=dict)  #: by part
    elastic: bool = False  #: the host's workers go on without one that is killed


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A part of a bucket on this host."""

    dtype: str  #: of its elements; of working weights, that of the narrow ones
    num_bytes: int  #: wherever they lie
    home: Home
    is_elsewhere: bool  #: computation does not see it there


@dataclass(frozen=True, kw_only=True)
class Row:
    """A bucket on this host."""

    bucket: int
    owner: int  #: the host that adds up its gradient and, where it is shared out, updates it
    is_own: bool  #: whether this host updates it: the owner, or every host where nothing is shared out
    placement: Placement  #: what of it is shared out
    numel: int
    num_narrow: int  #: elements whose working weight is not the master
    parts: Mapping[str, Holding]  #: by region

    @property
    def is_shared_out(self) -> bool:
        """Whether one host alone updates it."""
        return self.placement != "replicate"

    @property
    def weights_stay_with_owner(self) -> bool:
        """Whether other hosts fetch its weights from the owner."""
        return self.placement == "zero3"

    @property
    def keeps_sent_sums(self) -> bool:
        """Whether its partial sums keep their memory when they have left for the owner."""
        return self.placement not in ("zero2", "zero3")

    @property
    def home_of_weights(self) -> Home:
        """Where its working weights are kept."""
        return self.parts[self._working].home

    @property
    def weights_are_fetched(self) -> bool:
        """Whether its working weights are here only while they are read, from home or from the owner."""
        return self.parts[self._working].is_elsewhere

    @cached_property
    def comes_for_update(self) -> tuple[str, ...]:
        """The regions whose parts come from the host's memory, or disk, for an update.

        Without partial sums, and without working weights that are fetched.
        """
        fetched = {self._working} if self.weights_are_fetched else set()
        away = [name for name, part in self.parts.items() if part.home in (Home.HOST, Home.DISK)]
        return tuple(name for name in away if name not in {SUMS, *fetched})

    @property
    def _working(self) -> str:
        return WORKING if WORKING in self.parts else MASTERS


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How many bytes an element of a weight has, and what masters belong to."""

    narrow: str | None  #: the type of working weights that are not masters; None where there are none
    weight: int  #: of most working weights
    working: int  #: of working weights that are not masters
    master_apart: int  #: of masters that are not working weights
    part_of_masters: Part  #: what a plan calls the masters: where they are the working weights, these


class Lies(NamedTuple):
    """Where the working weight of a parameter lies."""

    region: str  #: WORKING, or MASTERS where it is its own master
    is_fetched: bool  #: it is here only while it is read, on a host that does not own it or on every one
    has_master: bool


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """The holdings of one host."""

    layout: Layout
    spec: Spec
    roster: Roster
    host: int
    state: StateShape
    dials: Dials = field(default_factory=Dials)
    dials_of: Mapping[int, Dials] = field(default_factory=dict)  #: of buckets for which the plan says something else
    depths: Depths = field(default_factory=Depths)
    num_workers: int = field(init=False, compare=False)  #: of this host, as the run begins
    capacity: int = field(init=False, compare=False)  #: the most workers; places that are not taken take no memory

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_workers", self.roster.sizes[self.host])
        object.__setattr__(self, "capacity", self.roster.capacities[self.host])
        if max(self.roster.sizes) > 1 and "zero3" in map(self._placement, self._all_dials()):
            raise SpecError(
                "placement='zero3' shares weights out among workers with memories of their own, and here workers of a "
                "machine share one. Choose transport='group', or placement='zero2'."
            )

    # --- the table --------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each bucket."""
        return tuple(self._row(bucket) for bucket in range(len(self.layout.buckets)))

    @property
    def num_slots(self) -> int:
        """Partial sums that one worker may hold; the spare ones (not in a file) are for what others leave that die."""
        num, has_spare = self.spec.num_micro_batches, self.dials.elastic and Home.DISK not in self.homes_of("gradients")
        return max_partial_sums(num) + has_spare * spare_partial_sums(num)

    @property
    def num_places(self) -> int:
        """Slots of a worker: for its partial sums and, with several hosts, for the sum of all (the leader's)."""
        return self.num_slots + (self.roster.num_hosts > 1)

    @cached_property
    def memories(self) -> Memories:
        """How the memory that computation sees and that of the host are related."""
        return ONE_MEMORY if self.spec.device == "cpu" else TWO_MEMORIES

    @cached_property
    def widths(self) -> Widths:
        """How wide weights are."""
        narrow = next((p.dtype for p in self.layout.parameters if p.dtype != "float32"), None)
        if narrow is None:
            return Widths(narrow=None, weight=4, working=0, master_apart=0, part_of_masters="weights")
        return Widths(narrow=narrow, weight=2, working=2, master_apart=4, part_of_masters="optimizer")

    @cached_property
    def own_buckets(self) -> tuple[int, ...]:
        """The buckets that this host updates."""
        return tuple(row.bucket for row in self.rows if row.is_own)

    @cached_property
    def shares_state(self) -> bool:
        """Whether any bucket is updated by one host alone."""
        return any(row.is_shared_out for row in self.rows)

    @cached_property
    def shares_weights(self) -> bool:
        """Whether the weights of any bucket stay with its owner."""
        return any(row.weights_stay_with_owner for row in self.rows)

    @cached_property
    def weights_are_paged(self) -> bool:
        """Whether forward and backward read weights that lie in a file, mapped: masters or working weights."""
        parts: set[Part] = {"weights", self.widths.part_of_masters}
        homes = {self._home(dials, part) for dials in self._all_dials() for part in parts}
        return Home.DISK in homes & self.memories.seen

    @cached_property
    def working_weights(self) -> tuple[Lies, ...]:
        """Where the working weight of each parameter lies."""
        *homes, _ = self.homes_of("weights")
        away = {bucket for bucket, home in enumerate(homes) if home not in self.memories.seen}
        found = []
        for index, parameter in enumerate(self.layout.parameters):
            is_trained, is_master = parameter.group is not None, parameter.dtype == "float32"
            # On a device all working weights lie in one region, so that masters need not be here for the fp32 ones.
            # These are few and small, and always here.
            lies_alone = not is_master or (self.memories.has_device and self.widths.narrow is not None)
            may_leave = is_trained and not (is_master and lies_alone)
            is_fetched = may_leave and not away.isdisjoint(self.layout.buckets_of(index))
            found.append(Lies(WORKING if lies_alone else MASTERS, is_fetched, is_trained or is_master))
        return tuple(found)

    def sent_at_once(self, roster: Roster, num_micro_batches: int) -> range:
        """Return which of this host's micro-batches, counted from 0, send gradients as they are made.

        The last one, to other hosts, where one worker computes all of them.
        """
        own = len(roster.micro_batches(self.host, num_micro_batches))
        is_sent = self.num_workers == 1 and self.roster.num_hosts > 1
        return range(own - 1, own) if is_sent else range(0)

    @property
    def updates_in_backward(self) -> bool:
        """Whether a bucket is updated as soon as its gradient is there."""
        needs_norm = self.spec.clip_grad_norm is not None or self.spec.precision == "fp16"
        is_alone = self.roster.world_size == 1 and self.spec.num_micro_batches == 1
        return is_alone and not needs_norm and self.layout.numel >= self.depths.early

    @property
    def masters_are_here(self) -> bool:
        """Whether this host has every master where computation sees it."""
        return not self.shares_state and not any(row.parts[MASTERS].is_elsewhere for row in self.rows)

    def _row(self, bucket: int) -> Row:
        dials = self._dials(bucket)
        blocks = self.layout.blocks_of(bucket)
        numel = sum(block.end - block.start for block in blocks)
        num_narrow = sum(b.end - b.start for b in blocks if self.layout.parameters[b.parameter].dtype != "float32")
        owner, placement = self.roster.owner(bucket), self._placement(dials)
        is_own = placement == "replicate" or owner == self.host
        away = None if is_own else Home.OWNER
        weights_away = away if placement == "zero3" else None
        of_state, of_weights = self._home(dials, "optimizer"), self._home(dials, "weights")
        if self.widths.narrow is None:
            parts = {MASTERS: self._holding("float32", numel * 4, weights_away or of_weights)}
        else:
            kept = of_weights if num_narrow else Home.HERE  # weights that are fp32 all the same are few
            parts = {
                MASTERS: self._holding("float32", numel * 4, away or of_state),
                WORKING: self._holding(self.widths.narrow, num_narrow * self.widths.working, weights_away or kept),
            }
        for entry, itemsize in self.state.of_bucket(self.layout.buckets[bucket]).items():
            kind = "uint8" if entry in self.state.in_8_bits else f"{itemsize} bytes"
            parts[state_region(entry)] = self._holding(kind, numel * itemsize, away or of_state)
        wire = self.spec.wire
        parts[SUMS] = self._holding(wire, numel * ITEMSIZE[wire], self._home(dials, "gradients"))
        return Row(
            bucket=bucket,
            owner=owner,
            is_own=is_own,
            placement=placement,
            numel=numel,
            num_narrow=num_narrow,
            parts=parts,
        )

    def _holding(self, dtype: str, num_bytes: int, home: Home) -> Holding:
        return Holding(dtype=dtype, num_bytes=num_bytes, home=home, is_elsewhere=home not in self.memories.seen)

    def _placement(self, dials: Dials) -> Placement:
        return dials.placement if self.roster.num_hosts > 1 else "replicate"

    def homes_of(self, part: Part) -> tuple[Home, ...]:
        """Return the home of a part of each bucket, whoever owns it; then that of what is in no bucket."""
        of_buckets = [self._home(self._dials(bucket), part) for bucket in range(len(self.rows))]
        return (*of_buckets, self._home(self.dials, part))

    def _home(self, dials: Dials, part: Part) -> Home:
        """Return where a bucket with these dials has a part, on a host that has it."""
        return self.memories.homes[dials.offload.get(part)]

    def _dials(self, bucket: int) -> Dials:
        return self.dials_of.get(bucket, self.dials)

    def _all_dials(self) -> Iterator[Dials]:
        yield self.dials
        yield from self.dials_of.values()
