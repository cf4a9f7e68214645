"""What a newcomer is told beside the memory that all share: where the run is, and what its script has set and kept.

It is a file of tensors in memory, with the rest as JSON in a tensor of its own; the newcomer opens it by the descriptor
of the worker that wrote it. So it takes no room before it is needed, and there is no bound to what a script keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import final

import torch

from lightwork.checkpoint.description import from_values, to_values
from lightwork.checkpoint.tensors import TensorFile, TensorWriter, in_file_order
from lightwork.engine.engine import Engine
from lightwork.run.calls import Calls
from lightwork.run.course import Course
from lightwork.run.saves import Saves
from lightwork.state.items import Plain, windows
from lightwork.team.team import Team

#: The tensor that has the JSON.
_VALUES = "values"


@final
class HandOver:
    """It, of one run."""

    def __init__(self, team: Team, engine: Engine, saves: Saves, course: Course) -> None:
        self._team = team
        self._engine = engine
        self._saves = saves
        self._course = course
        self.calls = Calls(course)

    def write(self, exchanges: int) -> int:
        """Return a descriptor, the caller's, of what is to be known before the step that begins.

        Args:
            exchanges: between all, so far.
        """
        tensors: dict[str, torch.Tensor] = {}
        description = self._saves.describe({}, within_loop=True)._replace(unfinished=None)
        values = {
            **to_values(description, tensors),
            "exchanges": exchanges,
            "evaluations": self._course.num_evaluations,
            "calls": self.calls.noted(tensors),
            "firsts": self._team.rendezvous.num_firsts,
            "trainable": [p.requires_grad for p in self._engine.state.weights.parameters],
            "training": [module.training for module in self._engine.model.modules()],
        }
        tensors[_VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
        items = in_file_order(Plain(name, tensor) for name, tensor in tensors.items())
        fd = os.memfd_create("lightwork-handover")
        try:
            with contextlib.closing(TensorWriter(Path(f"/proc/self/fd/{fd}"), items)) as file:
                for window in windows(items):
                    for piece in window:
                        file.write(piece.read())
        except BaseException:
            os.close(fd)
            raise
        return fd

    def take(self, path: str) -> int:
        """Be where the run is, by what was handed over at `path`; return the exchanges so far.

        Raises: OSError when who wrote it is gone.
        """
        tensors = dict(TensorFile(Path(path)))
        values = json.loads(tensors.pop(_VALUES).numpy().tobytes())
        description = from_values(values, tensors)
        trained, model = self._engine.trained, self._engine.model
        for parameter, flag in zip(self._engine.state.weights.parameters, values["trainable"], strict=True):
            parameter.requires_grad_(flag)
        for module, flag in zip(model.modules(), values["training"], strict=True):
            module.training = flag
        trained.extra.write(description.extra)
        trained.set_groups(description.settings.groups)
        trained.accept()
        self._saves.resume(description)
        self._course.num_evaluations = values["evaluations"]
        self.calls.take(values["calls"], tensors)
        self._team.rendezvous.num_firsts = values["firsts"]
        return int(values["exchanges"])
