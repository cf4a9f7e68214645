"""Rounding to 8 bits: how far off, and that what was rounded once stays as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightwork.state.eight_bit import GROUP, num_scales, restore_into, round_into


def through(source: torch.Tensor, *, square: bool) -> torch.Tensor:
    values, scales = torch.empty(source.numel(), dtype=torch.uint8), torch.empty(num_scales(source.numel()))
    round_into(values, scales, source, square=square)
    target = torch.empty_like(source)
    restore_into(target, values, scales, square=square)
    return target


def numbers(seed: int, size: int, exponents: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(*exponents, (size,), generator=generator).float()
    return torch.randn(size, generator=generator) * 2.0**spread


sizes = st.sampled_from([1, 7, 255, 256, 257, 1000])


@given(st.integers(0, 1000), sizes, st.booleans())
def test_a_value_that_was_rounded_is_rounded_to_itself(seed: int, size: int, square: bool) -> None:
    source = numbers(seed, size, (-20, 10))
    once = through(source.square() if square else source, square=square)
    assert torch.equal(through(once, square=square), once)


@given(st.integers(0, 1000), sizes)
def test_a_first_moment_is_off_by_at_most_a_127th_of_the_largest_of_its_group(seed: int, size: int) -> None:
    source = numbers(seed, size, (-3, 3))
    groups = torch.nn.functional.pad(source, (0, -size % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True).expand_as(groups).reshape(-1)[:size]
    assert bool(((through(source, square=False) - source).abs() <= largest / 127).all())


@given(st.integers(0, 1000), sizes)
def test_a_second_moment_is_never_made_smaller(seed: int, size: int) -> None:
    source = numbers(seed, size, (-12, 3)).square()
    back = through(source, square=True)
    assert bool((back >= source * (1 - 1e-6)).all())
    assert bool((back[source > 0] > 0).all())


@pytest.mark.parametrize("square", [False, True])
def test_nothing_stays_nothing(square: bool) -> None:
    assert torch.equal(through(torch.zeros(300), square=square), torch.zeros(300))
