"""Hosts that see different disks: the main worker decides where a run is kept and from what it goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightwork
from lightwork.launcher.team import fork_team
from tests.cases import vectors
from tests.training import run_team

#: One path, and another folder for every process: each sees a disk of its own.
OWN_DISK = Path("/proc/self/cwd")

pytestmark = pytest.mark.skipif(not OWN_DISK.exists(), reason="this system has no /proc")


def trained(disks: Path, *, save_on: str = "", **settings: Any) -> tuple[int, str]:
    """Train two steps where each worker has a disk of its own; return the steps before them, and the digest."""
    rank = str(lightwork.rank())
    (disks / rank).mkdir(exist_ok=True)
    os.chdir(disks / rank)
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = lightwork.distribute(model, optimizer, global_batch=8, run_dir=OWN_DISK / "run", **settings)
    begun = run.step_index
    for step in run.steps(vectors(), max_steps=begun + 2):
        for x, y in step:
            step.backward(F.cross_entropy(run.model(x), y))
    if save_on:
        run.save(OWN_DISK / "run" / "checkpoint")
    digest = run.digest()
    run.close()
    return begun, digest


@pytest.mark.parametrize("transport", ["host", "group"])
def test_every_worker_keeps_its_trace_on_its_own_disk(transport: str, tmp_path: Path) -> None:
    first, second = run_team(2, lambda: trained(tmp_path, transport=transport))
    assert first == second
    for rank in "01":
        assert [path.name for path in (tmp_path / rank / "run" / "trace").iterdir()] == [f"rank{rank}.jsonl"]
    assert (tmp_path / "0" / "run" / "roster.json").exists()
    assert not (tmp_path / "1" / "run" / "roster.json").exists()


def test_a_checkpoint_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    run_team(1, lambda: trained(tmp_path, save_on="0"))
    first, second = fork_team(2, lambda: trained(tmp_path, transport="group"))
    assert "CheckpointError: rank 1 on " in (second.error or "")
    assert "does not see the checkpoint /proc/self/cwd/run/checkpoint from which rank 0 goes on" in (second.error or "")
    assert first.status != 0


def test_a_checkpoint_that_only_another_worker_sees_is_left_alone(tmp_path: Path) -> None:
    run_team(1, lambda: trained(tmp_path, save_on="0"))
    (tmp_path / "0").rename(tmp_path / "1")
    first, second = run_team(2, lambda: trained(tmp_path, transport="group"))
    assert first == second
    assert first[0] == 0
