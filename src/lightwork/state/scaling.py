"""Dynamic loss scaling, which keeps small fp16 gradients from vanishing (Micikevicius et al., 2018, section 3.2).

The loss is multiplied by a power of two before backward, and the sum of gradients divided by it. When the sum over the
whole global batch is not finite, everyone leaves the weights as they are and halves the scale; after `GROWTH_STEPS`
finite steps it is doubled.

The scale of a step lies in shared memory, in one of two places used in turn ([Note: what a late worker may read] in
`team/ledger`).
"""

from __future__ import annotations

from typing import NamedTuple

from lightwork.store.regions import Regions

#: torch.amp.GradScaler's values.
INITIAL_SCALE = 65536.0
GROWTH_STEPS = 2000

#: The smallest scale: below it a loss is not finite for another reason.
SMALLEST_SCALE = 2.0**-14

_REGION = "loss scale"
_FIELDS = 3


class Scale(NamedTuple):
    """The state of loss scaling as a step begins."""

    scale: float = INITIAL_SCALE
    good_steps: int = 0  #: since the scale changed
    skipped: int = 0  #: steps in all whose gradients were not finite


class LossScale:
    """The shared state of loss scaling. With `enabled` False the scale is always 1."""

    def __init__(self, memory: Regions, *, enabled: bool) -> None:
        self.enabled = enabled
        self._values = memory.region(_REGION).cast("d")

    @staticmethod
    def region_bytes() -> dict[str, int]:
        """Return the bytes of the region, by name."""
        return {_REGION: 2 * _FIELDS * 8}

    def of(self, step: int) -> float:
        """Return the factor of the loss in `step`."""
        return self.state(step).scale if self.enabled else 1.0

    def state(self, step: int) -> Scale:
        """Return the state as `step` begins."""
        at = step % 2 * _FIELDS
        scale, good_steps, skipped = self._values[at : at + _FIELDS]
        return Scale(scale, int(good_steps), int(skipped)) if scale else Scale()

    def set_state(self, step: int, state: Scale) -> None:
        """Let `step` begin with `state`. Nobody is in a step."""
        at = step % 2 * _FIELDS
        self._values[at], self._values[at + 1], self._values[at + 2] = state

    def advance(self, step: int, *, finite: bool) -> None:
        """Set the state of the step after `step`. One worker does."""
        scale, good_steps, skipped = self.state(step)
        if not finite:
            scale, good_steps, skipped = max(scale / 2, SMALLEST_SCALE), 0, skipped + 1
        else:
            good_steps += 1
            if good_steps == GROWTH_STEPS:
                scale, good_steps = scale * 2, 0
        self.set_state(step + 1, Scale(scale, good_steps, skipped))
