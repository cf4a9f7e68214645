"""The folder of a checkpoint, replaced as a whole: whoever looks for it finds the old one or the new one.

A new one is written beside its place, as `.NAME.writing`. When all of it is on the disk the two are exchanged, in one
call where the system has one. Elsewhere the old one is put aside as `.NAME.old` before the new one takes its place, and
is found there if nothing came after. What a killed process leaves is cleared away by the next one that saves.
Some older ones may be kept beside it, as `NAME-STEP`.

Not replaced: a folder that holds anything but a checkpoint's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lightwork.errors import CheckpointError

MANIFEST = "manifest.json"

#: The newest one's folder in a run directory.
DEFAULT = "checkpoint"

#: What the files of tensors are called, without their suffix.
TENSOR_FILES = ("model", "buffers", "optimizer", "kept")


def file_of(name: str) -> str:
    """Return the name of the file of these tensors."""
    return f"{name}.safetensors"


_FILES = {MANIFEST, *map(file_of, TENSOR_FILES)}

#: Of renameat2: paths are relative to the current folder; both names change places.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def find(path: Path) -> Path:
    """Return where the checkpoint in `path` lies: there or, after a kill at the wrong moment, beside it."""
    aside = path.resolve()
    aside = _aside(aside) if aside.name else aside
    return aside if not (path / MANIFEST).exists() and (aside / MANIFEST).exists() else path


def wait_until_written(path: Path, seconds: float = 60.0) -> None:
    """Wait for the process that is writing a checkpoint to `path`, if one is: at most so many seconds."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError, ValueError):  # nobody is writing there, or nobody can
        fd = os.open(_fresh(path.resolve()), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                time.sleep(0.01)
        finally:
            os.close(fd)


def exists(path: Path) -> bool:
    """Return whether there is a checkpoint."""
    return (find(path) / MANIFEST).exists()


@contextlib.contextmanager
def replaced(path: Path, mark: str | None = None, keep: int = 1) -> Iterator[Path]:
    """Give the body an empty folder to write a checkpoint into, which takes the place of `path` if it succeeds.

    With `mark`, it is one in the form of others, and what it replaces has a file of this name. Of those that were
    replaced, the last `keep` - 1 stay.

    Raises: CheckpointError when `path` is something else, or another process is saving there; OSError.
    """
    path = path.resolve()
    _check_may_replace(path, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _fresh(path)
    with _alone(fresh):
        try:
            yield fresh
            sync(fresh)
            replaced_one = _put(fresh, path)
            if keep > 1:
                _keep(replaced_one, path, keep)
            shutil.rmtree(replaced_one, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def older(path: Path) -> list[Path]:
    """Return the checkpoints that were kept when others took their place at `path`, the newest first."""
    path = path.resolve()
    found = [entry for entry in path.parent.glob(f"{path.name}-*") if entry.name[len(path.name) + 1 :].isdecimal()]
    return sorted(found, key=lambda entry: int(entry.name[len(path.name) + 1 :]), reverse=True)


def _keep(replaced_one: Path, path: Path, keep: int) -> None:
    """Let a checkpoint that was replaced be found by its step, if it is of another one; remove what is too old."""
    step, now = (step_of(folder) for folder in (replaced_one, path))
    if step is not None and step != now:
        place = path.with_name(f"{path.name}-{step:06d}")
        shutil.rmtree(place, ignore_errors=True)
        replaced_one.rename(place)
    for folder in older(path)[keep - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint; None where there is none, or it can not be read."""
    try:
        return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["position"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def put_aside(path: Path) -> Path:
    """Rename a checkpoint that is damaged, so that the next one does not have to replace it; return where it is.

    Raises: OSError.
    """
    place = path.resolve()
    place = place.with_name(f"{place.name}.damaged")
    shutil.rmtree(place, ignore_errors=True)
    find(path).rename(place)
    return place


def sync(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:  # not every file system can, for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def _check_may_replace(path: Path, mark: str | None) -> None:
    """Raise CheckpointError unless `path` is nothing, an empty folder, or a checkpoint."""
    if path == Path.cwd() or path == path.parent:
        raise CheckpointError(f"{path} is the current folder or a root, which can not be replaced. Name one in it.")
    if not path.exists():
        return
    advice = "Choose another path, or remove it."
    if not path.is_dir():
        raise CheckpointError(f"{path} exists and is not a checkpoint: it is a file. {advice}")
    found = {entry.name for entry in path.iterdir()}
    if not found:
        return
    if mark is not None:
        if mark not in found:
            raise CheckpointError(f"{path} exists and was not written by run.save: it has no {mark}. {advice}")
        return
    if MANIFEST not in found:
        raise CheckpointError(f"{path} exists and is not a checkpoint: it has no {MANIFEST}. {advice}")
    if found - _FILES:
        names = ", ".join(sorted(found - _FILES)[:3])
        raise CheckpointError(f"{path} holds what is no part of a checkpoint: {names}. {advice}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"format", "spec", "position"} <= manifest.keys():
        raise CheckpointError(f"{path} exists and is not a checkpoint: its {MANIFEST} is another program's. {advice}")


@contextlib.contextmanager
def _alone(fresh: Path) -> Iterator[None]:
    """Make the folder `fresh`, in place of what a killed process left of it.

    Raises: CheckpointError when a living one is writing there.
    """
    if fresh.exists():
        with _locked(fresh):
            shutil.rmtree(fresh)
    fresh.mkdir()
    with _locked(fresh):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with this process; nothing where the file system has none."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is saving a checkpoint in {folder.parent}, as {folder.name}. Give each run a path "
                "of its own."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(fd)


def _put(fresh: Path, path: Path) -> Path:
    """Let the folder `fresh` take the place of `path`; return where what was there is now, if anything was."""
    old = _aside(path)
    if not path.exists():  # the first one, or one put aside when its successor did not come
        fresh.rename(path)
    elif swap(fresh, path):
        old = fresh
    else:
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        fresh.rename(path)
    try:
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint in {path} is whole, but the folder around it could not be synchronised with the disk "
            f"({error}): after a power failure the one before it may be found. Save again."
        ) from error
    return old


def swap(one: Path, other: Path) -> bool:
    """Let two folders change their names in one call; return False where the system has none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _fresh(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
