"""The claims board of a host: who has which micro-batch, which partial sums exist, who updates what.

A worker reports what it has finished and gets what to do next, in one visit under the team's lock. A step goes
through these phases, and the visit that completes one opens the next:

    COMPUTE   micro-batches are claimed, computed and folded. Ends when every one is done and every worker has
              entered the step: until then someone may still read the old weights between two steps.
    EXCHANGE  (only with several hosts) the leader exchanges records and partial sums with the other hosts' leaders.
    MEASURE   (only with clipping or loss scaling) the norm of each bucket's gradient.
    AGREE     (only where each host updates buckets of its own) the leader exchanges these norms.
    UPDATE    buckets are claimed and updated; the last piece of work is the model's buffers.
    GATHER    (only where each host updates buckets of its own) the leader exchanges the new weights. Then the step is
              done.

What a late worker may read: the records of its own step (two sets are used in turn, and nobody can be two steps
ahead), and the norms, until it enters the next step. The partial sums and their map belong to a step in progress: a
worker reads them only while it holds a claim.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, final

from lightwork.errors import Disagreement, RankFailed, UsageError
from lightwork.spec.assignment import choose
from lightwork.spec.hosts import Hosts
from lightwork.spec.tree import Node, fold, max_partial_sums

#: Bytes in which the metrics of one micro-batch are kept, as JSON.
METRICS_BYTES = 4096

#: The claimant of a micro-batch of another host.
_ANOTHER_HOST = -1

_WORD = 8


class Signal(Protocol):
    """What the board needs of a transport's signal."""

    @property
    def value(self) -> int:
        """The number now."""

    def notify(self) -> None:
        """Change it and wake the waiting."""


class Phase(IntEnum):
    """Where the open step is."""

    COMPUTE = 0
    EXCHANGE = 1
    MEASURE = 2
    AGREE = 3
    UPDATE = 4
    GATHER = 5


class Activity(IntEnum):
    """What a worker is doing; others name it by this when they wait for it."""

    OUTSIDE = 0  #: user code outside the loop
    BETWEEN = 1  #: user code between two steps
    COMPUTING = 2  #: a micro-batch
    WAITING = 3  #: for the others, in a step
    UPDATING = 4
    MEETING = 5  #: in a collective call, such as save
    ENDED = 6  #: the process is about to end
    EXCHANGING = 7  #: with the other hosts


class Kind(IntEnum):
    """What a worker should do next."""

    COMPUTE = 0  #: micro-batch `item`
    MEASURE = 1  #: the norm of bucket `item`
    UPDATE = 2  #: bucket `item`, or the buffers if it is the number of buckets
    WAIT = 3  #: until the signal is not `item` any more
    COMMITTED = 4  #: nothing: the step is done
    EXCHANGE = 5  #: what the `Phase` `item` says, with the other hosts; the leader's work


class Action(NamedTuple):
    """One piece of work."""

    kind: Kind
    item: int


@dataclass(frozen=True, kw_only=True)
class BoardSize:
    """What the size of a board depends on."""

    world_size: int  #: workers of the host
    num_micro_batches: int  #: of a full global batch, on all hosts
    num_parameters: int
    num_buckets: int
    num_hosts: int = 1

    @property
    def num_slots(self) -> int:
        """Partial sums that one worker may hold."""
        return max_partial_sums(self.num_micro_batches)

    @property
    def num_places(self) -> int:
        """Slots of a worker: for its partial sums and, with several hosts, for the sum of all (the leader's)."""
        return self.num_slots + (self.num_hosts > 1)


# Words of the header.
_COMMITTED, _OPEN, _PHASE, _MICRO_BATCHES, _DONE, _NEXT, _FAILED, _ROUND, _TAKEN, _MEASURE = range(10)
_HEADER_WORDS = 16

# Words of a rank.
_PID, _ACTIVITY, _DETAIL, _ENTERED, _SETTINGS, _LEFT = range(6)
_RANK_WORDS = 8


def _sizes(size: BoardSize) -> tuple[int, ...]:
    """Return the bytes of the board's parts: header, ranks, claims, slots, records, norms, touched, metrics."""
    n, m = size.world_size, size.num_micro_batches
    words = (_HEADER_WORDS, n * _RANK_WORDS, m, n * size.num_places * 2, 2 * m * 2, size.num_buckets + 1)
    return (*(count * _WORD for count in words), m * size.num_parameters, 2 * m * METRICS_BYTES)


def _cut(region: memoryview, sizes: Iterable[int]) -> Iterator[memoryview]:
    at = 0
    for size in sizes:
        yield region[at : at + size]
        at += size


