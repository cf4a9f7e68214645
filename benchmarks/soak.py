"""Teams whose workers are killed and stopped at random instants, and others come, compared bit for bit.

    python benchmarks/soak.py --seconds 600     # make soak SECONDS=600; --out DIR writes the table as well
    python benchmarks/soak.py --hosts           # each worker is a host of its own

Each run trains a job of `tests/cases.py` with 2 to 4 workers, looks at loss, gradient norm and digest after every step,
and saves in between. Meanwhile workers are killed (SIGKILL) or stopped for ever (SIGSTOP: ended by the team after its
lease), one by one or several at once, down to one that trains; other processes take their places, and are killed as
well, on their way too. Whoever comes to the end must have seen what one worker alone sees, a newcomer from where it
came in on. With `--hosts` there are 2 to 5 workers with memories of their own, which are only killed: nobody takes
their places, and who is stopped is waited for.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lightwork
from lightwork.launcher.team import WorkerResult, fork_team

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.cases import CASES
from tests.training import distributed, in_small_pieces

from bench import markdown, preamble, print_table

MAX_STEPS = 100
SCHEDULED = 15  #: steps of a scheduler, which may have a last one
SECONDS = 0.004  #: of a micro-batch, at least: else a run is over before anybody can come
LEASE = 0.5
RESTARTS = 1_000_000
HEADS = ("job", "runs", "killed", "... on their way", "stopped", "came", "survived to the bit", "longest step (s)")


def train(name: str, folder: Path, plan: lightwork.Plan, seconds: float = 0.0) -> dict[str, Any]:
    """Train a case and return what was seen after every step, and how long each took."""
    (folder / f"{os.getpid()}.pid").touch()
    in_small_pieces()
    case = CASES[name]
    run, scheduler = distributed(case, run_dir=str(folder), plan=plan)
    seen: dict[str, Any] = {"steps": [], "seconds": []}
    last = time.monotonic()
    for step in run.steps(case.dataset(), max_steps=MAX_STEPS):
        for batch in step:
            time.sleep(seconds)
            step.backward(*case.loss(run.model, batch))
        if scheduler is not None and step.index < SCHEDULED:
            scheduler.step()
        seen["seconds"].append(time.monotonic() - last)
        last = time.monotonic()
        seen["steps"].append((step.index, step.loss, step.grad_norm, run.digest()))
        (folder / f"{os.getpid()}.in").touch()
        if step.index % 10 == 1:
            run.save()
    return seen


@dataclass
class Tally:
    """What happened to the runs of a job."""

    runs: int = 0
    faults: Counter[int] = field(default_factory=Counter)  #: by signal
    on_their_way: int = 0  #: of those killed
    came: int = 0
    survived: int = 0  #: faults of runs whose survivors saw the right bits
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Killer(threading.Thread):
    """Kills and stops workers of one run; remembers whom, as one that is still dying looks alive."""

    def __init__(self, folder: Path, chance: random.Random, *, hosts: bool) -> None:
        super().__init__(daemon=True)
        self._stops = 0.0 if hosts else 0.05  # how often, rather than killed
        self.faults: list[int] = []
        self.on_their_way = 0
        self.is_over = False
        self._folder = folder
        self._chance = chance
        self._gone: set[int] = set()

    def run(self) -> None:
        """Kill until the run is over; one that has done a step always lives."""
        chance = self._chance
        while not self.is_over and not self._pids("in"):  # a death before the team has begun ends it
            time.sleep(0.002)
        time.sleep(0.05 * chance.random())
        while not self.is_over:
            members = [pid for pid in self._pids("in") if _is_worker(pid)]
            others = [pid for pid in self._pids("pid") if pid not in members and _is_worker(pid)]
            if members:
                members.remove(chance.choice(members))
            may_go = members + others * (chance.random() < 0.15)
            for pid in chance.sample(may_go, min(len(may_go), 1 + (chance.random() < 0.3))):
                number = signal.SIGSTOP if pid in members and chance.random() < self._stops else signal.SIGKILL
                if self.is_over or not _is_worker(pid):
                    continue
                os.kill(pid, number)
                self._gone.add(pid)
                self.faults.append(number)
                self.on_their_way += pid in others
            time.sleep(chance.choice((0.02, 0.1, 0.2, 0.4)) * chance.random())

    def _pids(self, kind: str) -> list[int]:
        return sorted({int(path.stem) for path in self._folder.glob(f"*.{kind}")} - self._gone)


def _is_worker(pid: int) -> bool:
    """Return whether a process is still this one's child, and not a zombie."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return False
    return int(parent) == os.getpid() and state not in "ZX"


