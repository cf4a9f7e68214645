"""What the engine does for a GPU, rehearsed on a CPU: the memory in units, staging and relays change no bit."""

from __future__ import annotations

from typing import Any

import pytest

from lightwork.engine import sharding
from lightwork.engine.elements import UnitElements
from lightwork.spec import layout
from tests.cases import CASES, Case
from tests.training import run_team, train

OFFLOADS: dict[str, dict[str, str]] = {
    "nothing offloaded": {},
    "optimizer on the host": {"optimizer": "host"},
    "weights on the host": {"weights": "host"},
    "everything on the host": {"optimizer": "host", "weights": "host", "gradients": "host"},
    "everything on disk": {"optimizer": "disk", "weights": "disk", "gradients": "disk"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_one_worker_has_the_digests_of_one_without_a_device(case: Case, offload: dict[str, Any]) -> None:
    (on_cpu,) = run_team(1, lambda: train(case))
    (rehearsed,) = run_team(1, lambda: train(case, device="rehearsal", offload=offload))
    assert rehearsed == on_cpu


def train_in_small_pieces(case: Case, **settings: Any) -> list[Any]:
    """Train with many small buckets, of which few are kept, and with NaN in memory that was given back."""
    layout.BLOCK, layout.BUCKET = 64, 128
    sharding.KEPT, sharding.AHEAD = 1, 2
    release = UnitElements.release

    def poisoned(self: UnitElements, start: int, end: int) -> None:
        for unit in self._units.of_elements(start, end):
            if self._flat[unit].untyped_storage().nbytes():
                self._whole(unit).fill_(0xFF)
        release(self, start, end)

    UnitElements.release = poisoned  # type: ignore[method-assign]
    return train(case, **settings)


@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "gpt, bf16", "experts, frozen, unused"])
@pytest.mark.parametrize("placement", ["replicate", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_a_team_has_the_digests_of_one_worker_wherever_everything_lies(
    name: str, placement: str, offload: dict[str, Any]
) -> None:
    case = CASES[name]
    (on_cpu,) = run_team(1, lambda: train_in_small_pieces(case))
    settings = {"placement": placement, "offload": offload, "device": "rehearsal"}
    for num_workers in (2, 3):
        for rehearsed in run_team(num_workers, lambda: train_in_small_pieces(case), settings=settings):
            assert rehearsed == on_cpu
