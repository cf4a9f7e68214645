"""The parser of `lightwork`: one verb a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lightwork.errors import LightworkError
from lightwork.launcher.again import start_again


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit status: 0, 2 for a wrong one, or that of what it ran.

    Without `arguments` it is that of this process, which may start itself again first.
    """
    if arguments is None:
        _open_what_is_closed()
        start_again()
    from lightwork.cli import check, run, scale, verify  # what is slow to import comes after that

    parser = argparse.ArgumentParser(
        prog="lightwork",
        description="Train a PyTorch model data-parallel, with the same bits for any number of workers.",
    )
    parser.add_argument("--version", action="version", version=f"lightwork {version('lightwork')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    run.add_parser(verbs)
    scale.add_parser(verbs)
    check.add_parser(verbs)
    verify.add_parser(verbs)
    options = parser.parse_args(arguments)
    carry_out = {
        "run": run.carry_out,
        "scale": scale.carry_out,
        "check": check.carry_out,
        "verify": verify.carry_out,
    }[options.verb]
    try:
        return carry_out(options)
    except LightworkError as error:
        print(f"lightwork: {error}", file=sys.stderr)
        return 2


def _open_what_is_closed() -> None:
    """Let standard input, output and error be the null device where the caller has closed them (`>&-`).

    Else the files that are opened next would take their numbers, and be written to by whoever prints.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free is this one
            vars(sys)[name] = os.fdopen(number, mode)
