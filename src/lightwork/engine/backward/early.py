"""Update in backward: where one worker computes the whole step in one micro-batch, a bucket is updated as soon as its
gradient is complete, and the gradient goes. So no gradient but a few buckets' ever exists.

It needs no norm before the update (clipping, loss scaling).

    [Note: who reads a weight after its gradient]
    A weight that is written within backward must not be read after. Of what autograd saves, a parameter in the graph is
    read before its gradient is there, since the gradient follows from that operation. A weight without its graph
    (`weight.detach()`) may be saved by an operation whose backward comes later. So what is saved is looked at, and a
    micro-batch with such a weight keeps its gradients until backward has ended. The loss is read before backward
    begins: if it is not finite, no weight may be written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightwork.engine.backward.gradients import Fold
from lightwork.engine.backward.outbox import Consumed
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.engine.update import Updater
from lightwork.state.weights import Weights


class Early:
    """What is updated within backward. Here: nothing."""

    #: Whether backward writes weights.
    updates_in_backward = False

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Look at what autograd saves in a forward."""
        return contextlib.nullcontext()

    def begin_step(self, divisor: float) -> Consumed | None:
        """Begin a step, whose gradients are to be divided by `divisor`; return who takes them, if anyone does."""
        return None

    def follow(self, fold: Fold) -> None:
        """Hear of the fold whose buckets are to be updated as they become complete."""

    def take_norms(self, bucket: int) -> list[torch.Tensor] | None:
        """Return the squared norms of the gradients of a bucket that was updated; None if it was not."""
        return None


class UpdateInBackward(Early, SavedWeights):
    """The buckets of the step in hand that are updated within backward. Also watches what autograd saves of weights."""

    updates_in_backward = True

    def __init__(self, weights: Weights, gradients: Consumed, updater: Updater, saved: SavedWeights) -> None:
        """`saved` brings what autograd has saved of weights."""
        super().__init__(weights)
        self._saved = saved
        self._gradients = gradients
        self._gradients.consume = self._update
        self._updater = updater
        self._divisor = 0.0
        self._touched = bytearray()
        self._norms: dict[int, list[torch.Tensor]] = {}  # by bucket: of each block, squared
        self._is_safe = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look for weights without their graph."""
        self._is_safe = True
        with saved_tensors_hooks(self._look_at, self.bring_saved):
            yield

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a saved tensor lies in the memory of the weights; note one that is saved without its graph."""
        index = self._weights.parameter_of(tensor)
        if index is not None and not tensor.requires_grad and self._weights.parameters[index].requires_grad:
            self._is_safe = False  # [Note: who reads a weight after its gradient]
        return index is not None

    def bring_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring a saved weight, where weights come and go."""
        return self._saved.bring_saved(tensor)

    def _look_at(self, tensor: torch.Tensor) -> torch.Tensor:
        self.is_weight(tensor)
        return tensor

    def begin_step(self, divisor: float) -> Consumed | None:
        """Take the gradients, unless something may read weights after theirs are there."""
        self._norms.clear()
        self._divisor = divisor
        return self._gradients if self._is_safe else None

    def follow(self, fold: Fold) -> None:
        """Keep the fold's record of which parameters have a gradient."""
        self._touched = fold.touched

    def take_norms(self, bucket: int) -> list[torch.Tensor] | None:
        """Return the norms of a bucket that was updated in this step, once."""
        return self._norms.pop(bucket, None)

    def _update(self, bucket: int) -> None:
        message = self._gradients.messages[bucket]
        present = [
            bool(self._touched[span.blocks[0].parameter]) and self._divisor != 0 for span, _, _ in message.blocks
        ]
        views = message.views(self._gradients.packed(bucket))
        leaves = [view if is_there else None for view, is_there in zip(views, present, strict=True)]
        with torch.no_grad():
            self._norms[bucket] = self._updater.update_of_one(bucket, leaves, self._divisor, following=bucket - 1)
        self._gradients.mark_taken(bucket)
