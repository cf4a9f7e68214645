"""What a user is told that is not an error."""

from __future__ import annotations

import contextlib
import sys


def notice(text: str) -> None:
    """Tell the user. Nothing happens where standard error can not be written."""
    with contextlib.suppress(OSError):
        print(f"lightwork: {text}", file=sys.stderr, flush=True)
