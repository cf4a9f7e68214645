"""Files, functions, constructors and classes stay small. `python -m tests.architecture.budget` prints what is not."""

from __future__ import annotations

import ast
from typing import cast

import pytest

from tests.architecture.budget import (
    LIMITS,
    SETTINGS,
    Function,
    body_lines,
    constructor_arguments,
    excess,
    measured,
    public_methods,
)


@pytest.mark.parametrize("kind", LIMITS)
def test_nothing_is_larger_than_its_limit(kind: str) -> None:
    assert excess()[kind] == {}, f"a {kind} has more than {LIMITS[kind]}: split it"


def test_settings_that_are_excepted_exist() -> None:
    assert measured()["constructor"].keys() >= SETTINGS


def test_a_body_is_counted_without_its_docstring() -> None:
    (function,) = ast.parse('def f():\n    """One\n    two."""\n    # three\n    a = 1\n\n    return a\n').body
    assert body_lines(cast(Function, function)) == 3
    (function,) = ast.parse('def f():\n    """One."""\n').body
    assert body_lines(cast(Function, function)) == 0


def test_what_makes_an_object_is_counted_without_self_and_constants() -> None:
    text = """
class A:
    def __init__(self, a, b=1, *, c): ...
    def run(self): ...
    @property
    def size(self): ...
    @size.setter
    def size(self, value): ...
    def _own(self): ...

@dataclass
class B:
    a: int
    b: int = 1
    c: int = field(init=False)
    d: ClassVar[int] = 3
"""
    a, b = (cast(ast.ClassDef, node) for node in ast.parse(text).body)
    assert (constructor_arguments(a), public_methods(a)) == (3, 2)
    assert (constructor_arguments(b), public_methods(b)) == (2, 0)
