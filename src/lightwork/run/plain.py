"""What a script of lightwork's does, carried out in plain PyTorch: one model, `loss.backward()`, `optimizer.step()`.

The reference that `lightwork check` and the tests compare with. Samples, batches and seeds are the run's; weights,
gradients, buffers and the optimizers are the script's own objects, and nothing of the engine takes part. Not all that a
run offers: what is missing raises `NotPlain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import nn, optim

from lightwork.data.feed import Batches, Schedule, feed_for_evaluation, feed_of
from lightwork.data.order import Ids
from lightwork.errors import LightworkError
from lightwork.random import RandomState, derive, seed_all
from lightwork.spec.means import weighted_mean

#: What `distribute` takes that changes no bit, or says where something lies.
_OF_PLANS = {
    *("transport", "placement", "offload", "memory", "plan", "threads", "resume", "device"),
    *("micro_batch", "run_dir", "name", "seed", "global_batch", "buffers", "clip_grad_norm"),
}

#: What the rest is by default; with anything else a plain script would be another one.
_DEFAULTS = {"precision": "fp32", "wire": "fp32", "optimizer_state": "fp32", "activations": "keep", "fp32_modules": ()}


class NotPlain(LightworkError):
    """The script uses what this reference has not."""


class PlainStep:
    """A step: gradients are accumulated, then the update is made."""

    def __init__(self, run: PlainRun, loader: Batches, order: Schedule, epoch: int, step_in_epoch: int) -> None:
        self.index, self.epoch, self.step_in_epoch = run.step_index, epoch, step_in_epoch
        self.batch_index = 0  #: the micro-batch in hand
        self.sample_ids: Ids
        self.grad_norm = 0.0  #: not computed
        self._run, self._loader, self._order = run, loader, order
        self._records: list[tuple[float, float]] = []
        self._metrics: dict[str, list[tuple[float, float]]] = {}
        self._goes_on: bool | None = None
        self._num = order.micro_batches(epoch, step_in_epoch)

    def __iter__(self) -> Iterator[Any]:
        run = self._run
        run.zero_grad()
        start = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        left: list[tuple[dict[str, torch.Tensor], float]] = []
        votes = []
        for index in range(self._num):
            self.batch_index, self.sample_ids = index, self._loader.ids(self.epoch, self.step_in_epoch, index)
            if len(self.sample_ids):
                batch = self._loader.get(self.epoch, self.step_in_epoch, index)
                for name, buffer in run.model.named_buffers():
                    buffer.copy_(start[name])
                seed_all(derive(run.seed, "micro-batch", self.index, index))
                yield batch
                left.append(({name: b.clone() for name, b in run.model.named_buffers()}, self._records[-1][1]))
            votes.append(self._loader.goes_on(self.epoch, self.step_in_epoch, index))
        known = [vote for vote in votes if vote is not None]
        self._goes_on = all(known) if known else None
        total = sum(weight for _, weight in self._records)
        run.update(start, left, total, is_scaled=self._num > 1)
        seed_all(derive(run.seed, "between", self.index))

    def backward(self, loss: torch.Tensor, weight: float | None = None) -> None:
        """Accumulate the gradients of a micro-batch."""
        weight = float(len(self.sample_ids) if weight is None else weight)
        self._records.append((float(loss.detach()), weight))
        if weight:
            (loss if self._num == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]

    def add(self, name: str, value: float | torch.Tensor, weight: float | None = None) -> None:
        """Add a metric of the micro-batch in hand."""
        weight = float(len(self.sample_ids) if weight is None else weight)
        self._metrics.setdefault(name, []).append((_as_number(value), weight))

    def __getitem__(self, name: str) -> float:
        return weighted_mean(self._metrics[name])

    @property
    def loss(self) -> float:
        """The mean loss over the global batch."""
        return weighted_mean(self._records)

    @property
    def last_of_epoch(self) -> bool:
        """Whether the data have no further step in this epoch."""
        following = self._order.after(self.epoch, self.step_in_epoch, self._goes_on)
        return self._goes_on is False or not self._order.has_step(*following)

    @property
    def following(self) -> tuple[int, int]:
        """The epoch and step that come next, if they exist."""
        return self._order.after(self.epoch, self.step_in_epoch, self._goes_on)


class PlainEvaluation:
    """A pass over a data set in eval mode."""

    def __init__(self, run: PlainRun, data: Any) -> None:
        self._run = run
        self._feed = feed_for_evaluation(data, seed=run.seed, micro_batch=run.micro_batch, world_size=1)
        self._metrics: dict[str, list[tuple[float, float]]] = {}
        self._gathered: dict[str, list[Any]] = {}
        self._num_samples = 0
        self._state = RandomState.capture()
        self._no_grad = torch.no_grad()

    def __enter__(self) -> PlainEvaluation:
        self._state = RandomState.capture()
        self._run.model.eval()
        self._no_grad.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._no_grad.__exit__(kind, error, trace)
        self._run.model.train()
        self._state.restore()

    def __iter__(self) -> Iterator[Any]:
        loader, index = self._feed.load(()), 0
        while self._feed.order.has_step(0, index):
            self._num_samples = len(loader.ids(0, index, 0))
            batch = loader.get(0, index, 0)
            seed_all(derive(self._run.seed, "evaluate", index))
            yield batch
            index += 1

    def add(self, name: str, value: float | torch.Tensor, weight: float | None = None) -> None:
        """Add a metric of the batch in hand."""
        weight = float(self._num_samples if weight is None else weight)
        self._metrics.setdefault(name, []).append((_as_number(value), weight))

    def gather(self, name: str, value: Any) -> None:
        """Keep values of the batch in hand."""
        self._gathered.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Any:
        if name in self._metrics:
            return weighted_mean(self._metrics[name])
        values = self._gathered[name]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else [v for part in values for v in part]


class PlainRun:
    """A run without a team.

    Raises: NotPlain for settings that it has not.
    """

    is_main, rank, world_size = True, 0, 1

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer | Sequence[optim.Optimizer], **settings: Any
    ) -> None:
        rest = {name: value for name, value in settings.items() if name not in _OF_PLANS and value is not None}
        odd = [f"{name}={value!r}" for name, value in rest.items() if value != _DEFAULTS.get(name)]
        if odd:
            raise NotPlain(f"the plain reference has no {', '.join(odd)}")
        self.model, self.name = model, settings.get("name")
        seed = settings.get("seed", 0)
        self.seed: int = seed if self.name is None else derive(seed, "run", self.name)
        self.optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        for group in (group for one in self.optimizers for group in one.param_groups):
            if "fused" in group and group["fused"] is None and not group.get("foreach"):
                group["fused"] = True
        self.global_batch: int = settings["global_batch"]
        self.micro_batch: int = settings.get("micro_batch") or -(-self.global_batch // 8)
        self._clip_grad_norm: float | None = settings.get("clip_grad_norm")
        self._rules: dict[str, str] = dict(settings.get("buffers") or {})
        self.kept: dict[str, Any] = {}
        self.run_dir = Path(settings.get("run_dir") or ".")
        self.step_index = 0  #: updates done
        self._passes: dict[Any, int] = {}  # of each data set; a script has no two of one type and length

    def epochs(self, num: int) -> Iterator[int]:
        """Go through them."""
        return iter(range(num))

    def steps(
        self, data: Any, *, epochs: int | None = None, max_steps: int | None = None, **options: Any
    ) -> Iterator[PlainStep]:
        """Go through the data step by step."""
        feed = feed_of(data, seed=self.seed, global_batch=self.global_batch, micro_batch=self.micro_batch, **options)
        loader = feed.load(())
        key = type(feed.data), _length(feed.data)
        epoch = first = self._passes.get(key, 0)
        step_in_epoch = done = 0
        epochs = 1 if epochs is None and max_steps is None else epochs
        while done != max_steps:
            while not feed.order.has_step(epoch, step_in_epoch):
                epoch, step_in_epoch = epoch + 1, 0
            if epochs is not None and epoch >= first + epochs:
                break
            step = self._step(loader, feed.order, epoch, step_in_epoch)
            self._passes[key] = epoch + 1
            yield step
            self.step_index += 1
            done += 1
            epoch, step_in_epoch = step.following

    def _step(self, loader: Batches, order: Schedule, epoch: int, step_in_epoch: int) -> PlainStep:
        return PlainStep(self, loader, order, epoch, step_in_epoch)

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def update(
        self,
        start: Mapping[str, torch.Tensor],
        left: Sequence[tuple[Mapping[str, torch.Tensor], float]],
        total: float,
        *,
        is_scaled: bool,
    ) -> None:
        """Divide what was accumulated, clip, take the optimizers' steps, and make the step's buffers."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for gradient in (p.grad for p in parameters if p.grad is not None and is_scaled):
            gradient /= total
        if self._clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._clip_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and self._rules.get(name) != "sum":
                weighted = [values[name].double() * weight for values, weight in left]
                buffer.copy_(torch.stack(weighted).sum(0) / total)
            else:
                increments = [values[name] - start[name] for values, _ in left]
                buffer.copy_(start[name] + torch.stack(increments).sum(0))

    def evaluate(self, data: Any) -> PlainEvaluation:
        """Return a pass over the data in eval mode."""
        return PlainEvaluation(self, data)

    def keep(self, **objects: Any) -> None:
        """Do nothing that shows."""
        self.kept.update(objects)

    def save(self, path: Any = None, **options: Any) -> Path:
        """Write nothing."""
        return Path(path or self.run_dir)

    def state_dict(self) -> dict[str, Any]:
        """Return the model's."""
        return self.model.state_dict()

    def close(self) -> None:
        """Do nothing."""


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _as_number(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def module(runs: list[PlainRun], **settings: Any) -> SimpleNamespace:
    """Return what a script imports as lightwork; the runs that it makes are appended to `runs`."""

    def distribute(model: nn.Module, optimizer: Any, **arguments: Any) -> PlainRun:
        runs.append(PlainRun(model, optimizer, **{**arguments, **settings}))
        return runs[-1]

    @contextmanager
    def first() -> Iterator[None]:
        yield

    return SimpleNamespace(distribute=distribute, first=first)
