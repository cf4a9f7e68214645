"""The claims board of a host: who has which micro-batch, which partial sums exist, who updates what.

A worker reports what it has finished and gets what to do next, in one visit under the team's lock: the board writes
`words` and asks the `rules`. A visit that ends a phase wakes those who wait for it.

A worker that died is buried by whoever finds it so: what it had in hand is free for others, and nobody waits for it.
Another one may be let in at its place, between two steps (`membership`).

The partial sums and their map belong to a step in progress: a worker reads them only while it holds a claim. What a
step came to is in the `ledger`, who is where in `presence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import final

from lightwork.errors import Disagreement
from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node
from lightwork.team.ledger import Ledger, Outcome
from lightwork.team.losses import Losses
from lightwork.team.membership import Membership
from lightwork.team.presence import Activity, Presence, Signal
from lightwork.team.proofs import Proofs
from lightwork.team.rules import (
    Action,
    Phase,
    Seat,
    next_action,
    other_settings,
    partial_sums,
    phases_of,
)
from lightwork.team.words import (
    AGAIN,
    ARRIVED,
    COMMITTED,
    ENTERED,
    EVALUATION,
    OPEN,
    PRESENCE_WORDS,
    SETTINGS,
    BoardSize,
    Kind,
    Shape,
    Words,
    claim_word,
    open_word,
    opened,
    slot_word,
)

_SHOWN = {
    Kind.COMPUTE: Activity.COMPUTING,
    Kind.AUDIT: Activity.UPDATING,
    Kind.MEASURE: Activity.UPDATING,
    Kind.UPDATE: Activity.UPDATING,
    Kind.EXCHANGE: Activity.EXCHANGING,
    Kind.AGREE: Activity.EXCHANGING,
    Kind.GATHER: Activity.EXCHANGING,
}

#: The kinds of which something may be written when a step begins again.
_UP_TO_EXCHANGE = (Kind.COMPUTE, Kind.EXCHANGE)


@final
class Board:
    """The board of one host, in `region`, which starts out as zeros; `rank` is the visitor."""

    def __init__(
        self,
        rank: int,
        roster: Roster,
        size: BoardSize,
        region: memoryview,
        lock: AbstractContextManager[bool | None],
        signal: Signal,
        *,
        steal: bool,
        sharded: bool = False,
    ) -> None:
        self._lock = lock
        self._signal = signal
        self._seat = Seat(roster, rank, size, sharded=sharded, steal=steal)
        self._words = Words(size, region)
        self.presence = Presence(self._words, roster, rank, lock, signal)
        self.ledger = Ledger(self._words, self._seat)
        self.losses = Losses(self._words, lock)
        self.membership = Membership(self._words, self._seat, lock, signal, self.losses)
        self.proofs = Proofs(self._words, self.membership, self._seat.local_rank, lock, signal, steal=steal)
        self._local_rank = self._seat.local_rank
        self._no_slots = memoryview(bytes(self._words.slots_of(0).nbytes)).cast("q")
        self._phases: tuple[Phase, ...] = ()
        self._shape = Shape(0, measures=False, is_audited=False)  # of what the phases are
        self._at = self._position = 0  # where the last action was found
        self.compares_settings = False  #: with those who are in a step, before it enters: a newcomer does
        self._known: tuple[int, ...] = (0,)  # of who is in: changes, and the hosts that are lost
        self._again = 0  # how often this worker has begun a step again

    @staticmethod
    def num_bytes(size: BoardSize) -> int:
        """Return the bytes of the region."""
        return Words.num_bytes(size)

    # --- a step, in the order of its visits -------------------------------------------------------------------------

    def enter(self, step: int, num_micro_batches: int, settings: int, *, measure: bool, audit: bool = False) -> Action:
        """Enter `step`, opening it if this is the first worker to, and return what to do.

        `settings` is a hash of all that must be the same everywhere, such as learning rates; `measure` says that the
        norm of the whole gradient must be known before the update, `audit` that one micro-batch is computed twice.

        Raises: Disagreement when the workers differ in it or in the number of micro-batches.
        """
        words, rank = self._words, self._seat.rank
        with self._lock:
            self._follow(step)
            self._again = words.header[AGAIN]
            open_step, shape = opened(words.header[OPEN])
            if open_step != step:
                shape = Shape(num_micro_batches, measure, audit)
                words.header[OPEN] = open_word(step, shape)
            elif shape.num_micro_batches != num_micro_batches:
                raise Disagreement(
                    f"step {step} has {num_micro_batches} micro-batches for rank {rank} and "
                    f"{shape.num_micro_batches} for another worker. Every worker must pass the same data set to "
                    "run.steps."
                )
            if self._shape != shape:
                self._shape = shape
                self._phases = phases_of(self._seat, shape)
            self._at = self._position = 0
            if self.compares_settings:
                self._compare_settings(step, settings)
            words.slots_of(self._local_rank)[:] = self._no_slots  # [Note: the order of a board's words]
            at = self._local_rank * PRESENCE_WORDS
            words.presence[at + SETTINGS] = settings
            words.presence[at + ENTERED] = step + 1
            return self._next(step, wrote=True)

    def _compare_settings(self, step: int, settings: int) -> None:
        """Raise Disagreement when this worker's settings are not those of the others that have entered `step`."""
        for local in self._seat.locals:
            if self._words.entered(local) == step and self._words.settings(local) != settings:
                raise other_settings(step, self._seat.rank, self._seat.name(local))
        self.compares_settings = False

    def finished_micro_batch(
        self, step: int, index: int, outcome: Outcome, *, freed: Sequence[int], slot: int, node: Node
    ) -> Action:
        """Record a computed micro-batch: what it came to, and the partial sum `node` that now lies in `slot`.

        `freed` are the slots whose sums went into it, held until now: [Note: lifetime of a partial sum].
        """
        words = self._words
        self.ledger.write_outcome(step, index, outcome)
        slots = words.slots_of(self._local_rank)
        with self._lock:
            slots[slot] = slot_word(node)  # [Note: the order of a board's words]
            words.done[Kind.COMPUTE][index] = step + 1
            for old in freed:
                slots[old] = 0
            return self._next(step, wrote=True)

    def finished_bucket(self, step: int, action: Action, norm_squared: float | None) -> Action:
        """Record a measured or updated bucket and the squared norm of its gradient, and return what to do."""
        kind, item = action
        if norm_squared is not None:
            self._words.norms[item] = norm_squared
        with self._lock:
            self._words.done[kind][item] = step + 1
            return self._next(step, wrote=True)

    def finished_phase(self, step: int, kind: Kind) -> Action:
        """Record that the phase `kind`, which is one piece of work, is done, and return what to do next.

        After `Kind.EXCHANGE` the sum over all hosts lies in the leader's last slot, in place of all partial sums.
        """
        with self._lock:
            self._words.done[kind][0] = step + 1
            return self._next(step, wrote=True)

    def begin_again(self, step: int) -> None:
        """Let `step`, of which nothing is updated, be computed anew by all workers of this host: each is told.

        The leader's, as everything that this host has computed of it was for an exchange that has failed.
        """
        words = self._words
        with self._lock:
            for kind in _UP_TO_EXCHANGE:
                _clear(words.claims[kind])
                _clear(words.done[kind])
            _clear(words.slots)
            words.header[AGAIN] += 1
            self._signal.notify()

    def visit(self, step: int) -> Action:
        """Return what to do now."""
        with self._lock:
            return self._next(step, wrote=False)

    def _next(self, step: int, *, wrote: bool) -> Action:
        """Claim what the visitor should do and return it; `wrote` says that this visit may have ended a phase."""
        words = self._words
        self._raise_if_failed()
        self._follow(step)
        if words.header[AGAIN] != self._again:
            self._again = words.header[AGAIN]
            self._at = self._position = 0
            return Action(Kind.AGAIN, 0)
        if words.header[COMMITTED] > step:
            return Action(Kind.COMMITTED, 0)
        before = self._at
        action, self._at, self._position = next_action(words, self._seat, step, self._phases, before, self._position)
        if wrote and self._at > before:
            self._signal.notify()
        kind, item = action
        if kind is Kind.WAIT:
            self.presence.show(Activity.WAITING, step)
            return Action(kind, self._signal.value)
        if kind is Kind.COMMITTED:
            words.header[COMMITTED] = step + 1
            return action
        words.claims[kind][item] = claim_word(step, self._local_rank)
        self.presence.show(_SHOWN[kind], item if kind is Kind.COMPUTE else step)
        return action

    # --- who is in --------------------------------------------------------------------------------------------------

    @property
    def roster(self) -> Roster:
        """Who is in, as of this worker's last visit."""
        return self._seat.roster

    def _follow(self, step: int) -> None:
        """Take note of who has died, and who has come."""
        known = self.membership.changes, *self.losses.before(step)
        if known == self._known:
            return
        self._known = known
        self._seat = self.ledger.seat = replace(self._seat, roster=self.membership.roster(step))
        if self._phases:
            self._phases = phases_of(self._seat, self._shape)
        self._position = 0  # what the dead had in hand is free

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Steps done so far, those before a resume included."""
        return int(self._words.header[COMMITTED])

    def resume_at(self, step: int) -> None:
        """Set the number of steps done so far. Nobody is in a step, nor visits before this is done."""
        words = self._words
        words.header[OPEN] = 0
        for array in (*words.claims, *words.done):  # the steps that they name may come again
            _clear(array)
        for local in range(self._seat.size.capacity):
            words.presence[local * PRESENCE_WORDS + ENTERED] = 0
            words.presence[local * PRESENCE_WORDS + ARRIVED] = 0
        words.header[COMMITTED] = step

    def partial_sums(self, step: int) -> dict[Node, tuple[int, int]]:
        """Return where the partial sums of this host lie: place of the worker and slot, by node."""
        return partial_sums(self._words, self._seat, step, self._shape.num_micro_batches)

    def take_evaluation(self, round_number: int) -> int:
        """Return the next batch of the evaluation `round_number` that nobody has. Hosts take them in turn."""
        header, seat = self._words.header, self._seat
        with self._lock:
            self._raise_if_failed()
            current, taken = divmod(header[EVALUATION], 1 << 32)
            if current != round_number:
                taken = 0
            header[EVALUATION] = (round_number << 32) + taken + 1
        hosts = seat.roster.hosts
        return int(taken) * len(hosts) + hosts.index(seat.host)

    def _raise_if_failed(self) -> None:
        failure = self.presence.failure()
        if failure is not None:
            raise failure


def _clear(words: memoryview) -> None:
    words[:] = memoryview(bytes(words.nbytes)).cast("q")
