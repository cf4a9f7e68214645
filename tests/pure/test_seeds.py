"""Derived seeds: in range, stable, and unrelated for different paths."""

from hypothesis import given
from hypothesis import strategies as st

from lightwork.random import derive

paths = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=8), max_size=4)


@given(seed=st.integers(0, 2**63 - 1), path=paths, other=paths)
def test_different_paths_have_different_seeds_in_range(seed, path, other):
    assert 0 <= derive(seed, *path) < 2**63
    assert (derive(seed, *path) == derive(seed, *other)) == (path == other)


def test_neighbouring_paths_that_read_alike_are_told_apart():
    alike = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", 2), (1, "2"), ("1i2;",), (), ("",)]
    assert len({derive(0, *path) for path in alike}) == len(alike)


def test_seeds_are_those_of_every_earlier_version():
    assert derive(0, "a", 1) == 7137039317012018303
    assert derive(2**63 - 1) == derive(2**63 - 1)


def test_bits_are_balanced():
    values = [derive(0, "sample", 0, i) for i in range(2000)]
    for bit in range(63):
        assert 800 < sum(value >> bit & 1 for value in values) < 1200
