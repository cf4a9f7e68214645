"""Supervision: waits for the workers of a team, passes on the main one's output, and ends all when one fails.

What counts as a failure: a status other than 0, a signal, and an end with status 0 in the middle of training, in
`distribute`, or before a call of it that others have made. The first failure decides; a worker that says that it
ended only because of another (EXIT_BECAUSE_OF_PEER) is believed for a moment, in which the other is looked for.

A worker that was killed by a signal is no failure where the others go on without it, as long as one of them does.
Another process takes its place (`replacing`): until it has come to where the others are, its end is no failure either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Protocol

from lightwork.errors import EXIT_BECAUSE_OF_PEER
from lightwork.launcher.ended import Ended
from lightwork.launcher.output import Output, Process
from lightwork.launcher.process import group_lives, kill_group
from lightwork.launcher.replacing import RESTARTS, Replacing
from lightwork.launcher.requests import Requests
from lightwork.spec.roster import FIRST_RANK
from lightwork.team.page import Page
from lightwork.team.rendezvous import IfKilled, Progress

#: Seconds between SIGTERM and SIGKILL after a failure, and after an interruption.
GRACE_AFTER_FAILURE = 2.0
GRACE_AFTER_INTERRUPT = 5.0

#: Seconds for which what a worker leaves running may go on: Python's resource tracker frees its shared memory then.
GRACE_AFTER_END = 0.5

#: Seconds in which the cause is looked for when a worker says that another one failed.
CAUSE_WINDOW = 1.0

#: Seconds between two ticks of the display.
TICK = 0.25


#: Of those who are in the team no more, whatever becomes of them.
_OUT = (Progress.RETIRED, Progress.TURNED_AWAY)


class Start(Protocol):
    """Starts a worker."""

    def __call__(self, rank: int, *, joins: bool) -> BaseProcess:
        """Return a new process of a rank; with `joins`, one that comes to a team that trains."""


class Display(Protocol):
    """Where output and progress go."""

    def write_out(self, data: bytes) -> None:
        """Show the main worker's standard output."""

    def write_error(self, data: bytes) -> None:
        """Show the main worker's standard error."""

    def tick(self) -> None:
        """Refresh; called some times a second."""


@dataclass(frozen=True)
class Outcome:
    """How a team ended."""

    ended: tuple[Ended, ...]
    culprit: Ended | None  #: the first failure, None when all went well
    interrupted: int | None  #: the signal that this process was sent, where that has ended the team
    signalled: int | None = None  #: any signal that it was sent
    shown: Collection[int] = ()  #: the ranks whose output was shown


