"""What a checkpoint says beside tensors: where the run was, and what code outside of the steps may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Bookmark(NamedTuple):
    """Where a run is: after `step` updates in all.

    The body of a loop over `run.epochs`, or the script outside of one, makes calls of run.steps. A call is one or more
    passes over a data set.
    """

    step: int = 0
    loop: int = 0  #: loops over run.epochs that have ended
    outer: int | None = None  #: the epoch of the present loop over run.epochs; None outside of one
    plain: int = 0  #: calls outside of such loops that have ended
    call: int = 0  #: calls of the present body that have ended
    is_open: bool = False  #: in a call, which may have no steps left
    is_after: bool = False  #: behind a call, in the code after it
    data: int = 0  #: the data set of the last call, by its number
    first_epoch: int = 0  #: of the data set, when that call began
    steps_in_call: int = 0
    last_epoch: int = 0  #: of the data set: that of the last step
    epoch: int = 0  #: that of the next step, if it exists
    step_in_epoch: int = 0
    order: Mapping[str, object] = {}  #: of the samples of `last_epoch`


@dataclass(frozen=True)
class Settings:
    """What goes on with a run besides tensors: all that code outside of the steps may change."""

    position: Bookmark
    groups: list[dict[str, Any]]  #: hyper-parameters of each parameter group
    kept: Mapping[str, Any]  #: plain values, and state dicts of kept objects


class Unfinished(NamedTuple):
    """The code outside of the steps in which a checkpoint was saved."""

    redo: Settings | None  #: of before that code, which may run again; None: in the body of the loop over steps
    obstacle: str  #: why it can not run again
