"""What the documents name exists: files, notes, tests; and the glossary's words are those of the source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightwork.spec import holdings
from tests.architecture.test_notes import all_notes

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ("docs/design.md", "docs/glossary.md", "CONTRIBUTING.md")
FILES = [path.as_posix() for top in ("src", "tests", "benchmarks", "dev") for path in REPOSITORY.glob(f"{top}/**/*.py")]

#: What the examples of CONTRIBUTING would add.
IMAGINED = {"device/other.py", "transport/other.py"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (REPOSITORY / document).read_text(encoding="utf-8")))
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in FILES)}
    assert missing - IMAGINED == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_note_that_a_document_names_exists(document: str) -> None:
    text = re.sub(r"\s+", " ", (REPOSITORY / document).read_text(encoding="utf-8"))
    assert set(re.findall(r"\[Note: ([^\]]+)\]", text)) - {"title"} - all_notes()[0].keys() == set()


def test_the_five_tensors_and_four_places_of_the_glossary_are_those_of_the_note() -> None:
    _, _, note = (holdings.__doc__ or "").partition("[Note: five tensors, four places]\n")
    words = re.findall(r"^ {4}(\w[\w ]*?) {2,}((?:.+\n?)(?: {20,}.+\n?)*)", note, flags=re.MULTILINE)
    assert len(words) == 9
    glossary = (REPOSITORY / "docs/glossary.md").read_text(encoding="utf-8")
    for word, meaning in words:
        assert f"| {word} | {' '.join(meaning.split())}" in glossary
