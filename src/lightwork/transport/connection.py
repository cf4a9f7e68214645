"""A connection to another host: frames that come and go by threads of its own, and an end that all who wait hear of.

[Note: a connection]
There is one for each pair of hosts, made and proven by `doors`. A frame is a header (tag, length) and its bytes. A
thread of each connection reads whatever comes, so that no send waits for the other side to ask for it: what is not
asked for yet is kept, in the order of its tag. Small frames are sent by whoever sends them, large ones by another
thread. A connection ends at once for all who wait for it: when its process ends, when this one closes it, or when the
other one is silent.

[Note: silence]
A link that is taken down says nothing; nor does a process that is stopped, or that runs one C call for minutes. So each
end sends a frame now and then that says no more than that it runs. Where not even the other machine's kernel confirms
these, the link is down, and the connection ends soon. A process that sends none has far longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import final

from lightwork.errors import TeamError
from lightwork.transport.base import Farewell, Pending

_HEADER = struct.Struct("<qQ")  # tag, bytes

#: The tags of a frame without bytes, which says that its sender runs, and of the last one (`Farewell`).
_BEAT, _FAREWELL = -1, -2

#: Bytes of a frame that its sender sends itself.
_SMALL = 64 * 1024

#: Bytes that are read at a time, of a frame.
_PIECE = 1024 * 1024

#: Bytes of frames of one connection that are kept before they are asked for; more are left in the network.
_MOST_KEPT = 1024 * 1024 * 1024

#: Of Linux's struct tcp_info: probes without an answer, segments without one, milliseconds since the last one.
_TCP_INFO = struct.Struct("=3xB4x16xI28xI")

#: Questions to a closed window that show, without an answer, that nobody is there.
_UNANSWERED = 3

#: Seconds after which a thread that waits looks whether it has waited for long.
_LOOK = 1.0


@final
class Transfer(Pending):
    """A tensor on its way."""

    def __init__(self, view: memoryview, name: Callable[[float], None]) -> None:
        """`name` is told of a wait some times, with the seconds so far."""
        self.view = view
        self.source = -1  #: the host that it came from
        self._name = name
        self._gate = threading.Lock()
        self._gate.acquire()
        self._error: TeamError | None = None
        self._is_over = False

    def end(self, error: TeamError | None = None) -> None:
        """Let go whoever waits."""
        self._error = error
        self._gate.release()

    def wait(self) -> None:
        """Wait, and let other threads run."""
        if not self._is_over:
            start = time.monotonic()
            while not self._gate.acquire(timeout=_LOOK):
                self._name(time.monotonic() - start)
            self._is_over = True
        if self._error is not None:
            raise self._error


@final
class Waiting:
    """What the threads of this host wait for from any other one, with the lock over all that is waited for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  #: also the lock
        self.of_any: dict[int, deque[Transfer]] = defaultdict(deque)  #: by tag
        self.connections: dict[int, Connection] = {}  #: by host

    def given_up(self) -> list[Transfer]:
        """Return who waits for any host when none is left. The caller has the lock."""
        if any(connection.end_reason is None for connection in self.connections.values()):
            return []
        waiting = [transfer for of_tag in self.of_any.values() for transfer in of_tag]
        self.of_any.clear()
        return waiting


