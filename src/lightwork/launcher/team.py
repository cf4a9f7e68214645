from __future__ import annotations
import os, pickle, traceback, signal, time, sys, atexit
from dataclasses import dataclass
from typing import Any
from lightwork.team.environment import Environment
from lightwork.team.rendezvous import FileRendezvous

@dataclass(frozen=True)
class WorkerResult:
    rank: int
    value: Any
    error: str | None
    status: int

def fork_team(num_workers, function, *, run_dir=None, settings=None, timeout=60.0):
    fd = FileRendezvous.create()
    kids = []
    sys.stdout.flush(); sys.stderr.flush()
    for rank in range(num_workers):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(r)
            os.environ.update(Environment(rank=rank, world_size=num_workers, local_rank=rank, local_world_size=num_workers, rendezvous_fd=fd, run_dir=run_dir, settings=settings or {}).variables())
            status = 0
            try:
                out = (function(), None)
            except BaseException as e:
                out = (None, traceback.format_exc()); status = 1
                sys.excepthook(*sys.exc_info())
            with os.fdopen(w, "wb") as f: f.write(pickle.dumps(out))
            atexit._run_exitfuncs()
            os._exit(status)
        os.close(w); kids.append((rank, pid, r))
    res = []
    end = time.time() + timeout
    import select
    bufs = {r: b"" for _, _, r in kids}
    open_ = set(bufs)
    while open_ and time.time() < end:
        for r in select.select(list(open_), [], [], 0.5)[0]:
            d = os.read(r, 1 << 20)
            if d: bufs[r] += d
            else: open_.discard(r)
    for rank, pid, r in kids:
        if open_: os.kill(pid, signal.SIGKILL)
        _, st = os.waitpid(pid, 0)
        os.close(r)
        v, e = pickle.loads(bufs[r]) if bufs[r] else (None, "no result (timeout?)")
        res.append(WorkerResult(rank, v, e, os.waitstatus_to_exitcode(st)))
    os.close(fd)
    return res
