"""Small messages between all workers of several hosts: mailboxes within a host, its leader's carrier between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import final

from lightwork.transport.base import Transport, Watch


@final
class LayeredTransport(Transport):
    """A transport within a host, joined to the other hosts' by `exchange_between`, which the leader calls."""

    def __init__(
        self, local: Transport, host: int, sizes: Sequence[int], between: Callable[[str, bytes], list[bytes | None]]
    ) -> None:
        """Take part on `host`.

        Args:
            sizes: of each host, how many workers it has.
            between: returns what each host's leader has given to it; None of a host that was lost.
        """
        self._local = local
        self._host = host
        self._sizes = sizes
        self._between = between

    def exchange(self, what: str, payload: bytes, watch: Watch) -> list[bytes | None]:
        """Gather on each host, exchange between the leaders, and pass on what came: three barriers."""
        own = packed_list(self._local.exchange(what, payload, watch))
        everything = packed_list(self._between(what, own))
        if self._sizes[self._host] > 1:
            of_leader = self._local.exchange(what, everything, watch)[0]
            everything = everything if of_leader is None else of_leader
        received: list[bytes | None] = []
        for size, of_host in zip(self._sizes, unpacked_list(everything), strict=True):
            received += [None] * size if of_host is None else unpacked_list(of_host)
        return received


def packed_list(payloads: Sequence[bytes | None]) -> bytes:
    """Return payloads in one, with those that are missing."""
    lengths = json.dumps([None if payload is None else len(payload) for payload in payloads]).encode()
    return b"".join((len(lengths).to_bytes(8, "little"), lengths, *(payload or b"" for payload in payloads)))


def unpacked_list(packed: bytes) -> list[bytes | None]:
    """Return what `packed_list` has put together."""
    at = 8 + int.from_bytes(packed[:8], "little")
    payloads: list[bytes | None] = []
    for length in json.loads(packed[8:at]):
        payloads.append(None if length is None else packed[at : at + length])
        at += length or 0
    return payloads
