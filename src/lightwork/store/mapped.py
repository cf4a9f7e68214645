"""Memory that several processes map: an anonymous memory file or, where there are none, an unlinked temporary file.

Neither uses `/dev/shm`, whose default size in containers is 64 MB, and neither leaves a name behind: the last
process to die frees the memory. On Linux another process opens it through `/proc/PID/fd/N` of its creator. Where
there is no such folder, the temporary file keeps its name until `published()`.

    [Note: one descriptor of a memory file]
    The descriptor stays open as long as the store, and the file is never opened twice in a process: closing a second
    descriptor of a file releases every POSIX record lock that the process holds on it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import final

from lightwork.errors import MemoryFull, SpecError, TeamError
from lightwork.spec.plan import Memory
from lightwork.store.base import Store
from lightwork.units import format_bytes

#: The beginning of the files' names.
_PREFIX = "lightwork-"

#: Where a worker's memory can be found.
_ADDRESS = re.compile(rf"/proc/\d+/fd/\d+|/.*/{_PREFIX}[^/]+")


@final
class MappedStore(Store[mmap.mmap]):
    """A mapping of an open file; made by `create_store` and `open_store`."""

    def __init__(self, fd: int, num_bytes: int, *, name: Path | None = None) -> None:
        self._fd = fd
        self._name = name
        self.buffer = mmap.mmap(fd, num_bytes)
        # The mapping holds a duplicate of its own; without this a program with many runs would run out of descriptors.
        weakref.finalize(self, os.close, fd).atexit = False

    @property
    def num_bytes(self) -> int:
        """The size."""
        return len(self.buffer)

    def address(self) -> str:
        """Return a path and the size."""
        path = self._name or Path(f"/proc/{os.getpid()}/fd/{self._fd}")
        return f"{self.num_bytes}:{path}"

    def fileno(self) -> int | None:
        """Return the descriptor."""
        return self._fd

    def published(self) -> None:
        """Unlink the temporary file, if it still has a name."""
        if self._name is not None:
            with contextlib.suppress(FileNotFoundError):
                self._name.unlink()
            self._name = None


def create_store(kind: Memory, num_bytes: int) -> MappedStore:
    """Return new zeroed memory.

    Raises: MemoryFull when the temporary file's disk has no room. (The room for anonymous memory is the caller's to
    check: a memory file takes pages only when they are written.)
    """
    if kind == "anonymous" and "memfd_create" in dir(os):
        fd = os.memfd_create(f"{_PREFIX}memory")
        os.ftruncate(fd, num_bytes)
        return MappedStore(fd, num_bytes)
    return _create_file(num_bytes)


def create_disk_store(folder: Path, num_bytes: int) -> MappedStore:
    """Return zeroed memory in an unlinked file in `folder`, with all its room taken.

    Raises: MemoryFull when the disk has not that much, or can not be written; SpecError when `folder` is no disk.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise SpecError(
            f"offload to disk would go to {folder}, which {what}. Name a folder on a disk: --set offload_dir=DIR."
        )
    kind = _file_system(folder)
    if kind in ("tmpfs", "ramfs"):
        raise SpecError(
            f"offload to disk would go to {folder}, which is memory itself ({kind}). Name a folder on a disk: "
            "--set offload_dir=DIR."
        )
    try:
        store = _create_file(num_bytes, folder)
        fd = store.fileno()
        if fd is not None:
            # Without its room, a full disk would be a bus error in the middle of training.
            os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        free = format_bytes(shutil.disk_usage(folder).free)
        raise MemoryFull(
            f"offload to disk needs {format_bytes(num_bytes)} in {folder} ({error.strerror}); {free} is free. Make "
            "room, or name another folder: --set offload_dir=DIR."
        ) from error
    return store


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`, empty where the system does not tell."""
    found = (0, "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, mount, kind, *_ = line.split()
            if folder.resolve().is_relative_to(mount):
                found = max(found, (len(mount), kind))
    return found[1]


def open_store(address: str) -> MappedStore:
    """Return the memory that another process of this host made.

    Raises: TeamError when it is not there (its creator is gone, or runs on another host), or is something else.
    """
    size, _, path = address.partition(":")
    if not _ADDRESS.fullmatch(path):
        raise TeamError(f"{path!r} is no memory of a worker: whoever told its place is no worker of this team.")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW * (not path.startswith("/proc/")))
        if not _is_memory(fd, int(size)):
            os.close(fd)
            raise TeamError(f"{path} is another file than the memory of a worker: its worker is gone, or is none.")
        return MappedStore(fd, int(size))
    except OSError as error:
        raise TeamError(
            f"the memory of rank 0 can not be opened ({path}: {error.strerror}). Its workers must run on one host, "
            "in one container, as one user; see the log of rank 0."
        ) from error


def _is_memory(fd: int, num_bytes: int) -> bool:
    """Return whether an open file is one that `create_store` or `create_disk_store` made, of this user."""
    status = os.fstat(fd)
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # no such folder: its path has told
        name = _PREFIX
    return status.st_size == num_bytes and status.st_uid == os.geteuid() and _PREFIX in Path(name).name


def _create_file(num_bytes: int, folder: Path | None = None) -> MappedStore:
    fd, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    path = Path(name)
    keeps_name = not Path(f"/proc/{os.getpid()}/fd").is_dir()
    try:
        if not keeps_name:
            path.unlink()
        os.ftruncate(fd, num_bytes)
        return MappedStore(fd, num_bytes, name=path if keeps_name else None)
    except OSError:
        os.close(fd)
        if keeps_name:
            path.unlink()
        raise


def check_room(kind: Memory, needed_bytes: int, available_bytes: int, breakdown: str) -> None:
    """Raise MemoryFull when `needed_bytes` will not fit into what the host has left.

    `breakdown` says what the bytes are for.
    """
    where = "memory"
    if kind == "file" or "memfd_create" not in dir(os):
        available_bytes = shutil.disk_usage(tempfile.gettempdir()).free
        where = f"room in {tempfile.gettempdir()}"
    if needed_bytes > available_bytes:
        raise MemoryFull(
            f"training needs {format_bytes(needed_bytes)} of shared {where}, and {format_bytes(available_bytes)} are "
            f"left ({breakdown}). Use fewer workers, a smaller model, or precision='bf16'."
        )
