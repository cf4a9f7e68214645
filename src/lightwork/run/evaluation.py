"""Evaluation: each sample once, whoever computes it, in eval mode, without a trace in the training."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, final

import torch

from lightwork.data.batch import map_tensors
from lightwork.data.feed import Batches, Feed
from lightwork.engine.engine import Engine
from lightwork.errors import UsageError
from lightwork.random import RandomState
from lightwork.run.step import as_metric
from lightwork.spec.means import combine_metrics
from lightwork.store import heap
from lightwork.team.team import Team


@final
class Evaluation:
    """A pass over a data set. Iterate over it inside its `with`, `add` values, and read them after the `with`.

    The batches are claimed one by one, so a slow worker takes fewer, or where there are loading workers as far ahead
    as those load; the results are combined in the fixed tree over the batches, so they do not depend on who took which.

    Owns: the loading workers, inside its `with`.
    """

    def __init__(self, team: Team, engine: Engine, feed: Feed, number: int) -> None:
        self._team = team
        self._engine = engine
        self._feed = feed
        self._loader: Batches | None = None  # inside the `with`
        self._claimed: deque[int] = deque()  # ahead, for the loading workers
        self._number = number
        self._added: dict[int, dict[str, tuple[float, float]]] = {}
        self._index = -1
        self._size = 0
        self._exhausted = False
        self._metrics: Mapping[str, float] | None = None
        self._no_grad = torch.no_grad()
        self._phase = heap.passing_phase()

    def add(self, name: str, value: float | torch.Tensor, weight: float | None = None) -> None:
        """Add a value for the batch in hand; `ev[name]` becomes the mean weighted by `weight`, else by samples."""
        if self._index < 0:
            raise UsageError(
                "add was called outside the loop over the evaluation. Call it in the body of `for ... in ev:`."
            )
        of_batch = self._added.setdefault(self._index, {})
        if name in of_batch:
            raise UsageError(f"add({name!r}, ...) was called twice for one batch of an evaluation.")
        of_batch[name] = as_metric(name, value, self._size if weight is None else weight)

    def __getitem__(self, name: str) -> float:
        if self._metrics is None:
            raise UsageError(
                f"{name!r} is not known yet: it belongs to all workers' batches. Read it after the `with`."
            )
        if name not in self._metrics:
            known = ", ".join(self._metrics) or "nothing"
            raise UsageError(f"no batch of the evaluation added {name!r}; they added {known}.")
        return self._metrics[name]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Every value, by name."""
        if self._metrics is None:
            raise UsageError("the evaluation's metrics are not known yet. Read them after the `with`.")
        return self._metrics

    def __enter__(self) -> Evaluation:
        self._team.meet_equal("evaluate", {**self._feed.order.describe(0), "evaluation": self._number})
        self._random_state = RandomState.capture(self._engine.device)
        self._modes = [(module, module.training) for module in self._engine.model.modules()]
        self._engine.model.eval()
        self._engine.state.buffers.restore()
        self._no_grad.__enter__()
        self._phase.__enter__()
        self._loader = self._feed.load(self._claims_ahead())
        return self

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if loader is None:
            raise UsageError("an evaluation was iterated outside its `with`. Write `with run.evaluate(...) as ev:`.")
        while (index := self._claimed.popleft() if self._claimed else self._claim()) is not None:
            self._index, self._size = index, len(loader.ids(0, index, 0))
            if not self._size:  # the end of a stream
                break
            batch = loader.get(0, index, 0)
            self._added.setdefault(index, {})
            batch = self._engine.device.bring_batch(batch, map_tensors)
            self._engine.seed("evaluate", index)
            with self._engine.computing():
                yield batch
        self._index = -1
        self._exhausted = True

    def _claim(self) -> int | None:
        """Return the next batch that nobody has claimed; None when there is no more."""
        index = self._team.board.take_evaluation(self._number)
        return index if self._feed.order.has_step(0, index) else None

    def _claims_ahead(self) -> Iterator[tuple[int, int, int]]:
        """Claim batches one by one as loading workers ask for them."""
        while (index := self._claim()) is not None:
            self._claimed.append(index)
            yield 0, index, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        self._no_grad.__exit__(kind, error, trace)
        self._phase.__exit__(kind, error, trace)
        for module, training in self._modes:
            module.training = training
        self._engine.state.buffers.restore()
        self._random_state.restore(self._engine.device)
        if error is not None:
            return
        if not self._exhausted:
            raise UsageError("the loop over an evaluation was left early. Go through all its batches.")
        parts = self._team.meet("evaluate (results)", json.dumps(self._added).encode())
        merged: dict[int, dict[str, tuple[float, float]]] = {}
        for part in parts:
            merged.update({int(index): metrics for index, metrics in json.loads(part).items()})
        self._metrics = combine_metrics([merged[index] for index in sorted(merged)])
