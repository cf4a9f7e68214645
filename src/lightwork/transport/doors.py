"""How hosts come to be connected: each opens a door, and nobody comes in without the run's token.

The first host's door is told to the others by the launcher's rendezvous. Each calls there, says where its own door is,
and is told where those of all are; then each pair is connected. Who calls and who is called prove to each other that
they know the token, without showing it: by an HMAC over a number that the other one has just chosen (a challenge and
a response, RFC 2104). Before that nothing of a caller is read but 84 bytes, for at most 10 seconds. Behind it comes a
message, which says what the connection is for.

Where a team goes on without a host that it loses, the doors stay open for it to come together anew (`regrouping`).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, final

from lightwork.errors import RankLost, TeamError
from lightwork.notice import notice

_MAGIC = b"lightwork host 1"
_NUMBER_BYTES = _PROOF_BYTES = 32
_QUESTION = struct.Struct(f"<{len(_MAGIC)}s{_NUMBER_BYTES}s")  # from who is called
_CALL = struct.Struct(f"<{len(_MAGIC)}sI{_NUMBER_BYTES}s{_PROOF_BYTES}s")  # from the caller, with its host

#: Seconds after which who waits at a door is told that somebody is there.
_BEAT = 1.0

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


#: Where a host's door is: address and port.
Place = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Caller:
    """A host that has come in."""

    host: int
    socket: socket.socket  #: the connection to it
    message: dict[str, Any]  #: what it has said


@final
class Door:
    """Where other hosts come in.

    Owns: a listening socket and a thread, until `close`.
    """

    def __init__(self, address: str, host: int, secret: Secret) -> None:
        """Listen at an address of this machine, on any free port. Raises: TeamError when that can not be had."""
        self.host = host
        self._secret = secret
        self._waiting: set[Caller] = set()  # those that are told now and then that this process runs
        self._order = threading.Lock()  # over them
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self.answer: Callable[[Caller], bool] = lambda caller: False  #: returns whether a caller has got its answer
        self._come: Queue[Caller] = Queue()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.bind((address, 0))
            self._listener.listen(1024)
            self._listener.settimeout(_BEAT)
        except OSError as error:
            self._listener.close()
            raise TeamError(
                f"this machine can not listen at {address} ({error.strerror}). Say which network the hosts share: "
                "GLOO_SOCKET_IFNAME=eth0, say."
            ) from error
        self.place: Place = (address, self._listener.getsockname()[1])
        _OPEN.add(self)
        threading.Thread(target=self._listen, name="lightwork door", daemon=True).start()

    def next(self, deadline: float) -> Caller | None:
        """Return a host that has come in; None at the deadline."""
        with contextlib.suppress(Empty):
            return self._come.get(timeout=max(0.0, deadline - time.monotonic()))
        return None

    def release(self, caller: Caller) -> None:
        """Say nothing to a caller any more: it will be told something else."""
        with self._order:
            self._waiting.discard(caller)

    def put_back(self, caller: Caller) -> None:
        """Let a host that has come in come once more."""
        self._come.put(caller)

    def close_in_child(self) -> None:
        """Let go of the descriptor in a process that was forked: else who calls would take its owner to be alive."""
        self._listener.close()

    def close(self) -> None:
        """Let nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        last_beat = time.monotonic()
        while True:
            if time.monotonic() - last_beat >= _BEAT:
                last_beat = time.monotonic()
                self._beat()
            try:
                stranger, place = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._let_in, args=(stranger, place[0]), daemon=True).start()
            else:
                stranger.close()

    def _beat(self) -> None:
        """Say that this process runs."""
        with self._order:
            for caller in list(self._waiting):
                try:
                    caller.socket.sendall(_LENGTH.pack(0))
                except OSError:
                    self._waiting.discard(caller)

    def _let_in(self, stranger: socket.socket, who: str) -> None:
        try:
            stranger.settimeout(_PATIENCE)
            own = secrets.token_bytes(_NUMBER_BYTES)
            stranger.sendall(_QUESTION.pack(_MAGIC, own))
            magic, host, asked, proof = _CALL.unpack(receive_exactly(stranger, _CALL.size, _PATIENCE))
            if magic != _MAGIC or not hmac.compare_digest(proof, self._secret.proof("caller", host, own, asked)):
                raise ConnectionError("it does not know the token of the run")
            stranger.sendall(self._secret.proof("called", self.host, asked, own))
            caller = Caller(host, stranger, json.loads(receive_message(stranger, time.monotonic() + _PATIENCE)))
        except (OSError, ValueError) as error:
            stranger.close()
            if not isinstance(error, Untouched | ConnectionResetError | BrokenPipeError):  # it has gone by itself
                notice(f"somebody at {who} was turned away from this run's team: {error}.")
        else:
            if caller.message.get("probe"):  # it has asked whether this one lives
                stranger.close()
            elif not self.answer(caller):
                if "wants" in caller.message:
                    with self._order:
                        self._waiting.add(caller)
                self._come.put(caller)
        finally:
            self._strangers.release()


_OPEN: weakref.WeakSet[Door] = weakref.WeakSet()


