"""Running a case of `cases.py` by the library, in a team of real processes or of fake ranks."""

from __future__ import annotations

import ctypes
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.run import distribute
from lightwork.spec.holdings import Depths, Tuning
from lightwork.store.elements import UnitElements
from lightwork.store.regions import Pages
from tests.cases import CASES, Case
from tests.fake_ranks import pause, run_ranks

T = TypeVar("T")

#: Loss, gradient norm and digest after every step.
Seen = list[tuple[float, float, str]]


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


def train(case: Case, *, max_steps: int | None = None, **settings: Any) -> Seen:
    """Train a case and return loss, gradient norm and digest after every step."""
    run, scheduler = distributed(case, **settings)
    seen = []
    for step in run.steps(case.dataset(), epochs=case.epochs, max_steps=max_steps):
        for batch in step:
            pause()
            loss, weight = case.loss(run.model, batch)
            pause()
            step.backward(loss, weight)
        if scheduler is not None:
            scheduler.step()
        seen.append((step.loss, step.grad_norm, run.digest()))
    run.close()
    return seen


_seen_alone: dict[str, Seen] = {}


def alone(name: str, **more: Any) -> Seen:
    """Return what one worker sees of a case, computed once: for tests that leave the package's constants alone."""
    key = f"{name} {sorted(more.items())}"
    if key not in _seen_alone:
        (_seen_alone[key],) = run_ranks(1, lambda: train(CASES[name], **more))
    return _seen_alone[key]


def in_small_pieces(*, block: int | None = 64, bucket: int | None = 128, **depths: int) -> None:
    """Cut parameters into buckets far smaller than any of them, for the runs of this process; see `Depths`."""
    distribute.TUNING = Tuning(block=block, bucket=bucket, depths=Depths(**depths))


def poison_what_is_given_back() -> None:
    """Make NaN of what is given back in this process, instead of zeros where it is a whole page."""
    release = UnitElements.release_room

    def poison(pages: Pages, start: int, end: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages._buffer)) + pages._start
        ctypes.memset(address + start, 0xFF, end - start)

    def poison_units(self: UnitElements, start: int, end: int) -> None:
        for unit in self._units.of_elements(start, end):
            if self._flat[unit].untyped_storage().nbytes():
                self._whole(unit).fill_(0xFF)
        release(self, start, end)

    Pages.release_room = poison  # type: ignore[method-assign]
    UnitElements.release_room = poison_units  # type: ignore[method-assign]


def new_folder() -> Path:
    """Return a new folder that the system cleans."""
    return Path(tempfile.mkdtemp(prefix="lightwork-test-"))


class Numbered(Dataset[Any]):
    """Samples that know their id, augmented by all three random generators."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        noise = torch.rand(3) + float(np.random.rand()) + torch.randn(3)
        return index, noise


def tiny_run(**settings: Any) -> lightwork.Run:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return lightwork.distribute(
        model, optimizer, **{"global_batch": 8, "micro_batch": 2, "run_dir": new_folder(), **settings}
    )


def seen_by_team(
    run_workers: Callable[[int, Callable[[], Any]], list[Any]], num_workers: int, data: Any, **settings: Any
) -> dict[tuple[int, int], dict[int, list[float]]]:
    """Return what came to whom, merged over the workers: (epoch, step) -> sample id -> its augmented values."""

    def job() -> list[tuple[int, int, int, list[float]]]:
        run = tiny_run()
        seen = []
        for step in run.steps(data, epochs=2, **settings):
            for ids, x in step:
                step.backward(run.model(x).mean())
                seen.extend((step.epoch, step.index, i, row.tolist()) for i, row in zip(ids.tolist(), x, strict=True))
        return seen

    merged: dict[tuple[int, int], dict[int, list[float]]] = {}
    for worker in run_workers(num_workers, job):
        for epoch, step, sample, values in worker:
            of_step = merged.setdefault((epoch, step), {})
            assert sample not in of_step, "a sample came twice"
            of_step[sample] = values
    return merged


def saved(model: nn.Module) -> nn.Module:
    """Return what torch.load makes of what torch.save makes of a model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded
