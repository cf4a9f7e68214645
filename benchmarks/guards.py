"""What the guards cost: steps of `tiny` with them and without, in turn, in one run; the median ratio of neighbours.

    python benchmarks/guards.py [--blocks 800] [--write]

The guards are what looks, in every step, whether the script has written or replaced what it can not: weights, buffers,
modules, gradients' places, the optimizer's state, hooks, and models of other runs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.models import make_data, make_model
from torch.utils.data import TensorDataset

import lightwork
from lightwork.engine.looks import EVERY
from lightwork.run.exit import Exits
from lightwork.run.guard import Guard
from lightwork.state.buffers import Buffers
from lightwork.state.structure import Structure
from lightwork.state.writes import Writes

#: Steps that are timed together: few, as a shared machine is faster and slower by a third from second to second, and as
#: many as those of which one looks at everything.
BLOCK = EVERY

GUARDS: list[tuple[type, str]] = [
    (Writes, "check"),
    (Writes, "check_values"),
    (Structure, "check"),
    (Buffers, "check_unwritten"),
    (Guard, "check"),
    (Exits, "beside"),
]


def nothing(*_: Any, **__: Any) -> tuple[()]:
    """Look at nothing."""
    return ()


def measure(num_blocks: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each step, with guards and without."""
    torch.set_num_threads(1)
    model = make_model("tiny")
    data = TensorDataset(*make_data("tiny", 64, 2 * num_blocks * BLOCK + 20))
    run = lightwork.distribute(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        global_batch=64,
        micro_batch=32,
        run_dir=tempfile.mkdtemp(),
    )
    seconds: tuple[list[float], list[float]] = [], []
    without: ExitStack | None = None
    last = time.perf_counter()
    for step in run.steps(data, shuffle=False):
        for features, labels in step:
            step.backward(model(features, labels))
        now = time.perf_counter()
        if step.index >= 20:
            seconds[without is not None].append(now - last)
            if (step.index - 19) % BLOCK == 0:
                without = switched(without)
        last = time.perf_counter()
    if without is not None:
        without.close()
    run.close()
    return seconds


def blocks(seconds: list[float]) -> list[float]:
    """Return the mean step of each block."""
    return [statistics.mean(seconds[at : at + BLOCK]) for at in range(0, len(seconds) - BLOCK + 1, BLOCK)]


def switched(without: ExitStack | None) -> ExitStack | None:
    """Take the guards away, or put them back."""
    if without is not None:
        without.close()
        return None
    stack = ExitStack()
    for of, name in GUARDS:
        stub: Callable[..., object] = nothing
        stack.enter_context(mock.patch.object(of, name, stub))
    return stack


def main() -> None:
    """Measure, and print or write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=600, help=f"blocks of {BLOCK} steps of each kind")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    guarded, bare = measure(options.blocks)
    with_them, without = statistics.median(guarded) * 1e6, statistics.median(bare) * 1e6
    ratios = sorted(one / other for one, other in zip(blocks(guarded), blocks(bare), strict=False))
    ratio = statistics.median(ratios)
    low, high = (
        ratios[len(ratios) // 2 - round(len(ratios) ** 0.5)],
        ratios[len(ratios) // 2 + round(len(ratios) ** 0.5)],
    )
    met = "met" if ratio <= 1.01 else "missed"
    text = (
        "# guards\n\ntiny, fp32, global batch 64, one worker of 1 thread; blocks of "
        f"{BLOCK} steps with the guards and without in turn, {len(guarded)} and {len(bare)} steps.\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n\n"
        "| | median step, us |\n| --- | --- |\n"
        f"| with guards | {with_them:.1f} |\n| without | {without:.1f} |\n\n"
        f"Median ratio of neighbouring blocks {ratio:.4f} (95 % of such medians: {low:.4f} to {high:.4f}); "
        f"bar 1.01: {met}.\n"
    )
    print(text)
    if options.write:
        (Path(__file__).parent / "results" / "guards_2core_202611.md").write_text(text)


if __name__ == "__main__":
    main()
