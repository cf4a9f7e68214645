"""What a host does about another one that it waits for: it names it, and ends it if that is stopped on this machine.

A process that is stopped can not say so, and another machine does not show it: there it is lost when it has said
nothing for long (`transport/connection`, [Note: silence]).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import final

import psutil

from lightwork.notice import notice
from lightwork.transport.late import Lateness

#: Seconds that count between two looks at most: more is a wait that has ended, or this process was stopped.
_MOST_BETWEEN = 2.0


@final
class Neighbours:
    """The other hosts, as one that waits sees them."""

    def __init__(self, rank: int, leaders: Sequence[int], pids: Mapping[int, int], lease: float) -> None:
        """`pids` are their leaders' processes on this machine, by host, where each is all of its host."""
        self._rank = rank
        self._leaders = leaders
        self._lease = lease
        self._processes: dict[int, psutil.Process] = {}  # (it knows when its number is another one's)
        for host, pid in pids.items():
            with contextlib.suppress(psutil.Error):
                self._processes[host] = psutil.Process(pid)
        self._stopped: dict[int, float] = {}  # for how long a host was seen so
        self._last_look: dict[int, float] = {}
        self._lateness = Lateness()

    def waits_for(self, host: int, seconds: float) -> None:
        """Name a host that has been waited for so long, from time to time; end it when it was stopped for its lease.

        Called each second or more often. Time in which this process itself was stopped does not count.
        """
        now, rank = time.monotonic(), self._leaders[host]
        if self._lateness.is_due(rank, now - seconds, now):
            notice(f"rank {self._rank} has been waiting for rank {rank} for {seconds:.0f} s.")
        between = min(now - self._last_look.get(host, now), _MOST_BETWEEN)
        self._last_look[host] = now
        process = self._processes.get(host)
        if not self._lease or process is None:
            return
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_STOPPED:
                self._stopped.pop(host, None)
                return
            self._stopped[host] = stopped = self._stopped[host] + between if host in self._stopped else 0.0
            if stopped >= self._lease:
                notice(
                    f"rank {rank} (pid {process.pid}) is ended: it was stopped for {stopped:.1f} s while rank "
                    f"{self._rank} waited for it. To wait for stopped workers: --set lease=0."
                )
                process.kill()
