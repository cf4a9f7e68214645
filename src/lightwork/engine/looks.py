"""When a run looks whether the script has written what it can not.

What stays as the script leaves it (counts of writes, addresses, the modules' members, what the optimizers have) is
looked at in each of a run's first steps, then in every few, at the end of a loop, and before anything is read, saved or
evaluated: nothing wrong gets out, at a third of the price. What was written through `.data` is looked for in each step:
an update hides it.
"""

from __future__ import annotations

from typing import final

#: The first steps, in which more is looked at than in any other: what modules do once, they do there.
CLOSELY = 2

#: The first steps, each of which looks: what a script does in every step or every few is found at once.
AT_FIRST = 16

#: After these one step in so many looks.
EVERY = 8

BETWEEN_STEPS = "outside the loop or between two steps"


@final
class Looks:
    """When one worker's run looks."""

    def __init__(self) -> None:
        self._num_steps = 0  # that have begun
        self.at_all = True  #: in this step
        self.closely = True  #: in this step

    @property
    def are_due(self) -> bool:
        """Whether the next step is one that looks."""
        return self._num_steps < AT_FIRST or self._num_steps % EVERY == 0

    def begin_step(self) -> str:
        """Begin a step, and return when that has happened which it finds."""
        when = BETWEEN_STEPS if self.at_all else f"in the last {EVERY} steps or between them"
        self.at_all, self.closely = self.are_due, self._num_steps < CLOSELY
        self._num_steps += 1
        return when
