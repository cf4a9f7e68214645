"""Where the package asks for a mode: the conditions that name one. Run as a script it prints the table.

A condition is what `if`, `elif`, `while`, a ternary or a comprehension tests, or `and` and `or` elsewhere. It names a
mode when one of the mode's words stands in it: as a name, an attribute or a string. A mode's files are those with such
a condition; passing a mode on, or declaring it, is none.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lightwork

ROOT = Path(lightwork.__file__).parent

#: The words of each mode, without leading underscores. `len(x)` stands for the length of x.
WORDS: dict[str, set[str]] = {
    "own memory": {"has_own_memory", "has_device", "memories"},
    "late": {"is_late", "reads_late"},
    "sharded": {"sharded", "sharded_weights", "serves_weights", "placement", "zero1", "zero2", "zero3", "replicate"}
    | {"weights_carrier", "is_sharded", "shards_weights"},
    "narrow": {"narrow", "is_narrow", "is_low", "precision", "bf16", "fp16", "all_working"},
    "one host": {"len(hosts)", "num_hosts", "carrier", "exchange", "several", "direct", "is_last_of_host"},
    "streamed": {"streamed", "is_streamed", "streams_weights", "comes_and_goes", "staging", "sources"},
    "early": {"early", "updates_in_backward"},
    "place": {"in_units", "elsewhere", "on_disk", "on_device", "beside_device"} | {"is_on_disk", "is_on_device"},
    "leader": {"is_leader", "is_main", "rank == 0", "rank != 0", "local_rank == 0"},
    "kind of device": {"cpu", "cuda", "rehearsal"},
}

#: Those that at most `MAX_FILES` files may ask for.
CONFINED = ("own memory", "late", "sharded", "narrow", "one host", "streamed", "early")
MAX_FILES = 4
MAX_CONDITIONS = 80


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield every condition once: the whole of it, not its parts."""
    inside: set[int] = set()
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            found = [node.test]
        elif isinstance(node, ast.comprehension):
            found = node.ifs
        elif isinstance(node, ast.BoolOp) and id(node) not in inside:
            found = [node]
        for condition in found:
            inside.update(id(part) for part in ast.walk(condition))
            yield condition


def words_of(condition: ast.AST) -> set[str]:
    """Return names, attributes and strings in a condition, lengths, and comparisons."""
    words: set[str] = set()
    for node in ast.walk(condition):
        if isinstance(node, ast.Name | ast.Attribute):
            words.add(last_name(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
            words.add(f"len({last_name(node.args[0])})")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            sign = "==" if isinstance(node.ops[0], ast.Eq) else "!="
            words.add(f"{last_name(node.left)} {sign} {ast.unparse(node.comparators[0])}")
    return words


def last_name(node: ast.expr) -> str:
    """Return the name, or the last attribute, without leading underscores."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_")


def modes_of(condition: ast.expr) -> list[str]:
    """Return the modes that a condition names."""
    words = words_of(condition)
    return [mode for mode, of_mode in WORDS.items() if words & of_mode]


def count() -> tuple[dict[str, Counter[str]], int]:
    """Return the conditions by file and mode, and how many name a mode at all."""
    table: dict[str, Counter[str]] = {}
    total = 0
    for path in sorted(ROOT.rglob("*.py")):
        of_file = [modes_of(condition) for condition in conditions(ast.parse(path.read_text(encoding="utf-8")))]
        total += sum(bool(modes) for modes in of_file)
        if counter := Counter(mode for modes in of_file for mode in modes):
            table[path.relative_to(ROOT).as_posix()] = counter
    return table, total


def files_of(table: dict[str, Counter[str]], mode: str) -> list[str]:
    """Return the files that ask for a mode."""
    return [name for name, counter in table.items() if counter[mode]]


def print_table() -> None:
    """Print conditions by file and by mode."""
    table, total = count()
    for name, counter in sorted(table.items(), key=lambda item: -item[1].total()):
        print(f"{counter.total():4d}  {name:38s} {', '.join(f'{mode} {n}' for mode, n in counter.most_common())}")
    print(f"\n{total} conditions name a mode, in {len(table)} files (at most {MAX_CONDITIONS})")
    for mode in WORDS:
        files = files_of(table, mode)
        limit = f" (at most {MAX_FILES})" if mode in CONFINED else ""
        print(f"{sum(counter[mode] for counter in table.values()):4d}  {mode}: {len(files)} files{limit}")


if __name__ == "__main__":
    print_table()
