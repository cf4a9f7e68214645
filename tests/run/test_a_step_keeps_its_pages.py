"""The C library keeps a step's memory for the next one; what a passing phase took besides goes back to the system."""

from __future__ import annotations

import ctypes
import re
import resource
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import lightwork
from lightwork.store import heap
from tests.training import new_folder, run_team

HAS_GLIBC = heap._glibc() is not None
needs_glibc = pytest.mark.skipif(not HAS_GLIBC, reason="other C libraries are left alone")
ROWS, WIDTH = 5120, 512
MEGABYTE = 1 << 20


def begun(**more: Any) -> tuple[lightwork.Run, TensorDataset]:
    """Return a run whose activations are large: 2 x 20 MiB for each micro-batch of 2 samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folder = str(new_folder())
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=2, run_dir=folder, **more)
    return run, TensorDataset(torch.randn(8, ROWS, 8))


def trained(run: lightwork.Run, data: TensorDataset, steps: int) -> Iterator[int]:
    """Train; yield after every step the page faults that it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for step in run.steps(data, max_steps=steps):
        for (x,) in step:
            step.backward(run.model(x).square().mean())
        now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        yield now - before
        before = now


def evaluated(run: lightwork.Run, num_kept: int) -> None:
    """Evaluate, with so many times 20 MiB at once."""
    with run.evaluate(TensorDataset(torch.randn(1, 8))) as evaluation:
        for _ in evaluation:
            kept = [run.model[0](torch.ones(2, ROWS, 8)) for _ in range(num_kept)]
            assert len(kept) == num_kept
            del kept


def own_bytes() -> int:
    """Return the memory of this process that it shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"(?m)^Anonymous:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


@needs_glibc
@pytest.mark.parametrize("settings", [{}, {"transport": "group"}], ids=str)
def test_a_step_takes_hardly_a_page_that_the_steps_before_had(settings: dict[str, Any]) -> None:
    def faults() -> list[int]:
        run, data = begun()
        return list(trained(run, data, steps=10))

    # A micro-batch has 60 MiB: 15,000 pages.
    for seen in run_team(2, faults, settings=settings):
        assert statistics.median(seen[4:]) < 2000, seen


@needs_glibc
def test_what_a_large_evaluation_took_goes_back() -> None:
    def grown() -> int:
        run, data = begun()
        list(trained(run, data, steps=3))
        before = own_bytes()
        evaluated(run, num_kept=32)  # 640 MiB
        return own_bytes() - before

    for seen in run_team(2, grown):
        assert seen < 40 * MEGABYTE


@needs_glibc
def test_an_evaluation_within_the_memory_of_a_step_leaves_it_to_the_next_one() -> None:
    def faults() -> int:
        run, data = begun()
        list(trained(run, data, steps=3))
        evaluated(run, num_kept=1)
        return next(trained(run, data, steps=1))

    (seen,) = run_team(1, faults)
    assert seen < 12_000  # all of a step are twice as many; some come where the heap still grows


class _OtherLibrary:
    """A C library that has none of the functions."""


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> int:
        real = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda name, **more: real(name, **more) if more else _OtherLibrary())
        heap._glibc.cache_clear()
        run, data = begun()
        evaluated(run, num_kept=1)
        return len(list(trained(run, data, steps=2)))

    assert run_team(1, train) == [2]


def test_where_there_are_huge_pages_glibc_keeps_its_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            calls.append((option, value))

        def malloc_trim(self, rest: int) -> None:
            calls.append((0, rest))

    monkeypatch.setattr(heap, "_glibc", Library)
    monkeypatch.setattr(heap, "AT_START", tmp_path / "environ")
    heap.AT_START.write_bytes(b"HOME=/\0GLIBC_TUNABLES=glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1\0")
    heap.keep_pages()
    assert calls == []
    heap.AT_START.write_bytes(b"HOME=/\0")
    heap.keep_pages()
    assert len(calls) == 3
