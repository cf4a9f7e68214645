"""Huge pages for what workers take from the C library, large tensors above all.

glibc asks for them if a tunable says so, which it reads when a program begins and never again. So `lightwork run`
starts itself once more, with the tunable among its variables, before anything slow is imported; workers are forked from
it. The second start takes the variable back: nothing that is started from there has it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"
#: From the first start to the second alone: what the user's tunables were, empty if there were none.
_BEFORE = "LIGHTWORK_GLIBC_TUNABLES"

#: Where the system says for which memory it has huge pages. With "always" they come without being asked for.
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: The first glibc that knows the tunable.
_FIRST_GLIBC = (2, 35)


def start_again() -> None:
    """Start this command again in this process, if that brings huge pages; in the second start, tidy up and go on."""
    if _BEFORE in os.environ:
        before = os.environ.pop(_BEFORE)
        os.environ.pop(_TUNABLES, None)
        if before:
            os.environ[_TUNABLES] = before
        return
    tunables = with_huge_pages(os.environ)
    if tunables is None or not _is_command() or not _has_glibc() or not _system_waits_to_be_asked():
        return
    variables = {**os.environ, _TUNABLES: tunables, _BEFORE: os.environ.get(_TUNABLES, "")}
    with contextlib.suppress(OSError):  # it goes on with small pages
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)


def with_huge_pages(variables: Mapping[str, str]) -> str | None:
    """Return the tunables of `variables` and that of huge pages; None if they say something of those already."""
    tunables = [tunable for tunable in variables.get(_TUNABLES, "").split(":") if tunable]
    if any(tunable.partition("=")[0] == _HUGE_PAGES for tunable in tunables):
        return None
    return ":".join([*tunables, f"{_HUGE_PAGES}=1"])


def _is_command() -> bool:
    """Return whether this process is a command that can begin once more: a file, with nothing done yet.

    Code that came through standard input or `-c` may have done something before.
    """
    return bool(sys.executable) and Path(sys.argv[0]).is_file() and "torch" not in sys.modules


def _has_glibc() -> bool:
    """Return whether the C library is glibc, and new enough to know the tunable."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_GLIBC
    except (ValueError, OSError):  # another system has no such entry
        return False


def _system_waits_to_be_asked() -> bool:
    with contextlib.suppress(OSError):
        return "[madvise]" in _SYSTEM.read_text()
    return False
