"""Page faults, system time, step and peak memory, with the C library's pages kept from step to step and without.

    python benchmarks/faults.py                           # prints a table; --out DIR writes it as well

Runs are interleaved; a figure is the median of the rounds, of each the median of the steps from the fourth on, on the
worker that is slowest. Peak memory is the highest resident size that the system saw, of the worker with most. `kept`
for plain PyTorch and DDP, which leave the C library as it is, is what a script could do by itself.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from bench import markdown, preamble, print_table
from lightwork.launcher.team import fork_team
from lightwork.store import heap
from models import LEARNING_RATE, make_data, make_model

HEADS = ("who", "workers", "samples a step", "pages", "faults a step", "system ms", "step ms", "peak MB")
WARM_UP_STEPS = 3
#: Who, workers, samples a step, samples a forward.
RUNS = [
    ("PyTorch", 1, 8, 8),
    ("lightwork", 1, 8, 8),
    ("DDP", 2, 16, 8),
    ("lightwork", 2, 16, 8),
    ("lightwork", 2, 16, 2),
]


@dataclass(frozen=True)
class Seen:
    faults: float
    system: float
    step: float
    peak: float


def lightwork_steps(model: torch.nn.Module, batch: int, share: int, steps: int) -> Iterator[None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(model, optimizer, global_batch=batch, micro_batch=share, run_dir=folder)
        dataset = TensorDataset(*make_data("mid", batch, steps))
        for step in run.steps(dataset, max_steps=steps, shuffle=False):
            for samples in step:
                step.backward(model(*samples))
            yield


def plain_steps(model: torch.nn.Module, batch: int, share: int, steps: int) -> Iterator[None]:
    torch.set_num_threads(1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    data = make_data("mid", batch, steps)
    for step in range(steps):
        first = step * batch + rank * share
        model(*(tensor[first : first + share] for tensor in data)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def work(who: str, workers: int, batch: int, share: int, steps: int, keep: bool, meeting: str) -> Seen:
    if who == "DDP":
        store = dist.FileStore(meeting, workers)
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=workers)
    if who != "lightwork" and keep:
        heap.keep_pages()
    elif not keep:
        heap.keep_pages = lambda: None
    begin = lightwork_steps if who == "lightwork" else plain_steps
    seen = []
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in begin(make_model("mid"), batch, share, steps):
        after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        seen.append((after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime, end - start))
        before, start = after, end
    faults, system, step = (statistics.median(column) for column in zip(*seen[WARM_UP_STEPS:], strict=True))
    return Seen(faults, system * 1e3, step * 1e3, after.ru_maxrss / 1024)


def measure(run: tuple[str, int, int, int], steps: int, keep: bool) -> Seen:
    """Return the figures of the slowest worker, and the highest peak."""
    with tempfile.TemporaryDirectory() as folder:
        one: Callable[[], Seen] = lambda: work(*run, steps, keep, str(Path(folder) / "meeting"))  # noqa: E731
        results = fork_team(run[1], one, timeout=300.0, settings={"trace": False})
    for result in results:
        if result.error is not None:
            raise RuntimeError(result.error)
    every = [result.value for result in results]
    slowest = max(every, key=lambda seen: seen.step)
    return Seen(slowest.faults, slowest.system, slowest.step, max(seen.peak for seen in every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    arguments = parser.parse_args()
    cells = [(run, keep) for run in RUNS for keep in (False, True)]
    seen: dict[object, list[Seen]] = {cell: [] for cell in cells}
    for _ in range(arguments.rounds):
        for run, keep in cells:
            seen[run, keep].append(measure(run, arguments.steps, keep))
    rows = []
    for (who, workers, batch, share), keep in cells:
        of_cell = seen[(who, workers, batch, share), keep]
        figures = [
            statistics.median(values)
            for values in zip(*((s.faults, s.system, s.step, s.peak) for s in of_cell), strict=True)
        ]
        split = f"{batch} by {share}"
        rows.append(
            (who, str(workers), split, "kept" if keep else "as they are", *(f"{value:.0f}" for value in figures))
        )
    title = f"`mid`, fp32, {arguments.rounds} rounds of {arguments.steps} steps"
    print_table(Console(width=160), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = ("# Page faults", title, preamble(), markdown(HEADS, rows))
        (arguments.out / "page-faults.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
