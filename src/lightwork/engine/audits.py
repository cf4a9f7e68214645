"""Computing a micro-batch once more that another worker has computed, and comparing: see `team/proofs`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import final

from lightwork.engine.backward.gradients import Gradients
from lightwork.state.buffers import Buffers
from lightwork.team.proofs import Proof, as_integer


@final
class Audits:
    """What a worker's engine does for them."""

    def __init__(self, gradients: Gradients, buffers: Buffers, names: Sequence[str]) -> None:
        """`names` are those of the parameters."""
        self._gradients = gradients
        self._buffers = buffers
        self._names = names
        self._buffer: str | None = None  # that came to something else
        self.is_repeating = False  #: the micro-batch in hand is one that another worker has computed

    def proof(self, index: int, loss: float, weight: float) -> Proof | None:
        """Return what the micro-batch in hand came to; None where it is added to others at once."""
        gradients = self._gradients.signature()
        return None if gradients is None else Proof(index, as_integer(loss), as_integer(weight), tuple(gradients))

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Be in the body of a micro-batch that another worker has computed."""
        self.is_repeating = True
        try:
            yield
        finally:
            self.is_repeating = False

    def begin(self, index: int) -> None:
        """Take the gradients of a micro-batch that is repeated, between its forward and its backward."""
        self._buffer = self._buffers.differing(index)
        self._gradients.begin_alone(index)

    def difference(self, theirs: Proof, loss: float, weight: float) -> str | None:
        """Return what of the micro-batch that was repeated is something else now; and leave nothing of it."""
        ours = self.proof(theirs.micro_batch, loss, weight)
        self._gradients.drop()
        if ours is None or ours == theirs:
            return None if self._buffer is None else f"buffer {self._buffer}"
        if (ours.loss, ours.weight) != (theirs.loss, theirs.weight):
            return "its loss or weight"
        both = zip(self._names, ours.gradients, theirs.gradients, strict=True)
        return next(f"the gradient of {name}" for name, one, other in both if one != other)
