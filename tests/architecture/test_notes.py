"""Lines of the source cite notes that exist, once, and every note is cited."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import lightwork
from tests.architecture.notes import notes_of

REPOSITORY = Path(__file__).parents[2]


def all_notes() -> tuple[Counter[str], dict[str, str]]:
    """Return how often each note is defined, and a place that cites it."""
    defined: Counter[str] = Counter()
    cited: dict[str, str] = {}
    for path in sorted(Path(lightwork.__file__).parent.rglob("*.py")):
        own, others = notes_of(path.read_text(encoding="utf-8"))
        defined.update(own)
        cited.update(dict.fromkeys(others, path.name))
    for path in sorted((REPOSITORY / "docs").rglob("*.md")):
        defined.update(notes_of(path.read_text(encoding="utf-8"), is_markdown=True)[0])
    return defined, cited


def test_every_note_that_is_cited_is_defined_once() -> None:
    defined, cited = all_notes()
    assert {title: place for title, place in cited.items() if not defined[title]} == {}, "no block defines these"
    assert [title for title, times in defined.items() if times > 1] == [], "defined in several places"


def test_every_note_is_cited_from_a_line_that_it_governs() -> None:
    defined, cited = all_notes()
    assert sorted(defined.keys() - cited.keys()) == []


def test_a_block_defines_and_all_else_cites() -> None:
    source = '''"""A module.

[Note: in a docstring]
Text.
"""

# [Note: in a comment]
# Text.
x = 1  # [Note: behind code]
# [Note: of one line]
y = 2
# See [Note: within a sentence] for why,
# and more.
'''
    assert notes_of(source) == (
        ["in a docstring", "in a comment"],
        ["behind code", "of one line", "within a sentence"],
    )
    assert notes_of("### [Note: a heading]\n\nText, see [Note: another].\n", is_markdown=True) == (
        ["a heading"],
        ["another"],
    )
