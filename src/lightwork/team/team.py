"""What a worker holds of its team: meeting the others, and watching them while it waits.

A watch raises nothing: it returns why waiting has become pointless, an error as a value, and the one who waits decides.
A death is such a reason only where the team can not do without the worker; else it is buried, and the wait goes on.
Another process may come to its place (`newcomer`).

    [Note: who is there]
    All must agree on who does what in a collective call, and a death is seen by one sooner than by another. But what
    a meeting came to is the same for everyone (`transport/mailboxes`), so a team's roster is that of its last meeting.
    Who leads by it may be dead by then; then what it should have done is done again by the next (`by_leader`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import final

from lightwork.errors import Disagreement, RankLost, TeamError
from lightwork.notice import notice
from lightwork.spec.roster import Roster, full, of_those_there
from lightwork.store.mapped import MappedStore
from lightwork.team.board import Board
from lightwork.team.hosts import Hosts
from lightwork.team.meeting_point import JOIN_TIMEOUT
from lightwork.team.newcomer import Newcomer, Welcome
from lightwork.team.peers import Peers
from lightwork.team.presence import Activity
from lightwork.team.rendezvous import IfKilled, Progress, Rendezvous
from lightwork.transport.base import Transport, Watch
from lightwork.transport.late import Lateness
from lightwork.transport.mailboxes import HostTransport

#: Seconds between two looks whether others have arrived, and whether they live. It is rare, and need not be quick.
ARRIVAL_POLL, ARRIVAL_LOOK = 0.001, 0.05

_SAME_CALLS = "Every worker must make the same calls: take them out of conditions such as `if run.is_main`."


@final
class Team:
    """The workers of a run, as one of them sees them.

    Owns: the memory of this host; until `close`, a descriptor of each other process of this host, and the leader's
    connections.
    """

    def __init__(
        self,
        rank: int,
        roster: Roster,
        board: Board,
        mailboxes: HostTransport,
        transport: Transport,
        rendezvous: Rendezvous,
        stores: Sequence[MappedStore],
        hosts: Hosts,
    ) -> None:
        """`mailboxes` are those of this host, `transport` is that of all; `hosts` are as their leader sees them."""
        self.rank = rank
        self.roster = roster  #: as of the last meeting: [Note: who is there]
        self.newcomer: Newcomer | None = None  #: as long as this worker is one
        self.is_in = True  #: not so a newcomer, and who has left
        self.welcome = Welcome(rank, board, mailboxes)
        self._first = full(roster)
        self.may_lose = False  #: a worker that dies, and go on
        self.lease = 0.0  #: seconds that a worker may be stopped while others wait, before it is ended; 0 for any
        self._stopped_since: dict[int, float] = {}  # by place, as far as this worker has seen
        self.board = board
        self.presence = board.presence
        self._stores = stores  # kept open: a descriptor is also the lock's, and newcomers open both
        self.local_rank = roster.local_rank(rank)
        self._mailboxes = mailboxes
        self._transport = transport
        self.rendezvous = rendezvous
        self.hosts = hosts
        self._host = roster.host_of(rank)
        self._names = dict(enumerate(self._first.ranks(self._host)))
        self._peers = Peers()
        self._lateness = Lateness()

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self.roster.world_size

    @property
    def is_main(self) -> bool:
        """Whether this worker speaks for the team, and its output is shown, for all that it knows of who is there."""
        return self.rank == self.board.roster.main

    @property
    def is_leader(self) -> bool:
        """Whether this worker speaks for its host."""
        return self.roster.is_leader(self.rank)

    def report(self, progress: Progress) -> None:
        """Tell the launcher how far this worker got; a newcomer has not got anywhere yet."""
        if self.newcomer is None:
            self.rendezvous.report(progress)

    def begin(self, *, elastic: bool) -> None:
        """Be a worker as the others are: at the end of `distribute`; a newcomer, when it has entered its first step.

        The launcher is told what becomes of the team from here on if this worker is killed. `elastic` says that it is
        to go on, be it from a checkpoint.
        """
        self.hosts.may_lose = self.hosts.carrier.may_come_together
        if self.may_lose:
            follows = IfKilled.REPLACED
        elif self.hosts.may_lose:
            follows = IfKilled.DONE_WITHOUT
        else:
            follows = IfKilled.BEGUN_AGAIN if elastic and self.world_size > 1 else IfKilled.ENDED
        self.rendezvous.report_if_killed(follows)
        if self.newcomer is not None:
            self.newcomer, self.is_in = None, True
            self.report(Progress.TRAINING)

    def say(self, text: str) -> None:
        """Tell the user something that is not an error, once: the main worker does."""
        if self.is_main:
            notice(text)

    def close(self) -> None:
        """Let go of the others: descriptors and connections."""
        self._peers.close()
        self.hosts.carrier.close()

    # --- meeting ----------------------------------------------------------------------------------------------------

    def meet(self, what: str, payload: bytes = b"") -> list[bytes]:
        """Exchange payloads with every worker; a barrier. `what` names the collective call.

        Raises: Disagreement, RankLost or RankFailed when not all will come.
        """
        if self.newcomer is not None:
            raise self.newcomer.can_not_meet(what)
        self.presence.announce(Activity.MEETING)
        received = self._transport.exchange(what, payload, self._watch(f"in {what}", self._missing_from_meeting))
        self.presence.show(Activity.OUTSIDE)
        there = [payload is not None for payload in received]
        if there != [rank in self.roster.living for rank in self._first.living]:
            self.roster = of_those_there(self._first, there, self.roster.generation + 1)
        return [payload for payload in received if payload is not None]

    def meet_main(self, what: str, payload: bytes = b"") -> bytes:
        """Meet, and return what the main worker has to say."""
        return self.meet(what, payload)[0]

    def by_leader(self, what: str, work: Callable[[], bytes]) -> bytes:
        """Let the leader of each host do something between two meetings; return what the main worker's came to.

        `work` may be done again from its beginning by another worker, where the one that was at it has died.
        """
        while True:
            leader = self.roster.leader(self._host)
            result = work() if leader == self.rank else b""
            main = self.roster.main
            received = self.meet(what, result)
            if main in self.roster.living:
                return received[self.roster.living.index(main)]

    def meet_first(self) -> None:
        """Meet for the first time, when a worker that will never come can not be watched yet; then watch all.

        Raises: RankLost when one has not come after `JOIN_TIMEOUT` seconds.
        """
        deadline = time.monotonic() + JOIN_TIMEOUT

        def look() -> TeamError | None:
            missing = [local for local in self._others() if not self.presence.pid(local)]
            if not missing or time.monotonic() <= deadline:
                return None
            rank = self._name(missing[0])
            return RankLost(
                f"rank {rank} has not called lightwork.distribute, {JOIN_TIMEOUT:.0f} s after rank {self.rank}. Every "
                "worker must reach it; see the log of that worker.",
                rank,
            )

        self.presence.announce(Activity.MEETING)
        self._transport.exchange("distribute", b"", look)
        self._watch_others()

    def meet_equal(self, what: str, values: dict[str, object]) -> None:
        """Meet, and raise Disagreement naming the first value in which a worker differs from the main one."""
        received = [json.loads(payload) for payload in self.meet(what, json.dumps(values).encode())]
        for rank, theirs in zip(self.roster.living, received, strict=True):
            compare(what, received[0], theirs, rank, self.roster.main)

    def wait_for_arrivals(self, step: int) -> bool:
        """Wait until every other worker of this host has come here after `step`, or has left its loop instead.

        Returns: whether all have come; the same on every one that has.
        Raises: RankLost, RankFailed where one can do neither.
        """
        self.presence.arrive(step)
        watch = self.watch_step(step)
        next_look = time.monotonic() + ARRIVAL_LOOK
        while True:
            others = self._others()
            if all(self.presence.has_arrived(local, step) or self.presence.has_left(local) for local in others):
                return not any(self.presence.has_left(local) for local in others)
            time.sleep(ARRIVAL_POLL)
            if time.monotonic() > next_look:
                next_look = time.monotonic() + ARRIVAL_LOOK
                reason = watch()
                if reason is not None:
                    raise reason

    # --- watching ---------------------------------------------------------------------------------------------------

    def watch_step(self, step: int) -> Watch:
        """Return what to call while waiting in `step`, from the beginning of the wait on."""
        return self._watch(f"in step {step}", lambda: self._missing_from_step(step))

    def _watch(self, where: str, look: Watch) -> Watch:
        """Return a watch that begins now: over failures, over what `look` sees, and over those that are late."""
        since = time.monotonic()
        self._stopped_since.clear()  # it may have gone on since

        def watch() -> TeamError | None:
            reason: TeamError | None = self.presence.failure()
            if reason is None:
                self._bury_the_dead()
                self._end_the_stopped(where)
                reason = look()
            if reason is None:
                self._name_late(where, since)
            return reason

        return watch

    def _name_late(self, where: str, since: float) -> None:
        there = (Activity.WAITING, Activity.MEETING)
        busy = [local for local in self._others() if self.presence.activity(local) not in there]
        if busy and self._lateness.is_due(self.rank, since, time.monotonic()):
            doing = "; ".join(map(self._describe, busy))
            notice(f"rank {self.rank} waits {where} for: {doing}.")

    def _bury_the_dead(self) -> None:
        """Bury the workers that were killed, where the team goes on without them."""
        if not self.may_lose:
            return
        for local in self._peers.ended():
            if self.presence.activity(local) is not Activity.ENDED:
                self.board.membership.bury(local, self._peers.pid(local))
                self._peers.forget(local)
        self._watch_others()

    def _watch_others(self) -> None:
        """Watch the processes of the others: where one has died there may be another one by now."""
        for local in self._others():
            self._peers.watch(local, self.presence.pid(local))

    def _lost(self) -> list[int]:
        """Return the places of workers that have ended and will not be buried."""
        ended = self._peers.ended()  # one that was killed just now will be, at the next look
        others = self._others()
        return [
            at for at in ended if not self.may_lose or (at in others and self.presence.activity(at) is Activity.ENDED)
        ]

    def _end_the_stopped(self, where: str) -> None:
        """End a worker that has been stopped for too long: it would write again, in memory that is the others', too.

        Time is this process's own, counted while it waits.
        """
        if not (self.may_lose and self.lease):
            return
        now = time.monotonic()
        for local in self._others():
            if not self._peers.stopped(local):
                self._stopped_since.pop(local, None)
            elif now - self._stopped_since.setdefault(local, now) >= self.lease:
                notice(
                    f"rank {self._name(local)} (pid {self.presence.pid(local)}) is ended: it was stopped for "
                    f"{now - self._stopped_since[local]:.1f} s while rank {self.rank} waited {where}. To wait for "
                    "stopped workers: --set lease=0."
                )
                self._peers.kill(local)

    def lock_is_held(self, pid: int, seconds: float) -> None:
        """Name the worker that holds the lock of the team's memory for so long, and end it if it is stopped."""
        self._watch_others()  # it may have come since this worker last waited for something else
        local = next((local for local in self._others() if self.presence.pid(local) == pid), None)
        if local is not None and self._peers.stopped(local):
            self._end_the_stopped("for the lock of the team's memory, which it holds")
        if self._lateness.is_due(self.rank, time.monotonic() - seconds, time.monotonic()):
            who = f"pid {pid}" if local is None else self._describe(local)
            notice(f"rank {self.rank} has waited {seconds:.0f} s for the lock of the team's memory, held by: {who}.")

    def _missing_from_step(self, step: int) -> TeamError | None:
        presence = self.presence
        for local in self._lost():
            if not presence.has_left(local):
                return RankLost(
                    f"rank {self._name(local)} (pid {presence.pid(local)}) is gone; rank {self.rank} needs it in "
                    f"step {step}. Its process ended in the middle of training; see its log.",
                    self._name(local),
                )
        for local in self._others():
            # Only in an exchange that this worker has not entered: otherwise it is just slow to wake from one.
            calls_alone = presence.activity(local) is Activity.MEETING and self._mailboxes.is_ahead(local)
            entered = presence.entered(local)
            if calls_alone and entered < step and not presence.has_left(local):
                return Disagreement(
                    f"rank {self._name(local)} calls {self._mailboxes.posted_last(local)} after step {entered} while "
                    f"rank {self.rank} is in step {step}. {_SAME_CALLS}"
                )
        return None

    def _missing_from_meeting(self) -> TeamError | None:
        presence = self.presence
        missing = self._mailboxes.missing()
        for local in self._lost():
            if local in missing:
                return RankLost(
                    f"rank {self._name(local)} (pid {presence.pid(local)}) has ended while rank {self.rank} "
                    f"waits for it in a collective call. {_SAME_CALLS}",
                    self._name(local),
                )
        for local in missing:
            # Only in a step that is still open: otherwise it is just slow to wake from its end.
            if presence.waits_in_open_step(local) and not presence.has_left(self.local_rank):
                return Disagreement(
                    f"rank {self.rank} is in a collective call (save, digest, evaluate, ...) while "
                    f"{presence.describe_worker(local)}. {_SAME_CALLS}"
                )
        return None

    def _describe(self, local_rank: int) -> str:
        """Return who a worker is, what it is doing, and whether it is stopped."""
        described = self.presence.describe_worker(local_rank)
        return f"{described} (stopped)" if self._peers.stopped(local_rank) else described

    def _others(self) -> list[int]:
        """Return the places of the other workers of this host that are not known to be dead."""
        return self.board.membership.others()

    def _name(self, local_rank: int) -> int:
        """Return the rank of a worker of this host."""
        return self._names[local_rank]


def compare(what: str, ours: dict[str, object], theirs: dict[str, object], rank: int, main: int) -> None:
    """Raise Disagreement naming the first value in which `rank` differs from `main`, whose values are `ours`."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise Disagreement(
                f"rank {rank} differs from rank {main} at {what} in its {name}: {_short(theirs.get(name))} against "
                f"{_short(value)}. All workers must run the same script on the same data with the same settings; "
                "nothing in it may depend on the rank."
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else text[:300] + "..."
