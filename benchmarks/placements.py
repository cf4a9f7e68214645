"""The memory of a worker by placement, against the formula of the ZeRO paper with what the design states besides.

    python benchmarks/placements.py                       # prints a table; --out DIR writes it as well

Workers have memories of their own (transport "group"). The formula is `Holdings.expected_bytes`, with the
working set, which does not grow with the model; beside it stands the
constant that a run with a model of next to nothing measures. Measured is the peak of the proportional set size, sampled
ten times a second from the third step on, of the worker with most. A tower of square layers with one sample a
micro-batch: activations take next to nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from bench import markdown, preamble, print_table
from lightwork.launcher.team import fork_team
from lightwork.spec.footprint import expected_bytes, working_set_bytes
from offload import Peak, proportional

WIDTH, STEPS = 1024, 6
HEADS = (
    "placement",
    "precision",
    "wire",
    "workers",
    "micro-batches a worker",
    "weights",
    "optimizer",
    "gradients",
    "working set",
    "formula + constant",
    "measured",
    "ratio",
)
#: Placement, precision, wire, workers, micro-batches a worker.
RUNS = [
    *((placement, "bf16", "bf16", 2, 1) for placement in ("replicate", "zero1", "zero2", "zero3")),
    *((placement, "bf16", "fp32", 2, 1) for placement in ("replicate", "zero1", "zero2", "zero3")),
    *((placement, "fp32", "fp32", 2, 1) for placement in ("replicate", "zero1", "zero2", "zero3")),
    *((placement, "bf16", "bf16", 4, 1) for placement in ("replicate", "zero1", "zero2", "zero3")),
    ("replicate", "bf16", "fp32", 2, 4),
    ("zero3", "bf16", "fp32", 2, 4),
]


@dataclass(frozen=True)
class Seen:
    expected: dict[str, int]
    peak: int


def train(layers: int, width: int, workers: int, micro_batches: int, precision: str, wire: str) -> Seen:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = workers * micro_batches
    data = TensorDataset(torch.randn(batch, width))
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model, optimizer, global_batch=batch, micro_batch=1, precision=precision, wire=wire, run_dir=folder
        )
        peak = Peak(interval=0.1)  # reading it takes long where much is mapped
        for step in run.steps(data, max_steps=STEPS):
            for (x,) in step:
                step.backward(model(x).square().mean())
            if step.index == 1:
                peak.highest = proportional()
                peak.start()
        peak.finish()
        holdings = run._engine._parts.holdings
        expected = {**expected_bytes(holdings), "working set": working_set_bytes(holdings)}
        run.digest()  # the others are alive until all have measured
    return Seen(expected, peak.highest)


def measure(layers: int, width: int, run: tuple[str, str, str, int, int]) -> Seen:
    """Return what the worker with the highest peak saw."""
    placement, precision, wire, workers, micro_batches = run
    settings = {"transport": "group", "placement": placement, "trace": False}
    results = fork_team(
        workers,
        lambda: train(layers, width, workers, micro_batches, precision, wire),
        timeout=500.0,
        settings=settings,
    )
    for result in results:
        if result.error is not None:
            raise RuntimeError(result.error)
    return max((result.value for result in results), key=lambda seen: seen.peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=128, help="of 1 M parameters each")
    parser.add_argument("--out", type=Path, help="a folder for the table")
    arguments = parser.parse_args()
    rows = []
    worst = 0.0
    for run in RUNS:
        constant = measure(1, 8, run).peak
        seen = measure(arguments.layers, WIDTH, run)
        formula = sum(seen.expected.values()) + constant
        ratio = seen.peak / formula
        worst = max(worst, abs(ratio - 1))
        parts = [f"{size / 1e6:.0f}" for size in seen.expected.values()]
        totals = (f"{formula / 1e6:.0f}", f"{seen.peak / 1e6:.0f}", f"{ratio:.3f}")
        rows.append((*map(str, run), *parts, *totals))
    millions = arguments.layers * WIDTH * (WIDTH + 1) / 1e6
    title = f"A tower of {arguments.layers} layers of {WIDTH} ({millions:.0f} M parameters)"
    print_table(Console(width=160), title, HEADS, rows)
    note = f"Memory in MB. The largest distance from the formula and the constant is {worst * 100:.1f} % (bar: 5 %)."
    print(note)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = ("# placements", title, preamble(), markdown(HEADS, rows), note)
        (arguments.out / "placements.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
