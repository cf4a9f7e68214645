"""`lightwork run`: a team of workers on this host, all running one script."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightwork.launcher.process import start_worker
from lightwork.launcher.script import Script
from lightwork.launcher.supervisor import Display, Outcome, Supervisor
from lightwork.team.environment import Environment
from lightwork.team.rendezvous import FileRendezvous


def preload() -> None:
    """Import what every worker will need, once: they share its pages, and none of them waits for it again.

    torch's optimizers import torch._dynamo when the first one is made, 70 MB and two seconds a worker (2026-11).
    """
    import torch._dynamo
    import torch.optim  # noqa: F401

    import lightwork  # noqa: F401

    # Objects that no collection looks at are not written to, so their pages stay shared.
    gc.collect()
    gc.freeze()


def launch(
    script: Script, num_workers: int, *, run_dir: Path, settings: Mapping[str, object], display: Display
) -> Outcome:
    """Run `script` on `num_workers` workers and wait for their end.

    The main worker's output goes to `display`; every worker's is kept in `run_dir`/log.
    """
    rendezvous_fd = FileRendezvous.create()
    supervisor = Supervisor(FileRendezvous(rendezvous_fd, 0), display)

    def start(rank: int) -> BaseProcess:
        environment = Environment(
            rank=rank,
            world_size=num_workers,
            rendezvous_fd=rendezvous_fd,
            run_dir=str(run_dir),
            settings=settings,
        )
        log = log_of(run_dir, rank)
        if rank == 0:
            stdout, stderr = supervisor.forward(log, error=False), supervisor.forward(log, error=True)
        else:
            stdout = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            stderr = os.dup(stdout)
        try:
            return start_worker(environment, script.run, stdout=stdout, stderr=stderr)
        finally:
            # Of the pipes the main worker alone keeps this end: they end with it.
            os.close(stdout)
            os.close(stderr)

    try:
        return supervisor.run([functools.partial(start, rank) for rank in range(num_workers)])
    finally:
        os.close(rendezvous_fd)


def log_of(run_dir: Path, rank: int) -> Path:
    """Return the file that holds a worker's output."""
    return run_dir / "log" / f"rank{rank}.log"
