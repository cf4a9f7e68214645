"""A process that comes to a team that trains, at the place of a worker that has died; and who lets it in.

It makes everything that a worker has, up to the end of `distribute`, in memory that is there; says that it is ready;
and waits. The senior, the first worker that is there, lets it in before it enters a step: it hands over what a worker
knows beside the shared memory. Nobody is past that step's micro-batches before the senior has entered it, nor from then
on before the newcomer has: so weights and state stay as they are while it goes on to its loop, as a run that is
resumed.

Until it has entered that step, nothing that it does may touch the team. What goes wrong in it ends it alone, and the
others, who may have been waiting for it, find it dead. Before it computes anything of its own it shows that it
computes what they do (`proofs`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import final

from lightwork.errors import CanNotJoin, LightworkError, RankLost
from lightwork.notice import notice
from lightwork.team.board import Board
from lightwork.team.peers import Peers
from lightwork.team.presence import Activity
from lightwork.transport.mailboxes import WATCH_SECONDS, HostTransport
from lightwork.transport.signal import Signal

#: More descriptors than a process has: a process and one of its descriptors are one word.
_FDS = 1 << 32


@final
class Newcomer:
    """What a process is until it has entered its first step."""

    def __init__(self, rank: int, local_rank: int, board: Board, mailboxes: HostTransport, signal: Signal) -> None:
        self._rank = rank
        self._local_rank = local_rank
        self._board = board
        self._mailboxes = mailboxes
        self._signal = signal
        board.compares_settings = True

    def wait_until_let_in(self) -> str:
        """Return the path of the file in which it is handed over what it needs to know.

        Raises: RankLost, RankFailed when nobody is there any more who could let it in; CanNotJoin when they can not.
        """
        presence = self._board.presence
        self._board.membership.wait_to_come()
        self._wait_until(lambda: presence.pid(self._local_rank) == os.getpid())
        pid, fd = divmod(self._board.membership.handover, _FDS)
        return f"/proc/{pid}/fd/{fd}"

    def wait_for_another(self, step: int) -> None:
        """Wait until another worker has entered `step`, or will not: its settings are then there to compare with.

        Raises: RankLost, RankFailed as `wait_until_let_in`.
        """
        self._wait_until(lambda: self._board.membership.has_company(step))

    def take_count(self, exchanges: int) -> None:
        """Take part in exchanges from the one after these on."""
        self._mailboxes.count = exchanges

    def can_not_meet(self, what: str) -> CanNotJoin:
        """Return the error of a collective call before the first step, which the others do not make."""
        return CanNotJoin(
            f"rank {self._rank} was to take the place of a worker that has died, and its script calls {what} before it "
            "comes to the loop in which the others are. They made that call before, and do not make it again."
        )

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        peers = Peers()
        try:
            while True:
                seen = self._signal.value
                if is_so():
                    return
                self._look_after_others(peers)
                self._signal.wait_for_change(seen, WATCH_SECONDS)
        finally:
            peers.close()

    def _look_after_others(self, peers: Peers) -> None:
        """Raise an error when nobody is there any more, or wants this process."""
        if self._board.membership.is_refused:
            raise CanNotJoin(
                f"rank {self._rank} can not come: what the script keeps can not be handed over (a notice of the others "
                "says why)."
            )
        presence, others = self._board.presence, self._board.membership.others()
        failure = presence.failure()
        if failure is not None:
            raise failure
        for local in others:
            peers.watch(local, presence.pid(local))
        ended = peers.ended()
        if all(local in ended or presence.activity(local) is Activity.ENDED for local in others):
            raise RankLost(f"rank {self._rank} came too late: the others have ended.")


@final
class Welcome:
    """What a worker does for newcomers."""

    def __init__(self, rank: int, board: Board, mailboxes: HostTransport) -> None:
        self._rank = rank
        self._board = board
        self._mailboxes = mailboxes
        self._given: list[tuple[int, int, list[int]]] = []  # descriptors, with the step, and the places of who reads

    def let_in(self, step: int, hand_over: Callable[[int], int]) -> None:
        """Before this worker enters `step`: let in who waits, if that falls to this worker.

        Args:
            hand_over: writes what they need to know, given the exchanges so far, and returns a descriptor.
        """
        membership, presence = self._board.membership, self._board.presence
        for given in list(self._given):
            fd, since, places = given
            if all(membership.is_dead(local) or presence.entered(local) >= since for local in places):
                self._given.remove(given)
                os.close(fd)
        if self._rank != self._board.roster.main or not membership.newcomers(step):
            return
        try:
            fd = hand_over(self._mailboxes.count)
        except (LightworkError, OSError) as error:  # as a save would; training goes on
            notice(f"nobody can be let in: {error}")
            membership.refuse(step)
            return
        places = membership.admit(step, self._mailboxes.count, os.getpid() * _FDS + fd)
        self._given.append((fd, step, places))
        for local in places:
            notice(f"{presence.describe_worker(local).partition(')')[0]}) is there, from step {step} on.")
