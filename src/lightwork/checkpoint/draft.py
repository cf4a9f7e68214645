"""A checkpoint in memory, on its way to the disk: a team waits until it is here, and no longer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, final

#: Bytes that are copied at a time.
_PIECE = 1 << 22

#: How far what is written stands back behind training, from 0 to 19.
_NICE = 19


@final
class Draft:
    """Its files, by name, and the folder that they are for.

    Owns: their memory, each until it is copied, and the folder, until it is closed: as a context, which puts the folder
    in its place if the body succeeds.
    """

    def __init__(self) -> None:
        self.manifest: dict[str, Any] = {}  #: without hashes
        self._files: dict[str, int] = {}
        self._place = ExitStack()
        self._folder = Path()

    def begin(self, place: AbstractContextManager[Path]) -> None:
        """Take the folder that `place` gives: who reads the checkpoint waits from now on.

        Raises: as `place` does.
        """
        self._folder = self._place.enter_context(place)

    def __enter__(self) -> Path:
        return self._folder

    def __exit__(self, *error: Any) -> None:
        for name in list(self._files):
            self._drop(name)
        self._place.__exit__(*error)

    def place(self, name: str) -> Path:
        """Return where to write a new file."""
        self._files[name] = fd = os.memfd_create(f"lightwork-{name}")
        return Path(f"/proc/self/fd/{fd}")

    def copy_to(self, folder: Path) -> dict[str, str]:
        """Write the files to the disk, giving their memory back; return the SHA-256 of each. Raises: OSError."""
        return {name: self._copy(name, folder / name) for name in list(self._files)}

    def _copy(self, name: str, path: Path) -> str:
        found = hashlib.sha256()
        room = memoryview(bytearray(_PIECE))
        at, source = 0, self._files[name]
        with open(path, "wb", buffering=0) as file:
            while count := os.preadv(source, [room], at):
                found.update(room[:count])
                rest = room[:count]
                while rest:
                    rest = rest[file.write(rest) :]
                at += count
            os.fsync(file.fileno())
        self._drop(name)
        return found.hexdigest()

    def _drop(self, name: str) -> None:
        fd = self._files.pop(name)
        os.ftruncate(fd, 0)  # also where a child has the descriptor, too
        os.close(fd)


@final
class Saving:
    """What is written beside the run, one after the other.

    Owns: a thread while it is. A process that comes to its end waits for it.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, when what was begun before is done."""

        def at_leisure() -> None:
            if sys.platform == "linux":  # where a thread has a priority of its own: what training leaves is enough
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)
            work()

        self.wait()
        self._thread = Thread(target=at_leisure, name="lightwork saving")
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