@final
class Connection:
    """One connection, of which one end is here. See [Note: a connection].

    Owns: the socket, which its reading thread closes in the end, and two threads.
    """

    def __init__(
        self, host: int, connected: socket.socket, waiting: Waiting, lost: Callable[[int, str], TeamError]
    ) -> None:
        """`lost` returns the error of those who wait for `host`, with the reason."""
        self.host = host
        self.end_reason: str | None = None  #: why it has ended
        self.farewell: Farewell | None = None  #: what the other end has said before
        self.posted: dict[int, deque[Transfer]] = defaultdict(deque)  #: by tag: what is waited for
        self.kept: dict[int, deque[bytearray]] = defaultdict(deque)  #: by tag: what has come before
        self._num_kept = 0  # bytes
        self._has_come = False  # anything since the last look
        self._silent = 0.0
        self._of_all = waiting
        self._lost = lost
        self._socket = connected
        self._order = threading.Lock()  # over what is sent next
        self._num_queued = 0
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[tuple[list[memoryview], Transfer | None] | None] = SimpleQueue()
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _OPEN.add(self)

    def start(self) -> None:
        """Let what was sent come."""
        for work, what in ((self._read, "reads"), (self._write, "writes")):
            thread = threading.Thread(target=work, name=f"lightwork {what} {self.host}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # --- sending ----------------------------------------------------------------------------------------------------

    def send(self, tag: int, transfer: Transfer) -> None:
        """Begin to send a frame."""
        parts = [memoryview(_HEADER.pack(tag, len(transfer.view))), transfer.view]
        with self._order:
            if self.end_reason is not None:
                transfer.end(self._lost(self.host, self.end_reason))
                return
            if not self._num_queued and len(transfer.view) <= _SMALL:
                parts = self._send_now(parts)
            if parts:
                self._num_queued += 1
                self._queue.put((parts, transfer))
                return
        transfer.end()

    def beat(self) -> None:
        """Say that this process runs, unless something is on its way anyway."""
        if not self._order.acquire(blocking=False):
            return
        try:
            if self.end_reason is None and not self._num_queued:
                beat = memoryview(_HEADER.pack(_BEAT, 0))
                parts = self._send_now([beat])
                if parts and len(parts[0]) < len(beat):
                    self._num_queued += 1
                    self._queue.put((parts, None))
        finally:
            self._order.release()

    def say(self, farewell: Farewell) -> None:
        """Tell the other end why this one will be closed, behind what was sent."""
        with self._order:
            if self.end_reason is None:
                self._num_queued += 1
                self._queue.put(([memoryview(_HEADER.pack(_FAREWELL, 1) + farewell.value)], None))

    def _send_now(self, parts: list[memoryview]) -> list[memoryview]:
        """Send as much as the network takes at once, and return the rest."""
        try:
            return _without_first(parts, self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT))
        except BlockingIOError:
            return parts
        except OSError:  # the reading thread says why, and ends it
            return parts

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            parts, transfer = item
            try:
                for part in parts:
                    self._socket.sendall(part)
            except OSError as error:
                self.end(_text(error))
            with self._order:
                self._num_queued -= 1
            if transfer is not None:
                reason = self.end_reason
                transfer.end(None if reason is None else self._lost(self.host, reason))

    # --- receiving --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        header = bytearray(_HEADER.size)
        try:
            while True:
                self._fill(memoryview(header))
                tag, length = _HEADER.unpack(header)
                if tag == _FAREWELL:
                    word = bytearray(1)
                    self._fill(memoryview(word))
                    self.farewell = Farewell(bytes(word))
                elif tag != _BEAT:
                    self._take(tag, length)
        except (OSError, ValueError) as error:
            self.end(_text(error))
        self._socket.close()

    def _fill(self, view: memoryview) -> None:
        """Read as many bytes as there is room for. Raises: OSError when the connection ends."""
        at = 0
        while at < len(view):
            size = self._socket.recv_into(view[at : at + _PIECE], flags=socket.MSG_WAITALL)
            if not size:
                raise ConnectionError("it was closed")
            self._has_come = True
            at += size

    def _take(self, tag: int, length: int) -> None:
        """Read a frame to where it is waited for, or keep it until it is."""
        changed = self._of_all.changed
        with changed:
            while (transfer := self._waiting(tag)) is None and self._num_kept + length > _MOST_KEPT:
                if self.end_reason is not None:
                    raise ConnectionError(self.end_reason)
                changed.wait()
        if transfer is None:
            frame = bytearray(length)
            self._fill(memoryview(frame))
            with changed:
                transfer = self._waiting(tag)  # it may have been asked for since
                if transfer is None:
                    self.kept[tag].append(frame)
                    self._num_kept += length
            if transfer is not None:
                self.give(frame, transfer)
            return
        try:
            if len(transfer.view) != length:
                raise ConnectionError(f"it sends {length} bytes where {len(transfer.view)} are expected")
            self._fill(transfer.view)
        except OSError as error:
            transfer.end(self._lost(self.host, _text(error)))
            raise
        transfer.source = self.host
        transfer.end()

    def take_kept(self, tag: int) -> bytearray | None:
        """Return the first frame of a tag that was kept. The caller has the carrier's lock."""
        if not self.kept[tag]:
            return None
        frame = self.kept[tag].popleft()
        self._num_kept -= len(frame)
        return frame

    def give(self, frame: bytearray, transfer: Transfer) -> None:
        """End a wait with a frame that was kept."""
        transfer.source = self.host
        if len(frame) == len(transfer.view):
            transfer.view[:] = frame
            transfer.end()
        else:
            reason = f"it sends {len(frame)} bytes where {len(transfer.view)} are expected"
            transfer.end(self._lost(self.host, reason))

    def _waiting(self, tag: int) -> Transfer | None:
        """Return who waits for the next frame of a tag: for one of this host, or of any. The caller has the lock."""
        for waiting in (self.posted[tag], self._of_all.of_any[tag]):
            if waiting:
                return waiting.popleft()
        return None

    # --- its end ----------------------------------------------------------------------------------------------------

    def look(self, seconds: float, silence: float, patience: float) -> None:
        """End it when the other machine is silent for `silence` seconds, or the other process for `patience`.

        See [Note: silence]. `seconds` have passed since the last look.
        """
        self._silent = 0.0 if self._has_come else self._silent + seconds
        self._has_come = False
        if self.end_reason is not None:
            return
        if self._silent >= patience:
            self.end(f"nothing came from it for {self._silent:.1f} s")
        elif self._silent >= silence and (unconfirmed := self._seconds_unconfirmed()) >= silence:
            self.end(f"its machine has not answered for {unconfirmed:.1f} s")

    def _seconds_unconfirmed(self) -> float:
        """Return for how long what was sent has not been confirmed by the other kernel; 0 where that is not known."""
        info = b""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return 0.0
        probes, unacknowledged, since = _TCP_INFO.unpack(info)
        # A process that reads nothing lets its window close: then its kernel is asked at growing intervals.
        is_asked = unacknowledged > 0 or probes >= _UNANSWERED
        return since / 1000 if is_asked else 0.0

    def end(self, reason: str) -> None:
        """Close it, and let go whoever waits for it."""
        with self._of_all.changed:
            if self.end_reason is not None:
                return
            self.end_reason = reason
            waiting = [transfer for of_tag in self.posted.values() for transfer in of_tag]
            self.posted.clear()
            waiting += self._of_all.given_up()
            self._of_all.changed.notify_all()
        with self._order:  # nothing is queued behind the last
            self._queue.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for transfer in waiting:
            transfer.end(self._lost(self.host, reason))

    def join(self, seconds: float) -> None:
        """Return when nothing of what was sent is written to any tensor any more, after it was ended."""
        for thread in self._threads:
            thread.join(seconds)

    def has_arrived(self) -> bool:
        """Return whether all that was sent has come to the other machine."""
        if self.end_reason is not None:
            return True
        unsent = bytearray(4)
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, unsent)
        return not self._num_queued and not int.from_bytes(unsent, "little")

    def close_in_child(self) -> None:
        """Let go of the descriptor in a process that was forked: else the connection would outlive its owner."""
        self._socket.close()


_OPEN: weakref.WeakSet[Connection] = weakref.WeakSet()


def _close_in_child() -> None:
    for connection in list(_OPEN):
        connection.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


def _text(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _without_first(parts: list[memoryview], size: int) -> list[memoryview]:
    """Return what is left of `parts` after their first `size` bytes."""
    rest = []
    for part in parts:
        if size >= len(part):
            size -= len(part)
        else:
            rest.append(part[size:])
            size = 0
    return rest
