"""The largest GPT that one GPU trains with its optimizer's state on the host, and how fast.

    python benchmarks/gpu/offload.py             # prints a table; --out DIR writes it as well
    python benchmarks/gpu/offload.py --device rehearsal --layers 1,2 --width 64      # without a GPU: that it runs

lightwork (offload of the optimizer, and of weights too), FSDP2 with CPUOffloadPolicy and DeepSpeed ZeRO-Offload with
its CPUAdam (where it is installed) train GPTs of more and more layers, each in a process of its own, until there is no
room. TFLOP/s: 8 operations a parameter and token (all recompute their layers) over the step. Goal: 1.5 x the better one
of the peers, at the largest size that it trains.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import markdown, preamble, print_table
from models import GPT, LEARNING_RATE, Size

COMPETITORS = ("lightwork", "lightwork/weights", "fsdp2", "deepspeed")
HEADS = ("competitor", "layers", "parameters (B)", "step (s)", "TFLOP/s", "GPU peak (GB)", "loss")
WARM_UP_STEPS = 2
#: Seconds after which a competitor is given up.
PATIENCE = 400


class Recomputed(nn.Module):
    """A layer that keeps its input alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return result


def initialise(model: nn.Module) -> None:
    """Give values to a model that was built without: small ones, quickly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.uniform_(-0.02, 0.02)


def train_lightwork(arguments: argparse.Namespace, size: Size, tokens: torch.Tensor) -> tuple[list[float], float]:
    import lightwork

    with torch.device("meta"):
        model = GPT(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    offload = {"optimizer": "host"}
    if arguments.competitor.endswith("weights"):
        offload["weights"] = "host"
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model,
            optimizer,
            global_batch=arguments.batch,
            micro_batch=arguments.batch,
            precision="bf16",
            device=arguments.device,
            offload=offload,
            activations="recompute",
            run_dir=folder,
        )
        start = time.perf_counter()
        for step in run.steps(TensorDataset(tokens), max_steps=arguments.steps, shuffle=False):
            for (ids,) in step:
                step.backward(model(ids))
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        run.close()
    return seconds, step.loss


def train_peer(
    arguments: argparse.Namespace, tokens: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[float], float]:
    seconds, loss = [], 0.0
    for number in range(arguments.steps):
        start = time.perf_counter()
        at = number % 2 * arguments.batch
        loss = step(tokens[at : at + arguments.batch].cuda(non_blocking=True)).item()
        seconds.append(time.perf_counter() - start)
    return seconds, loss


def train_fsdp2(arguments: argparse.Namespace, size: Size, tokens: torch.Tensor) -> tuple[list[float], float]:
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    with torch.device("meta"):
        model = GPT(size)
    model.layers = nn.ModuleList(Recomputed(layer) for layer in model.layers)
    settings: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        "offload_policy": CPUOffloadPolicy(),
    }
    for layer in model.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    model.to_empty(device="cpu")
    initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return train_peer(arguments, tokens, step)


def train_deepspeed(arguments: argparse.Namespace, size: Size, tokens: torch.Tensor) -> tuple[list[float], float]:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    with torch.device("meta"):
        model = GPT(size)
    model.layers = nn.ModuleList(Recomputed(layer) for layer in model.layers)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    initialise(model)
    config = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    }
    adam = DeepSpeedCPUAdam(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(ids)
        engine.backward(loss)
        engine.step()
        return loss

    return train_peer(arguments, tokens, step)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train some steps as one competitor."""
    torch.set_num_threads(os.cpu_count() or 1)  # of the peers' optimizers; lightwork sets its own
    size = size_of(arguments.width, int(arguments.layers))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size.vocabulary, (arguments.batch * 2, size.sequence + 1), generator=generator)
    torch.manual_seed(0)
    train = {"fsdp2": train_fsdp2, "deepspeed": train_deepspeed}.get(arguments.competitor, train_lightwork)
    seconds, loss = train(arguments, size, tokens)
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    return {"step": statistics.median(seconds[WARM_UP_STEPS:]), "peak": peak, "loss": loss}


def size_of(width: int, layers: int) -> Size:
    tokens = 50304 if width >= 1024 else 512
    return Size(vocabulary=tokens, width=width, layers=layers, heads=max(1, width // 128), sequence=1024)


def measure_apart(arguments: argparse.Namespace, competitor: str, layers: int) -> dict[str, float] | str:
    """Call `measure` in a process of its own; return what went wrong if it failed."""
    command = [sys.executable, __file__, "--measure", "--competitor", competitor, "--layers", str(layers)]
    for name in ("device", "width", "batch", "steps"):
        command += [f"--{name}", str(vars(arguments)[name])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {PATIENCE} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"status {done.returncode}"]
        return lines[-1][:80]
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "rehearsal"))
    parser.add_argument("--layers", default="8,16,24,32,40", help="of GPTs, from small to large")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default=",".join(COMPETITORS), help="competitors")
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--competitor", choices=COMPETITORS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for competitor in arguments.only.split(","):
        for layers in map(int, arguments.layers.split(",")):
            size = size_of(arguments.width, layers)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in GPT(size).parameters())
            seen = measure_apart(arguments, competitor, layers)
            row = (competitor, str(layers), f"{parameters / 1e9:.2f}")
            if isinstance(seen, str):
                rows.append((*row, seen, "", "", ""))
                break
            rate = 8 * parameters * arguments.batch * size.sequence / seen["step"] / 1e12
            measured = (f"{seen['step']:.2f}", f"{rate:.1f}", f"{seen['peak'] / 1e9:.1f}", f"{seen['loss']:.3f}")
            rows.append((*row, *measured))
            print(*rows[-1], file=sys.stderr, flush=True)
    title = f"GPTs of width {arguments.width} with state on the host, batch {arguments.batch} x 1024 tokens"
    print_table(Console(width=140), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "rehearsal"
        parts = ("# gpu-offload", title + f", on {device}.", preamble(), markdown(HEADS, rows))
        (arguments.out / "gpu-offload.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
