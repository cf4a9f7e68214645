"""What collective calls outside the loop over steps came to, for a newcomer: it makes them again, and alone.

A newcomer's script runs from its beginning to the loop in which the others are. On the way lie calls that the others
have made together: those before the first loop and, in a loop over run.epochs, those of the present body. What each
came to is noted, and a newcomer gets it in the same order. A script that makes other calls does not come to where the
others are, and is turned away by name; so is one that needs what was not kept, more than `MAX_BYTES` of tensors.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from lightwork.checkpoint.values import put_together, take_apart
from lightwork.errors import CanNotJoin, CheckpointError
from lightwork.run.course import Course

#: Of the tensors that one call came to.
MAX_BYTES = 1 << 20


@final
class Calls:
    """The calls of one run, as one worker has made them; or, for a newcomer, as the others have."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._before: list[tuple[str, Any]] = []  # the first loop
        self._in_body: list[tuple[str, Any]] = []  # of run.epochs
        self._to_come: deque[tuple[str, Any]] = deque()

    def note(self, what: str, result: object) -> None:
        """Take note of what a call outside the loop over steps came to."""
        tensors: dict[str, torch.Tensor] = {}
        try:
            take_apart(result, tensors, what)
            is_small = sum(tensor.nbytes for tensor in tensors.values()) <= MAX_BYTES
        except CheckpointError:
            is_small = False
        noted = what, {"result": copy.deepcopy(result)} if is_small else None
        if not self._course.has_begun:
            self._before.append(noted)
        elif self._course.is_in_epochs:
            self._in_body.append(noted)

    def body_ended(self) -> None:
        """Take note that the body of a loop over run.epochs has come to its end."""
        self._in_body.clear()

    # --- for a newcomer ---------------------------------------------------------------------------------------------

    def noted(self, tensors: dict[str, torch.Tensor]) -> list[Any]:
        """Return what was noted, as JSON values; its tensors go into `tensors`."""
        return [
            [what, take_apart(noted, tensors, f"call {number}")]
            for number, (what, noted) in enumerate([*self._before, *self._in_body])
        ]

    def take(self, noted: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Have what others have noted to come."""
        self._to_come.extend((what, put_together(values, dict(tensors))) for what, values in noted)
        self._before = list(self._to_come)

    def again(self, what: str) -> Any:
        """Return what a call came to that a newcomer makes.

        Raises: CanNotJoin when it is another one, or what it came to was not kept.
        """
        theirs, noted = self._to_come.popleft() if self._to_come else ("none", None)
        if theirs != what:
            raise CanNotJoin(
                f"the script calls {what} where the others, before they came to their loop, have called {theirs}. A "
                "process that takes the place of one that has died makes the calls before the first loop and, in `for "
                "epoch in run.epochs(E):`, those of the present body."
            )
        if noted is None:
            raise CanNotJoin(
                f"what {what} came to was not kept for a process that takes the place of one that has died: only "
                f"numbers, texts and tensors up to {MAX_BYTES} bytes are."
            )
        return noted["result"]

    def check_all_were_made(self) -> None:
        """Raise CanNotJoin where a newcomer comes to its loop without a call that the others have made."""
        if self._to_come:
            raise CanNotJoin(
                f"the script comes to its loop without {self._to_come[0][0]}, which the others have called before "
                "theirs. Nothing in it may depend on the worker."
            )
