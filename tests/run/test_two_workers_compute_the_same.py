"""One micro-batch is computed by two workers and compared, every so many steps and by newcomers; it changes no bit."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.launcher.team import WorkerResult, fork_team
from lightwork.spec.plan import Plan
from tests.training import new_folder

NUM_STEPS = 24


#: What an odd worker does, and how it is called.
ODD = {
    "forward": "its loss or weight differs",
    "gradient": "the gradient of 0.weight differs",
    "buffer": "buffer 1.seen differs",
}


class Odd(nn.Module):
    """A layer, of which a worker may do what others do not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(1))
        self.kind = kind
        self.is_odd = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.is_odd and self.kind == "buffer"
        x = self.layer(x)
        if self.is_odd and self.kind == "forward":
            return x * (1 + 2**-20)
        if self.is_odd and self.kind == "gradient":
            x.register_hook(lambda grad: grad * (1 + 2**-20))
        return x


def train(folder: Path, kind: str, odd_rank: int, dies: int, plan: Plan, **settings: object) -> str:
    """Train; `odd_rank` does something else from its first step on, as a newcomer if `dies` is its rank."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), Odd(kind), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    is_newcomer = "LIGHTWORK_JOINS" in os.environ
    buffers = {"1.seen": "first"}
    run = lightwork.distribute(
        model, optimizer, global_batch=12, micro_batch=3, run_dir=folder, plan=plan, buffers=buffers, **settings
    )
    model[1].is_odd = run.rank == odd_rank and (is_newcomer or dies < 0)
    x = torch.randn(72, 6, generator=torch.Generator().manual_seed(1))
    for step in run.steps(TensorDataset(x), max_steps=NUM_STEPS):
        for (xs,) in step:
            time.sleep(0.01)
            if run.rank == dies and step.index == 2 and not is_newcomer:
                os.kill(os.getpid(), signal.SIGKILL)
            step.backward(model(xs).square().mean())
    return run.digest()


def compared(folder: Path) -> list[dict[str, int]]:
    """Return the comparisons that the traces tell of."""
    lines = [line for path in sorted((folder / "trace").glob("rank*.jsonl")) for line in path.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record["name"] == "compared"]


def alone(**settings: object) -> str:
    (result,) = fork_team(1, partial(train, new_folder(), "", -1, -1, Plan(), **settings))
    assert result.error is None, result.error
    return str(result.value)


def errors(results: list[WorkerResult]) -> str:
    return "\n".join(result.error or "" for result in results)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "fp16"}], ids=str)
def test_comparing_changes_no_bit_and_finds_no_difference(num_workers: int, settings: dict[str, object]) -> None:
    folder = new_folder()
    results = fork_team(num_workers, partial(train, folder, "", -1, -1, Plan(audit_every=2), **settings))
    assert [result.error for result in results] == [None] * num_workers
    assert {result.value for result in results} == {alone(**settings)}
    steps = sorted(record["step"] for record in compared(folder))
    assert steps == (list(range(0, NUM_STEPS, 2)) if num_workers > 1 else []), "one alone has nobody to compare with"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("forward", "its loss or weight differs"),
        ("gradient", "the gradient of 0.weight differs"),
        ("buffer", "buffer 1.seen"),
    ],
)
@pytest.mark.parametrize("odd_rank", [0, 1])
def test_a_worker_that_computes_something_else_ends_the_team_by_name(kind: str, said: str, odd_rank: int) -> None:
    results = fork_team(2, partial(train, new_folder(), kind, odd_rank, -1, Plan(audit_every=2)))
    assert all(result.error for result in results)
    assert "was computed by two workers" in errors(results)
    assert said in errors(results)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("forward", "its loss or weight differs"),
        ("gradient", "the gradient of 0.weight differs"),
        ("buffer", "buffer 1.seen"),
    ],
)
@pytest.mark.parametrize("dies", [0, 1])
def test_a_newcomer_that_computes_something_else_is_turned_away(
    kind: str, said: str, dies: int, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = new_folder()
    results = fork_team(2, partial(train, folder, kind, dies, dies, Plan()), restarts=3)
    other = next(result for result in results if result.rank != dies)
    assert other.error is None, other.error
    assert other.value == alone()
    error = capfd.readouterr().err
    assert f"CanNotJoin: rank {dies} can not take the place of a worker that has died: it computes micro-batch" in error
    assert said in error


def test_a_newcomer_has_compared_before_it_goes_on() -> None:
    folder = new_folder()
    results = fork_team(2, partial(train, folder, "", -1, 1, Plan()), restarts=3)
    assert {result.value for result in results if result.status == 0} == {alone()}
    (record,) = compared(folder)
    assert record["step"] > 2


def test_where_no_two_workers_share_a_memory_it_is_refused() -> None:
    results = fork_team(2, partial(train, new_folder(), "", -1, -1, Plan(audit_every=2, transport="group")))
    assert "audit_every=2 compares workers that share a memory" in errors(results)


def test_a_number_of_steps_that_is_none_is_refused() -> None:
    with pytest.raises(lightwork.SpecError, match="audit_every=-1 is not a whole number of steps"):
        Plan(audit_every=-1)
