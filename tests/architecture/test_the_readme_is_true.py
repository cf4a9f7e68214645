"""The README's snippets compile, use names that exist, and its tree lists the rooms that there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightwork
from lightwork.run.run import Run

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in FENCES if language == "python"]
TREE = next((text for _, text in FENCES if text.startswith("src/lightwork/")), "")


def test_there_are_snippets_and_a_tree() -> None:
    assert SNIPPETS
    assert TREE


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_compiles_and_uses_what_exists(snippet: str) -> None:
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "lightwork":
                assert node.attr in lightwork.__all__
            elif node.value.id == "run":
                assert node.attr in dir(Run)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lightwork.distribute":
            parameters = lightwork.distribute.__kwdefaults__.keys() | {"global_batch"}
            assert {keyword.arg for keyword in node.keywords} <= parameters


def test_the_first_snippet_trains(tmp_path: Path) -> None:
    names = """\
import torch
def Net(): return torch.nn.Linear(6, 3)
def MyDataset(): return torch.utils.data.TensorDataset(torch.randn(512, 6), torch.randint(0, 3, (512,)))
"""
    (tmp_path / "train.py").write_text(names + SNIPPETS[0])
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(step) for step in range(6)]
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir())


def test_the_tree_lists_the_rooms() -> None:
    listed = re.findall(r"^[├└]── (\w+)/", TREE, flags=re.MULTILINE)
    package = REPOSITORY / "src" / "lightwork"
    assert sorted(listed) == sorted(path.parent.name for path in package.glob("*/__init__.py"))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target
