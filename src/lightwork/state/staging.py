"""What a device offloads, on its way through an update: a bucket's state comes from the host, is updated, and leaves.

The update itself is the device's, wherever state lies, so that the bits do not depend on the place. While one bucket is
updated, the next one is on its way in, and the one before on its way out, in queues of their own. The host keeps pages
locked that the device reads and writes by itself; from disk they are copied by the CPU.

Moves: the bytes of what is offloaded, of each bucket that is updated, in and out: 12 a parameter each way for AdamW's
state and masters under bf16, and 2 out where weights are offloaded, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from lightwork.device.base import Backlog, Mark
from lightwork.state.residency import Residency
from lightwork.state.weights import Weights
from lightwork.store.elements import Elements
from lightwork.store.regions import SharedMemory

#: Buckets that may be on their way out before the next one comes in.
LEAVING = 2


class StreamedWeights(Protocol):
    """Who brings weights to the device, where they are offloaded, too."""

    def hold(self, bucket: int, *, values: bool) -> None:
        """Keep room for a bucket here, with its present values if they are wanted, until `leave`."""

    def leave(self, bucket: int) -> None:
        """Let go of it: its values here are no longer those at home, which are about to change."""


class Staging(Residency):
    """Brings what is offloaded to the device, and takes it home."""

    def __init__(
        self,
        memory: SharedMemory,
        weights: Weights,
        regions: dict[str, int],
        num_slots: int,
        places: Sequence[tuple[str, Elements, Elements]],
    ) -> None:
        """`places` are the regions that an update reads and writes: name, at home, and here."""
        super().__init__(memory, weights, regions, num_slots)
        self._device = memory.device
        of_masters = ("masters", weights.masters, weights.masters_here)
        self._staged = [place for place in (*places, of_masters) if place[1] is not place[2]]
        self._narrow = weights.working_is_apart
        if weights.streamed and not self._narrow:  # then masters are weights, and come as such
            self._staged = [place for place in self._staged if place is not of_masters]
        self._streamed: StreamedWeights | None = None
        self._coming: dict[int, Mark] = {}
        self._left: dict[int, Mark] = {}  # of each bucket, when it was last at home again
        self._backlog = Backlog(self._device, LEAVING)

    def follow(self, streamed: StreamedWeights) -> None:
        """Let `streamed` bring weights."""
        self._streamed = streamed

    def reserve(self, buckets: Iterable[int]) -> None:
        """Take the room at home that these buckets will need: what is missing must show before the first step."""
        for bucket in buckets:
            for start, end in self._stretches(bucket):
                for _, home, _ in self._staged:
                    home.take(start, end)

    def fetch(self, bucket: int) -> None:
        """Begin to bring a bucket's state."""
        if not self._staged or bucket in self._coming or bucket >= len(self._layout.buckets):
            return
        super().fetch(bucket)
        with self._device.queue("in"):
            self._device.wait(self._left.get(bucket))
            for start, end in self._stretches(bucket):
                for _, home, here in self._staged:
                    here.take(start, end)
                    self._copy(here, home, start, end)
            self._coming[bucket] = self._device.mark()

    def map(self, bucket: int) -> None:
        """Let the update of a bucket begin when everything is here."""
        self.fetch(bucket)
        if bucket in self._coming:
            self._device.wait(self._coming.pop(bucket))
        if self._streamed is not None and self._weights.comes_and_goes(bucket):
            self._streamed.hold(bucket, values=not self._narrow)

    def updated(self, bucket: int) -> None:
        """Take a bucket home, when its update is done."""
        if not self._staged and self._streamed is None:
            return
        mark = self._device.mark()
        with self._device.queue("out"):
            self._device.wait(mark)
            stretches = list(self._stretches(bucket))
            for _, home, here in self._staged:
                for start, end in stretches:
                    self._copy(home, here, start, end)
                here.release(*stretches[0])  # the unit of the bucket
            if self._streamed is not None and self._weights.comes_and_goes(bucket):
                for home_tensor, here_tensor in zip(
                    self._weights.of_bucket(bucket), self._weights.here_of_bucket(bucket), strict=True
                ):
                    home_tensor.copy_(here_tensor, non_blocking=True)
                self._streamed.leave(bucket)
            left = self._left[bucket] = self._device.mark()
        self._backlog.add(left)
        super().updated(bucket)

    def left(self, bucket: int) -> Mark:
        """Return when a bucket was last at home again."""
        return self._left.get(bucket)

    def settle(self) -> None:
        """Return when everything is at home."""
        self._backlog.finish()

    def _copy(self, target: Elements, source: Elements, start: int, end: int) -> None:
        target.view(start, end).copy_(source.view(start, end), non_blocking=True)
