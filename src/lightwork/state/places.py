"""What has its home elsewhere comes here before it is used, and leaves after: weights, state, pages of a file.

[Note: coming and leaving]
A visitor is a bucket, or a parameter. Its place here is an address that never changes, so that views, tied weights
and what autograd saved see its values when they are there. Asking for it takes room and begins to bring it; nobody
reads it before it has arrived. What was written here goes home when it leaves, in a queue of its own, and a later
visit begins when it is there. A visitor leaves when its user says so or, if it may stay, when others need the room,
the least recently used first, but never while something that runs holds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Protocol, final

from lightwork.device.base import Backlog, Device, Mark
from lightwork.spec.layout import Layout, spans_of
from lightwork.store.elements import Elements


class Where(Enum):
    """Where the values of a visitor are."""

    AWAY = "at home, on their way there, or with their owner: the place here is empty"
    COMING = "on their way here: there is room for them, and nothing may read it yet"
    HERE = "here, until they leave"


class HeldBy(Flag):
    """Who keeps a visitor from leaving."""

    NOBODY = 0
    FUNCTION = auto()  #: the torch function that runs
    MODULE = auto()  #: a module that is left alone while it runs
    SAVED = auto()  #: backward, which has taken it out of what autograd saved
    AGAIN = auto()  #: a forward within backward, until the gradient is there
    UPDATE = auto()  #: the update of its bucket


class Arrival(Protocol):
    """Values on their way."""

    def wait(self) -> None:
        """Return when they may be read by what the current queue is given from now on."""


class Way(ABC):
    """How visitors come, and leave."""

    @abstractmethod
    def bring(self, visitor: int, left: Mark) -> Sequence[Arrival]:
        """Take room here and begin to bring the values, which are at home when `left` is reached."""

    @abstractmethod
    def make_room(self, visitor: int) -> None:
        """Take room here for values that are about to be written."""

    @abstractmethod
    def leave(self, visitor: int, *, written: bool) -> Mark:
        """Give the room here back, after values that were `written` have gone home; return when they are there."""


@dataclass
class _Stay:
    where: Where
    arrivals: Sequence[Arrival] = ()
    held_by: HeldBy = HeldBy.NOBODY


@final
class Visits:
    """The visitors of one kind. Those that are always here pass through without anything being done.

    See [Note: coming and leaving].
    """

    def __init__(self, way: Way, visitors: Iterable[int], device: Device, *, limit: int) -> None:
        """`visitors` come and go; `limit` is how many may be on their way home before the host waits for the device."""
        self._way = way
        self._visitors = frozenset(visitors)
        self._stays: OrderedDict[int, _Stay] = OrderedDict()  # the least recently used first
        self._left: dict[int, Mark] = {}
        self._backlog = Backlog(device, limit)

    def comes_and_goes(self, visitor: int) -> bool:
        """Return whether it is here only at times."""
        return visitor in self._visitors

    def where(self, visitor: int) -> Where:
        """Return where a visitor's values are."""
        stay = self._stays.get(visitor)
        if stay is None:
            return Where.AWAY if visitor in self._visitors else Where.HERE
        return stay.where

    @property
    def coming(self) -> list[int]:
        """Visitors on their way here."""
        return [visitor for visitor, stay in self._stays.items() if stay.where is Where.COMING]

    def ask(self, visitor: int) -> None:
        """Begin to bring a visitor that is away."""
        if visitor in self._visitors and visitor not in self._stays:
            arrivals = self._way.bring(visitor, self._left.get(visitor))
            self._stays[visitor] = _Stay(Where.COMING, arrivals)

    def make_room(self, visitor: int) -> None:
        """Take the place here of a visitor whose values are about to be written."""
        if visitor in self._visitors and visitor not in self._stays:
            self._way.make_room(visitor)
            self._stays[visitor] = _Stay(Where.HERE)

    def arrive(self, visitor: int) -> None:
        """Return when a visitor that was asked for is here."""
        stay = self._stays.get(visitor)
        if stay is None:
            return
        if stay.where is Where.COMING:
            for arrival in stay.arrivals:
                arrival.wait()
            stay.where, stay.arrivals = Where.HERE, ()
        self._stays.move_to_end(visitor)

    def hold(self, visitor: int, by: HeldBy) -> None:
        """Keep a visitor that was asked for until `let_go`."""
        stay = self._stays.get(visitor)
        if stay is not None:
            stay.held_by |= by

    def let_go(self, by: HeldBy, visitors: Iterable[int] | None = None) -> None:
        """Say that `by` holds these visitors no longer; all, unless given."""
        for visitor in self._stays if visitors is None else visitors:
            stay = self._stays.get(visitor)
            if stay is not None:
                stay.held_by &= ~by

    def leave(self, visitor: int, *, written: bool) -> None:
        """Let a visitor leave, with what was written here."""
        if visitor not in self._visitors:
            return
        self._stays.pop(visitor, None)
        mark = self._way.leave(visitor, written=written)
        if written:
            self._left[visitor] = mark
        self._backlog.add(mark)

    def leave_room(self, kept: int) -> None:
        """Let those leave that nobody holds, the least recently used first, until `kept` are here."""
        if len(self._stays) <= kept:
            return
        surplus = sum(stay.where is Where.HERE for stay in self._stays.values()) - kept
        if surplus > 0:
            free = [v for v, s in self._stays.items() if s.where is Where.HERE and s.held_by is HeldBy.NOBODY]
            for visitor in free[:surplus]:
                self.leave(visitor, written=False)

    def leave_all(self) -> None:
        """Let every visitor leave, as nothing was written."""
        for visitor in list(self._stays):
            self.arrive(visitor)
            self.leave(visitor, written=False)

    def settle(self) -> None:
        """Let every visitor leave, and return when all are at home."""
        self.leave_all()
        self._backlog.finish()


