"""What a checkpoint that comes by itself costs a run: taken into memory and written beside it, and waited for.

    python benchmarks/saves.py                            # prints a table; --out DIR writes it as well

Two workers train `mid` in fp32 on two cores and save every so many steps, in turn either way. The cost of a checkpoint
is the time of the steps from one that saves to the next one that does, less as many of those that no checkpoint is near
to. Goal: at most 3 % of the time with one each ten minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from lightwork.launcher.team import fork_team

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import markdown, preamble, print_table
from models import LEARNING_RATE, make_data, make_model

BATCH, EVERY, WARM_UP = 2, 12, 1
#: Of the steps from one that saves on: those that a checkpoint may still be written in.
NEAR = 9
HEADS = (
    "way",
    "step (ms)",
    "one that saves (ms)",
    "cost of a checkpoint (ms)",
    "range",
    "each 10 min",
    "each min",
)


def train(saves: int) -> tuple[list[float], int]:
    """Return the seconds of each step, and the bytes of a checkpoint."""
    torch.set_num_threads(1)
    num_steps = EVERY * (saves + WARM_UP + 1)
    model = make_model("mid")
    data = TensorDataset(*make_data("mid", BATCH, num_steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model, optimizer, global_batch=BATCH, micro_batch=1, run_dir=folder, save_every=EVERY, keep_checkpoints=1
        )
        seconds, last = [], time.perf_counter()
        for step in run.steps(data, shuffle=False):
            for batch in step:
                step.backward(model(*batch))
            run._automatic._has_room = (step.index + 1) // EVERY % 2 == 1
            seconds.append(time.perf_counter() - last)
            last = time.perf_counter()
        run.close()
        size = sum(file.stat().st_size for file in Path(folder, "checkpoint").iterdir()) if run.is_main else 0
    return seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    arguments = parser.parse_args()
    seconds, size = fork_team(2, partial(train, arguments.saves), timeout=900)[0].value
    # A step is timed to the end of its body: the checkpoint behind it falls to the one after it.
    periods = [seconds[at : at + EVERY] for at in range(EVERY, len(seconds) - EVERY + 1, EVERY)][WARM_UP:]
    plain = statistics.median(second for period in periods for second in period[NEAR:])
    rows = []
    for way, parity in (("beside the run", 1), ("waited for", 0)):
        own = [period for number, period in enumerate(periods, WARM_UP + 1) if number % 2 == parity]
        costs = [sum(period[:NEAR]) - NEAR * plain for period in own]
        cost = statistics.median(costs)
        rows.append(
            (
                way,
                f"{plain * 1e3:.0f}",
                f"{statistics.median(period[0] for period in own) * 1e3:.0f}",
                f"{cost * 1e3:.0f}",
                f"{min(costs) * 1e3:.0f}-{max(costs) * 1e3:.0f}",
                f"{cost / 600:.3%}",
                f"{cost / 60:.2%}",
            )
        )
    title = f"Checkpoints of {size / 1e6:.0f} MB, mid in fp32 at batch {BATCH}, two workers, {arguments.saves} saves"
    print_table(Console(width=160), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = ("# saves", title + ".", preamble(), markdown(HEADS, rows))
        (arguments.out / "saves.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
