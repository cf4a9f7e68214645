"""A process may have many runs, one after the other or together: what one had is gone when it is closed and let go."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightwork
from tests.launcher.command import HEAD, lightwork_run
from tests.training import new_folder, run_team

#: Bytes of the weights of `wide`, of which a run has four times that with AdamW.
WEIGHTS = 64 * 4096 * 4

Taken = tuple[int, int, int, int]


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4096, bias=False), nn.Tanh(), nn.Linear(4096, 1))


def taken() -> Taken:
    """Return this process's descriptors, threads, mappings of runs and resident bytes."""
    gc.collect()
    mappings = Path("/proc/self/maps").read_text().splitlines()
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        sum("lightwork" in line and "rendezvous" not in line for line in mappings),
        int(resident.split()[1]) * 1024,
    )


def one_run(settings: dict[str, Any]) -> None:
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(model, optimizer, global_batch=8, micro_batch=4, run_dir=new_folder(), **settings)
    for step in run.steps([torch.ones(64)] * 8):
        for x in step:
            step.backward(model(x).mean())
    run.close()


def taken_after_runs(num_runs: int, settings: dict[str, Any]) -> list[Taken]:
    seen = []
    for _ in range(num_runs):
        one_run(settings)
        seen.append(taken())
    return seen


@pytest.mark.parametrize(
    ("num_workers", "num_runs", "settings"),
    [
        (1, 20, {}),
        (2, 20, {}),
        (2, 20, {"transport": "group"}),
        (2, 10, {"transport": "group", "placement": "zero3"}),
        (1, 20, {"offload": {"optimizer": "disk", "weights": "disk", "gradients": "disk"}}),
        (1, 20, {"device": "rehearsal"}),
        (2, 10, {"device": "rehearsal", "offload": {"optimizer": "host", "weights": "host"}}),
    ],
    ids=str,
)
def test_a_run_that_was_closed_and_let_go_takes_nothing(
    num_workers: int, num_runs: int, settings: dict[str, Any]
) -> None:
    for seen in run_team(num_workers, lambda: taken_after_runs(num_runs, settings)):
        descriptors, threads, mappings, resident = zip(*seen, strict=True)
        # The other worker's end is waited for by no one: a thread that answers it may live a moment longer.
        assert min(descriptors[-3:]) <= descriptors[1], descriptors
        assert min(threads[-3:]) <= threads[1], threads
        assert min(mappings[-3:]) <= max(mappings[:3]), mappings  # the allocator may take one more
        # Allocators keep some MiB back, and not always the same. Every run that stayed would be four of them.
        assert resident[-1] - resident[num_runs // 2] < 12 * WEIGHTS, resident


def test_a_process_has_one_hook_and_one_exit_handler_whatever_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> tuple[int, bool, bool, int]:
        handlers: list[Any] = []
        monkeypatch.setattr(atexit, "register", handlers.append)
        monkeypatch.setattr(atexit, "unregister", handlers.remove)
        before = sys.excepthook
        models = [wide() for _ in range(3)]
        runs = [
            lightwork.distribute(model, torch.optim.SGD(model.parameters()), global_batch=4, run_dir=new_folder())
            for model in models
        ]
        meanwhile = len(handlers)
        runs[0].close()
        runs[2].close()
        is_hooked = sys.excepthook is not before
        runs[1].close()
        return meanwhile, is_hooked, sys.excepthook is before, len(handlers)

    assert run_team(1, job) == [(1, True, True, 0)]


def test_a_hook_that_was_put_over_the_run_s_own_stays() -> None:
    def job() -> tuple[bool, int]:
        calls = []
        model = wide()
        run = lightwork.distribute(model, torch.optim.SGD(model.parameters()), global_batch=4, run_dir=new_folder())
        inner = sys.excepthook

        def outer(*error: Any) -> None:
            calls.append(error)
            inner(*error)

        sys.excepthook = outer
        run.close()
        is_there = sys.excepthook is outer
        sys.excepthook(ValueError, ValueError("shown by Python's own hook"), None)
        return is_there, len(calls)

    assert run_team(1, job) == [(True, 1)]


TWO_RUNS = (
    HEAD
    + """
def run_of():
    model = torch.nn.Linear(6, 3)
    return model, lightwork.distribute(model, torch.optim.SGD(model.parameters()), global_batch=16, micro_batch=2)

older, first = run_of()
newer, second = run_of()
for a, b in zip(first.steps(dataset, epochs=50), second.steps(dataset, epochs=50)):
    for inputs, targets in a:
        a.backward(F.cross_entropy(older(inputs), targets))
    for inputs, targets in b:
        if first.rank == 1 and b.index >= 2:
            ERROR
        b.backward(F.cross_entropy(newer(inputs), targets))
"""
)


def test_an_error_with_two_runs_is_shown_once_and_ends_the_team(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, TWO_RUNS.replace("ERROR", "raise ValueError('mine alone')"))
    assert result.status == 1, result.text
    assert result.err.count("ValueError: mine alone") == 1, result.text
    assert result.log(1).count("Traceback") == 1, result.log(1)
    assert result.log(0).count("rank 0 ends because rank 1") == 1, result.text


def test_lost_memory_of_a_gpu_is_explained_once_with_two_runs(tmp_path: Path) -> None:
    result = lightwork_run(tmp_path, TWO_RUNS.replace("ERROR", "raise torch.OutOfMemoryError('as on a GPU')"))
    assert result.status == 1, result.text
    assert result.log(1).count("the GPU has no more room") == 1, result.log(1)
