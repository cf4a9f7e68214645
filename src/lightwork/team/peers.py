"""Whether the other workers of this host are alive: a descriptor for each process that becomes readable at its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import final


@final
class Peers:
    """Watches processes, each by its worker's place on the host, which is called rank here.

    On systems without process descriptors it asks by signal 0, which a zombie still answers.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._rank_of: dict[int, int] = {}
        self._pids: dict[int, int] = {}  # of those without a descriptor
        self._pid_of: dict[int, int] = {}

    def watch(self, rank: int, pid: int) -> None:
        """Watch the process of `rank` from now on, in place of another one."""
        if self.pid(rank) == pid:
            return
        self.forget(rank)
        self._pid_of[rank] = pid
        try:
            fd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            self._pids[rank] = pid
            return
        self._rank_of[fd] = rank
        self._poll.register(fd, select.POLLIN)

    def pid(self, rank: int) -> int:
        """Return the process of `rank` that is watched, 0 for none."""
        return self._pid_of.get(rank, 0)

    def ended(self) -> list[int]:
        """Return the ranks whose process has ended, in order."""
        ranks = [self._rank_of[fd] for fd, _ in self._poll.poll(0)]
        for rank, pid in self._pids.items():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                ranks.append(rank)
            except PermissionError:
                pass
        return sorted(ranks)

    def stopped(self, rank: int) -> bool:
        """Return whether the process of `rank` is stopped (SIGSTOP, Ctrl-Z); one in a debugger is not."""
        try:
            with open(f"/proc/{self._pid_of[rank]}/stat", encoding="ascii", errors="replace") as stat:
                return stat.read().rpartition(")")[2].split()[0] == "T"
        except (OSError, KeyError):
            return False

    def kill(self, rank: int) -> None:
        """Kill the process of `rank`: it, and not another one that has its number by now."""
        for fd, of in self._rank_of.items():
            if of == rank:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)

    def forget(self, rank: int) -> None:
        """Watch the process of `rank` no more."""
        self._pids.pop(rank, None)
        self._pid_of.pop(rank, None)
        for fd in [fd for fd, of in self._rank_of.items() if of == rank]:
            self._poll.unregister(fd)
            del self._rank_of[fd]
            os.close(fd)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self._rank_of:
            os.close(fd)
        self._rank_of.clear()
        self._poll = select.poll()
