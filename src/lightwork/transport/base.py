"""The contracts of the transports: small messages between all workers, and tensors between hosts."""

from __future__ import annotations

import contextlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import torch

from lightwork.errors import Disagreement, TeamError

#: Called while waiting, some times a second; returns why waiting has become pointless, which the one who waits raises.
Watch = Callable[[], TeamError | None]


class Transport(ABC):
    """Moves small messages between all workers of a team.

    Gradients do not pass here: on a host they are read in place, between hosts a `Carrier` brings them.
    """

    @abstractmethod
    def exchange(self, what: str, payload: bytes, watch: Watch) -> list[bytes | None]:
        """Return every worker's payload, in order. Also a barrier: nobody leaves before all have entered.

        `what` names the call, such as "save"; all must agree on it. Of a worker that died before it came there is None;
        what one has left that died since is there. Everyone receives the same.

        Moves: the payload of each worker, once, to each other.
        Blocks: until all have called, while `watch` has nothing against it.
        Raises: what `watch` returns; Disagreement when another worker exchanges something else.
        """


class Pending(ABC):
    """A tensor on its way."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the tensor may be read (received) or written again (sent).

        Raises: RankLost when the other host is gone.
        """


_WHAT_BYTES = 48
_HEADER = struct.Struct(f"<{_WHAT_BYTES}sq")  # what, bytes of the whole payload

#: Bytes of the first message of an exchange, which holds the header and as much of the payload as fits.
FIRST_BYTES = 16 * 1024

#: Tags of `exchange`, and of what one came to, for who has missed it; those of tensors begin at `FIRST_TAG`.
_TAG_FIRST, _TAG_REST, GIVEN_TAG, FIRST_TAG = range(4)


class PointToPoint(ABC):
    """Moves tensors between hosts that share no memory. Bytes only: it never adds.

    Tensors are contiguous and of any type. Two of one sender to one receiver with one tag arrive in order.
    """

    @abstractmethod
    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send `tensor`, which stays as it is until `wait`."""

    @abstractmethod
    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive into `tensor`, of as many bytes as are sent."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the connections."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let what is begun inside be on its way at once: every host begins the other sides of it inside, too.

        For those that would otherwise wait in one call for a host that waits in another.
        """
        yield


class Farewell(Enum):
    """What a host tells the others before it closes its connections; a killed one tells nothing."""

    LEFT = b"L"  #: its script has ended
    FAILED = b"F"  #: its code has raised an error


class Carrier(PointToPoint):
    """Moves tensors and messages between the leaders of hosts that share no memory."""

    def __init__(self, host: int, leaders: list[int]) -> None:
        self.host = host
        self.leaders = leaders  #: the rank that speaks for each host, for messages
        self.farewell: Farewell | None = Farewell.LEFT  #: what `close` tells the others

    @property
    def num_hosts(self) -> int:
        """The number of hosts."""
        return len(self.leaders)

    @property
    def others(self) -> list[int]:
        """The hosts but this one, and those that were lost."""
        return [host for host in range(self.num_hosts) if host != self.host]

    @abstractmethod
    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Receive into `tensor` from whoever sends first, and return the host.

        Blocks: until one sends.
        Raises: RankLost.
        """

    @property
    def may_come_together(self) -> bool:
        """Whether `come_together` can be called."""
        return False

    @property
    def has_lost(self) -> bool:
        """Whether a connection has ended without a farewell."""
        return False

    def come_together(self, report: int) -> Mapping[int, int]:
        """Go on with the hosts that are left, after one was lost, and return what each of them reports.

        What was on its way is lost; nothing of it is written any more.

        Blocks: until all of them have called it.
        Raises: RankLost when this host can not go on; RankFailed when the code of another one has failed.
        """
        raise ValueError("these hosts can not come together anew")

    def exchange(self, what: str, payload: bytes) -> list[bytes | None]:
        """Return every host's payload, by host; None of those that were lost. Also a barrier.

        Moves: `FIRST_BYTES` to and from each other host, and what of the payloads did not fit.
        Raises: Disagreement when another host exchanges something else; RankLost.
        """
        others = self.others
        first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        room = FIRST_BYTES - _HEADER.size
        name = what.encode()[:_WHAT_BYTES]
        start = _HEADER.pack(name, len(payload)) + payload[:room]
        first[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        firsts = {host: torch.empty_like(first) for host in others}
        on_the_way = [self.receive(host, firsts[host], _TAG_FIRST) for host in others]
        on_the_way += [self.send(host, first, _TAG_FIRST) for host in others]
        for pending in on_the_way:
            pending.wait()
        rests: dict[int, torch.Tensor] = {}
        heads = {host: _HEADER.unpack(firsts[host][: _HEADER.size].numpy().tobytes()) for host in others}
        for host in others:
            theirs = bytes(heads[host][0]).rstrip(b"\0")
            if theirs != name:
                raise Disagreement(
                    f"rank {self.leaders[self.host]} calls {name.decode(errors='ignore')} while rank "
                    f"{self.leaders[host]} calls {theirs.decode(errors='ignore')}. Every worker must make the same "
                    "calls in the same order, and leave its loop at the same step: take them out of conditions such "
                    "as `if run.is_main`."
                )
            if heads[host][1] > room:
                rests[host] = torch.empty(heads[host][1] - room, dtype=torch.uint8)
        on_the_way = [self.receive(host, rest, _TAG_REST) for host, rest in rests.items()]
        if len(payload) > room:
            rest = torch.frombuffer(bytearray(payload[room:]), dtype=torch.uint8)
            on_the_way += [self.send(host, rest, _TAG_REST) for host in others]
        for pending in on_the_way:
            pending.wait()
        received: list[bytes | None] = [None] * self.num_hosts
        received[self.host] = payload
        for host in others:
            length = heads[host][1]
            begin = firsts[host][_HEADER.size : _HEADER.size + min(length, room)].numpy().tobytes()
            received[host] = begin + (rests[host].numpy().tobytes() if host in rests else b"")
        return received
