"""What other hosts own of the trained state: brought here for a while, and given back.

Where it is shared out, a bucket's masters and optimizer state lie with its owner alone (and its weights, under zero3).
To be read or written by name, they come to every host piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from lightwork.spec.holdings import Holdings
from lightwork.state.items import Piece
from lightwork.state.moments import Moments
from lightwork.state.weights import Weights


class Between(Protocol):
    """What moves bytes between the leaders of hosts."""

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Return every host's payload."""

    def share(self, buckets: Iterable[int], tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send tensors of each of these buckets from its owner to all, into the same places."""


class Shards:
    """Brings what other hosts own. Its methods are called by every host's leader, in the same order."""

    def __init__(self, holdings: Holdings, weights: Weights, moments: Moments, between: Between) -> None:
        self._rows = holdings.rows
        self._weights = weights
        self._layout = weights.layout
        self._moments = moments
        self._between = between
        self._shared_out = frozenset(row.bucket for row in self._rows if row.is_shared_out)

    @property
    def are_there(self) -> bool:
        """Whether anything is shared out."""
        return bool(self._shared_out)

    def tell_what_is_made(self) -> None:
        """Let every host know which state there is."""
        if not self.are_there:
            return
        moments = self._moments
        buckets = sorted(self._shared_out)
        blocks = {bucket: self._layout.block_indices(bucket) for bucket in buckets}
        received = self._between.exchange_bytes("state", b"".join(moments.flags(blocks[b]) for b in buckets))
        at = 0
        for bucket in buckets:
            end = at + len(moments.flags(blocks[bucket]))
            moments.set_flags(blocks[bucket], received[self._rows[bucket].owner][at:end])
            at = end

    def bring_window(self, pieces: Iterable[Piece]) -> None:
        """Bring these pieces to every host, until their buckets are released."""
        of_bucket: dict[int, list[torch.Tensor]] = {}
        for item, start, end in pieces:
            for bucket, tensor in item.owned(start, end):
                if bucket in self._shared_out:
                    of_bucket.setdefault(bucket, []).append(tensor)
        self._between.share(sorted(of_bucket), of_bucket.__getitem__)

    def release_window(self, buckets: Iterable[int]) -> None:
        """Of these buckets, give back the memory of those that other hosts own."""
        for bucket in buckets:
            if not self._rows[bucket].is_own:
                self._weights.release_home(bucket)
                self._moments.release_home(bucket)

    def release_all(self) -> None:
        """Give back the memory of all that other hosts own."""
        self.release_window(range(len(self._rows)))
