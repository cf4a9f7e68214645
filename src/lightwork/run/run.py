"""A run: one model, one optimizer, one team.

`Run` keeps the place in the data and says which call may be made when; what the calls do is in the rooms below.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightwork.checkpoint.checkpoint import Checkpoint
from lightwork.checkpoint.foreign import DEFAULT_NAMES, Format, check_format
from lightwork.data.feed import feed_for_evaluation, feed_of
from lightwork.data.order import CustomOrder
from lightwork.engine.engine import Engine
from lightwork.errors import RankLost, TeamError, UsageError
from lightwork.run.automatic import Automatic
from lightwork.run.course import Course, check_count
from lightwork.run.evaluation import Evaluation, PastEvaluation
from lightwork.run.exit import EXITS
from lightwork.run.guard import Guard, say_written
from lightwork.run.handover import HandOver
from lightwork.run.kept import Kept
from lightwork.run.passes import Passes
from lightwork.run.saves import Saves
from lightwork.run.state_calls import StateCalls
from lightwork.run.step import Step
from lightwork.spec.plan import Plan
from lightwork.spec.spec import Spec
from lightwork.team.presence import Activity
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
        newest = run_dir / DEFAULT_NAMES["lightwork"]
        self._state = StateCalls(spec, team, engine.trained, self._saves, trace, keep=plan.keep_checkpoints, at=newest)
        self._guard = Guard(
            engine.optimizers, engine.trained.optimizer_state, partial(self._state.load_optimizer, engine)
        )
        self._automatic = Automatic(plan, team, self._state, model, newest)
        self._handover = HandOver(team, engine, self._saves, self._course)
        self._calls = self._handover.calls
        self._passes = Passes(
            team, engine, self._course, self._saves, self._automatic, self._guard, self._handover, trace
        )
        # A script's function that ends lets go of its run: in a cycle it lives on for the end of the script to find.
        self._passes.owner = self

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
        self._passes.end_former()
        self._saves.check_settings()
        return self._course.epochs(num, self._body_ended)

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
        self._passes.end_former()
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
        return self._passes.begin(feed, epochs, max_steps)

    # --- collective calls -------------------------------------------------------------------------------------------

    def evaluate(self, dataset: Any, *, batches: bool | None = None) -> Evaluation:
        """Return a pass over `dataset` in eval mode, without gradients: a context manager to iterate over.

        `batches` as of `steps`.

        Each sample comes once, on one of the workers, in micro-batches; random state and buffers are left alone.
        """
        self._passes.refuse_within("run.evaluate")
        if self._team.newcomer is not None:
            return PastEvaluation(self._calls.again("run.evaluate"))
        feed = feed_for_evaluation(
            dataset,
            seed=self.spec.seed,
            micro_batch=self.spec.micro_batch,
            world_size=self.world_size,
            batches=batches,
        )
        self._course.num_evaluations += 1
        done = partial(self._note, "run.evaluate")
        return Evaluation(self._team, self._engine, feed, self._course.num_evaluations, done)

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
        self._passes.refuse_within("run.edit")
        if self._team.newcomer is not None:
            self._calls.again("run.edit")
            return self._state.edit_alone()
        self._passes.meet_where("edit")
        self._note("run.edit", None)
        return self._state.edit()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict, under its names: full, plain fp32 tensors of its own, on the host."""
        self._passes.refuse_within("run.state_dict")
        if self._team.newcomer is not None:
            found: dict[str, torch.Tensor] = self._calls.again("run.state_dict")
            return found
        self._passes.meet_where("state_dict")
        found = self._state.state_dict()
        self._note("run.state_dict", found)
        return found

    def digest(self) -> str:
        """Return the SHA-256 of weights, buffers and optimizer state, in hexadecimal digits; the same everywhere."""
        self._passes.refuse_within("run.digest")
        if self._team.newcomer is not None:
            return str(self._calls.again("run.digest"))
        self._passes.meet_where("digest")
        digest = self._state.digest()
        self._note("run.digest", digest)
        return digest

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
        self._passes.refuse_within("run.save")
        check_format(format, self.model)
        folder = Path(path) if path is not None else self.run_dir / DEFAULT_NAMES[format]
        if self._team.newcomer is not None:
            self._calls.again("run.save")
            return folder
        farthest = self._passes.meet_where("save")
        beside = EXITS.steps_beside(self)
        self._state.save(folder, format, self.model, beside, within_loop=self._passes.is_within, of=farthest)
        self._automatic.saved()
        self._note("run.save", None)
        return folder

    def load(self, path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
        """Go on where a checkpoint was saved, and return it: weights, optimizer, buffers, kept objects, and the place.

        Raises: CheckpointError when it is of another model, optimizer or spec; DamagedCheckpoint.
        """
        self._passes.refuse_within("run.load")
        if self._passes.is_within:
            raise UsageError("run.load was called inside the loop over run.steps. Call it before the loop.")
        if self._team.newcomer is not None:
            return self._state.loaded_before(path, self._calls.again("run.load"))
        checkpoint = self._state.load(path)
        if checkpoint.step:
            self._passes.updated()
        self._note("run.load", checkpoint.description.name)
        return checkpoint

    def begin(self, *, elastic: bool) -> None:
        """Be in the team; a newcomer waits until a team that trains lets it in, and is where that is then.

        Called by `distribute`. With `elastic`, the team goes on without a worker that is killed.

        Raises: RankLost, RankFailed when nobody is there any more.
        """
        self._team.may_lose, self._team.lease = elastic, self.plan.lease
        self._passes.leaving.listen()
        newcomer = self._team.newcomer
        if newcomer is None:
            self._team.begin(elastic=self.plan.elastic)
            return
        path = newcomer.wait_until_let_in()
        try:
            newcomer.take_count(self._handover.take(path))
        except OSError as error:
            raise RankLost(f"rank {self.rank} was let in by a worker that has died ({error}).") from error
        self._passes.updated()
        self._trace.event("joined", step=self._course.at.step)

    def _note(self, what: str, result: object) -> None:
        """Take note of a collective call, unless it lies behind where a newcomer begins."""
        if not self._passes.is_within:
            self._calls.note(what, result)

    def _body_ended(self) -> None:
        self._saves.body_ended()
        self._calls.body_ended()

    def stay_while_needed(self) -> None:
        """At the end of the script: wait for the others, if they may still read weights that are here."""
        self._saves.script_ended()
        if self._engine.serves_weights and not self._passes.is_closed:
            with contextlib.suppress(TeamError):  # who is not coming any more is named elsewhere
                self._team.meet("the end of the script")

    def close(self, *, gives_back: bool = True) -> None:
        """Give model and optimizer back to plain PyTorch, in memory of this worker's own. Not collective."""
        if self._passes.is_closed:
            return
        self._passes.is_closed = True
        if gives_back and sys.exc_info()[0] is None:  # not at the end of a script, which may have been ended anywhere
            self._saves.body_ended()
        EXITS.remove(self)
        self._guard.close()
        written = self._engine.close(gives_back=gives_back)
        self._state.saving.wait()
        self._trace.event("end", step=self._course.at.step)
        self._trace.close()
        self._team.close()
        if self._team.is_in:
            self._team.presence.announce(Activity.ENDED)
        say_written(written, is_error=gives_back)
