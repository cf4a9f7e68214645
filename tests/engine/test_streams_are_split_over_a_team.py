"""Data sets that are iterated: the same micro-batches whoever reads them, resumed exactly, read where needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightwork
from lightwork.errors import DataError, UsageError
from tests.fake_ranks import run_ranks
from tests.training import new_folder

Seen = list[tuple[int, int, float, str]]


class Plain(IterableDataset[torch.Tensor]):
    """Samples with noise, through a shuffling window that draws as it goes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[torch.Tensor]:
        window: list[torch.Tensor] = []
        for index in range(self.count):
            window.append(torch.full((8,), float(index)) + torch.rand(8) + np.random.rand() + random.random())
            if len(window) > 5:
                yield window.pop(random.randrange(len(window)))
        yield from window


class Sharded(IterableDataset[torch.Tensor]):
    """Shards of different lengths; notes which are read."""

    def __init__(self, lengths: list[int], shards: list[int] | None = None) -> None:
        self.lengths = lengths
        self.shards = list(range(len(lengths))) if shards is None else shards
        self.read: set[int] = set()

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard(self, *, num_shards: int, index: int) -> Iterator[torch.Tensor]:
        assert num_shards == len(self.shards)
        self.read.add(index)
        for position in range(self.lengths[index]):
            yield torch.full((8,), index + position / 100) + torch.rand(8)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in self.shards:
            yield from self.shard(num_shards=len(self.shards), index=index)


