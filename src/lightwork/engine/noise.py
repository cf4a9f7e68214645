"""The noise scale of a run's gradients, beside its steps: every worker comes to the same from the records of all."""

from __future__ import annotations

import math
from typing import final

from lightwork.engine.backward.leaves import LeafNorms
from lightwork.spec.noise import PARTS, NoiseEstimator, NoiseScale
from lightwork.team.ledger import Ledger


class Unasked:
    """Nobody asks for it."""

    num_all = math.inf  #: samples of the data set, where an epoch takes each once

    def begin_step(self, step: int) -> None:
        """Begin a step."""

    def begin_micro_batch(self, share: float) -> None:
        """Begin with a micro-batch, of which `share` times the mean loss is differentiated."""

    def of_micro_batch(self) -> float:
        """Return the squared norm of a part of the gradient of the mean loss; NaN if nobody has looked."""
        return math.nan

    def end_step(self, step: int, num_micro_batches: int) -> NoiseScale | None:
        """Take in a step that is committed; return an estimate when there is a new one."""
        return None


@final
class Noise(Unasked):
    """What a worker sees of it. Only steps count whose micro-batches are all alike: full, and of one weight."""

    def __init__(self, leaves: LeafNorms, ledger: Ledger, micro_batch: int) -> None:
        """`micro_batch` is in samples."""
        self.leaves = leaves
        self._ledger = ledger
        self._micro_batch = micro_batch
        self.estimator = NoiseEstimator(parts=leaves.num_parts)
        self._share = 0.0
        self._looks = False  # in this step

    def begin_step(self, step: int) -> None:
        """Look at the part of the gradients that is due."""
        self.leaves.begin_step(step % PARTS)
        self._looks = step % PARTS < self.leaves.num_parts

    def begin_micro_batch(self, share: float) -> None:
        """Begin to look."""
        self._share = share
        self.leaves.begin()

    def of_micro_batch(self) -> float:
        """Return what was looked at."""
        return self.leaves.square() / self._share**2 if self._looks and self._share else math.nan

    def end_step(self, step: int, num_micro_batches: int) -> NoiseScale | None:
        """Return an estimate each `PARTS` steps."""
        if self._looks:
            self._take(step, num_micro_batches)
        return self.estimator.estimate() if step % PARTS == PARTS - 1 else None

    def _take(self, step: int, num_micro_batches: int) -> None:
        weights = {weight for _, weight in self._ledger.records(step, num_micro_batches)}
        squares = self._ledger.squares(step, num_micro_batches)
        if num_micro_batches < 2 or len(weights) > 1:
            return
        big = math.fsum(self._ledger.norms_squared()[step % PARTS :: PARTS])
        small = math.fsum(squares) / num_micro_batches
        b = self._micro_batch
        self.estimator.take(step % PARTS, small, big, b, b * num_micro_batches, self.num_all)
