"""A step on one GPU beside plain PyTorch's, in the same deterministic mode; what that mode costs is a line of its own.

    python benchmarks/gpu/overhead.py            # prints a table; --out DIR writes it as well
    python benchmarks/gpu/overhead.py --device rehearsal --model tiny --steps 4     # without a GPU: that it runs

Every competitor trains the same GPT on the same tokens with fused AdamW, in a process of its own, one after the other
in each round. Plain PyTorch trains fp32 weights under bf16 autocast, or bf16 weights with fp32 masters kept by hand, as
lightwork does. Goal: at most 1.02 of the faster of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import markdown, preamble, print_table
from models import GPT, LEARNING_RATE, Size, to_bf16

MODELS = {
    "tiny": (Size(vocabulary=512, width=64, layers=2, heads=2, sequence=32), 2),
    "124M": (Size(vocabulary=50304, width=768, layers=12, heads=12, sequence=1024), 16),
    "355M": (Size(vocabulary=50304, width=1024, layers=24, heads=16, sequence=1024), 16),
    "1.5B": (Size(vocabulary=50304, width=1600, layers=48, heads=25, sequence=1024), 8),
}
COMPETITORS = ("plain autocast", "plain masters", "free autocast", "free masters", "lightwork")
HEADS = ("model", "competitor", "step (ms)", "range", "over plain", "peak (GB)", "loss")
WARM_UP_STEPS = 5


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train some steps as one competitor."""
    size, batch = MODELS[arguments.model]
    on_gpu = arguments.device == "cuda"
    place = torch.device("cuda" if on_gpu else "cpu")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size.vocabulary, (batch * 4, size.sequence + 1), generator=generator)
    torch.manual_seed(0)
    model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    seconds: list[float] = []
    loss = 0.0
    if arguments.competitor == "lightwork":
        import lightwork

        with tempfile.TemporaryDirectory() as folder:
            run = lightwork.distribute(
                model,
                optimizer,
                global_batch=batch,
                micro_batch=batch,
                precision="bf16",
                device=arguments.device,
                run_dir=folder,
            )
            start = time.perf_counter()
            for step in run.steps(TensorDataset(tokens), max_steps=arguments.steps, shuffle=False):
                for (ids,) in step:
                    step.backward(model(ids))
                loss = step.loss
                seconds.append(time.perf_counter() - start)
                start = time.perf_counter()
            run.close()
    else:
        kind, precision = arguments.competitor.split()
        if kind == "plain":
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        model.to(place)
        masters = [p.detach().clone() for p in model.parameters()]
        if precision == "masters":
            optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)
            to_bf16(model)
        weights = list(model.parameters())
        for number in range(arguments.steps):
            start = time.perf_counter()
            at = number % 4 * batch
            ids = tokens[at : at + batch]
            ids = ids.pin_memory().to(place, non_blocking=True) if on_gpu else ids
            with torch.autocast(place.type, torch.bfloat16):
                result = model(ids)
            result.backward()
            if precision == "masters":
                for master, weight in zip(masters, weights, strict=True):
                    master.grad = weight.grad.float() if weight.grad is not None else None
            optimizer.step()
            if precision == "masters":
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            model.zero_grad(set_to_none=True)
            optimizer.zero_grad(set_to_none=True)
            loss = result.item()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    timed = seconds[min(WARM_UP_STEPS, len(seconds) - 1) :]
    return {"step": statistics.median(timed), "peak": peak, "loss": loss}


def measure_apart(arguments: argparse.Namespace, model: str, competitor: str) -> dict[str, float]:
    """Call `measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", "--model", model, "--competitor", competitor]
    command += ["--device", arguments.device, "--steps", str(arguments.steps)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: 124M, 355M and 1.5B")
    parser.add_argument("--device", default="cuda", choices=("cuda", "rehearsal"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--competitor", choices=COMPETITORS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.model = arguments.model[0]
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for model in arguments.model or ["124M", "355M", "1.5B"]:
        rounds: dict[str, list[dict[str, float]]] = {competitor: [] for competitor in COMPETITORS}
        for _ in range(arguments.rounds):
            for competitor in COMPETITORS:
                with contextlib.suppress(subprocess.CalledProcessError):  # no room: the others may have it
                    rounds[competitor].append(measure_apart(arguments, model, competitor))
        steps = {name: [seen["step"] for seen in of_one] for name, of_one in rounds.items() if of_one}
        medians = {name: statistics.median(of_one) for name, of_one in steps.items()}
        plain = min((value for name, value in medians.items() if name.startswith("plain")), default=float("nan"))
        for name, of_one in steps.items():
            rows.append(
                (
                    model,
                    name,
                    f"{medians[name] * 1e3:.1f}",
                    f"{min(of_one) * 1e3:.1f}-{max(of_one) * 1e3:.1f}",
                    f"{medians[name] / plain:.3f}",
                    f"{rounds[name][0]['peak'] / 1e9:.1f}",
                    f"{rounds[name][-1]['loss']:.4f}",
                )
            )
    title = "One worker on one GPU: plain is PyTorch in deterministic mode, free is without it"
    print_table(Console(width=140), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "rehearsal"
        parts = ("# gpu-overhead", title + f", on {device}.", preamble(), markdown(HEADS, rows))
        (arguments.out / "gpu-overhead.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
