"""Tensors and messages between hosts over TCP: bytes alone, no process group, and an end that everybody hears of.

Gloo, which did this before, can not be aborted, and under traffic heard of only every other death before its timeout.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import final

import torch

from lightwork.errors import RankLost
from lightwork.transport.base import Carrier, Pending
from lightwork.transport.connection import Connection, Transfer, Waiting
from lightwork.transport.late import Lateness

#: Called with the rank that is waited for, and the seconds so far.
Late = Callable[[int, float], None]

#: Seconds in which what was sent may still arrive, when the connections are closed.
_FAREWELL = 1.0


@final
class SocketCarrier(Carrier):
    """Tensors and messages over a connection to each other host.

    Owns: the connections, with two threads each, and one that looks whether the others are silent; until `close`.
    """

    def __init__(
        self,
        host: int,
        leaders: list[int],
        connected: Mapping[int, socket.socket],
        late: Late | None = None,
        silence: float = 0.0,
        patience: float = math.inf,
    ) -> None:
        """Be `host`, with a socket that is connected to each other one.

        Args:
            late: told of those that are waited for.
            silence: seconds after which a host is lost whose machine does not answer; 0 for never.
            patience: the same for one whose machine answers, and whose process says nothing.
        """
        super().__init__(host, leaders)
        self._waiting = waiting = Waiting()
        self._late = late
        self._lateness = Lateness()
        self._silence = silence
        self._patience = patience
        self._is_closed = threading.Event()
        for other, made in connected.items():
            waiting.connections[other] = Connection(other, made, waiting, self._lost)
        for connection in waiting.connections.values():
            connection.start()
        if silence:
            threading.Thread(target=self._look, name="lightwork listener", daemon=True).start()

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send."""
        transfer = self._transfer(host, tensor)
        self._waiting.connections[host].send(tag, transfer)
        return transfer

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        transfer, connection = self._transfer(host, tensor), self._waiting.connections[host]
        with self._waiting.changed:
            frame, reason = connection.take_kept(tag), connection.end_reason
            if frame is None and reason is None:
                connection.posted[tag].append(transfer)
            self._waiting.changed.notify_all()
        if frame is not None:
            connection.give(frame, transfer)
        elif reason is not None:
            transfer.end(self._lost(host, reason))
        return transfer

    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Receive from whoever sends first. A host that is lost does not send; without any other this fails."""
        transfer = self._transfer(None, tensor)
        with self._waiting.changed:
            for connection in self._waiting.connections.values():
                frame = connection.take_kept(tag)
                if frame is not None:
                    break
            else:
                self._waiting.of_any[tag].append(transfer)
                for given_up in self._waiting.given_up():
                    given_up.end(self._lost(None, "nobody is left"))
            self._waiting.changed.notify_all()
        if frame is not None:
            connection.give(frame, transfer)
        transfer.wait()
        return transfer.source

    def close(self) -> None:
        """Close the connections, as soon as what was sent has arrived: the others notice, and whoever waits here."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline and not all(one.has_arrived() for one in self._waiting.connections.values()):
            time.sleep(0.001)
        for connection in self._waiting.connections.values():
            connection.end("")

    def _lost(self, host: int | None, reason: str) -> RankLost:
        """Return the error of a connection that has ended; of all with None."""
        rank = self.leaders[self.host]
        if self._is_closed.is_set():
            return RankLost(f"rank {rank} has closed its connections: its run was ended.")
        if host is None:
            return RankLost(f"rank {rank} lost its connections ({reason}). See the logs of the others.")
        other = self.leaders[host]
        return RankLost(
            f"rank {rank} lost its connection to rank {other} ({reason}). Its process ended, or the network between "
            "them did; see its log.",
            other,
        )

    def _transfer(self, host: int | None, tensor: torch.Tensor) -> Transfer:
        def name(seconds: float) -> None:
            if self._late is not None and host is not None:
                now, rank = time.monotonic(), self.leaders[host]
                if self._lateness.is_due(rank, now - seconds, now):
                    self._late(rank, seconds)

        return Transfer(tensor.detach().view(-1).view(torch.uint8).numpy().data, name)

    def _look(self) -> None:
        """Tell the others that this process runs, and look whether they do, some times in `silence` seconds.

        Time in which this process itself was stopped does not count.
        """
        interval = self._silence / 8
        before = time.monotonic()
        while not self._is_closed.wait(interval):
            now = time.monotonic()
            for connection in self._waiting.connections.values():
                connection.beat()
                connection.look(min(now - before, 2 * interval), self._silence, self._patience)
            before = now
