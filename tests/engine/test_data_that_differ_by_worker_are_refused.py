"""Data that each worker sees differently: refused before the first step, by what differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import lightwork
from lightwork.errors import Disagreement
from tests.fake_ranks import run_ranks
from tests.training import new_folder

DATA = TensorDataset(torch.randn(40, 2, generator=torch.Generator().manual_seed(3)))


class Split(IterableDataset[Any]):
    """Gives each process its part, as scripts for other libraries do."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        return (DATA[i][0] for i in range(self.rank, 40, 2))


class Wraps:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


def train(make: Any) -> str:
    model = nn.Linear(2, 1)
    run = lightwork.distribute(
        model, torch.optim.SGD(model.parameters(), lr=0.1), global_batch=8, micro_batch=2, run_dir=new_folder()
    )
    for step in run.steps(make(run.rank)):
        for x in step:
            step.backward(model(x[0] if isinstance(x, list | tuple) else x).mean())
    return run.digest()


def part(rank: int) -> Subset[Any]:
    """A part that begins, halves and ends alike."""
    ids = list(range(20))
    ids[5 + rank] = 30
    return Subset(DATA, ids)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (Split, "content of its first sample"),
        (lambda rank: DataLoader(Split(rank), batch_size=4), "content of its first sample"),
        (lambda rank: Wraps(DataLoader(Split(rank), batch_size=4)), "content of its first sample"),
        (part, "ids of the subset"),
        (lambda rank: TensorDataset(DATA.tensors[0] + rank), "content of some samples"),
    ],
    ids=["stream", "loader of it", "wrapped loader of it", "subset", "samples"],
)
def test_they_are_refused(make: Any, what: str) -> None:
    with pytest.raises(Disagreement, match=what):
        run_ranks(2, lambda: train(make))


@pytest.mark.parametrize("make", [lambda rank: Split(0), lambda rank: part(0), lambda rank: Wraps(DataLoader(DATA))])
def test_the_same_on_every_worker_is_trained_on(make: Any) -> None:
    torch.manual_seed(0)
    assert len(set(run_ranks(2, lambda: train(make)))) == 1
