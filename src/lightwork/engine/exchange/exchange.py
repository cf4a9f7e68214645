"""Between hosts: what each has of a step becomes the sum over all, on every host or on the owner of the bucket.

Data travels bucket by bucket, in turns: in each turn every host owns one bucket. It receives the others' partial sums
of it, adds them up with its own in the fixed tree, and sends the sum to all. While the leaders wait for one turn's
tensors, those of the next are on their way. All this happens in a thread beside backward of the last micro-batch: the
last buckets come first, and a bucket leaves as soon as backward has completed it (`outbox`). Which of its blocks
hold anything travels with it, because no host knows by then which parameters the others' micro-batches touch.

    own partial sums --> nodes of the tree over the host's micro-batches --> owner of the bucket: sum --> every host

With sharded state (ZeRO-1) the sum stays with the owner, whose host alone holds the masters and the optimizer's state
of the bucket. It updates the bucket and sends the new working weights to all. With sharded gradients (ZeRO-2) a partial
sum's memory is given back as soon as it has left or is added up.

A gradient of a single micro-batch travels in the type of the working weight, a sum in the wire format.

Moves, a step and host, with H hosts of one node each: (H - 1) / H of the gradients' bytes to the owners and as much of
the sums from them, in and out: a ring all-reduce's traffic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lightwork.device.base import Device, Mark
from lightwork.engine.backward.gradients import Slots
from lightwork.engine.backward.outbox import Message, make_outbox, message_of
from lightwork.engine.exchange.background import Background
from lightwork.engine.exchange.sums import Adder
from lightwork.spec.hosts import Hosts
from lightwork.spec.layout import Layout, Span
from lightwork.spec.tree import Node, Sum, sum_of, without_absent
from lightwork.state.buffers import Buffers
from lightwork.team.board import Board
from lightwork.transport.base import FIRST_TAG, Carrier, Pending

_SUMS, _TOTALS, _SHARED, _PRESENCE = range(FIRST_TAG, FIRST_TAG + 4)

#: Turns that are on their way at once: one begins, one is added up, and of one the sums arrive.
TURNS_AT_ONCE = 3

#: A byte for each parameter: whether a micro-batch gave it a gradient.
Touched = memoryview | bytearray

#: Bytes of a message of a broadcast.
_CHUNK_BYTES = 64 * 1024 * 1024


class Total(NamedTuple):
    """Where the sum over all hosts lies: the leader's slot, and the node that it is."""

    slot: int
    node: Node


@dataclass
class _Held:
    """What this host holds of the step."""

    whole: Node
    places: Mapping[Node, tuple[int, int]]  #: rank of this host and slot, by node
    nodes: tuple[tuple[Node, ...], ...]  #: those that travel, by host
    touched: Mapping[int, Touched]  #: by micro-batch of this host
    in_outbox: Node | None  #: the node that lies in the outbox

    def has(self, node: Node, parameter: int) -> bool:
        """Return whether a node of this host holds a sum for `parameter`."""
        return any(self.touched[leaf][parameter] for leaf in range(node.first, node.end))


@dataclass
class _Turn:
    """A turn on its way."""

    buckets: dict[int, int]  #: by owner
    presence: list[tuple[int, torch.Tensor, Pending]] = field(default_factory=list)  #: by host, for the own bucket
    sums: list[tuple[Node, torch.Tensor, Pending]] = field(default_factory=list)  #: of the own bucket
    totals: list[tuple[int, torch.Tensor, Pending]] = field(default_factory=list)  #: of the others' buckets
    sent: list[Pending] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)  #: to be given back


