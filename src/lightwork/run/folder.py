"""The run directory: what a run writes, for people and for programs that read it later.

spec.json              everything that can change a bit
plan.json              everything that can not
roster.json            the workers: rank, host, process
trace/rankR.jsonl      spans and counters of each worker (see `lightwork.trace`)
log/rankR.log          output of each worker, where the launcher captures it
checkpoint/            what `run.save()` wrote, unless it was given another path
NAME/                  the same of a run that has a name, or of a script's second one
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightwork.checkpoint import folder as folders
from lightwork.errors import CheckpointError, UsageError
from lightwork.notice import notice

if TYPE_CHECKING:
    from lightwork.team.team import Team


#: Of a run directory that is made here: it holds weights, and is where a launcher is asked to change its team.
_OWNER_ALONE = 0o700


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
                folder.mkdir(_OWNER_ALONE)
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
        if not folder.exists():
            folder.mkdir(_OWNER_ALONE, parents=True, exist_ok=True)
        for name in ("trace", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the run directory {folder} can not be written ({error}). Choose another run_dir.") from error


class RunFolders:
    """Which folders the runs of this process have had: several runs of a script have one each."""

    def __init__(self) -> None:
        self._runs = Path()  #: the folder in `runs` in which the named runs of a script without a directory are
        self._launched: dict[Path, int] = {}  #: runs by launched directory
        self._named: set[Path] = set()
        self._begun: dict[str, tuple[int, Mapping[str, int]]] = {}

    def begin(self, folder: Path, step: int, beside: Mapping[str, int], living: Collection[Path]) -> None:
        """Take note of where a run begins: at `step`, saved when the other runs were at the steps `beside`.

        Raises: CheckpointError when another living run has begun elsewhere than both were when either was saved.
        """
        for name in (other.name for other in living if other != folder):
            at, theirs = self._begun.get(name, (0, {}))
            is_known = folder.name in theirs or name in beside
            if is_known and theirs.get(folder.name) != step and beside.get(name) != at:
                raise CheckpointError(
                    f"the runs {name} and {folder.name} do not belong together: {name} goes on after {at} steps and "
                    f"{folder.name} after {step}, and at no save both were there (the script was ended between the two "
                    "saves). Use the checkpoints of an earlier save: run.save(path) at a path of each step keeps them."
                )
        self._begun[folder.name] = step, beside

    def choose(self, asked_for: Path | None, launched: Path | None, name: str | None) -> tuple[Path, bool]:
        """Return the folder of the next run, and whether it is one that a later start of the script finds again.

        Args:
            asked_for: what the script says.
            launched: what the launcher says, for a script that does not.
        """
        base = asked_for or launched
        if base is None and name is None:
            return create_run_dir(Path("runs")), False
        if base is None:
            if self._runs == Path() or self._runs / str(name) in self._named:
                self._runs = create_run_dir(Path("runs"))
            folder = self._runs / str(name)
            self._named.add(folder)
            return folder, False
        if name is not None:
            return base / name, True
        if asked_for is None:
            self._launched[base] = number = self._launched.get(base, 0) + 1
            return (base if number == 1 else base / str(number)), True
        return base, True

    def note(self, wanted: Wanted) -> None:
        """Take note of a run whose folder others have chosen."""
        if wanted.launched is not None:
            self.choose(
                Path(wanted.run_dir) if wanted.run_dir is not None else None, Path(wanted.launched), wanted.name
            )


#: Those of this process.
FOLDERS = RunFolders()

_TAKEN_NAMES = ("trace", "log", folders.DEFAULT)


def check_name(name: str | None) -> None:
    """Raise UsageError when a run can not have this name: it is that of a folder."""
    if name is None:
        return
    if not name or name in _TAKEN_NAMES or name.isdecimal() or not all(c.isalnum() or c in "-_." for c in name):
        raise UsageError(
            f"name={name!r} is not a name for a run, whose folder has it. Take letters, digits, '-', '_' and '.', not "
            f"digits alone, and none of {', '.join(_TAKEN_NAMES)}."
        )
    if name.startswith("."):
        raise UsageError(f"name={name!r} begins with a dot, which hides the run's folder. Choose another.")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the script and its launcher say of a run's folder."""

    run_dir: str | os.PathLike[str] | None  #: the script's
    launched: str | None  #: the launcher's
    resume: str | os.PathLike[str] | None
    name: str | None


def agree_on_folder(team: Team, wanted: Wanted, living: Collection[Path]) -> tuple[Path, list[Path]]:
    """Return the run directory and the checkpoints to go on from, the newest first, as the main worker finds them.

    Machines need not have a file system in common: each worker makes the folder for its own trace.

    Args:
        living: the directories of the process's runs that are not closed.

    Raises: UsageError when it can not; CheckpointError when this worker does not see the checkpoint.
    """
    found: dict[str, Any] = {}
    resume = wanted.resume
    if team.is_main:
        asked_for = Path(wanted.run_dir) if wanted.run_dir is not None else None
        launched = Path(wanted.launched) if wanted.launched is not None else None
        folder, is_found_again = FOLDERS.choose(asked_for, launched, wanted.name)
        prepare_run_dir(folder)
        if launched is not None and asked_for is not None:
            _lead_to(folder, launched)
        candidates = [Path(resume)] if resume is not None else []
        if resume is None and is_found_again:
            newest = folder / folders.DEFAULT
            candidates = [path for path in (newest, *folders.older(newest)) if folders.exists(path)]
        found = {
            "folder": str(folder.absolute()),
            "checkpoints": [str(path.absolute()) for path in candidates],
            "are there": [folders.exists(path) for path in candidates],
        }
    found = json.loads(team.meet_main("distribute (run directory)", json.dumps(found).encode()))
    folder, candidates = Path(found["folder"]), [Path(path) for path in found["checkpoints"]]
    if folder in living:
        raise UsageError(
            f"two runs at once have the directory {folder}, in which each would replace the other's checkpoint and "
            "trace. Give each a name: lightwork.distribute(..., name='generator')."
        )
    prepare_run_dir(folder)
    for path, is_there in zip(candidates, found["are there"], strict=True):
        if is_there and not folders.exists(path):
            raise CheckpointError(
                f"rank {team.rank} on {socket.gethostname()} does not see the checkpoint {path} from which rank "
                f"{team.roster.main} goes on. Every worker reads it: copy it there, or save it where all machines see "
                "it."
            )
    return folder, candidates


def _lead_to(folder: Path, launched: Path) -> None:
    """Let who watches the launched directory find a run that the script has put elsewhere."""
    folder, launched = folder.absolute(), launched.absolute()
    if launched not in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            (launched / folder.name).symlink_to(folder, target_is_directory=True)


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
