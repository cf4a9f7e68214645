"""What a step comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightwork.spec.noise import NoiseScale


@dataclass(frozen=True)
class StepResult:
    """What a step came to; the same on every worker."""

    loss: float  #: weighted mean over the global batch
    grad_norm: float  #: L2, before clipping
    skipped: bool  #: the gradient was not finite, and the weights are as they were (loss scaling)
    metrics: Sequence[Mapping[str, Sequence[float]]]  #: what each micro-batch collected by name, as numbers
    goes_on: bool | None  #: by the votes of the micro-batches, whether more steps follow; None where none votes
    wishes: int  #: of the workers, for its end
    state_before: int | None  #: a hash of a part of the state from which it began
    noise: NoiseScale | None  #: of the gradients so far, where there is a new estimate
