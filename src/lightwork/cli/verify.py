"""`lightwork verify RUN_DIR`: train from one checkpoint of a run to the next once more, and compare the bits.

The script is started again in a folder of its own, with one worker, from the older checkpoint, and ended when it has
saved at the step of the newer one. Whatever the team was that made that, and whoever was killed: it has computed what
one worker computes here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightwork.checkpoint import folder as folders
from lightwork.checkpoint.checkpoint import Checkpoint, load_whole
from lightwork.errors import CheckpointError, UsageError
from lightwork.team.environment import environment_of_replay
from lightwork.units import format_seconds

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

#: Where `lightwork run` writes what it was asked for.
COMMAND = "command.json"

#: Seconds between two looks whether the checkpoint is there.
_TICK = 0.1


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "verify",
        help="train between two checkpoints of a run once more, and compare the bits",
        description="Start the script of RUN_DIR again, with one worker in a folder of its own, from a checkpoint of "
        "that run to the next one, and compare all weights, buffers and optimizer state, bit for bit. What the script "
        "itself writes elsewhere it writes again.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="that of a `lightwork run`")
    parser.add_argument("--from", dest="first", type=int, metavar="STEP", help="the checkpoint to begin with")
    parser.add_argument(
        "--to", dest="last", type=int, metavar="STEP", help="that to compare with (default: the newest)"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="give up after (default: 3600)"
    )


def carry_out(options: argparse.Namespace) -> int:
    """Replay and compare; return 0 where all bits are equal, 1 where some are not.

    Raises: UsageError for a folder from which it can not be done; CheckpointError when the run does not come there.
    """
    command = _command_of(options.run_dir)
    first, last = _chosen(options.run_dir, options.first, options.last)
    _say(f"training from step {first.step} to step {last.step} with one worker ...")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lightwork-verify-") as folder:
        found = _replay(Path(folder), command, first, last.step, options.timeout)
        difference = _first_difference(last, found)
    if difference:
        _say(f"steps {first.step} to {last.step} give other bits here: {difference}.")
        return 1
    seconds = time.monotonic() - start
    _say(
        f"steps {first.step} to {last.step} give the same bits: all weights, buffers and optimizer state "
        f"({format_seconds(seconds)})."
    )
    return 0


def _command_of(run_dir: Path) -> Mapping[str, Any]:
    try:
        command: Mapping[str, Any] = json.loads((run_dir / COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{run_dir / COMMAND} can not be read ({error}). Pass the directory of a `lightwork run`, which writes it."
        ) from error
    return command


def _chosen(run_dir: Path, first: int | None, last: int | None) -> tuple[Checkpoint, Checkpoint]:
    """Return the checkpoints to begin and to end with; both are sound.

    Raises: UsageError when they are not there.
    """
    newest = run_dir / folders.DEFAULT
    paths = [path for path in (newest, *folders.older(newest)) if folders.exists(path)]
    by_step = {checkpoint.step: checkpoint for checkpoint in map(load_whole, paths)}
    ends = [step for step in by_step if last is None or step == last]
    end = max(ends, default=None)
    begins = [step for step in by_step if end is not None and step < end and (first is None or step == first)]
    if end is None or not begins:
        there = ", ".join(map(str, sorted(by_step))) or "none"
        raise UsageError(
            f"{run_dir} has checkpoints of these steps: {there}. Two are needed, to begin and to end with: "
            "distribute(save_every=, keep_checkpoints=) keeps some."
        )
    chosen = by_step[max(begins)], by_step[end]
    for checkpoint in chosen:
        damage = checkpoint.damage()
        if damage:
            raise CheckpointError(damage)
    return chosen


def _replay(folder: Path, command: Mapping[str, Any], first: Checkpoint, step: int, timeout: float) -> Checkpoint:
    """Train from a checkpoint on, and return that of `step`."""
    newest = folder / folders.DEFAULT
    shutil.copytree(first.folder, newest)
    # The first multiple of the step is itself; all are kept, as the script may save by itself.
    settings = {**command["settings"], "save_every": step, "keep_checkpoints": 1_000_000}
    words = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    arguments = [sys.executable, "-m", "lightwork", "run", "-n", "1", "--quiet", "--run-dir", str(folder)]
    arguments += [part for word in words for part in ("--set", word)]
    arguments += ["-m"] * command["is_module"] + [command["script"], *command["arguments"]]
    log = folder / "replay.log"
    with log.open("wb") as output, _ended_afterwards(arguments, command["folder"], output) as process:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            is_over = process.poll() is not None
            for path in (newest, *folders.older(newest)):
                if folders.step_of(path) == step:
                    return load_whole(path)
            if is_over:
                break
            time.sleep(_TICK)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
    raise CheckpointError(
        f"the script did not come to step {step} from step {first.step} ({'it ended' if is_over else 'in time'}). "
        f"Its last words:\n{tail}"
    )


@contextlib.contextmanager
def _ended_afterwards(arguments: list[str], folder: str, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment_of_replay(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()


def _first_difference(expected: Checkpoint, found: Checkpoint) -> str:
    """Return the first tensor in which two checkpoints differ, or nothing."""
    sources = ("weights or buffers", expected.model, found.model), ("buffers", expected.buffers, found.buffers)
    for what, ours, theirs in (*sources, ("optimizer state", expected.optimizer_file, found.optimizer_file)):
        if sorted(ours) != sorted(theirs):
            return f"the names of {what} differ"
        for name in ours:
            one, other = ours[name], theirs[name]
            if one.shape != other.shape or not torch.equal(_bits(one), _bits(other)):
                return name
    return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _say(text: str) -> None:
    print(f"lightwork: {text}", file=sys.stderr, flush=True)
