"""`lightwork run`: a team of workers on this host, all running one script."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightwork.launcher.process import start_worker
from lightwork.launcher.replacing import RESTARTS
from lightwork.launcher.requests import Requests
from lightwork.launcher.script import Script
from lightwork.launcher.supervisor import Display, Outcome, Supervisor
from lightwork.spec.roster import FIRST_RANK
from lightwork.team.environment import Environment
from lightwork.team.page import Page

#: Where torch._compile keeps the version of a function that the compiler leaves alone.
_COMPILER_KEPT_OUT = "__dynamo_disable"


def preload() -> None:
    """Import what every worker will need, once: they share its pages, and none of them waits for it again."""
    import torch

    from lightwork import distribute  # noqa: F401

    of_class = torch.optim.Optimizer
    for method in (of_class.add_param_group, of_class.zero_grad, of_class.state_dict, of_class.load_state_dict):
        _leave_compiler_out(method)
    # Whatever else torch puts off until the first optimizer is made.
    torch.optim.SGD([torch.zeros(1)])
    # Objects that no collection looks at are not written to, so their pages stay shared.
    gc.collect()
    gc.freeze()


def _leave_compiler_out(method: Callable[..., object]) -> None:
    """Let a method of torch's optimizers run without torch._dynamo, as long as nothing else has imported that.

    They import it only to tell it to keep out of them: a second and 70 MB a worker (2026-11), for nothing where
    nothing is compiled.
    """
    function = inspect.unwrap(method)

    def run(*args: object, **kwargs: object) -> object:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        vars(function).pop(_COMPILER_KEPT_OUT, None)  # from now on torch sees to it
        return method(*args, **kwargs)

    vars(function)[_COMPILER_KEPT_OUT] = run


def launch(
    script: Script,
    num_workers: int,
    *,
    run_dir: Path,
    settings: Mapping[str, object],
    display: Display,
    restarts: int = RESTARTS,
) -> Outcome:
    """Run `script` on `num_workers` workers and wait for their end.

    The main worker's output goes to `display`; every worker's is kept in `run_dir`/log.

    Args:
        restarts: how often in succession the place of a worker that was killed is given to another process.
    """
    rendezvous_fd = Page.create()
    supervisor = Supervisor(Page(rendezvous_fd), display, restarts=restarts, requests=Requests(run_dir))

    def start(rank: int, *, joins: bool) -> BaseProcess:
        environment = Environment(
            rank=rank,
            world_size=num_workers,
            rendezvous_fd=rendezvous_fd,
            run_dir=str(run_dir),
            joins=joins,
            settings=settings,
        )
        log = log_of(run_dir, rank)
        process = rank, supervisor.life(rank)
        stdout = supervisor.output.forward(process, log, display.write_out)
        is_first = rank == FIRST_RANK
        stderr = supervisor.output.forward(process, log, display.write_error) if is_first else os.dup(stdout)
        try:
            return start_worker(environment, script.run, stdout=stdout, stderr=stderr)
        finally:
            # Of the pipes the worker alone keeps this end: they end with it.
            os.close(stdout)
            os.close(stderr)

    try:
        return supervisor.run(start, num_workers)
    finally:
        os.close(rendezvous_fd)


def log_of(run_dir: Path, rank: int) -> Path:
    """Return the file that holds a worker's output."""
    return run_dir / "log" / f"rank{rank}.log"
