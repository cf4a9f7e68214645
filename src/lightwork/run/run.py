"""A run: one model, one optimizer, one team.

`Run` keeps the place in the data and says which call may be made when; what the calls do is in the rooms below.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightwork.checkpoint import checkpoint as checkpoints
from lightwork.checkpoint.checkpoint import Checkpoint
from lightwork.checkpoint.foreign import DEFAULT_NAMES, Format, check_format
from lightwork.checkpoint.settings import Bookmark
from lightwork.data.feed import Batches, Feed, Schedule, feed_for_evaluation, feed_of, total_steps, upcoming, walk
from lightwork.data.order import CustomOrder
from lightwork.engine.engine import Engine
from lightwork.errors import TeamError, UsageError
from lightwork.run.course import Course, Following, check_count
from lightwork.run.evaluation import Evaluation
from lightwork.run.exit import EXITS
from lightwork.run.guard import Guard, say_written
from lightwork.run.kept import Kept
from lightwork.run.saves import Saves
from lightwork.run.state_calls import StateCalls
from lightwork.run.step import Loop, Step, StepPlace
from lightwork.spec.plan import Plan
from lightwork.spec.spec import Spec
from lightwork.team.presence import Activity
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team
from lightwork.trace import Trace


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
        trace: Trace,
    ) -> None:
        self.model = model
        self.spec = spec
        self.plan = plan
        self.run_dir = run_dir
        self._team = team
        self._engine = engine
        self._trace = trace
        self.rank = team.rank  #: this worker's number, from 0
        self.world_size = team.world_size  #: the number of workers
        self.is_main = team.is_main  #: whether this is the worker whose output is shown: rank 0
        self._course = Course()
        self._kept = Kept()
        self._saves = Saves(spec, engine.trained, self._course, self._kept)
        self._state = StateCalls(spec, team, engine.trained, self._saves, trace)
        self._guard = Guard(
            engine.optimizers, engine.trained.optimizer_state, partial(self._state.load_optimizer, engine)
        )
        self._evaluations = 0
        self._loop: weakref.ref[Loop] | None = None  # while in it
        self._step: Step | None = None
        self._closed = False

    # --- who and where ----------------------------------------------------------------------------------------------

    @property
    def step_index(self) -> int:
        """Updates done so far, those before a resume included."""
        return self._course.step

    @property
    def epoch(self) -> int:
        """The epoch that the run is in: of `run.epochs` or, outside of such a loop, of the last data set."""
        return self._course.epoch

    @property
    def kept(self) -> Mapping[str, Any]:
        """What was given to `keep`, by name; on a resumed run also what was saved and not given again."""
        return self._kept.values

    # --- training ---------------------------------------------------------------------------------------------------

    def epochs(self, num: int) -> Iterator[int]:
        """Go through `num` epochs, or those that are left: `for epoch in run.epochs(E):` with `run.steps(data)` in it.

        A run that is resumed goes on in the middle of the epoch that was interrupted. What the body does after its
        steps is done once for each epoch: where it was interrupted, it is done again from the state before it.
        """
        check_count("the number of epochs", num)
        self._end_former_loop()
        self._saves.check_settings()
        return self._course.epochs(num, self._saves.body_ended)

    def steps(
        self,
        dataset: Any,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        shuffle: bool | None = None,
        order: CustomOrder | None = None,
        drop_last: bool | None = None,
        batches: bool | None = None,
    ) -> Iterator[Step]:
        """Go through `dataset` step by step, each a global batch and one update.

        Args:
            dataset: a map-style data set (`len()` and `[]`), or a DataLoader, of which the data set, collate function,
                loading workers and sampler are used; the batches are the run's. Or a stream, such as an
                IterableDataset, which the worker reads itself: in its own order or, where it has `num_shards` and
                `shard(num_shards=, index=)`, each micro-batch of a step from shards of its own.
            epochs: passes over the data; 1 if `max_steps` is not given either. Each has an order of its own, and is
                the data set's next epoch in the run.
            max_steps: stop after so many steps, wherever that is. Both count from the beginning of this loop, also when
                the run was resumed in the middle of it. `len()` of the loop says how many steps it makes in all.
            shuffle: a new permutation each epoch (the default), or the ids in order; of a stream, its shards.
            order: the ids of an epoch: a function from its number, or the same ids for every one.
            drop_last: leave out a last global batch that is short.
            batches: whether the items of `dataset` are whole batches (True) or samples (False). Left out: batches where
                it wraps a DataLoader, as a prefetcher does, or is one with batch_size=None; else samples.

        Leaving the loop early is agreed by all: when one worker breaks, the others end after the step that they are in.
        With several hosts all workers must break at the same step; another one is told so by an error.
        """
        for name, count in (("epochs", epochs), ("max_steps", max_steps)):
            if count is not None:
                check_count(name, count)
        self._end_former_loop()
        feed = feed_of(
            dataset,
            seed=self.spec.seed,
            global_batch=self.spec.global_batch,
            micro_batch=self.spec.micro_batch,
            shuffle=shuffle,
            order=order,
            drop_last=drop_last,
            batches=batches,
        )
        epochs = 1 if epochs is None and max_steps is None else epochs
        total = partial(total_steps, feed.order, self._course.first_epoch_of(feed), epochs, max_steps)
        return Loop(partial(self._steps, feed, epochs, max_steps), total)

    def _steps(
        self, feed: Feed, epochs: int | None, max_steps: int | None, loop: weakref.ref[Loop]
    ) -> Generator[Step, None, None]:
        order, course = feed.order, self._course
        self._end_former_loop()
        if not self._begin_loop(feed):
            return
        self._loop = loop
        loader: Batches | None = None
        broken = True
        try:
            start = course.at
            total = total_steps(order, start.first_epoch, epochs, max_steps)
            self._trace.event("steps", first=start.step, total=course.end_of(total))
            left = None if total is None else max(0, total - start.steps_in_call)
            share = partial(self._team.roster.share, self.rank)
            loader = feed.load(upcoming(order, start.epoch, start.step_in_epoch, left, share))
            while total is None or course.at.steps_in_call < total:
                epoch, step_in_epoch = next(walk(order, course.at.epoch, course.at.step_in_epoch))
                if epochs is not None and epoch >= start.first_epoch + epochs:
                    break
                if self._team.presence.anyone_left():
                    break
                self._guard.check()
                course.begin_step(order, epoch)
                step = self._make_step(order, loader, epoch, step_in_epoch)
                self._step = step
                yield step
                step.check_finished()
                self._saves.body_ended()
            broken = False
        finally:
            self._end_loop(broken=broken)
            if loader is not None:
                loader.close()

    def _begin_loop(self, feed: Feed) -> bool:
        """Meet the others before a loop; return False for one that a resumed run had finished."""
        course = self._course
        self._meet_where("steps")
        was_resuming = course.is_resuming
        if was_resuming:
            self._saves.check_settings()
        elif not course.is_in_epochs:
            self._saves.body_ended()
        following = course.enter(feed, self._saves.check_unchanged)
        if was_resuming and course.is_in_epochs and following is not Following.NEW:
            self._saves.put_all_back()
        if following is Following.FINISHED:
            return False
        self._team.presence.set_left(left=False)
        fingerprint = course.data.known[course.at.data].fingerprint
        self._team.meet_equal("run.steps", {**fingerprint, **feed.order.describe(course.at.epoch)})
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

    def _end_loop(self, *, broken: bool) -> None:
        self._loop = None
        if self._closed:
            return
        step = self._step
        self._course.leave(broken=broken)
        if self.is_main:
            self._saves.pass_ended()
        # A step that was left in its middle (an error) is not left as a loop is: the others may still need this worker.
        if step is None or step.finished or not step.begun:
            self._team.presence.set_left(left=True)
            self._team.presence.show(Activity.OUTSIDE)
            self._team.report(Progress.BETWEEN)

    def _make_step(self, order: Schedule, loader: Batches, epoch: int, step_in_epoch: int) -> Step:
        place = StepPlace(
            index=self._course.at.step,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            num_micro_batches=order.micro_batches(epoch, step_in_epoch),
            is_last=order.is_last(epoch, step_in_epoch),
        )
        updated = partial(self._advance, order, epoch, step_in_epoch)
        return Step(
            place, self._team, self._engine, loader, self._trace, updated, partial(EXITS.leave_out, self._engine.beside)
        )

    def _meet_where(self, what: str) -> None:
        """Meet, and take over the place of the worker that is farthest.

        One that left its loop early is behind: the others finished the step that they were in without it.
        """
        places = [json.loads(place) for place in self._team.meet(what, json.dumps(asdict(self._course.at)).encode())]
        self._course.at = Bookmark(**max(places, key=lambda place: (place["step"], place["plain"], place["call"])))

    def _advance(self, order: Schedule, epoch: int, step_in_epoch: int, goes_on: bool | None) -> None:
        """Take note of an update that is done: what is saved from here on is the state after it."""
        self._guard.updated()
        self._course.advance(epoch, order.after(epoch, step_in_epoch, goes_on))

    # --- collective calls -------------------------------------------------------------------------------------------

    def evaluate(self, dataset: Any, *, batches: bool | None = None) -> Evaluation:
        """Return a pass over `dataset` in eval mode, without gradients: a context manager to iterate over.

        `batches` as of `steps`.

        Each sample comes once, on one of the workers, in micro-batches; random state and buffers are left alone.
        """
        self._refuse_in_step("evaluate")
        feed = feed_for_evaluation(
            dataset,
            seed=self.spec.seed,
            micro_batch=self.spec.micro_batch,
            world_size=self.world_size,
            batches=batches,
        )
        self._evaluations += 1
        return Evaluation(self._team, self._engine, feed, self._evaluations)

    def keep(self, **objects: Any) -> None:
        """Save these with the run, and restore them with it: anything with a state dict, or plain values.

        On a resumed run their saved state is loaded at once; a plain value given before the loops begin stays what was
        saved, as `run.kept[name]` says.

        Raises: UsageError for what can not be saved.
        """
        self._kept.put(objects, restores=self._saves.is_resuming)
        if self._saves.is_resuming:
            self._saves.put_back()

    def edit(self) -> AbstractContextManager[None]:
        """Apply what the body writes to weights and buffers, once: as the main worker leaves them.

        Inside, autograd is off, and every worker sees fp32 weights of its own. Parameters can be written, not added or
        replaced.
        """
        self._refuse_in_step("edit")
        return self._state.edit()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict, under its names: full, plain fp32 tensors of its own, on the host."""
        self._refuse_in_step("state_dict")
        return self._state.state_dict()

    def digest(self) -> str:
        """Return the SHA-256 of weights, buffers and optimizer state, in hexadecimal digits; the same everywhere."""
        self._refuse_in_step("digest")
        return self._state.digest()

    def save(self, path: str | os.PathLike[str] | None = None, *, format: Format = "lightwork") -> Path:
        """Write a checkpoint to `path` (in the run directory, unless given) and return it.

        Args:
            path: a folder; of format "torch" a file.
            format: "lightwork": all that a run goes on from, as if it had not stopped; "torch": what a plain script
                saves, a dictionary with "model", "optimizer" (a list of several), "step", "epoch" and "kept"; "dcp": a
                folder of torch.distributed.checkpoint; "huggingface": the model's own `save_pretrained`. Those of
                others hold the whole model in one worker's memory while they are written.

        Raises: CheckpointError when it can not be written; what was there before is kept.
        """
        self._refuse_in_step("save")
        check_format(format, self.model)
        folder = Path(path) if path is not None else self.run_dir / DEFAULT_NAMES[format]
        self._meet_where("save")
        beside = EXITS.steps_beside(self)
        self._state.save(folder, format, self.model, beside, within_loop=self._loop is not None)
        return folder

    def load(self, path: str | os.PathLike[str] | Checkpoint) -> None:
        """Go on where a checkpoint was saved: weights, optimizer, buffers, kept objects and the place in the data.

        Raises: CheckpointError when it is of another model, optimizer or spec.
        """
        self._refuse_in_step("load")
        if self._loop is not None:
            raise UsageError("run.load was called inside the loop over run.steps. Call it before the loop.")
        if self._state.load(path if isinstance(path, Checkpoint) else checkpoints.load_whole(path)):
            self._guard.updated()  # a scheduler may step at once

    def stay_while_needed(self) -> None:
        """At the end of the script: wait for the others, if they may still read weights that are here."""
        self._saves.script_ended()
        if self._engine.serves_weights and not self._closed:
            with contextlib.suppress(TeamError):  # who is not coming any more is named elsewhere
                self._team.meet("the end of the script")

    def close(self, *, gives_back: bool = True) -> None:
        """Give model and optimizer back to plain PyTorch, in memory of this worker's own. Not collective."""
        if self._closed:
            return
        self._closed = True
        if gives_back and sys.exc_info()[0] is None:  # not at the end of a script, which may have been ended anywhere
            self._saves.body_ended()
        EXITS.remove(self)
        self._guard.close()
        written = self._engine.close(gives_back=gives_back)
        self._trace.event("end", step=self._course.at.step)
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
