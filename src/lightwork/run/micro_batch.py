"""Which step it is, and the micro-batch of it that a worker has in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightwork.data.order import Ids
from lightwork.run.collected import Collected


@dataclass(frozen=True, kw_only=True)
class StepPlace:
    """Which step it is."""

    index: int  #: of the run
    epoch: int
    step_in_epoch: int
    num_micro_batches: int
    is_last: bool | None  #: of its epoch; None where only reading shows it
    wish: int = 0  #: of this worker


@dataclass
class MicroBatch:
    """The micro-batch that the user's loop body has in hand."""

    index: int
    ids: Ids
    start: float  #: of forward, on the trace's clock
    loss: float = 0.0
    weight: float = 0.0
    collected: Collected = field(init=False)

    def __post_init__(self) -> None:
        self.collected = Collected(len(self.ids), "step")
