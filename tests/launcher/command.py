"""Scripts that a user may write, and the command that runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The beginning of every script; `{...}` of the body are filled in by hand.
HEAD = """\
import os, signal, sys, time
import torch, torch.nn.functional as F
import lightwork

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(2)
dataset = torch.utils.data.TensorDataset(
    torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator)
)
"""

#: A run of 8 micro-batches a step; `AT` is where a script's own mischief goes, in the body of the inner loop.
LOOP = """\
run = lightwork.distribute(model, optimizer, global_batch=16, micro_batch=2)
for step in run.steps(dataset, max_steps=MAX_STEPS):
    for inputs, targets in step:
        AT
        step.backward(F.cross_entropy(model(inputs), targets))
"""


def script(at: str = "pass", *, max_steps: int = 6, end: str = "") -> str:
    """Return a script with `at` in its inner loop and `end` after the loops."""
    return HEAD + LOOP.replace("AT", at).replace("MAX_STEPS", str(max_steps)) + end


@dataclass
class Result:
    """A command that has ended."""

    status: int
    out: str
    err: str
    run_dir: Path

    def log(self, rank: int) -> str:
        return (self.run_dir / "log" / f"rank{rank}.log").read_text()

    def pids(self) -> list[int]:
        return pids_of(self.run_dir)

    @property
    def text(self) -> str:
        """Everything, for the message of a failed test."""
        return f"status {self.status}\n--- out\n{self.out}\n--- err\n{self.err}"


def pids_of(run_dir: Path) -> list[int]:
    """Return the workers' processes."""
    return [member["pid"] for member in json.loads((run_dir / "roster.json").read_text())["members"]]


def environment() -> dict[str, str]:
    """Return the environment of a shell: without what another launcher may have left."""
    left = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LIGHTWORK_RUN_DIR", "LIGHTWORK_RENDEZVOUS_FD")
    return {name: value for name, value in os.environ.items() if name not in left}


def start(folder: Path, *command: str, within: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `python -m ...` in `folder`, as the leader of a process group of its own, as a shell does.

    `within` is a command that runs another, such as `ip netns exec NAME`.
    """
    return subprocess.Popen(
        [*within, sys.executable, *command],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], run_dir: Path, timeout: float = 60.0) -> Result:
    """Return what became of a started command."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"the command did not end in {timeout} s\n--- out\n{out}\n--- err\n{err}") from None
    return Result(process.returncode, out, err, run_dir)


def lightwork_run(folder: Path, text: str, *options: str, arguments: Sequence[str] = (), workers: str = "2") -> Result:
    """Write a script into `folder`, run it by `lightwork run`, and return what became of it."""
    (folder / "train.py").write_text(text)
    command = ("-m", "lightwork", "run", "-n", workers, *options, "train.py", *arguments)
    return finish(start(folder, *command), folder / "runs" / "1")


def is_alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `condition()`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("what was waited for did not happen")
        time.sleep(0.02)


def left_running(pids: Sequence[int], seconds: float = 3.0) -> list[int]:
    """Return the processes that still run after `seconds`; at once if none does."""
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if is_alive(pid)]
