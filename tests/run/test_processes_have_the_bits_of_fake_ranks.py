"""Real teams of each kind, in processes: what is shown on fake ranks (`tests/engine`) holds for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import CASES
from tests.training import alone, run_team, train

GROUP = {"transport": "group"}
DISK = {"optimizer": "disk", "weights": "disk", "gradients": "disk"}
TEAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 worker": (1, {}),
    "3 workers": (3, {}),
    "11 workers": (11, {}),
    "2 hosts, replicate": (2, GROUP),
    "3 hosts, zero1": (3, {**GROUP, "placement": "zero1"}),
    "3 hosts, zero2": (3, {**GROUP, "placement": "zero2"}),
    "3 hosts, zero3": (3, {**GROUP, "placement": "zero3"}),
    "on disk": (2, {"offload": DISK}),
    "hosts on disk": (2, {**GROUP, "placement": "zero1", "offload": DISK, "activations": "recompute"}),
    "rehearsed devices": (2, {"device": "rehearsal", "placement": "zero3", "offload": {"optimizer": "host"}}),
}


@pytest.mark.parametrize(("num_workers", "settings"), TEAMS.values(), ids=TEAMS)
@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "buffers"])
def test_every_step_has_the_digest_of_one_fake_rank(name: str, num_workers: int, settings: dict[str, Any]) -> None:
    case = CASES[name]
    for seen in run_team(num_workers, lambda: train(case), settings=settings):
        assert seen == alone(name)
