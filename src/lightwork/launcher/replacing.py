"""Which process takes the place of a worker that was killed, and whether it has come to where the others are.

A process that is killed as soon as it is there, by what it computes, say, would be replaced for ever. So the tries at a
place are counted, until a process there has lived for a while.
"""

from __future__ import annotations

import time
from typing import final

from lightwork.team.page import Page
from lightwork.team.rendezvous import Progress

#: How often a place is given to another process, unless told otherwise.
RESTARTS = 3

#: Seconds for which a process must have been there for the tries at its place to be counted anew.
LONG_ENOUGH = 60.0


@final
class Replacing:
    """The processes at the places of one team."""

    def __init__(self, page: Page, restarts: int) -> None:
        self._page = page
        self._restarts = restarts
        self._lives: dict[int, int] = {}
        self._begun: dict[int, float] = {}
        self._tries: dict[int, int] = {}
        self.coming: set[int] = set()  #: ranks of processes that have not come yet to where the others are

    def life(self, rank: int) -> int:
        """Return how many processes were at a place before the one that is there now."""
        return self._lives.get(rank, 0)

    def has_come(self, rank: int) -> bool:
        """Return whether a newcomer has, once: it is a worker as the others are from then on."""
        if rank in self.coming and self._page.progress(rank) >= Progress.TRAINING:
            self.coming.discard(rank)
            return True
        return False

    def obstacle(self, rank: int, num_runs: int) -> str | None:
        """Return why nobody can take a place, if nobody can; empty where nobody is to, and nothing is to be said.

        Args:
            num_runs: the most runs that a worker that is there has begun.
        """
        now = time.monotonic()
        if self._restarts == 0:
            return ""
        if num_runs > 1:
            return "Its place stays empty: in a script with several runs none can be taken."
        if now - self._begun.get(rank, now) > LONG_ENOUGH:
            self._tries[rank] = 0
        if self._tries.get(rank, 0) >= self._restarts:
            return (
                f"Its place stays empty: {self._restarts} others were killed there, each within "
                f"{LONG_ENOUGH:.0f} s (--restarts)."
            )
        return None

    def begin(self, rank: int) -> None:
        """Take note that another process begins at a place."""
        self._page.clear(rank)
        self._lives[rank] = self.life(rank) + 1
        self._tries[rank] = self._tries.get(rank, 0) + 1
        self._begun[rank] = time.monotonic()
        self.coming.add(rank)

    def gave_up(self, rank: int) -> None:
        """Take note that a newcomer has ended before it came."""
        self.coming.discard(rank)
