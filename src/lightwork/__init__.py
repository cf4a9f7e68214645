"""lightwork trains a PyTorch model data-parallel on a team of workers: the same weights, bit for bit, for any team."""

import importlib as _importlib
import typing as _typing

from lightwork.errors import (
    CanNotJoin,
    CheckpointError,
    DamagedCheckpoint,
    DataError,
    Disagreement,
    HostLost,
    LightworkError,
    MemoryFull,
    NonFiniteLoss,
    RankFailed,
    RankLost,
    SpecError,
    TeamError,
    UsageError,
)

if _typing.TYPE_CHECKING:
    from lightwork.checkpoint.checkpoint import Checkpoint, load
    from lightwork.run.distribute import distribute
    from lightwork.run.evaluation import Evaluation
    from lightwork.run.run import Run
    from lightwork.run.step import Step
    from lightwork.spec.plan import Plan
    from lightwork.spec.spec import Spec
    from lightwork.team.first import first, rank, world_size

__version__ = "0.1.0"

__all__ = [
    "CanNotJoin",
    "Checkpoint",
    "CheckpointError",
    "DamagedCheckpoint",
    "DataError",
    "Disagreement",
    "Evaluation",
    "HostLost",
    "LightworkError",
    "MemoryFull",
    "NonFiniteLoss",
    "Plan",
    "RankFailed",
    "RankLost",
    "Run",
    "Spec",
    "SpecError",
    "Step",
    "TeamError",
    "UsageError",
    "distribute",
    "first",
    "load",
    "rank",
    "world_size",
]

#: Where the names are that need torch. They are imported when one is first asked for: the command begins without.
_HOMES = {
    "Checkpoint": "lightwork.checkpoint.checkpoint",
    "Evaluation": "lightwork.run.evaluation",
    "Plan": "lightwork.spec.plan",
    "Run": "lightwork.run.run",
    "Spec": "lightwork.spec.spec",
    "Step": "lightwork.run.step",
    "distribute": "lightwork.run.distribute",
    "first": "lightwork.team.first",
    "load": "lightwork.checkpoint.checkpoint",
    "rank": "lightwork.team.first",
    "world_size": "lightwork.team.first",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightwork' has no attribute {name!r}")
    for public, home in _HOMES.items():
        globals()[public] = vars(_importlib.import_module(home))[public]
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
