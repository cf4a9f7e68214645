"""Who takes which micro-batch: first one's own, then those that a late worker has not started."""

from __future__ import annotations

from collections.abc import Sequence


def share(rank: int, world_size: int, num_micro_batches: int) -> range:
    """Return the micro-batches that fall to `rank`: neighbours, so that they fold; none for a surplus rank."""
    return range(rank * num_micro_batches // world_size, (rank + 1) * num_micro_batches // world_size)


def choose(rank: int, world_size: int, claims: Sequence[int], *, steal: bool) -> list[int]:
    """Return the unclaimed micro-batches that `rank` should take, the best first.

    `claims[i]` is 0 while micro-batch i is unclaimed. Own ones come first, in order. Without any left, those of the
    rank with the most unclaimed come next, from its end: it reaches them last, and they fold with each other.
    """
    num_micro_batches = len(claims)
    own = [i for i in share(rank, world_size, num_micro_batches) if not claims[i]]
    if own or not steal:
        return own
    open_by_rank = [
        [i for i in share(other, world_size, num_micro_batches) if not claims[i]] for other in range(world_size)
    ]
    open_by_rank.sort(key=len, reverse=True)
    return [i for indices in open_by_rank for i in reversed(indices)]
