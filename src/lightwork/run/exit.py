"""The end of a worker's process, whichever way it comes: its runs are closed, and the others learn of it.

One exit handler and one hook for exceptions serve all runs of a process. They hold the runs weakly, and are taken away
with the last one that is closed. What happens:

    the script ends     each run waits while others may read weights that are here, and is closed
    an exception        its traceback is shown, every run tells its team that this worker can not go on; then as above,
                        without waiting
    ... of a peer       RankFailed, HostLost: only a sentence is shown, for the cause is elsewhere. They and RankLost:
                        the runs are closed and the process ends at once, with EXIT_BECAUSE_OF_PEER
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from lightwork.engine.beside import Beside
from lightwork.errors import EXIT_BECAUSE_OF_PEER, HostLost, RankFailed, RankLost, without_own_frames
from lightwork.notice import notice
from lightwork.team.team import Team

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class Closable(Protocol):
    """What the end of a process needs of a run."""

    def stay_while_needed(self) -> None:
        """Wait for the others, if they may still need what is here."""

    @property
    def model(self) -> object:
        """What it trains."""

    @property
    def run_dir(self) -> Path:
        """Where it writes."""

    @property
    def step_index(self) -> int:
        """The steps that it has done."""

    def close(self, *, gives_back: bool = True) -> None:
        """Let go of everything, and of its place in `EXITS`; with `gives_back`, after copying the weights."""


@dataclass
class _Living:
    """A run that is not closed."""

    run: weakref.ref[Closable]
    team: weakref.ref[Team]
    beside: weakref.ref[Beside]
    pid: int  #: a process that is forked from a worker later is not that worker
    has_failed: bool = False


class Exits:
    """The runs of a process that are not closed, and its hooks."""

    def __init__(self) -> None:
        self._living: list[_Living] = []
        self._hook: Hook | None = None
        self._previous: Hook = sys.__excepthook__
        self._registered_in = 0  # the process

    def add(self, run: Closable, team: Team, beside: Beside) -> None:
        """See to a run's end, and to what other runs do to its model."""
        self._living = [*self._living, _Living(weakref.ref(run), weakref.ref(team), weakref.ref(beside), os.getpid())]
        beside.listen(partial(self._others_in_backward, weakref.ref(beside)))
        if self._registered_in != os.getpid():
            self._registered_in = os.getpid()
            atexit.register(self._at_exit)
        if self._hook is None or sys.excepthook is not self._hook:
            self._previous = sys.excepthook
            self._hook = self._hook_before(self._previous)
            sys.excepthook = self._hook

    def remove(self, run: Closable) -> None:
        """Let go of a run that is closed, and with the last one of the hooks."""
        self._living = [living for living in self._living if living.run() not in (None, run)]
        if not self._living:
            atexit.unregister(self._at_exit)
            self._registered_in = 0
            if sys.excepthook is self._hook:  # else somebody else's leads to it, and it leads on
                sys.excepthook = self._previous
            self._hook = None

    def close_run_of(self, model: object) -> None:
        """Close the run that trains this very object, if there is one."""
        for living in self._here():
            run = living.run()
            if run is not None and run.model is model:
                run.close()

    def models(self) -> list[object]:
        """Return what the living runs train."""
        return [run.model for run in self._runs()]

    def steps_beside(self, run: Closable) -> dict[str, int]:
        """Return the steps that the others have done, by the names of their folders."""
        return {other.run_dir.name: other.step_index for other in self._runs() if other is not run}

    def has_others(self, run: Closable) -> bool:
        """Return whether there are other living runs."""
        return any(other is not run for other in self._runs())

    def folders(self) -> list[Path]:
        """Return where the living runs write."""
        return [run.run_dir for run in self._runs()]

    def _others_in_backward(self, beside: weakref.ref[Beside]) -> bool:
        alive = beside()
        return alive is not None and any(other.is_in_backward for other in self.beside(alive))

    def beside(self, beside: Beside) -> Sequence[Beside]:
        """Return the models of the other runs."""
        if len(self._living) < 2:
            return ()
        found = [living.beside() for living in self._here()]
        return [other for other in found if other is not None and other is not beside]

    def _runs(self) -> list[Closable]:
        return [run for living in self._here() if (run := living.run()) is not None]

    def _here(self) -> list[_Living]:
        return [living for living in self._living if living.pid == os.getpid()]

    def _at_exit(self) -> None:
        for living in self._here():
            run = living.run()
            if run is not None:
                if not living.has_failed:
                    run.stay_while_needed()
                run.close(gives_back=False)

    def _hook_before(self, previous: Hook) -> Hook:
        def on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            # Hooks may lie in one chain: the first that comes to a run's failure sees to it.
            failing = [living for living in self._here() if not living.has_failed]
            for living in failing:
                living.has_failed = True
            if failing and isinstance(error, RankFailed | HostLost):
                notice(str(error))
            elif failing and isinstance(error, KeyboardInterrupt) and error.args:  # a run's: the loop was left in order
                notice(f"interrupted {error.args[0]}.")
            else:
                previous(kind, error, without_own_frames(error) if trace is not None else None)
            if failing:
                _tell(error, failing)

        return on_error


#: What a run adds to errors of torch's own: their type, words in them, and what to do.
_ADVICE = (
    (
        torch.OutOfMemoryError,
        "",
        "the GPU has no more room. What takes it: activations (activations='recompute' or 'offload', or a smaller "
        "micro_batch), the optimizer's state and masters (offload={'optimizer': 'host'}), weights (offload={'weights': "
        "'host'}); or memory=, which chooses what to offload.",
    ),
    (
        RuntimeError,
        "saved tensor hooks",
        "torch.func.grad, vjp, jacrev and hessian do not go with weights that are brought when they are read "
        "(placement='zero3', offload={'weights': ...}), nor within a module whose activations are not kept. Use "
        "placement='zero2', leave these weights and this module where they are (activations={'NAME': 'keep'}), or "
        "write torch.autograd.grad(..., create_graph=True), which goes with all of them.",
    ),
    (
        RuntimeError,
        "must have the same dtype",
        "under precision='bf16' or 'fp16' the model's weights are of that type. The loop body, run.evaluate and a call "
        "of the whole model compute under autocast; around a part of it write `with torch.autocast('cpu', "
        "torch.bfloat16):`. A module that mixes its weights with fp32 tensors keeps fp32 ones: fp32_modules=('NAME',). "
        "run.state_dict() has all weights in fp32.",
    ),
)


def _tell(error: BaseException, failing: list[_Living]) -> None:
    """Tell the teams of an error, and end the process where it is another worker's."""
    advice = next((text for kind, words, text in _ADVICE if isinstance(error, kind) and words in str(error)), None)
    if advice is not None:
        notice(advice)
    for living in failing:
        team = living.team()
        if team is not None and team.is_in:
            team.presence.fail()
            team.hosts.fail(error)
    if isinstance(error, (RankFailed, RankLost)):  # the launcher looks for the cause elsewhere
        for living in failing:
            run = living.run()
            if run is not None:
                run.close(gives_back=False)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_BECAUSE_OF_PEER)


#: Those of this process.
EXITS = Exits()
