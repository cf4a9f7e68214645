"""What it costs that a team goes on without a worker that is killed, and how soon it does.

    python benchmarks/elastic.py             # prints tables; --out DIR writes them as well

Two workers train on two cores. Cost: steps of elastic=true and elastic=false, a team of each in turn, several rounds;
the median of the rounds' ratios. Goals: at most 1.02 of the step of `mid` at batch 16, 1.08 at batch 2, 1.05 of `tiny`.
Death: one worker kills itself in the middle of a step. From then to the other's notice, and to its next committed step;
goals: 0.1 s and what the kernel needs to end the process; 1 s and what was to be computed again.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from lightwork.launcher.team import fork_team
from lightwork.team.board import Board

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import markdown, preamble, print_table
from models import GPT, LEARNING_RATE, Size

MID = Size(vocabulary=8192, width=512, layers=6, heads=8, sequence=256)
TINY = Size(vocabulary=512, width=64, layers=2, heads=2, sequence=32)
#: Model, global batch, steps, and the goal.
CASES: dict[str, tuple[Size, int, int, float]] = {
    "tiny, batch 2": (TINY, 2, 300, 1.05),
    "mid, batch 2": (MID, 2, 16, 1.08),
    "mid, batch 16": (MID, 16, 8, 1.02),
}
WARM_UP = 3
COST_HEADS = ("case", "elastic (ms)", "not (ms)", "ratio", "range", "goal")
DEATH_HEADS = ("case", "step (s)", "noticed (s)", "next commit (s)", "of which micro-batches again (s)")


def train(case: str, *, elastic: bool, dies_in: int | None = None) -> dict[str, Any]:
    """Train, and return the seconds of each step, and when what happened."""
    size, batch, steps, _ = CASES[case]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size.vocabulary, (batch * 4, size.sequence + 1), generator=generator)
    torch.manual_seed(0)
    model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    seen: dict[str, Any] = {"seconds": [], "committed": [], "buried": None}
    bury = Board.bury

    def noted(self: Board, local_rank: int) -> None:
        seen["buried"] = time.monotonic()
        bury(self, local_rank)

    Board.bury = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model,
            optimizer,
            global_batch=batch,
            micro_batch=1,
            run_dir=folder,
            plan=lightwork.Plan(elastic=elastic, trace=False),
        )
        for step in run.steps(TensorDataset(tokens), max_steps=steps, shuffle=False):
            start = time.monotonic()
            for (ids,) in step:
                loss = model(ids)
                if run.rank == 1 and step.index == dies_in:
                    seen_at = Path(os.environ["LIGHTWORK_KILLED_AT"])
                    seen_at.write_text(str(time.monotonic()))
                    os.kill(os.getpid(), signal.SIGKILL)
                step.backward(loss)
            seen["committed"].append(time.monotonic())
            seen["seconds"].append(time.monotonic() - start)
        run.close()
    return seen


def cost(case: str, rounds: int) -> tuple[str, ...]:
    """Return a row of the first table."""
    medians: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for elastic in (True, False) if number % 2 else (False, True):
            result = fork_team(2, partial(train, case, elastic=elastic), timeout=300)[0]
            medians[elastic].append(statistics.median(result.value["seconds"][WARM_UP:]))
    ratios = [on / off for on, off in zip(medians[True], medians[False], strict=True)]
    return (
        case,
        f"{statistics.median(medians[True]) * 1e3:.2f}",
        f"{statistics.median(medians[False]) * 1e3:.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f}-{max(ratios):.3f}",
        f"{CASES[case][3]:.2f}",
    )


def death(case: str, rounds: int) -> tuple[str, ...]:
    """Return a row of the second table."""
    steps, noticed, committed = [], [], []
    for _ in range(rounds):
        with tempfile.NamedTemporaryFile() as file:
            os.environ["LIGHTWORK_KILLED_AT"] = file.name
            at = WARM_UP + 1
            seen = fork_team(2, partial(train, case, elastic=True, dies_in=at), timeout=300)[0].value
            killed = float(Path(file.name).read_text())
        steps.append(statistics.median(seen["seconds"][WARM_UP - 1 : at]))
        noticed.append(seen["buried"] - killed)
        committed.append(seen["committed"][at] - killed)
    step, num_again = statistics.median(steps), CASES[case][1] // 2
    again = step / (CASES[case][1] / 2) * num_again
    shown = [
        f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})" for values in (noticed, committed)
    ]
    return case, f"{step:.3f}", *shown, f"at most {again:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    arguments = parser.parse_args()
    cases = arguments.case or list(CASES)
    costs = [cost(case, arguments.rounds) for case in cases]
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
