"""A run: one model, one optimizer, one team.

`Run` keeps the place in the data and says which call may be made when; what the calls do is in the rooms below.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import weakref
from collections.abc import Generator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import nn

from lightwork.checkpoint import checkpoint as checkpoints
from lightwork.checkpoint.checkpoint import Bookmark, Checkpoint, Description
from lightwork.data.feed import Batches, Feed, Schedule, feed_for_evaluation, feed_of, total_steps, walk
from lightwork.data.order import CustomOrder
from lightwork.engine.engine import Engine
from lightwork.errors import CheckpointError, TeamError, UsageError
from lightwork.run.evaluation import Evaluation
from lightwork.run.exit import EXITS
from lightwork.run.guard import Guard, say_written
from lightwork.run.step import Loop, Step, StepPlace
from lightwork.spec.plan import Plan
from lightwork.spec.spec import Spec
from lightwork.team.presence import Activity
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team
from lightwork.trace import Trace


class Stateful(Protocol):
    """Anything that `keep` can save: a scheduler, an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state that `state_dict` returned."""


@final
class Run:
    """A model being trained by a team; made by `distribute`.

    `save`, `state_dict`, `digest`, `evaluate`, `edit`, `load` and `steps` are collective: every worker calls them, in
    the same order.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        spec: Spec,
        plan: Plan,
        run_dir: Path,
        team: Team,
        engine: Engine,
        guard: Guard,
        trace: Trace,
    ) -> None:
        self.model = model
        self.spec = spec
        self.plan = plan
        self.run_dir = run_dir
        self._team = team
        self._engine = engine
        self._guard = guard
        self._trace = trace
        self._position = Bookmark()
        self._resumed = False
        self._kept_before: dict[str, Any] = {}  # of a run that was resumed, for objects that are still to come
        self._calls = 0
        self._evaluations = 0
        self._loop: weakref.ref[Loop] | None = None  # while in it
        self._step: Step | None = None
        self._kept: dict[str, Stateful] = {}
        self._closed = False

    # --- who and where ----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._team.rank

    @property
    def world_size(self) -> int:
        """The number of workers."""
        return self._team.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is the worker whose output is shown: rank 0."""
        return self._team.is_main

    @property
    def step_index(self) -> int:
        """Updates done so far, those before a resume included."""
        return self._position.step

    # --- training ---------------------------------------------------------------------------------------------------

    def steps(
        self,
        dataset: Any,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        shuffle: bool | None = None,
        order: CustomOrder | None = None,
        drop_last: bool | None = None,
    ) -> Iterator[Step]:
        """Go through `dataset` step by step, each a global batch and one update.

        Args:
            dataset: a map-style data set (`len()` and `[]`), or a DataLoader, of which the data set, collate function,
                loading workers and sampler are used; the batches are the run's. Or a stream, such as an
                IterableDataset, which the worker reads itself: in its own order or, where it has `num_shards` and
                `shard(num_shards=, index=)`, each micro-batch of a step from shards of its own.
            epochs: passes over the data; 1 if `max_steps` is not given either.
            max_steps: stop after so many steps, wherever that is. Both count from the beginning of this loop, also when
                the run was resumed in the middle of it.
            shuffle: a new permutation each epoch (the default), or the ids in order; of a stream, its shards.
            order: the ids of an epoch: a function from its number, or the same ids for every one.
            drop_last: leave out a last global batch that is short.

        Leaving the loop early is agreed by all: when one worker breaks, the others end after the step that they are in.
        With several hosts all workers must break at the same step; another one is told so by an error.
        """
        for name, count in (("epochs", epochs), ("max_steps", max_steps)):
            if count is not None and (not isinstance(count, int) or count < 0):
                raise UsageError(f"{name}={count!r} is not a whole number from 0 upwards.")
        self._end_former_loop()
        feed = feed_of(
            dataset,
            seed=self.spec.seed,
            global_batch=self.spec.global_batch,
            micro_batch=self.spec.micro_batch,
            shuffle=shuffle,
            order=order,
            drop_last=drop_last,
        )
        return Loop(partial(self._steps, feed, 1 if epochs is None and max_steps is None else epochs, max_steps))

    def _steps(
        self, feed: Feed, epochs: int | None, max_steps: int | None, loop: weakref.ref[Loop]
    ) -> Generator[Step, None, None]:
        order = feed.order
        self._end_former_loop()
        if not self._begin_loop(order):
            return
        self._loop = loop
        loader: Batches | None = None
        try:
            start = self._position
            total = total_steps(order, epochs, max_steps)
            self._trace.event(
                "steps",
                first=start.step,
                total=None if total is None else start.step - start.steps_in_call + total,
            )
            loader = feed.load(self._upcoming(order, start, total))
            while total is None or self._position.steps_in_call < total:
                epoch, step_in_epoch = next(walk(order, self._position.epoch, self._position.step_in_epoch))
                if epochs is not None and epoch >= epochs:
                    break
                if self._team.presence.anyone_left():
                    break
                self._guard.check_parameters()
                step = self._make_step(order, loader, epoch, step_in_epoch)
                self._step = step
                yield step
                step.check_finished()
        finally:
            self._end_loop()
            if loader is not None:
                loader.close()

    def _begin_loop(self, order: Schedule) -> bool:
        """Meet the others before a loop; return False for one that a resumed run had finished."""
        call, self._calls = self._calls, self._calls + 1
        self._meet_where("steps")
        if self._resumed and call < self._position.call:
            return False
        if call != self._position.call:
            self._position = Bookmark(step=self._position.step, call=call)
        self._team.presence.set_left(left=False)
        self._team.meet_equal("run.steps", order.describe(self._position.epoch))
        self._team.report(Progress.TRAINING)
        return True

    def _end_former_loop(self) -> None:
        """End a loop that was left without its iterator being let go of.

        Raises: UsageError in a step, after one that was left in its middle, and after `close`.
        """
        if self._closed:
            raise UsageError("run.steps was called after run.close(). Call lightwork.distribute for another run.")
        if self._loop is None:
            self._refuse_in_step("steps")
            return
        loop = self._loop()
        if loop is None or (self._step is not None and self._step.begun and not self._step.finished):
            raise UsageError(
                "run.steps was called inside a loop over run.steps. End the one before beginning the next."
            )
        loop.close()

    def _end_loop(self) -> None:
        self._loop = None
        step = self._step
        # A step that was left in its middle (an error) is not left as a loop is: the others may still need this worker.
        if step is None or step.finished or not step.begun:
            self._team.presence.set_left(left=True)
            self._team.presence.show(Activity.OUTSIDE)
            self._team.report(Progress.BETWEEN)

    def _upcoming(self, order: Schedule, start: Bookmark, total: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield the micro-batches that fall to this worker if nobody is late, in order."""
        steps = walk(order, start.epoch, start.step_in_epoch)
        left = None if total is None else max(0, total - start.steps_in_call)
        for epoch, step_in_epoch in itertools.islice(steps, left):
            for index in self._team.roster.share(self.rank, order.micro_batches(epoch, step_in_epoch)):
                yield (epoch, step_in_epoch, index)

    def _make_step(self, order: Schedule, loader: Batches, epoch: int, step_in_epoch: int) -> Step:
        place = StepPlace(
            index=self._position.step,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            num_micro_batches=order.micro_batches(epoch, step_in_epoch),
        )
        updated = partial(self._advance, order, epoch, step_in_epoch)
        return Step(place, self._team, self._engine, loader, self._trace, updated)

    def _meet_where(self, what: str) -> None:
        """Meet, and take over the place of the worker that is farthest.

        One that left its loop early is behind: the others finished the step that they were in without it.
        """
        places = [json.loads(place) for place in self._team.meet(what, json.dumps(asdict(self._position)).encode())]
        self._position = Bookmark(**max(places, key=lambda place: (place["step"], place["call"])))

    def _advance(self, order: Schedule, epoch: int, step_in_epoch: int, goes_on: bool | None) -> None:
        """Take note of an update that is done: what is saved from here on is the state after it."""
        self._guard.updated()
        epoch, step_in_epoch = order.after(epoch, step_in_epoch, goes_on)
        self._position = Bookmark(
            step=self._position.step + 1,
            call=self._position.call,
            steps_in_call=self._position.steps_in_call + 1,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
        )

    # --- collective calls -------------------------------------------------------------------------------------------

    def evaluate(self, dataset: Any) -> Evaluation:
        """Return a pass over `dataset` in eval mode, without gradients: a context manager to iterate over.

        Each sample comes once, on one of the workers, in micro-batches; random state and buffers are left alone.
        """
        self._refuse_in_step("evaluate")
        feed = feed_for_evaluation(
            dataset, seed=self.spec.seed, micro_batch=self.spec.micro_batch, world_size=self.world_size
        )
        self._evaluations += 1
        return Evaluation(self._team, self._engine, feed, self._evaluations)

    def keep(self, **objects: Stateful) -> None:
        """Save these with the run, and restore them with it: anything with `state_dict` and `load_state_dict`.

        On a resumed run their saved state is loaded at once.

        Raises: UsageError when one has no state dict.
        """
        for name, value in objects.items():
            if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
                raise UsageError(
                    f"run.keep({name}=...): a {type(value).__name__} has no state_dict() and load_state_dict()."
                )
            self._kept[name] = value
            if name in self._kept_before:
                value.load_state_dict(self._kept_before[name])

    @contextlib.contextmanager
    def edit(self) -> Iterator[None]:
        """Apply what the body writes to weights and buffers, once: as the main worker leaves them.

        Inside, autograd is off, and every worker sees fp32 weights of its own. Parameters can be written, not added or
        replaced.
        """
        self._refuse_in_step("edit")
        self._team.meet("edit")
        with self._engine.trained.edit(self._team.meet, is_leader=self._team.is_leader):
            yield

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict, under its names: full, plain fp32 tensors of its own, on the host."""
        self._refuse_in_step("state_dict")
        self._team.meet("state_dict")
        return self._engine.trained.state_dict(self._team.meet, is_leader=self._team.is_leader)

    def digest(self) -> str:
        """Return the SHA-256 of weights, buffers and optimizer state, in hexadecimal digits; the same everywhere."""
        self._refuse_in_step("digest")
        self._team.meet("digest")
        team = self._team
        return self._engine.trained.digest(team.meet, team.rank, team.world_size, is_leader=team.is_leader)

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint to the folder `path` (the run directory's, unless given) and return it.

        Raises: CheckpointError when it can not be written; what was there before is kept.
        """
        self._refuse_in_step("save")
        folder = Path(path) if path is not None else self.run_dir / "checkpoint"
        self._meet_where("save")
        description: Description | None = None
        if self.is_main:
            kept = {name: value.state_dict() for name, value in self._kept.items()}
            description = Description(self.spec, self._position, kept)
        team = self._team
        problem = checkpoints.save(folder, self._engine.trained, description, team.meet, is_leader=team.is_leader)
        if self.is_main:
            self._trace.event("save", path=str(folder), step=self._position.step)
        problem = team.meet_main("save (result)", problem.encode()).decode()
        if problem:
            raise CheckpointError(problem)
        return folder

    def load(self, path: str | os.PathLike[str] | Checkpoint) -> None:
        """Go on where a checkpoint was saved: weights, optimizer, buffers, kept objects and the place in the data.

        Raises: CheckpointError when it is of another model, optimizer or spec.
        """
        self._refuse_in_step("load")
        if self._loop is not None:
            raise UsageError("run.load was called inside the loop over run.steps. Call it before the loop.")
        checkpoint = path if isinstance(path, Checkpoint) else checkpoints.load(path)
        state, team = self._engine.trained, self._team
        checkpoints.check_fits(checkpoint, self.spec, state)
        team.meet("load")
        checkpoints.restore(checkpoint, state, is_leader=team.is_leader)
        if team.is_leader:
            team.board.resume_at(checkpoint.step)
        self._position = checkpoint.position
        self._resumed, self._kept_before = True, checkpoint.kept
        self._calls = 0
        self.keep(**self._kept)
        team.meet("load (end)")
        state.accept()
        self._trace.event("load", step=checkpoint.step)

    def stay_while_needed(self) -> None:
        """At the end of the script: wait for the others, if they may still read weights that are here."""
        if self._engine.serves_weights and not self._closed:
            with contextlib.suppress(TeamError):  # who is not coming any more is named elsewhere
                self._team.meet("the end of the script")

    def close(self, *, gives_back: bool = True) -> None:
        """Give model and optimizer back to plain PyTorch, in memory of this worker's own. Not collective."""
        if self._closed:
            return
        self._closed = True
        EXITS.remove(self)
        self._guard.close()
        written = self._engine.close(gives_back=gives_back)
        self._trace.event("end", step=self._position.step)
        self._trace.close()
        self._team.close()
        self._team.presence.announce(Activity.ENDED)
        say_written(written, is_error=gives_back)

    def _refuse_in_step(self, call: str) -> None:
        step = self._step
        if step is None or step.finished or not step.begun:
            return
        message = (
            f"inside the loop over the micro-batches of step {step.index}. Call it after that loop, when the update is "
            "done."
        )
        if self._loop is None:
            message = (
                f"after step {step.index} was left in its middle (an error, an interruption), which can not be taken "
                "up again. Call lightwork.distribute anew, with resume= to go on from a checkpoint."
            )
        raise UsageError(f"run.{call} was called {message}")
