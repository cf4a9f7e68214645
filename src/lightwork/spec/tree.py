"""The fixed binary tree in which micro-batches are added up.

The leaves are the micro-batches 0 to M - 1 of a step. A node is the range of leaves below it. A range of more than
one leaf is split at the largest power of two below its length, so that every node starts at a multiple of its
(rounded up) size: a worker that folds neighbouring micro-batches like a binary counter meets only nodes of this tree.
The shape depends on M alone, and so do the bits of the sum, whoever adds.

Where a leaf contributes nothing (a parameter that its micro-batch did not touch), its node is absent and the sum of
its parent is the other child: nothing is added, not even zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """The leaves from `first` to `end`, the end not included."""

    first: int
    end: int


#: A node that somebody holds, or the sum of two such trees.
Sum = Node | tuple["Sum", "Sum"]


def split(node: Node) -> tuple[Node, Node]:
    """Return the two children of a node of two or more leaves."""
    first, end = node
    middle = first + (1 << ((end - first - 1).bit_length() - 1))
    return Node(first, middle), Node(middle, end)


def fold(leaf: int, num_leaves: int, held: Iterable[Node]) -> tuple[tuple[Node, ...], Node]:
    """Return the held nodes that `leaf` can be added to at once, in that order, and the node that results.

    Like a carry in a binary counter: the leaf's sibling, its parent's sibling, and so on, as far as they are held.
    """
    target = Node(leaf, leaf + 1)
    path: list[Node] = []  # the siblings on the way from the root to the leaf, each with its parent's range
    parents: list[Node] = []
    node = Node(0, num_leaves)
    while node != target:
        left, right = split(node)
        parents.append(node)
        node, sibling = (left, right) if leaf < left.end else (right, left)
        path.append(sibling)
    available = set(held)
    chain: list[Node] = []
    result = target
    for sibling, parent in zip(reversed(path), reversed(parents), strict=True):
        if sibling not in available:
            break
        chain.append(sibling)
        result = parent
    return tuple(chain), result


def cover(leaves: Node, num_leaves: int) -> tuple[Node, ...]:
    """Return the fewest nodes of the tree over `num_leaves` that hold just `leaves`, in order."""

    def within(node: Node) -> tuple[Node, ...]:
        if node.end <= leaves.first or leaves.end <= node.first:
            return ()
        if leaves.first <= node.first and node.end <= leaves.end:
            return (node,)
        left, right = split(node)
        return within(left) + within(right)

    return within(Node(0, num_leaves))


def sum_of(whole: Node, held: Iterable[Node]) -> Sum:
    """Return how the sum over the node `whole` is made of the held nodes.

    Raises: ValueError when they do not cover every leaf of it.
    """
    available = set(held)

    def expand(node: Node) -> Sum:
        if node in available:
            return node
        if node.end - node.first == 1:
            raise ValueError(f"micro-batch {node.first} of {tuple(whole)} is in no partial sum {sorted(available)}")
        left, right = split(node)
        return expand(left), expand(right)

    return expand(whole)


def without_absent(tree: Sum, present: Callable[[Node], bool]) -> Sum | None:
    """Return `tree` with its absent nodes taken out, or None when nothing is left."""
    if isinstance(tree, Node):
        return tree if present(tree) else None
    left, right = without_absent(tree[0], present), without_absent(tree[1], present)
    if left is None:
        return right
    return left if right is None else (left, right)


def combine(values: Sequence[T | None], add: Callable[[T, T], T]) -> T | None:
    """Return the sum of the leaves' values in the tree; None stands for a leaf that contributes nothing."""

    def value(node: Node) -> T | None:
        if node.end - node.first == 1:
            return values[node.first]
        left, right = (value(child) for child in split(node))
        if left is None or right is None:
            return right if left is None else left
        return add(left, right)

    return value(Node(0, len(values))) if values else None


def max_partial_sums(num_leaves: int) -> int:
    """Return how many partial sums a worker may come to hold.

    A run of neighbouring leaves, folded upwards, is at most 2 log2(M) nodes, wherever it lies; one that starts at a
    multiple of its size is log2(m) + 1. The rest is for stolen leaves and the sum being made.
    """
    return 2 * (num_leaves - 1).bit_length() + 3


def spare_partial_sums(num_leaves: int) -> int:
    """Return how many more a worker may come to hold that takes over what others leave when they die.

    Of leaves at any places no two can be siblings, or they are one node: half of them, and the sum being made.
    """
    return max(0, num_leaves // 2 + 2 - max_partial_sums(num_leaves))
