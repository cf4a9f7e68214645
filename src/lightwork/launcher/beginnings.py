"""Whether a team that has ended begins again from its last checkpoint: where nobody else has what a killed worker had.

That is where weights or the optimizer's state are shared out, or lie in the memory of a GPU. A worker that dies of what
it computes would die again, so the beginnings from one checkpoint are counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from lightwork.checkpoint.folder import step_of
from lightwork.launcher.supervisor import Outcome
from lightwork.team.rendezvous import IfKilled, Progress

#: Where a worker that was killed may have been.
_IN_A_RUN = (Progress.TRAINING, Progress.BETWEEN)


@final
class Beginnings:
    """The beginnings of one run."""

    def __init__(self, run_dir: Path, most: int) -> None:
        """`most` is how often a team may begin again from one checkpoint, or from none."""
        self._checkpoint = run_dir / "checkpoint"
        self._most = most
        self._step: int | None = None
        self._num_tries = 0

    def follows(self, outcome: Outcome) -> str:
        """Return what to say where another beginning follows; empty where none does."""
        culprit, step = outcome.culprit, step_of(self._checkpoint)
        if step != self._step:
            self._step, self._num_tries = step, 0
        if culprit is None or outcome.interrupted is not None or self._num_tries >= self._most:
            return ""
        if culprit.status >= 0 or culprit.if_killed is not IfKilled.BEGUN_AGAIN or culprit.progress not in _IN_A_RUN:
            return ""
        self._num_tries += 1
        where = "from its beginning, as there is no checkpoint yet (save_every= makes some)"
        if step is not None:
            where = f"from its checkpoint after {step} steps"
        number = f"{self._num_tries} of at most {self._most} times from there: --restarts"
        return f"{culprit.describe_end()} No other one has what it had. The team begins again {where} ({number})."
