"""Spec, plan and roster as JSON, and what can not be built."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightwork.errors import SpecError
from lightwork.spec.plan import Plan
from lightwork.spec.roster import Roster
from lightwork.spec.spec import BufferRule, Precision, Spec, choose_micro_batch, differences

specs = st.builds(
    lambda micro, times, **rest: Spec(global_batch=micro * times, micro_batch=micro, **rest),
    st.integers(1, 64),
    st.integers(1, 64),
    seed=st.integers(0, 2**63 - 1),
    precision=st.sampled_from(get_args(Precision)),
    clip_grad_norm=st.none() | st.floats(min_value=1e-6, max_value=1e6),
    threads=st.integers(1, 8),
    fp32_modules=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    buffers=st.dictionaries(st.text(max_size=8), st.sampled_from(get_args(BufferRule)), max_size=3),
    optimizer=st.text(max_size=12),
)
plans = st.builds(
    Plan,
    world_size=st.integers(1, 64),
    shared_memory=st.sampled_from(["anonymous", "file"]),
    steal=st.booleans(),
    trace=st.booleans(),
)


@given(specs)
def test_a_spec_is_read_back_as_it_was_written(spec: Spec) -> None:
    assert Spec.from_json(spec.to_json()) == spec
    assert differences(spec, Spec.from_json(spec.to_json())) == {}
    assert list(json.loads(spec.to_json())) == sorted(json.loads(spec.to_json()))


@given(plans)
def test_a_plan_is_read_back_as_it_was_written(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_differences_name_the_field_and_both_values() -> None:
    a, b = Spec(global_batch=8, micro_batch=2), Spec(global_batch=8, micro_batch=4, seed=1)
    assert differences(a, b) == {"micro_batch": (2, 4), "seed": (0, 1)}


def test_neither_can_be_changed() -> None:
    for value, field in ((Spec(global_batch=8, micro_batch=2), "seed"), (Plan(), "steal")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, 1)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_micro_batch_divides_or_the_nearest_that_do_are_named(global_batch: int, micro_batch: int) -> None:
    assert choose_micro_batch(global_batch, None) == math.ceil(global_batch / 8)
    if global_batch % micro_batch == 0:
        assert choose_micro_batch(global_batch, micro_batch) == micro_batch
    elif micro_batch < global_batch:
        below = global_batch // micro_batch * micro_batch
        with pytest.raises(SpecError, match=rf"Nearest: {below} or {below + micro_batch}\."):
            choose_micro_batch(global_batch, micro_batch)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"global_batch": True}, "global_batch=True is not a positive whole number"),
        ({"global_batch": 2.0}, "global_batch=2.0 is not"),
        ({"micro_batch": "2"}, "micro_batch='2' is not"),
        ({"seed": "x"}, "seed='x' is not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm=nan is not a positive number"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm='1' is not a positive number"),
        ({"buffers": {"a": "middle"}}, "buffers['a']='middle' is not a rule"),
    ],
)
def test_a_value_of_another_kind_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as raised:
        Spec(**{"global_batch": 8, "micro_batch": 2, **values})
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"world_size": 0}, "world_size=0 is not a positive whole number"),
        ({"offload": "disk"}, "offload='disk' is not a choice by part"),
        ({"offload": {"optimizer": "moon"}}, "the places host, disk"),
        ({"placement": "zero9"}, "placement='zero9' is not known"),
        ({"memory": "much"}, "'much' is not a number of bytes"),
        ({"transport": 5}, "transport=5 is not known"),
        ({"transport": "pigeon"}, "transport='pigeon' is not known"),
        ({"shared_memory": "disk"}, "shared_memory='disk' is not known. Choose one of anonymous, file"),
        ({"steal": "no"}, "steal='no' is neither true nor false"),
        ({"trace": 1}, "trace=1 is neither true nor false"),
    ],
)
def test_an_impossible_plan_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as raised:
        Plan(**values)
    assert words in str(raised.value)


@pytest.mark.parametrize("read", [Spec.from_json, Plan.from_json])
def test_an_unknown_field_is_named(read: Any) -> None:
    with pytest.raises(SpecError, match="does not know: colour"):
        read(
            '{"colour": "red", "global_batch": 8, "micro_batch": 2}' if read == Spec.from_json else '{"colour": "red"}'
        )


def test_a_roster_lists_its_members() -> None:
    roster = Roster(((0,), (1,)), generation=3)
    assert json.loads(roster.to_json(["a", "b"], [7, 8])) == {
        "generation": 3,
        "members": [{"rank": 0, "host": "a", "pid": 7}, {"rank": 1, "host": "b", "pid": 8}],
    }
