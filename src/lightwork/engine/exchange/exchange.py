"""Between hosts: what each has of a step becomes the sum over all, on every host or on the owner of the bucket.

Partial sums travel in turns, beside backward (`turns`); here are the messages around them: records and buffers, norms,
new weights from the owners of buckets that are shared out, and whatever is gathered or spread between steps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator

import torch

from lightwork.engine.backward.outbox import Outbox
from lightwork.engine.backward.slots import Slots
from lightwork.engine.exchange.turns import NEXT_TAG, Held, Turns
from lightwork.errors import Disagreement, RankLost
from lightwork.spec.holdings import Holdings
from lightwork.spec.tree import Node
from lightwork.state.buffers import Buffers
from lightwork.state.hashes import StateHashes
from lightwork.team.board import Board
from lightwork.team.hosts import Collective, Hosts
from lightwork.transport.base import Pending

_SHARED, _FROM_FIRST = NEXT_TAG, NEXT_TAG + 1

_HEAD = struct.Struct("<QQQ")  # a hash of the state, bytes of the ledger's share and of parts

#: Bytes of a message of a broadcast.
_CHUNK_BYTES = 64 * 1024 * 1024


class Exchange:
    """What a worker does about other hosts. Here: nothing, as there are none, or another worker speaks to them."""

    #: Where buckets that are complete go while backward runs.
    outbox: Outbox | None = None
    #: What of a step the trace tells beside what every worker does.
    phases: tuple[str, ...] = ()
    #: What `sum_up` has brought beside the sums, of all hosts; None where it brings nothing.
    parts: list[bytes] | None = None
    #: Seconds for which partial sums travelled in this step, waits for backward left out.
    busy_seconds = 0.0

    def begin_sums(self, held: Held) -> None:
        """Begin to exchange the partial sums of a step, each bucket as soon as `outbox` says that it is complete."""
        raise ValueError("this worker does not speak to other hosts")

    def sum_up(self, step: int, num_micro_batches: int, held: Callable[[], Held], parts: bytes) -> bool:
        """Make what each host has of a step that of all.

        When it returns True, the board has what all micro-batches came to, and the leader's last slot the sum over all
        hosts. False: a host was lost, and the step is to be begun again by those who are left.

        Args:
            held: returns what this host holds, where `begin_sums` was not called.
            parts: what this worker gives to the others, where each host has one.
        """
        raise ValueError("this worker does not speak to other hosts")

    def norms(self) -> None:
        """Give the squared norms of this host's buckets to all, and write theirs on the board."""

    def share(self, buckets: Iterable[int], tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send the tensors of each bucket from its owner to all, into the same places.

        `tensors_of` returns the tensors of a bucket, contiguous, in the shared memory.
        """

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Return every host's payload."""
        return [payload]

    def broadcast(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Write the first host's contents of these tensors into every other host's, one after the other."""

    def close(self) -> None:
        """End what runs beside the worker."""


class BetweenHosts(Exchange):
    """The leader's side, where there are several hosts.

    Owns: a thread, in which partial sums travel, until `close`.
    """

    phases = ("exchange", "exchange behind backward")

    def __init__(
        self, holdings: Holdings, hosts: Hosts, board: Board, slots: Slots, buffers: Buffers, hashes: StateHashes
    ) -> None:
        self._holdings = holdings
        self._hosts = hosts
        self._carrier = hosts.carrier
        self._host = hosts.carrier.host
        self._board = board
        self._ledger = board.ledger
        self._slots = slots
        self._buffers = buffers
        self._hashes = hashes
        self._turns = self._new_turns()

    def _new_turns(self) -> Turns:
        return Turns(self._holdings, self._carrier, self._slots, lambda: self._board.roster)

    @property
    def outbox(self) -> Outbox:  # type: ignore[override]
        """Of the turns."""
        return self._turns.outbox

    @property
    def busy_seconds(self) -> float:  # type: ignore[override]
        """Of the turns."""
        return self._turns.busy_seconds

    def begin_sums(self, held: Held) -> None:
        """Let turns begin."""
        self._turns.begin(held)

    def sum_up(self, step: int, num_micro_batches: int, held: Callable[[], Held], parts: bytes) -> bool:
        """Exchange records, and wait for the turns.

        Raises: Disagreement when another host is elsewhere, has other settings or another copy; RankLost.
        """
        whole = Node(0, num_micro_batches)

        def run() -> list[bytes | None]:
            # Before records: a host whose backward waits for room in its outbox can not exchange these yet.
            if not self._turns.are_going:
                self._turns.outbox.expect(())
                self._turns.begin(held())
            records = self._records(step, num_micro_batches, parts)
            self._take_records(step, num_micro_batches, records)
            self._turns.wait_for_total()
            return records

        def give(host: int, records: list[bytes | None]) -> None:
            self._hosts.give(host, records)
            self._turns.give_total(host, whole)

        def take(host: int) -> list[bytes | None]:
            self._abandon_turns()
            records = self._hosts.take(host)
            self._take_records(step, num_micro_batches, records)
            self._turns.take_total(host, whole)
            return records

        if self._hosts.go_through(Collective(run=run, give=give, take=take), step) is None:
            self._abandon_turns()
            return False
        return True

    def _abandon_turns(self) -> None:
        self._turns.abandon()
        self._turns = self._new_turns()

    def _records(self, step: int, num_micro_batches: int, parts: bytes) -> list[bytes | None]:
        """Exchange records, metrics, which parameters were touched, and what forward left in the buffers.

        And a hash of what the step before has written: all hosts have a copy of it.
        """
        own = self._board.roster.micro_batches(self._host, num_micro_batches)
        share = self._ledger.share_of_step(step, num_micro_batches)
        head = _HEAD.pack(self._hashes.before(step) or 0, len(share), len(parts))
        return self._carrier.exchange(f"step {step}", head + share + parts + self._buffers.changes(own))

    def _take_records(self, step: int, num_micro_batches: int, records: list[bytes | None]) -> None:
        """Write what the other hosts' micro-batches came to onto this host's board."""
        of_hosts = {host: record for host, record in enumerate(records) if record is not None}
        if len({_HEAD.unpack_from(record)[0] for record in of_hosts.values()}) > 1:
            raise self._other_copies(step - 1)
        parts: list[bytes] = []
        for host, record in of_hosts.items():
            _, of_share, of_parts = _HEAD.unpack_from(record)
            end = _HEAD.size + of_share
            parts.append(record[end : end + of_parts])
            if host != self._host:
                self._ledger.take_share(step, num_micro_batches, host, record[_HEAD.size : end])
                own = self._board.roster.micro_batches(host, num_micro_batches)
                self._buffers.take_changes(own, record[end + of_parts :])
        self.parts = parts if max(self._holdings.roster.sizes) == 1 else None

    def _other_copies(self, step: int) -> Disagreement:
        """Return the error of copies that differ after `step`, with the first bucket that does. Every host calls it."""
        own = self._hashes.of_buckets()
        received = self._carrier.exchange("hashes of state", json.dumps(list(own.values())).encode())
        leaders = [rank for rank, there in zip(self._carrier.leaders, received, strict=True) if there is not None]
        by_bucket = zip(own, zip(*(json.loads(one) for one in received if one is not None), strict=True), strict=True)
        bucket, values = next((bucket, values) for bucket, values in by_bucket if len(set(values)) > 1)
        layout = self._holdings.layout
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
            if host != self._host and received is not None:
                self._ledger.take_norms(host, torch.frombuffer(bytearray(received), dtype=torch.float64).tolist())

    def share(self, buckets: Iterable[int], tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send and receive them all at once."""
        on_the_way: list[Pending] = []
        for bucket in buckets:
            owner = self._holdings.rows[bucket].owner
            for tensor in tensors_of(bucket):
                if owner == self._host:
                    on_the_way += [self._carrier.send(host, tensor, _SHARED) for host in self._carrier.others]
                else:
                    on_the_way.append(self._carrier.receive(owner, tensor, _SHARED))
        for pending in on_the_way:
            pending.wait()

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Exchange the payloads."""
        return [received or b"" for received in self._carrier.exchange(what, payload)]

    def broadcast(self, tensors: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Send the tensors in chunks.

        Raises: RankLost, too, when the first host is lost over it: nobody has all of what it sends.
        """
        first = min([self._host, *self._carrier.others])

        def run() -> bool:
            if self._host != first:
                take(first)
            else:
                for chunk in _chunks(tensors()):
                    for pending in [self._carrier.send(host, chunk, _FROM_FIRST) for host in self._carrier.others]:
                        pending.wait()
            self._carrier.exchange("broadcast", b"")  # a barrier: [Note: a host is lost]
            return True

        def give(host: int, _: bool) -> None:
            for chunk in _chunks(tensors()):
                self._carrier.send(host, chunk, _FROM_FIRST).wait()

        def take(host: int) -> bool:
            for chunk in _chunks(tensors()):
                self._carrier.receive(host, chunk, _FROM_FIRST).wait()
            return True

        while self._hosts.go_through(Collective(run=run, give=give, take=take)) is None:
            there = {self._host, *self._carrier.others}
            if first not in there:
                rank = self._carrier.leaders[first]
                raise RankLost(
                    f"rank {rank} was lost while it sent its weights to the others, of which none has all. Start "
                    "again, to go on from the last checkpoint.",
                    rank,
                )

    def close(self) -> None:
        """End the thread."""
        self._turns.close()


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Return the bytes of tensors as they are broadcast."""
    for tensor in tensors:
        yield from torch.split(tensor.view(-1).view(torch.uint8), _CHUNK_BYTES)
