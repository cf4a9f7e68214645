"""The assignment: own micro-batches first, then those of the worker that has most left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightwork.spec.assignment import choose, share

counts = st.integers(min_value=1, max_value=50)


@given(counts, counts)
def test_shares_cover_every_micro_batch_once_in_runs_of_nearly_equal_length(world_size: int, num: int) -> None:
    shares = [share(rank, world_size, num) for rank in range(world_size)]
    assert [index for part in shares for index in part] == list(range(num)), "contiguous, by rank, each once"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(counts, st.data())
def test_own_micro_batches_come_first_and_then_any_that_is_free(world_size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    claims = data.draw(st.lists(st.integers(0, world_size), min_size=1, max_size=50))
    free = [index for index, claim in enumerate(claims) if not claim]
    own = [index for index in free if index in share(rank, world_size, len(claims))]
    assert choose(rank, world_size, claims, steal=False) == own
    chosen = choose(rank, world_size, claims, steal=True)
    assert chosen == own if own else sorted(chosen) == free


@given(st.integers(2, 12), st.data())
def test_a_thief_takes_the_last_of_the_worker_with_most_left(world_size: int, data: st.DataObject) -> None:
    claims = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=50))
    rank = data.draw(st.integers(0, world_size - 1))
    for index in share(rank, world_size, len(claims)):
        claims[index] = 1
    left = [
        [index for index in share(other, world_size, len(claims)) if not claims[index]] for other in range(world_size)
    ]
    chosen = choose(rank, world_size, claims, steal=True)
    if any(left):
        most = max(left, key=len)
        assert chosen[: len(most)] == most[::-1]
    else:
        assert chosen == []
