"""Tensors between two processes: our sockets beside Gloo's point-to-point calls, in turn.

    python benchmarks/carriers.py                         # prints a table; --out DIR writes it as well

Both ends send at once and receive at once. Each round times some exchanges of each kind; the table has the medians over
the rounds, and of their ratios within a round. The CPU time is that of both processes, all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import markdown, preamble, print_table
from lightwork.transport.base import FIRST_TAG
from lightwork.transport.sockets import SocketCarrier

#: Bytes each way, and exchanges in a round.
SIZES = {"8 B": (8, 400), "64 KiB": (64 * 1024, 200), "2 MiB": (2 * 1024**2, 60), "64 MiB": (64 * 1024**2, 6)}
HEADS = ("each way", "sockets", "Gloo", "ratio", "range", "CPU, sockets", "CPU, Gloo", "rounds")


def swap_by_sockets(connected: socket.socket, host: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    carrier = SocketCarrier(host, [0, 1], {1 - host: connected}, silence=10.0)

    def swap(own: torch.Tensor, into: torch.Tensor) -> None:
        receiving = carrier.receive(1 - host, into, FIRST_TAG)
        carrier.send(1 - host, own, FIRST_TAG).wait()
        receiving.wait()

    return swap


def swap_by_gloo(folder: str, host: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    from torch.distributed import FileStore, ProcessGroupGloo

    make: Any = ProcessGroupGloo
    options = make._Options()
    options._timeout = timedelta(minutes=5)
    options._devices = [make.create_device(hostname="127.0.0.1")]
    group = make(FileStore(f"{folder}/store", 2), host, 2, options)

    def swap(own: torch.Tensor, into: torch.Tensor) -> None:
        receiving = group.recv([into], 1 - host, 0)
        group.send([own], 1 - host, 0).wait()
        receiving.wait()

    return swap


def measure(host: int, fd: int, folder: str, rounds: int) -> dict[str, list[list[float]]]:
    """Return wall seconds and CPU seconds of an exchange by either way, of each round, by size."""
    torch.set_num_threads(1)
    ways = [swap_by_sockets(socket.socket(fileno=fd), host), swap_by_gloo(folder, host)]
    seen: dict[str, list[list[float]]] = {name: [] for name in SIZES}
    for turn in range(rounds):
        for name, (size, times) in SIZES.items():
            own, into = torch.full((size,), 1 + host, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
            row = []
            for swap in ways if turn % 2 else ways[::-1]:
                swap(own, into)
                start, cpu = time.perf_counter(), time.process_time()
                for _ in range(times):
                    swap(own, into)
                row.append([(time.perf_counter() - start) / times, (time.process_time() - cpu) / times])
                if int(into.min()) != 2 - host:
                    raise SystemExit("other bytes came than were sent")
            seen[name].append([value for way in (row if turn % 2 else row[::-1]) for value in way])
    return seen


def of_two(rounds: int) -> list[dict[str, list[list[float]]]]:
    """Return what two processes measured."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        ends = [socket.create_connection(server.getsockname()), server.accept()[0]]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--host", str(host), str(end.fileno()), folder, "--rounds", str(rounds)],
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for host, end in enumerate(ends)
        ]
        for end in ends:
            end.close()
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--host", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host:
        print(json.dumps(measure(int(options.host[0]), int(options.host[1]), options.host[2], options.rounds)))
        sys.stdout.flush()
        os._exit(0)  # the other one may still wait for Gloo
    first, second = of_two(options.rounds)
    rows = []
    for name in SIZES:
        ours, ours_cpu, gloo, gloo_cpu = (
            [row[at] for row in first[name]]
            if at % 2 == 0
            else [row[at] + other[at] for row, other in zip(first[name], second[name], strict=True)]
            for at in range(4)
        )
        ratios = [one / other for one, other in zip(ours, gloo, strict=True)]
        times = [f"{1e3 * statistics.median(values):.3f}" for values in (ours, gloo, ours_cpu, gloo_cpu)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        ratio = f"{statistics.median(ratios):.2f}"
        rows.append([name, *times[:2], ratio, spread, *times[2:], str(len(ratios))])
    print_table(Console(), "carriers", HEADS, rows)
    if options.out:
        text = markdown(HEADS, rows)
        (options.out / "carriers.md").write_text(f"# carriers\n\nMilliseconds an exchange.\n\n{preamble()}\n\n{text}\n")


if __name__ == "__main__":
    main()
