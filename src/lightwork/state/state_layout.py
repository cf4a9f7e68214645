"""Which state an optimizer keeps for each block, and where that lies in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lightwork.errors import SpecError
from lightwork.spec.holdings import scales_region, state_region
from lightwork.spec.layout import Layout
from lightwork.spec.spec import StateFormat
from lightwork.state.eight_bit import num_scales

#: Elements of the parameter on which an element-wise optimizer shows what state it keeps.
PROBE_ELEMENTS = 16

#: Bytes; entries that are not of the block's own shape begin at multiples: [Note: bits and addresses].
_STATE_ALIGNMENT = 64

#: A parameter group's number, and the shape on which its optimizer has shown what it keeps.
Probed = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class StateEntry:
    """One entry of the state that an optimizer keeps for each parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None  #: None: the shape of the parameter or block
    number: type[int] | type[float] | type[bool] | None = None  #: a Python number rather than a tensor
    on_host: bool = True  #: for a worker on a device: whether it lies with the host nevertheless
    comes_later: bool = False  #: a parameter's first update does not make it
    is_spare: bool = False  #: no update makes it before a setting is switched on: memory that is not touched till then


class StateLayout:
    """Where each block's state lies: a flat region for each entry of the parameters' shape, one for the rest.

    Beside it, a flag for each entry of each block says whether it has been made.
    """

    def __init__(
        self,
        layout: Layout,
        entries: Mapping[Probed, list[StateEntry]],
        state_format: StateFormat = "fp32",
        counted: frozenset[int] = frozenset(),
        restless: frozenset[int] = frozenset(),
    ) -> None:
        """Of the parameter groups, `step()` changes settings of `counted`; of `restless` what has no gradient, too."""
        self.counted = counted
        self.restless = restless
        self.flat: dict[str, torch.dtype] = {}
        self.in_8_bits: set[str] = set()  #: of the flat ones
        self.of_group: dict[int, dict[str, int]] = {}  #: bytes of an element of those of a group; 0 while it is spare
        self.names_of_group: dict[int, set[str]] = {}  #: flat or not
        self.scales_of_block: list[tuple[int, int]] = []  #: first and end, in the region of scales of an entry
        at = 0
        for block in layout.blocks:
            self.scales_of_block.append((at, at + num_scales(block.end - block.start)))
            at = self.scales_of_block[-1][1]
        self.num_scales = at
        self.odd_bytes = 0
        self.number_bytes = 0  #: of odd state on the host
        self.of_block: list[list[tuple[StateEntry, int]]] = []  # with the offset in bytes
        self.first_flag: list[int] = [0]  #: of each block; then their number
        for block in layout.blocks:
            parameter = layout.parameters[block.parameter]
            if parameter.group is None:
                raise ValueError(f"{parameter.name} has blocks but no parameter group")
            shape = parameter.shape if parameter.whole else (PROBE_ELEMENTS,)
            own = entries[parameter.group, shape]
            flat = self.of_group.setdefault(parameter.group, {})
            self.names_of_group.setdefault(parameter.group, set()).update(entry.name for entry in own)
            places = []
            for entry in own:
                if entry.shape is None:
                    self._take(entry, state_format)
                    flat[entry.name] = 0 if entry.is_spare else self.flat[entry.name].itemsize
                    places.append((entry, (layout.offsets[block.parameter] + block.start) * entry.dtype.itemsize))
                else:
                    places.append((entry, self._take_odd(entry)))
            self.of_block.append(places)
            self.first_flag.append(self.first_flag[-1] + len(places))

    def flags_of(self, blocks: range) -> slice:
        """Return the flags of neighbouring blocks."""
        return slice(self.first_flag[blocks.start], self.first_flag[blocks.stop])

    def ranges_of(self, blocks: range, start: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Yield where the state of neighbouring blocks lies, elements `start` to `end`: region, first byte, end."""
        odd: dict[bool, list[int]] = {True: [], False: []}  # by whether it is with the host
        own = [place for index in blocks for place in self.of_block[index]]
        for name in dict.fromkeys(entry.name for entry, _ in own if entry.shape is None):
            size = self.flat[name].itemsize
            yield state_region(name), start * size, end * size
            if name in self.in_8_bits:
                scales = self.scales_of_block[blocks[0]][0], self.scales_of_block[blocks[-1]][1]
                yield scales_region(name), 4 * scales[0], 4 * scales[1]
        for entry, offset in own:
            if entry.shape is not None:
                size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
                odd[entry.on_host] += [offset, offset + size]
        for on_host, bounds in odd.items():  # offsets rise from block to block
            if bounds:
                yield "state numbers" if on_host else "state odd", min(bounds), max(bounds)
        flags = self.flags_of(blocks)
        yield "state made", flags.start, flags.stop

    def _take(self, entry: StateEntry, state_format: StateFormat) -> None:
        in_8_bits = state_format == "int8" and entry.dtype is torch.float32
        dtype = torch.uint8 if in_8_bits else entry.dtype
        if self.flat.setdefault(entry.name, dtype) != dtype:
            raise SpecError(
                f"two parameter groups keep state {entry.name!r} in different types, {dtype} and "
                f"{self.flat[entry.name]}. Give them the same settings, or the same optimizer."
            )
        if in_8_bits:
            self.in_8_bits.add(entry.name)

    def _take_odd(self, entry: StateEntry) -> int:
        """Return the offset of an entry that is not of the parameters' shape."""
        num_bytes = max(1, torch.Size(entry.shape or ()).numel()) * entry.dtype.itemsize
        num_bytes = -(-num_bytes // _STATE_ALIGNMENT) * _STATE_ALIGNMENT
        at = self.number_bytes if entry.on_host else self.odd_bytes
        if entry.on_host:
            self.number_bytes += num_bytes
        else:
            self.odd_bytes += num_bytes
        return at
