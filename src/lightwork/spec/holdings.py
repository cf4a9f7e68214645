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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property

from lightwork.errors import SpecError
from lightwork.spec.layout import Cut, Layout, cut_for
from lightwork.spec.plan import Part, Place, Placement
from lightwork.spec.roster import Roster
from lightwork.spec.spec import Spec
from lightwork.spec.tree import max_partial_sums

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
    odd_bytes: int = 0  #: of entries of other shapes that lie where computation sees them
    number_bytes: int = 0  #: of entries of other shapes that lie with the host, such as counts of steps


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
        return self.parts.get(WORKING, self.parts[MASTERS]).home


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

    def __post_init__(self) -> None:
        if max(self.roster.sizes) > 1 and any(self._placement(dials) == "zero3" for dials in self._all_dials()):
            raise SpecError(
                f"placement='zero3' shares weights out among workers with memories of their own, and here up to "
                f"{max(self.roster.sizes)} workers of a machine share one. Choose transport='group', or "
                "placement='zero2'."
            )

    # --- the table --------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row for each bucket."""
        return tuple(self._row(bucket) for bucket in range(len(self.layout.buckets)))

    @property
    def num_workers(self) -> int:
        """The workers of this host."""
        return len(self.roster.places[self.host])

    @property
    def num_slots(self) -> int:
        """Partial sums that one worker may hold."""
        return max_partial_sums(self.spec.num_micro_batches)

    @property
    def num_places(self) -> int:
        """Slots of a worker: for its partial sums and, with several hosts, for the sum of all (the leader's)."""
        return self.num_slots + (self.roster.num_hosts > 1)

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
        return any(row.is_shared_out for row in self.rows)

    @cached_property
    def shares_weights(self) -> bool:
        """Whether the weights of any bucket stay with its owner."""
        return any(row.weights_stay_with_owner for row in self.rows)

    @cached_property
    def weights_on_disk(self) -> bool:
        """Whether a file holds masters or working weights, of which forward and backward read some."""
        parts: set[Part] = {"weights", self.part_of_masters}
        return any(self._home(dials, part) is Home.DISK for dials in self._all_dials() for part in parts)

    @property
    def part_of_masters(self) -> Part:
        """What a plan calls the masters: where they are the working weights, these."""
        return "optimizer" if self.narrow else "weights"

    @property
    def updates_in_backward(self) -> bool:
        """Whether a bucket is updated as soon as its gradient is there."""
        needs_norm = self.spec.clip_grad_norm is not None or self.spec.precision == "fp16"
        is_alone = self.roster.world_size == 1 and self.spec.num_micro_batches == 1
        return is_alone and not needs_norm and self.layout.numel >= self.depths.early

    def weights_are_fetched(self, row: Row) -> bool:
        """Return whether a bucket's working weights are here only while they are read, from home or from the owner."""
        home = row.home_of_weights
        return home is Home.OWNER or (self.has_device and home is not Home.HERE)

    @property
    def masters_are_here(self) -> bool:
        """Whether this host has every master where computation sees it."""
        at_home = all(row.parts[MASTERS].home is Home.HERE for row in self.rows)
        return not self.shares_state and (at_home or not self.has_device)

    def _row(self, bucket: int) -> Row:
        dials = self._dials(bucket)
        blocks = self.layout.blocks_of(bucket)
        numel = sum(block.end - block.start for block in blocks)
        narrow = sum(b.end - b.start for b in blocks if self.layout.parameters[b.parameter].dtype != "float32")
        owner, placement = self.roster.owner(bucket), self._placement(dials)
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
            placement=placement,
            numel=numel,
            num_narrow=narrow,
            parts=parts,
        )

    def _placement(self, dials: Dials) -> Placement:
        return dials.placement if self.roster.num_hosts > 1 else "replicate"

    def homes_of(self, part: Part) -> tuple[Home, ...]:
        """Return the home of a part of each bucket, whoever owns it; then that of what is in no bucket."""
        return (
            *(self._home(self._dials(bucket), part) for bucket in range(len(self.rows))),
            self._home(self.dials, part),
        )

    def _home(self, dials: Dials, part: Part) -> Home:
        """Return where a bucket with these dials has a part, on a host that has it: a CPU's memory is the host's."""
        place = dials.offload.get(part)
        if place == "disk":
            return Home.DISK
        return Home.HOST if place == "host" and self.has_device else Home.HERE

    def _dials(self, bucket: int) -> Dials:
        return self.dials_of.get(bucket, self.dials)

    def _all_dials(self) -> Iterator[Dials]:
        yield self.dials
        yield from self.dials_of.values()
