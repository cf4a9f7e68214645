"""What a script of lightwork's does, carried out in plain PyTorch: one model, `loss.backward()`, `optimizer.step()`.

Samples, batches and seeds are the run's; weights, gradients, buffers and the optimizer are the script's own objects,
and nothing of the engine takes part. `module(...)` stands for the package in a script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from lightwork.data.feed import feed_for_evaluation, feed_of
from lightwork.random import RandomState, derive, seed_all


class HandStep:
    """A step: gradients are accumulated, then the update is made."""

    def __init__(self, run: HandRun, loader: Any, order: Any, epoch: int, step_in_epoch: int) -> None:
        self.index, self.epoch, self.step_in_epoch = run.step_index, epoch, step_in_epoch
        self._run, self._loader, self._order = run, loader, order
        self._records: list[tuple[float, float]] = []
        self._metrics: dict[str, list[tuple[float, float]]] = {}
        self._num_samples = 0
        self.goes_on: bool | None = None
        self.grad_norm = 0.0

    def __iter__(self) -> Iterator[Any]:
        run = self._run
        run.zero_grad()
        start = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        left: list[tuple[dict[str, torch.Tensor], float]] = []
        votes = []
        self._num = self._order.micro_batches(self.epoch, self.step_in_epoch)
        for index in range(self._num):
            ids = self._loader.ids(self.epoch, self.step_in_epoch, index)
            if len(ids):
                batch = self._loader.get(self.epoch, self.step_in_epoch, index)
                for name, buffer in run.model.named_buffers():
                    buffer.copy_(start[name])
                seed_all(derive(run.seed, "micro-batch", self.index, index))
                self._num_samples = len(ids)
                with run.autocast():
                    yield batch
                left.append(({name: b.clone() for name, b in run.model.named_buffers()}, self._records[-1][1]))
            votes.append(self._loader.goes_on(self.epoch, self.step_in_epoch, index))
        known = [vote for vote in votes if vote is not None]
        self.goes_on = all(known) if known else None
        total = sum(weight for _, weight in self._records)
        run.update(start, left, total, alone=self._num == 1)
        self.grad_norm = run.grad_norm
        seed_all(derive(run.seed, "between", self.index))

    def backward(self, loss: torch.Tensor, weight: float | None = None) -> None:
        weight = float(self._num_samples if weight is None else weight)
        self._records.append((float(loss.detach()), weight))
        if weight:
            (loss if self._num == 1 else loss * weight).backward()

    def add(self, name: str, value: Any, weight: float | None = None) -> None:
        self._metrics.setdefault(name, []).append((as_number(value), float(weight or self._num_samples)))

    def __getitem__(self, name: str) -> float:
        return mean(self._metrics[name])

    @property
    def loss(self) -> float:
        return mean(self._records)

    @property
    def last_of_epoch(self) -> bool:
        return not self._order.has_step(*self._order.after(self.epoch, self.step_in_epoch, self.goes_on)) or (
            self.goes_on is False
        )


class HandEvaluation:
    """A pass over a data set in eval mode."""

    def __init__(self, run: HandRun, data: Any) -> None:
        self._run = run
        self._feed = feed_for_evaluation(data, seed=run.seed, micro_batch=run.micro_batch, world_size=1)
        self._metrics: dict[str, list[tuple[float, float]]] = {}
        self._gathered: dict[str, list[Any]] = {}

    def __enter__(self) -> HandEvaluation:
        self._state = RandomState.capture()
        self._run.model.eval()
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(None, None, None)
        self._run.model.train()
        self._state.restore()

    def __iter__(self) -> Iterator[Any]:
        loader, index = self._feed.load(()), 0
        while self._feed.order.has_step(0, index):
            self._num_samples = len(loader.ids(0, index, 0))
            batch = loader.get(0, index, 0)
            seed_all(derive(self._run.seed, "evaluate", index))
            with self._run.autocast():
                yield batch
            index += 1

    def add(self, name: str, value: Any, weight: float | None = None) -> None:
        self._metrics.setdefault(name, []).append((as_number(value), float(weight or self._num_samples)))

    def gather(self, name: str, value: Any) -> None:
        self._gathered.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Any:
        if name in self._metrics:
            return mean(self._metrics[name])
        values = self._gathered[name]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else [v for part in values for v in part]


class HandRun:
    """A run without a team."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        buffers: Mapping[str, str] | None = None,
        precision: str = "fp32",
        run_dir: Any = None,
        name: str | None = None,
    ) -> None:
        self.model, self.seed, self.name = model, seed if name is None else derive(seed, "run", name), name
        self.optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        for group in (group for one in self.optimizers for group in one.param_groups):
            if "fused" in group and group["fused"] is None and not group.get("foreach"):
                group["fused"] = True
        self.global_batch, self.micro_batch = global_batch, micro_batch or -(-global_batch // 8)
        self.clip_grad_norm, self.rules = clip_grad_norm, dict(buffers or {})
        self.autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "bf16" else nullcontext
        self.kept: dict[str, Any] = {}
        self.run_dir = Path(run_dir or ".")
        self.is_main, self.rank, self.world_size = True, 0, 1
        self.step_index, self.grad_norm = 0, 0.0
        self._passes: dict[Any, int] = {}  # of each data set; a script has no two of one type and length

    def epochs(self, num: int) -> Iterator[int]:
        return iter(range(num))

    def steps(
        self, data: Any, *, epochs: int | None = None, max_steps: int | None = None, **options: Any
    ) -> Iterator[HandStep]:
        feed = feed_of(data, seed=self.seed, global_batch=self.global_batch, micro_batch=self.micro_batch, **options)
        loader = feed.load(())
        known = getattr(data, "dataset", data)
        key = type(known), None if isinstance(known, IterableDataset) else len(known)
        epoch = first = self._passes.get(key, 0)
        step_in_epoch = done = 0
        epochs = 1 if epochs is None and max_steps is None else epochs
        while done != max_steps:
            while not feed.order.has_step(epoch, step_in_epoch):
                epoch, step_in_epoch = epoch + 1, 0
            if epochs is not None and epoch >= first + epochs:
                break
            step = HandStep(self, loader, feed.order, epoch, step_in_epoch)
            self._passes[key] = epoch + 1
            yield step
            self.step_index += 1
            done += 1
            epoch, step_in_epoch = feed.order.after(epoch, step_in_epoch, step.goes_on)

    def zero_grad(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def update(
        self,
        start: dict[str, torch.Tensor],
        left: list[tuple[dict[str, torch.Tensor], float]],
        total: float,
        *,
        alone: bool,
    ) -> None:
        """Divide what was accumulated, clip, take the optimizers' steps, and make the step's buffers."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in parameters if not alone else ():
            parameter.grad /= total  # type: ignore[operator]
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and self.rules.get(name) != "sum":
                buffer.copy_(sum(values[name].double() * weight for values, weight in left) / total)
            else:
                buffer.copy_(start[name] + sum(values[name] - start[name] for values, _ in left))

    def evaluate(self, data: Any) -> HandEvaluation:
        return HandEvaluation(self, data)

    def keep(self, **objects: Any) -> None:
        self.kept.update(objects)

    def save(self, path: Any = None, **options: Any) -> Path:
        return Path(path or self.run_dir)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def as_number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def mean(records: list[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in records)
    return sum(value * weight for value, weight in records) / total if total else 0.0


def module(runs: list[HandRun], **settings: Any) -> SimpleNamespace:
    """Return what a script imports as lightwork; the runs that it makes are appended to `runs`."""

    def distribute(model: nn.Module, optimizer: Any, **arguments: Any) -> HandRun:
        runs.append(HandRun(model, optimizer, **{**arguments, **settings}))
        return runs[-1]

    @contextmanager
    def first() -> Iterator[None]:
        yield

    return SimpleNamespace(distribute=distribute, first=first)
