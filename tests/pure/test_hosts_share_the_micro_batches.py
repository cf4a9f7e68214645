"""What falls to a host, and what it gives to the others, follows from the sizes of the hosts alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightwork.spec.assignment import share
from lightwork.spec.hosts import Hosts
from lightwork.spec.tree import Node, cover, split, sum_of

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple)
counts = st.integers(1, 70)


@given(sizes, counts)
def test_the_hosts_have_every_micro_batch_once_in_order_and_those_of_their_ranks(
    sizes: tuple[int, ...], m: int
) -> None:
    hosts = Hosts(sizes)
    ranges = [hosts.micro_batches(host, m) for host in range(len(hosts))]
    assert [index for own in ranges for index in own] == list(range(m))
    for host, own in enumerate(ranges):
        assert [index for rank in hosts.ranks(host) for index in share(rank, hosts.world_size, m)] == list(own)
        assert {hosts.host_of(rank) for rank in hosts.ranks(host)} == {host}


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
    hosts = Hosts(sizes)
    given_nodes = [node for host in range(len(hosts)) for node in hosts.nodes(host, m)]
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
