"""lightwork trains a PyTorch model data-parallel on a team of workers: the same weights, bit for bit, for any team."""

from lightwork.checkpoint.checkpoint import Checkpoint, load
from lightwork.errors import (
    CheckpointError,
    DataError,
    Disagreement,
    LightworkError,
    MemoryFull,
    NonFiniteLoss,
    RankFailed,
    RankLost,
    SpecError,
    TeamError,
    UsageError,
)
from lightwork.run.distribute import distribute
from lightwork.run.evaluation import Evaluation
from lightwork.run.run import Run
from lightwork.run.step import Step
from lightwork.spec.plan import Plan
from lightwork.spec.spec import Spec

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DataError",
    "Disagreement",
    "Evaluation",
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
    "load",
]
