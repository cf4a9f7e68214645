"""Teams whose workers are killed and stopped at random instants, for as long as one likes, compared bit for bit.

    python benchmarks/soak.py --seconds 600     # make soak SECONDS=600; --out DIR writes the table as well

Each run trains a job of `tests/cases.py` with 2 to 4 workers, looks at loss, gradient norm and digest after every step,
and saves in between. Meanwhile workers are killed (SIGKILL) or stopped for ever (SIGSTOP: ended by the team after its
lease), one by one or several at once, down to one. Every survivor must have seen what one worker alone sees.
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

MAX_STEPS = 8
LEASE = 0.5
HEADS = ("job", "runs", "killed", "stopped", "survived to the bit", "longest step after a death (s)")


def train(name: str, folder: Path, plan: lightwork.Plan) -> dict[str, Any]:
    """Train a case and return what was seen after every step, and when."""
    (folder / f"{os.getpid()}.pid").touch()
    in_small_pieces()
    case = CASES[name]
    run, scheduler = distributed(case, run_dir=str(folder), plan=plan)
    seen: dict[str, Any] = {"steps": [], "seconds": []}
    last = time.monotonic()
    for step in run.steps(case.dataset(), epochs=case.epochs, max_steps=MAX_STEPS):
        for batch in step:
            step.backward(*case.loss(run.model, batch))
        if scheduler is not None:
            scheduler.step()
        seen["seconds"].append(time.monotonic() - last)
        last = time.monotonic()
        seen["steps"].append((step.loss, step.grad_norm, run.digest()))
        if step.index % 3 == 1:
            run.save()
    return seen


@dataclass
class Tally:
    """What happened to the runs of a job."""

    runs: int = 0
    faults: Counter[int] = field(default_factory=Counter)  #: by signal
    survived: int = 0  #: faults of runs whose survivors saw the right bits
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Killer(threading.Thread):
    """Kills and stops workers of one run; remembers whom, as one that is still dying looks alive."""

    def __init__(self, folder: Path, num_workers: int, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.faults: list[int] = []
        self.is_over = False
        self._folder = folder
        self._left = num_workers - 1  # that may go
        self._num_workers = num_workers
        self._chance = chance

    def run(self) -> None:
        """Kill until one is left, or the run is over."""
        chance = self._chance
        while len(self._pids()) < self._num_workers and not self.is_over:
            time.sleep(0.002)
        # The team must have begun: a death before that ends it.
        while not self.is_over and not (self._folder / "roster.json").exists():
            time.sleep(0.002)
        time.sleep(0.08)
        living = self._pids()
        chance.shuffle(living)
        while living[: self._left] and not self.is_over:
            time.sleep(chance.choice((0.0, 0.01, 0.05, 0.2)) * chance.random())
            at_once = living[: min(self._left, 1 + (chance.random() < 0.3))]
            for pid in at_once:
                number = signal.SIGSTOP if chance.random() < 0.05 else signal.SIGKILL
                living.remove(pid)
                self._left -= 1
                if self.is_over or not _is_worker(pid):
                    continue
                os.kill(pid, number)
                self.faults.append(number)

    def _pids(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.pid"))


def _is_worker(pid: int) -> bool:
    """Return whether a process is still this one's child, and not a zombie."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return False
    return int(parent) == os.getpid() and state not in "ZX"


def one_run(name: str, expected: Sequence[Any], chance: random.Random, tally: Tally) -> None:
    """Do one run and count what came of it."""
    num_workers = chance.randint(2, 4)
    with tempfile.TemporaryDirectory() as path:
        killer = Killer(Path(path), num_workers, chance)
        killer.start()
        plan = lightwork.Plan(lease=LEASE, trace=False)
        results = fork_team(num_workers, partial(train, name, Path(path), plan), timeout=120)
        killer.is_over = True
        killer.join()
    tally.runs += 1
    tally.faults.update(killer.faults)
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
        if result.value["steps"] != expected:
            at = next(i for i, (a, b) in enumerate(zip(result.value["steps"], expected, strict=False)) if a != b)
            return f"other bits on rank {result.rank} at step {at}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
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
        one_run(name, expected[name], chance, tallies[name])
    rows = [
        (
            name,
            str(tally.runs),
            str(tally.faults[signal.SIGKILL]),
            str(tally.faults[signal.SIGSTOP]),
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
        parts = ("# soak", title + ".", preamble(), markdown(HEADS, rows))
        (arguments.out / "soak.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
