"""Data sets that the tests of this room load."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset


class Augmented(Dataset):
    """Samples that draw from each of the three generators, a varying number of times."""

    def __init__(self, num_samples: int = 24) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, object]:
        for _ in range(random.randrange(3)):
            torch.rand(1)
        noise = torch.randn(5) + torch.from_numpy(np.random.rand(5))
        return {"id": index, "noise": noise, "pair": (random.random(), torch.rand(2, 3))}


class Failing(Augmented):
    """One sample can not be read."""

    def __init__(self, bad: int, error: BaseException) -> None:
        super().__init__()
        self.bad = bad
        self.error = error

    def __getitem__(self, index: int) -> dict[str, object]:
        if index == self.bad:
            raise self.error
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def _random_state():
    """Give every test a random state of its own, and the next one the state of before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.fixture
def augmented() -> Augmented:
    return Augmented()


@pytest.fixture
def failing() -> type[Failing]:
    return Failing
