"""Running the user's script in a worker, as `python script.py` would."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lightwork.errors import without_own_frames


@dataclass(frozen=True, kw_only=True)
class Script:
    """What the workers run."""

    target: str  #: a path, or the name of a module
    arguments: tuple[str, ...] = ()
    is_module: bool = False

    def run(self) -> int:
        """Run it to its end and return the exit status; an error's traceback goes to standard error."""
        sys.argv = [self.target, *self.arguments]
        try:
            if self.is_module:
                sys.path[0] = os.getcwd()
                runpy.run_module(self.target, run_name="__main__", alter_sys=True)
            else:
                sys.path[0] = str(Path(self.target).absolute().parent)
                runpy.run_path(self.target, run_name="__main__")
        except SystemExit as end:
            return _status_of(end)
        except BaseException as error:
            # Through the hook: the run put itself there, to tell the other workers.
            own = _own_frames(without_own_frames(error))
            with _to_its_end():
                sys.excepthook(type(error), error.with_traceback(own), own)
            return 1
        return 0


@contextlib.contextmanager
def _to_its_end() -> Iterator[None]:
    """Let what is said here be said whole: the launcher ends this worker in its middle if another one fails, too."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def _status_of(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the script's first frame on, without those of runpy and of this file.

    None for a script that could not be parsed: it has no frame.
    """
    hidden = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None:
        (frame,) = traceback.extract_tb(trace, limit=1)
        if frame.filename not in hidden:
            break
        trace = trace.tb_next
    return trace
