"""Where fetched weights come from: another host, which owns them, or this host's memory, where a device has its home.

[Note: who answers]
Each host answers the others' requests for buckets in a thread of its own, whatever its worker is doing. Nothing is
scheduled, so a host that has more micro-batches than others, or takes another way through the model, keeps nobody
waiting. A bucket that is asked for is as the last step left it: its owner updates it only when every host has
computed all its micro-batches, and nobody asks between that and the end of the step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Protocol, final

import torch

from lightwork.device.base import Device, Mark
from lightwork.errors import RankLost
from lightwork.spec.holdings import Holdings, Home
from lightwork.state.places import Arrival, Way, copied
from lightwork.state.weights import Weights
from lightwork.transport.base import FIRST_TAG, Carrier

_REQUEST, _ANSWER = range(FIRST_TAG, FIRST_TAG + 2)

#: The request of a host that will make no more.
_GOODBYE = -1


class Source(Protocol):
    """Where the weights of a bucket come from."""

    def request(self, bucket: int, tensors: Sequence[torch.Tensor], left: Mark) -> list[Arrival]:
        """Begin to bring a bucket's values into `tensors`. Written on an earlier visit, they are at home at `left`."""


@final
class Owners:
    """The other hosts."""

    def __init__(self, holdings: Holdings, carrier: Carrier) -> None:
        self._holdings = holdings
        self._carrier = carrier

    def request(self, bucket: int, tensors: Sequence[torch.Tensor], left: Mark) -> list[Arrival]:
        """Ask the owner."""
        owner = self._holdings.rows[bucket].owner
        arrivals: list[Arrival] = [self._carrier.receive(owner, tensor, _ANSWER) for tensor in tensors]
        return [*arrivals, self._carrier.send(owner, torch.tensor([bucket]), _REQUEST)]

    def close(self) -> None:
        """Let the other hosts' threads end."""
        goodbye = torch.tensor([_GOODBYE])
        for host in self._carrier.others:
            with contextlib.suppress(RankLost):
                self._carrier.send(host, goodbye, _REQUEST).wait()


@final
class HostMemory:
    """This host's memory, where a device has what it offloads."""

    def __init__(self, weights: Weights, device: Device) -> None:
        self._weights = weights
        self._device = device

    def request(self, bucket: int, tensors: Sequence[torch.Tensor], left: Mark) -> list[Arrival]:
        """Begin to copy the bucket to the device."""
        with self._device.queue("in"):
            self._device.wait_for_mark(left)
            for home, here in zip(self._weights.of_bucket(bucket), tensors, strict=True):
                here.copy_(home, non_blocking=True)
            return [copied(self._device)]


@final
class FetchedWeights(Way):
    """The working weights of a bucket, from its source. What an update wrote here goes home.

    Moves: two requests of 8 bytes and twice the weights' bytes of other hosts a micro-batch, in and out (forward, and
    backward), less what stays between them. Of offloaded ones, twice their bytes to the device.
    """

    def __init__(self, weights: Weights, holdings: Holdings, device: Device, carrier: Carrier) -> None:
        """`carrier` is for requests alone; there are no others where no weights are shared out."""
        self._weights = weights
        self._device = device
        self.closed = threading.Event()  #: nothing will be asked for any more
        self._owners = Owners(holdings, carrier)
        self._num_askers = len(carrier.others)
        at_home = HostMemory(weights, device)
        self._sources: dict[int, Source] = {}
        for row in holdings.rows:
            if row.weights_are_fetched:
                self._sources[row.bucket] = self._owners if row.home_of_weights is Home.OWNER else at_home

    @property
    def is_used(self) -> bool:
        """Whether this host fetches any bucket, or others may fetch from it."""
        return len(self._sources) + self._num_askers > 0

    @property
    def buckets(self) -> list[int]:
        """The buckets that are fetched."""
        return list(self._sources)

    def bring(self, visitor: int, left: Mark) -> Sequence[Arrival]:
        """Take room, and ask the source."""
        with self._device.queue("in"):
            self._take_room(visitor)
        return self._sources[visitor].request(visitor, _here(self._weights, visitor), left)

    def make_room(self, visitor: int) -> None:
        """Take room, for computation to write."""
        with self._device.queue("in"):
            self._take_room(visitor)
            taken = self._device.mark()
        self._device.wait_for_mark(taken)

    def leave(self, visitor: int, *, written: bool) -> Mark:
        """Give the room back, after what was written has been copied home."""
        if not written:
            self._give_room_back(visitor)
            return self._device.mark()
        mark = self._device.mark()
        with self._device.queue("out"):
            self._device.wait_for_mark(mark)
            homes, here = self._weights.of_bucket(visitor), _here(self._weights, visitor)
            for home_tensor, here_tensor in zip(homes, here, strict=True):
                home_tensor.copy_(here_tensor, non_blocking=True)
            self._give_room_back(visitor)
            return self._device.mark()

    def _take_room(self, bucket: int) -> None:
        for stretch in self._weights.stretches(bucket):
            stretch.here.take_room(stretch.start, stretch.end)

    def _give_room_back(self, bucket: int) -> None:
        for stretch in self._weights.stretches(bucket):
            stretch.here.release_room(stretch.start, stretch.end)

    def close(self) -> None:
        """Say to the other hosts that nothing will be asked for any more."""
        self._owners.close()
        self.closed.set()


def _here(weights: Weights, bucket: int) -> list[torch.Tensor]:
    """Return the working weights of a bucket as computation sees them, neighbours of one type together."""
    return [stretch.here.view(stretch.start, stretch.end) for stretch in weights.stretches(bucket)]


def answer_requests(weights: Weights, carrier: Carrier, device: Device, closed: threading.Event) -> None:
    """Start the thread that answers the other hosts' requests for buckets, until all have said goodbye or are gone.

    Then, when this host has `closed` too and asks for nothing any more, it closes the carrier. See [Note: who answers].
    """
    if not carrier.others:
        return
    arguments = (weights, carrier, device, closed)
    threading.Thread(target=_answer_requests, args=arguments, name="lightwork weights", daemon=True).start()


def _answer_requests(weights: Weights, carrier: Carrier, device: Device, closed: threading.Event) -> None:
    request = torch.empty(1, dtype=torch.int64)
    open_hosts = len(carrier.others)
    with contextlib.suppress(RankLost), device.queue("out"):  # the exchange of gradients names it
        while open_hosts:
            host = carrier.receive_from_any(request, _REQUEST)
            bucket = int(request)
            if bucket == _GOODBYE:
                open_hosts -= 1
                continue
            device.wait_for_mark(weights.writes.accepted)
            for pending in [carrier.send(host, tensor, _ANSWER) for tensor in weights.of_bucket(bucket)]:
                pending.wait()
    closed.wait()
    carrier.close()
