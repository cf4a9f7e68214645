"""What of the memory on disk is mapped: pages come when they are touched, and are let go as soon as they were used.

Regions that the plan offloads to disk lie in a mapped file. Touching a page brings it in; `drop` takes it out of this
process again, and leaves it to the system to write it behind and to keep it in its page cache as long as there is room.
So a worker's resident memory holds what is in use, and training may be larger than memory.

    weights           after forward of the module that owns them, after their gradient, and after their update
    gradients         after the fold into a partial sum, and after the update
    masters, state    after the update; the next bucket's are read ahead meanwhile
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import EllipsisType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightwork.spec.layout import spans_of
from lightwork.state.weights import Weights
from lightwork.store.regions import Advice, SharedMemory

#: Elements of a gradient that are folded at once where partial sums lie on disk.
PIECE = 4 * 2**20


class Residency:
    """Drops and fetches ranges of the regions that lie on disk; nothing happens to the others."""

    def __init__(self, memory: SharedMemory, weights: Weights, regions: dict[str, int], num_slots: int) -> None:
        """`regions` are the bytes of an element of each region that is laid out like the weights.

        `num_slots` is the number of partial sums in their region, of all workers.
        """
        self._memory = memory
        self._weights = weights
        self._layout = weights.layout
        self._num_slots = num_slots
        self._hooks: list[RemovableHandle] = []
        on_disk = {name: size for name, size in regions.items() if memory.is_on_disk(name)}
        self._gradients = on_disk.pop("partial sums", 0)
        self._others = on_disk
        self._of_model = {name: size for name, size in on_disk.items() if name in ("masters", "working")}
        self.enabled = bool(on_disk or self._gradients)

    def watch(self, model: nn.Module) -> None:
        """Drop each module's own weights after its forward, and read the next one's ahead before it."""
        if not self._of_model or self._memory.device.has_own_memory:
            return
        index_of = {id(parameter): index for index, parameter in enumerate(self._weights.parameters)}
        owners = [(module, [index_of[id(p)] for p in module.parameters(recurse=False)]) for module in model.modules()]
        owners = [(module, indices) for module, indices in owners if indices]
        for position, (module, indices) in enumerate(owners):
            following = owners[(position + 1) % len(owners)][1]

            def before(_module: nn.Module, _inputs: object, following: list[int] = following) -> None:
                for index in following:
                    self._advise(self._of_model, *self._range(index), Advice.FETCH)

            def after(_module: nn.Module, _inputs: object, _out: object, indices: list[int] = indices) -> None:
                for index in indices:
                    self._advise(self._of_model, *self._range(index), Advice.DROP)

            self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def close(self) -> None:
        """Take the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def pieces(self, gradient: torch.Tensor) -> Sequence[slice | EllipsisType]:
        """Return the rows in which a gradient is to be folded, so that little of its partial sum is mapped at once."""
        if not self._gradients or gradient.numel() <= PIECE or not gradient.is_contiguous():
            return [...]
        rows = max(1, PIECE // (gradient.numel() // len(gradient)))
        return [slice(first, first + rows) for first in range(0, len(gradient), rows)]

    def folded(self, parameter: int, rows: slice | EllipsisType = ...) -> None:
        """Drop what a fold has used: partial sums of some rows, or all of a parameter and its weight."""
        start, end = self._range(parameter)
        if isinstance(rows, slice):
            row = (end - start) // self._layout.parameters[parameter].shape[0]
            start, end = start + rows.start * row, min(end, start + rows.stop * row)
        else:
            self._advise(self._of_model, start, end, Advice.DROP)
        self._drop_gradients(start, end)

    def fetch(self, bucket: int) -> None:
        """Begin to read a bucket's masters and state."""
        if self.enabled and bucket < len(self._layout.buckets):
            for start, end in self._stretches(bucket):
                self._advise(self._others, start, end, Advice.FETCH)

    def map(self, bucket: int) -> None:
        """Map a bucket's masters and state, all at once rather than page by page."""
        if self.enabled and bucket < len(self._layout.buckets):
            for start, end in self._stretches(bucket):
                self._advise(self._others, start, end, Advice.MAP_TO_WRITE)

    def measured(self, bucket: int) -> None:
        """Drop the partial sums of a bucket whose norm was taken."""
        if self._gradients:
            for start, end in self._stretches(bucket):
                self._drop_gradients(start, end)

    def updated(self, bucket: int) -> None:
        """Drop everything of a bucket."""
        if self.enabled:
            for start, end in self._stretches(bucket):
                self._advise(self._others, start, end, Advice.DROP)
                self._drop_gradients(start, end)

    def reserve(self, buckets: Iterable[int]) -> None:
        """Take the room at home that these buckets will need: here it is always taken."""

    def settle(self) -> None:
        """Return when everything is at home: here it always is."""

    def drop_all(self) -> None:
        """Drop everything, after a call that has read it all."""
        if self.enabled:
            self._advise(self._others, 0, self._layout.numel, Advice.DROP)
            self._drop_gradients(0, self._layout.numel)

    def _range(self, parameter: int) -> tuple[int, int]:
        start = self._layout.offsets[parameter]
        return start, start + self._layout.parameters[parameter].numel

    def _stretches(self, bucket: int) -> Iterator[tuple[int, int]]:
        for span in spans_of(self._layout, self._layout.buckets[bucket]):
            yield span.start, span.end

    def _drop_gradients(self, start: int, end: int) -> None:
        if self._gradients:
            for slot in range(self._num_slots):
                first = slot * self._layout.numel
                self._advise({"partial sums": self._gradients}, first + start, first + end, Advice.DROP)

    def _advise(self, regions: dict[str, int], start: int, end: int, advice: Advice) -> None:
        for name, size in regions.items():
            self._memory.advise(name, start * size, end * size, advice)
