"""The transport between workers of one host: mailboxes in their shared memory.

Each worker has two boxes, used in turn: a worker that is a whole exchange ahead may write its next box, but can not be
two ahead, because the exchange between needs everyone. A payload longer than a box goes in several rounds.

The number of the exchange is the last word that is written of a box, at once: it is there with all that it announces,
or not at all. What a worker that died has posted stays, so that everyone finds the same of it, however late.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import final

from lightwork.errors import Disagreement
from lightwork.transport.base import Transport, Watch
from lightwork.transport.signal import Signal

#: Bytes of a payload that fit into one box.
BOX_BYTES = 256 * 1024

_WHAT_BYTES = 48
_WORD = 8
_HEADER = struct.Struct(f"<{_WHAT_BYTES}sq")  # what, bytes of the whole payload; before it the number of the exchange
_PAYLOAD_AT = _WORD + _HEADER.size
_STRIDE = _PAYLOAD_AT + BOX_BYTES

#: Seconds between two calls of the watch.
WATCH_SECONDS = 0.05


@final
class HostTransport(Transport):
    """Mailboxes in `region`, which all workers of the host map. Workers are counted by their places on the host."""

    def __init__(
        self,
        local_rank: int,
        names: Sequence[int],
        region: memoryview,
        lock: AbstractContextManager[bool | None],
        signal: Signal,
        is_expected: Callable[[int, int], bool] = lambda local_rank, exchange: True,
    ) -> None:
        """Take part in the exchanges of a host's workers.

        Args:
            names: their ranks in the whole team, for messages.
            is_expected: says of a worker whether an exchange, by its number, waits for it.
        """
        self._local_rank = local_rank
        self._names = names
        self._locals = range(len(names))
        self._region = region
        self._lock = lock
        self._signal = signal
        self._is_expected = is_expected
        self._counts = region[: len(region) // _WORD * _WORD].cast("q")
        self.count = 0  #: the exchanges so far

    @staticmethod
    def num_bytes(num_workers: int) -> int:
        """Return the bytes of the region that `num_workers` workers need."""
        return num_workers * 2 * _STRIDE

    def exchange(self, what: str, payload: bytes, watch: Watch) -> list[bytes | None]:
        """Write to the own box, wait for the others', read them; again while any payload is not complete."""
        what = what.encode()[:_WHAT_BYTES].decode(errors="ignore")
        received = dict.fromkeys(self._locals, b"")
        lengths = dict.fromkeys(self._locals, 1)
        start = 0
        while any(len(received[local]) < lengths[local] for local in received):
            self._post(what, payload[start : start + BOX_BYTES], len(payload))
            start += BOX_BYTES
            self._wait_for_all(watch)
            for local in list(received):
                if self.posted(local) is None:  # it died, maybe with a part of its payload left to send
                    del received[local]
                    continue
                self._check(local, what)
                lengths[local], chunk = self._read(local, len(received[local]))
                received[local] += chunk
        return [received.get(local) for local in self._locals]

    def posted(self, local_rank: int) -> str | None:
        """Return what a worker has posted in the exchange that this worker is in, None if it has not come yet."""
        at = self._box(local_rank)
        if self._counts[at // _WORD] != self.count:
            return None
        what, _ = _HEADER.unpack_from(self._region, at + _WORD)
        return bytes(what).rstrip(b"\0").decode()

    def missing(self) -> list[int]:
        """Return the workers for which the exchange that this worker is in waits."""
        late = (local for local in self._locals if self.posted(local) is None)
        return [local for local in late if self._is_expected(local, self.count)]

    def is_ahead(self, local_rank: int) -> bool:
        """Return whether a worker has entered an exchange that this worker has not."""
        return max(self._counts[self._box_at(local_rank, box) // _WORD] for box in range(2)) > self.count

    def posted_last(self, local_rank: int) -> str:
        """Return the last exchange that a worker has posted."""
        at = max((self._box_at(local_rank, box) for box in range(2)), key=lambda at: self._counts[at // _WORD])
        what, _ = _HEADER.unpack_from(self._region, at + _WORD)
        return bytes(what).rstrip(b"\0").decode()

    def _box(self, local_rank: int) -> int:
        return self._box_at(local_rank, self.count % 2)

    @staticmethod
    def _box_at(local_rank: int, box: int) -> int:
        return (local_rank * 2 + box) * _STRIDE

    def _post(self, what: str, chunk: bytes, length: int) -> None:
        self.count += 1
        at = self._box(self._local_rank)
        self._region[at + _PAYLOAD_AT : at + _PAYLOAD_AT + len(chunk)] = chunk
        _HEADER.pack_into(self._region, at + _WORD, what.encode(), length)
        with self._lock:
            self._counts[at // _WORD] = self.count
            self._signal.notify()

    def _wait_for_all(self, watch: Watch) -> None:
        while True:
            with self._lock:
                seen = self._signal.value
                missing = self.missing()
            if not missing:
                return
            if not self._signal.wait_for_change(seen, WATCH_SECONDS):
                reason = watch()
                if reason is not None:
                    raise reason

    def _check(self, local_rank: int, what: str) -> None:
        theirs = self.posted(local_rank)
        if theirs != what:
            raise Disagreement(
                f"rank {self._names[self._local_rank]} calls {what} while rank {self._names[local_rank]} calls "
                f"{theirs}. Every worker must make the same calls in the same order: take them out of conditions such "
                "as `if run.is_main`."
            )

    def _read(self, local_rank: int, received: int) -> tuple[int, bytes]:
        at = self._box(local_rank)
        _, length = _HEADER.unpack_from(self._region, at + _WORD)
        size = min(BOX_BYTES, length - received)
        return length, bytes(self._region[at + _PAYLOAD_AT : at + _PAYLOAD_AT + size])
