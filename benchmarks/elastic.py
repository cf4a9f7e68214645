"""What it costs that a team goes on without a worker that is killed, and how soon it does.

    python benchmarks/elastic.py             # prints tables; --out DIR writes them as well

Two workers train on two cores, the models of `bench.py` in fp32. Cost: blocks of steps with the journal and the hashes
of the state, and without, in turn in one run; the median ratio of neighbouring blocks. Goals: at most 1.02 of the step
of `mid` at batch 16, 1.08 at batch 2, 1.05 of `tiny`; 1.01 for the hashes alone. Death: one worker kills itself in the
middle of a step. From then to the other's notice, and to its next committed step; goals: 0.1 s and what the kernel
needs to end the process; 1 s and what is computed again.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.state.hashes import StateHashes
from lightwork.state.journal import Journal
from lightwork.team.membership import Membership

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import markdown, preamble, print_table
from models import LEARNING_RATE, make_data, make_model


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    batch: int
    micro_batch: int
    block: int  #: steps
    blocks: int
    goal: float


CASES = {
    "tiny": Case("tiny", 64, 32, 8, 300, 1.05),
    "mid, batch 2": Case("mid", 2, 1, 2, 30, 1.08),
    "mid, batch 16": Case("mid", 16, 2, 1, 24, 1.02),
}
WARM_UP = 4
COST_HEADS = ("case", "with (ms)", "without (ms)", "ratio", "quartiles", "goal")
DEATH_HEADS = ("case", "step (s)", "noticed (s)", "next commit (s)", "again, at most (s)")


def train(
    case: Case, num_steps: int, *, dies_in: int | None = None, killed_at: str = "", hashes_alone: bool = False
) -> dict[str, Any]:
    """Train, and return the seconds of each step, and when what happened."""
    torch.set_num_threads(1)
    model = make_model(case.model)
    data = TensorDataset(*make_data(case.model, case.batch, num_steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    seen: dict[str, Any] = {"seconds": [], "committed": [], "buried": None}
    bury = Membership.bury

    def noted(self: Membership, local_rank: int, pid: int) -> None:
        seen["buried"] = time.monotonic()
        bury(self, local_rank, pid)

    Membership.bury = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model, optimizer, global_batch=case.batch, micro_batch=case.micro_batch, run_dir=folder
        )
        updater = run._engine._parts.updater
        journals = updater.journal, Journal(updater._layout)
        hashes = updater.hashes, StateHashes()
        last = time.monotonic()
        for step in run.steps(data, shuffle=False):
            for batch in step:
                loss = model(*batch)
                if run.rank == 1 and step.index == dies_in:
                    Path(killed_at).write_text(str(time.monotonic()))
                    os.kill(os.getpid(), signal.SIGKILL)
                step.backward(loss)
            seen["committed"].append(time.monotonic())
            seen["seconds"].append(time.monotonic() - last)
            last = time.monotonic()
            if dies_in is None and step.index >= WARM_UP - 1:
                is_off = (step.index + 1 - WARM_UP) // case.block % 2
                updater.hashes = hashes[is_off]
                updater.journal = journals[is_off and not hashes_alone]
        run.close()
    return seen


def ratios_of(blocks: Sequence[float]) -> list[float]:
    """Return the ratios of blocks with something to those without, which come in turn.

    Each is compared with the mean of its neighbours, which are of the other kind.
    """
    beside = [(before + after) / 2 for before, after in zip(blocks, blocks[2:], strict=False)]
    pairs = enumerate(zip(blocks[1:], beside, strict=False), 1)
    return [other / one if number % 2 else one / other for number, (one, other) in pairs]


def cost(name: str, *, hashes_alone: bool = False) -> tuple[str, ...]:
    """Return a row of the first table."""
    case = CASES[name]
    job = partial(train, case, WARM_UP + case.block * case.blocks, hashes_alone=hashes_alone)
    result = fork_team(2, job, timeout=600)[0]
    seconds = result.value["seconds"][WARM_UP:]
    blocks = [sum(seconds[at : at + case.block]) / case.block for at in range(0, len(seconds), case.block)]
    ratios = ratios_of(blocks)
    quartiles = statistics.quantiles(ratios, n=4)
    return (
        f"{name}, hashes alone" if hashes_alone else name,
        f"{statistics.median(blocks[::2]) * 1e3:.2f}",
        f"{statistics.median(blocks[1::2]) * 1e3:.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
        f"{1.01 if hashes_alone else case.goal:.2f}",
    )


def death(name: str, rounds: int) -> tuple[str, ...]:
    """Return a row of the second table."""
    case, at = CASES[name], WARM_UP + 1
    steps, noticed, committed = [], [], []
    for _ in range(rounds):
        with tempfile.NamedTemporaryFile() as file:
            job = partial(train, case, at + 4, dies_in=at, killed_at=file.name)
            seen = fork_team(2, job, timeout=300)[0].value
            killed = float(Path(file.name).read_text())
        steps.append(statistics.median(seen["seconds"][WARM_UP - 2 : at]))
        noticed.append(seen["buried"] - killed)
        committed.append(seen["committed"][at] - killed)
    shown = [f"{statistics.median(of):.3f} ({min(of):.3f}-{max(of):.3f})" for of in (noticed, committed)]
    return name, f"{statistics.median(steps):.3f}", *shown, f"{statistics.median(steps):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=5, help="deaths of each case")
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    arguments = parser.parse_args()
    cases = arguments.case or list(CASES)
    costs = [cost(case, hashes_alone=alone) for case in cases for alone in (False, True)]
    deaths = [death(case, arguments.rounds) for case in cases]
    title = "Two workers that may be killed, on two cores"
    print_table(Console(width=140), title, COST_HEADS, costs)
    print_table(Console(width=140), "A worker is killed in the middle of a step", DEATH_HEADS, deaths)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tables = (markdown(COST_HEADS, costs), markdown(DEATH_HEADS, deaths))
        parts = ("# elastic", title + ".", preamble(), *tables)
        (arguments.out / "elastic.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
