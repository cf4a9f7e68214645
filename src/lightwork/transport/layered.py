"""Small messages between all workers of several hosts: mailboxes within a host, its leader's carrier between them."""

from __future__ import annotations

import json
from typing import final

from lightwork.transport.base import Carrier, Transport, Watch


@final
class LayeredTransport(Transport):
    """A transport within a host of `num_workers`, joined to the other hosts' by the leader's `carrier`."""

    def __init__(self, local: Transport, num_workers: int, carrier: Carrier) -> None:
        self._local = local
        self._num_workers = num_workers
        self._carrier = carrier

    def exchange(self, what: str, payload: bytes, watch: Watch) -> list[bytes | None]:
        """Gather on each host, exchange between the leaders, and pass on what came: three barriers."""
        own = _of_all(self._local.exchange(what, payload, watch))
        everything = _pack(self._carrier.exchange(what, _pack(own)))
        if self._num_workers > 1:
            everything = _of_all(self._local.exchange(what, everything, watch))[0]
        return [payload for of_host in _unpack(everything) for payload in _unpack(of_host)]


def _of_all(payloads: list[bytes | None]) -> list[bytes]:
    """Return the payloads of a host none of whose workers may be missing."""
    return [payload for payload in payloads if payload is not None]


def _pack(payloads: list[bytes]) -> bytes:
    lengths = json.dumps([len(payload) for payload in payloads]).encode()
    return b"".join((len(lengths).to_bytes(8, "little"), lengths, *payloads))


def _unpack(packed: bytes) -> list[bytes]:
    at = 8 + int.from_bytes(packed[:8], "little")
    payloads = []
    for length in json.loads(packed[8:at]):
        payloads.append(packed[at : at + length])
        at += length
    return payloads
