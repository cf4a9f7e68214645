"""A number or tensor that a forward leaves in an attribute of a module is seen by one worker alone: a run says so."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lightwork
from tests.fake_ranks import run_ranks
from tests.training import new_folder

DATA = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Calls `leave` with itself and its output, in each forward."""

    def __init__(self, leave: Callable[[Net, torch.Tensor], object]) -> None:
        super().__init__()
        self.leave = leave
        self.body = nn.Linear(4, 4)
        self.count, self.rate, self.last, self.state = 0, 0.5, torch.zeros(2, 4), (torch.zeros(4), torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        self.leave(self, out)
        return out


def assign(name: str, value: Callable[[Net, torch.Tensor], object]) -> Callable[[Net, torch.Tensor], object]:
    return lambda net, out: setattr(net, name, value(net, out))


def train(leave: Callable[[Net, torch.Tensor], object], num_workers: int = 1) -> None:
    def job() -> None:
        model = nn.Sequential(Net(leave))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=new_folder())
        for step in run.steps(DATA):
            for x in step:
                step.backward(model(x).square().mean())
            model[0].rate = 1 / (2 + step.index)  # type: ignore[assignment]  # the script's own: on every worker
        run.close()

    run_ranks(num_workers, job)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("leave", "told"),
    [
        (assign("count", lambda net, out: net.count + 1), "module 0 keeps the number count .*from 1 to 2"),
        (assign("rate", lambda net, out: net.rate * 0.9), "module 0 keeps the number rate "),
        (assign("last", lambda net, out: out.detach()[:2]), "module 0 keeps last .*another"),
        (
            assign("state", lambda net, out: (out[0].detach(), out[1].detach())),
            "module 0 keeps state .*another",
        ),
    ],
    ids=["a count", "a rate", "a tensor", "a tuple of tensors"],
)
def test_what_each_forward_changes_is_told_once(
    capsys: pytest.CaptureFixture[str], leave: Callable[[Net, torch.Tensor], object], told: str, num_workers: int
) -> None:
    train(leave, num_workers)
    lines = [line for line in capsys.readouterr().err.splitlines() if " in an attribute" in line]
    assert len(lines) == num_workers
    for line in lines:
        assert re.search(told, line), line


@pytest.mark.parametrize(
    "leave",
    [
        lambda net, out: None,
        assign("count", lambda net, out: len(out)),  # a size: the same in each
        assign("last", lambda net, out: net.last),
        assign("loss", lambda net, out: out.square().mean()),  # for the loss of the same body; it has a graph
    ],
    ids=["nothing", "a size", "the same tensor", "a part of the loss"],
)
def test_what_is_the_same_in_each_forward_or_has_a_graph_is_not(
    capsys: pytest.CaptureFixture[str], leave: Callable[[Net, torch.Tensor], object]
) -> None:
    train(leave)
    assert " in an attribute" not in capsys.readouterr().err
