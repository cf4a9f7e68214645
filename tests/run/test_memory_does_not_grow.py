"""From the third step on, a step takes no memory that the steps before have not taken."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lightwork
from tests.training import new_folder, run_team

STEPS = 40


def taken_by_step() -> list[int]:
    """Return after each step the bytes of this worker's own memory and of what it shares."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=1, run_dir=str(new_folder()))
    data = torch.utils.data.TensorDataset(torch.randn(8, 256))
    seen = []
    for step in run.steps(data, max_steps=STEPS):
        for (x,) in step:
            step.backward(model(x).square().mean())
        text = Path("/proc/self/smaps_rollup").read_text()
        own = int(re.search(r"(?m)^Anonymous:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
        seen.append(own + os.fstat(run._team._stores[0].fileno() or -1).st_blocks * 512)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_grad_norm": 1.0, "precision": "bf16"},
        {"transport": "group"},
        {"transport": "group", "placement": "zero1", "wire": "bf16", "optimizer_state": "int8"},
        {"offload": {"optimizer": "disk", "gradients": "disk", "weights": "disk"}, "activations": "recompute"},
    ],
    ids=str,
)
def test_memory_stays_as_it_was_after_the_third_step(settings: dict[str, Any]) -> None:
    parameters = (256 * 512 * 2 + 768) * 4
    # Stolen micro-batches go to slots of their own, whose pages come when they are first needed.
    for seen in run_team(2, taken_by_step, settings={**settings, "steal": False}):
        # Scratch, and in the journal a record of a block (6 bytes a parameter here), come with the first update that
        # falls to a worker, whenever that is. One set of gradients lost in each step would be 37 of them.
        assert max(seen[3:]) - max(seen[:3]) < 8 * parameters, [size - seen[0] for size in seen]
