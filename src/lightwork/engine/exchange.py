"""Between hosts: what each has of a step becomes the sum over all, on every host or on the owner of the bucket.

Data travels bucket by bucket, in turns: in each turn every host owns one bucket. It receives the others' partial sums
of it, adds them up with its own in the fixed tree, and sends the sum to all. While the leaders wait for one turn's
tensors, those of the next are on their way.

    own partial sums --> nodes of the tree over the host's micro-batches --> owner of the bucket: sum --> every host

With sharded state (ZeRO-1) the sum stays with the owner, whose host alone holds the masters and the optimizer's state
of the bucket. It updates the bucket and sends the new working weights to all.

A gradient of a single micro-batch travels in the type of the working weight, a sum in the wire format.

Moves, a step and host, with H hosts of one node each: (H - 1) / H of the gradients' bytes to the owners and as much of
the sums from them, in and out: a ring all-reduce's traffic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lightwork.engine.buffers import Buffers
from lightwork.engine.gradients import Slots, present_nodes
from lightwork.engine.memory import SharedMemory
from lightwork.engine.sums import Adder
from lightwork.spec.hosts import Hosts
from lightwork.spec.layout import ALIGNMENT, Layout, Span, span_of
from lightwork.spec.tree import Node, Sum, sum_of, without_absent
from lightwork.team.board import Board
from lightwork.transport.base import FIRST_TAG, Carrier, Pending

_SUMS, _TOTALS, _SHARED = range(FIRST_TAG, FIRST_TAG + 3)

#: Bytes of a message of a broadcast.
_CHUNK_BYTES = 64 * 1024 * 1024

#: Bytes between two blocks of a packed message.
_PACKED_ALIGNMENT = 64


@dataclass(frozen=True)
class Message:
    """How a bucket of one partial sum travels: its blocks one after the other, each in its type."""

    blocks: tuple[tuple[Span, torch.dtype, int], ...]  #: with the offset in bytes
    num_bytes: int
    stretch: tuple[int, int] | None  #: the elements of the layout that it is, if it need not be packed

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return each block as a tensor in `buffer`, bytes."""
        return [
            buffer[offset : offset + span.numel * dtype.itemsize].view(dtype) for span, dtype, offset in self.blocks
        ]


def message_of(layout: Layout, slots: Slots, bucket: int, *, leaf: bool) -> Message:
    """Return how `bucket` travels, as the gradient of a single micro-batch (`leaf`) or as a sum."""
    spec = layout.buckets[bucket]
    spans = [span_of(layout, block) for block in layout.blocks[spec.first_block : spec.end_block]]
    node = Node(0, 1) if leaf else Node(0, 2)
    dtypes = [slots.dtype(node, span.blocks[0].parameter) for span in spans]
    neighbours = all(0 <= after.start - before.end < ALIGNMENT for before, after in itertools.pairwise(spans))
    first, end = spans[0].start, spans[-1].end
    if neighbours and all(dtype is slots.wire for dtype in dtypes):
        blocks = tuple((span, slots.wire, (span.start - first) * slots.wire.itemsize) for span in spans)
        return Message(blocks, (end - first) * slots.wire.itemsize, (first, end))
    placed = []
    at = 0
    for span, dtype in zip(spans, dtypes, strict=True):
        placed.append((span, dtype, at))
        at += -(-span.numel * dtype.itemsize // _PACKED_ALIGNMENT) * _PACKED_ALIGNMENT
    return Message(tuple(placed), at, None)


@dataclass
class _Held:
    """What the hosts hold of the step."""

    whole: Node
    places: Mapping[Node, tuple[int, int]]  #: rank of this host and slot, by node
    nodes: tuple[tuple[Node, ...], ...]  #: those that travel, by host
    touched: Sequence[memoryview]  #: by micro-batch, a byte for each parameter
    everywhere: bytes  #: by parameter: whether every micro-batch touched it
    into: int  #: the leader's slot for the sum


@dataclass
class _Turn:
    """A turn on its way."""

    own: int | None = None  #: the bucket of this host
    sums: list[tuple[Node, torch.Tensor, Pending]] = field(default_factory=list)  #: of the own bucket
    totals: list[tuple[int, torch.Tensor, Pending]] = field(default_factory=list)  #: of the others' buckets
    sent: list[Pending] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)  #: to be given back


