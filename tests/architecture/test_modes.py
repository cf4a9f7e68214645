"""Each mode is asked for in few files, and all in few conditions. `python -m tests.architecture.modes` prints where."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.modes import (
    CONFINED,
    MAX_CONDITIONS,
    MAX_FILES,
    ROOT,
    WORDS,
    conditions,
    count,
    files_of,
    modes_of,
    words_of,
)


@pytest.mark.parametrize("mode", CONFINED)
def test_a_mode_is_asked_for_in_few_files(mode: str) -> None:
    files = files_of(count()[0], mode)
    assert len(files) <= MAX_FILES, files


def test_modes_are_asked_for_in_few_conditions() -> None:
    assert count()[1] <= MAX_CONDITIONS, "ask what owns the answer, rather than for the mode"


def test_every_mode_has_words_that_the_source_knows() -> None:
    known = {word for path in ROOT.rglob("*.py") for word in words_of(ast.parse(path.read_text(encoding="utf-8")))}
    assert [mode for mode, words in WORDS.items() if not words & known] == [], "a mode that was renamed counts nothing"


def named(text: str) -> list[list[str]]:
    return [modes_of(condition) for condition in conditions(ast.parse(text))]


def test_a_condition_is_counted_once_whatever_it_is_made_of() -> None:
    assert named("if a and self._sharded or placement == 'zero3': pass") == [["sharded"]]
    assert named("x = self._early or self._sharded_weights or weights") == [["sharded", "early"]]
    assert named("y = [1 for b in c if len(self._hosts) > 1] if device.has_own_memory else 2") == [
        ["own memory"],
        ["one host"],
    ]
    assert named("if rank == 0: pass\nif rank == 1: pass\nz = f(sharded=sharded)") == [["leader"], []]
