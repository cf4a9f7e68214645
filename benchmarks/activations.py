"""What keeping less of forward saves, and what it costs: one worker, a model of the benchmarks.

    python benchmarks/activations.py                        # prints a table; --out DIR writes it as well

Memory is the growth of the process from before forward to before backward, in a process whose allocator gives every
large tensor back to the system. Time is measured in others, without that, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from bench import markdown, preamble, print_table
from models import LEARNING_RATE, make_data, make_model

MODES = ("keep", "recompute", "int8")
HEADS = ("activations", "memory", "saved", "step", "range", "over keep", "loss")
WARM_UP_STEPS = 2

#: glibc then maps every tensor of 64 KiB or more by itself, and unmaps it when it is freed.
EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(model_name: str, precision: str, batch: int, mode: str, steps: int) -> dict[str, float]:
    """Train some steps; return the memory of forward, the median step and the last loss."""
    model = make_model(model_name)
    dataset = TensorDataset(*make_data(model_name, batch, steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    process = psutil.Process()
    grown: list[int] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model,
            optimizer,
            global_batch=batch,
            micro_batch=batch,
            precision=precision,
            activations=mode,
            run_dir=folder,
        )
        start = time.perf_counter()
        for step in run.steps(dataset, max_steps=steps, shuffle=False):
            for inputs in step:
                before = process.memory_info().rss
                loss = model(*inputs)
                grown.append(process.memory_info().rss - before)
                step.backward(loss)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        run.close()
    return {
        "memory": statistics.median(grown[WARM_UP_STEPS:]),
        "step": statistics.median(seconds[WARM_UP_STEPS:]),
        "loss": step.loss,
    }


def measure_apart(arguments: argparse.Namespace, mode: str, *, exact: bool) -> dict[str, float]:
    """Call `measure` in a process of its own."""
    options = ("--model", arguments.model, "--precision", arguments.precision, "--batch", str(arguments.batch))
    command = [sys.executable, __file__, *options, "--steps", str(arguments.steps), "--measure", mode]
    environment = {**os.environ, **(EXACT_ALLOCATOR if exact else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mid", "gpt2"), default="mid")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--batch", type=int, default=8, help="samples a step, all in one micro-batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*(vars(arguments)[n] for n in ("model", "precision", "batch", "measure", "steps")))))
        return
    memory = {mode: measure_apart(arguments, mode, exact=True)["memory"] for mode in MODES}
    rounds = [{mode: measure_apart(arguments, mode, exact=False) for mode in MODES} for _ in range(arguments.rounds)]
    rows = []
    for mode in MODES:
        times = [of_modes[mode]["step"] for of_modes in rounds]
        ratio = statistics.median(of_modes[mode]["step"] / of_modes["keep"]["step"] for of_modes in rounds)
        rows.append(
            (
                mode,
                f"{memory[mode] / 1e6:.0f}",
                f"{1 - memory[mode] / memory['keep']:.0%}",
                f"{statistics.median(times) * 1e3:.0f}",
                f"{min(times) * 1e3:.0f}-{max(times) * 1e3:.0f}",
                f"{ratio:.2f}",
                f"{rounds[0][mode]['loss']:.4f}",
            )
        )
    title = f"{arguments.model}, {arguments.precision}, {arguments.batch} samples a micro-batch, one worker"
    print_table(Console(), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        legend = "Memory: MB that forward leaves for backward. Step: ms, median over rounds, and the range."
        parts = ("# activations", f"{title}; {arguments.rounds} rounds.", preamble(), markdown(HEADS, rows), legend)
        text = "\n\n".join(part.strip() for part in parts) + "\n"
        (arguments.out / f"activations-{arguments.model}-{arguments.precision}.md").write_text(text)


if __name__ == "__main__":
    main()