def make(run_dir: str | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    folder = run_dir or str(new_folder())
    return lightwork.distribute(model, optimizer, global_batch=12, micro_batch=3, run_dir=folder)


def train(
    data: Any, *, epochs: int | None = 2, stop: int | None = None, run_dir: str | None = None, **more: Any
) -> Seen:
    run = make(run_dir)
    seen: Seen = []
    for step in run.steps(data, epochs=epochs, **more):
        for x in step:
            assert len(x)
            loss = run.model(x).square().mean()
            step.backward(loss)
            step.add("samples", len(x), weight=1)
        seen.append((step.epoch, step.index, step.loss, run.digest()))
        if stop is not None and step.index + 1 == stop:
            run.save(run.run_dir / "checkpoint")
            break
    run.close()
    return seen


@pytest.mark.parametrize("count", [48, 50, 5])
def test_a_plain_stream_gives_the_same_steps_to_any_team(count: int) -> None:
    (alone,) = run_ranks(1, lambda: train(Plain(count)))
    assert [epoch for epoch, *_ in alone] == [epoch for epoch in (0, 1) for _ in range(-(-count // 12))]
    for num_workers, settings in ((2, {}), (3, {}), (2, {"transport": "group"})):
        for seen in run_ranks(num_workers, lambda: train(Plain(count)), settings=settings):
            assert seen == alone


def test_a_stream_with_shards_gives_the_same_steps_to_any_team() -> None:
    lengths = [7, 3, 9, 1, 4, 8, 2, 6]
    (alone,) = run_ranks(1, lambda: train(Sharded(lengths)))
    for num_workers, settings in ((2, {}), (3, {"steal": False}), (2, {"transport": "group"})):
        for seen in run_ranks(num_workers, lambda: train(Sharded(lengths)), settings=settings):
            assert seen == alone


def shards_read() -> set[int]:
    data = Sharded([6] * 8)
    train(data, epochs=1, shuffle=False)
    return data.read


def test_a_worker_reads_the_shards_of_its_own_lanes_alone() -> None:
    assert run_ranks(2, shards_read, settings={"steal": False}) == [{0, 4, 1, 5}, {2, 6, 3, 7}]


@pytest.mark.parametrize("data", [Plain(50), Sharded([7, 3, 9, 1, 4, 8, 2, 6])], ids=["plain", "sharded"])
@pytest.mark.parametrize("stop", [2, 5, 6])
def test_a_resumed_stream_goes_on_to_the_same_bits(data: Any, stop: int, tmp_path: Path) -> None:
    (whole,) = run_ranks(1, lambda: train(data))
    for first, second in ((1, 2), (2, 1)):
        folder = str(tmp_path / f"{first}{second}")
        before = run_ranks(first, partial(train, data, stop=stop, run_dir=folder))[0]
        after = run_ranks(second, partial(train, data, run_dir=folder))[0]
        assert before + after == whole


def test_a_resumed_stream_whose_end_is_not_known_is_not_said_to_be_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(1, partial(train, Plain(50), stop=2, run_dir=str(tmp_path)))
    run_ranks(1, partial(train, Plain(50), run_dir=str(tmp_path)))
    assert "resumed after" in (said := capsys.readouterr().err)
    assert "which has none left" not in said


def test_a_short_last_step_can_be_left_out() -> None:
    for data, steps in ((Plain(50), 4), (Sharded([7, 3, 9, 12]), 1)):
        (alone,) = run_ranks(1, partial(train, data, epochs=1, drop_last=True))
        assert len(alone) == steps
        for seen in run_ranks(2, partial(train, data, epochs=1, drop_last=True)):
            assert seen == alone


def evaluated(data: Any) -> tuple[float, float]:
    run = make()
    with run.evaluate(data) as ev:
        for x in ev:
            ev.add("mean", x.mean(dim=1).sum() / len(x))
            ev.add("count", len(x), weight=1)
    return ev["mean"], ev["count"]


def test_an_evaluation_takes_each_sample_of_a_stream_once() -> None:
    for data, mean_batch in ((Plain(10), 10 / 4), (Sharded([3, 4, 4]), 11 / 4)):
        (alone,) = run_ranks(1, partial(evaluated, data))
        assert alone[1] == pytest.approx(mean_batch)
        assert run_ranks(2, partial(evaluated, data)) == [alone, alone]


def test_a_loader_of_a_stream_gives_its_collate_function() -> None:
    def doubled(samples: list[torch.Tensor]) -> torch.Tensor:
        return 2 * torch.stack(samples)

    def job() -> Seen:
        return train(DataLoader(Plain(24), batch_size=4, collate_fn=doubled))

    (alone,) = run_ranks(1, job)
    assert alone != run_ranks(1, lambda: train(Plain(24)))[0]
    assert run_ranks(2, job) == [alone, alone]


def test_what_a_stream_can_not_do_is_said() -> None:
    for call, error, text in (
        (lambda: train(Plain(24), shuffle=True), UsageError, "shuffle=True was given for the data set Plain"),
        (lambda: train(Plain(24), order=[1, 2]), UsageError, "samples have no ids"),
        (lambda: train(Plain(0)), DataError, "gave no sample in epoch 0"),
        (lambda: train(Plain(7), drop_last=True), DataError, "fewer samples than one global batch"),
        (lambda: train(iter([1, 2])), UsageError, "is not a data set"),
        (lambda: train(Broken()), DataError, "failed at sample 3 of epoch 0: ValueError: no such record"),
    ):
        with pytest.raises(error, match=text):
            run_ranks(1, call)


class Broken(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.rand(3, 8)
        raise ValueError("no such record")


def test_a_memory_mapped_array_is_a_data_set(tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float32, shape=(24, 8))
    array[:] = np.random.default_rng(0).random((24, 8))
    array.flush()

    def job() -> Seen:
        return train(np.load(tmp_path / "a.npy", mmap_mode="c"))

    (alone,) = run_ranks(1, job)
    assert run_ranks(2, job) == [alone, alone]


def test_no_metric_ends_a_stream() -> None:
    def job() -> tuple[int, dict[str, float]]:
        run = make()
        for step in run.steps(Plain(40), epochs=1):
            for x in step:
                step.backward(run.model(x).square().mean())
                step.add("\0more", 0.0)  # once the name under which the end of a stream was told
        return step.index, dict(step.metrics)

    ((last, metrics),) = run_ranks(1, job)
    assert last > 0
    assert metrics == {"\0more": 0.0}
    assert run_ranks(2, job) == [(last, metrics)] * 2
