"""Which workers share a memory. A *host* here is a set of neighbouring ranks that do: those of one machine, or, where
workers are to have memories of their own, each worker by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightwork.spec.assignment import share
from lightwork.spec.tree import Node, cover


@dataclass(frozen=True)
class Hosts:
    """The hosts of a team, by how many workers each has."""

    sizes: tuple[int, ...]

    @property
    def world_size(self) -> int:
        """All workers."""
        return sum(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def first_rank(self, host: int) -> int:
        """Return the lowest rank of a host: its leader, which speaks to the other hosts."""
        return sum(self.sizes[:host])

    def ranks(self, host: int) -> range:
        """Return the ranks of a host."""
        first = self.first_rank(host)
        return range(first, first + self.sizes[host])

    def host_of(self, rank: int) -> int:
        """Return the host of a rank."""
        return next(host for host in range(len(self)) if rank in self.ranks(host))

    def owner(self, bucket: int) -> int:
        """Return the host that adds up a bucket and, where state is sharded, holds and updates it."""
        return bucket % len(self)

    def micro_batches(self, host: int, num_micro_batches: int) -> range:
        """Return the micro-batches of a step that fall to a host: neighbours, as many as its workers' shares."""
        ranks = self.ranks(host)
        first, last = (share(rank, self.world_size, num_micro_batches) for rank in (ranks[0], ranks[-1]))
        return range(first.start, last.stop)

    def nodes(self, host: int, num_micro_batches: int) -> tuple[Node, ...]:
        """Return the partial sums that a host gives to the others: the fewest nodes of the tree over its share."""
        own = self.micro_batches(host, num_micro_batches)
        return cover(Node(own.start, own.stop), num_micro_batches)
