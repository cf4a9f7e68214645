"""Update in backward: where one worker computes the whole step in one micro-batch, a bucket is updated as soon as its
gradient is complete, and the gradient goes. So no gradient but a few buckets' ever exists.

It needs no norm before the update (clipping, loss scaling). And nothing may read a weight after its own gradient is
there: autograd reads what it has saved, which for a parameter in the graph comes before; but a detached weight may be
saved by an operation further down. Such a micro-batch keeps its gradients until the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightwork.engine.backward.outbox import Outbox
from lightwork.engine.update import Updater
from lightwork.state.residency import Residency
from lightwork.state.weights import Weights

#: Elements of a model below which its gradients are not worth it.
WORTH_IT = 16 * 1024 * 1024


class UpdateInBackward:
    """The buckets of the step in hand that are updated within backward. Also watches what autograd saves of weights."""

    def __init__(
        self,
        weights: Weights,
        outbox: Outbox,
        updater: Updater,
        residency: Residency,
        bring: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """`bring` returns a saved tensor with its values, where weights come and go."""
        self.bring = bring
        self.outbox = outbox
        self._weights = weights
        self._updater = updater
        self._residency = residency
        self._divisor = 0.0
        self._touched = bytearray()
        self._norms: dict[int, list[torch.Tensor]] = {}  # by bucket: of each block, squared
        self._is_safe = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what autograd saves in a forward."""
        self._is_safe = True
        with saved_tensors_hooks(self._look_at, self.bring):
            yield

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a saved tensor lies in the memory of the weights; note one that is saved without its graph."""
        index = self._weights.parameter_of(tensor)
        if index is not None and not tensor.requires_grad and self._weights.parameters[index].requires_grad:
            self._is_safe = False
        return index is not None

    def _look_at(self, tensor: torch.Tensor) -> torch.Tensor:
        self.is_weight(tensor)
        return tensor

    def begin(self, divisor: float) -> bool:
        """Begin a step, whose gradients are to be divided by `divisor`; return False where they must be kept."""
        self._norms.clear()
        self._divisor = divisor
        return self._is_safe

    def follow(self, touched: bytearray) -> None:
        """Update what becomes complete; `touched` tells by parameter whether it has a gradient."""
        self._touched = touched
        self.outbox.on_complete = self._update

    def take_norms(self, bucket: int) -> list[torch.Tensor] | None:
        """Return the squared norms of the gradients of a bucket that was updated; None if it was not."""
        return self._norms.pop(bucket, None)

    def _update(self, bucket: int) -> None:
        message = self.outbox.messages[bucket]
        present = [
            bool(self._touched[span.blocks[0].parameter]) and self._divisor != 0 for span, _, _ in message.blocks
        ]
        views = message.views(self.outbox.packed(bucket))
        leaves = [view if is_there else None for view, is_there in zip(views, present, strict=True)]
        with torch.no_grad():
            if bucket > 0:
                self._residency.fetch(bucket - 1)
            self._residency.map(bucket)
            gradients = self._updater.gradients_of_one(bucket, leaves, self._divisor)
            self._norms[bucket] = self._updater.apply(bucket, gradients)
            self._residency.updated(bucket)
        self.outbox.taken(bucket)