@dataclass(frozen=True)
class _Copied:
    """What a queue brings."""

    device: Device
    mark: Mark

    def wait(self) -> None:
        self.device.wait_for_mark(self.mark)


@dataclass(frozen=True)
class _Mapped:
    """Pages of a file, which are mapped all at once rather than one by one as they are touched."""

    map_now: Callable[[], None]

    def wait(self) -> None:
        self.map_now()


def copied(device: Device) -> Arrival:
    """Return the arrival of what the current queue was given before."""
    return _Copied(device, device.mark())


@final
class UpdateParts(Way):
    """Masters and optimizer state of a bucket, for its update: from disk or from the host, and home again.

    On a device the update is always the device's, so that the bits do not depend on where state lies: it is copied in
    and out by queues of their own. From disk to a CPU, pages are read ahead, mapped, and unmapped.

    Moves: 12 bytes a parameter each way for AdamW's state and masters under bf16.
    """

    def __init__(
        self, layout: Layout, device: Device, parts: Callable[[int], Sequence[tuple[Elements, Elements]]]
    ) -> None:
        """`parts` returns those of a bucket that come and go: where each has its home, and its place here."""
        self._device = device
        self._spans = [spans_of(layout, bucket) for bucket in layout.buckets]
        self._parts = parts

    def bring(self, visitor: int, left: Mark) -> Sequence[Arrival]:
        """Begin to read, and to copy."""
        spans, parts = self._spans[visitor], self._parts(visitor)
        for home, _ in parts:
            for span in spans:
                home.read_ahead(span.start, span.end)
        if all(home is here for home, here in parts):
            return [_Mapped(lambda: self.make_room(visitor))]
        with self._device.queue("in"):
            self._device.wait_for_mark(left)
            for home, here in parts:
                for span in spans:
                    here.take_room(span.start, span.end)
                    here.view(span.start, span.end).copy_(home.view(span.start, span.end), non_blocking=True)
            return [copied(self._device)]

    def make_room(self, visitor: int) -> None:
        """Take room here for each part of the bucket."""
        for _, here in self._parts(visitor):
            for span in self._spans[visitor]:
                here.take_room(span.start, span.end)

    def leave(self, visitor: int, *, written: bool) -> Mark:
        """Copy home what was written; let go of pages."""
        spans, parts = self._spans[visitor], self._parts(visitor)
        mark = self._device.mark()
        with self._device.queue("out"):
            self._device.wait_for_mark(mark)
            for home, here in parts:
                if home is here:
                    continue
                for span in spans if written else ():
                    home.view(span.start, span.end).copy_(here.view(span.start, span.end), non_blocking=True)
                here.release_room(spans[0].start, spans[0].end)  # the unit of the bucket
            left = self._device.mark()
        for home, _ in parts:
            for span in spans:
                home.unmap(span.start, span.end)
        return left


@final
class WeightPages(Way):
    """Working weights on disk, of workers on CPUs, by parameter: read ahead before a module, unmapped after."""

    def __init__(self, layout: Layout, regions: Sequence[Elements]) -> None:
        """`regions` are those in which weights lie, masters among them."""
        self._layout = layout
        self._regions = regions

    def bring(self, visitor: int, left: Mark) -> Sequence[Arrival]:
        """Let the system read ahead; pages are mapped as they are touched."""
        for region in self._regions:
            region.read_ahead(*self._layout.range_of(visitor))
        return ()

    def make_room(self, visitor: int) -> None:
        """Do nothing: there is room in the file."""

    def leave(self, visitor: int, *, written: bool) -> Mark:
        """Unmap; the system writes behind."""
        for region in self._regions:
            region.unmap(*self._layout.range_of(visitor))
        return None
