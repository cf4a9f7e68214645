"""Every error that lightwork raises on purpose.

    LightworkError
    ├── SpecError          a field of the spec or the plan is impossible
    ├── UsageError         a call that the training loop does not allow (the message says what replaces it)
    ├── DataError          the data set is empty, shrank, or a sample could not be fetched
    ├── NonFiniteLoss      a loss is NaN or infinite
    ├── CheckpointError    a checkpoint is missing, or of another model
    │   └── DamagedCheckpoint  it is not as it was written
    ├── MemoryFull         the host has no room for the shared memory
    └── TeamError          the team can not go on
        ├── RankLost       a worker is gone
        │   └── HostLost       with its whole host, or the way to it
        ├── RankFailed     a worker's own code raised
        ├── CanNotJoin     a newcomer's script does not come to where the others are
        └── Disagreement   the workers' scripts differ

A message has three parts: what happened, the values, what to do. Worker, step and phase are named where they
are known.
"""

from __future__ import annotations

import os
from types import TracebackType

#: Where this package lies.
_OWN = os.path.dirname(__file__) + os.sep

#: Exit status of a worker that ends only because another one failed: the launcher looks for the cause elsewhere.
EXIT_BECAUSE_OF_PEER = 76


class LightworkError(Exception):
    """The root of all errors that lightwork raises on purpose."""


class SpecError(LightworkError, ValueError):
    """A field of the spec or of the plan is impossible, alone or together with another."""


class UsageError(LightworkError, RuntimeError):
    """A call that the training loop does not allow; the message says what replaces it."""


class DataError(LightworkError):
    """The data set is empty, changed its length, or a sample could not be fetched."""


class NonFiniteLoss(LightworkError, ArithmeticError):
    """The loss of a micro-batch is NaN or infinite; names the worker, the step and the samples."""


class CheckpointError(LightworkError):
    """A checkpoint is missing, damaged, or belongs to another model or optimizer."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not as it was written."""


class MemoryFull(LightworkError, MemoryError):
    """The host has no room for the memory that its workers share."""


class TeamError(LightworkError):
    """The team can not go on; the subclasses say why."""


class RankLost(TeamError):
    """A worker ended, was killed, or left while the others still needed it; `rank` is its own, where it is known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class HostLost(RankLost):
    """Another host's processes were killed, or the way to them is cut off: they said no farewell."""


class RankFailed(TeamError):
    """Another worker's code raised; its traceback is shown where it happened."""


class CanNotJoin(TeamError):
    """A process can not take the place of a worker that has died: its script does not come to where the others are."""


class Disagreement(TeamError):
    """The workers run different scripts, models, settings or calls."""


def without_own_frames(error: BaseException) -> TracebackType | None:
    """Return an error's traceback, of one of these errors up to where the script calls this package.

    What is below is of no use to who reads the message; of any other error it is.
    """
    trace = error.__traceback__
    if not isinstance(error, LightworkError):
        return trace
    last, one = None, trace
    while one is not None:
        if not one.tb_frame.f_code.co_filename.startswith(_OWN):
            last = one
        one = one.tb_next
    if last is not None:
        last.tb_next = None
    return trace
