"""The rooms stand in rows: one imports only from the rows below it, never from a sibling."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightwork

ROOT = Path(lightwork.__file__).parent

ROWS = (
    ("errors", "notice", "units", "trace", "random"),
    ("spec", "device"),
    ("transport", "store"),
    ("team",),
    ("state", "data", "planner"),
    ("engine", "checkpoint", "membership", "tuner", "checker"),
    ("run", "launcher", "observer"),
    ("cli",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}

#: Who may import what the rows do not allow, and why.
EXCEPTIONS = {
    ("launcher/local.py", "lightwork.distribute"),  # every worker needs it, so it is imported before they are forked
    ("units.py", "lightwork.errors"),  # row 0: what says that a text is not a quantity
    ("__main__.py", "lightwork.cli.main"),  # above all rows
}

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MODULES = [name for name in FILES if name != "__init__.py"]  # the package's root is above all rows


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of this package that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "lightwork")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "a relative import"
            elif node.module == "lightwork":
                yield from (f"lightwork.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("lightwork."):
                yield node.module


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_has_a_row() -> None:
    rooms = {Path(name).parts[0].removesuffix(".py") for name in FILES} - {"__init__", "__main__"}
    assert rooms <= ROW_OF.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_room_and_the_rows_below(name: str) -> None:
    own = Path(name).parts[0].removesuffix(".py")
    for module in imports(ast.parse((ROOT / name).read_text())):
        if (name, module) in EXCEPTIONS:
            continue
        theirs = room_of(module)
        assert theirs in ROW_OF, f"{name} imports {module}"
        assert theirs == own or ROW_OF[theirs] < ROW_OF[own], f"{name} imports {module}"


def test_the_exceptions_are_still_needed() -> None:
    for name, module in EXCEPTIONS:
        assert module in set(imports(ast.parse((ROOT / name).read_text()))), f"{name} does not import {module}"


def test_nothing_imports_what_another_module_keeps_to_itself() -> None:
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightwork"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert private == [], f"{name} imports {private} from {node.module}"
