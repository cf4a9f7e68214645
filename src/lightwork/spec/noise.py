"""The gradient noise scale: how large a batch must be for its gradient to be more signal than noise.

From squared norms of a gradient over b samples (small) and over B (big), with g the gradient of all data and S the
variance of one sample's gradient, summed over its elements, both without bias (McCandlish et al. 2018, "An Empirical
Model of Large-Batch Training", appendix A.1):

    |g|^2 = (B |G_big|^2 - b |G_small|^2) / (B - b)
    S     = (|G_small|^2 - |G_big|^2) / (1/b - 1/B)

Their ratio B_noise = S / |g|^2 is the *simple noise scale*, in samples. From about there (the critical batch) twice the
batch saves far less than half of the steps. A single step says little of either, so both are averaged before they are
divided.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import final

#: The parts in which a gradient is looked at, one in each step; and how many rounds of all parts count.
PARTS, WINDOW = 8, 50

#: Rounds before there is an estimate.
_LEAST = 5

#: Of a normal distribution: 95 % lie within so many standard deviations.
_WIDTH = 1.96


@dataclass(frozen=True)
class NoiseScale:
    """An estimate."""

    samples: float  #: S / |g|^2; infinite where the mean gradient can not be told from 0
    low: float  #: of its confidence interval of 95 %
    high: float


@final
class NoiseEstimator:
    """Averages over the last `WINDOW` rounds, of `PARTS` steps each: in each one part of the gradient is seen."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # S and |g|^2, of the whole gradient
        self._parts: dict[int, tuple[float, float]] = {}  # of this round

    def take(self, part: int, small: float, big: float, num_small: int, num_big: int) -> bool:
        """Take the squared norms of a part of a step's gradient; return whether a round is complete.

        Args:
            small: the mean of those over `num_small` samples.
            big: that over all `num_big`.
        """
        if part == 0:
            self._parts.clear()
        if not math.isfinite(small + big):
            return False
        variance = (small - big) / (1 / num_small - 1 / num_big)
        self._parts[part] = variance, (num_big * big - num_small * small) / (num_big - num_small)
        if part != PARTS - 1 or len(self._parts) < PARTS:
            return False
        of_parts = list(self._parts.values())
        self._rounds.append((math.fsum(s for s, _ in of_parts), math.fsum(g for _, g in of_parts)))
        return True

    def estimate(self) -> NoiseScale | None:
        """Return what is known; None before there is enough.

        The interval is that of a ratio of means, by the delta method: Var(S/g) is about Var(S - r g) / (n mean(g)^2).
        """
        count = len(self._rounds)
        if count < _LEAST:
            return None
        variance = math.fsum(s for s, _ in self._rounds) / count
        signal = math.fsum(g for _, g in self._rounds) / count
        if signal <= 0:
            return NoiseScale(math.inf, 0.0, math.inf)
        ratio = variance / signal
        spread = math.fsum((s - ratio * g) ** 2 for s, g in self._rounds) / (count - 1)
        deviation = _WIDTH * math.sqrt(spread / count) / signal
        return NoiseScale(max(0.0, ratio), max(0.0, ratio - deviation), max(0.0, ratio + deviation))
