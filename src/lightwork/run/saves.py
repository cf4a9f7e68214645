"""What is saved beside the trained state, and when: of the code outside of the steps, which a save is in the midst of.

saved in the body of the loop over steps    with settings and kept objects as they are. What the body changes after
                                            the save is added when the next step begins
saved in the code after a pass              also with what they were when the pass ended: if that code does not come
                                            to its end, it runs again, whole, from there. When it has ended, with
                                            settings and kept objects as it left them, and the place behind it
"""

from __future__ import annotations

import copy
import json
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from lightwork.checkpoint import writing
from lightwork.checkpoint.description import Description
from lightwork.checkpoint.settings import Settings, Unfinished
from lightwork.checkpoint.values import take_apart
from lightwork.errors import CheckpointError, UsageError
from lightwork.notice import notice
from lightwork.run.course import Course
from lightwork.run.kept import Kept
from lightwork.spec.spec import Spec
from lightwork.state.state import TrainedState


@final
class Saves:
    """What one worker knows of them. The main worker alone saves; all check what they go on from."""

    def __init__(self, spec: Spec, state: TrainedState, course: Course, kept: Kept) -> None:
        self._spec = spec
        self._state = state
        self._course = course
        self._kept = kept
        self._before: Settings | None = None  # as the last pass ended
        self._obstacle = ""  # to running the code after it again
        self._unfinished: list[tuple[Path, Description]] = []
        self._resumed: Settings | None = None  # what the run goes on from
        self._signatures_then = 0, 0  # of groups, and of all, when they were put back

    def describe(self, beside: Mapping[str, int], *, within_loop: bool) -> Description:
        """Return what a save says beside the trained state; `beside` are the steps of the script's other runs."""
        course = self._course
        is_after = course.at.is_after and not within_loop
        position = course.completed if is_after else course.at
        settings = Settings(position, self._state.groups(), self._kept.state())
        return Description(
            spec=self._spec,
            settings=settings,
            data_sets=course.data.to_json(),
            name=uuid.uuid4().hex,
            unfinished=self._unfinished_code(is_after=is_after) if is_after or within_loop else None,
            beside=beside,
            extra=self._state.extra.read(),
        )

    def _unfinished_code(self, *, is_after: bool) -> Unfinished:
        if not is_after:
            return Unfinished(None, "")
        return Unfinished(None if self._obstacle else self._before, self._obstacle)

    def saved(self, path: Path, description: Description) -> None:
        """Take note of a save."""
        if description.unfinished is not None:
            self._unfinished.append((path, description))

    def pass_ended(self) -> None:
        """Take note of how settings and kept objects are when a pass has ended."""
        self._before = Settings(self._course.at, copy.deepcopy(self._state.groups()), self._kept.copied())
        self._obstacle = ""

    def edited(self, call: str) -> None:
        """Take note that the code after a pass has changed what can not be put back."""
        self._obstacle = call

    def body_ended(self) -> None:
        """Complete what was saved in the code that has ended now."""
        unfinished, self._unfinished = self._unfinished, []
        for path, description in unfinished:
            settings = Settings(description.settings.position, self._state.groups(), self._kept.state())
            writing.complete(path, description._replace(settings=settings, unfinished=None))

    def script_ended(self) -> None:
        """Complete what could not be gone on with otherwise; the rest may run its last code again."""
        if self._obstacle and not self._course.is_in_epochs:
            self.body_ended()

    # --- going on ---------------------------------------------------------------------------------------------------

    def resume(self, saved: Description) -> None:
        """Go on from what was saved, where its trained state is there.

        Raises: CheckpointError when it was saved in code that can not run again and had not ended.
        """
        redo, obstacle = saved.unfinished or Unfinished(None, "")
        if obstacle:
            raise CheckpointError(
                f"the checkpoint was saved in the code after a pass, behind {obstacle}, and that code did not come to "
                "its end: it can neither go on nor run again. Use an older one; call run.save before "
                f"{obstacle}, or in the loop over steps."
            )
        if saved.unfinished is not None and redo is None:
            notice(
                f"the checkpoint was saved after step {saved.settings.position.step - 1}, in the body of the loop over "
                "steps, and the run ended before that body did. What it does after run.save, such as "
                "scheduler.step(), is missing. (run.save last in the body loses nothing.)"
            )
        self._resumed = redo or saved.settings
        self._before = redo
        self._course.resume(self._resumed.position, saved.data_sets)
        self.put_all_back()

    def put_back(self) -> None:
        """Let the settings be those of the checkpoint: a scheduler's constructor changes them."""
        if self._resumed is not None:
            self._state.set_groups(copy.deepcopy(self._resumed.groups))
            self._signatures_then = self._signatures()

    def put_all_back(self) -> None:
        """Let settings and kept objects be those of the checkpoint: the body of an epoch has begun again."""
        if self._resumed is not None:
            self._kept.restore(copy.deepcopy(dict(self._resumed.kept)))
            self.put_back()

    @property
    def is_resuming(self) -> bool:
        """Whether the run goes on from a checkpoint and its loops have not begun."""
        return self._resumed is not None and not self._course.has_begun

    def check_settings(self) -> None:
        """Raise UsageError where the script has changed settings since the run was resumed, before its loops."""
        if self.is_resuming and self._resumed is not None and self._signatures()[0] != self._signatures_then[0]:
            ours, saved = self._state.groups(), self._resumed.groups
            changed = [
                f"{name} of group {i}: {group.get(name)!r}, was {theirs[name]!r}"
                for i, (group, theirs) in enumerate(zip(ours, saved, strict=True))
                for name in theirs
                if repr(group.get(name)) != repr(theirs[name])
            ]
            raise UsageError(
                f"the optimizer's settings are not those of the checkpoint that the run goes on from "
                f"({'; '.join(changed)}). A scheduler is restored by run.keep(scheduler=scheduler); change settings "
                "in the loop over steps, where a run that never stopped would."
            )

    def check_unchanged(self) -> None:
        """Raise UsageError where code that has run again has changed settings or kept objects."""
        if self._resumed is not None and self._signatures() != self._signatures_then:
            raise UsageError(
                "the run was resumed behind its first loop over run.steps, and the code between that loop and this one "
                "has run again: it has changed the optimizer's settings or what run.keep holds. Write `for epoch in "
                "run.epochs(E):` with `run.steps(data)` in it, whose code after an epoch runs once."
            )

    def extra_signatures(self) -> dict[str, object]:
        """Return a number for each thing that modules keep beside tensors."""
        return {name: _signature(value) for name, value in self._state.extra.read().items()}

    def _signatures(self) -> tuple[int, int]:
        groups, kept = self._state.groups(), self._kept.state()
        return _signature(groups), _signature([groups, kept])


def _signature(value: Any) -> int:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(take_apart(value, tensors, "value"))
    number = zlib.crc32(text.encode())
    for tensor in tensors.values():
        number = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, number)
    return number