def one_run(name: str, expected: Sequence[Any], chance: random.Random, tally: Tally, *, hosts: bool) -> None:
    """Do one run and count what came of it."""
    num_workers = chance.randint(2, 5 if hosts else 4)
    with tempfile.TemporaryDirectory() as path:
        killer = Killer(Path(path), chance, hosts=hosts)
        killer.start()
        plan = lightwork.Plan(lease=LEASE, trace=False, transport="group" if hosts else "host")
        job = partial(train, name, Path(path), plan, SECONDS)
        results = fork_team(num_workers, job, restarts=0 if hosts else RESTARTS, timeout=120)
        killer.is_over = True
        killer.join()
        tally.came += len(list(Path(path).glob("*.in"))) - num_workers
    tally.runs += 1
    tally.faults.update(killer.faults)
    tally.on_their_way += killer.on_their_way
    problem = problem_of(results, expected)
    if problem:
        tally.wrong.append(problem)
        return
    tally.survived += len(killer.faults)
    if killer.faults:
        seconds = [max(r.value["seconds"]) for r in results if r.error is None]
        tally.longest = max(tally.longest, *seconds)


def problem_of(results: Sequence[WorkerResult], expected: Sequence[Any]) -> str:
    """Return what is wrong with a run, if anything is."""
    living = [result for result in results if result.status != -signal.SIGKILL]
    if not living:
        return "nobody was left"
    for result in living:
        if result.error is not None:
            return result.error.splitlines()[-1]
        steps = result.value["steps"]
        if steps != expected[len(expected) - len(steps) :]:
            at = next((a[0] for a, b in zip(reversed(steps), reversed(expected), strict=False) if a != b), -1)
            return f"other bits on rank {result.rank} at step {at}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--hosts", action="store_true", help="workers with memories of their own")
    parser.add_argument("--out", type=Path, help="a folder for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    expected = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as path:
            (alone,) = fork_team(1, partial(train, name, Path(path), lightwork.Plan(trace=False)))
        if alone.error is not None:
            raise SystemExit(alone.error)
        expected[name] = alone.value["steps"]
    tallies = {name: Tally() for name in CASES}
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        name = chance.choice(list(CASES))
        one_run(name, expected[name], chance, tallies[name], hosts=arguments.hosts)
    rows = [
        (
            name,
            str(tally.runs),
            str(tally.faults[signal.SIGKILL]),
            str(tally.on_their_way),
            str(tally.faults[signal.SIGSTOP]),
            str(tally.came),
            f"{tally.survived} of {tally.faults.total()}",
            f"{tally.longest:.2f}",
        )
        for name, tally in tallies.items()
    ]
    total = sum(tally.faults.total() for tally in tallies.values())
    survived = sum(tally.survived for tally in tallies.values())
    title = f"{survived} of {total} faults survived to the bit in {arguments.seconds:.0f} s, seed {arguments.seed}"
    print_table(Console(width=140), title, HEADS, rows)
    problems = [problem for tally in tallies.values() for problem in tally.wrong]
    for problem, count in Counter(problems).most_common():
        print(f"{count} x {problem}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = "soak of hosts" if arguments.hosts else "soak"
        parts = (f"# {name}", title + ".", preamble(), markdown(HEADS, rows))
        (arguments.out / f"{name.replace(' ', '_')}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
