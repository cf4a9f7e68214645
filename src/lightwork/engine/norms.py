"""Norms of a step's gradient: of each bucket on the board, and what follows from that of all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from lightwork.device.base import Device
from lightwork.team.ledger import Ledger

#: The slope of torch.nn.utils.clip_grad_norm_: max_norm / (norm + this).
CLIP_EPSILON = 1e-6


class Norms:
    """One worker's view of them."""

    def __init__(
        self, ledger: Ledger, device: Device, num_own: int, limit: float | None, *, may_overflow: bool
    ) -> None:
        """`num_own` buckets are this host's; `limit` clips; where a gradient `may_overflow`, losses are scaled."""
        self._ledger = ledger
        self._device = device
        self._num_own = num_own
        self._limit = limit
        self._may_overflow = may_overflow
        self._squares: dict[int, Sequence[torch.Tensor]] = {}  # by bucket, of each block's gradient: not read yet

    @property
    def come_first(self) -> bool:
        """Whether the norm of the whole gradient must be known before the update."""
        return self._may_overflow or self._limit is not None

    def of_bucket(self, bucket: int, squares: Sequence[torch.Tensor]) -> float | None:
        """Return a bucket's squared norm, the sum of the `squares` of its blocks, if these can be read now.

        From a device, those of all buckets are read at once with the last one, and written down here.
        """
        if not self._device.is_late:
            return math.fsum(map(float, squares))
        self._squares[bucket] = squares
        if len(self._squares) == self._num_own:
            of_all = [square for of_bucket in self._squares.values() for square in of_bucket]
            values = iter(torch.stack(of_all).tolist() if of_all else [])
            for own, of_blocks in self._squares.items():
                self._ledger.write_norm(own, math.fsum(itertools.islice(values, len(of_blocks))))
            self._squares.clear()
        return None

    def of_all(self) -> float:
        """Return the L2 norm of the whole gradient."""
        squares = self._ledger.norms_squared()
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf

    def may_be_used(self) -> bool:
        """Return whether the step's gradient may be used: always, where losses are not scaled."""
        return not self._may_overflow or math.isfinite(self.of_all())

    def clip_scale(self) -> float:
        """Return what clipping multiplies the gradient by; 1 where it does not clip."""
        return 1.0 if self._limit is None else min(1.0, self._limit / (self.of_all() + CLIP_EPSILON))
