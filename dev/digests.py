"""The digests of every job of the tests, step by step: written before the house is moved, compared after.

python dev/digests.py --write     into dev/digests.json
python dev/digests.py             compares; exit status 1 where a bit differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch._dynamo

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.cases import CASES
from tests.training import run_team, train

TABLE = Path(__file__).with_suffix(".json")
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "bf16 wire": {"wire": "bf16"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "8-bit state": {"optimizer_state": "int8"},
    "8-bit activations": {"activations": "int8"},
    "recompute": {"activations": "recompute"},
    "rehearsal": {"device": "rehearsal"},
}


def digests() -> dict[str, object]:
    """Train every job in every variant."""
    table: dict[str, object] = {"instruction set": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    for name, case in CASES.items():
        for variant, settings in VARIANTS.items():
            try:
                (seen,) = run_team(1, lambda case=case, settings=settings: train(case, max_steps=4, **settings))
                table[f"{name} | {variant}"] = [digest[:16] for _, _, digest in seen]
            except AssertionError as error:
                table[f"{name} | {variant}"] = str(error).strip().splitlines()[-1].partition(":")[0]
    return table


def main() -> int:
    """Write or compare the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    table = digests()
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        return 0
    before = json.loads(TABLE.read_text(encoding="utf-8"))
    other = [name for name in before if table.get(name) != before[name]]
    print(f"{len(before) - len(other)} equal, {len(other)} other", *other, sep="\n  ")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
