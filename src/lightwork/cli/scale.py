"""`lightwork scale`: change the number of workers of a run while it trains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightwork.errors import UsageError
from lightwork.launcher.requests import ask

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "scale",
        help="change the number of workers of a run while it trains",
        description="Let workers come to a run of lightwork run, or go, while it trains. The weights do not depend on "
        "it. Who comes begins the script anew and joins between two steps; who goes does after its step, the last "
        "first.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run directory: runs/1, say")
    parser.add_argument("workers", metavar="N", type=int, help="workers from now on")


def carry_out(options: argparse.Namespace) -> int:
    """Ask the run's launcher, say what it says, and return the exit status.

    Raises: UsageError when it refuses, or nobody answers.
    """
    if options.workers < 1:
        raise UsageError(f"{options.workers} is not a number of workers from 1 upwards. To end a run: Ctrl-C.")
    print(f"lightwork: {ask(Path(options.run_dir), options.workers)}")
    return 0
