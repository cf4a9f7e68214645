"""Between steps, after the loop and after the run, a model's buffers are those that plain PyTorch has there."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from tests.training import new_folder, run_team

INPUTS = torch.randn(42, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(42)[:, None]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))


def seen_in(model: nn.Sequential) -> list[Any]:
    return [value.tolist() for value in model[0].buffers()]


def by_hand(micro_batches: int) -> list[Any]:
    """Return the buffers after each step, and after the loop the outputs in eval mode.

    A step's buffers are the mean of what each of its micro-batches makes of those before it, by samples.
    """
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for batch in INPUTS.split(8):
        start = {name: value.clone() for name, value in model[0].named_buffers()}
        left: list[dict[str, torch.Tensor]] = []
        for part in batch.split(8 // micro_batches):
            model[0].load_state_dict({**model[0].state_dict(), **start})
            (model(part).mean() * len(part) / len(batch)).backward()
            left.append({name: value.clone() for name, value in model[0].named_buffers()})
        sizes = [len(part) for part in batch.split(8 // micro_batches)]
        mean = {
            name: sum(of[name].double() * size for of, size in zip(left, sizes, strict=True)) / len(batch)
            for name in ("running_mean", "running_var")
        }
        count = start["num_batches_tracked"] + len(left)
        model[0].load_state_dict({**model[0].state_dict(), **mean, "num_batches_tracked": count})
        optimizer.step()
        optimizer.zero_grad()
        seen.append(seen_in(model))
    model.eval()
    with torch.no_grad():
        return [*seen, model(INPUTS).tolist()]


def in_a_team(micro_batch: int, ends_by: str) -> list[Any]:
    model = build()
    run = lightwork.distribute(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        global_batch=8,
        micro_batch=micro_batch,
        run_dir=str(new_folder()),
    )
    seen: list[Any] = []
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).mean())
        seen.append(seen_in(model))
    if ends_by == "close":
        run.close()
    model.eval()
    with torch.no_grad():
        return [*seen, model(INPUTS).tolist()]


def close(one: Any, other: Any) -> bool:
    return torch.allclose(torch.tensor(one).double(), torch.tensor(other).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ends_by", ["nothing", "close"])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [8, 4])  # with 8 a worker computes nothing of most steps
def test_every_worker_sees_them(micro_batch: int, num_workers: int, ends_by: str) -> None:
    expected = by_hand(8 // micro_batch)
    teams = run_team(num_workers, lambda: in_a_team(micro_batch, ends_by))
    for seen in teams:
        assert len(seen) == len(expected)
        for step, (found, wanted) in enumerate(zip(seen[:-1], expected[:-1], strict=True)):
            assert all(close(a, b) for a, b in zip(found, wanted, strict=True)), step
        assert close(seen[-1], expected[-1])
        assert seen == teams[0]


def left_in_the_middle() -> bool:
    """Leave a step by an error after its forward; return whether the buffers are those of its beginning."""
    model = build()
    run = lightwork.distribute(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), global_batch=8, micro_batch=8, run_dir=str(new_folder())
    )
    before: list[Any] = []
    with contextlib.suppress(ZeroDivisionError):
        for step in run.steps(TensorDataset(INPUTS), shuffle=False):
            for (x,) in step:
                before = seen_in(model)
                model(x)
                raise ZeroDivisionError
    changed = seen_in(model) != before
    run.close()
    return changed and seen_in(model) == before


def test_a_step_that_is_left_in_its_middle_leaves_none_of_a_micro_batch() -> None:
    assert run_team(1, left_in_the_middle) == [True]


def writes_of_the_script() -> list[Any]:
    """Set a buffer after the last step; return what is there when the run is closed."""
    model = build()
    run = lightwork.distribute(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), global_batch=8, micro_batch=8, run_dir=str(new_folder())
    )
    for step in run.steps(TensorDataset(INPUTS), shuffle=False):
        for (x,) in step:
            step.backward(model(x).mean())
    model[0].reset_running_stats()
    run.close()
    return seen_in(model)


def test_what_the_script_writes_after_the_last_step_stays() -> None:
    assert run_team(1, writes_of_the_script) == [[[0.0] * 3, [1.0] * 3, 0]]
