"""Training within a limit of memory: the step, the memory and the bytes that went to and from the disk.

    python benchmarks/offload.py                          # prints a table; --out DIR writes it as well

The limit is a quarter of the training state (weights, gradients, optimizer state). The model is built without values.
Resident memory is the proportional set size above a bare `import torch`, sampled while the worker trains; bytes read
and written are those that the system counts for the process at the disk, and `moved` is what the step has to move if
nothing stays in the page cache: the state and master weights, in and out, the gradients, and the weights three times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import lightwork
from bench import markdown, preamble, print_table
from models import LEARNING_RATE, SIZES, make_data, make_model

HEADS = (
    "run",
    "step",
    "range",
    "over memory",
    "peak memory",
    "limit",
    "read a step",
    "written a step",
    "moved",
    "loss",
)
WARM_UP_STEPS = 2


def proportional() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


class Peak(threading.Thread):
    """Samples the proportional set size every `interval` seconds."""

    def __init__(self, interval: float = 0.01) -> None:
        super().__init__(daemon=True)
        self._interval = interval
        self.start_bytes = self.highest = proportional()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(self._interval):
            self.highest = max(self.highest, proportional())

    def finish(self) -> int:
        self._stop_now.set()
        self.join()
        return self.highest - self.start_bytes


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train some steps, within `arguments.limit` bytes if not 0."""
    peak = Peak()
    if arguments.sample:
        peak.start()
    with torch.device("meta"):
        model = make_model(arguments.model)
    torch.manual_seed(0)
    dataset = TensorDataset(*make_data(arguments.model, arguments.batch, arguments.steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    limit = f"{arguments.limit}" if arguments.limit else None
    seconds: list[float] = []
    counts: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = lightwork.distribute(
            model,
            optimizer,
            global_batch=arguments.batch,
            micro_batch=arguments.batch,
            precision=arguments.precision,
            memory=limit,
            run_dir=folder,
        )
        start = time.perf_counter()
        for step in run.steps(dataset, max_steps=arguments.steps, shuffle=False):
            for inputs in step:
                step.backward(model(*inputs))
            seconds.append(time.perf_counter() - start)
            io = psutil.Process().io_counters()
            counts.append((io.read_bytes, io.write_bytes))
            start = time.perf_counter()
        run.close()
    timed = len(counts) - WARM_UP_STEPS
    return {
        "step": statistics.median(seconds[WARM_UP_STEPS:]),
        "peak": peak.finish() if arguments.sample else 0,
        "read": (counts[-1][0] - counts[WARM_UP_STEPS - 1][0]) / timed,
        "written": (counts[-1][1] - counts[WARM_UP_STEPS - 1][1]) / timed,
        "loss": step.loss,
    }


def measure_apart(arguments: argparse.Namespace, limit: int, *, sample: bool) -> dict[str, float]:
    """Call `measure` in a process of its own."""
    options = ("--model", arguments.model, "--precision", arguments.precision, "--batch", str(arguments.batch))
    command = [sys.executable, __file__, *options, "--steps", str(arguments.steps), "--limit", str(limit), "--measure"]
    done = subprocess.run([*command, *(["--sample"] if sample else [])], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def disk_rate(folder: Path) -> tuple[float, float]:
    """Return bytes a second, written and read, of a file of 1 GiB, past the page cache."""
    chunk = os.urandom(16 * 2**20)
    path = folder / "rate"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(64):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        written = 64 * len(chunk) / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(len(chunk)):
            pass
    read = 64 * len(chunk) / (time.perf_counter() - start)
    path.unlink()
    return written, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mid", "gpt2"), default="gpt2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="samples a step, all in one micro-batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    with torch.device("meta"):
        numel = sum(p.numel() for p in make_model(arguments.model).parameters())
    bytes_of_weight, bytes_of_master = (4, 0) if arguments.precision == "fp32" else (2, 4)
    state = numel * (bytes_of_weight + bytes_of_master + 4 + 8)
    limit = state // 4
    moved = numel * (2 * (8 + (bytes_of_master or 4)) + 2 * 4 + 3 * bytes_of_weight)
    with tempfile.TemporaryDirectory() as folder:
        written, read = disk_rate(Path(folder))
    memory = {name: measure_apart(arguments, size, sample=True) for name, size in (("in memory", 0), ("disk", limit))}
    rounds = [
        {name: measure_apart(arguments, size, sample=False) for name, size in (("in memory", 0), ("disk", limit))}
        for _ in range(arguments.rounds)
    ]
    rows = []
    for name in ("in memory", "disk"):
        times = [of_round[name]["step"] for of_round in rounds]
        ratio = statistics.median(of_round[name]["step"] / of_round["in memory"]["step"] for of_round in rounds)
        rows.append(
            (
                name,
                f"{statistics.median(times) * 1e3:.0f}",
                f"{min(times) * 1e3:.0f}-{max(times) * 1e3:.0f}",
                f"{ratio:.2f}",
                f"{memory[name]['peak'] / 1e6:.0f}",
                f"{limit / 1e6:.0f}" if name == "disk" else "-",
                f"{statistics.median(r[name]['read'] for r in rounds) / 1e6:.0f}",
                f"{statistics.median(r[name]['written'] for r in rounds) / 1e6:.0f}",
                f"{moved / 1e6:.0f}" if name == "disk" else "-",
                f"{rounds[0][name]['loss']:.4f}",
            )
        )
    size = SIZES[arguments.model]
    title = (
        f"{arguments.model} ({size.layers} layers of {size.width}, {numel / 1e6:.0f} M parameters), "
        f"{arguments.precision}, batch {arguments.batch}, one worker; training state {state / 1e6:.0f} MB"
    )
    print_table(Console(), title, HEADS, rows)
    note = (
        f"The disk: {written / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read (1 GiB, past the page cache). Step in "
        "ms, median over rounds, and the range; memory and bytes in MB."
    )
    print(note)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = ("# offload", title, preamble(), markdown(HEADS, rows), note)
        text = "\n\n".join(part.strip() for part in parts) + "\n"
        (arguments.out / f"offload-{arguments.model}-{arguments.precision}.md").write_text(text)


if __name__ == "__main__":
    main()