def _close_in_child() -> None:
    for door in list(_OPEN):
        door.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


class Untouched(ConnectionError):
    """A connection was closed before anything came."""


class NotOurs(ConnectionError):
    """Who has the port does not know the token: another program."""


class Silent(ConnectionError):
    """Who has the port says nothing: its process is stopped, or busy in one call."""


def call(
    place: Place,
    host: int,
    caller: int,
    secret: Secret,
    message: Mapping[str, object],
    seconds: float,
    patience: float = _PATIENCE,
) -> socket.socket:
    """Return a connection to `host`, whose door is at `place`, when it has been told the message.

    Raises: OSError when it can not be had after so many seconds, or is another's.
    """
    connected = socket.create_connection(place, timeout=seconds)
    try:
        connected.settimeout(patience)
        magic, asked = _QUESTION.unpack(receive_exactly(connected, _QUESTION.size, patience))
        if magic != _MAGIC:
            raise NotOurs("another program has the port")
        own = secrets.token_bytes(_NUMBER_BYTES)
        connected.sendall(_CALL.pack(_MAGIC, caller, own, secret.proof("caller", caller, asked, own)))
        proof = receive_exactly(connected, _PROOF_BYTES, patience)
        if not hmac.compare_digest(proof, secret.proof("called", host, own, asked)):
            raise NotOurs("it does not know the token of the run")
        send_message(connected, json.dumps(message).encode())
    except TimeoutError as error:
        connected.close()
        raise Silent("it does not answer") from error
    except OSError:
        connected.close()
        raise
    return connected


def connect_all(
    door: Door,
    first: Place,
    host: int,
    leaders: Sequence[int],
    secret: Secret,
    seconds: float,
    about: Mapping[str, object] | None = None,
) -> tuple[Mapping[int, socket.socket], Mapping[int, Mapping[str, Any]]]:
    """Return a connection to each other host, by host, and what each of all says of itself: the place of its door.

    Args:
        first: where the first one's door is.
        about: what else this one says.

    Blocks: until all hosts have called this.
    Raises: RankLost when one has not after so many seconds, or is gone; TeamError when this one is turned away.
    """
    deadline = time.monotonic() + seconds
    connected: dict[int, socket.socket] = {}
    own = {"place": door.place, **(about or {})}
    of_all: dict[int, Mapping[str, Any]] = {host: own}
    try:
        if host == 0:
            of_all |= _come_in(door, range(1, len(leaders)), leaders, deadline, connected)
            for one in connected.values():
                send_message(one, json.dumps(of_all).encode())
        else:
            connected[0] = call(first, 0, host, secret, own, seconds)
            told = json.loads(receive_message(connected[0], deadline))
            of_all = {int(other): message | {"place": tuple(message["place"])} for other, message in told.items()}
            for other in range(1, host):
                connected[other] = call(of_all[other]["place"], other, host, secret, own, seconds)
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
    return connected, of_all


def _come_in(
    door: Door, hosts: Sequence[int], leaders: Sequence[int], deadline: float, connected: dict[int, socket.socket]
) -> dict[int, Mapping[str, Any]]:
    """Wait for hosts to come in, put the connections to them into `connected`, and return what they say."""
    said: dict[int, Mapping[str, Any]] = {}
    while missing := [host for host in hosts if host not in connected]:
        came = door.next(deadline)
        if came is None:
            raise RankLost(
                f"rank {leaders[missing[0]]} has not connected to the others. Every worker must reach "
                "lightwork.distribute, and the ports of the others' machines; see its log.",
                leaders[missing[0]],
            )
        if came.host in missing:
            connected[came.host] = came.socket
            said[came.host] = came.message | {"place": tuple(came.message["place"])}
        else:
            came.socket.close()
    return said


def receive_exactly(connected: socket.socket, size: int, seconds: float) -> bytes:
    """Return the next `size` bytes. Raises: OSError when they have not come after so many seconds."""
    received, deadline = b"", time.monotonic() + seconds
    while len(received) < size:
        connected.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connected.recv(size - len(received))
        if not piece:
            raise ConnectionError("it was closed") if received else Untouched("it was closed")
        received += piece
    return received


def is_there(connected: socket.socket, seconds: float) -> bool:
    """Return whether something comes, or the end, in so many seconds; it is left to be read.

    Raises: OSError when the way is cut.
    """
    connected.settimeout(seconds)
    try:
        connected.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except TimeoutError as error:
        if error.errno is not None:  # the kernel's
            raise
        return False
    return True


def send_message(connected: socket.socket, message: bytes) -> None:
    """Send a message of any length."""
    connected.sendall(_LENGTH.pack(len(message)) + message)


def receive_message(connected: socket.socket, deadline: float) -> bytes:
    """Return the next message. Raises: OSError when it has not come by then."""
    (size,) = _LENGTH.unpack(receive_exactly(connected, _LENGTH.size, deadline - time.monotonic()))
    if size > _MOST_BYTES:
        raise ConnectionError(f"it sends a table of {size} bytes")
    return receive_exactly(connected, size, deadline - time.monotonic())
