"""A checkpoint: a folder with a manifest and three tensor files.

    manifest.json           format, spec, position in the data, hyper-parameters, kept objects, aliases of tied tensors
    model.safetensors       the model's state dict: fp32 weights, buffers
    optimizer.safetensors   "PARAMETER|ENTRY": the optimizer's state of each parameter
    kept.safetensors        tensors of the objects given to `run.keep`

It does not depend on how many workers wrote it. A folder is written beside its final place and renamed, so that a
reader sees the old one or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightwork.checkpoint.values import put_together, take_apart
from lightwork.errors import CheckpointError
from lightwork.spec.spec import Spec

FORMAT = 1

_TENSOR_FILES = ("model", "optimizer", "kept")

#: Between a parameter's name and the state entry's, in optimizer.safetensors.
SEPARATOR = "|"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in its data a run is: after `step` updates in all."""

    step: int = 0
    call: int = 0  #: how many calls of run.steps came before the present one
    steps_in_call: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass
class Checkpoint(Mapping[str, torch.Tensor]):
    """What `lightwork.load` returns: a mapping of the model's tensors by name, ready for `model.load_state_dict`.

    Everything else that a run needs to go on is in its attributes.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]  #: state entries of each parameter
    groups: list[dict[str, Any]]  #: hyper-parameters of each parameter group
    spec: Spec
    position: Position
    kept: dict[str, Any] = field(default_factory=dict)
    loss_scale: tuple[float, ...] = ()  #: of fp16: scale, steps since it changed, steps skipped

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.model[name]

    def __iter__(self) -> Any:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.position.step


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint to the folder `path`, in place of one that is there.

    Raises: CheckpointError when a kept object can not be saved, or the folder is something else.
    """
    if path.exists() and not (path / "manifest.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not a checkpoint. Choose another path, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        _write(checkpoint, fresh)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}). The checkpoint that was there is kept."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    kept_tensors: dict[str, torch.Tensor] = {}
    kept = {name: take_apart(value, kept_tensors, name) for name, value in checkpoint.kept.items()}
    state = {
        f"{name}{SEPARATOR}{entry}": value
        for name, entries in checkpoint.optimizer.items()
        for entry, value in entries.items()
    }
    model, aliases = _without_aliases(checkpoint.model)
    manifest = {
        "format": FORMAT,
        "spec": json.loads(checkpoint.spec.to_json()),
        "position": asdict(checkpoint.position),
        "groups": [take_apart(group, kept_tensors, f"group{i}") for i, group in enumerate(checkpoint.groups)],
        "kept": kept,
        "loss_scale": checkpoint.loss_scale,
        "aliases": aliases,
    }
    for name, tensors in (("model", model), ("optimizer", state), ("kept", kept_tensors)):
        on_host = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        save_file(on_host, folder / f"{name}.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _without_aliases(model: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor once, and under which name the others are found (tied weights)."""
    first: dict[tuple[int, torch.Size], str] = {}
    unique: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor
    return unique, aliases


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint in the folder `path`, or in the `checkpoint` folder of a run directory.

    Raises: CheckpointError when there is none, or it is damaged.
    """
    folder = Path(path)
    if not (folder / "manifest.json").exists() and (folder / "checkpoint" / "manifest.json").exists():
        folder = folder / "checkpoint"
    for name in ("manifest.json", *(f"{name}.safetensors" for name in _TENSOR_FILES)):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder} is not a checkpoint: {name} is missing. Pass the folder given to run.save, "
                "or a run directory."
            )
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}; this version reads format {FORMAT}.")
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in _TENSOR_FILES}
        optimizer: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            name, _, entry = key.rpartition(SEPARATOR)
            optimizer.setdefault(name, {})[entry] = value
        model = tensors["model"]
        model.update({alias: model[name] for alias, name in manifest["aliases"].items()})
        return Checkpoint(
            model=model,
            optimizer=optimizer,
            groups=[put_together(group, tensors["kept"]) for group in manifest["groups"]],
            spec=Spec.from_json(json.dumps(manifest["spec"])),
            position=Position(**manifest["position"]),
            loss_scale=tuple(manifest.get("loss_scale", ())),
            kept={name: put_together(value, tensors["kept"]) for name, value in manifest["kept"].items()},
        )
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"the checkpoint in {folder} is damaged ({error}). Use an older one.") from error
