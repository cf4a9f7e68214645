"""Running a case of `cases.py`: by the library, in teams of real processes, and by hand in plain PyTorch."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.run import distribute
from lightwork.spec.holdings import Depths, Tuning
from lightwork.store.regions import Pages
from tests.cases import Case

T = TypeVar("T")


def run_team(num_workers: int, function: Callable[[], T], timeout: float = 60.0, **options: Any) -> list[T]:
    """Return what `function` returned on each worker of a real team; raise if one failed."""
    results = fork_team(num_workers, function, timeout=timeout, **options)
    for result in results:
        if result.error is not None or result.status != 0:
            raise AssertionError(f"rank {result.rank} ended with status {result.status}:\n{result.error}")
    return [result.value for result in results]


def distributed(
    case: Case, *, global_batch: int = 16, micro_batch: int = 2, run_dir: str | None = None, **more: Any
) -> Any:
    """Return the run, scheduler, data set and settings of a case, ready to be trained."""
    torch.manual_seed(1)
    model = case.build()
    optimizer = case.optimizer(model)
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    settings = {**case.settings, **more}
    folder = run_dir or tempfile.mkdtemp(prefix="lightwork-test-")
    run = lightwork.distribute(
        model, optimizer, global_batch=global_batch, micro_batch=micro_batch, run_dir=folder, **settings
    )
    if scheduler is not None:
        run.keep(scheduler=scheduler)
    return run, scheduler


def train(case: Case, *, max_steps: int | None = None, **settings: Any) -> list[tuple[float, float, str]]:
    """Train a case and return loss, gradient norm and digest after every step."""
    run, scheduler = distributed(case, **settings)
    seen = []
    for step in run.steps(case.dataset(), epochs=case.epochs, max_steps=max_steps):
        for batch in step:
            loss, weight = case.loss(run.model, batch)
            step.backward(loss, weight)
        if scheduler is not None:
            scheduler.step()
        seen.append((step.loss, step.grad_norm, run.digest()))
    run.close()
    return seen


def in_small_pieces(*, block: int | None = 64, bucket: int | None = 128, **depths: int) -> None:
    """Cut parameters into buckets far smaller than any of them, for the runs of this process; see `Depths`."""
    distribute.TUNING = Tuning(block=block, bucket=bucket, depths=Depths(**depths))


def poison_what_is_given_back() -> None:
    """Make NaN of what is given back in this process, instead of zeros where it is a whole page."""

    def poison(pages: Pages, start: int, end: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages._buffer)) + pages._start
        ctypes.memset(address + start, 0xFF, end - start)

    Pages.release = poison  # type: ignore[method-assign]


def new_folder() -> Path:
    """Return a new folder that the system cleans."""
    return Path(tempfile.mkdtemp(prefix="lightwork-test-"))
