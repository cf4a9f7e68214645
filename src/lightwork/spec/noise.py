"""The gradient noise scale: how large a batch must be for its gradient to be more signal than noise.

From squared norms of a gradient over b samples (small) and over B (big), with g the gradient of all data and S the
variance of one sample's gradient, summed over its elements, both without bias (McCandlish et al. 2018, "An Empirical
Model of Large-Batch Training", appendix A.1):

    S     = (|G_small|^2 - |G_big|^2) / (1/b - 1/B)
    |g|^2 = |G_big|^2 - S (1/B - 1/N)

The last term is 0 in the paper, whose samples come from an endless stream. An epoch takes each of N samples once, so
that larger batches of it vary less (the correction for a finite population); without it |g|^2 would come out too small
by S / N, which is much of it where the noise scale is not far below N. (It corrects too much by the part of S that is
not the samples' but dropout's or an augmentation's.)

The ratio B_noise = S / |g|^2 is the *simple noise scale*, in samples. From about there (the critical batch) twice the
batch saves far less than half of the steps. A single step says little of either, so both are averaged before they are
divided.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

#: The parts in which a gradient is looked at, one in each step; and how many looks at each of them count.
PARTS, WINDOW = 8, 50

#: Looks at each before there is an estimate.
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
    """Averages over the last steps. In each of them one part of the gradient is seen, in turn."""

    def __init__(self, window: int = WINDOW, parts: int = PARTS) -> None:
        """`window` is how many looks at each part count; only the first `parts` hold anything."""
        self._seen: list[deque[tuple[float, float]]] = [deque(maxlen=window) for _ in range(parts)]  # S and |g|^2

    def take(
        self, part: int, small: float, big: float, num_small: int, num_big: int, num_all: float = math.inf
    ) -> None:
        """Take the squared norms of a part of a step's gradient.

        Args:
            small: the mean of those over `num_small` samples.
            big: that over all `num_big`.
            num_all: samples of the data set, of which an epoch takes each once; infinite where that is not so.
        """
        if math.isfinite(small + big):
            variance = (small - big) / (1 / num_small - 1 / num_big)
            self._seen[part].append((variance, big - variance * (1 / num_big - 1 / num_all)))

    def estimate(self) -> NoiseScale | None:
        """Return what is known; None before there is enough.

        The interval is that of a ratio of sums, by the delta method: with r = S / |g|^2 the variance of r is about that
        of S - r |g|^2, of which each part's mean has its own, over |g|^4.
        """
        if min(map(len, self._seen)) < _LEAST:
            return None
        variance = math.fsum(math.fsum(s for s, _ in of_part) / len(of_part) for of_part in self._seen)
        signal = math.fsum(math.fsum(g for _, g in of_part) / len(of_part) for of_part in self._seen)
        if signal <= 0:
            return NoiseScale(math.inf, 0.0, math.inf)
        ratio = variance / signal
        spread = math.fsum(_variance_of_mean([s - ratio * g for s, g in of_part]) for of_part in self._seen)
        deviation = _WIDTH * math.sqrt(spread) / signal
        return NoiseScale(max(0.0, ratio), max(0.0, ratio - deviation), max(0.0, ratio + deviation))


def _variance_of_mean(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