class Exchange:
    """The leader's side of a step's exchange."""

    def __init__(
        self,
        hosts: Hosts,
        carrier: Carrier,
        board: Board,
        layout: Layout,
        slots: Slots,
        buffers: Buffers,
        *,
        sharded: bool,
    ) -> None:
        self._sharded = sharded
        self._hosts = hosts
        self._carrier = carrier
        self._host = carrier.host
        self._others = [host for host in range(len(hosts)) if host != self._host]
        self._board = board
        self._slots = slots
        self._buffers = buffers
        self._adder = Adder(slots.wire)
        buckets = range(len(layout.buckets))
        self._messages = {leaf: [message_of(layout, slots, b, leaf=leaf) for b in buckets] for leaf in (True, False)}
        of_any = [message for messages in self._messages.values() for message in messages]
        self._largest = max((message.num_bytes for message in of_any), default=0)
        self._free: list[torch.Tensor] = []  # byte buffers, used in turn

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

    def partial_sums(
        self,
        num_micro_batches: int,
        places: Mapping[Node, tuple[int, int]],
        touched: Sequence[memoryview],
        into: int,
    ) -> Node:
        """Put the sum over all hosts into the leader's slot `into` and return its node.

        Args:
            places: the rank (of this host) and slot of each partial sum that it holds.
            touched: by micro-batch, a byte for each parameter.
        """
        nodes = tuple(self._hosts.nodes(host, num_micro_batches) for host in range(len(self._hosts)))
        everywhere = bytes(map(min, zip(*touched, strict=True)))
        held = _Held(Node(0, num_micro_batches), places, nodes, touched, everywhere, into)
        count = len(self._messages[False])
        turns = range(0, count, len(self._hosts))
        started = [self._begin(held, first) for first in turns[:1]]
        for position in range(len(turns)):
            started += [self._begin(held, first) for first in turns[position + 1 : position + 2]]
            self._add_up(held, started[position], turns[position])
            if position > 0:
                self._end(held, started[position - 1])
        for turn in started[-1:]:
            self._end(held, turn)
        return held.whole

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
        for bucket in range(len(self._messages[False])):
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

    def broadcast(self, memory: SharedMemory, regions: Iterable[str]) -> None:
        """Write the first host's contents of these regions of the shared memory on every other host."""
        for region in regions:
            for chunk in torch.split(memory.tensor(region), _CHUNK_BYTES):
                if self._host == 0:
                    on_the_way = [self._carrier.send(host, chunk, _SUMS) for host in self._others]
                else:
                    on_the_way = [self._carrier.receive(0, chunk, _SUMS)]
                for pending in on_the_way:
                    pending.wait()

    # --- a turn -----------------------------------------------------------------------------------------------------

    def _begin(self, held: _Held, first: int) -> _Turn:
        """Send this host's part of the others' buckets; await theirs of its own."""
        turn = _Turn()
        for host in range(len(self._hosts)):
            bucket = first + host
            if bucket >= len(self._messages[False]):
                break
            if host == self._host:
                turn.own = bucket
                for other in self._others:
                    for node in held.nodes[other]:
                        buffer = self._take(turn)[: self._message(bucket, node).num_bytes]
                        turn.sums.append((node, buffer, self._carrier.receive(other, buffer, _SUMS)))
            else:
                for node in held.nodes[self._host]:
                    tensor = self._packed(held, node, bucket, turn)
                    turn.sent.append(self._carrier.send(host, tensor, _SUMS))
        return turn

    def _add_up(self, held: _Held, turn: _Turn, first: int) -> None:
        """Add up the own bucket and send the sum; await those of the others."""
        if turn.own is not None:
            self._add_up_own(held, turn, turn.own)
            if not self._sharded:
                total = self._packed(_only(held), held.whole, turn.own, turn)
                turn.sent += [self._carrier.send(host, total, _TOTALS) for host in self._others]
        for host in [] if self._sharded else self._others:
            bucket = first + host
            if bucket < len(self._messages[False]):
                message = self._message(bucket, held.whole)
                if message.stretch:
                    tensor = self._slots.stretch(0, held.into, *message.stretch)
                else:
                    tensor = self._take(turn)[: message.num_bytes]
                turn.totals.append((bucket, tensor, self._carrier.receive(host, tensor, _TOTALS)))

    def _add_up_own(self, held: _Held, turn: _Turn, bucket: int) -> None:
        views: dict[Node, list[torch.Tensor]] = {}
        for node, buffer, pending in turn.sums:
            pending.wait()
            views[node] = self._message(bucket, node).views(buffer)
        for node in held.nodes[self._host]:
            if node not in held.places:
                buffer = self._packed(held, node, bucket, turn)
                views[node] = self._message(bucket, node).views(buffer)
        tree = sum_of(held.whole, [node for of_host in held.nodes for node in of_host])
        for position, (span, _, _) in enumerate(self._message(bucket, held.whole).blocks):

            def operand(node: Node, position: int = position, span: Span = span) -> torch.Tensor:
                if node in views:
                    return views[node][position]
                return self._slots.span(*held.places[node], node, span)

            self._put_sum(tree, held, span, operand, self._slots.span(0, held.into, held.whole, span))

    def _end(self, held: _Held, turn: _Turn) -> None:
        """Take the others' sums, and wait until everything sent has left."""
        for bucket, tensor, pending in turn.totals:
            pending.wait()
            message = self._message(bucket, held.whole)
            if message.stretch is None:
                for (span, _, _), view in zip(message.blocks, message.views(tensor), strict=True):
                    self._slots.span(0, held.into, held.whole, span).copy_(view)
        for pending in turn.sent:
            pending.wait()
        self._free += turn.buffers

    # --- sums -------------------------------------------------------------------------------------------------------

    def _packed(self, held: _Held, node: Node, bucket: int, turn: _Turn) -> torch.Tensor:
        """Return a bucket of a node of this host as it travels: where it lies, or in a buffer."""
        message = self._message(bucket, node)
        if message.stretch and node in held.places:
            return self._slots.stretch(*held.places[node], *message.stretch)
        buffer = self._take(turn)[: message.num_bytes]
        tree = sum_of(node, held.places)
        for (span, _, _), view in zip(message.blocks, message.views(buffer), strict=True):
            self._put_sum(tree, held, span, lambda n, s=span: self._slots.span(*held.places[n], n, s), view)  # type: ignore[misc]
        return buffer

    def _put_sum(
        self, tree: Sum, held: _Held, span: Span, operand: Callable[[Node], torch.Tensor], out: torch.Tensor
    ) -> None:
        """Put the sum of what is present into `out`, which nobody reads where nothing is."""
        parameter = span.blocks[0].parameter
        if not held.everywhere[parameter]:
            present = without_absent(tree, present_nodes(held.touched, parameter))
            if present is None:
                return
            tree = present
        total = self._adder.add_up(tree, operand, out)
        if total.data_ptr() != out.data_ptr():
            out.copy_(total)

    def _message(self, bucket: int, node: Node) -> Message:
        return self._messages[node.end - node.first == 1][bucket]

    def _take(self, turn: _Turn) -> torch.Tensor:
        buffer = self._free.pop() if self._free else torch.empty(self._largest, dtype=torch.uint8)
        turn.buffers.append(buffer)
        return buffer


def _only(held: _Held) -> _Held:
    """Return `held` as it is once the sum of all lies in the leader's slot."""
    return replace(held, places={held.whole: (0, held.into)})
