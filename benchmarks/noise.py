"""The noise scale that a run shows, beside a direct measurement, and what it costs.

    python benchmarks/noise.py               # prints tables; --out DIR writes them as well

Agreement: the net of examples/digits.py after 0, 50 and 100 of its steps, its weights held fixed from there.
`noise=True` sees an eighth of each gradient over 4,000 steps (400 in a run of users). Directly: gradients of 6,000
micro-batches by plain PyTorch, whole; their variance, summed over the elements, and the square of their mean. Goal:
within 15 %.
Cost: blocks of steps with it and without, in turn in one run of two workers on two cores; the median ratio of
neighbouring blocks. Goal: 1.01.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import lightwork
from lightwork.engine.noise import Unasked
from lightwork.launcher.team import fork_team
from lightwork.spec.noise import PARTS, NoiseEstimator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import markdown, preamble, print_table
from elastic import CASES, WARM_UP, Case, ratios_of
from models import LEARNING_RATE, make_data, make_model

MICRO_BATCH, GLOBAL_BATCH = 16, 64
DIRECT = 6000
LOOKS = 500
AGREEMENT_HEADS = ("steps trained", "noise=True", "its interval of 95 %", "directly", "ratio")
COST_HEADS = ("case", "with (ms)", "without (ms)", "ratio", "quartiles", "goal")


def digits() -> tuple[TensorDataset, nn.Module]:
    """Return what examples/digits.py trains, and on what."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )
    return TensorDataset(images[:1500], torch.from_numpy(found.target)[:1500]), model


def shown(num_steps: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the noise scale that a run shows after so many steps, and the weights of which it is."""
    data, model = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    estimate, weights = None, {}
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model, optimizer, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, noise=True, run_dir=folder
        )
        noise = run._engine.noise
        for step in run.steps(data, max_steps=num_steps + LOOKS * PARTS):
            if step.index == num_steps:
                optimizer.param_groups[0]["lr"] = 0.0
                noise.estimator = NoiseEstimator(LOOKS, noise.leaves.num_parts)
                weights = {name: value.clone() for name, value in run.state_dict().items()}
            for inputs, targets in step:
                step.backward(F.cross_entropy(model(inputs), targets))
            result = step._result
            if step.index >= num_steps and result is not None and result.noise is not None:
                estimate = result.noise
        run.close()
    return estimate, weights


def direct(weights: dict[str, torch.Tensor]) -> float:
    """Return the ratio of variance and squared mean of gradients of single samples, from those of micro-batches."""
    data, model = digits()
    model.load_state_dict(weights)
    generator = torch.Generator().manual_seed(5)
    total, squares = None, 0.0
    for _ in range(DIRECT):
        chosen = torch.randperm(len(data), generator=generator)[:MICRO_BATCH]
        model.zero_grad()
        F.cross_entropy(model(data.tensors[0][chosen]), data.tensors[1][chosen]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        total = gradient if total is None else total + gradient
        squares += float(gradient.square().sum())
    of_mean = float((total / DIRECT).square().sum()) if total is not None else 0.0
    variance = (squares / DIRECT - of_mean) * DIRECT / (DIRECT - 1)
    return variance * MICRO_BATCH / (of_mean - variance / DIRECT)


def in_a_process(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a process of its own: one that has computed can not be forked any more."""
    (result,) = fork_team(1, function, timeout=300)
    if result.error is not None:
        raise SystemExit(result.error)
    return result.value


def agreement(num_steps: int) -> tuple[str, ...]:
    """Return a row of the first table."""
    estimate, weights = in_a_process(partial(shown, num_steps))
    there = in_a_process(partial(direct, weights))
    interval = f"{estimate.low:.1f}-{estimate.high:.1f}"
    return str(num_steps), f"{estimate.samples:.1f}", interval, f"{there:.1f}", f"{estimate.samples / there:.3f}"


def train(case: Case, num_steps: int) -> list[float]:
    """Return the seconds of each step, with and without in turn."""
    torch.set_num_threads(1)
    model = make_model(case.model)
    data = TensorDataset(*make_data(case.model, case.batch, num_steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model, optimizer, global_batch=case.batch, micro_batch=case.micro_batch, run_dir=folder, noise=True
        )
        engine = run._engine
        gradients = engine._parts.backward.gradients
        ways = (engine.noise, gradients.leaves), (Unasked(), None)
        last = time.monotonic()
        for step in run.steps(data, shuffle=False):
            for batch in step:
                step.backward(model(*batch))
            seconds.append(time.monotonic() - last)
            last = time.monotonic()
            if step.index >= WARM_UP - 1:
                engine.noise, gradients.leaves = ways[(step.index + 1 - WARM_UP) // case.block % 2]
        run.close()
    return seconds


def cost(name: str) -> tuple[str, ...]:
    """Return a row of the second table."""
    case = CASES[name]
    result = fork_team(2, partial(train, case, WARM_UP + case.block * case.blocks), timeout=600)[0]
    if result.error is not None:
        raise SystemExit(result.error)
    seconds = result.value[WARM_UP:]
    blocks = [sum(seconds[at : at + case.block]) / case.block for at in range(0, len(seconds), case.block)]
    ratios = ratios_of(blocks)
    quartiles = statistics.quantiles(ratios, n=4)
    return (
        name,
        f"{statistics.median(blocks[::2]) * 1e3:.2f}",
        f"{statistics.median(blocks[1::2]) * 1e3:.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
        "1.01",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("agreement", "cost"))
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    arguments = parser.parse_args()
    parts, tables = arguments.part or ["agreement", "cost"], []
    if "agreement" in parts:
        rows = [agreement(steps) for steps in (0, 50, 100)]
        print_table(Console(width=140), "The noise scale of digits, in samples", AGREEMENT_HEADS, rows)
        tables.append(markdown(AGREEMENT_HEADS, rows))
    if "cost" in parts:
        rows = [cost(name) for name in CASES]
        print_table(Console(width=140), "Two workers on two cores, fp32", COST_HEADS, rows)
        tables.append(markdown(COST_HEADS, rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        text = ("# noise", "The noise scale of digits in samples, and its cost.", preamble(), *tables)
        (arguments.out / "noise.md").write_text("\n\n".join(part.strip() for part in text) + "\n")


if __name__ == "__main__":
    main()
