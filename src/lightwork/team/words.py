"""The memory of a host's board: what each of its words means, who writes it, and in what order.

A word is 8 bytes and is written at once. What a step has come to is derived from words that say one thing each, and
nothing is counted.

    committed           steps that are done. Who finds every piece of a step done writes it; another would, too
    open                the step that is open, its micro-batches, whether it is audited and norms are measured: one word
    failed              1 + the place of a worker that can not go on; the first one stays
    evaluation          the evaluation that goes on, and how many of its batches are claimed, in one word
    changes             how often a worker was found dead, or was let in, or a host was lost
    again               how often a step was begun again, as a host was lost in it
    handover            where what a newcomer needs to know lies: a process and its descriptor, in one word
    proven              1 + the step of which what one micro-batch comes to is to be written down, for a newcomer
    proof               what the first of them came to: the micro-batch, in which step, in one word; loss, weight, and a
                        number for each parameter's gradient
    gone                of each host: 1 + the first step without it, once it is lost
    presence            of each worker, its own to write (`presence`); whether it is dead, and which process is in,
                        written by who finds it so, or lets it in
    claim   of a piece  who has it, in which step: written under the lock, before the work
    done    of a piece  the step for which it is done: written by its claimant, after everything that the work left
    deaths              of a micro-batch: the workers that died while they had it, in which step, in one word
    slot                the node of the tree whose sum lies in a worker's slot, 0 for none; its own to write

Pieces are the micro-batches, a bucket's measurement, a bucket's update (and the buffers'), and what leaders exchange.
A claim or a done word of an earlier step says nothing, so nothing is cleared when a step is opened.

    [Note: the order of a board's words]
    A worker may be killed between any two words, so the word that makes the others count is the last but for those that
    only give memory back.
    It enters a step: open (if it is the first), its slots cleared, settings, **entered**.
    It finishes a micro-batch: outcome, touched and metrics (`ledger`), the slot of the new sum, **done**, then the
    slots of the sums that went into it are freed. Until it is done, a sum with this micro-batch does not count, and
    the sums that went into it do; from then on it is the reverse.
    It finishes a bucket: its norm, **done**.
    It buries another one: what that had claimed and not done is counted and free, **dead**, changes. Who finds a
    worker dead does all of it, also where somebody else has; so it may be killed in between.
    It lets a newcomer in: it buries who was there, handover, since, **process**, changes. A place is given away when
    the step in which its last worker died is done: until then that one's partial sums and journal are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, final

from lightwork.spec.tree import Node, max_partial_sums

#: Bytes in which the metrics of one micro-batch are kept, as JSON.
METRICS_BYTES = 4096

WORD = 8

#: More places than any host has.
MAX_WORKERS = 4096

# Words of the header.
COMMITTED, OPEN, FAILED, EVALUATION, CHANGES, HANDOVER, PROVEN, AGAIN = range(8)
_HEADER_WORDS = 8

# Words of a worker. `READY` is the process that waits to come to its place; `SINCE` the last exchange without it;
# `OWES` whether it has still to show that it computes what others do.
PID, ACTIVITY, SETTINGS, ENTERED, LEFT, DEAD, ARRIVED, READY, SINCE, OWES = range(10)
PRESENCE_WORDS = 16


#: Words of a proof before those of the parameters: which it is, who has computed it, loss, weight.
PROOF_WORDS = 4


class Kind(IntEnum):
    """What a worker should do next. Those before `WAIT` are the phases of a step, in order, and its kinds of pieces."""

    COMPUTE = 0  #: micro-batch `item`
    AUDIT = 1  #: a micro-batch that another worker has computed, once more
    EXCHANGE = 2  #: records and partial sums, with the other hosts; the leader's work
    MEASURE = 3  #: the norm of bucket `item`
    AGREE = 4  #: ... and exchange these norms; the leader's work
    UPDATE = 5  #: bucket `item`, or the buffers if it is the number of buckets
    GATHER = 6  #: the new weights from the other hosts; the leader's work
    WAIT = 7  #: until the signal is not `item` any more
    COMMITTED = 8  #: nothing: the step is done
    AGAIN = 9  #: forget what was computed of the step: it begins again


class Shape(NamedTuple):
    """What must be known of a step that is open, to know its phases."""

    num_micro_batches: int
    measures: bool  #: norms, before the update
    is_audited: bool


@dataclass(frozen=True, kw_only=True)
class BoardSize:
    """What the size of a board depends on."""

    capacity: int  #: places of the host, taken or not
    num_micro_batches: int  #: of a full global batch, on all hosts
    num_parameters: int
    num_buckets: int
    num_hosts: int = 1
    num_spare_slots: int = 0  #: of a worker, used only after another one has died

    @property
    def num_slots(self) -> int:
        """Partial sums that one worker may hold."""
        return max_partial_sums(self.num_micro_batches) + self.num_spare_slots

    @property
    def num_places(self) -> int:
        """Slots of a worker: for its partial sums and, with several hosts, for the sum of all (the leader's)."""
        return self.num_slots + (self.num_hosts > 1)


def _pieces(size: BoardSize) -> tuple[int, ...]:
    """Return the number of pieces of each kind."""
    return size.num_micro_batches, 1, 1, size.num_buckets, 1, size.num_buckets + 1, 1


def _sizes(size: BoardSize) -> tuple[int, ...]:
    """Return the bytes of the board's parts, in their order."""
    n, m = size.capacity, size.num_micro_batches
    proof = PROOF_WORDS + size.num_parameters
    header = (_HEADER_WORDS, n * PRESENCE_WORDS, n * size.num_slots, size.num_hosts)
    words = (*header, m, proof, *_pieces(size), *_pieces(size))
    ledger = (2 * m * 2, 2 * m, size.num_buckets)
    return (*(count * WORD for count in words + ledger), m * size.num_parameters, 2 * m, 2 * m * METRICS_BYTES)


def _cut(region: memoryview, sizes: Iterable[int]) -> Iterator[memoryview]:
    at = 0
    for size in sizes:
        yield region[at : at + size]
        at += size


@final
class Words:
    """The words in `region`, which starts out as zeros. Workers are counted by their places on the host."""

    def __init__(self, size: BoardSize, region: memoryview) -> None:
        self.size = size
        parts = _cut(region, _sizes(size))
        self.header, self.presence, self.slots, self.gone = (next(parts).cast("q") for _ in range(4))
        self._deaths, self.proof = (next(parts).cast("q") for _ in range(2))
        self.claims = tuple(next(parts).cast("q") for _ in _pieces(size))  #: by kind
        self.done = tuple(next(parts).cast("q") for _ in _pieces(size))  #: by kind
        # By parity of the step: [Note: what a late worker may read].
        self.outcomes: memoryview[float] = next(parts).cast("d")  #: [parity of the step][micro-batch][loss, weight]
        self.squares: memoryview[float] = next(parts).cast("d")  #: [parity of the step][micro-batch]
        self.norms: memoryview[float] = next(parts).cast("d")  #: squared, by bucket
        self.touched = next(parts)  #: [micro-batch][parameter]
        self.votes = next(parts)  #: [parity of the step][micro-batch]
        self.metrics = next(parts)  #: [parity of the step][micro-batch], length and JSON

    @staticmethod
    def num_bytes(size: BoardSize) -> int:
        """Return the bytes of the region."""
        return sum(_sizes(size))

    def slots_of(self, local_rank: int) -> memoryview:
        """Return the slots of a worker."""
        count = self.size.num_slots
        return self.slots[local_rank * count : (local_rank + 1) * count]

    def entered(self, local_rank: int) -> int:
        """Return the last step that a worker has entered, -1 for none."""
        return int(self.presence[local_rank * PRESENCE_WORDS + ENTERED]) - 1

    def settings(self, local_rank: int) -> int:
        """Return the hash of the settings with which a worker has entered its step."""
        return int(self.presence[local_rank * PRESENCE_WORDS + SETTINGS])

    def is_dead(self, local_rank: int) -> bool:
        """Return whether the worker at a place was found dead."""
        at = local_rank * PRESENCE_WORDS
        return bool(self.presence[at + DEAD]) and self.presence[at + DEAD] == self.presence[at + PID]

    def newcomer(self, local_rank: int) -> int:
        """Return the process that waits to come to a place; 0 for none."""
        at = local_rank * PRESENCE_WORDS
        ready = int(self.presence[at + READY])
        return ready if ready != self.presence[at + PID] else 0

    def deaths(self, step: int, index: int) -> int:
        """Return how many workers died while they had a micro-batch of `step`."""
        of_step, count = divmod(self._deaths[index], MAX_WORKERS)
        return int(count) if of_step == step + 1 else 0

    def count_death(self, step: int, index: int) -> None:
        """Count one more."""
        self._deaths[index] = (step + 1) * MAX_WORKERS + self.deaths(step, index) + 1

    def claimant(self, kind: Kind, item: int, step: int) -> int | None:
        """Return who has a piece of a step, None while nobody has."""
        claimed, local_rank = divmod(self.claims[kind][item], MAX_WORKERS)
        return local_rank if claimed == step + 1 else None


def claim_word(step: int, local_rank: int) -> int:
    """Return the word that claims a piece of `step`."""
    return (step + 1) * MAX_WORKERS + local_rank


def open_word(step: int, shape: Shape) -> int:
    """Return the word that opens a step."""
    return (step + 1) << 32 | shape.num_micro_batches << 2 | shape.is_audited << 1 | shape.measures


def opened(word: int) -> tuple[int, Shape]:
    """Return the step (-1 for none), and what it is like, of a word `open`."""
    return (word >> 32) - 1, Shape((word & 0xFFFFFFFF) >> 2, bool(word & 1), bool(word & 2))


def slot_word(node: Node) -> int:
    """Return the word of a slot that holds the sum `node`."""
    return node.first << 32 | node.end


def node_of(word: int) -> Node:
    """Return the node of a slot's word that is not 0."""
    return Node(word >> 32, word & 0xFFFFFFFF)
