"""The run directory: what a run writes, for people and for programs that read it later.

spec.json              everything that can change a bit
plan.json              everything that can not
roster.json            the workers: rank, host, process
trace/rankR.jsonl      spans and counters of each worker (see `lightwork.trace`)
log/rankR.log          output of each worker, where the launcher captures it
checkpoint/            what `run.save()` wrote, unless it was given another path
"""

from __future__ import annotations

from pathlib import Path

from lightwork.errors import UsageError


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
