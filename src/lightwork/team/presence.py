"""Who is where: what each worker of a host is doing, for those who wait for it and for messages."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Protocol, final

from lightwork.errors import RankFailed
from lightwork.spec.roster import Roster, full
from lightwork.team.words import ACTIVITY, ARRIVED, COMMITTED, FAILED, LEFT, PID, PRESENCE_WORDS, Words


class Signal(Protocol):
    """What the board needs of a transport's signal."""

    @property
    def value(self) -> int:
        """The number now."""

    def notify(self) -> None:
        """Change it and wake the waiting."""

    def wait_for_change(self, seen: int, timeout: float) -> bool:
        """Wait until it is not `seen` any more, at most `timeout` seconds; return whether it is not."""


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


@final
class Presence:
    """What this worker shows of itself, and what the others of its host show. They are named by their places there."""

    def __init__(
        self, words: Words, roster: Roster, rank: int, lock: AbstractContextManager[bool | None], signal: Signal
    ) -> None:
        self._words = words
        self._roster = full(roster)
        self._host = roster.host_of(rank)
        self._own = roster.local_rank(rank)
        self._at = self._own * PRESENCE_WORDS
        self._lock = lock
        self._signal = signal

    # --- of this worker -------------------------------------------------------------------------------------------

    def show(self, activity: Activity, detail: int = 0) -> None:
        """Say what this worker is doing, in one word."""
        self._words.presence[self._at + ACTIVITY] = detail << 8 | activity

    def announce(self, activity: Activity) -> None:
        """Say what this worker is doing, and wake those who may be waiting for just that."""
        with self._lock:
            self.show(activity)
            self._signal.notify()

    def set_left(self, *, left: bool) -> None:
        """Say that this worker has left its loop (or entered a new one)."""
        with self._lock:
            self._words.presence[self._at + LEFT] = int(left)
            self._signal.notify()

    def arrive(self, step: int) -> None:
        """Say that this worker has come to the end of the loop's body after `step`, and does not leave it there."""
        self._words.presence[self._at + ARRIVED] = step + 1

    def fail(self) -> None:
        """Say that this worker can not go on; every other one learns it at its next visit."""
        with self._lock:
            if not self._words.header[FAILED]:
                self._words.header[FAILED] = self._own + 1
            self._signal.notify()

    # --- of the others ----------------------------------------------------------------------------------------------

    def activity(self, local_rank: int) -> Activity:
        """Return what a worker is doing."""
        return _activity(self._words, local_rank)

    def waits_in_open_step(self, local_rank: int) -> bool:
        """Return whether a worker waits in a step that is not done yet."""
        step, activity = divmod(self._words.presence[local_rank * PRESENCE_WORDS + ACTIVITY], 256)
        return activity == Activity.WAITING and step >= self._words.header[COMMITTED]

    def pid(self, local_rank: int) -> int:
        """Return the process of a worker; 0 before it joined."""
        return int(self._words.presence[local_rank * PRESENCE_WORDS + PID])

    def entered(self, local_rank: int) -> int:
        """Return the last step that a worker has entered, -1 for none."""
        return self._words.entered(local_rank)

    def has_arrived(self, local_rank: int, step: int) -> bool:
        """Return whether a worker has come to the end of the loop's body after `step`."""
        return bool(self._words.presence[local_rank * PRESENCE_WORDS + ARRIVED] > step)

    def has_left(self, local_rank: int) -> bool:
        """Return whether a worker has left its loop."""
        return _has_left(self._words, local_rank)

    def anyone_left(self) -> bool:
        """Return whether any worker that is in has left its loop."""
        places = self._roster.local_ranks(self._host)
        return any(self.has_left(local) and not self._words.is_dead(local) for local in places)

    def describe_worker(self, local_rank: int) -> str:
        """Return who a worker is and what it is doing, for a message."""
        detail, activity = divmod(self._words.presence[local_rank * PRESENCE_WORDS + ACTIVITY], 256)
        doing = {
            Activity.OUTSIDE: "is in code outside run.steps",
            Activity.BETWEEN: f"is in code after step {self.entered(local_rank)}",
            Activity.COMPUTING: f"computes micro-batch {detail} of step {self.entered(local_rank)}",
            Activity.WAITING: f"waits in step {detail}",
            Activity.UPDATING: f"updates weights in step {detail}",
            Activity.MEETING: "is in a collective call",
            Activity.ENDED: "has ended",
            Activity.EXCHANGING: f"exchanges gradients with the other hosts in step {detail}",
        }[Activity(activity)]
        return f"rank {self._roster.rank_of(self._host, local_rank)} (pid {self.pid(local_rank)}) {doing}"

    def failure(self) -> RankFailed | None:
        """Return the reason to end when another worker has said that it can not go on."""
        failed = self._words.header[FAILED] - 1
        if failed < 0 or failed == self._own:
            return None
        name = self._roster.rank_of(self._host, self._own)
        return RankFailed(f"rank {name} ends because {self.describe_worker(failed)} and failed; see its traceback.")


def is_excused(words: Words, local_rank: int) -> bool:
    """Return whether a worker that has not entered a step does not read weights before its next collective call."""
    return _has_left(words, local_rank) and _activity(words, local_rank) in (Activity.MEETING, Activity.ENDED)


def _activity(words: Words, local_rank: int) -> Activity:
    return Activity(words.presence[local_rank * PRESENCE_WORDS + ACTIVITY] & 0xFF)


def _has_left(words: Words, local_rank: int) -> bool:
    return bool(words.presence[local_rank * PRESENCE_WORDS + LEFT])
