"""A hash of what is trained goes with each step: the same for any team, and another one where a single bit is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lightwork
from lightwork.errors import Disagreement
from lightwork.state.hashes import BucketHashes
from lightwork.state.state_layout import state_region
from tests.cases import CASES
from tests.fake_ranks import run_ranks
from tests.training import distributed, in_small_pieces, new_folder

#: Teams, each with settings of its own; whoever has copies must have the same.
TEAMS: dict[str, tuple[int, dict[str, Any], list[int] | None]] = {
    "two of a host": (2, {}, None),
    "three of a host": (3, {}, None),
    "two hosts": (2, {"transport": "group"}, None),
    "two hosts of three": (3, {}, [2, 1]),
}


def hashes_of(name: str, **settings: Any) -> list[int | None]:
    """Train, and return the hash of each step."""
    in_small_pieces()
    run, scheduler = distributed(CASES[name], **settings)
    seen = []
    for step in run.steps(CASES[name].dataset(), epochs=9, max_steps=18):
        for batch in step:
            step.backward(*CASES[name].loss(run.model, batch))
        if scheduler is not None:
            scheduler.step()
        seen.append(step._result.state_before)
    run.close()
    return seen


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "optimizer_state": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["gpt, tied, dropout, token weights", "convolution, batch norm", "Muon"])
def test_every_team_has_the_same_hashes(name: str, settings: dict[str, Any]) -> None:
    if name == "Muon" and settings:
        pytest.skip("whole parameters have no state in 8 bits")
    all_seen = [
        run_ranks(num, lambda: hashes_of(name, **settings), hosts=hosts, settings=team)
        for num, team, hosts in TEAMS.values()
    ]
    first = all_seen[0][0]
    assert first[0] is None
    assert len(set(first[8:16]) - {None}) >= 2
    assert all(seen == first for of_team in all_seen for seen in of_team)


@pytest.mark.parametrize("offload", [{}, {"optimizer": "host"}], ids=str)
def test_workers_with_devices_have_the_same_hashes(offload: dict[str, str]) -> None:
    seen = run_ranks(2, lambda: hashes_of("gpt, tied, dropout, token weights", device="rehearsal", offload=offload))
    assert seen[0] == seen[1]
    assert None not in seen[0][8:]


def test_one_worker_has_nobody_to_compare_with() -> None:
    assert run_ranks(1, lambda: hashes_of("gpt, tied, dropout, token weights")) == [[None] * 18]


@pytest.mark.parametrize("where", ["masters", state_region("exp_avg_sq")])
@pytest.mark.parametrize(
    ("num_workers", "settings", "hosts", "who"),
    [
        (2, {"transport": "group"}, None, "rank 0 than on rank 1"),
        (3, {"transport": "group"}, None, "rank 1"),
        (3, {}, [1, 2], "rank 0 than on rank 1"),
    ],
    ids=["two hosts", "three hosts", "hosts of one and two"],
)
def test_a_bit_that_flips_in_one_copy_is_named_within_eight_steps(
    num_workers: int, settings: dict[str, Any], hosts: list[int] | None, who: str, where: str
) -> None:
    last = [0] * num_workers
    sizes: dict[str, Any] = {"global_batch": 8, "micro_batch": 2, "run_dir": new_folder()}

    def work() -> None:
        in_small_pieces()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run = lightwork.distribute(model, optimizer, **sizes, precision="bf16")
        for step in run.steps(torch.randn(400, 6, generator=torch.Generator().manual_seed(1)), max_steps=20):
            for x in step:
                step.backward(run.model(x).square().mean())
            last[run.rank] = step.index
            if run.rank == 1 and step.index == 5:
                run._engine._parts.workplace.memory.region(where)[2] ^= 1  # past the guards of weights

    with pytest.raises(Disagreement, match=rf"the copies of the model differ: after step \d+ .* other bits on {who}\."):
        run_ranks(num_workers, work, hosts=hosts, settings=settings)
    assert 5 <= max(last) < 14


def test_without_the_hashes_the_bit_goes_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above sees what it says."""
    monkeypatch.setattr(BucketHashes, "take", lambda _self, _bucket, _granule: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_bit_that_flips_in_one_copy_is_named_within_eight_steps(
            2, {"transport": "group"}, None, "rank 0 than on rank 1", "masters"
        )
