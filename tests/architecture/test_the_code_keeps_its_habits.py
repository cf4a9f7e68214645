"""What the package does not do: reflection, assertions, reading the environment in many places."""

from __future__ import annotations

import ast
import importlib
import subprocess
from pathlib import Path

import pytest

import lightwork

ROOT = Path(lightwork.__file__).parent
REPOSITORY = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

#: Attributes of objects that are the user's, of any class: asked for with a default.
REFLECTIONS = {
    ("run/run.py", "state_dict"),  # `keep` takes anything that has these two
    ("run/run.py", "load_state_dict"),
}


def calls(name: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", FILES)
def test_a_module_has_no_reflection(name: str) -> None:
    for call in calls(name):
        if not isinstance(call.func, ast.Name) or call.func.id not in ("hasattr", "getattr", "setattr", "eval", "exec"):
            continue
        asked = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else None
        allowed = call.func.id == "getattr" and len(call.args) == 3 and (name, asked) in REFLECTIONS
        assert allowed, f"{name}:{call.lineno} uses {call.func.id} for {asked!r}"


@pytest.mark.parametrize("name", FILES)
def test_a_module_raises_where_others_would_assert(name: str) -> None:
    found = [node.lineno for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Assert)]
    assert found == []


def environment_uses(name: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    ]


def test_one_module_reads_the_environment() -> None:
    readers = {name for name in FILES if environment_uses(name)}
    # The command starts itself again with one variable more, and takes that back.
    assert readers <= {"team/environment.py", "launcher/process.py", "launcher/again.py"}
    # The launcher writes what a worker will read.
    lines = (ROOT / "launcher/process.py").read_text().splitlines()
    for number in environment_uses("launcher/process.py"):
        assert "os.environ.update(" in lines[number - 1]


def test_what_is_public_is_importable_sorted_and_documented() -> None:
    assert lightwork.__all__ == sorted(lightwork.__all__)
    for name in lightwork.__all__:
        assert getattr(lightwork, name).__doc__, f"lightwork.{name} has no docstring"
    modules = {path.stem for path in ROOT.iterdir()}
    rest = {name for name in vars(lightwork) if not name.startswith("_")} - set(lightwork.__all__)
    assert rest <= modules, "what is not public has no public name"


def test_every_error_is_in_the_tree_of_their_docstring() -> None:
    errors = importlib.import_module("lightwork.errors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        assert f"{kind.__name__} " in (errors.__doc__ or "") or f"{kind.__name__}\n" in (errors.__doc__ or "")
        assert issubclass(kind, lightwork.LightworkError)
        assert kind.__name__ in lightwork.__all__


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if not (REPOSITORY / ".git").exists():
        pytest.skip("an unpacked archive, of which nothing says which files are the project's")
    assert listed.returncode == 0, listed.stderr
    return [REPOSITORY / name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


def test_no_text_names_a_path_of_one_machine() -> None:
    machine = ("/" + "work/", "/" + "root/", "/" + "home/")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for folder in machine:
            assert folder not in text, f"{path.relative_to(REPOSITORY)} names {folder}"
