"""Page faults, system time, step and peak memory of `mid` in fp32, by how the C library keeps a step's pages.

    python benchmarks/faults.py                           # prints a table; --out DIR writes it as well

Pages "as they are": what glibc does by itself, and so what plain PyTorch and DDP have. "kept": what `distribute` sets,
where glibc takes no huge pages. "huge": what workers of `lightwork run` have where the system has huge pages to ask
for. Runs are interleaved; a figure is the median of the rounds, of each the median of the steps from the fourth on, on
the worker whose step is the longest. Peak memory is the highest resident size that the system saw, shared pages and
libraries included, of the worker with most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from bench import markdown, preamble, print_table, program
from lightwork.store import heap
from models import LEARNING_RATE, make_data, make_model

HEADS = ("who", "workers", "samples a step", "pages", "faults a step", "system ms", "step ms", "peak MB")
WARM_UP_STEPS = 3
RUN_SECONDS = 240
AS_THEY_ARE, KEPT, HUGE = "as they are", "kept", "huge"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table."""

    who: str
    workers: int
    batch: int
    share: int  #: samples a forward
    pages: str

    @property
    def of_lightwork(self) -> bool:
        return self.who == "lightwork"

    def command(self, steps: int, out: Path) -> list[str]:
        """Return the command line that a user would type."""
        arguments = [__file__, "--steps", str(steps), "--out", str(out), "--cell", json.dumps(asdict(self))]
        if self.of_lightwork:
            return [program("lightwork"), "run", "--quiet", "-n", str(self.workers), *arguments]
        if self.workers > 1:
            return [program("torchrun"), "--standalone", "--nproc-per-node", str(self.workers), *arguments]
        return [sys.executable, *arguments]

    def variables(self) -> dict[str, str]:
        """Return the environment; one that says no to huge pages is heeded by `lightwork run`."""
        variables = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        if self.of_lightwork and self.pages != HUGE:
            variables["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"
        return {**variables, "OMP_NUM_THREADS": "1"}


CELLS = [
    Cell(who="PyTorch", workers=1, batch=8, share=8, pages=AS_THEY_ARE),
    *(Cell(who="lightwork", workers=1, batch=8, share=8, pages=pages) for pages in (AS_THEY_ARE, KEPT, HUGE)),
    Cell(who="DDP", workers=2, batch=16, share=8, pages=AS_THEY_ARE),
    *(Cell(who="lightwork", workers=2, batch=16, share=8, pages=pages) for pages in (AS_THEY_ARE, HUGE)),
    *(Cell(who="lightwork", workers=2, batch=16, share=2, pages=pages) for pages in (AS_THEY_ARE, HUGE)),
]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a worker saw."""

    faults: float
    system: float  #: ms
    step: float  #: ms
    peak: float  #: MB

    def figures(self) -> tuple[float, ...]:
        return (self.faults, self.system, self.step, self.peak)


# --- in a worker ------------------------------------------------------------------------------------------------------


def lightwork_steps(model: torch.nn.Module, cell: Cell, steps: int, out: Path) -> Iterator[int]:
    """Train; yield the rank after every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    run = lightwork.distribute(
        model, optimizer, global_batch=cell.batch, micro_batch=cell.share, run_dir=str(out / "run")
    )
    dataset = TensorDataset(*make_data("mid", cell.batch, steps))
    for step in run.steps(dataset, max_steps=steps, shuffle=False):
        for samples in step:
            step.backward(model(*samples))
        yield run.rank


def plain_steps(model: torch.nn.Module, cell: Cell, steps: int) -> Iterator[int]:
    """Train; yield the rank after every step."""
    torch.set_num_threads(1)
    rank = 0
    if cell.who == "DDP":
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    data = make_data("mid", cell.batch, steps)
    for step in range(steps):
        first = step * cell.batch + rank * cell.share
        model(*(tensor[first : first + cell.share] for tensor in data)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield rank
    if cell.who == "DDP":
        dist.destroy_process_group()


def work(cell: Cell, steps: int, out: Path) -> None:
    """Train, and leave what was seen in the folder `out`."""
    if cell.pages == AS_THEY_ARE:
        heap.keep_pages = lambda: None
    model = make_model("mid")
    seen = []
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    training = lightwork_steps(model, cell, steps, out) if cell.of_lightwork else plain_steps(model, cell, steps)
    for rank in training:  # noqa: B007  # it is used after the loop
        after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        seen.append((after.ru_minflt - before.ru_minflt, (after.ru_stime - before.ru_stime) * 1e3, (end - start) * 1e3))
        before, start = after, end
    faults, system, step = (statistics.median(column) for column in zip(*seen[WARM_UP_STEPS:], strict=True))
    figures = Seen(faults=faults, system=system, step=step, peak=after.ru_maxrss / 1024)
    (out / f"rank{rank}.json").write_text(json.dumps(asdict(figures)))


# --- the command ------------------------------------------------------------------------------------------------------


def measure(cell: Cell, steps: int) -> Seen:
    """Return the figures of the worker with the longest step, and the highest peak."""
    with tempfile.TemporaryDirectory(prefix="lightwork-faults-") as folder:
        out, log = Path(folder), Path(folder) / "log"
        with log.open("w") as file:
            command, variables = cell.command(steps, out), cell.variables()
            done = subprocess.run(
                command, env=variables, cwd=out, stdout=file, stderr=file, timeout=RUN_SECONDS, check=False
            )
        files = list(out.glob("rank*.json"))
        if done.returncode or len(files) != cell.workers:
            raise SystemExit(f"{cell} ended with status {done.returncode}:\n{log.read_text()}")
        every = [Seen(**json.loads(file.read_text())) for file in files]
    slowest = max(every, key=lambda seen: seen.step)
    return Seen(**{**asdict(slowest), "peak": max(seen.peak for seen in every)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        work(Cell(**json.loads(arguments.cell)), arguments.steps, arguments.out)
        return
    rounds = [{cell: measure(cell, arguments.steps) for cell in CELLS} for _ in range(arguments.rounds)]
    rows = []
    for cell in CELLS:
        columns = zip(*(of_cells[cell].figures() for of_cells in rounds), strict=True)
        figures = [f"{statistics.median(values):.0f}" for values in columns]
        rows.append((cell.who, str(cell.workers), f"{cell.batch} by {cell.share}", cell.pages, *figures))
    title = f"`mid`, fp32, medians of {arguments.rounds} rounds of {arguments.steps} steps"
    print_table(Console(width=160), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = ("# Page faults", f"{title}.", preamble(), markdown(HEADS, rows))
        (arguments.out / "page-faults.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
