"""The model's weights in shared memory: one copy a host, into which every worker's parameters are views.

Masters and working weights, where they have their home and where computation sees them are read from the table of
holdings ([Note: five tensors, four places] in `spec/holdings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from lightwork.errors import UsageError
from lightwork.spec.holdings import MASTERS, WORKING, Holdings, Home
from lightwork.spec.layout import ALIGNMENT, Block, span_of
from lightwork.state.parameters import DTYPES, like, plainly
from lightwork.state.writes import Writes
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions


class Stretch(NamedTuple):
    """Working weights of a bucket that lie beside each other: their type, places, and elements."""

    home: Elements
    here: Elements
    dtype: torch.dtype
    start: int
    end: int


class _Value(NamedTuple):
    """Where the working weight of a parameter lies."""

    home: Elements
    here: Elements
    is_fetched: bool  #: it is here only while it is read
    has_master: bool


class Weights:
    """The parameters of one worker's model, attached to the memory of the team.

    Owns: the `.data` of every parameter in `parameters`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], holdings: Holdings, memory: Regions) -> None:
        self.parameters = list(parameters)
        self.layout = holdings.layout
        self.masters = memory.home(MASTERS, torch.float32)
        self.masters_here = memory.here(MASTERS, torch.float32)
        self._holdings = holdings
        self._device = memory.device
        self._stays_put = memory.units is None  # tensors of it may be kept
        self._values = self._place(memory)
        self._places_here = tuple(dict.fromkeys((*(value.here for value in self._values), self.masters_here)))
        self.homes = list(dict.fromkeys((self.masters, *(value.home for value in self._values))))
        self.writes = Writes(parameters, holdings, memory)
        self._stretches_of: dict[int, list[Stretch]] = {}  # of each bucket, made once
        self._tensors: dict[int, list[torch.Tensor]] = {}

    def _place(self, memory: Regions) -> list[_Value]:
        """Return where each parameter's working weight lies."""
        homes, here = {MASTERS: self.masters}, {MASTERS: self.masters_here}
        narrow = self._holdings.widths.narrow
        if narrow is not None:
            homes[WORKING] = memory.home(WORKING, DTYPES[narrow])
            here[WORKING] = memory.here_of_types(WORKING, [DTYPES[p.dtype] for p in self.layout.parameters])
        values = []
        for region, is_fetched, has_master in self._holdings.working_weights:
            places = homes if is_fetched or region == MASTERS else here
            values.append(_Value(places[region], here[region], is_fetched, has_master))
        return values

    @plainly
    def attach(self, *, write: bool, done: Callable[[int], None] = lambda index: None) -> list[int]:
        """Point every parameter at the memory of the team; with `write`, after putting its present value there.

        `done` is called after each. Returns the parameters that were on the meta device, which have no value yet.
        """
        were_meta = []
        for index, parameter in enumerate(self.parameters):
            if parameter.shape != self.layout.parameters[index].shape:
                raise UsageError(
                    f"parameter {self._name(index)} has shape {tuple(parameter.shape)}, and had "
                    f"{self.layout.parameters[index].shape} at distribute. Parameters keep their shape."
                )
            view = self.own_view(index)
            if parameter.is_meta:
                were_meta.append(index)
                # Its `.data` can not change its device; swapped, it stays the object that modules and optimizer hold.
                empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
                torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]
            elif write:
                self.write_value(index, parameter.data)
            parameter.data = view
            self._leave_unread(index)
            done(index)
        self.writes.accept(moved=True)
        return were_meta

    @plainly
    def give_back(self, *, copies: bool) -> str | None:
        """Move every parameter that is here into memory of its own, unless `copies` is false.

        Shared out weights stay with their owners, and what the script has moved stays where it is. Returns the name of
        a parameter that the script has written since the last step, in the memory that all workers write.
        """
        written: str | None = None
        changed = self.writes.found()
        for index, parameter in enumerate(self.parameters):
            if parameter.numel() and self.parameter_of(parameter) != index:
                continue
            if changed[index]:
                written = written or self._name(index)
            rows = [self._holdings.rows[bucket] for bucket in self.layout.buckets_of(index)]
            if copies and not any(row.weights_stay_with_owner for row in rows):
                value = self._values[index]
                own = self._strided(index, value.home if value.is_fetched else value.here)
                parameter.data = torch.empty_like(own, device=parameter.device).copy_(own)
        return written

    def write_value(self, index: int, value: torch.Tensor) -> None:
        """Give a parameter a value, as master and as working weight."""
        if self._values[index].has_master:
            master = self._strided(index, self.masters)
            if master.data_ptr() != value.data_ptr():
                master.copy_(value)
        for region in self._working_places(index):
            self._strided(index, region).copy_(value)
        self._leave_unread(index)

    def parts(self, index: int, start: int, end: int) -> Iterator[torch.Tensor]:
        """Yield elements `start` to `end` of a parameter, flat, in each place where it is kept: first its master.

        A frozen narrow parameter has no master: its working weight alone.
        """
        first = self.layout.offsets[index]
        masters = [self.masters] if self._values[index].has_master else []
        for region in (*masters, *self._working_places(index)):
            yield region.view(first + start, first + end)

    def _leave_unread(self, index: int) -> None:
        """Give back the room here of a working weight that is fetched: whoever reads it next brings its value again."""
        if self._values[index].is_fetched:
            self._values[index].here.release_room(*self.layout.range_of(index))

    def home_on_host(self, index: int) -> torch.Tensor | None:
        """Return where the fp32 value of a parameter lies, if that is the host's memory."""
        if not self._values[index].has_master:
            return None
        master = self._strided(index, self.masters)
        return master if master.device.type == "cpu" else None

    def own_view(self, index: int) -> torch.Tensor:
        """Return the working weight of a parameter, as computation sees it, in the parameter's shape and strides.

        In a storage of its own, so that who saves the parameter saves no more than that.
        """
        return like(self._values[index].here.alone(*self.layout.range_of(index)), self.parameters[index])

    def master_view(self, index: int) -> torch.Tensor:
        """Return the fp32 value of a parameter, in its shape; of a frozen narrow one, a converted copy."""
        if not self._values[index].has_master:
            return self._strided(index, self._values[index].here).float()
        return self._strided(index, self.masters)

    def write_working(self, blocks: Sequence[Block]) -> None:
        """Write the working weights of these blocks from their masters here, after an update."""
        targets, sources = [], []
        for block in blocks:
            here = self._values[block.parameter].here
            if here is not self.masters_here:
                span = span_of(self.layout, block)
                targets.append(here.view(span.start, span.end))
                sources.append(self.masters_here.view(span.start, span.end))
        if targets:
            torch._foreach_copy_(targets, sources)

    def of_bucket(self, bucket: int) -> list[torch.Tensor]:
        """Return the working weights of a bucket, at home, as flat tensors, neighbours of one type together."""
        tensors = self._tensors.get(bucket)
        if tensors is None:
            with torch.no_grad():
                tensors = [stretch.home.view(stretch.start, stretch.end) for stretch in self.stretches(bucket)]
            if self._stays_put:
                self._tensors[bucket] = tensors
        return tensors

    def release_home(self, bucket: int) -> None:
        """Give back the room at home of a bucket that another host owns: of masters and, under zero3, of weights."""
        row = self._holdings.rows[bucket]
        for block in self.layout.blocks_of(bucket):
            span, home = span_of(self.layout, block), self._values[block.parameter].home
            stay_away = row.weights_stay_with_owner
            if row.parts[MASTERS].home is Home.OWNER and (stay_away or home is not self.masters):
                self.masters.release_room(span.start, span.end)
            if stay_away and home is not self.masters:
                home.release_room(span.start, span.end)

    def parameter_of(self, tensor: torch.Tensor) -> int | None:
        """Return the parameter in whose working weight a tensor lies, or None. It may be wrapped by torch.func."""
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            return None
        if tensor.device.type != self._device.place.type:
            return None
        for region in self._places_here:
            element = region.element_of(tensor)
            if element is not None:
                return self.layout.parameter_at(element)
        return None

    def _name(self, index: int) -> str:
        return self.layout.parameters[index].name

    def values_at_home(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in which a value has its home, or its only place; each value once."""
        for index, value in enumerate(self._values):
            start, end = self.layout.range_of(index)
            if start == end:
                continue
            if value.has_master:
                yield self.masters.view(start, end)
            for region in self._working_places(index):
                yield region.view(start, end)

    def stretches(self, bucket: int) -> list[Stretch]:
        """Return the working weights of a bucket, neighbours of one type together."""
        found = self._stretches_of.get(bucket)
        if found is None:
            found = []
            for block in self.layout.blocks_of(bucket):
                value, span = self._values[block.parameter], span_of(self.layout, block)
                dtype = DTYPES[self.layout.parameters[block.parameter].dtype]
                stretch = Stretch(value.home, value.here, dtype, span.start, span.end)
                last = found[-1] if found else None
                if last and last[:3] == stretch[:3] and 0 <= stretch.start - last.end < ALIGNMENT:
                    found[-1] = last._replace(end=stretch.end)
                else:
                    found.append(stretch)
            # Whole before it is seen: the thread that answers other hosts may ask for the same bucket.
            self._stretches_of[bucket] = found
        return found

    # --- where they lie ---------------------------------------------------------------------------------------------

    def _working_places(self, index: int) -> list[Elements]:
        """Return where a parameter's working weight is kept, beside its master."""
        value = self._values[index]
        places = dict.fromkeys((value.home,) if value.is_fetched else (value.home, value.here))
        return [place for place in places if place is not self.masters]

    def _strided(self, index: int, region: Elements) -> torch.Tensor:
        return like(region.view(*self.layout.range_of(index)), self.parameters[index])
