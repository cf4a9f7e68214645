"""`torch.func` in a loss: tangents, jacobians, gradients of each sample, right under every dial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import lightwork
from tests.fake_ranks import run_ranks
from tests.training import new_folder

#: Of torch's own forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: torch.Tensor = self.head(x)
        return out


def tangents(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return jvp(model, (x,), (torch.ones_like(x),))[1].square().mean()


def jacobians(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return vmap(jacrev(lambda row: model(row[None])[0]))(x).square().mean()


def gradients_of_samples(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    def of_one(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row[None],)).square().mean()

    found = vmap(grad(of_one), (None, 0))(dict(model.named_parameters()), x)
    return torch.stack([value.square().mean() for value in found.values()]).sum()


def rows(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return vmap(model)(x).square().mean()


DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
LOSSES: list[Loss] = [tangents, jacobians, gradients_of_samples, rows]
KEPT: list[dict[str, Any]] = [
    {"activations": "recompute"},
    {"activations": "int8"},
    {"device": "rehearsal", "activations": "offload"},
    {"transport": "group", "placement": "zero2"},
]
AWAY: list[dict[str, Any]] = [
    {"transport": "group", "placement": "zero3"},
    {"device": "rehearsal", "offload": {"weights": "host"}},
]


def job(loss: Loss, micro_batch: int, **settings: Any) -> list[torch.Tensor]:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = lightwork.distribute(
        model, optimizer, global_batch=8, micro_batch=micro_batch, run_dir=new_folder(), **settings
    )
    for step in run.steps(DATA, shuffle=False):
        for x in step:
            step.backward(loss(model, x))
    return list(run.state_dict().values())


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        *((loss, settings) for loss in LOSSES for settings in KEPT),
        *((loss, settings) for loss in (tangents, rows) for settings in AWAY),  # torch refuses the others
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_transform_gives_the_bits_of_one_worker_with_no_dial(loss: Loss, settings: dict[str, Any]) -> None:
    expected = run_ranks(1, lambda: job(loss, 4))[0]
    for seen in run_ranks(2, lambda: job(loss, 4, **settings)):
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_transform_gives_what_plain_pytorch_gives(loss: Loss) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for x in DATA.split(8):
        optimizer.zero_grad()
        loss(model, x).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    seen = run_ranks(1, lambda: job(loss, 8, activations="recompute"))[0]
    for one, other in zip(seen, model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
