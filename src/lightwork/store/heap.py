"""The heap of the C library: where torch takes memory that is not shared, for activations above all.

By default glibc gives what is freed back to the system, and what it gets for the next step are zeroed pages, one fault
each. After `keep_pages` it keeps them. Where glibc takes huge pages (`launcher/again`) there are few faults anyway, and
to keep pages would cost a hundredth of the memory and more. Another C library is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

#: From how many bytes on an allocation is a mapping of its own, which goes when it is freed: glibc's upper limit before
#: 2.35. Larger ones in the heap would save more faults, but leave holes that none of them fits into again: a tenth more
#: memory at the peak, and for some models half (see the lab log).
OWN_MAPPING = 32 << 20

#: The environment with which this program began, also in a process forked from it.
AT_START = Path("/proc/self/environ")


def keep_pages() -> None:
    """Let this process keep the pages of what it frees from now on; those that are free already go back."""
    library = _glibc()
    if library is not None and not _takes_huge_pages():
        library.mallopt(_M_TRIM_THRESHOLD, -1)
        library.mallopt(_M_MMAP_THRESHOLD, OWN_MAPPING)
        library.malloc_trim(0)


def _takes_huge_pages() -> bool:
    """Return whether glibc was told to when this program began; it does not hear of it later."""
    with contextlib.suppress(OSError):
        return b"glibc.malloc.hugetlb=1" in AT_START.read_bytes()
    return False


@contextlib.contextmanager
def passing_phase() -> Iterator[None]:
    """Give back what is free at the end, if the body made the heap grow by more than one large tensor.

    What the heap had is that of a step: to take it again costs as many faults as are saved in several.
    """
    library = _glibc()
    before = library.sbrk(0) if library is not None else 0
    try:
        yield
    finally:
        if library is not None and library.sbrk(0) > before + OWN_MAPPING:
            library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        library.malloc_trim.argtypes = [ctypes.c_size_t]
        library.sbrk.argtypes, library.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    except AttributeError:
        return None
    return library
