"""From a limit on a worker's memory to what is offloaded: the least that fits.

    resident bytes of a worker = its share of what lies in memory (the host's weights and optimizer state, divided by
                                 its workers; its own partial sums)
                               + the working set of what lies on disk, and of the update and of backward

Activations are not in the formula: they are the script's, and `activations=` is their dial.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightwork.engine.blueprint import Blueprint
from lightwork.errors import MemoryFull
from lightwork.spec.plan import Place
from lightwork.units import format_bytes, parse_bytes

#: What is moved to disk, in this order: first what a step touches once.
ORDER = ("optimizer", "gradients", "weights")

#: An allowance for Python objects, the board, mailboxes and threads' stacks; an estimate, not measured by itself.
FIXED_BYTES = 48 * 2**20


def fit(blueprint: Blueprint, memory: str, offload: Mapping[str, Place]) -> dict[str, Place]:
    """Return what to offload so that a worker's resident memory stays below `memory`, above a bare `import torch`.

    Raises: MemoryFull when nothing fits, with the bytes that are missing and the smallest limit that would do.
    """
    limit = parse_bytes(memory)
    chosen = dict(offload)
    for part in (None, *ORDER):
        if part is not None:
            chosen[part] = "disk"
        if resident_bytes(blueprint, chosen) <= limit:
            return chosen
    needed = resident_bytes(blueprint, chosen)
    largest = max(blueprint.layout.parameters, key=lambda p: p.numel)
    raise MemoryFull(
        f"memory={memory!r} is {format_bytes(needed - limit)} too little: with everything on disk a worker still needs "
        f"{format_bytes(needed)} ({format_bytes(FIXED_BYTES)} for itself, the rest for one bucket's update and for the "
        f"largest parameter, {largest.name} of {format_bytes(largest.numel * 4)}). The nearest plan that fits is "
        f"memory='{-(-needed // 2**20)}MiB'."
    )


def resident_bytes(blueprint: Blueprint, offload: Mapping[str, Place]) -> int:
    """Return the resident bytes of a worker at their peak, without its activations."""
    in_memory = {
        part: size / blueprint.world_size
        for part, size in blueprint.expected_bytes().items()
        if offload.get(part) != "disk"
    }
    return int(sum(in_memory.values())) + FIXED_BYTES + blueprint.working_set_bytes()
