"""Who is in a host's team, in words of its board: who died is buried, and who waits at its place is let in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import final

from lightwork.spec.roster import Roster, full, with_only, without_hosts
from lightwork.team.losses import Losses
from lightwork.team.presence import Activity, Signal
from lightwork.team.rules import Seat, freed_by_death, phases_of
from lightwork.team.words import (
    ACTIVITY,
    ARRIVED,
    CHANGES,
    COMMITTED,
    DEAD,
    HANDOVER,
    LEFT,
    OPEN,
    OWES,
    PID,
    PRESENCE_WORDS,
    PROVEN,
    READY,
    SINCE,
    Kind,
    Words,
    opened,
)

#: The process at a place that was never taken: it counts as dead.
_NOBODY = -1


@final
class Membership:
    """The places of a host; they are named by their numbers there."""

    def __init__(
        self, words: Words, seat: Seat, lock: AbstractContextManager[bool | None], signal: Signal, losses: Losses
    ) -> None:
        """`seat` is that of this worker as the team begins."""
        self._words = words
        self._founders = seat.roster
        self._first = replace(seat, roster=full(seat.roster))
        self._lock = lock
        self._signal = signal
        self._losses = losses

    def found(self, pid: int) -> None:
        """Put this worker on the board, as one of the first; and nobody at the places that are not taken yet."""
        for local in self._first.locals:
            if self._founders.places[self._first.host][local] is None:
                at = local * PRESENCE_WORDS
                self._words.presence[at + DEAD] = self._words.presence[at + PID] = _NOBODY
        self._words.presence[self._first.local_rank * PRESENCE_WORDS + PID] = pid

    # --- who is there -----------------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """How often somebody has gone or come."""
        return int(self._words.header[CHANGES])

    def roster(self, step: int) -> Roster:
        """Return who is in `step`, for all that is known now."""
        living = [local for local in self._first.locals if not self._words.is_dead(local)]
        roster = with_only(self._first.roster, self._first.host, living, self.changes)
        return without_hosts(roster, self._losses.before(step), self.changes)

    def others(self) -> list[int]:
        """Return the places of those who are in but for this worker's."""
        own = self._first.local_rank
        return [local for local in self._first.locals if local != own and not self._words.is_dead(local)]

    def is_dead(self, local_rank: int) -> bool:
        """Return whether a worker was found dead, and nobody has come to its place."""
        return self._words.is_dead(local_rank)

    def is_expected(self, local_rank: int, number: int) -> bool:
        """Return whether a worker takes part in that exchange of all: one that is dead, or came after it, does not."""
        since = self._words.presence[local_rank * PRESENCE_WORDS + SINCE]
        return not self._words.is_dead(local_rank) and bool(since < number)

    def has_company(self, step: int) -> bool:
        """Return whether any other worker has entered `step`, or all have left their loops."""
        words, others = self._words, self.others()
        return any(words.entered(local) >= step for local in others) or all(
            words.presence[local * PRESENCE_WORDS + LEFT] for local in others
        )

    # --- who goes, and who comes ------------------------------------------------------------------------------------

    def bury(self, local_rank: int, pid: int) -> None:
        """Take a worker that has died out of the team: see [Note: the order of a board's words].

        Nothing happens if another process than `pid` is at its place by now.
        """
        with self._lock:
            if self._words.presence[local_rank * PRESENCE_WORDS + PID] == pid:
                self._bury(local_rank)
                self._signal.notify()

    def retire(self) -> bool:
        """Take this worker, which is between two steps, out of the team; return False if it is the last one."""
        with self._lock:
            if not self.others():
                return False
            self._bury(self._first.local_rank)
            self._signal.notify()
        return True

    def wait_to_come(self) -> None:
        """Say that this process waits to be let in at its place."""
        self._words.presence[self._first.local_rank * PRESENCE_WORDS + READY] = os.getpid()

    def refuse(self, step: int) -> None:
        """Send away who waits: it can not be told what it needs to know."""
        for local in self.newcomers(step):
            self._words.presence[local * PRESENCE_WORDS + READY] = 0

    @property
    def is_refused(self) -> bool:
        """Whether this process, which has waited, was sent away."""
        return not self._words.presence[self._first.local_rank * PRESENCE_WORDS + READY]

    def newcomers(self, step: int) -> list[int]:
        """Return the places to which a process waits to come, and can before `step`."""
        words = self._words  # what one that died in this step has left is still needed
        return [local for local in self._first.locals if words.newcomer(local) and words.entered(local) < step]

    def admit(self, step: int, since: int, handover: int) -> list[int]:
        """Let newcomers in before `step`, and return their places. See [Note: the order of a board's words].

        The caller has not entered the step, so nothing of it is updated.

        Args:
            since: the last exchange without them.
            handover: where they find what they need to know.
        """
        words, admitted = self._words, []
        with self._lock:
            if words.header[COMMITTED] != step:
                return []
            for local in self.newcomers(step):
                if not words.is_dead(local):
                    self._bury(local)
                at = local * PRESENCE_WORDS
                words.header[HANDOVER] = handover
                words.header[PROVEN] = step + 1
                words.presence[at + SINCE] = since
                words.presence[at + OWES] = 1
                words.presence[at + ACTIVITY] = Activity.OUTSIDE
                words.presence[at + ARRIVED] = step
                words.presence[at + PID] = words.newcomer(local)
                words.header[CHANGES] += 1
                admitted.append(local)
            self._signal.notify()
        return admitted

    @property
    def handover(self) -> int:
        """Where a newcomer that was let in finds what it needs to know."""
        return int(self._words.header[HANDOVER])

    def _bury(self, local_rank: int) -> None:
        words, at = self._words, local_rank * PRESENCE_WORDS
        step, shape = opened(words.header[OPEN])
        if step >= words.header[COMMITTED]:
            phases = phases_of(self._first, shape)
            for kind, item in freed_by_death(words, local_rank, step, phases):
                if kind is Kind.COMPUTE:
                    words.count_death(step, item)
                words.claims[kind][item] = 0
        words.presence[at + LEFT] = 0
        words.presence[at + DEAD] = words.presence[at + PID]
        words.header[CHANGES] += 1
