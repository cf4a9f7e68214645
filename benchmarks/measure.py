"""What every competitor measures about itself, in the same way, and hands to `bench.py` as one JSON file.

A step's time runs from the end of the step before it to its own end, on the main worker and without barriers: workers
that exchange gradients in every step cannot drift apart. Host memory is taken after the last step, while all workers
are alive; they meet through files, so that measuring needs no process group.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

#: Set by bench.py to its own process id: what lies between it and a worker is the launcher.
BENCH_PID = "BENCH_PID"
_MEETING_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of one competitor."""

    setting: str  #: the settings behind the name, for the reader of the table
    step_seconds: list[float]  #: of each step but the first
    losses: list[float]  #: of each step, averaged over workers
    first_step_at: float  #: wall clock, in seconds since the epoch
    workers_bytes: int  #: proportional set size, summed over workers; 0 where the system does not tell
    launcher_bytes: int  #: of the launcher and its helpers


def parse_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all competitors share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=("mid", "gpt2", "tiny"), required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples a step, over all workers")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder for the result")
    return parser


class Recorder:
    """One worker's record."""

    def __init__(self, out: Path, *, rank: int, world_size: int) -> None:
        self._out, self._rank, self._world_size = out, rank, world_size
        self._ends: list[float] = []
        self._losses: list[float] = []
        self._first_step_at = 0.0

    def end_step(self, loss: float) -> None:
        """Note that a step has ended. `loss`: this worker's, or the team's."""
        self._ends.append(time.perf_counter())
        self._losses.append(loss)
        if len(self._ends) == 1:
            self._first_step_at = time.time()

    def meet(self, name: str, content: str = "") -> list[str]:
        """Wait until every worker has come to the meeting `name`; return what each has brought, by rank."""
        part = self._out / f"{name}.{self._rank}.part"
        part.write_text(content)
        part.rename(self._out / f"{name}.{self._rank}")
        return [_await(self._out / f"{name}.{rank}") for rank in range(self._world_size)]

    def finish(self, setting: str) -> None:
        """Measure the host's memory and write the result. Every worker calls it after the same number of steps."""
        steps = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        mine = {"pid": os.getpid(), "losses": self._losses, "steps": steps}
        records = [json.loads(text) for text in self.meet("record", json.dumps(mine))]
        if self._rank == 0:
            pids = [record["pid"] for record in records]
            measurement = Measurement(
                setting=setting,
                step_seconds=steps,
                losses=[sum(each) / len(each) for each in zip(*(r["losses"] for r in records), strict=True)],
                first_step_at=self._first_step_at,
                workers_bytes=sum(_proportional_set_size(pid) for pid in pids),
                launcher_bytes=sum(_proportional_set_size(pid) for pid in _launcher_pids(pids)),
            )
            (self._out / "result.json").write_text(json.dumps(asdict(measurement)))
        self.meet("end")


def _await(path: Path) -> str:
    deadline = time.monotonic() + _MEETING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} did not appear within {_MEETING_SECONDS} s: that worker is late or gone.")
        time.sleep(0.002)
    return path.read_text()


def _proportional_set_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # not Linux, or a helper that has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _launcher_pids(workers: list[int]) -> list[int]:
    """Return the processes below bench.py that are not workers."""
    bench = os.environ.get(BENCH_PID)
    if bench is None:
        return []
    below = {child.pid for child in psutil.Process(int(bench)).children(recursive=True)}
    return sorted(below - set(workers))
