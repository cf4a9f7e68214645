"""From a limit on a worker's memory to what is offloaded: the least that fits.

    resident bytes of a worker = its share of what lies in memory (the host's weights and optimizer state, divided by
                                 its workers; its own partial sums)
                               + the working set of what lies on disk, and of the update and of backward

Activations are not in the formula: they are the script's, and `activations=` is their dial.

For a worker on a GPU it is the bytes of the GPU's memory, and what does not fit goes to the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightwork.errors import MemoryFull
from lightwork.spec.footprint import expected_bytes, working_set_bytes
from lightwork.spec.holdings import Holdings, Home
from lightwork.spec.plan import Place
from lightwork.units import format_bytes, parse_bytes

#: What is moved to disk, in this order: first what a step touches once.
ORDER: tuple[str, ...] = ("optimizer", "gradients", "weights")


def fit(holdings: Holdings, memory: str, offload: Mapping[str, Place]) -> dict[str, Place]:
    """Return what to offload so that a worker's resident memory stays below `memory`, above a bare `import torch`.

    Raises: MemoryFull when nothing fits, with the bytes that are missing and the smallest limit that would do.
    """
    limit, own = parse_bytes(memory), holdings.memories.of_process
    chosen = dict(offload)
    for part in (None, *ORDER):
        if part is not None:
            chosen[part] = holdings.memories.nearest if chosen.get(part) != "disk" else "disk"
        needed = resident_bytes(offloaded(holdings, chosen))
        if needed <= limit:
            return chosen
    largest = max(holdings.layout.parameters, key=lambda p: p.numel)
    raise MemoryFull(
        f"memory={memory!r} ({format_bytes(limit)}) is {format_bytes(needed - limit)} too little: with everything "
        f"offloaded a worker still needs {format_bytes(needed)} ({format_bytes(own)} for itself, the rest for one "
        f"bucket's update and the largest parameter, {largest.name} of {format_bytes(largest.numel * 4)}). The "
        f"nearest plan that fits is memory='{-(-needed // 2**20)}MiB'."
    )


def offloaded(holdings: Holdings, offload: Mapping[str, Place]) -> Holdings:
    """Return the holdings under another choice of what to offload."""
    return replace(holdings, dials=replace(holdings.dials, offload=dict(offload)))


def resident_bytes(holdings: Holdings) -> int:
    """Return the resident bytes of a worker at their peak, without its activations."""
    in_memory = sum(expected_bytes(holdings, (Home.HERE,)).values()) / holdings.num_workers
    return int(in_memory) + holdings.memories.of_process + working_set_bytes(holdings)
