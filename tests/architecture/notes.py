"""Notes: a block of text with a title, to which lines of the source refer.

defined   `[Note: title]` alone on a line of a comment or docstring with text on the next line, or as a heading of a
          Markdown file
cited     `[Note: title]` anywhere else in the source: behind code, within a sentence, or as a comment of one line
"""

from __future__ import annotations

import re

_NOTE = re.compile(r"\[Note: ([^\]]+)\]")
_ALONE = re.compile(r"\s*(#*)\s*\[Note: ([^\]]+)\]\s*")


def notes_of(text: str, *, is_markdown: bool = False) -> tuple[list[str], list[str]]:
    """Return the titles of the notes that a text defines, and of those that it cites."""
    defined: list[str] = []
    cited: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        alone = _ALONE.fullmatch(line)
        following = lines[number + 1].strip() if number + 1 < len(lines) else ""
        if (alone and is_markdown and alone[1]) or (
            alone and not is_markdown and following.strip("# ") and following.startswith("#") == bool(alone[1])
        ):
            defined.append(alone[2])
        else:
            cited += _NOTE.findall(line)
    return defined, cited
