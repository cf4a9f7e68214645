"""Between hosts: what each has of a step becomes the sum over all, on every host or on the owner of the bucket.

Partial sums travel in turns, beside backward (`turns`); here are the messages around them: records and buffers, norms,
new weights from the owners of buckets that are shared out, and whatever is gathered or spread between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lightwork.engine.backward.outbox import Outbox
from lightwork.engine.backward.slots import Slots
from lightwork.engine.exchange.turns import NEXT_TAG, Held, Turns
from lightwork.spec.holdings import Holdings
from lightwork.state.buffers import Buffers
from lightwork.team.ledger import Ledger
from lightwork.transport.base import Carrier, Pending

_SHARED, _FROM_FIRST = NEXT_TAG, NEXT_TAG + 1

#: Bytes of a message of a broadcast.
_CHUNK_BYTES = 64 * 1024 * 1024


class Exchange:
    """What a worker does about other hosts. Here: nothing, as there are none, or another worker speaks to them."""

    #: Where buckets that are complete go while backward runs.
    outbox: Outbox | None = None
    #: What of a step the trace tells beside what every worker does.
    phases: tuple[str, ...] = ()
    #: Seconds for which partial sums travelled in this step, waits for backward left out.
    busy_seconds = 0.0

    def begin_sums(self, held: Held) -> None:
        """Begin to exchange the partial sums of a step, each bucket as soon as `outbox` says that it is complete."""
        raise ValueError("this worker does not speak to other hosts")

    def sum_up(self, held: Callable[[], Held]) -> None:
        """Return once the sum over all hosts lies in the leader's last slot; begin with `held()` if nobody did."""
        raise ValueError("this worker does not speak to other hosts")

    def records(self, step: int, num_micro_batches: int) -> None:
        """Write what the other hosts' micro-batches came to onto this host's board, and theirs in return."""

    def norms(self) -> None:
        """Give the squared norms of this host's buckets to all, and write theirs on the board."""

    def share(self, buckets: Iterable[int], tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send the tensors of each bucket from its owner to all, into the same places.

        `tensors_of` returns the tensors of a bucket, contiguous, in the shared memory.
        """

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Return every host's payload."""
        return [payload]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the first host's contents of these tensors into every other host's, one after the other."""

    def close(self) -> None:
        """End what runs beside the worker."""


class BetweenHosts(Exchange):
    """The leader's side, where there are several hosts.

    Owns: a thread, in which partial sums travel, until `close`.
    """

    phases = ("exchange", "exchange behind backward")

    def __init__(self, holdings: Holdings, carrier: Carrier, ledger: Ledger, slots: Slots, buffers: Buffers) -> None:
        self._holdings = holdings
        self._carrier = carrier
        self._host = carrier.host
        self._others = carrier.others
        self._ledger = ledger
        self._buffers = buffers
        self._turns = Turns(holdings, carrier, slots)
        self.outbox = self._turns.outbox

    @property
    def busy_seconds(self) -> float:  # type: ignore[override]
        """Of the turns."""
        return self._turns.busy_seconds

    def begin_sums(self, held: Held) -> None:
        """Let turns begin."""
        self._turns.begin(held)

    def sum_up(self, held: Callable[[], Held]) -> None:
        """Wait for the turns.

        Raises: RankLost.
        """
        if not self._turns.are_going:
            self._turns.outbox.expect(())
            self._turns.begin(held())
        self._turns.wait_for_total()

    def records(self, step: int, num_micro_batches: int) -> None:
        """Exchange records, metrics, which parameters were touched, and what forward left in the buffers.

        Raises: Disagreement when another host is elsewhere or has other settings; RankLost.
        """
        roster = self._holdings.roster
        own = roster.micro_batches(self._host, num_micro_batches)
        share = self._ledger.share_of_step(step, num_micro_batches)
        payload = len(share).to_bytes(8, "little") + share + self._buffers.changes(own)
        for host, received in enumerate(self._carrier.exchange(f"step {step}", payload)):
            if host == self._host:
                continue
            end = 8 + int.from_bytes(received[:8], "little")
            self._ledger.take_share(step, num_micro_batches, host, received[8:end])
            self._buffers.take_changes(roster.micro_batches(host, num_micro_batches), received[end:])

    def norms(self) -> None:
        """Exchange the norms; a barrier, too."""
        own = torch.tensor(self._ledger.norms_squared(), dtype=torch.float64).numpy().tobytes()
        for host, received in enumerate(self._carrier.exchange("norms", own)):
            if host != self._host:
                self._ledger.take_norms(host, torch.frombuffer(bytearray(received), dtype=torch.float64).tolist())

    def share(self, buckets: Iterable[int], tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send and receive them all at once."""
        on_the_way: list[Pending] = []
        for bucket in buckets:
            owner = self._holdings.rows[bucket].owner
            for tensor in tensors_of(bucket):
                if owner == self._host:
                    on_the_way += [self._carrier.send(host, tensor, _SHARED) for host in self._others]
                else:
                    on_the_way.append(self._carrier.receive(owner, tensor, _SHARED))
        for pending in on_the_way:
            pending.wait()

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Exchange the payloads."""
        return self._carrier.exchange(what, payload)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send the tensors in chunks."""
        for tensor in tensors:
            for chunk in torch.split(tensor.view(-1).view(torch.uint8), _CHUNK_BYTES):
                if self._host == 0:
                    on_the_way = [self._carrier.send(host, chunk, _FROM_FIRST) for host in self._others]
                else:
                    on_the_way = [self._carrier.receive(0, chunk, _FROM_FIRST)]
                for pending in on_the_way:
                    pending.wait()

    def close(self) -> None:
        """End the thread."""
        self._turns.close()
