"""Seeds: numbers that look random and are a pure function of the run's seed and a path of names and indices.

Whatever draws random numbers (the order of an epoch, a sample's augmentation, a micro-batch's dropout) starts
from a seed of its own, so that no draw depends on what the same process drew before, or on which process
draws.
"""

from __future__ import annotations

from hashlib import blake2b


def derive(seed: int, *path: int | str) -> int:
    """Return the seed of `path`, from 0 to 2**63 - 1, such as `derive(seed, "sample", epoch, sample_id)`.

    2 us (2026-11). Different paths give unrelated seeds: names carry their length and numbers an end, so that
    ("ab", "c") and ("a", "bc"), or 1 and "1", are told apart.
    """
    parts = [f"s{len(part)}:{part}" if isinstance(part, str) else f"i{part:d};" for part in (seed, *path)]
    digest = blake2b("".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
