"""What a launcher is asked while its team trains: files in the run directory, which is its user's.

The one who asks writes `scale.json`, all at once; the launcher looks for it some times a second, takes it away, and
writes its answer beside it. No socket, and no wire: who can write the folder can end the run anyway.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import NamedTuple, final

from lightwork.errors import UsageError

_REQUEST, _ANSWER = "scale.json", "scale.answer.json"

#: Seconds that the one who asks waits, and between two looks.
PATIENCE, _LOOK = 5.0, 0.02


class Request(NamedTuple):
    """How many workers somebody wants."""

    num_workers: int
    of: int  #: the process that asks


@final
class Requests:
    """Those to the launcher of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        with contextlib.suppress(OSError):
            (run_dir / _REQUEST).unlink()  # of an earlier run

    def next(self) -> Request | None:
        """Return a request, if there is one, and take it away."""
        path = self._run_dir / _REQUEST
        try:
            request = Request(**json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return request

    def answer(self, request: Request, said: str, *, is_refused: bool) -> None:
        """Answer a request."""
        with contextlib.suppress(OSError):
            _write(self._run_dir / _ANSWER, {"of": request.of, "said": said, "is_refused": is_refused})


def ask(run_dir: Path, num_workers: int) -> str:
    """Ask the launcher of a run directory for so many workers, and return what it says.

    Blocks: until it has answered, at most `PATIENCE` seconds.
    Raises: UsageError when it refuses, or nobody answers.
    """
    if not run_dir.is_dir():
        raise UsageError(
            f"there is no run directory {run_dir}. It is what lightwork run names at its end: runs/1, say."
        )
    request, answer = run_dir / _REQUEST, run_dir / _ANSWER
    deadline = time.monotonic() + PATIENCE
    try:
        _write(request, {"num_workers": num_workers, "of": os.getpid()})
        while time.monotonic() < deadline:
            time.sleep(_LOOK)
            with contextlib.suppress(OSError, ValueError):
                said = json.loads(answer.read_text(encoding="utf-8"))
                if said["of"] == os.getpid():
                    answer.unlink()
                    if said["is_refused"]:
                        raise UsageError(said["said"])
                    return str(said["said"])
        request.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{run_dir} can not be written ({error}).") from error
    raise UsageError(f"no lightwork run answers in {run_dir}: it has ended, or runs elsewhere.")


def _write(path: Path, values: dict[str, object]) -> None:
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(values), encoding="utf-8")
    fresh.replace(path)
