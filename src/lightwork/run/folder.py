"""The run directory: what a run writes, for people and for programs that read it later.

spec.json              everything that can change a bit
plan.json              everything that can not
roster.json            the workers: rank, host, process
trace/rankR.jsonl      spans and counters of each worker (see `lightwork.trace`)
log/rankR.log          output of each worker, where the launcher captures it
checkpoint/            what `run.save()` wrote, unless it was given another path
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightwork.checkpoint import folder as checkpoints
from lightwork.errors import CheckpointError, UsageError
from lightwork.notice import notice

if TYPE_CHECKING:
    from lightwork.team.team import Team


def create_run_dir(parent: Path) -> Path:
    """Return a new folder in `parent`, named by the next free number. Making it is the claim.

    Raises: UsageError when it can not be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdecimal()), default=0)
        while True:
            try:
                folder = parent / str(number)
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except OSError as error:
        raise UsageError(
            f"the run directory could not be made in {parent.absolute()} ({error}). Choose another: "
            "distribute(..., run_dir=...) or lightwork run --run-dir."
        ) from error


def prepare_run_dir(folder: Path) -> None:
    """Make the folder and those in it.

    Raises: UsageError when they can not be made.
    """
    try:
        for name in ("trace", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the run directory {folder} can not be written ({error}). Choose another run_dir.") from error


def agree_on_folder(
    team: Team, asked_for: str | os.PathLike[str] | None, resume: str | os.PathLike[str] | None
) -> tuple[Path, Path | None]:
    """Return the run directory and the checkpoint to go on from, if there is one, as the main worker finds them.

    Machines need not have a file system in common: each worker makes the folder for its own trace.

    Raises: UsageError when it can not; CheckpointError when this worker does not see the checkpoint.
    """
    found: dict[str, Any] = {}
    if team.is_main:
        folder = Path(asked_for) if asked_for is not None else create_run_dir(Path("runs"))
        prepare_run_dir(folder)
        checkpoint = Path(resume) if resume is not None else folder / "checkpoint"
        is_there = checkpoints.exists(checkpoint)
        goes_on = resume is not None or (asked_for is not None and is_there)
        found = {
            "folder": str(folder.absolute()),
            "checkpoint": str(checkpoint.absolute()) if goes_on else "",
            "is there": is_there,
        }
    found = json.loads(team.meet_main("distribute (run directory)", json.dumps(found).encode()))
    folder, checkpoint = Path(found["folder"]), Path(found["checkpoint"])
    prepare_run_dir(folder)
    if not found["checkpoint"]:
        return folder, None
    if found["is there"] and not checkpoints.exists(checkpoint):
        raise CheckpointError(
            f"rank {team.rank} on {socket.gethostname()} does not see the checkpoint {checkpoint} from which rank "
            f"{team.roster.main} goes on. Every worker reads it: copy it there, or save it where all machines see it."
        )
    return folder, checkpoint


def write_records(folder: Path, texts: Mapping[str, str]) -> None:
    """Write JSON files, by their names. One for which there is no room is left out, and that is said."""
    for name, text in texts.items():
        path = folder / f"{name}.json"
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            notice(f"{path} can not be written ({error.strerror}). Training goes on without it.")
            with contextlib.suppress(OSError):
                path.unlink()  # what there was room for