class Supervisor:
    """The workers of one team, from the fork to the end of the last."""

    def __init__(
        self,
        page: Page,
        display: Display,
        *,
        restarts: int = RESTARTS,
        requests: Requests | None = None,
    ) -> None:
        """Supervise a team.

        Args:
            restarts: how often in succession the place of a worker that was killed is given to another process.
            requests: to change the number of workers while they train.
        """
        self._page = page
        self._display = display
        self._requests = requests
        self._start: Start | None = None
        self._num_workers = 0
        self._replacing = Replacing(page, restarts)
        self._running: dict[int, BaseProcess] = {}
        self._leftovers: list[tuple[BaseProcess, float]] = []
        self._ended: list[Ended] = []
        self._culprit: Ended | None = None
        self._interrupted: int | None = None
        self._signalled: int | None = None  # also where there is a culprit already
        self.output = Output(self._tell)
        self._lost: set[Process] = set()  # that were killed or left, and the others went on without
        self._going: set[Process] = set()  # that were told to
        self._kill_at: float | None = None
        self._judge_at: float | None = None

    def run(self, start: Start, num_workers: int, timeout: float | None = None) -> Outcome:
        """Start workers, in the order of ranks, and wait until every one has ended.

        A signal that comes while they are started is heard; if one can not be started, those that were are killed.

        Blocks: at most `timeout` seconds, then they are killed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        before = self._catch_signals()
        try:
            self._start_all(start, num_workers)
            while self._running:
                self.output.pass_on(TICK)
                self._reap()
                self._look_at_newcomers()
                self._hear_requests()
                now = time.monotonic()
                if self._judge_at is not None and now > self._judge_at:
                    self._judge()
                if self._kill_at is not None and now > self._kill_at:
                    self._send(signal.SIGKILL)
                if deadline is not None and now > deadline:
                    self._send(signal.SIGKILL)
                self._end_leftovers(now)
                self._display.tick()
            self._judge()
            self.output.drain()
        finally:
            for worker in self._running.values():
                kill_group(worker, signal.SIGKILL)
                worker.join()
            while any(group_lives(worker) for worker, _ in self._leftovers):
                self._end_leftovers(time.monotonic())
                time.sleep(0.01)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            self.output.close()
        by_rank = tuple(sorted(self._ended, key=lambda ended: ended.rank))
        shown = {rank for rank, _ in self.output.shown}
        return Outcome(by_rank, self._culprit, self._interrupted, self._signalled, shown)

    def _tell(self, text: str) -> None:
        self._display.write_error(f"lightwork: {text}\n".encode())

    def _start_all(self, start: Start, num_workers: int) -> None:
        self._start = start
        for rank in range(num_workers):
            if self._interrupted is not None:
                break
            self._running[rank] = start(rank, joins=False)
            self._num_workers += 1
        if self._interrupted is not None:  # the signal found only those that were there
            self._end(GRACE_AFTER_INTERRUPT)

    def _reap(self) -> None:
        for rank, worker in list(self._running.items()):
            status = worker.exitcode
            if status is None:
                continue
            del self._running[rank]
            self._leftovers.append((worker, time.monotonic() + GRACE_AFTER_END))
            ended = Ended(
                rank=rank,
                pid=worker.pid or 0,
                status=status,
                progress=self._page.progress(rank),
                if_killed=self._page.if_killed(rank),
                life=self._replacing.life(rank),
                at=time.monotonic(),
            )
            if rank in self._replacing.coming and not self._replacing.has_come(rank):
                self._give_up(ended)
            else:
                self._ended.append(ended)
        # One that ended may become a failure later: when another one reaches a `distribute` that it did not.
        failures = [ended for ended in self._ended if self._is_failure(ended)]
        self._tell_of_deaths(failures)
        if any(ended.status != EXIT_BECAUSE_OF_PEER for ended in failures):
            self._judge_at = 0.0
        elif failures and self._judge_at is None:
            self._judge_at = time.monotonic() + CAUSE_WINDOW

    def _tell_of_deaths(self, failures: Sequence[Ended]) -> None:
        """Say once of each worker that was killed that the others go on, and show the output of the first of them."""
        for ended in self._ended:
            process = ended.rank, ended.life
            if process in self._lost or ended in failures or self._kill_at is not None:
                continue
            if ended.progress is Progress.RETIRED:
                self._lost.add(process)
                self._tell(f"rank {ended.rank} (pid {ended.pid}) has left, as it was told. The others go on.")
            elif ended.progress is Progress.TURNED_AWAY:
                self._lost.add(process)
                self._tell(f"{ended.describe_end()} The others go on. Its place stays empty; see its log.")
            elif ended.status < 0:
                self._lost.add(process)
                text, follows = f"{ended.describe_end()} The others go on.", self._replace(ended.rank)
                if ended.rank == FIRST_RANK and ended.rank not in self._running:
                    text += " It was the main one: what a script does if run.is_main is not done any more."
                self._tell(f"{text} {follows}".rstrip())
        if self.output.shown <= self._lost and self._members:
            rank = min(self._members)
            self.output.shown.add((rank, self._replacing.life(rank)))

    def life(self, rank: int) -> int:
        """Return how many processes were at a place before the one that is there, or is being started."""
        return self._replacing.life(rank)

    @property
    def _members(self) -> list[int]:
        """The ranks of those that run and are in the team."""
        return [rank for rank in self._running if rank not in self._replacing.coming]

    def _takes_others(self, members: Sequence[int]) -> bool:
        """Return whether other processes can come to a team of these."""
        return all(self._page.if_killed(rank) is IfKilled.REPLACED for rank in members)

    def _replace(self, rank: int) -> str:
        """Let another process come to a place, if it can; return what there is to say of it."""
        if self._interrupted is not None or not self._members:
            return ""
        if not self._takes_others(self._members):
            return "Its place stays empty: where workers have memories of their own, none can come."
        obstacle = self._replacing.obstacle(rank, max(map(self._page.num_runs, self._members)))
        if obstacle is not None:
            return obstacle
        return self._begin(rank) or f"Another (pid {self._running[rank].pid}) is started in its place."

    def _begin(self, rank: int) -> str:
        """Start a process that comes to a place; return why not, if that can not be."""
        self._replacing.begin(rank)
        try:
            if self._start is not None:
                self._running[rank] = self._start(rank, joins=True)
        except OSError as error:
            self._replacing.gave_up(rank)
            return f"No other could be started ({error})."
        return ""

    def _hear_requests(self) -> None:
        """Change the number of workers, if that is asked for."""
        request = self._requests.next() if self._requests is not None else None
        if request is None or self._requests is None:
            return
        refusal = self._refusal(request.num_workers)
        if refusal:
            self._requests.answer(request, refusal, is_refused=True)
            return
        there = [rank for rank in sorted(self._running) if (rank, self.life(rank)) not in self._going]
        places = [rank for rank in range(self._page.capacity()) if rank not in self._running]
        come, go = places[: max(0, request.num_workers - len(there))], there[request.num_workers :]
        for rank in come:
            self._begin(rank)
        for rank in go:
            number = signal.SIGKILL if rank in self._replacing.coming else signal.SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running[rank].pid or 0, number)
            self._going.add((rank, self.life(rank)))
        named = ", ".join(map(str, come or go))
        change = f": ranks {named} {'come' if come else 'go after their step'}" if named else ", as there are"
        workers = f"{request.num_workers} worker{'s' if request.num_workers > 1 else ''}"
        self._requests.answer(request, f"{workers}{change}.", is_refused=False)

    def _refusal(self, num_workers: int) -> str:
        """Return why there can not be so many workers, if so."""
        members, most = self._members, self._page.capacity()
        if not members or not self._takes_others(members):
            return (
                "the team can not change now: it has not begun to train or is ending; or it is one that never can: one "
                "worker alone, workers with memories of their own (--transport group, GPUs), --set elastic=false."
            )
        if max(map(self._page.num_runs, members)) > 1:
            return "the team can not change: its script has several runs."
        if num_workers > max(most, len(self._running)):
            return (
                f"{num_workers} workers are more than the team has places for, which is {most}: twice as many as it "
                "began with, at least 8 and as many as cores; no more than it began with where memory= is limited or "
                "gradients lie on disk."
            )
        return ""

    def _look_at_newcomers(self) -> None:
        """Let a main worker that has come speak again; end those that nobody is left to let in."""
        for rank in list(self._replacing.coming):
            if self._replacing.has_come(rank) and rank == FIRST_RANK:
                self.output.shown = {(rank, self._replacing.life(rank))}
        if not self._members:
            for rank in self._replacing.coming & self._running.keys():
                kill_group(self._running[rank], signal.SIGKILL)

    def _give_up(self, ended: Ended) -> None:
        """Say that a newcomer has ended before it came, and try again if it was killed."""
        self._replacing.gave_up(ended.rank)
        if not self._members or self._interrupted is not None or self._kill_at is not None:
            return
        text = f"{ended.describe_end()} It was to take the place of another. The others go on."
        is_to_blame = ended.status >= 0 and ended.status != EXIT_BECAUSE_OF_PEER
        follows = "Its place stays empty; see its log." if is_to_blame else self._replace(ended.rank)
        self._tell(f"{text} {follows}".rstrip())

    def _is_survived(self, ended: Ended) -> bool:
        """Return whether a worker was killed that the others can do without, and any of them does."""
        well = [other for other in self._ended if other.status == 0 and other.progress not in _OUT]
        others = well or self._members
        if ended.status >= 0 or not others or ended.progress in (Progress.STARTED, Progress.JOINING):
            return False
        return ended.if_killed.goes_on and all(self._page.if_killed(rank).goes_on for rank in self._members)

    def _is_failure(self, ended: Ended) -> bool:
        if ended.progress in _OUT:
            return False
        is_bad = ended.status != 0 or ended.progress in (Progress.JOINING, Progress.TRAINING)
        return (is_bad and not self._is_survived(ended)) or self._is_missed(ended)

    def _is_missed(self, ended: Ended) -> bool:
        """Return whether others have called `distribute` more often, and wait there for a worker that has ended."""
        num_runs = self._page.num_runs(ended.rank)
        if ended.life < self._replacing.life(ended.rank):  # who takes its place has not begun, or is called as they are
            num_runs = 1
            if ended.rank in self._members:
                return False
        return any(self._page.num_runs(rank) > num_runs for rank in range(self._num_workers))

    def _judge(self) -> None:
        """Name the first failure, if there is one, and end the others."""
        if self._culprit is None and self._interrupted is None:
            failures = [ended for ended in self._ended if self._is_failure(ended)]
            lost = [ended for ended in self._ended if (ended.rank, ended.life) in self._lost]
            causes = [ended for ended in failures if ended.status != EXIT_BECAUSE_OF_PEER and ended not in lost]
            if failures and not causes:  # maybe one that they could not do without after all, or one that just left
                first = failures[0].at
                left = [one for one in self._ended if one.status == 0 and one.progress not in _OUT and one.at <= first]
                causes = sorted([*lost, *left], key=lambda one: one.at)[-1:]
            self._culprit = next(iter(causes or failures), None)
            if self._culprit is not None:
                self._end(GRACE_AFTER_FAILURE)

    def _end_leftovers(self, now: float) -> None:
        # Not at the end of the run: by then a group's number may be that of another program's.
        for worker, deadline in list(self._leftovers):
            if now > deadline:
                kill_group(worker, signal.SIGKILL)
                self._leftovers.remove((worker, deadline))

    def _end(self, grace: float) -> None:
        self._page.announce_end()
        self._send(signal.SIGTERM)
        self._kill_at = time.monotonic() + grace

    def _send(self, number: int) -> None:
        for worker in self._running.values():
            kill_group(worker, number)

    def _send_to_workers(self, number: int) -> None:
        """Send a signal to the workers alone, not to what they have started."""
        for worker in self._running.values():
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(worker.pid, number)

    def _catch_signals(self) -> dict[int, signal.Handlers | None]:
        def on_signal(number: int, frame: object) -> None:
            self._signalled = number
            if self._interrupted is None and self._culprit is None:
                self._interrupted = number
                if number == signal.SIGINT:  # as from a terminal: the script may save, and ends by itself
                    self._send_to_workers(number)
                else:
                    self._end(GRACE_AFTER_INTERRUPT)
            elif self._kill_at is None:
                self._end(GRACE_AFTER_INTERRUPT)
            else:
                self._send(signal.SIGKILL)

        signal.set_wakeup_fd(self.output.wake_fd, warn_on_full_buffer=False)
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[int(number)] = signal.signal(number, on_signal)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # a job's scheduler sends them: the script's to handle
            before[int(number)] = signal.signal(number, lambda number, frame: self._send_to_workers(number))
        before[int(signal.SIGCHLD)] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        return before  # type: ignore[return-value]
