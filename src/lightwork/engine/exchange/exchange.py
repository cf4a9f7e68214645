"""Between hosts: what each has of a step becomes the sum over all, on every host or on the owner of the bucket.

Partial sums travel in turns, beside backward (`turns`); here are the messages around them: records and buffers, norms,
new weights from the owners of buckets that are shared out, and whatever is gathered or spread between steps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable

import torch

from lightwork.engine.backward.outbox import Outbox
from lightwork.engine.backward.slots import Slots
from lightwork.engine.exchange.turns import NEXT_TAG, Held, Turns
from lightwork.errors import Disagreement
from lightwork.spec.holdings import Holdings
from lightwork.state.buffers import Buffers
from lightwork.state.hashes import StateHashes
from lightwork.team.ledger import Ledger
from lightwork.transport.base import Carrier, Pending

_SHARED, _FROM_FIRST = NEXT_TAG, NEXT_TAG + 1

_HEAD = struct.Struct("<QQ")  # a hash of the state, bytes of the ledger's share

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

    def __init__(
        self,
        holdings: Holdings,
        carrier: Carrier,
        ledger: Ledger,
        slots: Slots,
        buffers: Buffers,
        hashes: StateHashes,
    ) -> None:
        self._holdings = holdings
        self._carrier = carrier
        self._host = carrier.host
        self._others = carrier.others
        self._ledger = ledger
        self._buffers = buffers
        self._hashes = hashes
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

        And hashes of what the step before has written: all hosts have a copy of it.

        Raises: Disagreement when another host is elsewhere, has other settings or another copy; RankLost.
        """
        roster = self._holdings.roster
        own = roster.micro_batches(self._host, num_micro_batches)
        share = self._ledger.share_of_step(step, num_micro_batches)
        head = _HEAD.pack(self._hashes.before(step) or 0, len(share))
        all_received = self._carrier.exchange(f"step {step}", head + share + self._buffers.changes(own))
        if len({_HEAD.unpack_from(received)[0] for received in all_received}) > 1:
            raise self._other_copies(step - 1)
        for host, received in enumerate(all_received):
            if host == self._host:
                continue
            end = _HEAD.size + _HEAD.unpack_from(received)[1]
            self._ledger.take_share(step, num_micro_batches, host, received[_HEAD.size : end])
            self._buffers.take_changes(roster.micro_batches(host, num_micro_batches), received[end:])

    def _other_copies(self, step: int) -> Disagreement:
        """Return the error of copies that differ after `step`, with the first bucket that does. Every host calls it."""
        own = self._hashes.of_buckets()
        received = self._carrier.exchange("hashes of state", json.dumps(list(own.values())).encode())
        by_bucket = zip(own, zip(*map(json.loads, received), strict=True), strict=True)
        bucket, values = next((bucket, values) for bucket, values in by_bucket if len(set(values)) > 1)
        layout, leaders = self._holdings.layout, self._carrier.leaders
        names = dict.fromkeys(layout.parameters[block.parameter].name for block in layout.blocks_of(bucket))
        most = max(values, key=values.count)
        others = [rank for rank, value in zip(leaders, values, strict=True) if value != most]
        where = f"rank {others[0]}" if values.count(most) > 1 else f"rank {leaders[0]} than on rank {others[0]}"
        return Disagreement(
            f"the copies of the model differ: after step {step} {', '.join(list(names)[:3])}, or what the optimizer "
            f"keeps of it, has other bits on {where}. Memory or a processor fails, or an operation is not "
            "deterministic (lightwork check finds it). Start again, to go on from the last checkpoint."
        )

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