class Exchange:
    """The leader's side of a step's exchange.

    Owns: a thread, in which partial sums travel, until `close`.
    """

    def __init__(
        self,
        hosts: Hosts,
        carrier: Carrier,
        board: Board,
        layout: Layout,
        slots: Slots,
        buffers: Buffers,
        *,
        into: int,
        sharded: bool,
        release_sent: bool,
        device: Device,
    ) -> None:
        """`into` is the leader's slot for the sums over all hosts.

        With `release_sent`, the memory of partial sums is given back as soon as they are sent or added up.
        """
        self._into = into
        self._sharded = sharded
        self._release_sent = release_sent
        self._hosts = hosts
        self._carrier = carrier
        self._host = carrier.host
        self._others = [host for host in range(len(hosts)) if host != self._host]
        self._board = board
        self._slots = slots
        self._buffers = buffers
        self._device = device
        self._adder = Adder(slots.wire, device.place)
        self._layout = layout
        sums = [slots.wire] * len(layout.parameters)
        self._sums = [message_of(layout, sums, slots.wire, bucket) for bucket in range(len(layout.buckets))]
        largest = max((message.num_bytes for message in self._sums), default=0)
        self.outbox = make_outbox(layout, slots.leaf_dtypes, slots.wire, room=largest, device=device)
        self._pool = self.outbox.pool
        self._thread: Background[Total] = Background("exchange")
        self._going: Future[Total] | None = None
        self._done: Mark = None  # where the thread's queue is at the end of an exchange
        self.busy_seconds = 0.0  #: of the thread in this step, waits for backward left out

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    def records(self, step: int, num_micro_batches: int) -> None:
        """Write what the other hosts' micro-batches came to onto this host's board, and theirs in return.

        Raises: Disagreement when another host is elsewhere or has other settings; RankLost.
        """
        own = self._hosts.micro_batches(self._host, num_micro_batches)
        share = self._board.share_of_step(step, num_micro_batches)
        payload = len(share).to_bytes(8, "little") + share + self._buffers.changes(own)
        for host, received in enumerate(self._carrier.exchange(f"step {step}", payload)):
            if host == self._host:
                continue
            end = 8 + int.from_bytes(received[:8], "little")
            self._board.take_share(step, num_micro_batches, host, received[8:end])
            self._buffers.take_changes(self._hosts.micro_batches(host, num_micro_batches), received[end:])

    @property
    def is_going(self) -> bool:
        """Whether the step's partial sums are on their way."""
        return self._going is not None

    def begin(
        self,
        num_micro_batches: int,
        places: Mapping[Node, tuple[int, int]],
        touched: Mapping[int, Touched],
        in_outbox: Node | None = None,
    ) -> None:
        """Begin to exchange the step's partial sums, each bucket as soon as `outbox` says that it is complete.

        Args:
            places: the rank (of this host) and slot of each partial sum that it holds; of that in the outbox too.
            touched: by micro-batch of this host, a byte for each parameter, true once its bucket is complete.
        """
        nodes = tuple(self._hosts.nodes(host, num_micro_batches) for host in range(len(self._hosts)))
        held = _Held(Node(0, num_micro_batches), places, nodes, touched, in_outbox)
        self.busy_seconds = 0.0
        before = self._device.mark()  # sums of earlier micro-batches
        self._going = self._thread.start(lambda: self._exchange(held, before))

    def partial_sums(self) -> Total:
        """Return where the sum over all hosts lies, once it does.

        Raises: RankLost.
        """
        if self._going is None:
            raise ValueError("begin() comes before partial_sums()")
        going, self._going = self._going, None
        total = going.result()
        self._device.wait(self._done)
        return total

    def _exchange(self, held: _Held, before: Mark) -> Total:
        try:
            with torch.no_grad(), self._device.queue("exchange"):
                self._device.wait(before)
                total = self._all_turns(held)
                self._done = self._device.mark()
                return total
        except BaseException:
            self.outbox.abandon()  # backward may be waiting for this thread
            raise

    def _all_turns(self, held: _Held) -> Total:
        start, self._waited = time.perf_counter(), 0.0
        count = len(self._layout.buckets)
        # Backward completes the last ones first.
        turns = [
            _Turn(
                {owner: bucket for owner, bucket in enumerate(range(first, first + len(self._hosts))) if bucket < count}
            )
            for first in reversed(range(0, count, len(self._hosts)))
        ]
        # One turn ahead: while a bucket is added up, the next is on its way.
        for position in range(len(turns) + 2):
            if position < len(turns):
                with self._carrier.together():
                    self._begin(held, turns[position])
            if 0 < position <= len(turns):
                self._add_up(held, turns[position - 1])
            if position > 1:
                self._end(held, turns[position - 2])
        self.busy_seconds = time.perf_counter() - start - self._waited
        return Total(self._into, held.whole)

    def norms(self) -> None:
        """Give the squared norms of this host's buckets to all, and write theirs on the board."""
        own = torch.tensor(self._board.norms_squared(), dtype=torch.float64).numpy().tobytes()
        for host, received in enumerate(self._carrier.exchange("norms", own)):
            if host != self._host:
                self._board.take_norms(host, torch.frombuffer(bytearray(received), dtype=torch.float64).tolist())

    def share(self, tensors_of: Callable[[int], Iterable[torch.Tensor]]) -> None:
        """Send the tensors of each bucket from its owner to all, into the same places.

        `tensors_of` returns the tensors of a bucket, contiguous, in the shared memory.
        """
        on_the_way: list[Pending] = []
        for bucket in range(len(self._sums)):
            owner = self._hosts.owner(bucket)
            for tensor in tensors_of(bucket):
                if owner == self._host:
                    on_the_way += [self._carrier.send(host, tensor, _SHARED) for host in self._others]
                else:
                    on_the_way.append(self._carrier.receive(owner, tensor, _SHARED))
        for pending in on_the_way:
            pending.wait()

    def exchange_bytes(self, what: str, payload: bytes) -> list[bytes]:
        """Return every host's payload."""
        return self._carrier.exchange(what, payload)

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the first host's contents of these tensors into every other host's, one after the other."""
        for tensor in tensors:
            for chunk in torch.split(tensor.view(-1).view(torch.uint8), _CHUNK_BYTES):
                if self._host == 0:
                    on_the_way = [self._carrier.send(host, chunk, _SUMS) for host in self._others]
                else:
                    on_the_way = [self._carrier.receive(0, chunk, _SUMS)]
                for pending in on_the_way:
                    pending.wait()

    # --- a turn -----------------------------------------------------------------------------------------------------

    def _begin(self, held: _Held, turn: _Turn) -> None:
        """Send this host's part of the others' buckets; await theirs of its own."""
        own = turn.buckets.get(self._host)
        if own is not None:
            for other in self._others:
                nodes = held.nodes[other]
                presence = torch.empty(len(nodes) * self._num_blocks(own), dtype=torch.uint8)
                if nodes:
                    turn.presence.append((other, presence, self._carrier.receive(other, presence, _PRESENCE)))
                for node in nodes:
                    buffer = self._take(turn)[: self._message(own, node).num_bytes]
                    turn.sums.append((node, buffer, self._carrier.receive(other, buffer, _SUMS)))
        for host, bucket in turn.buckets.items():
            nodes = held.nodes[self._host]
            if host == self._host or not nodes:
                continue
            self._wait_for_backward(bucket)
            presence = self._presence(held, bucket)
            turn.sent.append(self._carrier.send(host, presence, _PRESENCE))
            for node in nodes:
                turn.sent.append(self._carrier.send(host, self._packed(held, node, bucket, turn), _SUMS))

    def _add_up(self, held: _Held, turn: _Turn) -> None:
        """Add up the own bucket and send the sum; await those of the others."""
        own = turn.buckets.get(self._host)
        if own is not None:
            self._wait_for_backward(own)
            self._add_up_own(held, turn, own)
        if self._sharded:
            return
        with self._carrier.together():
            if own is not None:
                total = self._packed_total(held, own, turn)
                turn.sent += [self._carrier.send(host, total, _TOTALS) for host in self._others]
            for host, bucket in turn.buckets.items():
                if host == self._host:
                    continue
                message = self._message(bucket, held.whole)
                if message.stretch:
                    tensor = self._slots.stretch(0, self._into, held.whole, *message.stretch)
                else:
                    tensor = self._take(turn)[: message.num_bytes]
                turn.totals.append((bucket, tensor, self._carrier.receive(host, tensor, _TOTALS)))

    def _add_up_own(self, held: _Held, turn: _Turn, bucket: int) -> None:
        rows: dict[Node, list[int]] = {}  # by node: whether it holds a sum for each block
        for host, presence, pending in turn.presence:
            pending.wait()
            rows |= zip(held.nodes[host], presence.view(len(held.nodes[host]), -1).tolist(), strict=True)
        own = self._presence(held, bucket).view(-1, self._num_blocks(bucket)).tolist()
        rows |= zip(held.nodes[self._host], own, strict=False)
        views: dict[Node, list[torch.Tensor]] = {}
        for node, buffer, pending in turn.sums:
            pending.wait()
            views[node] = self._message(bucket, node).views(buffer)
        for node in held.nodes[self._host]:
            if node == held.in_outbox or node not in held.places:
                views[node] = self._message(bucket, node).views(self._packed(held, node, bucket, turn))
        tree = sum_of(held.whole, rows)
        for position, (span, _, _) in enumerate(self._message(bucket, held.whole).blocks):

            def operand(node: Node, position: int = position, span: Span = span) -> torch.Tensor:
                if node in views:
                    return views[node][position]
                return self._slots.operand(*held.places[node], node, span)

            def is_present(node: Node, position: int = position) -> bool:
                return bool(rows[node][position])

            self._put_sum(tree, is_present, operand, self._slots.span(0, self._into, held.whole, span))

    def _end(self, held: _Held, turn: _Turn) -> None:
        """Take the others' sums, and wait until everything sent has left."""
        for bucket, tensor, pending in turn.totals:
            pending.wait()
            message = self._message(bucket, held.whole)
            if message.stretch is None:
                for (span, _, _), view in zip(message.blocks, message.views(tensor), strict=True):
                    self._slots.span(0, self._into, held.whole, span).copy_(view)
        for pending in turn.sent:
            pending.wait()
        self._pool.give_back(turn.buffers)
        for bucket in turn.buckets.values():
            self.outbox.taken(bucket)
            if self._release_sent:
                for rank, slot in held.places.values():
                    self._slots.release(rank, slot, bucket)

    def _wait_for_backward(self, bucket: int) -> None:
        start = time.perf_counter()
        self.outbox.wait(bucket)
        self._waited += time.perf_counter() - start

    # --- sums -------------------------------------------------------------------------------------------------------

    def _presence(self, held: _Held, bucket: int) -> torch.Tensor:
        """Return a byte for each partial sum that travels and each block: whether it holds anything for it."""
        spec = self._layout.buckets[bucket]
        parameters = [block.parameter for block in self._layout.blocks[spec.first_block : spec.end_block]]
        has = [held.has(node, parameter) for node in held.nodes[self._host] for parameter in parameters]
        return torch.tensor(has, dtype=torch.uint8)

    def _packed(self, held: _Held, node: Node, bucket: int, turn: _Turn) -> torch.Tensor:
        """Return a bucket of a node of this host as it travels: where it lies, or in a buffer."""
        message = self._message(bucket, node)
        if node == held.in_outbox:
            return self.outbox.packed(bucket)
        if message.stretch and node in held.places:
            return self._slots.stretch(*held.places[node], node, *message.stretch)
        buffer = self._take(turn)[: message.num_bytes]
        tree = sum_of(node, held.places)
        for (span, _, _), view in zip(message.blocks, message.views(buffer), strict=True):

            def operand(node: Node, span: Span = span) -> torch.Tensor:
                return self._slots.operand(*held.places[node], node, span)

            def is_present(node: Node, parameter: int = span.blocks[0].parameter) -> bool:
                return held.has(node, parameter)

            self._put_sum(tree, is_present, operand, view)
        return buffer

    def _packed_total(self, held: _Held, bucket: int, turn: _Turn) -> torch.Tensor:
        """Return the sum over all hosts of a bucket as it travels."""
        message = self._message(bucket, held.whole)
        if message.stretch:
            return self._slots.stretch(0, self._into, held.whole, *message.stretch)
        buffer = self._take(turn)[: message.num_bytes]
        for (span, _, _), view in zip(message.blocks, message.views(buffer), strict=True):
            view.copy_(self._slots.span(0, self._into, held.whole, span))
        return buffer

    def _put_sum(
        self, tree: Sum, is_present: Callable[[Node], bool], operand: Callable[[Node], torch.Tensor], out: torch.Tensor
    ) -> None:
        """Put the sum of what is present into `out`, which nobody reads where nothing is."""
        present = without_absent(tree, is_present)
        if present is None:
            return
        here = torch.empty_like(out, device=self._device.place) if self._slots.are_elsewhere else out
        total = self._adder.add_up(present, operand, here)
        if total.data_ptr() != out.data_ptr():
            out.copy_(total)

    def _num_blocks(self, bucket: int) -> int:
        spec = self._layout.buckets[bucket]
        return spec.end_block - spec.first_block

    def _message(self, bucket: int, node: Node) -> Message:
        return (self.outbox.messages if node.end - node.first == 1 else self._sums)[bucket]

    def _take(self, turn: _Turn) -> torch.Tensor:
        buffer = self._pool.take()
        turn.buffers.append(buffer)
        return buffer
