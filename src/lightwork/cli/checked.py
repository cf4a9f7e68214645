"""What `lightwork check` runs in place of a script: the script, with notes of all that its first steps compute.

    python -m lightwork.cli.checked FOLDER STEPS SLOW SCRIPT ...

Each worker writes `FOLDER/rankR.jsonl`, a record for whatever `observer/findings` compares: the settings, the first
weights, and of each micro-batch the samples, the outputs of every module in the order of their calls, the loss, the
gradients, the buffers and the random state; of each step the weights. Values are told by a hash. After STEPS steps the
process ends. What the script saves by the run goes into FOLDER, and it goes on from no checkpoint.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from lightwork.data.batch import tensors
from lightwork.data.stream import StreamLoader
from lightwork.launcher.script import Script
from lightwork.observer.findings import PLAIN
from lightwork.random import RandomState
from lightwork.run import distribute as distributing
from lightwork.run.passes import Passes
from lightwork.run.plain import PlainRun, PlainStep
from lightwork.run.run import Run
from lightwork.run.step import Step
from lightwork.team.rendezvous import Progress
from lightwork.team.team import Team

_OWN = str(Path(__file__).parents[1]) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep

#: Times the steps that are asked for, of one run, while another has not made as many.
_MOST = 5

#: Seconds for which a worker that is to be late sleeps, so that others take over what falls to it.
_LATE = 1.5


class Recorder:
    """The notes of one process."""

    def __init__(self, folder: Path, num_steps: int, *, slow: int) -> None:
        self.folder = folder
        self._num_steps = num_steps
        self._slow = slow
        self._lines: list[str] = []
        self._place: dict[str, Any] | None = None  # of the micro-batch in hand
        self._calls = 0
        self._run = ""
        self._rank = 0
        self._models: dict[str, nn.Module] = {}
        self._random: dict[str, str] = {}
        self._done: dict[str, int] = {}

    def note(self, kind: str, **values: Any) -> None:
        """Write a record."""
        self._lines.append(json.dumps({"kind": kind, "run": self._run, **values}))

    def know(self, name: str, model: nn.Module) -> None:
        """Take note of a run that is not watched."""
        self._models[name] = model

    def watch(self, run: Run, model: nn.Module) -> None:
        """Listen to a run's model."""
        self._run, self._rank = run.run_dir.name, run.rank
        self._models[self._run] = model
        self.note(
            "run",
            spec=json.loads(run.spec.to_json()),
            num_micro_batches=run.spec.num_micro_batches,
            where=caller(),
            norms=[name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)],
            trained=[name for name, p in model.named_parameters() if p.requires_grad],
        )
        self.note("weights", step=-1, values=digests(model.named_parameters()))
        for name, module in model.named_modules():
            module.register_forward_hook(self._on_forward(name, self._run), with_kwargs=False)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._on_gradient(name, self._run))  # type: ignore[no-untyped-call]

    def _on_forward(self, name: str, run: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._place is not None and module.training:
                self.note(
                    "output",
                    **self._place,
                    call=self._calls,
                    module=name,
                    type=type(module).__name__,
                    where=where_of(module),
                    value=digest(output),
                    of=run,
                )
                self._calls += 1

        return note

    def _on_gradient(self, name: str, run: str) -> Any:
        def note(gradient: torch.Tensor) -> None:
            if self._place is not None:
                self.note("gradient", **self._place, parameter=name, value=digest(gradient), of=run)

        return note

    def name_of(self, model: nn.Module) -> str:
        """Return the name of the run that trains a model."""
        return next(name for name, of in self._models.items() if of is model)

    def begin(self, step: int, index: int, ids: Any, batch: Any, run: str, reads_stream: bool) -> None:
        """Note a micro-batch that the script is about to be given."""
        if self._rank == self._slow and step == 1:
            time.sleep(_LATE)
        self._run = run
        rows = {}
        for number, tensor in enumerate(tensors(batch)):
            per_row = tensor.dim() > 0 and len(tensor) == len(ids)
            rows[str(number)] = [digest(row) for row in tensor] if per_row else [digest(tensor)]
        self.note("batch", step=step, index=index, ids=[int(i) for i in ids], fields=rows, stream=reads_stream)
        self._place, self._calls = {"step": step, "index": index}, 0
        self._random = random_state()

    def end(self, loss: tuple[float, float, str] | None) -> None:
        """Note what the body of the loop has left of a micro-batch."""
        if self._place is None:
            return
        model = self._models[self._run]
        if loss is not None:
            self.note("loss", **self._place, value=loss[0], weight=loss[1], where=loss[2])
        self.note("buffers", **self._place, values=digests(model.named_buffers()))
        after = random_state()
        drawn = [name for name, value in after.items() if value != self._random[name]]
        self.note("random", **self._place, values=after, drawn=drawn)
        self._place = None

    def step_done(self, run: str, step: int, loss: float, settings: Any) -> None:
        """Note a step."""
        self._run = run
        model = self._models[self._run]
        self.note("weights", step=step, values=digests(model.named_parameters()))
        self.note("step", step=step, loss=loss, settings=settings)

    def measured(self, run: str, model: nn.Module, step: int, loss: float) -> None:
        """Note the loss and the size of each weight, for a comparison to rounding."""
        self._run = run
        sizes = {name: float(p.detach().double().norm()) for name, p in model.named_parameters()}
        self.note("sizes", step=step, loss=loss, values=sizes)

    def has_enough(self, run: str, step: int) -> bool:
        """Take note that a step has ended, and return whether every run of the script has made enough."""
        self._done[run] = step + 1
        fewest = min(self._done.get(name, 0) for name in self._models)
        return fewest >= self._num_steps or step + 1 >= _MOST * self._num_steps

    def body_done(self, run: str, step: int, team: Team) -> None:
        """End with the others when there were enough steps, of every run of the script."""
        if self.has_enough(run, step):
            self.write()
            team.meet("lightwork check (end)")
            team.report(Progress.BETWEEN)
            sys.stdout.flush()
            os._exit(0)

    def write(self) -> None:
        """Write the notes."""
        (self.folder / f"rank{self._rank}.jsonl").write_text("\n".join(self._lines) + "\n", encoding="utf-8")


class RecordedStep(Step):
    """A step whose micro-batches are noted."""

    recorder: Recorder

    def __iter__(self) -> Iterator[Any]:
        run = self.recorder.name_of(self._engine.model)
        reads_stream = isinstance(self._loader, StreamLoader)
        self._said: tuple[float, float, str] | None = None
        for batch in super().__iter__():
            self.recorder.begin(self.index, self.batch_index, self.sample_ids, batch, run, reads_stream)
            yield batch
            self.recorder.end(self._said)
            self._said = None
        settings = [  # of the optimizer
            {name: repr(value) for name, value in group.items() if name != "params"}
            for group in self._engine.optimizers.groups
        ]
        self.recorder.step_done(run, self.index, self.loss, settings)
        self.recorder.measured(run, self._engine.model, self.index, self.loss)

    def backward(self, loss: torch.Tensor, weight: float | None = None) -> None:
        """Note the loss, and go on."""
        super().backward(loss, weight)
        given = -1.0 if weight is None else float(weight)
        self._said = float(loss.detach()), given, caller()

    def check_finished(self) -> int:
        """End the process, if this was the last step."""
        wishes = super().check_finished()
        self.recorder.body_done(self.recorder.name_of(self._engine.model), self.index, self._team)
        return wishes


class MeasuredPlain(PlainRun):
    """The reference, of which losses and weights are noted."""

    recorder: Recorder
    folder_name: str

    def steps(self, data: Any, **options: Any) -> Iterator[PlainStep]:
        """Go through the data, and end the process after enough steps."""
        for step in super().steps(data, **options):
            yield step
            self.recorder.measured(self.folder_name, self.model, step.index, step.loss)
            if self.recorder.has_enough(self.folder_name, step.index):
                self.recorder.write()
                sys.stdout.flush()
                os._exit(0)


# --- hashes and places ------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return a hash of all tensors in a value."""
    hasher = hashlib.blake2b(digest_size=8)
    for tensor in tensors(value):
        if tensor.layout is torch.strided and not tensor.is_quantized:
            plain = tensor.detach().cpu().contiguous()
            hasher.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return hasher.hexdigest()


def digests(named: Any) -> dict[str, str]:
    """Return a hash of each named tensor."""
    return {name: digest(tensor) for name, tensor in named}


def random_state() -> dict[str, str]:
    """Return a hash of each generator's state."""
    state = RandomState.capture()
    values: Mapping[str, Any] = {
        "torch": state.torch_state.tolist(),
        "numpy": state.numpy_state,
        "random": state.python_state,
    }
    return {name: hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest() for name, value in values.items()}


def caller() -> str:
    """Return the line of the script that has called this package: FILE:LINE."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def where_of(module: nn.Module) -> str:
    """Return the line at which a module's forward begins, if it is none of torch's."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, FunctionType):  # a scripted module's
        return ""
    code = forward.__code__
    return "" if code.co_filename.startswith(_TORCH) else f"{code.co_filename}:{code.co_firstlineno}"


# --- the process ------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run the script under notes, and return its exit status."""
    folder, num_steps, slow, *rest = arguments
    script = Script(target=rest[0], arguments=tuple(rest[1:]))
    return record(Path(folder), int(num_steps), int(slow), script.run)


def record(folder: Path, num_steps: int, slow: int, body: Callable[[], int]) -> int:
    """Call `body`, whose runs are noted, and return what it does; the process ends after `num_steps` steps."""
    recorder = Recorder(folder, num_steps, slow=slow)
    RecordedStep.recorder = recorder
    Passes.step_class = RecordedStep
    plain_distribute, plain_save = distributing.distribute, Run.save
    number = 0

    def distribute(model: nn.Module, optimizer: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        name = options.get("name") or f"run-{number}"
        if slow == PLAIN:
            plain = MeasuredPlain(model, optimizer, **options)
            plain.recorder, plain.folder_name = recorder, name
            recorder.know(name, model)
            return plain
        options |= {"run_dir": recorder.folder / "runs" / name, "resume": None}
        run = plain_distribute(model, optimizer, **options)
        recorder.watch(run, model)
        return run

    def save(self: Run, path: Any = None, **options: Any) -> Path:
        return plain_save(self, recorder.folder / "runs" / "saved" / Path(str(path or "checkpoint")).name, **options)

    distributing.distribute = distribute
    vars(sys.modules["lightwork"])["distribute"] = distribute  # where a script finds it
    Run.save = save  # type: ignore[method-assign]
    status = body()
    recorder.write()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
