"""One worker of two is killed in the middle of a step: how soon the next step is committed, what is lost, which bits.

    python benchmarks/recovery.py            # prints a table; --out DIR writes it as well

The model is `mid` of `bench.py`, fp32, at batch 2, on two cores. Side by side, on the same kill:

    lightwork        lightwork run -n 2: the other goes on, and another process takes the place
    ... hosts        --transport group: each has a memory of its own; the other goes on alone
    ... zero2        the same, with state that nobody else has: both begin again from the last checkpoint, one each 10
    torchrun + DDP   both are started anew and go on from the last checkpoint, one each 10 steps; the kill comes 7 after
    torchft          two replica groups (pip install torchft): the other goes on; the driver starts the killed one anew

"Back to two" is when both are at work again. Bits are those of the same program undisturbed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench import markdown, preamble, print_table
from recovery_peer import DIES_IN, SAVES_EVERY, STEPS

HERE = Path(__file__).resolve().parent
MODEL, BATCH = "mid", 2
TIMEOUT = 240.0
HEADS = ("", "step (s)", "next commit (s)", "back to two (s)", "steps lost", "bits as undisturbed")

Events = list[dict[str, Any]]


def command(kind: str, batch: int, folder: Path, *, dies: bool) -> list[str]:
    """Return a worker's command line, for the launcher of its kind."""
    return [str(HERE / "recovery_peer.py"), kind, MODEL, str(batch), str(folder), "dies" if dies else "lives"]


def by_lightwork(batch: int, folder: Path, *, dies: bool, settings: dict[str, Any] | None = None) -> None:
    launcher = [sys.executable, "-m", "lightwork", "run", "-n", "2", "--quiet", "--run-dir", str(folder / "run")]
    environment = {**os.environ, "RECOVERY_SETTINGS": json.dumps(settings or {})}
    line = [*launcher, *command("lightwork", batch, folder, dies=dies)]
    subprocess.run(line, check=True, timeout=TIMEOUT, env=environment)


def by_torchrun(batch: int, folder: Path, *, dies: bool) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    subprocess.run([*launcher, *command("ddp", batch, folder, dies=dies)], check=True, timeout=TIMEOUT)


def by_torchft(batch: int, folder: Path, *, dies: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]  # as its README has it
    options += ["--bind", f"127.0.0.1:{port}"]
    lighthouse = subprocess.Popen(["torchft_lighthouse", *options], stderr=subprocess.DEVNULL)
    environment = {**os.environ, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}

    def start(group: int) -> subprocess.Popen[bytes]:
        line = [sys.executable, *command("torchft", batch, folder, dies=dies)]
        return subprocess.Popen(line, env={**environment, "REPLICA_GROUP_ID": str(group)}, stderr=subprocess.DEVNULL)

    groups = [start(0), start(1)]
    deadline = time.monotonic() + TIMEOUT
    try:
        while groups[0].poll() is None and time.monotonic() < deadline:
            if groups[1].poll() not in (None, 0):
                groups[1] = start(1)
            time.sleep(0.005)
        groups[1].wait(30)
    finally:
        for process in (*groups, lighthouse):
            process.kill()
            process.wait()


WAYS: dict[str, Callable[..., None]] = {
    "lightwork": by_lightwork,
    "lightwork, hosts": partial(by_lightwork, settings={"transport": "group"}),
    "lightwork, zero2": partial(
        by_lightwork, settings={"transport": "group", "placement": "zero2", "save_every": SAVES_EVERY}
    ),
    "torchrun + DDP": by_torchrun,
    "torchft": by_torchft,
}


def run(way: str, batch: int, *, dies: bool) -> list[Events]:
    """Return the events of each process, those that came first first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        WAYS[way](batch, folder, dies=dies)
        found = [list(map(json.loads, path.read_text().splitlines())) for path in folder.glob("*.jsonl")]
    return sorted((events for events in found if events), key=lambda events: events[0]["at"])


def digests(processes: list[Events]) -> set[str]:
    return {event["digest"] for events in processes for event in events if "digest" in event}


def one(way: str, batch: int, undisturbed: set[str]) -> tuple[float, float, float, int, bool]:
    """Return seconds (of a step, to the next commit, until two are at work), steps lost, and whether bits agree."""
    processes = run(way, batch, dies=True)
    killed = next(event["at"] for events in processes for event in events if "killed" in event)
    commits = [[event for event in events if "step" in event] for events in processes]
    before = sorted(event["at"] for events in commits for event in events if event["at"] < killed)[-10:]
    step = (before[-1] - before[0]) / (len(before) // 2 - 0.5) if len(before) > 2 else 0.0
    reached = max(event["step"] for events in commits for event in events if event["at"] < killed)
    after = [event for events in commits for event in events if event["at"] > killed]
    next_commit = min(event["at"] for event in after if event["step"] > reached)
    again = sum(1 for number in {event["step"] for event in after} if number <= reached)
    new = [events for events in commits if events and events[0]["at"] > killed]
    at_work = [events[0]["at"] for events in new]
    back = max(min(at_work), next_commit) if at_work else float("nan")
    return step, next_commit - killed, back - killed, again, digests(processes) == undisturbed and len(undisturbed) == 1


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


def rows_of(batch: int, ways: list[str], rounds: int) -> list[tuple[str, ...]]:
    rows = []
    found: dict[str, list[tuple[float, float, float, int, bool]]] = {way: [] for way in ways}
    undisturbed = {way: digests(run(way, batch, dies=False)) for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way].append(one(way, batch, undisturbed[way]))
    for way in ways:
        steps, commits, backs, lost, same = zip(*found[way], strict=True)
        rows.append(
            (
                way,
                f"{statistics.median(steps):.2f}",
                spread(commits),
                "never" if math.isnan(backs[0]) else spread(backs),
                f"{max(lost)}",
                f"{sum(same)} of {len(same)}",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    arguments = parser.parse_args()
    rows = rows_of(BATCH, arguments.way or list(WAYS), arguments.rounds)
    title = f"one of two workers killed in step {DIES_IN} of {STEPS}"
    print_table(Console(width=140), title, HEADS, rows)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        parts = (
            "# recovery",
            f"{title[0].upper()}{title[1:]}, `{MODEL}` at batch {BATCH}.",
            preamble(),
            markdown(HEADS, rows),
        )
        (arguments.out / "recovery.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
