"""The optimizer's state in shared memory: as an update sees it, and by the names of parameters and entries.

State of a parameter's shape lies like the weights, a region for each entry; in 8 bits it comes with scales, and becomes
fp32 for the time of an update. The rest, such as counts of steps, lies apart, a piece for each block.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch

from lightwork.spec.layout import span_of
from lightwork.state.eight_bit import SQUARES, restore_into, round_into
from lightwork.state.parameters import like
from lightwork.state.state_layout import StateEntry, StateLayout
from lightwork.state.weights import Weights
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions


class Moments:
    """One worker's views of the optimizer's state."""

    def __init__(self, weights: Weights, state_layout: StateLayout, memory: Regions) -> None:
        self._weights = weights
        self._layout = weights.layout
        self._state_layout = state_layout
        self._homes = {name: memory.home(f"state {name}", dtype) for name, dtype in state_layout.flat.items()}
        self._here = {name: memory.here(f"state {name}", dtype) for name, dtype in state_layout.flat.items()}
        self._scales = {name: memory.tensor(f"scales {name}", torch.float32) for name in state_layout.in_8_bits}
        # Where state in 8 bits becomes fp32 for an update: of one bucket at a time.
        sizes = [
            [b.end - b.start for b in self._layout.blocks_of(bucket)] for bucket in range(len(self._layout.buckets))
        ]
        largest = max(map(sum, sizes), default=0)
        self._wide = {
            name: torch.empty(largest, dtype=torch.float32, device=memory.device.place)
            for name in state_layout.in_8_bits
        }
        self._wide_offsets = [sum(of_bucket[:i]) for of_bucket in sizes for i in range(len(of_bucket))]
        self.device = memory.device.place
        self.counted = state_layout.counted
        self.restless = state_layout.restless
        self.in_8_bits = bool(state_layout.in_8_bits)
        self._odd = memory.tensor("state odd")
        self._numbers = memory.tensor("state numbers")  # of the odd state, what an optimizer keeps on the host
        self.made = memory.region("state made")  #: a byte for each entry of each block: whether an update has made it
        self._views: dict[int, list[tuple[StateEntry, torch.Tensor]]] = {}  # of each block, made once

    @property
    def places(self) -> list[tuple[str, Elements, Elements]]:
        """The regions with state of the parameters' shape, each at home and as an update sees it."""
        return [(f"state {name}", home, self._here[name]) for name, home in self._homes.items()]

    def release_home(self, bucket: int) -> None:
        """Give back the room at home of the state of a bucket that another host owns."""
        for block in self._layout.blocks_of(bucket):
            span = span_of(self._layout, block)
            for home in self._homes.values():
                home.release_room(span.start, span.end)

    # --- for an update ----------------------------------------------------------------------------------------------

    def views_of(self, index: int) -> list[tuple[StateEntry, torch.Tensor]]:
        """Return each entry of a block's state, as an update sees it."""
        views = self._views.get(index)
        if views is None:
            places = self._state_layout.of_block[index]
            views = self._views[index] = [(entry, self._view(index, entry, offset)) for entry, offset in places]
        return views

    def flags(self, blocks: range) -> bytes:
        """Return for each entry of neighbouring blocks whether it has been made."""
        return bytes(self.made[self._state_layout.flags_of(blocks)])

    def set_flags(self, blocks: range, flags: bytes) -> None:
        """Say so of each entry of neighbouring blocks."""
        self.made[self._state_layout.flags_of(blocks)] = flags

    def widen(self, index: int) -> None:
        """Bring a block's state in 8 bits, if it has any, into fp32."""
        for name in self._wide:
            if self._is_made(index, name):
                restore_into(self._wide_view(name, index), *self._packed(name, index, self._here), square=_square(name))

    def round_widened(self, index: int) -> None:
        """Round a block's state to 8 bits again, after an update."""
        for name in self._wide:
            if self._is_made(index, name):
                round_into(*self._packed(name, index, self._here), self._wide_view(name, index), square=_square(name))

    def may_have(self, group: int) -> frozenset[str]:
        """Return the names of the entries for which parameters of a group have room."""
        return frozenset(self._state_layout.names_of_group.get(group, ()))

    # --- by name ----------------------------------------------------------------------------------------------------

    def blocks_of(self, parameter: int) -> list[int]:
        """Return the numbers of a parameter's blocks, in order; none for a frozen one."""
        layout = self._layout
        return [
            index
            for bucket in layout.buckets_of(parameter)
            for index in layout.block_indices(bucket)
            if layout.blocks[index].parameter == parameter
        ]

    def entries_of(self, parameter: int, *, possible: bool = False) -> dict[str, StateEntry]:
        """Return the entries of a parameter's state by name: those that were made or, with `possible`, may be."""
        blocks = self.blocks_of(parameter)
        if not blocks:
            return {}
        flags = self.flags(range(blocks[0], blocks[0] + 1))
        places = zip(self._state_layout.of_block[blocks[0]], flags, strict=True)
        return {entry.name: entry for (entry, _), is_made in places if possible or is_made}

    def mark(self, parameter: int, made: Container[str]) -> None:
        """Say which entries of a parameter's state there are; without any, the next update begins anew."""
        for index in self.blocks_of(parameter):
            flags = bytes(entry.name in made for entry, _ in self._state_layout.of_block[index])
            self.set_flags(range(index, index + 1), flags)

    def read(self, entry: StateEntry, blocks: range) -> torch.Tensor:
        """Return an entry of the state of neighbouring blocks, flat, in the order in which the parameter lies."""
        if entry.shape is not None:
            return self._odd_view(entry, self._offset(blocks[0], entry)).reshape(-1)
        if entry.name not in self._wide:
            return self._homes[entry.name].view(*self._elements(blocks))
        start, end = self._elements(blocks)
        flat, at = torch.empty(end - start, dtype=torch.float32), 0
        for index in blocks:
            wide = self._wide_view(entry.name, index)
            restore_into(wide, *self._packed(entry.name, index, self._homes), square=_square(entry.name))
            flat[at : at + len(wide)].copy_(wide)
            at += len(wide)
        return flat

    def write(self, entry: StateEntry, blocks: range, values: torch.Tensor) -> None:
        """Write an entry of the state of neighbouring blocks, flat; what is not of the parameter's shape, into each."""
        if entry.shape is not None:
            for index in blocks:
                view = self._odd_view(entry, self._offset(index, entry))
                view.copy_(values.view(view.shape))
        elif entry.name not in self._wide:
            self._homes[entry.name].view(*self._elements(blocks)).copy_(values)
        else:
            at = 0
            for index in blocks:
                wide = self._wide_view(entry.name, index)
                wide.copy_(values[at : at + len(wide)])
                packed = self._packed(entry.name, index, self._homes)
                round_into(*packed, wide.to(packed[0].device), square=_square(entry.name))
                at += len(wide)

    def stored(self, entry: StateEntry, blocks: range) -> Iterator[torch.Tensor]:
        """Yield the tensors, flat and contiguous, from which `read` makes an entry of neighbouring blocks."""
        if entry.shape is not None:
            yield self._odd_view(entry, self._offset(blocks[0], entry)).view(-1)
            return
        yield self._homes[entry.name].view(*self._elements(blocks))
        if entry.name in self._scales:
            of_block = self._state_layout.scales_of_block
            yield self._scales[entry.name][of_block[blocks[0]][0] : of_block[blocks[-1]][1]]

    # --- where it lies ----------------------------------------------------------------------------------------------

    def _elements(self, blocks: range) -> tuple[int, int]:
        first, last = (span_of(self._layout, self._layout.blocks[index]) for index in (blocks[0], blocks[-1]))
        return first.start, last.end

    def _is_made(self, index: int, name: str) -> bool:
        names = [entry.name for entry, _ in self._state_layout.of_block[index]]
        return name in names and bool(self.made[self._state_layout.first_flag[index] + names.index(name)])

    def _offset(self, index: int, entry: StateEntry) -> int:
        return next(offset for other, offset in self._state_layout.of_block[index] if other.name == entry.name)

    def _view(self, index: int, entry: StateEntry, offset: int) -> torch.Tensor:
        block = self._layout.blocks[index]
        if entry.shape is not None:
            return self._odd_view(entry, offset)
        if entry.name in self._wide:
            return self._wide_view(entry.name, index)
        span = span_of(self._layout, block)
        flat = self._here[entry.name].view(span.start, span.end)
        whole = self._layout.parameters[block.parameter].whole
        return like(flat, self._weights.parameters[block.parameter]) if whole else flat

    def _odd_view(self, entry: StateEntry, offset: int) -> torch.Tensor:
        num_bytes = torch.Size(entry.shape or ()).numel() * entry.dtype.itemsize
        region = self._numbers if entry.on_host else self._odd
        return region[offset : offset + num_bytes].view(entry.dtype).view(entry.shape or ())

    def _wide_view(self, name: str, index: int) -> torch.Tensor:
        """Return where a block's state in 8 bits becomes fp32."""
        block, at = self._layout.blocks[index], self._wide_offsets[index]
        return self._wide[name][at : at + block.end - block.start]

    def _packed(self, name: str, index: int, places: Mapping[str, Elements]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a block's state in 8 bits, at home or as an update sees it, and its scales."""
        span = span_of(self._layout, self._layout.blocks[index])
        values = places[name].view(span.start, span.end)
        return values, self._scales[name][slice(*self._state_layout.scales_of_block[index])]


def _square(name: str) -> bool:
    return name in SQUARES
