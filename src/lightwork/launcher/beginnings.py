"""Whether a team that has ended begins again from its last checkpoint: where nobody else has what a killed worker had.

That is where weights or the optimizer's state are shared out, or lie in the memory of a GPU; where all were killed; or
in the middle of what can not be done again. A worker that dies of what it computes would die again, so the beginnings
from one checkpoint are counted.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import final

from lightwork.checkpoint.folder import step_of
from lightwork.launcher.supervisor import Outcome
from lightwork.team.rendezvous import IfKilled, Progress

#: Where a worker that was killed may have been.
_IN_A_RUN = (Progress.TRAINING, Progress.BETWEEN)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Give the body the signals that come between two teams, which would end this process; teams have handlers."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@final
class Beginnings:
    """The beginnings of one run."""

    def __init__(self, run_dir: Path, most: int) -> None:
        """`most` is how often a team may begin again from one checkpoint, or from none."""
        self._checkpoint = run_dir / "checkpoint"
        self._most = most
        self._step: int | None = None
        self._num_tries = 0
        self.why_not = ""  #: what to say where none follows that could

    def follows(self, outcome: Outcome) -> str:
        """Return what to say where another beginning follows; empty where none does."""
        culprit, step = outcome.culprit, step_of(self._checkpoint)
        if step != self._step:
            self._step, self._num_tries = step, 0
        if culprit is None or culprit.status >= 0 or culprit.progress not in _IN_A_RUN or not self._most:
            return ""
        if culprit.if_killed in (IfKilled.UNKNOWN, IfKilled.ENDED) or outcome.interrupted is not None:
            return ""
        if self._num_tries >= self._most:
            self.why_not = f"It has begun {self._most} times from there, and does not again (--restarts)."
            return ""
        self._num_tries += 1
        where = "from its beginning, as there is no checkpoint yet (save_every= makes some)"
        if step is not None:
            where = f"from its checkpoint after {step} steps"
        number = f"{self._num_tries} of at most {self._most} times from there: --restarts"
        return (
            f"{culprit.describe_end()} The others can not go on without it. The team begins again {where} ({number})."
        )
