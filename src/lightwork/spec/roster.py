"""The roster: who is in the team, and what follows from that alone.

A *host* is a set of workers that share a memory: those of one machine or, where workers are to have memories of their
own, each worker by itself. It has places, numbered from 0 (a worker's *local rank*); a place is taken by a worker,
whose rank is its name in the whole team, or by nobody. How many places a host has is its capacity; who is in them is
its membership, and changes from one generation to the next.

Who speaks for a host, whose output is shown, who owns a bucket and which micro-batches fall to whom is asked here and
computed nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightwork.spec.tree import Node, cover

#: The main worker of generation 0, for whom has no roster yet: it publishes where the others find the team.
FIRST_RANK = 0


@dataclass(frozen=True)
class Roster:
    """Who is in, by host; `generation` counts the changes of it."""

    places: tuple[tuple[int | None, ...], ...]  #: of each host: the rank at each of its places, None where nobody is
    generation: int = 0
    living: tuple[int, ...] = field(init=False, compare=False, repr=False)  #: the ranks of all workers, host by host
    world_size: int = field(init=False, compare=False, repr=False)  #: the number of workers
    num_hosts: int = field(init=False, compare=False, repr=False)  #: those that have lost all workers included
    hosts: tuple[int, ...] = field(init=False, compare=False, repr=False)  #: those that have any
    sizes: tuple[int, ...] = field(init=False, compare=False, repr=False)  #: the workers of each host
    capacities: tuple[int, ...] = field(init=False, compare=False, repr=False)  #: the most that each may have
    main: int = field(init=False, compare=False, repr=False)  #: who decides for the team; its output is shown

    def __post_init__(self) -> None:
        living = tuple(rank for ranks in self._ranks for rank in ranks)
        derived = {
            "living": living,
            "world_size": len(living),
            "num_hosts": len(self.places),
            "hosts": tuple(host for host, ranks in enumerate(self._ranks) if ranks),
            "sizes": tuple(len(ranks) for ranks in self._ranks),
            "capacities": tuple(map(len, self.places)),
            "main": living[0],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Roster:
        """Return the first roster of a team whose hosts have so many workers each, with neighbouring ranks."""
        ends = [sum(sizes[: host + 1]) for host in range(len(sizes))]
        return cls(tuple(tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)))

    # --- who is in ------------------------------------------------------------------------------------------------

    def ranks(self, host: int) -> tuple[int, ...]:
        """Return the ranks of a host's workers."""
        return self._ranks[host]

    def local_ranks(self, host: int) -> tuple[int, ...]:
        """Return the places of a host that are taken."""
        return tuple(local for local, rank in enumerate(self.places[host]) if rank is not None)

    def rank_of(self, host: int, local_rank: int) -> int:
        """Return the rank at a place of a host.

        Raises: ValueError when nobody is there.
        """
        rank = self.places[host][local_rank]
        if rank is None:
            raise ValueError(f"nobody is at place {local_rank} of host {host} in generation {self.generation}")
        return rank

    def host_of(self, rank: int) -> int:
        """Return the host of a worker."""
        return self._seats[rank][0]

    def local_rank(self, rank: int) -> int:
        """Return the place of a worker on its host."""
        return self._seats[rank][1]

    def leader(self, host: int) -> int:
        """Return the rank of the worker that speaks for a host to the others."""
        return self.ranks(host)[0]

    def is_leader(self, rank: int) -> bool:
        """Return whether a worker speaks for its host."""
        return self.leader(self.host_of(rank)) == rank

    def to_json(self, names: Sequence[str], pids: Sequence[int]) -> str:
        """Return the roster as a JSON object, with the names of the workers' machines and their processes."""
        members = [
            {"rank": rank, "host": name, "pid": pid} for rank, name, pid in zip(self.living, names, pids, strict=True)
        ]
        return json.dumps({"generation": self.generation, "members": members}, indent=2)

    # --- who has what -----------------------------------------------------------------------------------------------

    def owner(self, bucket: int) -> int:
        """Return the host that adds up a bucket and, where state is sharded, holds and updates it."""
        return self.hosts[bucket % len(self.hosts)]

    def own_buckets(self, host: int, num_buckets: int) -> range:
        """Return the buckets that a host owns."""
        return range(self.hosts.index(host), num_buckets, len(self.hosts))

    def share(self, rank: int, num_micro_batches: int) -> range:
        """Return the micro-batches that fall to a worker: neighbours, so that they fold; none for a surplus one."""
        position, count = self._seats[rank][2], self.world_size
        return range(position * num_micro_batches // count, (position + 1) * num_micro_batches // count)

    def choose(self, rank: int, is_claimed: Sequence[bool], *, steal: bool) -> list[int]:
        """Return the unclaimed micro-batches of its host that a worker should take, the best first.

        Own ones come first, in order. Without any left, those of the host's worker with the most unclaimed come next,
        from its end: it reaches them last, and they fold with each other.
        """
        count = len(is_claimed)
        own = [i for i in self.share(rank, count) if not is_claimed[i]]
        if own or not steal:
            return own
        open_by_rank = [
            [i for i in self.share(other, count) if not is_claimed[i]] for other in self.ranks(self.host_of(rank))
        ]
        open_by_rank.sort(key=len, reverse=True)
        return [i for indices in open_by_rank for i in reversed(indices)]

    def micro_batches(self, host: int, num_micro_batches: int) -> range:
        """Return the micro-batches of a step that fall to a host: neighbours, as many as its workers' shares."""
        ranks = self.ranks(host)
        first, last = self.share(ranks[0], num_micro_batches), self.share(ranks[-1], num_micro_batches)
        return range(first.start, last.stop)

    def nodes(self, host: int, num_micro_batches: int) -> tuple[Node, ...]:
        """Return the partial sums that a host gives to the others: the fewest nodes of the tree over its share."""
        own = self.micro_batches(host, num_micro_batches)
        return cover(Node(own.start, own.stop), num_micro_batches)

    @cached_property
    def _ranks(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rank for rank in places if rank is not None) for places in self.places)

    @cached_property
    def _seats(self) -> dict[int, tuple[int, int, int]]:
        """By rank: host, place on it, and position among all workers."""
        positions = {rank: position for position, rank in enumerate(self.living)}
        return {
            rank: (host, local, positions[rank])
            for host, ranks in enumerate(self.places)
            for local, rank in enumerate(ranks)
            if rank is not None
        }


def without_hosts(roster: Roster, gone: Collection[int], generation: int) -> Roster:
    """Return a roster in which nobody is on these hosts any more."""
    places = (tuple(None for _ in of_host) if host in gone else of_host for host, of_host in enumerate(roster.places))
    return Roster(tuple(places), generation)


def of_those_there(full: Roster, are_there: Sequence[bool], generation: int) -> Roster:
    """Return the `full` roster without those of its workers, in their order, who are not there."""
    there = dict(zip(full.living, are_there, strict=True))
    places = (tuple(rank if rank is not None and there[rank] else None for rank in of_host) for of_host in full.places)
    return Roster(tuple(places), generation)


def with_only(full: Roster, host: int, local_ranks: Collection[int], generation: int) -> Roster:
    """Return the `full` roster, in which all places are taken, with nobody at other places of a host than these."""
    places = list(full.places)
    places[host] = tuple(rank if local in local_ranks else None for local, rank in enumerate(places[host]))
    return Roster(tuple(places), generation)


def full(roster: Roster) -> Roster:
    """Return the roster of a team in which all places are taken: one on several hosts has no others."""
    places = (tuple(local if rank is None else rank for local, rank in enumerate(of_host)) for of_host in roster.places)
    return Roster(tuple(places))
