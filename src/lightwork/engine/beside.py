"""A run's model beside other runs in one process, whose losses may go through it: a generator's through the critic."""

from __future__ import annotations

from collections.abc import Callable

from lightwork.engine.backward.gradients import Gradients
from lightwork.notice import notice
from lightwork.state.buffers import Buffers


class Beside:
    """What a step of another run may do to this one's model, and what is left of it: nothing."""

    def __init__(self, gradients: Gradients, buffers: Buffers) -> None:
        self._gradients = gradients
        self._buffers = buffers
        self.is_in_step = False  #: of its own
        self._has_said = False

    @property
    def is_in_backward(self) -> bool:
        """Whether gradients of its own are being taken."""
        return self._gradients.is_open

    def listen(self, others_in_backward: Callable[[], bool]) -> None:
        """Leave out gradients that come while this returns true: those of another run's loss.

        In plain PyTorch the optimizer's `zero_grad` would clear them before the next backward.
        """
        self._gradients.others_in_backward = others_in_backward

    def leave_out(self) -> None:
        """Put the buffers back as this run's last step left them, where another run's forward has written them."""
        if self.is_in_step:
            return
        name = self._buffers.put_back()
        if name is not None and not self._has_said:
            self._has_said = True
            notice(
                f"buffer {name} was written by a forward in a step of another run. It is as the steps of its own run "
                "leave it; what the other's forward makes of it is left out. (In eval mode a forward writes none.)"
            )
