"""What files, functions and classes of the package measure, and the limits. As a script it prints what is above them.

file         lines
function     lines of its body from the first statement after the docstring to the last, what is nested included
constructor  arguments but `self`: of `__init__`, or the fields of a dataclass that it takes
class        public methods and properties (a property that can be set counts once)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lightwork

ROOT = Path(lightwork.__file__).parent
LIMITS = {"file": 400, "function": 60, "constructor": 8, "class": 15}

#: Dataclasses that are settings or records, with a name for each value: never built by position.
SETTINGS = {
    "checkpoint/settings.py Bookmark",
    "checkpoint/checkpoint.py Checkpoint",
    "spec/spec.py Spec",
    "spec/plan.py Plan",
    "team/environment.py Environment",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def measured() -> dict[str, dict[str, int]]:
    """Return what everything measures, by kind of limit."""
    found: dict[str, dict[str, int]] = {kind: {} for kind in LIMITS}
    for path in sorted(ROOT.rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found["file"][name] = len(text.splitlines())
        for of, node in definitions(ast.parse(text)):
            full = f"{name} {of}"
            if isinstance(node, ast.ClassDef):
                found["constructor"][full] = constructor_arguments(node) if full not in SETTINGS else 0
                found["class"][full] = public_methods(node)
            else:
                found["function"][full] = body_lines(node)
    return found


def excess() -> dict[str, dict[str, int]]:
    """Return what is above its limit."""
    return {kind: {name: n for name, n in of.items() if n > LIMITS[kind]} for kind, of in measured().items()}


def definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yield functions and classes with their dotted names."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, Function | ast.ClassDef):
            name = f"{inside}.{node.name}" if inside else node.name
            yield name, node
        yield from definitions(node, name)


def body_lines(function: Function) -> int:
    """Return the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def constructor_arguments(node: ast.ClassDef) -> int:
    """Return how many arguments make an object of a class."""
    for member in node.body:
        if isinstance(member, Function) and member.name == "__init__":
            arguments = member.args
            return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
        return sum("init=False" not in ast.unparse(f) and "ClassVar" not in ast.unparse(f.annotation) for f in fields)
    return 0


def public_methods(node: ast.ClassDef) -> int:
    """Return how many public methods and properties a class defines."""
    return len({member.name for member in node.body if isinstance(member, Function) and member.name[0] != "_"})


def print_excess() -> None:
    """Print what is above the limits, as the table of what is known."""
    for kind, above in excess().items():
        print(f'    "{kind}": {{')
        for name, number in above.items():
            print(f'        "{name}": {number},')
        print("    },")


if __name__ == "__main__":
    print_excess()