@final
class Board:
    """The board of one host, in `region`, which starts out as zeros.

    Workers are counted within the host, from its leader, 0; `rank` is the visitor. In messages they have the ranks of
    the whole team.
    """

    def __init__(
        self,
        rank: int,
        size: BoardSize,
        region: memoryview,
        lock: AbstractContextManager[bool | None],
        signal: Signal,
        *,
        steal: bool,
        hosts: Hosts | None = None,
        host: int = 0,
        sharded: bool = False,
    ) -> None:
        self._rank = rank
        self._hosts = hosts or Hosts((size.world_size,))
        self._host = host
        self._first_rank = self._hosts.first_rank(host)
        self._sharded = sharded
        self._own_buckets = range(host, size.num_buckets, len(self._hosts)) if sharded else range(size.num_buckets)
        self._size = size
        self._lock = lock
        self._signal = signal
        self._steal = steal
        parts = iter(_cut(region, _sizes(size)))
        self._header, self._ranks, self._claims, self._slots = (next(parts).cast("q") for _ in range(4))
        self._records: memoryview[float] = next(parts).cast("d")  # [parity][micro-batch][loss, weight]
        self._norms: memoryview[float] = next(parts).cast("d")
        self._touched, self._metrics = next(parts), next(parts)
        self._no_claims = memoryview(bytes(len(self._claims) * _WORD)).cast("q")
        self._no_slots = memoryview(bytes(len(self._slots) * _WORD)).cast("q")

    @staticmethod
    def num_bytes(size: BoardSize) -> int:
        """Return the bytes of the region."""
        return sum(_sizes(size))

    # --- a step, in the order of its visits -------------------------------------------------------------------

    def enter(self, step: int, num_micro_batches: int, settings: int, *, measure: bool) -> Action:
        """Enter `step`, opening it if this is the first worker to, and return what to do.

        `settings` is a hash of all that must be the same everywhere, such as learning rates; `measure` says that the
        norm of the whole gradient must be known before the update.

        Raises: Disagreement when the workers differ in it or in the number of micro-batches.
        """
        header = self._header
        with self._lock:
            if header[_OPEN] != step + 1:
                self._open(step, num_micro_batches, measure=measure)
            elif header[_MICRO_BATCHES] != num_micro_batches:
                raise Disagreement(
                    f"step {step} has {num_micro_batches} micro-batches for rank {self._name(self._rank)} and "
                    f"{header[_MICRO_BATCHES]} for another worker. Every worker must pass the same data set to "
                    "run.steps."
                )
            self._set_rank(_SETTINGS, settings)
            self._set_rank(_ENTERED, step + 1)
            return self._next(step)

    def finished_micro_batch(
        self,
        step: int,
        index: int,
        *,
        loss: float,
        weight: float,
        metrics: bytes,
        freed: Sequence[int],
        slot: int,
        node: Node,
    ) -> Action:
        """Record a computed micro-batch: its loss and weight, and the partial sum `node` that now lies in `slot`.

        `freed` are the slots whose sums went into it. Until this visit they count as held, so that a worker killed in
        the middle of a fold has lost nothing but the micro-batch.
        """
        at = (step % 2 * self._size.num_micro_batches + index) * 2
        self._records[at], self._records[at + 1] = loss, weight
        self._write_metrics(step, index, metrics)
        with self._lock:
            for old in freed:
                self._set_slot(old, Node(0, 0))
            self._set_slot(slot, node)
            self._header[_DONE] += 1
            return self._next(step)

    def finished_bucket(self, step: int, action: Action, norm_squared: float | None) -> Action:
        """Record a measured or updated bucket and the squared norm of its gradient, and return what to do."""
        if norm_squared is not None:
            self._norms[action.item] = norm_squared
        header = self._header
        with self._lock:
            header[_DONE] += 1
            if header[_DONE] == len(self._own_buckets) + (action.kind is Kind.UPDATE):
                self._end_phase(step)
            return self._next(step)

    def finished_exchange(self, step: int, total: tuple[int, Node] | None = None) -> Action:
        """Record that the leader has exchanged what the phase is for, and return what to do.

        `total` is the slot of the leader in which the sum over all hosts lies, in place of all partial sums, and its
        node.
        """
        with self._lock:
            if total is not None:
                self._slots[:] = self._no_slots
                self._set_slot(*total)
            self._end_phase(step)
            return self._next(step)

    def visit(self, step: int) -> Action:
        """Return what to do now."""
        with self._lock:
            return self._next(step)

    def _open(self, step: int, num_micro_batches: int, *, measure: bool) -> None:
        header = self._header
        header[_OPEN], header[_MICRO_BATCHES], header[_MEASURE] = step + 1, num_micro_batches, measure
        header[_PHASE], header[_DONE], header[_NEXT] = Phase.COMPUTE, 0, 0
        self._claims[:] = self._no_claims
        self._slots[:] = self._no_slots
        own = self._own(num_micro_batches)
        for index in range(num_micro_batches):
            if index not in own:
                self._claims[index] = _ANOTHER_HOST

    def _end_phase(self, step: int) -> None:
        """Begin the next phase, or commit the step after the last one; the lock is held."""
        header = self._header
        several, measures = len(self._hosts) > 1, bool(header[_MEASURE])
        needed = {
            Phase.EXCHANGE: several,
            Phase.MEASURE: measures and len(self._own_buckets) > 0,
            Phase.AGREE: measures and self._sharded,
            Phase.UPDATE: True,
            Phase.GATHER: self._sharded,
        }
        following = next((phase for phase in Phase if phase > header[_PHASE] and needed[phase]), None)
        if following is None:
            header[_COMMITTED] = step + 1
        else:
            header[_PHASE], header[_DONE], header[_NEXT] = following, 0, 0
        self._signal.notify()

    def _own(self, num_micro_batches: int) -> range:
        """Return the micro-batches of this host."""
        return self._hosts.micro_batches(self._host, num_micro_batches)

    def _next(self, step: int) -> Action:
        """Return what the visitor should do; the lock is held."""
        header = self._header
        self._raise_if_failed()
        if header[_COMMITTED] > step:
            return Action(Kind.COMMITTED, 0)
        if header[_PHASE] == Phase.COMPUTE:
            count = header[_MICRO_BATCHES]
            index = self._claimable(count)
            if index is not None:
                self._claims[index] = self._rank + 1
                self.show(Activity.COMPUTING, index)
                return Action(Kind.COMPUTE, index)
            if header[_DONE] < len(self._own(count)) or not self._all_entered(step):
                self.show(Activity.WAITING, step)
                return Action(Kind.WAIT, self._signal.value)
            self._check_settings(step)
            self._end_phase(step)
        if header[_PHASE] in (Phase.EXCHANGE, Phase.AGREE, Phase.GATHER):
            if self._rank == 0 and header[_NEXT] == 0:
                header[_NEXT] = 1
                self.show(Activity.EXCHANGING, step)
                return Action(Kind.EXCHANGE, header[_PHASE])
            if self.entered(0) < step and self._is_excused(0):
                raise Disagreement(
                    f"rank {self._first_rank} has left its loop before step {step}, which rank "
                    f"{self._name(self._rank)} is in. With several hosts all workers leave at the same step: decide by "
                    "what is the same everywhere, such as step.loss or an evaluation."
                )
            self.show(Activity.WAITING, step)
            return Action(Kind.WAIT, self._signal.value)
        kind = Kind.UPDATE if header[_PHASE] == Phase.UPDATE else Kind.MEASURE
        position, own = header[_NEXT], self._own_buckets
        if position < len(own) + (kind is Kind.UPDATE):
            header[_NEXT] = position + 1
            self.show(Activity.UPDATING, step)
            return Action(kind, own[position] if position < len(own) else self._size.num_buckets)
        self.show(Activity.WAITING, step)
        return Action(Kind.WAIT, self._signal.value)

    def _claimable(self, count: int) -> int | None:
        """Return the best micro-batch that the visitor can take and still has a slot for."""
        candidates = choose(
            self._name(self._rank), self._hosts.world_size, self._claims[:count].tolist(), steal=self._steal
        )
        if not candidates:
            return None
        held = self.held(self._rank)
        if len(held) < self._size.num_slots - 1:
            return candidates[0]
        return next((index for index in candidates if fold(index, count, held.values())[0]), None)

    def _all_entered(self, step: int) -> bool:
        # A worker that has left the loop for good does not read weights before its next collective call.
        return all(self.entered(rank) >= step or self._is_excused(rank) for rank in range(self._size.world_size))

    def _is_excused(self, rank: int) -> bool:
        return self.has_left(rank) and self.activity(rank) in (Activity.MEETING, Activity.ENDED)

    def _check_settings(self, step: int) -> None:
        entered = [
            (rank, self._ranks[rank * _RANK_WORDS + _SETTINGS])
            for rank in range(self._size.world_size)
            if self._ranks[rank * _RANK_WORDS + _ENTERED] > step
        ]
        odd = [rank for rank, settings in entered if settings != entered[0][1]]
        if odd:
            raise Disagreement(
                f"at step {step} rank {self._name(odd[0])} has other learning rates, optimizer settings or trainable "
                f"parameters than rank {self._name(entered[0][0])}. Schedulers and changes of requires_grad must run "
                "on every worker alike."
            )

    # --- what a step left ---------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Steps done so far, those before a resume included."""
        return int(self._header[_COMMITTED])

    def resume_at(self, step: int) -> None:
        """Set the number of steps done so far. Nobody is in a step."""
        self._header[_COMMITTED] = step

    def records(self, step: int, num_micro_batches: int) -> list[tuple[float, float]]:
        """Return loss and weight of each micro-batch."""
        at = step % 2 * self._size.num_micro_batches * 2
        flat = self._records[at : at + 2 * num_micro_batches].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def metrics(self, step: int, index: int) -> dict[str, tuple[float, float]]:
        """Return value and weight of each metric of a micro-batch."""
        at = (step % 2 * self._size.num_micro_batches + index) * METRICS_BYTES
        (length,) = struct.unpack_from("<q", self._metrics, at)
        return json.loads(bytes(self._metrics[at + 8 : at + 8 + length])) if length else {}

    def take_norm(self, bucket: int, norm_squared: float) -> None:
        """Write down the norm of a bucket of this host that is known only now."""
        self._norms[bucket] = norm_squared

    def take_norms(self, host: int, norms_squared: Sequence[float]) -> None:
        """Write down the norms of the buckets of another host, of which `norms_squared` holds all."""
        for bucket in range(host, self._size.num_buckets, len(self._hosts)):
            self._norms[bucket] = norms_squared[bucket]

    def norms_squared(self) -> list[float]:
        """Return the squared gradient norm of each bucket."""
        return list(self._norms[: self._size.num_buckets])

    def touched(self, index: int) -> memoryview:
        """Return a byte for each parameter, its claimant's to write: whether micro-batch `index` gave it a gradient."""
        size = self._size.num_parameters
        return self._touched[index * size : (index + 1) * size]

    def held(self, rank: int) -> dict[int, Node]:
        """Return the partial sums of `rank` by slot."""
        count = self._size.num_places * 2
        flat = self._slots[rank * count : (rank + 1) * count].tolist()
        return {at // 2: Node(flat[at], flat[at + 1]) for at in range(0, count, 2) if flat[at + 1]}

    def claimant(self, index: int) -> int:
        """Return the rank that has micro-batch `index`."""
        return int(self._claims[index]) - 1

    def _set_slot(self, slot: int, node: Node) -> None:
        at = (self._rank * self._size.num_places + slot) * 2
        self._slots[at], self._slots[at + 1] = node

    def _write_metrics(self, step: int, index: int, metrics: bytes) -> None:
        at = (step % 2 * self._size.num_micro_batches + index) * METRICS_BYTES
        if len(metrics) > METRICS_BYTES - 8:
            raise UsageError(
                f"the metrics of micro-batch {index} of step {step} take {len(metrics)} bytes, more than "
                f"{METRICS_BYTES - 8}. step.add is for a few numbers; write larger things to a file."
            )
        struct.pack_into("<q", self._metrics, at, len(metrics))
        if metrics:
            self._metrics[at + 8 : at + 8 + len(metrics)] = metrics

    # --- between hosts ----------------------------------------------------------------------------------------------

    def share_of_step(self, step: int, num_micro_batches: int) -> bytes:
        """Return all that other hosts need to know of this host's micro-batches."""
        own = self._own(num_micro_batches)
        return json.dumps(
            {
                "settings": self._ranks[_SETTINGS],
                "records": self.records(step, num_micro_batches)[own.start : own.stop],
                "metrics": [self.metrics(step, index) for index in own],
                "touched": b"".join(bytes(self.touched(index)) for index in own).hex(),
            }
        ).encode()

    def take_share(self, step: int, num_micro_batches: int, host: int, share: bytes) -> None:
        """Write down what another host's leader says of its micro-batches.

        Raises: Disagreement when its settings differ.
        """
        values = json.loads(share)
        if values["settings"] != self._ranks[_SETTINGS]:
            raise Disagreement(
                f"at step {step} rank {self._hosts.first_rank(host)} has other learning rates, optimizer settings or "
                f"trainable parameters than rank {self._name(self._rank)}. Schedulers and changes of requires_grad "
                "must run on every worker alike."
            )
        touched = bytes.fromhex(values["touched"])
        count = self._size.num_parameters
        for position, index in enumerate(self._hosts.micro_batches(host, num_micro_batches)):
            at = (step % 2 * self._size.num_micro_batches + index) * 2
            self._records[at], self._records[at + 1] = values["records"][position]
            metrics = values["metrics"][position]
            self._write_metrics(step, index, json.dumps(metrics).encode() if metrics else b"")
            self.touched(index)[:] = touched[position * count : (position + 1) * count]

    # --- evaluation ---------------------------------------------------------------------------------------------

    def take_evaluation(self, round_number: int) -> int:
        """Return the next batch of the evaluation `round_number` that nobody has. Hosts take them in turn."""
        header = self._header
        with self._lock:
            self._raise_if_failed()
            if header[_ROUND] != round_number:
                header[_ROUND], header[_TAKEN] = round_number, 0
            header[_TAKEN] += 1
            return (int(header[_TAKEN]) - 1) * len(self._hosts) + self._host

    # --- who does what ------------------------------------------------------------------------------------------

    def show(self, activity: Activity, detail: int = 0) -> None:
        """Say what this worker is doing."""
        at = self._rank * _RANK_WORDS
        self._ranks[at + _ACTIVITY], self._ranks[at + _DETAIL] = activity, detail

    def activity(self, rank: int) -> Activity:
        """Return what `rank` is doing."""
        return Activity(self._ranks[rank * _RANK_WORDS + _ACTIVITY])

    def waits_in_open_step(self, rank: int) -> bool:
        """Return whether `rank` waits in a step that is not done yet."""
        at = rank * _RANK_WORDS
        return self.activity(rank) is Activity.WAITING and self._ranks[at + _DETAIL] >= self._header[_COMMITTED]

    def join(self, pid: int) -> None:
        """Put this worker on the board."""
        self._set_rank(_PID, pid)

    def pid(self, rank: int) -> int:
        """Return the process of `rank`; 0 before it joined."""
        return int(self._ranks[rank * _RANK_WORDS + _PID])

    def leave(self, *, left: bool) -> None:
        """Say that this worker has left its loop (or entered a new one)."""
        with self._lock:
            self._set_rank(_LEFT, int(left))
            self._signal.notify()

    def announce(self, activity: Activity) -> None:
        """Say what this worker is doing, and wake those who may be waiting for just that."""
        with self._lock:
            self.show(activity)
            self._signal.notify()

    def has_left(self, rank: int) -> bool:
        """Return whether `rank` has left its loop."""
        return bool(self._ranks[rank * _RANK_WORDS + _LEFT])

    def anyone_left(self) -> bool:
        """Return whether any worker has left its loop."""
        return any(self.has_left(rank) for rank in range(self._size.world_size))

    def entered(self, rank: int) -> int:
        """Return the last step that `rank` has entered, -1 for none."""
        return int(self._ranks[rank * _RANK_WORDS + _ENTERED]) - 1

    def describe(self, rank: int) -> str:
        """Return who `rank` is and what it is doing, for a message."""
        detail = self._ranks[rank * _RANK_WORDS + _DETAIL]
        doing = {
            Activity.OUTSIDE: "is in code outside run.steps",
            Activity.BETWEEN: f"is in code after step {self.entered(rank)}",
            Activity.COMPUTING: f"computes micro-batch {detail} of step {self.entered(rank)}",
            Activity.WAITING: f"waits in step {detail}",
            Activity.UPDATING: f"updates weights in step {detail}",
            Activity.MEETING: "is in a collective call",
            Activity.ENDED: "has ended",
            Activity.EXCHANGING: f"exchanges gradients with the other hosts in step {detail}",
        }[self.activity(rank)]
        return f"rank {self._name(rank)} (pid {self.pid(rank)}) {doing}"

    def fail(self) -> None:
        """Say that this worker can not go on; every other one raises RankFailed at its next visit."""
        with self._lock:
            if not self._header[_FAILED]:
                self._header[_FAILED] = self._rank + 1
            self._signal.notify()

    def raise_if_failed(self) -> None:
        """Raise RankFailed when another worker has said that it can not go on."""
        with self._lock:
            self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        failed = self._header[_FAILED] - 1
        if failed >= 0 and failed != self._rank:
            raise RankFailed(
                f"rank {self._name(self._rank)} ends because {self.describe(failed)} and failed; see its traceback."
            )

    def _name(self, rank: int) -> int:
        """Return the rank in the whole team of a worker of this host."""
        return self._first_rank + rank

    def _set_rank(self, field: int, value: int) -> None:
        self._ranks[self._rank * _RANK_WORDS + field] = value
