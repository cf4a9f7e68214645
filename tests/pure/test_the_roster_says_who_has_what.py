"""Who leads, who owns and what falls to whom follows from who is in alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightwork.spec.roster import Roster
from lightwork.spec.tree import Node, cover, split, sum_of

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple)
counts = st.integers(1, 70)


@st.composite
def rosters(draw: st.DrawFn) -> Roster:
    """Return a roster in which some have left, but nobody's host is empty."""
    places = []
    for ranks in Roster.of_sizes(draw(sizes)).places:
        gone = draw(st.sets(st.sampled_from(ranks), max_size=len(ranks) - 1))
        places.append(tuple(None if rank in gone else rank for rank in ranks))
    return Roster(tuple(places), draw(st.integers(0, 9)))


@given(rosters(), counts)
def test_whoever_is_in_every_piece_has_one_owner_and_every_host_a_leader(roster: Roster, m: int) -> None:
    shares = [roster.share(rank, m) for rank in roster.living]
    assert [index for part in shares for index in part] == list(range(m)), "contiguous, in order, each once"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    owned = [roster.own_buckets(host, m) for host in range(roster.num_hosts)]
    assert sorted(bucket for buckets in owned for bucket in buckets) == list(range(m))
    assert all(roster.owner(bucket) == host for host, buckets in enumerate(owned) for bucket in buckets)
    leaders = [rank for rank in roster.living if roster.is_leader(rank)]
    assert leaders == [roster.leader(host) for host in range(roster.num_hosts)]
    assert roster.main == leaders[0]
    assert roster.world_size == sum(roster.sizes) == len(shares)


def test_a_place_that_nobody_has_is_capacity_and_no_member() -> None:
    roster = Roster(((None, 1, None), (3,)), generation=2)
    assert roster.living == (1, 3)
    assert roster.leader(0) == roster.main == 1
    assert roster.local_ranks(0) == (1,)
    assert len(roster.places[0]) == 3
    with pytest.raises(ValueError, match="nobody is at place 2 of host 0 in generation 2"):
        roster.rank_of(0, 2)


@given(rosters(), st.data())
def test_own_micro_batches_come_first_and_then_any_that_is_free_on_the_host(
    roster: Roster, data: st.DataObject
) -> None:
    rank = data.draw(st.sampled_from(roster.living))
    claims = data.draw(st.lists(st.booleans(), min_size=1, max_size=50))
    of_host = roster.micro_batches(roster.host_of(rank), len(claims))
    free = [index for index in of_host if not claims[index]]
    own = [index for index in free if index in roster.share(rank, len(claims))]
    assert roster.choose(rank, claims, steal=False) == own
    chosen = roster.choose(rank, claims, steal=True)
    assert chosen == own if own else sorted(chosen) == free


@given(st.integers(2, 12), st.data())
def test_a_thief_takes_the_last_of_the_worker_with_most_left(num_workers: int, data: st.DataObject) -> None:
    roster = Roster.of_sizes((num_workers,))
    rank = data.draw(st.sampled_from(roster.living))
    claims = data.draw(st.lists(st.booleans(), min_size=1, max_size=50))
    for index in roster.share(rank, len(claims)):
        claims[index] = True
    left = [[index for index in roster.share(other, len(claims)) if not claims[index]] for other in roster.living]
    chosen = roster.choose(rank, claims, steal=True)
    if any(left):
        most = max(left, key=len)
        assert chosen[: len(most)] == most[::-1]
    else:
        assert chosen == []


@given(sizes, counts)
def test_the_hosts_have_every_micro_batch_once_in_order_and_those_of_their_ranks(
    sizes: tuple[int, ...], m: int
) -> None:
    roster = Roster.of_sizes(sizes)
    ranges = [roster.micro_batches(host, m) for host in range(roster.num_hosts)]
    assert [index for own in ranges for index in own] == list(range(m))
    for host, own in enumerate(ranges):
        assert [index for rank in roster.ranks(host) for index in roster.share(rank, m)] == list(own)
        assert {roster.host_of(rank) for rank in roster.ranks(host)} == {host}
        assert [roster.rank_of(host, roster.local_rank(rank)) for rank in roster.ranks(host)] == [*roster.ranks(host)]


@given(counts, st.data())
def test_a_cover_is_the_fewest_nodes_that_hold_just_these_leaves(m: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, m))
    end = data.draw(st.integers(first, m))
    nodes = cover(Node(first, end), m)
    assert [leaf for node in nodes for leaf in range(*node)] == list(range(first, end))
    parents = {split(node): node for node in _nodes_of(Node(0, m))}
    for pair in itertools.pairwise(nodes):
        assert pair not in parents, "two siblings would be one node"


@given(sizes, counts)
def test_the_sum_over_all_is_made_of_what_the_hosts_give(sizes: tuple[int, ...], m: int) -> None:
    roster = Roster.of_sizes(sizes)
    given_nodes = [node for host in range(roster.num_hosts) for node in roster.nodes(host, m)]
    assert _leaves(sum_of(Node(0, m), given_nodes)) == list(range(m))
    with pytest.raises(ValueError, match="in no partial sum"):
        sum_of(Node(0, m), given_nodes[1:])


def _nodes_of(node: Node) -> list[Node]:
    return [] if node.end - node.first == 1 else [node, *(n for child in split(node) for n in _nodes_of(child))]


def _leaves(tree: object) -> list[int]:
    if isinstance(tree, Node):
        return list(range(*tree))
    assert isinstance(tree, tuple)
    return [leaf for child in tree for leaf in _leaves(child)]
