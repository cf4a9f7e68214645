"""Checkpoints in the forms of others: what a plain script, torch.distributed or Hugging Face would have written.

    "torch"         a file of torch.save: "model", "optimizer" (a list for several), "step", "epoch", "kept".
                    `torch.load(weights_only=True)` reads it, and a plain loop goes on from it
    "dcp"           a folder of torch.distributed.checkpoint: "model", and "optimizer" by the names of parameters
    "huggingface"   the folder that the model's own `save_pretrained` makes: of a PEFT model the adapters alone

All hold the whole model in memory of one worker while they are written. Only lightwork's own form has the place in the
data, so that only from it a run goes on as if it had not stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from lightwork.checkpoint import folder as folders
from lightwork.checkpoint.settings import Settings
from lightwork.checkpoint.tensors import TensorFile
from lightwork.errors import CheckpointError
from lightwork.state.items import Item, Moment
from lightwork.state.optimizer_state import state_dict_of
from lightwork.state.optimizers import Optimizers
from lightwork.state.state import Meet, TrainedState

Format = Literal["lightwork", "torch", "dcp", "huggingface"]

#: What a path is called by default, in the run directory.
DEFAULT_NAMES: Mapping[str, str] = {
    "lightwork": "checkpoint",
    "torch": "checkpoint.pt",
    "dcp": "checkpoint-dcp",
    "huggingface": "huggingface",
}

#: A file that says of a folder in another's form that lightwork has written it, and may replace it.
_MARK = "lightwork.json"

#: The keys under which plain scripts keep a model's state dict.
_MODEL_KEYS = ("model", "state_dict", "model_state_dict")

_HF_INDEX = "model.safetensors.index.json"
_HF_FILES = ("model.safetensors", "adapter_model.safetensors")


@runtime_checkable
class _Pretrained(Protocol):
    """A model of Hugging Face's, or PEFT's."""

    def save_pretrained(self, save_directory: str, *, state_dict: Mapping[str, torch.Tensor]) -> object:
        """Write a folder."""


def save(
    path: Path,
    form: Format,
    model: nn.Module,
    state: TrainedState,
    settings: Settings | None,
    meet: Meet,
    *,
    is_leader: bool,
) -> str:
    """Write the trained state in the form of others; return what went wrong, if anything did.

    Every worker calls it and goes through the state; the one that has the `settings` writes.
    """
    problem = ""
    with state.reading("save", meet, is_leader=is_leader) as walk:
        items, aliases, _ = state.of_model()
        moments: list[Moment] = [] if form == "huggingface" else state.of_optimizer()
        whole: list[Item] = [*items, *moments]
        if settings is None:
            for _ in walk.through(whole):
                pass
            return problem
        values = {id(item): value for item, value in walk.copies(whole)}
        of_model = {item.name: values[id(item)] for item in items}
        of_model |= {alias: of_model[name] for alias, name in aliases.items()} | state.extra.read()
        found = [(moment, values[id(moment)]) for moment in moments]
    try:
        match form:
            case "torch":
                _save_file(path, _as_plain(of_model, found, state.optimizers, settings))
            case "dcp":
                _save_dcp(path, of_model, found, state.optimizers, settings)
            case _:
                _save_pretrained(path, model, of_model)
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{path} could not be written ({error}). What was there is kept."
    return problem


def check_format(form: str, model: nn.Module) -> None:
    """Raise CheckpointError when a model can not be saved in a form."""
    if form not in DEFAULT_NAMES:
        raise CheckpointError(f"format={form!r} is none that run.save knows. They are {', '.join(DEFAULT_NAMES)}.")
    if form == "huggingface" and not isinstance(_not_compiled(model), _Pretrained):
        raise CheckpointError(
            f"format='huggingface' is for models that have save_pretrained, and {type(model).__name__} has not. Take "
            "format='torch'."
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def _as_plain(
    model: Mapping[str, Any], moments: list[tuple[Moment, torch.Tensor]], optimizers: Optimizers, settings: Settings
) -> dict[str, Any]:
    states: dict[torch.Tensor, dict[str, Any]] = {}
    for moment, value in moments:
        states.setdefault(moment.parameter, {})[moment.entry.name] = moment.in_python(value)
    dicts = [state_dict_of(member, states) for member in optimizers.members]
    return {
        "model": dict(model),
        "optimizer": dicts[0] if len(dicts) == 1 else dicts,
        "step": settings.position.step,
        "epoch": settings.position.last_epoch if settings.position.outer is None else settings.position.outer,
        "kept": dict(settings.kept),
    }


def _save_file(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file of torch.save in place of one that is there, as a whole."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and format='torch' writes a file. Choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            torch.save(dict(value), file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            if isinstance(error, RuntimeError):  # how torch says that the disk is full
                raise OSError(str(error).splitlines()[0]) from error
            raise
    folders.sync(path.parent)


def _save_dcp(
    path: Path,
    model: Mapping[str, Any],
    moments: list[tuple[Moment, torch.Tensor]],
    optimizers: Optimizers,
    settings: Settings,
) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save as save_dcp  # half a second

    state: dict[str, dict[str, Any]] = {}
    names: dict[torch.Tensor, str] = {}
    for moment, value in moments:
        names[moment.parameter] = moment.of
        state.setdefault(moment.of, {})[moment.entry.name] = moment.in_python(value)
    groups = [{**group, "params": [names[p] for p in group["params"] if p in names]} for group in optimizers.groups]
    whole = {
        "model": dict(model),
        "optimizer": {"state": state, "param_groups": groups},
        "step": settings.position.step,
    }
    with folders.replaced(path, mark=_MARK) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.distributed is not initialised
            save_dcp(whole, checkpoint_id=str(folder), no_dist=True)
        _write_mark(folder)


def _save_pretrained(path: Path, model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    plain = _not_compiled(model)
    if not isinstance(plain, _Pretrained):
        raise CheckpointError(f"{type(plain).__name__} has no save_pretrained")
    with folders.replaced(path, mark=_MARK) as folder:
        plain.save_pretrained(str(folder), state_dict=values)
        _write_mark(folder)


def _write_mark(folder: Path) -> None:
    (folder / _MARK).write_text(json.dumps({"written by": "lightwork"}) + "\n", encoding="utf-8")


def _not_compiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


# --- reading ----------------------------------------------------------------------------------------------------------


def is_there(path: Path) -> bool:
    """Return whether a path looks like a checkpoint in the form of others."""
    return path.is_file() or any((path / name).exists() for name in (".metadata", _MARK, _HF_INDEX, *_HF_FILES))


def load_weights(path: Path) -> Mapping[str, Any] | None:
    """Return a model's state dict from a form of others, or None where there is none.

    Raises: CheckpointError when it is damaged.
    """
    try:
        if path.is_file():
            return TensorFile(path) if path.suffix == ".safetensors" else _from_file(path)
        if (path / ".metadata").exists():
            return _from_dcp(path)
        if (path / _HF_INDEX).exists():
            index = json.loads((path / _HF_INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: TensorFile(path / name) for name in sorted(set(index.values()))}
            return {name: files[file][name] for name, file in index.items()}
        for name in _HF_FILES:
            if (path / name).exists():
                return dict(TensorFile(path / name))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint in {path} can not be read ({error}). Use another one.") from error
    return None


def _from_file(path: Path) -> Mapping[str, Any]:
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    key = next((key for key in _MODEL_KEYS if isinstance(found.get(key), Mapping)), None)
    state: Mapping[str, Any] = found if key is None else found[key]
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} has no state dict of a model under {', '.join(_MODEL_KEYS)}.")
    return state


def _from_dcp(path: Path) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

    reader = FileSystemReader(str(path))
    found = reader.read_metadata().state_dict_metadata
    prefix = "model." if any(name.startswith("model.") for name in found) else ""
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_dcp(wanted, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}
