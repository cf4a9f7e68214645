"""Loaders that hand out whole batches, and batch samplers: read as what they are, for any team."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightwork
from lightwork.data.batches import Rows, looks_like_batches, put_together
from lightwork.data.feed import feed_of
from lightwork.errors import UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

X = torch.arange(40.0).view(20, 2)
Y = torch.arange(20)
DATA = TensorDataset(X, Y)


class Prefetcher:
    """Wraps a loader, and does something with its batches, as timm's does."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for x, y in self.loader:
            yield x + 100, y

    def __len__(self) -> int:
        return len(self.loader)


class Whole(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for at in range(0, 20, 4):
            yield X[at : at + 4], Y[at : at + 4]


class Buckets:
    """A batch sampler whose batches have different sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        ids = torch.randperm(sum(self.sizes)).tolist()
        for size in self.sizes:
            yield [ids.pop() for _ in range(size)]

    def __len__(self) -> int:
        return len(self.sizes)


def seen(
    data: Any, *, global_batch: int = 8, micro_batch: int = 4, epochs: int = 1, **options: Any
) -> list[list[list[int]]]:
    """Return the labels of every micro-batch that one worker is given, step by step."""
    model = nn.Linear(2, 1)
    run = lightwork.distribute(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        global_batch=global_batch,
        micro_batch=micro_batch,
        run_dir=new_folder(),
    )
    steps = []
    for step in run.steps(data, epochs=epochs, **options):
        labels = []
        for x, y in step:
            labels.append(y.tolist())
            step.backward(model(x).mean())
        steps.append(labels)
    return steps


def alone(data: Any, **options: Any) -> list[list[list[int]]]:
    return run_ranks(1, lambda: seen(data, **options))[0]


IN_ORDER = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]], [[16, 17, 18, 19]]]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (Prefetcher(DataLoader(DATA, batch_size=4)), {}),
        (Prefetcher(DataLoader(DATA, batch_size=8)), {}),
        (Prefetcher(DataLoader(DATA, batch_size=3)), {}),
        (Prefetcher(Prefetcher(DataLoader(DATA, batch_size=5))), {}),
        (DataLoader(Whole(), batch_size=None), {}),
        (Whole(), {"batches": True}),
        (list(DataLoader(DATA, batch_size=4)), {"batches": True}),
        (list(DataLoader(DATA, batch_size=7)), {"batches": True}),
    ],
    ids=["as micro", "as global", "other", "wrapped twice", "None", "stream", "list", "list of others"],
)
def test_a_loader_of_batches_gives_its_samples_in_its_order(data: Any, options: dict[str, Any]) -> None:
    assert alone(data, **options) == IN_ORDER


def test_what_a_wrapper_does_with_batches_is_kept() -> None:
    feed = feed_of(Prefetcher(DataLoader(DATA, batch_size=4)), seed=0, global_batch=8, micro_batch=4)
    x, y = feed.load(()).get(0, 0, 1)
    assert torch.equal(x, X[4:8] + 100)
    assert y.tolist() == [4, 5, 6, 7]


def test_a_shuffling_loader_has_an_order_of_its_own_in_each_epoch_the_same_for_any_team() -> None:
    data = Prefetcher(DataLoader(DATA, batch_size=4, shuffle=True))
    steps = alone(data, epochs=2)
    flat = [label for step in steps for batch in step for label in batch]
    assert sorted(flat[:20]) == sorted(flat[20:]) == list(range(20))
    assert flat[:20] != flat[20:]
    of_two = run_ranks(2, lambda: seen(Prefetcher(DataLoader(DATA, batch_size=4, shuffle=True)), epochs=2))
    together = [sorted(batch for of_rank in of_step for batch in of_rank) for of_step in zip(*of_two, strict=True)]
    assert together == [sorted(step) for step in steps]


def test_a_progress_bar_is_looked_through(capfd: pytest.CaptureFixture[str]) -> None:
    class tqdm:
        def __init__(self, iterable: Any) -> None:
            self.iterable = iterable

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("is not read")

    tqdm.__module__ = "tqdm.std"
    assert alone(tqdm(DataLoader(DATA, batch_size=5)), shuffle=False) == IN_ORDER
    assert alone(tqdm(DATA), shuffle=False) == IN_ORDER
    assert "tqdm's bar stands still" in capfd.readouterr().err


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(DataLoader(DATA, batch_size=4)),
        lambda: tuple(DataLoader(DATA, batch_size=3)),
        lambda: [torch.randn(4, 2) for _ in range(3)],
        lambda: [{"x": torch.randn(5, 2), "y": torch.arange(5)} for _ in range(3)],
    ],
)
def test_a_list_that_may_be_of_batches_is_refused_until_the_script_says_which(make: Any) -> None:
    def attempt(data: Any) -> str:
        with pytest.raises(UsageError) as error:
            seen(data)
        return str(error.value)

    assert "batches=True for whole batches, batches=False for samples" in run_ranks(1, lambda: attempt(make()))[0]


@pytest.mark.parametrize(
    "sample",
    [
        (torch.randn(2), torch.tensor(1)),
        (torch.randn(3, 8, 8), torch.tensor(1)),
        (torch.randn(3, 8, 8), 1),
        (torch.randn(3, 8, 8), torch.randn(3, 8, 8)),
        (torch.arange(4), torch.arange(4)),
        {"input_ids": torch.arange(8), "labels": torch.arange(8)},
        (torch.randn(3, 8, 8), torch.zeros(8, 8)),
        torch.randn(3, 8, 8),
        5,
        "text",
    ],
)
def test_samples_as_people_have_them_are_not_taken_for_batches(sample: Any) -> None:
    assert looks_like_batches(sample, (16, 4)) is None


@pytest.mark.parametrize("what", ["generator", "iterator", "enumerate"])
def test_what_can_be_read_once_is_refused_by_name(what: str) -> None:
    loader = DataLoader(DATA, batch_size=4)
    data: Any = {"generator": (b for b in loader), "iterator": iter(loader), "enumerate": enumerate(loader)}[what]
    with pytest.raises(UsageError, match="read once"):
        feed_of(data, seed=0, global_batch=8, micro_batch=4)
    with pytest.raises(UsageError, match="read once"):
        feed_of(data, seed=0, global_batch=8, micro_batch=4, batches=True)


class Encoded(UserDict[str, Any]):
    """A mapping of a library's own."""


@dataclass
class Record:
    x: torch.Tensor
    names: list[str]


def batches_of(num: int) -> Iterable[Any]:
    for at in range(0, 6, num):
        yield {"x": X[at : at + num], "names": [str(i) for i in range(at, at + num)], "scale": 2.0, "none": None}


def test_batches_are_cut_and_put_together_with_all_that_is_in_them() -> None:
    rows = list(Rows(batches_of(2)))
    whole = put_together(rows[2:4])
    assert whole is rows[2].whole.batch
    part, both = put_together(rows[1:2]), put_together(rows[1:5])
    assert (part["names"], both["names"]) == (["1"], ["1", "2", "3", "4"])
    assert torch.equal(part["x"], X[1:2])
    assert torch.equal(both["x"], X[1:5])
    assert (both["scale"], both["none"]) == (2.0, None)


def test_types_of_others_stay_whole_or_are_cut_and_not_put_together() -> None:
    rows = list(Rows([Encoded(x=X[:4]), Encoded(x=X[4:8])]))
    assert isinstance(put_together(rows[:4]), Encoded)
    cut = put_together(rows[1:3])
    assert isinstance(cut, Encoded)
    assert torch.equal(cut["x"], X[1:3])
    with pytest.raises(UsageError, match="Choose a micro_batch that divides"):
        put_together(rows[2:6])
    record = put_together(list(Rows([Record(X[:4], ["a", "b", "c", "d"])])))
    assert record.names == ["a", "b", "c", "d"]


@pytest.mark.parametrize("batch", [("a", "b"), (X[:4], Y[:3]), 5])
def test_batches_that_do_not_say_their_size_are_refused(batch: Any) -> None:
    with pytest.raises(UsageError, match="do not say how many samples"):
        list(Rows([batch]))


# --- batch samplers ---------------------------------------------------------------------------------------------------


def sampled(sizes: list[int], **options: Any) -> list[list[list[int]]]:
    return alone(DataLoader(DATA, batch_sampler=Buckets(sizes)), **options)  # type: ignore[arg-type]


def test_batches_of_a_batch_sampler_stay_together_as_micro_batches() -> None:
    steps = sampled([4, 3, 2, 4, 1, 4, 2])
    assert [[len(batch) for batch in step] for step in steps] == [[4, 3], [2, 4], [1, 4], [2]]
    assert sorted(label for step in steps for batch in step for label in batch) == list(range(20))
    two = run_ranks(2, lambda: seen(DataLoader(DATA, batch_sampler=Buckets([4, 3, 2, 4, 1, 4, 2]))))  # type: ignore[arg-type]
    together = [sorted(batch for of_rank in of_step for batch in of_rank) for of_step in zip(*two, strict=True)]
    assert together == [sorted(step) for step in steps]


def test_batches_that_are_larger_than_a_micro_batch_are_cut_anew_and_that_is_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    steps = sampled([5, 5, 5, 5])
    assert [[len(batch) for batch in step] for step in steps] == [[4, 4], [4, 4], [4]]
    assert "With micro_batch=5 its batches stay together" in capfd.readouterr().err


def test_a_last_global_batch_of_few_batches_is_left_out_if_asked() -> None:
    assert [len(step) for step in sampled([4, 4, 4, 4, 4], drop_last=True)] == [2, 2]


def test_the_gradient_of_batches_of_different_sizes_is_the_mean_over_all_samples() -> None:
    sizes = [4, 3, 2, 1]

    def job() -> tuple[torch.Tensor, float]:
        torch.manual_seed(1)
        model = nn.Linear(2, 1)
        start = model.weight.detach().clone()
        run = lightwork.distribute(
            model, torch.optim.SGD(model.parameters(), lr=1.0), global_batch=16, micro_batch=4, run_dir=new_folder()
        )
        data = TensorDataset(X[:10])
        for step in run.steps(DataLoader(data, batch_sampler=Buckets(sizes))):  # type: ignore[arg-type]
            for (x,) in step:
                step.backward(model(x).mean())
            return start - model.weight.detach(), step.loss
        raise AssertionError

    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    loss = model(X[:10]).mean()
    loss.backward()
    assert model.weight.grad is not None
    for moved, of_step in run_ranks(2, job):
        torch.testing.assert_close(moved, model.weight.grad, rtol=1e-5, atol=1e-5)
        assert of_step == pytest.approx(float(loss.detach()), rel=1e-4)


def test_a_worker_to_which_no_micro_batch_of_a_stream_falls_waits_for_the_others() -> None:
    three = run_ranks(3, lambda: seen(Whole(), batches=True))
    together = [sorted(batch for of_rank in of_step for batch in of_rank) for of_step in zip(*three, strict=True)]
    assert together == IN_ORDER


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return np.full(2, index, dtype=np.float32), index


def test_a_data_set_of_torch_s_is_one_of_samples_whatever_these_look_like() -> None:
    assert len(alone(Numbers(), global_batch=2, micro_batch=2)) == 2
