"""Running a function on a team of workers forked from this process, and getting back what it returned.

For tests, benchmarks and notebooks: as `lightwork run`, without a script.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightwork.launcher.process import start_worker
from lightwork.launcher.supervisor import Supervisor
from lightwork.team.environment import Environment
from lightwork.team.page import Page


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What became of one worker."""

    rank: int
    value: Any  #: what the function returned; it must be picklable
    error: str | None  #: the traceback, if it raised
    status: int  #: exit status, or minus the signal's number


class _Silence:
    """A display that shows nothing."""

    def write_out(self, data: bytes) -> None:
        """Discard."""

    def write_error(self, data: bytes) -> None:
        """Discard."""

    def tick(self) -> None:
        """Do nothing."""


def fork_team(
    num_workers: int,
    function: Callable[[], Any],
    *,
    run_dir: str | None = None,
    settings: Mapping[str, object] | None = None,
    restarts: int = 0,
    timeout: float = 60.0,
) -> list[WorkerResult]:
    """Return what became of `function`, called in each of `num_workers` new processes.

    Args:
        restarts: how often in succession the place of one that was killed is given to another process.

    Blocks: until all have ended, at most `timeout` seconds; then they are killed.
    """
    rendezvous_fd = Page.create()
    with tempfile.TemporaryDirectory(prefix="lightwork-team-") as folder:

        def start(rank: int, *, joins: bool) -> BaseProcess:
            environment = Environment(
                rank=rank,
                world_size=num_workers,
                rendezvous_fd=rendezvous_fd,
                run_dir=run_dir,
                settings=settings or {},
                joins=joins,
            )
            return start_worker(environment, _answering(function, Path(folder)), stdout=1, stderr=2)

        supervisor = Supervisor(Page(rendezvous_fd), _Silence(), restarts=restarts)
        try:
            outcome = supervisor.run(start, num_workers, timeout)
        finally:
            os.close(rendezvous_fd)
        return [_result(ended.rank, ended.status, Path(folder) / f"{ended.pid}") for ended in outcome.ended]


def _answering(function: Callable[[], Any], folder: Path) -> Callable[[], int]:
    def main() -> int:
        answer = folder / f"{os.getpid()}"
        try:
            value, error = function(), None
        except BaseException as problem:
            value, error = None, traceback.format_exc()
            _write(answer, (value, error))
            sys.excepthook(type(problem), problem, problem.__traceback__)
        _write(answer, (value, error))
        return int(error is not None)

    return main


def _write(answer: Path, result: object) -> None:
    """Write an answer at once: who is killed over it has given none."""
    fresh = answer.with_suffix(".fresh")
    fresh.write_bytes(pickle.dumps(result))
    fresh.replace(answer)


def _result(rank: int, status: int, answer: Path) -> WorkerResult:
    value, error = pickle.loads(answer.read_bytes()) if answer.exists() else (None, None)
    if error is None and status != 0:
        error = f"ended with status {status} before it returned or raised"
    return WorkerResult(rank=rank, value=value, error=error, status=status)
