"""Ctrl-C in a team: every worker leaves its loop behind the same step, which is whole, so that the script can save.

While a loop over run.steps is active, the first SIGINT is noted. The worker's next micro-batch carries it as a vote,
and all raise KeyboardInterrupt when the step, and what the script does after it, has ended. A second one, and one
outside of such loops, raises at once. A handler of the script's own is left alone.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import final

from lightwork.notice import notice


@final
class Interrupts:
    """The interruptions of a process."""

    def __init__(self) -> None:
        self.is_pending = False  #: the user wants the loop to end
        self._num_loops = 0

    def begin_loop(self) -> None:
        """Note interruptions from here on."""
        self._num_loops += 1
        if _may_handle() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_signal)

    def end_loop(self) -> None:
        """Let them raise again, when the last loop ends."""
        self._num_loops -= 1
        if self._num_loops == 0:
            self.is_pending = False
            if _may_handle() and signal.getsignal(signal.SIGINT) == self._on_signal:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_pending:
            raise KeyboardInterrupt
        self.is_pending = True
        notice("interrupted: training stops after this step. (Once more: at once.)")


def _may_handle() -> bool:
    """Return whether this thread is the one that signals come to."""
    return threading.current_thread() is threading.main_thread()


#: Those of this process.
INTERRUPTS = Interrupts()
