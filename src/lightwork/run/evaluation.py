"""Evaluation: each sample once, whoever computes it, in eval mode, without a trace in the training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, final

import torch

from lightwork.checkpoint.packing import pack, unpack
from lightwork.data.batch import map_tensors
from lightwork.data.feed import Batches, Feed
from lightwork.data.order import Ids
from lightwork.engine.engine import Engine
from lightwork.errors import RankLost, UsageError
from lightwork.random import RandomState
from lightwork.run.collected import Collected, Numbers, Part, combined, from_values, to_values
from lightwork.store import heap
from lightwork.team.team import Team


class Evaluation:
    """A pass over a data set. Iterate over it inside its `with`, `add` values, and read them after the `with`.

    The batches are claimed one by one, so a slow worker takes fewer, or where there are loading workers as far ahead
    as those load; the results are combined in the fixed tree over the batches, so they do not depend on who took which.

    Owns: the loading workers, inside its `with`.
    """

    def __init__(
        self, team: Team, engine: Engine, feed: Feed, number: int, done: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """`done` is called with what it came to."""
        self._done = done
        self._team = team
        self._engine = engine
        self._feed = feed
        self._loader: Batches | None = None  # inside the `with`
        self._claimed: deque[int] = deque()  # ahead, for the loading workers
        self._number = number
        self._collected: dict[int, Collected] = {}  # by batch, of this worker
        self._numbers: dict[int, Numbers] = {}  # of all workers
        self._parts: dict[int, Mapping[str, Part]] = {}
        self._end: int | None = None  # of a stream, where this worker has seen it
        self._index = -1
        self._exhausted = False
        self._metrics: Mapping[str, Any] | None = None
        self._no_grad = torch.no_grad()
        self._phase = heap.passing_phase()

    def add(self, name: str, value: float | torch.Tensor, weight: float | None = None) -> None:
        """Add a value for the batch in hand; `ev[name]` becomes the mean weighted by `weight`, else by samples."""
        self._in_hand("add").add(name, value, weight)

    def sum(self, name: str, value: float | torch.Tensor) -> None:
        """Add a number or a tensor of the batch in hand; `ev[name]` becomes the sum over all batches."""
        self._in_hand("sum").sum(name, value)

    def gather(self, name: str, value: Any) -> None:
        """Keep values of the batch in hand; `ev[name]` becomes those of all batches, in the order of the data set.

        Args:
            value: a tensor or array, of which the rows of all batches are put together, on the host; or a list with
                something for each sample, which gives one list.

        Moves: after the `with`, every worker's values to all.
        """
        self._in_hand("gather").gather(name, value)

    @property
    def batch_index(self) -> int:
        """The number of the batch in hand, from 0, whoever computes it."""
        self._in_hand("batch_index")
        return self._index

    @property
    def sample_ids(self) -> Ids:
        """The ids of the samples of the batch in hand, int64; of a stream their positions."""
        self._in_hand("sample_ids")
        return self._ids

    def _in_hand(self, call: str) -> Collected:
        if self._index < 0:
            raise UsageError(
                f"{call} was called outside the loop over the evaluation. Call it in the body of `for ... in ev:`."
            )
        return self._collected[self._index]

    def __getitem__(self, name: str) -> Any:
        metrics = self.metrics
        if name not in metrics:
            known = ", ".join(metrics) or "nothing"
            raise UsageError(f"no batch of the evaluation gave {name!r}; they gave {known}.")
        return metrics[name]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was added, summed and gathered, by name; the same on every worker."""
        if self._metrics is None:
            raise UsageError(
                "what an evaluation comes to is not known yet: it belongs to all workers' batches. Read it after the "
                "`with`."
            )
        return self._metrics

    def __enter__(self) -> Evaluation:
        self._engine.trained.check_untouched("before run.evaluate")
        self._team.meet_equal("evaluate", {**self._feed.order.describe(0), "evaluation": self._number})
        self._random_state = RandomState.capture(self._engine.device)
        self._modes = [(module, module.training) for module in self._engine.model.modules()]
        self._engine.model.eval()
        self._no_grad.__enter__()
        self._phase.__enter__()
        self._loader = self._feed.load(self._claims_ahead())
        return self

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if loader is None:
            raise UsageError("an evaluation was iterated outside its `with`. Write `with run.evaluate(...) as ev:`.")
        while (index := self._claimed.popleft() if self._claimed else self._claim()) is not None:
            ids = loader.ids(0, index, 0)
            if not len(ids):  # the end of a stream
                self._end = index
                break
            yield from self._batch(loader, index, ids)
        while left := self._meet():
            for index in left[self._team.roster.living.index(self._team.rank) :: self._team.world_size]:
                yield from self._batch(loader, index, loader.ids(0, index, 0))
        self._exhausted = True

    def _batch(self, loader: Batches, index: int, ids: Ids) -> Iterator[Any]:
        """Let the body compute a batch."""
        batch = loader.get(0, index, 0)
        self._index, self._ids = index, ids
        self._collected[index] = Collected(len(ids), "ev")
        batch = self._engine.device.bring_batch(batch, map_tensors)
        self._engine.seed("evaluate", index)
        with self._engine.computing():
            yield batch
        self._index = -1

    def _meet(self) -> list[int]:
        """Exchange with the others what batches came to, and return those that a worker that died has left.

        Raises: RankLost where they can not be read again.
        """
        new = {i: one for i, one in self._collected.items() if i not in self._numbers}
        numbers, parts = {i: one.numbers for i, one in new.items()}, {i: one.parts for i, one in new.items()}
        total = self._feed.order.total_steps(1)
        ends = []
        for payload in self._team.meet("evaluate (results)", pack([self._end, numbers, to_values(parts)])):
            end, numbers_there, parts_there = unpack(payload)
            ends.append(end)
            self._numbers.update(numbers_there)
            self._parts.update(from_values(parts_there))
        of_stream = min((end for end in ends if end is not None), default=0)
        left = [index for index in range(of_stream if total is None else total) if index not in self._numbers]
        if left and total is None:
            raise RankLost(
                f"batches {left[:5]} of an evaluation are lost with a worker that has died, and a stream is not read "
                "twice. Start again, to go on from the last checkpoint; a map-style data set would have gone on."
            )
        return left

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
        self._metrics = self._combined()
        self._done(self._metrics)

    def _combined(self) -> dict[str, Any]:
        batches = sorted(self._numbers)
        in_order = {place: self._parts[index] for place, index in enumerate(batches)}
        return combined([self._numbers[index] for index in batches], lambda: [in_order])


@final
class PastEvaluation(Evaluation):
    """One that others have made before this worker came: it has no batches left, and what it came to."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._index = -1
        self._metrics = metrics

    def __enter__(self) -> PastEvaluation:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""
