"""A worker process: forked from this one, so that the pages of everything imported are shared.

Each worker leads a process group of its own, so that what it started (loading workers) ends with it, and the kernel
kills it when this process dies.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from lightwork.team.environment import Environment

_PR_SET_PDEATHSIG = 1


#: What the launcher has handlers for.
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start_worker(environment: Environment, main: Callable[[], int], *, stdout: int, stderr: int) -> BaseProcess:
    """Return a new process that runs `main` as a worker and ends with the status it returns.

    `stdout` and `stderr` are descriptors that become the worker's; standard input is empty.
    """
    # Held until the worker has handlers of its own: it would take a signal that ends it for one to this process.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        arguments = (os.getpid(), mask, environment, main, stdout, stderr)
        process = multiprocessing.get_context("fork").Process(target=_be_worker, args=arguments)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if process.pid is not None:
        with contextlib.suppress(OSError):  # the worker does the same; whoever comes first
            os.setpgid(process.pid, process.pid)
    return process


def kill_group(process: BaseProcess, number: int) -> None:
    """Send a signal to a worker and everything that it started; nothing happens if all are gone."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def group_lives(process: BaseProcess) -> bool:
    """Return whether something that a worker started still runs, or the worker itself."""
    if process.pid is None:
        return False
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _be_worker(
    parent: int, mask: set[int], environment: Environment, main: Callable[[], int], stdout: int, stderr: int
) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # At the descriptor too, not only sys.stdin: what a worker starts would read from the terminal, and be stopped.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.environ.update(environment.variables())
    # multiprocessing leaves out exit handlers. What was registered before the fork is its registrant's business.
    atexit._clear()
    atexit.register(logging.shutdown)
    try:
        status = main()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as Python ends: first threads, then exit handlers
        atexit._run_exitfuncs()
    sys.exit(status)
