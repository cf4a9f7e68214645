"""How hosts come to be connected: each opens a door, and nobody comes in without the run's token.

The first host's door is told to the others by the launcher's rendezvous. Each calls there, says where its own door is,
and is told where those of all are; then each pair is connected. Who calls and who is called prove to each other that
they know the token, without showing it: by an HMAC over a number that the other one has just chosen (a challenge and
a response, RFC 2104). Before that nothing of a caller is read but 84 bytes, for at most 10 seconds.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import final

from lightwork.errors import RankLost, TeamError
from lightwork.notice import notice

_MAGIC = b"lightwork host 1"
_NUMBER_BYTES = _PROOF_BYTES = 32
_QUESTION = struct.Struct(f"<{len(_MAGIC)}s{_NUMBER_BYTES}s")  # from who is called
_CALL = struct.Struct(f"<{len(_MAGIC)}sI{_NUMBER_BYTES}s{_PROOF_BYTES}s")  # from the caller, with its host

#: Seconds that a stranger has to prove itself, and the strangers that may do so at a time.
_PATIENCE, _MOST_STRANGERS = 10.0, 1024

#: Bytes of the table of all doors, at most.
_MOST_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Secret:
    """What is proven of a connection: the token of the run, and that it is meant for the same purpose."""

    token: str
    purpose: str  #: such as the number of the run, and what the connections are for

    def proof(self, side: str, host: int, asked: bytes, own: bytes) -> bytes:
        """Return the answer of `host` on a side of the connection to the number it was `asked`."""
        text = f"{side} {host} {self.purpose} ".encode()
        return hmac.digest(self.token.encode(), text + asked + own, "sha256")


@final
class Door:
    """Where other hosts come in.

    Owns: a listening socket and a thread, until `close`.
    """

    def __init__(self, address: str, host: int, secret: Secret) -> None:
        """Listen at an address of this machine, on any free port. Raises: TeamError when that can not be had."""
        self._host = host
        self._secret = secret
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self._come: Queue[tuple[int, socket.socket]] = Queue()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.bind((address, 0))
            self._listener.listen(1024)
        except OSError as error:
            self._listener.close()
            raise TeamError(
                f"this machine can not listen at {address} ({error.strerror}). Say which network the hosts share: "
                "GLOO_SOCKET_IFNAME=eth0, say."
            ) from error
        self.place: tuple[str, int] = (address, self._listener.getsockname()[1])
        threading.Thread(target=self._listen, name="lightwork door", daemon=True).start()

    def next(self, deadline: float) -> tuple[int, socket.socket] | None:
        """Return a host that has come in, and the connection to it; None at the deadline."""
        with contextlib.suppress(Empty):
            return self._come.get(timeout=max(0.0, deadline - time.monotonic()))
        return None

    def close(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                stranger, place = self._listener.accept()
            except OSError:
                return
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._let_in, args=(stranger, place[0]), daemon=True).start()
            else:
                stranger.close()

    def _let_in(self, stranger: socket.socket, who: str) -> None:
        try:
            stranger.settimeout(_PATIENCE)
            own = secrets.token_bytes(_NUMBER_BYTES)
            stranger.sendall(_QUESTION.pack(_MAGIC, own))
            magic, host, asked, proof = _CALL.unpack(receive_exactly(stranger, _CALL.size, _PATIENCE))
            if magic != _MAGIC or not hmac.compare_digest(proof, self._secret.proof("caller", host, own, asked)):
                raise ConnectionError("it does not know the token of the run")
            stranger.sendall(self._secret.proof("called", self._host, asked, own))
        except OSError as error:
            stranger.close()
            notice(f"somebody at {who} was turned away from this run's team: {error}.")
        else:
            self._come.put((host, stranger))
        finally:
            self._strangers.release()


def call(place: tuple[str, int], host: int, caller: int, secret: Secret, seconds: float) -> socket.socket:
    """Return a connection to `host`, whose door is at `place`.

    Raises: OSError when it can not be had, or is another's.
    """
    connected = socket.create_connection(place, timeout=seconds)
    try:
        connected.settimeout(_PATIENCE)
        magic, asked = _QUESTION.unpack(receive_exactly(connected, _QUESTION.size, _PATIENCE))
        if magic != _MAGIC:
            raise ConnectionError("another program has the port")
        own = secrets.token_bytes(_NUMBER_BYTES)
        connected.sendall(_CALL.pack(_MAGIC, caller, own, secret.proof("caller", caller, asked, own)))
        proof = receive_exactly(connected, _PROOF_BYTES, _PATIENCE)
        if not hmac.compare_digest(proof, secret.proof("called", host, own, asked)):
            raise ConnectionError("it does not know the token of the run")
    except OSError:
        connected.close()
        raise
    return connected


def connect_all(
    door: Door, first: tuple[str, int], host: int, leaders: Sequence[int], secret: Secret, seconds: float
) -> Mapping[int, socket.socket]:
    """Return a connection to each other host, by host; `first` is where the first one's door is.

    Blocks: until all hosts have called this.
    Raises: RankLost when one has not after so many seconds, or is gone; TeamError when this one is turned away.
    """
    deadline = time.monotonic() + seconds
    connected: dict[int, socket.socket] = {}
    try:
        if host == 0:
            _come_in(door, range(1, len(leaders)), leaders, deadline, connected)
            places = {other: json.loads(_receive_message(one, deadline)) for other, one in connected.items()}
            for one in connected.values():
                _send_message(one, json.dumps(places).encode())
        else:
            connected[0] = call(first, 0, host, secret, seconds)
            _send_message(connected[0], json.dumps(door.place).encode())
            for other, place in json.loads(_receive_message(connected[0], deadline)).items():
                if int(other) < host:
                    connected[int(other)] = call((place[0], place[1]), int(other), host, secret, seconds)
            _come_in(door, range(host + 1, len(leaders)), leaders, deadline, connected)
    except (OSError, TeamError) as error:
        for one in connected.values():
            one.close()
        if isinstance(error, TeamError):
            raise
        raise TeamError(
            f"rank {leaders[host]} can not be connected to the workers of other hosts ({error}). The first one is at "
            f"{first[0]}:{first[1]}. All must have the same LIGHTWORK_TOKEN, or none, and reach each other's ports."
        ) from error
    return connected


def _come_in(
    door: Door, hosts: Sequence[int], leaders: Sequence[int], deadline: float, connected: dict[int, socket.socket]
) -> None:
    """Wait for hosts to come in, and put the connections to them into `connected`."""
    while missing := [host for host in hosts if host not in connected]:
        came = door.next(deadline)
        if came is None:
            raise RankLost(
                f"rank {leaders[missing[0]]} has not connected to the others. Every worker must reach "
                "lightwork.distribute, and the ports of the others' machines; see its log.",
                leaders[missing[0]],
            )
        host, one = came
        if host in missing:
            connected[host] = one
        else:
            one.close()


def receive_exactly(connected: socket.socket, size: int, seconds: float) -> bytes:
    """Return the next `size` bytes. Raises: OSError when they have not come after so many seconds."""
    received, deadline = b"", time.monotonic() + seconds
    while len(received) < size:
        connected.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connected.recv(size - len(received))
        if not piece:
            raise ConnectionError("it was closed")
        received += piece
    return received


def _send_message(connected: socket.socket, message: bytes) -> None:
    connected.sendall(_LENGTH.pack(len(message)) + message)


def _receive_message(connected: socket.socket, deadline: float) -> bytes:
    (size,) = _LENGTH.unpack(receive_exactly(connected, _LENGTH.size, deadline - time.monotonic()))
    if size > _MOST_BYTES:
        raise ConnectionError(f"it sends a table of {size} bytes")
    return receive_exactly(connected, size, deadline - time.monotonic())
