"""A worker process: forked from this one, so that the pages of everything imported are shared.

Each worker leads a process group of its own, so that what it started (loading workers) ends with it, and the kernel
kills it when this process dies.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from lightwork.team.environment import Environment

_PR_SET_PDEATHSIG = 1


def fork_worker(environment: Environment, main: Callable[[], int], *, stdout: int, stderr: int) -> int:
    """Return the pid of a new process that runs `main` as a worker and ends with the status it returns.

    `stdout` and `stderr` are descriptors that become the worker's; standard input is empty.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the child does the same; whoever comes first
            os.setpgid(pid, pid)
        return pid
    try:
        _become_worker(parent, environment, stdout, stderr)
        status = main()
    except BaseException as error:  # nothing may return into the launcher's frames
        os.write(2, f"lightwork: a worker could not be started: {error!r}\n".encode())
        status = 1
    _leave(status)


def kill_group(pid: int, number: int) -> None:
    """Send a signal to a worker and everything that it started; nothing happens if all are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _become_worker(parent: int, environment: Environment, stdout: int, stderr: int) -> None:
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.environ.update(environment.variables())


def _leave(status: int) -> NoReturn:
    """End the process as the interpreter would, but without unwinding into the frames of the launcher."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
