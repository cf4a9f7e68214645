"""The fixed tree: whatever the order and the partition of the leaves over workers, the same additions are made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightwork.spec.tree import Node, Sum, combine, fold, max_partial_sums, split, sum_of, without_absent


class Worker:
    """Folds leaves like a binary counter; a value is the expression that made it."""

    def __init__(self, num_leaves: int, values: list[str | None]) -> None:
        self.num_leaves = num_leaves
        self.values = values
        self.held: dict[Node, str | None] = {}
        self.most = 0

    def take(self, leaf: int) -> None:
        chain, result = fold(leaf, self.num_leaves, self.held)
        value, first, end = self.values[leaf], leaf, leaf + 1
        for sibling in chain:
            other = self.held.pop(sibling)
            left, right = (other, value) if sibling.first < first else (value, other)
            value = plus(left, right)
            first, end = min(first, sibling.first), max(end, sibling.end)
        assert (first, end) == result
        self.held[result] = value
        # The leaf's own sum is made in a free place before those that went into it are given up.
        self.most = max(self.most, len(self.held) + len(chain))


def plus(left: str | None, right: str | None) -> str | None:
    if left is None or right is None:
        return right if left is None else left
    return f"({left}+{right})"


def evaluate(tree: Sum, held: dict[Node, str | None]) -> str | None:
    if isinstance(tree, Node):
        return held[tree]
    return plus(evaluate(tree[0], held), evaluate(tree[1], held))


leaves = st.integers(min_value=1, max_value=40)


@given(leaves, st.integers(1, 6), st.data())
def test_any_order_on_any_workers_makes_the_expression_of_the_tree(
    count: int, num_workers: int, data: st.DataObject
) -> None:
    absent = data.draw(st.sets(st.integers(0, count - 1)))
    values = [None if leaf in absent else str(leaf) for leaf in range(count)]
    order = data.draw(st.permutations(range(count)))
    owners = data.draw(st.lists(st.integers(0, num_workers - 1), min_size=count, max_size=count))
    workers = [Worker(count, values) for _ in range(num_workers)]
    for leaf in order:
        workers[owners[leaf]].take(leaf)
    held = {node: value for worker in workers for node, value in worker.held.items()}
    assert sorted(leaf for node in held for leaf in range(*node)) == list(range(count)), "every leaf once"

    expected = combine(values, lambda left, right: f"({left}+{right})")
    assert evaluate(sum_of(Node(0, count), held), held) == expected
    # An absent node is one in which no leaf has a value: taking it out changes nothing.
    present = without_absent(
        sum_of(Node(0, count), held), lambda node: any(values[leaf] is not None for leaf in range(*node))
    )
    assert (None if present is None else evaluate(present, held)) == expected


@given(leaves, st.data())
def test_a_run_of_neighbours_never_holds_more_sums_than_there_is_room_for(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(first + 1, count))
    worker = Worker(count, [str(leaf) for leaf in range(count)])
    for leaf in range(first, end):
        worker.take(leaf)
        assert worker.most <= max_partial_sums(count)


@given(st.integers(0, 10), st.integers(0, 6), st.data())
def test_an_aligned_run_ends_as_one_sum_and_holds_a_logarithm_of_them(
    log_leaves: int, log_run: int, data: st.DataObject
) -> None:
    log_run = min(log_run, log_leaves)
    size = 1 << log_run
    first = size * data.draw(st.integers(0, (1 << (log_leaves - log_run)) - 1))
    worker = Worker(1 << log_leaves, [str(leaf) for leaf in range(1 << log_leaves)])
    most = 0
    for leaf in range(first, first + size):
        worker.take(leaf)
        most = max(most, len(worker.held))
    assert list(worker.held) == [Node(first, first + size)]
    assert most <= log_run + 1


@given(st.integers(0, 1000), st.integers(2, 1000))
def test_a_node_is_split_at_the_largest_power_of_two_below_its_length(first: int, length: int) -> None:
    left, right = split(Node(first, first + length))
    size = left.end - left.first
    assert (left.first, left.end, right.end) == (first, right.first, first + length)
    assert size & (size - 1) == 0
    assert size < length <= 2 * size


def test_known_trees_are_as_documented() -> None:
    def written(count: int) -> str | None:
        return combine([str(leaf) for leaf in range(count)], lambda left, right: f"({left}+{right})")

    assert written(0) is None
    assert written(1) == "0"
    assert written(5) == "(((0+1)+(2+3))+4)"
    assert written(8) == "(((0+1)+(2+3))+((4+5)+(6+7)))"


def test_a_missing_leaf_is_named() -> None:
    with pytest.raises(ValueError, match="micro-batch 3 of \\(0, 4\\) is in no partial sum"):
        sum_of(Node(0, 4), [Node(0, 2), Node(2, 3)])
