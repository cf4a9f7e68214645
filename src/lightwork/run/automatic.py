"""Checkpoints that come by themselves, each so many steps or so much time (`save_every=`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import nn

from lightwork.errors import CheckpointError
from lightwork.run.state_calls import StateCalls
from lightwork.spec.plan import Plan
from lightwork.team.ledger import SAVE
from lightwork.team.team import Team
from lightwork.units import parse_interval


@final
class Automatic:
    """When a run saves by itself, and where: after a step, when the body of the loop has ended.

    Steps are counted by all alike. Of the time the main worker decides, and says so as a wish of its micro-batches.
    """

    def __init__(self, plan: Plan, team: Team, calls: StateCalls, model: nn.Module, folder: Path) -> None:
        self._steps, self._seconds = (None, None) if plan.save_every is None else parse_interval(plan.save_every)
        self._team = team
        self._calls = calls
        self._model = model
        self._folder = folder
        self._has_room = plan.memory is None and not plan.offload  # else it was told to do with little
        self._last = time.monotonic()

    @property
    def wish(self) -> int:
        """What this worker wishes for the end of the step that begins."""
        is_time = self._seconds is not None and time.monotonic() - self._last >= self._seconds
        return SAVE if is_time and self._team.is_main else 0

    def is_due(self, steps_done: int, wishes: int) -> bool:
        """Return whether to save after so many steps, where workers have had these wishes."""
        return bool(wishes & SAVE) or (self._steps is not None and steps_done % self._steps == 0)

    def saved(self) -> None:
        """Take note that a checkpoint was saved: the time begins anew."""
        self._last = time.monotonic()

    def save(self, beside: Mapping[str, int], of: int | None) -> None:
        """Save, as `StateCalls.save` does; where that can not be, say so and go on. Collective."""
        try:
            self._calls.save(
                self._folder, "lightwork", self._model, beside, within_loop=False, of=of, beside_the_run=self._has_room
            )
        except CheckpointError as error:
            self._team.say(f"no checkpoint was saved, and training goes on: {error}")
        self.saved()
