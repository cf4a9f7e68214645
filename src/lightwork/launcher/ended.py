"""How a worker ended, in words."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from lightwork.team.rendezvous import IfKilled, Progress


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended."""

    rank: int
    pid: int
    status: int  #: exit status, or minus the signal's number
    progress: Progress
    if_killed: IfKilled = IfKilled.UNKNOWN  #: what becomes of its runs
    life: int = 0  #: how many processes were at its place before
    at: float = 0.0  #: when, by the monotonic clock

    @property
    def exit_status(self) -> int:
        """The status as a shell tells it."""
        return 128 - self.status if self.status < 0 else self.status

    def describe_end(self) -> str:
        """Say how it ended."""
        who = f"rank {self.rank} (pid {self.pid})"
        if self.status < 0:
            hints: dict[int, str] = {
                signal.SIGKILL: " Somebody killed it, or the kernel when memory ran out (see dmesg; use fewer).",
                signal.SIGSEGV: " A crash in compiled code: run with python -X faulthandler.",
                signal.SIGBUS: " Shared memory without room behind it: the host or its container is out of memory.",
            }
            hint = hints.get(-self.status, "")
            return f"{who} was killed by {_signal_name(-self.status)} {_where(self.progress)}.{hint}"
        if self.status == 0:
            return f"{who} exited with status 0 {_where(self.progress)}, while others need it."
        return f"{who} failed with exit status {self.status} {_where(self.progress)}."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal: only the first and the last have names
        return f"signal {number}"


def _where(progress: Progress) -> str:
    return {
        Progress.STARTED: "before it called lightwork.distribute",
        Progress.JOINING: "in lightwork.distribute",
        Progress.JOINED: "after lightwork.distribute, before training",
        Progress.TRAINING: "in the middle of training",
        Progress.BETWEEN: "after a loop over run.steps",
        Progress.RETIRED: "after it had left the team",
        Progress.TURNED_AWAY: "as it was turned away",
    }[progress]
