"""Leaving a team on purpose: a worker that is sent SIGTERM goes when its step is done, and nothing is computed again.

The launcher sends it to those that are too many (`lightwork scale`), a person or a machine's scheduler to any. Where
the team can not do without the worker, or ends as a whole, SIGTERM ends it at once as ever; so does a second one. A
script that leaves its loop so sees SystemExit, and its `finally` runs. A handler of its own is left alone.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import final

from lightwork.notice import notice
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team


@final
class Leaving:
    """That of one worker."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self.is_wanted = False

    def listen(self) -> None:
        """Be told by SIGTERM from here on."""
        is_main_thread = threading.current_thread() is threading.main_thread()
        if self._team.may_lose and is_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_signal)

    def leave(self, *, has_other_runs: bool) -> None:
        """Leave the team between two steps.

        Raises: SystemExit when this worker is out of it. It ends at once where it is the last, or has other runs.
        """
        team = self._team
        if has_other_runs or not team.board.membership.retire():
            _end_at_once()
        team.is_in = False
        team.rendezvous.report(Progress.RETIRED)
        raise SystemExit(0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_wanted or self._team.rendezvous.is_ending():
            _end_at_once()
        self.is_wanted = True
        notice(f"rank {self._team.rank} was told to leave (SIGTERM), and does after this step. (Once more: at once.)")


def _end_at_once() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
