"""Gradients that are sparse, or not finite: named where they come, not in the step that suffers from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightwork
from lightwork.errors import NonFiniteLoss, UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

DATA = torch.arange(16)


class Embeds(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(16, 4))
        self.sparse = sparse

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.table, sparse=self.sparse)


def train(loss: Callable[[nn.Module, torch.Tensor], torch.Tensor], sparse: bool = False) -> int:
    model = Embeds(sparse)
    run = lightwork.distribute(
        model, torch.optim.SGD(model.parameters(), lr=0.1), global_batch=8, micro_batch=4, run_dir=new_folder()
    )
    for step in run.steps(DATA, shuffle=False, epochs=2):
        for x in step:
            step.backward(loss(model, x))
    return run.step_index


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_sparse_gradient_is_refused_by_name(num_workers: int) -> None:
    with pytest.raises(UsageError, match="parameter table has got a sparse gradient"):
        run_ranks(num_workers, lambda: train(lambda model, x: model(x).mean(), sparse=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_gradient_that_is_not_finite_is_named_at_its_step_though_the_loss_is(num_workers: int) -> None:
    # The square root of zero: a loss of 0, and a gradient that is infinite, or 0 times that.
    with pytest.raises(NonFiniteLoss, match=r"the gradient of step 0 is not finite .*though its loss is 0\."):
        run_ranks(num_workers, lambda: train(lambda model, x: model(x).square().sum(1).sqrt().mean()))


def test_a_finite_one_is_used() -> None:
    assert run_ranks(1, lambda: train(lambda model, x: model(x).mean())) == [4]
