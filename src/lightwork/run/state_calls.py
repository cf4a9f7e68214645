"""Collective calls on what is trained: every worker makes them, outside a step, in the same order."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightwork.checkpoint import checkpoint as checkpoints
from lightwork.checkpoint import foreign, writing
from lightwork.checkpoint.checkpoint import Checkpoint
from lightwork.checkpoint.description import Description, from_values, to_values
from lightwork.checkpoint.draft import Draft, Saving
from lightwork.checkpoint.foreign import Format
from lightwork.checkpoint.packing import pack, unpack
from lightwork.engine.engine import Engine
from lightwork.errors import CanNotJoin, CheckpointError, DamagedCheckpoint, RankLost, UsageError
from lightwork.notice import notice
from lightwork.run.saves import Saves
from lightwork.spec.spec import Spec
from lightwork.state.optimizer_state import take_settings
from lightwork.state.state import TrainedState
from lightwork.team.join import available_memory
from lightwork.team.team import Team
from lightwork.trace import Trace

#: How much more memory must be left than a checkpoint takes, so that it may be there for a while.
_ROOM = 3


class StateCalls:
    """The calls of one run."""

    def __init__(
        self, spec: Spec, team: Team, trained: TrainedState, saves: Saves, trace: Trace, *, keep: int, at: Path
    ) -> None:
        """Of checkpoints that are saved `at` a path the last `keep` stay; elsewhere the last one."""
        self._spec = spec
        self._team = team
        self._trained = trained
        self._saves = saves
        self._keep, self._keep_at = keep, at
        self.saving = Saving()
        self._trace = trace

    @contextlib.contextmanager
    def edit(self) -> Iterator[None]:
        """Apply what the body writes to weights and buffers, once: as the main worker leaves them."""
        self._saves.edited("run.edit()")
        with self._trained.edit(self._team.meet, self._team.by_leader, is_leader=self._team.is_leader):
            yield

    def edit_alone(self) -> AbstractContextManager[None]:
        """Let the body write where it changes nothing: the others have edited before this worker came."""

        def nobody(what: str, payload: bytes = b"") -> list[bytes]:
            return []

        return self._trained.edit(nobody, lambda what, work: b"", is_leader=False)

    def loaded_before(self, saved: str | os.PathLike[str] | Checkpoint, name: str) -> Checkpoint:
        """Return the checkpoint of this name that the others have loaded before this worker came.

        Raises: CanNotJoin when it is not there any more.
        """
        with contextlib.suppress(CheckpointError):
            checkpoint = saved if isinstance(saved, Checkpoint) else checkpoints.load_whole(saved)
            if checkpoint.description.name == name:
                return checkpoint
        raise CanNotJoin(f"the checkpoint that the others have loaded by run.load is not at {saved} any more.")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict: plain fp32 tensors, on the host."""
        return self._trained.state_dict(self._team.meet, is_leader=self._team.is_leader)

    def digest(self) -> str:
        """Return the SHA-256 of everything."""
        team = self._team

        def share(names: Sequence[str]) -> Sequence[str]:
            return names[team.roster.living.index(team.rank) :: team.world_size]

        return self._trained.digest(team.meet, share, is_leader=team.is_leader)

    def save(
        self,
        path: Path,
        form: Format,
        model: nn.Module,
        beside: Mapping[str, int],
        *,
        within_loop: bool,
        of: int | None,
        beside_the_run: bool = False,
    ) -> None:
        """Write a checkpoint, when all have met.

        Args:
            beside: the steps of the script's other runs.
            beside_the_run: only take it into memory now, where there is room, and write it while the run goes on.
            of: the worker whose settings and kept objects are saved, where another one is behind: it has left its loop
                a step before.

        Raises: CheckpointError when it can not be written; Disagreement when modules keep different things.
        """
        team = self._team
        extra = self._saves.extra_signatures()
        if extra:
            team.meet_equal("run.save (what modules say by get_extra_state)", extra)
        said = self._saves.describe(beside, within_loop=within_loop)
        said = said if of is None else self._of(of, said)
        self.saving.wait()
        draft = None
        while True:
            writer = team.roster.main
            description = said if team.rank == writer else None
            if form == "lightwork":
                keep = self._keep if path == self._keep_at else 1
                if description is not None and beside_the_run:
                    draft = self._draft(description)
                problem = writing.save(
                    path, self._trained, description, team.meet, is_leader=team.is_leader, keep=keep, draft=draft
                )
            else:
                settings = None if description is None else description.settings
                problem = foreign.save(path, form, model, self._trained, settings, team.meet, is_leader=team.is_leader)
            problem = team.meet_main("save (result)", problem.encode()).decode()
            if writer in team.roster.living:  # else it has died over it
                break
        if problem:
            error = CheckpointError(problem)
            if draft is not None:
                draft.__exit__(CheckpointError, error, None)
            raise error
        if description is not None and draft is not None:
            self.saving.start(partial(self._finish, draft, path, description.settings.position.step))
        elif description is not None:
            if form == "lightwork":
                self._saves.saved(path, description)
            self._trace.event("save", path=str(path), step=description.settings.position.step)

    def _draft(self, description: Description) -> Draft | None:
        """Return where to write a checkpoint in memory, if that is possible.

        Not one that the code that runs now will complete; and where memory is short it would be too much.
        """
        if description.unfinished is not None or sys.platform != "linux":
            return None
        needed = writing.size_of(self._trained)
        return Draft() if _ROOM * needed < available_memory() else None

    def _finish(self, draft: Draft, path: Path, step: int) -> None:
        """Write a draft to the disk, in a thread beside the run."""
        problem = writing.finish(draft, path)
        if problem:
            notice(f"no checkpoint was saved, and training goes on: {problem}")
        else:
            self._trace.event("save", path=str(path), step=step)

    def _of(self, rank: int, description: Description) -> Description:
        """Return the description that a worker has, to all."""
        team = self._team
        tensors: dict[str, torch.Tensor] = {}
        own = pack([to_values(description, tensors), tensors]) if team.rank == rank else b""
        received = team.meet("save (settings)", own)
        if rank not in team.roster.living:
            raise RankLost(
                f"rank {rank} has died, which was a step ahead of the others: they left their loop before it. What its "
                "schedulers and kept objects came to is lost. Start again, to go on from the last checkpoint.",
                rank,
            )
        values, tensors = unpack(received[team.roster.living.index(rank)])
        return from_values(values, tensors)

    def load(self, saved: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
        """Take everything from a checkpoint, and return it.

        Raises: CheckpointError when it is of another model, optimizer or spec; DamagedCheckpoint on every worker.
        """
        trained, team = self._trained, self._team
        self.saving.wait()
        while True:
            there = team.roster
            own = there.ranks(there.host_of(team.rank))
            try:
                checkpoint = saved if isinstance(saved, Checkpoint) else checkpoints.load_whole(saved)
                problem = checkpoint.damage(own.index(team.rank), len(own))  # each host may have a disk of its own
            except DamagedCheckpoint as error:
                problem = str(error)
            for found in team.meet("load", problem.encode()):
                if found:
                    raise DamagedCheckpoint(found.decode())
            if team.roster == there:  # else someone has died over it, and with it what it should have looked at
                break
        checkpoints.check_fits(checkpoint, self._spec, trained)
        checkpoints.restore(checkpoint, trained, is_leader=False)

        def write() -> bytes:
            checkpoints.restore(checkpoint, trained, is_leader=True)
            team.board.resume_at(checkpoint.step)
            return b""

        team.by_leader("load (end)", write)
        self._saves.resume(checkpoint.description)
        trained.accept()
        self._trace.event("load", step=checkpoint.step)
        return checkpoint

    def load_optimizer(self, engine: Engine, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Take an optimizer's state and settings from its state dict, which is the same on every worker.

        Raises: UsageError in a step; as the class's own `load_state_dict`.
        """
        trained, team = self._trained, self._team
        if engine.beside.is_in_step:
            raise UsageError(
                "optimizer.load_state_dict was called inside the loop over the micro-batches of a step. Call it after "
                "that loop, when the update is done."
            )
        loaded = trained.optimizer_state.loaded(optimizer, state_dict)
        team.meet("optimizer.load_state_dict")
        self._saves.edited("optimizer.load_state_dict()")
        take_settings(optimizer, loaded)

        def write() -> bytes:
            trained.optimizer_state.take_loaded(optimizer, loaded)
            trained.release()
            return b""

        team.by_leader("optimizer.load_state_dict (end)", write)
        trained.accept()
