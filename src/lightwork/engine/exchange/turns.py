"""The partial sums of a step on their way between hosts, in a thread beside backward of the last micro-batch.

Data travels bucket by bucket, in turns: in each turn every host owns one bucket. It receives the others' partial sums
of it, adds them up with its own in the fixed tree, and sends the sum to all. The last buckets come first, and a bucket
leaves as soon as backward has completed it (`backward/outbox`). Which of its blocks hold anything travels with it,
because no host knows by then which parameters the others' micro-batches touch.

    own partial sums --> nodes of the tree over the host's micro-batches --> owner of the bucket: sum --> every host

Where a bucket's state is shared out, the sum stays with its owner.

    [Note: three turns at once]
    One turn begins (its tensors are sent and awaited), the one before is added up, and of the one before that the sums
    arrive. So while the leaders wait for one turn's tensors, those of the next are on their way. The thread waits for
    backward only where it sends or adds up a bucket that is not complete; backward waits for the thread only where it
    is `Depths.backlog` buckets ahead.

    [Note: a sum stays until all have it]
Who lacks a step's sum as a host was lost is given it by another one (`team/hosts`), after that has begun the next step.
So no sum of a step is written before every host has begun it: each waits for a word of all, also of those that have no
micro-batch and give none.

A gradient of a single micro-batch travels in the type of the working weight, a sum in the wire format.

Moves, a step and host, with H hosts of one node each: (H - 1) / H of the gradients' bytes to the owners and as much of
the sums from them, in and out: a ring all-reduce's traffic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from lightwork.device.base import Mark
from lightwork.engine.backward.message import Message, message_of
from lightwork.engine.backward.outbox import Outbox, messages_of_leaves, pool_for
from lightwork.engine.backward.slots import Slots, is_leaf
from lightwork.engine.exchange.background import Background
from lightwork.engine.exchange.sums import Adder
from lightwork.spec.holdings import Holdings
from lightwork.spec.layout import Span
from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node, Sum, sum_of, without_absent
from lightwork.transport.base import FIRST_TAG, Carrier, Pending

_SUMS, _TOTALS, _PRESENCE = range(FIRST_TAG, FIRST_TAG + 3)

#: The first tag of the other messages between hosts.
NEXT_TAG = FIRST_TAG + 3

#: A byte for each parameter: whether a micro-batch gave it a gradient.
Touched = memoryview | bytearray


@dataclass
class Held:
    """What this host holds of a step."""

    whole: Node
    places: Mapping[Node, tuple[int, int]]  #: place of the worker on this host and slot, by node
    touched: Mapping[int, Touched]  #: by micro-batch of this host
    in_outbox: Node | None = None  #: the node that lies in the outbox
    nodes: Mapping[int, tuple[Node, ...]] = field(default_factory=dict)  #: those that travel, by host

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


class Turns:
    """The leader's side of the turns.

    Owns: a thread, in which partial sums travel, until `close`.
    """

    def __init__(self, holdings: Holdings, carrier: Carrier, slots: Slots, roster: Callable[[], Roster]) -> None:
        """`roster` returns who is in the step."""
        self._holdings = holdings
        self._roster = roster
        self._carrier = carrier
        self._slots = slots
        self._device = slots.device
        self._into = holdings.num_places - 1  # the leader's slot for the sums over all hosts
        self._host = holdings.host
        self._adder = Adder(slots.wire, self._device.place)
        layout = self._layout = slots.layout
        sums = [slots.wire] * len(layout.parameters)
        self._sums = [message_of(layout, sums, slots.wire, bucket) for bucket in range(len(layout.buckets))]
        leaves = messages_of_leaves(slots)
        self._pool = pool_for(self._device, leaves, self._sums)
        self.outbox = Outbox(layout, slots.leaf_dtypes, leaves, self._pool, self._device, holdings.depths.backlog)
        self._thread: Background[None] = Background("exchange")
        self._going: Future[None] | None = None
        self._done: Mark = None  # where the thread's queue is at the end of an exchange
        self._waited = 0.0
        self.busy_seconds = 0.0  #: of the thread in this step, waits for backward left out

    @property
    def _others(self) -> list[int]:
        return self._carrier.others

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    def abandon(self) -> None:
        """Wait for the end of turns that have failed, as a host was lost. Then there will be no others."""
        self.outbox.abandon()
        if self._going is not None:
            self._going.exception()
        self.close()

    @property
    def are_going(self) -> bool:
        """Whether the step's partial sums are on their way."""
        return self._going is not None

    def begin(self, held: Held) -> None:
        """Begin to exchange the step's partial sums, each bucket as soon as `outbox` says that it is complete."""
        roster = self._roster()
        held.nodes = {host: roster.nodes(host, held.whole.end) for host in roster.hosts}
        self.busy_seconds = 0.0
        before = self._device.mark()  # sums of earlier micro-batches
        self._going = self._thread.start(lambda: self._exchange(held, before))

    def wait_for_total(self) -> None:
        """Return once the sum over all hosts lies in the leader's last slot.

        Raises: RankLost.
        """
        if self._going is None:
            raise ValueError("begin() comes before wait_for_total()")
        going, self._going = self._going, None
        going.result()
        self._device.wait_for_mark(self._done)

    def _exchange(self, held: Held, before: Mark) -> None:
        try:
            with torch.no_grad(), self._device.queue("exchange"):
                self._device.wait_for_mark(before)
                self._all_turns(held)
                self._done = self._device.mark()
        except BaseException:
            self.outbox.abandon()  # backward may be waiting for this thread
            raise

    def _all_turns(self, held: Held) -> None:
        start, self._waited = time.perf_counter(), 0.0
        count = len(self._layout.buckets)
        # Backward completes the last ones first.
        roster = self._roster()
        num_hosts = len(roster.hosts)
        turns = [
            _Turn({roster.owner(b): b for b in range(first, min(first + num_hosts, count))})
            for first in reversed(range(0, count, num_hosts))
        ]
        for position in range(len(turns) + 2):  # [Note: three turns at once]
            if position < len(turns):
                with self._carrier.together():
                    self._begin(held, turns[position])
            if 0 < position <= len(turns):
                self._add_up(held, turns[position - 1])
            if position > 1:
                self._end(held, turns[position - 2])
        self.busy_seconds = time.perf_counter() - start - self._waited

    # --- what they came to, once more ---------------------------------------------------------------------------------

    def give_total(self, host: int, whole: Node) -> None:
        """Send the sum over all hosts, which lies in the leader's last slot, to a host that has not got it."""
        held, turn = Held(whole, {}, {}), _Turn({})
        for bucket in range(len(self._layout.buckets)):
            self._carrier.send(host, self._packed_total(held, bucket, turn), _TOTALS).wait()
            self._pool.give_back(turn.buffers)
            turn.buffers.clear()

    def take_total(self, host: int, whole: Node) -> None:
        """Receive it into the leader's last slot."""
        for bucket in range(len(self._layout.buckets)):
            buffer = self._pool.take_buffer()
            message = self._message(bucket, whole)
            self._carrier.receive(host, buffer[: message.num_bytes], _TOTALS).wait()
            self._unpack_total(message, buffer, whole)
            self._pool.give_back([buffer])

    # --- a turn -----------------------------------------------------------------------------------------------------

    def _begin(self, held: Held, turn: _Turn) -> None:
        """Send this host's part of the others' buckets; await theirs of its own."""
        own = turn.buckets.get(self._host)
        if own is not None:
            for other in self._others:
                nodes = held.nodes[other]
                presence = torch.empty(len(nodes) * self._num_blocks(own), dtype=torch.uint8)
                # Also of who has no sums: [Note: a sum stays until all have it].
                turn.presence.append((other, presence, self._carrier.receive(other, presence, _PRESENCE)))
                for node in nodes:
                    buffer = self._buffer(turn)[: self._message(own, node).num_bytes]
                    turn.sums.append((node, buffer, self._carrier.receive(other, buffer, _SUMS)))
        for host, bucket in turn.buckets.items():
            nodes = held.nodes[self._host]
            if host == self._host:
                continue
            self._wait_for_backward(bucket)
            presence = self._presence(held, bucket)
            turn.sent.append(self._carrier.send(host, presence, _PRESENCE))
            for node in nodes:
                turn.sent.append(self._carrier.send(host, self._packed(held, node, bucket, turn), _SUMS))

    def _add_up(self, held: Held, turn: _Turn) -> None:
        """Add up the own bucket and send the sum; await those of the others."""
        own = turn.buckets.get(self._host)
        if own is not None:
            self._wait_for_backward(own)
            self._add_up_own(held, turn, own)
        with self._carrier.together():
            if own is not None and not self._stays(own):
                total = self._packed_total(held, own, turn)
                turn.sent += [self._carrier.send(host, total, _TOTALS) for host in self._others]
            for host, bucket in turn.buckets.items():
                if host == self._host or self._stays(bucket):
                    continue
                message = self._message(bucket, held.whole)
                if message.whole:
                    tensor = self._slots.range_view(0, self._into, held.whole, *message.whole)
                else:
                    tensor = self._buffer(turn)[: message.num_bytes]
                turn.totals.append((bucket, tensor, self._carrier.receive(host, tensor, _TOTALS)))

    def _add_up_own(self, held: Held, turn: _Turn, bucket: int) -> None:
        rows: dict[Node, list[int]] = {}  # by node: whether it holds a sum for each block
        for host, presence, pending in turn.presence:
            pending.wait()
            if held.nodes[host]:
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

            self._put_sum(tree, is_present, operand, self._slots.span_view(0, self._into, held.whole, span))

    def _end(self, held: Held, turn: _Turn) -> None:
        """Take the others' sums, and wait until everything sent has left."""
        for bucket, tensor, pending in turn.totals:
            pending.wait()
            message = self._message(bucket, held.whole)
            if message.whole is None:
                self._unpack_total(message, tensor, held.whole)
        for pending in turn.sent:
            pending.wait()
        self._pool.give_back(turn.buffers)
        for bucket in turn.buckets.values():
            self.outbox.mark_taken(bucket)
            if not self._holdings.rows[bucket].keeps_sent_sums:  # [Note: lifetime of a partial sum]
                for rank, slot in held.places.values():
                    self._slots.release_bucket(rank, slot, bucket)

    def _wait_for_backward(self, bucket: int) -> None:
        start = time.perf_counter()
        self.outbox.wait_for_bucket(bucket)
        self._waited += time.perf_counter() - start

    # --- sums -------------------------------------------------------------------------------------------------------

    def _presence(self, held: Held, bucket: int) -> torch.Tensor:
        """Return a byte for each partial sum that travels and each block: whether it holds anything for it."""
        parameters = [block.parameter for block in self._layout.blocks_of(bucket)]
        has = [held.has(node, parameter) for node in held.nodes[self._host] for parameter in parameters]
        return torch.tensor(has, dtype=torch.uint8)

    def _packed(self, held: Held, node: Node, bucket: int, turn: _Turn) -> torch.Tensor:
        """Return a bucket of a node of this host as it travels: where it lies, or in a buffer."""
        message = self._message(bucket, node)
        if node == held.in_outbox:
            return self.outbox.packed(bucket)
        if message.whole and node in held.places:
            return self._slots.range_view(*held.places[node], node, *message.whole)
        buffer = self._buffer(turn)[: message.num_bytes]
        tree = sum_of(node, held.places)
        for (span, _, _), view in zip(message.blocks, message.views(buffer), strict=True):

            def operand(node: Node, span: Span = span) -> torch.Tensor:
                return self._slots.operand(*held.places[node], node, span)

            def is_present(node: Node, parameter: int = span.blocks[0].parameter) -> bool:
                return held.has(node, parameter)

            self._put_sum(tree, is_present, operand, view)
        return buffer

    def _packed_total(self, held: Held, bucket: int, turn: _Turn) -> torch.Tensor:
        """Return the sum over all hosts of a bucket as it travels."""
        message = self._message(bucket, held.whole)
        if message.whole:
            return self._slots.range_view(0, self._into, held.whole, *message.whole)
        buffer = self._buffer(turn)[: message.num_bytes]
        for (span, _, _), view in zip(message.blocks, message.views(buffer), strict=True):
            view.copy_(self._slots.span_view(0, self._into, held.whole, span))
        return buffer

    def _unpack_total(self, message: Message, tensor: torch.Tensor, whole: Node) -> None:
        """Put the sum over all hosts of a bucket, as it has travelled, where it belongs."""
        for (span, _, _), view in zip(message.blocks, message.views(tensor), strict=True):
            self._slots.span_view(0, self._into, whole, span).copy_(view)

    def _put_sum(
        self, tree: Sum, is_present: Callable[[Node], bool], operand: Callable[[Node], torch.Tensor], out: torch.Tensor
    ) -> None:
        """Put the sum of the present nodes into `out`. With no node present it keeps old values, which nobody reads."""
        present = without_absent(tree, is_present)
        if present is None:
            return
        here = torch.empty_like(out, device=self._device.place) if self._slots.any_elsewhere else out
        total = self._adder.add_up(present, operand, here)
        if total.data_ptr() != out.data_ptr():
            out.copy_(total)

    def _stays(self, bucket: int) -> bool:
        """Return whether the sum of a bucket stays with its owner."""
        return self._holdings.rows[bucket].is_shared_out

    def _num_blocks(self, bucket: int) -> int:
        return len(self._layout.block_indices(bucket))

    def _message(self, bucket: int, node: Node) -> Message:
        return (self.outbox.messages if is_leaf(node) else self._sums)[bucket]

    def _buffer(self, turn: _Turn) -> torch.Tensor:
        buffer = self._pool.take_buffer()
        turn.buffers.append(buffer)
        return buffer
