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

from lightwork.errors import HostLost, RankFailed, RankLost, TeamError
from lightwork.transport.base import Carrier, Farewell, Pending
from lightwork.transport.connection import Connection, Transfer, Waiting
from lightwork.transport.regrouping import Regrouping

#: Called each second with the host that is waited for, and the seconds so far.
Waits = Callable[[int, float], None]

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
        waits: Waits | None = None,
        silence: float = 0.0,
        patience: float = math.inf,
        regrouping: Regrouping | None = None,
    ) -> None:
        """Be `host`, with a socket that is connected to each other one.

        Args:
            waits: told of those that are waited for.
            silence: seconds after which a host is lost whose machine does not answer; 0 for never.
            patience: the same for one whose machine answers, and whose process says nothing.
            regrouping: for hosts that go on without one that they lose.
        """
        super().__init__(host, leaders)
        self._waits = waits
        self._silence = silence
        self._patience = patience
        self._regrouping = regrouping
        self._is_closed = threading.Event()
        self._renew(connected)
        if silence:
            threading.Thread(target=self._look, name="lightwork listener", daemon=True).start()

    def _renew(self, connected: Mapping[int, socket.socket]) -> None:
        """Go on over other connections; a host to which there is none is lost."""
        self._waiting = waiting = Waiting()
        for other, made in sorted(connected.items()):
            waiting.connections[other] = Connection(other, made, waiting, self._lost)
        for connection in waiting.connections.values():
            connection.start()

    @property
    def others(self) -> list[int]:
        """The hosts but this one, and those that were lost."""
        return list(self._waiting.connections)

    @property
    def has_lost(self) -> bool:
        """Whether any connection has ended without a farewell."""
        connections = self._waiting.connections.values()
        return any(one.end_reason is not None and one.farewell is None for one in connections)

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
        if self.farewell is not None:
            for connection in self._waiting.connections.values():
                connection.say(self.farewell)
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline and not all(one.has_arrived() for one in self._waiting.connections.values()):
            time.sleep(0.001)
        for connection in self._waiting.connections.values():
            connection.end("")
        if self._regrouping is not None:
            self._regrouping.close()

    @property
    def may_come_together(self) -> bool:
        """Whether there is a way."""
        return self._regrouping is not None

    def come_together(self, report: int) -> Mapping[int, int]:
        """End all connections, by which the others hear of it, too, and make new ones."""
        if self._regrouping is None:
            raise ValueError("these hosts can not come together anew")
        connections = self._waiting.connections.values()
        for connection in connections:
            connection.end("the team comes together anew")
        for connection in connections:
            connection.join(_FAREWELL)
            if connection.farewell is Farewell.FAILED:
                raise self._lost(connection.host, "")
        regrouped = self._regrouping.come_together(report)
        self._renew(regrouped.connected)
        return regrouped.reports

    def _lost(self, host: int | None, reason: str) -> TeamError:
        """Return the error of a connection that has ended; of all with None."""
        rank = self.leaders[self.host]
        if self._is_closed.is_set():
            return RankLost(f"rank {rank} has closed its connections: its run was ended.")
        if host is None:
            return RankLost(f"rank {rank} lost its connections ({reason}). See the logs of the others.")
        other, farewell = self.leaders[host], self._waiting.connections[host].farewell
        if farewell is Farewell.FAILED:
            return RankFailed(f"rank {rank} ends because rank {other}, or one beside it, failed; see its traceback.")
        kind = HostLost if farewell is None else RankLost
        return kind(
            f"rank {rank} lost its connection to rank {other} ({reason}). Its process ended, or the network between "
            "them did; see its log.",
            other,
        )

    def _transfer(self, host: int | None, tensor: torch.Tensor) -> Transfer:
        def name(seconds: float) -> None:
            if self._waits is not None and host is not None:
                self._waits(host, seconds)

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
